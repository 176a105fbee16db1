"""The planner: which forward values to keep so that the simulated peak fits and little is made again.

Two searches, both judged by the exact simulator alone.  From above: keep everything and drop what
costs the least time for the bytes it takes off the overflow.  From below: keep nothing and add the
values that take the most off it, which finds chain breakers (a block's input) that no single drop
would.  Then, while the plan fits, keep whatever saves the most time.  Deterministic: ties fall to
graph order, limits count simulations.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

from fxmem.dataflow import Dataflow
from fxmem.simulate import Outcome, Simulator


@dataclass(frozen=True)
class Choice:
    """What to keep, which remade values to drop between their readers, and what that leads to."""

    kept: frozenset[int]
    brief: frozenset[int]
    outcome: Outcome

    @property
    def rank(self) -> tuple[float, int]:
        """Among choices that fit: less time first, then less peak."""
        return (self.outcome.seconds, self.outcome.peak)


@dataclass
class Planner:
    """must_keep, must_remake: values that the user's checkpoint policies decide.

    limit: simulations, the search's only clock.
    """

    flow: Dataflow
    must_keep: frozenset[int] = frozenset()
    must_remake: frozenset[int] = frozenset()
    limit: int = 20_000
    simulations: int = field(default=0, init=False)

    def __post_init__(self) -> None:
        self.simulator = Simulator(self.flow)
        candidates = self.simulator.candidates()
        self.free = [v for v in candidates if v not in self.must_keep | self.must_remake]

    # -- The two ends ------------------------------------------------------------------------------

    def keep_all(self) -> Choice:
        """Save what the backward reads: no time added."""
        return self._choose(self.simulator.directly_read() - self.must_remake)

    def fit(self, budget: int) -> Choice | None:
        """The fastest choice found that peaks at or below ``budget`` bytes; None if none was."""
        unchanged = self.keep_all()
        if unchanged.outcome.peak <= budget:
            return unchanged
        found = [
            self._faster(choice, budget)
            for choice in (self._from_above(budget), self._from_below(budget))
            if choice is not None
        ]
        return min(found, key=lambda c: c.rank, default=None)

    def smallest(self) -> Choice:
        """The choice with the smallest peak found, made as fast as it gets at that peak."""
        best = min((self.keep_all(), self._choose(())), key=lambda c: c.outcome.peak)
        while True:
            lower = self._from_below(best.outcome.peak - 1)
            if lower is None:
                return self._faster(best, best.outcome.peak)
            best = lower

    def choice(self, kept: frozenset[int], brief: frozenset[int]) -> Choice:
        """A given choice, judged."""
        return self._choose(kept, brief)

    # -- From above ----------------------------------------------------------------------------------

    def _from_above(self, budget: int) -> Choice | None:
        """Drop values one at a time, best overflow per second first, while that helps."""
        current = self.keep_all()
        heap = _Ranking(v for v in self.free if v in current.kept)
        while (overflow := current.outcome.overflow(budget)) > 0 and self._has_time():

            def gain(v: int, base: Choice = current, overflow: int = overflow) -> float:
                after = self._choose(base.kept - {v})
                added = after.outcome.seconds - base.outcome.seconds
                return (overflow - after.outcome.overflow(budget)) / max(added, 1e-9)

            best = heap.take(gain)
            if best is None:
                return None
            current = self._choose(current.kept - {best})
        return current if current.outcome.overflow(budget) == 0 else None

    # -- From below ----------------------------------------------------------------------------------

    def _from_below(self, budget: int) -> Choice | None:
        """Keep values one at a time, most overflow removed first, from nothing kept at all."""
        for brief in (frozenset(), frozenset(self.simulator.candidates())):
            current = self._grow(self._choose(self.must_keep, brief), budget)
            if current.outcome.overflow(budget) == 0:
                return current
        return None

    def _grow(self, current: Choice, budget: int) -> Choice:
        heap = _Ranking(self.free)
        while (overflow := current.outcome.overflow(budget)) > 0 and self._has_time():

            def gain(v: int, base: Choice = current, overflow: int = overflow) -> float:
                after = self._choose(base.kept | {v}, base.brief)
                return float(overflow - after.outcome.overflow(budget))

            best = heap.take(gain)
            if best is None:
                break
            current = self._choose(current.kept | {best}, current.brief)
        return current

    # -- Faster at the same budget ---------------------------------------------------------------------

    def _faster(self, current: Choice, budget: int) -> Choice:
        """Keep more, most seconds saved first, as long as the plan fits."""
        current = self._lasting(current, budget)
        heap = _Ranking(v for v in self.free if v not in current.kept)
        while self._has_time():

            def gain(v: int, base: Choice = current) -> float:
                after = self._choose(base.kept | {v}, base.brief)
                if after.outcome.peak > budget:
                    return 0.0
                return (base.outcome.seconds - after.outcome.seconds) / self.flow.values[v].nbytes

            best = heap.take(gain)
            if best is None:
                return current
            current = self._choose(current.kept | {best}, current.brief)
        return current

    def _lasting(self, current: Choice, budget: int) -> Choice:
        """Let remade values stay between their readers wherever that fits."""
        for v in sorted(current.brief, key=lambda v: self.flow.values[v].nbytes):
            after = self._choose(current.kept, current.brief - {v})
            if after.outcome.peak <= budget and after.outcome.seconds <= current.outcome.seconds:
                current = after
        return current

    # -- Simulation --------------------------------------------------------------------------------------

    def _choose(self, kept: Iterable[int], brief: frozenset[int] = frozenset()) -> Choice:
        self.simulations += 1
        kept = frozenset(kept) | self.must_keep
        return Choice(kept, brief, self.simulator.run(kept, brief))

    def _has_time(self) -> bool:
        return self.simulations < self.limit


class _Ranking:
    """Lazy greedy choice: gains are looked up again only when a stale one leads.

    Gains mostly shrink as more is chosen, so an old gain is mostly an upper bound.
    Source: Minoux 1978, "Accelerated greedy algorithms for maximizing submodular set functions".
    """

    def __init__(self, items: Iterable[int]) -> None:
        self.stale: dict[int, float] = {v: float("inf") for v in items}

    def take(self, gain: Callable[[int], float]) -> int | None:
        """Remove and return the item with the largest positive gain; None when there is none."""
        fresh: dict[int, float] = {}
        while self.stale:
            leader = max(self.stale, key=lambda v: (self.stale[v], -v))
            if leader in fresh:
                break
            self.stale[leader] = fresh[leader] = gain(leader)
        else:
            return None
        if self.stale[leader] <= 0:
            return None
        del self.stale[leader]
        return leader
