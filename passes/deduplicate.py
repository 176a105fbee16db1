"""Deduplicate: what the forward computes twice from the same inputs is saved once.

before                              after
  m = where(mask, 0, -inf)            m = where(mask, 0, -inf)
  a = attention(q, k, m)              a = attention(q, k, m)
  n = where(mask, 0, -inf)            b = attention(r, s, m)
  b = attention(r, s, n)

Every layer of a transformer turns the same mask into the same floats, and each is saved.  Eager
often sees that no mask is needed, and a traced step cannot, so this is bytes that eager does not
hold.  Only values that stay for the backward anyway are merged, and tiny ones: merging others
would keep them alive longer than two runs do.
"""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import fx
from torch.utils import _pytree as pytree

from fxmem.basics.sizes import hint, storage_keys, tensors_in
from fxmem.graphs.fakes import replace_uses
from fxmem.graphs.graph import JointGraph, is_backward, is_view
from fxmem.graphs.operators import is_random, recomputable_nodes

_TINY = 1024  # bytes


@dataclass(frozen=True)
class DeduplicatePass:
    name: ClassVar[str] = "deduplicate"

    def apply(self, graph: JointGraph) -> JointGraph:
        graph = graph.copy()
        saved, returned = _read_by_backward(graph), _returned(graph)
        pure = recomputable_nodes(graph)
        first: dict[Hashable, fx.Node] = {}
        for node in graph.nodes:
            if node.op != "call_function" or is_backward(node) or is_random(node):
                continue
            if node not in pure or _storages(node) & returned:
                continue
            if not (is_view(node) or _is_tiny(node) or _storages(node) & saved):
                continue
            twin = first.setdefault(_call(node), node)
            if twin is not node:
                replace_uses(node, twin)
                graph.module.graph.erase_node(node)
        return graph.verified()


def _call(node: fx.Node) -> Hashable:
    """Equal for two nodes that compute the same from the same inputs."""
    leaves, tree = pytree.tree_flatten((node.args, node.kwargs))
    # 1, 1.0 and True are equal in Python, and are different arguments.
    return (node.target, str(tree), tuple((type(a), a if _hashable(a) else str(a)) for a in leaves))


def _hashable(value: Any) -> bool:
    return isinstance(value, Hashable)


def _storages(node: fx.Node) -> set[int]:
    return set(storage_keys(node.meta.get("val")))


def _read_by_backward(graph: JointGraph) -> set[int]:
    readers = [n for n in graph.nodes if is_backward(n)]
    return {key for n in readers for i in n.all_input_nodes for key in _storages(i)}


def _returned(graph: JointGraph) -> set[int]:
    outputs = [o for o in graph.outputs() if isinstance(o, fx.Node)]
    return {key for node in outputs for key in _storages(node)}


def _is_tiny(node: fx.Node) -> bool:
    sizes = [hint(t.untyped_storage().nbytes()) for t in tensors_in(node.meta.get("val"))]
    return sum(sizes) <= _TINY
