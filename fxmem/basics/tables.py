"""Figures in one unit, tables of at most ``WIDTH`` columns, and text that a terminal can be trusted with.

Names and source lines come from models and from plan files, so they are cleaned of whatever a terminal
would act on.
"""

from __future__ import annotations

import re
import textwrap
import unicodedata
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from decimal import Decimal

from tabulate import tabulate

WIDTH = 100

# -- Figures in one unit ---------------------------------------------------------------------------

ROUNDED = "Figures are rounded; the totals are sums of the exact ones."
SECONDS = (("us", 1e-6), ("ms", 1e-3), ("s", 1.0))
BYTES = (("bytes", 1), ("KiB", 2**10), ("MiB", 2**20), ("GiB", 2**30), ("TiB", 2**40))


@dataclass(frozen=True)
class Scale:
    """A unit and its decimals.  adds_up: printed figures add up to the printed totals."""

    name: str
    size: float
    decimals: int
    adds_up: bool = True

    def text(self, value: float, sign: bool = False) -> str:
        mark = "+" if sign and value > 0 else ""
        if self.size == 1 and isinstance(value, int):
            return f"{mark}{value:,}"
        text = f"{mark}{value / self.size:,.{self.decimals}f}"
        return text if text.strip("+-0.,") else text.strip("+-")  # no "-0.0", no "+0.0"


def scale(units: Sequence[tuple[str, float]], columns: Sequence[Sequence[float]]) -> Scale:
    """The unit that the largest total fills, with the fewest decimals that hide all rounding."""
    largest = max((sum(map(abs, column)) for column in columns), default=0)
    # Whole bytes stay readable a good while; a time has no exact unit.
    start = 10**6 if units is BYTES else 0
    name, size = units[0]
    if largest >= start:
        name, size = next((u for u in reversed(units) if largest >= u[1]), units[0])
    for decimals in (1, 2, 3):
        found = Scale(name, size, decimals)
        if all(_adds_up(column, found.text) for column in columns) and _rows_agree(columns, found):
            return found
    coarse = name in ("GiB", "TiB", "s")
    return Scale(name, size, 2 if coarse else 1, adds_up=False)


def _adds_up(column: Iterable[float], text: Callable[[float], str]) -> bool:
    column = list(column)
    return sum(_number(text(value)) for value in column) == _number(text(sum(column)))


def _rows_agree(columns: Sequence[Sequence[float]], scale: Scale) -> bool:
    """Where the third column is the second less the first, is it so in print too?"""
    if len(columns) != 3:
        return True
    rows = [*zip(*columns, strict=True), tuple(map(sum, columns))]
    texts = [[_number(scale.text(value)) for value in row] for row in rows]
    return all(change == after - before for before, after, change in texts)


def _number(text: str) -> Decimal:
    return Decimal(text.replace(",", ""))


def percent(part: float, whole: float) -> str:
    return f"{100 * part / whole:.1f}" if whole else "-"


# -- Text that a terminal can be trusted with ------------------------------------------------------

_ESCAPES = re.compile(r"\x1b\][^\x07\x1b]*(?:\x07|\x1b\\)?|\x1b\[[0-?]*[ -/]*[@-~]|\x1b.")
_LONGEST = 2_000


def clean(text: str) -> str:
    """``text`` on one line, every character one column wide.

    Control, bidirectional and other invisible characters go; wide and combining ones are escaped,
    because a table cannot know how many columns a terminal gives them.
    """
    if len(text) > _LONGEST:
        text = text[: _LONGEST // 2] + text[-_LONGEST // 2 :]
    return "".join(map(_column, _ESCAPES.sub("", text)))


def _column(char: str) -> str:
    if char.isascii() and char.isprintable():
        return char
    category = unicodedata.category(char)
    if char.isspace():
        return " "
    if category.startswith("C"):
        return ""
    wide = unicodedata.east_asian_width(char) in "WF" or category.startswith("M")
    return f"\\u{ord(char):04x}" if wide else char


def cut(text: str, width: int) -> str:
    """``text``, or its two ends where it is longer than ``width``: the end tells more."""
    if len(text) <= width:
        return text
    head = (width - 3) // 3
    return text[:head] + "..." + text[len(text) - (width - 3 - head) :]


def wrapped(text: str) -> list[str]:
    return textwrap.wrap(clean(text), WIDTH, subsequent_indent="  ")


def unnumbered(name: str) -> str:
    """A dotted name with ``*`` for each number: what equal blocks share.  ``h.0.mlp`` -> ``h.*.mlp``."""
    return ".".join("*" if step.isdecimal() else step for step in name.split("."))


def starred(names: Sequence[str]) -> str:
    """Dotted names as one, ``*`` where they differ: ``h.*.mlp``."""
    steps = zip(*(name.split(".") for name in names), strict=True)
    return ".".join(step[0] if len(set(step)) == 1 else "*" for step in steps)


_SEPARATOR = 2
_SMALLEST = 6


def table(
    headers: Sequence[str],
    rows: Sequence[Sequence[str]],
    align: str,
    needs: Mapping[int, int] | None = None,
) -> list[str]:
    """A table of at most WIDTH columns: text gives way, figures never do.

    needs: column -> characters below which it shrinks only when nothing else can.
    """
    rows = [[clean(cell) for cell in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(headers, *rows, strict=True)]
    elastic = [i for i, side in enumerate(align) if side == "l"]
    needs = needs or {}
    while sum(widths) + _SEPARATOR * (len(widths) - 1) > WIDTH:
        wide = [i for i in elastic if widths[i] > _SMALLEST]
        if not wide:
            break
        widest = max(wide, key=lambda i: widths[i] - needs.get(i, len(headers[i])))
        widths[widest] -= 1
    rules = ["-" * width for width in widths]
    cells = [[cut(c, w) for c, w in zip(row, widths, strict=True)] for row in rows]
    sides = [{"l": "left", "r": "right"}[side] for side in align]
    # Headers and rules go in as rows: tabulate pads its own headers by two columns each.
    lines = [headers, rules, *cells]
    text = tabulate(lines, tablefmt="plain", disable_numparse=True, colalign=sides)
    return [line.rstrip() for line in text.splitlines()]
