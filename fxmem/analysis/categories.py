"""What the bytes that are live at a step are to the user."""

from __future__ import annotations

from fxmem.analysis.liveness import MemoryTimeline, Step, Storage
from fxmem.graphs.graph import JointGraph, Role

LOSS = "loss outside the model"

_ROLES = {Role.PARAMETER: "parameters", Role.BUFFER: "buffers", Role.INPUT: "inputs"}


def category(storage: Storage, graph: JointGraph, line: MemoryTimeline) -> str:
    """Parameters, buffers, inputs, constants, gradients, outputs, saved activations or transients."""
    if storage.resident:
        info = graph.inputs.get(storage.node.name)
        return _ROLES.get(info.role, "inputs") if info else "constants"
    if storage.held:
        late = line.steps[storage.born].phase == "backward"
        return "gradients" if late else "outputs"
    if storage.born < line.boundary < storage.dies:
        return "saved activations"
    return "transients"


def workspace_name(step: Step) -> str:
    return "operator workspace" if step.node is not None else LOSS
