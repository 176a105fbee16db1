"""The linear program against plans that are there: none is faster than its bound."""

import itertools
import random

import pytest
from flows import coded_flow, noisy_flow, random_flow

from fxmem.analysis.dataflow import NOISE_CEILING
from fxmem.planning import relaxation
from fxmem.planning.planner import Choice, Planner

SEEDS = range(60)


def random_choices(planner: Planner, seed: int, number: int = 12) -> list[Choice]:
    """Choices that keep some and let copies go now and then."""
    rng = random.Random(seed)
    slots = range(len(planner.simulator.read_by_backward))
    found = []
    for _ in range(number):
        keep, drop = rng.random(), rng.choice((0.0, 0.2, 0.8))
        kept = quiet(planner, [v for v in planner.free if rng.random() < keep])
        drops = [(v, j) for v in planner.free for j in slots if rng.random() < drop]
        found.append(planner.choice(kept, drops))
    return found


def quiet(planner: Planner, kept: list[int]) -> list[int]:
    """Without lossy codes, where they are too much noise."""
    simulator = planner.simulator
    if simulator.noise_of_keeping(kept) <= NOISE_CEILING:
        return kept
    return [v for v in kept if v not in simulator.lossy]


@pytest.mark.parametrize("forward", [6, 25])
@pytest.mark.parametrize("flow", [random_flow, coded_flow, noisy_flow])
@pytest.mark.parametrize("seed", SEEDS)
def test_no_plan_adds_less_than_the_bound(seed, flow, forward):
    planner = Planner(flow(seed, forward))
    for choice in random_choices(planner, seed):
        program = planner.solver.program(choice.outcome.peak)
        assert program.feasible
        assert program.bound.seconds <= choice.outcome.seconds + 1e-12


@pytest.mark.parametrize("seed", SEEDS[::5])
def test_less_room_never_lowers_the_bound(seed):
    planner = Planner(random_flow(seed, forward=20))
    low, high = planner.solver.least_possible, planner.keep_all().outcome.peak
    budgets = [low + (high - low) * i // 8 for i in range(9)]
    bounds = [p.bound.seconds for p in map(planner.solver.program, budgets) if p.feasible]
    assert all(a >= b - 1e-9 for a, b in itertools.pairwise(bounds))


@pytest.mark.parametrize("seed", SEEDS[::5])
def test_what_no_plan_can_do_is_not_feasible(seed):
    planner = Planner(random_flow(seed, forward=20))
    assert not planner.solver.program(planner.solver.least_possible - 1).feasible


def test_a_large_program_gets_one_cut(monkeypatch):
    """Without any its bound is low; with more it takes too long."""

    def third(seed):
        planner = Planner(random_flow(seed, forward=25))
        high = planner.keep_all().outcome.peak
        return planner.solver.program(high - (high - planner.solver.least_possible) // 3)

    free = [third(seed) for seed in SEEDS[::5]]
    monkeypatch.setattr(relaxation, "_COLUMNS", 0)
    large = [third(seed) for seed in SEEDS[::5]]
    assert max(len(program.cuts) for program in free) > 1
    assert [len(program.cuts) for program in large] == [min(len(p.cuts), 1) for p in free]
    assert sum(p.bound.seconds for p in large) > 0.5 * sum(p.bound.seconds for p in free)


def test_the_bound_is_near_the_plans():
    """Or it would say nothing: a bound of zero passes every other test."""
    gaps = []
    for seed in SEEDS:
        planner = Planner(random_flow(seed, forward=20))
        high = planner.keep_all().outcome.peak
        budget = high - (high - planner.solver.least_possible) // 3
        found = planner.fit(budget)
        if found is not None and found.outcome.seconds:
            assert found.bound is not None
            gaps.append((found.outcome.seconds - found.bound) / planner.flow.seconds)
    assert len(gaps) > 20
    assert sorted(gaps)[len(gaps) // 2] < 0.05
