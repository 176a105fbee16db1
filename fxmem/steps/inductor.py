"""A planned step as Inductor's code: the plan's graph in Inductor's operators, cut anew and measured.

Inductor fuses, so two things differ from the plan.  What a kernel can make again at no cost is not
saved: a minimum cut of the rewritten graph says what that is, with every twin where the plan put it.
And what is never written to memory does not count, so the peak that was predicted operator by operator
is only about right: one step is run and measured, the prediction corrected, and the step planned once
more if it does not fit, or if there is much room left.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import replace
from fractions import Fraction
from itertools import accumulate
from typing import Any

import torch
from torch import fx

from fxmem import _torch
from fxmem._torch import inductor as _torch_inductor
from fxmem.basics.budget import Budget
from fxmem.basics.sizes import evaluate, hint
from fxmem.basics.units import format_bytes
from fxmem.codes.encodings import ENCODERS, pool_offsets
from fxmem.codes.planes import fusible
from fxmem.graphs.capture import tag_backward
from fxmem.graphs.graph import (
    JointGraph,
    OutputKind,
    Role,
    is_backward,
    output_values,
)
from fxmem.graphs.measure import cpu_allocations, measure
from fxmem.graphs.partition import Split, split
from fxmem.passes.tangents import UndefinedTangentsPass
from fxmem.steps.analyze import Analysis
from fxmem.steps.backward import Backward, Coded, op_by_op
from fxmem.steps.compile_errors import explained
from fxmem.steps.options import Options
from fxmem.steps.pipeline import Planned
from fxmem.steps.validity import Validity, decided

log = logging.getLogger(__name__)

MARGIN = 0.01
"""Of the budget, left free by a second plan: what it will peak at is known from the first one's error."""

ROOM = 0.1
"""Of the budget: with more left, a plan that costs time is worth a second one."""


class Inductor:
    """Code for both halves of a planned step; see ``Code`` in backward.py."""

    def __init__(self, planned: Planned) -> None:
        with explained("taking the step apart into Inductor's operators", planned.graph.module):
            self.graph = _in_inductors_operators(planned)
            self.saved = _worth_saving(self.graph)
            self.split = self._halves(self.graph)
        self.strides: _torch_inductor.Strides = {}

    def forward(self) -> _torch.BoxedCallable:
        module = _copy(self.split.forward)
        with explained("making code of the step's forward with Inductor", module):
            code, self.strides = _torch_inductor.inductor(
                module,
                backward=False,
                static_inputs=_static(module, self.graph),
                visible=range(self.split.num_forward_outputs),
                strides={},
            )
        return code

    def backward_for(self, undefined: tuple[str, ...]) -> fx.GraphModule:
        if not undefined:
            return _copy(self.split.backward)
        return self._halves(UndefinedTangentsPass(undefined).apply(self.graph)).backward

    def backward(self, module: fx.GraphModule) -> _torch.BoxedCallable:
        module = _copy(module)
        with explained("making code of the step's backward with Inductor", module):
            code, _ = _torch_inductor.inductor(
                module,
                backward=True,
                static_inputs=_static(module, self.graph),
                visible=range(len(output_values(module))),
                strides=self.strides,
            )
        return code

    def _halves(self, graph: JointGraph) -> Split:
        nodes = {node.name: node for node in graph.nodes}
        halves = split(graph, [nodes[name] for name in self.saved if name in nodes])
        return replace(halves, backward=_torch_inductor.just_in_time(halves.backward))


def _in_inductors_operators(planned: Planned) -> JointGraph:
    graph = _codes_marked(planned.functional)
    module = _torch_inductor.decomposed(graph.module, fusible)
    _torch_inductor.read_offsets_of_pools(module, pool_offsets)
    if not any(map(_is_twin, graph.nodes)):
        # They would take what is made again for what it was made of first.
        _torch_inductor.optimize_joint(module)
        tag_backward(module)
    return replace(graph, module=module).verified()


_CODE = "fxmem_code"


def _codes_marked(graph: JointGraph) -> JointGraph:
    """With a mark on the codes that the forward makes; what they become inherits it."""
    graph = graph.copy()
    for node in graph.nodes:
        if node.target in ENCODERS and not is_backward(node):
            node.meta["custom"] = {**node.meta.get("custom", {}), _CODE: True}
    return graph


def _codes(graph: JointGraph) -> list[str]:
    """Names of the codes: of what was marked, what the backward reads."""
    marked = [n for n in graph.nodes if _CODE in n.meta.get("custom", {})]
    return [node.name for node in marked if any(map(is_backward, node.users))]


def _is_twin(node: fx.Node) -> bool:
    return is_backward(node) and "fxmem_origin" in node.meta


def _worth_saving(graph: JointGraph) -> list[str]:
    """Names of the values to save: codes, which are few bytes, and what the cut says beside them."""
    cut = _torch_inductor.min_cut(
        graph.copy().module, graph.num_forward_outputs, _static(graph.module, graph), is_backward
    )
    return _reached(graph, {*_codes(graph), *cut})


def _reached(graph: JointGraph, saved: set[str]) -> list[str]:
    """Those that the backward reads where all of them are saved, in program order."""
    gradients = output_values(graph.module)[graph.num_forward_outputs :]
    found = {node for node in gradients if isinstance(node, fx.Node)}
    for node in reversed(list(graph.nodes)):
        if is_backward(node) or (node in found and node.name not in saved):
            found.update(node.all_input_nodes)
    return [n.name for n in graph.nodes if n in found and n.name in saved and not is_backward(n)]


def _static(module: fx.GraphModule, graph: JointGraph) -> list[int]:
    """Places of the parameters and buffers, which lie where they are."""
    given = module.graph.find_nodes(op="placeholder")
    known = {n.name for n in graph.placeholders(Role.PARAMETER, Role.BUFFER)}
    return [place for place, node in enumerate(given) if node.name in known]


def _copy(module: fx.GraphModule) -> fx.GraphModule:
    """A module whose graph may be changed."""
    graph, copies = fx.Graph(), dict[fx.Node, fx.Node]()
    graph.output(graph.graph_copy(module.graph, copies))
    for node, other in zip(module.graph.nodes, graph.nodes, strict=True):
        other.meta = dict(node.meta)
    return _torch.graph_module(module, graph)


# -- One step, measured ------------------------------------------------------------------------------


def _compiled(planned: Planned, analysis: Analysis, graph: JointGraph) -> Coded:
    code = Inductor(planned)
    forward = code.forward()
    coded = Coded(planned, code.split, forward, Backward(planned, graph, code))
    with explained("running the step as Inductor's code", planned.graph.module):
        peak = _peak(coded, analysis)
    plan = planned.plan
    budget = max(plan.predicted_peak, peak) if plan.smallest else plan.budget
    plan = replace(plan, predicted_peak=peak, budget=budget)
    return replace(coded, planned=replace(planned, plan=plan))


def _peak(coded: Coded, analysis: Analysis) -> int:
    """Bytes that one step holds at its peak: run on what it was captured with, or on zeros."""
    devices = [analysis.device] if analysis.device.type == "cuda" else []
    planned = coded.planned
    with _torch_inductor.for_real(), torch.random.fork_rng(devices=devices):
        given = [
            _real(node, analysis.examples)
            for node in coded.split.forward.graph.find_nodes(op="placeholder")
        ]

        def step() -> None:
            _step(coded, list(given), _loss_outside(planned), analysis.device)

        step()  # once more than measured: libraries allocate what they keep
        if analysis.device.type == "cpu":
            added = max(accumulate(cpu_allocations(step)[0]), default=0)
        else:
            found = measure(step)
            added = found.peak - found.at_start
    return planned.plan.resident + added


def _step(coded: Coded, given: list[Any], loss_outside: int, device: torch.device) -> None:
    """A forward and its backward, with what the caller holds meanwhile."""
    halves = coded.split
    returned = list(coded.forward(given))
    names = [n.name if isinstance(n, fx.Node) else "" for n in output_values(halves.forward)]
    cut = halves.num_forward_outputs
    saved = dict(zip(names[cut:], returned[cut:], strict=True))
    kinds = halves.output_kinds
    held = [v for v, kind in zip(returned, kinds, strict=False) if kind is OutputKind.RESULT]
    del returned
    if loss_outside:
        torch.empty(loss_outside, dtype=torch.uint8, device=device)
    undefined = set(coded.planned.undefined)
    args = [
        saved.pop(node.name)
        if node.name in saved
        else None
        if node.name in undefined
        else _real(node, {})
        for node in halves.backward.graph.find_nodes(op="placeholder")
    ]
    saved.clear()
    gradients = coded.backward(args)
    del gradients, held


def _real(node: fx.Node, examples: Mapping[str, Any]) -> Any:
    """A value for an input: the example's, or zeros."""
    example, value = examples.get(node.name), node.meta["val"]
    if not isinstance(value, torch.Tensor):
        return hint(value)
    if isinstance(example, torch.Tensor) and not _torch.is_fake(example) and not example.is_meta:
        return example.detach()
    size, strides = [*map(hint, value.shape)], [*map(hint, value.stride())]
    found = torch.empty_strided(size, strides, dtype=value.dtype, device=value.device)
    return found.zero_()


def _loss_outside(planned: Planned) -> int:
    """Bytes that a loss outside the step holds at the boundary of its halves."""
    line = planned.line
    return int(evaluate(line.steps[line.boundary].workspace, planned.graph.bindings()))


# -- The step that fits ------------------------------------------------------------------------------


def inductor_step(
    analysis: Analysis,
    options: Options,
    graph: JointGraph,
    found: tuple[Planned, Validity | None],
    here: Mapping[str, int],
) -> tuple[Coded, Validity | None]:
    """Code for a planned step that keeps its budget as measured; operator by operator if no code does.

    found, here: what was decided, and the sizes that may change as they are now.
    """
    planned, validity = found
    first = _compiled(planned, analysis, graph)
    log.info("%s", _said(planned, first))
    tried = [(first, planned, validity)]
    target = _second_target(planned, first, options)
    if target is not None:
        other, other_validity = _planned_again(analysis, options, planned, target, here)
        if other.plan.decisions != planned.plan.decisions:
            second = _compiled(other, analysis, graph)
            log.info("%s", _said(other, second))
            tried.append((second, other, other_validity))
    fitting = [one for one in tried if _fits(one[0])]
    if not fitting:
        log.warning(
            "Inductor's code for the step peaks at %s, more than the budget of %s, so the step runs "
            "operator by operator",
            format_bytes(min(one[0].planned.plan.predicted_peak for one in tried)),
            format_bytes(planned.plan.budget),
        )
        return op_by_op(planned, graph), validity
    best, was, valid = min(fitting, key=lambda one: one[0].planned.plan.added_seconds)
    if valid is not None:
        # Larger sizes come with a larger error, those that are served with this one at most.
        more = best.planned.plan.predicted_peak - was.plan.predicted_peak
        valid = replace(valid, limit=valid.limit - max(more, 0))
    return best, valid


def _planned_again(
    analysis: Analysis, options: Options, planned: Planned, target: int, here: Mapping[str, int]
) -> tuple[Planned, Validity | None]:
    """The step planned for other bytes, operator by operator, under the same budget."""
    plan = planned.plan
    asked = Budget("bytes", Fraction(target + plan.reserve), plan.asked)
    again = replace(options, budget=asked, on_infeasible="best")
    found, validity = decided(analysis, again, here, memory=planned.memory is not None)
    return replace(found, plan=replace(found.plan, budget=plan.budget)), validity


def _second_target(planned: Planned, first: Coded, options: Options) -> int | None:
    """Bytes to plan for once more, operator by operator; None where the first plan may stay."""
    plan, measured = planned.plan, first.planned.plan.predicted_peak
    if plan.smallest or options.plan is not None or plan.predicted_peak > plan.budget:
        return None
    room = plan.budget - measured
    if room < 0:
        return max(int(plan.predicted_peak + room - MARGIN * plan.budget), 1)
    if room > ROOM * plan.budget and plan.added_seconds > 0:
        return int(plan.predicted_peak + room - ROOM / 2 * plan.budget)
    return None


def _fits(coded: Coded) -> bool:
    plan = coded.planned.plan
    return plan.predicted_peak <= plan.budget


def _said(planned: Planned, coded: Coded) -> str:
    operator, measured = planned.plan.predicted_peak, coded.planned.plan.predicted_peak
    return (
        f"Inductor's code peaks at {format_bytes(measured)}, measured; operator by operator "
        f"{format_bytes(operator)} were predicted, the budget is {format_bytes(planned.plan.budget)}"
    )
