"""Inductor's code for a planned step: are budgets kept, and how fast is it beside torch.compile's own?

``--keep`` plans families at shares of the unchanged peak and measures each step.  ``--speed`` times, in
turns and on one thread: torch.compile as it is beside a budget of what eager peaks at; and at each peak
that a peer reaches (``activation_memory_budget``, compiled checkpoints by block) fxmem with those bytes.
``--codes`` times a step whose codes fuse beside the same step with codes in operators of fxmem's own.
``--compile`` compares seconds of processor time from nothing to the first step's end, caches empty, each
in a process of its own.
``--foresee`` compares what code is foreseen to peak at with what it is then measured to peak at, and counts
the plans that were lowered and those that code was made of.

    python benchmarks/inductor.py --keep --families gpt2 resnet --size tiny
    python benchmarks/inductor.py --speed --families gpt2 --size small
    python benchmarks/inductor.py --compile --foresee --families gpt2 llama --size small
"""

import argparse
import contextlib
import datetime
import functools
import json
import logging
import operator
import re
import resource
import statistics
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from peers import with_checkpoints
from steps import FAMILIES, HERE, Family, Step, keep_freed_memory, side_by_side
from torch import nn
from torch._inductor import config as inductor_config
from torch._inductor.cpu_vec_isa import pick_vec_isa
from torch._inductor.graph import GraphLowering
from torch._inductor.utils import fresh_inductor_cache

import fxmem
import fxmem.steps.inductor
import fxmem.steps.inductor_step
from fxmem.planning.remembered import forget

RESULTS = HERE / "results" / "inductor-cpu.json"
BUDGETS = ("0.6x", "0.4x")
CODED = ("0.8x", "0.6x")
SHARES = (0.5, 0.2)
EVERY = (1, 2)

Clock = Callable[[], float]


def gradients(step: Step, module: Any) -> list[torch.Tensor]:
    """Of one step from the start."""
    seen = step.seen(module)[1 : 1 + len(list(step.model.parameters()))]
    return [g for g in seen if g is not None]


def distance(left: list[torch.Tensor], right: list[torch.Tensor]) -> float:
    """Norm of the difference of all gradients / norm of the first ones."""
    off = sum(
        float((a.double() - b.double()).square().sum()) for a, b in zip(left, right, strict=True)
    )
    return float((off / sum(float(a.double().square().sum()) for a in left)) ** 0.5)


class Warned(logging.Handler):
    """Counts what fxmem warns of: steps that run operator by operator after all."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.count = 0

    def emit(self, record: logging.LogRecord) -> None:
        self.count += "operator by operator" in record.getMessage()


def optimized(step: Step, budget: Any) -> tuple[fxmem.OptimizedModule, bool]:
    """The step by Inductor, and whether it fell back to running operator by operator."""
    handler = Warned()
    logger = logging.getLogger("fxmem")
    logger.addHandler(handler)
    try:
        module = fxmem.optimize(
            step.model, budget, step.args, example_kwargs=step.kwargs, compiler="inductor"
        )
    finally:
        logger.removeHandler(handler)
    return module, bool(handler.count)


# -- Budgets -----------------------------------------------------------------------------------------


def keep(family: str, size: str) -> Iterator[dict[str, Any]]:
    """One row a budget: what was measured beside the budget and the prediction.

    torch_compile_off: how far the gradients of torch.compile's own code are off eager's.
    """
    eager = Step(family, size, "cpu")
    want = gradients(eager, eager.model)
    torch._dynamo.reset()
    own = distance(want, gradients(eager, torch.compile(eager.model)))
    for budget in BUDGETS:
        row: dict[str, Any] = {"family": family, "size": size, "budget": budget}
        step = Step(family, size, "cpu")
        forget()
        start = time.perf_counter()
        try:
            module, fell_back = optimized(step, budget)
        except fxmem.BudgetInfeasibleError:
            yield {**row, "refused": True}
            continue
        row["seconds_to_compile"] = round(time.perf_counter() - start, 1)
        row["gradients_off"] = distance(want, gradients(step, module))
        row["torch_compile_off"] = own
        peak = step.added_peak(module) + module.plan.resident
        plan = module.plan
        row["of_budget"], row["of_predicted"] = peak / plan.budget, peak / plan.predicted_peak
        row["predicted_overhead"], row["op_by_op"] = plan.predicted_overhead, fell_back
        yield row


# -- Speed -------------------------------------------------------------------------------------------


@contextlib.contextmanager
def variant(step: Step, kind: str, value: Any) -> Iterator[Any]:
    """The step's model as torch.compile runs it: as it is, by ratio, with checkpoints."""
    torch._dynamo.reset()
    with contextlib.ExitStack() as stack:
        if kind == "ratio":
            stack.enter_context(torch._functorch.config.patch(activation_memory_budget=value))
        if kind == "checkpoint":
            stack.enter_context(with_checkpoints(step, value))
        yield torch.compile(step.model)


def in_turns(left: Clock, right: Clock, rounds: int) -> tuple[float, float]:
    """Median seconds of the left one, and the median ratio of the right one's beside them."""
    pairs = side_by_side([left, right], rounds + 1)[1:]  # the first round warms up
    return statistics.median(a for a, _ in pairs), statistics.median(b / a for a, b in pairs)


def processor_seconds(step: Step, module: Any) -> float:
    """Of one step."""
    step.reset()
    began = time.process_time()
    step.run(module)
    return time.process_time() - began


def speed(family: str, size: str, rounds: int) -> Iterator[dict[str, Any]]:
    """One row a peer's point: its peak, fxmem's within those bytes, and the ratio of their times."""
    peers: list[tuple[str, Any]] = [("default", None)]
    peers += [("checkpoint", every) for every in EVERY]
    peers += [("ratio", share) for share in SHARES]
    seen: set[int] = set()
    for kind, value in peers:
        theirs, mine = Step(family, size, "cpu"), Step(family, size, "cpu")
        row: dict[str, Any] = {"family": family, "size": size, "peer": kind, "value": value}
        with variant(theirs, kind, value) as compiled:
            theirs.run(compiled)  # compiles
            peak = theirs.added_peak(compiled)
            if peak in seen:
                continue
            seen.add(peak)
            row["peer_added_peak"] = peak
            resident = fxmem.plan(
                mine.model, "1TiB", mine.args, example_kwargs=mine.kwargs
            ).resident
            budget: Any = "1TiB" if kind == "default" else resident + peak
            try:
                module, row["op_by_op"] = optimized(mine, budget)
            except fxmem.BudgetInfeasibleError as error:
                yield {**row, "refused": True, "smallest_peak": error.smallest_peak - resident}
                continue
            mine.run(module)
            row["added_peak"] = mine.added_peak(module)
            clocks = [
                functools.partial(processor_seconds, theirs, compiled),
                functools.partial(processor_seconds, mine, module),
            ]
            row["seconds"], row["time_beside"] = in_turns(*clocks, rounds)
        yield row


# -- Codes -------------------------------------------------------------------------------------------


def convnet(batch: int, width: int, size: int, p: float) -> Any:
    """Rectifiers between convolutions and pools that read no input: of each, the backward needs a bit."""
    layers: list[nn.Module] = []
    channels = 3
    for block in range(3):
        layers += [nn.Conv2d(channels, channels := width << block, 3, padding=1), nn.ReLU()]
        layers += [nn.Dropout(p)] if p else []
        layers += [nn.AvgPool2d(2)]
    model = nn.Sequential(*layers, nn.Flatten(), nn.LazyLinear(10), MeanSquare())
    x = torch.randn(batch, 3, size, size)
    with torch.no_grad():
        model(x)
    return model, (x,), {}


class MeanSquare(nn.Module):
    """A loss."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.square().mean()


_SIZES = {
    "small": {"batch": 16, "width": 16, "size": 64},
    "tiny": {"batch": 8, "width": 8, "size": 32},
}
FAMILIES["convnet"] = Family("convnet", convnet, _SIZES)
FAMILIES["convnet-dropout"] = Family("convnet-dropout", convnet, _SIZES, dropout=0.1)


_OWN = re.compile(r"= torch\.ops\.fxmem\.\w+")
_KERNEL = re.compile(r"^\s+cpp_fused\w*\(", re.MULTILINE)


@contextlib.contextmanager
def written_to(codes: list[str]) -> Iterator[None]:
    """Inside, the Python that Inductor writes for each graph is noted; nothing comes from a cache."""
    write = staticmethod(codes.append)
    with (
        mock.patch.object(GraphLowering, "save_output_code", write),
        inductor_config.patch(fx_graph_cache=False),
    ):
        yield


@contextlib.contextmanager
def closed_codes() -> Iterator[None]:
    """Inside, codes are operators of fxmem's own, which Inductor calls one by one."""
    with (
        mock.patch.object(fxmem.steps.inductor, "fusible", return_value=None),
        mock.patch.object(fxmem._torch.inductor, "read_offsets_of_pools"),
    ):
        yield


def codes(family: str, size: str, rounds: int) -> Iterator[dict[str, Any]]:
    """One row a budget: calls of operators outside of Inductor's kernels, peaks, and times in turns."""
    for budget in CODED:
        row: dict[str, Any] = {"family": family, "size": size, "budget": budget}
        steps = [Step(family, size, "cpu") for _ in range(2)]
        modules = []
        try:
            for step, fuse in zip(steps, (False, True), strict=True):
                called: list[str] = []
                with written_to(called), closed_codes() if not fuse else contextlib.nullcontext():
                    module, fell_back = optimized(step, budget)
                modules.append(module)
                name = "fused" if fuse else "closed"
                row[name] = {
                    "op_by_op": fell_back,
                    "own_operators": sum(len(_OWN.findall(code)) for code in called[-2:]),
                    "kernels": sum(len(_KERNEL.findall(code)) for code in called[-2:]),
                    "peak": step.added_peak(module) + module.plan.resident,
                }
        except fxmem.BudgetInfeasibleError:
            yield {**row, "refused": True}
            continue
        row["budget_bytes"] = modules[0].plan.budget
        seen = [step.seen(module) for step, module in zip(steps, modules, strict=True)]
        row["gradients_off"] = distance(*([g for g in s[1:] if g is not None] for s in seen))
        clocks = [
            functools.partial(processor_seconds, step, module)
            for step, module in zip(steps, modules, strict=True)
        ]
        row["seconds"], row["time_beside"] = in_turns(*clocks, rounds)
        yield row


# -- Compilation -------------------------------------------------------------------------------------


def cpu_seconds() -> float:
    """Of this process and of the compilers that it has waited for."""
    both = (resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return sum(used.ru_utime + used.ru_stime for used in both)


COMPILED: dict[str, Callable[[Step], Any]] = {
    "torch.compile": lambda step: torch.compile(step.model),
    "fxmem at 1TiB": lambda step: optimized(step, "1TiB")[0],
    "fxmem at 0.7x": lambda step: optimized(step, "0.7x")[0],
}


def compilation(family: str, size: str, rounds: int = 3) -> dict[str, Any]:
    """Processor seconds from nothing to the first step's end, each time in a process of its own.

    beside: medians of the ratios to torch.compile's, taken round by round.
    """
    seen: dict[str, list[float]] = {name: [] for name in COMPILED}
    for _ in range(rounds):
        for name, times in seen.items():
            with ProcessPoolExecutor(1, get_context("spawn")) as process:
                times.append(process.submit(seconds_to_compile, family, size, name).result())
    base = seen["torch.compile"]
    return {
        "family": family,
        "size": size,
        **{name: round(statistics.median(times), 1) for name, times in seen.items()},
        "beside": {
            name: round(statistics.median(map(operator.truediv, times, base)), 3)
            for name, times in seen.items()
        },
    }


def seconds_to_compile(family: str, size: str, name: str) -> float:
    """With empty caches."""
    set_up()
    warm = nn.Linear(2, 2)
    torch.compile(warm)(torch.ones(1, 2)).sum().backward()  # what every process does once
    step = Step(family, size, "cpu")
    torch._dynamo.reset()
    with fresh_inductor_cache(), inductor_config.patch(compile_threads=1):
        start = cpu_seconds()
        step.run(COMPILED[name](step))
        return cpu_seconds() - start


# -- What is foreseen --------------------------------------------------------------------------------

FORESEEN = ("0.8x", "0.6x", "0.4x")


def foresee(family: str, size: str) -> Iterator[dict[str, Any]]:
    """One row a budget; caches are empty, for nothing is foreseen of code that is there already."""
    for budget in FORESEEN:
        row: dict[str, Any] = {"family": family, "size": size, "budget": budget}
        step = Step(family, size, "cpu")
        lowered, made = list[Any](), list[Any]()
        start = cpu_seconds()
        with (
            noted("foreseen", lowered, of=fxmem.steps.inductor.Inductor),
            noted("_compiled", made, of=fxmem.steps.inductor_step),
            fresh_inductor_cache(),
            inductor_config.patch(compile_threads=1),
        ):
            try:
                module, row["op_by_op"] = optimized(step, budget)
            except fxmem.BudgetInfeasibleError:
                yield {**row, "refused": True}
                continue
        row["processor_seconds"] = round(cpu_seconds() - start, 1)
        row["lowered"], row["compiled"] = len(lowered), len(made)
        if not made:  # all were foreseen to be far too large
            yield row
            continue
        (tried, *_), coded = made[0]
        measured = coded.planned.plan.predicted_peak
        row["operator_by_operator"] = tried.plan.predicted_peak / measured
        row["foreseen"] = tried.foreseen and tried.foreseen / measured
        row["of_budget"] = module.plan.predicted_peak / module.plan.budget
        row["predicted_overhead"] = module.plan.predicted_overhead
        yield row


@contextlib.contextmanager
def noted(name: str, calls: list[Any], *, of: Any) -> Iterator[None]:
    """Inside, the arguments of each call of a function and what it gave are noted."""
    function = getattr(of, name)

    def called(*args: Any) -> Any:
        found = function(*args)
        calls.append((args, found))
        return found

    with mock.patch.object(of, name, called):
        yield


# -- The script --------------------------------------------------------------------------------------


def key(row: dict[str, Any]) -> tuple[Any, ...]:
    """What a row is about: a later run of the same replaces it."""
    return tuple(row.get(name) for name in ("family", "size", "budget", "peer", "value"))


def write(path: Path, kind: str, row: dict[str, Any]) -> None:
    """Put a row in the place of an older one, as soon as it is there: compiling takes minutes."""
    known: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}
    known[kind] = [*(old for old in known.get(kind, []) if key(old) != key(row)), row]
    known["device"] = "cpu"
    known["torch"] = torch.__version__
    known["date"] = datetime.date.today().isoformat()
    path.write_text(json.dumps(known, indent=1) + "\n")
    print(kind, row, flush=True)


def refuse_scalar_code() -> None:
    """torch tries once a process whether vector code runs; where that fails all timings are others."""
    if torch.backends.cpu.get_cpu_capability() != "DEFAULT" and not pick_vec_isa():
        raise SystemExit(
            "Inductor finds no vector instructions here, though the processor has some"
        )


def set_up() -> None:
    """One thread, vector code, eager's random numbers."""
    torch.set_num_threads(1)
    refuse_scalar_code()
    inductor_config.fallback_random = True  # torch.compile then draws what eager draws


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--families", nargs="+", default=list(FAMILIES), choices=list(FAMILIES))
    parser.add_argument("--size", default="small")
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--out", type=Path, default=RESULTS)
    for kind in ("keep", "speed", "codes", "compile", "foresee"):
        parser.add_argument(f"--{kind}", action="store_true")
    given = parser.parse_args()
    set_up()
    keep_freed_memory()
    with fresh_inductor_cache():  # of which code was made in another way, or by another processor
        for family in given.families:
            run(family, given)


def run(family: str, given: argparse.Namespace) -> None:
    jobs: dict[str, Iterator[dict[str, Any]]] = {}
    if given.keep:
        jobs["keep"] = keep(family, given.size)
    if given.speed:
        jobs["speed"] = speed(family, given.size, given.rounds)
    if given.codes:
        jobs["codes"] = codes(family, given.size, given.rounds)
    if given.compile:
        jobs["compile"] = iter([compilation(family, given.size)])
    if given.foresee:
        jobs["foresee"] = foresee(family, given.size)
    for kind, rows in jobs.items():
        for row in rows:
            write(given.out, kind, row)


if __name__ == "__main__":
    main()
