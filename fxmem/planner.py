"""The planner: which forward values to keep so that the simulated peak fits and little is made again.

Where the linear program at the very budget leads to a plan close to its bound, that is it.  Else
plans of the descent compete, from the rung above the budget down, as far as the bound says that one
of them might be faster; and where there are few values, searches from everywhere.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import cached_property

from fxmem.dataflow import Dataflow
from fxmem.descent import Descent, Found
from fxmem.schedule import Schedule
from fxmem.simulate import Drop, Outcome, Simulator
from fxmem.solver import Solver


@dataclass(frozen=True)
class Choice:
    """What to keep, which remade copies to let go before their last reader, and what it leads to.

    bound: seconds that every plan adds at the budget that was asked for, None if nobody looked.
    """

    kept: frozenset[int]
    drops: frozenset[Drop]
    outcome: Outcome
    bound: float | None = None

    @property
    def rank(self) -> tuple[float, int]:
        """Among choices that fit: less time first, then less peak."""
        return (self.outcome.seconds, self.outcome.peak)


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
            if best is not None and stage.bound.at(stage.rung) >= best.seconds:
                break
            for plan in stage.plans:
                if plan.peak <= budget and (best is None or _rank(plan) < _rank(best)):
                    best = plan
        if best is not None:
            choice = self.choice(best.kept - self.simulator.always_kept, best.drops)
            return replace(choice, bound=min(bound, best.seconds))
        smallest = self._smallest
        return smallest if smallest.outcome.peak <= budget else None

    def smallest(self) -> Choice:
        """The choice with the smallest peak found, made as fast as it gets at that peak."""
        return self._smallest

    # -- Where choices come from ---------------------------------------------------------------------

    def _faster(self, plan: Found, budget: int) -> Schedule:
        """A plan with what more it can keep at a budget."""
        schedule = Schedule(self.simulator, plan.kept, plan.drops)
        search = self.solver.search(schedule)
        search.improve(budget)
        search.swap(budget)
        return schedule

    @cached_property
    def _descent(self) -> Descent:
        return Descent(self.solver)

    @cached_property
    def _unchanged(self) -> Choice:
        return replace(self.choice(self.solver.all_read), bound=0.0)

    @cached_property
    def _smallest(self) -> Choice:
        found = self._descent.lowest
        lowest = self.solver.lowest(Schedule(self.simulator, found.kept, found.drops))
        if lowest.peak >= self._unchanged.outcome.peak:
            return self._unchanged
        program = self.solver.program(lowest.peak)
        kept, drops = frozenset(lowest.kept), lowest.drops()
        choices = [self._chosen(self._faster(Found(kept, drops, 0, 0.0), lowest.peak))]
        for schedule in (self.solver.quick(program),):
            if schedule is not None:
                choices.append(self._chosen(schedule))
        best = min(choices, key=lambda choice: choice.rank)
        return replace(best, bound=min(program.bound.seconds, best.outcome.seconds))

    def _chosen(self, schedule: Schedule) -> Choice:
        """A schedule as a choice, judged by the exact simulator."""
        return self.choice(schedule.kept - self.simulator.always_kept, schedule.useful_drops())


def _rank(plan: Found) -> tuple[float, int]:
    return (plan.seconds, plan.peak)
