"""The solver: the fastest schedule found at one budget, and the lowest peak found at any.

A linear program bounds the time that any plan adds; its solution, made whole, is a first choice.
Local search over the incremental simulator takes it into the budget and then makes it as fast as it
gets there.  Where bytes are so tight that this fails, the search starts again from choices that let
every copy go at once.  Deterministic: ties fall to graph order, limits count simulated work.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Set
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from fxmem.relaxation import Bound, Program, Relaxation, Relaxed
from fxmem.schedule import Schedule
from fxmem.search import Search
from fxmem.simulate import Drop, Simulator

_SHARES = (0.5, 0.3, 0.7)
"""What a share in the linear program's solution must exceed to count as all."""

_CORRECTIONS = 1
"""Programs tried for one budget; each knows the bytes that the one before left out."""

_CLOSE = 0.002
"""Of the unchanged step's time: how near its bound a plan is good enough."""

_FAIR = 0.005
"""And where there are so many values that every search takes seconds."""

_SHORT = 20_000
"""Operators made again in all slots: up to here a search may start from nothing kept."""

FEW = 20
"""Values among which there is time for all ways to start."""

_CUTS_BELOW = 8
"""In linear programs that only say where to start looking for the smallest peak."""

_CUTS_AT_RUNGS = (5, 3)
"""In programs whose plans search will change anyway."""

_COLUMNS_TO_CORRECT = 2_000

_FEW_TO_SWAP = 500

_LAST_STEPS = 8
"""Searches right below the smallest peak found, as long as they find a smaller one."""

_PATIENCE = 6
"""How much longer a search may take that looks for the smallest peak."""


@dataclass(frozen=True)
class Solver:
    """free: the values that may be kept or not.  must_keep, must_remake: those that may not.

    limit: work that one search may do for each free value, in values looked at: the only clock.
    """

    simulator: Simulator
    free: tuple[int, ...]
    must_keep: frozenset[int]
    must_remake: frozenset[int]
    limit: int

    def program(self, budget: int) -> Program:
        return self._relaxation.program(budget)

    def quick(self, program: Program) -> Schedule | None:
        """The fastest schedule that the program's solutions lead to."""
        return self._fastest(self._from_programs(program), program)

    def best(self, program: Program) -> Schedule | None:
        """The fastest schedule found; where there are few values to choose, from everywhere."""
        if len(self.free) > FEW:
            return self.quick(program)
        best = self._fastest(self._starts(program), program)
        if best is not None and best.seconds > program.bound.seconds:
            self.search(best).exchange(int(program.budget))
        return best

    def _fastest(self, starts: Iterable[Schedule], program: Program) -> Schedule | None:
        """The search ends early when none can be much faster."""
        budget = int(program.budget)
        best: Schedule | None = None
        for schedule in self._fitting(self._unseen(starts, set()), budget):
            if best is None or (schedule.seconds, schedule.peak) < (best.seconds, best.peak):
                best = schedule
            if best.seconds <= self.near(program.bound, _CLOSE if self._few_to_swap else _FAIR):
                return best
        if best is not None:
            self.search(best).swap(budget)
        return best

    def lowest(self, best: Schedule) -> Schedule:
        """From a schedule, halve the distance to what every choice needs, then look right below."""
        low, high = self.least_possible, best.peak
        while high - low > max(high // 200, 1):
            target = (low + high) // 2
            found = self.below(target, best)
            if found is None:
                low = target
            else:
                best, high = found, min(found.peak, target)
        for _ in range(_LAST_STEPS):
            found = self.below(best.peak - 1, best)
            if found is None:
                break
            best = found
        return best

    @property
    def least_possible(self) -> int:
        """Bytes that every choice needs: in each slot what its operator reads, makes and works in."""
        return self.simulator.least.nbytes

    @cached_property
    def _relaxation(self) -> Relaxation:
        return Relaxation(self.simulator, self.must_keep, self.must_remake)

    @property
    def all_read(self) -> frozenset[int]:
        """What is saved when nothing is made again that need not be."""
        return self.simulator.directly_read() - self.must_remake | self.must_keep

    def rung(self, budget: int, share: float) -> tuple[list[Schedule], Bound] | None:
        """The schedules that small programs lead to, and a bound; None if there is no plan.

        Ends early when a schedule is so near its bound.
        """
        found: list[Schedule] = []
        bound: Bound | None = None
        seen: set[tuple[frozenset[int], frozenset[Drop]]] = set()
        for cuts in _CUTS_AT_RUNGS:
            program = self._relaxation.program(budget, cuts)
            if not program.feasible:
                return None
            if bound is None or program.bound.seconds > bound.seconds:
                bound = program.bound
            for schedule in self._fitting(self._unseen(self._rounded(program), seen), budget):
                found.append(schedule)
                if schedule.seconds <= self.near(bound, share):
                    return found, bound
        assert bound is not None
        return found, bound

    def _unseen(
        self, schedules: Iterable[Schedule], seen: set[tuple[frozenset[int], frozenset[Drop]]]
    ) -> Iterator[Schedule]:
        for schedule in schedules:
            key = frozenset(schedule.kept), schedule.useful_drops()
            if key not in seen:
                seen.add(key)
                yield schedule

    @property
    def _few_to_swap(self) -> bool:
        return len(self.free) <= _FEW_TO_SWAP

    def near(self, bound: Bound, share: float) -> float:
        """Seconds above a bound by such a share of the unchanged step's time."""
        return bound.seconds + share * self.simulator.flow.seconds

    # -- Where searches start ----------------------------------------------------------------------

    def _starts(self, program: Program) -> Iterator[Schedule]:
        """Where to search from, the most promising first."""
        relaxed = program.relaxed()
        yield from self._from_programs(program)
        yield from self._extremes()
        yield from self._tight(relaxed, int(program.budget))

    def _from_programs(self, program: Program) -> Iterator[Schedule]:
        relaxed = program.relaxed()
        yield from (self._whole(relaxed, share) for share in _SHARES)
        yield from self._corrected(program)

    def _rounded(self, program: Program) -> Iterator[Schedule]:
        relaxed = program.relaxed()
        yield from (self._whole(relaxed, share) for share in _SHARES)
        if program.columns <= _COLUMNS_TO_CORRECT and self._few_to_swap:
            yield from self._corrected(program, 1)

    def _corrected(self, program: Program, most: int = _CORRECTIONS) -> Iterator[Schedule]:
        """Solutions in whole numbers; each program knows where the one before it did not fit."""
        schedule = self._whole(program.relaxed())
        extra = np.zeros(len(self.simulator.read_by_backward), dtype=np.int64)
        for _ in range(most):
            peaks = schedule.slot_peaks()
            extra = np.maximum(extra, schedule.transients())
            fullest = np.argsort(-peaks, kind="stable")[:3]
            if not program.tighten(extra, [int(j) for j in fullest if peaks[j] > program.budget]):
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
        """Everything kept that is read, and nothing."""
        yield Schedule(self.simulator, self.all_read)
        yield Schedule(self.simulator, self.must_keep)

    def _tight(self, relaxed: Relaxed, budget: int) -> Iterator[Schedule]:
        """Choices whose copies are let go at once; last of all one that keeps nothing."""
        kept = self._whole(relaxed).kept
        yield Schedule(self.simulator, kept)
        yield Schedule(self.simulator, kept, self._all_drops(kept))
        drops = self._all_drops(self.must_keep)
        if len(drops) <= _SHORT:
            schedule = Schedule(self.simulator, self.must_keep, drops)
            self.search(schedule).fill(budget, sorted(kept))
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

    def _fitting(self, starts: Iterable[Schedule], budget: int) -> Iterator[Schedule]:
        for schedule in starts:
            search = self.search(schedule)
            if search.repair(budget):
                search.improve(budget)
                yield schedule

    def below(self, budget: int, best: Schedule) -> Schedule | None:
        """A schedule that fits, from what was found last or from a new start."""
        program = self._relaxation.program(budget, _CUTS_BELOW)
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
            if self.search(schedule, patience=_PATIENCE).repair(budget):
                return schedule
        return None

    def search(self, schedule: Schedule, patience: int = 1) -> Search:
        return Search(schedule, self.free, patience * self.limit * (len(self.free) + 50))
