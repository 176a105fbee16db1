"""Activations whose backward multiplies the gradient by a derivative, whatever it is computed from."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

aten = torch.ops.aten


@dataclass(frozen=True)
class Activation:
    """target: the backward, of the gradient, what is saved, and ``options``.  low, high: f' is within."""

    target: Any
    low: float
    high: float
    options: tuple[tuple[str, Any], ...] = ()

    def derivative(self, saved: torch.Tensor) -> torch.Tensor:
        found: torch.Tensor = self.target(torch.ones_like(saved), saved, **dict(self.options))
        return found


ACTIVATIONS = {
    "gelu": Activation(aten.gelu_backward.default, -0.13, 1.13),
    "gelu tanh": Activation(aten.gelu_backward.default, -0.13, 1.13, (("approximate", "tanh"),)),
    "silu": Activation(aten.silu_backward.default, -0.1, 1.1),
    "tanh": Activation(aten.tanh_backward.default, 0.0, 1.0),
    "sigmoid": Activation(aten.sigmoid_backward.default, 0.0, 0.25),
}
"""By name.  The least derivative is -0.12890 of GELU, -0.12899 of its approximation, -0.09984 of SiLU."""


def activation_of(node: fx.Node) -> tuple[fx.Node, fx.Node, str] | None:
    """Gradient, saved tensor and name, if the node is the backward of one of these."""
    grad, saved = (*node.args, None, None)[:2]
    if not (isinstance(grad, fx.Node) and isinstance(saved, fx.Node)):
        return None
    options = {k: v for k, v in node.kwargs.items() if (k, v) != ("approximate", "none")}
    for name, activation in ACTIVATIONS.items():
        if node.target is activation.target and options == dict(activation.options):
            return grad, saved, name
    return None
