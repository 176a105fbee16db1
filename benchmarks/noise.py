"""Is the noise that is predicted for codes the noise that they add?

python benchmarks/noise.py [--families llama gpt2 vit] [--size small] [--bits 4 2] [--draws 256]

Each family's step runs with every tensor that may be a code stored in so many bits, once for each of
many seeds, beside the step without codes.  Rows hold, for codes that only a weight's gradient reads
(``linear``) and for all (``unbiased``):

tensors           how many of them are codes
share             predicted variance over the minibatch's own
ratio             predicted variance over the mean square of the error, all parameters together
groups            the same, smallest and largest, of parameters that get a hundredth of the noise or more;
                  of noise that travels only the sum over all parameters is predicted
mean of R draws   square of its distance from the gradient, times R, over the predicted variance: it stays
                  about 1 where the distance falls as 1 / sqrt(R), and grows with R where codes are biased

Results go to a JSON file after each row, in the place of what was there of it.
"""

import argparse
import datetime
import json
import re
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from joint import options_for
from steps import FAMILIES, HERE, SIZES, Step
from torch import Tensor, fx

from fxmem._torch import fake_tensors_off
from fxmem.api import analyzed
from fxmem.codes.gradient_noise import given, parameter_gradients
from fxmem.codes.travelling import ALL
from fxmem.graphs.consumers import Use
from fxmem.graphs.graph import JointGraph
from fxmem.passes.quantize import Code, QuantizePass
from fxmem.planning.allotment import Allotment, Candidate, encoding_named
from fxmem.steps.analyze import Analysis

USES = {"linear": (Use.LINEAR,), "unbiased": (Use.LINEAR, Use.TRAVELLING)}
COUNTS = (16, 64, 256)
_LEAST_SHARE = 0.01


class Coded:
    """A step whose every candidate of these uses is a code of so many bits."""

    def __init__(self, analysis: Analysis, allotment: Allotment, uses: Any, bits: int) -> None:
        self.candidates = [c for c in allotment.candidates if c.sensitivity.use in uses]
        names = {c.source: named(c, bits) for c in self.candidates}
        self.predicted: dict[str, float] = defaultdict(float)
        for one in self.candidates:
            for group, variance in one.sensitivity.variances[names[one.source]].items():
                self.predicted[group] += variance
        codes = [Code(c.source, encoding_named(names[c.source]), c.stream) for c in self.candidates]
        self.graph = QuantizePass(tuple(codes)).apply(analysis.runs)
        self.analysis = analysis
        self.exact = self.run(analysis.runs)

    def run(self, graph: JointGraph) -> dict[str, Tensor]:
        inputs = given(self.analysis.runs, self.analysis.examples)
        with torch.no_grad():
            results = fx.Interpreter(graph.module).run(*inputs, enable_io_processing=False)
        return {n: g.double() for n, g in parameter_gradients(graph, results).items()}

    def errors(self, draws: int) -> Iterator[dict[str, Tensor]]:
        for seed in range(draws):
            torch.manual_seed(seed)
            found = self.run(self.graph)
            yield {name: found[name] - self.exact[name] for name in found}


def named(candidate: Candidate, bits: int) -> str:
    """The code in so many bits of a candidate: of the tensor, or of a derivative there."""
    return next(name for name, _ in candidate.choices if re.search(rf"int{bits} |' {bits}$", name))


def measured(coded: Coded, draws: int, minibatch: float) -> dict[str, Any]:
    squares: dict[str, float] = defaultdict(float)
    total = {name: torch.zeros_like(g) for name, g in coded.exact.items()}
    predicted = sum(coded.predicted.values())
    means = {}
    for count, errors in enumerate(coded.errors(draws), 1):
        for name, error in errors.items():
            squares[name] += float(error.square().sum()) / draws
            total[name] += error
        if count in COUNTS:
            distance = sum(float((t / count).square().sum()) for t in total.values())
            means[count] = distance * count / predicted
    groups = [
        variance / squares[name]
        for name, variance in coded.predicted.items()
        if name != ALL and variance > _LEAST_SHARE * predicted
    ]
    return {
        "tensors": len(coded.candidates),
        "share": predicted / minibatch,
        "ratio": predicted / sum(squares.values()),
        "groups": [min(groups), max(groups)] if ALL not in coded.predicted else None,
        "mean of R draws": means,
    }


def rows(family: str, options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    step = Step(family, options.size, "cpu")
    asked = options_for("joint", "min")
    with analyzed(step.model, asked, step.args, step.kwargs, None, None, ()) as (analysis, _):
        allotment = analysis.allotted(asked.noise)
        with fake_tensors_off():
            for bits in options.bits:
                for use, uses in USES.items():
                    coded = Coded(analysis, allotment, uses, bits)
                    if not coded.candidates:
                        continue
                    found = measured(coded, options.draws, allotment.statistics.variance)
                    about = {"family": family, "size": options.size, "bits": bits, "use": use}
                    yield {**about, "draws": options.draws, **found}


def write(path: Path, row: dict[str, Any]) -> None:
    results = json.loads(path.read_text()) if path.exists() else {"rows": []}
    kept = [r for r in results["rows"] if _key(r) != _key(row)]
    about = {"date": f"{datetime.date.today()}", "torch": torch.__version__}
    path.write_text(json.dumps({**about, "rows": [*kept, row]}, indent=1) + "\n")


def _key(row: dict[str, Any]) -> tuple[Any, ...]:
    return row["family"], row["size"], row["bits"], row["use"]


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--families", nargs="+", default=[n for n in FAMILIES if "-" not in n])
    parser.add_argument("--size", choices=SIZES, default="small")
    parser.add_argument("--bits", nargs="+", type=int, default=[4, 2])
    parser.add_argument("--draws", type=int, default=256)
    parser.add_argument("--out", type=Path, default=HERE / "results" / "noise-cpu.json")
    options = parser.parse_args()
    torch.set_num_threads(1)
    for family in options.families:
        for row in rows(family, options):
            groups = row["groups"] and "groups {:.2f} to {:.2f}; ".format(*row["groups"])
            means = {n: round(value, 2) for n, value in row["mean of R draws"].items()}
            print(
                f"{family} {row['bits']} bits {row['use']}: {row['tensors']} tensors, "
                f"{row['share']:.2%} of the minibatch's; predicted / measured {row['ratio']:.3f}, "
                f"{groups or ''}means {means}",
                flush=True,
            )
            write(options.out, row)


if __name__ == "__main__":
    main()
