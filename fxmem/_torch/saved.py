"""What autograd saved for operators that are in no graph of ours.

``_raw_saved_*`` of autograd's nodes, and what they hold, and ``torch.autograd._engine_run_backward``:
checked against torch 2.11, 2.13 and 2.15.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from typing import Any

import torch

PREPARED = "_fxmem_prepared"
"""Attribute of a node of autograd's that is the backward of a graph of ours."""

_RAW = "_raw_saved_"


def nodes_before(values: Any, is_end: Callable[[Any], bool]) -> Iterator[Any]:
    """Autograd's nodes on the way to these values, each once; of what is before an end, none."""
    seen: set[Any] = set()
    # In place of a tensor, autograd also takes an edge, which is a tuple with a node in it.
    stack: list[Any] = [
        value.grad_fn if isinstance(value, torch.Tensor) else value
        for value in torch.utils._pytree.tree_leaves(values)
        if isinstance(value, (torch.Tensor, torch.autograd.graph.Node))
    ]
    while stack:
        node = stack.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        yield node
        if not is_end(node):
            stack += [before for before, _ in node.next_functions]


def saved_before(values: Any) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """Tensors that were saved on the way to these values, as far as graphs of ours; and leaves that get a
    gradient there.

    values: tensors, or what else a backward may begin with.  Nothing is unpacked: what a hook of the
    user's packed, in tensors or tuples of them, counts as that.
    """
    saved: list[torch.Tensor] = []
    leaves: list[torch.Tensor] = []
    for node in nodes_before(values, _is_ours):
        if _is_ours(node):
            continue
        if node.name().endswith("AccumulateGrad"):
            leaves.append(node.variable)
        saved += _saved_by(node)
    return saved, leaves


def leads_to_ours(values: Any) -> bool:
    """Does the backward of these values run that of a graph of ours?"""
    return any(map(_is_ours, nodes_before(values, _is_ours)))


def _is_ours(node: Any) -> bool:
    return hasattr(node, PREPARED)


def _saved_by(node: Any) -> Iterator[torch.Tensor]:
    for name in dir(node):
        if name.startswith(_RAW):
            try:
                found = getattr(node, name)
                every = found if isinstance(found, (tuple, list)) else (found,)
                packed = [one.data for one in every]
            except RuntimeError:  # its backward has run
                continue
            for value in torch.utils._pytree.tree_leaves(packed):
                if isinstance(value, torch.Tensor):
                    yield value


Look = Callable[[Any], bool]
"""Is given what a backward begins with.  True: it has seen enough."""

_looking: list[weakref.WeakMethod[Look]] = []


def look_at_backwards(look: Look) -> None:
    """Call a method with what each backward begins with, before it runs, until the method has seen enough.

    What an operator saved can be reached from what follows it alone; so what was saved after a graph is
    only known here.  Nothing is watched where nobody looks.
    """
    one = weakref.WeakMethod(look)
    if one not in _looking:
        _looking.append(one)
    torch.autograd._engine_run_backward = _looked_at  # type: ignore[assignment]


def _looked_at(roots: Any, *args: Any, **kwargs: Any) -> Any:
    for one in list(_looking):
        look = one()
        if look is None or look(roots):
            _looking.remove(one)
    run = torch.autograd.graph._engine_run_backward
    if not _looking:
        torch.autograd._engine_run_backward = run
    return run(roots, *args, **kwargs)
