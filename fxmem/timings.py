"""Operator times, measured on the device at hand: each distinct operator signature runs a few times.

The operands are throwaway tensors of the same shapes and strides.  Before each run other memory is
written, so that operands lie where a step finds them: not in the smallest caches.
"""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import fx

from fxmem.cost import CostModel
from fxmem.graph import is_view
from fxmem.workspace import (
    Call,
    cache_path,
    can_measure,
    has_workspace,
    on_stand_ins,
    save_table,
)

_LEAST_RUNS, _MOST_RUNS = 5, 25
_SECONDS = 0.01
"""How long one signature is measured, between the least and the most runs."""

_SCRATCH = 8 << 20
"""Bytes written between two runs."""


@dataclass
class MeasuredCost:
    """Seconds by operator signature; what was not measured takes what ``otherwise`` says."""

    otherwise: CostModel
    table: dict[str, float] = field(default_factory=dict)
    name: str = "measured"

    def seconds(self, node: fx.Node) -> float:
        """Seconds of one node; a view takes none."""
        if node.op != "call_function" or is_view(node):
            return 0.0
        if has_workspace(node):
            known = self.table.get(Call.of_node(node).signature)
            if known is not None:
                return known
        return self.otherwise.seconds(node)


def measured_cost(graph: fx.Graph, device: torch.device, otherwise: CostModel) -> MeasuredCost:
    """Times of all operators of a graph: from the file, or measured now and written there."""
    table = load_timings(device)
    known = len(table)
    for node in graph.nodes:
        if has_workspace(node):
            call = Call.of_node(node)
            if call.signature not in table and can_measure(call, device):
                seconds = time_call(call, device)
                if seconds is not None:
                    table[call.signature] = seconds
    if len(table) > known:
        save_table(table, timings_path(device))
    return MeasuredCost(otherwise, table)


# -- Measuring ---------------------------------------------------------------------------------------


def time_call(call: Call, device: torch.device) -> float | None:
    """Median seconds of an operator on throwaway tensors; None where it refuses them."""
    return on_stand_ins(_time, call, device)


def _time(call: Call, device: torch.device) -> float:
    args, kwargs = call.stand_ins(device)
    operator = getattr(call.target, "_op", call.target)

    def run() -> None:
        operator(*args, **kwargs)

    run()  # the first call makes handles and tunes kernels
    return (_time_cuda if device.type == "cuda" else _time_cpu)(run)


def _time_cpu(run: Callable[[], None]) -> float:
    scratch = _scratch()
    times: list[float] = []
    while len(times) < _LEAST_RUNS or (len(times) < _MOST_RUNS and sum(times) < _SECONDS):
        scratch.zero_()
        began = time.perf_counter()
        run()
        times.append(time.perf_counter() - began)
    return statistics.median(times)


def _time_cuda(run: Callable[[], None]) -> float:
    """Launches follow each other as in a step: the slower of launching and running counts."""
    times: list[float] = []
    for _ in range(_LEAST_RUNS):
        torch.cuda.synchronize()
        began = time.perf_counter()
        for _ in range(_MOST_RUNS):
            run()
        torch.cuda.synchronize()
        times.append((time.perf_counter() - began) / _MOST_RUNS)
    return statistics.median(times)


@lru_cache(maxsize=1)
def _scratch() -> torch.Tensor:
    return torch.zeros(_SCRATCH, dtype=torch.uint8)


# -- The table on disk -------------------------------------------------------------------------------


def timings_path(device: torch.device) -> Path:
    return cache_path(device, "timings")


def load_timings(device: torch.device) -> dict[str, float]:
    """The table on disk; an unreadable file counts as empty, since it can be measured again."""
    try:
        table: dict[str, Any] = json.loads(timings_path(device).read_text())
        return {str(k): float(seconds) for k, seconds in table.items()}
    except (OSError, ValueError, AttributeError, TypeError):
        return {}
