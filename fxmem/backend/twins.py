"""Graphs of Dynamo's that compute the same, such as those of equal blocks between graph breaks.

Parameters are inputs of a graph, so what was compiled for one of its twins runs for all of them.
"""

from __future__ import annotations

import builtins
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import fields, is_dataclass, replace
from typing import Any, TypeVar

import torch
from torch import fx, nn

from fxmem._torch import is_view_of_another
from fxmem.basics.sizes import storages_in
from fxmem.graphs.graph import Input, module_name, source_line

Form = Hashable
"""Equal for twins."""

_HOMES = ("torch", "math", "_operator", builtins.__name__)
"""Packages whose functions do the same at each trace."""

_Part = TypeVar("_Part")


class _NotAlike(Exception):
    """There is something in the graph that may differ between two that look alike."""


def form_of(module: fx.GraphModule, inputs: Sequence[Any], roles: Sequence[Input]) -> Form | None:
    """What of a graph and of its inputs decides how it is compiled; None where that is not all known.

    So it is where sizes may change, where an input is no plain tensor or shares bytes with another one,
    and where the graph holds modules or constants or calls functions that are not torch's.
    """
    try:
        _check_apart(inputs)
        given = tuple(_of_input(value, role) for value, role in zip(inputs, roles, strict=True))
        return given, _of_nodes(module.graph), str(torch.get_default_device())
    except _NotAlike:
        return None


def _check_apart(inputs: Sequence[Any]) -> None:
    for value in inputs:
        if type(value) not in (torch.Tensor, nn.Parameter) or value.layout is not torch.strided:
            raise _NotAlike
    every = [key for value in inputs for key in storages_in(value)]
    if len(set(every)) < len(inputs):
        raise _NotAlike


def _of_input(value: torch.Tensor, role: Input) -> Form:
    where = (value.device, value.shape, value.stride(), value.storage_offset())
    form = (type(value), value.dtype, value.is_conj(), value.is_neg(), value.is_inference())
    autograd = (value.requires_grad, value.is_leaf, is_view_of_another(value))
    return where, form, autograd, role.role, role.keeps_gradient


def _of_nodes(graph: fx.Graph) -> Form:
    places: dict[fx.Node, int] = {}
    found = []
    for place, node in enumerate(graph.nodes):
        found.append(_of_node(node, places))
        places[node] = place
    return tuple(found)


def _of_node(node: fx.Node, places: Mapping[fx.Node, int]) -> Form:
    if node.op == "placeholder":
        example = node.meta.get("example_value")
        if not isinstance(example, torch.Tensor) or any(type(n) is not int for n in example.shape):
            raise _NotAlike
        return node.op
    if node.op not in ("call_function", "call_method", "output"):
        raise _NotAlike
    home = getattr(node.target, "__module__", None) or ""
    if node.op == "call_function" and home.partition(".")[0] not in _HOMES:
        raise _NotAlike
    return node.op, node.target, _of_value(node.args, places), _of_value(node.kwargs, places)


def _of_value(value: Any, places: Mapping[fx.Node, int]) -> Form:
    if isinstance(value, fx.Node):
        return fx.Node, places[value]
    if isinstance(value, (tuple, list)):
        return isinstance(value, tuple), tuple(_of_value(v, places) for v in value)
    if isinstance(value, dict):
        return dict, tuple((key, _of_value(v, places)) for key, v in value.items())
    if isinstance(value, slice):
        return slice, _of_value((value.start, value.stop, value.step), places)
    if value is None or type(value) in _PLAIN:
        return type(value), repr(value)  # 0.0 and -0.0 are two, as are 1 and True
    raise _NotAlike


_PLAIN = (bool, int, float, complex, str, type(...), torch.dtype, torch.device, torch.memory_format)


# -- Names -----------------------------------------------------------------------------------------------


_NAMES = frozenset(("model", "module", "source", "name", "least_module", "least_source"))
"""Fields of a plan and of its parts that hold names of a graph."""


def names_of(title: str, module: fx.GraphModule, roles: Sequence[Input]) -> tuple[str, ...]:
    """What a graph calls itself, its inputs, modules and lines, in an order that its twins have, too."""
    of_nodes = (name(node) for node in module.graph.nodes for name in (module_name, source_line))
    return (title, *(role.name for role in roles), *of_nodes)


def renamed(part: _Part, names: Mapping[str, str]) -> _Part:
    """A plan, or a part of one, that speaks of another graph's inputs, modules and lines."""
    if not names:
        return part
    if isinstance(part, tuple):
        return tuple(renamed(one, names) for one in part)  # type: ignore[return-value]
    if not is_dataclass(part) or isinstance(part, type):
        return part
    new = {}
    for field in fields(part):
        value = getattr(part, field.name)
        new[field.name] = names.get(value, value) if field.name in _NAMES else renamed(value, names)
    return replace(part, **new)
