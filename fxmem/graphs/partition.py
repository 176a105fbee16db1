"""Cut the joint graph where the forward ends: the saved tensors are what the backward reads."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import fx

from fxmem import _torch
from fxmem.basics.errors import VerificationError
from fxmem.graphs.graph import (
    JointGraph,
    OutputKind,
    Role,
    has_effect,
    is_backward,
    is_symbolic_scalar,
)
from fxmem.graphs.operators import is_random


@dataclass(frozen=True)
class Split:
    """The two graphs that run.

    forward: takes the step's inputs, returns its outputs and then the saved tensors.
    backward: takes the saved tensors and the tangents, returns the gradients.
    """

    forward: fx.GraphModule
    backward: fx.GraphModule
    output_kinds: tuple[OutputKind, ...]
    num_forward_outputs: int


def saved_tensors(graph: JointGraph) -> list[fx.Node]:
    """The nodes before the cut that a backward node or a gradient reads, in graph order."""
    read = {i for n in graph.nodes if is_backward(n) for i in n.all_input_nodes}
    read |= {o for o in graph.backward_outputs() if isinstance(o, fx.Node)}
    return [n for n in graph.nodes if n in read and not is_backward(n) and n.op != "get_attr"]


def split(graph: JointGraph, saved: Sequence[fx.Node] | None = None) -> Split:
    """Forward and backward modules of a joint graph; the graph itself is left as it is.

    saved: what to save instead of what the backward's nodes read; the backward makes the rest again.
    """
    if saved is None:
        saved = saved_tensors(graph)
    forward, backward = _torch.extract_modules(
        graph.module,
        [n for n in saved if not is_symbolic_scalar(n)],
        [n for n in saved if is_symbolic_scalar(n)],
        graph.num_forward_outputs,
        list(graph.placeholders(Role.PARAMETER, Role.BUFFER)),
    )
    for module, of_backward in ((forward, False), (backward, True)):
        _drop_the_others(module, of_backward)
    _check_draws(backward)
    return Split(forward, backward, graph.output_kinds, graph.num_forward_outputs)


def _check_draws(backward: fx.GraphModule) -> None:
    """What the forward draws is saved, or made again by a twin that rewinds the generator."""
    again = [n.name for n in backward.graph.nodes if is_random(n) and not is_backward(n)]
    if again:
        raise VerificationError(f"the backward would draw once more what the forward drew: {again}")


def _drop_the_others(module: fx.GraphModule, backward: bool) -> None:
    """Each half comes with what the other one draws, where it has the operands, read or not."""

    def is_needed(node: fx.Node) -> bool:
        outside = node.op in ("placeholder", "output")
        return outside or (is_backward(node) == backward and has_effect(node))

    module.graph.eliminate_dead_code(is_needed)
    module.recompile()
