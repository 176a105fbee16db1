"""Lossless encodings: what a backward needs to know of a saved tensor, in fewer bytes than the tensor.

A rectifier's backward asks one question of each element, a dropout's another, and a max pool's where in
its window the largest one was.  One bit answers the first two, and a byte the third, where eager saves 32
and 64 bits.  Bits are packed in the order of memory, eight to a byte.

Operators work through their operands a stretch at a time, so that what they hold beside them is small.
Source of the idea: Jain et al. 2018, doi:10.1109/ISCA.2018.00070 (Gist).  Error: none, to the bit.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch

from fxmem._torch import with_batch, without_bytes
from fxmem.codes.packing import flat, laid_out, on_triton, stretch

aten = torch.ops.aten

_LIBRARY = torch.library.Library("fxmem", "FRAGMENT")


# -- Eight bits to a byte ----------------------------------------------------------------------------

_GATHER = 0x0102040810204080
_SPREAD = 0x0101010101010101
_SELECT = 0x8040201008040201 - (1 << 64)
"""Eight bytes of 0 or 1, times the first, have their bits in the top byte, the first one lowest; a byte
times the second, and the third, has each of its bits in a byte of its own."""


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


def _spread(bits: torch.Tensor, at: slice) -> torch.Tensor:
    """uint8[n] of those elements: 0, or anything else."""
    words = bits[at.start // 8 : -(-at.stop // 8)].to(torch.int64)
    words.mul_(_SPREAD).bitwise_and_(_SELECT)
    return words.view(torch.uint8)[: at.stop - at.start]


def _bits_like(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.new_empty(((tensor.numel() + 7) // 8,), dtype=torch.uint8)


def _pack(mask: torch.Tensor) -> torch.Tensor:
    if not on_triton(mask, _triton_agrees):
        return pack_by_torch(mask)
    from fxmem.codes import triton_kernels

    bits = _bits_like(mask)
    triton_kernels.pack(flat(mask), bits)
    return bits


def pack_by_torch(mask: torch.Tensor) -> torch.Tensor:
    """As the operator, on any device."""
    bits, masks = _bits_like(mask), flat(mask)
    for at in _stretches(mask):
        bits[at.start // 8 : -(-at.stop // 8)] = _packed(masks[at])
    return bits


def _triton_agrees(device: torch.device) -> bool:
    """Of masks that end within a byte."""
    from fxmem.codes import triton_kernels

    mask = torch.arange(10_007, device=device) % 7 % 3 == 0
    bits, again = _bits_like(mask), torch.empty_like(mask)
    triton_kernels.pack(mask, bits)
    triton_kernels.unpack(bits, again)
    return torch.equal(bits, pack_by_torch(mask)) and torch.equal(mask, again)


def _pack_above(x: torch.Tensor, threshold: Any) -> torch.Tensor:
    bits, xs = _bits_like(x), flat(x)
    for at in _stretches(x):
        # Not "above": what is not a number lets the gradient through.
        bits[at.start // 8 : -(-at.stop // 8)] = _packed(xs[at].le(threshold).logical_not_())
    return bits


def _pack_positive(x: torch.Tensor) -> torch.Tensor:
    bits, xs = _bits_like(x), flat(x)
    for at in _stretches(x):
        bits[at.start // 8 : -(-at.stop // 8)] = _packed(xs[at].gt(0))
    return bits


def _unpack(bits: torch.Tensor, size: list[int], strides: list[int]) -> torch.Tensor:
    mask = bits.new_empty_strided(size, strides, dtype=torch.bool)
    masks = flat(mask)
    if on_triton(mask, _triton_agrees):
        from fxmem.codes import triton_kernels

        triton_kernels.unpack(bits, masks)
        return mask
    for at in _stretches(mask):
        torch.ne(_spread(bits, at), 0, out=masks[at])
    return mask


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


def _threshold_backward(grad: torch.Tensor, bits: torch.Tensor, order: list[int]) -> torch.Tensor:
    if not _is_laid_out(grad, order):
        return aten.threshold_backward.default(grad, _ones_where(bits, grad, order), 0)
    return _threshold_backward_out(grad, bits, order, grad_input=torch.empty_like(grad))


def _fake_threshold_backward(
    grad: torch.Tensor, bits: torch.Tensor, order: list[int]
) -> torch.Tensor:
    return aten.threshold_backward.default(grad, laid_out(grad, order), 0)


def _threshold_backward_out(
    grad: torch.Tensor, bits: torch.Tensor, order: list[int], *, grad_input: torch.Tensor
) -> torch.Tensor:
    if not _is_laid_out(grad, order):
        x = _ones_where(bits, grad, order)
        return aten.threshold_backward.grad_input(grad, x, 0, grad_input=grad_input)
    grads, result = flat(grad), flat(grad_input)
    for at in _stretches(grad):
        x = _spread(bits, at).to(grad.dtype)
        aten.threshold_backward.grad_input(grads[at], x, 0, grad_input=result[at])
    return grad_input


def _leaky_relu_backward(
    grad: torch.Tensor, bits: torch.Tensor, order: list[int], slope: Any
) -> torch.Tensor:
    if not _is_laid_out(grad, order):
        x = _ones_where(bits, grad, order)
        return aten.leaky_relu_backward.default(grad, x, slope, False)
    return _leaky_relu_backward_out(grad, bits, order, slope, grad_input=torch.empty_like(grad))


def _fake_leaky_relu_backward(
    grad: torch.Tensor, bits: torch.Tensor, order: list[int], slope: Any
) -> torch.Tensor:
    x = laid_out(grad, order)
    return aten.leaky_relu_backward.default(grad, x, slope, False)


def _leaky_relu_backward_out(
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
    grads, result = flat(grad), flat(grad_input)
    for at in _stretches(grad):
        x = _spread(bits, at).to(grad.dtype)
        aten.leaky_relu_backward.grad_input(grads[at], x, slope, False, grad_input=result[at])
    return grad_input


def _dropout_backward(
    grad: torch.Tensor, bits: torch.Tensor, order: list[int], scale: float
) -> torch.Tensor:
    if not _is_laid_out(grad, order):
        mask = _ones_where(bits, grad, order).ne(0)
        return aten.native_dropout_backward.default(grad, mask, scale)
    found = torch.empty_like(grad)
    grads, result = flat(grad), flat(found)
    for at in _stretches(grad):
        mask = _spread(bits, at).ne(0)
        aten.native_dropout_backward.out(grads[at], mask, scale, out=result[at])
    return found


def _fake_dropout_backward(
    grad: torch.Tensor, bits: torch.Tensor, order: list[int], scale: float
) -> torch.Tensor:
    mask = laid_out(grad, order).ne(0)
    return aten.native_dropout_backward.default(grad, mask, scale)


# -- Where in its window the largest element is --------------------------------------------------------


def _images(tensor: torch.Tensor) -> Iterator[slice]:
    """Stretches of whole images."""
    count = len(tensor)
    step = stretch(tensor.device)
    step = max(1, step * count // max(1, tensor.numel()))
    return (slice(at, min(at + step, count)) for at in range(0, count, step))


def _corners(outputs: int, stride: int, padding: int, like: torch.Tensor) -> torch.Tensor:
    """The first row, or column, of each window; it may lie in the padding."""
    return torch.arange(outputs, device=like.device) * stride - padding


def _pool_offsets(
    indices: torch.Tensor,
    width: int,
    kernel: list[int],
    stride: list[int],
    padding: list[int],
    dilation: list[int],
) -> torch.Tensor:
    offsets = torch.empty_like(indices, dtype=torch.uint8)
    top = _corners(indices.shape[-2], stride[0], padding[0], indices)[:, None]
    left = _corners(indices.shape[-1], stride[1], padding[1], indices)
    for at in _images(indices):
        row, column = indices[at] // width, indices[at] % width
        row.sub_(top).floor_divide_(dilation[0]).mul_(kernel[1])
        offsets[at] = column.sub_(left).floor_divide_(dilation[1]).add_(row)
    return offsets


def _pool_backward(
    grad: torch.Tensor,
    offsets: torch.Tensor,
    size: list[int],
    strides: list[int],
    kernel: list[int],
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    ceil_mode: bool,
) -> torch.Tensor:
    size = with_batch(size, grad)
    found = grad.new_empty_strided(size, strides)
    top = _corners(offsets.shape[-2], stride[0], padding[0], offsets)[:, None]
    left = _corners(offsets.shape[-1], stride[1], padding[1], offsets)
    for at in _images(offsets):
        code = offsets[at].long()
        # Clamped, for the kernel trusts what it is given, also where an operator is tried on zeros.
        indices = code.div(kernel[1], rounding_mode="floor").mul_(dilation[0]).add_(top)
        code.remainder_(kernel[1]).mul_(dilation[1]).add_(left).clamp_(0, size[-1] - 1)
        indices.clamp_(0, size[-2] - 1).mul_(size[-1]).add_(code)
        x = without_bytes([len(indices), *size[1:]], strides, grad)
        found[at] = aten.max_pool2d_with_indices_backward.default(
            grad[at], x, kernel, stride, padding, dilation, ceil_mode, indices
        )
    return found


# -- Small integers ------------------------------------------------------------------------------------


def _shorten(x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    return x.to(dtype, copy=True)


def _lengthen(code: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    return code.to(dtype, copy=True)


SHORT = (torch.uint8, torch.int16, torch.int32)


def short_type(most: int) -> torch.dtype:
    """The smallest type of integers from 0 up to ``most``."""
    return next((d for d in SHORT if most <= torch.iinfo(d).max), torch.int64)


# -- Pools that look at the shape of their input alone ---------------------------------------------------


def _avg_pool2d_backward(
    grad: torch.Tensor, size: list[int], strides: list[int], *how: Any
) -> torch.Tensor:
    found: torch.Tensor = aten.avg_pool2d_backward.default(
        grad, without_bytes(with_batch(size, grad), strides, grad), *how
    )
    return found


def _max_pool2d_backward(
    grad: torch.Tensor, indices: torch.Tensor, size: list[int], strides: list[int], *how: Any
) -> torch.Tensor:
    found: torch.Tensor = aten.max_pool2d_with_indices_backward.default(
        grad, without_bytes(with_batch(size, grad), strides, grad), *how, indices
    )
    return found


# -- As operators ------------------------------------------------------------------------------------


def _fake_unpack(bits: torch.Tensor, size: list[Any], strides: list[Any]) -> torch.Tensor:
    return bits.new_empty_strided(size, strides, dtype=torch.bool)


def _fake_pool_offsets(indices: torch.Tensor, *_: Any) -> torch.Tensor:
    return torch.empty_like(indices, dtype=torch.uint8)


def _fake_avg_pool2d_backward(
    grad: torch.Tensor, size: list[Any], strides: list[Any], *_: Any
) -> torch.Tensor:
    return grad.new_empty_strided(with_batch(size, grad), strides)


def _fake_pool_backward(
    grad: torch.Tensor, offsets: torch.Tensor, size: list[Any], strides: list[Any], *_: Any
) -> torch.Tensor:
    return grad.new_empty_strided(with_batch(size, grad), strides)


for _signature, _real, _fake in (
    ("pack(Tensor mask) -> Tensor", _pack, _bits_like),
    (
        "pack_above(Tensor x, Scalar threshold) -> Tensor",
        _pack_above,
        lambda x, threshold: _bits_like(x),
    ),
    ("pack_positive(Tensor x) -> Tensor", _pack_positive, _bits_like),
    ("shorten(Tensor x, ScalarType dtype) -> Tensor", _shorten, _shorten),
    ("lengthen(Tensor code, ScalarType dtype) -> Tensor", _lengthen, _lengthen),
    (
        "leaky_relu_backward(Tensor grad, Tensor bits, int[] order, Scalar slope) -> Tensor",
        _leaky_relu_backward,
        _fake_leaky_relu_backward,
    ),
    (
        "leaky_relu_backward.grad_input(Tensor grad, Tensor bits, int[] order, Scalar slope, *, "
        "Tensor(a!) grad_input) -> Tensor(a!)",
        _leaky_relu_backward_out,
        lambda grad, bits, order, slope, *, grad_input: grad_input,
    ),
    ("unpack(Tensor bits, SymInt[] size, SymInt[] stride) -> Tensor", _unpack, _fake_unpack),
    (
        "threshold_backward(Tensor grad, Tensor bits, int[] order) -> Tensor",
        _threshold_backward,
        _fake_threshold_backward,
    ),
    (
        "threshold_backward.grad_input(Tensor grad, Tensor bits, int[] order, *, "
        "Tensor(a!) grad_input) -> Tensor(a!)",
        _threshold_backward_out,
        lambda grad, bits, order, *, grad_input: grad_input,
    ),
    (
        "dropout_backward(Tensor grad, Tensor bits, int[] order, float scale) -> Tensor",
        _dropout_backward,
        _fake_dropout_backward,
    ),
    (
        "pool_offsets(Tensor indices, SymInt width, int[] kernel, int[] stride, int[] padding, "
        "int[] dilation) -> Tensor",
        _pool_offsets,
        _fake_pool_offsets,
    ),
    (
        "pool_backward(Tensor grad, Tensor offsets, SymInt[] size, SymInt[] strides, int[] kernel, "
        "int[] stride, int[] padding, int[] dilation, bool ceil_mode) -> Tensor",
        _pool_backward,
        _fake_pool_backward,
    ),
    (
        "avg_pool2d_backward(Tensor grad, SymInt[] size, SymInt[] strides, int[] kernel, "
        "int[] stride, int[] padding, bool ceil_mode, bool count_include_pad, "
        "int? divisor_override) -> Tensor",
        _avg_pool2d_backward,
        _fake_avg_pool2d_backward,
    ),
    (
        "max_pool2d_backward(Tensor grad, Tensor indices, SymInt[] size, SymInt[] strides, "
        "int[] kernel, int[] stride, int[] padding, int[] dilation, bool ceil_mode) -> Tensor",
        _max_pool2d_backward,
        _fake_pool_backward,
    ),
):
    _LIBRARY.define(_signature)
    _name = _signature.partition("(")[0]
    _LIBRARY.impl(_name, _real, "CompositeExplicitAutograd")
    torch.library.register_fake(f"fxmem::{_name}", _fake, lib=_LIBRARY)

pack = torch.ops.fxmem.pack.default
"""bool -> bits.  The mask has no gaps."""
pack_above = torch.ops.fxmem.pack_above.default
"""Which elements are not at or below a threshold, as bits.  The operand has no gaps."""
pack_positive = torch.ops.fxmem.pack_positive.default
"""Which elements are above zero: what is not a number is not."""
shorten = torch.ops.fxmem.shorten.default
"""Integers as a shorter type, which holds them all."""
lengthen = torch.ops.fxmem.lengthen.default
unpack = torch.ops.fxmem.unpack.default
"""bits, size, strides -> bool."""
leaky_relu_backward = torch.ops.fxmem.leaky_relu_backward.default
leaky_relu_backward_out = torch.ops.fxmem.leaky_relu_backward.grad_input
threshold_backward = torch.ops.fxmem.threshold_backward.default
"""As aten's.  order: the dimensions in which the bits lie, the outermost first, as for those below."""
threshold_backward_out = torch.ops.fxmem.threshold_backward.grad_input
dropout_backward = torch.ops.fxmem.dropout_backward.default
pool_offsets = torch.ops.fxmem.pool_offsets.default
"""int64 indices into planes -> uint8 indices into windows."""
pool_backward = torch.ops.fxmem.pool_backward.default

avg_pool2d_backward = torch.ops.fxmem.avg_pool2d_backward.default
max_pool2d_backward = torch.ops.fxmem.max_pool2d_backward.default
"""aten's, with the size and the strides of the input in its place.  A batch of -1 is the gradient's."""

ENCODERS = frozenset({pack, pack_above, pack_positive, pool_offsets, shorten})
"""Operators whose result is a code of their first operand."""

MOST_IN_A_WINDOW = 256


def pool_shape(kernel: Any, stride: Any, padding: Any, dilation: Any) -> list[list[int]] | None:
    """The four as pairs; None where a byte does not count the elements of a window."""
    kernel = _pair(kernel)
    if math.prod(kernel) > MOST_IN_A_WINDOW:
        return None
    return [kernel, _pair(stride) if stride else kernel, _pair(padding), _pair(dilation)]


def _pair(value: Any) -> list[int]:
    both = list(value) if isinstance(value, (list, tuple)) else [value]
    return both * 2 if len(both) == 1 else both
