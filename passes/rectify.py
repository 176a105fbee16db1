"""Rectify: a convolution whose result only a rectifier reads is one operator with it.

before                                    after
  c = convolution(x, w, ...)                a = convolution_relu(x, w, ...)
  a = relu(c)

A rectifier that runs for the first time may take its operand's memory; one that runs again in the
backward may not, and holds both.  As one operator it always does.  Nobody can keep c then, which only
the rectifier would read.  Seconds and error: none.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import fx

from fxmem.graphs.convolution import convolution_relu
from fxmem.graphs.fakes import replace_uses
from fxmem.graphs.graph import JointGraph, is_backward
from fxmem.graphs.workspace import lies_plainly
from fxmem.passes.base import insert_like

aten = torch.ops.aten


@dataclass(frozen=True)
class RectifyPass:
    name: ClassVar[str] = "rectify"

    def apply(self, graph: JointGraph) -> JointGraph:
        graph = graph.copy()
        for node in list(graph.nodes):
            if node.target is aten.relu.default and not is_backward(node):
                convolution = node.args[0]
                if isinstance(convolution, fx.Node) and _is_only_for(convolution, node):
                    _join(graph.module.graph, convolution, node)
        return graph.verified()


def _is_only_for(convolution: fx.Node, relu: fx.Node) -> bool:
    """And do both lay their results out alike?"""
    if convolution.target is not aten.convolution.default or convolution.kwargs:
        return False
    plain = lies_plainly(convolution) and lies_plainly(relu)
    alike = convolution.meta["val"].stride() == relu.meta["val"].stride()
    return plain and alike and list(convolution.users) == [relu]


def _join(graph: fx.Graph, convolution: fx.Node, relu: fx.Node) -> None:
    args = tuple(convolution.args)
    with graph.inserting_before(relu):
        both = insert_like(graph, relu, convolution_relu, args, suffix="joined", backward=False)
    del both.meta["fxmem_origin"]  # it is made once
    replace_uses(relu, both)
    graph.erase_node(relu)
    graph.erase_node(convolution)
