"""The demo: train a model as it is, then in a budget, and compare every loss and both peaks."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from tabulate import tabulate
from torch import Tensor, nn
from tqdm import tqdm

import fxmem
from fxmem.demo_models import Batch, Task, task
from fxmem.report import Report
from fxmem.units import format_bytes

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
    """Train the model ``name`` for ``steps`` steps unchanged, then again in ``budget``.

    Both runs start from the same parameters, batches and seed.  Raises ``BudgetInfeasibleError``.
    """
    chosen = task(name, steps)
    model = chosen.model
    start = {key: value.clone() for key, value in model.state_dict().items()}
    optimized = fxmem.optimize(model, budget, chosen.batches[0])
    resident = optimized.plan.resident
    unchanged = _train(model, model, chosen, resident, "unchanged")
    model.load_state_dict(start)
    planned = _train(optimized, model, chosen, resident, "in the budget")
    same = _same_named(unchanged.gradients, planned.gradients)
    gradients = "bitwise equal to the unchanged step's" if same else "NOT equal to the unchanged"
    return Demo(Report(optimized.plan, planned.peak, gradients), unchanged, planned)


def _train(
    step: Callable[..., Tensor], model: nn.Module, chosen: Task, resident: int, label: str
) -> Training:
    """Measure one step, then train.  ``step`` computes the loss with ``model``'s parameters."""
    start = {key: value.clone() for key, value in model.state_dict().items()}
    peak, gradients = _measured_step(step, model, chosen.batches[0], resident)
    model.load_state_dict(start)  # a batch norm counts the measured step, too
    torch.manual_seed(_SEED)
    optimizer = torch.optim.AdamW(model.parameters(), lr=chosen.learning_rate)
    losses, seconds = [], []
    for batch in tqdm(chosen.batches, desc=f"{chosen.name} {label}", unit="step", disable=None):
        began = time.perf_counter()
        loss = step(*batch)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        seconds.append(time.perf_counter() - began)
        losses.append(loss.detach())
    state = {key: value.clone() for key, value in model.state_dict().items()}
    return Training(losses, state, gradients, peak, statistics.median(seconds[1:] or seconds))


def _measured_step(
    step: Callable[..., Tensor], model: nn.Module, batch: Batch, resident: int
) -> tuple[int, dict[str, Tensor]]:
    """Bytes that one step holds at its peak, and its gradients.

    Everything else that is alive (other batches, saved states) is there before the step and after
    it, so it cancels; what the step finds there of its own is ``resident``.
    """

    def one_step() -> None:
        step(*batch).backward()

    for _ in range(2):  # the first call prepares, the second is measured
        model.zero_grad()
        torch.manual_seed(_SEED)
        measured = fxmem.measure(one_step)
    gradients = {k: p.grad.clone() for k, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return measured.peak - measured.at_start + resident, gradients


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
