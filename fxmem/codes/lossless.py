"""What a backward may read as a code, and which code: the lossless encodings.

Some readers have an operator of their own that reads the code.  Any other reads what is decoded right
before it, which then takes the tensor's bytes for that moment alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import sympy
import torch
from torch import fx

from fxmem.basics.sizes import by_stride, hint, is_dense
from fxmem.codes import encodings
from fxmem.graphs.graph import is_backward
from fxmem.graphs.workspace import LAYOUT, lies_plainly

aten = torch.ops.aten

LEAST = 4096
"""Elements below which a tensor is not worth two more operators."""

ELEMENTS = sympy.Symbol("n", integer=True, nonnegative=True)
"""How many elements a tensor has."""


@dataclass(frozen=True)
class Reading:
    """How one node of the backward may read a code of ``source``, one of its arguments.

    more: what the encoder takes beside it.  reader: what reads the code in the node's place, with
    ``arguments``, where None stands for the code.  Without one the node stays, and reads in the place of
    ``source`` what ``decoder`` makes of the code and ``decoded``; None: and its sizes and strides.
    """

    source: fx.Node
    more: tuple[Any, ...] = ()
    reader: Any = None
    arguments: tuple[Any, ...] = ()
    decoder: Any = None
    decoded: tuple[Any, ...] | None = ()


Finder = Callable[[fx.Node], Iterator[Reading]]
"""The readings of a node; none where a code would not do."""


@dataclass(frozen=True)
class Encoding:
    """A form of a tensor in fewer bytes, with no error for those that read it.

    nbytes: of the code of a tensor of ``ELEMENTS`` elements.  encoder: operator from the tensor, and more,
    to the code.  readers: by operator of the backward, how it reads the code; under None, how any does.
    """

    name: str
    nbytes: sympy.Expr
    encoder: Any
    readers: Mapping[Any, Finder] = field(repr=False)

    def readings(self, node: fx.Node) -> Iterator[Reading]:
        for key in (node.target, None):
            if key in self.readers:
                yield from self.readers[key](node)


# -- What can be encoded -----------------------------------------------------------------------------


def _is_saved(x: Any) -> bool:
    """Does the forward make it, as memory without gaps that is worth a code?"""
    if not isinstance(x, fx.Node) or is_backward(x) or x.op != "call_function" or LAYOUT in x.meta:
        return False
    value: Any = x.meta.get("val")
    return isinstance(value, torch.Tensor) and is_dense(value) and hint(value.numel()) >= LEAST


def _order(x: Any) -> list[int]:
    """The dimensions in which the elements lie in memory, the outermost first."""
    value: Any = x.meta["val"]
    return by_stride(value.shape, value.stride())


def _meet(grad: Any, x: Any) -> bool:
    """Is there an element of the gradient for each of the other, which the forward saves?

    The step of a dimension of size 1 means nothing, and operators choose it each in their own way.
    """
    if not isinstance(grad, fx.Node) or not _is_saved(x):
        return False
    mine, theirs = grad.meta["val"], x.meta["val"]
    if mine.shape != theirs.shape:
        return False
    return 1 not in map(hint, theirs.shape) or (lies_plainly(grad) and lies_plainly(x))


def _holds(dtype: torch.dtype, bound: Any) -> bool:
    """Is the bound a number of this type?  Kernels compare numbers of 16 bits with the bound as it is."""
    return dtype.itemsize > 2 or torch.tensor(bound, dtype=dtype).item() == float(bound)


def _of_threshold(node: fx.Node) -> Iterator[Reading]:
    grad, x, threshold = _arguments(node)
    if _meet(grad, x) and _holds(x.meta["val"].dtype, threshold):
        given = (grad, None, _order(x))
        yield Reading(x, (threshold,), encodings.threshold_backward, given)


def _of_leaky_relu(node: fx.Node) -> Iterator[Reading]:
    grad, x, slope, _ = _arguments(node)
    if _meet(grad, x):
        given = (grad, None, _order(x), slope)
        yield Reading(x, (), encodings.leaky_relu_backward, given)


def _of_dropout(node: fx.Node) -> Iterator[Reading]:
    grad, mask, scale = _arguments(node)
    if _meet(grad, mask):
        given = (grad, None, _order(mask), scale)
        yield Reading(mask, (), encodings.dropout_backward, given)


def _arguments(node: fx.Node) -> Any:
    return node.args


def _of_max_pool(node: fx.Node) -> Iterator[Reading]:
    grad, indices, size, strides, kernel, stride, padding, dilation, ceil_mode = _arguments(node)
    how = encodings.pool_shape(kernel, stride, padding, dilation)
    plain = isinstance(grad, fx.Node) and _is_saved(indices) and lies_plainly(indices)
    if how is not None and plain and lies_plainly(grad):
        given = (grad, None, size, strides, *how, ceil_mode)
        yield Reading(indices, (size[-1], *how), encodings.pool_backward, given)


def _of_bool(node: fx.Node) -> Iterator[Reading]:
    """Any reader: of a mask."""
    for mask in node.all_input_nodes:
        if _is_saved(mask) and mask.meta["val"].dtype is torch.bool:
            yield Reading(mask, (), decoder=encodings.unpack, decoded=None)


def _of_indices(short: torch.dtype, node: fx.Node) -> Iterator[Reading]:
    """Any reader: of indices that are known to be small, for they point into one dimension, or a few."""
    for indices in node.all_input_nodes:
        most = _largest_index(indices)
        if most is None or not _is_saved(indices):
            continue
        dtype = indices.meta["val"].dtype
        if short is encodings.short_type(most) and short.itemsize < dtype.itemsize:
            yield Reading(indices, (short,), decoder=encodings.lengthen, decoded=(dtype,))


_DIMENSION: dict[Any, int] = {
    aten.max.dim: 1,
    aten.min.dim: 1,
    aten.median.dim: 1,
    aten.nanmedian.dim: 1,
    aten.mode.default: 1,
    aten.kthvalue.default: 2,
    aten.topk.default: 2,
    aten.sort.default: 1,
    aten.sort.stable: 2,
}
"""Operators whose second result points into one dimension of the first argument: which argument it is."""

_PLANES: dict[Any, int] = {
    aten.max_pool2d_with_indices.default: 2,
    aten.max_pool3d_with_indices.default: 3,
    aten.adaptive_max_pool2d.default: 2,
    aten.adaptive_max_pool3d.default: 3,
}
"""Operators whose second result points into so many of the last dimensions at once."""


def _largest_index(node: fx.Node) -> int | None:
    """The largest value that a tensor of indices can have; None where nobody knows."""
    if getattr(node.target, "__name__", "") != "getitem" or node.args[1] != 1:
        return None
    maker: Any = node.args[0]
    if maker.target not in _PLANES and maker.target not in _DIMENSION:
        return None
    source: Any = maker.args[0].meta["val"]
    if maker.target in _PLANES:
        sizes = list(source.shape[-_PLANES[maker.target] :])
    elif source.ndim:
        place = _DIMENSION[maker.target]
        dim = maker.args[place] if len(maker.args) > place else maker.kwargs.get("dim", -1)
        sizes = [source.shape[dim]]
    else:
        return None
    most = 1
    for size in sizes:
        if not isinstance(size, int):
            return None
        most *= size
    return most - 1


# -- The table -----------------------------------------------------------------------------------------

_BITS = sympy.ceiling(ELEMENTS / 8)

LOSSLESS: tuple[Encoding, ...] = (
    Encoding(
        "above", _BITS, encodings.pack_above, {aten.threshold_backward.default: _of_threshold}
    ),
    Encoding(
        "positive",
        _BITS,
        encodings.pack_positive,
        {aten.leaky_relu_backward.default: _of_leaky_relu},
    ),
    Encoding(
        "mask",
        _BITS,
        encodings.pack,
        {aten.native_dropout_backward.default: _of_dropout, None: _of_bool},
    ),
    Encoding(
        "offset",
        ELEMENTS,
        encodings.pool_offsets,
        {encodings.max_pool2d_backward: _of_max_pool},
    ),
    *(
        Encoding(
            f"short {short.itemsize}",
            short.itemsize * ELEMENTS,
            encodings.shorten,
            {None: partial(_of_indices, short)},
        )
        for short in encodings.SHORT
    ),
)
