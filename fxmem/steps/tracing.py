"""A training step traced with symbolic sizes, on fake tensors and without a budget."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from fxmem._torch import collector_paused
from fxmem.analysis.dynamic import Bounds, Names, marked
from fxmem.graphs.capture import StepCall, capture
from fxmem.graphs.standins import at_sizes, stand_in_call
from fxmem.graphs.workspace import load_workspaces, save_workspaces
from fxmem.steps.analyze import cleaned
from fxmem.steps.rewrite import as_run
from fxmem.steps.symbolic import SMALLEST, Trace, traced


@collector_paused()
def trace(
    call: StepCall,
    names: Names,
    sizes: Mapping[str, int],
    device: torch.device,
    bounds: Bounds | None = None,
) -> Trace:
    """Trace a step at the given sizes; nothing large is allocated."""
    call = at_sizes(stand_in_call(call), names, sizes)
    free = {
        place: {d: name for d, name in dims.items() if sizes[name] >= SMALLEST}
        for place, dims in names.items()
    }
    with capture(marked(call, free), names, guarded=False) as captured:
        graph, table = cleaned(captured.graph, load_workspaces(device), device)
        graph, _, run, table = as_run(graph, table, device)
        found = traced(graph, run, table, device, sizes, bounds)
        save_workspaces(table, device)
    return found
