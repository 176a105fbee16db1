"""Codes of one bit in operators that a compiler fuses with their neighbours, in place of ours.

To a compiler an operator of ours is closed: what it reads has to lie in memory, and so has what it makes.
In operators of aten a mask is packed where it is computed, and unpacked where it is read.

The bits lie in another order than in ``encodings.py``, for loops that read neighbours and write them.  The
outer dimensions in memory are cut into eight blocks: a batch of 16 into eight of 2, or 2 images of 64 rows
into four blocks of 16 rows each.  A byte has the elements at one place of all eight, the first block's
lowest.  Tensors that cannot be cut so, or whose sizes change, keep the operators of ours, and so does what
reads their codes.  Error: none, to the bit.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx

from fxmem.basics.sizes import by_stride
from fxmem.codes import encodings
from fxmem.codes.packing import define

aten = torch.ops.aten


# -- Eight blocks --------------------------------------------------------------------------------------


def _blocks(sizes: Sequence[Any]) -> list[int] | None:
    """Into how many parts each dimension is cut, eight in all; None where that does not come out even.

    sizes: in the order of memory, the outermost first.  The innermost one stays whole.
    """
    if not all(isinstance(n, int) for n in sizes) or 0 in sizes:
        return None
    innermost = max((d for d, n in enumerate(sizes) if n != 1), default=0)
    parts, left = [1] * len(sizes), 8
    for d, n in enumerate(sizes[:innermost]):
        parts[d] = math.gcd(n, left)
        left //= parts[d]
    return parts if left == 1 else None


def _cut(sizes: Sequence[int], parts: Sequence[int]) -> tuple[list[int], list[int], list[int]]:
    """Sizes with each dimension as two, a part and a place in it; those of the parts, and of the places."""
    places = [n // part for n, part in zip(sizes, parts, strict=True)]
    pairs = list(zip(parts, places, strict=True))
    return (
        [n for pair in pairs for n in pair],
        [n for part in parts for n in (part, 1)],
        [n for place in places for n in (1, place)],
    )


def _planes(mask: Tensor, order: list[int]) -> list[Tensor]:
    """The blocks, views of the mask.  order: of the dimensions in memory, the outermost first."""
    inner = mask.permute(order)
    parts = _blocks(inner.shape)
    assert parts is not None
    both, *_ = _cut(inner.shape, parts)
    cut = inner.reshape(both)
    places = itertools.product(*map(range, parts))
    return [cut[tuple(i for part in place for i in (part, slice(None)))] for place in places]


def _packed(mask: Tensor, order: list[int]) -> Tensor:
    """bool -> uint8[n / 8].  Shifts are of 32 bits, for which there are vectors."""
    bits, *others = (plane.to(torch.int32) for plane in _planes(mask, order))
    for n, plane in enumerate(others, 1):
        bits = bits | (plane << n)
    return bits.to(torch.uint8).reshape(-1)


def _unpacked(bits: Tensor, shape: Sequence[int], order: list[int]) -> Tensor:
    """uint8[n / 8] -> bool of that shape."""
    sizes = [shape[d] for d in order]
    parts = _blocks(sizes)
    assert parts is not None
    _, blocks, places = _cut(sizes, parts)
    which = torch.arange(8, dtype=torch.int32, device=bits.device).reshape(blocks)
    ones = (bits.reshape(places).to(torch.int32) >> which).bitwise_and(1).ne(0)
    return ones.reshape(sizes).permute([order.index(d) for d in range(len(order))])


def _pack_planes(mask: Tensor, order: list[int]) -> Tensor:
    bits, *others = _planes(mask.view(torch.uint8), order)
    bits = bits.clone(memory_format=torch.contiguous_format)
    for n, plane in enumerate(others, 1):
        bits.add_(plane, alpha=2**n)
    return bits.view(-1)


pack_planes = define(
    "pack_planes(Tensor mask, int[] order) -> Tensor",
    _pack_planes,
    lambda mask, _: mask.new_empty((mask.numel() // 8,), dtype=torch.uint8),
)
"""The same from a mask that lies in memory: Inductor's own loops over a mask are slow on a CPU."""


# -- In the place of our operators ---------------------------------------------------------------------


def _pack(node: fx.Node, order: list[int]) -> Callable[..., Tensor]:
    mask: Any = node.args[0]
    lies = torch.Tag.pointwise not in getattr(mask.target, "tags", ())
    if lies and mask.meta["val"].device.type == "cpu":
        return lambda mask: pack_planes(mask, order)
    return lambda mask: _packed(mask, order)


def _pack_above(_: fx.Node, order: list[int]) -> Callable[..., Tensor]:
    # Not "above": what is not a number lets the gradient through.
    return lambda x, threshold: _packed(x.le(threshold).logical_not(), order)


def _pack_positive(_: fx.Node, order: list[int]) -> Callable[..., Tensor]:
    return lambda x: _packed(x.gt(0), order)


_ENCODERS: Mapping[Any, Callable[[fx.Node, list[int]], Callable[..., Tensor]]] = {
    encodings.pack: _pack,
    encodings.pack_above: _pack_above,
    encodings.pack_positive: _pack_positive,
}


def _threshold_backward(grad: Tensor, bits: Tensor, order: list[int]) -> Tensor:
    return torch.where(_unpacked(bits, grad.shape, order), grad, 0.0)


def _leaky_relu_backward(grad: Tensor, bits: Tensor, order: list[int], slope: Any) -> Tensor:
    return torch.where(_unpacked(bits, grad.shape, order), grad, grad * slope)


def _dropout_backward(grad: Tensor, bits: Tensor, order: list[int], scale: float) -> Tensor:
    mask = _unpacked(bits, grad.shape, order)
    return aten.native_dropout_backward.default(grad, mask, scale)


_READERS: Mapping[Any, Callable[..., Tensor]] = {
    encodings.threshold_backward: _threshold_backward,
    encodings.leaky_relu_backward: _leaky_relu_backward,
    encodings.dropout_backward: _dropout_backward,
}


def _unpack(bits: Tensor, size: list[int], strides: list[int]) -> Tensor:
    return _unpacked(bits, size, by_stride(size, strides))


def _convert(x: Tensor, dtype: torch.dtype) -> Tensor:
    return x.to(dtype)


def fusible(node: fx.Node) -> Callable[..., Any] | None:
    """What to run in the node's place, on its arguments; None where the node stays.

    The metadata of its operands says how they lie in memory.
    """
    args: Any = node.args
    if node.target in (encodings.shorten, encodings.lengthen):
        return _convert
    if node.target in _ENCODERS:
        value = args[0].meta["val"]
        order = by_stride(value.shape, value.stride())
        if _blocks([value.shape[d] for d in order]) is not None:
            return _ENCODERS[node.target](node, order)
    elif node.target in _READERS:
        shape, order = args[0].meta["val"].shape, args[2]
        if _blocks([shape[d] for d in order]) is not None:
            return _READERS[node.target]
    elif node.target is encodings.unpack:
        size, strides = args[1:]
        if _blocks([size[d] for d in by_stride(size, strides)]) is not None:
            return _unpack
    return None
