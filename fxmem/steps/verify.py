"""Verification: one real step of the optimized module against the plan and the unchanged model."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from fxmem.basics.errors import VerificationError
from fxmem.basics.units import format_bytes
from fxmem.codes.gradient_noise import in_double
from fxmem.graphs.capture import StepCall, training_step
from fxmem.graphs.measure import measure
from fxmem.graphs.standins import backward
from fxmem.graphs.untouched import copies, untouched

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
    if plan.noise is None or plan.noise.tier == "exact":
        return {"measured_peak": peak, "gradients": text}
    noise = _measured_noise(optimized, call, parameters)
    _refuse_more_noise(plan, sum(noise.values()))
    exact = sum(1 for name in mine if not noise[name])
    text = f"of {exact} of {len(mine)} parameters bitwise equal to the unchanged step"
    return {"measured_peak": peak, "gradients": text, "noise": noise}


DRAWS = 8
_MARGIN = 1.25
"""Times the ceiling that so few draws may come to."""


def _measured_noise(optimized: Any, call: StepCall, parameters: Any) -> dict[str, float]:
    """Parameter -> mean squared distance of its gradient from the unchanged step's, summed over it."""
    model = optimized.__dict__["_fxmem_model"]
    inputs = (*call.args, *call.loss_inputs)
    found = dict.fromkeys(_gradients(model), 0.0)
    for seed in range(DRAWS):
        both = []
        for step in (
            lambda: optimized(*inputs, **call.kwargs),
            lambda: training_step(*call.values()),
        ):
            with untouched(model, parameters):
                torch.manual_seed(seed)
                _train(step)
                both.append(_gradients(model))
        for name, gradient in both[0].items():
            other = both[1][name]
            if gradient is not None and other is not None:
                error = (in_double(gradient) - in_double(other)).square().sum()
                found[name] += float(error) / DRAWS
    return found


def _refuse_more_noise(plan: Any, added: float) -> None:
    own = sum(group.own for group in plan.noise.parameters)
    if added > _MARGIN * plan.noise.ceiling * own:
        raise VerificationError(
            f"codes add {100 * added / own:.3g} % to the variance of the gradients, measured over "
            f"{DRAWS} draws; predicted {100 * plan.noise.predicted:.3g} %, allowed "
            f"{100 * plan.noise.ceiling:.3g} %.\n  try: a lower noise=, and please report the model"
        )


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
