"""Planning time and gap against the size of the graph; and plans against each other and the best.

    python benchmarks/planning.py --nodes 500,2000,10000,30000 --budgets 0.5,0.35

Steps that no model stands behind, in three shapes: deep (transformer blocks, one after the other),
wide (blocks of parallel branches that a concatenation joins) and irregular (every operator reads
something at random of what was made lately, or long ago).  Then the families of the tests at
``--rungs`` budgets each: is a plan ever slower for a larger budget?  And random steps that are small
enough to try every choice of kept values: how far are plans from the best?  Capture is not timed.
Writes JSON.
"""

import argparse
import dataclasses
import datetime
import itertools
import json
import random
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import torch
from tabulate import tabulate
from torch import fx

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent), str(HERE.parent / "tests")]

from families import FAMILIES, SIZES  # noqa: E402
from optimum import distances  # noqa: E402

from fxmem.analysis.dataflow import Dataflow, Operator, Value  # noqa: E402
from fxmem.graphs.capture import StepCall, capture  # noqa: E402
from fxmem.planning.planner import Planner  # noqa: E402
from fxmem.steps.analyze import analyze, unchanged_step  # noqa: E402

NODE = cast(fx.Node, None)
"""The planner looks at numbers alone."""

MIB = 2**20


class Tape:
    """Records a forward, then writes its backward as automatic differentiation does."""

    def __init__(self) -> None:
        self.values: list[Value] = [Value(MIB, NODE, resident=True)]
        self.forward: list[Operator] = []
        self.saved: list[tuple[int, ...]] = []

    def call(
        self, reads: list[int], nbytes: int, seconds: float, saves: str = "", weight: int = 0
    ) -> int:
        """One operator.  saves: what its backward reads, of "i"nputs and "o"utput."""
        made = len(self.values)
        self.values.append(Value(nbytes, NODE, producer=len(self.forward)))
        self.forward.append(
            Operator(NODE, False, tuple(reads), (made,), 0, seconds, True, 0, (made,))
        )
        self.saved.append((*(reads if "i" in saves else ()), *((made,) if "o" in saves else ())))
        if weight:  # its gradient is held to the end
            self.saved[-1] = (*self.saved[-1], -weight)
        return made

    def step(self, loss: int) -> Dataflow:
        """The forward so far, the loss that it returns, and the backward."""
        self.values[loss].result = True
        self.values.append(Value(4, NODE, tangent=True, held=True))
        gradients = {loss: len(self.values) - 1}
        operators = list(self.forward)

        def backward(reads: tuple[int, ...], nbytes: int, seconds: float, final: bool) -> int:
            made = len(self.values)
            self.values.append(Value(nbytes, NODE, producer=len(operators), gradient=final))
            operators.append(Operator(NODE, True, reads, (made,), 0, seconds))
            return made

        for i in reversed(range(len(self.forward))):
            op = self.forward[i]
            sent = gradients.pop(op.makes[0], None)
            if sent is None:
                continue
            reads = (sent, *(v for v in self.saved[i] if v > 0))
            for weight in (-v for v in self.saved[i] if v < 0):
                backward(reads, weight, op.seconds, True)
            for v in op.reads:
                if self.values[v].resident:
                    continue
                nbytes = self.values[v].nbytes
                found = backward(reads, nbytes, op.seconds, False)
                if v in gradients:
                    found = backward((gradients[v], found), nbytes, nbytes / 5e10, False)
                gradients[v] = found
        return Dataflow(operators, self.values, len(self.forward))


# -- Shapes ------------------------------------------------------------------------------------------


def memory_bound(nbytes: int) -> float:
    return 3 * nbytes / 5e10


def product(nbytes: int, width: int) -> float:
    """A matrix product that makes so many bytes, over a dimension of this width."""
    return nbytes / 4 * 2 * width / 1e13 + memory_bound(nbytes)


def deep(nodes: int) -> Dataflow:
    """Transformer blocks: batch 16, sequence 512, width 512."""
    tape, width, x = Tape(), 512, 0
    one = 16 * 512 * width * 4
    x = tape.call([0], one, memory_bound(one))

    def norm(x: int) -> int:
        return tape.call([x], one, memory_bound(one), "i", width * 4)

    def linear(x: int, factor: int = 1, inner: int = width) -> int:
        return tape.call(
            [x], factor * one, product(factor * one, inner), "i", factor * width**2 * 4
        )

    while len(tape.forward) * 2.9 < nodes:
        h = norm(x)
        q, k, v = (linear(h) for _ in range(3))
        scores = tape.call([q, k], 2 * one, product(2 * one, 64), "i")
        shares = tape.call([scores], 2 * one, memory_bound(2 * one), "o")
        mixed = tape.call([shares, v], one, product(one, 256), "i")
        x = tape.call([x, linear(mixed)], one, memory_bound(one))
        h = norm(x)
        gate, up = linear(h, 4), linear(h, 4)
        act = tape.call([gate], 4 * one, memory_bound(4 * one), "i")
        both = tape.call([act, up], 4 * one, memory_bound(4 * one), "i")
        down = tape.call([both], one, product(one, 4 * width), "i", 4 * width**2 * 4)
        x = tape.call([x, down], one, memory_bound(one))
    return tape.step(tape.call([x], 4, memory_bound(one), "i"))


def wide(nodes: int, branches: int = 8) -> Dataflow:
    """Blocks of branches of different depths, that a concatenation joins."""
    tape, rng = Tape(), random.Random("wide")
    one = 4 * MIB
    x = tape.call([0], one, memory_bound(one))
    while len(tape.forward) * 2.6 < nodes:
        ends = []
        for b in range(branches):
            h = x
            for _ in range(1 + b % 4):
                small = one // branches
                h = tape.call([h], small, product(small, rng.choice((64, 256, 576))), "i", 65536)
                h = tape.call([h], small, memory_bound(small), "i")
                h = tape.call([h], small, memory_bound(small), "o")
            ends.append(h)
        x = tape.call(ends, one, memory_bound(one))
    return tape.step(tape.call([x], 4, memory_bound(one), "i"))


def irregular(nodes: int) -> Dataflow:
    """Operators of all sizes and prices that read at random what was made lately, or long ago."""
    tape, rng = Tape(), random.Random("irregular")
    made = [tape.call([0], MIB, memory_bound(MIB))]
    while len(tape.forward) * 3.0 < nodes:
        reads = {made[-1]} if rng.random() < 0.8 else {rng.choice(made[-12:])}
        if rng.random() < 0.3:
            reads.add(rng.choice(made[-12:]))
        if rng.random() < 0.03:
            reads.add(rng.choice(made))
        nbytes = rng.choice((1, 2, 4, 4, 8)) * MIB // 4
        heavy = rng.random() < 0.35
        seconds = product(nbytes, rng.choice((256, 1024, 4096))) if heavy else memory_bound(nbytes)
        saves = "i" if heavy else rng.choice(("", "i", "i", "o"))
        made.append(tape.call(sorted(reads), nbytes, seconds, saves, MIB // 16 if heavy else 0))
    unread = set(made).difference(v for op in tape.forward for v in op.reads)
    return tape.step(tape.call(sorted(unread | {made[-1]}), 4, 1e-6, "i"))


SHAPES: dict[str, Callable[[int], Dataflow]] = {"deep": deep, "wide": wide, "irregular": irregular}


# -- Measuring ---------------------------------------------------------------------------------------


@dataclasses.dataclass
class Row:
    """share: the budget, of the unchanged step's activations and gradients.

    added, bound, gap: of the unchanged step's time; the gap is what stands between them.  peak: of
    the budget.  seconds: of the processor, to make a planner and ask it once.
    """

    shape: str
    nodes: int
    share: float
    seconds: float
    added: float | None = None
    bound: float | None = None
    gap: float | None = None
    peak: float | None = None


def row_of(shape: str, nodes: int, share: float) -> Row:
    flow = SHAPES[shape](nodes)
    top = Planner(flow).keep_all().outcome.peak
    budget = flow.resident + int(share * (top - flow.resident))
    began = time.process_time()
    choice = Planner(flow).fit(budget)
    row = Row(shape, len(flow.operators), share, time.process_time() - began)
    if choice is not None:
        row.added = choice.outcome.seconds / flow.seconds
        row.bound = (choice.bound or 0.0) / flow.seconds
        row.gap = row.added - row.bound
        row.peak = choice.outcome.peak / budget
    return row


@dataclasses.dataclass
class Ladder:
    """One family at budgets from the smallest peak found up to the unchanged step's.

    seconds: of the processor, each budget asked of a planner of its own; ``smallest`` of finding the
    smallest peak.  gaps: of the unchanged step's time.  used: of the budget, where something is made
    again.  monotone: is no plan slower for a larger budget?  kept: does none peak above its budget?
    """

    family: str
    nodes: int
    smallest: float
    seconds: list[float]
    added: list[float]
    gaps: list[float]
    used: list[float]
    monotone: bool
    kept: bool


def ladder_of(family: str, size: str, rungs: int) -> Ladder:
    flow = flow_of(family, size)
    began = time.process_time()
    lowest = Planner(flow).smallest()
    took = time.process_time() - began
    low, high = lowest.outcome.peak, Planner(flow).keep_all().outcome.peak
    found = Ladder(family, len(flow.operators), took, [], [], [], [], True, True)
    for n in range(1, rungs + 1):
        budget = low + (high - low) * n // (rungs + 1)
        began = time.process_time()
        choice = Planner(flow).fit(budget)
        found.seconds.append(time.process_time() - began)
        found.kept &= choice is not None and choice.outcome.peak <= budget
        if choice is not None:
            found.added.append(choice.outcome.seconds / flow.seconds)
            found.gaps.append(found.added[-1] - (choice.bound or 0.0) / flow.seconds)
            found.used.append(choice.outcome.peak / budget)
    added = [lowest.outcome.seconds / flow.seconds, *found.added]
    found.monotone = all(less >= more for less, more in itertools.pairwise(added))
    return found


def flow_of(family: str, size: str) -> Dataflow:
    """The numbers that the planner gets for a family's step."""
    model, args, kwargs = FAMILIES[family].build(size)
    call = StepCall(model, args, kwargs)
    unchanged = unchanged_step(call)
    with torch.enable_grad(), capture(call) as captured:
        return analyze(captured.graph, call, unchanged).split.flow


def ladder_table(ladders: list[Ladder]) -> str:
    headers = ["family", "nodes", "median s", "worst s", "smallest s", "median gap", "worst gap"]
    lines = [
        [
            ladder.family,
            ladder.nodes,
            f"{statistics.median(ladder.seconds):.2f}",
            f"{max(ladder.seconds):.2f}",
            f"{ladder.smallest:.2f}",
            f"{statistics.median(ladder.gaps):.2%}",
            f"{max(ladder.gaps):.2%}",
            "yes" if ladder.monotone else "NO",
            "yes" if ladder.kept else "NO",
        ]
        for ladder in ladders
    ]
    return tabulate(lines, [*headers, "monotone", "kept"], disable_numparse=True)


def optimum_of(steps: int) -> dict[str, float]:
    """Plans for so many random steps against the best choice: step time over step time."""
    found: list[float] = []
    seed = solved = 0
    while solved < steps:
        ratios = distances(seed)
        solved += bool(ratios)
        found += ratios
        seed += 1
    within = sum(ratio <= 1.01 for ratio in found)
    return {"steps": steps, "plans": len(found), "within 1 %": within, "worst": max(found)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shapes", default=",".join(SHAPES))
    parser.add_argument("--nodes", default="500,2000,10000,30000")
    parser.add_argument("--budgets", default="0.5,0.35", help="shares of the unchanged step's peak")
    parser.add_argument("--families", default=",".join(FAMILIES), help="names, by commas; or none")
    parser.add_argument("--size", choices=SIZES, default="small")
    parser.add_argument("--rungs", type=int, default=20, help="budgets for each family")
    parser.add_argument(
        "--steps", type=int, default=200, help="random steps that are tried in full"
    )
    parser.add_argument("--out", type=Path, default=HERE / "results" / "planning-cpu.json")
    options = parser.parse_args()
    rows: list[Row] = []
    ladders: list[Ladder] = []
    document = {
        "device": "cpu",
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "date": datetime.date.today().isoformat(),
        "optimum": optimum_of(options.steps),
    }
    print(document["optimum"], flush=True)
    for shape in options.shapes.split(","):
        for nodes in map(int, filter(None, options.nodes.split(","))):
            for share in map(float, options.budgets.split(",")):
                rows.append(row_of(shape, nodes, share))
                print(rows[-1], flush=True)
                save(options.out, document, rows, ladders)
    for family in filter(None, options.families.split(",")):
        ladders.append(ladder_of(family, options.size, options.rungs))
        print(ladder_table(ladders[-1:]), flush=True)
        save(options.out, document, rows, ladders)
    print(tabulate([dataclasses.asdict(row) for row in rows], headers="keys", floatfmt=".3f"))
    print(ladder_table(ladders))


def save(path: Path, document: dict[str, Any], rows: list[Row], ladders: list[Ladder]) -> None:
    """What there is so far, in case the run is cut short."""
    document["rows"] = [dataclasses.asdict(row) for row in rows]
    document["families"] = [dataclasses.asdict(ladder) for ladder in ladders]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(document, indent=1) + "\n")


if __name__ == "__main__":
    main()
