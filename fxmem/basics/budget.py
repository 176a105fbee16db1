"""Budgets: what a person may ask for, read once, and what it comes to in bytes."""

from __future__ import annotations

import inspect
import math
import re
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction
from numbers import Integral, Rational, Real
from typing import Any, Literal, NoReturn

import torch

from fxmem._torch import new_fake_mode
from fxmem.basics.device import free_memory, total_memory
from fxmem.basics.errors import BudgetError
from fxmem.basics.units import NUMBER, format_bytes, parse_bytes, shown

Kind = Literal["bytes", "device_share", "baseline_share", "auto", "min"]

ACCEPTED = """\
  accepted: bytes, as an int or as "20GiB", "20GB", "512MiB" (also MB, KiB, KB);
    "80%", or a float between 0 and 1: share of the device's total memory;
    "0.5x": share of what the unchanged step peaks at;
    "auto": what is free on the device now;  "min": the smallest peak any plan reaches"""

_PERCENT = re.compile(rf"({NUMBER}) *%")
_TIMES = re.compile(rf"({NUMBER}) *[xX]")


@dataclass(frozen=True)
class Budget:
    """What was asked for; ``resolve`` says what that is in bytes.

    amount: bytes for "bytes", a share for the two shares, 0 for "auto" and "min".
    asked: the budget as the user wrote it, for messages and reports.
    """

    kind: Kind
    amount: Fraction
    asked: str

    @staticmethod
    def parse(value: object) -> Budget:
        """Read any form that ACCEPTED lists; raises BudgetError with the likely meaning."""
        if isinstance(value, Budget):
            return value
        if isinstance(value, str):
            return _parse_text(value)
        if isinstance(value, bool):
            _refuse(value, "it is a bool")
        # numpy registers its scalars with these abstract types, so both kinds come through here.
        if isinstance(value, Integral):
            return _parse_int(int(value))
        if isinstance(value, Real) and not isinstance(value, Rational):
            return _parse_float(float(value))
        _refuse(value, f"it is of type {type(value).__name__}")

    def resolve(self, *, device: torch.device, baseline_peak: int, reserve: int) -> int | None:
        """Bytes that the step may hold at its peak; None for "min", which names no bytes.

        ``reserve`` bytes lie outside the step but inside the budget, so they are taken off every
        form but "0.5x": there both sides are the step's own peak. baseline_peak: bytes, the peak
        of the unchanged step. Raises BudgetError if nothing is left, or if the device's memory
        cannot be found.
        """
        if self.kind == "min":
            return None
        if self.kind == "baseline_share":
            return self._left(int(self.amount * baseline_peak), 0)
        return self._left(self._whole(device), reserve)

    def __str__(self) -> str:
        return self.asked

    def _whole(self, device: torch.device) -> int:
        if self.kind == "auto":
            return free_memory(device)
        if self.kind == "device_share":
            return int(self.amount * total_memory(device))
        return int(self.amount)

    def _left(self, whole: int, reserve: int) -> int:
        if whole > reserve:
            return whole - reserve
        smaller = ", or a smaller reserve" if reserve else ""
        raise BudgetError(
            "nothing is left for the step\n"
            f"  budget {self.asked}: {format_bytes(whole)} ({whole} bytes)\n"
            f"  reserve: {format_bytes(reserve)} ({reserve} bytes)\n"
            f"  try a budget above {format_bytes(max(whole, reserve))}{smaller}"
        )


@dataclass(frozen=True)
class Reserve:
    """Bytes to keep free for what lies outside the step.

    in_8_bits: of them, what an optimizer would free that stores its moments in 8 bits.  what: their
    name among categories, "optimizer state" where they are that.
    """

    nbytes: int
    in_8_bits: int = 0
    what: str = "reserve"

    @property
    def categories(self) -> dict[str, int]:
        """The bytes by their name, or nothing."""
        return {self.what: self.nbytes} if self.nbytes else {}


NO_RESERVE = Reserve(0)


def read_reserve(reserve: int | str | torch.optim.Optimizer) -> Reserve:
    """What to keep free for what lies outside the step.

    reserve: bytes as an int (zero too) or as "2GiB"; or an optimizer, for the bytes of its state
    on its parameters' devices: counted if the state exists, else what one ``step()`` would
    create. The optimizer is only read. Raises BudgetError if the value cannot be read, or if the
    optimizer's state cannot be told ahead.
    """
    if isinstance(reserve, torch.optim.Optimizer):
        return _optimizer_reserve(reserve)
    if isinstance(reserve, str):
        try:
            return Reserve(parse_bytes(reserve))
        except BudgetError as error:
            raise BudgetError(f"reserve: {error}\n{_ACCEPTED_RESERVES}") from None
    if isinstance(reserve, Integral) and not isinstance(reserve, bool) and reserve >= 0:
        return Reserve(int(reserve))
    raise BudgetError(f"cannot read {shown(reserve)} as a reserve\n{_ACCEPTED_RESERVES}")


_ACCEPTED_RESERVES = (
    '  accepted: bytes, as an int of at least 0 or as "2GiB"; or a torch.optim.Optimizer'
)


# Reading


def _parse_text(text: str) -> Budget:
    bare = text.strip()
    if bare.lower() == "auto":
        return Budget("auto", Fraction(0), text)
    if bare.lower() == "min":
        return Budget("min", Fraction(0), text)
    if percent := _PERCENT.fullmatch(bare):
        return _parse_percent(text, Fraction(percent[1]))
    if times := _TIMES.fullmatch(bare):
        return _parse_times(text, Fraction(times[1]))
    return _parse_bytes(text)


def _parse_percent(text: str, percent: Fraction) -> Budget:
    if percent == 0:
        _refuse(text, 'it is nothing at all; "min" asks for the smallest peak')
    if percent > 100:
        times = f'"{float(percent / 100):g}x"'
        _refuse(text, f"no device holds more than 100%; did you mean {times} the unchanged peak?")
    return Budget("device_share", percent / 100, text)


def _parse_times(text: str, times: Fraction) -> Budget:
    if times == 0:
        _refuse(text, 'it is nothing at all; "min" asks for the smallest peak')
    return Budget("baseline_share", times, text)


def _parse_bytes(text: str) -> Budget:
    share = _as_share(text)
    if share is not None:
        _refuse(
            text, f'it has no unit; did you mean "{float(share * 100):g}%" or "{text.strip()}x"?'
        )
    try:
        nbytes = parse_bytes(text)
    except BudgetError as error:
        raise BudgetError(f"{error}\n{ACCEPTED}") from None
    if nbytes == 0:
        _refuse(text, 'it is nothing at all; "min" asks for the smallest peak')
    return Budget("bytes", Fraction(nbytes), text)


def _as_share(text: str) -> Fraction | None:
    """The share that text such as "0.8" most likely means."""
    if not re.fullmatch(NUMBER, text.strip()):
        return None
    number = Fraction(text.strip())
    return number if 0 < number < 1 else None


def _parse_int(nbytes: int) -> Budget:
    if nbytes < 0:
        _refuse(nbytes, "it is negative")
    if nbytes == 0:
        _refuse(nbytes, 'it is nothing at all; "min" asks for the smallest peak')
    return Budget("bytes", Fraction(nbytes), str(nbytes))


def _parse_float(share: float) -> Budget:
    if not math.isfinite(share):
        _refuse(share, "it is not a finite number")
    if share <= 0:
        _refuse(share, "a share of the device must be above 0")
    if share == 1:
        _refuse(share, 'did you mean "100%" of the device, or 1 byte?')
    if share > 1:
        _refuse(share, f"a float is a share, below 1; did you mean {_bytes_meant(share)}?")
    # Through its text: 0.8 is meant as 4/5, not as the binary fraction nearest to it.
    return Budget("device_share", Fraction(str(share)), str(share))


def _bytes_meant(number: float) -> str:
    if number >= 2**20:
        return f"the int {int(number)}"
    return f'"{number:g}GiB", or the int {int(number)}'


def _refuse(value: object, why: str) -> NoReturn:
    raise BudgetError(f"cannot read {shown(value)} as a budget: {why}\n{ACCEPTED}")


# Optimizers


def _optimizer_reserve(optimizer: torch.optim.Optimizer) -> Reserve:
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    devices = {parameter.device for parameter in parameters}
    if any(optimizer.state.values()):
        return _reserve_for(_storages(optimizer.state, devices))
    try:
        states = [_state_after_one_step(optimizer, group) for group in optimizer.param_groups]
        return _reserve_for(_storages(states, devices))
    # An optimizer is anybody's code: whatever stops it on fake tensors, the rule of thumb is next.
    except Exception as error:
        name = type(optimizer).__name__
        if "adam" in name.lower():
            # Two moments, each of the parameter's size and type.
            moments = [_local(p).to("meta") for p in parameters for _ in range(2)]
            return _reserve_for(moments)
        raise BudgetError(
            f"cannot tell what {name} will hold: its step fails on fake tensors ({error})\n"
            '  give the bytes instead, such as reserve="2GiB", or call step() once before'
        ) from error


_BLOCK, _SCALE, _LEAST_ELEMENTS = 256, 4, 4096
"""Of 8-bit moments: elements that share a scale, its bytes, and elements below which none are.

Source: Dettmers et al. 2022, arXiv:2110.02861, and bitsandbytes' defaults (min_8bit_size).
"""


def _reserve_for(tensors: list[torch.Tensor]) -> Reserve:
    """The tensors are one for each storage."""
    whole = sum(tensor.untyped_storage().nbytes() for tensor in tensors)
    freed = sum(tensor.nbytes - _in_8_bits(tensor) for tensor in tensors)
    return Reserve(whole, freed, "optimizer state")


def _in_8_bits(tensor: torch.Tensor) -> int:
    """Bytes of a moment in 8 bits; what is no moment, or too small to be one, stays as it is."""
    if not tensor.is_floating_point() or tensor.numel() < _LEAST_ELEMENTS:
        return tensor.nbytes
    return min(tensor.nbytes, tensor.numel() + _SCALE * math.ceil(tensor.numel() / _BLOCK))


def _state_after_one_step(optimizer: torch.optim.Optimizer, group: dict[str, Any]) -> object:
    """The state that ``optimizer`` would have for ``group``: fake tensors, by a copy's own step."""
    with new_fake_mode(), torch.no_grad():
        fakes = [_fake_with_grad(parameter) for parameter in group["params"]]
        copy = object.__new__(type(optimizer))
        # Only what every optimizer saves of itself: a learning-rate schedule, for one, replaces
        # `step` on the instance by a function that is bound to the real optimizer.
        saved = {
            "defaults": dict(optimizer.defaults),
            "state": defaultdict(dict),
            "param_groups": [{**group, "params": fakes}],
        }
        copy.__setstate__(saved)
        try:
            # Unwrapped, so that no hook that watches optimizers hears of this step.
            inspect.unwrap(type(optimizer).step)(copy)
        except Exception:
            # Some read a tensor's value, which fakes have not; but by then the state is there.
            if not all(copy.state[fake] for fake in fakes if fake.grad is not None):
                raise
        return copy.state


def _fake_with_grad(parameter: torch.Tensor) -> torch.Tensor:
    like = _local(parameter)
    fake = torch.empty(like.shape, dtype=like.dtype, device=like.device)
    if parameter.requires_grad:
        fake.grad = torch.empty_like(fake)
    return fake


def _storages(state: object, devices: set[torch.device]) -> list[torch.Tensor]:
    """The tensors in ``state`` that lie on ``devices``, one for each distinct storage."""
    here = [_local(tensor) for tensor in _tensors(state) if tensor.device in devices]
    # One storage has one Python object for as long as something holds it.
    owners = [(tensor.untyped_storage(), tensor) for tensor in here]
    return list({id(storage): tensor for storage, tensor in owners}.values())


def _tensors(state: object) -> Iterator[torch.Tensor]:
    if isinstance(state, torch.Tensor):
        yield state
    elif isinstance(state, dict):
        for value in state.values():
            yield from _tensors(value)
    elif isinstance(state, (list, tuple)):
        for value in state:
            yield from _tensors(value)


def _local(tensor: torch.Tensor) -> torch.Tensor:
    """This rank's part of a distributed tensor; any other tensor as it is."""
    to_local = getattr(tensor, "to_local", None)
    return tensor if to_local is None else to_local()
