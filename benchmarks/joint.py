"""Recomputation and noisy codes, each alone and both in one plan: smallest peaks, and times at equal bytes.

python benchmarks/joint.py floors [--families llama gpt2 vit] [--size small]
python benchmarks/joint.py budgets [--families ...] [--size small] [--shares 0.6 0.25] [--below 0.3 0.05]

ways          what plans may do beside lossless codes
recompute     recompute, without lossless codes
exact         recompute
codes         store tensors with noise
joint         both
kept          neither

Noise is at most 1 % of the minibatch's own variance.  ``saved`` is what saved tensors make of a smallest
peak: no code can take more off it than that.  Budgets lie at shares of the way from the smallest peak of
the codes alone to the peak with everything kept, where each way has a plan, and ``--below`` of the way
from the smallest peak of both to that of the codes.  Ways that fit also run, in turns, and are planned
by what operators take on this machine.  Results go to a JSON file after each family, in the place of what
was there of it.
"""

import argparse
import datetime
import json
import statistics
import warnings
from pathlib import Path
from typing import Any

import torch
from steps import FAMILIES, HERE, SIZES, Step, keep_freed_memory, side_by_side

import fxmem
from fxmem.api import analyzed, options_of
from fxmem.steps.analyze import Analysis
from fxmem.steps.pipeline import decide

WAYS = {
    "recompute": ("recompute",),
    "exact": ("recompute", "lossless"),
    "codes": ("lossless", "quantize"),
    "joint": ("recompute", "lossless", "quantize"),
    "kept": ("lossless",),
}
NOISE = fxmem.Noise(0.01)


def options_for(way: str, budget: Any, cost: str = "auto") -> Any:
    return options_of(budget, allow=WAYS[way], noise=NOISE, on_infeasible="best", cost=cost)


def decided(analysis: Analysis, way: str, budget: Any) -> fxmem.Plan:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return decide(analysis, options_for(way, budget)).plan


def facts(way: str, plan: fxmem.Plan) -> dict[str, Any]:
    return {
        "way": way,
        "peak": plan.predicted_peak,
        "least": plan.certificate.least if plan.certificate else None,
        "saved": plan.peak.live.get("saved activations", 0),
        "live": plan.peak.live,
        "seconds": plan.seconds,
        "added": plan.added_seconds,
        "noise": plan.noise.predicted if plan.noise else 0.0,
        "tier": plan.noise.tier if plan.noise else "exact",
        "backwards": plan.noise.backwards if plan.noise else 0,
        "codes": sum(1 for d in plan.decisions if d.error),
    }


def floors(step: Step, analysis: Analysis, options: argparse.Namespace) -> dict[str, Any]:
    plans = {way: decided(analysis, way, "min") for way in options.ways}
    one = plans[options.ways[0]]
    return {
        "resident": one.resident,
        "baseline": one.baseline_peak,
        "floors": [facts(way, plan) for way, plan in plans.items()],
    }


def budgets(step: Step, analysis: Analysis, options: argparse.Namespace) -> dict[str, Any]:
    """With the plans themselves, by way, for ``clock``."""
    lowest, codes = (decided(analysis, way, "min") for way in ("joint", "codes"))
    kept, least, low = codes.keep_all_peak, codes.predicted_peak, lowest.predicted_peak
    asked = [least + int(share * (kept - least)) for share in options.shares]
    asked += [low + int(share * (least - low)) for share in options.below]
    found = []
    for budget in asked:
        plans = {way: decided(analysis, way, budget) for way in ("exact", "codes", "joint")}
        found.append({"budget": budget, "plans": plans})
    return {"kept": kept, "least": least, "lowest": low, "budgets": found}


ROUNDS = 31
"""The first two are not counted."""


def clock(step: Step, row: dict[str, Any]) -> None:
    """Run the plans that fit, and put figures in the place of plans."""
    for one in row["budgets"]:
        plans, budget = one["plans"], one["budget"]
        one["plans"] = [facts(way, plan) for way, plan in plans.items()]
        fitting = {way: plan for way, plan in plans.items() if plan.predicted_peak <= budget}
        if "joint" in fitting:
            one["clocked"] = clocked(step, budget, fitting)


def clocked(step: Step, budget: int, plans: dict[str, fxmem.Plan]) -> dict[str, Any]:
    """Measured seconds and peaks of each way, run in turns."""
    modules = {
        way: fxmem.optimize(
            step.model, budget, step.args, example_kwargs=step.kwargs, allow=WAYS[way],
            noise=NOISE, plan=plan, cost="measure",
        )
        for way, plan in plans.items()
    }  # fmt: skip
    peaks = {w: step.added_peak(m) + plans[w].resident for w, m in modules.items()}
    clocks = [lambda m=m: step.seconds(m) for m in modules.values()]
    rounds = side_by_side(clocks, ROUNDS)[2:]
    ways = list(modules)
    joint = ways.index("joint")
    return {
        "peaks": peaks,
        "seconds": {w: statistics.median(r[i] for r in rounds) for i, w in enumerate(ways)},
        "joint_over": {
            w: statistics.median(r[joint] / r[i] for r in rounds) for i, w in enumerate(ways)
        },
    }


def floors_said(row: dict[str, Any]) -> str:
    each = [f"{f['way']} {f['peak']} (saved {f['saved'] / f['peak']:.0%})" for f in row["floors"]]
    return f"smallest peaks: {', '.join(each)}"


def budgets_said(row: dict[str, Any]) -> str:
    lines = []
    for one in row["budgets"]:
        each = ", ".join(
            f"{p['way']} {p['added'] / p['seconds']:+.2%}"
            if p["peak"] <= one["budget"]
            else p["way"] + " -"
            for p in one["plans"]
        )
        lines.append(f"{one['budget']}: {each} {one.get('clocked', {}).get('joint_over', '')}")
    return "\n    ".join(["added time", *lines])


TASKS = {"floors": (floors, floors_said), "budgets": (budgets, budgets_said)}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("task", choices=TASKS)
    parser.add_argument("--families", nargs="+", default=[n for n in FAMILIES if "-" not in n])
    parser.add_argument("--size", choices=SIZES, default="small")
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=list(WAYS), help="of floors")
    parser.add_argument("--shares", nargs="+", type=float, default=[0.6, 0.25])
    parser.add_argument("--below", nargs="+", type=float, default=[0.3, 0.05])
    parser.add_argument("--out", type=Path, default=HERE / "results" / "joint-cpu.json")
    options = parser.parse_args()
    torch.set_num_threads(1)
    keep_freed_memory()
    find, say = TASKS[options.task]
    for name in options.families:
        step = Step(name, options.size, "cpu")
        given = (step.args, step.kwargs, None, None, ())
        cost = "measure" if options.task == "budgets" else "auto"
        with analyzed(step.model, options_for("joint", "min", cost), *given) as (analysis, _):
            row = {"family": name, "size": options.size, **find(step, analysis, options)}
        if options.task == "budgets":
            clock(step, row)
        print(name, options.size, say(row), flush=True)
        write(options.out, options.task, row)


def write(path: Path, task: str, row: dict[str, Any]) -> None:
    results = json.loads(path.read_text()) if path.exists() else {}
    rows = [r for r in results.get(task, []) if (r["family"], r["size"]) != _key(row)]
    about = {"date": f"{datetime.date.today()}", "torch": torch.__version__}
    results = {**results, **about, task: [*rows, row]}
    path.write_text(json.dumps(results, indent=1) + "\n")


def _key(row: dict[str, Any]) -> tuple[str, str]:
    return row["family"], row["size"]


if __name__ == "__main__":
    main()
