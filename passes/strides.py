"""Strides: let what reads one value read another of the same numbers, laid out otherwise.

before                                  after, other in the place of g
  g  = add(tangents_2, other)             t  = t(other)
  t  = t(g)                               c  = clone(t, memory_format=contiguous)
  gx = native_group_norm_backward(t, x)   gx = native_group_norm_backward(c, x)

Most operators read any strides, and results below take others, too.  Some read the memory as it is.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from fxmem.basics.sizes import storages_in
from fxmem.graphs.fakes import fake_value, same_strides
from fxmem.passes.base import insert_like

aten = torch.ops.aten

_READ_AS_TRACED = {
    aten._cdist_backward.default,
    aten._weight_norm_interface_backward.default,
    aten.cudnn_batch_norm_backward.default,
    aten.miopen_batch_norm_backward.default,
    aten.native_group_norm_backward.default,
}
"""Backwards that take the gradient's elements in the order of memory, without a look at its strides.

Autograd hands them ``grad.contiguous()``, of which a graph shows nothing where that was no copy.
Source: tools/autograd/derivatives.yaml.
"""


def replace_with_other_strides(node: fx.Node, other: fx.Node) -> bool:
    """``replace_uses`` where the strides differ, and so those of what is computed from them may.

    What cannot do with other strides gets a copy in the old ones.  False, and nothing is changed,
    where there is none, or where a view below exists for the old strides alone.
    """
    new: dict[fx.Node, Any] = {node: other.meta["val"]}
    copies: list[tuple[fx.Node, fx.Node, torch.memory_format]] = []
    for user in node.graph.nodes:
        changed = [i for i in user.all_input_nodes if i in new]
        if user is other or user.op != "call_function" or not changed:
            continue
        if user.target in _READ_AS_TRACED:
            formats = [_memory_format(i.meta["val"]) for i in changed]
            if None in formats:
                return False
            copies += [(user, i, f) for i, f in zip(changed, formats, strict=True) if f]
            continue
        try:
            value = fake_value(user.target, user.args, dict(user.kwargs), new)
        except (RuntimeError, ValueError):
            return False
        if _shows(user, new) or not same_strides(value, user.meta.get("val")):
            new[user] = value
    for user, source, memory_format in copies:
        _copy_for(user, source, memory_format)
    for user, value in new.items():
        if user is not node:
            user.meta["val"] = value
    node.replace_all_uses_with(
        other, delete_user_cb=lambda user: user is not other, propagate_meta=False
    )
    return True


def _memory_format(value: Any) -> torch.memory_format | None:
    """The format that a tensor is contiguous in; None if there is none, or if it is no tensor."""
    formats = (torch.contiguous_format, torch.channels_last, torch.channels_last_3d)
    if not isinstance(value, torch.Tensor):
        return None
    dims = {torch.channels_last: 4, torch.channels_last_3d: 5}
    fitting = (f for f in formats if dims.get(f, value.ndim) == value.ndim)
    return next((f for f in fitting if value.is_contiguous(memory_format=f)), None)


def _copy_for(user: fx.Node, source: fx.Node, memory_format: torch.memory_format) -> None:
    """Let ``user`` read a copy of ``source`` that is laid out as the value was traced."""
    kwargs = {"memory_format": memory_format}
    with user.graph.inserting_before(user):
        copy = insert_like(
            user.graph, source, aten.clone.default, (source,), kwargs, suffix="copy", backward=True
        )
    del copy.meta["fxmem_origin"]  # it is made once
    user.replace_input_with(source, copy)


def _shows(node: fx.Node, new: dict[fx.Node, Any]) -> bool:
    """Is the node a view of a value that changes?"""
    mine = set(storages_in(node.meta.get("val")))
    sources = (i for i in node.all_input_nodes if i in new)
    return any(mine & set(storages_in(i.meta.get("val"))) for i in sources)
