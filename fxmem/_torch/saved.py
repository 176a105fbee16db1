"""What autograd saved for operators that are in no graph of ours.

``_raw_saved_*`` of autograd's nodes, and what they hold: checked against torch 2.11, 2.13 and 2.15.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

PREPARED = "_fxmem_prepared"
"""Attribute of a node of autograd's that is the backward of a graph of ours."""

_RAW = "_raw_saved_"


def saved_before(values: Any) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """Tensors that were saved on the way to these values, as far as graphs of ours; and leaves that get a
    gradient there.

    Nothing is unpacked: what a hook of the user's packed, in tensors or tuples of them, counts as that.
    """
    saved: list[torch.Tensor] = []
    leaves: list[torch.Tensor] = []
    seen: set[Any] = set()
    stack: list[Any] = [
        value.grad_fn
        for value in torch.utils._pytree.tree_leaves(values)
        if isinstance(value, torch.Tensor) and value.grad_fn is not None
    ]
    while stack:
        node = stack.pop()
        if node is None or node in seen or hasattr(node, PREPARED):
            continue
        seen.add(node)
        if node.name().endswith("AccumulateGrad"):
            leaves.append(node.variable)
        saved += _saved_by(node)
        stack += [below for below, _ in node.next_functions]
    return saved, leaves


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
