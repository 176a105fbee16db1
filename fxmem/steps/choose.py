"""Which form of the step to run, and what to keep, make again and encode in it."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import replace

from fxmem.analysis.rebatch import resized
from fxmem.analysis.simulate import Simulator
from fxmem.basics.errors import PlanMismatchError
from fxmem.codes.gradient_noise import check_measurable
from fxmem.planning.allotment import Allotment
from fxmem.planning.plan import Plan, fingerprint, keys
from fxmem.planning.planner import Choice, Planner
from fxmem.steps.analyze import Analysis
from fxmem.steps.decisions import find_choice, kept_codes
from fxmem.steps.options import Options

Chosen = tuple[Analysis, Choice]

_MARGIN = 1.25
"""Times the ceiling that the few draws of a plan may come to."""


def choose(
    analysis: Analysis, options: Options, budget: int | None
) -> tuple[Analysis, Choice, int | None]:
    """As ``_choose``, with noise that travels confirmed by draws; with less of it where it is too much."""
    form, choice, floor = _choose(analysis, options, budget)
    allotment = form.allotment
    kept = kept_codes(form.planner.simulator, choice.kept)
    if allotment is None or form.base is None or not allotment.travels(kept):
        return form, choice, floor
    known = _drawn(form.base, allotment, kept)
    if known.is_allowed(_MARGIN):
        return replace(form, allotment=known), choice, floor
    if options.plan is not None:
        raise PlanMismatchError(
            "the codes of the plan add more noise to gradients than is allowed, as drawn here\n"
            "  try: a higher noise=, or optimize without plan="
        )
    form.base.retreat(options.noise, known)
    return choose(analysis, options, budget)


def _drawn(base: Analysis, allotment: Allotment, kept: frozenset[str]) -> Allotment:
    """What the kept codes are seen to add to gradients; first, those alone that move their mean."""
    biased = allotment.biased(kept)
    if biased:
        moved = base.drawn(allotment, biased, draws=1)
        allotment = replace(allotment, moved=moved)
        if not allotment.is_allowed(_MARGIN):
            return allotment
    return replace(allotment, drawn=base.drawn(allotment, kept))


def _choose(
    analysis: Analysis, options: Options, budget: int | None
) -> tuple[Analysis, Choice, int | None]:
    """The form of the step and the choice to apply, and the smallest peak if somebody looked for it.

    A loaded plan is of either form, and its fingerprint says of which.
    """
    if "quantize" in options.allow:
        check_measurable(analysis.runs, analysis.examples, analysis.call, options.noise)
    if options.plan is not None:
        form = _form_of(analysis, options.plan, options)
        return form, find_choice(form, options.plan), None
    fitting = None if budget is None else _fitting(analysis, options, budget)
    if fitting is not None:
        return *fitting, None
    form, smallest = _smallest(analysis, options)
    return form, smallest, smallest.outcome.peak if "recompute" in options.allow else None


def _fitting(analysis: Analysis, options: Options, budget: int) -> Chosen | None:
    """The fastest plan that fits, of all forms of the step; the first of these among equals.

    Forms with lossy codes come last: without noise is better than with.
    """
    exact = _fastest(analysis.forms(options), options, budget)
    limit = math.inf if exact is None else added(*exact)
    best = exact
    if "quantize" in options.allow and limit > 0:
        for found in _lossy(analysis, options, budget):
            if found[1].outcome.peak <= budget and (best is None or added(*found) < added(*best)):
                best = found
    if best is None or best is exact:
        return exact
    finer = _finer(*best, budget)
    return finer if added(*finer) < limit else best


def _finer(form: Analysis, choice: Choice, budget: int) -> Chosen:
    """The same with finer codes, the noisiest first, where there is room for them."""
    assert form.allotment is not None
    allotment, simulator = form.allotment, form.planner.simulator
    values = {simulator.operand(v): v for v in simulator.lossy & choice.kept}
    names = {form.flow.values[x].node.name: v for x, v in values.items()}
    sizes = [v.nbytes for v in form.flow.values]
    for source in sorted(names, key=lambda name: (-allotment.share(name), name)):
        for name, nbytes in allotment.finer(source):
            tried = [nbytes if v == names[source] else n for v, n in enumerate(sizes)]
            flow = resized(form.flow, tried)
            if Simulator(flow).run(choice.kept, choice.drops).peak <= budget:
                sizes, allotment = tried, allotment.with_code(source, name)
                break
    again = form.quantized_alike(allotment)
    same = again.planner.choice(choice.kept, choice.drops)
    fits = same.outcome.peak <= budget
    return (again, replace(same, bound=choice.bound)) if fits else (form, choice)


def _fastest(forms: Iterable[Analysis], options: Options, budget: int) -> Chosen | None:
    best: Chosen | None = None
    least = math.inf
    seen: list[Analysis] = []
    for form in forms:
        more = _added_by(form)
        if more >= least or any(form is other for other in seen):
            continue
        seen.append(form)
        choice = _fit(form.planner, options, budget)
        if choice is not None and more + choice.outcome.seconds < least:
            best, least = (form, choice), more + choice.outcome.seconds
        if least <= 0:
            break
    return best


def added(form: Analysis, choice: Choice) -> float:
    """Seconds more than the unchanged step takes."""
    return _added_by(form) + choice.outcome.seconds


def _added_by(form: Analysis) -> float:
    return form.flow.seconds - (form.whole or form).flow.seconds


def _smallest(analysis: Analysis, options: Options) -> Chosen:
    """The smallest plan, of all forms of the step; the first of these among equals."""
    best = _least(analysis.small_forms(options), options)
    if "quantize" in options.allow:
        for found in _lossy(analysis, options, None):
            if found[1].outcome.peak < best[1].outcome.peak:
                best = found
    return best


def _least(forms: Iterable[Analysis], options: Options) -> Chosen:
    best: Chosen | None = None
    for form in forms:
        below = form.planner.simulator.least.nbytes  # no plan of this form goes below
        if best is not None and (form is best[0] or below >= best[1].outcome.peak):
            continue
        if "recompute" in options.allow:
            choice = form.planner.smallest()
        else:
            choice = min(form.planner.without_remaking(), key=lambda found: found.outcome.peak)
        if best is None or choice.outcome.peak < best[1].outcome.peak:
            best = form, choice
    assert best is not None
    return best


_ROUNDS = 3
"""Of plans with lossy codes, each with the noise shared out among what the one before kept."""


def _lossy(analysis: Analysis, options: Options, budget: int | None) -> Iterator[Chosen]:
    """Plans with lossy codes: the fastest that fit, or where there are none the smallest.

    The noise is first shared out among all that may be a code, then among what was kept.
    """
    base = analysis.coded if "lossless" in options.allow else analysis
    allotment = base.allotted(options.noise)
    for _ in range(_ROUNDS):
        if not allotment.candidates:
            return
        form = base.quantized(allotment)
        forms = [form, form.split]
        found = None if budget is None else _fastest(forms, options, budget)
        found = found or _least(forms[1:], options)
        yield found
        again = allotment.among(kept_codes(found[0].planner.simulator, found[1].kept))
        if again.encodings == allotment.encodings:
            return
        allotment = again


def _form_of(analysis: Analysis, plan: Plan, options: Options) -> Analysis:
    """The form that the plan is of; the step itself if it is of none."""
    if plan.noise is not None and "quantize" not in options.allow:
        raise PlanMismatchError(
            "the plan stores tensors in a few bits, which adds noise to gradients, and that is not "
            'allowed here\n  try: allow=("recompute", "lossless", "quantize")'
        )
    for form in (*analysis.forms(options), *_lossy_forms_of(analysis, plan, options)):
        if plan.fingerprint == fingerprint(form.expected):
            return form
    return analysis


def _lossy_forms_of(analysis: Analysis, plan: Plan, options: Options) -> Iterator[Analysis]:
    """The forms with the codes of a plan, whose noise is found out anew.

    Raises ``PlanMismatchError`` where it asks for codes that may not be, or that are too much noise.
    """
    if plan.noise is None:
        return
    base = analysis.coded if "lossless" in options.allow else analysis
    allotment = base.allotted(options.noise)
    nodes = {key: node.name for key, node in keys(base.expected).items()}
    wanted = {nodes.get(code.key, ""): code.encoding for code in plan.noise.codes}
    form = base.quantized(allotment.given(wanted))
    yield form
    yield form.split


def _fit(planner: Planner, options: Options, budget: int) -> Choice | None:
    if "recompute" in options.allow:
        return planner.fit(budget)
    return planner.fit_without_remaking(budget)
