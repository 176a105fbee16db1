"""Liveness: when each storage of a training step is born and dies, and so what is live at each step.

The unit is the untyped storage: a tensor and its views are one.  Steps are the operators of the
forward, one boundary, and the operators of the backward.  A storage is live from the step that
makes it to the last step that reads it, both included, because the generated code drops each name
on the line of its last use.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Protocol

import numpy as np
import sympy
from torch import fx

from fxmem._torch import storage_key
from fxmem.basics.sizes import Size, evaluate, storage_keys, storages_in
from fxmem.graphs.graph import (
    OutputKind,
    bytes_of_loss,
    is_backward,
    is_held_tangent,
    output_values,
)
from fxmem.graphs.partition import Split


@dataclass
class Storage:
    """Bytes that exist once.

    node: name of the node that makes it.  aliases: other nodes that look at it.
    born, dies: steps; a resident storage (input, parameter, buffer) has born = -1.
    held: the caller keeps it to the end of the training step.  key: its identity in the graph.
    """

    node: fx.Node
    nbytes: Size
    born: int
    dies: int
    aliases: list[str] = field(default_factory=list)
    held: bool = False
    key: int = -1

    @property
    def resident(self) -> bool:
        return self.born < 0


@dataclass(frozen=True)
class Step:
    """One operator that runs.  workspace: bytes that it allocates and frees inside.

    The boundary between the two graphs has no operator: there the caller computes the loss, if the
    step does not, and that is its workspace.
    """

    node: fx.Node | None
    phase: str
    workspace: Size = 0


@dataclass(frozen=True)
class Peak:
    """The largest live bytes and where they occur."""

    nbytes: int
    step: int


@dataclass(frozen=True)
class MemoryTimeline:
    """Steps in program order and the storages that live across them."""

    steps: list[Step]
    storages: list[Storage]

    def resident(self, bindings: dict[sympy.Symbol, int]) -> int:
        """Bytes of parameters, buffers and inputs: there before, during and after the step."""
        return sum(evaluate(s.nbytes, bindings) for s in self.storages if s.resident)

    def live_bytes(self, bindings: dict[sympy.Symbol, int]) -> np.ndarray:
        """int64[steps]: bytes held while each step runs, workspaces included."""
        change = np.zeros(len(self.steps) + 1, dtype=np.int64)
        for storage in self.storages:
            nbytes = evaluate(storage.nbytes, bindings)
            change[max(storage.born, 0)] += nbytes
            change[storage.dies + 1] -= nbytes
        workspace = [evaluate(step.workspace, bindings) for step in self.steps]
        return np.cumsum(change)[:-1] + np.array(workspace, dtype=np.int64)

    def peak(self, bindings: dict[sympy.Symbol, int]) -> Peak:
        live = self.live_bytes(bindings)
        step = int(live.argmax())
        return Peak(int(live[step]), step)

    @cached_property
    def boundary(self) -> int:
        """The step between forward and backward."""
        return next(i for i, step in enumerate(self.steps) if step.phase == "boundary")

    def with_less_between(self, nbytes: int) -> MemoryTimeline:
        """The same with so many bytes fewer at the boundary, of what is held outside of the step."""
        steps = list(self.steps)
        between = steps[self.boundary]
        steps[self.boundary] = replace(between, workspace=between.workspace - nbytes)
        return replace(self, steps=steps)

    def live_at(self, step: int) -> list[Storage]:
        """The storages that are live while the step runs, residents included."""
        return [s for s in self.storages if s.born <= step <= s.dies]


class HoldsBytes(Protocol):
    """What knows how many bytes an operator holds beyond its inputs and outputs."""

    def nbytes(self, node: fx.Node) -> Size: ...


def timeline(split: Split, workspaces: HoldsBytes) -> MemoryTimeline:
    """Lifetimes over the two graphs that run."""
    return _Recorder(workspaces).record(split)


def _loss_outside(backward: fx.GraphModule) -> Size:
    """Bytes that the caller's loss holds beside the gradients that it sends into the step."""
    tangents = [n for n in backward.graph.find_nodes(op="placeholder") if is_backward(n)]
    return sum((bytes_of_loss(n) for n in tangents if n.users), start=0)


class _Recorder:
    """Walks both graphs once; ``table`` maps a storage key to its record."""

    def __init__(self, workspaces: HoldsBytes) -> None:
        self.workspaces = workspaces
        self.steps: list[Step] = []
        self.table: dict[int, Storage] = {}

    def record(self, split: Split) -> MemoryTimeline:
        self._residents(split.forward)
        self._run(split.forward, "forward")
        self.steps.append(Step(None, "boundary", _loss_outside(split.backward)))
        self._forward_outputs(split)
        self._tangents(split.backward)
        self._run(split.backward, "backward")
        self._gradients(split.backward)
        return MemoryTimeline(self.steps, list(self.table.values()))

    @property
    def now(self) -> int:
        return len(self.steps) - 1

    def _residents(self, forward: fx.GraphModule) -> None:
        for node in forward.graph.find_nodes(op="placeholder"):
            self._touch(node, born=-1)

    def _run(self, module: fx.GraphModule, phase: str) -> None:
        for node in module.graph.nodes:
            if node.op == "get_attr":
                self._touch(node, born=-1)
            if node.op != "call_function":
                continue
            self.steps.append(Step(node, phase, self.workspaces.nbytes(node)))
            for source in node.all_input_nodes:
                self._touch(source, born=self.now)
            self._touch(node, born=self.now)

    def _touch(self, node: fx.Node, born: int) -> None:
        """The node's storages are in use now; those not seen before are born."""
        for key, nbytes in storages_in(node.meta.get("val")).items():
            storage = self.table.get(key)
            if storage is None:
                self.table[key] = Storage(node, nbytes, born, max(born, 0), held=born < 0, key=key)
                continue
            storage.dies = max(storage.dies, self.now)
            if node.name != storage.node.name and node.name not in storage.aliases:
                storage.aliases.append(node.name)

    def _forward_outputs(self, split: Split) -> None:
        outputs = output_values(split.forward)
        for index, node in enumerate(outputs):
            if not isinstance(node, fx.Node):
                continue
            for key in storage_keys(node.meta.get("val")):
                storage = self.table[key]
                storage.dies = max(storage.dies, self.now)
                if index < split.num_forward_outputs:
                    storage.held |= split.output_kinds[index] is OutputKind.RESULT

    def _tangents(self, backward: fx.GraphModule) -> None:
        for node in backward.graph.find_nodes(op="placeholder"):
            if is_backward(node) and node.users:  # nobody sends one that nobody reads
                self._touch(node, born=self.now)
                if is_held_tangent(node):
                    self.table[storage_key(node.meta["val"])].held = True

    def _gradients(self, backward: fx.GraphModule) -> None:
        for node in output_values(backward):
            if isinstance(node, fx.Node):
                for key in storage_keys(node.meta.get("val")):
                    self.table[key].held = True
        for storage in self.table.values():
            if storage.held:
                storage.dies = self.now
