"""In place: an operator writes its result over an operand that nobody reads afterwards.

before                              after
  add = add(g1, g2)                   add = add(g1, g2, out=g1)
  gx = gelu_backward(add, x)          gx = gelu_backward(add, x, grad_input=add)
  return gx                           return gx

A training step is at its peak in the backward, where each of these would hold two gradients at once.
Autograd adds up gradients in place, too.  Models that say ``relu_`` or ``+=`` do it in the forward;
capture makes fresh memory of that, and this puts it back.  A phase writes only over what it made
itself: never over a saved tensor in the backward, a tangent or anything that the caller has or gets.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import fx

from fxmem.fakes import look, refresh
from fxmem.graph import JointGraph, is_backward, is_view
from fxmem.sizes import storages_in
from fxmem.workspace import LAYOUT

aten = torch.ops.aten

# Elementwise operators on TensorIterator, which reads an element before it writes there and accepts
# a destination that is one of the operands: ATen/MemoryOverlap.h.  Each with the variant that takes
# a destination, and the keyword for it, or None if it is always the first operand.  ``mul_.Scalar``
# is none: it rounds the scalar to half first.  ``relu.out`` is none: it copies.
_DESTINATIONS: dict[Any, tuple[Any, str | None]] = {
    aten.add.Tensor: (aten.add.out, "out"),
    aten.sub.Tensor: (aten.sub.out, "out"),
    aten.mul.Tensor: (aten.mul.out, "out"),
    aten.mul.Scalar: (aten.mul.out, "out"),
    aten.div.Tensor: (aten.div.out, "out"),
    aten.div.Scalar: (aten.div.out, "out"),
    aten.neg.default: (aten.neg.out, "out"),
    aten.where.self: (aten.where.self_out, "out"),
    aten.elu.default: (aten.elu.out, "out"),
    aten.gelu.default: (aten.gelu.out, "out"),
    aten.hardtanh.default: (aten.hardtanh.out, "out"),
    aten.leaky_relu.default: (aten.leaky_relu.out, "out"),
    aten.relu.default: (aten.relu_.default, None),
    aten.sigmoid.default: (aten.sigmoid.out, "out"),
    aten.silu.default: (aten.silu.out, "out"),
    aten.tanh.default: (aten.tanh.out, "out"),
    aten.elu_backward.default: (aten.elu_backward.grad_input, "grad_input"),
    aten.gelu_backward.default: (aten.gelu_backward.grad_input, "grad_input"),
    aten.hardtanh_backward.default: (aten.hardtanh_backward.grad_input, "grad_input"),
    aten.leaky_relu_backward.default: (aten.leaky_relu_backward.grad_input, "grad_input"),
    aten.sigmoid_backward.default: (aten.sigmoid_backward.grad_input, "grad_input"),
    aten.silu_backward.default: (aten.silu_backward.grad_input, "grad_input"),
    aten.softplus_backward.default: (aten.softplus_backward.grad_input, "grad_input"),
    aten.tanh_backward.default: (aten.tanh_backward.grad_input, "grad_input"),
    aten.threshold_backward.default: (aten.threshold_backward.grad_input, "grad_input"),
}


@dataclass(frozen=True)
class InPlacePass:
    """phase: ``"forward"`` or ``"backward"``.

    The forward's turn comes when its plan is made, for two values are one storage afterwards, and
    before the graph is cut or loses tangents, for all its backwards read what one forward saves.
    """

    phase: Literal["forward", "backward"] = "backward"
    name: ClassVar[str] = "in_place"

    def apply(self, graph: JointGraph) -> JointGraph:
        graph = graph.copy()
        graph.module.graph.eliminate_dead_code()
        views = {n for n in graph.nodes if is_view(n)}
        written = _overwritten(graph, backward=self.phase == "backward")
        moved = set(written)
        for node in graph.nodes:
            if node in written:
                _write_over(node, written[node])
            elif node in views and moved.intersection(node.all_input_nodes):
                moved.add(node)
                refresh([node])
        return graph.verified()


def _overwritten(graph: JointGraph, backward: bool) -> dict[fx.Node, fx.Node]:
    """Operator of one phase -> the operand that its result may take the place of."""
    last = _last_readers(graph)
    ours = _made_in_phase(graph, backward)
    found: dict[fx.Node, fx.Node] = {}
    for node in graph.nodes:
        if node.target not in _DESTINATIONS or is_backward(node) != backward:
            continue
        for operand in (a for a in node.args if isinstance(a, fx.Node)):
            storages = set(storages_in(operand.meta.get("val")))
            dying = all(key in ours and last[key] is node for key in storages)
            if dying and _fits(node, operand):
                found[node] = operand
                break
    return found


def _last_readers(graph: JointGraph) -> dict[int, fx.Node]:
    """Storage key -> the node that reads the storage last, through whatever view of it."""
    return {
        key: node
        for node in graph.nodes
        for source in node.all_input_nodes
        for key in storages_in(source.meta.get("val"))
    }


def _made_in_phase(graph: JointGraph, backward: bool) -> set[int]:
    """Storages of what the phase makes: not of inputs or tangents, nor of values made again.

    torch's own operators return memory that nobody else has; others need not.
    """
    made: set[int] = set()
    for node in graph.nodes:
        if node.op != "call_function" or is_backward(node) != backward or is_view(node):
            continue
        if getattr(node.target, "namespace", "") == "aten" and "fxmem_origin" not in node.meta:
            made.update(storages_in(node.meta.get("val")))
    return made


def _fits(node: fx.Node, operand: fx.Node) -> bool:
    """Does the result look just like the operand, in a storage that no other operand looks at?"""
    mine, theirs = look(node), look(operand)
    if mine is None or theirs is None or mine[1:] != theirs[1:]:
        return False
    if LAYOUT in node.meta or LAYOUT in operand.meta:
        return False  # the real strides are others
    made, taken = storages_in(node.meta["val"]), storages_in(operand.meta["val"])
    shared = (set(taken) & set(storages_in(i.meta.get("val"))) for i in node.all_input_nodes)
    return list(made.values()) == list(taken.values()) and sum(map(bool, shared)) == 1


def _write_over(node: fx.Node, operand: fx.Node) -> None:
    node.target, keyword = _DESTINATIONS[node.target]
    if keyword is not None:
        node.kwargs = {**node.kwargs, keyword: operand}
    node.meta["val"] = operand.meta["val"]
