"""A planned step as Inductor's code: the plan's graph in Inductor's operators, cut anew and measured.

Inductor fuses, so two things differ from the plan.  What a kernel can make again at no cost is not
saved: a minimum cut of the rewritten graph says what that is, with every twin where the plan put it.
And what is never written to memory does not count, so the peak that was predicted operator by operator
is only about right.  Inductor's schedule of the kernels, which takes little of the time that their code
takes, says what that will peak at (fused.py); the step is planned again until it will fit without much
room left.  Then one step of the code is run and measured.  If it does not keep the budget after all, the
step is planned and compiled once more.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass, replace
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
from fxmem.graphs.workspace import Workspaces
from fxmem.passes.tangents import UndefinedTangentsPass
from fxmem.planning.plan import Plan
from fxmem.steps.analyze import Analysis
from fxmem.steps.backward import Backward, Coded, op_by_op, without_unread
from fxmem.steps.compile_errors import explained
from fxmem.steps.decisions import infeasible
from fxmem.steps.fused import peak_of
from fxmem.steps.options import Options
from fxmem.steps.pipeline import Planned
from fxmem.steps.validity import Validity, decided

log = logging.getLogger(__name__)

MARGIN = 0.01
"""Of the budget, left free by a further plan: what it will peak at is known from the last one's error."""

ROOM = 0.1
"""Of the budget: with more left, a plan that costs time is worth a further one."""

UNSURE = 0.05
"""Of the budget: so far above it, what is foreseen is not tried."""

PLANS = 3
"""So many are lowered at most, before code is made of one."""


class Inductor:
    """Code for both halves of a planned step; see ``Code`` in backward.py."""

    def __init__(self, planned: Planned) -> None:
        with explained("taking the step apart into Inductor's operators", planned.graph.module):
            self.graph = _in_inductors_operators(planned)
            self.saved = _worth_saving(self.graph)
            self.split = self._halves(self.graph)
        self.strides: _torch_inductor.Strides = {}
        self.lowered: list[Any] = []
        self._backwards: dict[tuple[str, ...], fx.GraphModule] = {}

    def forward(self) -> _torch.BoxedCallable:
        module = _copy(self.split.forward)
        with explained("making code of the step's forward with Inductor", module):
            code, self.strides = _torch_inductor.inductor(
                module,
                **self._of_forward(module),
                lowered=self.lowered[0] if self.lowered else None,
            )
        return code

    def backward_for(self, undefined: tuple[str, ...]) -> fx.GraphModule:
        if undefined not in self._backwards:
            half = self.split.backward
            if undefined:
                half = self._halves(UndefinedTangentsPass(undefined).apply(self.graph)).backward
            self._backwards[undefined] = without_unread(_copy(half))
        return self._backwards[undefined]

    def backward(self, module: fx.GraphModule) -> _torch.BoxedCallable:
        module = _copy(module)
        with explained("making code of the step's backward with Inductor", module):
            code, _ = _torch_inductor.inductor(
                module,
                **self._of_backward(module, self.strides),
                lowered=self.lowered[1] if self.lowered else None,
            )
            self.lowered = []
        return code

    def foreseen(self, planned: Planned, table: Workspaces, device: torch.device) -> int | None:
        """Bytes that the step will peak at; None where torch has code of it already.

        table: gets what it lacks about operators.
        """
        module = _copy(self.split.forward)
        first = _torch_inductor.schedule(module, **self._of_forward(module))
        if first is None:
            return None
        backward = self.backward_for(planned.undefined)
        module = _copy(backward)
        how = self._of_backward(module, first.strides)
        second = _torch_inductor.schedule(module, **how)
        if second is None:
            return None
        self.lowered = [first.lowered, second.lowered]
        halves = replace(self.split, backward=backward)
        added = peak_of(first, second, halves, table, _loss_outside(planned), device)
        return planned.plan.resident + added

    def _of_forward(self, module: fx.GraphModule) -> dict[str, Any]:
        return {
            "backward": False,
            "static_inputs": _static(module, self.graph),
            "visible": range(self.split.num_forward_outputs),
            "strides": {},
        }

    def _of_backward(
        self, module: fx.GraphModule, strides: _torch_inductor.Strides
    ) -> dict[str, Any]:
        return {
            "backward": True,
            "static_inputs": _static(module, self.graph),
            "visible": range(len(output_values(module))),
            "strides": strides,
        }

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


def _compiled(tried: _Tried, analysis: Analysis, graph: JointGraph) -> Coded:
    planned, code = tried.planned, tried.code
    forward = code.forward()
    coded = Coded(planned, code.split, forward, Backward(planned, graph, code))
    with explained("running the step as Inductor's code", planned.graph.module):
        peak = _peak(coded, analysis)
    plan = planned.plan
    budget = max(plan.predicted_peak, peak) if plan.smallest else plan.budget
    plan = replace(plan, predicted_peak=peak, budget=budget)
    log.info("%s", _said(tried, peak))
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


@dataclass(frozen=True)
class _Tried:
    """A plan in Inductor's operators.  foreseen: bytes that its code will peak at, if that is known."""

    planned: Planned
    validity: Validity | None
    code: Inductor
    foreseen: int | None

    @property
    def plan(self) -> Plan:
        return self.planned.plan

    @property
    def fits(self) -> bool:
        return self.foreseen is None or self.foreseen <= self.plan.budget

    @property
    def is_hopeless(self) -> bool:
        """Is its code so much too large that none need be made?"""
        return self.foreseen is not None and self.foreseen > (1 + UNSURE) * self.plan.budget


def inductor_step(
    analysis: Analysis,
    options: Options,
    graph: JointGraph,
    found: tuple[Planned, Validity | None],
    here: Mapping[str, int],
) -> tuple[Coded, Validity | None]:
    """Code for a planned step that keeps its budget as measured; operator by operator if no code does.

    found, here: what was decided, and the sizes that may change as they are now.
    Raises ``BudgetInfeasibleError`` where operators do not, either.
    """
    planned = found[0]
    first = _before_code(analysis, options, found, here)
    if first.is_hopeless:
        return _without_code(options, graph, found, first.foreseen or 0)
    coded = [(_compiled(first, analysis, graph), first)]
    measured = coded[0][0].planned.plan
    if first.foreseen is None or not _fits(measured):
        second = _planned_again(
            analysis, options, planned, first.plan, measured.predicted_peak, here
        )
        if second is not None and second[0].plan.decisions != first.plan.decisions:
            last = _Tried(*second, Inductor(second[0]), None)
            coded.append((_compiled(last, analysis, graph), last))
    fitting = [one for one in coded if _fits(one[0].planned.plan)]
    if not fitting:
        least = min((one.planned.plan for one, _ in coded), key=lambda plan: plan.predicted_peak)
        return _without_code(options, graph, found, least.predicted_peak, least)
    best, tried = min(fitting, key=lambda one: one[0].planned.plan.added_seconds)
    valid = tried.validity
    if valid is not None:
        # Larger sizes come with a larger error, those that are served with this one at most.
        more = best.planned.plan.predicted_peak - tried.plan.predicted_peak
        limit = valid.limit if _fits(tried.plan) else tried.plan.predicted_peak
        valid = replace(valid, limit=limit - max(more, 0))
    return best, valid


def _without_code(
    options: Options,
    graph: JointGraph,
    found: tuple[Planned, Validity | None],
    peak: int,
    *measured: Plan,
) -> tuple[Coded, Validity | None]:
    """The step operator by operator, since Inductor's code of it peaks higher than the budget.

    peak: of its code, bytes.  measured: plans whose code was run.  Raises ``BudgetInfeasibleError`` with
    the smallest where operators do not keep the budget, either.
    """
    planned, validity = found
    if options.on_infeasible == "raise" and not _fits(planned.plan):
        raise infeasible(min([planned.plan, *measured], key=lambda plan: plan.predicted_peak))
    log.warning(
        "Inductor's code for the step peaks at %s, more than the budget of %s, so the step runs "
        "operator by operator",
        format_bytes(peak),
        format_bytes(planned.plan.budget),
    )
    return op_by_op(planned, graph), validity


def _before_code(
    analysis: Analysis,
    options: Options,
    found: tuple[Planned, Validity | None],
    here: Mapping[str, int],
) -> _Tried:
    """The plan to make code of: of those whose code will fit, the one that adds the least time."""
    if _may_stay(found[0].plan):
        return _Tried(*found, Inductor(found[0]), None)
    table = Workspaces(analysis.workspaces.table)
    seen: list[_Tried] = []
    next_one: tuple[Planned, Validity | None] | None = found
    while next_one is not None and len(seen) < PLANS:
        if any(next_one[0].plan.decisions == one.plan.decisions for one in seen):
            break
        code = Inductor(next_one[0])
        one = _Tried(*next_one, code, _foreseen(code, next_one[0], table, analysis.device))
        seen.append(one)
        if one.foreseen is None:
            break
        next_one = _planned_again(analysis, options, found[0], one.plan, one.foreseen, here)
    fitting = [one for one in seen if one.fits]
    if not fitting:
        return min(seen, key=lambda one: one.foreseen or 0)
    return min(fitting, key=lambda one: one.plan.added_seconds)


def _foreseen(
    code: Inductor, planned: Planned, table: Workspaces, device: torch.device
) -> int | None:
    try:
        return code.foreseen(planned, table, device)
    except Exception:  # to compile says what is wrong, if anything is but this look ahead
        log.info("the peak of Inductor's code cannot be foreseen", exc_info=True)
        return None


def _planned_again(
    analysis: Analysis,
    options: Options,
    first: Planned,
    plan: Plan,
    peak: int,
    here: Mapping[str, int],
) -> tuple[Planned, Validity | None] | None:
    """The step planned for other bytes, operator by operator, under the same budget.

    first: as it was planned for the budget.  plan, peak: what was tried last, and its code's peak.
    None where that may stay, or no other is allowed.
    """
    if first.plan.smallest or options.plan is not None or not _fits(first.plan):
        return None
    target = _target(plan, peak)
    if target is None:
        return None
    asked = Budget("bytes", Fraction(target + plan.reserve), plan.asked)
    again = replace(options, budget=asked, on_infeasible="best")
    found, validity = decided(analysis, again, here, memory=first.memory is not None)
    return replace(found, plan=replace(found.plan, budget=plan.budget)), validity


def _may_stay(plan: Plan) -> bool:
    """Does it cost nothing, with room for what code may take more?  Then it is only measured."""
    return plan.added_seconds <= 0 and plan.predicted_peak <= (1 - ROOM) * plan.budget


def _target(plan: Plan, peak: int) -> int | None:
    """Bytes to plan for, operator by operator, after a plan whose code peaks so; None if it may stay."""
    room = plan.budget - peak
    if room < 0:
        return max(int(plan.predicted_peak + room - MARGIN * plan.budget), 1)
    if room > ROOM * plan.budget and plan.added_seconds > 0:
        return int(plan.predicted_peak + room - ROOM / 2 * plan.budget)
    return None


def _fits(plan: Plan) -> bool:
    return plan.predicted_peak <= plan.budget


def _said(tried: _Tried, measured: int) -> str:
    foreseen = "" if tried.foreseen is None else f"{format_bytes(tried.foreseen)} were foreseen, "
    return (
        f"Inductor's code peaks at {format_bytes(measured)}, measured; {foreseen}operator by operator "
        f"{format_bytes(tried.plan.predicted_peak)} were predicted, "
        f"the budget is {format_bytes(tried.plan.budget)}"
    )
