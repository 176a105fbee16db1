"""Example values: what a node returns on fake tensors, and keeping them true when inputs change."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any
from unittest import mock

import torch
from torch import fx
from torch.utils import _pytree as pytree

from fxmem._torch import storage_key
from fxmem.basics.sizes import as_expr, can_view, storage_keys, tensors_in


def fake_value(
    target: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    new: Mapping[fx.Node, Any] = MappingProxyType({}),
) -> Any:
    """What the call returns on the example values of its arguments; nothing is allocated.

    new: values to take in place of what these nodes have.
    """
    example_args, example_kwargs = fx.node.map_arg(
        (args, kwargs), lambda n: new[n] if n in new else n.meta.get("val")
    )
    if target in (torch.ops.aten.view.default, torch.ops.aten._unsafe_view.default):
        _refuse_impossible_view(*example_args)
    mode = _fake_mode(example_args, example_kwargs)
    with mode or contextlib.nullcontext(), _with_constants(mode), torch.no_grad():
        return target(*example_args, **example_kwargs)


def _refuse_impossible_view(tensor: torch.Tensor, shape: Sequence[Any]) -> None:
    """Raise as real tensors do: fake ones merge dimensions over one of size 1 that parts them.

    So [2, 1, 2] with strides (1, 2, 2) becomes [4] without an error (torch 2.13).
    """
    if not can_view(tensor.shape, tensor.stride(), shape):
        raise RuntimeError(f"a view as {list(shape)} needs other strides than {tensor.stride()}")


def fake_empty_bytes(like: fx.Node, nbytes: int) -> torch.Tensor:
    """An example value of ``nbytes`` bytes on the CPU, as fake as that of ``like``."""
    with _fake_mode(like.meta.get("val")) or contextlib.nullcontext():
        return torch.empty(nbytes, dtype=torch.uint8)


def fake_like(value: torch.Tensor) -> torch.Tensor:
    """An example value of the same kind with a storage of its own."""
    with _fake_mode(value) or contextlib.nullcontext():
        return torch.empty_strided(
            value.shape, value.stride(), dtype=value.dtype, device=value.device
        )


def views_below(node: fx.Node) -> list[fx.Node]:
    """The nodes that look at the node's storages through views, in graph order."""
    mine = storage_keys(node.meta.get("val")).keys()
    found: set[fx.Node] = set()
    stack = list(node.users)
    while stack:
        user = stack.pop()
        if user not in found and user.op == "call_function" and mine & _storages(user):
            found.add(user)
            stack += list(user.users)
    return [n for n in node.graph.nodes if n in found]


def replace_uses(node: fx.Node, other: fx.Node) -> None:
    """Let what reads ``node`` read ``other``; views of the one become views of the other.

    ``other`` may be made of ``node``: it goes on reading it.
    """
    views = views_below(node)
    node.replace_all_uses_with(
        other, delete_user_cb=lambda user: user is not other, propagate_meta=False
    )
    refresh(views)


def same_strides(a: Any, b: Any) -> bool:
    """Are the tensors in two example values laid out alike?"""
    return [t.stride() for t in tensors_in(a)] == [t.stride() for t in tensors_in(b)]


def refresh(nodes: list[fx.Node]) -> None:
    """Compute the nodes' example values again from those of their inputs."""
    for node in nodes:
        node.meta["val"] = fake_value(node.target, node.args, dict(node.kwargs))  # type: ignore[arg-type]


def look(node: fx.Node) -> tuple[Any, ...] | None:
    """Everything that tells one view of a storage from another; None for what is not one tensor."""
    tensor = node.meta.get("val")
    if not isinstance(tensor, torch.Tensor) or tensor.layout != torch.strided:
        return None
    sizes = [as_expr(s) for s in (*tensor.shape, *tensor.stride(), tensor.storage_offset())]
    flags = (tensor.dtype, tensor.is_conj(), tensor.is_neg())
    return (storage_key(tensor), type(tensor), *flags, *sizes)


def _storages(node: fx.Node) -> dict[int, None]:
    return storage_keys(node.meta.get("val"))


def _with_constants(mode: Any) -> contextlib.AbstractContextManager[Any]:
    """Inside, real tensors may be operands: a graph's constants are, as a mask that a model holds.

    Dynamo's mode takes them while Dynamo works on the graph, and not when it is planned later.
    """
    if mode is None or mode.allow_non_fake_inputs:
        return contextlib.nullcontext()
    return mock.patch.object(mode, "allow_non_fake_inputs", True)


def _fake_mode(*values: Any) -> Any:
    for leaf in pytree.tree_leaves(values):
        if isinstance(leaf, torch.Tensor) and hasattr(leaf, "fake_mode"):
            return leaf.fake_mode
    return None
