"""The best choice of kept values there is, on steps small enough to try every one."""

import itertools
from collections.abc import Callable

from flows import random_flow

from fxmem.analysis.dataflow import NOISE_CEILING, Dataflow
from fxmem.planning.planner import Choice, Planner

MOST = 9
"""Values that may be kept or not: all 2**9 choices are tried."""


def small_planner(seed: int, flow: Callable[[int], Dataflow] = random_flow) -> Planner | None:
    """A planner with something to choose; None where there is nothing, or too much."""
    planner = Planner(flow(seed))
    return planner if 0 < len(planner.free) <= MOST and planner.keep_all() else None


def every_choice(planner: Planner) -> list[Choice]:
    """All there are that let no copy go early, and that are not too much noise."""
    free, noise = planner.free, planner.simulator.noise_of_keeping
    subsets = (s for n in range(len(free) + 1) for s in itertools.combinations(free, n))
    return [planner.choice(kept) for kept in subsets if noise(kept) <= NOISE_CEILING]


def budgets(choices: list[Choice]) -> list[int]:
    """The smallest peak of all choices, and two in between."""
    peaks = sorted({c.outcome.peak for c in choices})
    return sorted({peaks[0], peaks[len(peaks) // 3], peaks[2 * len(peaks) // 3]})


def distance(planner: Planner, budget: int, choices: list[Choice]) -> float:
    """Step time of the plan / step time of the best choice that fits; infinite without a plan."""
    whole = planner.flow.seconds
    best = min(c.outcome.seconds for c in choices if c.outcome.peak <= budget)
    found = planner.fit(budget)
    if found is None:
        return float("inf")
    assert found.outcome.peak <= budget
    assert planner.simulator.noise_of_keeping(found.kept) <= NOISE_CEILING
    return (whole + found.outcome.seconds) / (whole + best)


def distances(seed: int, flow: Callable[[int], Dataflow] = random_flow) -> list[float]:
    """How far plans for one random step are from the best, for a few budgets."""
    planner = small_planner(seed, flow)
    if planner is None:
        return []
    choices = every_choice(planner)
    return [distance(planner, budget, choices) for budget in budgets(choices)]


def spread(planner: Planner, number: int = 20) -> list[int]:
    """Budgets from what every plan needs up to what the unchanged step needs, evenly."""
    low, high = planner.solver.least_possible, planner.keep_all().outcome.peak
    return [low + (high - low) * n // number for n in range(1, number + 1)]
