"""One GPU: a Llama of a billion parameters under budgets, beside eager and per-block checkpoints.

    python benchmarks/gpu.py --layers 16 --batch 8 --seq 1024 --budgets 1TiB,0.7x,0.6x,0.5x,0.4x,min

bfloat16 autocast over float32 parameters, as people train.  Peaks are what CUDA's allocator counts
(``max_memory_allocated``) less what was there before the step; times are medians after a warm-up,
every way in turn.  Writes JSON.  Needs transformers and a CUDA device.
"""

import argparse
import dataclasses
import datetime
import gc
import json
import statistics
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from tabulate import tabulate
from transformers import LlamaConfig, LlamaForCausalLM

import fxmem
from fxmem.basics.device import library_memory
from fxmem.planning.remembered import forget

HERE = Path(__file__).resolve().parent
Module = Callable[..., Any]


@dataclasses.dataclass
class Row:
    """One way to run the step.  Bytes above what was there before it, unless said.

    peak, asked_for: what the allocator handed out at most, and what it was asked for.  reserved: what
    it had from the driver, all told.  budget, predicted: the plan's, less its residents.  same: are
    the gradients those of eager's run?  Eager's own need not be those of a second run of it.
    """

    way: str
    peak: int = 0
    asked_for: int = 0
    reserved: int = 0
    seconds: float = 0.0
    same: bool | None = None
    budget: int | None = None
    predicted: int | None = None
    predicted_overhead: float | None = None
    gap: float | None = None
    recomputed: int | None = None
    optimize_seconds: float | None = None
    error: str | None = None


class Step:
    """The model and its batch, to be trained as it is or by something else."""

    def __init__(self, layers: int, batch: int, seq: int):
        config = LlamaConfig(
            vocab_size=32000,
            hidden_size=2048,
            intermediate_size=8192,
            num_hidden_layers=layers,
            num_attention_heads=32,
            num_key_value_heads=8,
            max_position_embeddings=seq,
            use_cache=False,
        )
        torch.manual_seed(0)
        with torch.device("cuda"):
            self.model = LlamaForCausalLM(config).train()
            self.ids = torch.randint(32000, (batch, seq))
        self.kwargs = {"labels": self.ids, "use_cache": False}

    def run(self, module: Module) -> Any:
        with torch.autocast("cuda", torch.bfloat16):
            outputs = module(self.ids, **self.kwargs)
        outputs.loss.backward()
        return outputs

    def clear(self) -> None:
        self.model.zero_grad(set_to_none=True)
        gc.collect()
        torch.cuda.synchronize()

    def gradients(self, module: Module) -> list[torch.Tensor]:
        """Of every tenth parameter: all of them would not fit beside the step."""
        self.run(module)
        found = [p.grad.cpu() for p in list(self.model.parameters())[::10]]
        self.clear()
        return found

    def measure(self, row: Row, module: Module) -> None:
        self.clear()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_stats()
        outputs = self.run(module)
        torch.cuda.synchronize()
        after = torch.cuda.memory_stats()
        del outputs
        self.clear()
        asked = "requested_bytes.all."
        row.peak = after["allocated_bytes.all.peak"] - before["allocated_bytes.all.current"]
        row.asked_for = after[asked + "peak"] - before[asked + "current"]
        row.reserved = after["reserved_bytes.all.peak"]

    def seconds(self, module: Module) -> float:
        self.clear()
        began = time.perf_counter()
        outputs = self.run(module)
        torch.cuda.synchronize()
        took = time.perf_counter() - began
        del outputs
        return took


def optimized(step: Step, budget: str, cost: str) -> tuple[Row, Module]:
    forget()
    began = time.perf_counter()
    with torch.autocast("cuda", torch.bfloat16), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "fxmem: no plan fits")
        module = fxmem.optimize(
            step.model,
            budget,
            (step.ids,),
            example_kwargs=step.kwargs,
            on_infeasible="best",
            cost=cost,
        )
    plan = module.plan
    row = Row(
        f"fxmem {budget}",
        budget=plan.budget - plan.resident,
        predicted=plan.predicted_peak - plan.resident,
        predicted_overhead=plan.predicted_overhead,
        gap=plan.gap,
        recomputed=len(plan.recomputed),
        optimize_seconds=time.perf_counter() - began,
    )
    return row, module


def checkpointed(model: Any) -> Module:
    """Per-block checkpoints while it is called, as transformers makes them."""

    def run(*args: Any, **kwargs: Any) -> Any:
        model.gradient_checkpointing_enable({"use_reentrant": False})
        try:
            return model(*args, **kwargs)
        finally:
            model.gradient_checkpointing_disable()

    return run


def rows_of(step: Step, budgets: list[str], cost: str, runs: int) -> list[Row]:
    ways: list[tuple[Row, Module]] = [
        (Row("eager"), step.model),
        (Row("checkpoint every block"), checkpointed(step.model)),
    ]
    for budget in budgets:
        try:
            ways.append(optimized(step, budget, cost))
        except Exception as error:  # one budget's failure must not cost the others their figures
            ways.append((Row(f"fxmem {budget}", error=str(error).splitlines()[0]), step.model))
    eager = step.gradients(step.model)
    for row, module in ways:
        if row.error is None:
            got = step.gradients(module)  # warms up, too
            row.same = all(torch.equal(a, b) for a, b in zip(eager, got, strict=True))
            step.measure(row, module)
    running = [(row, module) for row, module in ways if row.error is None]
    times = [[step.seconds(module) for _, module in running] for _ in range(runs)]
    for (row, _), seconds in zip(running, zip(*times, strict=True), strict=True):
        row.seconds = statistics.median(seconds)
    return [row for row, _ in ways]


HEADERS = ["way", "peak GiB", "of eager", "predicted/peak", "time", "predicted", "same", "plan s"]


def cells(row: Row, eager: Row) -> list[str]:
    if row.error is not None:
        return [row.way, row.error[:60]]
    planned = row.predicted is not None
    return [
        row.way,
        f"{row.peak / 2**30:.2f}",
        f"{row.peak / eager.peak:.3f}x",
        f"{row.predicted / row.peak:.5f}" if planned else "",
        f"{row.seconds / eager.seconds:.3f}x",
        f"{1 + row.predicted_overhead:.3f}x" if planned else "",
        "yes" if row.same else "no",
        f"{row.optimize_seconds:.1f}" if planned else "",
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layers", type=int, default=16)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--seq", type=int, default=1024)
    parser.add_argument("--budgets", default="1TiB,0.7x,0.6x,0.5x,0.4x,min")
    parser.add_argument("--cost", choices=("auto", "measure"), default="auto")
    parser.add_argument("--runs", type=int, default=7)
    parser.add_argument("--out", type=Path, default=HERE / "results" / "gpu.json")
    options = parser.parse_args()
    step = Step(options.layers, options.batch, options.seq)
    rows = rows_of(step, options.budgets.split(","), options.cost, options.runs)
    print(tabulate([cells(r, rows[0]) for r in rows], HEADERS, disable_numparse=True))
    found = {
        "device": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "date": datetime.date.today().isoformat(),
        "parameters": sum(p.numel() for p in step.model.parameters()),
        "batch": options.batch,
        "seq": options.seq,
        "layers": options.layers,
        "cost": options.cost,
        "library": library_memory(torch.device("cuda", 0)),
        "rows": [dataclasses.asdict(row) for row in rows],
    }
    options.out.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
