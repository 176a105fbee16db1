"""From a traced step to its ``Liveness``: rows and points as plain values, and further traces on demand."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import sympy
import torch

from fxmem._torch import collector_paused
from fxmem._torch.eager import compiling
from fxmem.analysis.baseline import eager_peak
from fxmem.analysis.dynamic import Bounds, Names, sizes_by_name
from fxmem.analysis.liveness import Step, Storage
from fxmem.basics.errors import CaptureError, FixedSizeError, FxmemError
from fxmem.basics.sizes import evaluate, storage_keys, symbols, tensors_in
from fxmem.graphs.capture import StepCall
from fxmem.graphs.graph import (
    Role,
    dtype_text,
    is_view,
    module_name,
    operator_name,
    source_line,
)
from fxmem.graphs.partition import Split
from fxmem.graphs.standins import at_sizes
from fxmem.graphs.workspace import load_workspaces, save_workspaces
from fxmem.steps.inventory import Liveness, Peak, Point, Row, SymbolInfo
from fxmem.steps.symbolic import SMALLEST, Trace, kind_of, scores_in
from fxmem.steps.tracing import trace


@dataclass
class Footprint:
    """A step for any sizes: the traces that were made of it so far."""

    call: StepCall
    names: Names
    device: torch.device
    bounds: Bounds = field(default_factory=dict)
    traces: list[Trace] = field(default_factory=list)

    def trace_for(self, sizes: Mapping[str, int]) -> Trace:
        """A trace whose forms hold for these sizes; a new one if there is none."""
        for known in self.traces:
            if known.covers(sizes):
                return known
        made = trace(self.call, self.names, sizes, self.device, self.bounds)
        self.traces.append(made)
        return made

    def peak_at(self, sizes: Mapping[str, int]) -> int:
        return self.trace_for(sizes).peak_at(sizes)

    def unchanged_at(self, sizes: Mapping[str, int]) -> int:
        """Bytes at the peak of the user's own step.  Raises ``FxmemError`` where it cannot be run."""
        call = at_sizes(self.call, self.names, sizes)
        table = load_workspaces(self.device)
        try:
            with torch.enable_grad(), compiling():
                peak = eager_peak(call, table, self.device)
        except FxmemError:
            raise
        except Exception as error:
            raise FxmemError(
                f"the model cannot be run on fake tensors: {type(error).__name__}: {error}"
            ) from error
        save_workspaces(table, self.device)
        return peak


@collector_paused()
def liveness_of(
    call: StepCall, names: Names, device: torch.device, bounds: Bounds | None = None
) -> Liveness:
    """The liveness of a step at its example's sizes."""
    here = sizes_by_name(call, names)
    footprint = Footprint(call, names, device, bounds or {})
    traced = footprint.trace_for(here)
    notes = _notes_of(traced)
    # A size that is special (0 or 1, or one that a kernel looks for) hides the formula of the others.
    for sizes in _more_general(here, traced):
        try:
            other = footprint.trace_for(sizes)
        except CaptureError as error:
            fixed = _fixed(footprint, traced, sizes, error)
            if len(traced.fixed) == len(here):
                raise fixed from error
            notes = [fixed.short, *notes[len(traced.fixed) :]]  # no other size is traced by itself
            return _liveness(footprint, traced, notes, fixed)
        if len(other.fixed) < len(traced.fixed):
            notes = [*_special(traced, other), *_notes_of(other)]
            traced = other
            break
    return _liveness(footprint, traced, notes)


def _more_general(here: Mapping[str, int], traced: Trace) -> list[dict[str, int]]:
    if not traced.fixed:
        return []
    return [
        {**here, **{n: max(size + more, SMALLEST) for n, size in traced.fixed.items()}}
        for more in (2, 5)
    ]


def _fixed(
    footprint: Footprint, traced: Trace, tried: Mapping[str, int], error: CaptureError
) -> FixedSizeError:
    """What to say of sizes that are constants in the user's code, as a trace at others shows."""
    infos = _symbol_infos(footprint, traced)
    sizes = ", ".join(f"{n}={size}" for n, size in traced.fixed.items())
    places = ", ".join(place for n in traced.fixed for place in infos[n].where)
    others = ", ".join(f"{n}={tried[n]}" for n in traced.fixed)
    numbers = " or ".join(str(size) for size in dict.fromkeys(traced.fixed.values()))
    return FixedSizeError(
        f"{' and '.join(traced.fixed)} cannot vary: the step works with {sizes} alone.\n"
        f"  read    {places}\n"
        f"  found   with {others}: {error.reason or error}\n"
        f"  at      {error.place or 'unknown line'}\n"
        f"  wanted  code and buffers whose sizes follow from the inputs, as x.new_zeros(...) does\n"
        f"  try     -1 or x.shape[...] in place of {numbers} there, or dynamic_shapes={{...}} with "
        "other dimensions",
        fixed=sizes,
        reason=error.reason,
        place=error.place,
    )


def _special(traced: Trace, other: Trace) -> list[str]:
    found = []
    for name, size in traced.fixed.items():
        if name in other.fixed:
            continue
        why = (
            "tracing takes sizes of 0 and 1 for constants, because they broadcast"
            if size < SMALLEST
            else "the step does otherwise for that size alone"
        )
        found.append(
            f"{name}: the example's {size} is special ({why}); the forms were traced at "
            f"{name}={other.here[name]}, and peak_at({name}={size}) by itself"
        )
    return found


def _notes_of(traced: Trace) -> list[str]:
    found = []
    for name, size in traced.fixed.items():
        why = (
            "sizes of 0 and 1 are constants to tracing"
            if size < SMALLEST
            else "the step works with this size alone"
        )
        found.append(f"{name} is fixed at {size}: {why}; other sizes are traced by themselves")
    if traced.assumed:
        held = "; ".join(map(str, traced.assumed))
        found.append(f"the forms hold where {held}; other sizes are traced by themselves")
    if count := traced.how.get("estimated"):
        found.append(
            f"workspaces of {count} operators are estimated from smaller ones: they cannot be "
            f"measured here"
        )
    if count := traced.how.get("measured"):
        found.append(
            f"workspaces of {count} operators follow no polynomial: peak bounds what was seen, "
            f"peak_at measures them at the size asked for"
        )
    return found


def _liveness(
    footprint: Footprint, traced: Trace, notes: list[str], fixed: FixedSizeError | None = None
) -> Liveness:
    forms, line = traced.forms, traced.line
    here = symbols(traced.here)
    live = forms.live(here)
    points = [_point(step, int(n)) for step, n in zip(line.steps, live, strict=True)]
    peaks = tuple(
        Peak(r.expression, r.nbytes, r.step, points[r.step], r.rules, forms.categories(r.step))
        for r in forms.rulers
    )
    return Liveness(
        model=type(footprint.call.model).__name__,
        device=str(footprint.device),
        symbols=_symbol_infos(footprint, traced),
        peak=forms.peak,
        peaks=peaks,
        points=tuple(points),
        storages=tuple(_Rows(traced, peaks[0].step).rows()),
        assumptions=tuple(map(str, traced.assumed)),
        notes=tuple(notes),
        rough=bool(traced.how.get("measured")),
        fixed={} if fixed is None else dict.fromkeys(traced.fixed, fixed),
        monomials=tuple(forms.monomials.index),
        live=forms.coefficients,
        peak_of=footprint.peak_at,
        unchanged_of=footprint.unchanged_at,
    )


def _symbol_infos(footprint: Footprint, traced: Trace) -> dict[str, SymbolInfo]:
    places: dict[str, list[str]] = defaultdict(list)
    for place, dims in footprint.names.items():
        for dim, name in dims.items():
            places[name].append(f"{place}.shape[{dim}]")
    found = {}
    for name, size in traced.here.items():
        low, high = traced.ranges.get(name, (size, size))
        found[name] = SymbolInfo(name, size, low, high, tuple(places[name]))
    return found


def _point(step: Step, nbytes: int) -> Point:
    node = step.node
    if node is None:
        return Point("", "end of the forward", "", "", step.phase, nbytes)
    return Point(
        node.name, operator_name(node), module_name(node), source_line(node), step.phase, nbytes
    )


class _Rows:
    """The storages of a trace as rows."""

    def __init__(self, traced: Trace, peak: int) -> None:
        self.traced = traced
        self.peak = peak
        self.here = symbols(traced.here)
        self.users = _readers(traced.run)
        self.scores = scores_in(traced.graph)
        self.seen: Counter[tuple[str, str]] = Counter()

    def rows(self) -> list[Row]:
        return [self._row(s) for s in self.traced.line.storages if s.nbytes != 0]

    def _row(self, storage: Storage) -> Row:
        node, graph = storage.node, self.traced.graph
        info = graph.inputs.get(node.name) if storage.resident else None
        name = info.name if info else node.name
        module = name.rpartition(".")[0] if info and _is_state(info.role) else module_name(node)
        place = (module, operator_name(node))
        ordinal = self.seen[place]
        self.seen[place] += 1
        tensor = _tensor_of(storage)
        size: Any = storage.nbytes
        return Row(
            node=name,
            operator=info.role.value if info else operator_name(node),
            shape=tuple(str(self.traced.rename(s)) for s in tensor.shape)
            if tensor is not None
            else (),
            dtype=dtype_text(tensor.dtype) if tensor is not None else "",
            bytes=sympy.sympify(size),
            nbytes=evaluate(size, self.here),
            born=storage.born,
            dies=storage.dies,
            at_peak=storage.born <= self.peak <= storage.dies,
            category=kind_of(storage, graph, self.traced.line, self.scores),
            aliases=tuple(storage.aliases),
            users=tuple(self.users.get(storage.key, ())),
            module=module,
            source=source_line(node),
            ordinal=ordinal,
        )


def _is_state(role: Role) -> bool:
    return role in (Role.PARAMETER, Role.BUFFER)


def _tensor_of(storage: Storage) -> torch.Tensor | None:
    """The tensor in the storage; of several results, the one that has it."""
    leaves = list(tensors_in(storage.node.meta.get("val")))
    mine = [t for t in leaves if storage.key in storage_keys(t)]
    return max(mine, key=lambda t: t.ndim, default=None)


def _readers(run: Split) -> dict[int, list[str]]:
    """Storage key -> names of the operators that read it, views aside."""
    found: dict[int, dict[str, None]] = defaultdict(dict)
    for module in (run.forward, run.backward):
        for node in module.graph.nodes:
            if node.op != "call_function" or is_view(node):
                continue
            for source in node.all_input_nodes:
                for key in storage_keys(source.meta.get("val")):
                    found[key][node.name] = None
    return {key: list(names) for key, names in found.items()}
