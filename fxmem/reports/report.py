"""The report: does the step fit, what does it cost, what was decided, and where.

No line is longer than ``WIDTH``.
"""

from __future__ import annotations

import html
import math
import os
import textwrap
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from fxmem.analysis.categories import LOSS
from fxmem.basics.errors import FxmemError
from fxmem.basics.tables import (
    BYTES,
    ROUNDED,
    SECONDS,
    WIDTH,
    Scale,
    clean,
    cut,
    percent,
    scale,
    starred,
    table,
    unnumbered,
    wrapped,
)
from fxmem.basics.units import format_bytes
from fxmem.graphs.lifetimes import BeforeAfter
from fxmem.planning.plan import Certificate, Decision, LiveTensor, NoiseOf, PeakPoint, Plan
from fxmem.planning.whole_step import REST
from fxmem.reports.charts import step_chart
from fxmem.reports.fits import Alternative, Fits, fit_lines
from fxmem.reports.page import page, write_page
from fxmem.reports.plots import draw

MAX_ROWS = 20
_INDENT = " " * 7


@dataclass(frozen=True)
class Report:
    """A plan beside what was measured.

    measured_peak: bytes that one step really held, or None.  gradients: the result of comparing
    them, as a phrase such as "bitwise equal to the unchanged step", or None.  memory: of each step,
    where the step itself was at hand.  alternatives: other budgets.  gpus: on which GPUs it runs.
    outside: bytes beside the step that were taken off the budget, such as the optimizer's state.
    noise: parameter -> variance of its gradient that codes were measured to add, or None.
    """

    plan: Plan
    measured_peak: int | None = None
    gradients: str | None = None
    memory: BeforeAfter | None = field(default=None, repr=False)
    alternatives: tuple[Alternative, ...] = ()
    gpus: Fits | None = field(default=None, repr=False)
    outside: Mapping[str, int] = field(default_factory=dict)
    noise: dict[str, float] | None = field(default=None, repr=False)

    @property
    def fits(self) -> bool:
        """Is no known peak, predicted or measured, above the budget?"""
        return max(self.plan.predicted_peak, self.measured_peak or 0) <= self.plan.budget

    def __str__(self) -> str:
        sections = [
            live_lines(self.plan, self.outside),
            step_chart(self.memory, None if self.plan.smallest else self.plan.budget)
            if self.memory
            else [],
            _decisions(self.plan),
            _noise(self),
            _else(self),
        ]
        parts = [_verdict(self)]
        for number, (title, *lines) in enumerate(filter(None, sections), 1):
            parts.append([f"{number}. {title}", *lines])
        text = "\n\n".join("\n".join(lines) for lines in parts)
        return "\n".join(cut(line.rstrip(), WIDTH) for line in text.split("\n"))

    def to_dict(self) -> dict[str, Any]:
        """The plan, the figures beside it and the folded decisions; ready for JSON."""
        return {
            "fits": self.fits,
            "measured_peak": self.measured_peak,
            "gradients": self.gradients,
            "noise": self.noise,
            "live": [asdict(row) for row in live_rows(self.plan)],
            "outside": dict(self.outside),
            "decisions": [asdict(row) for row in folded(self.plan)],
            "alternatives": [asdict(row) for row in self.alternatives],
            "gpus": None if self.gpus is None else self.gpus.to_dict(),
            "plan": self.plan.to_dict(),
        }

    def html(self, path: str | os.PathLike[str], other: Plan | None = None) -> None:
        """Write the page: one file, to be opened in a browser, with no network.

        other: another plan for the same step, to show what changes.  Raises ``FxmemError`` where there
        is no memory to show or the file cannot be written, ``PlanMismatchError`` for another step's plan.
        """
        write_page(path, page(str(self), self.plan, self._memory("a page"), other))

    def png(self, path: str | os.PathLike[str]) -> None:
        """Write the chart of the step.  Raises ``FxmemError`` without matplotlib (``fxmem[plot]``)."""
        self._draw(path, "png")

    def svg(self, path: str | os.PathLike[str]) -> None:
        """``png`` with lines instead of pixels."""
        self._draw(path, "svg")

    def _draw(self, path: str | os.PathLike[str], form: str) -> None:
        budget = None if self.plan.smallest else self.plan.budget
        label, parts = _fit(self)
        caption = "   ".join([self.plan.model, label, *filter(None, parts)])
        draw(path, form, self._memory("a picture"), budget, caption)

    def _memory(self, what: str) -> BeforeAfter:
        if self.memory is None:
            raise FxmemError(
                f"{what} shows the memory of every operator, and a plan alone does not hold it\n"
                "  try: opt.report(), or fxmem.report(model, (x,), budget)"
            )
        return self.memory

    def _repr_html_(self) -> str:
        return f"<pre>{html.escape(str(self))}</pre>"


# -- The lines on top ------------------------------------------------------------------------------


def _verdict(report: Report) -> list[str]:
    plan = report.plan
    return [
        *labelled("fxmem", _header(plan)),
        *labelled(*_fit(report)),
        *labelled("PRICE", [_step_times(plan), _gap(plan)]),
        *labelled("PEAK", _place(plan.peak)),
        *(labelled("NOISE", _noise_parts(plan)) if plan.noise is not None else []),
        *labelled("CHECK", _check(report)),
    ]


def _header(plan: Plan) -> list[str]:
    return [
        plan.model,
        plan.device,
        " ".join(f"{name}={value}" for name, value in plan.symbols.items()),
        f"budget {plan.asked}",
        f"plan {plan.fingerprint[:8]}",
        f"torch {plan.torch_version}",
    ]


def _fit(report: Report) -> tuple[str, list[str]]:
    plan, budget = report.plan, report.plan.budget
    peak, was = format_bytes(plan.predicted_peak), f"was {format_bytes(plan.baseline_peak)}"
    reserve = f"reserve {format_bytes(plan.reserve)} extra" if plan.reserve else ""
    if plan.smallest:
        return "LEAST", [f"peak {peak}, the smallest that was found", was, reserve]
    of = f"peak {peak} of {format_bytes(budget)} ({percent(plan.predicted_peak, budget)} %)"
    return "FITS" if report.fits else "OVER", [of, was, _room(report, budget), reserve]


def _room(report: Report, budget: int) -> str:
    """What the larger of the two peaks leaves of the budget."""
    predicted, measured = report.plan.predicted_peak, report.measured_peak or 0
    slack = budget - max(predicted, measured)
    room = f"slack {format_bytes(slack)}" if slack >= 0 else f"over by {format_bytes(-slack)}"
    return f"{room} as measured" if measured > predicted else room


def _step_times(plan: Plan) -> str:
    unit = scale(SECONDS, [[plan.seconds, plan.added_seconds]])
    before, after = unit.text(plan.seconds), unit.text(plan.seconds + plan.added_seconds)
    overhead = f"+{100 * plan.predicted_overhead:.1f} %"
    return f"step {before} -> {after} {unit.name} ({overhead}, cost model {plan.cost_model})"


def _gap(plan: Plan) -> str:
    return "gap not bounded" if plan.gap is None else f"gap to optimum <= {100 * plan.gap:.1f} %"


def _place(peak: PeakPoint) -> list[str]:
    step = f"step {peak.step} of {peak.steps}, {peak.phase}"
    return [peak.operator, step, peak.source, f"module {peak.module}" if peak.module else ""]


def _check(report: Report) -> list[str]:
    measured, predicted = report.measured_peak, report.plan.predicted_peak
    if measured is None:
        found = "not measured yet: optimize(..., verify=True) or fxmem.measure(step)"
    elif measured == predicted:
        found = f"measured {format_bytes(measured)}, as predicted to the byte"
    else:
        off = f"{100 * (measured - predicted) / max(predicted, 1):+.2f} %"
        found = f"measured {format_bytes(measured)} ({off} against the prediction)"
    return [found, f"gradients {report.gradients}" if report.gradients else ""]


# -- Noise in gradients -----------------------------------------------------------------------------


def _noise_parts(plan: Plan) -> list[str]:
    noise = plan.noise
    assert noise is not None
    if noise.tier == "exact":
        return ["exact: no tensor is stored with noise", f"ceiling {_share(noise.ceiling)}"]
    parts = [
        f"{noise.tier}: adds {_share(noise.predicted)} to the variance of gradients",
        f"ceiling {_share(noise.ceiling)}",
        "sampled, not worst case",
    ]
    if noise.tier == "bounded":
        farthest = max(group.error for group in noise.parameters)
        parts.insert(2, f"moves their mean by {_share(farthest)}, {_share(noise.bounded)} allowed")
    return parts


def _share(value: float) -> str:
    return f"{100 * value:.3g} %"


def _noise(report: Report) -> list[str]:
    """What each group of parameters gets of it."""
    noise = report.plan.noise
    if noise is None or noise.tier == "exact":
        return []
    measured: dict[str, float] = defaultdict(float)
    for name, variance in (report.noise or {}).items():
        measured[NoiseOf.group_of(name)] += variance
    moved = noise.tier == "bounded"
    headers = ("gradients of", "n", "predicted", "measured", "moved by")[: 5 if moved else 4]
    cells = []
    for group in sorted(noise.parameters, key=lambda g: -g.added):
        if group.added:
            seen = measured[group.parameters] / group.own if report.noise and group.own else None
            own = group.added / group.own if group.own else math.inf
            measured_share = "" if seen is None else _share(seen)
            cell = (
                group.parameters,
                str(group.n),
                _share(own),
                measured_share,
                _share(group.error),
            )
            cells.append(cell[: len(headers)])
    exact = sum(group.n for group in noise.parameters if not group.added)
    rest = f"Those of the other {exact} parameters are exact. " if exact else ""
    notes = (
        f"{rest}Each share is of the variance that the group's gradients have from minibatch to "
        f"minibatch, found with {noise.backwards} backwards on your batch: sampled, not worst case. "
        + (_MOVED if moved else "The mean over many steps is the exact gradient.")
    )
    aligned = "l" + "r" * (len(headers) - 1)
    return ["Noise in gradients", *table(headers, cells, aligned, {0: 40}), *wrapped(notes)]


_MOVED = (
    "Some codes are read in ways that do not keep the mean of gradients: what they move one by is a "
    "share of its length, seen once on your batch."
)


# -- Live at the peak ---------------------------------------------------------------------------


@dataclass(frozen=True)
class LiveRow:
    """Bytes of one category at the peak of the step before and after."""

    category: str
    before: int
    after: int


def live_rows(plan: Plan) -> list[LiveRow]:
    """One row a category, in the plan's order; the rows add up to the two peaks."""
    before, after = plan.before.live, plan.peak.live
    rows = [LiveRow(c, before.get(c, 0), after.get(c, 0)) for c in dict.fromkeys((*before, *after))]
    rest = LiveRow(
        "in no category",
        plan.before.nbytes - sum(before.values()),
        plan.peak.nbytes - sum(after.values()),
    )
    return [*rows, rest] if rest.before or rest.after else rows


def live_lines(plan: Plan, outside: Mapping[str, int] | None = None) -> list[str]:
    """The table of categories; outside: of bytes beside the step, which are in no total."""
    rows = live_rows(plan)
    beside = [LiveRow(f"{what}, beside", n, n) for what, n in (outside or {}).items()]
    total = LiveRow("TOTAL", sum(r.before for r in rows), sum(r.after for r in rows))
    columns = [
        [r.before for r in rows],
        [r.after for r in rows],
        [r.after - r.before for r in rows],
    ]
    unit = scale(BYTES, columns)
    whole = total.after if plan.smallest else plan.budget
    cells = [
        (
            r.category,
            unit.text(r.before),
            unit.text(r.after),
            unit.text(r.after - r.before, sign=True),
            "" if r in beside else percent(r.after, whole),
        )
        for r in (*rows, total, *beside)
    ]
    share = "% of peak" if plan.smallest else "% of budget"
    lines = table(("category", "before", "after", "change", share), cells, "lrrrr")
    return [f"Live at the peak ({unit.name})", *lines, *_live_notes(plan, unit)]


def _live_notes(plan: Plan, unit: Scale) -> list[str]:
    notes = [] if unit.adds_up else [ROUNDED]
    if plan.before.nbytes != plan.baseline_peak:
        notes += wrapped(
            f"before: the captured step with everything kept, {plan.before.nbytes:,} bytes at its "
            f"peak; the step as it is today peaks at {plan.baseline_peak:,} bytes."
        )
    return notes


# -- Decisions -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class DecisionRow:
    """Equal decisions of equal blocks.

    where: module and operator, with ``*`` for what differs.  nbytes: of one of the n values.
    before, after: bytes over all n, as they are and as they are stored.  seconds: added by all n.
    """

    where: str
    type: str
    nbytes: int
    n: int
    before: int
    after: int
    decision: str
    seconds: float
    source: str


def folded(plan: Plan) -> list[DecisionRow]:
    """The decisions with equal blocks as one row, most bytes first, ties in the plan's order."""
    groups: dict[tuple[object, ...], list[Decision]] = defaultdict(list)
    for decision in plan.decisions:
        groups[_likeness(decision)].append(decision)
    return sorted((_row(group) for group in groups.values()), key=lambda row: -row.before)


def _likeness(d: Decision) -> tuple[object, ...]:
    """What two decisions share that differ in nothing but the number of their block."""
    what = (d.key.operator, d.key.ordinal, d.key.output, d.type, d.source)
    return (unnumbered(d.key.module), *what, d.action, d.times, d.nbytes, d.nbytes_stored)


def _row(group: Sequence[Decision]) -> DecisionRow:
    first = group[0]
    return DecisionRow(
        where=_where(group),
        type=first.type,
        nbytes=first.nbytes,
        n=len(group),
        before=sum(d.nbytes for d in group),
        after=sum(d.nbytes_stored for d in group),
        decision=_decided(first),
        seconds=sum(d.seconds for d in group),
        source=first.source.split(" in ")[0],
    )


def _decided(decision: Decision) -> str:
    """``recompute x2``; of a lossy code, which."""
    if decision.action == "encode" and decision.error is not None:
        return decision.reason.partition(" in place of")[0]
    return decision.action + (f" x{decision.times}" if decision.times > 1 else "")


def _where(group: Sequence[Decision]) -> str:
    """``h.*.mlp gelu``; ``add#1`` is the module's second add, ``.1`` its second result."""
    module = starred([d.key.module for d in group])
    key = group[0].key
    ordinal = f"#{key.ordinal}" if key.ordinal else ""
    output = f".{key.output}" if key.output else ""
    return f"{module} {key.operator}{ordinal}{output}".strip()


def _decisions(plan: Plan) -> list[str]:
    rows = folded(plan)
    if not rows:
        return ["Decisions", "none: the backward reads nothing that could be made again"]
    size = scale(BYTES, [[r.before for r in rows], [r.after for r in rows]])
    time = scale(SECONDS, [[r.seconds for r in rows]])
    cells = [_decision_cells(r, size, time) for r in rows[:MAX_ROWS]]
    if rest := rows[MAX_ROWS:]:
        cells.append(_sum_cells(f"{len(rest)} more", _at_most(rest, size), rest, size, time))
    cells.append(_sum_cells("TOTAL", "", rows, size, time))
    headers = ("where", "type", "each", "n", "before", "after", "decision", time.name, "source")
    lines = table(headers, cells, "llrrrrlrl", {0: 22, 1: 12, 8: 13})
    title = f"Decisions ({size.name}; before and after over all n; added time in {time.name})"
    return [title, *lines, *_decision_notes(plan, rows, size, time)]


def _at_most(rows: Sequence[DecisionRow], size: Scale) -> str:
    return "each <= " + size.text(max(r.nbytes for r in rows))


def _decision_cells(r: DecisionRow, size: Scale, time: Scale) -> tuple[str, ...]:
    each, added = size.text(r.nbytes), time.text(r.seconds, sign=True)
    before, after = size.text(r.before), size.text(r.after)
    return (
        r.where,
        r.type.replace(", ", ","),
        each,
        str(r.n),
        before,
        after,
        r.decision,
        added,
        r.source,
    )


def _sum_cells(
    label: str, note: str, rows: Sequence[DecisionRow], size: Scale, time: Scale
) -> tuple[str, ...]:
    before, after = sum(r.before for r in rows), sum(r.after for r in rows)
    added = time.text(sum(r.seconds for r in rows), sign=True)
    count = str(sum(r.n for r in rows))
    return (label, note, "", count, size.text(before), size.text(after), "", added, "")


def _decision_notes(plan: Plan, rows: Sequence[DecisionRow], size: Scale, time: Scale) -> list[str]:
    notes = [] if size.adds_up and time.adds_up else [ROUNDED]
    elsewhere = plan.added_seconds - sum(r.seconds for r in rows)
    if abs(elsewhere) > 0.005 * plan.added_seconds:
        added = time.text(plan.added_seconds, sign=True)
        notes.append(f"The whole plan adds {added} {time.name}.")
    return notes


# -- What else fits ----------------------------------------------------------------------------------


def _else(report: Report) -> list[str]:
    plan = report.plan
    hints = [
        *_floor_hints(plan),
        *_residents(plan),
        *(["Nothing is made again: the step fits as it is."] if _is_unchanged(plan) else []),
        *_ranges(plan),
        *_least(plan),
    ]
    lines = [*_other_budgets(report), *(line for hint in hints for line in wrapped(hint))]
    lines += _tight(plan)
    if report.gpus is not None:
        lines += ["", *fit_lines(report.gpus)]
    return ["What else fits", *lines] if lines else []


def _other_budgets(report: Report) -> list[str]:
    """A line a budget, from the most bytes to the least, the report's own among them."""
    if not report.alternatives:
        return []
    plan = report.plan
    mine = Alternative(plan.budget, plan.predicted_peak, plan.predicted_overhead, report.fits)
    rows = sorted((mine, *report.alternatives), key=lambda row: -row.budget)
    cells = [
        (
            format_bytes(row.budget),
            format_bytes(row.peak),
            f"{100 * row.overhead:+.1f} %" if row.overhead else "0",
            "this plan" if row is mine else "" if row.fits else "does not fit: the smallest plan",
        )
        for row in rows
    ]
    return table(("budget", "peak", "time", ""), cells, "rrrl")


def _floor_hints(plan: Plan) -> list[str]:
    hints = [f"This plan fits every budget from {plan.predicted_peak:,} bytes up."]
    if plan.floor is not None:
        hints.append(f'Smallest peak shown to be in reach: {plan.floor:,} bytes (budget "min").')
    return hints


def _residents(plan: Plan) -> list[str]:
    if not plan.resident:
        return []
    share = percent(plan.resident, plan.predicted_peak)
    return [
        f"{format_bytes(plan.resident)} of the peak ({share} %) are parameters, buffers and "
        "inputs, which no plan changes."
    ]


def _least(plan: Plan) -> list[str]:
    return list(filter(None, [least_text(plan)]))


def least_text(plan: Plan) -> str:
    """What no plan goes below, and the operator that makes it so.

    Nothing where that is not known, as for code that fuses operators and so goes below what they take.
    """
    known = plan.certificate
    if known is None or known.least > plan.predicted_peak:
        return ""
    places = (known.least_source, f"module {known.least_module}" if known.least_module else "")
    place = ", ".join(filter(None, places))
    is_operator = known.least_operator not in (LOSS, REST)
    does = "itself reads, makes and works in" if is_operator else "takes"
    return (
        f"No recomputation goes below {known.least:,} bytes: {known.least_operator}"
        f"{f' ({place})' if place else ''} {does} {format_bytes(known.least_own)}."
    )


def _tight(plan: Plan) -> list[str]:
    """Where no plan fits, or the smallest was asked for: its tensors, and what would lower it."""
    known = plan.certificate
    if known is None or (plan.floor is None and plan.predicted_peak <= plan.budget):
        return []
    remedies = [f"  {line}" for line in remedy_lines(known, WIDTH - 2)]
    return [
        *_live_tensors(known),
        *(["What would lower it, each alone:", *remedies] if remedies else []),
    ]


def _live_tensors(known: Certificate) -> list[str]:
    unit = scale(BYTES, [[*(t.nbytes for t in known.tensors), known.others_nbytes]])
    cells = [
        (t.name, t.type.replace(", ", ","), unit.text(t.nbytes), t.category, _place_of(t))
        for t in known.tensors
    ]
    if known.others:
        cells.append((f"{known.others} more", "", unit.text(known.others_nbytes), "", ""))
    cells.append(("TOTAL", "", unit.text(known.nbytes), "", ""))
    headers = ("largest at the peak", "type", unit.name, "category", "where")
    lines = table(headers, cells, "llrll", {0: 19, 1: 12, 3: 17, 4: 20})
    return [*lines, *([] if unit.adds_up else [ROUNDED])]


def _place_of(tensor: LiveTensor) -> str:
    return " ".join(filter(None, (line_of(tensor), tensor.module)))


def line_of(tensor: LiveTensor) -> str:
    """``model.py:12``"""
    return tensor.source.split(" in ")[0]


def remedy_lines(known: Certificate, width: int = WIDTH) -> list[str]:
    """What would lower the peak, the most saving first: ``about 6.5 MiB less: a batch of 2 for 4``."""
    lines: list[str] = []
    for r in known.remedies:
        text = f"{r.accuracy} {format_bytes(r.saves)} less: {r.what}".strip()
        lines += textwrap.wrap(clean(text), width, subsequent_indent="  ")
    return lines


def _is_unchanged(plan: Plan) -> bool:
    return all(d.action == "keep" for d in plan.decisions) and not plan.added_seconds


def _ranges(plan: Plan) -> list[str]:
    spans = [
        f"{name}={low}" if low == high else f"{name} from {low} to {high}"
        for name, (low, high) in plan.valid_for.items()
    ]
    return [f"The plan holds for {', '.join(spans)}."] if spans else []


def labelled(label: str, parts: Sequence[str]) -> list[str]:
    """``FITS   part   part``: as many lines as it takes, later ones indented."""
    room = WIDTH - len(_INDENT)
    lines = [""]
    for part in (cut(clean(part), room) for part in parts if part):
        joined = f"{lines[-1]}   {part}" if lines[-1] else part
        lines[-1:] = [joined] if len(joined) <= room else [lines[-1], part]
    return [f"{label:<7}{lines[0]}", *(_INDENT + line for line in lines[1:])]
