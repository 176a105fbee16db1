"""The planner: which forward values to keep so that the simulated peak fits and little is made again.

A linear program says which values are worth their bytes; its solution, made whole, is a first
choice.  Local search over the incremental simulator takes it into the budget and then makes it as
fast as it gets there.  Where bytes are so tight that this fails, the search starts again from
choices that let every copy go at once.  Deterministic: ties fall to graph order, limits count
simulated work.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np

from fxmem.dataflow import Dataflow
from fxmem.relaxation import Extra, Relaxation
from fxmem.schedule import Schedule
from fxmem.search import Search
from fxmem.simulate import Drop, Outcome, Simulator

_CORRECTIONS = 4
"""Linear programs tried for one budget; each knows the bytes that the one before left out."""

_SHORT = 20_000
"""Operators made again in all slots: up to here a search may start from nothing kept."""


_FEW = 100
"""Values among which there is time for all ways to start."""

_PATIENCE = 6
"""How much longer a search may take that looks for the smallest peak."""


@dataclass(frozen=True)
class Choice:
    """What to keep, which remade copies to let go before their last reader, and what it leads to."""

    kept: frozenset[int]
    drops: frozenset[Drop]
    outcome: Outcome

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
    _smallest: Choice | None = field(default=None, init=False, repr=False)

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
            return unchanged
        found = list(self._fitting(self._relaxed(budget), budget))
        if len(self.free) <= _FEW:
            found += self._fitting(self._extremes(), budget)
        if not found or len(self.free) <= _FEW:
            found += self._fitting(self._tight(budget), budget)
        if not found:
            return None
        best = min(found, key=lambda s: (s.seconds, s.peak))
        self._search(best).swap(budget)
        return self._chosen(best)

    def smallest(self) -> Choice:
        """The choice with the smallest peak found, made as fast as it gets at that peak."""
        if self._smallest is None:
            lowest = self._lowest
            found = self.fit(lowest.peak)
            if found is None or found.outcome.peak > lowest.peak:
                found = self._chosen(lowest)
            self._smallest = found
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

    def _relaxed(self, budget: int) -> Iterator[Schedule]:
        """Whole solutions of the linear program; copies stay until their last reader."""
        extra: Extra | None = None
        for _ in range(_CORRECTIONS):
            kept = self._whole(budget, extra)
            schedule = Schedule(self.simulator, kept)
            left_out = self._left_out(schedule)  # before a search changes it
            yield schedule
            if extra is not None:  # half way, or two solutions take turns for ever
                left_out = (left_out[0] + extra[0]) / 2, (left_out[1] + extra[1]) / 2
            extra = left_out

    def _extremes(self) -> Iterator[Schedule]:
        """Everything kept that is read, and nothing; and what peaks lowest."""
        yield Schedule(self.simulator, self.keep_all().kept)
        yield Schedule(self.simulator, self.must_keep)
        yield Schedule(self.simulator, self._lowest.kept, self._lowest.drops())

    def _tight(self, budget: int) -> Iterator[Schedule]:
        """Choices whose copies are let go at once; last of all one that keeps nothing."""
        kept = self._whole(budget, None)
        yield Schedule(self.simulator, kept)
        yield Schedule(self.simulator, kept, self._all_drops(kept))
        drops = self._all_drops(self.must_keep)
        if len(drops) <= _SHORT:
            schedule = Schedule(self.simulator, self.must_keep, drops)
            self._search(schedule).fill(budget, sorted(kept))
            yield schedule

    def _whole(self, budget: int, extra: Extra | None) -> frozenset[int]:
        shares = self.relaxation.solve(budget, extra).kept
        return frozenset(v for v, share in shares.items() if share > 0.5) | self.must_keep

    def _left_out(self, schedule: Schedule) -> Extra:
        """The bytes of a schedule that the linear program does not see, by step and slot."""
        needed = {v for v, slots in schedule.read_in.items() if slots}
        forward, slots = self.relaxation.modelled(schedule.kept & needed, needed)
        peaks = schedule.forward_peaks()
        if len(peaks) != len(forward):  # the forward makes more than it does for its results
            peaks = forward
        return peaks - forward, schedule.slot_peaks() - slots

    def _all_drops(self, kept: frozenset[int]) -> list[Drop]:
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
        kept = self._whole(budget, None)
        starts: list[tuple[Iterable[int], Iterable[Drop]]] = [
            (best.kept, best.drops()),
            (kept, ()),
            (kept, self._all_drops(kept)),
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
