"""Every model family under budgets: were the bytes kept, the bits equal, and what did it cost?

    python benchmarks/engine.py --size small --budgets 0.9x,0.6x,0.4x,0.3x,min --knob

Peaks are of forward and backward with the gradients set to None before, parameters, buffers and
inputs included. ``--knob`` adds the lowest peak that torch's own ``activation_memory_budget``
reaches on the same step, also run op by op.
"""

import argparse
import dataclasses
import datetime
import json
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from peers import SHARES, with_ratio
from steps import FAMILIES, HERE, SIZES, Step, alternating_seconds, same
from tabulate import tabulate

import fxmem
from fxmem.planning.remembered import forget

BUDGETS = "0.9x,0.6x,0.4x,0.3x,min"
PLENTY = "1TiB"
EAGER = "eager"
"""The row whose budget is, in bytes, what the unchanged step was measured to peak at."""

RUNS, RUNS_UNCHANGED = 7, 31
"""Timed pairs of steps, at least; more where nothing is asked, for there a few per cent matter."""

SECONDS_UNCHANGED = 12.0
"""And where nothing is asked, pairs until so much time has passed: short steps vary most."""

PREDICTED_WITHIN = 0.001
BASELINE_WITHIN = 0.01
FREE_OVERHEAD = 0.01
SLOWER_BY = 0.03
"""What an unchanged step's time may be off by."""


@dataclasses.dataclass
class Row:
    """One family under one budget. Bytes unless said; None where it was not found out.

    limit: the budget in bytes that the step was planned for, None for the smallest peak.
    refused_above: the smallest peak that a refusal names, which is then the limit.
    predicted: predicted / measured peak.  baseline: predicted / measured peak of eager.
    kept: measured peak within the limit; without one, within the prediction.
    exact: loss, gradients and buffers bitwise those of eager.
    overhead: predicted.  time_ratio: median of measured step / eager step measured beside it.
    optimize_seconds: capture, planning and compilation of the budget that was met.
    """

    family: str
    budget: str
    limit: int | None = None
    refused_above: int | None = None
    resident: int | None = None
    eager_peak: int | None = None
    baseline_peak: int | None = None
    predicted_peak: int | None = None
    peak: int | None = None
    predicted: float | None = None
    baseline: float | None = None
    kept: bool | None = None
    exact: bool | None = None
    recomputed: int | None = None
    overhead: float | None = None
    eager_seconds: float | None = None
    time_ratio: float | None = None
    optimize_seconds: float | None = None
    error: str | None = None


@dataclasses.dataclass
class Knob:
    """The peaks of torch's ratio on one family, beside the smallest peak fxmem was measured at."""

    family: str
    peaks: dict[str, int]
    errors: dict[str, str]
    resident: int
    eager_peak: int
    smallest_peak: int | None = None

    @property
    def lowest(self) -> int | None:
        return min(self.peaks.values(), default=None)


# -- Under a budget ----------------------------------------------------------------------------------


def optimize_timed(step: Step, budget: str | int) -> tuple[fxmem.OptimizedModule, float]:
    forget()
    began = time.perf_counter()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "fxmem: no plan fits")
        module = fxmem.optimize(
            step.model, budget, step.args, example_kwargs=step.kwargs, on_infeasible="best"
        )
    return module, time.perf_counter() - began


def fill(row: Row, step: Step, budget: str | int) -> None:
    """Optimize for the budget, or with the smallest plan if it is refused, and measure."""
    module, row.optimize_seconds = optimize_timed(step, budget)
    promised(row, module.plan)
    row.exact = same(step.seen(step.model), step.seen(module))  # warms both up, too
    measured(row, step, module)


def promised(row: Row, plan: fxmem.Plan) -> None:
    """What the plan says of itself."""
    row.limit, row.resident = plan.budget, plan.resident
    if plan.budget is not None and plan.predicted_peak > plan.budget:
        row.limit = row.refused_above = plan.predicted_peak
    row.predicted_peak, row.baseline_peak = plan.predicted_peak, plan.baseline_peak
    row.recomputed, row.overhead = len(plan.recomputed), plan.predicted_overhead


def measured(row: Row, step: Step, module: fxmem.OptimizedModule) -> None:
    """What the allocator and the clock say."""
    plan = module.plan
    row.eager_peak = step.added_peak(step.model) + plan.resident
    row.peak = step.added_peak(module) + plan.resident
    row.predicted = plan.predicted_peak / row.peak
    row.baseline = plan.baseline_peak / row.eager_peak
    row.kept = row.peak <= (plan.predicted_peak if row.limit is None else row.limit)
    unchanged = row.budget == PLENTY
    row.eager_seconds, row.time_ratio = alternating_seconds(
        step,
        module,
        RUNS_UNCHANGED if unchanged else RUNS,
        SECONDS_UNCHANGED if unchanged else 0.0,
    )


def rows_of(step: Step, budgets: list[str]) -> Iterator[Row]:
    """Nothing asked, then eager's own measured peak, then the budgets."""
    eager_peak = None
    for budget in (PLENTY, EAGER, *budgets):
        row = Row(step.family, budget)
        try:
            fill(row, step, eager_peak if budget == EAGER and eager_peak else budget)
        except Exception as error:  # one family's failure must not cost the others their figures
            row.error = f"{type(error).__name__}: {error}".splitlines()[0]
        eager_peak = eager_peak or row.eager_peak
        yield row
        if row.refused_above is not None:
            return  # what is smaller still is refused with the same plan


# -- torch's own ratio -------------------------------------------------------------------------------


def knob_of(step: Step, rows: list[Row]) -> Knob | None:
    """All shares on one family; None if its rows failed, for then nothing is there to compare."""
    done = [row for row in rows if row.error is None]
    if not done:
        return None
    resident, eager_peak = done[0].resident, done[0].eager_peak
    knob = Knob(step.family, {}, {}, resident, eager_peak, smallest_of(done))
    for share in SHARES:
        try:
            with with_ratio(step, share) as module:
                step.seen(module)
                knob.peaks[f"{share:g}"] = step.added_peak(module) + resident
        except Exception as error:
            knob.errors[f"{share:g}"] = f"{type(error).__name__}: {error}".splitlines()[0]
    return knob


def smallest_of(rows: list[Row]) -> int | None:
    """The measured peak where the smallest was asked for, by name or after a refusal."""
    peaks = [row.peak for row in rows if row.budget == "min" or row.refused_above]
    return max(peaks, default=None)


# -- Results -----------------------------------------------------------------------------------------


def misses(row: Row) -> list[str]:
    """Which promises the row breaks."""
    if row.error is not None:
        return [row.error]
    checks = {
        "over the budget": row.kept,
        "not exact": row.exact,
        f"predicted off by {abs(1 - row.predicted):.3%}": abs(1 - row.predicted)
        <= PREDICTED_WITHIN,
        f"baseline off by {abs(1 - row.baseline):.2%}": abs(1 - row.baseline) <= BASELINE_WITHIN,
        f"slower by {row.time_ratio - 1:.1%}": row.budget != PLENTY
        or row.time_ratio <= 1 + SLOWER_BY,
        "recomputes though nothing is asked": row.budget != PLENTY or not row.recomputed,
        f"eager's peak at +{row.overhead:.1%}": row.budget != EAGER
        or (row.overhead <= FREE_OVERHEAD and row.refused_above is None),
    }
    return [what for what, met in checks.items() if not met]


def knob_misses(knob: Knob) -> list[str]:
    if knob.lowest is None or knob.smallest_peak is None:
        return ["nothing to compare"]
    if knob.smallest_peak >= knob.lowest:
        return [f"torch's ratio goes lower, to {knob.lowest / knob.eager_peak:.3f}x"]
    return []


ROW_HEADERS = [
    "family",
    "budget",
    "refused above",
    "peak",
    "pred/peak",
    "pred/eager",
    "kept",
    "exact",
    "recomputed",
    "pred. time",
    "time",
    "optimize s",
    "misses",
]


def row_table(rows: list[Row]) -> str:
    return tabulate([row_cells(row) for row in rows], ROW_HEADERS, disable_numparse=True)


def row_cells(row: Row) -> list[str]:
    if row.error is not None:
        return [row.family, row.budget, *[""] * (len(ROW_HEADERS) - 3), row.error[:60]]
    refused = row.refused_above
    return [
        row.family,
        row.budget,
        f"{refused / row.baseline_peak:.3f}x" if refused else "",
        f"{row.peak / row.eager_peak:.3f}x",
        f"{row.predicted:.6f}",
        f"{row.baseline:.5f}",
        "yes" if row.kept else "NO",
        "yes" if row.exact else "NO",
        str(row.recomputed),
        f"+{row.overhead:.1%}",
        f"{row.time_ratio:.2f}x",
        f"{row.optimize_seconds:.1f}",
        "; ".join(misses(row)),
    ]


def knob_table(knobs: list[Knob]) -> str:
    return tabulate(
        [knob_cells(knob) for knob in knobs],
        headers=["family", "fxmem smallest", "ratio's lowest", "at share", "failed", "misses"],
        disable_numparse=True,
    )


def knob_cells(knob: Knob) -> list[str]:
    lowest, smallest = knob.lowest, knob.smallest_peak
    return [
        knob.family,
        f"{smallest / knob.eager_peak:.3f}x" if smallest else "",
        f"{lowest / knob.eager_peak:.3f}x" if lowest else "",
        min(knob.peaks, key=knob.peaks.get, default=""),
        str(len(knob.errors)),
        "; ".join(knob_misses(knob)),
    ]


def document(options: argparse.Namespace, rows: list[Row], knobs: list[Knob]) -> dict[str, Any]:
    """What is written as JSON."""
    cuda = options.device != "cpu"
    return {
        "device": torch.cuda.get_device_name() if cuda else "cpu",
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "date": datetime.date.today().isoformat(),
        "size": options.size,
        "runs": RUNS,
        "rows": [{**dataclasses.asdict(row), "misses": misses(row)} for row in rows],
        "knob": [
            {**dataclasses.asdict(knob), "lowest": knob.lowest, "misses": knob_misses(knob)}
            for knob in knobs
        ],
    }


def save(options: argparse.Namespace, rows: list[Row], knobs: list[Knob]) -> None:
    path = options.out or HERE / "results" / f"engine-{options.device}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(document(options, rows, knobs), indent=1) + "\n")


# -- Command line ------------------------------------------------------------------------------------


def read_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--families", default=",".join(FAMILIES), help="names, by commas")
    parser.add_argument("--size", choices=SIZES, default="small")
    parser.add_argument("--budgets", default=BUDGETS, help=f"by commas (default {BUDGETS})")
    parser.add_argument("--knob", action=argparse.BooleanOptionalAction, default=False)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--out", type=Path, help="JSON (default benchmarks/results/engine-*.json)")
    options = parser.parse_args()
    options.families = [name for name in options.families.split(",") if name]
    options.budgets = [budget for budget in options.budgets.split(",") if budget]
    if unknown := set(options.families) - set(FAMILIES):
        parser.error(f"unknown families {sorted(unknown)}; known are {', '.join(FAMILIES)}")
    return options


def main() -> None:
    """Budgets first, then the ratio; saved after each family, in case the run is cut short."""
    options = read_options()
    rows: list[Row] = []
    knobs: list[Knob] = []
    for family in options.families:
        mine = list(rows_of(Step(family, options.size, options.device), options.budgets))
        rows += mine
        save(options, rows, knobs)
        print(row_table(mine), flush=True)
    for family in options.families if options.knob else []:
        mine = [row for row in rows if row.family == family]
        knob = knob_of(Step(family, options.size, options.device), mine)
        if knob is not None:
            knobs.append(knob)
            save(options, rows, knobs)
            print(knob_table([knob]), flush=True)
    print(f"\n{row_table(rows)}")
    if knobs:
        print(f"\n{knob_table(knobs)}")


if __name__ == "__main__":
    main()
