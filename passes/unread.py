"""Unread: a pool's backward looks at the shape of its input and at no element, so it gets the shape.

before                                          after
  y, i = max_pool2d_with_indices(a, ...)          y, i = max_pool2d_with_indices(a, ...)
  # backward                                      # backward
  d = max_pool2d_with_indices_backward(g, a, ..)  d = max_pool2d_backward(g, i, shape of a, ...)

Seconds and error: none.  Autograd saves the input all the same.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import fx

from fxmem.encodings import avg_pool2d_backward, max_pool2d_backward
from fxmem.fakes import replace_uses
from fxmem.graph import JointGraph
from fxmem.passes.base import insert_like
from fxmem.sizes import is_plain
from fxmem.workspace import LAYOUT

aten = torch.ops.aten


@dataclass(frozen=True)
class UnreadPass:
    name: ClassVar[str] = "unread"

    def apply(self, graph: JointGraph) -> JointGraph:
        graph = graph.copy()
        for node in list(graph.nodes):
            if node.target in _REWRITES and _is_known(node.args[1]):
                _replace(graph.module.graph, node)
        return graph.verified()


def _is_known(x: Any) -> bool:
    """Are the sizes and the strides fixed, those that the tensor really has, and the gradient's, too?"""
    if not isinstance(x, fx.Node) or LAYOUT in x.meta:
        return False
    value: Any = x.meta["val"]
    fixed = all(isinstance(n, int) for n in (*value.shape, *value.stride()))
    return value.ndim == 4 and fixed and is_plain(value)


def _max_pool(node: fx.Node, shape: tuple[Any, Any]) -> tuple[Any, tuple[Any, ...]]:
    grad, _, *how, indices = node.args
    return max_pool2d_backward, (grad, indices, *shape, *how)


def _avg_pool(node: fx.Node, shape: tuple[Any, Any]) -> tuple[Any, tuple[Any, ...]]:
    grad, _, *how = node.args
    return avg_pool2d_backward, (grad, *shape, *how)


_REWRITES: dict[Any, Any] = {
    aten.max_pool2d_with_indices_backward.default: _max_pool,
    aten.avg_pool2d_backward.default: _avg_pool,
}


def _replace(graph: fx.Graph, node: fx.Node) -> None:
    value: Any = node.args[1].meta["val"]  # type: ignore[union-attr]
    target, args = _REWRITES[node.target](node, (list(value.shape), list(value.stride())))
    with graph.inserting_before(node):
        ours = insert_like(graph, node, target, args, suffix="unread", backward=True)
    del ours.meta["fxmem_origin"]  # it is made once
    replace_uses(node, ours)
    graph.erase_node(node)
