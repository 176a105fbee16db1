"""Identities: a view that undoes views is the tensor they started from, and so is a copy of one.

before                          after
  t  = t(w)                       t  = t(w)
  y  = mm(x, t)                   y  = mm(x, t)
  # backward                      # backward
  t2 = t(t)                       gx = mm(g, w)
  gx = mm(g, t2)

Autograd transposes back what the forward transposed and detaches what has no graph.  Autograd's own
backward does so in C++; a graph that is run operator by operator pays for each of these calls.  A
dropout of zero is traced as a copy where eager returns its input: bytes that eager does not hold.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import fx

from fxmem.basics.sizes import storage_keys, storages_in
from fxmem.graphs.fakes import look, replace_uses
from fxmem.graphs.graph import JointGraph, has_effect, is_view


@dataclass(frozen=True)
class IdentitiesPass:
    name: ClassVar[str] = "identities"

    def apply(self, graph: JointGraph) -> JointGraph:
        graph = graph.copy()
        returned = [o for o in graph.outputs() if isinstance(o, fx.Node)]
        shared = [*returned, *graph.placeholders()]
        exposed = {key for node in shared for key in storage_keys(node.meta.get("val"))}
        for node in graph.nodes:
            # The caller may change an output in place, so each stays a tensor of its own.
            if node not in returned and (original := _original(node)) is not None:
                node.replace_all_uses_with(original, propagate_meta=False)
            elif (copied := _copied(node, exposed)) is not None:
                replace_uses(node, copied)
        graph.module.graph.eliminate_dead_code(_is_needed)
        return graph.verified()


def _original(node: fx.Node) -> fx.Node | None:
    """The first value up a chain of views that looks just like ``node``, which is one."""
    mine = look(node)
    found = None
    source: fx.Node | None = node
    while mine is not None and source is not None:
        source = _viewed(source)
        if source is not None and look(source) == mine:
            found = source
    return found


def _copied(node: fx.Node, exposed: set[int]) -> fx.Node | None:
    """What ``node`` is a plain copy of, if no one but the graph can ever tell them apart.

    exposed: storages that the caller has or gets, and may change.
    """
    if node.target is not torch.ops.aten.clone.default or node.kwargs.get("memory_format"):
        return None
    source = node.all_input_nodes[0]
    mine, theirs = look(node), look(source)
    if mine is None or theirs is None or mine[1:] != theirs[1:]:
        return None
    copy, original = (storages_in(n.meta["val"]) for n in (node, source))
    # A copy of a part stays: it lets go of the whole.
    same_bytes = list(copy.values()) == list(original.values())
    return source if same_bytes and not exposed & {*copy, *original} else None


def _viewed(node: fx.Node) -> fx.Node | None:
    """What a view of one tensor looks at.

    ``as_strided`` is left alone: its strides are the example's, and real ones may differ.
    """
    sources = node.all_input_nodes
    if node.target is torch.ops.aten.as_strided.default or len(sources) != 1 or not is_view(node):
        return None
    return sources[0]


def _is_needed(node: fx.Node) -> bool:
    disposable = is_view(node) or node.target is torch.ops.aten.clone.default
    return has_effect(node) or not disposable
