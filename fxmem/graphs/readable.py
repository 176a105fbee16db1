"""Graphs to read: copies of what runs, with the user's names for inputs, parameters and gradients."""

from __future__ import annotations

import itertools
import re
from collections.abc import Collection

from torch import fx

from fxmem.graphs.graph import JointGraph, Role

_NOT_IDENTIFIER = re.compile(r"\W+")


def readable(
    graph: JointGraph, forward: fx.GraphModule, backward: fx.GraphModule
) -> tuple[fx.GraphModule, fx.GraphModule]:
    """Copies of a forward and a backward whose placeholders carry names that a person recognises."""
    names: dict[str, str] = {}
    for name, info in graph.inputs.items():
        names[name] = _unlike(names.values(), _name(info.role, info.name))
    return _renamed(forward, names), _renamed(backward, names)


def _renamed(module: fx.GraphModule, names: dict[str, str]) -> fx.GraphModule:
    graph = fx.Graph()
    copies: dict[fx.Node, fx.Node] = {}
    for node in module.graph.nodes:
        if node.op == "output":
            graph.output(fx.node.map_arg(node.args[0], copies.__getitem__))
        elif node.op == "placeholder":
            copies[node] = graph.placeholder(names.get(node.name, node.name))
        else:
            copies[node] = graph.node_copy(node, copies.__getitem__)
        if node in copies:
            copies[node].meta = dict(node.meta)
    return fx.GraphModule(module, graph)


def _unlike(taken: Collection[str], name: str) -> str:
    """The name, with a number where another one is spelt alike: ``a_`` beside ``a``."""
    numbered = (f"{name}_{n}" for n in itertools.count(1))
    return name if name not in taken else next(n for n in numbered if n not in taken)


def _name(role: Role, name: str) -> str:
    """``layers.0.weight`` -> ``layers_0_weight``; ``kwargs['labels']`` -> ``labels``."""
    plain = _NOT_IDENTIFIER.sub("_", name).strip("_")
    plain = plain.removeprefix("kwargs_")
    if role is Role.TANGENT:
        plain = f"grad_{plain.removeprefix('tangents_')}"
    return plain if plain.isidentifier() else f"input_{plain}"
