"""The simulator against the graphs it speaks of: byte for byte at every step, for random choices."""

import copy
import dataclasses
import random
from typing import Any

import pytest
from families import FAMILIES
from hazards import differences, train
from programs import random_program
from quick import but_slow
from test_engine import Captured, capture_once

from fxmem.analysis.liveness import MemoryTimeline, Step
from fxmem.basics.sizes import storages_in
from fxmem.graphs.graph import is_view, node_line, operator_name
from fxmem.planning.planner import Choice
from fxmem.steps.pipeline import Planned
from fxmem.steps.rewrite import rewrite

SHARES = (0.0, 0.2, 0.5, 0.8)
"""Of the candidates, how many are kept: one choice each."""

SEEDS = range(1000, 1020)


def choices(captured: Captured, seed: int) -> list[Choice]:
    """Random choices; in every other one, copies are let go now and then."""
    rng = random.Random(seed)
    planner = captured.analysis.planner
    candidates = planner.simulator.candidates()
    found = []
    for i, share in enumerate(SHARES):
        kept = frozenset(v for v in candidates if rng.random() < share)
        slots = range(len(planner.simulator.read_by_backward))
        drops = [(v, j) for v in candidates for j in slots if i % 2 and rng.random() < 0.5]
        found.append(planner.choice(kept, drops))
    return found


def rewritten(captured: Captured, whole: Planned, choice: Choice) -> tuple[Planned, MemoryTimeline]:
    """The step with a choice applied, and the timeline of what is expected to run of it."""
    graph, halves, line, _ = rewrite(captured.analysis, choice)
    return dataclasses.replace(whole, graph=graph, split=halves), line


def runs(step: Step) -> bool:
    """Does the step do more than look at memory that is there already?"""
    if step.node is None:
        return True
    looks = is_view(step.node) or operator_name(step.node) == "getitem"
    return not looks and bool(storages_in(step.node.meta.get("val")))


def wrong_steps(choice: Choice, line: MemoryTimeline) -> list[str]:
    """Where the simulated bytes are not those of the rewritten graph, the first few."""
    live = line.live_bytes({})
    real = [(step, int(n)) for step, n in zip(line.steps, live, strict=True) if runs(step)]
    simulated = [int(n) for n in choice.outcome.live]
    if len(real) != len(simulated):
        return [f"{len(simulated)} steps simulated, {len(real)} run"]
    lines = [
        f"step {i}, {node_line(step.node) if step.node else 'boundary'}: {n - m:+} bytes of {n}"
        for i, ((step, n), m) in enumerate(zip(real, simulated, strict=True))
        if n != m
    ]
    peak = line.peak({}).nbytes
    if choice.outcome.peak < peak:
        lines.insert(0, f"peak {choice.outcome.peak} simulated, {peak} really")
    return lines[:5]


def check(model: Any, args: tuple[Any, ...], kwargs: dict[str, Any], seed: int) -> None:
    start = copy.deepcopy(model.state_dict())

    def seen(step: Any) -> Any:
        model.load_state_dict(start)
        model.zero_grad(set_to_none=True)
        return train(step, args, kwargs)

    wrong = []
    with capture_once(model, args, kwargs) as captured:
        whole = captured.decide("1TiB")
        unchanged, steps = captured.compile(whole), []
        for share, choice in zip(SHARES, choices(captured, seed), strict=True):
            planned, line = rewritten(captured, whole, choice)
            steps.append((share, captured.compile(planned)))
            wrong += [f"{share:.0%} kept: {text}" for text in wrong_steps(choice, line)]
    want = seen(unchanged)
    for share, step in steps:
        wrong += [f"{share:.0%} kept: {text}" for text in differences(want, seen(step))]
    assert not wrong, "\n".join(wrong)


QUICK = {"llama", "gpt2-dropout", "resnet", "unet"}


@pytest.mark.parametrize("name", but_slow(FAMILIES, QUICK))
def test_family(name):
    check(*FAMILIES[name].build("tiny"), seed=0)


@pytest.mark.parametrize("seed", but_slow(SEEDS, SEEDS[:10]))
def test_random_program(seed):
    program = random_program(seed)
    check(program.model, program.inputs, {}, seed)
