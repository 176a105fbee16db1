"""Split convolutions: the weight's gradient first, then the input's, for which the input may die.

before                                          after
  c  = convolution_backward(g, x, w, ...,         c  = convolution_backward(g, x, w, ...,
           [True, True, True])                             [False, True, True])
  gx = c[0]                                       gx = convolution_input_backward(g, w, shape of x, ...)
  gw = c[1]                                       gw = c[1]

One call holds the input, the gradient that comes and the one that goes, all three large.  Of two
calls none does: the second reads no element of x, and x may be gone by then.  Seconds: one more launch,
and whatever the kernel reorders for both gradients at once.  Error: none, to the bit, for either way
each gradient comes from a kernel of its own (on CUDA, too, where nobody has measured it yet).
"""

from __future__ import annotations

import operator
from collections import defaultdict
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import fx

from fxmem.basics.sizes import as_numbers, hint, storages_in
from fxmem.graphs.convolution import convolution_input_backward, reads_shape_alone
from fxmem.graphs.fakes import replace_uses
from fxmem.graphs.graph import JointGraph
from fxmem.graphs.workspace import LAYOUT
from fxmem.passes.base import insert_like

aten = torch.ops.aten


@dataclass(frozen=True)
class SplitConvolutionPass:
    name: ClassVar[str] = "split_convolution"

    def apply(self, graph: JointGraph) -> JointGraph:
        graph = graph.copy()
        dying = _last_read(graph)
        for node in graph.nodes:
            if node.target is aten.convolution_backward.default and _is_worth_it(node, dying[node]):
                _split(graph.module.graph, node)
        return graph.verified()


def _is_worth_it(node: fx.Node, dying: set[int]) -> bool:
    """Do both gradients come of it, does its input die there, and is it known to be unread?

    The weight's gradient is there while the input's is made, which in one call comes first: an input
    that is smaller does not make up for it.
    """
    _, x, weight, bias_sizes, *how, mask = node.args
    if not (mask[0] and mask[1] and _results(node, 0) and _results(node, 1)):  # type: ignore[index]
        return False
    if not isinstance(x, fx.Node) or not isinstance(weight, fx.Node) or LAYOUT in x.meta:
        return False
    if _shape(node) is None or not dying.issuperset(storages_in(x.meta["val"])):
        return False
    values = (_as_in_the_example(x.meta["val"]), weight.meta["val"])
    if values[0].numel() < values[1].numel():
        return False
    return reads_shape_alone(*values, bias_sizes, tuple(how))


def _shape(node: fx.Node) -> tuple[list[int], list[int]] | None:
    """The input's sizes and strides; None where more than the batch is no constant."""
    grad, x, weight = (n.meta["val"] for n in node.args[:3])  # type: ignore[union-attr]
    fixed = all(isinstance(size, int) for size in weight.shape)
    return as_numbers(x, grad) if fixed else None


def _as_in_the_example(value: torch.Tensor) -> torch.Tensor:
    """A fake tensor of the same sizes as numbers, of which questions may be asked that fix them."""
    return value.new_empty_strided([*map(hint, value.shape)], [*map(hint, value.stride())])


def _last_read(graph: JointGraph) -> dict[fx.Node, set[int]]:
    """Node -> the storages that nobody reads after it, through whatever view; never the caller's."""
    last = {
        key: node
        for node in graph.nodes
        for source in node.all_input_nodes
        for key in storages_in(source.meta.get("val"))
    }
    for node in graph.placeholders():
        for key in storages_in(node.meta.get("val")):
            last.pop(key, None)
    dying: dict[fx.Node, set[int]] = defaultdict(set)
    for key, node in last.items():
        dying[node].add(key)
    return dying


def _split(graph: fx.Graph, node: fx.Node) -> None:
    grad, _, weight, bias_sizes, *how, mask = node.args
    shape = _shape(node)
    assert shape is not None  # it is worth it
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
