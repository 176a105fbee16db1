"""One step of code, run and measured."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import accumulate
from typing import Any

import torch
from torch import fx

from fxmem import _torch
from fxmem._torch.inductor import for_real
from fxmem.basics.sizes import evaluate, hint
from fxmem.graphs.graph import OutputKind, output_values
from fxmem.graphs.measure import cpu_phases, measure
from fxmem.steps.analyze import Analysis
from fxmem.steps.backward import Coded, Phases
from fxmem.steps.pipeline import Planned


def measured(coded: Coded, analysis: Analysis) -> Phases:
    """One step, run on what it was captured with; on zeros where that was a stand-in."""
    devices = [analysis.device] if analysis.device.type == "cuda" else []
    with for_real(), torch.random.fork_rng(devices=devices):
        given = [
            _real(node, analysis.examples)
            for node in coded.split.forward.graph.find_nodes(op="placeholder")
        ]
        for at in coded.written:
            given[at] = _copied(given[at])
        step = _Step(coded, given)
        step.forward()  # once more than measured: libraries allocate what they keep
        step.backward()
        phases = _on_the_cpu if analysis.device.type == "cpu" else _by_counters
        return Phases(*phases(step), loss_outside(coded.planned))


def _on_the_cpu(step: _Step) -> tuple[int, int, int]:
    first, second = cpu_phases(step.forward, step.backward)
    held = sum(first)
    return max(accumulate(first), default=0), held, held + max(accumulate(second), default=0)


def _by_counters(step: _Step) -> tuple[int, int, int]:
    first, second = measure(step.forward), measure(step.backward)
    start = first.at_start
    return first.peak - start, second.at_start - start, second.peak - start


class _Step:
    """A forward and its backward, with what the caller holds meanwhile."""

    def __init__(self, coded: Coded, given: list[Any]) -> None:
        self.coded, self.given = coded, given
        self.saved: dict[str, Any] = {}
        self.results: list[Any] = []

    def forward(self) -> None:
        halves = self.coded.split
        returned = list(self.coded.forward(list(self.given)))
        names = [n.name if isinstance(n, fx.Node) else "" for n in output_values(halves.forward)]
        cut, kinds = halves.num_forward_outputs, halves.output_kinds
        self.saved = dict(zip(names[cut:], returned[cut:], strict=True))
        results = zip(returned, kinds, strict=False)
        self.results = [v for v, kind in results if kind is OutputKind.RESULT]

    def backward(self) -> None:
        undefined = set(self.coded.planned.undefined)
        args = [
            self.saved.pop(node.name)
            if node.name in self.saved
            else None
            if node.name in undefined
            else _real(node, {})
            for node in self.coded.split.backward.graph.find_nodes(op="placeholder")
        ]
        self.saved.clear()
        gradients = self.coded.backward(args)
        del gradients
        self.results.clear()


def _real(node: fx.Node, examples: Mapping[str, Any]) -> Any:
    """A value for an input: the example's, or zeros."""
    example, value = examples.get(node.name), node.meta.get("val")
    if not isinstance(value, torch.Tensor):
        return 0 if value is None else hint(value)  # none: a size that became a constant
    if isinstance(example, torch.Tensor) and not _torch.is_fake(example) and not example.is_meta:
        return example.detach()
    size, strides = [*map(hint, value.shape)], [*map(hint, value.stride())]
    found = torch.empty_strided(size, strides, dtype=value.dtype, device=value.device)
    return found.zero_()


def _copied(tensor: torch.Tensor) -> torch.Tensor:
    """As it lies, gaps included."""
    like = torch.empty_strided(
        tensor.shape, tensor.stride(), dtype=tensor.dtype, device=tensor.device
    )
    return like.copy_(tensor)


def loss_outside(planned: Planned) -> int:
    """Bytes that a loss outside the step holds at the boundary of its halves."""
    line = planned.line
    return int(evaluate(line.steps[line.boundary].workspace, planned.graph.bindings()))
