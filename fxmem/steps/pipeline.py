"""The pipeline: capture, clean up, plan, rewrite, cut, check.  One function reads top to bottom."""

from __future__ import annotations

import logging
import math
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from types import MappingProxyType
from typing import Any, Literal

import torch
from torch import fx

from fxmem._torch.eager import compiling
from fxmem.analysis.baseline import eager_peak
from fxmem.analysis.cost import Cost, CostModel, default_cost_model
from fxmem.analysis.dataflow import Dataflow, dataflow, with_codes
from fxmem.analysis.liveness import MemoryTimeline, timeline
from fxmem.analysis.rebatch import resized
from fxmem.analysis.simulate import Simulator
from fxmem.analysis.tags import tagged_values
from fxmem.analysis.timings import measured_cost
from fxmem.basics.budget import NO_RESERVE, Budget, Reserve
from fxmem.basics.device import library_memory
from fxmem.basics.errors import PlanMismatchError, VerificationError
from fxmem.codes import travelling
from fxmem.codes.gradient_noise import Noise, Statistics, candidates, check_measurable, statistics
from fxmem.graphs.capture import StepCall, capture
from fxmem.graphs.consumers import Saved, Use
from fxmem.graphs.convolution import convolution_input_backward
from fxmem.graphs.graph import INSTEAD_OF_LOSS, JointGraph, Role, bytes_of_scalars, is_backward
from fxmem.graphs.lifetimes import BeforeAfter
from fxmem.graphs.operators import recomputable_nodes
from fxmem.graphs.partition import Split, split
from fxmem.graphs.standins import without_meta
from fxmem.graphs.workspace import Workspaces, load_workspaces, save_workspaces
from fxmem.passes.base import Pass
from fxmem.passes.cleanup import CleanupPass
from fxmem.passes.cudnn_batch_norm import CudnnBatchNormPass
from fxmem.passes.deduplicate import DeduplicatePass
from fxmem.passes.encode import EncodePass
from fxmem.passes.gradient_layouts import GradientLayoutsPass
from fxmem.passes.identities import IdentitiesPass
from fxmem.passes.in_place import InPlacePass
from fxmem.passes.order import OrderPass
from fxmem.passes.quantize import Code, QuantizePass
from fxmem.passes.recompute import Recompute, RecomputePass
from fxmem.passes.rectify import RectifyPass
from fxmem.passes.split_convolution import SplitConvolutionPass
from fxmem.passes.tangents import UndefinedTangentsPass
from fxmem.passes.uncode import (
    UncodePass,
    coders,
    lossy_coders,
    plain_name,
    reader_of,
    without_codes,
)
from fxmem.passes.unread import UnreadPass
from fxmem.planning.allotment import Allotment, candidates_of, encoding_named
from fxmem.planning.plan import Plan, fingerprint, keys
from fxmem.planning.planner import Choice, Planner
from fxmem.reports.words import memory_of
from fxmem.steps.decisions import explain, find_choice, infeasible, kept_codes, too_large

log = logging.getLogger(__name__)


BEFORE_PLANNING: tuple[Pass, ...] = (
    CleanupPass(),
    CudnnBatchNormPass(),
    IdentitiesPass(),
    DeduplicatePass(),
    GradientLayoutsPass(),
)
"""Rewrites that cost no time, in order; what the planner chooses is applied after them."""


@dataclass(frozen=True)
class Options:
    """``optimize``'s keywords, checked; see there.

    outside: what ``reserve`` was read from.  library: bytes outside the step, too, that the device's
    libraries hold.  compiler: None for the one that goes with the device.
    """

    budget: Budget
    outside: Reserve = NO_RESERVE
    library: int = 0
    allow: tuple[str, ...] = ("recompute", "lossless")
    on_infeasible: str = "raise"
    cost: CostModel | Literal["measure"] | None = None
    plan: Plan | None = None
    noise: Noise = field(default_factory=Noise)
    compiler: str | None = "eager"

    def uses_inductor(self, device: torch.device) -> bool:
        """Does Inductor write the code?  Where nobody said, it does on CUDA."""
        return (self.compiler or ("inductor" if device.type == "cuda" else "eager")) == "inductor"

    @property
    def reserve(self) -> int:
        """Bytes outside the step, those of libraries aside."""
        return self.outside.nbytes


@dataclass(frozen=True)
class Planned:
    """A step that is ready to run.

    plan: what was promised.  graph: the rewritten joint graph, for every tangent.  split: its two
    halves.  undefined: names of the tangents that nobody is expected to send.  line, before: when each
    storage lives, as planned and with everything kept.  functional: the graph before any operator
    wrote over an operand, for compilers that reuse memory themselves.  memory: of each operator, where it
    was asked for.
    """

    plan: Plan
    graph: JointGraph
    split: Split
    undefined: tuple[str, ...]
    line: MemoryTimeline = field(repr=False)
    before: MemoryTimeline = field(repr=False)
    functional: JointGraph = field(repr=False)
    memory: BeforeAfter | None = field(default=None, repr=False)


@dataclass
class Analysis:
    """A captured step before any decision: the graph, its numbers, and the search over them.

    whole: the step before its convolutions were split, where this is the one after.  examples: what
    it was captured with.  allotment: of the noise of its codes, where it may have lossy ones, and base:
    the step without these.
    """

    graph: JointGraph
    expected: JointGraph
    undefined: tuple[str, ...]
    flow: Dataflow
    planner: Planner
    workspaces: Workspaces
    cost: Cost
    device: torch.device
    baseline_peak: int
    call: StepCall = field(repr=False)
    cost_asked: CostModel | Literal["measure"] | None = None
    whole: Analysis | None = field(default=None, repr=False)
    examples: Mapping[str, Any] = field(default_factory=dict, repr=False)
    allotment: Allotment | None = None
    base: Analysis | None = field(default=None, repr=False)
    _allotted: tuple[Noise, Allotment] | None = field(default=None, repr=False)

    @cached_property
    def split(self) -> Analysis:
        """The step with its convolutions split, for less memory at once; itself if none can be."""
        return self._rewritten(SplitConvolutionPass())

    @cached_property
    def coded(self) -> Analysis:
        """The step with codes, if kept, of all that the backward can read so; itself if there are none."""
        return self._rewritten(EncodePass(), RectifyPass())

    @cached_property
    def _saved(self) -> list[Saved]:
        return candidates(self.graph)

    def allotted(self, noise: Noise) -> Allotment:
        """Encodings for what may be a lossy code, all of which may be kept; found out once."""
        if self._allotted is None or self._allotted[0] is not noise:
            runs = UndefinedTangentsPass(self.undefined).apply(self.graph)
            if not self._saved:
                return Allotment(Statistics({}, (), 0), noise.ceiling, (), ())
            known = self._statistics(runs, noise)
            self._allotted = noise, Allotment.of(known, noise.ceiling, candidates_of(known, runs))
        return self._allotted[1]

    def _statistics(self, runs: JointGraph, noise: Noise) -> Statistics:
        """What codes of all that may be one add to gradients, and what these have anyway."""
        linear = [s for s in self._saved if s.use is Use.LINEAR]
        others = [s for s in self._saved if s.use is Use.TRAVELLING]
        known = statistics(runs, self.examples, self.call, noise, linear)
        if not others:
            return known
        found = travelling.sensitivities(
            without_codes(runs), self.examples, self.call.model, others
        )
        more = known.backwards + 1 + travelling.PROBES
        return replace(known, sensitivities=(*known.sensitivities, *found), backwards=more)

    def stay(self, noise: Noise) -> None:
        """From now on without codes whose noise travels."""
        self._allotted = noise, self.allotted(noise).staying()

    def drawn(self, allotment: Allotment, kept: Collection[str]) -> dict[str, float]:
        """Parameter -> the variance that the kept codes are seen to add to its gradient."""
        runs = UndefinedTangentsPass(self.undefined).apply(self.graph)
        codes = tuple(code for code in codes_of(allotment) if code.source in kept)
        coded = QuantizePass(codes).apply(runs)
        return travelling.drawn(runs, coded, self.examples, self.call.model)

    def quantized(self, allotment: Allotment) -> Analysis:
        """The step with these codes, if kept."""
        form = self._rewritten(QuantizePass(codes_of(allotment)))
        return replace(form, allotment=allotment, base=self)

    def quantized_alike(self, allotment: Allotment) -> Analysis:
        """A form like this one with other codes of the same values, which all keep their numbers."""
        assert self.base is not None
        form = self.base.quantized(allotment)
        return form.split if self.is_split else form

    def forms(self, options: Options) -> Iterator[Analysis]:
        """The step, and what else could run in its place; each is made when its turn comes."""
        yield self
        yield self.split
        if "lossless" in options.allow:
            yield self.coded
            yield self.coded.split

    def small_forms(self, options: Options) -> Iterator[Analysis]:
        """Those of the forms that a smallest peak may be of."""
        yield self.split
        if "lossless" in options.allow:
            yield self.coded.split

    @property
    def is_split(self) -> bool:
        return any(n.target is convolution_input_backward for n in self.graph.nodes)

    def _rewritten(self, *passes: Pass) -> Analysis:
        graph = self.graph
        for a_pass in passes:
            graph = a_pass.apply(graph)
        if [n.target for n in graph.nodes] == [n.target for n in self.graph.nodes]:
            return self
        unchanged = Unchanged(self.device, self.baseline_peak, self.workspaces)
        form = _numbers(graph, self.call, unchanged, self.cost_asked, (self.whole or self).flow)
        return replace(
            form,
            whole=self.whole or self,
            examples=self.examples,
            allotment=self.allotment,
            base=self.base,
        )


def codes_of(allotment: Allotment) -> tuple[Code, ...]:
    return tuple(
        Code(source, encoding_named(name), candidate.stream, allotment.units(source))
        for source, (candidate, name) in allotment.chosen.items()
    )


@dataclass(frozen=True)
class Unchanged:
    """The user's step as it is: its device, its peak in bytes, and the workspaces it met.

    peak is None where the model cannot run on a copy with fake tensors.
    """

    device: torch.device
    peak: int | None
    workspaces: Workspaces


def unchanged_step(call: StepCall) -> Unchanged:
    """Look at the step before it is captured."""
    device = device_of(call)
    workspaces = load_workspaces(device)
    try:
        with compiling():
            peak = eager_peak(call, workspaces, device)
    except Exception as error:  # whatever a model's own code may raise: capture will say it better
        log.info("the unchanged step could not be run on fake tensors: %s", error)
        peak = None
    return Unchanged(device, peak, workspaces)


def analyze(
    graph: JointGraph,
    call: StepCall,
    unchanged: Unchanged,
    cost: CostModel | Literal["measure"] | None = None,
    examples: Mapping[str, Any] = MappingProxyType({}),
) -> Analysis:
    """Clean the joint graph up and measure what the planner needs to know about it.

    examples: what was captured with, for lossy codes.
    """
    graph, workspaces = cleaned(graph, unchanged.workspaces, unchanged.device)
    found = _numbers(graph, call, replace(unchanged, workspaces=workspaces), cost)
    return replace(found, examples=examples)


def cleaned(
    graph: JointGraph, workspaces: Workspaces, device: torch.device
) -> tuple[JointGraph, Workspaces]:
    """The captured graph after the rewrites that cost no time, and what its operators hold."""
    for a_pass in BEFORE_PLANNING:
        graph = a_pass.apply(graph)
    graph, workspaces = _ordered(graph, workspaces, device)
    graph = UnreadPass().apply(graph)  # by strides that the order's figures brought along
    return graph, workspaces


def _numbers(
    graph: JointGraph,
    call: StepCall,
    unchanged: Unchanged,
    cost: CostModel | Literal["measure"] | None,
    plain: Dataflow | None = None,
) -> Analysis:
    """plain: what is known of the step without codes, if this is one with them."""
    device = unchanged.device
    undefined = undefined_tangents(graph)
    expected, workspaces = _measured(graph, unchanged.workspaces, device)
    save_workspaces(workspaces, device)
    times = _times(expected, device, cost)
    flow = dataflow(expected, workspaces, times, recomputable_nodes(expected))
    if plain is not None:
        flow = with_codes(flow, plain, times, coders())
    keep, remake = tagged_values(flow)
    planner = Planner(flow, keep, remake)
    baseline = unchanged.peak
    if baseline is None:
        baseline = planner.keep_all().outcome.peak
    numbers = (flow, planner, workspaces, times, device, baseline)
    return Analysis(graph, expected, undefined, *numbers, call, cost)


def _measured(
    graph: JointGraph, workspaces: Workspaces, device: torch.device
) -> tuple[JointGraph, Workspaces]:
    """What is expected to run of a graph, and what the operators of both hold."""
    expected = _expected_to_run(graph, undefined_tangents(graph))
    for one in (graph, expected):
        workspaces = workspaces.calibrated(one.module.graph, device)
    return expected, workspaces


def _ordered(
    graph: JointGraph, workspaces: Workspaces, device: torch.device
) -> tuple[JointGraph, Workspaces]:
    """The graph in the order that holds fewer bytes, and what its operators hold."""
    expected, workspaces = _measured(graph, workspaces, device)
    ordered = OrderPass(workspaces).apply(graph)
    runs, workspaces = _measured(ordered, workspaces, device)
    # What the pass moves by may differ from this: gradients that nobody sends.
    if _peak(runs, workspaces) <= _peak(expected, workspaces):
        return ordered, workspaces
    return graph, workspaces


def _peak(graph: JointGraph, workspaces: Workspaces) -> int:
    return timeline(split(graph), workspaces).peak(graph.bindings()).nbytes


def _times(
    graph: JointGraph, device: torch.device, cost: CostModel | Literal["measure"] | None
) -> Cost:
    """What says how long the graph's operators take."""
    if cost == "measure":
        return measured_cost(graph.module.graph, device, default_cost_model(device))
    return cost or default_cost_model(device)


def calibrate(call: StepCall, device: torch.device) -> Workspaces:
    """Measure every operator of a step on ``device``, known or not, and write the table.

    The step itself does not run, and its tensors may be on another device, meta for one.  Returns
    what was measured.
    """
    with capture(without_meta(call)) as captured:
        graph, measured = cleaned(captured.graph, Workspaces(), device)
        coded = RectifyPass().apply(EncodePass().apply(graph))
        for form in (graph, coded):
            _, measured = _measured(form, measured, device)
            _, measured = _measured(SplitConvolutionPass().apply(form), measured, device)
    known = load_workspaces(device)
    save_workspaces(Workspaces({**known.table, **measured.table}), device)
    return measured


def limit_for(budget: int, loss_outside: bool, device: torch.device) -> int:
    """Bytes that a captured step may hold of a budget, where the caller may compute the loss."""
    return budget - bytes_of_scalars(device) if loss_outside else budget


def decide(analysis: Analysis, options: Options, *, memory: bool = False) -> Planned:
    """Choose, rewrite and check.  Raises ``BudgetInfeasibleError`` as ``options`` asks for.

    memory: keep that of each operator too, for reports.
    """
    options = replace(options, library=library_memory(analysis.device))
    budget = options.budget.resolve(
        device=analysis.device,
        baseline_peak=analysis.baseline_peak,
        reserve=options.reserve + options.library,
    )
    limit = budget
    if budget is not None:
        limit = limit_for(budget, analysis.flow.loss_outside > 0, analysis.device)
    applied = _applied(analysis, options, limit)
    if applied.settled and applied.form.allotment is not None and options.plan is None:
        exact = tuple(name for name in options.allow if name != "quantize")
        other = _applied(analysis, replace(options, allow=exact), limit)
        if other.fits(limit) and not (applied.fits(limit) and applied.added < other.added):
            applied = other  # it took more to settle than the codes had won
    analysis, choice, floor = applied.form, applied.choice, applied.floor
    rewritten, halves, line = applied.graph, applied.halves, applied.line
    whole = analysis.whole or analysis
    before = timeline(split(whole.expected), whole.workspaces)
    plan = explain(analysis, options, budget, choice, before, line, floor)
    if budget is not None and plan.predicted_peak > budget and options.on_infeasible == "raise":
        raise (infeasible if options.plan is None else too_large)(plan)
    watched = memory_of(analysis, before, line) if memory else None
    return Planned(
        plan, rewritten, halves, analysis.undefined, line, before, applied.functional, watched
    )


@dataclass(frozen=True)
class _Applied:
    """A choice and the graph that it makes.

    functional: before operators write over their operands.  settled: was it planned again for less than
    was asked?
    """

    form: Analysis
    choice: Choice
    floor: int | None
    graph: JointGraph
    halves: Split
    line: MemoryTimeline
    functional: JointGraph
    settled: bool

    @property
    def added(self) -> float:
        return _added(self.form, self.choice)

    def fits(self, budget: int | None) -> bool:
        return budget is not None and self.line.peak(self.graph.bindings()).nbytes <= budget


def _applied(analysis: Analysis, options: Options, budget: int | None) -> _Applied:
    form, choice, floor = _chosen(analysis, options, budget)
    graph, halves, line, functional = rewrite(form, choice)
    settled = line.peak(form.graph.bindings()).nbytes > choice.outcome.peak
    if settled:
        choice, graph, halves, line, functional = _settle(form, options, budget, choice)
    return _Applied(form, choice, floor, graph, halves, line, functional, settled)


def _expected_to_run(graph: JointGraph, undefined: tuple[str, ...]) -> JointGraph:
    """The graph as it runs when these tangents are undefined."""
    graph = UndefinedTangentsPass(undefined).apply(graph)
    return InPlacePass().apply(GradientLayoutsPass().apply(graph))


_MARGIN = 1.25
"""Times the ceiling that the few draws of a plan may come to."""


def _chosen(
    analysis: Analysis, options: Options, budget: int | None
) -> tuple[Analysis, Choice, int | None]:
    """As ``_choose``, with noise that travels confirmed by draws; without it where it is too much."""
    form, choice, floor = _choose(analysis, options, budget)
    allotment = form.allotment
    kept = kept_codes(form.planner.simulator, choice.kept)
    if allotment is None or form.base is None or not allotment.travels(kept):
        return form, choice, floor
    drawn = form.base.drawn(allotment, kept)
    if allotment.statistics.share(sum(drawn.values())) <= _MARGIN * allotment.ceiling:
        known = allotment.confirmed(drawn, travelling.DRAWS + 1)
        return replace(form, allotment=known), choice, floor
    if options.plan is not None:
        raise PlanMismatchError(
            "the codes of the plan add more noise to gradients than is allowed, as drawn here\n"
            "  try: a higher noise=, or optimize without plan="
        )
    form.base.stay(options.noise)
    return _choose(analysis, options, budget)


def _choose(
    analysis: Analysis, options: Options, budget: int | None
) -> tuple[Analysis, Choice, int | None]:
    """The form of the step and the choice to apply, and the smallest peak if somebody looked for it.

    A loaded plan is of either form, and its fingerprint says of which.
    """
    if "quantize" in options.allow:
        runs = UndefinedTangentsPass(analysis.undefined).apply(analysis.graph)
        check_measurable(runs, analysis.examples, analysis.call, options.noise)
    if options.plan is not None:
        form = _form_of(analysis, options.plan, options)
        return form, find_choice(form, options.plan), None
    fitting = None if budget is None else _fitting(analysis, options, budget)
    if fitting is not None:
        return *fitting, None
    form, smallest = _smallest(analysis, options)
    return form, smallest, smallest.outcome.peak if "recompute" in options.allow else None


Chosen = tuple["Analysis", Choice]


def _fitting(analysis: Analysis, options: Options, budget: int) -> Chosen | None:
    """The fastest plan that fits, of all forms of the step; the first of these among equals.

    Forms with lossy codes come last: without noise is better than with.
    """
    exact = _fastest(analysis.forms(options), options, budget)
    limit = math.inf if exact is None else _added(*exact)
    best = exact
    if "quantize" in options.allow and limit > 0:
        for found in _lossy(analysis, options, budget):
            if found[1].outcome.peak <= budget and (best is None or _added(*found) < _added(*best)):
                best = found
    if best is None or best is exact:
        return exact
    finer = _finer(*best, budget)
    return finer if _added(*finer) < limit else best


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


def _added(form: Analysis, choice: Choice) -> float:
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
    choices = planner.without_remaking()
    return next((choice for choice in choices if choice.outcome.peak <= budget), None)


Rewritten = tuple[JointGraph, Split, MemoryTimeline, JointGraph]
"""A graph as it runs, its halves, its timeline, and the graph before it wrote over operands."""


def rewrite(analysis: Analysis, choice: Choice) -> Rewritten:
    """Apply a choice to the graph with every tangent, and time what is expected to run of it."""
    graph = recompute_pass(analysis.flow, analysis.planner, choice).apply(analysis.graph)
    _refuse_unplanned_noise(UncodePass().apply(graph))
    rewritten, halves, line, functional = _timed(analysis, UncodePass().apply(graph))
    if line.peak(graph.bindings()).nbytes > choice.outcome.peak:
        full = _above(line, graph, choice.outcome.peak)
        return _timed(analysis, UncodePass(full).apply(graph))
    return rewritten, halves, line, functional


def _refuse_unplanned_noise(graph: JointGraph) -> None:
    """A lossy code that is not kept must be none.  Raises ``VerificationError``."""
    lossy = lossy_coders()
    made = [n.name for n in graph.nodes if n.target in lossy and is_backward(n)]
    if made:
        raise VerificationError(f"codes that were not planned add noise: {made}")


def _timed(analysis: Analysis, functional: JointGraph) -> Rewritten:
    graph, halves, run, table = as_run(functional, analysis.workspaces, analysis.device)
    return graph, halves, timeline(run, table), functional


def _above(line: MemoryTimeline, graph: JointGraph, peak: int) -> frozenset[str]:
    """The readers of codes that would take more bytes than was planned if they read no code."""
    live = line.live_bytes(graph.bindings())
    full = {s.node.name for s, n in zip(line.steps, live, strict=True) if s.node and n > peak}
    lossy = lossy_coders()
    exact = (n for n in graph.nodes if n.target not in lossy)
    readers = filter(None, map(reader_of, exact))
    return frozenset(r.name for r in readers if plain_name(r) in full)


def as_run(
    graph: JointGraph, workspaces: Workspaces, device: torch.device
) -> tuple[JointGraph, Split, Split, Workspaces]:
    """The graph as it runs, its halves for every tangent and for the expected ones, and workspaces."""
    table = workspaces.calibrated(graph.module.graph, device)
    graph = InPlacePass("forward").apply(graph)
    table = table.calibrated(graph.module.graph, device)
    halves = split(InPlacePass().apply(graph))
    expected = _expected_to_run(graph, undefined_tangents(graph))
    table = table.calibrated(expected.module.graph, device)
    backward = split(expected).backward
    run = Split(halves.forward, backward, halves.output_kinds, halves.num_forward_outputs)
    return graph, halves, run, table


def _settle(
    analysis: Analysis, options: Options, budget: int | None, choice: Choice
) -> tuple[Choice, JointGraph, Split, MemoryTimeline, JointGraph]:
    """Plan again for a little less while the rewritten graph peaks above what was simulated.

    The two differ by bytes, where a second run returns less or copies more than the first.
    """
    bindings = analysis.graph.bindings()
    target = budget
    for _ in range(4):
        graph, halves, line, functional = rewrite(analysis, choice)
        over = line.peak(bindings).nbytes - (budget or 0)
        if budget is None or target is None or over <= 0 or options.plan is not None:
            break
        target -= over
        again = analysis.planner.fit(target)
        if again is None:
            break
        choice = replace(again, bound=choice.bound)  # which is of the budget that was asked for
    return choice, graph, halves, line, functional


def recompute_pass(flow: Dataflow, planner: Planner, choice: Choice) -> RecomputePass:
    """A choice over numbers as a pass over nodes."""
    operators, values = flow.operators, flow.values
    kept = choice.kept | planner.simulator.always_kept
    return RecomputePass(
        tuple(
            Recompute(operators[i].node.name, operators[flow.num_forward + j].node.name)
            for i, j in choice.outcome.recomputed
        ),
        frozenset(values[v].node.name for v in kept),
    )


# -- Questions about the step ------------------------------------------------------------------------


def device_of(call: StepCall) -> torch.device:
    """The device that the budget is about: an accelerator if the step uses one."""
    leaves = [*call.model.parameters(), *call.model.buffers()]
    leaves += torch.utils._pytree.tree_leaves((call.args, call.kwargs, call.loss_inputs))
    devices = {t.device for t in leaves if isinstance(t, torch.Tensor)}
    accelerators = sorted((d for d in devices if d.type not in ("cpu", "meta")), key=str)
    if accelerators:
        return accelerators[0]
    return next((d for d in devices if d.type == "meta"), torch.device("cpu"))


def undefined_tangents(graph: JointGraph) -> tuple[str, ...]:
    """Tangents that nobody is expected to send: all but the loss's, if there is one scalar loss.

    None where more graphs follow: those may read all that this one returns.
    """
    tangents = list(graph.placeholders(Role.TANGENT))
    if any(INSTEAD_OF_LOSS in n.meta for n in tangents):
        return ()
    scalars = [n for n in tangents if _numel(n) == 1]
    if len(scalars) != 1:
        return ()
    return tuple(n.name for n in tangents if n is not scalars[0])


def _numel(node: fx.Node) -> int:
    value = node.meta.get("val")
    return int(value.numel()) if isinstance(value, torch.Tensor) and value.ndim == 0 else -1


def backward_for(planned: Planned, undefined: tuple[str, ...]) -> fx.GraphModule:
    """The backward to run when exactly these tangents are undefined."""
    if not undefined:
        return planned.split.backward
    backward = split(_expected_to_run(planned.graph, undefined)).backward
    known = {n.name for n in planned.split.backward.graph.find_nodes(op="placeholder")}
    unknown = [n.name for n in backward.graph.find_nodes(op="placeholder") if n.name not in known]
    if unknown:
        raise VerificationError(f"the forward does not save {unknown}")
    return backward
