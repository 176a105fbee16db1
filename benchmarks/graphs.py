"""A model that Dynamo cuts into several graphs: one budget for all of them, measured.

Each row is a budget: bytes at the peak of a step once all graphs are known, beside the budget and beside
what was predicted, and gradients beside eager's.  A prediction counts what a graph returns as there until
its backward, for the caller may hold it; here nobody does.

    python benchmarks/graphs.py --compiler eager
    python benchmarks/graphs.py --compiler inductor
    python benchmarks/graphs.py --compile

``--compile`` compares seconds of processor time from nothing to the end of the third step, by when all is
planned, with those of ``torch.compile``: Inductor's code, caches empty, each in a process of its own.  It
also compares the seconds and the peaks of the steps that follow.
"""

import argparse
import datetime
import gc
import json
import operator
import statistics
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from itertools import accumulate
from multiprocessing import get_context
from pathlib import Path
from typing import Any, NamedTuple

import torch
from inductor import cpu_seconds
from torch import nn
from torch._inductor import config as inductor_config
from torch._inductor.utils import fresh_inductor_cache

import fxmem
from fxmem.graphs.measure import cpu_allocations
from fxmem.planning.remembered import forget

RESULTS = Path(__file__).parent / "results" / "graphs-cpu.json"
SHARES = (0.8, 0.7, 0.6, 0.5)


class Cut(nn.Module):
    """Four graphs of transformer layers, with a loss in the last."""

    def __init__(self, width: int = 64, layers: int = 1) -> None:
        super().__init__()
        self.parts = nn.ModuleList(
            nn.Sequential(
                *(
                    nn.TransformerEncoderLayer(width, 4, 4 * width, batch_first=True)
                    for _ in range(layers)
                )
            )
            for _ in range(4)
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.parts[0](x)
        torch._dynamo.graph_break()
        x = self.parts[1](x)
        torch._dynamo.graph_break()
        x = self.parts[2](x)
        torch._dynamo.graph_break()
        return self.parts[3](x).square().mean()


class Run:
    """Steps of the model, compiled or not."""

    def __init__(self, budget: Any = None, compiler: str = "eager") -> None:
        torch._dynamo.reset()
        gc.collect()
        forget()
        torch.manual_seed(0)
        self.model, self.x = Cut(), torch.randn(16, 64, 64)
        options = {"budget": budget, "compiler": compiler}
        eager = budget is None
        self.step = (
            self.model if eager else torch.compile(self.model, backend="fxmem", options=options)
        )
        self.resident = sum(p.nbytes for p in self.model.parameters()) + self.x.nbytes

    def peak(self) -> int:
        """Bytes at the peak of one step; its gradients stay until the next one."""
        self.model.zero_grad(set_to_none=True)
        torch.manual_seed(1)
        sizes, _ = cpu_allocations(lambda: self.step(self.x).backward())
        return self.resident + max(accumulate(sizes))

    def gradients(self) -> torch.Tensor:
        return torch.cat([p.grad.flatten() for p in self.model.parameters() if p.grad is not None])


def row(name: str, budget: int | str, compiler: str, want: torch.Tensor) -> dict[str, Any]:
    run = Run(budget, compiler)
    found: dict[str, Any] = {"budget": name, "compiler": compiler}
    try:
        # The first call compiles as well, and what that holds is no part of the step.
        run.step(run.x).backward()
    except fxmem.BudgetInfeasibleError as error:
        found["first_step_refused"] = error.smallest_peak
    try:
        run.peak()
    except fxmem.BudgetInfeasibleError as error:
        return {**found, "refused": error.smallest_peak}
    peak = run.peak()
    plans = fxmem.plans(run.step)
    predicted = max(plan.predicted_peak for plan in plans)
    if isinstance(budget, int):
        found["of_budget"] = peak / budget
    found |= {
        "graphs": len(plans),
        "peak": peak,
        "predicted": predicted,
        "of_predicted": peak / predicted,
    }
    got = run.gradients()
    found["bitwise"] = torch.equal(got, want)
    found["gradients_off"] = float((got - want).norm() / want.norm())
    return found


def rows(compiler: str) -> Iterator[dict[str, Any]]:
    eager = Run()
    unchanged = eager.peak()
    want = eager.gradients()
    yield {"budget": "as it is", "compiler": compiler, "peak": unchanged}
    for share in SHARES:
        yield row(f"{share}x", int(share * unchanged), compiler, want)
    yield row("min", "min", compiler, want)


COMPILED: dict[str, Any] = {"torch.compile": None, "fxmem at 1TiB": 2**40, "fxmem at 0.7x": "0.7x"}


def compilation(rounds: int) -> dict[str, Any]:
    """Processor seconds to the end of the third step, and of one more; beside: medians of ratios, taken
    round by round.  peak: bytes.
    """
    seen: dict[str, list[Compiled]] = {name: [] for name in COMPILED}
    for _ in range(rounds):
        for name, runs in seen.items():
            with ProcessPoolExecutor(1, get_context("spawn")) as process:
                runs.append(process.submit(compile_and_run, COMPILED[name]).result())
            print(name, runs[-1], flush=True)
    base = seen["torch.compile"]

    def medians(runs: list[Compiled], what: str) -> tuple[float, float]:
        found, others = ([getattr(run, what) for run in some] for some in (runs, base))
        beside = statistics.median(map(operator.truediv, found, others))
        return statistics.median(found), round(beside, 3)

    return {
        name: {
            "seconds": round(medians(runs, "seconds")[0], 1),
            "beside": medians(runs, "seconds")[1],
            "step_seconds": round(medians(runs, "step")[0], 4),
            "step_beside": medians(runs, "step")[1],
            "peak": max(run.peak for run in runs),
        }
        for name, runs in seen.items()
    }


class Compiled(NamedTuple):
    seconds: float
    step: float
    peak: int


def compile_and_run(budget: int | str | None) -> Compiled:
    """By ``torch.compile`` where no budget is given."""
    torch.set_num_threads(1)
    warm = nn.Linear(2, 2)
    torch.compile(warm)(torch.ones(1, 2)).sum().backward()  # what every process does once
    if budget == "0.7x":
        budget = int(0.7 * Run().peak())
    with fresh_inductor_cache(), inductor_config.patch(compile_threads=1):
        run = Run(budget, "inductor")
        if budget is None:
            run.step = torch.compile(run.model)
        start = cpu_seconds()
        for _ in range(3):
            run.step(run.x).backward()
        seconds = cpu_seconds() - start
        return Compiled(
            seconds, statistics.median(step_seconds(run) for _ in range(40)), run.peak()
        )


def step_seconds(run: Run) -> float:
    start = time.process_time()
    run.step(run.x).backward()
    return time.process_time() - start


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--compiler", choices=["eager", "inductor"])
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--rounds", type=int, default=3)
    chosen = parser.parse_args()
    torch.set_num_threads(1)
    known = json.loads(RESULTS.read_text()) if RESULTS.exists() else {"rows": []}
    if chosen.compiler:
        kept = [old for old in known["rows"] if old["compiler"] != chosen.compiler]
        made = []
        with fresh_inductor_cache():
            for one in rows(chosen.compiler):
                print(json.dumps(one), flush=True)
                made.append(one)
        known["rows"] = [*kept, *made]
    if chosen.compile:
        known["compile"] = compilation(chosen.rounds)
    known["device"] = "cpu"
    known["torch"] = torch.__version__
    known["date"] = datetime.date.today().isoformat()
    RESULTS.write_text(json.dumps(known, indent=1) + "\n")


if __name__ == "__main__":
    main()
