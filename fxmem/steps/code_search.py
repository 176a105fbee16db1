"""The plan to make code of: plans of one step, each lowered to see what its code will peak at.

Plans are made operator by operator, and Inductor's kernels hold fewer bytes or more.  So a plan is lowered
to see what its code will peak at (fused.py), which takes little of the time that the code takes, and the
step is planned again, for more bytes or fewer, until it will fit without much room left, or until code is
seen not to follow its plan.  What Inductor's cut makes again costs next to nothing, so the step as it is
may fit where operators of it do not: where that seems so, it is looked at first.

Where code of a plan does not fit, kernels may make more again than costs nothing: all that they can, so
that the least is saved.  That takes less time than operators made again, if it is arithmetic.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property

from fxmem.graphs.graph import JointGraph, bytes_of_scalars
from fxmem.graphs.workspace import Workspaces
from fxmem.planning.plan import Plan
from fxmem.steps.analyze import Analysis
from fxmem.steps.inductor import Held, Inductor, held, taken_apart
from fxmem.steps.measured_step import loss_outside
from fxmem.steps.options import Options
from fxmem.steps.pipeline import Planned
from fxmem.steps.validity import Validity, decided

log = logging.getLogger(__name__)

MARGIN = 0.01
"""Of the budget, left free by a further plan: what it will peak at is known from the last one's error."""

ROOM = 0.1
"""Of the budget: with more left, a plan that costs time is worth a further one."""

UNSURE = 0.02
"""Of the budget: so far above it, what is foreseen is not tried."""

SPARE = 0.05
"""Of what the step as it is holds: with so much more, it is looked at first."""

LIGHT = 0.05
"""Of the elements that kernels make again: with fewer that take more than arithmetic, it costs no time."""

PLANS = 3
"""So many are lowered at most, before code is made of one."""

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

    @property
    def fits(self) -> bool:
        return self.foreseen is None or self.foreseen <= self.plan.budget

    @property
    def is_hopeless(self) -> bool:
        """Is its code so much too large that none need be made?"""
        return self.foreseen is not None and self.foreseen > (1 + UNSURE) * self.plan.budget


@dataclass
class CodeSearch:
    """Plans of one step under one budget, each lowered to see what its code will peak at.

    found: what was decided operator by operator.  here: the sizes that may change as they are now.  seen:
    plans in turn.  saving_least: those again whose code did not fit.
    """

    analysis: Analysis
    options: Options
    found: Found
    here: Mapping[str, int]
    seen: list[Tried] = field(default_factory=list)
    saving_least: list[Tried] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.plan = self.found[0].plan
        self.table = Workspaces(self.analysis.workspaces.table)

    def best(self) -> Tried:
        """Of those whose code will fit, the one that adds the least time; else the smallest one."""
        if _may_stay(self.plan):
            return Tried(*self.found, Inductor(self.found[0]), None)
        following = self._as_it_is() if self._seems_to_fit_as_it_is() else None
        following = following or self.found
        while following is not None and len(self.seen) < PLANS:
            self.seen.append(self._lowered(*following))
            other = self._saving_least(self.seen[-1])
            if other is not None:
                self.saving_least.append(other)
                if other.fits:
                    break
            following = self._following()
        larger = self._larger_saving_least()
        if larger is not None:
            self.saving_least.append(larger)
        fitting = [one for one in self._all if one.fits]
        if not fitting:
            return min(self._all, key=lambda one: one.foreseen or 0)
        return min(fitting, key=lambda one: one.plan.added_seconds)

    def instead(self, tried: Tried, peak: int) -> Tried | None:
        """What to make code of after code that was measured to peak so; None if that may stay, or if
        nothing seems to fit.

        After the step as it is comes what was decided.
        """
        too_many = peak > self.plan.budget
        others = self._fitting_with(max(peak - (tried.foreseen or peak), 0))
        if too_many and others:
            return min(others, key=lambda one: one.plan.added_seconds)
        if too_many and self._is_as_it_is(tried):
            again: Found | None = self.found if self._is_new(self.found[0].plan) else None
        else:
            again = self._new(_target(tried.plan, peak))
        if again is None or again[0].plan.decisions == tried.plan.decisions:
            return None
        found = self._lowered(*again)
        return None if found.is_hopeless else found

    def _fitting_with(self, error: int) -> list[Tried]:
        """Those that were seen and keep the budget with so many bytes more than was foreseen."""
        budget = self.plan.budget
        return [t for t in self._all if t.foreseen is not None and t.foreseen + error <= budget]

    @property
    def _all(self) -> list[Tried]:
        return [*self.seen, *self.saving_least]

    def _is_as_it_is(self, tried: Tried) -> bool:
        """Is it the step as it is, which was not decided?"""
        return tried.planned is not self.found[0] and tried.planned is self.seen[0].planned

    def _is_new(self, plan: Plan) -> bool:
        return all(plan.decisions != one.plan.decisions for one in self.seen)

    def _lowered(self, planned: Planned, validity: Validity | None) -> Tried:
        """The plan as code; the step as it is saves the least where it would hold too much otherwise."""
        as_it_is = planned is not self.found[0] and planned.plan.added_seconds <= 0
        least = as_it_is and self._has_to_save_least
        return self._looked_at(planned, validity, Inductor(planned, saves_least=least))

    def _saving_least(self, tried: Tried) -> Tried | None:
        """The same plan as code that saves the least, where that may keep the budget."""
        if tried.fits or tried.code.saves_least or not self._may_save_least(tried.plan):
            return None
        code = Inductor(tried.planned, saves_least=True, like=tried.code)
        too_many = (tried.foreseen or 0) - tried.plan.budget
        if tried.code.saved_bytes - code.saved_bytes < too_many:
            return None
        return self._looked_at(tried.planned, tried.validity, code)

    def _larger_saving_least(self) -> Tried | None:
        """Code of a plan for more bytes, after such code that keeps the budget with room left."""
        last = self.saving_least[-1] if self.saving_least else None
        if last is None or last.foreseen is None or not last.fits or len(self.seen) >= PLANS:
            return None
        room = last.plan.budget - last.foreseen
        if room <= UNSURE * last.plan.budget or last.plan.predicted_overhead < GAIN:
            return None
        gives = _slope(self.saving_least)
        if gives <= 0:
            return None
        more = (room - MARGIN * last.plan.budget) / gives
        again = self._new(int(last.plan.predicted_peak + more))
        if again is None or not _spares(last.plan, again[0].plan):
            return None
        return self._looked_at(*again, Inductor(again[0], saves_least=True))

    def _may_save_least(self, plan: Plan) -> bool:
        """The step as it is costs nothing, and is to go on costing nothing."""
        return plan.added_seconds > 0 or self._held_least.heavy <= LIGHT

    def _looked_at(self, planned: Planned, validity: Validity | None, code: Inductor) -> Tried:
        try:
            foreseen = code.foreseen(planned, self.table, self.analysis.device)
        except Exception:  # to compile says what is wrong, if anything is but this look ahead
            log.info("the peak of Inductor's code cannot be foreseen", exc_info=True)
            foreseen = None
        return Tried(planned, validity, code, foreseen)

    def _following(self) -> Found | None:
        """A plan that may be better than those that were seen."""
        last = self.seen[-1]
        if last.foreseen is None:
            return None
        if len(self.seen) == 1 and self._is_as_it_is(last):
            return None if last.fits else self.found
        if last.fits:
            again = self._new(_target(last.plan, last.foreseen))
            if again is None:
                return None
            return again if _spares(last.plan, again[0].plan) else None
        gives = self._gives()
        if gives <= 0 or not self._may_fit(last, gives, self._least()):
            return None
        again = self._new(_target(last.plan, last.foreseen, gives))
        if again is None or not self._may_fit(last, gives, again[0].plan.predicted_peak):
            return None
        return again

    def _gives(self) -> float:
        """Bytes that code peaks lower by for each that its plan does, as far as is seen."""
        return min(_slope([one for one in self.seen if not self._is_as_it_is(one)]), 1.0)

    def _may_fit(self, last: Tried, gives: float, planned: int) -> bool:
        """May the code of a plan of so many bytes keep the budget, after the last one's, which does not?"""
        expected = (last.foreseen or 0) - gives * (last.plan.predicted_peak - planned)
        return expected <= (1 + UNSURE) * self.plan.budget

    def _least(self) -> int:
        """Bytes that no plan goes below, where that is known."""
        if "quantize" in self.options.allow:
            return 0
        forms = self.analysis.small_forms(self.options)
        return min(form.planner.simulator.least.nbytes for form in forms)

    def _seems_to_fit_as_it_is(self) -> bool:
        """Is what it holds between its halves within the budget, with a little to spare?"""
        if self.plan.added_seconds <= 0:
            return False
        return not self._has_to_save_least or (
            self._held_least.heavy <= LIGHT and self._has_room_for(self._held_least)
        )

    @cached_property
    def _has_to_save_least(self) -> bool:
        """Does the step as it is hold too much otherwise?"""
        return not self._has_room_for(held(self._graph))

    @cached_property
    def _graph(self) -> JointGraph:
        """The step as it was captured, taken apart once for both cuts."""
        return taken_apart(self.analysis.graph)

    def _has_room_for(self, found: Held) -> bool:
        return (1 + SPARE) * (found.nbytes + loss_outside(self.found[0])) <= self.plan.budget

    @cached_property
    def _held_least(self) -> Held:
        """By the step as it is, where kernels make again all that they can."""
        return held(self._graph, saves_least=True)

    def _as_it_is(self) -> Found | None:
        scalars = bytes_of_scalars(self.analysis.device)  # of a loss outside, kept free
        return self._new(self.plan.keep_all_peak + scalars)

    def _new(self, target: int | None) -> Found | None:
        """The step planned for other bytes, operator by operator, under the same budget.

        None where there is no target, no other plan is allowed, or that one was seen.
        """
        plan, options = self.plan, self.options
        if target is None or plan.smallest or options.plan is not None or not fits(plan):
            return None
        options = replace(options.for_bytes(target, self.analysis.device), on_infeasible="best")
        memory = self.found[0].memory is not None
        again, validity = decided(self.analysis, options, self.here, memory=memory)
        if not self._is_new(again.plan):
            return None
        return replace(again, plan=replace(again.plan, budget=plan.budget)), validity


def _spares(plan: Plan, other: Plan) -> bool:
    """Does the other one take so much less time that it is worth a look?"""
    return plan.predicted_overhead - other.predicted_overhead >= GAIN


def _slope(tried: Sequence[Tried]) -> float:
    """Bytes that code peaks lower by for each that its plan does, by the last two, if there are two."""
    if len(tried) < 2:
        return 1.0
    (planned, code), (then, again) = (
        (one.plan.predicted_peak, one.foreseen or 0) for one in tried[-2:]
    )
    return (code - again) / (planned - then) if planned != then else 0.0


def _may_stay(plan: Plan) -> bool:
    """Does it cost nothing, with room for what code may take more?  Then it is only measured."""
    return plan.added_seconds <= 0 and plan.predicted_peak <= (1 - ROOM) * plan.budget


def _target(plan: Plan, peak: int, gives: float = 1.0) -> int | None:
    """Bytes to plan for, operator by operator, after a plan whose code peaks so; None if it may stay.

    gives: bytes that code peaks lower by for each that its plan does.
    """
    room = plan.budget - peak
    if room < 0:
        return max(int(plan.predicted_peak + (room - MARGIN * plan.budget) / gives), 1)
    if room > ROOM * plan.budget and plan.added_seconds > 0:
        return int(plan.predicted_peak + room - ROOM / 2 * plan.budget)
    return None


def fits(plan: Plan) -> bool:
    """Does it peak within its budget, as predicted or measured?"""
    return plan.predicted_peak <= plan.budget
