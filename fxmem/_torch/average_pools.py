"""Private functions of torch with which gradients of average pools are divided by what eager divides by.

A pool that rounds its size up (``ceil_mode=True``) has windows that reach beyond the padding.  Eager
divides those by the elements within it; Inductor's loops of the gradient, unlike those of the pool itself,
divide by the whole window, so that gradients at the far edges come out at half of what they are.  The
operator is called instead.

Compiled and run on torch 2.13.0, 2.11.0 and 2.15.0.
"""

from __future__ import annotations

from typing import Any
from unittest import mock

import torch
from torch._inductor.lowering import fallback_handler, lowerings

_GRADIENTS = (
    torch.ops.aten.avg_pool2d_backward.default,
    torch.ops.aten.avg_pool3d_backward.default,
)

DIVIDED_AS_EAGER = "average pools divided as eager"
"""What code that was made so is known by in torch's cache."""


def divided_as_eager() -> Any:
    """A context in which Inductor leaves to the operator what its loops would divide wrongly."""
    return mock.patch.dict(lowerings, {op: _lowering(op) for op in _GRADIENTS})


def _lowering(operator: Any) -> Any:
    loops = lowerings[operator]
    as_it_is = fallback_handler(operator, add_to_fallback_set=False)

    def lowered(*args: Any) -> Any:
        return (as_it_is if _rounds_up(*args) else loops)(*args)

    return lowered


def _rounds_up(
    gradient: Any,
    source: Any,
    kernel: Any,
    stride: Any,
    padding: Any,
    ceil_mode: bool,
    count_include_pad: bool,
    divisor: int | None = None,
) -> bool:
    """Where padding is not counted Inductor counts elements as eager does, and a given divisor is one."""
    return ceil_mode and count_include_pad and divisor is None
