"""A choice applied to the graph: what is made again, what is read as codes, and the graph as it runs."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import fx

from fxmem.analysis.dataflow import Dataflow
from fxmem.analysis.liveness import MemoryTimeline, timeline
from fxmem.basics.errors import VerificationError
from fxmem.graphs.graph import INSTEAD_OF_LOSS, JointGraph, Role, is_backward
from fxmem.graphs.partition import Split, split
from fxmem.graphs.workspace import Workspaces
from fxmem.passes.gradient_layouts import GradientLayoutsPass
from fxmem.passes.in_place import InPlacePass
from fxmem.passes.recompute import Recompute, RecomputePass
from fxmem.passes.tangents import UndefinedTangentsPass
from fxmem.passes.uncode import UncodePass, lossy_coders, plain_name, reader_of
from fxmem.planning.planner import Choice, Planner

if TYPE_CHECKING:
    from fxmem.steps.analyze import Analysis

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


def recompute_pass(flow: Dataflow, planner: Planner, choice: Choice) -> RecomputePass:
    """A choice over numbers as a pass over nodes."""
    operators, values = flow.operators, flow.values
    kept = choice.kept | planner.simulator.always_kept
    recomputed = (one for one in choice.outcome.recomputed if not _reads_no_code(flow, *one))
    return RecomputePass(
        tuple(
            Recompute(operators[i].node.name, operators[flow.num_forward + j].node.name)
            for i, j in recomputed
        ),
        frozenset(values[v].node.name for v in kept),
    )


def _reads_no_code(flow: Dataflow, i: int, j: int) -> bool:
    """Would a code be made for an operator that writes over what is decoded, and reads that alone?"""
    makes_code = any(flow.values[v].noise for v in flow.operators[i].makes)
    return makes_code and flow.operators[flow.num_forward + j].overwrites


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
    expected = expected_to_run(graph, undefined_tangents(graph))
    table = table.calibrated(expected.module.graph, device)
    backward = split(expected).backward
    run = Split(halves.forward, backward, halves.output_kinds, halves.num_forward_outputs)
    return graph, halves, run, table


def expected_to_run(graph: JointGraph, undefined: tuple[str, ...]) -> JointGraph:
    """The graph as it runs when these tangents are undefined."""
    graph = UndefinedTangentsPass(undefined).apply(graph)
    return InPlacePass().apply(GradientLayoutsPass().apply(graph))


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
