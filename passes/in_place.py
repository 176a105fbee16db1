"""In place: an operator writes its result over an operand that nobody reads afterwards.

before                              after
  add = add(g1, g2)                   add = add(g1, g2, out=g1)
  gx = gelu_backward(add, x)          gx = gelu_backward(add, x, grad_input=add)
  return gx                           return gx

A training step is at its peak in the backward, where each of these would hold two gradients at once.
Autograd adds up gradients in place, too.  Models that say ``relu_`` or ``+=`` do it in the forward;
capture makes fresh memory of that, and this puts it back.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from torch import fx

from fxmem.analysis.overwriting import DESTINATIONS, overwritable
from fxmem.basics.sizes import storage_keys
from fxmem.graphs.fakes import refresh
from fxmem.graphs.graph import JointGraph, has_effect, is_view


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
        graph.module.graph.eliminate_dead_code(has_effect)
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
    """Operator of one phase -> the operand that its result takes the place of."""
    last = _last_readers(graph)
    found: dict[fx.Node, fx.Node] = {}
    for node, operands in overwritable(graph, backward).items():
        for operand in operands:
            if all(last[key] is node for key in storage_keys(operand.meta["val"])):
                found[node] = operand
                break
    return found


def _last_readers(graph: JointGraph) -> dict[int, fx.Node]:
    """Storage key -> the node that reads the storage last, through whatever view of it."""
    return {
        key: node
        for node in graph.nodes
        for source in node.all_input_nodes
        for key in storage_keys(source.meta.get("val"))
    }


def _write_over(node: fx.Node, operand: fx.Node) -> None:
    node.target, keyword = DESTINATIONS[node.target]
    if keyword is not None:
        node.kwargs = {**node.kwargs, keyword: operand}
    node.meta["val"] = operand.meta["val"]
