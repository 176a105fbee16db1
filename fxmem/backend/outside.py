"""Code of a step that is in no graph: what autograd saved for it, and what its backward will make."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from fxmem._torch.saved import saved_before
from fxmem.basics.sizes import storages_in
from fxmem.graphs.graph import LOSS_OUTSIDE
from fxmem.planning.ledger import Part

_OF_A_NORM = 4
"""Tensors as large as its operand that the backward of a norm makes, where that is in eager's operators."""


@dataclass(frozen=True)
class Outside:
    """What code before, between or after the graphs of a step leaves there until its backward.

    saved, leaves: storage -> bytes of what autograd saved for it, and of leaves whose gradients it makes.
    again: bytes of further gradients, of leaves that graphs of the step are given as well.
    """

    saved: dict[int, int] = field(default_factory=dict)
    leaves: dict[int, int] = field(default_factory=dict)
    again: int = 0

    @property
    def nbytes(self) -> int:
        return sum(self.saved.values())

    @property
    def gradients(self) -> int:
        return sum(self.leaves.values()) + self.again

    @property
    def last(self) -> Part:
        """The same as the end of a step, where it ran after all of its graphs.

        What its backward needs while it runs is not seen: as with a loss, two more tensors are
        assumed, here as large as the largest that was saved, or four as large as the second largest,
        for a norm below the loss; or gradients, if these are more.
        """
        largest, second, *_ = *sorted(self.saved.values(), reverse=True), 0, 0
        working = max(LOSS_OUTSIDE * largest, _OF_A_NORM * second)
        forward, backward = self.nbytes + working, self.nbytes + max(working, self.gradients)
        return Part(
            resident=sum(self.leaves.values()),
            held=self.nbytes,
            gradients=self.gradients,
            forward=forward,
            boundary=backward,
            backward=backward,
            tangents=0,
        )


def outside_of(values: Any, known: set[int], device: torch.device) -> Outside:
    """What was saved on the device on the way to these values, as far as graphs of the step.

    known: storages that these hold or are given.
    """
    saved, found = saved_before(values)
    every = storages(found)
    leaves = {key: n for key, n in every.items() if key not in known}
    there = storages([tensor for tensor in saved if tensor.device == device])
    new = {key: n for key, n in there.items() if key not in known and key not in leaves}
    return Outside(new, leaves, sum(every.values()) - sum(leaves.values()))


def storages(values: Any) -> dict[int, int]:
    """Storage -> bytes of all tensors in there."""
    tensors: Sequence[torch.Tensor] = [
        t for t in torch.utils._pytree.tree_leaves(values) if isinstance(t, torch.Tensor)
    ]
    return {key: int(n) for t in tensors for key, n in storages_in(t).items()}
