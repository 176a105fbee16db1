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

from fxmem.basics.sizes import as_numbers
from fxmem.codes.encodings import avg_pool2d_backward, max_pool2d_backward
from fxmem.graphs.fakes import replace_uses
from fxmem.graphs.graph import JointGraph
from fxmem.graphs.workspace import lies_plainly
from fxmem.passes.base import insert_like

aten = torch.ops.aten


@dataclass(frozen=True)
class UnreadPass:
    name: ClassVar[str] = "unread"

    def apply(self, graph: JointGraph) -> JointGraph:
        graph = graph.copy()
        for node in list(graph.nodes):
            shape = _known(node) if node.target in _REWRITES else None
            if shape is not None:
                _replace(graph.module.graph, node, shape)
        return graph.verified()


Shape = tuple[list[int], list[int]]
"""Sizes and strides."""


def _known(node: fx.Node) -> Shape | None:
    """The input's shape, if it is fixed but for the batch, and what the tensor and its gradient have."""
    grad, x, *_ = node.args
    if not isinstance(grad, fx.Node) or not isinstance(x, fx.Node):
        return None
    value: Any = x.meta["val"]
    known = value.ndim == 4 and lies_plainly(x)
    return as_numbers(value, grad.meta["val"]) if known else None


def _max_pool(node: fx.Node, shape: Shape) -> tuple[Any, tuple[Any, ...]]:
    grad, _, *how, indices = node.args
    return max_pool2d_backward, (grad, indices, *shape, *how)


def _avg_pool(node: fx.Node, shape: Shape) -> tuple[Any, tuple[Any, ...]]:
    grad, _, *how = node.args
    return avg_pool2d_backward, (grad, *shape, *how)


_REWRITES: dict[Any, Any] = {
    aten.max_pool2d_with_indices_backward.default: _max_pool,
    aten.avg_pool2d_backward.default: _avg_pool,
}


def _replace(graph: fx.Graph, node: fx.Node, shape: Shape) -> None:
    target, args = _REWRITES[node.target](node, shape)
    with graph.inserting_before(node):
        ours = insert_like(graph, node, target, args, suffix="unread", backward=True)
    del ours.meta["fxmem_origin"]  # it is made once
    replace_uses(node, ours)
    graph.erase_node(node)
