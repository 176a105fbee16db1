"""What data parallelism holds beside a step's graphs: DDP's buckets, FSDP2's shards and buffers.

FSDP2 gathers the parameters of a group before the group's forward, lets go of them after it, and gathers
them again for the backward.  The graphs read the gathered ones and return their whole gradients; Python
between the graphs gathers and scatters.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch

from fxmem._torch.distributed import ShardGroup, bucket_bytes, shard_groups
from fxmem.basics.budget import Reserve
from fxmem.basics.sizes import storages_in

_AT_ONCE = 2
"""Groups that are gathered at the same time: while one runs, the next may be on its way."""


def reads_gathered(inputs: Sequence[Any]) -> bool:
    """Is one of these parameters one that FSDP2 has gathered?"""
    return bool(_of_step(inputs))


def gathered(shards: Iterable[torch.Tensor]) -> list[torch.Tensor]:
    """The whole parameters that FSDP2 made of these shards."""
    known = {id(shard) for shard in shards}
    pairs = (pair for g in shard_groups() for pair in zip(g.shards, g.whole, strict=True))
    return [whole for shard, whole in pairs if id(shard) in known]


def with_parallelism(reserve: Reserve, inputs: Sequence[Any]) -> Reserve:
    """The reserve, and what data parallelism holds around graphs with these inputs."""
    buckets, buffers = bucket_bytes(), _beside_gathered(_of_step(inputs))
    held = {"DDP's buckets": buckets, "FSDP's shards and buffers": buffers}
    what = [name for name, nbytes in held.items() if nbytes]
    if not what:
        return reserve
    names = [reserve.what, *what] if reserve.nbytes else what
    return replace(reserve, nbytes=reserve.nbytes + buckets + buffers, what=" and ".join(names))


def resident_bytes(storages: Mapping[int, int]) -> int:
    """Of what the graphs of a step are given (storage -> bytes), all that is there at one time."""
    always, turns = dict(storages), []
    for group in shard_groups():
        if group.in_turn:
            turns.append(sum(always.pop(key, 0) for t in group.whole for key in storages_in(t)))
    return sum(always.values()) + sum(sorted(turns)[-_AT_ONCE:])


def _of_step(inputs: Sequence[Any]) -> list[ShardGroup]:
    """The groups of the step whose graphs are given some of these inputs."""
    given = {id(value) for value in inputs}
    groups = shard_groups()
    steps = {g.step for g in groups if any(id(t) in given for t in g.whole)}
    return [g for g in groups if g.step in steps]


def _beside_gathered(groups: Sequence[ShardGroup]) -> int:
    """Shards, which stay, and of the largest group the buffers: one to gather, two to scatter."""
    if not groups:
        return 0
    shards = [sum(_local(t).nbytes for t in g.shards) for g in groups]
    whole = [sum(t.numel() * t.element_size() for t in g.whole) for g in groups]
    summed = [sum(t.numel() * max(t.element_size(), g.reduced) for t in g.whole) for g in groups]
    return sum(shards) + max(shards) + max(whole) + 2 * max(summed)


def _local(shard: torch.Tensor) -> torch.Tensor:
    found: torch.Tensor = shard.to_local() if hasattr(shard, "to_local") else shard
    return found
