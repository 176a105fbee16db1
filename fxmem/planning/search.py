"""Local search over one schedule: into a budget at the least time, then as fast as it gets inside.

A move is judged by the incremental simulator and by nothing else.  Deterministic: ties fall to the
order of moves, limits count simulated work.
"""

from __future__ import annotations

import heapq
import itertools
import math
from collections.abc import Callable, Iterable, Iterator
from typing import Literal

import numpy as np

from fxmem.analysis.dataflow import NOISE_CEILING
from fxmem.planning.schedule import Schedule

Kind = Literal["keep", "remake", "drop", "retain", "forget", "clear", "encode", "decode"]
Move = tuple[Kind, int, int]
"""What to do with a value: keep it, or make it again (and ``forget`` what that makes, too); let its
copy go after a slot, or not.  Or ``clear`` a slot of the copies that it does not read.  Or keep a code of
a value, named in the place of a slot, and the value no more; or the other way round."""

_FEW = 20
"""Values of which any two may be changed at once to get into a budget."""

_ROUNDS = 4
"""Of swaps, as long as they save something."""

_TRIED = 12
"""Values in whose favour one may be given up."""

_MORE = 2.0
"""A move may save so much more of what it saves alone after another value is given up."""

_NEARLY = 0.95
"""A move that gains so much of what the best of the others may gain is as good as the best."""

_EPSILON = 1e-12
"""Seconds that count as none."""

_LEAST_SECONDS = 1e-9
"""What a move is taken to add where it adds less."""


class Search:
    """free: the values that may be moved.  limit: work that the schedule may do for it."""

    def __init__(self, schedule: Schedule, free: Iterable[int], limit: int) -> None:
        self.schedule = schedule
        self.free = list(free)
        self.copies = schedule.simulator.candidates()
        self._movable = frozenset(self.free)
        self.codes = sorted(schedule.simulator.codes & self._movable)
        self._operand = schedule.simulator.operand
        self.until = schedule.work + limit

    @property
    def exhausted(self) -> bool:
        return self.schedule.work >= self.until

    # -- Into the budget ---------------------------------------------------------------------------

    def repair(self, budget: int) -> bool:
        """Make the moves that take most off the overflow a second, until none is left."""
        schedule = self.schedule
        ranking = Ranking()
        unranked = set(self.free)
        while (overflow := schedule.overflow(budget)) > 0:
            seconds = schedule.seconds

            def gain(_: Move, overflow: int = overflow, seconds: float = seconds) -> float:
                removed = overflow - schedule.overflow(budget)
                if removed <= 0:
                    return removed
                return removed / max(schedule.seconds - seconds, _LEAST_SECONDS)

            fullest = int(schedule.slot_peaks().argmax())
            ranking.offer(self._reductions(budget, fullest, sorted(unranked)))
            unranked = {v for v in unranked if not ranking.knows(self._opposite(v))}
            move = self._take(ranking, gain)
            if move is not None:
                self.make(move)
                unranked.add(move[1])
                continue
            unranked.update(self.free)
            move = self._take(Ranking(_unknown(self._last_resorts(fullest))), gain)
            if move is not None:
                self.make(move)
            elif not self._reduce_by_two(budget):
                return False
        return True

    def _reduce_by_two(self, budget: int) -> bool:
        """Change two values at once, where that takes something off the overflow."""
        if len(self.free) > _FEW:
            return False
        overflow = self.schedule.overflow(budget)
        return self._change_two(lambda: self.schedule.overflow(budget) < overflow)

    def _reductions(
        self, budget: int, fullest: int, values: Iterable[int]
    ) -> Iterator[tuple[Move, float]]:
        """Keep a value or not; let a copy go that is there in the fullest slot, but not read.

        With each, what it gains at most: making again what is kept takes no more than its bytes off
        each slot above the budget that it is there in, and takes no less than its operator's time.
        """
        schedule, step = self.schedule, self.schedule.step
        full = np.concatenate([[0], np.cumsum(schedule.slot_peaks() > budget)])
        forward = int((schedule.forward_peaks() > budget).sum())
        for v in values:
            if v not in schedule.kept:
                yield self._opposite(v), math.inf
                continue
            spans = schedule.spans.get(v, ())
            slots = forward + sum(int(full[end + 1] - full[max(start, 0)]) for start, end in spans)
            seconds = max(step.seconds[step.producer[v]], _LEAST_SECONDS)
            yield self._opposite(v), slots * step.nbytes[v] / seconds
        for v, j in schedule.passing(fullest, self.copies):
            yield ("drop", v, j), math.inf
        for code in self.codes:
            if code not in schedule.kept and (v := self._operand(code)) in schedule.kept:
                yield ("encode", v, code), math.inf

    def _last_resorts(self, fullest: int) -> Iterator[Move]:
        """Let all copies go that pass the fullest slot, or forget a value that is kept for later."""
        schedule = self.schedule
        yield ("clear", -1, fullest)
        for v in self.free:
            if v in schedule.kept and any(end >= fullest for _, end in schedule.spans.get(v, ())):
                yield ("forget", v, -1)

    # -- Faster inside the budget ------------------------------------------------------------------

    def fill(self, budget: int, values: Iterable[int]) -> None:
        """Keep one value after the other where that fits."""
        for v in values:
            mark = self.schedule.mark()
            if self.make(("keep", v, -1)) and self.schedule.peak > budget:
                self.schedule.undo(mark)

    def improve(self, budget: int) -> None:
        """Keep more and let go less, most seconds saved a byte first, as long as that fits."""
        schedule = self.schedule
        nbytes = schedule.step.nbytes
        ranking = Ranking(_unknown(self._increases()))
        while True:
            seconds = schedule.seconds

            def gain(move: Move, seconds: float = seconds) -> float:
                saved = seconds - schedule.seconds
                if saved <= _EPSILON or schedule.peak > budget:
                    return 0.0
                return saved / max(nbytes[move[1]], 1)

            move = self._take(ranking, gain)
            if move is None:
                return
            self.make(move)

    def _increases(self) -> Iterator[Move]:
        schedule = self.schedule
        for v in self.free:
            if v not in schedule.kept:
                yield ("keep", v, -1)
        for v, j in sorted(schedule.useful_drops()):
            yield ("retain", v, j)
        for code in self.codes:
            if code in schedule.kept:
                yield ("decode", self._operand(code), code)

    def swap(self, budget: int) -> None:
        """Give one kept value up for others, where that saves time.

        What each move changes on its own is looked at once a round; only values that are cheap for
        their bytes are given up, and only what is dear for its bytes and may fit is tried instead.
        """
        schedule, nbytes = self.schedule, self.schedule.step.nbytes
        for _ in range(_ROUNDS):
            before = schedule.seconds
            gains = self._by_density(self._increases(), -1.0)
            slack = budget - schedule.peak
            wanted = dict(self._worth_giving_up(gains, slack))
            losses = self._by_density((("remake", v, -1) for v in wanted), 1.0)
            for loss, (_, v, _) in reversed(losses):
                if v in schedule.kept and wanted[v][0] > loss * nbytes[v]:
                    self._give_up(v, wanted[v][1], budget)
            if self.exhausted or schedule.seconds >= before - _EPSILON:
                return

    def _worth_giving_up(
        self, gains: list[tuple[float, Move]], slack: int
    ) -> Iterator[tuple[int, tuple[float, list[tuple[float, Move]]]]]:
        """The kept values that other moves may make up for: what those save at most, and those.

        Making a value again takes no less than its operator's time.
        """
        schedule, step = self.schedule, self.schedule.step
        for v in self.free:
            if v in schedule.kept:
                room = step.nbytes[v] + slack
                fitting = (g for g in gains if step.nbytes[g[1][1]] <= room and g[1][1] != v)
                wanted = list(itertools.islice(fitting, _TRIED))
                most = self._most(wanted, room)
                if most > step.seconds[step.producer[v]]:
                    yield v, (most, wanted)

    def _by_density(self, moves: Iterable[Move], sign: float) -> list[tuple[float, Move]]:
        """Moves that change the seconds in this direction, the most for a byte first."""
        schedule, nbytes = self.schedule, self.schedule.step.nbytes
        found = []
        for move in moves:
            mark, before = schedule.mark(), schedule.seconds
            if self.exhausted or not self.make(move):
                continue
            schedule.work += 1
            change = sign * (schedule.seconds - before)
            schedule.undo(mark)
            if change > _EPSILON or sign > 0:
                found.append((change / max(nbytes[move[1]], 1), move))
        return sorted(found, key=lambda one: -one[0])

    def _most(self, gains: Iterable[tuple[float, Move]], room: float) -> float:
        """Seconds that moves may save in so many bytes, the best first, the last in part."""
        seconds = 0.0
        for density, (_, v, _) in gains:
            nbytes = max(self.schedule.step.nbytes[v], 1)
            seconds += density * min(nbytes, max(room, 0))
            room -= nbytes
        return seconds

    def _give_up(self, v: int, gains: list[tuple[float, Move]], budget: int) -> None:
        """Make ``v`` again and as many of the moves as fit, if that saves time.

        No further than the others in the room that is left may make up for what ``v`` takes.
        """
        schedule = self.schedule
        mark, before = schedule.mark(), schedule.seconds
        schedule.remake(v)
        for n, (_, move) in enumerate(gains):
            tried, seconds = schedule.mark(), schedule.seconds
            if _MORE * self._most(gains[n:], budget - schedule.peak) <= seconds - before:
                break
            if self.exhausted or not self.make(move):
                continue
            schedule.work += 1
            if schedule.peak > budget or schedule.seconds >= seconds - _EPSILON:
                schedule.undo(tried)
        if schedule.peak > budget or schedule.seconds >= before - _EPSILON:
            schedule.undo(mark)

    def exchange(self, budget: int) -> None:
        """Change two values at once, as long as that saves time."""
        schedule = self.schedule
        while True:
            seconds = schedule.seconds - _EPSILON

            def better(seconds: float = seconds) -> bool:
                return schedule.seconds < seconds and schedule.peak <= budget

            if not self._change_two(better):
                return
            self.improve(budget)

    def _change_two(self, better: Callable[[], bool]) -> bool:
        """Make the first two changes after which it is ``better``; False if there are none."""
        schedule = self.schedule
        for n, v in enumerate(self.free):
            before = schedule.mark()
            self.make(self._opposite(v))
            changed = schedule.mark()
            for w in self.free[n + 1 :]:
                if self.exhausted:
                    schedule.undo(before)
                    return False
                self.make(self._opposite(w))
                schedule.work += 1
                if better():
                    return True
                schedule.undo(changed)
            schedule.undo(before)
        return False

    def _opposite(self, v: int) -> Move:
        """Keep what is made again, make again what is kept."""
        return ("remake" if v in self.schedule.kept else "keep", v, -1)

    # -- Moves ---------------------------------------------------------------------------------------

    def make(self, move: Move) -> bool:
        """Make a move; False if there is nothing to do."""
        kind, v, j = move
        schedule = self.schedule
        if kind == "keep":
            if v in schedule.kept or not self._is_quiet(v):
                return False
            schedule.keep(v)
        elif kind in ("remake", "forget"):
            if v not in schedule.kept:
                return False
            (schedule.remake if kind == "remake" else schedule.forget)(v)
        elif kind == "clear":
            mark = schedule.mark()
            # Again and again: what makes them again would stay in their place.
            while passing := list(schedule.passing(j, self.copies)):
                for w, last in passing:
                    schedule.drop(w, last)
            return schedule.mark() != mark
        elif kind in ("encode", "decode"):
            return self._exchange_code(v, j, encode=kind == "encode")
        elif (j in schedule.dropped.get(v, ())) == (kind == "drop"):
            return False
        elif kind == "drop":
            schedule.drop(v, j)
        else:
            schedule.retain(v, j)
        return True

    def _exchange_code(self, v: int, code: int, encode: bool) -> bool:
        schedule = self.schedule
        if (code in schedule.kept) == encode:
            return False
        if v not in self._movable and (encode or v not in schedule.kept):
            return False
        if encode:
            if not self._is_quiet(code):
                return False
            schedule.keep(code)
            if v in schedule.kept:
                schedule.remake(v)
        else:
            if v not in schedule.kept:
                schedule.keep(v)
            schedule.remake(code)
        return True

    def _is_quiet(self, v: int) -> bool:
        """May ``v`` be kept, too, with the noise that is there already?"""
        return self.schedule.noise + self.schedule.flow.values[v].noise <= NOISE_CEILING

    def _take(self, ranking: Ranking, gain: Callable[[Move], float]) -> Move | None:
        """The best move by ``gain``, which is asked while the move is made."""

        def judged(move: Move) -> float:
            mark = self.schedule.mark()
            if self.exhausted or not self.make(move):
                return 0.0
            self.schedule.work += 1
            found = gain(move)
            self.schedule.undo(mark)
            return found

        return ranking.take(judged)


class Ranking:
    """Lazy greedy choice: gains are looked up again only when a stale one leads.

    Gains mostly shrink as more is chosen, so an old gain is mostly an upper bound.
    Source: Minoux 1978, "Accelerated greedy algorithms for maximizing submodular set functions".
    """

    def __init__(self, moves: Iterable[tuple[Move, float]] = ()) -> None:
        self._heap: list[tuple[float, int, Move]] = []  # by gain, then first offered
        self._known: set[Move] = set()
        self._offers = 0
        self.offer(moves)

    def knows(self, move: Move) -> bool:
        """Is it there?"""
        return move in self._known

    def offer(self, moves: Iterable[tuple[Move, float]]) -> None:
        """Add moves that are not there yet, with what each gains at most."""
        for move, most in moves:
            if move not in self._known and most > 0:
                self._known.add(move)
                self._offers += 1
                heapq.heappush(self._heap, (-most, self._offers, move))

    def take(self, gain: Callable[[Move], float]) -> Move | None:
        """Remove and return a move with the largest positive gain, or nearly; None if there is none."""
        fresh: set[int] = set()
        best: tuple[float, int, Move] | None = None
        while self._heap:
            leader = self._heap[0]
            if leader[1] in fresh or (best is not None and best[0] <= leader[0] * _NEARLY):
                break
            again = (-gain(leader[2]), *leader[1:])
            heapq.heapreplace(self._heap, again)
            fresh.add(leader[1])
            best = again if best is None else min(best, again)
        if best is None or best[0] >= 0:
            return None
        self._heap.remove(best)
        heapq.heapify(self._heap)
        self._known.discard(best[2])
        return best[2]


def _unknown(moves: Iterable[Move]) -> Iterator[tuple[Move, float]]:
    """Moves of which nobody knows what they gain."""
    return ((move, math.inf) for move in moves)
