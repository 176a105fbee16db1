"""Plans against the best there is, on steps small enough to try everything; and against each other."""

import itertools

import pytest
from flows import coded_flow, noisy_flow, random_flow
from optimum import distances, every_choice, small_planner, spread
from quick import but_slow

from fxmem.planning.planner import Choice, Planner

SEEDS = range(240)


@pytest.mark.parametrize("flow", but_slow([random_flow, coded_flow, noisy_flow], [coded_flow]))
def test_plans_are_close_to_the_best_choice_of_kept_values(flow):
    """Of 973 searches (600 seeds) one ended further away today, without a plan: none of these."""
    found = [distance for seed in SEEDS for distance in distances(seed, flow)]
    assert len(found) > 200
    assert max(found) <= 1.01


@pytest.mark.parametrize("seed", SEEDS[::5])
def test_the_smallest_is_no_smaller_than_possible(seed):
    planner = small_planner(seed)
    if planner is None:
        pytest.skip("nothing to choose, or too much to try")
    smallest = planner.smallest().outcome.peak
    assert planner.solver.least_possible <= smallest <= planner.keep_all().outcome.peak
    best = min(c.outcome.peak for c in every_choice(planner))
    assert smallest <= 1.08 * best


def is_the_same(first: Choice | None, second: Choice | None) -> bool:
    if first is None or second is None:
        return first is second
    return (first.kept, first.drops) == (second.kept, second.drops)


@pytest.mark.parametrize("forward", but_slow([20, 40], [20]))
@pytest.mark.parametrize("seed", SEEDS[::80])
def test_the_same_step_gets_the_same_plan(seed, forward):
    """Whatever the planner was asked before."""
    first, second = (Planner(random_flow(seed, forward)) for _ in range(2))
    budgets = spread(first, 5)
    plans = [first.fit(budget) for budget in budgets]
    again = [second.fit(budget) for budget in reversed(budgets)]
    assert all(map(is_the_same, plans, reversed(again)))


@pytest.mark.parametrize("flow", but_slow([random_flow, coded_flow, noisy_flow], [noisy_flow]))
@pytest.mark.parametrize("forward", but_slow([8, 20, 40], [8, 20]))
@pytest.mark.parametrize("seed", SEEDS[::80])
def test_more_room_is_never_slower(seed, forward, flow):
    planner = Planner(flow(seed, forward))
    smallest = planner.smallest()
    asked = [*spread(planner), smallest.outcome.peak]
    found = [(budget, plan) for budget in sorted(asked) if (plan := planner.fit(budget))]
    assert len(found) > 5
    assert all(plan.outcome.peak <= budget for budget, plan in found)
    assert all(plan.bound <= plan.outcome.seconds for _, plan in found)
    seconds = [plan.outcome.seconds for _, plan in found]
    assert all(less >= more for less, more in itertools.pairwise(seconds))
    assert smallest.outcome.seconds >= seconds[-1]


@pytest.mark.parametrize("flow", [coded_flow, noisy_flow])
@pytest.mark.parametrize("seed", SEEDS[::8])
def test_codes_alone_are_as_few_as_the_budget_allows(seed, flow):
    planner = Planner(flow(seed))
    choices = planner.without_remaking()
    for budget in sorted({c.outcome.peak for c in choices} | set(spread(planner))):
        fitting = [c.outcome.seconds for c in choices if c.outcome.peak <= budget]
        found = planner.fit_without_remaking(budget)
        if not fitting:
            assert found is None
            continue
        assert found is not None
        assert found.outcome.peak <= budget
        assert found.outcome.seconds <= min(fitting)


def test_a_code_goes_where_there_is_room_for_what_it_is_made_of():
    slower = 0
    for seed in SEEDS:
        planner = Planner(coded_flow(seed, 12))
        *_, least = planner.without_remaking()
        room = planner.keep_all().outcome.peak - 1
        found = planner.fit_without_remaking(room)
        slower += found is not None and found.outcome.seconds < least.outcome.seconds
    assert slower > 20
