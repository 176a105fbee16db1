"""Every private function of torch.distributed that fxmem calls.  Run on torch 2.13.0."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import distributed, nn


def shared_store() -> Any:
    """What all processes of the job can read and write; None where there is one process alone."""
    if not (distributed.is_available() and distributed.is_initialized()):
        return None
    # A fake process group has no other processes, whatever its size says.
    if distributed.get_world_size() == 1 or distributed.get_backend() == "fake":
        return None
    return distributed.distributed_c10d._get_default_store()


def bucket_bytes() -> int:
    """What the buckets of the DDP module hold whose forward is going on; 0 outside of one."""
    if not distributed.is_available():
        return 0
    module = nn.parallel.DistributedDataParallel._get_active_ddp_module()
    if module is None:
        return 0
    trained = (p for p in module.module.parameters() if p.requires_grad)
    return sum(p.nbytes for p in trained)


@dataclass(frozen=True)
class ShardGroup:
    """Parameters that FSDP2 gathers at once, in this process.

    shards, whole: them, one for one; the whole ones are there from the first gathering on, with bytes
    while they are gathered.  in_turn: let go after the forward and gathered again for the backward.
    reduced: bytes an element in which gradients are summed.  step: equal for groups of one step.
    """

    shards: tuple[torch.Tensor, ...]
    whole: tuple[torch.Tensor, ...]
    in_turn: bool
    reduced: int
    step: int


def shard_groups() -> list[ShardGroup]:
    """All that FSDP2 has gathered once in this process."""
    if not distributed.is_available():
        return []
    from torch.distributed._composable_state import _module_state_mapping

    found = []
    for reference in list(_module_state_mapping.values()):
        for group in getattr(reference(), "_fsdp_param_groups", ()):
            parameters = [p for p in group.fsdp_params if hasattr(p, "_unsharded_param")]
            dtype = group._reduce_dtype
            found.append(
                ShardGroup(
                    tuple(p.sharded_param for p in parameters),
                    tuple(p._unsharded_param for p in parameters),
                    group._reshard_after_forward,
                    dtype.itemsize if dtype is not None else 0,
                    id(group.comm_ctx),
                )
            )
    return found
