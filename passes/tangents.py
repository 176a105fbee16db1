"""Undefined tangents: the gradients that nobody sends need no zeros.

before                                     after UndefinedTangentsPass(("tangents_2",))
  tangents_2: f32[B, V] = input              tangents_2: f32[B, V] = input
  # backward                                 # backward
  g = add(tangents_2, h)                     r = relu_backward(h)
  r = relu_backward(g)                       return r, None
  u = mm(tangents_3, w)
  return r, u

A model that returns its loss and its logits gets a gradient for the loss alone.  Autograd leaves
the other one undefined, and so the step should neither make zeros for it nor add them.  Gradients
are linear in the tangents, so zero travels through every operator below; where one is not known to
be linear, zeros are made after all.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import fx

from fxmem.basics.sizes import hint
from fxmem.graphs.fakes import replace_uses, same_strides
from fxmem.graphs.graph import JointGraph, has_effect, is_backward, is_view, operator_name
from fxmem.passes.base import insert_like
from fxmem.passes.strides import replace_with_other_strides

aten = torch.ops.aten

_SUMS = {aten.add.Tensor, aten.sub.Tensor}
_LINEAR = {
    "_to_copy", "bmm", "cat", "clone", "constant_pad_nd", "copy", "div", "index", "index_put",
    "masked_fill", "mean", "mm", "mul", "neg", "select_scatter", "slice_scatter", "squeeze", "stack",
    "sum", "where", "_unsafe_index", "unfold", "gather", "index_select", "flip", "roll", "repeat",
    "addmm", "convolution", "contiguous", "_unsafe_view", "_reshape_copy", "as_strided_scatter",
}  # fmt: skip


@dataclass(frozen=True)
class UndefinedTangentsPass:
    """tangents: names of the placeholders that will be undefined."""

    tangents: tuple[str, ...]
    name: ClassVar[str] = "undefined_tangents"

    def apply(self, graph: JointGraph) -> JointGraph:
        graph = graph.copy()
        _Zeros(graph, self.tangents).spread()
        graph.module.graph.eliminate_dead_code(has_effect)
        return graph.verified()


class _Zeros:
    """Nodes known to be zero, and nodes that depend on a tangent at all."""

    def __init__(self, graph: JointGraph, tangents: tuple[str, ...]) -> None:
        self.graph = graph
        self.zero = {n for n in graph.nodes if n.name in tangents}
        self.varying = {n for n in graph.nodes if n.op == "placeholder" and is_backward(n)}

    def spread(self) -> None:
        if not self.zero:
            return
        output = node = self.graph.module.graph.output_node()
        while (node := node.next) is not output:  # what is inserted on the way is visited, too
            if node.op == "call_function":
                self._visit(node)
        unreached = self.varying - self._reached()
        values = self.graph.outputs()
        output.args = (tuple(None if o in unreached else o for o in values),)

    def _reached(self) -> set[fx.Node]:
        """What a tangent that is defined leads to: autograd leaves all other gradients undefined."""
        reached = {n for n in self.varying if n.op == "placeholder" and n not in self.zero}
        for node in self.graph.nodes:
            if node.op == "call_function" and reached.intersection(node.all_input_nodes):
                reached.add(node)
        return reached

    def _visit(self, node: fx.Node) -> None:
        varying = [i for i in node.all_input_nodes if i in self.varying]
        if not varying:
            return
        self.varying.add(node)
        zeros = [i for i in varying if i in self.zero]
        if not zeros:
            return
        if node.target in _SUMS and len(varying) == 2 and len(zeros) == 1:
            self._skip_sum(node, zeros[0])
        elif len(zeros) == len(varying) and _keeps_zero(node, zeros):
            self.zero.add(node)
        else:
            self._materialize(node, zeros)

    def _skip_sum(self, node: fx.Node, zero: fx.Node) -> None:
        """a + 0 is a, where shapes and types agree and a is not scaled.

        It is a in a's own layout, as it is in eager: later sums add up in the order of the layout.
        """
        left, right = node.args[:2]
        other = right if left is zero else left
        negated = node.target is aten.sub.Tensor and left is zero
        scaled = node.kwargs.get("alpha", 1) != 1 and right is other
        if not isinstance(other, fx.Node) or negated or scaled or not _same_type(node, other):
            self._materialize(node, [zero])
        elif same_strides(node.meta["val"], other.meta["val"]):
            replace_uses(node, other)
        elif not replace_with_other_strides(node, other):
            self._materialize(node, [zero])

    def _materialize(self, node: fx.Node, zeros: list[fx.Node]) -> None:
        for zero in zeros:
            with self.graph.module.graph.inserting_before(node):
                node.replace_input_with(zero, _zeros_like(zero))


def _zeros_like(node: fx.Node) -> fx.Node:
    """Zeros laid out as the node's value is: views below it were traced for those strides."""
    value: Any = node.meta["val"]
    order = sorted(range(value.ndim), key=lambda dim: -hint(value.stride(dim)))
    kwargs = {"dtype": value.dtype, "device": value.device}
    shape = [value.shape[dim] for dim in order]
    made = insert_like(
        node.graph, node, aten.full.default, (shape, 0), kwargs, suffix="zeros", backward=True
    )
    if order == list(range(value.ndim)):
        return made
    back = [order.index(dim) for dim in range(value.ndim)]
    return insert_like(
        node.graph, node, aten.permute.default, (made, back), suffix="zeros_like", backward=True
    )


def _keeps_zero(node: fx.Node, zeros: list[fx.Node]) -> bool:
    """Is the result zero when these inputs, all that depend on a tangent, are zero?"""
    name = operator_name(node)
    if is_view(node) or name == "getitem" or "backward" in name:
        return True
    if name == "div":
        return node.args[0] in zeros
    if node.target in _SUMS:
        return all(a in zeros for a in node.args[:2])
    if name in ("where", "cat", "stack", "index_put", "masked_fill", "select_scatter", "addmm"):
        return _only_zeros_or_constants(node, zeros)
    return name in _LINEAR


def _only_zeros_or_constants(node: fx.Node, zeros: list[fx.Node]) -> bool:
    """These combine values by adding or choosing: every floating operand must be zero."""
    return all(i in zeros or not _is_floating(i) for i in node.all_input_nodes) and not any(
        isinstance(a, (int, float))
        and not isinstance(a, bool)
        and a != 0
        and operator_name(node) == "masked_fill"
        for a in node.args
    )


def _is_floating(node: fx.Node) -> bool:
    value = node.meta.get("val")
    return isinstance(value, torch.Tensor) and value.dtype.is_floating_point


def _same_type(node: fx.Node, other: fx.Node) -> bool:
    mine: Any = node.meta.get("val")
    theirs: Any = other.meta.get("val")
    return mine.shape == theirs.shape and mine.dtype == theirs.dtype
