"""Gradients of pools in operators of aten, which Inductor has loops for, in place of ours.

before                                                   after
  d = max_pool2d_backward(g, i, shape of x, ...)           x = constant_pad_nd(g, to the size of x)
                                                           d = max_pool2d_with_indices_backward(g, x, ..)

An operator of ours is closed to a compiler: what it reads has to lie in memory.  In loops the gradient is
made where it is read, and indices that are kept as bytes are not first written as 64 bits.  Of ``x`` the
loops read the shape alone, so that it is never made; it lies as ``g`` does, where Inductor has moved the
channels innermost as well.  A large window has no loops, and keeps the operator, and so does an average
that rounds its size up, see ``_torch/average_pools.py``.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, fx

from fxmem._torch.inductor import indices_of_offsets
from fxmem.codes import encodings

aten = torch.ops.aten

LARGEST = 25
"""Windows over one element of the input, for which Inductor has loops."""


def fusible(node: fx.Node) -> Callable[..., Tensor] | None:
    """What to run in the node's place, on its arguments; None where the node stays."""
    args: Any = node.args
    if node.target is encodings.avg_pool2d_backward:
        kernel, stride, _, ceil_mode, *_ = args[3:]
        return _average if not ceil_mode and _windows(kernel, stride) <= LARGEST else None
    if node.target in _MAXIMA:
        kernel, stride, _, dilation, _ = args[4:]
        is_dense = all(d == 1 for d in dilation)
        has_loops = is_dense and _windows(kernel, stride) <= LARGEST
        return _MAXIMA[node.target] if has_loops else None
    return None


def _windows(kernel: Sequence[int], stride: Sequence[int]) -> int:
    """At most so many of them overlap."""
    return math.prod(-(-k // s) for k, s in zip(kernel, stride or kernel, strict=True))


def _average(grad: Tensor, size: list[int], _: list[int], *how: Any) -> Tensor:
    found: Tensor = aten.avg_pool2d_backward.default(grad, _sized(grad, size), *how)
    return found


def _maximum(grad: Tensor, indices: Tensor, size: list[int], _: list[int], *how: Any) -> Tensor:
    x = _sized(grad, size)
    found: Tensor = aten.max_pool2d_with_indices_backward.default(grad, x, *how, indices)
    return found


def _by_offsets(
    grad: Tensor, offsets: Tensor, size: list[int], strides: list[int], *how: Any
) -> Tensor:
    kernel, *window, _ = how
    indices = indices_of_offsets(offsets, kernel, size[-2:], *window)
    return _maximum(grad, indices, size, strides, *how)


_MAXIMA: dict[Any, Callable[..., Tensor]] = {
    encodings.max_pool2d_backward: _maximum,
    encodings.pool_backward: _by_offsets,
}


def _sized(grad: Tensor, size: list[int]) -> Tensor:
    """A tensor of that height and width, of which no element is read."""
    (height, width), (rows, columns) = size[-2:], grad.shape[-2:]
    found: Tensor = aten.constant_pad_nd.default(grad, [0, width - columns, 0, height - rows])
    return found
