"""The solver: fast schedules at one budget, and the lowest peak found at any.

A linear program bounds the time that any plan adds, and its solution, rounded, is a first choice.
The program does not see what a slot holds while it makes values again; so where the rounded choice
does not fit, the program is told and solved again.  Local search over the incremental simulator
takes each choice into the budget and then makes it as fast as it gets there.  Where there are few
values, searches start from everywhere.  Deterministic: ties fall to graph order, limits count
simulated work.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Set
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from fxmem.analysis.dataflow import NOISE_CEILING
from fxmem.analysis.simulate import Drop, Simulator
from fxmem.planning.relaxation import CUTS, Bound, Program, Relaxation, Relaxed, worst
from fxmem.planning.schedule import Schedule
from fxmem.planning.search import Search

_SHARES = (0.5, 0.3)
"""What a share in the linear program's first solution must exceed to count as all."""

_CORRECTIONS = 3
"""Programs solved again for one budget; each knows the bytes that the ones before left out."""

_CUTS_A_CORRECTION = 2

_CLOSE = (0.002, 0.005, 0.01)
"""Of the unchanged step's time: how near its bound a plan is good enough; the more work was done in
vain, the less is asked."""

_MANY = 500
"""Values among which searches take seconds, so that the second of these is asked at first."""

_SHORT = 20_000
"""Operators made again in all slots: up to here a search may start from nothing kept."""

FEW = 20
"""Values among which there is time for all ways to start."""

_CUTS_BELOW = 8
"""In linear programs that only say where to start looking for the smallest peak."""

_CUTS_OF_FEW = 12

_LAST_STEPS = 8
"""Searches right below the smallest peak found, as long as they find a smaller one."""

_PATIENCE = 6
"""How much longer a search may take that looks for the smallest peak."""


@dataclass(frozen=True)
class Answer:
    """What is found at one budget: schedules that fit, and a bound on every schedule's time."""

    schedules: tuple[Schedule, ...]
    bound: Bound


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

    # -- At one budget -------------------------------------------------------------------------------

    def answer(self, budget: int) -> Answer | None:
        """Schedules until one is close to the bound; None where the program says there are none."""
        program = self.program(budget)
        if not program.feasible:
            return None
        found: list[Schedule] = []
        seen: set[tuple[frozenset[int], frozenset[Drop]]] = set()
        for tried, starts in enumerate(self._starts(program)):
            new = list(self._fitting(starts, budget, seen))
            if new:
                best = min(new, key=_rank)
                if not self.is_close(best.seconds, program.bound, tried):
                    self.search(best).swap(budget)
                found += new
            if found and self.is_close(min(found, key=_rank).seconds, program.bound, tried):
                return Answer(tuple(found), program.bound)
        if found and self.are_few:
            self.search(min(found, key=_rank)).exchange(budget)
        return Answer(tuple(found), program.bound)

    def program(self, budget: int) -> Program:
        return self._relaxation.program(budget, _CUTS_OF_FEW if self.are_few else CUTS)

    def is_close(self, seconds: float, bound: Bound, tried: int = 0) -> bool:
        """Is a plan that adds so many seconds as good as one need look for, after so many tries?"""
        tried += self.are_many
        share = _CLOSE[min(tried, len(_CLOSE) - 1)]
        return seconds <= bound.seconds + share * self.simulator.flow.seconds

    @property
    def are_many(self) -> bool:
        return len(self.free) > _MANY

    @property
    def are_few(self) -> bool:
        return len(self.free) <= FEW

    def search(self, schedule: Schedule, patience: int = 1) -> Search:
        return Search(schedule, self.free, patience * self.limit * (len(self.free) + 50))

    @property
    def all_read(self) -> frozenset[int]:
        """What is saved when nothing is made again that need not be, and there is no code."""
        return self.all_read_without(self.simulator.codes)

    def all_read_without(self, codes: Set[int]) -> frozenset[int]:
        """The same with codes of whatever has one, but for these."""
        return self.simulator.read_without(codes) - self.must_remake | self.must_keep

    def coded_without(self, codes: Set[int]) -> frozenset[int]:
        """``all_read_without``, and without codes that are too much noise together."""
        lossy = self.simulator.lossy
        saved = self.all_read_without(codes)
        return self.all_read_without(codes | lossy - self._quiet(saved))

    def _quiet(self, kept: Set[int]) -> frozenset[int]:
        """These values without the codes that are too much noise together, most a byte saved first."""
        values, operand = self.simulator.flow.values, self.simulator.operand

        def density(v: int) -> float:
            return values[v].noise / max(values[operand(v)].nbytes - values[v].nbytes, 1)

        left, found = NOISE_CEILING, set(kept)
        for v in sorted(self.simulator.lossy & found, key=lambda v: (density(v), v)):
            left -= values[v].noise
            if left < 0:
                left += values[v].noise
                found.discard(v)
        return frozenset(found)

    @property
    def least_possible(self) -> int:
        """Bytes that every choice needs: in each slot what its operator reads, makes and works in."""
        return self.simulator.least.nbytes

    @cached_property
    def _relaxation(self) -> Relaxation:
        return Relaxation(self.simulator, self.must_keep, self.must_remake)

    def _fitting(
        self,
        starts: Iterable[Schedule],
        budget: int,
        seen: set[tuple[frozenset[int], frozenset[Drop]]],
    ) -> Iterator[Schedule]:
        """Those of the schedules that a search takes into the budget, each once."""
        for schedule in starts:
            key = frozenset(schedule.kept), schedule.useful_drops()
            if key in seen:
                continue
            seen.add(key)
            search = self.search(schedule)
            if search.repair(budget):
                search.improve(budget)
                yield schedule
            elif key[1]:  # what the drops make again stands in the way
                yield from self._fitting([Schedule(self.simulator, key[0])], budget, seen)

    # -- Where searches start ------------------------------------------------------------------------

    def _starts(self, program: Program) -> Iterator[Iterable[Schedule]]:
        """Where to search from, the most promising first; the bound gets better on the way."""
        first = program.relaxed()
        yield from self._rounded(program)
        if self.are_few:
            yield self._extremes()
            yield self._tight(first, int(program.budget))

    def _rounded(self, program: Program) -> Iterator[Iterable[Schedule]]:
        """Solutions, rounded; each program knows where the ones before it did not fit."""
        relaxed = program.relaxed()
        extra = np.zeros(len(self.simulator.read_by_backward), dtype=np.int64)
        for correction in range(_CORRECTIONS + 1):
            all_shares = self.are_few or not (correction or self.are_many)
            shares = _SHARES if all_shares else _SHARES[:1]
            schedules = [self._whole(relaxed, share) for share in shares]
            peaks, transients = schedules[0].slot_peaks(), schedules[0].transients()
            yield schedules  # which a search changes
            full = worst(peaks - program.budget)[:_CUTS_A_CORRECTION]
            extra = np.maximum(extra, transients)
            if correction == _CORRECTIONS or not program.tighten(extra, full):
                return
            relaxed = program.whole() if self.are_few else program.relaxed()
            program.relax()

    def _whole(self, relaxed: Relaxed, share: float = 0.5) -> Schedule:
        """Keep what has more than ``share``; let copies go that are not there at a cut."""
        kept = {v for v, kept in relaxed.kept.items() if kept > share}
        schedule = Schedule(self.simulator, self._quiet(kept) | self.must_keep)
        for slot, there in relaxed.there:
            gone = [v for v, share_there in there.items() if share_there <= share]
            for drop in schedule.passing(slot, gone):
                schedule.drop(*drop)
        schedule.commit()
        return schedule

    def _extremes(self) -> Iterator[Schedule]:
        """Everything kept that is read, as it is and as codes; and nothing."""
        for saved in dict.fromkeys((self.all_read, self.coded_without(frozenset()))):
            yield Schedule(self.simulator, saved)
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

    # -- The lowest peak -----------------------------------------------------------------------------

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


def _rank(schedule: Schedule) -> tuple[float, int]:
    return (schedule.seconds, schedule.peak)
