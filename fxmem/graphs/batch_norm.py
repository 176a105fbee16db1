"""Batch normalization as cuDNN trains it, as functions: what eager runs on CUDA, and tracing takes apart.

Tracing turns ``aten.cudnn_batch_norm`` into torch's own kernel, whose sums round differently.  The
operators here call cuDNN's.  They return new running statistics where aten's write the old ones.
"""

from __future__ import annotations

from typing import Any

import torch
from torch._prims_common import suggest_memory_format

from fxmem._torch import cudnn_reserve_nbytes

aten = torch.ops.aten

_LIBRARY = torch.library.Library("fxmem", "FRAGMENT")
_LIBRARY.define(
    "cudnn_batch_norm(Tensor x, Tensor weight, Tensor bias, Tensor mean, Tensor var, float momentum, "
    "float eps) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)"
)
_LIBRARY.define(
    "cudnn_batch_norm_again(Tensor x, Tensor weight, Tensor bias, float eps) "
    "-> (Tensor, Tensor, Tensor, Tensor)"
)
_LIBRARY.define(
    "cudnn_batch_norm_backward(Tensor grad, Tensor x, Tensor weight, Tensor save_mean, "
    "Tensor save_var, Tensor reserve, float eps) -> (Tensor, Tensor, Tensor)"
)


def _forward(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    mean: torch.Tensor,
    var: torch.Tensor,
    momentum: float,
    eps: float,
) -> tuple[torch.Tensor, ...]:
    mean, var = mean.clone(), var.clone()
    found = aten.cudnn_batch_norm.default(x, weight, bias, mean, var, True, momentum, eps)
    return (*found, mean, var)


def _again(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, eps: float
) -> tuple[torch.Tensor, ...]:
    found: tuple[torch.Tensor, ...] = aten.cudnn_batch_norm.default(
        x, weight, bias, None, None, True, 0.0, eps
    )
    return found


def _backward(
    grad: torch.Tensor,
    x: torch.Tensor,
    weight: torch.Tensor,
    save_mean: torch.Tensor,
    save_var: torch.Tensor,
    reserve: torch.Tensor,
    eps: float,
) -> tuple[torch.Tensor, ...]:
    grad = grad.contiguous(memory_format=suggest_memory_format(x))
    found: tuple[torch.Tensor, ...] = aten.cudnn_batch_norm_backward.default(
        x, grad, weight, None, None, save_mean, save_var, eps, reserve
    )
    return found


def _fake_again(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, eps: float
) -> tuple[torch.Tensor, ...]:
    out = torch.empty_like(x, memory_format=suggest_memory_format(x))
    reserve = x.new_empty((cudnn_reserve_nbytes(x),), dtype=torch.uint8)
    return out, torch.empty_like(weight), torch.empty_like(weight), reserve


def _fake_forward(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    mean: torch.Tensor,
    var: torch.Tensor,
    momentum: float,
    eps: float,
) -> tuple[torch.Tensor, ...]:
    return (*_fake_again(x, weight, bias, eps), torch.empty_like(mean), torch.empty_like(var))


def _fake_backward(
    grad: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, *_: Any
) -> tuple[torch.Tensor, ...]:
    dx = torch.empty_like(x, memory_format=suggest_memory_format(x))
    return dx, torch.empty_like(weight), torch.empty_like(weight)


for _name, _real, _fake in (
    ("cudnn_batch_norm", _forward, _fake_forward),
    ("cudnn_batch_norm_again", _again, _fake_again),
    ("cudnn_batch_norm_backward", _backward, _fake_backward),
):
    _LIBRARY.impl(_name, _real, "CUDA")
    torch.library.register_fake(f"fxmem::{_name}", _fake, lib=_LIBRARY)

cudnn_batch_norm = torch.ops.fxmem.cudnn_batch_norm.default
"""-> output, saved mean, saved inverse deviation, cuDNN's reserve, new running mean and variance."""

cudnn_batch_norm_again = torch.ops.fxmem.cudnn_batch_norm_again.default
"""-> the first four of these."""

cudnn_batch_norm_backward = torch.ops.fxmem.cudnn_batch_norm_backward.default
"""-> the gradients of the input, the weight and the bias."""
