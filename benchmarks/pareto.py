"""Peak against time: fxmem beside everything else that shrinks a step, on one machine in one run.

    python benchmarks/pareto.py --families llama,resnet --size small

For each family: eager, ``torch.utils.checkpoint`` around every first to fourth block, the same with
a policy that saves products, torch's ``activation_memory_budget`` over its range; and fxmem, at a
ladder of budgets and at the very peak that each peer's point was measured at.  Peaks are shares of
eager's activations and gradients; FLOPs and time are of eager's, too.  Writes JSON and a picture.
"""

import argparse
import contextlib
import dataclasses
import datetime
import json
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from peers import EVERY, SHARES, blocks_of, with_checkpoints, with_ratio
from steps import FAMILIES, HERE, SIZES, Step, alternating_seconds, same
from tabulate import tabulate

import fxmem

LADDER = (0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.25, 0.2, 0.15)
"""Budgets, as shares of eager's activations and gradients."""

RUNS, SECONDS = 5, 1.5
"""Timed pairs of steps a point, at least, and until so many seconds have passed."""

NOISE = 0.02
"""What times and FLOPs of the same peak may differ by."""


@dataclasses.dataclass
class Point:
    """One way to run one family's step.

    peak: measured bytes, residents included.  share: of eager's activations and gradients.
    flops, time: of eager's.  exact: loss, gradients and buffers bitwise eager's.
    predicted_time: fxmem's.  answers: the peer's point whose measured peak was the budget.
    """

    family: str
    way: str
    setting: str
    peak: int | None = None
    share: float | None = None
    flops: float | None = None
    time: float | None = None
    exact: bool | None = None
    budget: int | None = None
    predicted_time: float | None = None
    gap: float | None = None
    answers: str | None = None
    error: str | None = None


@dataclasses.dataclass(frozen=True)
class Eager:
    """What everything is measured against."""

    resident: int
    peak: int
    flops: int
    seen: list[Any]

    def share(self, peak: int) -> float:
        return (peak - self.resident) / (self.peak - self.resident)

    def budget(self, share: float) -> int:
        return self.resident + int(share * (self.peak - self.resident))


def eager_of(step: Step) -> Eager:
    resident = fxmem.plan(step.model, "1TiB", step.args, example_kwargs=step.kwargs).resident
    seen = step.seen(step.model)
    return Eager(resident, step.added_peak(step.model) + resident, step.flops(step.model), seen)


# -- One point ---------------------------------------------------------------------------------------


def measured(point: Point, step: Step, eager: Eager, module: Any) -> None:
    """What the allocator, the counter and the clock say, inside the peer's context."""
    point.exact = same(eager.seen, step.seen(module))
    point.peak = step.added_peak(module) + eager.resident
    point.share = eager.share(point.peak)
    point.flops = step.flops(module) / eager.flops


def timed(point: Point, step: Step, baseline: Step, module: Any) -> None:
    """Beside an unchanged twin, since peers patch their model."""
    _, point.time = alternating_seconds(step, module, RUNS, SECONDS, baseline)


def ways(step: Step) -> Iterator[tuple[str, str, contextlib.AbstractContextManager[Any]]]:
    """Every peer at every setting."""
    blocks = len(blocks_of(step))
    for every in EVERY:
        if every == 1 or every < blocks:
            yield "checkpoint", f"every {every}", with_checkpoints(step, every)
    for share in (1.0, 0.5):
        yield "selective", f"save {share:g} of products", with_checkpoints(step, 1, share)
    for share in SHARES:
        yield "ratio", f"{share:g}", with_ratio(step, share)


def peer_points(step: Step, twin: Step, eager: Eager) -> Iterator[Point]:
    for way, setting, context in ways(step):
        point = Point(step.family, way, setting)
        try:
            with context as module:
                measured(point, step, eager, module)
                timed(point, step, twin, module)
        except Exception as error:  # a peer that fails has no point; that is worth a line, too
            point.error = f"{type(error).__name__}: {error}".splitlines()[0]
        yield point


def our_point(
    step: Step, twin: Step, eager: Eager, budget: int | str, setting: str, cost: str
) -> Point:
    point = Point(step.family, "fxmem", setting)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "fxmem: no plan fits")
            module = fxmem.optimize(
                step.model,
                budget,
                step.args,
                example_kwargs=step.kwargs,
                on_infeasible="best",
                cost=cost,
            )
        plan = module.plan
        point.budget, point.gap = plan.budget, plan.gap
        point.predicted_time = 1 + plan.predicted_overhead
        measured(point, step, eager, module)
        timed(point, step, twin, module)
    except Exception as error:
        point.error = f"{type(error).__name__}: {error}".splitlines()[0]
    return point


def our_points(
    step: Step, twin: Step, eager: Eager, peers: list[Point], cost: str
) -> Iterator[Point]:
    """The ladder down to the smallest peak, then an answer to each peer's point."""
    smallest = our_point(step, twin, eager, "min", "min", cost)
    yield smallest
    for share in LADDER:
        if smallest.share is None or share > smallest.share:
            yield our_point(step, twin, eager, eager.budget(share), f"{share:g}", cost)
    for peer in peers:
        if peer.peak is not None and peer.share is not None and peer.share <= 1:
            name = f"{peer.way} {peer.setting}"
            point = our_point(step, twin, eager, peer.peak, name, cost)
            point.answers = name
            yield point


# -- Results -----------------------------------------------------------------------------------------


def behind(points: list[Point]) -> list[str]:
    """Where a peer is ahead: more than noise less time or FLOPs at a peak that fxmem does not beat."""
    found = []
    answers = {(p.family, p.answers): p for p in points if p.answers}
    for peer in points:
        mine = answers.get((peer.family, f"{peer.way} {peer.setting}"))
        if mine is None or peer.way == "fxmem":
            continue
        where = f"{peer.family}, {peer.way} {peer.setting}"
        if mine.error or mine.peak is None or peer.peak is None:
            found.append(f"{where}: {mine.error}")
            continue
        if mine.peak > peer.peak:
            found.append(f"{where}: peak {mine.share:.3f} > {peer.share:.3f}")
        for what in ("flops", "time"):
            ours, theirs = getattr(mine, what), getattr(peer, what)
            if ours > theirs * (1 + NOISE):
                found.append(f"{where}: {what} {ours:.3f} > {theirs:.3f}")
    return found


def floors(points: list[Point]) -> list[tuple[str, float, float]]:
    """For each family: fxmem's smallest share, the peers' smallest."""
    found = []
    for family in dict.fromkeys(p.family for p in points):
        mine = [p.share for p in points if p.family == family and p.way == "fxmem" and p.share]
        theirs = [p.share for p in points if p.family == family and p.way != "fxmem" and p.share]
        if mine and theirs:
            found.append((family, min(mine), min(theirs)))
    return found


def table(points: list[Point]) -> str:
    lines = [
        [
            p.family,
            p.way,
            p.setting,
            _number(p.share),
            _number(p.flops),
            _number(p.time),
            _number(p.predicted_time),
            {True: "yes", False: "no", None: ""}[p.exact],
            p.error or "",
        ]
        for p in points
    ]
    headers = ["family", "way", "setting", "share", "FLOPs", "time", "predicted", "exact", "error"]
    return tabulate(lines, headers, disable_numparse=True)


def _number(x: float | None) -> str:
    return "" if x is None else f"{x:.3f}"


def picture(points: list[Point], path: Path) -> None:
    """Peak against time, one panel a family."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    families = list(dict.fromkeys(p.family for p in points))
    columns = min(4, len(families))
    rows = -(-len(families) // columns)
    figure, axes = pyplot.subplots(
        rows, columns, figsize=(3.6 * columns, 3.0 * rows), squeeze=False, layout="constrained"
    )
    marks = {"fxmem": "o-", "checkpoint": "s", "selective": "D", "ratio": "^", "eager": "*"}
    for axis in axes.flat[len(families) :]:
        axis.set_visible(False)
    for axis, family in zip(axes.flat, families, strict=False):
        for way, mark in marks.items():
            mine = [
                (p.share, p.time)
                for p in points
                if p.family == family and p.way == way and p.share and p.time and not p.answers
            ]
            if mine:
                axis.plot(*zip(*sorted(mine), strict=True), mark, label=way, markersize=5)
        axis.set_title(family)
        axis.set_xlabel("peak / eager's (activations, gradients)")
        axis.set_ylabel("time / eager's")
        axis.grid(alpha=0.3)
    axes.flat[0].legend(fontsize="small")
    figure.savefig(path, dpi=130)
    pyplot.close(figure)


def save(options: argparse.Namespace, points: list[Point]) -> None:
    cuda = options.device != "cpu"
    document = {
        "device": torch.cuda.get_device_name() if cuda else "cpu",
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "date": datetime.date.today().isoformat(),
        "size": options.size,
        "cost": options.cost,
        "points": [dataclasses.asdict(p) for p in points],
        "behind": behind(points),
        "floors": floors(points),
    }
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(document, indent=1) + "\n")
    if points:
        picture(points, options.out.with_suffix(".png"))


# -- Command line ------------------------------------------------------------------------------------


def read_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    plain = [name for name, family in FAMILIES.items() if not family.has_dropout]
    parser.add_argument("--families", default=",".join(plain), help="names, by commas")
    parser.add_argument("--size", choices=SIZES, default="small")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--cost", default="auto", help="how fxmem predicts time (default auto)")
    parser.add_argument("--out", type=Path, help="JSON (default benchmarks/results/pareto-*.json)")
    options = parser.parse_args()
    options.families = [name for name in options.families.split(",") if name]
    if unknown := set(options.families) - set(FAMILIES):
        parser.error(f"unknown families {sorted(unknown)}; known are {', '.join(FAMILIES)}")
    options.out = options.out or HERE / "results" / f"pareto-{options.device}.json"
    return options


def main() -> None:
    """One family after the other; saved after each, in case the run is cut short."""
    options = read_options()
    points: list[Point] = []
    for family in options.families:
        step, twin = (Step(family, options.size, options.device) for _ in range(2))
        eager = eager_of(step)
        mine = [Point(family, "eager", "", eager.peak, 1.0, 1.0, 1.0, True)]
        mine += peer_points(step, twin, eager)
        mine += list(our_points(step, twin, eager, mine[1:], options.cost))
        points += mine
        save(options, points)
        print(f"\n{table(mine)}", flush=True)
    print("\nsmallest share: fxmem, peers")
    print(tabulate(floors(points), floatfmt=".3f"))
    print("\n" + ("\n".join(behind(points)) or "no peer is ahead anywhere"))


if __name__ == "__main__":
    main()
