"""One step in program order as text: the bytes that are live before and after, and the budget."""

from __future__ import annotations

import itertools

import numpy as np

from fxmem.basics.tables import BYTES, WIDTH
from fxmem.graphs.lifetimes import BeforeAfter, Memory

_ROWS = 12
_STEPS = (1, 2, 2.5, 5, 10)


def step_chart(memory: BeforeAfter, budget: int | None) -> list[str]:
    """The title and the chart, at most ``WIDTH`` columns.

    A cell is filled where the bytes reach the figure at the left of its row.  The budget is drawn at the
    first figure that is not below it.
    """
    highest = max(int(memory.before.live.max(initial=0)), int(memory.after.live.max(initial=0)))
    if not highest:
        return []
    ticks, labels, unit = _ticks(max(highest, budget or 0))
    margin = max(map(len, labels))
    wide = WIDTH - margin - 5
    forward = _forward_columns(memory.before, wide)
    before = _columns(memory.before, forward, wide)
    after = _columns(memory.after, forward, wide)
    line = next((tick for tick in ticks if budget is not None and tick >= budget), None)
    rows = [
        f"{label:>{margin}} |{_row(before, after, tick, tick == line)}|"
        for tick, label in reversed(list(zip(ticks, labels, strict=True)))
    ]
    axis = f"{'forward':<{forward}}{'backward'}" if forward >= 8 else "forward, backward"
    legend = ": before   # after" + ("   - budget" if line is not None else "")
    return [f"One step in program order ({unit})   {legend}", *rows, f"{'':>{margin}}  {axis}"]


def _row(before: np.ndarray, after: np.ndarray, tick: float, is_budget: bool) -> str:
    empty = "-" if is_budget else " "
    return "".join(
        "#" if b >= tick else ":" if a >= tick else empty
        for a, b in zip(before, after, strict=True)
    )


def _ticks(highest: int) -> tuple[list[float], list[str], str]:
    """Round figures up to the first that ``highest`` does not exceed, in one unit."""
    unit, size = next((u for u in reversed(BYTES) if highest >= 2 * u[1]), BYTES[0])
    power = 10.0 ** np.floor(np.log10(max(highest / size / _ROWS, 1e-9)))
    step = next(power * s for s in _STEPS if power * s * _ROWS >= highest / size)
    count = int(np.ceil(highest / size / step - 1e-9))
    decimals = next(d for d in (0, 1, 2, 3) if d == 3 or abs(round(step, d) - step) < 1e-9)
    figures = [step * (n + 1) for n in range(count)]
    return [f * size for f in figures], [f"{f:,.{decimals}f}" for f in figures], unit


def _forward_columns(memory: Memory, wide: int) -> int:
    """As many as the forward's share of the operators."""
    forward = sum(point.phase != "backward" for point in memory.points)
    return min(max(round(wide * forward / len(memory.points)), 1), wide - 1)


def _columns(memory: Memory, forward: int, wide: int) -> np.ndarray:
    """The most bytes that are live within each column; the two phases have columns of their own."""
    late = sum(point.phase == "backward" for point in memory.points)
    first = len(memory.points) - late
    return np.concatenate(
        [_most(memory.live[:first], forward), _most(memory.live[first:], wide - forward)]
    )


def _most(live: np.ndarray, columns: int) -> np.ndarray:
    if not len(live):
        return np.zeros(columns, dtype=np.int64)
    edges = np.arange(columns + 1) * len(live) // columns
    return np.array([live[a : max(b, a + 1)].max() for a, b in itertools.pairwise(edges)])
