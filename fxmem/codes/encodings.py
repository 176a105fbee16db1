"""Lossless encodings: what a backward needs to know of a saved tensor, in fewer bytes than the tensor.

A rectifier's backward asks one question of each element, a dropout's another, and a max pool's where in
its window the largest one was.  One bit answers the first two (bits.py), and a byte the third (pools.py),
where eager saves 32 and 64 bits.

Operators work through their operands a stretch at a time, so that what they hold beside them is small.
Source of the idea: Jain et al. 2018, doi:10.1109/ISCA.2018.00070 (Gist).  Error: none, to the bit.
"""

from __future__ import annotations

import math
from typing import Any

import torch

from fxmem._torch import with_batch, without_bytes
from fxmem.codes import bits, pools

aten = torch.ops.aten

_LIBRARY = torch.library.Library("fxmem", "FRAGMENT")


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


def _fake_avg_pool2d_backward(
    grad: torch.Tensor, size: list[Any], strides: list[Any], *_: Any
) -> torch.Tensor:
    return grad.new_empty_strided(with_batch(size, grad), strides)


for _signature, _real, _fake in (
    ("pack(Tensor mask) -> Tensor", bits.pack, bits.bits_like),
    (
        "pack_above(Tensor x, Scalar threshold) -> Tensor",
        bits.pack_above,
        lambda x, threshold: bits.bits_like(x),
    ),
    ("pack_positive(Tensor x) -> Tensor", bits.pack_positive, bits.bits_like),
    ("shorten(Tensor x, ScalarType dtype) -> Tensor", _shorten, _shorten),
    ("lengthen(Tensor code, ScalarType dtype) -> Tensor", _lengthen, _lengthen),
    (
        "leaky_relu_backward(Tensor grad, Tensor bits, int[] order, Scalar slope) -> Tensor",
        bits.leaky_relu_backward,
        bits.fake_leaky_relu_backward,
    ),
    (
        "leaky_relu_backward.grad_input(Tensor grad, Tensor bits, int[] order, Scalar slope, *, "
        "Tensor(a!) grad_input) -> Tensor(a!)",
        bits.leaky_relu_backward_out,
        lambda grad, bits, order, slope, *, grad_input: grad_input,
    ),
    (
        "unpack(Tensor bits, SymInt[] size, SymInt[] stride) -> Tensor",
        bits.unpack,
        bits.fake_unpack,
    ),
    (
        "threshold_backward(Tensor grad, Tensor bits, int[] order) -> Tensor",
        bits.threshold_backward,
        bits.fake_threshold_backward,
    ),
    (
        "threshold_backward.grad_input(Tensor grad, Tensor bits, int[] order, *, "
        "Tensor(a!) grad_input) -> Tensor(a!)",
        bits.threshold_backward_out,
        lambda grad, bits, order, *, grad_input: grad_input,
    ),
    (
        "dropout_backward(Tensor grad, Tensor bits, int[] order, float scale) -> Tensor",
        bits.dropout_backward,
        bits.fake_dropout_backward,
    ),
    (
        "pool_offsets(Tensor indices, SymInt width, int[] kernel, int[] stride, int[] padding, "
        "int[] dilation) -> Tensor",
        pools.pool_offsets,
        pools.fake_pool_offsets,
    ),
    (
        "pool_backward(Tensor grad, Tensor offsets, SymInt[] size, SymInt[] strides, int[] kernel, "
        "int[] stride, int[] padding, int[] dilation, bool ceil_mode) -> Tensor",
        pools.pool_backward,
        pools.fake_pool_backward,
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
        pools.fake_pool_backward,
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
