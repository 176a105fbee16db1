"""The user's checkpoint policies, as constraints on what may be kept and what must be made again."""

from __future__ import annotations

from torch.utils.checkpoint import CheckpointPolicy

from fxmem.analysis.dataflow import Dataflow


def tagged_values(flow: Dataflow) -> tuple[frozenset[int], frozenset[int]]:
    """Values that must be kept, and values that must be made again.

    MUST_SAVE and MUST_RECOMPUTE bind; the PREFER policies leave the choice to the planner.  A value
    that cannot be made again stays kept whatever its tag says.
    """
    keep, remake = set(), set()
    for v, value in enumerate(flow.values):
        if not 0 <= value.producer < flow.num_forward:
            continue
        operator = flow.operators[value.producer]
        policy = operator.node.meta.get("recompute")
        if policy is CheckpointPolicy.MUST_SAVE:
            keep.add(v)
        elif policy is CheckpointPolicy.MUST_RECOMPUTE and operator.recomputable:
            remake.add(v)
    return frozenset(keep), frozenset(remake)
