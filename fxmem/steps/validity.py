"""For which sizes a plan keeps its budget: the closed forms of the graph that it rewrote."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import torch

from fxmem.basics.errors import BudgetInfeasibleError, PlanMismatchError
from fxmem.graphs.boundary import largest
from fxmem.graphs.workspace import Workspaces, save_workspaces
from fxmem.planning.plan import Plan
from fxmem.planning.ranks import agreed
from fxmem.steps.analyze import Analysis
from fxmem.steps.decisions import infeasible, too_large
from fxmem.steps.options import Options
from fxmem.steps.pipeline import Planned, decide, limit_for
from fxmem.steps.rewrite import as_run
from fxmem.steps.symbolic import Trace, traced

UNSURE = (0.8, 1.25)
"""Shares of the budget between which a formula is not enough and operators are measured."""


@dataclass
class Validity:
    """A plan at any sizes.  limit: bytes that its step may hold at the peak."""

    trace: Trace
    limit: int
    _known: dict[tuple[int, ...], bool] = field(default_factory=dict)

    def fits(self, sizes: Mapping[str, int]) -> bool:
        """Does the plan keep its budget at these sizes of all symbols?  Looked up once for each."""
        key = tuple(sizes.values())
        if key not in self._known:
            self._known[key] = self._fits(sizes)
        return self._known[key]

    def _fits(self, sizes: Mapping[str, int]) -> bool:
        if not self.trace.covers(sizes):
            return False
        about = self.trace.by_form(sizes)
        if not UNSURE[0] * self.limit < about < UNSURE[1] * self.limit:
            return about <= self.limit
        return self.trace.peak_at(sizes) <= self.limit

    def ranges(self) -> dict[str, tuple[int, int]]:
        """Symbol -> smallest and largest size for which the plan keeps its budget.

        The others are the example's or less.
        """
        here = self.trace.here
        return {name: self._range(name, size) for name, size in here.items()}

    def _range(self, name: str, size: int) -> tuple[int, int]:
        if name in self.trace.fixed:
            return size, size
        return min(self.trace.ranges[name][0], size), self._largest(name, self.trace.here) or size

    def admissible(self, sizes: Mapping[str, int]) -> dict[str, int]:
        """Symbol -> the largest size that fits while the others are as given; 0 if none does."""
        return {name: self._largest(name, sizes) for name in sizes if name in self.trace.ranges}

    def _largest(self, name: str, others: Mapping[str, int]) -> int:
        """By the formula; then exactly, but far from the example, where to measure is dear."""
        low, high = self.trace.ranges[name]

        def by_form(size: int) -> int:
            return self.trace.by_form({**others, name: size})

        def exact(size: int) -> int:
            return self.trace.peak_at({**others, name: size})

        found = largest(by_form, self.limit, others[name], low, high)
        if found is None or found <= 4 * self.trace.here[name]:
            found = largest(exact, self.limit, found or low, low, high)
        return found or 0


def validity_of(
    planned: Planned, workspaces: Workspaces, device: torch.device, here: Mapping[str, int]
) -> Validity:
    """The closed forms of what was planned at the sizes ``here``."""
    _, _, run, table = as_run(planned.graph, workspaces, device)
    trace = traced(planned.graph, run, table, device, here)
    save_workspaces(table, device)
    plan = planned.plan
    work = trace.line.steps[trace.line.boundary].workspace
    limit = limit_for(plan.budget, work != 0, device)
    # The smallest plan may take the last bytes that a loss outside should have.
    return Validity(trace, max(limit, min(plan.predicted_peak, plan.budget)))


def with_ranges(plan: Plan, validity: Validity) -> Plan:
    return replace(plan, valid_for=validity.ranges())


def decided(
    analysis: Analysis, options: Options, here: Mapping[str, int], *, memory: bool = False
) -> tuple[Planned, Validity | None]:
    """The plan, and where sizes may change, for which of them it holds.

    here: the sizes that may change, as they are in the example.  memory: as ``decide``'s.
    In a job of several processes, all that plan this step get one plan.
    Raises ``BudgetInfeasibleError``, then with the largest sizes that fit.
    """
    mine = _decided(analysis, options, here, memory)
    if options.plan is not None:
        return mine
    plan = agreed(mine[0].plan)
    if plan is mine[0].plan:
        return mine
    try:
        return _decided(analysis, replace(options, plan=plan), here, memory)
    except (BudgetInfeasibleError, PlanMismatchError):
        return mine  # a budget that each rank reads from its own device


def _decided(
    analysis: Analysis, options: Options, here: Mapping[str, int], memory: bool
) -> tuple[Planned, Validity | None]:
    if not here:
        return decide(analysis, options, memory=memory), None
    planned = decide(analysis, replace(options, on_infeasible="best"), memory=memory)
    validity = validity_of(planned, analysis.workspaces, analysis.device, here)
    if planned.plan.predicted_peak > planned.plan.budget and options.on_infeasible == "raise":
        error = (infeasible if options.plan is None else too_large)(planned.plan)
        raise _with_admissible(error, validity, here)
    return replace(planned, plan=with_ranges(planned.plan, validity)), validity


def _with_admissible(
    error: BudgetInfeasibleError, validity: Validity, here: Mapping[str, int]
) -> BudgetInfeasibleError:
    """The error again, with the sizes that would fit."""
    lines = []
    for name, most in validity.admissible(here).items():
        others = ", ".join(f"{n}={size}" for n, size in here.items() if n != name)
        fits = f"{name} <= {most}" if most else f"no {name}"
        lines.append(f"{fits}{f' at {others}' if others else ''}")
    text = f"{error}\n  fits    {'; '.join(lines)}" if lines else str(error)
    return BudgetInfeasibleError(
        text, smallest_peak=error.smallest_peak, best_plan=error.best_plan, why=error.why
    )
