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

Move = tuple[int, str]
"""A value, and what to do with it: ``keep`` it, ``drop`` it, or let its remade copies be ``brief``."""


_FEW = 64
"""Values among which the smallest peak is found in a moment, and competes for every budget."""


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

    limit: simulations that one search may take, the only clock there is.
    """

    flow: Dataflow
    must_keep: frozenset[int] = frozenset()
    must_remake: frozenset[int] = frozenset()
    limit: int = 3_000
    simulations: int = field(default=0, init=False)

    def __post_init__(self) -> None:
        self.simulator = Simulator(self.flow)
        self.candidates = self.simulator.candidates()
        fixed = self.must_keep | self.must_remake
        self.free = [v for v in self.candidates if v not in fixed]
        self._until = 0
        self._smallest: Choice | None = None
        self._ends: list[Choice] = []  # where searches ended

    # -- What is asked of a planner ----------------------------------------------------------------

    def keep_all(self) -> Choice:
        """Save what the backward reads: no time added."""
        return self.choice(self.simulator.directly_read() - self.must_remake)

    def fit(self, budget: int) -> Choice | None:
        """The fastest choice found that peaks at or below ``budget`` bytes; None if none was."""
        unchanged = self.keep_all()
        if unchanged.outcome.peak <= budget:
            return unchanged
        found = list(self._searches(budget))
        self._ends += found
        if len(self.free) <= _FEW:
            found.append(self.smallest())
        fitting = [c for c in found if c.outcome.peak <= budget]
        return min((self._faster(c, budget) for c in fitting), key=lambda c: c.rank, default=None)

    def smallest(self) -> Choice:
        """The choice with the smallest peak found, made as fast as it gets at that peak."""
        if self._smallest is None:
            self._smallest = self._find_smallest()
        return self._smallest

    def _find_smallest(self) -> Choice:
        starts = [self.keep_all(), *(self.choice(self.must_keep, b) for b in self._briefs())]
        ends = [*map(self._lower, starts), *self._ends]
        best = min(ends, key=lambda c: c.outcome.peak)
        return self._faster(best, best.outcome.peak)

    def choice(self, kept: Iterable[int], brief: frozenset[int] = frozenset()) -> Choice:
        """A given choice, judged."""
        self.simulations += 1
        kept = frozenset(kept) | self.must_keep
        return Choice(kept, brief, self.simulator.run(kept, brief))

    # -- Searches for a choice that fits -----------------------------------------------------------

    def _searches(self, budget: int) -> Iterable[Choice]:
        yield self._descend(self.keep_all(), budget, ("drop",), per_second=True)
        lasting, brief = (self.choice(self.must_keep, b) for b in self._briefs())
        below = self._descend(lasting, budget, ("keep", "brief"))
        yield below
        if below.outcome.peak > budget:
            yield self._descend(brief, budget, ("keep",))

    def _briefs(self) -> tuple[frozenset[int], frozenset[int]]:
        """Remade values stay between their readers, or none of them does."""
        return frozenset(), frozenset(self.candidates)

    def _lower(self, current: Choice) -> Choice:
        """Take the peak down in steps that shrink when they fail."""
        until = self.simulations + self.limit // 2
        step = current.outcome.peak // 4
        while step > current.outcome.peak // 400 and self.simulations < until:
            target = current.outcome.peak - step
            after = self._descend(current, target, ("keep", "brief", "drop"))
            if after.outcome.peak > target:
                step //= 2
            if after.outcome.peak < current.outcome.peak:
                current = after
        return current

    def _descend(
        self, current: Choice, budget: int, kinds: tuple[str, ...], per_second: bool = False
    ) -> Choice:
        """Make moves, most overflow removed first (or most a second), until it is gone."""
        self._until = self.simulations + self.limit
        ranking = _Ranking((v, kind) for v in self.free for kind in kinds)
        while (overflow := current.outcome.overflow(budget)) > 0:

            def gain(move: Move, base: Choice = current, overflow: int = overflow) -> float:
                after = self._moved(base, move)
                if after is None:
                    return 0.0
                removed = overflow - after.outcome.overflow(budget)
                added = after.outcome.seconds - base.outcome.seconds
                return removed / max(added, 1e-9) if per_second else float(removed)

            best = ranking.take(gain)
            moved = self._moved(current, best) if best else None
            if moved is None or self.simulations >= self._until:
                break
            current = moved
        return current

    def _moved(self, base: Choice, move: Move) -> Choice | None:
        """The choice after a move; None if the move changes nothing."""
        v, kind = move
        if (v in base.kept) != (kind == "drop") or (kind == "brief" and v in base.brief):
            return None
        if kind == "brief":
            return self.choice(base.kept, base.brief | {v})
        kept = base.kept - {v} if kind == "drop" else base.kept | {v}
        return self.choice(kept, base.brief)

    # -- Faster at the same budget -----------------------------------------------------------------

    def _faster(self, current: Choice, budget: int) -> Choice:
        """Keep more, most seconds saved a byte first, as long as the plan fits."""
        current = self._lasting(current, budget)
        self._until = self.simulations + self.limit
        ranking = _Ranking((v, "keep") for v in self.free if v not in current.kept)
        while self.simulations < self._until:

            def gain(move: Move, base: Choice = current) -> float:
                after = self._moved(base, move)
                if after is None or after.outcome.peak > budget:
                    return 0.0
                saved = base.outcome.seconds - after.outcome.seconds
                return saved / max(self.flow.values[move[0]].nbytes, 1)

            best = ranking.take(gain)
            moved = self._moved(current, best) if best else None
            if moved is None:
                break
            current = moved
        return self._lasting(current, budget)

    def _lasting(self, current: Choice, budget: int) -> Choice:
        """Let remade values stay between their readers wherever that fits."""
        for v in sorted(current.brief, key=lambda v: (self.flow.values[v].nbytes, v)):
            after = self.choice(current.kept, current.brief - {v})
            if after.outcome.peak <= budget and after.outcome.seconds <= current.outcome.seconds:
                current = after
        return current


class _Ranking:
    """Lazy greedy choice: gains are looked up again only when a stale one leads.

    Gains mostly shrink as more is chosen, so an old gain is mostly an upper bound.
    Source: Minoux 1978, "Accelerated greedy algorithms for maximizing submodular set functions".
    """

    def __init__(self, moves: Iterable[Move]) -> None:
        self.stale: dict[Move, float] = {move: float("inf") for move in moves}

    def take(self, gain: Callable[[Move], float]) -> Move | None:
        """Remove and return the move with the largest positive gain; None when there is none."""
        fresh: set[Move] = set()
        while self.stale:
            leader = max(self.stale, key=self.stale.__getitem__)  # ties: first in graph order
            if leader in fresh:
                if self.stale[leader] <= 0:
                    return None
                del self.stale[leader]
                return leader
            self.stale[leader] = gain(leader)
            fresh.add(leader)
        return None
