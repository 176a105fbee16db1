"""Split convolutions: the weight's gradient first, then the input's, for which the input may die.

before                                          after
  c  = convolution_backward(g, x, w, ...,         c  = convolution_backward(g, x, w, ...,
           [True, True, True])                             [False, True, True])
  gx = c[0]                                       gx = convolution_input_backward(g, w, shape of x, ...)
  gw = c[1]                                       gw = c[1]

One call holds the input, the gradient that comes and the one that goes, all three large.  Of two
calls none does: the second reads no element of x, and x may be gone by then.  Seconds: those of one
more call, about a hundredth of a large convolution's.  Error: none, for either way each gradient comes
from a kernel of its own.
"""

from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import fx

from fxmem.convolution import convolution_input_backward, reads_shape_alone
from fxmem.fakes import replace_uses
from fxmem.graph import JointGraph
from fxmem.passes.base import insert_like
from fxmem.sizes import storages_in, tensors_in
from fxmem.workspace import LAYOUT

aten = torch.ops.aten


@dataclass(frozen=True)
class SplitConvolutionPass:
    name: ClassVar[str] = "split_convolution"

    def apply(self, graph: JointGraph) -> JointGraph:
        graph = graph.copy()
        resident = {key for n in graph.placeholders() for key in storages_in(n.meta.get("val"))}
        for node in graph.nodes:
            if node.target is aten.convolution_backward.default and _is_worth_it(node, resident):
                _split(graph.module.graph, node)
        return graph.verified()


def _is_worth_it(node: fx.Node, resident: set[int]) -> bool:
    """Do both gradients come of it, may the input die in between, and is it known to be unread?"""
    _, x, weight, bias_sizes, *how, mask = node.args
    if not (mask[0] and mask[1] and _results(node, 0) and _results(node, 1)):  # type: ignore[index]
        return False
    if not isinstance(x, fx.Node) or not isinstance(weight, fx.Node) or LAYOUT in x.meta:
        return False
    if resident.issuperset(storages_in(x.meta["val"])):
        return False
    values = (node.meta["val"], *(i.meta["val"] for i in node.all_input_nodes))
    if any(not isinstance(size, int) for t in tensors_in(values) for size in t.shape):
        return False
    return reads_shape_alone(x.meta["val"], weight.meta["val"], bias_sizes, tuple(how))


def _split(graph: fx.Graph, node: fx.Node) -> None:
    grad, x, weight, bias_sizes, *how, mask = node.args
    value: Any = x.meta["val"]  # type: ignore[union-attr]
    shape = (list(value.shape), list(value.stride()))
    first, *others = _results(node, 0)
    with graph.inserting_before(first):
        alone = insert_like(
            graph,
            node,
            convolution_input_backward,
            (grad, weight, *shape, bias_sizes, *how),
            suffix="input",
            backward=True,
        )
    del alone.meta["fxmem_origin"]  # it is made once
    for result in (first, *others):
        replace_uses(result, alone)
        graph.erase_node(result)
    node.args = (*node.args[:-1], [False, *mask[1:]])  # type: ignore[index,misc]
    node.meta["val"] = (None, *node.meta["val"][1:])
    for changed in (node, alone):
        changed.meta.pop(LAYOUT, None)


def _results(node: fx.Node, place: int) -> list[fx.Node]:
    """The nodes that take one result out of the tuple, for somebody to read."""
    taken = (n for n in node.users if n.target is operator.getitem and n.args[1] == place)
    return [n for n in taken if n.users]
