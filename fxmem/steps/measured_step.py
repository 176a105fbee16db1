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
from fxmem.graphs.measure import cpu_allocations, measure
from fxmem.steps.analyze import Analysis
from fxmem.steps.backward import Coded
from fxmem.steps.pipeline import Planned


def measured_peak(coded: Coded, analysis: Analysis) -> int:
    """Bytes that one step holds at its peak: run on what it was captured with, or on zeros."""
    devices = [analysis.device] if analysis.device.type == "cuda" else []
    planned = coded.planned
    with for_real(), torch.random.fork_rng(devices=devices):
        given = [
            _real(node, analysis.examples)
            for node in coded.split.forward.graph.find_nodes(op="placeholder")
        ]

        def step() -> None:
            _step(coded, list(given), loss_outside(planned), analysis.device)

        step()  # once more than measured: libraries allocate what they keep
        if analysis.device.type == "cpu":
            added = max(accumulate(cpu_allocations(step)[0]), default=0)
        else:
            found = measure(step)
            added = found.peak - found.at_start
    return planned.plan.resident + added


def _step(coded: Coded, given: list[Any], outside: int, device: torch.device) -> None:
    """A forward and its backward, with what the caller holds meanwhile."""
    halves = coded.split
    returned = list(coded.forward(given))
    names = [n.name if isinstance(n, fx.Node) else "" for n in output_values(halves.forward)]
    cut = halves.num_forward_outputs
    saved = dict(zip(names[cut:], returned[cut:], strict=True))
    kinds = halves.output_kinds
    held = [v for v, kind in zip(returned, kinds, strict=False) if kind is OutputKind.RESULT]
    del returned
    if outside:
        torch.empty(outside, dtype=torch.uint8, device=device)
    undefined = set(coded.planned.undefined)
    args = [
        saved.pop(node.name)
        if node.name in saved
        else None
        if node.name in undefined
        else _real(node, {})
        for node in halves.backward.graph.find_nodes(op="placeholder")
    ]
    saved.clear()
    gradients = coded.backward(args)
    del gradients, held


def _real(node: fx.Node, examples: Mapping[str, Any]) -> Any:
    """A value for an input: the example's, or zeros."""
    example, value = examples.get(node.name), node.meta["val"]
    if not isinstance(value, torch.Tensor):
        return hint(value)
    if isinstance(example, torch.Tensor) and not _torch.is_fake(example) and not example.is_meta:
        return example.detach()
    size, strides = [*map(hint, value.shape)], [*map(hint, value.stride())]
    found = torch.empty_strided(size, strides, dtype=value.dtype, device=value.device)
    return found.zero_()


def loss_outside(planned: Planned) -> int:
    """Bytes that a loss outside the step holds at the boundary of its halves."""
    line = planned.line
    return int(evaluate(line.steps[line.boundary].workspace, planned.graph.bindings()))
