"""Beside torch's own pass that saves activations in float8: gradients' errors and peaks at the same bytes.

python benchmarks/fp8_peer.py [--families llama gpt2 vit unet] [--size small]

way         what runs
eager       the step as it is
e4m3, e5m2  torch.compile's graphs, op by op, with ``activation_quantization_aten_pass`` and scales, but for
            what ``where`` makes: masks of attention, which hold infinities
masks       e4m3 with these, as the pass comes
default     e4m3 without the key ``use_scaling``, of which the two halves of the pass think otherwise
fxmem       a plan for the peak of e4m3, with noise allowed up to 1 % of the minibatch's
codes       the same without recomputation, at its smallest peak if that is larger
bounded     the same with a hundredth of the noise, where means may move by 5 % in any group of parameters

Errors are of all gradients together: the norm of the difference from eager's over the norm of eager's.
Peaks are measured and count what the step holds before it begins.  Times are over eager's, in turns.
"""

import argparse
import datetime
import json
import statistics
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from peers import with_fp8
from steps import FAMILIES, HERE, SIZES, Step, keep_freed_memory, side_by_side
from torch import Tensor

import fxmem

PEERS: dict[str, tuple[str, bool | None, bool]] = {
    "e4m3": ("e4m3fn", True, False),
    "e5m2": ("e5m2", True, False),
    "masks": ("e4m3fn", True, True),
    "default": ("e4m3fn", None, False),
}
CODES = ("lossless", "quantize")
OURS: dict[str, tuple[tuple[str, ...], fxmem.Noise]] = {
    "fxmem": (("recompute", *CODES), fxmem.Noise(0.01)),
    "codes": (CODES, fxmem.Noise(0.01)),
    "bounded": (CODES, fxmem.Noise(0.0001, bounded=0.05)),
}
ROUNDS = 31


def error(found: list[Tensor | None], right: list[Tensor | None]) -> float:
    """Of gradients, as a share of their norm."""
    pairs = [(a.double(), b.double()) for a, b in zip(found, right, strict=True) if b is not None]
    off = sum(float((a - b).square().sum()) for a, b in pairs)
    return (off / sum(float(b.square().sum()) for _, b in pairs)) ** 0.5


def gradients(step: Step, module: Any) -> list[Tensor | None]:
    count = sum(1 for _ in step.model.parameters())
    return [None if g is None else g.clone() for g in step.seen(module)[1 : 1 + count]]


def rows(step: Step) -> Iterator[dict[str, Any]]:
    right = gradients(step, step.model)
    given = torch.utils._pytree.tree_leaves((step.args, step.kwargs))
    there = [*step.model.parameters(), *step.model.buffers(), *given]
    resident = sum(t.nbytes for t in there if isinstance(t, Tensor))
    found: dict[str, dict[str, Any]] = {}

    def add(way: str, module: Any, **more: Any) -> None:
        off = error(gradients(step, module), right)
        peak = step.added_peak(module) + resident
        found[way] = {"family": step.family, "way": way, "error": off, "peak": peak, **more}

    add("eager", step.model)
    for way, how in PEERS.items():
        with with_fp8(step, *how) as module:
            add(way, module)
            found[way]["time"] = beside(step, module)
    budget = found["e4m3"]["peak"]
    for way, (allow, noise) in OURS.items():
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            module = fxmem.optimize(
                step.model, budget, step.args, example_kwargs=step.kwargs, allow=allow,
                noise=noise, cost="measure", on_infeasible="best",
            )  # fmt: skip
        said = module.plan.noise
        add(
            way, module, predicted=module.plan.predicted_peak,
            rho=0.0 if said is None else said.predicted,
            tier="exact" if said is None else said.tier,
            codes=sum(1 for d in module.plan.decisions if d.error),
        )  # fmt: skip
        found[way]["time"] = beside(step, module)
    return iter(found.values())


def beside(step: Step, module: Any) -> float:
    """Its time over eager's."""
    clocks = [lambda: step.seconds(step.model), lambda: step.seconds(module)]
    return statistics.median(b / a for a, b in side_by_side(clocks, ROUNDS)[2:])


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument(
        "--families", nargs="+", default=["llama", "gpt2", "vit", "unet"], choices=FAMILIES
    )
    parser.add_argument("--size", choices=SIZES, default="small")
    parser.add_argument("--out", type=Path, default=HERE / "results" / "fp8-cpu.json")
    options = parser.parse_args()
    torch.set_num_threads(1)
    keep_freed_memory()
    every: list[dict[str, Any]] = []
    for name in options.families:
        for row in rows(Step(name, options.size, "cpu")):
            every.append(row)
            print(row, flush=True)
        about = {"date": f"{datetime.date.today()}", "torch": torch.__version__}
        results = {**about, "size": options.size, "rows": every}
        options.out.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
