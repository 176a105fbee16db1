"""One family at shares of eager's peak: floating-point operations, measured peaks and bits.

    python benchmarks/shares.py --family llama --size bench --shares 0.345,0.18,min

Shares are of what eager's activations, gradients and transients hold at the peak, parameters and
inputs left out.  Prints a table and writes JSON.
"""

import argparse
import dataclasses
import datetime
import json
import time
from pathlib import Path

import torch
from pareto import Eager, eager_of
from steps import FAMILIES, HERE, SIZES, Step, same
from tabulate import tabulate

import fxmem
from fxmem.planning.remembered import forget


@dataclasses.dataclass
class Row:
    """One share.  peak, flops, time: over eager's; the time is predicted.

    used: of the budget, measured.  gap: a bound on the distance to the fastest plan.
    exact: loss, gradients and buffers bitwise eager's.  seconds: of ``optimize``.
    """

    share: str
    peak: float
    used: float
    flops: float
    time: float
    gap: float | None
    exact: bool
    seconds: float


def row_of(step: Step, eager: Eager, share: str) -> Row:
    budget = "min" if share == "min" else eager.budget(float(share))
    forget()
    began = time.perf_counter()
    module = fxmem.optimize(step.model, budget, step.args, example_kwargs=step.kwargs)
    seconds = time.perf_counter() - began
    peak, plan = step.added_peak(module) + eager.resident, module.plan
    return Row(
        share,
        eager.share(peak),
        peak / plan.budget,
        step.flops(module) / eager.flops,
        1 + plan.predicted_overhead,
        plan.gap,
        same(eager.seen, step.seen(module)),
        seconds,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--family", choices=FAMILIES, default="llama")
    parser.add_argument("--size", choices=SIZES, default="bench")
    parser.add_argument(
        "--shares", default="0.345,0.18,min", help="by commas; min: the smallest peak"
    )
    parser.add_argument("--out", type=Path, help="JSON (default benchmarks/results/shares-*.json)")
    options = parser.parse_args()
    step = Step(options.family, options.size, "cpu")
    eager = eager_of(step)
    rows = [row_of(step, eager, share) for share in options.shares.split(",")]
    print(tabulate([dataclasses.asdict(row) for row in rows], "keys", floatfmt=".4f"))
    results = {
        "family": options.family,
        "size": options.size,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "date": datetime.date.today().isoformat(),
        "rows": [dataclasses.asdict(row) for row in rows],
    }
    path = options.out or HERE / "results" / f"shares-{options.family}-{options.size}.json"
    path.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
