"""Operator times, measured on the device at hand: each distinct operator signature runs a few times.

The operands are throwaway tensors of the same shapes and strides.  On the CPU each operator is timed
twice.  Many times in a row: what it takes when it is made again, next to its reader.  And each time
after other memory was written: what it takes in the unchanged step, which finds neither its operands
in the smallest caches nor its code.
"""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import fx
from torch.utils import _pytree as pytree

from fxmem._torch import as_in_a_step
from fxmem.analysis.cost import CostModel
from fxmem.graphs.graph import is_view
from fxmem.graphs.workspace import (
    Call,
    cache_path,
    can_measure,
    has_workspace,
    on_stand_ins,
    save_table,
)

_LEAST_RUNS, _MOST_RUNS = 5, 25
_SECONDS = 0.01
"""How long one signature is measured either way, between the least and the most runs."""

_TICK, _MOST_IN_A_ROW = 5e-5, 50
"""Seconds that are long enough for a clock: faster operators run so often between two looks at it."""

_SCRATCH = 24 << 20
"""Bytes written between two runs: more than the caches of a core, and most of what cores share."""


class Times(NamedTuple):
    """Seconds of an operator: called in a row, and in the unchanged step."""

    hot: float
    cold: float


@dataclass
class MeasuredCost:
    """Times by operator signature; what was not measured takes what ``otherwise`` says."""

    otherwise: CostModel
    table: dict[str, Times] = field(default_factory=dict)
    name: str = "measured"

    def seconds(self, node: fx.Node) -> float:
        """Seconds of one node; a view takes none."""
        if node.op != "call_function" or is_view(node):
            return 0.0
        known = self._known(node)
        return self.otherwise.seconds(node) if known is None else known.hot

    def waiting(self, node: fx.Node) -> float:
        """Seconds that the unchanged step waits for memory, and those of its views."""
        known = self._known(node)
        return 0.0 if known is None else max(0.0, known.cold - self.seconds(node))

    def _known(self, node: fx.Node) -> Times | None:
        return self.table.get(Call.of_node(node).signature) if _is_call(node) else None


def _is_call(node: fx.Node) -> bool:
    """Does the node call an operator that can be timed?  Views can."""
    return has_workspace(node) or (is_view(node) and isinstance(node.target, torch._ops.OpOverload))


def measured_cost(graph: fx.Graph, device: torch.device, otherwise: CostModel) -> MeasuredCost:
    """Times of all operators of a graph: from the file, or measured now and written there."""
    table = load_timings(device)
    known = len(table)
    for node in graph.nodes:
        if _is_call(node):
            call = Call.of_node(node)
            if call.signature not in table and can_measure(call, device):
                times = time_call(call, device)
                if times is not None:
                    table[call.signature] = times
    if len(table) > known:
        save_table(table, timings_path(device))
    return MeasuredCost(otherwise, table)


# -- Measuring ---------------------------------------------------------------------------------------


def time_call(call: Call, device: torch.device) -> Times | None:
    """Median times of an operator on throwaway tensors; None where it refuses them."""
    return on_stand_ins(_time, call, device)


def _time(call: Call, device: torch.device) -> Times:
    args, kwargs = call.stand_ins(device)
    for leaf in pytree.tree_leaves((args, kwargs)):
        _scatter(leaf)
    operator = getattr(call.target, "_op", call.target)

    def run(times: int) -> None:
        for _ in range(times):
            operator(*args, **kwargs)

    with as_in_a_step():
        run(1)  # the first call makes handles and tunes kernels
        if device.type == "cuda":
            took = _time_cuda(run)
            return Times(took, took)
        return Times(_time_in_a_row(run), _time_apart(run))


_NORMAL = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def _scatter(operand: Any) -> None:
    """Numbers as a step has them: a pool of equal ones never changes its mind, and is thrice as fast."""
    if isinstance(operand, torch.Tensor) and operand.dtype in _NORMAL:
        whole = operand.new_empty(0).set_(operand.untyped_storage())
        whole.normal_()


def _time_in_a_row(run: Callable[[int], None]) -> float:
    took = _clocked(run, 1)
    in_a_row = max(1, min(_MOST_IN_A_ROW, round(_TICK / max(took, 1e-7))))
    return _median(lambda: _clocked(run, in_a_row), in_a_row)


def _time_apart(run: Callable[[int], None]) -> float:
    scratch = _scratch()

    def once() -> float:
        scratch.zero_()
        return _clocked(run, 1)

    return _median(once, 1)


def _clocked(run: Callable[[int], None], times: int) -> float:
    """Seconds of each of so many calls."""
    began = time.perf_counter()
    run(times)
    return (time.perf_counter() - began) / times


def _median(clock: Callable[[], float], times: int) -> float:
    found: list[float] = []
    while len(found) < _LEAST_RUNS or (len(found) < _MOST_RUNS and sum(found) * times < _SECONDS):
        found.append(clock())
    return statistics.median(found)


def _time_cuda(run: Callable[[int], None]) -> float:
    """Launches follow each other as in a step: the slower of launching and running counts."""
    times: list[float] = []
    for _ in range(_LEAST_RUNS):
        torch.cuda.synchronize()
        began = time.perf_counter()
        run(_MOST_RUNS)
        torch.cuda.synchronize()
        times.append((time.perf_counter() - began) / _MOST_RUNS)
    return statistics.median(times)


@lru_cache(maxsize=1)
def _scratch() -> torch.Tensor:
    return torch.zeros(_SCRATCH, dtype=torch.uint8)


# -- The table on disk -------------------------------------------------------------------------------


def timings_path(device: torch.device) -> Path:
    return cache_path(device, "timings")


def load_timings(device: torch.device) -> dict[str, Times]:
    """The table on disk; an unreadable file counts as empty, since it can be measured again."""
    try:
        table: dict[str, Any] = json.loads(timings_path(device).read_text())
        return {str(k): Times(float(hot), float(cold)) for k, (hot, cold) in table.items()}
    except (OSError, ValueError, AttributeError, TypeError):
        return {}
