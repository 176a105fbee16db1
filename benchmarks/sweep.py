"""Every operator and module that torch tests itself with, and every hazard, through ``backend="fxmem"``.

python benchmarks/sweep.py [--suites hazards,modules,ops,...] [--minutes 15] [--samples 1]

One forward and backward each, at the smallest budget, beside ``backend="aot_eager"`` and eager.  Hazards
go through ``fxmem.optimize``, too, both with room for all, with half of what eager takes and at the
smallest budget; they must give what eager gives, or refuse where ``tests/hazards.py`` allows it, and
"hazards-aot_eager" shows what torch's own backend makes of them.  What is
not captured, or fails without fxmem, is skipped and not passed; random operators are freed of the seed that
torch's database puts into them, which Dynamo could not trace; the generator is seeded anew before the
backward; of each entry's samples those that draw are taken first, then the largest.  Results go to
a JSON file after each entry, and a further run goes on where the last one stopped and tries
again what was wrong (``--again``: all).  An entry that ends the process stays in the file as "died".
"""

import argparse
import collections
import contextlib
import functools
import json
import os
import random
import signal
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent), str(HERE.parent / "tests")]

from hazards import HAZARDS, Case, Hazard, differences, fresh, snapshot, tensors  # noqa: E402

import fxmem  # noqa: E402
from fxmem import backend  # noqa: E402
from fxmem.basics.errors import FxmemError  # noqa: E402

SECONDS = 120
"""No entry may take longer."""

TOLERANCE = 1e-4


@dataclass
class Result:
    """status: "equal" bit for bit to eager or to aot_eager (``to`` says which), "rounds" (differs by less
    than the tolerance), "wrong", "raises" (and aot_eager does not), "refuses" (where a hazard allows it;
    ``why`` has the words), "died" or "skipped".  recomputed: operators that the plans run again.
    """

    status: str
    why: str = ""
    to: str = ""
    recomputed: int = 0
    seconds: float = 0.0


Step = Callable[..., Any]
Program = Callable[[Callable[[Step], Step]], Any]
"""Given what a function or module becomes, run it and say all that can be seen."""


Trial = Callable[[], Result]

Entry = tuple[str, Callable[[], Iterable[Trial]]]
"""A name, and what gives its trials."""


# -- Running one entry -------------------------------------------------------------------------------


class Planned:
    """fxmem as a backend that counts the graphs it is given."""

    def __init__(self, budget: str) -> None:
        self.options = {"budget": budget, "on_infeasible": "best"}
        self.graphs = 0

    def __call__(self, step: Step) -> Step:
        return torch.compile(step, backend=self._graph)

    def _graph(self, module: Any, inputs: Any) -> Callable[..., Any]:
        self.graphs += 1
        return backend.fxmem(module, inputs, options=self.options)

    def plans(self) -> list[Any]:
        mine = [s for s in list(backend._sessions.values()) if s.given is self.options]
        graphs = [graph for session in mine for graph in session.living()]
        return [p.plan for graph in graphs for p in graph.programs.values()]


def unchanged(step: Step) -> Step:
    return step


def by_aot(step: Step) -> Step:
    return torch.compile(step, backend="aot_eager")


def judged(program: Program, budget: str) -> Result:
    """The program as it is, through aot_eager and through fxmem."""
    torch._dynamo.reset()
    try:
        want = program(unchanged)
    except Exception as error:
        return Result("skipped", f"eager: {text_of(error)}")
    try:
        traced = program(by_aot)
    except Exception as error:
        traced = error
    torch._dynamo.reset()
    planned = Planned(budget)
    try:
        got = program(planned)
    except Exception as error:
        if isinstance(traced, Exception) and not isinstance(error, FxmemError):
            return Result("skipped", f"aot_eager: {text_of(traced)}")
        return Result("raises", text_of(error))
    plans = planned.plans()
    again = sum(decision.times for plan in plans for decision in plan.decisions)
    found = [name for name, other in (("eager", want), ("aot_eager", traced)) if same(other, got)]
    if found and not plans:
        return Result("skipped", "nothing to plan" if planned.graphs else "not captured")
    if found:
        return Result("equal", to=" and ".join(found), recomputed=again)
    lines = differences(want, got)
    near = close(want, got) or (not isinstance(traced, Exception) and close(traced, got))
    return Result("rounds" if near else "wrong", "; ".join(lines)[:300], recomputed=again)


def same(want: Any, got: Any) -> bool:
    return not isinstance(want, Exception) and not differences(want, got)


def close(want: Any, got: Any) -> bool:
    pairs = list(zip(tensors(want), tensors(got), strict=False))
    return all(
        a.shape == b.shape and torch.allclose(a, b, TOLERANCE, TOLERANCE, equal_nan=True)
        for a, b in pairs
        if a.dtype == b.dtype
    )


def text_of(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {' '.join(lines)}"[:300]


def trained(step: Step, args: Any, kwargs: Any, parameters: Any = ()) -> Any:
    """What a step returns and the gradients that it sends; the generator is seeded for both halves."""
    torch.manual_seed(1)
    outputs = step(*args, **kwargs)
    seen = {"outputs": snapshot(outputs), "generator": torch.get_rng_state()}
    torch.manual_seed(2)
    results = [t for t in pytree.tree_leaves(outputs) if isinstance(t, Tensor) and t.requires_grad]
    leaves = [t for t in tensors((list(args), kwargs)) if t.requires_grad] + list(parameters)
    if not results or not leaves:
        raise ValueError("no gradient")
    weights = [torch.randn(t.shape, dtype=t.dtype) for t in results]
    torch.autograd.backward(results, weights)
    return {**seen, "gradients": [snapshot(t.grad) for t in leaves]}


# -- The databases -----------------------------------------------------------------------------------


def ops(
    samples: int, budget: str, dtype: torch.dtype = torch.float32, suite: str = "ops"
) -> Iterator[Entry]:
    """Operators in a shuffled order, so that a part of them is a sample; random ones come first."""
    from torch.testing._internal import common_methods_invocations as database

    database.wrapper_set_seed = lambda op, *args, **kwargs: op(*args, **kwargs)
    entries = list(database.op_db)
    random.Random(0).shuffle(entries)
    entries.sort(key=lambda op: not is_random(op))
    yield from infos(suite, entries, samples, budget, dtype)


def in_bfloat16(samples: int, budget: str) -> Iterator[Entry]:
    yield from ops(samples, budget, torch.bfloat16, "ops-bfloat16")


def functions(samples: int, budget: str) -> Iterator[Entry]:
    """Users' own, without their rules for forward mode, at which Dynamo ends a graph."""
    from torch.testing._internal import autograd_function_db as database

    for kind in vars(database).values():
        if isinstance(kind, type) and "jvp" in vars(kind):
            del kind.jvp
    yield from infos("functions", database.autograd_function_db, samples, budget)


def custom_ops(samples: int, budget: str) -> Iterator[Entry]:
    from torch.testing._internal.custom_op_db import custom_op_db

    yield from infos("custom-ops", custom_op_db, samples, budget)


def higher_order(samples: int, budget: str) -> Iterator[Entry]:
    from torch.testing._internal.hop_db import hop_db

    yield from infos("higher-order", hop_db, samples, budget)


def infos(
    suite: str,
    entries: Iterable[Any],
    samples: int,
    budget: str,
    dtype: torch.dtype = torch.float32,
) -> Iterator[Entry]:
    for op in entries:
        if op.supports_autograd and dtype in op.supported_backward_dtypes("cpu"):
            variant = f"{op.name}.{op.variant_test_name}" if op.variant_test_name else op.name
            programs = functools.partial(op_programs, op, samples, dtype)
            yield f"{suite}/{variant}", functools.partial(judgements, programs, budget)


def judgements(programs: Callable[[], Iterable[Program]], budget: str) -> Iterator[Trial]:
    for program in programs():
        yield functools.partial(judged, program, budget)


def is_random(op: Any) -> bool:
    words = ("dropout", "rrelu", "fractional", "bernoulli", "normal", "attention", "lowrank")
    return any(word in op.name for word in words)


def op_programs(op: Any, samples: int, dtype: torch.dtype) -> Iterator[Program]:
    def call(*args: Any, **kwargs: Any) -> Any:
        return op.op(*args, **kwargs)

    torch.manual_seed(0)
    found = list(op.sample_inputs("cpu", dtype, requires_grad=True))
    found.sort(key=lambda s: (not draws(op, s), -numel(s)))
    for sample in found[:samples]:

        def program(how: Callable[[Step], Step], sample: Any = sample) -> Any:
            args, kwargs = fresh(((sample.input, *sample.args), sample.kwargs))
            return trained(how(call), args, kwargs)

        yield program


def numel(sample: Any) -> int:
    return sum(t.numel() for t in pytree.tree_leaves(sample.input) if isinstance(t, Tensor))


def draws(op: Any, sample: Any) -> bool:
    """Does the operator draw random numbers for this sample?  With p=0 or in eval mode many do not."""
    if not is_random(op):
        return False
    before = torch.get_rng_state()
    args, kwargs = fresh(((sample.input, *sample.args), sample.kwargs))
    with contextlib.suppress(Exception):
        op.op(*args, **kwargs)
    return not torch.equal(before, torch.get_rng_state())


def modules(samples: int, budget: str) -> Iterator[Entry]:
    from torch.testing._internal.common_modules import module_db

    for info in module_db:
        if torch.float32 in info.dtypes:
            programs = functools.partial(module_programs, info, samples)
            yield f"modules/{info.name}", functools.partial(judgements, programs, budget)


def module_programs(info: Any, samples: int) -> Iterator[Program]:
    torch.manual_seed(0)
    arguments = (info, "cpu", torch.float32, True)
    found = [s for s in info.module_inputs_func(*arguments, training=True) if s.forward_input]
    for sample in found[-samples:]:

        def program(how: Callable[[Step], Step], sample: Any = sample) -> Any:
            torch.manual_seed(0)
            built = sample.constructor_input
            module = info.module_cls(*built.args, **built.kwargs).train()
            given = sample.forward_input
            args, kwargs = fresh((tuple(given.args), given.kwargs))
            seen = trained(how(module), args, kwargs, module.parameters())
            return {**seen, "buffers": [snapshot(b) for b in module.buffers()]}

        yield program


# -- Hazards -----------------------------------------------------------------------------------------

BUDGETS = {"all": "1TiB", "half": "0.5x", "min": "min"}

REFUSALS = (RuntimeError, NotImplementedError, FxmemError)


class Optimized:
    """fxmem.optimize."""

    graphs = 0  # of Dynamo's

    def __init__(self, budget: str) -> None:
        self.budget = budget
        self.steps: list[fxmem.OptimizedModule] = []

    def __call__(self, case: Case) -> Step:
        made = fxmem.optimize(
            case.model,
            self.budget,
            case.inputs,
            example_kwargs=case.kwargs,
            dynamic_shapes=case.dynamic_shapes,
            on_infeasible="best",
        )
        self.steps.append(made)
        return made

    def plans(self) -> list[Any]:
        return [step.plan for step in self.steps]


class Compiled(Planned):
    """torch.compile around a case's model."""

    def __call__(self, case: Case) -> Step:
        return torch.compile(case.model, backend=self._graph)


class InPlace(Planned):
    """The model compiled in place, which can be copied and pickled, and keeps its names."""

    def __call__(self, case: Case) -> Step:
        case.model.compile(backend=self._graph)
        return case.model


DOORS: dict[str, tuple[Callable[[str], Any], ...]] = {
    "optimize": (Optimized,),
    "backend": (Compiled, InPlace),  # the second where the first one's graphs are none
}


def hazards(_: int, __: str) -> Iterator[Entry]:
    for name, hazard in HAZARDS.items():
        for door, ways in DOORS.items():
            for label, budget in BUDGETS.items():
                trial = functools.partial(faced, hazard, ways, budget)
                yield f"hazards/{door}/{label}/{name}", functools.partial(iter, [trial])


def faced(hazard: Hazard, ways: Sequence[Callable[[str], Any]], budget: str) -> Result:
    """The hazard as it is, and by the first of the ways that captures it.

    Where torch.compile around the model raises with torch's own backend too, the next way is tried as well.
    """
    want = observed(hazard.make(), lambda case: case.model)
    first = found = through(hazard, ways[0](budget), want)
    for way in ways[1:]:
        raises_anyway = found.status == "raises" and by_torch(hazard).status == "raises"
        if found.status == "skipped" or raises_anyway:
            found = through(hazard, way(budget), want)
            found.to += " in place"
    return first if found.status == "skipped" else found


def through(hazard: Hazard, door: Any, want: Any) -> Result:
    torch._dynamo.reset()
    case = hazard.make()
    try:
        got = observed(case, door)
    except Exception as error:
        clear = hazard.refusal_ok and isinstance(error, REFUSALS)
        return Result("refuses" if clear else "raises", text_of(error))
    lines = differences(want, got)
    if lines and case.right is not None:
        right = hazard.make()
        lines = differences(case.right(right.model), got)
    plans = door.plans()
    again = sum(decision.times for plan in plans for decision in plan.decisions)
    if lines:
        return Result("wrong", "; ".join(lines)[:300], recomputed=again)
    if not plans:
        return Result("skipped", "nothing to plan" if door.graphs else "not captured")
    return Result("equal", to="eager", recomputed=again)


def observed(case: Case, door: Callable[[Case], Step]) -> Any:
    with case.context():
        step = door(case)
    return case.run(step)


def hazards_of_torch(_: int, __: str) -> Iterator[Entry]:
    for name, hazard in HAZARDS.items():
        trial = functools.partial(by_torch, hazard)
        yield f"hazards-aot_eager/{name}", functools.partial(iter, [trial])


def by_torch(hazard: Hazard) -> Result:
    want = observed(hazard.make(), lambda case: case.model)
    torch._dynamo.reset()
    try:
        got = observed(hazard.make(), lambda case: by_aot(case.model))
    except Exception as error:
        return Result("raises", text_of(error))
    lines = differences(want, got)
    return Result("wrong", "; ".join(lines)[:300]) if lines else Result("equal", to="eager")


SUITES = {
    "hazards": hazards,
    "hazards-aot_eager": hazards_of_torch,
    "modules": modules,
    "functions": functions,
    "custom-ops": custom_ops,
    "higher-order": higher_order,
    "ops": ops,
    "ops-bfloat16": in_bfloat16,
}


# -- All of it ---------------------------------------------------------------------------------------


def worst(results: list[Result]) -> Result:
    """One result for an entry of several samples."""
    order = ("wrong", "raises", "refuses", "rounds", "equal", "skipped")
    best = min(results, key=lambda r: order.index(r.status))
    best.recomputed = sum(r.recomputed for r in results)
    best.seconds = round(sum(r.seconds for r in results), 2)
    return best


@contextlib.contextmanager
def limited() -> Iterator[None]:
    def stop(*_: Any) -> None:
        raise TimeoutError(f"longer than {SECONDS} seconds")

    signal.signal(signal.SIGALRM, stop)
    signal.alarm(SECONDS)
    try:
        yield
    finally:
        signal.alarm(0)


def entry(trials: Callable[[], Iterable[Trial]]) -> Result:
    results = []
    for trial in trials():
        began = time.perf_counter()
        try:
            with limited(), warnings.catch_warnings():
                warnings.simplefilter("ignore")
                result = trial()
        except TimeoutError as error:
            result = Result("skipped", str(error))
        result.seconds = time.perf_counter() - began
        results.append(result)
    return worst(results) if results else Result("skipped", "no sample")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--suites", default=",".join(SUITES), help="names, by commas")
    parser.add_argument("--budget", default="min")
    parser.add_argument("--samples", type=int, default=1, help="of each entry, the largest")
    parser.add_argument("--minutes", type=float, default=15)
    parser.add_argument("--only", default="", help="entries whose name has this in it")
    parser.add_argument("--again", action="store_true")
    parser.add_argument("--out", type=Path, default=HERE / "results" / "sweep-cpu.json")
    asked = parser.parse_args()
    asked.out = asked.out.resolve()
    os.chdir(tempfile.mkdtemp())  # torch leaves files where it fails to cut a nested graph
    torch.set_num_threads(1)
    known: dict[str, dict[str, Any]] = {}
    if asked.out.exists() and not asked.again:
        known = json.loads(asked.out.read_text())["entries"]
    end = time.monotonic() + 60 * asked.minutes
    total = 0
    for suite in asked.suites.split(","):
        for name, trials in SUITES[suite](asked.samples, asked.budget):
            total += 1
            done = known.get(name, {}).get("status") not in (None, "wrong", "raises")
            if done or asked.only not in name or time.monotonic() > end:
                continue
            known[name] = asdict(Result("died"))
            save(asked, known, total)
            result = entry(trials)
            known[name] = asdict(result)
            if result.status in ("wrong", "raises", "rounds"):
                print(f"{name}: {result.status}: {result.why}", flush=True)
            save(asked, known, total)
    save(asked, known, total)
    print(json.dumps(summary(known), indent=1))
    ours = [r for name, r in known.items() if not name.startswith("hazards-aot_eager/")]
    return 1 if any(r["status"] in ("wrong", "raises", "died") for r in ours) else 0


def summary(known: dict[str, dict[str, Any]]) -> dict[str, dict[str, int]]:
    found: dict[str, collections.Counter[str]] = {}
    for name, result in known.items():
        suite = name.rsplit("/", 1)[0] if name.startswith("hazards/") else name.split("/", 1)[0]
        found.setdefault(suite, collections.Counter())[result["status"]] += 1
        found[suite]["with recomputation"] += result["recomputed"] > 0
    return {suite: dict(counts) for suite, counts in found.items()}


def save(asked: argparse.Namespace, known: dict[str, dict[str, Any]], total: int) -> None:
    asked.out.parent.mkdir(exist_ok=True)
    text = {
        "torch": torch.__version__,
        "date": time.strftime("%Y-%m-%d"),
        "budget": asked.budget,
        "samples": asked.samples,
        "summary": summary(known),
        "entries": dict(sorted(known.items())),
    }
    asked.out.write_text(json.dumps(text, indent=1) + "\n")


if __name__ == "__main__":
    sys.exit(main())
