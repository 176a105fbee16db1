"""Derivatives of activations in 8, 4 or 2 bits, rounded at random without bias.

The backward of y = f(x) multiplies the gradient by f'(x), whatever x was.  A code of f'(x) leaves the mean
of the result alone, where one of x would not, for f' bends.  The range of f' is known, so that a code needs
no scale.  Grids of 8 and 4 bits have points at 0 and 1, where f' is flat, so that what is far from zero has
no error; two bits are too few for that, and span the range.

One uint8 tensor holds a float32 that is added to every derivative, and codes in groups of 64 neighbours in
memory, the last one filled up; byte j of a group has those of elements j, j + 8 bits, ..., the first one
lowest.  The float32 is 0, or NaN where any derivative is not finite: then every gradient is NaN.

The derivative is aten's own, computed in float32.  Where the gradient's type is narrower, what is unbiased
is rounded to it, as aten's result is.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from fxmem.basics.errors import EncodingError
from fxmem.basics.noise import Noise
from fxmem.codes import native
from fxmem.codes.packing import (
    by_rows,
    check_bits,
    check_code,
    check_dense,
    check_float,
    define,
    fake_decoder,
    flat,
    group_count,
    join,
    laid_out,
    over,
    put,
    rows,
    split,
    stretches,
)
from fxmem.graphs.activations import ACTIVATIONS, Activation

GROUP = 64
_HEADER = 4


def grid(how: Activation, bits: int) -> tuple[float, float]:
    """``first`` and ``inside`` of points (code + first) / inside."""
    points = 2**bits
    if bits == 2 or how.high <= 1:
        inside = (points - 1) / (how.high - how.low)
        return how.low * inside, inside

    def outside(whole: int) -> int:
        return -int(how.low * whole // 1)

    # So many steps from 0 to 1 as leave enough points for what is outside.
    whole = max(n for n in range(1, points) if n + 2 * outside(n) < points)
    return -outside(whole), whole


def _activation(name: str) -> Activation:
    if name not in ACTIVATIONS:
        raise EncodingError(f"an activation is one of {', '.join(ACTIVATIONS)}, not {name!r}")
    return ACTIVATIONS[name]


def _check(dtype: torch.dtype, name: str, bits: int) -> Activation:
    check_float(dtype)
    check_bits(bits)
    return _activation(name)


def _code_nbytes(x: torch.Tensor, bits: int) -> Any:
    return _HEADER + group_count(x, GROUP) * (GROUP * bits // 8)


def _encode(
    x: torch.Tensor, activation: str, bits: int, seed: torch.Tensor | None, stream: int
) -> torch.Tensor:
    rounded = _round_natively if native.on_native(x, _native_agrees) else _round_by_torch
    return encode_by(rounded, x, activation, bits, seed, stream)


_Rounding = Callable[[torch.Tensor, torch.Tensor, tuple[float, float], int, Noise, int], None]
"""Writes words of whole groups of derivatives, by a grid, in so many bits, from a place on."""


def encode_by(
    rounded: _Rounding,
    x: torch.Tensor,
    activation: str,
    bits: int,
    seed: torch.Tensor | None,
    stream: int,
) -> torch.Tensor:
    """As the operator."""
    how, code = _check(x.dtype, activation, bits), _fake_encode(x, activation, bits, seed, stream)
    check_dense(x)
    noise, words = Noise(seed, stream, x.device), code[_HEADER:].view(-1, GROUP * bits // 8)
    added = x.new_zeros((1,), dtype=torch.float32)
    for at, end in stretches(len(words), GROUP, x.device):
        found = how.derivative(rows(flat(x), at, end, GROUP))
        added += found.sum() * 0.0  # NaN if any is not finite
        rounded(found, words[at:end], grid(how, bits), bits, noise, at * GROUP)
        del found  # before the next ones are made
    code[:_HEADER] = added.view(torch.uint8)
    return code


def _round_by_torch(
    found: torch.Tensor,
    words: torch.Tensor,
    points: tuple[float, float],
    bits: int,
    noise: Noise,
    place: int,
) -> None:
    first, inside = points
    steps = found.mul_(inside).sub_(first)
    below = steps.floor().nan_to_num_(0.0).clamp_(0, 2**bits - 2)
    share = steps.sub_(below).view(-1)
    above = torch.gt(share, noise.at(place, len(share))).view_as(below)
    words.copy_(join(below.add_(above), bits))


_round_natively = native.round_derivatives


@native.proof
def _native_agrees(device: torch.device) -> bool:
    """With the torch code, with a last group that is not full?"""
    seed = torch.full((1,), 3, dtype=torch.int64, device=device)
    x = torch.linspace(-5, 5, 5003, device=device)
    codes = [encode_by(how, x, "gelu", 4, seed, 1) for how in (_round_by_torch, _round_natively)]
    grads = [
        multiplied(x, codes[0], "gelu", 4, torch.empty_like(x))
        for multiplied in (_multiply_by_torch, _multiply_natively)
    ]
    return torch.equal(*codes) and torch.equal(*grads)


def _values(code: torch.Tensor, how: Activation, bits: int, at: int, end: int) -> torch.Tensor:
    """The derivatives of those groups: float32[end - at, GROUP]."""
    words = code[_HEADER:].view(-1, GROUP * bits // 8)[at:end]
    first, inside = grid(how, bits)
    found = over(split(words, bits).add_(first), inside)
    return found.add_(code[:_HEADER].view(torch.float32))


def _decode(
    code: torch.Tensor,
    activation: str,
    bits: int,
    size: list[int],
    stride: list[int],
    dtype: torch.dtype,
) -> torch.Tensor:
    how, found = _check(dtype, activation, bits), code.new_empty_strided(size, stride, dtype=dtype)
    check_dense(found)
    check_code(code, _code_nbytes(found, bits), found)
    for at, end in stretches(group_count(found, GROUP), GROUP, code.device):
        put(_values(code, how, bits, at, end), flat(found), at, GROUP)
    return found


def _backward(
    grad: torch.Tensor, code: torch.Tensor, order: list[int], activation: str, bits: int
) -> torch.Tensor:
    if grad.permute(order).is_contiguous():
        return _backward_out(grad, code, order, activation, bits, grad_input=torch.empty_like(grad))
    _check(grad.dtype, activation, bits)
    return torch.mul(grad, _decoded(grad, code, order, activation, bits)).to(grad.dtype)


def _decoded(
    grad: torch.Tensor, code: torch.Tensor, order: list[int], activation: str, bits: int
) -> torch.Tensor:
    """The derivatives in float32, in their own order."""
    check_code(code, _code_nbytes(grad, bits), grad)
    like = laid_out(grad, order)
    size, stride = list(like.shape), list(like.stride())
    return _decode(code, activation, bits, size, stride, torch.float32)


def _backward_out(
    grad: torch.Tensor,
    code: torch.Tensor,
    order: list[int],
    activation: str,
    bits: int,
    *,
    grad_input: torch.Tensor,
) -> torch.Tensor:
    _check(grad.dtype, activation, bits)
    if not grad.permute(order).is_contiguous():
        return grad_input.copy_(torch.mul(grad, _decoded(grad, code, order, activation, bits)))
    check_code(code, _code_nbytes(grad, bits), grad)
    natively = native.on_native(grad, _native_agrees)
    multiplied = _multiply_natively if natively else _multiply_by_torch
    return multiplied(grad, code, activation, bits, grad_input)


def _multiply_natively(
    grad: torch.Tensor, code: torch.Tensor, activation: str, bits: int, grad_input: torch.Tensor
) -> torch.Tensor:
    points = grid(ACTIVATIONS[activation], bits)
    native.multiply_derivatives(grad, code, _HEADER, points, bits, grad_input)
    return grad_input


def _multiply_by_torch(
    grad: torch.Tensor, code: torch.Tensor, activation: str, bits: int, grad_input: torch.Tensor
) -> torch.Tensor:
    how = ACTIVATIONS[activation]
    for at, end in stretches(group_count(grad, GROUP), GROUP, grad.device):
        part = flat(grad)[at * GROUP : end * GROUP]
        values = _values(code, how, bits, at, end).view(-1)[: len(part)]
        flat(grad_input)[at * GROUP : end * GROUP] = values.mul_(part)
    return grad_input


# -- Errors ------------------------------------------------------------------------------------------


def derivative_variance(x: torch.Tensor, activation: str, bits: int) -> torch.Tensor:
    """The expected squared error of each derivative, exactly: float32, laid out as ``x``."""
    how = _check(x.dtype, activation, bits)
    first, inside = grid(how, bits)

    def of(part: torch.Tensor) -> torch.Tensor:
        steps = how.derivative(part).mul_(inside).sub_(first)
        share = steps - steps.floor()
        return share.mul(1 - share).div_(inside**2)

    check_dense(x)
    return by_rows(x, GROUP, of)


def derivative_variance_average(x: torch.Tensor, activation: str, bits: int) -> torch.Tensor:
    """The same for a derivative at random between two points: step^2 / 6."""
    _, inside = grid(_check(x.dtype, activation, bits), bits)
    return torch.full_like(x, 1 / (6 * inside**2), dtype=torch.float32)


# -- As operators ------------------------------------------------------------------------------------


def _fake_encode(
    x: torch.Tensor, activation: str, bits: int, seed: torch.Tensor | None, stream: int
) -> torch.Tensor:
    _check(x.dtype, activation, bits)
    return x.new_empty((_code_nbytes(x, bits),), dtype=torch.uint8)


def _fake_backward(
    grad: torch.Tensor, code: torch.Tensor, order: list[int], activation: str, bits: int
) -> torch.Tensor:
    return torch.mul(grad, laid_out(grad, order))


encode_derivative = define(
    "encode_derivative(Tensor x, str activation, int bits, Tensor? seed, int stream) -> Tensor",
    _encode,
    _fake_encode,
)
"""What the backward saves, name, bits, seed (one int64; None: to the nearest), stream -> code."""

decode_derivative = define(
    "decode_derivative(Tensor code, str activation, int bits, SymInt[] size, SymInt[] stride, "
    "ScalarType dtype) -> Tensor",
    _decode,
    fake_decoder,
)
"""The derivative, laid out as what was saved."""

derivative_backward = define(
    "derivative_backward(Tensor grad, Tensor code, int[] order, str activation, int bits) -> Tensor",
    _backward,
    _fake_backward,
)
"""The gradient times the derivative.  order: the dimensions in which the codes lie, the outermost first."""

derivative_backward_out = define(
    "derivative_backward.grad_input(Tensor grad, Tensor code, int[] order, str activation, int bits, *, "
    "Tensor(a!) grad_input) -> Tensor(a!)",
    _backward_out,
    lambda grad, code, order, activation, bits, *, grad_input: grad_input,
)
