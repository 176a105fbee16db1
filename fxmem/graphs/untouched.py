"""Steps that leave no trace: parameters, buffers, gradients and the generator come back."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

_Copies = list[tuple[torch.Tensor, torch.Tensor]]
"""Each parameter, and what it was."""


def copies(model: nn.Module) -> _Copies:
    """In the host's memory, because a device may have no room for them twice."""
    return [(p, p.detach().to("cpu", copy=True)) for p in model.parameters()]


@contextmanager
def untouched(model: nn.Module, parameters: _Copies) -> Iterator[None]:
    """Run a step as if it had not been: its state, gradients and the generator come back."""
    versions = [p._version for p, _ in parameters]
    buffers = [(b, b.detach().clone()) for b in model.buffers()]
    gradients = [(p, p.grad) for p in model.parameters()]
    devices = {p.device for p in model.parameters() if p.device.type == "cuda"}
    for p, _ in gradients:
        p.grad = None
    with torch.random.fork_rng(devices=sorted(devices, key=str)):
        torch.manual_seed(0)
        try:
            yield
        finally:
            for p, gradient in gradients:
                p.grad = gradient
            with torch.no_grad():
                for buffer, value in buffers:
                    buffer.copy_(value)
                for (parameter, value), version in zip(parameters, versions, strict=True):
                    if parameter._version != version:  # few steps write parameters
                        parameter.copy_(value)
