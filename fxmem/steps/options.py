"""What was asked for: ``optimize``'s keywords, checked."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from fractions import Fraction
from typing import Literal

import torch

from fxmem.analysis.cost import CostModel
from fxmem.basics.budget import NO_RESERVE, Budget, Reserve
from fxmem.basics.device import library_memory
from fxmem.codes.gradient_noise import Noise
from fxmem.planning.plan import Plan


@dataclass(frozen=True)
class Options:
    """``optimize``'s keywords, checked; see there.

    outside: what ``reserve`` was read from.  library: bytes outside the step, too, that the device's
    libraries hold.  compiler: None for the one that goes with the device.
    """

    budget: Budget
    outside: Reserve = NO_RESERVE
    library: int = 0
    allow: tuple[str, ...] = ("recompute", "lossless")
    on_infeasible: str = "raise"
    cost: CostModel | Literal["measure"] | None = None
    plan: Plan | None = None
    noise: Noise = field(default_factory=Noise)
    compiler: str | None = "eager"

    def uses_inductor(self, device: torch.device) -> bool:
        """Does Inductor write the code?  Where nobody said, it does on CUDA."""
        return (self.compiler or ("inductor" if device.type == "cuda" else "eager")) == "inductor"

    @property
    def reserve(self) -> int:
        """Bytes outside the step, those of libraries aside."""
        return self.outside.nbytes

    def for_bytes(self, nbytes: int, device: torch.device) -> Options:
        """The same, for a plan of so many bytes beside those of the reserve and of libraries."""
        whole = Fraction(nbytes + self.reserve + library_memory(device))
        return replace(self, budget=Budget("bytes", whole, self.budget.asked))

    def for_the_smallest(self) -> Options:
        """The same, for the plan with the smallest peak."""
        return replace(self, budget=Budget.parse("min"), on_infeasible="best", plan=None)
