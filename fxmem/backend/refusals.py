"""Errors for a step in several graphs: it finds no room, or a plan was given for it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from fxmem.basics.errors import BudgetInfeasibleError, PlanMismatchError
from fxmem.basics.units import format_bytes
from fxmem.planning.ledger import Around
from fxmem.planning.whole_step import REST, in_step
from fxmem.steps.decisions import infeasible

if TYPE_CHECKING:
    from fxmem.backend.program import Program


def of_a_share(error: BudgetInfeasibleError) -> BudgetInfeasibleError:
    """The error for a share of what one graph peaks at, which may not be all of the step."""
    return BudgetInfeasibleError(
        f"{error}\n  note    the share is of this one graph; where more make the step, as with blocks that "
        "are compiled one by one, ask for bytes",
        smallest_peak=error.smallest_peak,
        best_plan=error.best_plan,
        why=error.why,
    )


def in_figures_of_the_step(
    error: BudgetInfeasibleError, needed: Around, budget: int
) -> BudgetInfeasibleError:
    """The error of a graph that had a part of the budget, in bytes of the whole step."""
    plan = in_step(error.best_plan, needed, budget)
    found = infeasible(plan)
    sizes = [line for line in str(error).split("\n") if line.startswith("  fits ")]
    note = f"  note    {REST}: what other graphs hold while this one runs, and code that is in none"
    return BudgetInfeasibleError(
        "\n".join([str(found), note, *sizes]),
        smallest_peak=plan.predicted_peak,
        best_plan=plan,
        why=found.why,
    )


def first_step(program: Program, peak: int, budget: int) -> BudgetInfeasibleError:
    """The error for a step of which nobody has seen all of its graphs yet."""
    return BudgetInfeasibleError(
        f"the step runs in several graphs; those seen so far, with the smallest plan for the last, need "
        f"{format_bytes(peak)} ({peak} bytes); the budget is {format_bytes(budget)} ({budget} bytes).\n"
        "  try: the step once more, if an earlier graph took room that a later one needs: it now knows of "
        f"all of them; or a budget above {peak} bytes, since graphs that follow, which nobody has seen "
        "yet, add to what these need",
        smallest_peak=peak,
        best_plan=program.plan,
        why="",
    )


def of_several_graphs() -> PlanMismatchError:
    """The error for a plan that is given to a step in several graphs."""
    return PlanMismatchError(
        "plan= is the plan of one graph, and Dynamo makes several of this step\n"
        "  try: fullgraph=True, which says where Dynamo cuts it; or a budget without plan=, which all "
        "graphs of the step share"
    )


def within_a_checkpoint() -> PlanMismatchError:
    """The error for a plan that is given to a graph within a user's checkpoint."""
    return PlanMismatchError(
        "plan= is the plan of a whole step, and this graph is within torch.utils.checkpoint, which runs "
        "its forward twice\n"
        "  try: no checkpoint around what is compiled; torch.compile of what the checkpoint is in; or a "
        "budget without plan="
    )
