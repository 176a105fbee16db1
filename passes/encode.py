"""Encode: the backward reads a code of one bit or one byte in place of a saved tensor.

before                                    after
  a = relu(h)                               a = relu(h)
  # backward                                b = pack_above(a, 0)
  d = threshold_backward(g, a, 0)           # backward
                                            d = threshold_backward(g, b)

  y, i = max_pool2d_with_indices(a, ...)    y, i = max_pool2d_with_indices(a, ...)
  # backward                                o = pool_offsets(i, ...)
  d = max_pool2d_backward(g, i, ...)        # backward
                                            d = pool_backward(g, o, ...)

  y, m = native_dropout(x, p)               y, m = native_dropout(x, p)
  # backward                                b = pack(m)
  d = native_dropout_backward(g, m, s)      # backward
                                            d = dropout_backward(g, b, s)

The code is a value like any other: the planner keeps it, or lets it be made again.  Seconds: one reading
of the tensor and one of the code.  Error: none, to the bit.
Source of the idea: Jain et al. 2018, doi:10.1109/ISCA.2018.00070.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import fx

from fxmem.encodings import (
    dropout_backward,
    max_pool2d_backward,
    pack,
    pack_above,
    pool_backward,
    pool_offsets,
    pool_shape,
    threshold_backward,
)
from fxmem.fakes import replace_uses
from fxmem.graph import JointGraph, is_backward
from fxmem.passes.base import insert_like
from fxmem.sizes import hint, is_plain, storages_in
from fxmem.workspace import LAYOUT

aten = torch.ops.aten

_LEAST = 4096
"""Elements below which a tensor is not worth two more operators."""


@dataclass(frozen=True)
class Encoded:
    """How one node of the backward may read a code.

    source: what is encoded, by ``encoder(source, *more)``.  The code then stands in ``reader``'s arguments,
    of which ``arguments`` are the others and None its place.
    """

    source: fx.Node
    encoder: Any
    more: tuple[Any, ...]
    reader: Any
    arguments: tuple[Any, ...]

    def given(self, code: fx.Node) -> tuple[Any, ...]:
        return tuple(code if a is None else a for a in self.arguments)


@dataclass(frozen=True)
class EncodePass:
    """alone: only where nothing else in the backward reads what is encoded, so that it may go."""

    alone: bool = False
    name: ClassVar[str] = "encode"

    def apply(self, graph: JointGraph) -> JointGraph:
        graph = graph.copy()
        found = {node: None for node in graph.nodes if _encoded(node) is not None}
        held, readers = _held(graph), _backward_readers(graph)
        codes: dict[tuple[Any, ...], fx.Node] = {}
        for node in found:
            how = _encoded(node)  # one of its operands may have changed meanwhile
            assert how is not None
            keys = set(storages_in(how.source.meta["val"]))
            others = {r for key in keys for r in readers[key]} - found.keys()
            if keys & held or (self.alone and others):
                continue
            call = (how.source, how.encoder, *map(str, how.more))
            if call not in codes:
                codes[call] = _code(graph.module.graph, how)
            _replace(graph.module.graph, node, how.reader, how.given(codes[call]))
        return graph.verified()


def _held(graph: JointGraph) -> set[int]:
    """Storages that are there to the end, or the caller's, whatever the backward reads."""
    outputs = [o for o in graph.forward_outputs() if isinstance(o, fx.Node)]
    nodes = [*graph.placeholders(), *outputs]
    return {key for node in nodes for key in storages_in(node.meta.get("val"))}


def _backward_readers(graph: JointGraph) -> dict[int, set[fx.Node]]:
    """Storage -> the nodes of the backward that read it, through views of the forward or at once."""
    readers: dict[int, set[fx.Node]] = defaultdict(set)
    for node in graph.nodes:
        if is_backward(node):
            for source in node.all_input_nodes:
                for key in storages_in(source.meta.get("val")):
                    readers[key].add(node)
    return readers


# -- What can be encoded -----------------------------------------------------------------------------


def _encoded(node: fx.Node) -> Encoded | None:
    if not is_backward(node) or node.op != "call_function":
        return None
    known = _READERS.get(node.target)
    return None if known is None else known(node)


def _of_threshold(node: fx.Node) -> Encoded | None:
    args: Any = node.args
    grad, x, threshold = args
    if not (_is_saved(x) and _are_alike(grad, x)):
        return None
    return Encoded(x, pack_above, (threshold,), threshold_backward, (grad, None))


def _of_dropout(node: fx.Node) -> Encoded | None:
    args: Any = node.args
    grad, mask, scale = args
    if not (_is_saved(mask) and _are_alike(grad, mask)):
        return None
    return Encoded(mask, pack, (), dropout_backward, (grad, None, scale))


def _of_max_pool(node: fx.Node) -> Encoded | None:
    args: Any = node.args
    grad, indices, size, strides, kernel, stride, padding, dilation, ceil_mode = args
    how = pool_shape(kernel, stride, padding, dilation)
    if how is None or not (_is_saved(indices) and _is_plain(grad)):
        return None
    given = (grad, None, size, strides, *how, ceil_mode)
    return Encoded(indices, pool_offsets, (size[-1], *how), pool_backward, given)


_READERS: dict[Any, Callable[[fx.Node], Encoded | None]] = {
    aten.threshold_backward.default: _of_threshold,
    aten.native_dropout_backward.default: _of_dropout,
    max_pool2d_backward: _of_max_pool,
}


def _is_saved(x: Any) -> bool:
    """Does the forward make it, as memory without gaps that is worth a code?"""
    if not isinstance(x, fx.Node) or is_backward(x) or x.op != "call_function" or LAYOUT in x.meta:
        return False
    value: Any = x.meta["val"]
    return is_plain(value) and hint(value.numel()) >= _LEAST


def _are_alike(grad: Any, x: fx.Node) -> bool:
    """Are both laid out in the same order, so that elements meet their bits?"""
    if not _is_plain(grad):
        return False
    mine, theirs = grad.meta["val"], x.meta["val"]
    return bool(mine.shape == theirs.shape and mine.stride() == theirs.stride())


def _is_plain(x: Any) -> bool:
    return isinstance(x, fx.Node) and LAYOUT not in x.meta and is_plain(x.meta["val"])


# -- Rewriting ---------------------------------------------------------------------------------------


def _code(graph: fx.Graph, how: Encoded) -> fx.Node:
    args = (how.source, *how.more)
    with graph.inserting_after(how.source):
        code = insert_like(graph, how.source, how.encoder, args, suffix="code", backward=False)
    del code.meta["fxmem_origin"]
    return code


def _replace(graph: fx.Graph, node: fx.Node, reader: Any, args: tuple[Any, ...]) -> None:
    with graph.inserting_before(node):
        ours = insert_like(graph, node, reader, args, suffix="coded", backward=True)
    del ours.meta["fxmem_origin"]
    replace_uses(node, ours)
    graph.erase_node(node)
