"""The planner's problem as a linear program: how much of each value to keep, and what memory is worth.

For each forward value v that the backward may need, ``kept[v]`` and ``needed[v]``, and for each
forward operator o, ``again[o]``, all between 0 and 1:

    minimise    sum of seconds[o] * again[o]
    where       again[o] >= needed[v] - kept[v]     for what o makes
                needed[v] >= again[o]               for what o reads
                needed[v] = 1                       for what a backward operator reads
                bytes at every step <= budget

Bytes at a step: what no choice changes, what is kept over it, and what is made again and still
read.  Rows for bytes are added where a solution breaks them.  Without the rows it is a minimum
cut; its shares are nearly all 0 or 1.  Solved by HiGHS.
"""

from __future__ import annotations

from dataclasses import dataclass

import highspy
import numpy as np

from fxmem.simulate import Simulator

_ROUNDS = 40
_ROWS_A_ROUND = 12
_TOLERANCE = 1e-3
"""Of the budget: how far above it a solution may be."""


@dataclass(frozen=True)
class Relaxed:
    """kept: share of each value.  seconds: of recomputation.  overflow: bytes by which it misses."""

    kept: dict[int, float]
    seconds: float
    overflow: float


Extra = tuple[np.ndarray, np.ndarray]
"""Bytes by forward step, and by slot."""


class Relaxation:
    """The linear program of one dataflow; budgets may be tried one after another."""

    def __init__(
        self, simulator: Simulator, must_keep: frozenset[int], must_remake: frozenset[int]
    ) -> None:
        self.simulator = simulator
        self.flow = simulator.flow
        self.values = sorted(simulator.readable)
        self.column = {v: n for n, v in enumerate(self.values)}
        self.direct = simulator.directly_read()
        self._zones()
        self.solver = highspy.Highs()
        self.solver.setOptionValue("output_flag", False)
        self.solver.setOptionValue("threads", 1)
        self._columns(must_keep, must_remake)
        self._dependencies()
        self._base()
        self.rows: list[tuple[str, int]] = []

    # -- Columns: needed[v], kept[v], again[o], and one for missing the budget ----------------------------

    def _columns(self, must_keep: frozenset[int], must_remake: frozenset[int]) -> None:
        size = len(self.values)
        always = self.simulator.always_kept | must_keep
        operators = sorted({self.flow.values[v].producer for v in self.values})
        self.again = {i: 2 * size + n for n, i in enumerate(operators)}
        self.missing = 2 * size + len(operators)
        cost = np.zeros(self.missing + 1)
        lower, upper = np.zeros(self.missing + 1), np.ones(self.missing + 1)
        for n, v in enumerate(self.values):
            lower[n] = v in self.direct
            if v in always:
                lower[size + n] = 1
            elif v in must_remake:
                upper[size + n] = 0
        for i, n in self.again.items():
            cost[n] = self.flow.operators[i].seconds
        self.scale = 1.0 / max(cost.sum(), 1e-12)
        cost *= 100 * self.scale
        cost[self.missing] = 1e3
        upper[self.missing] = highspy.kHighsInf
        none = np.zeros(0)
        self.solver.addCols(
            len(cost),
            cost,
            lower,
            upper,
            0,
            np.zeros(len(cost), np.int32),
            none.astype(np.int32),
            none,
        )

    def _dependencies(self) -> None:
        size = len(self.values)
        rows: list[tuple[int, ...]] = []
        signs: list[tuple[float, ...]] = []
        for n, v in enumerate(self.values):
            i = self.flow.values[v].producer
            rows.append((self.again[i], size + n, n))
            signs.append((1.0, 1.0, -1.0))
        for i, a in self.again.items():
            for v in self.flow.operators[i].reads:
                if v in self.column and v not in self.direct:
                    rows.append((self.column[v], a))
                    signs.append((1.0, -1.0))
        self._add_rows([0.0] * len(rows), [highspy.kHighsInf] * len(rows), rows, signs)

    def _add_rows(
        self,
        lower: list[float],
        upper: list[float],
        columns: list[tuple[int, ...]],
        numbers: list[tuple[float, ...]],
    ) -> None:
        starts = np.cumsum([0, *map(len, columns)])[:-1].astype(np.int32)
        flat = np.array([c for row in columns for c in row], dtype=np.int32)
        values = np.array([x for row in numbers for x in row], dtype=np.float64)
        self.solver.addRows(
            len(lower), np.array(lower), np.array(upper), len(flat), starts, flat, values
        )

    # -- Bytes ---------------------------------------------------------------------------------------------

    def _zones(self) -> None:
        """When each value is read, if it is made again just in time: first and last slot."""
        flow = self.flow
        first: dict[int, int] = {}
        last: dict[int, int] = {}
        for j, reads in enumerate(self.simulator.read_by_backward):
            for v in reads:
                first.setdefault(v, j)
                last[v] = j
        for i in reversed(range(flow.num_forward)):
            op = flow.operators[i]
            starts = [first[w] for w in op.makes if w in first]
            if not starts:
                continue
            for v in op.reads:
                if v in self.column and v not in self.direct:
                    first[v] = min(first.get(v, starts[0]), *starts)
                    last[v] = max(last.get(v, 0), *starts)
        self.first = np.array([first[v] for v in self.values], dtype=np.int64)
        self.last = np.array([last[v] for v in self.values], dtype=np.int64)

    def _base(self) -> None:
        simulator, numbers = self.simulator, self.simulator.numbers
        forward = simulator.forward_with(frozenset())
        self.forward_base = simulator.forward_bytes(forward)
        self.saved_from = np.array(
            [forward.last.get(v, forward.steps - 1) + 1 for v in self.values], dtype=np.int64
        )
        self.slot_base = np.maximum(numbers.static_at, numbers.static_before)
        self.unit = float(max(self.forward_base.max(), self.slot_base.max(initial=0), 1))
        self.nbytes = np.array([self.flow.values[v].nbytes for v in self.values], dtype=np.float64)
        self.saved = np.array([numbers.saved_nbytes[v] for v in self.values], dtype=np.float64)

    def _bytes(self, needed: np.ndarray, kept: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Bytes at each forward step and in each slot."""
        saved = kept * self.saved
        forward = np.zeros(len(self.forward_base) + 1)
        np.add.at(forward, self.saved_from, saved)
        slots = np.zeros(len(self.slot_base) + 1)
        slots[0] = saved.sum()
        np.subtract.at(slots, self.first, saved)
        here = needed * self.nbytes
        np.add.at(slots, self.first, here)
        np.subtract.at(slots, self.last + 1, here)
        return (
            self.forward_base + np.cumsum(forward)[:-1],
            self.slot_base + np.cumsum(slots)[:-1],
        )

    def _row(self, phase: str, at: int) -> tuple[tuple[int, ...], tuple[float, ...]]:
        size = len(self.values)
        if phase == "forward":
            here = np.flatnonzero((self.saved_from <= at) & (self.saved > 0))
            columns, numbers = size + here, self.saved[here]
        else:
            kept = np.flatnonzero((self.first > at) & (self.saved > 0))
            alive = np.flatnonzero((self.first <= at) & (at <= self.last) & (self.nbytes > 0))
            columns = np.concatenate([size + kept, alive])
            numbers = np.concatenate([self.saved[kept], self.nbytes[alive]])
        columns = np.append(columns, self.missing)
        numbers = np.append(numbers / self.unit, -1.0)
        return tuple(columns.tolist()), tuple(numbers.tolist())

    # -- Solving -------------------------------------------------------------------------------------------

    def solve(self, budget: int, extra: Extra | None = None) -> Relaxed:
        """The best shares at ``budget`` bytes, when steps take ``extra`` bytes more than modelled."""
        self.more = extra or (np.zeros(len(self.forward_base)), np.zeros(len(self.slot_base)))
        known = self.solver.getNumRow() - len(self.rows)
        if self.rows:  # rows of an earlier budget, with this one's right-hand side
            for n, (phase, at) in enumerate(self.rows):
                self.solver.changeRowBounds(
                    known + n, -highspy.kHighsInf, self._room(budget, phase, at)
                )
        size = len(self.values)
        for _ in range(_ROUNDS):
            self.solver.run()
            solution = np.array(self.solver.getSolution().col_value)
            forward, slots = self._bytes(solution[:size], solution[size : 2 * size])
            forward, slots = forward + self.more[0], slots + self.more[1]
            excess = budget * (1 + _TOLERANCE) + self.unit * solution[self.missing]
            broken = [("forward", at) for at in _worst(forward, excess)]
            broken += [("slot", at) for at in _worst(slots, excess)]
            broken = [row for row in broken if row not in self.rows]
            if not broken:
                break
            rows = [self._row(*row) for row in broken]
            self._add_rows(
                [-highspy.kHighsInf] * len(rows),
                [self._room(budget, *row) for row in broken],
                [columns for columns, _ in rows],
                [numbers for _, numbers in rows],
            )
            self.rows += broken
        return Relaxed(
            dict(zip(self.values, solution[size : 2 * size].tolist(), strict=True)),
            float(sum(solution[n] * self.flow.operators[i].seconds for i, n in self.again.items())),
            float(solution[self.missing]) * self.unit,
        )

    def _room(self, budget: int, phase: str, at: int) -> float:
        which = 0 if phase == "forward" else 1
        base = (self.forward_base, self.slot_base)[which][at] + self.more[which][at]
        return (budget - float(base)) / self.unit

    def modelled(self, kept: set[int], needed: set[int]) -> Extra:
        """Bytes at each forward step and in each slot, as modelled, for a whole choice."""
        return self._bytes(
            np.array([float(v in needed) for v in self.values]),
            np.array([float(v in kept) for v in self.values]),
        )


def _worst(live: np.ndarray, limit: float) -> list[int]:
    """The fullest step of each run of steps above the limit, the worst runs first."""
    above = np.flatnonzero(live > limit)
    if not len(above):
        return []
    runs = np.split(above, np.flatnonzero(np.diff(above) > 1) + 1)
    peaks = [int(run[np.argmax(live[run])]) for run in runs]
    return sorted(sorted(peaks, key=lambda at: -live[at])[:_ROWS_A_ROUND])
