"""Recomputation and noisy codes, each alone and both in one plan: smallest peaks, and times at equal bytes.

python benchmarks/joint.py [--size small] [--families llama ...] [--shares 0.75 0.5] [--clock llama ...]

ways          what plans may do beside lossless codes
exact         recompute
codes         store tensors with noise
joint         both
kept          neither

Every family, noise at most 1 % of the minibatch's own variance.  Budgets lie at shares of the way from the
smallest peak of the joint plan to the peak with everything kept.  ``saved`` is what saved tensors make of a
smallest peak: no code can take more off it than that.  ``--clock`` families also run, the ways in turns.
Results go to a JSON file after each family, which takes the place of what was there of it.
"""

import argparse
import datetime
import json
import statistics
import warnings
from pathlib import Path
from typing import Any

import torch
from steps import FAMILIES, SIZES, Step, keep_freed_memory, side_by_side

import fxmem
from fxmem.api import analyzed, options_of
from fxmem.pipeline import Analysis, decide

HERE = Path(__file__).resolve().parent

WAYS = {
    "exact": ("recompute", "lossless"),
    "codes": ("lossless", "quantize"),
    "joint": ("recompute", "lossless", "quantize"),
    "kept": ("lossless",),
}
NOISE = fxmem.Noise(0.01)


def options_for(way: str, budget: Any) -> Any:
    return options_of(budget, allow=WAYS[way], noise=NOISE, on_infeasible="best")


def decided(analysis: Analysis, way: str, budget: Any) -> fxmem.Plan:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return decide(analysis, options_for(way, budget)).plan


def facts(way: str, plan: fxmem.Plan) -> dict[str, Any]:
    return {
        "way": way,
        "peak": plan.predicted_peak,
        "saved": plan.peak.live.get("saved activations", 0),
        "live": plan.peak.live,
        "seconds": plan.seconds,
        "added": plan.added_seconds,
        "noise": plan.noise.predicted if plan.noise else 0.0,
        "tier": plan.noise.tier if plan.noise else "exact",
        "backwards": plan.noise.backwards if plan.noise else 0,
    }


def floors(analysis: Analysis) -> dict[str, fxmem.Plan]:
    return {way: decided(analysis, way, "min") for way in WAYS}


def at_budget(analysis: Analysis, budget: int, lowest: dict[str, fxmem.Plan]) -> dict[str, Any]:
    """The plans that fit a budget, by way, and what they promise."""
    plans = {
        way: decided(analysis, way, budget)
        for way, least in lowest.items()
        if least.predicted_peak <= budget and way != "kept"
    }
    return {"budget": budget, "plans": plans, "rows": [facts(w, p) for w, p in plans.items()]}


def row(name: str, size: str, shares: list[float], clock: bool) -> dict[str, Any]:
    step = Step(name, size, "cpu")
    asked = options_for("joint", "min")
    given = (step.args, step.kwargs, None, None, ())
    with analyzed(step.model, asked, *given) as (analysis, _):
        lowest = floors(analysis)
        least, most = lowest["joint"].predicted_peak, lowest["joint"].keep_all_peak
        budgets = [int(least + share * (most - least)) for share in shares]
        found = [at_budget(analysis, budget, lowest) for budget in budgets]
    if clock:
        for one in found:
            one["clocked"] = clocked(step, one["budget"], one["plans"])
    for one in found:
        del one["plans"]
    return {
        "family": name,
        "size": size,
        "resident": lowest["exact"].resident,
        "baseline": lowest["exact"].baseline_peak,
        "kept": lowest["exact"].keep_all_peak,
        "floors": [facts(way, plan) for way, plan in lowest.items()],
        "budgets": found,
    }


def clocked(step: Step, budget: int, plans: dict[str, fxmem.Plan]) -> dict[str, Any]:
    """Measured seconds and peaks of each way, run in turns."""
    modules = {
        way: fxmem.optimize(
            step.model, budget, step.args, example_kwargs=step.kwargs, allow=WAYS[way],
            noise=NOISE, plan=plan,
        )
        for way, plan in plans.items()
    }  # fmt: skip
    peaks = {w: step.added_peak(m) + plans[w].resident for w, m in modules.items()}
    clocks = [lambda m=m: step.seconds(m) for m in modules.values()]
    rounds = side_by_side(clocks, 9)[2:]
    ways = list(modules)
    joint = ways.index("joint")
    return {
        "peaks": peaks,
        "seconds": {w: statistics.median(r[i] for r in rounds) for i, w in enumerate(ways)},
        "joint_over": {
            w: statistics.median(r[joint] / r[i] for r in rounds) for i, w in enumerate(ways)
        },
    }


def said(found: dict[str, Any]) -> str:
    peaks = {f["way"]: f["peak"] for f in found["floors"]}
    saved = {f["way"]: f["saved"] / f["peak"] for f in found["floors"]}
    lines = [
        f"{found['family']} {found['size']}: smallest peak {peaks['exact']} exact, "
        f"x{peaks['joint'] / peaks['exact']:.2f} with noise (saved tensors {saved['exact']:.0%} of it); "
        f"{peaks['kept']} without recomputation, x{peaks['codes'] / peaks['kept']:.2f} with noise "
        f"({saved['kept']:.0%})"
    ]
    for one in found["budgets"]:
        each = ", ".join(f"{r['way']} {r['added'] / r['seconds']:+.2%}" for r in one["rows"])
        lines.append(f"    {one['budget']}: {each} {one.get('clocked', {}).get('joint_over', '')}")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--families", nargs="+", default=[n for n in FAMILIES if "-" not in n])
    parser.add_argument("--size", choices=SIZES, default="small")
    parser.add_argument("--shares", nargs="+", type=float, default=[0.6, 0.25])
    parser.add_argument("--clock", nargs="*", default=[])
    parser.add_argument("--out", type=Path, default=HERE / "results" / "joint-cpu.json")
    options = parser.parse_args()
    torch.set_num_threads(1)
    keep_freed_memory()
    results = json.loads(options.out.read_text()) if options.out.exists() else {"rows": []}
    for name in options.families:
        found = row(name, options.size, options.shares, name in options.clock)
        print(said(found), flush=True)
        others = [r for r in results["rows"] if (r["family"], r["size"]) != (name, options.size)]
        results = {
            "when": f"{datetime.date.today()}",
            "torch": torch.__version__,
            "rows": [*others, found],
        }
        options.out.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
