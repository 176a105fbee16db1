"""The plan of one graph of several, in the figures of the step that it is part of."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from fxmem.analysis.categories import LOSS
from fxmem.planning.ledger import Around
from fxmem.planning.plan import Certificate, LiveTensor, PeakPoint, Plan

REST = "rest of the step"
"""Category of what other graphs, and code that is in none, hold while a graph runs."""


def in_step(plan: Plan, around: Around, budget: int | None = None) -> Plan:
    """The plan, with what is around its graph among its bytes; budget: the step's, if it is known."""
    always = around.always
    if not always and around.meanwhile is None:
        return plan
    baseline = plan.baseline_peak + always if around.unchanged is None else around.unchanged
    known = plan.certificate
    return replace(
        plan,
        budget=plan.budget + always if budget is None else budget,
        predicted_peak=plan.predicted_peak + always,
        baseline_peak=baseline,
        keep_all_peak=plan.keep_all_peak + always,
        floor=None if plan.floor is None else plan.floor + always,
        peak=_point(plan.peak, around),
        before=_point(plan.before, around),
        certificate=None if known is None else _certificate(known, around),
    )


def _point(point: PeakPoint, around: Around) -> PeakPoint:
    nbytes = point.nbytes + around.always
    return replace(point, nbytes=nbytes, live=_live(point.live, around))


def _live(live: Mapping[str, int], around: Around) -> dict[str, int]:
    found = dict(live)
    rest = around.always
    if around.meanwhile is not None:  # what a plan takes for a loss are the graphs that follow
        rest += found.pop(LOSS, 0)
    return {**found, REST: rest} if rest else found


def _certificate(known: Certificate, around: Around) -> Certificate:
    follows = around.meanwhile is not None
    after = [t for t in known.tensors if follows and t.category == LOSS]
    tensors = [t for t in known.tensors if t not in after]
    rest = around.always + sum(t.nbytes for t in after)
    if rest:
        tensors.append(LiveTensor(REST, "", rest, REST, "", ""))
    return replace(
        known,
        tensors=tuple(sorted(tensors, key=lambda tensor: -tensor.nbytes)),
        least=known.least + around.always,
        least_operator=REST if follows and known.least_operator == LOSS else known.least_operator,
        remedies=tuple(r for r in known.remedies if not (follows and r.kind == "loss")),
    )
