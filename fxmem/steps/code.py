"""Code for a planned step, by the compiler that was asked for."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from fxmem.graphs.graph import JointGraph
from fxmem.steps.analyze import Analysis
from fxmem.steps.backward import Coded, op_by_op
from fxmem.steps.options import Options
from fxmem.steps.pipeline import Planned
from fxmem.steps.validity import Validity, decided


def decided_for_code(
    analysis: Analysis, options: Options, here: Mapping[str, int], *, memory: bool = False
) -> tuple[Planned, Validity | None]:
    """``decided``; but Inductor's code may keep a budget that no plan keeps operator by operator."""
    if options.uses_inductor(analysis.device) and options.plan is None:
        options = replace(options, on_infeasible="best")
    return decided(analysis, options, here, memory=memory)


def step_code(
    analysis: Analysis,
    options: Options,
    graph: JointGraph,
    found: tuple[Planned, Validity | None],
    here: Mapping[str, int],
) -> tuple[Coded, Validity | None]:
    """The step that was decided on, ready to run, and the sizes that it holds for.

    graph: as it was captured.  found, here: what was decided, and the sizes that may change as they
    are now.  With Inductor the plan may be another one in the end, see ``code_search.py``.
    Raises ``BudgetInfeasibleError`` where neither its code nor the operators keep the budget.
    """
    planned, validity = found
    if not options.uses_inductor(analysis.device):
        return op_by_op(planned, graph), validity
    from fxmem.steps.inductor_step import inductor_step  # which takes a second to import

    return inductor_step(analysis, options, graph, found, here)
