"""The pipeline: capture, clean up, plan, rewrite, cut, check.  One function reads top to bottom."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Literal

import torch
from torch import fx

from fxmem._torch_eager import compiling
from fxmem.baseline import eager_peak
from fxmem.budget import Budget
from fxmem.capture import StepCall, capture
from fxmem.cost import Cost, CostModel, default_cost_model
from fxmem.dataflow import Dataflow, dataflow, with_codes
from fxmem.decisions import explain, find_choice, infeasible, too_large
from fxmem.device import library_memory
from fxmem.encodings import ENCODERS
from fxmem.errors import VerificationError
from fxmem.graph import INSTEAD_OF_LOSS, LOSS_SCALARS, JointGraph, Role
from fxmem.lifetimes import BeforeAfter
from fxmem.liveness import MemoryTimeline, timeline
from fxmem.operators import recomputable_nodes
from fxmem.partition import Split, split
from fxmem.passes.base import Pass
from fxmem.passes.cleanup import CleanupPass
from fxmem.passes.cudnn_batch_norm import CudnnBatchNormPass
from fxmem.passes.deduplicate import DeduplicatePass
from fxmem.passes.encode import EncodePass
from fxmem.passes.gradient_layouts import GradientLayoutsPass
from fxmem.passes.identities import IdentitiesPass
from fxmem.passes.in_place import InPlacePass
from fxmem.passes.order import OrderPass
from fxmem.passes.recompute import Recompute, RecomputePass
from fxmem.passes.rectify import RectifyPass
from fxmem.passes.split_convolution import SplitConvolutionPass
from fxmem.passes.tangents import UndefinedTangentsPass
from fxmem.passes.uncode import UncodePass, plain_name, reader_of
from fxmem.passes.unread import UnreadPass
from fxmem.plan import Plan, fingerprint
from fxmem.planner import Choice, Planner
from fxmem.standins import without_meta
from fxmem.tags import tagged_values
from fxmem.timings import measured_cost
from fxmem.words import memory_of
from fxmem.workspace import Workspaces, load_workspaces, save_workspaces

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

    reserve_in_8_bits: bytes of ``reserve`` that 8-bit moments would free.  library: bytes outside
    the step, too, that the device's libraries hold.
    """

    budget: Budget
    reserve: int = 0
    reserve_in_8_bits: int = 0
    library: int = 0
    allow: tuple[str, ...] = ("recompute", "lossless")
    on_infeasible: str = "raise"
    cost: CostModel | Literal["measure"] | None = None
    plan: Plan | None = None


@dataclass(frozen=True)
class Planned:
    """A step that is ready to run.

    plan: what was promised.  graph: the rewritten joint graph, for every tangent.  split: its two
    halves.  undefined: names of the tangents that nobody is expected to send.  line, before: when each
    storage lives, as planned and with everything kept.  memory: of each operator, where it was asked for.
    """

    plan: Plan
    graph: JointGraph
    split: Split
    undefined: tuple[str, ...]
    line: MemoryTimeline = field(repr=False)
    before: MemoryTimeline = field(repr=False)
    memory: BeforeAfter | None = field(default=None, repr=False)


@dataclass
class Analysis:
    """A captured step before any decision: the graph, its numbers, and the search over them.

    whole: the step before its convolutions were split, where this is the one after.
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

    @cached_property
    def split(self) -> Analysis:
        """The step with its convolutions split, for less memory at once; itself if none can be."""
        return self._rewritten(SplitConvolutionPass())

    @cached_property
    def coded(self) -> Analysis:
        """The step with codes, if kept, of all that the backward can read so; itself if there are none."""
        return self._rewritten(EncodePass(), RectifyPass())

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

    def _rewritten(self, *passes: Pass) -> Analysis:
        graph = self.graph
        for a_pass in passes:
            graph = a_pass.apply(graph)
        if [n.target for n in graph.nodes] == [n.target for n in self.graph.nodes]:
            return self
        unchanged = Unchanged(self.device, self.baseline_peak, self.workspaces)
        form = _numbers(graph, self.call, unchanged, self.cost_asked, (self.whole or self).flow)
        return replace(form, whole=self.whole or self)


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
) -> Analysis:
    """Clean the joint graph up and measure what the planner needs to know about it."""
    graph, workspaces = cleaned(graph, unchanged.workspaces, unchanged.device)
    return _numbers(graph, call, replace(unchanged, workspaces=workspaces), cost)


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
        flow = with_codes(flow, plain, times, ENCODERS)
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
    if budget is not None and analysis.flow.loss_outside:
        limit = budget - LOSS_SCALARS
    analysis, choice, floor = _choose(analysis, options, limit)
    rewritten, halves, line = rewrite(analysis, choice)
    if line.peak(analysis.graph.bindings()).nbytes > choice.outcome.peak:
        choice, rewritten, halves, line = _settle(analysis, options, limit, choice)
    whole = analysis.whole or analysis
    before = timeline(split(whole.expected), whole.workspaces)
    plan = explain(analysis, options, budget, choice, before, line, floor)
    if budget is not None and plan.predicted_peak > budget and options.on_infeasible == "raise":
        raise (infeasible if options.plan is None else too_large)(plan)
    watched = memory_of(analysis, before, line) if memory else None
    return Planned(plan, rewritten, halves, analysis.undefined, line, before, watched)


def _expected_to_run(graph: JointGraph, undefined: tuple[str, ...]) -> JointGraph:
    """The graph as it runs when these tangents are undefined."""
    graph = UndefinedTangentsPass(undefined).apply(graph)
    return InPlacePass().apply(GradientLayoutsPass().apply(graph))


def _choose(
    analysis: Analysis, options: Options, budget: int | None
) -> tuple[Analysis, Choice, int | None]:
    """The form of the step and the choice to apply, and the smallest peak if somebody looked for it.

    A loaded plan is of either form, and its fingerprint says of which.
    """
    if options.plan is not None:
        form = _form_of(analysis, options.plan, options)
        return form, find_choice(form, options.plan), None
    fitting = None if budget is None else _fitting(analysis, options, budget)
    if fitting is not None:
        return *fitting, None
    form, smallest = _smallest(analysis, options)
    return form, smallest, smallest.outcome.peak if "recompute" in options.allow else None


def _smallest(analysis: Analysis, options: Options) -> tuple[Analysis, Choice]:
    """The smallest plan, of all forms of the step; the first of these among equals."""
    best: tuple[Analysis, Choice] | None = None
    for form in analysis.small_forms(options):
        if best is not None and (form is best[0] or _least(form) >= best[1].outcome.peak):
            continue
        if "recompute" in options.allow:
            choice = form.planner.smallest()
        else:
            choice = min(form.planner.without_remaking(), key=lambda found: found.outcome.peak)
        if best is None or choice.outcome.peak < best[1].outcome.peak:
            best = form, choice
    assert best is not None
    return best


def _least(form: Analysis) -> int:
    """Bytes that no plan of this form goes below."""
    return form.planner.simulator.least.nbytes


def _form_of(analysis: Analysis, plan: Plan, options: Options) -> Analysis:
    """The form that the plan is of; the step itself if it is of none."""
    for form in analysis.forms(options):
        if plan.fingerprint == fingerprint(form.expected):
            return form
    return analysis


def _fitting(analysis: Analysis, options: Options, budget: int) -> tuple[Analysis, Choice] | None:
    """The fastest plan that fits, of all forms of the step; the first of these among equals."""
    best: tuple[Analysis, Choice] | None = None
    least = math.inf
    seen: list[Analysis] = []
    for form in analysis.forms(options):
        more = form.flow.seconds - analysis.flow.seconds
        if more >= least or any(form is other for other in seen):
            continue
        seen.append(form)
        choice = _fit(form.planner, options, budget)
        if choice is not None and more + choice.outcome.seconds < least:
            best, least = (form, choice), more + choice.outcome.seconds
        if least <= 0:
            break
    return best


def _fit(planner: Planner, options: Options, budget: int) -> Choice | None:
    if "recompute" in options.allow:
        return planner.fit(budget)
    choices = planner.without_remaking()
    return next((choice for choice in choices if choice.outcome.peak <= budget), None)


def rewrite(analysis: Analysis, choice: Choice) -> tuple[JointGraph, Split, MemoryTimeline]:
    """Apply a choice to the graph with every tangent, and time what is expected to run of it."""
    graph = recompute_pass(analysis.flow, analysis.planner, choice).apply(analysis.graph)
    rewritten, halves, line = _timed(analysis, UncodePass().apply(graph))
    if line.peak(graph.bindings()).nbytes > choice.outcome.peak:
        full = _above(line, graph, choice.outcome.peak)
        return _timed(analysis, UncodePass(full).apply(graph))
    return rewritten, halves, line


def _timed(analysis: Analysis, graph: JointGraph) -> tuple[JointGraph, Split, MemoryTimeline]:
    graph, halves, run, table = as_run(graph, analysis.workspaces, analysis.device)
    return graph, halves, timeline(run, table)


def _above(line: MemoryTimeline, graph: JointGraph, peak: int) -> frozenset[str]:
    """The readers of codes that would take more bytes than was planned if they read no code."""
    live = line.live_bytes(graph.bindings())
    full = {s.node.name for s, n in zip(line.steps, live, strict=True) if s.node and n > peak}
    readers = filter(None, map(reader_of, graph.nodes))
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
) -> tuple[Choice, JointGraph, Split, MemoryTimeline]:
    """Plan again for a little less while the rewritten graph peaks above what was simulated.

    The two differ by bytes, where a second run returns less or copies more than the first.
    """
    bindings = analysis.graph.bindings()
    target = budget
    for _ in range(4):
        graph, halves, line = rewrite(analysis, choice)
        over = line.peak(bindings).nbytes - (budget or 0)
        if budget is None or target is None or over <= 0 or options.plan is not None:
            break
        target -= over
        again = analysis.planner.fit(target)
        if again is None:
            break
        choice = replace(again, bound=choice.bound)  # which is of the budget that was asked for
    return choice, graph, halves, line


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
