"""Looking at a step: its full report, with a budget or without one, and where it fits.

The step is captured once and planned for several budgets: that of the report, those around it, and what
each size of memory leaves.  From the largest memory down, so that what fits nowhere is looked for once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from typing import Any

from torch import fx, nn

from fxmem.api import ALLOWED, analyzed, liveness, read_options
from fxmem.budget import Budget, read_reserve
from fxmem.cost import CostModel, model_of
from fxmem.dynamic import sizes_by_name
from fxmem.errors import BudgetInfeasibleError, FxmemError
from fxmem.fits import Alternative, Fit, Fits, usable
from fxmem.gpus import GPUS, Gpu
from fxmem.inventory import Liveness
from fxmem.pipeline import Analysis, Options, Planned, decide
from fxmem.plan import Plan
from fxmem.report import Report
from fxmem.step_report import StepReport
from fxmem.validity import decided


def report(
    model: nn.Module,
    example_inputs: Any = None,
    budget: Any = None,
    *,
    example_kwargs: Mapping[str, Any] | None = None,
    dynamic_shapes: Any = None,
    loss_fn: Callable[..., Any] | None = None,
    loss_inputs: Any = (),
    allow: Any = ALLOWED,
    reserve: Any = 0,
    on_infeasible: str = "raise",
    cost: Any = "auto",
    gpus: bool = False,
) -> Report | StepReport:
    """What ``optimize`` would decide, with the memory of every step and what other budgets would cost.

    Without a budget: what the step holds as it is, and closed forms of that.  Arguments as
    ``fxmem.plan``'s; gpus: also say on which GPUs the step fits.  Nothing is compiled or allocated;
    the model may be on the meta device.  Raises as ``fxmem.plan`` and ``fxmem.liveness`` do, and
    ``FxmemError`` for what only a plan has, without a budget.
    """
    if budget is None:
        _refuse_without_a_budget(allow=allow, on_infeasible=on_infeasible, cost=cost, gpus=gpus)
        found = liveness(
            model, example_inputs, example_kwargs=example_kwargs, dynamic_shapes=dynamic_shapes,
            loss_fn=loss_fn, loss_inputs=loss_inputs,
        )  # fmt: skip
        return _as_it_is(found, reserve)
    options = read_options(
        model, budget, allow=allow, noise=0.01, reserve=reserve, on_infeasible=on_infeasible,
        compiler="eager", cost=cost, plan=None,
    )  # fmt: skip
    with analyzed(
        model, options, example_inputs, example_kwargs, dynamic_shapes, loss_fn, loss_inputs
    ) as (analysis, names):
        planned, _ = decided(analysis, options, sizes_by_name(analysis.call, names), memory=True)
        return Report(
            planned.plan,
            memory=planned.memory,
            alternatives=tuple(_alternatives(analysis, options, planned.plan)),
            gpus=fits_of(analysis, options) if gpus else None,
        )


# -- Without a budget ---------------------------------------------------------------------------------

_OF_PLANS = {"allow": ALLOWED, "on_infeasible": "raise", "cost": "auto", "gpus": False}
"""What only a plan has, and what it is where nobody gives it."""


def _refuse_without_a_budget(**options: Any) -> None:
    given = [name for name, value in options.items() if value != _OF_PLANS[name]]
    if given:
        raise FxmemError(
            f"without a budget there is no plan, so {', '.join(given)} has no meaning\n"
            '  try: fxmem.report(model, inputs, "24GiB", ...)'
        )


def _as_it_is(found: Liveness, reserve: Any) -> StepReport:
    try:
        unchanged = found.unchanged_at()
    except FxmemError:
        unchanged = None
    return StepReport(found, unchanged, read_reserve(reserve).nbytes)


# -- Other budgets -----------------------------------------------------------------------------------

_AROUND = (1.25, 0.75, 0.5)
"""Budgets to look at beside the one that was asked for, as shares of it."""


def _alternatives(analysis: Analysis, options: Options, plan: Plan) -> Iterator[Alternative]:
    """What more or fewer bytes would buy: plans whose peak or price differs."""
    if plan.smallest:
        return
    options = replace(options, on_infeasible="raise")
    seen = {(plan.predicted_peak, plan.added_seconds)}
    for share in _AROUND:
        budget = round(plan.budget * share)
        asked = replace(options, budget=Budget.parse(budget + options.reserve))
        try:
            other = decide(analysis, asked).plan
        except BudgetInfeasibleError as error:
            other = error.best_plan
            yield Alternative(budget, other.predicted_peak, other.predicted_overhead, False)
            return
        if (other.predicted_peak, other.added_seconds) not in seen:
            seen.add((other.predicted_peak, other.added_seconds))
            yield Alternative(budget, other.predicted_peak, other.predicted_overhead, True)


# -- Where it fits -----------------------------------------------------------------------------------


def fits(
    model: nn.Module,
    example_inputs: Any = None,
    *,
    example_kwargs: Mapping[str, Any] | None = None,
    loss_fn: Callable[..., Any] | None = None,
    loss_inputs: Any = (),
    allow: Any = ALLOWED,
    reserve: Any = 0,
    gpus: tuple[Gpu, ...] = GPUS,
) -> Fits:
    """Where the step fits; arguments as ``fxmem.plan``'s, gpus: those to look at.

    Operators and what they hold are those of the model's own device, or of the device at hand for a
    model on the meta device.  Raises as ``fxmem.plan`` does, but not where the step fits nowhere.
    """
    options = read_options(
        model, "min", allow=allow, noise=0.01, reserve=reserve, on_infeasible="raise",
        compiler="eager", cost="auto", plan=None,
    )  # fmt: skip
    with analyzed(model, options, example_inputs, example_kwargs, None, loss_fn, loss_inputs) as (
        analysis,
        _,
    ):
        return fits_of(analysis, options, gpus)


def fits_of(analysis: Analysis, options: Options, gpus: tuple[Gpu, ...] = GPUS) -> Fits:
    """Where a captured step fits."""
    rows = sorted(_rows(analysis, options, gpus), key=lambda row: row.nbytes)
    return Fits(
        type(analysis.call.model).__name__,
        str(analysis.device),
        analysis.baseline_peak,
        options.reserve,
        tuple(rows),
    )


def _rows(analysis: Analysis, options: Options, gpus: tuple[Gpu, ...]) -> Iterator[Fit]:
    """One size of memory after the other, the largest first; below one that is too small all are."""
    options = replace(options, on_infeasible="raise")
    too_small: int | None = None
    for size in sorted({usable(gpu) for gpu in gpus}, reverse=True):
        planned = None
        room = size - options.reserve
        as_it_is = analysis.baseline_peak <= room
        if not as_it_is and too_small is None and room > 0:
            try:
                planned = decide(analysis, replace(options, budget=Budget.parse(size)))
            except BudgetInfeasibleError as error:
                too_small = error.smallest_peak
        for gpu in gpus:
            if usable(gpu) == size:
                yield _row(gpu, analysis, planned, too_small, as_it_is)


def _row(
    gpu: Gpu, analysis: Analysis, planned: Planned | None, smallest: int | None, as_it_is: bool
) -> Fit:
    known = (gpu.name, gpu.nbytes, usable(gpu))
    if as_it_is:
        return Fit(*known, "as it is", analysis.baseline_peak, 0.0)
    if planned is None:
        return Fit(*known, "no", smallest or analysis.baseline_peak, None)
    peak = planned.plan.predicted_peak
    return Fit(*known, "with a plan", peak, overhead(analysis, planned, model_of(gpu)))


def overhead(analysis: Analysis, planned: Planned, cost: CostModel) -> float:
    """Added time / unchanged time of a plan by another cost model than the one it was made with."""
    unchanged = _seconds(analysis.expected.module.graph, cost)
    added = _seconds(planned.graph.module.graph, cost) - _seconds(analysis.graph.module.graph, cost)
    return added / unchanged if unchanged else 0.0


def _seconds(graph: fx.Graph, cost: CostModel) -> float:
    return sum(cost.seconds(node) for node in graph.nodes)
