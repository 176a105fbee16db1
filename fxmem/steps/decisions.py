"""From the planner's choice to the plan's words, and back."""

from __future__ import annotations

import textwrap
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence, Set
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch

from fxmem.analysis.categories import category, workspace_name
from fxmem.analysis.dataflow import NOISE_CEILING, Dataflow, Value
from fxmem.analysis.liveness import MemoryTimeline
from fxmem.analysis.simulate import Drop, Simulator
from fxmem.basics.errors import BudgetInfeasibleError, PlanMismatchError
from fxmem.basics.sizes import evaluate
from fxmem.basics.tables import WIDTH, clean, cut
from fxmem.basics.units import format_bytes
from fxmem.codes.seeds import step_seed
from fxmem.graphs.graph import JointGraph, module_name, operator_name, source_line, type_text
from fxmem.graphs.operators import refusal
from fxmem.planning.certificates import Judge, certificate, optimizer_in_8_bits
from fxmem.planning.plan import (
    Certificate,
    CodeOf,
    Decision,
    GradientNoise,
    Key,
    LiveTensor,
    NoiseOf,
    PeakPoint,
    Plan,
    Remedy,
    fingerprint,
    keys,
)
from fxmem.planning.planner import Choice
from fxmem.reports.report import least_text, line_of, remedy_lines
from fxmem.reports.words import Words, type_of

if TYPE_CHECKING:
    from fxmem.steps.analyze import Analysis
    from fxmem.steps.options import Options


def explain(
    analysis: Analysis,
    options: Options,
    budget: int | None,
    choice: Choice,
    before: MemoryTimeline,
    line: MemoryTimeline,
    floor: int | None,
) -> Plan:
    """Everything that was decided and predicted, as a value that outlives the graph.

    before: the step with everything kept.  line: the step as it will run.
    """
    graph, flow = analysis.expected, analysis.flow
    bindings = graph.bindings()
    whole = analysis.whole or analysis
    symbols = {s.name: s.hint for s in graph.symbols.values()}
    peak = line.peak(bindings).nbytes
    tight = floor is not None or peak > (peak if budget is None else budget)
    return Plan(
        budget=peak if budget is None else budget,
        asked=options.budget.asked,
        reserve=options.reserve + options.library,
        predicted_peak=peak,
        baseline_peak=analysis.baseline_peak,
        keep_all_peak=before.peak(bindings).nbytes,
        resident=flow.resident,
        floor=floor,
        seconds=whole.flow.seconds,
        added_seconds=choice.outcome.seconds + flow.seconds - whole.flow.seconds,
        gap=_gap(flow, choice),
        decisions=tuple(_decisions(analysis, choice)),
        symbols=symbols,
        valid_for={name: (min(size, 2), size) for name, size in symbols.items()},
        peak=peak_point(line, graph, bindings),
        before=peak_point(before, whole.expected, bindings),
        fingerprint=fingerprint(graph),
        step=fingerprint(whole.expected),
        device=str(analysis.device),
        model=analysis.call.title,
        torch_version=torch.__version__,
        cost_model=analysis.cost.name,
        certificate=_certificate(analysis, options, budget, choice, line, tight)
        if tight or choice.outcome.recomputed
        else None,
        noise=_noise(analysis, choice),
    )


def _noise(analysis: Analysis, choice: Choice) -> GradientNoise | None:
    allotment = analysis.allotment
    if allotment is None:
        return None
    kept = kept_codes(analysis.planner.simulator, choice.kept)
    names = {node.name: key for key, node in keys(analysis.expected).items()}
    groups: dict[str, list[tuple[float, ...]]] = defaultdict(list)
    for parameter, numbers in allotment.by_parameter(kept):
        groups[NoiseOf.group_of(parameter)].append(numbers)
    biased = allotment.biased(kept)
    return GradientNoise(
        ceiling=allotment.ceiling,
        predicted=sum(map(allotment.share, sorted(kept))),
        tier="bounded" if biased else "unbiased" if kept else "exact",
        parameters=tuple(
            NoiseOf(name, len(found), *map(sum, zip(*found, strict=True)))
            for name, found in groups.items()
        ),
        codes=tuple(
            CodeOf(names[source], encoding) for source, (_, encoding) in allotment.chosen.items()
        ),
        backwards=allotment.statistics.backwards
        if analysis.base is None
        else analysis.base.backwards,
        bounded=allotment.bounded,
    )


def kept_codes(simulator: Simulator, kept: Set[int]) -> frozenset[str]:
    """The sources of the lossy codes among what is kept."""
    operands = (simulator.operand(v) for v in simulator.lossy & kept)
    return frozenset(simulator.flow.values[v].node.name for v in operands)


def _gap(flow: Dataflow, choice: Choice) -> float | None:
    """How much longer the step takes than the bound of every plan's says, as a share of that."""
    added = choice.outcome.seconds
    if choice.bound is None:
        return None if added else 0.0
    return (added - choice.bound) / (flow.seconds + choice.bound)


# -- One decision for each value that the backward needs ---------------------------------------------


def _decisions(analysis: Analysis, choice: Choice) -> list[Decision]:
    flow, simulator = analysis.flow, analysis.planner.simulator
    names = {node: key for key, node in keys(analysis.expected).items()}
    words = Words(analysis.expected)
    runs = Counter(i for i, _ in choice.outcome.recomputed)
    read = simulator.read_without(simulator.codes - choice.kept)
    drops: dict[int, tuple[int, ...]] = {}
    for v, j in sorted(choice.drops):
        drops[v] = (*drops.get(v, ()), j)
    found = []
    for v in sorted(simulator.readable):
        value = flow.values[v]
        kept = v in choice.kept or v in simulator.always_kept
        if value.node.target is step_seed or (value.code and not kept):
            continue  # what would read it reads what it is made of
        remade = runs[value.producer] > 0 and not kept
        if value.node not in names or not (remade or (kept and (v in read or runs))):
            continue
        dropped = () if kept else drops.get(v, ())
        made = _decision(flow, v, names[value.node], kept, runs, dropped, v in read)
        if value.noise and analysis.allotment is not None:
            source = flow.values[simulator.operand(v)].node
            name = analysis.allotment.chosen[source.name][1]
            reason = f"{name} in place of {type_text(source.meta.get('val'))}"
            made = replace(made, reason=reason, error=analysis.allotment.share(source.name))
        found.append(replace(made, type=words.named(made.type)))
    return list(_with_codes(flow, found))


def _with_codes(flow: Dataflow, decisions: list[Decision]) -> Iterator[Decision]:
    """A code takes the place of all bytes of its tensor, where nothing else is said of that."""
    values = {value.node.name: value for value in flow.values}
    decided = {decision.value for decision in decisions}
    for decision in decisions:
        value = values[decision.value]
        if value.code:
            operand = flow.values[flow.operators[value.producer].reads[-1]]
            nbytes = value.nbytes if operand.node.name in decided else operand.nbytes
            decision = replace(decision, nbytes=nbytes, seconds=value.keeping)
        yield decision


def _decision(
    flow: Dataflow,
    v: int,
    key: Key,
    kept: bool,
    runs: Counter[int],
    dropped: tuple[int, ...],
    read: bool,
) -> Decision:
    value = flow.values[v]
    operator = flow.operators[value.producer]
    times = 0 if kept else runs[value.producer]
    return Decision(
        key=key,
        value=value.node.name,
        type=type_text(value.node.meta.get("val")),
        module=module_name(value.node),
        source=source_line(value.node),
        action="recompute" if not kept else "encode" if value.code else "keep",
        nbytes=value.nbytes,
        nbytes_stored=value.nbytes if kept else 0,
        seconds=operator.seconds * times,
        reason=_code_reason(value) if value.code else _reason(operator, kept, read),
        times=times,
        dropped=dropped,
    )


def _code_reason(value: Value) -> str:
    source = value.node.all_input_nodes[0]
    return f"in place of {type_text(source.meta.get('val'))}"


def _reason(operator: Any, kept: bool, read: bool) -> str:
    if kept:
        why = refusal(operator.node)
        if why:
            return f"not to run twice: {why}"
        return "read by the backward" if read else "breaks a chain of recomputation"
    return "costs less than its bytes" if read else "needed to make another value again"


# -- The peak in the user's words --------------------------------------------------------------------


def peak_point(line: MemoryTimeline, graph: JointGraph, bindings: dict[Any, int]) -> PeakPoint:
    peak = line.peak(bindings)
    step = line.steps[peak.step]
    node = step.node
    live: Counter[str] = Counter()
    for storage in line.live_at(peak.step):
        live[category(storage, graph, line)] += evaluate(storage.nbytes, bindings)
    live[workspace_name(step)] += evaluate(step.workspace, bindings)
    return PeakPoint(
        nbytes=peak.nbytes,
        operator=operator_name(node) if node else "end of the forward",
        module=module_name(node) if node else "",
        source=source_line(node) if node else "",
        phase=step.phase,
        step=peak.step,
        steps=len(line.steps),
        live={name: nbytes for name, nbytes in live.items() if nbytes},
    )


def _certificate(
    analysis: Analysis,
    options: Options,
    budget: int | None,
    choice: Choice,
    line: MemoryTimeline,
    tight: bool,
) -> Certificate:
    """Why the peak is not lower; what would lower it only where the bytes are ``tight``."""
    graph, simulator = analysis.expected, analysis.planner.simulator
    bindings = graph.bindings()
    peak = line.peak(bindings)
    tensors = list(_live_tensors(line, peak.step, graph, bindings))
    remedies: list[Remedy] = []
    if tight:
        judge = Judge(graph, simulator, choice.kept, choice.drops, choice.outcome, budget)
        remedies += judge.remedies(tensors)
        if options.budget.kind != "baseline_share":  # which the reserve is no part of
            remedies += optimizer_in_8_bits(options.reserve, options.outside.in_8_bits)
    return certificate(simulator, peak.nbytes, tensors, remedies)


def _live_tensors(
    line: MemoryTimeline, step: int, graph: JointGraph, bindings: dict[Any, int]
) -> Iterator[LiveTensor]:
    """Every storage with bytes that is live at a step, and what its operator works in."""
    words = Words(graph)
    for storage in line.live_at(step):
        if nbytes := evaluate(storage.nbytes, bindings):
            node = storage.node
            info = graph.inputs.get(node.name) if storage.resident else None
            yield LiveTensor(
                name=info.name if info else node.name,
                type=words.named(type_of(storage)),
                nbytes=nbytes,
                category=category(storage, graph, line),
                module=module_name(node),
                source=source_line(node),
            )
    running = line.steps[step]
    if nbytes := evaluate(running.workspace, bindings):
        name = operator_name(running.node) if running.node else "loss"
        module = module_name(running.node) if running.node else ""
        source = source_line(running.node) if running.node else ""
        yield LiveTensor(name, "", nbytes, workspace_name(running), module, source)


# -- Infeasible ------------------------------------------------------------------------------------------


def too_large(plan: Plan) -> BudgetInfeasibleError:
    """The error for a plan that was loaded: nobody looked whether another one fits."""
    why = " + ".join(f"{format_bytes(n)} {name}" for name, n in plan.peak.live.items())
    return BudgetInfeasibleError(
        f"the plan that was given peaks at {format_bytes(plan.predicted_peak)} "
        f"({plan.predicted_peak} bytes); the budget is {format_bytes(plan.budget)} "
        f"({plan.budget} bytes).\n"
        f"  try: optimize without plan=, which looks for a plan that fits; or a budget of "
        f"{plan.predicted_peak} bytes",
        smallest_peak=plan.predicted_peak,
        best_plan=plan,
        why=why,
    )


def infeasible(plan: Plan) -> BudgetInfeasibleError:
    """The error that names the smallest budget that works and what stands in the way."""
    parts = sorted(plan.peak.live.items(), key=lambda item: -item[1])
    why = [" + ".join(f"{format_bytes(nbytes)} {name}" for name, nbytes in parts)]
    said, remedies = clean(least_text(plan)), []
    least = _entry("least", textwrap.wrap(said, _ROOM)) if said else []
    if plan.certificate is not None:
        why += _tensor_lines(plan.certificate)
        remedies = remedy_lines(plan.certificate, _ROOM)
    where = f"{plan.peak.operator}, {plan.peak.source or plan.peak.module or 'unknown line'}"
    asked = format_bytes(plan.budget or 0)
    reserve = f", after a reserve of {format_bytes(plan.reserve)}" if plan.reserve else ""
    budget = f'a budget of {plan.predicted_peak} bytes ("{plan.predicted_peak}B")'
    lines = [
        f"smallest plan peaks at {format_bytes(plan.predicted_peak)} "
        f"({plan.predicted_peak} bytes); the budget is {asked} ({plan.budget} bytes{reserve}).",
        *_entry("floor", [*textwrap.wrap(why[0], _ROOM), *why[1:]]),
        *_entry("at", [where]),
        *least,
        *_entry("try", [budget, *remedies]),
        *_entry("note", ['error.best_plan holds that plan; on_infeasible="best" applies it']),
    ]
    return BudgetInfeasibleError(
        "\n".join(lines),
        smallest_peak=plan.predicted_peak,
        best_plan=plan,
        why="\n".join(why),
    )


_LABEL = 10
_ROOM = WIDTH - _LABEL


def _entry(label: str, lines: Sequence[str]) -> list[str]:
    """A labelled line and those that go on below it."""
    first, *more = lines
    return [f"  {label:<{_LABEL - 2}}{first}", *(" " * _LABEL + line for line in more)]


def _tensor_lines(known: Certificate) -> list[str]:
    """``512.0 KiB  mm_28 f32[512,256], outputs, model.py:471``: the largest; then the rest."""
    rows = [
        (t.nbytes, [f"{t.name} {t.type.replace(', ', ',')}".strip(), t.category, line_of(t)])
        for t in known.tensors
    ]
    if known.others:
        rows.append((known.others_nbytes, [f"{known.others} more"]))
    return [
        cut(f"{format_bytes(nbytes):>9}  {clean(', '.join(filter(None, words)))}", _ROOM)
        for nbytes, words in rows
    ]


# -- Back from a plan --------------------------------------------------------------------------------------


def find_choice(analysis: Analysis, plan: Plan) -> Choice:
    """The choice that a loaded plan describes, judged anew: its claims count for nothing.

    Raises ``PlanMismatchError`` for a plan of another graph, or one that asks what is not legal.
    """
    graph, planner, flow = analysis.expected, analysis.planner, analysis.flow
    mine = fingerprint(graph)
    if plan.fingerprint != mine:
        raise PlanMismatchError(
            f"the plan is for another step: {plan.model}, fingerprint {plan.fingerprint}; this is "
            f"{analysis.call.title}, fingerprint {mine}.\n"
            "  try: plan this model, mode and these input shapes again, or pass those of the plan"
        )
    nodes = keys(graph)
    values = {value.node: v for v, value in enumerate(flow.values)}
    kept: set[int] = set()
    drops: set[Drop] = set()
    for decision in plan.decisions:
        node = nodes.get(decision.key)
        if node is None or node not in values:
            raise PlanMismatchError(f"the plan speaks of {decision.key}, which this step lacks")
        v = values[node]
        if decision.action in ("keep", "encode"):
            kept.add(v)
        elif v in planner.simulator.always_kept or v in planner.must_keep:
            raise PlanMismatchError(
                f"the plan makes {decision.value} again, which must not run twice: "
                f"{refusal(node) or 'the model asks for it to be saved'}"
            )
        else:
            drops.update((v, j) for j in decision.dropped)
    decided = {values[nodes[d.key]] for d in plan.decisions}
    simulator = planner.simulator
    forgotten = simulator.read_without(simulator.codes - kept) - simulator.always_kept - decided
    if forgotten:
        names = sorted(flow.values[v].node.name for v in forgotten)
        raise PlanMismatchError(f"the plan says nothing of {', '.join(names[:5])}")
    if simulator.noise_of_keeping(kept) > NOISE_CEILING:
        raise PlanMismatchError(
            "the codes of the plan add more noise to gradients than is allowed\n"
            "  try: a higher noise=, or optimize without plan="
        )
    return planner.choice(kept, drops)
