"""Gradient layouts: each parameter's gradient leaves the step in memory that ``.grad`` may keep.

before                              after
  mm = mm(xt, g)                      mm = mm(xt, g)
  t = t(mm)                           t = t(mm)
  ...                                 t_kept = clone(t, memory_format=contiguous)
  return t                            ...
                                      return t_kept

Autograd keeps a gradient as it comes if nobody else has it and if it is laid out as its parameter.
Else it copies: after the step has returned, and so beside all other gradients, with nothing to show for
it in the graph.  Here the copy comes where autograd's own backward makes it, as soon as the gradient
is there.  Source: the layout contract in torch/csrc/autograd/functions/accumulate_grad.h.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import fx

from fxmem.basics.sizes import by_stride, hint, is_dense
from fxmem.graphs.graph import JointGraph, is_backward
from fxmem.passes.base import insert_like

aten = torch.ops.aten


@dataclass(frozen=True)
class GradientLayoutsPass:
    name: ClassVar[str] = "gradient_layouts"

    def apply(self, graph: JointGraph) -> JointGraph:
        graph = graph.copy()
        gradients, others = graph.gradients(), graph.backward_outputs()[len(graph.leaves()) :]
        taken: set[Any] = set()
        for index, (leaf, gradient) in enumerate(zip(graph.leaves(), gradients, strict=True)):
            if not isinstance(gradient, fx.Node) or not graph.inputs[leaf.name].keeps_gradient:
                continue
            if gradient in taken or not obeys_contract(gradient, leaf):
                gradients[index] = _copied(graph, gradient, leaf)
            taken.add(gradient)
        output = graph.module.graph.output_node()
        output.args = ((*graph.forward_outputs(), *gradients, *others),)
        return graph.verified()


def obeys_contract(gradient: fx.Node, leaf: fx.Node) -> bool:
    """Is the gradient laid out as ``.grad`` must be?"""
    mine, theirs = gradient.meta["val"], leaf.meta["val"]
    if mine.layout != torch.strided or theirs.layout != torch.strided:
        return True  # sparse gradients follow rules of their own
    wanted = _contract(theirs)
    return all(
        hint(have) == want
        for size, have, want in zip(mine.shape, mine.stride(), wanted, strict=True)
        if hint(size) != 1
    )


def _contract(leaf: torch.Tensor) -> list[int]:
    """The leaf's strides if it is dense, else those of a contiguous tensor."""
    if is_dense(leaf):
        return list(map(hint, leaf.stride()))
    shape = list(map(hint, leaf.shape))
    return [math.prod(shape[d + 1 :]) for d in range(len(shape))]


def _copied(graph: JointGraph, gradient: fx.Node, leaf: fx.Node) -> fx.Node:
    """A copy in the right layout, made as soon as the gradient is there."""
    order = by_stride(leaf.meta["val"].shape, _contract(leaf.meta["val"]))
    early = gradient.next if is_backward(gradient) else graph.module.graph.output_node()
    contiguous = {"memory_format": torch.contiguous_format}
    with graph.module.graph.inserting_before(early):
        if order == list(range(len(order))):
            return _insert(gradient, aten.clone.default, (gradient,), contiguous)
        seen = _insert(gradient, aten.permute.default, (gradient, order))
        copy = _insert(gradient, aten.clone.default, (seen,), contiguous)
        back = [order.index(d) for d in range(len(order))]
        return _insert(gradient, aten.permute.default, (copy, back))


def _insert(
    gradient: fx.Node, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any] | None = None
) -> fx.Node:
    node = insert_like(gradient.graph, gradient, target, args, kwargs, suffix="kept", backward=True)
    del node.meta["fxmem_origin"]  # it is made once
    return node
