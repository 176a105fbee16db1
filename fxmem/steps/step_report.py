"""The report of a step without a budget: its peak, what is live there, its course, its largest tensors."""

from __future__ import annotations

import html
import itertools
from dataclasses import dataclass
from typing import Any

from fxmem.basics.tables import BYTES, ROUNDED, WIDTH, Scale, cut, percent, scale, table, wrapped
from fxmem.basics.units import format_bytes
from fxmem.reports.fits import ROUGH
from fxmem.reports.report import labelled
from fxmem.steps.inventory import Liveness, Row

LARGEST = 15
"""Rows of the table of storages."""

_CHART_WIDTH, _CHART_HEIGHT = 64, 10
_COMMON_GIB = (8, 16, 24, 40, 80)


@dataclass(frozen=True)
class StepReport:
    """What a training step holds, in bytes.

    liveness: of the captured step with everything kept.  unchanged: the peak of the model's own step as
    eager PyTorch runs it, or None where it cannot be run on fake tensors.
    """

    liveness: Liveness
    unchanged: int | None = None

    @property
    def reserve(self) -> int:
        """Bytes outside the step, such as the optimizer's state."""
        return sum(self.liveness.outside.values())

    def __str__(self) -> str:
        sections = (
            _verdict(self),
            _live(self),
            _course(self.liveness),
            _storages(self.liveness),
            _else(self),
        )
        text = "\n\n".join("\n".join(lines) for lines in sections if lines)
        return "\n".join(cut(line.rstrip(), WIDTH) for line in text.split("\n"))

    def to_dict(self) -> dict[str, Any]:
        """``{"unchanged_peak", "reserve", "liveness": Liveness.to_dict()}``, ready for JSON."""
        return {
            "unchanged_peak": self.unchanged,
            "reserve": self.reserve,
            "liveness": self.liveness.to_dict(),
        }

    def _repr_html_(self) -> str:
        return f"<pre>{html.escape(str(self))}</pre>"


def _verdict(report: StepReport) -> list[str]:
    found, peak = report.liveness, report.liveness.peaks[0]
    sizes = " ".join(f"{name}={size}" for name, size in found.hint.items())
    point = peak.point
    unchanged = (
        f"unchanged step {format_bytes(report.unchanged)}" if report.unchanged is not None else ""
    )
    beside = [f"{what} {format_bytes(n)} extra" for what, n in found.outside.items()]
    return [
        *labelled("fxmem", [found.model, found.device, sizes, "no budget"]),
        *labelled("PEAK", [format_bytes(peak.nbytes), unchanged, *beside]),
        *labelled(
            "AT",
            [
                point.operator,
                f"step {peak.step} of {len(found.points)}, {point.phase}",
                point.source,
                f"module {point.module}" if point.module else "",
            ],
        ),
    ]


def _live(report: StepReport) -> list[str]:
    found, peak = report.liveness, report.liveness.peaks[0]
    here = {s: found.hint[str(s)] for s in peak.expression.free_symbols}
    rows = [(name, int(e.subs(here)), e) for name, e in peak.categories.items()]
    rows.sort(key=lambda row: -row[1])
    total = sum(nbytes for _, nbytes, _ in rows)
    unit = scale(BYTES, [[nbytes for _, nbytes, _ in rows]])
    cells = [(n, unit.text(b), percent(b, total), str(e)) for n, b, e in rows]
    cells.append(("TOTAL", unit.text(total), percent(total, total), str(peak.expression)))
    for what, nbytes in found.outside.items():
        cells.append((f"{what}, beside", unit.text(nbytes), "", str(nbytes)))
    headers = ("category", unit.name, "%", "closed form (bytes)")
    lines = table(headers, cells, "lrrl", {0: 23, 3: 40})
    notes = [] if unit.adds_up else [ROUNDED]
    return [f"1. Live at the peak ({unit.name})", *lines, *notes, *_other_peaks(found)]


def _other_peaks(found: Liveness) -> list[str]:
    """Where the peak is at other sizes."""
    lines = []
    for peak in found.peaks:
        if len(found.peaks) > 1 and any(peak.rules.values()):
            lines += wrapped(f"{peak.point.operator}, {peak.where()}: {peak.expression}")
    return ["The peak, by the sizes where it is (others as above):", *lines] if lines else []


def _course(found: Liveness) -> list[str]:
    """One step in program order: the most bytes of each stretch of steps."""
    values = [point.nbytes for point in found.points]
    if not values:
        return []
    width = min(_CHART_WIDTH, len(values))
    edges = [len(values) * i // width for i in range(width + 1)]
    stretches = [max(values[a:b]) for a, b in itertools.pairwise(edges)]
    top = max(values)
    unit = scale(BYTES, [[top]])
    lines = []
    for level in range(_CHART_HEIGHT, 0, -1):
        limit = top * level / _CHART_HEIGHT
        marks = "".join("#" if v >= limit - top / (2 * _CHART_HEIGHT) else " " for v in stretches)
        lines.append(f"{unit.text(round(limit)):>12} |{marks:<{width}}|")
    boundary = next((i for i, p in enumerate(found.points) if p.phase == "boundary"), len(values))
    turn = width * boundary // len(values)
    bands = f"{'forward':<{max(turn, 8)}}backward"
    return [
        f"2. One step in program order ({unit.name}; {len(values)} steps)",
        *lines,
        f"{'':>12}  {bands}",
    ]


def _storages(found: Liveness) -> list[str]:
    rows = found.rows("bytes", at_peak=True, fold=True)
    if not rows:
        return []
    unit = scale(BYTES, [[row.total for row in rows]])
    cells = [_storage_cells(row, unit) for row in rows[:LARGEST]]
    if rest := rows[LARGEST:]:
        total, n = sum(r.total for r in rest), sum(r.n for r in rest)
        cells.append((f"{len(rest)} more", "", "", str(n), unit.text(total), "", "", ""))
    total = sum(row.total for row in rows)
    cells.append(("TOTAL", "", "", str(sum(r.n for r in rows)), unit.text(total), "", "", ""))
    headers = ("where", "type", "bytes of each", "n", unit.name, "category", "life", "source")
    lines = table(headers, cells, "lllrrlrl", {0: 24, 1: 12, 2: 10, 5: 6, 7: 10})
    title = f"3. Storages that are live at the peak ({unit.name} over all n of equal blocks)"
    return [title, *lines]


def _storage_cells(row: Row, unit: Scale) -> tuple[str, ...]:
    where = row.node if row.born < 0 else f"{row.module} {row.operator}".strip()
    return (
        where,
        f"{row.dtype}[{','.join(row.shape)}]",
        str(row.bytes),
        str(row.n),
        unit.text(row.total),
        row.category,
        f"{row.born}..{row.dies}",
        row.source.split(" in ")[0],
    )


def _else(report: StepReport) -> list[str]:
    found = report.liveness
    lines = [line for note in found.notes for line in wrapped(f"Note: {note}.")]
    lines += _fitting(report)
    return ["4. What fits", *lines] if lines else []


def _fitting(report: StepReport) -> list[str]:
    """By the closed form alone: the largest first symbol in common amounts of memory."""
    found = report.liveness
    name = next(iter(found.symbols), None)
    if name is None:
        return []
    others = ", ".join(f"{n}={size}" for n, size in found.hint.items() if n != name)
    fits: list[str] = []
    for gib in _COMMON_GIB:
        limit = gib * 2**30 - report.reserve
        most = found.largest(name, limit, peak=report.unchanged)
        if most is None:
            break
        fits.append(f"{gib} GiB: {name} <= {most}" if most else f"{gib} GiB: not even {name}=1")
    if not fits:
        return []
    at = f" at {others}" if others else ""
    step = "unchanged step" if report.unchanged is not None else "captured step"
    return wrapped(
        f"By the closed form, of the {step}{at}: {'; '.join(fits)}. fxmem.max_batch settles the "
        f"boundary.{ROUGH if found.rough else ''}"
    )
