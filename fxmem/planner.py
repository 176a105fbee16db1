"""The planner: which forward values to keep so that the simulated peak fits and little is made again.

A linear program bounds the time that any plan adds; its solution, made whole, is a first choice.
Local search over the incremental simulator takes it into the budget and then makes it as fast as it
gets there.  Where bytes are so tight that this fails, the search starts again from choices that let
every copy go at once.  Deterministic: ties fall to graph order, limits count simulated work.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Set
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np

from fxmem.dataflow import Dataflow
from fxmem.relaxation import Program, Relaxation, Relaxed
from fxmem.schedule import Schedule
from fxmem.search import Search
from fxmem.simulate import Drop, Outcome, Simulator

_SHARES = (0.5, 0.3, 0.7)
"""What a share in the linear program's solution must exceed to count as all."""

_CORRECTIONS = 3
"""Programs tried for one budget; each knows the bytes that the one before left out."""

_CLOSE = 0.002
"""Of the unchanged step's time: how near its bound a plan is good enough."""

_SHORT = 20_000
"""Operators made again in all slots: up to here a search may start from nothing kept."""

_FEW = 100
"""Values among which there is time for all ways to start."""

_CUTS_BELOW = 8
"""In linear programs that only say where to start looking for the smallest peak."""

_PATIENCE = 6
"""How much longer a search may take that looks for the smallest peak."""


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


@dataclass
class Planner:
    """must_keep, must_remake: values that the user's checkpoint policies decide.

    limit: work that one search may do for each value that may be moved, in values looked at: the
    only clock there is.
    """

    flow: Dataflow
    must_keep: frozenset[int] = frozenset()
    must_remake: frozenset[int] = frozenset()
    limit: int = 500

    def __post_init__(self) -> None:
        self.simulator = Simulator(self.flow)
        fixed = self.must_keep | self.must_remake
        self.free = [v for v in self.simulator.candidates() if v not in fixed]

    # -- What is asked of a planner ----------------------------------------------------------------

    def choice(self, kept: Iterable[int], drops: Iterable[Drop] = ()) -> Choice:
        """A given choice, judged."""
        kept = frozenset(kept) | self.must_keep
        drops = frozenset(drops)
        return Choice(kept, drops, self.simulator.run(kept, drops))

    def keep_all(self) -> Choice:
        """Save what the backward reads: no time added."""
        return self.choice(self.simulator.directly_read() - self.must_remake)

    def fit(self, budget: int) -> Choice | None:
        """The fastest choice found that peaks at or below ``budget`` bytes; None if none was."""
        unchanged = self.keep_all()
        if unchanged.outcome.peak <= budget:
            return replace(unchanged, bound=0.0)
        program = self.relaxation.program(budget)
        if not program.feasible:
            return None
        found = self._fastest(program, budget)
        best = None if found is None else self._chosen(found)
        if len(self.free) <= _FEW and not self._is_close(best, program):
            smallest = self.smallest()
            if smallest.outcome.peak <= budget and (best is None or smallest.rank < best.rank):
                best = smallest
        if best is None:
            return None
        return replace(best, bound=min(program.bound, best.outcome.seconds))

    def smallest(self) -> Choice:
        """The choice with the smallest peak found, made as fast as it gets at that peak."""
        return self._smallest

    @property
    def least_possible(self) -> int:
        """Bytes that every choice needs: in each slot what its operator reads, makes and works in."""
        numbers = self.simulator.numbers
        reads = [sum(numbers.saved_nbytes[v] for v in slot) for slot in numbers.reads]
        backward = np.array(numbers.static_at, dtype=np.int64) + np.array(reads, dtype=np.int64)
        forward = self.relaxation.forward_base
        return int(max(forward.max(initial=0), backward.max(initial=0)))

    # -- Where searches start ----------------------------------------------------------------------

    @cached_property
    def relaxation(self) -> Relaxation:
        return Relaxation(self.simulator, self.must_keep, self.must_remake)

    def _starts(self, program: Program, budget: int) -> Iterator[Schedule]:
        """Where to search from, the most promising first."""
        relaxed = program.relaxed()
        yield from (self._whole(relaxed, share) for share in _SHARES)
        yield from self._corrected(program, budget)
        if len(self.free) <= _FEW:
            yield from self._extremes()
        yield from self._tight(relaxed, budget)

    def _corrected(self, program: Program, budget: int) -> Iterator[Schedule]:
        """Solutions in whole numbers; each program knows where the one before it did not fit."""
        schedule = self._whole(program.relaxed())
        extra = np.zeros(len(self.simulator.read_by_backward), dtype=np.int64)
        for _ in range(_CORRECTIONS):
            peaks = schedule.slot_peaks()
            extra = np.maximum(extra, schedule.transients())
            full = [int(j) for j in np.argsort(-peaks, kind="stable")[:3] if peaks[j] > budget]
            if not program.tighten(extra, full):
                return
            schedule = self._whole(program.whole())
            yield Schedule(self.simulator, schedule.kept, schedule.drops())  # a search changes it

    def _whole(self, relaxed: Relaxed, share: float = 0.5) -> Schedule:
        """Keep what has more than ``share``; let copies go that are not there at a cut."""
        kept = {v for v, kept in relaxed.kept.items() if kept > share}
        schedule = Schedule(self.simulator, kept | self.must_keep)
        for slot, there in relaxed.there:
            gone = [v for v, share_there in there.items() if share_there <= share]
            for drop in schedule.passing(slot, gone):
                schedule.drop(*drop)
        schedule.commit()
        return schedule

    def _extremes(self) -> Iterator[Schedule]:
        """Everything kept that is read, and nothing; and what peaks lowest."""
        yield Schedule(self.simulator, self.keep_all().kept)
        yield Schedule(self.simulator, self.must_keep)
        yield Schedule(self.simulator, self._lowest.kept, self._lowest.drops())

    def _tight(self, relaxed: Relaxed, budget: int) -> Iterator[Schedule]:
        """Choices whose copies are let go at once; last of all one that keeps nothing."""
        kept = self._whole(relaxed).kept
        yield Schedule(self.simulator, kept)
        yield Schedule(self.simulator, kept, self._all_drops(kept))
        drops = self._all_drops(self.must_keep)
        if len(drops) <= _SHORT:
            schedule = Schedule(self.simulator, self.must_keep, drops)
            self._search(schedule).fill(budget, sorted(kept))
            yield schedule

    def _all_drops(self, kept: Set[int]) -> list[Drop]:
        """Every copy goes after the slot that makes it."""
        everything = kept | self.simulator.always_kept
        numbers, drops = self.simulator.numbers, []
        for j, reads in enumerate(numbers.reads):
            made: set[int] = set()
            stack = [v for v in reads if v not in everything]
            while stack:
                v = stack.pop()
                if v in made:
                    continue
                i = numbers.producer[v]
                made.update(w for w in numbers.remakes[i] if w not in everything)
                stack += [
                    u
                    for u in numbers.inputs[i]
                    if u < len(numbers.producer) and u not in everything
                ]
            drops += [(v, j) for v in sorted(made)]
        return drops

    # -- Searches ------------------------------------------------------------------------------------

    def _fastest(self, program: Program, budget: int) -> Schedule | None:
        """The fastest schedule found; the search ends early when none can be much faster."""
        best: Schedule | None = None
        close = program.bound + _CLOSE * self.flow.seconds
        for schedule in self._fitting(self._starts(program, budget), budget):
            if best is None or (schedule.seconds, schedule.peak) < (best.seconds, best.peak):
                best = schedule
            if best.seconds <= close:
                return best
        if best is not None:
            self._search(best).swap(budget)
            if len(self.free) <= _FEW:
                self._search(best).exchange(budget)
        return best

    def _is_close(self, choice: Choice | None, program: Program) -> bool:
        """Is the choice so near the bound that no other can be much faster?"""
        close = program.bound + _CLOSE * self.flow.seconds
        return choice is not None and choice.outcome.seconds <= close

    @cached_property
    def _smallest(self) -> Choice:
        lowest = self._lowest
        if lowest.peak >= self.keep_all().outcome.peak:
            return replace(self.keep_all(), bound=0.0)
        program = self.relaxation.program(lowest.peak)
        found = self._fastest(program, lowest.peak) if program.feasible else None
        best = self._chosen(lowest if found is None else found)
        return replace(best, bound=min(program.bound, best.outcome.seconds))

    def _fitting(self, starts: Iterable[Schedule], budget: int) -> Iterator[Schedule]:
        for schedule in starts:
            search = self._search(schedule)
            if search.repair(budget):
                search.improve(budget)
                yield schedule

    @cached_property
    def _lowest(self) -> Schedule:
        """Halve the distance to what every choice needs until it is no longer met."""
        kept = self.simulator.directly_read() - self.must_remake
        best = Schedule(self.simulator, kept | self.must_keep)
        low, high = self.least_possible, best.peak
        while high - low > max(high // 200, 1):
            target = (low + high) // 2
            found = self._below(target, best)
            if found is None:
                low = target
            else:
                best, high = found, min(found.peak, target)
        return best

    def _below(self, budget: int, best: Schedule) -> Schedule | None:
        """A schedule that fits, from what was found last or from a new start."""
        program = self.relaxation.program(budget, _CUTS_BELOW)
        if not program.feasible:
            return None
        whole = self._whole(program.relaxed())
        starts: list[tuple[Iterable[int], Iterable[Drop]]] = [
            (best.kept, best.drops()),
            (whole.kept, whole.drops()),
            (whole.kept, ()),
            (whole.kept, self._all_drops(whole.kept)),
        ]
        if len(drops := self._all_drops(self.must_keep)) <= _SHORT:
            starts.append((self.must_keep, drops))
        for start in starts:
            schedule = Schedule(self.simulator, *start)
            if self._search(schedule, patience=_PATIENCE).repair(budget):
                return schedule
        return None

    def _search(self, schedule: Schedule, patience: int = 1) -> Search:
        return Search(schedule, self.free, patience * self.limit * (len(self.free) + 50))

    def _chosen(self, schedule: Schedule) -> Choice:
        """A schedule as a choice, judged by the exact simulator."""
        return self.choice(schedule.kept - self.simulator.always_kept, schedule.useful_drops())
