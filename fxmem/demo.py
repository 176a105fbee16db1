"""The demo: train a model as it is and in a budget, and compare every loss and both peaks."""

from __future__ import annotations

import copy
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from tabulate import tabulate
from torch import Tensor, nn
from tqdm import tqdm

import fxmem
from fxmem.basics.units import format_bytes
from fxmem.demo_models import Batch, Task, task
from fxmem.reports.report import Report

_SEED = 1


@dataclass(frozen=True)
class Training:
    """What one run gave.

    losses: one a step.  state: the model's at the end.  gradients: of the measured step, by
    parameter.  peak: bytes of that step alone.  seconds: median of a step, the first left out.
    """

    losses: list[Tensor]
    state: dict[str, Tensor]
    gradients: dict[str, Tensor]
    peak: int
    seconds: float


@dataclass(frozen=True)
class Demo:
    """The two runs and the report of the plan between them."""

    report: Report
    unchanged: Training
    planned: Training

    @property
    def losses_identical(self) -> bool:
        return _same(self.unchanged.losses, self.planned.losses)

    @property
    def identical(self) -> bool:
        """Are all losses, the measured gradients and the final state equal to the bit?"""
        return (
            self.losses_identical
            and _same_named(self.unchanged.gradients, self.planned.gradients)
            and _same_named(self.unchanged.state, self.planned.state)
        )

    def __str__(self) -> str:
        before, after = self.unchanged, self.planned
        rows = [
            ("measured peak", format_bytes(before.peak), format_bytes(after.peak)),
            ("median step", f"{1e3 * before.seconds:.1f} ms", f"{1e3 * after.seconds:.1f} ms"),
            ("first loss", f"{before.losses[0]:.6f}", f"{after.losses[0]:.6f}"),
            ("last loss", f"{before.losses[-1]:.6f}", f"{after.losses[-1]:.6f}"),
        ]
        table = tabulate(rows, ("", "unchanged", "planned"), disable_numparse=True)
        return f"{self.report}\n\n{table}\n\n{self._verdict()}"

    def _verdict(self) -> str:
        steps = len(self.unchanged.losses)
        if self.identical:
            return f"All {steps} losses and the final parameters are identical, bit for bit."
        if self.losses_identical:
            return f"All {steps} losses are identical, but gradients or parameters are NOT."
        pairs = zip(self.unchanged.losses, self.planned.losses, strict=True)
        first = next(i for i, (a, b) in enumerate(pairs) if not _same([a], [b]))
        return f"The losses are NOT identical: they differ from step {first} on."

    def to_dict(self) -> dict[str, Any]:
        return {
            "identical": self.identical,
            "losses": [loss.item() for loss in self.planned.losses],
            "unchanged": {"peak": self.unchanged.peak, "seconds": self.unchanged.seconds},
            "planned": {"peak": self.planned.peak, "seconds": self.planned.seconds},
            "report": self.report.to_dict(),
        }


def run(name: str = "gpt", budget: int | float | str = "0.4x", steps: int = 20) -> Demo:
    """Train the model ``name`` for ``steps`` steps unchanged and, beside it, in ``budget``.

    Both start from the same parameters and see the same batches and seeds.  Raises
    ``BudgetInfeasibleError``.
    """
    chosen = task(name, steps)
    copied = copy.deepcopy(chosen.model)
    optimized = fxmem.optimize(copied, budget, chosen.batches[0])
    plan = optimized.plan
    sides = (_Side(chosen.model, chosen.model), _Side(optimized, copied))
    for side in sides:
        side.measure(chosen.batches[0], plan.resident)
    _train(sides, chosen)
    unchanged, planned = (side.training() for side in sides)
    same = _same_named(unchanged.gradients, planned.gradients)
    gradients = "bitwise equal to the unchanged step's" if same else "NOT equal to the unchanged"
    return Demo(Report(plan, planned.peak, gradients), unchanged, planned)


@dataclass
class _Side:
    """One of the two runs.  step: computes the loss of a batch with the parameters of ``model``."""

    step: Callable[..., Tensor]
    model: nn.Module
    peak: int = 0
    gradients: dict[str, Tensor] = field(default_factory=dict)
    losses: list[Tensor] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)

    def measure(self, batch: Batch, resident: int) -> None:
        """Bytes that one step holds at its peak, and its gradients; the model stays as it is.

        Everything else that is alive (other batches, the other side) is there before the step and
        after it, so it cancels; what the step finds there of its own is ``resident``.
        """
        start = {key: value.clone() for key, value in self.model.state_dict().items()}
        for _ in range(2):  # the first call prepares, the second is measured
            self.model.zero_grad()
            torch.manual_seed(_SEED)
            measured = fxmem.measure(lambda: self.step(*batch).backward())
        self.peak = measured.peak - measured.at_start + resident
        gradients = {name: p.grad for name, p in self.model.named_parameters()}
        self.gradients = {name: g.clone() for name, g in gradients.items() if g is not None}
        self.model.zero_grad()
        self.model.load_state_dict(start)  # a batch norm counts the measured steps, too

    def train(self, batch: Batch, seed: int, optimizer: torch.optim.Optimizer) -> None:
        torch.manual_seed(seed)
        began = time.perf_counter()
        loss = self.step(*batch)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        self.seconds.append(time.perf_counter() - began)
        self.losses.append(loss.detach())

    def training(self) -> Training:
        median = statistics.median(self.seconds[1:] or self.seconds)
        return Training(self.losses, self.model.state_dict(), self.gradients, self.peak, median)


def _train(sides: Sequence[_Side], chosen: Task) -> None:
    """Both sides take turns, so that whatever else the machine does slows both alike."""
    optimizers = [torch.optim.AdamW(s.model.parameters(), lr=chosen.learning_rate) for s in sides]
    bar = tqdm(chosen.batches, desc=f"{chosen.name}, both ways", unit="step", disable=None)
    for number, batch in enumerate(bar):
        for side, optimizer in zip(sides, optimizers, strict=True):
            side.train(batch, _SEED + number, optimizer)


# -- Equal to the bit ------------------------------------------------------------------------------


def _same(mine: list[Tensor], theirs: list[Tensor]) -> bool:
    """Equal to the bit: NaNs of equal bits are equal, zeros of unequal sign are not."""
    return len(mine) == len(theirs) and all(
        a.shape == b.shape and a.dtype == b.dtype and torch.equal(_bits(a), _bits(b))
        for a, b in zip(mine, theirs, strict=True)
    )


def _same_named(mine: dict[str, Tensor], theirs: dict[str, Tensor]) -> bool:
    return mine.keys() == theirs.keys() and _same(list(mine.values()), list(theirs.values()))


def _bits(tensor: Tensor) -> Tensor:
    return tensor.reshape(-1).contiguous().view(torch.uint8)
