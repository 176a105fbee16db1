"""A step with stand-ins for its tensors: the user's own code runs on them, and nothing is computed."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import nn
from torch.utils import _pytree as pytree

from fxmem._torch import autocast_off, is_fake, symbolic_fake_mode
from fxmem.basics.sizes import by_stride, hint, tensors_in
from fxmem.graphs.capture import StepCall
from fxmem.graphs.workspace import device_at_hand


def fake_call(call: StepCall, mode: Any) -> StepCall:
    """The step on a copy of the model with fake tensors, small integers excepted."""

    def fake(tensor: torch.Tensor) -> torch.Tensor:
        return _like(tensor, mode.from_tensor(tensor.detach(), static_shapes=True))

    return _replaced(call, fake, lambda tensor: tensor.clone() if stays_real(tensor) else None)


def without_meta(call: StepCall) -> StepCall:
    """The step with fake tensors of the device at hand for its meta tensors; or the step itself.

    The meta device has kernels of its own for operators that autograd takes apart elsewhere, so a
    loss that is traced there loses its gradient.
    """
    tensors = [*_tensors_of(call.model), *pytree.tree_leaves((call.args, call.kwargs))]
    if not any(isinstance(t, torch.Tensor) and t.device.type == "meta" for t in tensors):
        return call
    mode, device = symbolic_fake_mode(), device_at_hand()

    def fake(tensor: torch.Tensor) -> torch.Tensor:
        return _twin(tensor, mode, device) if tensor.device.type == "meta" else tensor

    return _replaced(call, fake, lambda _: None)


def stand_in_call(call: StepCall) -> StepCall:
    """The step with fake tensors for all of its tensors, to be captured with; meta as above."""
    mode = symbolic_fake_mode()

    def fake(tensor: torch.Tensor) -> torch.Tensor:
        device = device_at_hand() if tensor.device.type == "meta" else tensor.device
        return _twin(tensor, mode, device)

    return _replaced(call, fake, lambda _: None)


def at_sizes(
    call: StepCall, names: Mapping[str, Mapping[int, str]], sizes: Mapping[str, int]
) -> StepCall:
    """The step with inputs of other sizes, zeros for integers; inputs of the right sizes stay."""

    def resized(place: str, value: Any) -> Any:
        dims = names.get(place)
        if not dims:
            return value
        shape = [sizes[dims[d]] if d in dims else n for d, n in enumerate(value.shape)]
        if shape == list(value.shape):
            return value
        order = by_stride(value.shape, value.stride())  # channels_last stays channels_last
        make = torch.empty if value.is_floating_point() else torch.zeros
        with getattr(value, "fake_mode", None) or contextlib.nullcontext():
            dense = make([shape[d] for d in order], dtype=value.dtype, device=value.device)
            twin = dense.permute([order.index(d) for d in range(len(order))])
        return twin.requires_grad_(value.requires_grad)

    return replace(
        call,
        args=tuple(resized(f"args[{i}]", v) for i, v in enumerate(call.args)),
        kwargs={k: resized(f"kwargs['{k}']", v) for k, v in call.kwargs.items()},
        loss_inputs=tuple(resized(f"loss_inputs[{i}]", v) for i, v in enumerate(call.loss_inputs)),
    )


def _twin(tensor: torch.Tensor, mode: Any, device: torch.device) -> torch.Tensor:
    with mode:
        twin = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device=device)
    return _like(tensor, twin)


def backward(outputs: Any, meanwhile: Callable[[int], None] = lambda _: None) -> None:
    """A scalar loss sends its gradient; without one, every differentiable output is sent ones.

    meanwhile: called with the bytes of those ones, as soon as they exist.  As with a real loss, they
    die when the step has read them.
    """
    tensors = [t for t in tensors_in(outputs) if t.requires_grad]
    losses = [t for t in tensors if t.numel() == 1]
    with autocast_off():
        if len(losses) == 1:
            losses[0].backward()
        elif tensors:
            _Loss.apply(meanwhile, *tensors).backward()


class _Loss(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, meanwhile: Callable[[int], None], *tensors: torch.Tensor) -> torch.Tensor:
        ctx.meanwhile = meanwhile
        ctx.made = [(t.shape, t.stride(), t.dtype, t.device) for t in tensors]
        return tensors[0].new_zeros((), dtype=torch.float32)

    @staticmethod
    def backward(ctx: Any, _: torch.Tensor) -> Any:
        ones = []
        for shape, strides, dtype, device in ctx.made:
            if 0 in strides:  # an expanded output: its gradient is not
                ones.append(torch.ones(shape, dtype=dtype, device=device))
            else:
                ones.append(
                    torch.empty_strided(shape, strides, dtype=dtype, device=device).fill_(1)
                )
        ctx.meanwhile(sum(hint(t.untyped_storage().nbytes()) for t in ones))
        return None, *ones


def _replaced(
    call: StepCall,
    replace: Callable[[torch.Tensor], torch.Tensor],
    special: Callable[[torch.Tensor], torch.Tensor | None],
) -> StepCall:
    """A copy of the step with each tensor replaced once; inputs may be ``special``."""
    memo: dict[int, Any] = {}

    def replaced(tensor: torch.Tensor) -> torch.Tensor:
        if id(tensor) not in memo:
            memo[id(tensor)] = replace(tensor)
        return memo[id(tensor)]

    def given(tensor: torch.Tensor) -> torch.Tensor:
        own = special(tensor)
        return replaced(tensor) if own is None else own

    for tensor in _tensors_of(call.model):
        replaced(tensor)
    args, kwargs, loss_inputs = pytree.tree_map_only(
        torch.Tensor, given, (call.args, call.kwargs, call.loss_inputs)
    )
    model = copy.deepcopy(call.model, memo)
    return StepCall(model, args, kwargs, call.loss_fn, loss_inputs)


_LARGE = 1 << 20  # elements


def stays_real(tensor: torch.Tensor) -> bool:
    """Small integers and masks, which a model may look at, on a device that holds them anyway."""
    plain = not (tensor.is_floating_point() or tensor.is_complex())
    return plain and is_small(tensor) and not is_fake(tensor)


def is_small(tensor: torch.Tensor) -> bool:
    return tensor.device.type in ("cpu", "cuda") and tensor.numel() <= _LARGE


def _like(tensor: torch.Tensor, twin: torch.Tensor) -> torch.Tensor:
    """``twin`` as a parameter or a leaf, if ``tensor`` is one."""
    if isinstance(tensor, nn.Parameter):
        return nn.Parameter(twin, requires_grad=tensor.requires_grad)
    return twin.requires_grad_(tensor.requires_grad) if tensor.is_leaf else twin


def _tensors_of(model: nn.Module) -> Any:
    """Parameters, buffers, and tensors that modules keep as plain attributes."""
    yield from model.parameters()
    yield from model.buffers()
    for module in model.modules():
        yield from (v for v in vars(module).values() if isinstance(v, torch.Tensor))
