"""The chart of one step as a picture, through matplotlib, which is an extra: ``fxmem[plot]``."""

from __future__ import annotations

import os
from typing import Any

import numpy as np

from fxmem.basics.errors import FxmemError
from fxmem.basics.tables import BYTES, clean
from fxmem.graphs.lifetimes import BeforeAfter, Memory

COLOURS = {
    "parameters": "#999999",
    "buffers": "#bbbbbb",
    "inputs": "#dddddd",
    "constants": "#cccccc",
    "outputs": "#f0e442",
    "gradients": "#56b4e9",
    "saved activations": "#0072b2",
    "transients": "#e69f00",
    "workspace": "#cc79a7",
}
"""Okabe and Ito's colours, which people with any colour vision can tell apart; greys for what stays."""

BUDGET_COLOUR = "#d55e00"


def draw(
    path: str | os.PathLike[str], form: str, memory: BeforeAfter, budget: int | None, caption: str
) -> None:
    """Write the chart as "png" or "svg"; the same step gives the same file.

    Raises ``FxmemError`` where matplotlib is missing or the file cannot be written.
    """
    try:
        import matplotlib
        from matplotlib.figure import Figure
    except ImportError as error:
        raise FxmemError(
            f"a picture needs matplotlib ({error})\n"
            "  try: pip install 'fxmem[plot]', or report.html(path), which needs nothing"
        ) from error
    # By itself, an SVG has the time and random names in it.
    with matplotlib.rc_context({"svg.hashsalt": "fxmem", "svg.fonttype": "none"}):
        figure = Figure(figsize=(10, 4.5), layout="constrained")
        _chart(figure.add_subplot(), memory, budget, caption)
        metadata = {"Date": None} if form == "svg" else {"Software": None}
        try:
            figure.savefig(path, format=form, dpi=120, metadata=metadata)
        except OSError as error:
            raise FxmemError(
                f"cannot write the picture to {path}: {error.strerror}\n"
                "  try: a file in a folder that exists and may be written to"
            ) from error


def _chart(axes: Any, memory: BeforeAfter, budget: int | None, caption: str) -> None:
    before, after = memory.before, memory.after
    highest = max(int(before.live.max(initial=0)), int(after.live.max(initial=0)), budget or 0, 1)
    unit, size = next((u for u in reversed(BYTES) if highest >= 2 * u[1]), BYTES[0])
    share = _late(after) / max(1, len(after.points))
    edges = _edges(after, share)
    below = np.zeros(len(after.points))
    for name, layer in after.by_category().items():
        above = below + layer / size
        axes.fill_between(
            edges, _held(below), _held(above), step="post", color=COLOURS[name], label=name, lw=0
        )
        below = above
    outline = _held(before.live / size)
    axes.step(
        _edges(before, share), outline, where="post", color="black", ls="--", lw=1, label="before"
    )
    if budget is not None:
        axes.axhline(budget / size, color=BUDGET_COLOUR, lw=1.5, label="budget")
    axes.set(xlim=(0, 1), ylim=(0, highest / size * 1.05), ylabel=unit, xticks=[0, share])
    axes.set_xticklabels(["forward", "backward"], ha="left")
    # A name with a dollar sign in it is no formula.
    axes.set_title(clean(caption), fontsize=10, loc="left", parse_math=False)
    axes.legend(fontsize=8, ncols=2, framealpha=0.9)


def _late(memory: Memory) -> int:
    """The first step of the backward."""
    return sum(point.phase != "backward" for point in memory.points)


def _edges(memory: Memory, share: float) -> np.ndarray:
    """Where each step begins, from 0 to 1, and where the last ends; the backward begins at ``share``."""
    late, length = _late(memory), len(memory.points)
    first = np.arange(late) / max(1, late) * share
    return np.concatenate([first, np.linspace(share, 1, length - late + 1)])


def _held(values: np.ndarray) -> np.ndarray:
    """The last value once more, for the edge at which it ends."""
    return np.append(values, values[-1:])
