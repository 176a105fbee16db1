"""Looking at a step: its full report, with a budget or without one, and where it fits.

The step is captured once and planned for several budgets: that of the report, those around it, and what
each size of memory leaves.  From the largest memory down, so that what fits nowhere is looked for once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from torch import fx, nn

from fxmem.analysis.cost import CostModel, model_of
from fxmem.analysis.dynamic import given_bounds, sizes_by_name
from fxmem.api import DEFAULT, analyzed, liveness, read_options
from fxmem.basics.budget import Budget
from fxmem.basics.device import library_memory
from fxmem.basics.errors import BudgetInfeasibleError, CaptureError, FixedSizeError, FxmemError
from fxmem.basics.gpus import GPUS, Gpu
from fxmem.basics.sizes import symbol
from fxmem.codes.gradient_noise import Noise
from fxmem.graphs.workspace import device_at_hand
from fxmem.planning.plan import Plan
from fxmem.reports.fits import Alternative, Fit, Fits, usable
from fxmem.reports.report import Report
from fxmem.steps.analyze import Analysis
from fxmem.steps.inventory import Liveness
from fxmem.steps.options import Options
from fxmem.steps.pipeline import Planned, decide
from fxmem.steps.step_report import StepReport
from fxmem.steps.validity import decided


def report(
    model: nn.Module,
    example_inputs: Any = None,
    budget: Any = None,
    *,
    example_kwargs: Mapping[str, Any] | None = None,
    dynamic_shapes: Any = None,
    loss_fn: Callable[..., Any] | None = None,
    loss_inputs: Any = (),
    allow: Any = DEFAULT,
    noise: float | Noise = 0.01,
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
        _refuse_without_a_budget(
            allow=allow, noise=noise, on_infeasible=on_infeasible, cost=cost, gpus=gpus
        )
        found = liveness(
            model, example_inputs, example_kwargs=example_kwargs, dynamic_shapes=dynamic_shapes,
            loss_fn=loss_fn, loss_inputs=loss_inputs, reserve=reserve,
        )  # fmt: skip
        return StepReport(found, _unchanged(found))
    options = read_options(
        model, budget, allow=allow, noise=noise, reserve=reserve, on_infeasible=on_infeasible,
        compiler="eager", cost=cost, plan=None,
    )  # fmt: skip
    step = (model, example_inputs, example_kwargs, dynamic_shapes, loss_fn, loss_inputs)
    batches = _batches(*step) if gpus else None  # no two captures at once
    with analyzed(model, options, *step[1:]) as (analysis, names):
        planned, _ = decided(analysis, options, sizes_by_name(analysis.call, names), memory=True)
        return Report(
            planned.plan,
            outside=options.outside.categories,
            memory=planned.memory,
            alternatives=tuple(_alternatives(analysis, options, planned.plan)),
            gpus=fits_of(analysis, options, batches) if batches else None,
        )


# -- Without a budget ---------------------------------------------------------------------------------

_OF_PLANS = {
    "allow": DEFAULT,
    "noise": 0.01,
    "on_infeasible": "raise",
    "cost": "auto",
    "gpus": False,
}
"""What only a plan has, and what it is where nobody gives it."""


def _refuse_without_a_budget(**options: Any) -> None:
    given = [name for name, value in options.items() if value != _OF_PLANS[name]]
    if given:
        raise FxmemError(
            f"without a budget there is no plan, so {', '.join(given)} has no meaning\n"
            '  try: fxmem.report(model, inputs, "24GiB", ...)'
        )


def _unchanged(found: Liveness) -> int | None:
    """Bytes at the peak of the model's own step; None where it cannot be run on fake tensors."""
    try:
        return found.unchanged_at()
    except FxmemError:
        return None


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
    dynamic_shapes: Any = None,
    loss_fn: Callable[..., Any] | None = None,
    loss_inputs: Any = (),
    allow: Any = DEFAULT,
    noise: float | Noise = 0.01,
    reserve: Any = 0,
    gpus: tuple[Gpu, ...] = GPUS,
) -> Fits:
    """Where the step fits, and the largest batch of it as it is; arguments as ``fxmem.plan``'s.

    gpus: those to look at.  The batch is what the first dimension of the inputs is called, B without
    ``dynamic_shapes``; its largest size comes from the closed form, which ``max_batch`` makes exact.

    Operators and what they hold are those of the model's own device, or of the device at hand for a
    model on the meta device.  Raises as ``fxmem.plan`` does, but not where the step fits nowhere.
    """
    options = read_options(
        model, "min", allow=allow, noise=noise, reserve=reserve, on_infeasible="raise",
        compiler="eager", cost="auto", plan=None,
    )  # fmt: skip
    step = (model, example_inputs, example_kwargs, dynamic_shapes, loss_fn, loss_inputs)
    batches = _batches(*step)
    with analyzed(model, options, example_inputs, example_kwargs, None, loss_fn, loss_inputs) as (
        analysis,
        _,
    ):
        return fits_of(analysis, options, batches, gpus)


@dataclass(frozen=True)
class _Batches:
    """The closed form of a step as it is, to be solved for the size called ``symbol``.

    peak: bytes of the step at the form's hint.  high: the largest size that the user has in mind.
    found is None where there is nothing to solve, and why_none says why.
    """

    found: Liveness | None = None
    symbol: str = ""
    peak: int | None = None
    high: int | None = None
    why_none: str = ""

    def largest(self, room: int) -> int | None:
        if self.found is None:
            return None
        return self.found.largest(self.symbol, room, peak=self.peak, high=self.high)


def _batches(
    model: nn.Module, inputs: Any, kwargs: Any, dynamic_shapes: Any, loss_fn: Any, loss_inputs: Any
) -> _Batches:
    try:
        found = liveness(
            model, inputs, example_kwargs=kwargs, dynamic_shapes=dynamic_shapes,
            loss_fn=loss_fn, loss_inputs=loss_inputs,
        )  # fmt: skip
    except CaptureError as error:  # with symbols: the step itself may well be captured
        return _Batches(why_none=error.short if isinstance(error, FixedSizeError) else _NO_SIZE)
    places = {name: info.where for name, info in found.symbols.items()}
    name = next((n for n, where in places.items() if any(map(_is_first, where))), None)
    if not places and found.fixed:
        return _Batches(why_none=next(iter(found.fixed.values())).short)
    if name is None:
        return _Batches(why_none="no input has a named first dimension" if places else _NO_SIZE)
    info = found.symbols[name]
    if name in found.fixed:
        return _Batches(why_none=found.fixed[name].short)
    if info.low == info.high:
        return _Batches(why_none=f"the step works with {name}={info.hint} alone")
    if symbol(name) not in found.peak.free_symbols:
        return _Batches(why_none=f"the peak is the same for every {name}")
    high = given_bounds(dynamic_shapes).get(name, (1, None))[1]
    return _Batches(found, name, _unchanged(found), high)


_NO_SIZE = "the step cannot be traced with a batch of any size"


def _is_first(place: str) -> bool:
    return place.endswith(".shape[0]")


def fits_of(
    analysis: Analysis, options: Options, batches: _Batches, gpus: tuple[Gpu, ...] = GPUS
) -> Fits:
    """Where a captured step fits."""
    rows = sorted(_rows(analysis, options, batches, gpus), key=lambda row: row.nbytes)
    return Fits(
        type(analysis.call.model).__name__,
        str(analysis.device if analysis.device.type != "meta" else device_at_hand()),
        analysis.baseline_peak,
        options.reserve,
        tuple(rows),
        batches.symbol,
        batches.why_none,
        batches.found is not None and batches.found.rough,
    )


def _rows(
    analysis: Analysis, options: Options, batches: _Batches, gpus: tuple[Gpu, ...]
) -> Iterator[Fit]:
    """One size of memory after the other, the largest first; below one that is too small all are."""
    options = replace(options, on_infeasible="raise")
    too_small: int | None = None
    for size in sorted({usable(gpu) for gpu in gpus}, reverse=True):
        planned = None
        room = size - options.reserve - library_memory(analysis.device)
        as_it_is = analysis.baseline_peak <= room
        if not as_it_is and too_small is None and room > 0:
            try:
                planned = decide(analysis, replace(options, budget=Budget.parse(size)))
            except BudgetInfeasibleError as error:
                too_small = error.smallest_peak
        most = batches.largest(room)
        for gpu in gpus:
            if usable(gpu) == size:
                yield replace(_row(gpu, analysis, planned, too_small, as_it_is), largest=most)


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
