"""The closed forms of a graph that runs, and for which sizes they hold.

A trace holds where the relations between sizes hold that it took for granted: a kernel that serves
small batches alone, a dimension of 1 that broadcasts.  Other sizes need a trace of their own.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import sympy
import torch

from fxmem._torch import ShapeGuard, shape_guards
from fxmem.analysis.categories import category, workspace_name
from fxmem.analysis.forms import Bytes, Forms, Work
from fxmem.analysis.liveness import MemoryTimeline, Storage, timeline
from fxmem.analysis.scaling import Scaling
from fxmem.basics.polynomials import Ranges
from fxmem.basics.sizes import in_known_sizes, storage_keys, symbol, symbols
from fxmem.graphs.graph import JointGraph
from fxmem.graphs.partition import Split
from fxmem.graphs.workspace import Workspaces
from fxmem.planning.certificates import scores_of_losses

Bounds = Mapping[str, tuple[int, "int | None"]]
"""Symbol -> the smallest and the largest size that matter; None: no largest."""

SMALLEST = 2
"""Tracing takes sizes of 0 and 1 for constants."""


@dataclass(frozen=True)
class Assumption:
    """Why a trace does not hold for all sizes."""

    relation: Any
    place: str

    def __str__(self) -> str:
        return f"{self.relation}" + (f" ({self.place})" if self.place else "")


@dataclass
class Trace:
    """One traced step.

    fixed: symbols that are constants here.  assumed: what its sizes must meet.  here: the sizes that
    it was traced at.  rename: sizes of its fake tensors -> expressions in the symbols.  near: are sizes
    close to those that operators were measured at?  how: of how many operators the workspace is
    "constant", "fitted", "measured" or "estimated".
    """

    forms: Forms
    line: MemoryTimeline
    graph: JointGraph
    run: Split
    here: dict[str, int]
    fixed: dict[str, int]
    assumed: list[Assumption]
    rename: Rename
    near: Callable[[Mapping[sympy.Symbol, int]], bool] = lambda _: True
    how: dict[str, int] = field(default_factory=dict)

    @property
    def ranges(self) -> dict[str, tuple[int, int | None]]:
        return {str(s): r for s, r in self.forms.ranges.items()}

    def covers(self, sizes: Mapping[str, int]) -> bool:
        """Do the closed forms hold for these sizes?"""
        if any(sizes[name] != size for name, size in self.fixed.items()):
            return False
        for name, (low, high) in self.ranges.items():
            if sizes[name] < low or (high is not None and sizes[name] > high):
                return False
        return all(_holds(a.relation, symbols(sizes)) for a in self.assumed)

    def by_form(self, sizes: Mapping[str, int]) -> int:
        """Bytes at the peak as the closed forms say."""
        return self.forms.by_form(symbols(sizes))

    def peak_at(self, sizes: Mapping[str, int]) -> int:
        """Bytes at the peak; far from the sizes of the trace every operator is measured anew."""
        there = symbols(sizes)
        return self.forms.peak_at(there, near=self.near(there))


UNDEFINED = AssertionError, ZeroDivisionError
"""What functions of torch's in a relation raise at numbers that no size can be, as a remainder by zero."""


def _holds(relation: Any, sizes: Mapping[sympy.Symbol, int]) -> bool:
    try:
        return bool(relation.subs(sizes) if isinstance(relation, sympy.Basic) else relation)
    except UNDEFINED:
        return False


def traced(
    graph: JointGraph,
    run: Split,
    table: Workspaces,
    device: torch.device,
    here: Mapping[str, int],
    bounds: Bounds | None = None,
) -> Trace:
    """The closed forms of a graph and its two halves as they run, calibrated at the sizes ``here``.

    bounds: further limits on the sizes for which they need to hold.
    """
    guards, spans = shape_guards(graph.module)
    rename = Rename(graph)
    ranges = _ranges(rename, spans, bounds or {})
    sizes = symbols(here)
    assumed = _assumed(guards, rename)
    scaling = Scaling(
        table,
        device,
        ranges,
        {s: sizes[s] for s in ranges},
        rename,
        lambda point: all(_holds(a.relation, point) for a in assumed),
    )
    for module in (run.forward, run.backward):
        scaling.look_at(module.graph)
    line = _renamed(timeline(run, scaling), rename, scaling.storages())
    fixed = {name: size for name, size in here.items() if symbol(name) not in ranges}
    forms = Forms(_bytes(line, graph), _work(line, scaling), ranges, sizes)
    how = Counter(form.how for form in scaling.forms.values())
    return Trace(
        forms, line, graph, run, dict(here), fixed, assumed, rename, scaling.covers, dict(how)
    )


class Rename:
    """Sizes of a traced graph -> expressions in the user's names."""

    def __init__(self, graph: JointGraph) -> None:
        self.names = {raw: symbol(info.name) for raw, info in graph.symbols.items()}
        self._known: dict[Any, Any] = {}

    def __call__(self, size: Any) -> Any:
        expression = in_known_sizes(size) if isinstance(size, torch.SymInt) else size
        if isinstance(expression, int):
            return expression
        if expression not in self._known:
            found = sympy.expand(expression.xreplace(self.names))
            self._known[expression] = int(found) if found.is_Integer else found
        return self._known[expression]


def as_compiled(trace: Trace) -> Trace:
    """The trace that also assumes what has been assumed of its sizes since, as code was made of it."""
    guards, _ = shape_guards(trace.graph.module)
    return replace(trace, assumed=_assumed(guards, trace.rename))


def _ranges(rename: Rename, spans: Mapping[Any, tuple[int, Any]], bounds: Bounds) -> Ranges:
    """Each symbol's smallest and largest size, of all dimensions that have its name."""
    found: dict[sympy.Symbol, tuple[int, int | None]] = {}
    for raw, name in rename.names.items():
        low, high = found.get(name, (SMALLEST, None))
        for least, most in (spans.get(raw, (SMALLEST, None)), bounds.get(str(name), (0, None))):
            low = max(low, least)
            high = most if high is None else high if most is None else min(high, most)
        found[name] = (low, high)
    return found


def _assumed(guards: list[ShapeGuard], rename: Rename) -> list[Assumption]:
    """The relations that are not always true, each once."""
    found: dict[str, Assumption] = {}
    for guard in guards:
        relation = guard.relation.xreplace(rename.names)
        known = set(rename.names.values())
        if relation in (sympy.true, True) or not relation.free_symbols <= known:
            continue
        if not _always(relation):
            found.setdefault(str(relation), Assumption(relation, guard.place))
    return list(found.values())


def _always(relation: Any) -> bool:
    """Is it true of all sizes, as far as is seen at once?"""
    if relation.count_ops() >= 20:
        return False
    try:
        return sympy.simplify(relation) in (sympy.true, True)
    except UNDEFINED:  # sympy tries numbers, zero first
        return False


def _renamed(line: MemoryTimeline, rename: Rename, real: Mapping[int, Any]) -> MemoryTimeline:
    """The timeline in the user's symbols, storages as large as real ones."""
    for storage in line.storages:
        storage.nbytes = rename(real.get(storage.key, storage.nbytes))
    steps = [
        step if step.node is not None else type(step)(None, step.phase, rename(step.workspace))
        for step in line.steps
    ]
    return MemoryTimeline(steps, line.storages)


def _bytes(line: MemoryTimeline, graph: JointGraph) -> list[Bytes]:
    scores = scores_in(graph)
    return [Bytes(s.nbytes, s.born, s.dies, kind_of(s, graph, line, scores)) for s in line.storages]


def scores_in(graph: JointGraph) -> set[int]:
    """Keys of the storages that hold the scores of a loss over classes, or their gradients."""
    return {key for node in scores_of_losses(graph) for key in storage_keys(node.meta.get("val"))}


def kind_of(storage: Storage, graph: JointGraph, line: MemoryTimeline, scores: set[int]) -> str:
    known = category(storage, graph, line)
    return "logits and loss" if storage.key in scores and not storage.resident else known


def _work(line: MemoryTimeline, scaling: Scaling) -> list[Work]:
    found = []
    for step in line.steps:
        form = scaling.forms.get(step.node) if step.node is not None else None
        exact = _measure(scaling, step.node) if form is not None and form.call is not None else None
        loose = form is not None and form.how == "measured"
        found.append(Work(step.workspace, workspace_name(step), exact, loose))
    return found


def _measure(scaling: Scaling, node: Any) -> Callable[[Any], int | None]:
    return lambda sizes: scaling.nbytes_at(node, sizes)
