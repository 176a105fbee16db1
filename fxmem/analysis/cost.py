"""How long an operator takes: a roofline of the device's arithmetic rate, its memory rate and a launch."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import fx
from torch.utils import _pytree as pytree
from torch.utils.flop_counter import flop_registry

from fxmem.basics.gpus import Gpu, find_gpu
from fxmem.basics.sizes import hint, tensors_in
from fxmem.graphs.convolution import convolution_input_backward, convolution_relu
from fxmem.graphs.graph import is_view, operator_name


class Cost(Protocol):
    """Whatever says how long an operator takes; ``name`` goes into plans and reports.

    seconds: of a node, where its operands and its code are at hand.  waiting: seconds more that it
    takes in the unchanged step, where they are not; what is made again is read right afterwards.
    """

    @property
    def name(self) -> str: ...

    def seconds(self, node: fx.Node) -> float: ...

    def waiting(self, node: fx.Node) -> float: ...


@dataclass(frozen=True)
class CostModel:
    """seconds = launch + max(operations / rate, bytes / bandwidth).

    flops: operations per second in float32, multiply-adds counted as two.  tf32, half: the same for
    matrix products and convolutions that may round to TF32, and for those of 16 bits, where that is
    faster.  bandwidth: bytes per second.  launch: seconds.
    Source: roofline model, Williams, Waterman and Patterson 2009, doi:10.1145/1498765.1498785.
    """

    name: str
    flops: float
    bandwidth: float
    launch: float
    tf32: float | None = None
    half: float | None = None

    def seconds(self, node: fx.Node) -> float:
        """Predicted seconds of one node; a view takes none."""
        if node.op != "call_function" or is_view(node):
            return 0.0
        moved = _nbytes(node.meta.get("val")) + sum(
            _nbytes(i.meta.get("val")) for i in node.all_input_nodes
        )
        again = _converted_again(node) / self.bandwidth
        again += self._rectifying(node)
        return self.launch + max(flops(node) / self._rate(node), moved / self.bandwidth) + again

    def waiting(self, node: fx.Node) -> float:
        return 0.0

    def _rectifying(self, node: fx.Node) -> float:
        """Seconds of the second of two operators in one."""
        if node.target is not convolution_relu:
            return 0.0
        return self.launch + 2 * _nbytes(node.meta.get("val")) / self.bandwidth

    def _rate(self, node: fx.Node) -> float:
        if _formula(node) is None:
            return self.flops
        dtypes = {t.dtype for i in node.all_input_nodes for t in tensors_in(i.meta.get("val"))}
        if self.half and dtypes & {torch.float16, torch.bfloat16}:
            return self.half
        return self.tf32 if self.tf32 and _may_round(node) else self.flops


def _converted_again(node: fx.Node) -> int:
    """Bytes that only a split call brings into its kernel's layout: on the CPU, the gradient's."""
    value: Any = node.meta.get("val")
    if node.target is not convolution_input_backward or value.device.type != "cpu":
        return 0
    return _nbytes(node.all_input_nodes[0].meta.get("val"))


def _may_round(node: fx.Node) -> bool:
    """May the operator's float32 operands be rounded to TF32?  Convolutions may, unless told not to."""
    backends: Any = torch.backends
    convolution = "convolution" in operator_name(node)
    switch = backends.cudnn.conv if convolution else backends.cuda.matmul
    return bool(switch.fp32_precision == "tf32")


# Two cores of a server processor, and some large accelerator.
CPU = CostModel("cpu", flops=5e10, bandwidth=1e10, launch=3e-6)
CUDA = CostModel("cuda", flops=3e14, bandwidth=1.5e12, launch=4e-6)

_REACHED = 0.5
"""What training reaches of a maker's figures; it is the same for all, so plans hardly depend on it."""


def default_cost_model(device: torch.device) -> CostModel:
    if device.type != "cuda":
        return CPU
    try:
        gpu = find_gpu(torch.cuda.get_device_name(device))
    except (RuntimeError, AssertionError):  # no driver, or a torch without CUDA
        gpu = None
    return CUDA if gpu is None else model_of(gpu)


def model_of(gpu: Gpu) -> CostModel:
    """The roofline of a product in the table, launched operator by operator."""
    return CostModel(
        gpu.name,
        flops=_REACHED * gpu.fp32,
        bandwidth=_REACHED * gpu.bandwidth,
        launch=CUDA.launch,
        tf32=_REACHED * gpu.tf32,
        half=_REACHED * gpu.half,
    )


def flops(node: fx.Node) -> float:
    """Floating-point operations of one node: torch's formula where it has one, else one an element."""
    formula = _formula(node)
    value = node.meta.get("val")
    if formula is None:
        return float(sum(_numel(t) for t in tensors_in(value)))
    args, kwargs = pytree.tree_map_only(
        fx.Node, lambda n: n.meta.get("val"), (tuple(node.args), dict(node.kwargs))
    )
    return float(hint(formula(*args, **kwargs, out_val=value)))


def _formula(node: fx.Node) -> Callable[..., Any] | None:
    """torch's count of a matrix product's, a convolution's or an attention's operations."""
    packet = getattr(node.target, "overloadpacket", None)
    return None if packet is None else flop_formula(packet)


def flop_formula(packet: Any) -> Callable[..., Any] | None:
    """torch's count of an operator's operations; attention on the CPU has that of attention elsewhere."""
    return flop_registry.get(_COUNTED_AS.get(packet, packet))


_ATEN: Any = torch.ops.aten
_COUNTED_AS = {
    convolution_relu.overloadpacket: _ATEN.convolution,
    _ATEN._scaled_dot_product_flash_attention_for_cpu: _ATEN._scaled_dot_product_flash_attention,
    _ATEN._scaled_dot_product_flash_attention_for_cpu_backward: (
        _ATEN._scaled_dot_product_flash_attention_backward
    ),
}
"""Operators that torch's table lacks, and those with the same leading arguments that it has."""


def _numel(tensor: torch.Tensor) -> int:
    return math.prod(hint(d) for d in tensor.shape)


def _nbytes(value: object) -> int:
    return sum(_numel(t) * t.element_size() for t in tensors_in(value))
