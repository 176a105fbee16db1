"""The incremental simulator against the exact one: after every move, and after taking it back."""

import random

import numpy as np
import pytest
from flows import coded_flow, noisy_flow, random_flow

from fxmem.analysis.simulate import Outcome, Simulator
from fxmem.planning.schedule import Schedule


def slots_of(simulator: Simulator, outcome: Outcome) -> list[list[int]]:
    """The exact simulator's steps, folded into slots: what is made again, then the operator."""
    slots = len(simulator.read_by_backward)
    made = [0] * slots
    for _, j in outcome.recomputed:
        made[j] += 1
    found, at = [], outcome.num_forward_steps
    for j in range(slots):
        found.append(outcome.live[at : at + made[j] + 1].tolist())
        at += made[j] + 1
    return found


def check(schedule: Schedule) -> None:
    simulator = schedule.simulator
    outcome = simulator.run(schedule.kept, schedule.drops())
    forward = outcome.live[: outcome.num_forward_steps]
    assert schedule.forward_peaks().tolist() == forward.tolist()
    slots = slots_of(simulator, outcome)
    assert schedule.slot_peaks().tolist() == [max(steps) for steps in slots]
    assert schedule.transients().tolist() == [max(steps) - steps[-1] for steps in slots]
    assert schedule.peak == outcome.peak
    assert schedule.recomputed() == outcome.recomputed
    assert schedule.seconds == pytest.approx(outcome.seconds, abs=1e-12)
    assert schedule.noise == sum(simulator.flow.values[v].noise for v in schedule.kept)


def move(schedule: Schedule, rng: random.Random) -> None:
    candidates = schedule.simulator.candidates()
    v, j = rng.choice(candidates), rng.randrange(len(schedule.remade))
    if rng.random() < 0.5:
        (schedule.remake if v in schedule.kept else schedule.keep)(v)
    elif (v, j) in schedule.drops():
        schedule.retain(v, j)
    else:
        schedule.drop(v, j)


def state(schedule: Schedule) -> tuple[object, ...]:
    return (
        schedule.seconds,
        schedule.noise,
        schedule.peak,
        schedule.recomputed(),
        schedule.drops(),
        set(schedule.kept),
        schedule.slot_peaks().tolist(),
        schedule.forward_peaks().tolist(),
    )


@pytest.mark.parametrize("flow", [random_flow, coded_flow, noisy_flow])
@pytest.mark.parametrize("seed", range(150))
def test_every_move_is_simulated_exactly_and_can_be_taken_back(seed, flow):
    simulator = Simulator(flow(seed))
    if not simulator.candidates() or not simulator.read_by_backward:
        pytest.skip("nothing to choose")
    rng = random.Random(seed)
    kept = [v for v in simulator.candidates() if rng.random() < 0.5]
    schedule = Schedule(simulator, kept)
    check(schedule)
    for _ in range(30):
        before, mark = state(schedule), schedule.mark()
        for _ in range(rng.randint(1, 3)):
            move(schedule, rng)
            check(schedule)
        if rng.random() < 0.5:
            schedule.undo(mark)
            assert state(schedule) == before
            check(schedule)


def test_a_schedule_that_starts_with_drops_is_the_one_that_got_them():
    simulator = Simulator(random_flow(3, forward=12))
    rng = random.Random(3)
    schedule = Schedule(simulator, [])
    for _ in range(20):
        move(schedule, rng)
    again = Schedule(simulator, schedule.kept, schedule.drops())
    assert state(again)[2:] == state(schedule)[2:]
    assert np.array_equal(again.slot_peaks(), schedule.slot_peaks())
