"""The pipeline: analyze, choose, rewrite, check.  ``decide`` reads top to bottom."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import torch
from torch import fx

from fxmem.analysis.liveness import MemoryTimeline, timeline
from fxmem.basics.device import library_memory
from fxmem.basics.errors import VerificationError
from fxmem.graphs.graph import JointGraph, bytes_of_scalars
from fxmem.graphs.lifetimes import BeforeAfter
from fxmem.graphs.partition import Split, split
from fxmem.planning.plan import Plan
from fxmem.planning.planner import Choice
from fxmem.reports.words import memory_of
from fxmem.steps.analyze import Analysis
from fxmem.steps.choose import added, choose
from fxmem.steps.decisions import explain, infeasible, too_large
from fxmem.steps.options import Options
from fxmem.steps.rewrite import expected_to_run, rewrite


@dataclass(frozen=True)
class Planned:
    """A step that is ready to run.

    plan: what was promised.  graph: the rewritten joint graph, for every tangent.  split: its two
    halves.  undefined: names of the tangents that nobody is expected to send.  line, before: when each
    storage lives, as planned and with everything kept.  functional: the graph before any operator
    wrote over an operand, for compilers that reuse memory themselves.  memory: of each operator, where it
    was asked for.
    """

    plan: Plan
    graph: JointGraph
    split: Split
    undefined: tuple[str, ...]
    line: MemoryTimeline = field(repr=False)
    before: MemoryTimeline = field(repr=False)
    functional: JointGraph = field(repr=False)
    memory: BeforeAfter | None = field(default=None, repr=False)


def decide(analysis: Analysis, options: Options, *, memory: bool = False) -> Planned:
    """Choose, rewrite and check.  Raises ``BudgetInfeasibleError`` as ``options`` asks for.

    memory: keep that of each operator too, for reports.
    """
    options = replace(options, library=library_memory(analysis.device))
    budget = options.budget.resolve(
        device=analysis.device,
        baseline_peak=analysis.baseline_peak,
        reserve=options.reserve + options.library,
    )
    limit = budget
    if budget is not None:
        limit = limit_for(budget, analysis.flow.loss_outside > 0, analysis.device)
    applied = _applied(analysis, options, limit)
    if applied.settled and applied.form.allotment is not None and options.plan is None:
        exact = tuple(name for name in options.allow if name != "quantize")
        other = _applied(analysis, replace(options, allow=exact), limit)
        if other.rank(limit) <= applied.rank(limit):
            applied = other  # it took more to settle than the codes had won
    analysis, choice, floor = applied.form, applied.choice, applied.floor
    rewritten, halves, line = applied.graph, applied.halves, applied.line
    whole = analysis.whole or analysis
    before = timeline(split(whole.expected), whole.workspaces)
    plan = explain(analysis, options, budget, choice, before, line, floor)
    if budget is not None and plan.predicted_peak > budget and options.on_infeasible == "raise":
        raise (infeasible if options.plan is None else too_large)(plan)
    watched = memory_of(analysis, before, line) if memory else None
    return Planned(
        plan, rewritten, halves, analysis.undefined, line, before, applied.functional, watched
    )


def limit_for(budget: int, loss_outside: bool, device: torch.device) -> int:
    """Bytes that a captured step may hold of a budget, where the caller may compute the loss."""
    return budget - bytes_of_scalars(device) if loss_outside else budget


@dataclass(frozen=True)
class _Applied:
    """A choice and the graph that it makes.

    functional: before operators write over their operands.  settled: was it planned again for less than
    was asked?
    """

    form: Analysis
    choice: Choice
    floor: int | None
    graph: JointGraph
    halves: Split
    line: MemoryTimeline
    functional: JointGraph
    settled: bool

    @property
    def added(self) -> float:
        return added(self.form, self.choice)

    def rank(self, budget: int | None) -> tuple[int, float]:
        """Bytes above the budget, or where none is named all bytes, and then the added time."""
        peak = self.line.peak(self.graph.bindings()).nbytes
        return max(peak - (budget or 0), 0), self.added


def _applied(analysis: Analysis, options: Options, budget: int | None) -> _Applied:
    form, choice, floor = choose(analysis, options, budget)
    graph, halves, line, functional = rewrite(form, choice)
    settled = line.peak(form.graph.bindings()).nbytes > choice.outcome.peak
    if settled:
        choice, graph, halves, line, functional = _settle(form, options, budget, choice)
    return _Applied(form, choice, floor, graph, halves, line, functional, settled)


def _settle(
    analysis: Analysis, options: Options, budget: int | None, choice: Choice
) -> tuple[Choice, JointGraph, Split, MemoryTimeline, JointGraph]:
    """Plan again for a little less while the rewritten graph peaks above what was simulated.

    The two differ by bytes, where a second run returns less or copies more than the first.
    """
    bindings = analysis.graph.bindings()
    target = budget
    for _ in range(4):
        graph, halves, line, functional = rewrite(analysis, choice)
        over = line.peak(bindings).nbytes - (budget or 0)
        if budget is None or target is None or over <= 0 or options.plan is not None:
            break
        target -= over
        again = analysis.planner.fit(target)
        if again is None:
            break
        choice = replace(again, bound=choice.bound)  # which is of the budget that was asked for
    return choice, graph, halves, line, functional


def backward_for(planned: Planned, undefined: tuple[str, ...]) -> fx.GraphModule:
    """The backward to run when exactly these tangents are undefined."""
    if not undefined:
        return planned.split.backward
    backward = split(expected_to_run(planned.graph, undefined)).backward
    known = {n.name for n in planned.split.backward.graph.find_nodes(op="placeholder")}
    unknown = [n.name for n in backward.graph.find_nodes(op="placeholder") if n.name not in known]
    if unknown:
        raise VerificationError(f"the forward does not save {unknown}")
    return backward
