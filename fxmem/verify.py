"""Verification: one real step of the optimized module against the plan and the unchanged model."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from fxmem.capture import StepCall, training_step
from fxmem.errors import VerificationError
from fxmem.measure import measure
from fxmem.standins import backward
from fxmem.units import format_bytes
from fxmem.untouched import copies, untouched

TOLERANCE = 0.001

def verify_step(optimized: Any, call: StepCall) -> dict[str, Any]:
    """Run one step of each and compare.  What ``Report`` prints of it.

    Parameters, buffers, gradients and the generator are afterwards what they were before.
    Raises ``VerificationError`` when the measured peak is over the budget or off the prediction.
    """
    plan = optimized.plan
    model = optimized.__dict__["_fxmem_model"]
    inputs = (*call.args, *call.loss_inputs)
    parameters = copies(model)
    with untouched(model, parameters):
        _train(lambda: optimized(*inputs, **call.kwargs))  # warm up: handles, caches
    with untouched(model, parameters):
        measured = measure(lambda: _train(lambda: optimized(*inputs, **call.kwargs)))
        mine = _gradients(model)
        del measured
    with untouched(model, parameters):
        started = measure(lambda: None).at_start
        again = measure(lambda: _train(lambda: optimized(*inputs, **call.kwargs)))
        peak = again.peak - started + plan.resident
        del again
    with untouched(model, parameters):
        _train(lambda: training_step(*call.values()))
        equal = _equal(mine, _gradients(model))
    if plan.budget is not None and peak > max(plan.budget, plan.predicted_peak) * (1 + TOLERANCE):
        raise VerificationError(
            f"the step peaked at {format_bytes(peak)}; planned {format_bytes(plan.predicted_peak)}, "
            f"budget {format_bytes(plan.budget)}.\n"
            "  try: reserve= the difference, and please report the model"
        )
    text = "bitwise equal to the unchanged step" if equal else "not bitwise equal to eager"
    return {"measured_peak": peak, "gradients": text}


def _train(step: Callable[[], Any]) -> Any:
    outputs = step()
    backward(outputs)
    return outputs


def _gradients(model: nn.Module) -> dict[str, torch.Tensor | None]:
    return {name: p.grad for name, p in model.named_parameters()}


def _equal(a: dict[str, torch.Tensor | None], b: dict[str, torch.Tensor | None]) -> bool:
    for name, left in a.items():
        right = b[name]
        if (left is None) != (right is None):
            return False
        if left is not None and right is not None and not torch.equal(left, right):
            return False
    return True
