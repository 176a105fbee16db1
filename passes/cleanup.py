"""Cleanup: make the backward independent of what the forward changes.

before                                          after
  # backward                                      # backward
  d = native_batch_norm_backward(..., mean', ...)  d = native_batch_norm_backward(..., None, ...)
  e = mul(g, counter)                              e = mul(g, counter_before)
  n = sym_size(h, 0)                               (n is asked for where h is made)

A training batch norm's backward takes the running statistics and ignores them, yet reading them
would save two tensors that the step itself overwrites.  An input that the step changes is read by
the backward as it was before, so a copy is made while it still is.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import fx

from fxmem.graphs.fakes import replace_uses
from fxmem.graphs.graph import JointGraph, has_effect, is_backward, is_view
from fxmem.passes.base import insert_like

aten = torch.ops.aten


@dataclass(frozen=True)
class CleanupPass:
    name: ClassVar[str] = "cleanup"

    def apply(self, graph: JointGraph) -> JointGraph:
        graph = graph.copy()
        for node in list(graph.nodes):
            if node.target is aten.native_batch_norm_backward.default and node.args[7] is True:
                _forget_running_statistics(node)
            elif _is_size(node) and not any(map(is_backward, node.all_input_nodes)):
                _ask_in_forward(node)
        for mutated in graph.mutated_inputs():
            _copy_for_backward(graph.module.graph, mutated)
        graph.module.graph.eliminate_dead_code(has_effect)
        return graph.verified()


def _forget_running_statistics(node: fx.Node) -> None:
    # native_batch_norm_backward(grad, input, weight, running_mean, running_var, ...)
    node.args = (*node.args[:3], None, None, *node.args[5:])


def _is_size(node: fx.Node) -> bool:
    return is_backward(node) and isinstance(node.meta.get("val"), torch.SymInt)


def _ask_in_forward(size: fx.Node) -> None:
    sources = set(size.all_input_nodes)
    last = next(n for n in reversed(size.graph.nodes) if n in sources)
    if last.op == "placeholder":
        last = size.graph.find_nodes(op="placeholder")[-1]
    last.append(size)
    size.meta["partitioner_tag"] = "is_forward"


def _copy_for_backward(graph: fx.Graph, mutated: fx.Node) -> None:
    """Let the backward read a copy of an input that the forward changes."""
    readers = [n for n in _readers_through_views(mutated) if is_backward(n)]
    if not readers:
        return
    last_placeholder = graph.find_nodes(op="placeholder")[-1]
    with graph.inserting_after(last_placeholder):
        copy = insert_like(
            graph, mutated, aten.clone.default, (mutated,), suffix="before", backward=False
        )
    copy.meta["fxmem_keep"] = "the step changes this input"
    replace_uses(mutated, copy)


def _readers_through_views(node: fx.Node) -> list[fx.Node]:
    readers: list[fx.Node] = []
    stack = list(node.users)
    while stack:
        user = stack.pop()
        readers.append(user)
        if is_view(user):
            stack += list(user.users)
    return readers
