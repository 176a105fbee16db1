"""What a step will peak at as Inductor's kernels, before there is code of them.

Inductor lowers both halves, fuses, orders its kernels and plans which buffer takes the memory of which,
all as it does to compile.  What is left out is what takes the time: the code.  Then each half is run
through in numbers.  Operators that run as they are hold what was measured; see graphs/workspace.py.
"""

from __future__ import annotations

from collections import defaultdict, deque
from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import fx
from torch.utils import _pytree as pytree

from fxmem._torch.inductor import Called, Freed, Made, Moved, Schedule
from fxmem.basics.sizes import hint, in_blocks
from fxmem.graphs.graph import OutputKind, output_values
from fxmem.graphs.partition import Split
from fxmem.graphs.workspace import Call, TensorSpec, Workspaces, generator_state, node_specs


def peak_of(
    forward: Schedule,
    backward: Schedule,
    halves: Split,
    table: Workspaces,
    loss_outside: int,
    device: torch.device,
) -> int:
    """Bytes that the step adds at its peak to what is there before it.

    table: gets what it lacks about operators.  loss_outside: bytes that a loss outside the step holds
    between its halves.
    """
    made = dict.fromkeys(filter(None, forward.returned))
    first, left = run(forward, {}, made, table, device)
    cut = halves.num_forward_outputs
    names = [n.name for n in output_values(halves.forward)[cut:] if isinstance(n, fx.Node)]
    saved = dict(zip(names, forward.returned[cut:], strict=True))
    results = {
        root
        for root, kind in zip(forward.returned, halves.output_kinds, strict=False)
        if kind is OutputKind.RESULT
    }
    held = sum(left.get(root, 0) for root in results if root)
    given = _given(backward, saved, {root: n for root, n in left.items() if root not in results})
    given |= _tangents(halves.backward, saved)
    second, _ = run(backward, given, set(filter(None, backward.returned)), table, device)
    return max(first, sum(left.values()) + loss_outside, held + second)


def run(
    schedule: Schedule,
    given: Mapping[str, int],
    kept: Iterable[str],
    table: Workspaces,
    device: torch.device,
) -> tuple[int, dict[str, int]]:
    """The most bytes that live at once, and what lives in the end, by name.

    given: bytes of the inputs that end with their last reader.  kept: what is returned.
    """
    live, kept = dict(given), set(kept)
    now = peak = sum(live.values())
    for event in schedule.events:
        match event:
            case Made(name, nbytes):
                live[name] = int(in_blocks(nbytes, device))
                now += live[name]
                peak = max(peak, now)
            case Moved(name, source):
                live[name] = live.pop(source, 0)
            case Freed(name) if name not in kept:
                now -= live.pop(name, 0)
            case Called():
                peak = max(peak, now + _works_in(event, table, device))
    return peak, live


def _works_in(called: Called, table: Workspaces, device: torch.device) -> int:
    """Bytes that an operator holds beyond its operands and results."""
    lowered: dict[tuple[int, ...], deque[tuple[int, ...]]] = defaultdict(deque)
    for shape, strides in called.operands:
        lowered[shape].append(strides)

    def as_lowered(node: fx.Node) -> Any:
        def spec(x: Any) -> Any:
            known = isinstance(x, TensorSpec) and lowered[x.shape]
            return replace(x, strides=known.popleft()) if known else x

        return pytree.tree_map(spec, node_specs(node))

    entry = table.look_up(Call.of_node(called.node, as_lowered), device)
    if entry is None:
        return table.nbytes(called.node)
    return entry.nbytes + generator_state(called.node)


def _given(
    backward: Schedule, saved: Mapping[str, str | None], left: Mapping[str, int]
) -> dict[str, int]:
    """Bytes of the saved tensors; where several lie in one buffer, the last to be let go has them all."""
    ends = {event.name: at for at, event in enumerate(backward.events) if isinstance(event, Freed)}
    last: dict[str, str] = {}
    for name, root in saved.items():
        if root is None or root not in left:
            continue
        if root not in last or _end(ends, name) > _end(ends, last[root]):
            last[root] = name
    return {name: left[root] for root, name in last.items()}


def _end(ends: Mapping[str, int], name: str) -> float:
    return ends.get(name, float("inf"))


def _tangents(backward: fx.GraphModule, saved: Mapping[str, str | None]) -> dict[str, int]:
    given = backward.graph.find_nodes(op="placeholder")
    values = {n.name: n.meta.get("val") for n in given if n.name not in saved}
    return {
        name: int(in_blocks(hint(value.untyped_storage().nbytes()), value.device))
        for name, value in values.items()
        if isinstance(value, torch.Tensor)
    }
