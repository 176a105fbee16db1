"""The planner: which forward values to keep so that the simulated peak fits and little is made again.

Plans of the descent compete, from the rung below the budget down, as far as the bound says that one
of them might be faster.
"""

from __future__ import annotations

from collections.abc import Iterable, Set
from dataclasses import dataclass, replace
from functools import cached_property

from fxmem.analysis.dataflow import Dataflow
from fxmem.analysis.simulate import Drop, Outcome, Simulator
from fxmem.planning.descent import Climb, Descent, Found, as_found, targets
from fxmem.planning.schedule import Schedule
from fxmem.planning.solver import Solver

_PATIENCE = 100
"""How much longer the search may take that makes the plan with the smallest peak faster."""

_STEPS = 8
"""From that plan up to the lowest plan of the ladder."""


@dataclass(frozen=True)
class Choice:
    """What to keep, which remade copies to let go before their last reader, and what it leads to.

    bound: seconds that every plan adds at the budget that was asked for, None if nobody looked.
    """

    kept: frozenset[int]
    drops: frozenset[Drop]
    outcome: Outcome
    bound: float | None = None


class Planner:
    """must_keep, must_remake: values that the user's checkpoint policies decide.

    limit: work that one search may do for each value that may be moved, in values looked at: the
    only clock there is.
    """

    def __init__(
        self,
        flow: Dataflow,
        must_keep: frozenset[int] = frozenset(),
        must_remake: frozenset[int] = frozenset(),
        limit: int = 500,
    ) -> None:
        self.flow = flow
        self.must_keep, self.must_remake = must_keep, must_remake
        self.simulator = Simulator(flow)
        fixed = must_keep | must_remake
        self.free = [v for v in self.simulator.candidates() if v not in fixed]
        self.solver = Solver(self.simulator, tuple(self.free), must_keep, must_remake, limit)

    # -- What is asked of a planner ----------------------------------------------------------------

    def choice(self, kept: Iterable[int], drops: Iterable[Drop] = ()) -> Choice:
        """A given choice, judged."""
        kept = frozenset(kept) | self.must_keep
        drops = frozenset(drops)
        return Choice(kept, drops, self.simulator.run(kept, drops))

    def keep_all(self) -> Choice:
        """Save what the backward reads: no time added."""
        return self._unchanged

    def without_remaking(self) -> tuple[Choice, ...]:
        """Choices that make nothing again, the fastest first: of codes none, some and all.

        Some are those of values that nothing else reads, which go for them.
        """
        saved = map(self.solver.coded_without, self._left_out())
        return (self._unchanged, *map(self.choice, saved))

    def _left_out(self) -> tuple[Set[int], ...]:
        simulator = self.simulator
        read = simulator.directly_read()
        doubled = {v for v in simulator.codes if simulator.operand(v) in read}
        return (doubled, frozenset()) if simulator.codes else ()

    def fit_without_remaking(self, budget: int) -> Choice | None:
        """The fastest such choice found that peaks at or below ``budget`` bytes; None if none was."""
        if self._unchanged.outcome.peak <= budget:
            return self._unchanged
        for without in self._left_out():
            choice = self.choice(self.solver.coded_without(without))
            if choice.outcome.peak <= budget:
                return self._with_fewer_codes(set(without), choice, budget)
        return None

    def _with_fewer_codes(self, without: set[int], choice: Choice, budget: int) -> Choice:
        """The slowest codes go where there is room for what they are made of, many at a time."""
        values = self.simulator.flow.values
        left = sorted(self.simulator.codes - without, key=lambda v: (-values[v].keeping, v))
        groups = [left]
        while groups:
            group = groups.pop()
            fewer = self.choice(self.solver.coded_without(without.union(group)))
            if fewer.outcome.peak <= budget and fewer.outcome.seconds <= choice.outcome.seconds:
                without.update(group)
                choice = fewer
            elif len(group) > 1:
                half = len(group) // 2
                groups += [group[half:], group[:half]]
        return choice

    def fit(self, budget: int) -> Choice | None:
        """The fastest choice found that peaks at or below ``budget`` bytes; None if none was.

        Never slower for a larger budget: a plan is passed over only where a bound says that it is
        no faster.
        """
        if self._unchanged.outcome.peak <= budget:
            return self._unchanged
        if budget < self.solver.least_possible:
            return None
        best: Found | None = None
        bound = 0.0
        for stage in self._descent.stages(budget):
            bound = max(bound, stage.bound.at(budget))
            best = min(filter(None, (*stage.plans, best)), key=_rank, default=None)
            if best is not None and best.seconds <= stage.bound.seconds:
                return self._answer(best, bound)  # no plan of a lower rung is faster
        last = [plan for plan in self._near_smallest.up_to(budget) if plan.peak <= budget]
        best = min(filter(None, (*last, best)), key=_rank, default=None)
        return None if best is None else self._answer(best, bound)

    def smallest(self) -> Choice:
        """The choice with the smallest peak found, made as fast as it gets at that peak."""
        return self._smallest

    # -- Where choices come from ---------------------------------------------------------------------

    def _answer(self, plan: Found, bound: float) -> Choice:
        choice = self.choice(plan.kept - self.simulator.always_kept, plan.drops)
        return replace(choice, bound=min(bound, choice.outcome.seconds))

    @cached_property
    def _descent(self) -> Descent:
        return Descent(self.solver)

    @cached_property
    def _unchanged(self) -> Choice:
        return replace(self.choice(self.solver.all_read), bound=0.0)

    @cached_property
    def _near_smallest(self) -> Climb:
        """What the smallest becomes with more room, up to the lowest plan of the ladder."""
        smallest = as_found(self._fastest_smallest[0])
        above = max(self._descent.lowest.peak, smallest.peak)
        return Climb(self.solver, smallest, targets(smallest.peak, above, _STEPS), _PATIENCE)

    @cached_property
    def _smallest(self) -> Choice:
        schedule, bound = self._fastest_smallest
        if schedule.peak >= self._unchanged.outcome.peak:
            return self._unchanged
        return self._answer(as_found(schedule), bound)

    @cached_property
    def _fastest_smallest(self) -> tuple[Schedule, float]:
        """The fastest schedule found with the smallest peak found, and the seconds that each adds."""
        lowest = self._descent.lowest
        smallest = self.solver.lowest(Schedule(self.simulator, lowest.kept, lowest.drops))
        peak = smallest.peak
        search = self.solver.search(smallest, _PATIENCE)
        search.improve(peak)
        search.swap(peak)
        answer = self.solver.answer(peak)
        found = [smallest, *(answer.schedules if answer is not None else ())]
        best = min(found, key=lambda schedule: (schedule.seconds, schedule.peak))
        return best, 0.0 if answer is None else answer.bound.seconds


def _rank(plan: Found) -> tuple[float, int]:
    return plan.rank
