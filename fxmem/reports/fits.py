"""Where a step fits, as a value and as text: on which GPUs as it is, with a plan, or not at all."""

from __future__ import annotations

import textwrap
from dataclasses import asdict, dataclass
from typing import Any

from fxmem.basics.gpus import GPUS, Gpu
from fxmem.basics.tables import clean, table, wrapped
from fxmem.basics.units import format_bytes
from fxmem.graphs.boundary import FARTHEST

DRIVER_SHARE = 8
"""Per cent of a GPU's memory that its driver may take: a sixteenth for error correction, and more."""

CONTEXT = 768 * 2**20
"""Bytes that a process holds on a GPU beside its tensors: kernels, libraries and their workspace.

``benchmarks/context.py`` measures both.
"""


@dataclass(frozen=True)
class Fit:
    """A step on one GPU.

    nbytes: of its memory.  usable: what is left of them for the step.  verdict: "as it is", "with a
    plan" or "no".  peak: bytes of the step as it runs there; where the verdict is "no", the smallest
    peak.  overhead: added time / unchanged time by this GPU's roofline; None where it does not fit.
    largest: the largest batch of the step as it is, by its closed form; None where no size is
    the batch, or where all that anybody would ask for fit.
    """

    gpu: str
    nbytes: int
    usable: int
    verdict: str
    peak: int
    overhead: float | None
    largest: int | None = None


@dataclass(frozen=True)
class Fits:
    """A step on all GPUs of the table, the smallest memory first.

    baseline_peak: bytes of the step as it is.  reserve: bytes beside it.  device: whose operators were
    captured.  symbol: what ``largest`` is of, such as B; empty where no size is the batch, and then
    why_none says why.  rough: the form may be off far from the example.
    """

    model: str
    device: str
    baseline_peak: int
    reserve: int
    rows: tuple[Fit, ...]
    symbol: str = ""
    why_none: str = ""
    rough: bool = False

    def __str__(self) -> str:
        beside = f" beside {format_bytes(self.reserve)} of reserve" if self.reserve else ""
        title = f"{clean(self.model)} peaks at {format_bytes(self.baseline_peak)} as it is{beside}"
        return "\n".join([title, *fit_lines(self)])

    @property
    def anywhere(self) -> bool:
        return any(row.verdict != "no" for row in self.rows)

    def to_dict(self) -> dict[str, Any]:
        """Ready for JSON; bytes are integers."""
        return {**asdict(self), "rows": [asdict(row) for row in self.rows]}


@dataclass(frozen=True)
class Alternative:
    """Another budget for the same step.

    peak: bytes of the plan for it; where it does not fit, of the smallest plan.  overhead: added time
    / unchanged time of that plan.
    """

    budget: int
    peak: int
    overhead: float
    fits: bool


def usable(gpu: Gpu) -> int:
    """Bytes of a GPU that a step may hold at its peak, by the less favourable of what is known."""
    return gpu.nbytes * (100 - DRIVER_SHARE) // 100 - CONTEXT


ROUGH = (
    " What some operators hold follows no polynomial, so far from the example it may be well off."
)
"""Of what closed forms say."""


# -- Text --------------------------------------------------------------------------------------------

_GIB = 2**30
_NAMES = 34


def fit_lines(found: Fits) -> list[str]:
    """The table: a line for GPUs of which all the same is true, be it that nothing fits."""
    groups: dict[tuple[Any, ...], list[Fit]] = {}
    for row in found.rows:
        size = row.nbytes if row.verdict == "with a plan" else 0
        groups.setdefault((row.verdict, size, _time(row), row.largest), []).append(row)
    cells = [line for group in groups.values() for line in _group_cells(group)]
    headers = ("GPU", "GiB", "usable", "fits", "peak", "time", f"largest {found.symbol}")
    columns = len(headers) if found.symbol else len(headers) - 1
    return [
        *table(headers[:columns], [line[:columns] for line in cells], "lrrlrrr"[:columns]),
        *wrapped(
            f"usable: {DRIVER_SHARE} % for the driver and {format_bytes(CONTEXT)} for the process "
            "are taken off. time: added to the step by that GPU's roofline. Operators are those of "
            f"{found.device}. Where nothing fits, peak is the smallest that any plan reached."
            + _largest_note(found)
        ),
    ]


def _largest_note(found: Fits) -> str:
    if not found.symbol:
        return f" No largest batch: {found.why_none}." if found.why_none else ""
    rough = ROUGH if found.rough else ""
    return (
        f" largest {found.symbol}: that fits without a plan, by the closed form; fxmem.max_batch settles "
        f"the boundary, and with a plan more may fit.{rough}"
    )


def _group_cells(group: list[Fit]) -> list[tuple[str, ...]]:
    """A line of cells, and one for each line that the names go on to."""
    first, last = group[0], group[-1]
    names = textwrap.wrap(", ".join(row.gpu for row in group), _NAMES)
    figures = (
        _span(f"{first.nbytes // _GIB}", f"{last.nbytes // _GIB}"),
        _span(f"{first.usable / _GIB:.1f}", f"{last.usable / _GIB:.1f}"),
        first.verdict,
        format_bytes(first.peak),
        _time(first),
        f"> {FARTHEST:,}" if first.largest is None else f"{first.largest:,}",
    )
    return [(names[0], *figures), *((name, *[""] * len(figures)) for name in names[1:])]


def _span(low: str, high: str) -> str:
    return low if low == high else f"{low} to {high}"


def _time(row: Fit) -> str:
    return "" if row.overhead is None else f"{100 * row.overhead:+.1f} %" if row.overhead else "0"


def gpu_lines(gpus: tuple[Gpu, ...] = GPUS) -> list[str]:
    """The table of GPUs itself."""
    cells = [
        (
            gpu.name,
            str(gpu.gib),
            f"{usable(gpu) / _GIB:.2f}",
            f"{gpu.bandwidth / 1e9:,.0f}",
            f"{gpu.fp32 / 1e12:g}",
            f"{gpu.half / 1e12:g}",
            gpu.source,
        )
        for gpu in gpus
    ]
    headers = ("GPU", "GiB", "usable", "GB/s", "f32", "16 bits", "source")
    return [
        *table(headers, cells, "lrrrrrl"),
        *wrapped(
            f"usable: GiB for a step, after {DRIVER_SHARE} % for the driver and "
            f"{format_bytes(CONTEXT)} for the process. f32, 16 bits: 10^12 operations per second, "
            "dense, by the maker's figures."
        ),
    ]


def gpu_rows(gpus: tuple[Gpu, ...] = GPUS) -> list[dict[str, Any]]:
    """The table for JSON, in bytes, bytes per second and operations per second."""
    return [
        {
            "name": gpu.name,
            "nbytes": gpu.nbytes,
            "usable": usable(gpu),
            "bandwidth": gpu.bandwidth,
            "fp32": gpu.fp32,
            "tf32": gpu.tf32,
            "half": gpu.half,
            "source": gpu.source,
        }
        for gpu in gpus
    ]
