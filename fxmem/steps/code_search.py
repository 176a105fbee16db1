"""The plan to make code of: plans of one step, each lowered to see what its code will peak at.

The step is planned again, for more bytes or fewer, until its code will fit without much room left, or until
code is seen not to follow its plan.  What Inductor's cut makes again costs next to nothing, so the step as
it is may fit where operators of it do not: where that seems so, it is looked at first.

Kernels may make more again than costs nothing: all that they can.  Where that saves bytes, larger plans are
looked at so (least_search.py).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property

from fxmem.planning.plan import Plan
from fxmem.steps.analyze import Analysis
from fxmem.steps.inductor import Held, Inductor
from fxmem.steps.least_search import larger_saving_least
from fxmem.steps.looks import GAIN, MARGIN, PLANS, UNSURE, Found, Looks, Tried, is_new
from fxmem.steps.measured_step import loss_outside
from fxmem.steps.options import Options

ROOM = 0.1
"""Of the budget: with more left, a plan that costs time is worth a further one."""

SPARE = 0.05
"""Of what the step as it is holds: with so much more, it is looked at first."""

LIGHT = 0.01
"""Of the step's time: where kernels make again for less what takes more than arithmetic, it costs none."""


@dataclass
class CodeSearch:
    """Plans of one step under one budget, each lowered to see what its code will peak at.

    found: what was decided operator by operator.  here: the sizes that may change as they are now.  seen:
    plans in turn.  saving_least: those whose code saves the least instead.
    """

    analysis: Analysis
    options: Options
    found: Found
    here: Mapping[str, int]
    seen: list[Tried] = field(default_factory=list)
    saving_least: list[Tried] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.plan = self.found[0].plan
        self.looks = Looks(self.analysis, self.options, self.found, self.here)

    def best(self) -> Tried:
        """Of those whose code will fit, the one that adds the least time; else the smallest one."""
        if _may_stay(self.plan):
            return Tried(*self.found, Inductor(self.found[0]), None)
        following = self.looks.as_it_is() if self._seems_to_fit_as_it_is() else None
        following = following or self.found
        while following is not None and len(self.seen) < PLANS:
            self.seen.append(self._lowered(following))
            if self._does_saving_least(self.seen[-1]):
                break
            following = self._following()
        fitting = [one for one in self._all if one.fits]
        if not fitting:
            return min(self._all, key=lambda one: one.foreseen or 0)
        return min(fitting, key=lambda one: one.seconds)

    def instead(self, tried: Tried, peak: int) -> Tried | None:
        """What to make code of after code that was measured to peak so; None if that may stay, or if
        nothing seems to fit.

        After the step as it is comes what was decided.
        """
        too_many = peak > self.plan.budget
        others = self._fitting_with(max(peak - (tried.foreseen or peak), 0))
        if too_many and others:
            return min(others, key=lambda one: one.seconds)
        if too_many and self._is_as_it_is(tried):
            again: Found | None = self.found if is_new(self.plan, self.seen) else None
        else:
            again = self._planned(_target(tried.plan, peak))
        if again is None or again[0].plan.decisions == tried.plan.decisions:
            return None
        found = self._lowered(again)
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

    def _lowered(self, found: Found) -> Tried:
        """The plan as code; the step as it is saves the least where it would hold too much otherwise."""
        planned, _ = found
        as_it_is = planned is not self.found[0] and planned.plan.added_seconds <= 0
        least = as_it_is and self._has_to_save_least
        return self.looks.at(*found, Inductor(planned, saves_least=least))

    def _does_saving_least(self, tried: Tried) -> bool:
        """Does code that saves the least keep the budget, of a larger plan or else of this one?"""
        if tried.code.saves_least or tried.foreseen is None or not self._may_save_least(tried.plan):
            return False
        was_decided = tried.planned is self.found[0]
        if tried.fits and not was_decided:
            return False
        code = Inductor(tried.planned, saves_least=True, like=tried.code)
        saved = tried.code.held.nbytes - code.held.nbytes
        if was_decided and saved > MARGIN * tried.plan.budget:
            self.saving_least += larger_saving_least(self.looks, tried, code, self._all)
            if any(one.fits and one.seconds < tried.seconds for one in self.saving_least):
                return True
        if tried.fits or saved < tried.foreseen - tried.plan.budget:
            return False
        self.saving_least.append(self.looks.at(tried.planned, tried.validity, code))
        return self.saving_least[-1].fits

    def _may_save_least(self, plan: Plan) -> bool:
        """The step as it is costs nothing, and is to go on costing nothing."""
        return plan.added_seconds > 0 or self._is_light

    def _following(self) -> Found | None:
        """A plan that may be better than those that were seen."""
        last = self.seen[-1]
        if last.foreseen is None:
            return None
        if len(self.seen) == 1 and self._is_as_it_is(last):
            return None if last.fits else self.found
        if last.fits:
            again = self._planned(_target(last.plan, last.foreseen))
            if again is None:
                return None
            return again if _spares(last.plan, again[0].plan) else None
        gives = self._gives()
        if gives <= 0 or not self._may_fit(last, gives, self._least()):
            return None
        again = self._planned(_target(last.plan, last.foreseen, gives))
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

    @cached_property
    def _is_light(self) -> bool:
        """Does the step as it is take about no more time where its code saves the least?"""
        more = self.looks.held_least.heavy - self.looks.held.heavy
        return more <= LIGHT * self.plan.seconds

    def _seems_to_fit_as_it_is(self) -> bool:
        """Is what it holds between its halves within the budget, with a little to spare?"""
        if self.plan.added_seconds <= 0:
            return False
        return not self._has_to_save_least or (
            self._is_light and self._has_room_for(self.looks.held_least)
        )

    @cached_property
    def _has_to_save_least(self) -> bool:
        """Does the step as it is hold too much otherwise?"""
        return not self._has_room_for(self.looks.held)

    def _has_room_for(self, found: Held) -> bool:
        return (1 + SPARE) * (found.nbytes + loss_outside(self.found[0])) <= self.plan.budget

    def _planned(self, target: int | None) -> Found | None:
        """The step planned for other bytes; None if no other plan is allowed, or that one was seen."""
        return self.looks.planned(target, self.seen)


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
