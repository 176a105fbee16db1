"""The planner: which forward values to keep so that the simulated peak fits and little is made again.

A search is not perfect: a smaller budget's may find the faster plan.  So whatever was found for a
budget competes with plans for fixed smaller budgets, the rungs of a ladder, as far down as the bound
says that one of them might be faster.  Rungs are few: this catches what went far astray.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from functools import cached_property

from fxmem.dataflow import Dataflow
from fxmem.relaxation import Bound
from fxmem.schedule import Schedule
from fxmem.simulate import Drop, Outcome, Simulator
from fxmem.solver import CLOSE, Solver

_RUNGS = 16
"""From the peak of saving everything down to what every plan needs."""


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


@dataclass(frozen=True)
class _Answer:
    """What was found at one budget, and a bound there; no bound where no plan can be."""

    choice: Choice | None
    bound: Bound | None


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
        self._answers: dict[int, _Answer] = {}

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
        """The fastest choice found that peaks at or below ``budget`` bytes; None if none was."""
        if self._unchanged.outcome.peak <= budget:
            return self._unchanged
        answers = list(self._descend(budget))
        choices = [a.choice for a in answers if a.choice and a.choice.outcome.peak <= budget]
        if not choices:
            return None
        best = min(choices, key=lambda choice: choice.rank)
        least = max((a.bound.at(budget) for a in answers if a.bound), default=0.0)
        return replace(best, bound=min(least, best.outcome.seconds))

    def smallest(self) -> Choice:
        """The choice with the smallest peak found, made as fast as it gets at that peak."""
        choice = self._smallest.choice
        assert choice is not None
        return choice

    # -- The ladder ----------------------------------------------------------------------------------

    def _descend(self, budget: int) -> Iterator[_Answer]:
        """From the budget down the ladder, until no lower plan can be faster; else to its end."""
        fastest, bound = float("inf"), None
        for rung in (budget, *self._rungs_below(budget)):
            if bound is not None and bound.at(rung) >= fastest:
                return
            answer = self._answer(rung)
            yield answer
            if answer.choice is None or answer.bound is None:
                break
            fastest = min(fastest, answer.choice.outcome.seconds)
            bound = answer.bound
        if bound is None or fastest > bound.seconds + CLOSE * self.flow.seconds:
            yield self._smallest

    def _rungs_below(self, budget: int) -> list[int]:
        top, least = self._unchanged.outcome.peak, self.solver.least_possible
        rungs = (top - (top - least) * i // _RUNGS for i in range(1, _RUNGS + 1))
        return [rung for rung in rungs if rung < budget]

    def _answer(self, budget: int) -> _Answer:
        if budget not in self._answers:
            program = self.solver.program(budget)
            answer = _Answer(None, None)
            if program.feasible:
                found = self.solver.fastest(program)
                answer = _Answer(None if found is None else self._chosen(found), program.bound)
            self._answers[budget] = answer
        return self._answers[budget]

    @cached_property
    def _unchanged(self) -> Choice:
        return replace(self.choice(self.solver.all_read), bound=0.0)

    @cached_property
    def _smallest(self) -> _Answer:
        lowest = self.solver.lowest
        if lowest.peak >= self._unchanged.outcome.peak:
            return _Answer(self._unchanged, None)
        answer = self._answer(lowest.peak)
        choice = answer.choice or self._chosen(lowest)
        if answer.bound is not None:
            choice = replace(choice, bound=min(answer.bound.seconds, choice.outcome.seconds))
        return _Answer(choice, answer.bound)

    def _chosen(self, schedule: Schedule) -> Choice:
        """A schedule as a choice, judged by the exact simulator."""
        return self.choice(schedule.kept - self.simulator.always_kept, schedule.useful_drops())
