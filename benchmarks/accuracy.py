"""Does training with lossy codes end where training without them ends?

    python benchmarks/accuracy.py --tasks mlp,cnn,lm --pairs 20

Three tasks: an MLP and a CNN on scikit-learn's digits, and a character-level language model on the help
texts of Python's language reference, which lie in every installation (``pydoc_data/topics.py``).  Three
ways to train each, paired by seed (weights, split and order of the data):

    exact     fxmem with lossless codes alone
    codes     everything that may be a lossy code is one, as coarse as 1 % of noise allows: plans keep
              those codes alone that their budgets need, which is less
    harmful   every saved tensor in 2 bits, rounded to the nearest of four values for all of the tensor:
              what the test must be able to see

Two one-sided tests: the difference from "exact" is taken for none where its 90 % confidence interval lies
within half a point of accuracy, or 0.01 nats.  "codes" must pass, "harmful" must fail.  Writes JSON.
"""

import argparse
import contextlib
import datetime
import json
import math
import pydoc_data.topics
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from scipy.stats import t as student
from sklearn.datasets import load_digits
from tabulate import tabulate
from torch import Tensor, nn

import fxmem
from fxmem.codes.quantizers import dequantize_groups, quantize_groups
from fxmem.steps import choose

HERE = Path(__file__).resolve().parent
CEILING = 0.01
CONFIDENCE = 0.90
GRID = (2, 1 << 16)
"""Bits, and elements that share a grid, of what must do harm."""


# -- Tasks ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Task:
    """A model, a step's data for each seed, and what is compared at the end.

    margin: what counts as no difference, in ``unit``.  steps: of training, by AdamW
    at this rate for the text, by gradient descent with momentum for the digits.
    """

    name: str
    unit: str
    margin: float
    steps: int
    rate: float
    build: Callable[[], nn.Module] = field(repr=False)
    batches: Callable[[int, int], Any] = field(repr=False)
    score: Callable[[nn.Module, int], float] = field(repr=False)


def mlp() -> nn.Module:
    return nn.Sequential(
        nn.Linear(64, 128), nn.LayerNorm(128), nn.GELU(), nn.Linear(128, 128), nn.LayerNorm(128),
        nn.ReLU(), nn.Linear(128, 128), nn.LayerNorm(128), nn.GELU(), nn.Linear(128, 10),
    )  # fmt: skip


def cnn() -> nn.Module:
    return nn.Sequential(
        nn.Unflatten(1, (1, 8, 8)), nn.Conv2d(1, 16, 3, padding=1), nn.ReLU(),
        nn.Conv2d(16, 32, 3, stride=2, padding=1), nn.ReLU(),
        nn.Conv2d(32, 32, 3, padding=1), nn.GELU(), nn.Flatten(), nn.Linear(512, 10),
    )  # fmt: skip


def digits(seed: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Four fifths to train on, and the rest; another split for each seed."""
    x, y = load_digits(return_X_y=True)
    x, y = torch.tensor(x, dtype=torch.float32) / 16, torch.tensor(y)
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(seed))
    cut = len(x) * 4 // 5
    train, rest = order[:cut], order[cut:]
    return x[train], y[train], x[rest], y[rest]


def digit_batches(seed: int, steps: int) -> Any:
    x, y, _, _ = digits(seed)
    generator = torch.Generator().manual_seed(1000 + seed)
    for _ in range(steps):
        rows = torch.randint(len(x), (128,), generator=generator)
        yield x[rows], y[rows]


def digit_accuracy(model: nn.Module, seed: int) -> float:
    """Percent of the digits that were held back."""
    _, _, x, y = digits(seed)
    with torch.no_grad():
        return 100 * float((model(x).argmax(1) == y).float().mean())


class Block(nn.Module):
    def __init__(self, dim: int, heads: int):
        super().__init__()
        self.heads = heads
        self.first, self.second = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.qkv, self.out = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)
        self.up, self.down = nn.Linear(dim, 4 * dim), nn.Linear(4 * dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        batch, length, dim = x.shape
        parts = (
            self.qkv(self.first(x)).view(batch, length, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        )
        seen = F.scaled_dot_product_attention(*parts, is_causal=True)
        x = x + self.out(seen.transpose(1, 2).reshape(batch, length, dim))
        return x + self.down(F.gelu(self.up(self.second(x))))


LENGTH, ROWS = 32, 16


class Characters(nn.Module):
    def __init__(self, dim: int = 64, heads: int = 4, layers: int = 2):
        super().__init__()
        self.characters, self.places = nn.Embedding(128, dim), nn.Embedding(LENGTH, dim)
        self.blocks = nn.Sequential(*(Block(dim, heads) for _ in range(layers)))
        self.norm, self.head = nn.LayerNorm(dim), nn.Linear(dim, 128)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.characters(ids) + self.places.weight
        return self.head(self.norm(self.blocks(x))).flatten(0, 1)


def text() -> Tensor:
    topics = pydoc_data.topics.topics
    joined = "\n".join(topics[name] for name in sorted(topics))
    return torch.tensor([min(b, 127) for b in joined.encode("ascii", "replace")])


TEXT = text()
HELD_BACK = len(TEXT) // 10


def windows(ids: Tensor, starts: Tensor) -> tuple[Tensor, Tensor]:
    rows = ids[starts[:, None] + torch.arange(LENGTH + 1)]
    return rows[:, :-1].contiguous(), rows[:, 1:].flatten()


def text_batches(seed: int, steps: int) -> Any:
    generator = torch.Generator().manual_seed(1000 + seed)
    ids = TEXT[:-HELD_BACK]
    for _ in range(steps):
        starts = torch.randint(len(ids) - LENGTH - 1, (ROWS,), generator=generator)
        yield windows(ids, starts)


def text_loss(model: nn.Module, seed: int) -> float:
    """Nats a character of the text that was held back: the same windows for all."""
    ids = TEXT[-HELD_BACK:]
    starts = torch.arange(0, len(ids) - LENGTH - 1, 8 * LENGTH)
    with torch.no_grad():
        x, y = windows(ids, starts)
        return float(F.cross_entropy(model(x), y))


TASKS = {
    "mlp": Task("mlp", "points", 0.5, 120, 0.02, mlp, digit_batches, digit_accuracy),
    "cnn": Task("cnn", "points", 0.5, 240, 0.05, cnn, digit_batches, digit_accuracy),
    "lm": Task("lm", "nats", 0.01, 120, 3e-3, Characters, text_batches, text_loss),
}


# -- Ways to train ---------------------------------------------------------------------------------------


@dataclass
class Way:
    """How a step runs.  rho: predicted noise / the minibatch's.  peak: bytes that were planned."""

    name: str
    model: nn.Module
    step: Callable[[Tensor, Tensor], Tensor]
    rho: float | None = None
    peak: int | None = None
    codes: tuple[str, ...] = ()


def ways(task: Task) -> list[Way]:
    torch.manual_seed(0)
    x, y = next(iter(task.batches(0, 1)))
    found = []
    for name, allow in (("exact", ("lossless",)), ("codes", ("lossless", "quantize"))):
        model = task.build()
        with mock.patch.object(choose, "_choose", all_codes):
            step = fxmem.optimize(
                model, "2x", (x,), allow=allow, noise=CEILING, loss_fn=F.cross_entropy,
                loss_inputs=(y,), on_infeasible="best",
            )  # fmt: skip
        noise = step.plan.noise
        stored = tuple(d.reason for d in step.plan.decisions if d.error)
        rho = None if noise is None else noise.predicted
        found.append(Way(name, model, step, rho, step.plan.predicted_peak, stored))
    model = task.build()
    return [*found, Way("harmful", model, lambda x, y: F.cross_entropy(rough(model, x), y))]


def all_codes(analysis: Any, options: Any, budget: Any) -> Any:
    """In place of the planner's choice: every code that may be kept."""
    form = analysis.coded
    if "quantize" in options.allow:
        form = form.quantized(form.allotted(options.noise))
    planner = form.planner
    return form, planner.choice(planner.solver.coded_without(frozenset())), None


def rough(model: nn.Module, x: Tensor) -> Tensor:
    """The model's result, with all floats that its backward saves in 2 bits, one grid for each tensor."""
    held = {p.untyped_storage().data_ptr() for p in model.parameters()}

    def pack(tensor: Tensor) -> Any:
        dense = tensor.is_floating_point() and tensor.untyped_storage().data_ptr() not in held
        if not dense:
            return tensor
        tensor = tensor.contiguous()
        return quantize_groups(tensor, *GRID, None, 0), tensor.shape, tensor.dtype

    def unpack(packed: Any) -> Tensor:
        if isinstance(packed, Tensor):
            return packed
        code, shape, dtype = packed
        strides = torch.empty(shape, device="meta").stride()
        return dequantize_groups(code, *GRID, list(shape), list(strides), dtype)

    with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
        return model(x)


def trained(task: Task, way: Way, seed: int) -> float:
    """The score after training from the seed's weights on the seed's data."""
    torch.manual_seed(seed)
    way.model.load_state_dict(task.build().state_dict())
    parameters = way.model.parameters()
    if task.unit == "nats":
        optimizer: Any = torch.optim.AdamW(parameters, lr=task.rate)
    else:
        optimizer = torch.optim.SGD(parameters, lr=task.rate, momentum=0.9)
    decay = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 1 / task.steps, task.steps)
    for x, y in task.batches(seed, task.steps):
        optimizer.zero_grad(set_to_none=True)
        way.step(x, y).backward()
        optimizer.step()
        decay.step()
    return task.score(way.model, seed)


# -- Comparing -------------------------------------------------------------------------------------------


@dataclass
class Comparison:
    """Paired differences of a way from "exact", and their confidence interval."""

    task: str
    way: str
    unit: str
    margin: float
    pairs: int
    exact: float
    mean: float
    low: float
    high: float
    equivalent: bool
    rho: float | None
    peak: int | None
    exact_peak: int | None
    codes: tuple[str, ...]
    differences: list[float]


def compared(task: Task, scores: dict[str, list[float]], way: Way, exact: Way) -> Comparison:
    differences = [a - b for a, b in zip(scores[way.name], scores["exact"], strict=True)]
    n, mean = len(differences), statistics.mean(differences)
    half = (
        float(student.ppf((1 + CONFIDENCE) / 2, n - 1))
        * statistics.stdev(differences)
        / math.sqrt(n)
    )
    low, high = mean - half, mean + half
    inside = -task.margin < low and high < task.margin
    return Comparison(
        task.name, way.name, task.unit, task.margin, n, statistics.mean(scores["exact"]), mean, low,
        high, inside, way.rho, way.peak, exact.peak, way.codes, differences,
    )  # fmt: skip


def run(task: Task, pairs: int) -> list[Comparison]:
    known = ways(task)
    scores: dict[str, list[float]] = {way.name: [] for way in known}
    began = time.perf_counter()
    for seed in range(pairs):
        for way in known:
            scores[way.name].append(trained(task, way, seed))
        print(f"{task.name} {seed + 1}/{pairs} {time.perf_counter() - began:.0f} s", flush=True)
    return [compared(task, scores, way, known[0]) for way in known[1:]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tasks", default=",".join(TASKS))
    parser.add_argument("--pairs", type=int, default=20)
    parser.add_argument("--out", default=str(HERE / "results" / "accuracy-cpu.json"))
    options = parser.parse_args()
    torch.set_num_threads(1)
    path, found = Path(options.out), []
    with contextlib.suppress(FileNotFoundError, ValueError):  # tasks that are not run again stay
        found = json.loads(path.read_text())["comparisons"]
    for name in options.tasks.split(","):
        found = [c for c in found if c["task"] != name]
        found += [asdict(c) for c in run(TASKS[name], options.pairs)]
        about = {
            "torch": torch.__version__,
            "date": datetime.date.today().isoformat(),
            "text": f"pydoc_data/topics.py, {len(TEXT)} characters",
            "ceiling": CEILING,
            "confidence": CONFIDENCE,
        }
        path.write_text(json.dumps({**about, "comparisons": found}, indent=1) + "\n")
    rows = [
        [
            c["task"], c["way"], c["pairs"], f"{c['exact']:.4g}", f"{c['mean']:+.4f}",
            f"[{c['low']:+.4f}, {c['high']:+.4f}]", f"{c['margin']} {c['unit']}",
            "yes" if c["equivalent"] else "no", "" if c["rho"] is None else f"{100 * c['rho']:.2f} %",
        ]
        for c in found
    ]  # fmt: skip
    headers = (
        "task",
        "way",
        "pairs",
        "exact",
        "difference",
        "90 % interval",
        "margin",
        "same",
        "rho",
    )
    print(tabulate(rows, headers))


if __name__ == "__main__":
    main()
