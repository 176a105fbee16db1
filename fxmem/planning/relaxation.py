"""The planner's problem as a linear program: what to keep, what to make again and when.

The backward is cut at a few of its operators into segments:

    kept[v]        v is saved in the forward; takes time if it is a code
    made[s, o]     forward operator o runs again in segment s
    there[c, v]    v is in memory while the operator of cut c runs

    minimise  sum of seconds[o] * made[s, o] and of keeping[v] * kept[v]
    where     for o that makes v, and c, c' the cuts before and after segment s,
              made[s, r] <= there[c, v] + made[s, o]     for what reads v,
              1 <= there[c, v] + made[s, o]              if a backward operator of s reads v,
              there[c', v] <= there[c, v] + made[s, o],
              kept[v] <= there[c, v]                     if a backward operator reads v after c,
              there[c, v] <= kept[v]                     if v is a lossy code;
              bytes that are there at each cut, and kept at each forward step, <= budget,
              noise of lossy codes that are kept <= the ceiling

Each plan that runs the forward once and the backward in this order, and holds what it saved until
its last reader, satisfies that, whatever it makes again and whenever: the optimum is a lower bound
on the time that a plan adds, and no solution means that there is no plan.  Cuts are made where a
solution breaks the budget.  What holds for a segment holds for several in a row; that is added where
a solution breaks it, too.  The solution says what to start a search from.

Source: Checkmate (Jain et al. 2020, arXiv:1910.02653), with segments in place of its stages, one
for each operator.  Solved by HiGHS.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property

import highspy
import numpy as np

from fxmem.analysis.dataflow import NOISE_CEILING
from fxmem.analysis.simulate import Simulator

CUTS = 4
"""At most, before ``tighten`` asks for more: they make the bound better, and the program larger.

Few are enough for a bound that is nearly as good; where rounding does not fit, more come where it breaks.
"""

_CUTS_A_ROUND = 3
_ROWS_A_ROUND = 8
_STRETCHES_A_ROUND = 2
_ROUNDS = 30
_TOLERANCE = 1e-3
"""Of the budget: how far above it a solution may be."""

_COLUMNS = 9_000
"""No second cut in programs that are larger: solving them takes long and they hardly change."""

_SMALL = 300
"""Columns up to which a program is solved in whole numbers with nothing fixed."""

_MIDDLE = 6_000
"""And columns up to which it is solved in whole numbers at all."""

_NODES = 20
_WHOLE_GAP = 0.1
"""Where a solution of whole numbers is good enough: percent of the unchanged step's time."""

_EPSILON = 1e-6
_PENALTY = 1e4
"""Price of missing the budget by all of it, in times of the unchanged step.

Where bytes are so dear that missing is cheaper, a plan that is there would be denied.
"""

NOWHERE = -1
"""In place of a column: the number is zero."""


@dataclass(frozen=True)
class Relaxed:
    """kept: share of each value.  there: (slot, share of each value while its operator runs)."""

    kept: dict[int, float]
    there: tuple[tuple[int, dict[int, float]], ...]


class Relaxation:
    """One dataflow as arrays, over the values that the backward may need and what makes them."""

    def __init__(
        self, simulator: Simulator, must_keep: frozenset[int], must_remake: frozenset[int]
    ) -> None:
        flow, numbers = simulator.flow, simulator.numbers
        self.seconds_unchanged = flow.seconds
        self.values = sorted(simulator.readable)
        self.slots = len(numbers.reads)
        at = {v: n for n, v in enumerate(self.values)}
        fixed = simulator.always_kept
        operators = sorted({flow.values[v].producer for v in self.values if v not in fixed})
        number = {i: k for k, i in enumerate(operators)}
        self.seconds = np.array([flow.operators[i].seconds for i in operators])
        self.maker = np.array(
            [NOWHERE if v in fixed else number[flow.values[v].producer] for v in self.values],
            dtype=np.int64,
        )
        self.reads = [[at[v] for v in flow.operators[i].reads if v in at] for i in operators]
        self.makes: list[list[int]] = [[] for _ in operators]
        for n, k in enumerate(self.maker):
            if k != NOWHERE:
                self.makes[k].append(n)
        self.read_at: list[list[int]] = [[] for _ in self.values]
        for j, slot in enumerate(numbers.reads):
            for v in slot:
                if v in at:
                    self.read_at[at[v]].append(j)
        self.last_read = np.array(
            [slots[-1] if slots else -1 for slots in self.read_at], dtype=np.int64
        )
        self.nbytes = np.array([numbers.saved_nbytes[v] for v in self.values], dtype=np.float64)
        self.keeping = np.array([flow.values[v].keeping for v in self.values])
        self.noise = np.array([flow.values[v].noise / NOISE_CEILING for v in self.values])
        always = (fixed | must_keep) & simulator.directly_read()  # what nobody reads is not saved
        self.least_kept = np.array([float(v in always) for v in self.values])
        self.most_kept = np.array([float(v not in must_remake) for v in self.values])
        forward = simulator.forward_with(frozenset())
        self.forward_base = simulator.forward_bytes(forward).astype(np.float64)
        self.saved_from = np.array([forward.saved_from(v) for v in self.values], dtype=np.int64)
        self.slot_base = simulator.static_least.astype(np.float64)
        self.least_possible = simulator.least.nbytes

    @cached_property
    def edges(self) -> tuple[np.ndarray, np.ndarray]:
        """(value, operator that reads it)."""
        pairs = [(n, k) for k, reads in enumerate(self.reads) for n in reads]
        found = np.array(pairs, dtype=np.int64).reshape(-1, 2)
        return found[:, 0], found[:, 1]

    @cached_property
    def direct(self) -> tuple[np.ndarray, np.ndarray]:
        """(value, slot that reads it)."""
        pairs = [(n, j) for n, slots in enumerate(self.read_at) for j in slots]
        found = np.array(pairs, dtype=np.int64).reshape(-1, 2)
        return found[:, 0], found[:, 1]

    @cached_property
    def last_use(self) -> tuple[np.ndarray, np.ndarray]:
        """The last slot that may need each value, and each operator: -1 for none."""
        value = self.last_read.copy()
        operator = np.full(len(self.reads), -1, dtype=np.int64)
        for k in reversed(range(len(self.reads))):
            operator[k] = max(value[n] for n in self.makes[k])
            for n in self.reads[k]:
                value[n] = max(value[n], operator[k])
        return value, operator

    def read_between(self, first: int, last: int) -> np.ndarray:
        """Values that a slot from ``first`` to ``last`` reads."""
        values, slots = self.direct
        return np.unique(values[(first <= slots) & (slots <= last)])

    def program(self, budget: int, cuts: int = CUTS) -> Program:
        """The linear program at a budget of so many bytes, with so many cuts at most."""
        return Program(self, budget, cuts)


@dataclass(frozen=True)
class Bound:
    """Every plan adds at least so many seconds; slope: what a byte more adds: negative or none."""

    budget: int
    seconds: float
    slope: float

    def at(self, budget: int) -> float:
        """Seconds that every plan adds at another budget: the least is convex in the budget."""
        return max(0.0, self.seconds + self.slope * (budget - self.budget))


@dataclass(frozen=True)
class _Stretch:
    """Slots in a row, and the columns of what is there before and after, and of what they make."""

    first: int
    last: int
    before: np.ndarray
    after: np.ndarray
    made: np.ndarray


class Program:
    """The linear program at one budget: grows where its solution breaks what it does not say yet.

    bound: seconds that every plan at the budget adds, and at others.  feasible: False if there is
    no plan.  Both speak of the budget as it was asked for; ``tighten`` makes the program stricter,
    to start from it.
    """

    def __init__(self, problem: Relaxation, budget: int, cuts: int) -> None:
        self.problem, self.budget = problem, float(max(budget, 1))
        self.forward_room = self.budget - problem.forward_base
        self.slot_room = self.budget - problem.slot_base
        self.price = 100.0 / max(problem.seconds_unchanged, 1e-12)
        self.solver = highspy.Highs()
        self.solver.setOptionValue("output_flag", False)
        self.solver.setOptionValue("threads", 1)
        self.solver.setOptionValue("mip_max_nodes", _NODES)
        self.solver.setOptionValue("mip_abs_gap", _WHOLE_GAP)
        self.solver.setOptionValue("mip_rel_gap", 0.0)
        self.columns = 0
        self.most_cuts = cuts
        self.cuts: dict[int, int] = {}  # slot -> its row of bytes
        self.byte_rows: list[int] = []
        everything = np.ones(len(problem.values), dtype=bool)
        cost = problem.keeping * self.price
        self.kept = self._add_columns(everything, problem.least_kept, problem.most_kept, cost)
        self._limit_noise()
        one = np.ones(1, dtype=bool)
        self.missing = int(
            self._add_columns(one, upper=np.full(1, highspy.kHighsInf), cost=100 * _PENALTY)[0]
        )
        nothing = np.full(len(problem.values), NOWHERE)
        self.segments = [self._segment(0, problem.slots - 1, self.kept, nothing)]
        self.full_forward: set[int] = set()
        self.stretches: set[tuple[int, int]] = set()
        self.solution = np.zeros(0)
        self.objective = 0.0
        self._solve()
        self.bound = self._bound()
        self.feasible = self._fits()

    # -- Growing ---------------------------------------------------------------------------------------

    def _add_columns(
        self,
        which: np.ndarray,
        lower: np.ndarray | float = 0.0,
        upper: np.ndarray | float = 1.0,
        cost: np.ndarray | float = 0.0,
    ) -> np.ndarray:
        """A column for each place that is asked for; the others get ``NOWHERE``."""
        size = int(which.sum())
        none = np.zeros(0)
        self.solver.addCols(
            size,
            np.broadcast_to(cost, which.shape)[which].astype(np.float64),
            np.broadcast_to(lower, which.shape)[which].astype(np.float64),
            np.broadcast_to(upper, which.shape)[which].astype(np.float64),
            0,
            np.zeros(size, np.int32),
            none.astype(np.int32),
            none,
        )
        found = np.full(len(which), NOWHERE)
        found[which] = np.arange(self.columns, self.columns + size)
        self.columns += size
        return found

    def _add_rows(
        self, columns: list[np.ndarray], signs: list[float], lower: float, upper: float
    ) -> None:
        """Rows of few terms: one array of columns for each term, ``NOWHERE`` for none."""
        table = np.stack(columns, axis=1)
        there = table != NOWHERE
        counts = there.sum(axis=1)
        size = len(table)
        if size:
            self.solver.addRows(
                size,
                np.full(size, lower),
                np.full(size, upper),
                int(counts.sum()),
                (np.cumsum(counts) - counts).astype(np.int32),
                table[there].astype(np.int32),
                np.broadcast_to(np.array(signs), table.shape)[there],
            )

    def _add_bytes(self, columns: np.ndarray, nbytes: np.ndarray, room: float) -> None:
        self.byte_rows.append(self.solver.getNumRow())
        some = (columns != NOWHERE) & (nbytes > 0)
        indices = np.append(columns[some], self.missing).astype(np.int32)
        numbers = np.append(nbytes[some] / self.budget, -1.0)
        room /= self.budget
        self.solver.addRow(-highspy.kHighsInf, room, len(indices), indices, numbers)

    def _limit_noise(self) -> None:
        noisy = np.flatnonzero(self.problem.noise)
        if len(noisy):
            columns, shares = self.kept[noisy].astype(np.int32), self.problem.noise[noisy]
            self.solver.addRow(-highspy.kHighsInf, 1.0, len(noisy), columns, shares)

    def _made(self, first: int) -> np.ndarray:
        return self._add_columns(
            self.problem.last_use[1] >= first, cost=self.problem.seconds * self.price
        )

    def _segment(self, first: int, last: int, before: np.ndarray, after: np.ndarray) -> _Stretch:
        stretch = _Stretch(first, last, before, after, self._made(first))
        self._add_stretch(stretch)
        return stretch

    def _add_stretch(self, stretch: _Stretch) -> None:
        """What must be there or made: for the backward, for what is made, for what comes after."""
        problem, before, made = self.problem, stretch.before, stretch.made
        maker = problem.maker
        remade = np.full(len(maker), NOWHERE)
        remade[maker != NOWHERE] = made[maker[maker != NOWHERE]]  # a step may have nothing to make
        infinite = highspy.kHighsInf
        read = problem.read_between(stretch.first, stretch.last)
        self._add_rows([before[read], remade[read]], [1, 1], 1.0, infinite)
        later = np.flatnonzero(stretch.after != NOWHERE)
        self._add_rows(
            [before[later], remade[later], stretch.after[later]], [1, 1, -1], 0.0, infinite
        )
        values, readers = problem.edges
        some = made[readers] != NOWHERE
        values, readers = values[some], readers[some]
        self._add_rows([before[values], remade[values], made[readers]], [1, 1, -1], 0.0, infinite)

    def _cut(self, slot: int) -> None:
        """Part the segment that ``slot`` lies in behind it; what the segment made, its parts make."""
        problem = self.problem
        n = next(n for n, s in enumerate(self.segments) if s.first <= slot <= s.last)
        whole = self.segments[n]
        read = np.zeros(len(problem.values))
        read[problem.read_between(slot, slot)] = 1.0
        read[problem.noise > 0] = 0.0
        there = self._add_columns(problem.last_use[0] >= slot, lower=read)
        self.cuts[slot] = self.solver.getNumRow()
        self._add_bytes(there, problem.nbytes, self.slot_room[slot])
        stay = np.flatnonzero(problem.last_read > slot)
        self._add_rows([there[stay], self.kept[stay]], [1, -1], 0.0, highspy.kHighsInf)
        lossy = np.flatnonzero((self.problem.noise > 0) & (there != NOWHERE))
        self._add_rows([there[lossy], self.kept[lossy]], [1, -1], -highspy.kHighsInf, 0.0)
        parts = [
            self._segment(whole.first, slot, whole.before, there),
            self._segment(slot + 1, whole.last, there, whole.after),
        ]
        self.segments[n : n + 1] = parts
        columns = whole.made[whole.made != NOWHERE].astype(np.int32)
        self.solver.changeColsCost(len(columns), columns, np.zeros(len(columns)))
        self._made_in_parts(whole.made, parts)

    def _made_in_parts(self, made: np.ndarray, parts: list[_Stretch]) -> None:
        some = made != NOWHERE
        columns = [part.made[some] for part in parts]
        self._add_rows([*columns, made[some]], [1.0] * len(parts) + [-1.0], 0.0, highspy.kHighsInf)

    def _join(self, first: int, last: int) -> None:
        """Say for segments ``first`` to ``last``, taken together, what holds for each."""
        parts = self.segments[first : last + 1]
        made = self._add_columns(self.problem.last_use[1] >= parts[0].first)
        stretch = _Stretch(parts[0].first, parts[-1].last, parts[0].before, parts[-1].after, made)
        self.stretches.add((stretch.first, stretch.last))
        self._add_stretch(stretch)
        self._made_in_parts(made, parts)

    # -- Solving -----------------------------------------------------------------------------------------

    def relaxed(self) -> Relaxed:
        """The best shares."""
        there = tuple((s.last, self._shares(s.after)) for s in self.segments[:-1])
        return Relaxed(self._shares(self.kept), there)

    def tighten(self, extra: np.ndarray, cuts: Iterable[int]) -> bool:
        """Let slots take ``extra`` bytes more than they show, and cut there; False: it fits no more."""
        self.slot_room = self.budget - self.problem.slot_base - extra
        for slot, row in self.cuts.items():
            room = float(self.slot_room[slot]) / self.budget
            self.solver.changeRowBounds(row, -highspy.kHighsInf, room)
        for slot in cuts:
            if slot not in self.cuts and self._has_room():
                self._cut(slot)
        self._solve()
        return self._fits()

    def relax(self) -> None:
        """Take all ``extra`` bytes back; the cuts that came with them make the bound better."""
        self.tighten(np.zeros(self.problem.slots), ())
        self.feasible = self._fits()
        bound = self._bound()
        if bound.seconds > self.bound.seconds:
            self.bound = bound

    def _fits(self) -> bool:
        return self.budget >= self.problem.least_possible and bool(
            self.solution[self.missing] <= _EPSILON
        )

    def whole(self) -> Relaxed:
        """The best shares that are 0 or 1, as well as the limits allow; all of them in small programs.

        In larger ones what is 0 or 1 already stays so, and in the largest nothing is done.  Source:
        relaxation enforced neighbourhood search, Berthold 2014, doi:10.1007/s10107-013-0630-8.
        """
        if self.columns > _MIDDLE:
            return self.relaxed()
        solver, solution, basis = self.solver, self.solution, self.solver.getBasis()
        shares = np.concatenate([self.kept, *(s.after for s in self.segments)])
        shares = shares[shares != NOWHERE].astype(np.int32)
        now = solution[shares]
        certain = (now < _EPSILON) | (now > 1 - _EPSILON)
        fixed = shares[certain & (self.columns > _SMALL)]
        lower, upper = self._bounds(fixed)
        solver.changeColsBounds(len(fixed), fixed, *[np.round(solution[fixed])] * 2)
        self._set_kind(shares, highspy.HighsVarType.kInteger)
        solver.run()
        found = np.array(solver.getSolution().col_value)
        if len(found) == self.columns:
            self.solution = np.append(found, 0.0)
        relaxed, self.solution = self.relaxed(), solution
        self._set_kind(shares, highspy.HighsVarType.kContinuous)
        solver.changeColsBounds(len(fixed), fixed, lower, upper)
        solver.setBasis(basis)
        return relaxed

    def _bounds(self, columns: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        model = self.solver.getLp()
        return np.array(model.col_lower_)[columns], np.array(model.col_upper_)[columns]

    def _set_kind(self, columns: np.ndarray, kind: highspy.HighsVarType) -> None:
        self.solver.changeColsIntegrality(len(columns), columns, np.full(len(columns), kind))

    def _solve(self) -> None:
        """Solve and grow until nothing is broken any more."""
        for _ in range(_ROUNDS):
            self.solver.run()
            solution = np.array(self.solver.getSolution().col_value)
            self.solution = np.append(solution, 0.0)  # what NOWHERE reads
            self.objective = float(self.solver.getInfo().objective_function_value)
            if not self._grow():
                break

    def _bound(self) -> Bound:
        seconds = max(0.0, self._seconds() - _EPSILON * self.problem.seconds_unchanged)
        return Bound(int(self.budget), seconds, self._seconds_a_byte())

    def _seconds(self) -> float:
        return self.objective / self.price

    def _seconds_a_byte(self) -> float:
        """What a byte more in every row of bytes adds to the bound: negative, or zero."""
        prices = np.array(self.solver.getSolution().row_dual)
        rows = [row for row in self.byte_rows if row < len(prices)]
        return min(0.0, float(prices[rows].sum())) / self.budget / self.price

    def _shares(self, columns: np.ndarray) -> dict[int, float]:
        return dict(zip(self.problem.values, self.solution[columns].tolist(), strict=True))

    def _grow(self) -> bool:
        """Add what the solution breaks; False if that is nothing."""
        limit = self.budget * (_TOLERANCE + float(self.solution[self.missing]))
        over = self._forward() - limit
        over[list(self.full_forward)] = 0
        forward = worst(over)[:_ROWS_A_ROUND]
        for t in forward:
            self.full_forward.add(t)
            saved = np.where(self.problem.saved_from <= t, self.kept, NOWHERE)
            self._add_bytes(saved, self.problem.nbytes, self.forward_room[t])
        broken = []
        if self.columns < 2 * _COLUMNS:
            broken = list(self._broken_stretches())[:_STRETCHES_A_ROUND]
        for first, last in broken:
            self._join(first, last)
        over = self._slots() - limit
        over[list(self.cuts)] = 0  # as full as they are allowed to be
        cuts = worst(over)
        left = self.most_cuts - len(self.cuts) if self._has_room() else not self.cuts
        cuts = cuts[: max(0, min(_CUTS_A_ROUND, left))]
        for j in cuts:
            self._cut(j)
        return bool(forward or broken or cuts)

    def _has_room(self) -> bool:
        return self.columns < _COLUMNS

    def _forward(self) -> np.ndarray:
        """Bytes above the budget at each forward step."""
        saved = np.zeros(len(self.forward_room) + 1)
        np.add.at(saved, self.problem.saved_from, self.problem.nbytes * self.solution[self.kept])
        return np.cumsum(saved)[:-1] - self.forward_room

    def _slots(self) -> np.ndarray:
        """Bytes above the budget in each slot, if what is made again is made just in time."""
        return np.concatenate([self._live_in(s) for s in self.segments]) - self.slot_room

    def _live_in(self, segment: _Stretch) -> np.ndarray:
        """Bytes in each slot of a segment: from before to the last use, or from the first to the last."""
        nbytes, solution = self.problem.nbytes, self.solution
        before, after = solution[segment.before], solution[segment.after]
        first, last = self._uses(segment)
        size = segment.last - segment.first + 1
        used = last >= 0
        maker = self.problem.maker
        made = np.zeros(len(maker))
        made[maker != NOWHERE] = solution[segment.made[maker[maker != NOWHERE]]]
        made = np.where(used, np.minimum(made, 1.0 - np.minimum(before, 1.0)), 0.0)
        through = np.minimum(before, after)
        live = np.zeros(size + 1)
        live[0] = (before * nbytes).sum()
        np.subtract.at(live, np.where(used, last + 1, 0), (before - through) * nbytes)
        np.add.at(live, np.where(used, first, 0), made * nbytes)
        stays = np.where(used, np.minimum(made, after - through), 0.0)
        np.subtract.at(live, np.where(used, last + 1, 0), (made - stays) * nbytes)
        live[size] = 0
        return np.cumsum(live)[:size]

    def _uses(self, segment: _Stretch) -> tuple[np.ndarray, np.ndarray]:
        """First and last slot of a segment, from its first, that needs each value; -1 for none."""
        problem = self.problem
        values, slots = problem.direct
        here = (segment.first <= slots) & (slots <= segment.last)
        first = np.full(len(problem.values), self.problem.slots)
        last = np.full(len(problem.values), -1)
        np.minimum.at(first, values[here], slots[here] - segment.first)
        np.maximum.at(last, values[here], slots[here] - segment.first)
        for k in np.flatnonzero(self.solution[segment.made] > _EPSILON)[::-1]:
            start = min(first[n] for n in problem.makes[k])
            if start < problem.slots:
                for n in problem.reads[k]:
                    first[n] = min(first[n], start)
                    last[n] = max(last[n], start)
        return first, last

    # -- Segments in a row -------------------------------------------------------------------------------

    def _broken_stretches(self) -> Iterator[tuple[int, int]]:
        """Segments that together make less than they must, the worst first."""
        found: list[tuple[float, int, int]] = []
        size = len(self.segments)
        made = np.array([self.solution[s.made] for s in self.segments])
        for first in range(size):
            for last in range(first + 1, size):
                slots = self.segments[first].first, self.segments[last].last
                if slots not in self.stretches:
                    total = made[first : last + 1].sum(axis=0)
                    broken = self._made_too_little(first, last, total)
                    if broken > 1e-4 * self.problem.seconds_unchanged:
                        found.append((-broken, first, last))
        for _, first, last in sorted(found):
            yield first, last

    def _made_too_little(self, first: int, last: int, total: np.ndarray) -> float:
        """Seconds by which segments ``first`` to ``last`` make less than they must."""
        problem = self.problem
        before = self.solution[self.segments[first].before]
        needed = self.solution[self.segments[last].after]
        read = problem.read_between(self.segments[first].first, self.segments[last].last)
        needed[read] = 1.0
        lacking = needed - before
        queue = _by_operator(problem, np.flatnonzero(lacking > _EPSILON))
        seconds = 0.0
        must = np.zeros(len(problem.reads))
        for k in range(len(problem.reads) - 1, -1, -1):
            if k not in queue:
                continue
            must[k] = max(lacking[n] for n in problem.makes[k])
            if must[k] > total[k]:
                seconds += (must[k] - total[k]) * problem.seconds[k]
            for n in problem.reads[k]:
                if must[k] > needed[n]:
                    needed[n] = must[k]
                    lacking[n] = must[k] - before[n]
                    if lacking[n] > _EPSILON and problem.maker[n] != NOWHERE:
                        queue.add(int(problem.maker[n]))
        return seconds


def _by_operator(problem: Relaxation, values: Iterable[int]) -> set[int]:
    return {int(problem.maker[n]) for n in values if problem.maker[n] != NOWHERE}


def worst(above: np.ndarray) -> list[int]:
    """The fullest step of each run of steps above zero, the worst runs first."""
    over = np.flatnonzero(above > 0)
    if not len(over):
        return []
    runs = np.split(over, np.flatnonzero(np.diff(over) > 1) + 1)
    peaks = [int(run[np.argmax(above[run])]) for run in runs]
    return sorted(peaks, key=lambda at: -above[at])
