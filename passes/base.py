"""What a pass is: a frozen dataclass whose ``apply`` gives a changed copy of the graph."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar, Protocol

import torch
from torch import fx

from fxmem.graphs.fakes import fake_value
from fxmem.graphs.graph import JointGraph

aten = torch.ops.aten


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
    node = graph.create_node("call_function", target, args, kwargs, name=f"{origin.name}_{suffix}")
    node.meta = dict(origin.meta)
    node.meta["partitioner_tag"] = "is_backward" if backward else "is_forward"
    node.meta["fxmem_origin"] = origin.name
    node.meta["val"] = fake_value(target, args, kwargs)
    node.meta.pop("tensor_meta", None)
    return node


def sizes_and_strides(source: fx.Node) -> tuple[list[Any], list[Any]]:
    """Of a forward node: as numbers, or as nodes right after it where they may change."""
    value = source.meta["val"]
    sizes = [_known(n, source, aten.sym_size.int, d) for d, n in enumerate(value.shape)]
    strides = [_known(n, source, aten.sym_stride.int, d) for d, n in enumerate(value.stride())]
    return sizes, strides


def _known(number: Any, source: fx.Node, asked: Any, dim: int) -> Any:
    if isinstance(number, int):
        return number
    with source.graph.inserting_after(source):
        node = insert_like(
            source.graph, source, asked, (source, dim), suffix="size", backward=False
        )
    del node.meta["fxmem_origin"]
    node.meta.pop("recompute", None)  # what a checkpoint says of the tensor
    return node
