"""How long an operator takes: a roofline of the device's arithmetic rate, its memory rate and a launch."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import fx
from torch.utils import _pytree as pytree
from torch.utils.flop_counter import flop_registry

from fxmem.graph import is_view
from fxmem.sizes import hint, tensors_in


class Cost(Protocol):
    """Whatever says how long an operator takes; ``name`` goes into plans and reports."""

    @property
    def name(self) -> str: ...

    def seconds(self, node: fx.Node) -> float: ...


@dataclass(frozen=True)
class CostModel:
    """seconds = launch + max(operations / rate, bytes / bandwidth).

    flops: multiply-adds count as two, per second.  bandwidth: bytes per second.  launch: seconds.
    Source: roofline model, Williams, Waterman and Patterson 2009, doi:10.1145/1498765.1498785.
    """

    name: str
    flops: float
    bandwidth: float
    launch: float

    def seconds(self, node: fx.Node) -> float:
        """Predicted seconds of one node; a view takes none."""
        if node.op != "call_function" or is_view(node):
            return 0.0
        moved = _nbytes(node.meta.get("val")) + sum(
            _nbytes(i.meta.get("val")) for i in node.all_input_nodes
        )
        return self.launch + max(flops(node) / self.flops, moved / self.bandwidth)


# Two cores of a server processor, a mid-range and a large accelerator; each the maker's figures for
# fp32 and bf16 halved, because that is what training reaches.
CPU = CostModel("cpu", flops=5e10, bandwidth=1e10, launch=3e-6)
CUDA = CostModel("cuda", flops=3e14, bandwidth=1.5e12, launch=4e-6)


def default_cost_model(device: torch.device) -> CostModel:
    return CUDA if device.type == "cuda" else CPU


def flops(node: fx.Node) -> float:
    """Floating-point operations of one node: torch's formula where it has one, else one an element."""
    packet = getattr(node.target, "overloadpacket", None)
    formula = flop_registry.get(packet) if packet is not None else None
    value = node.meta.get("val")
    if formula is None:
        return float(sum(_numel(t) for t in tensors_in(value)))
    args, kwargs = pytree.tree_map_only(
        fx.Node, lambda n: n.meta.get("val"), (tuple(node.args), dict(node.kwargs))
    )
    return float(hint(formula(*args, **kwargs, out_val=value)))


def _numel(tensor: torch.Tensor) -> int:
    return math.prod(hint(d) for d in tensor.shape)


def _nbytes(value: object) -> int:
    return sum(_numel(t) * t.element_size() for t in tensors_in(value))
