"""A step planned for one number of bytes or another, each plan lowered to see what its code will peak at.

Plans are made operator by operator, and Inductor's kernels hold fewer bytes or more.  To lower a plan
(fused.py) takes little of the time that its code takes.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property

from fxmem.graphs.graph import JointGraph, bytes_of_scalars
from fxmem.graphs.workspace import Workspaces
from fxmem.planning.plan import Plan
from fxmem.steps.analyze import Analysis
from fxmem.steps.inductor import Held, Inductor, held, taken_apart
from fxmem.steps.options import Options
from fxmem.steps.pipeline import Planned
from fxmem.steps.validity import Validity, decided

log = logging.getLogger(__name__)

PLANS = 3
"""So many are lowered at most, before code is made of one; and so many that save the least."""

MARGIN = 0.01
"""Of the budget, left free by a further plan: what it will peak at is known from the last one's error."""

UNSURE = 0.02
"""Of the budget: so far above it, what is foreseen is not tried."""

GAIN = 0.01
"""Of the step's time: to spare less is not worth the seconds that it takes to lower a further plan."""

Found = tuple[Planned, Validity | None]
"""A planned step, and where sizes may change, those that it holds for."""


@dataclass(frozen=True)
class Tried:
    """A plan in Inductor's operators.  foreseen: bytes that its code will peak at, if that is known."""

    planned: Planned
    validity: Validity | None
    code: Inductor
    foreseen: int | None

    @property
    def plan(self) -> Plan:
        return self.planned.plan

    @cached_property
    def seconds(self) -> float:
        """Of time that is added: by operators that are made again, and by what kernels make."""
        return self.plan.added_seconds + self.code.held.heavy

    @property
    def fits(self) -> bool:
        return self.foreseen is None or self.foreseen <= self.plan.budget

    @property
    def is_hopeless(self) -> bool:
        """Is its code so much too large that none need be made?"""
        return self.foreseen is not None and self.foreseen > (1 + UNSURE) * self.plan.budget


@dataclass
class Looks:
    """Plans of one step under one budget.

    found: what was decided operator by operator.  here: the sizes that may change as they are now.
    """

    analysis: Analysis
    options: Options
    found: Found
    here: Mapping[str, int]
    table: Workspaces = field(init=False)

    def __post_init__(self) -> None:
        self.table = Workspaces(self.analysis.workspaces.table)

    @property
    def plan(self) -> Plan:
        return self.found[0].plan

    def at(self, planned: Planned, validity: Validity | None, code: Inductor) -> Tried:
        """What its code will peak at."""
        try:
            foreseen = code.foreseen(planned, self.table, self.analysis.device)
        except Exception:  # to compile says what is wrong, if anything is but this look ahead
            log.info("the peak of Inductor's code cannot be foreseen", exc_info=True)
            foreseen = None
        return Tried(planned, validity, code, foreseen)

    def planned(self, target: int | None, seen: Iterable[Tried]) -> Found | None:
        """The step planned for other bytes, operator by operator, under the same budget.

        None where there is no target, no other plan is allowed, or that one was seen.
        """
        plan, options = self.plan, self.options
        if target is None or plan.smallest or options.plan is not None or not fits(plan):
            return None
        options = replace(options.for_bytes(target, self.analysis.device), on_infeasible="best")
        memory = self.found[0].memory is not None
        again, validity = decided(self.analysis, options, self.here, memory=memory)
        if not is_new(again.plan, seen):
            return None
        return replace(again, plan=replace(again.plan, budget=plan.budget)), validity

    def as_it_is(self) -> Found | None:
        """The step without a change that costs time."""
        scalars = bytes_of_scalars(self.analysis.device)  # of a loss outside, kept free
        return self.planned(self.plan.keep_all_peak + scalars, seen=())

    @cached_property
    def held(self) -> Held:
        """By the step as it is."""
        return held(self._graph)

    @cached_property
    def held_least(self) -> Held:
        """By the step as it is, where kernels make again all that they can."""
        return held(self._graph, saves_least=True)

    @cached_property
    def _graph(self) -> JointGraph:
        """The step as it was captured, taken apart once for both cuts."""
        return taken_apart(self.analysis.graph)


def is_new(plan: Plan, seen: Iterable[Tried]) -> bool:
    return all(plan.decisions != one.plan.decisions for one in seen)


def fits(plan: Plan) -> bool:
    """Does it peak within its budget, as predicted or measured?"""
    return plan.predicted_peak <= plan.budget
