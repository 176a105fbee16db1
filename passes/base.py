"""What a pass is: a frozen dataclass whose ``apply`` gives a changed copy of the graph."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any, ClassVar, Protocol

import torch
from torch import fx

from fxmem.graph import JointGraph


class Pass(Protocol):
    """A rewrite.  The graph that it is given stays as it is."""

    name: ClassVar[str]

    def apply(self, graph: JointGraph) -> JointGraph: ...


def insert_like(
    graph: fx.Graph,
    origin: fx.Node,
    target: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: dict[str, Any] | None = None,
    *,
    suffix: str,
    backward: bool,
) -> fx.Node:
    """A node at the insertion point that remembers where it comes from.

    The module and the user's source line are the origin's; the value is computed on fake tensors.
    """
    kwargs = kwargs or {}
    node = graph.create_node(
        "call_function", target, args, kwargs, name=f"{origin.name}_{suffix}"
    )
    node.meta = dict(origin.meta)
    node.meta["partitioner_tag"] = "is_backward" if backward else "is_forward"
    node.meta["fxmem_origin"] = origin.name
    node.meta["val"] = fake_value(target, args, kwargs)
    node.meta.pop("tensor_meta", None)
    return node


def fake_value(target: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """What the call returns on the example values of its arguments; nothing is allocated."""
    example_args, example_kwargs = fx.node.map_arg((args, kwargs), lambda n: n.meta.get("val"))
    mode = _fake_mode(example_args, example_kwargs)
    if mode is None:
        return target(*example_args, **example_kwargs)
    with mode, torch.no_grad():
        return target(*example_args, **example_kwargs)


def fake_empty_bytes(like: fx.Node, nbytes: int) -> torch.Tensor:
    """An example value of ``nbytes`` bytes on the CPU, as fake as that of ``like``."""
    mode = _fake_mode(like.meta.get("val"))
    with mode or contextlib.nullcontext():
        return torch.empty(nbytes, dtype=torch.uint8)


def _fake_mode(*values: Any) -> Any:
    for leaf in torch.utils._pytree.tree_leaves(values):
        if isinstance(leaf, torch.Tensor) and hasattr(leaf, "fake_mode"):
            return leaf.fake_mode
    return None
