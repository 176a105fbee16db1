"""The planned step as Inductor's code that keeps its budget.

Code is made of the plan that is foreseen to do best (code_search.py), and one step of it is run and
measured.  If it does not keep the budget after all, code is made of one more plan; then the step runs
operator by operator.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import replace

from fxmem.basics.units import format_bytes
from fxmem.graphs.graph import JointGraph
from fxmem.planning.plan import Plan
from fxmem.steps.analyze import Analysis
from fxmem.steps.backward import Backward, Coded, op_by_op
from fxmem.steps.code_search import CodeSearch
from fxmem.steps.compile_errors import explained
from fxmem.steps.decisions import infeasible
from fxmem.steps.looks import Found, Tried, fits
from fxmem.steps.measured_step import measured
from fxmem.steps.options import Options
from fxmem.steps.symbolic import as_compiled
from fxmem.steps.validity import Validity

log = logging.getLogger(__name__)


def inductor_step(
    analysis: Analysis,
    options: Options,
    graph: JointGraph,
    found: Found,
    here: Mapping[str, int],
) -> tuple[Coded, Validity | None]:
    """Code for a planned step that keeps its budget as measured; operator by operator if no code does.

    found, here: what was decided, and the sizes that may change as they are now.
    Raises ``BudgetInfeasibleError`` where operators do not, either.
    """
    search = CodeSearch(analysis, options, found, here)
    first = search.best()
    if first.is_hopeless:
        return _without_code(options, graph, found, first.foreseen or 0)
    coded = [(_compiled(first, analysis, graph), first)]
    as_measured = coded[0][0].planned.plan
    if first.foreseen is None or not fits(as_measured):
        second = search.instead(first, as_measured.predicted_peak)
        if second is not None:
            coded.append((_compiled(second, analysis, graph), second))
    fitting = [one for one in coded if fits(one[0].planned.plan)]
    if not fitting:
        least = min((one.planned.plan for one, _ in coded), key=lambda plan: plan.predicted_peak)
        return _without_code(options, graph, found, least.predicted_peak, least)
    best, tried = min(fitting, key=lambda one: one[1].seconds)
    valid = tried.validity
    if valid is not None:
        # Larger sizes come with a larger error, those that are served with this one at most.
        more = best.planned.plan.predicted_peak - tried.plan.predicted_peak
        limit = valid.limit if fits(tried.plan) else tried.plan.predicted_peak
        valid = replace(valid, trace=as_compiled(valid.trace), limit=limit - max(more, 0))
    return best, valid


def _compiled(tried: Tried, analysis: Analysis, graph: JointGraph) -> Coded:
    planned, code = tried.planned, tried.code
    forward = code.forward()
    backward, written = Backward(planned, graph, code), tuple(code.written.values())
    coded = Coded(planned, code.split, forward, backward, written=written)
    with explained("running the step as Inductor's code", planned.graph.module):
        phases = measured(coded, analysis)
    plan = planned.plan
    peak = plan.resident + phases.peak
    budget = max(plan.predicted_peak, peak) if plan.smallest else plan.budget
    plan = replace(plan, predicted_peak=peak, budget=budget)
    log.info("%s", _said(tried, peak))
    return replace(coded, planned=replace(planned, plan=plan), phases=phases)


def _without_code(
    options: Options, graph: JointGraph, found: Found, peak: int, *measured: Plan
) -> tuple[Coded, Validity | None]:
    """The step operator by operator, since Inductor's code of it peaks higher than the budget.

    peak: of its code, bytes.  measured: plans whose code was run.  Raises ``BudgetInfeasibleError`` with
    the smallest where operators do not keep the budget, either.
    """
    planned, validity = found
    if options.on_infeasible == "raise" and not fits(planned.plan):
        raise infeasible(min([planned.plan, *measured], key=lambda plan: plan.predicted_peak))
    log.warning(
        "Inductor's code for the step peaks at %s, more than the budget of %s, so the step runs "
        "operator by operator",
        format_bytes(peak),
        format_bytes(planned.plan.budget),
    )
    return op_by_op(planned, graph), validity


def _said(tried: Tried, measured: int) -> str:
    foreseen = "" if tried.foreseen is None else f"{format_bytes(tried.foreseen)} were foreseen, "
    return (
        f"Inductor's code peaks at {format_bytes(measured)}, measured; {foreseen}operator by operator "
        f"{format_bytes(tried.plan.predicted_peak)} were predicted, "
        f"the budget is {format_bytes(tried.plan.budget)}"
    )
