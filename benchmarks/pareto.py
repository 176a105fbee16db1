"""Peak against time: fxmem beside everything else that shrinks a step, on one machine in one run.

    python benchmarks/pareto.py --families llama,resnet --size small

For each family: eager, ``torch.utils.checkpoint`` around every first to fourth block, the same with
a policy that saves products, torch's ``activation_memory_budget`` over its range; and fxmem, at a
ladder of budgets and at the very peak that each peer's point was measured at.  Peaks are shares of
eager's activations and gradients; FLOPs and time are of eager's, too.  A peer and fxmem's answer to
it are timed in turns, and eager with them.  Plans minimise time; where one runs more FLOPs than the
peer, a plan of few FLOPs answers in its place.  Writes JSON and a picture.
"""

import argparse
import contextlib
import dataclasses
import datetime
import functools
import json
import statistics
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from peers import EVERY, blocks_of, with_checkpoints, with_ratio
from steps import FAMILIES, HERE, SIZES, Step, keep_freed_memory, same, side_by_side
from tabulate import tabulate

import fxmem
from fxmem.analysis.cost import CostModel
from fxmem.api import read_options
from fxmem.graphs.capture import StepCall, capture
from fxmem.steps.analyze import analyze, unchanged_step
from fxmem.steps.options import Options
from fxmem.steps.pipeline import decide

Module = Callable[..., Any]

LADDER = (0.9, 0.75, 0.6, 0.5, 0.4, 0.3, 0.25, 0.2, 0.15)
"""Budgets, as shares of eager's activations and gradients."""

RATIOS = (0.8, 0.4, 0.2, 0.1, 0.0)
"""Values of ``activation_memory_budget``."""

RUNS, SECONDS = 7, 1.0
"""Timed rounds of steps a point, at least, and until so many seconds have passed."""

NOISE = 0.02
"""What times and FLOPs of the same peak may differ by."""

FEW_FLOPS = CostModel("few flops", flops=5e10, bandwidth=1e11, launch=3e-6)
"""A processor whose memory is ten times as fast: plans for it run few floating-point operations again."""


@dataclasses.dataclass
class Point:
    """One way to run one family's step.

    peak: measured bytes, residents included.  share: of eager's activations and gradients.
    flops, time: of eager's.  exact: loss, gradients and buffers bitwise eager's.
    predicted_time, gap: the plan's.  answers: the peer's point whose measured peak was the budget.
    few: a plan of few FLOPs, of which no time is predicted.
    beside: median of fxmem's seconds over the peer's in the same round; against: over those of the
    captured step with everything kept, which is what a predicted time is relative to.
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
    few: bool = False
    beside: float | None = None
    against: float | None = None
    error: str | None = None

    @property
    def name(self) -> str:
        return f"{self.way} {self.setting}"


@dataclasses.dataclass(frozen=True)
class Eager:
    """What everything is measured against: a step that nobody patches."""

    step: Step
    resident: int
    peak: int
    flops: int
    seen: list[Any]

    def share(self, peak: int) -> float:
        return (peak - self.resident) / (self.peak - self.resident)

    def budget(self, share: float) -> int:
        return self.resident + int(share * (self.peak - self.resident))

    def seconds(self) -> float:
        return self.step.seconds(self.step.model)


def eager_of(step: Step) -> Eager:
    resident = fxmem.plan(step.model, "1TiB", step.args, example_kwargs=step.kwargs).resident
    seen = step.seen(step.model)
    return Eager(
        step, resident, step.added_peak(step.model) + resident, step.flops(step.model), seen
    )


def measured(point: Point, step: Step, eager: Eager, module: Any) -> None:
    """What the allocator and the counter say, inside the peer's context."""
    point.exact = same(eager.seen, step.seen(module))
    point.peak = step.added_peak(module) + eager.resident
    point.share = eager.share(point.peak)
    point.flops = step.flops(module) / eager.flops


@contextlib.contextmanager
def failing(point: Point) -> Iterator[None]:
    """What fails has no figures; that is worth a line, too."""
    try:
        yield
    except Exception as error:
        point.error = f"{type(error).__name__}: {error}".splitlines()[0]


# -- Peers -------------------------------------------------------------------------------------------

Way = Callable[[Step], contextlib.AbstractContextManager[Any]]


def ways(step: Step) -> Iterator[tuple[Point, Way]]:
    """Every peer at every setting: its point, with nothing measured, and how to run it."""
    blocks = len(blocks_of(step))
    for every in EVERY:
        if every == 1 or every < blocks:
            point = Point(step.family, "checkpoint", f"every {every}")
            yield point, lambda step, every=every: with_checkpoints(step, every)
    for share in (1.0, 0.5):
        point = Point(step.family, "selective", f"save {share:g} of products")
        yield point, lambda step, share=share: with_checkpoints(step, 1, share)
    for share in RATIOS:
        point = Point(step.family, "ratio", f"{share:g}")
        yield point, lambda step, share=share: with_ratio(step, share)


# -- fxmem -------------------------------------------------------------------------------------------


def plans(step: Step, cost: str | CostModel, budgets: Iterable[int]) -> Iterator[fxmem.Plan]:
    """The smallest plan, and one for each budget above it; as ``plan`` gives, captured once for all."""
    call = StepCall(step.model, step.args, step.kwargs)

    def options(budget: int | str) -> Options:
        return read_options(
            step.model, budget, allow=("recompute", "lossless"), noise=0.01, reserve=0,
            on_infeasible="best", compiler="eager", cost=cost, plan=None,
        )  # fmt: skip

    unchanged = unchanged_step(call)
    with torch.enable_grad(), capture(call) as captured:
        analysis = analyze(captured.graph, call, unchanged, options("min").cost)
        smallest = decide(analysis, options("min")).plan
        yield smallest
        for budget in budgets:
            large = budget > smallest.predicted_peak
            yield decide(analysis, options(budget)).plan if large else smallest


Asked = tuple[str, str | None, int]
"""A setting, the peer's point that it answers, and the budget."""


def our_points(
    step: Step, eager: Eager, peers: list[Point], cost: str
) -> list[tuple[Point, Module | None]]:
    """The smallest peak, the ladder down to it, and an answer to each peer's point."""
    asked: list[Asked] = [("min", None, 0)]
    asked += [(f"{share:g}", None, eager.budget(share)) for share in LADDER]
    asked += [(p.name, p.name, p.peak) for p in peers if p.peak and p.peak <= eager.peak]
    found = list(planned(step, eager, asked, cost))
    flops = {p.name: p.flops for p in peers}
    more = {p.answers for p, _ in found if p.answers and _more(p.flops, flops[p.answers])}
    again = [one for one in asked if one[1] in more]
    few = {p.answers: (p, m) for p, m in planned(step, eager, again, FEW_FLOPS)} if again else {}
    return [few.get(point.answers, (point, module)) for point, module in found]


def _more(mine: float | None, theirs: float | None) -> bool:
    return mine is not None and theirs is not None and mine > theirs * (1 + NOISE)


def planned(
    step: Step, eager: Eager, asked: list[Asked], cost: str | CostModel
) -> Iterator[tuple[Point, Module | None]]:
    """One point for each that is asked; nothing is timed."""
    modules: dict[Any, Module | None] = {}
    made = list(plans(step, cost, (budget for _, _, budget in asked)))[1:]
    for (setting, answers, budget), plan in zip(asked, made, strict=True):
        if plan.smallest and setting != "min" and answers is None:
            continue  # the ladder ends above the smallest peak
        point = Point(step.family, "fxmem", setting, answers=answers, budget=budget, gap=plan.gap)
        point.few = cost is FEW_FLOPS
        point.predicted_time = None if point.few else 1 + plan.predicted_overhead
        module = modules.get(plan.decisions)
        with failing(point):
            module = module or replayed(step, plan)
            measured(point, step, eager, module)
        modules[plan.decisions] = module
        yield point, module


def replayed(step: Step, plan: fxmem.Plan) -> Module:
    """The optimized module with this plan."""
    return fxmem.optimize(
        step.model, plan.predicted_peak, step.args, example_kwargs=step.kwargs, plan=plan
    )


def kept_whole(step: Step) -> Module:
    """The captured step with nothing done to it."""
    return fxmem.optimize(step.model, "1TiB", step.args, example_kwargs=step.kwargs)


# -- One family --------------------------------------------------------------------------------------


def family_points(family: str, options: argparse.Namespace) -> list[Point]:
    """Peers' peaks first, since they are our budgets; then all the times."""
    base, theirs, mine = (Step(family, options.size, options.device) for _ in range(3))
    eager = eager_of(base)
    peers = list(ways(theirs))
    for point, way in peers:
        with failing(point), way(theirs) as module:
            measured(point, theirs, eager, module)
    ours = our_points(mine, eager, [point for point, _ in peers], options.cost)
    answers = {point.answers: (point, module) for point, module in ours if point.answers}
    for point, way in peers:
        if point.error is None:
            with way(theirs) as module:
                timed(point, theirs, module, eager, mine, *answers.get(point.name, ()))
    kept = kept_whole(mine)
    for point, module in ours:
        if point.error is None:
            clocks = [functools.partial(mine.seconds, m) for m in (kept, module)]
            rounds = side_by_side([eager.seconds, *clocks], RUNS, SECONDS)
            point.against = statistics.median(r[2] / r[1] for r in rounds)
            if not point.answers:
                point.time = statistics.median(r[2] / r[0] for r in rounds)
    unchanged = Point(family, "eager", "", eager.peak, 1.0, 1.0, 1.0, True)
    return [unchanged, *(p for p, _ in peers), *(p for p, _ in ours)]


def timed(
    peer: Point,
    theirs: Step,
    module: Any,
    eager: Eager,
    mine: Step,
    answer: Point | None = None,
    answer_module: Any = None,
) -> None:
    """The peer, and fxmem's answer if there is one, in turns with eager."""
    clocks = [eager.seconds, lambda: theirs.seconds(module)]
    if answer is not None:
        clocks.append(lambda: mine.seconds(answer_module))
    theirs.seconds(module)  # compiled again: its context was left meanwhile
    rounds = side_by_side(clocks, RUNS, SECONDS)
    peer.time = statistics.median(r[1] / r[0] for r in rounds)
    if answer is not None:
        answer.time = statistics.median(r[2] / r[0] for r in rounds)
        answer.beside = statistics.median(r[2] / r[1] for r in rounds)


# -- Results -----------------------------------------------------------------------------------------


def behind(points: list[Point]) -> list[str]:
    """Where a peer is ahead: more than noise less time or FLOPs at a peak that fxmem does not beat."""
    found = []
    answers = {(p.family, p.answers): p for p in points if p.answers}
    for peer in points:
        mine = answers.get((peer.family, peer.name))
        if mine is None:
            continue
        where = f"{peer.family}, {peer.name}"
        if mine.error or mine.peak is None or peer.peak is None:
            found.append(f"{where}: {mine.error}")
            continue
        if mine.peak > peer.peak:
            found.append(f"{where}: peak {mine.share:.3f} > {peer.share:.3f}")
        if _more(mine.flops, peer.flops):
            found.append(f"{where}: flops {mine.flops:.3f} > {peer.flops:.3f}")
        if mine.beside > 1 + NOISE:
            found.append(
                f"{where}: time {mine.time:.3f} > {peer.time:.3f}, {mine.beside:.3f} of it"
            )
    return found


def prediction(points: list[Point]) -> dict[str, Any]:
    """How far predicted times are off the measured ones: error relative to the measured time."""
    errors = {
        f"{p.family}, {p.setting}": p.predicted_time / p.against - 1
        for p in points
        if p.predicted_time and p.against
    }
    if not errors:
        return {}
    worst = max(errors, key=lambda name: abs(errors[name]))
    return {
        "points": len(errors),
        "median": statistics.median(map(abs, errors.values())),
        "bias": statistics.median(errors.values()),
        "worst": errors[worst],
        "worst_at": worst,
    }


def floors(points: list[Point]) -> list[tuple[str, float, float]]:
    """For each family: fxmem's smallest share, the peers' smallest."""
    found = []
    for family in dict.fromkeys(p.family for p in points):
        mine = [p.share for p in points if p.family == family and p.way == "fxmem" and p.share]
        theirs = [
            p.share
            for p in points
            if p.family == family and p.way not in ("fxmem", "eager") and p.share
        ]
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
            _number(p.against),
            _number(p.beside),
            {True: "yes", False: "no", None: ""}[p.exact],
            p.error or "",
        ]
        for p in points
    ]
    headers = ["family", "way", "setting", "share", "FLOPs", "time"]
    headers += ["predicted", "against", "beside", "exact", "error"]
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
    named = {way: line for axis in axes.flat for line, way in _legend(axis)}
    figure.legend(named.values(), named.keys(), loc="outside lower center", ncols=len(marks))
    figure.savefig(path, dpi=130)
    pyplot.close(figure)


def _legend(axis: Any) -> Iterator[tuple[Any, str]]:
    return zip(*axis.get_legend_handles_labels(), strict=True)


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
        "prediction": prediction(points),
    }
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(document, indent=1) + "\n")
    if points:
        picture(points, options.out.with_suffix(".png"))


# -- Command line ------------------------------------------------------------------------------------


def read_options_given() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    plain = [name for name, family in FAMILIES.items() if not family.has_dropout]
    parser.add_argument("--families", default=",".join(plain), help="names, by commas")
    parser.add_argument("--size", choices=SIZES, default="small")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--cost", default="measure", help="how fxmem predicts time")
    parser.add_argument("--out", type=Path, help="JSON (default benchmarks/results/pareto-*.json)")
    parser.add_argument("--add", action="store_true", help="keep the other families in that file")
    options = parser.parse_args()
    options.families = [name for name in options.families.split(",") if name]
    if unknown := set(options.families) - set(FAMILIES):
        parser.error(f"unknown families {sorted(unknown)}; known are {', '.join(FAMILIES)}")
    options.out = options.out or HERE / "results" / f"pareto-{options.device}.json"
    return options


def main() -> None:
    """One family after the other; saved after each, in case the run is cut short."""
    options = read_options_given()
    keep_freed_memory()
    points: list[Point] = []
    if options.add and options.out.exists():
        known = [Point(**p) for p in json.loads(options.out.read_text())["points"]]
        points = [p for p in known if p.family not in options.families]
    for family in options.families:
        began = time.perf_counter()
        mine = family_points(family, options)
        points += mine
        save(options, points)
        print(f"\n{table(mine)}\n{time.perf_counter() - began:.0f} s", flush=True)
    print("\nsmallest share: fxmem, peers")
    print(tabulate(floors(points), floatfmt=".3f"))
    print("\nprediction of time:", json.dumps(prediction(points)))
    print("\n" + ("\n".join(behind(points)) or "no peer is ahead anywhere"))


if __name__ == "__main__":
    main()
