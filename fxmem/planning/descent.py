"""Plans on the way down: a fixed ladder of budgets, and the plans that each rung's answer leads to.

The rungs lie at fixed shares of the room above what every choice needs.  At each, the solver is
asked, and from its best plans others climb up, a little at a time and not as far as the next rung:
they get faster with the room.

Nothing here depends on the budget that somebody asks for.  So the fastest plan that fits, of all
rungs below where a bound does not say that none is faster, is never slower for a larger budget.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from fxmem.analysis.simulate import Drop
from fxmem.planning.relaxation import Bound
from fxmem.planning.schedule import Schedule
from fxmem.planning.solver import Answer, Solver

_RUNG = 0.93
"""Of a rung's room above what every choice needs: what the next rung has."""

_RUNGS = 50
"""The last but one has a fortieth of the room; below, every search is for itself."""

_STEPS, _STEPS_OF_MANY = 5, 2
"""From a rung up to the next."""


@dataclass(frozen=True)
class Found:
    """One plan: what it keeps and lets go early, its peak in bytes, the seconds that it adds."""

    kept: frozenset[int]
    drops: frozenset[Drop]
    peak: int
    seconds: float

    @property
    def rank(self) -> tuple[float, int]:
        return (self.seconds, self.peak)


@dataclass(frozen=True)
class Stage:
    """One rung.  bound: on plans at the rung, and at other budgets.  plans: of it and above it."""

    rung: int
    bound: Bound
    plans: tuple[Found, ...]


class Climb:
    """What a plan becomes with more room: a step at a time, as far as somebody asks."""

    def __init__(self, solver: Solver, base: Found, targets: Iterable[int], patience: int = 1):
        self.plans = [base]
        self._schedule = Schedule(solver.simulator, base.kept, base.drops)
        self._solver, self._patience = solver, patience
        self._targets = list(targets)

    def up_to(self, budget: int) -> list[Found]:
        """The plans of the steps up to a budget, and perhaps of higher ones."""
        schedule = self._schedule
        while self._targets and self._targets[0] <= budget:
            target = self._targets.pop(0)
            search = self._solver.search(schedule, self._patience)
            search.improve(target)
            if not self._solver.are_many:
                search.swap(target)
            schedule.commit()
            if schedule.seconds < self.plans[-1].seconds:
                self.plans.append(as_found(schedule))
        return self.plans


def targets(low: int, high: int, steps: int) -> list[int]:
    """So many budgets from above ``low`` up to ``high``."""
    return [low + (high - low) * step // steps for step in range(1, steps + 1)]


class Descent:
    """The ladder below one way to run a step: ``top``, what is saved when nothing is made again."""

    def __init__(self, solver: Solver) -> None:
        self.solver = solver
        self.top = as_found(Schedule(solver.simulator, solver.all_read))
        least = solver.least_possible
        room = max(self.top.peak - least, 0)
        rungs = [least + int(room * _RUNG**k) for k in range(_RUNGS)]
        self.rungs = tuple(dict.fromkeys((*rungs, least)))
        self._answers: dict[int, Answered | None] = {}

    def stages(self, budget: int) -> Iterator[Stage]:
        """From the rung below the budget down, as far as bounds say that there may be plans.

        Each plan peaks at or below the budget.
        """
        if self.solver.are_few:
            yield from self._one_by_one(budget)
            return
        for rung in self.rungs:
            if rung <= budget:
                answered = self._answered(rung)
                if answered is None:
                    return
                yield answered.stage(budget)

    @property
    def lowest(self) -> Found:
        """The plan with the smallest peak at the lowest rung where there is one."""
        low, high = 0, len(self.rungs)
        while high - low > 1:  # the program says where there is surely none
            middle = (low + high) // 2
            if self.solver.program(self.rungs[middle]).feasible:
                low = middle
            else:
                high = middle
        for rung in reversed(self.rungs[: low + 1]):
            answered = self._answered(rung)
            if answered is not None and answered.found:
                return min(answered.found, key=lambda plan: (plan.peak, plan.seconds))
        return self.top

    def _answered(self, rung: int) -> Answered | None:
        """None where the program says that there is no plan, here or below."""
        if rung not in self._answers:
            answer = self.solver.answer(rung)
            self._answers[rung] = None if answer is None else self._climbing(rung, answer)
        return self._answers[rung]

    def _climbing(self, rung: int, answer: Answer) -> Answered:
        found = sorted(map(as_found, answer.schedules), key=lambda plan: plan.rank)
        steps = _STEPS_OF_MANY if self.solver.are_many else _STEPS
        above = min((other for other in self.rungs if other > rung), default=rung)
        higher = targets(rung, above - 1, steps) if above > rung else []
        climb = Climb(self.solver, found[0], higher) if found else None
        return Answered(rung, answer.bound, found, climb)

    # -- Where there are few values ------------------------------------------------------------------

    def _one_by_one(self, budget: int) -> Iterator[Stage]:
        """From each rung to the next, each plan right below the one before."""
        first = max(n for n, rung in enumerate(self.rungs) if rung >= budget)
        for n in range(first, len(self.rungs)):
            rung, end = self.rungs[n], self.rungs[n + 1] if n + 1 < len(self.rungs) else -1
            while rung > end and (answered := self._answered(rung)) is not None:
                if not answered.found:
                    break
                best = answered.found[0]
                if best.peak <= budget:
                    yield Stage(rung, answered.bound, (best,))
                rung = best.peak - 1


@dataclass(frozen=True)
class Answered:
    """A rung, the plans that the solver found for it, fastest first, and a climb from the best."""

    rung: int
    bound: Bound
    found: list[Found]
    climb: Climb | None

    def stage(self, budget: int) -> Stage:
        """What there is for a budget."""
        plans = self.found + (self.climb.up_to(budget) if self.climb is not None else [])
        return Stage(self.rung, self.bound, tuple(p for p in plans if p.peak <= budget))


def as_found(schedule: Schedule) -> Found:
    """What a schedule is now."""
    return Found(frozenset(schedule.kept), schedule.useful_drops(), schedule.peak, schedule.seconds)
