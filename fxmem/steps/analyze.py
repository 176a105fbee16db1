"""A captured step before any decision: cleaned up, measured, and in all the forms that it may run in."""

from __future__ import annotations

import logging
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from types import MappingProxyType
from typing import Any, Literal

import torch

from fxmem._torch.eager import compiling
from fxmem.analysis.baseline import eager_peak
from fxmem.analysis.cost import Cost, CostModel, default_cost_model
from fxmem.analysis.dataflow import Dataflow, dataflow, with_codes
from fxmem.analysis.liveness import timeline
from fxmem.analysis.tags import tagged_values
from fxmem.analysis.timings import measured_cost
from fxmem.codes import travelling
from fxmem.codes.gradient_noise import Noise, Statistics, candidates, statistics
from fxmem.graphs.capture import StepCall, capture
from fxmem.graphs.consumers import Saved, Use
from fxmem.graphs.convolution import convolution_input_backward
from fxmem.graphs.graph import JointGraph
from fxmem.graphs.operators import recomputable_nodes
from fxmem.graphs.partition import split
from fxmem.graphs.standins import without_meta
from fxmem.graphs.workspace import Workspaces, load_workspaces, save_workspaces
from fxmem.passes.base import Pass
from fxmem.passes.cleanup import CleanupPass
from fxmem.passes.cudnn_batch_norm import CudnnBatchNormPass
from fxmem.passes.deduplicate import DeduplicatePass
from fxmem.passes.encode import EncodePass
from fxmem.passes.gradient_layouts import GradientLayoutsPass
from fxmem.passes.identities import IdentitiesPass
from fxmem.passes.order import OrderPass
from fxmem.passes.quantize import Code, QuantizePass
from fxmem.passes.rectify import RectifyPass
from fxmem.passes.split_convolution import SplitConvolutionPass
from fxmem.passes.tangents import UndefinedTangentsPass
from fxmem.passes.uncode import (
    coders,
    without_codes,
)
from fxmem.passes.unread import UnreadPass
from fxmem.planning.allotment import Allotment, candidates_of, encoding_named
from fxmem.planning.planner import Planner
from fxmem.planning.remembered import RememberingPlanner
from fxmem.steps.options import Options
from fxmem.steps.rewrite import expected_to_run, undefined_tangents

log = logging.getLogger(__name__)


BEFORE_PLANNING: tuple[Pass, ...] = (
    CleanupPass(),
    CudnnBatchNormPass(),
    IdentitiesPass(),
    DeduplicatePass(),
    GradientLayoutsPass(),
)
"""Rewrites that cost no time, in order; what the planner chooses is applied after them."""


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
    _draws: travelling.Draws | None = field(default=None, repr=False)

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
            saved = [s for s in self._saved if noise.bounded or s.use is not Use.SMOOTH]
            if not saved:
                return Allotment(Statistics({}, (), 0), noise.ceiling, (), ())
            known = self._statistics(self.runs, noise, saved)
            found = candidates_of(known, self.runs)
            self._allotted = noise, Allotment.of(known, noise.ceiling, found, noise.bounded)
        return self._allotted[1]

    def _statistics(self, runs: JointGraph, noise: Noise, saved: list[Saved]) -> Statistics:
        """What codes of all that may be one add to gradients, and what these have anyway."""
        linear = [s for s in saved if s.use is Use.LINEAR]
        others = [s for s in saved if s.use is not Use.LINEAR]
        known = statistics(runs, self.examples, self.call, noise, linear)
        if not others:
            return known
        plain = without_codes(runs)
        for most in (Use.SMOOTH, Use.TRAVELLING):
            others = [s for s in others if s.use <= most]
            found = travelling.sensitivities(plain, self.examples, self.call.model, others)
            if found:
                break
        more = known.backwards + 1 + travelling.PROBES
        return replace(known, sensitivities=(*known.sensitivities, *found), backwards=more)

    def retreat(self, noise: Noise, refused: Allotment) -> None:
        """From now on with less harmful codes than those of which some were refused."""
        self._allotted = noise, refused.harmless(self.allotted(noise).candidates)

    def drawn(
        self, allotment: Allotment, kept: Collection[str], draws: int = travelling.DRAWS
    ) -> dict[str, float]:
        """Parameter -> the variance that the kept codes are seen to add to its gradient."""
        codes = tuple(code for code in codes_of(allotment) if code.source in kept)
        coded = QuantizePass(codes).apply(self.runs)
        if self._draws is None:
            self._draws = travelling.Draws(self.runs, self.examples, self.call.model)
        return self._draws.distances(coded, draws)

    @cached_property
    def runs(self) -> JointGraph:
        """The step as it runs when the tangents come that are expected."""
        return UndefinedTangentsPass(self.undefined).apply(self.graph)

    @property
    def backwards(self) -> int:
        """That were run to find out about noise."""
        found = 0 if self._allotted is None else self._allotted[1].statistics.backwards
        return found + (0 if self._draws is None else self._draws.backwards)

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


def device_of(call: StepCall) -> torch.device:
    """The device that the budget is about: an accelerator if the step uses one."""
    leaves = [*call.model.parameters(), *call.model.buffers()]
    leaves += torch.utils._pytree.tree_leaves((call.args, call.kwargs, call.loss_inputs))
    devices = {t.device for t in leaves if isinstance(t, torch.Tensor)}
    accelerators = sorted((d for d in devices if d.type not in ("cpu", "meta")), key=str)
    if accelerators:
        return accelerators[0]
    return next((d for d in devices if d.type == "meta"), torch.device("cpu"))


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
    planner = RememberingPlanner(flow, keep, remake)
    baseline = unchanged.peak
    if baseline is None:
        baseline = planner.keep_all().outcome.peak
    numbers = (flow, planner, workspaces, times, device, baseline)
    return Analysis(graph, expected, undefined, *numbers, call, cost)


def _measured(
    graph: JointGraph, workspaces: Workspaces, device: torch.device
) -> tuple[JointGraph, Workspaces]:
    """What is expected to run of a graph, and what the operators of both hold."""
    expected = expected_to_run(graph, undefined_tangents(graph))
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
