"""Private functions of torch with which Inductor's code draws as the graph does, in its order.

Inductor orders its kernels by who reads them, and what draws without reading data may come anywhere: two
such operators would get each other's numbers.  torch chains those that it knows to draw, from 2.13 on;
those that also save the generator's state it does not know.

``bernoulli`` with a number is lowered to a copy that is then written over.  Once the copy is fused with
what reads the result, that reads what was there before the draw.

Compiled and run on torch 2.13.0, 2.11.0 and 2.15.0.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from itertools import pairwise
from typing import Any
from unittest import mock

import torch
from torch._inductor import ir
from torch._inductor.lowering import fallback_handler, lowerings
from torch._inductor.scheduler import Scheduler
from torch._inductor.virtualized import V

DRAWS_IN_ORDER = "draws in order, whole"
"""What code that was made so is known by in torch's cache."""


@contextlib.contextmanager
def draws_in_order() -> Iterator[None]:
    """Inside, each operator that draws waits for the one before, and returns what it draws."""
    compute_dependencies = Scheduler.compute_dependencies

    def chained(scheduler: Any) -> None:
        graph: Any = V.graph
        drawing = [op for op in graph.operations if _draws(op)]
        for first, second in pairwise(drawing):
            graph.additional_buffer_deps[second.operation_name].add(first.get_name())
        compute_dependencies(scheduler)

    in_place = lowerings[_BERNOULLI]
    lowerings[_BERNOULLI] = fallback_handler(_BERNOULLI, add_to_fallback_set=False)
    try:
        with mock.patch.object(Scheduler, "compute_dependencies", chained):
            yield
    finally:
        lowerings[_BERNOULLI] = in_place


_BERNOULLI = torch.ops.aten.bernoulli.p


def _draws(operation: Any) -> bool:
    """What runs again with a saved state leaves the generator as it finds it."""
    if not isinstance(operation, ir.ExternKernel):
        return False
    target = operation.op_overload
    if target is torch.ops.higher_order.run_and_save_rng_state:
        return True
    return torch.Tag.nondeterministic_seeded in getattr(target, "tags", ())
