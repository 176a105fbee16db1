"""One bit for each element, packed in the order of memory, and the backwards that read bits.

Of float32 and of masks on the CPU they are loops in C, of masks on an accelerator kernels of Triton's, and
else torch's operators, a stretch of the operands at a time, so that what they hold beside them is small.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch

from fxmem.codes import native
from fxmem.codes.packing import flat, laid_out, on_triton, stretch

aten = torch.ops.aten

_GATHER = 0x0102040810204080
_SPREAD = 0x0101010101010101
_SELECT = 0x8040201008040201 - (1 << 64)
"""Eight bytes of 0 or 1, times the first, have their bits in the top byte, the first one lowest; a byte
times the second, and the third, has each of its bits in a byte of its own."""


# -- Packing -------------------------------------------------------------------------------------------


def bits_like(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.new_empty(((tensor.numel() + 7) // 8,), dtype=torch.uint8)


def pack(mask: torch.Tensor) -> torch.Tensor:
    if on_triton(mask, _triton_agrees):
        return _pack_by_triton(mask)
    if native.on_native(mask, _native_agrees, torch.bool):
        return _pack_natively(mask)
    return pack_by_torch(mask)


def _pack_by_triton(mask: torch.Tensor) -> torch.Tensor:
    from fxmem.codes import triton_kernels

    bits = bits_like(mask)
    triton_kernels.pack(flat(mask), bits)
    return bits


def _pack_natively(mask: torch.Tensor) -> torch.Tensor:
    bits = bits_like(mask)
    native.pack(mask, bits)
    return bits


def pack_by_torch(mask: torch.Tensor) -> torch.Tensor:
    return _packed_where(mask, lambda part: part)


def pack_above(x: torch.Tensor, threshold: Any) -> torch.Tensor:
    if native.on_native(x, _native_agrees):
        return _pack_above_natively(x, threshold)
    return _pack_above_by_torch(x, threshold)


def _pack_above_natively(x: torch.Tensor, threshold: Any) -> torch.Tensor:
    bits = bits_like(x)
    native.pack_above(x, threshold, bits)
    return bits


def _pack_above_by_torch(x: torch.Tensor, threshold: Any) -> torch.Tensor:
    # Not "above": what is not a number lets the gradient through.
    return _packed_where(x, lambda part: part.le(threshold).logical_not_())


def pack_positive(x: torch.Tensor) -> torch.Tensor:
    if native.on_native(x, _native_agrees):
        return _pack_positive_natively(x)
    return _pack_positive_by_torch(x)


def _pack_positive_natively(x: torch.Tensor) -> torch.Tensor:
    bits = bits_like(x)
    native.pack_positive(x, bits)
    return bits


def _pack_positive_by_torch(x: torch.Tensor) -> torch.Tensor:
    return _packed_where(x, lambda part: part.gt(0))


def _packed_where(x: torch.Tensor, asked: Callable[[torch.Tensor], torch.Tensor]) -> torch.Tensor:
    bits, xs = bits_like(x), flat(x)
    for at in _stretches(x):
        bits[at.start // 8 : -(-at.stop // 8)] = _packed(asked(xs[at]))
    return bits


def _stretches(tensor: torch.Tensor) -> Iterator[slice]:
    """Slices of the flat tensor, each but the last a multiple of eight elements long."""
    length, step = tensor.numel(), stretch(tensor.device)
    return (slice(at, min(at + step, length)) for at in range(0, length, step))


def _packed(mask: torch.Tensor) -> torch.Tensor:
    """uint8[ceil(n / 8)] of bool[n]."""
    tail = -len(mask) % 8
    if tail:
        mask = torch.cat([mask, mask.new_zeros(tail)])
    words = (
        mask.view(torch.int64) if mask.storage_offset() % 8 == 0 else mask.clone().view(torch.int64)
    )
    return (words * _GATHER).bitwise_right_shift_(56).to(torch.uint8)


# -- Unpacking -----------------------------------------------------------------------------------------


def unpack(bits: torch.Tensor, size: list[int], strides: list[int]) -> torch.Tensor:
    mask = fake_unpack(bits, size, strides)
    if on_triton(mask, _triton_agrees):
        from fxmem.codes import triton_kernels

        triton_kernels.unpack(bits, flat(mask))
    elif native.on_native(mask, _native_agrees, torch.bool):
        native.unpack(bits, mask)
    else:
        _unpack_by_torch(bits, mask)
    return mask


def _unpack_by_torch(bits: torch.Tensor, mask: torch.Tensor) -> None:
    masks = flat(mask)
    for at in _stretches(mask):
        torch.ne(_spread(bits, at), 0, out=masks[at])


def fake_unpack(bits: torch.Tensor, size: list[Any], strides: list[Any]) -> torch.Tensor:
    return bits.new_empty_strided(size, strides, dtype=torch.bool)


def _spread(bits: torch.Tensor, at: slice) -> torch.Tensor:
    """uint8[n] of those elements: 0, or anything else."""
    words = bits[at.start // 8 : -(-at.stop // 8)].to(torch.int64)
    words.mul_(_SPREAD).bitwise_and_(_SELECT)
    return words.view(torch.uint8)[: at.stop - at.start]


# -- Backwards that read bits ------------------------------------------------------------------------


def _is_laid_out(grad: torch.Tensor, order: list[int]) -> bool:
    """Do the gradient's elements lie in the order of the bits?  It may come otherwise at times."""
    return grad.permute(order).is_contiguous()


def _ones_where(bits: torch.Tensor, grad: torch.Tensor, order: list[int]) -> torch.Tensor:
    """The tensor that was encoded, laid out as it was, as zeros and ones of the gradient's type."""
    found = laid_out(grad, order)
    ones = flat(found)
    for at in _stretches(found):
        ones[at] = _spread(bits, at).ne(0)
    return found


def _parts(
    grad: torch.Tensor, bits: torch.Tensor, found: torch.Tensor
) -> Iterator[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
    """Stretches of a gradient, of what has its bits, and of the result."""
    grads, results = flat(grad), flat(found)
    return ((grads[at], _spread(bits, at), results[at]) for at in _stretches(grad))


def threshold_backward(grad: torch.Tensor, bits: torch.Tensor, order: list[int]) -> torch.Tensor:
    if not _is_laid_out(grad, order):
        return aten.threshold_backward.default(grad, _ones_where(bits, grad, order), 0)
    return threshold_backward_out(grad, bits, order, grad_input=torch.empty_like(grad))


def fake_threshold_backward(
    grad: torch.Tensor, bits: torch.Tensor, order: list[int]
) -> torch.Tensor:
    return aten.threshold_backward.default(grad, laid_out(grad, order), 0)


def threshold_backward_out(
    grad: torch.Tensor, bits: torch.Tensor, order: list[int], *, grad_input: torch.Tensor
) -> torch.Tensor:
    if not _is_laid_out(grad, order):
        x = _ones_where(bits, grad, order)
        return aten.threshold_backward.grad_input(grad, x, 0, grad_input=grad_input)
    if native.on_native(grad, _native_agrees):
        native.threshold_backward(grad, bits, grad_input)
    else:
        _threshold_backward_by_torch(grad, bits, grad_input)
    return grad_input


def _threshold_backward_by_torch(
    grad: torch.Tensor, bits: torch.Tensor, found: torch.Tensor
) -> None:
    for g, x, result in _parts(grad, bits, found):
        aten.threshold_backward.grad_input(g, x.to(g.dtype), 0, grad_input=result)


def leaky_relu_backward(
    grad: torch.Tensor, bits: torch.Tensor, order: list[int], slope: Any
) -> torch.Tensor:
    if not _is_laid_out(grad, order):
        x = _ones_where(bits, grad, order)
        return aten.leaky_relu_backward.default(grad, x, slope, False)
    return leaky_relu_backward_out(grad, bits, order, slope, grad_input=torch.empty_like(grad))


def fake_leaky_relu_backward(
    grad: torch.Tensor, bits: torch.Tensor, order: list[int], slope: Any
) -> torch.Tensor:
    x = laid_out(grad, order)
    return aten.leaky_relu_backward.default(grad, x, slope, False)


def leaky_relu_backward_out(
    grad: torch.Tensor,
    bits: torch.Tensor,
    order: list[int],
    slope: Any,
    *,
    grad_input: torch.Tensor,
) -> torch.Tensor:
    if not _is_laid_out(grad, order):
        x = _ones_where(bits, grad, order)
        return aten.leaky_relu_backward.grad_input(grad, x, slope, False, grad_input=grad_input)
    if native.on_native(grad, _native_agrees):
        native.leaky_relu_backward(grad, bits, slope, grad_input)
    else:
        _leaky_relu_backward_by_torch(grad, bits, slope, grad_input)
    return grad_input


def _leaky_relu_backward_by_torch(
    grad: torch.Tensor, bits: torch.Tensor, slope: Any, found: torch.Tensor
) -> None:
    for g, x, result in _parts(grad, bits, found):
        aten.leaky_relu_backward.grad_input(g, x.to(g.dtype), slope, False, grad_input=result)


def dropout_backward(
    grad: torch.Tensor, bits: torch.Tensor, order: list[int], scale: float
) -> torch.Tensor:
    if not _is_laid_out(grad, order):
        mask = _ones_where(bits, grad, order).ne(0)
        return aten.native_dropout_backward.default(grad, mask, scale)
    found = torch.empty_like(grad)
    if native.on_native(grad, _native_agrees):
        native.dropout_backward(grad, bits, scale, found)
    else:
        _dropout_backward_by_torch(grad, bits, scale, found)
    return found


def _dropout_backward_by_torch(
    grad: torch.Tensor, bits: torch.Tensor, scale: float, found: torch.Tensor
) -> None:
    for g, x, result in _parts(grad, bits, found):
        aten.native_dropout_backward.out(g, x.ne(0), scale, out=result)


def fake_dropout_backward(
    grad: torch.Tensor, bits: torch.Tensor, order: list[int], scale: float
) -> torch.Tensor:
    mask = laid_out(grad, order).ne(0)
    return aten.native_dropout_backward.default(grad, mask, scale)


# -- Do they agree? --------------------------------------------------------------------------------------


def _triton_agrees(device: torch.device) -> bool:
    """Of masks that end within a byte."""
    from fxmem.codes import triton_kernels

    mask = torch.arange(10_007, device=device) % 7 % 3 == 0
    bits, again = bits_like(mask), torch.empty_like(mask)
    triton_kernels.pack(mask, bits)
    triton_kernels.unpack(bits, again)
    return torch.equal(bits, pack_by_torch(mask)) and torch.equal(mask, again)


@native.proof
def _native_agrees(device: torch.device) -> bool:
    """Of numbers of all kinds, as many as end within a byte."""
    x = torch.linspace(-3, 3, 1003, device=device)
    x[::17], x[5::19], x[7::23], x[11::29] = torch.nan, torch.inf, -0.0, -torch.inf
    return all(_alike(*both) for both in _compared(x))


def _compared(x: torch.Tensor) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """The same by the loops and by torch's operators."""
    mask, grad = x > 0, x.flip(0)
    bits = pack_by_torch(mask)
    yield _pack_natively(mask), bits
    yield _pack_positive_natively(x), _pack_positive_by_torch(x)
    yield _pack_above_natively(x, 0.7), _pack_above_by_torch(x, 0.7)
    again = torch.empty_like(mask), torch.empty_like(mask)
    native.unpack(bits, again[0])
    _unpack_by_torch(bits, again[1])
    yield again
    backwards: tuple[tuple[Callable[..., None], Callable[..., None], tuple[Any, ...]], ...] = (
        (native.threshold_backward, _threshold_backward_by_torch, ()),
        (native.leaky_relu_backward, _leaky_relu_backward_by_torch, (0.01,)),
        (native.dropout_backward, _dropout_backward_by_torch, (1 / 0.9,)),
    )
    for by_loops, by_torch, more in backwards:
        found = torch.empty_like(grad), torch.empty_like(grad)
        by_loops(grad, bits, *more, found[0])
        by_torch(grad, bits, *more, found[1])
        yield found


def _alike(left: torch.Tensor, right: torch.Tensor) -> bool:
    """The same bits; what is not a number may be another one that is not."""
    if not left.is_floating_point():
        return torch.equal(left, right)
    numbers = ~right.isnan()
    words = (t[numbers].view(torch.int32) for t in (left, right))
    return torch.equal(numbers, ~left.isnan()) and torch.equal(*words)
