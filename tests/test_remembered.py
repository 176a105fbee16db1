"""Searches for plans that are remembered: equal steps share one, and no other step does."""

from dataclasses import fields, replace

import pytest
import torch
from dynamo import fresh_dynamo
from flows import coded_flow, random_flow
from optimum import spread
from test_backend import Cut

import fxmem
from fxmem.analysis.dataflow import Operator, Value
from fxmem.planning.planner import Planner
from fxmem.planning.remembered import RememberingPlanner, forget
from fxmem.planning.solver import Solver


@pytest.fixture
def asked(monkeypatch):
    """The budgets that were searched for."""
    budgets = []
    real = Solver.answer
    monkeypatch.setattr(Solver, "answer", lambda s, n: budgets.append(n) or real(s, n))
    forget()
    return budgets


@pytest.mark.parametrize("flow", [random_flow, coded_flow])
def test_equal_steps_are_searched_once_and_get_the_plans_of_a_planner_of_their_own(flow, asked):
    own = Planner(flow(1, 24))
    budgets = [*spread(own, 5), own.smallest().outcome.peak]
    want = [own.fit(budget) for budget in budgets]
    first = RememberingPlanner(flow(1, 24))
    got = [first.fit(budget) for budget in reversed(budgets)][::-1]
    asked.clear()
    second = RememberingPlanner(flow(1, 24))
    again = [second.fit(budget) for budget in budgets]
    assert second.smallest().kept == first.smallest().kept == own.smallest().kept
    assert not asked
    assert len(list(filter(None, want))) > 2
    for plans in zip(want, got, again, strict=True):
        assert len(set(map(all_of, plans))) == 1


def all_of(plan):
    return plan and (plan.kept, plan.drops, plan.outcome.peak, plan.outcome.seconds, plan.bound)


def changed(item, name):
    old = getattr(item, name)
    if isinstance(old, bool):
        return replace(item, **{name: not old})
    return replace(item, **{name: (*old, 0) if isinstance(old, tuple) else old + 1})


@pytest.mark.parametrize(
    ("kind", "name"),
    [
        (kind, field.name)
        for kind in (Operator, Value)
        for field in fields(kind)
        if field.name not in ("node", "storage")
    ],
)
def test_a_step_that_differs_in_one_number_is_searched_for_itself(kind, name):
    flow = random_flow(1, 20)
    items = list(flow.operators if kind is Operator else flow.values)
    items[3] = changed(items[3], name)
    other = replace(flow, **{"operators" if kind is Operator else "values": items})
    first = RememberingPlanner(flow)
    assert RememberingPlanner(random_flow(1, 20))._first is first._first
    different = RememberingPlanner(flow)
    different.flow = other
    assert different._first is not first._first


@pytest.mark.parametrize("changes", [{"waiting": 1.0}, {"loss_outside": 8}])
def test_a_step_with_other_bytes_or_seconds_around_it_is_searched_for_itself(changes):
    flow = random_flow(1, 20)
    other = RememberingPlanner(replace(flow, **changes))
    assert other._first is not RememberingPlanner(flow)._first


def test_what_policies_decide_is_searched_for_itself():
    flow = random_flow(1, 20)
    v = Planner(flow).free[0]
    planners = [
        RememberingPlanner(flow),
        RememberingPlanner(flow, must_keep=frozenset({v})),
        RememberingPlanner(flow, must_remake=frozenset({v})),
        RememberingPlanner(flow, limit=100),
    ]
    assert len({id(planner._first) for planner in planners}) == 4


class Six(Cut):
    """Two graphs more."""

    def forward(self, x):
        x = self.blocks[4](x)
        torch._dynamo.graph_break()
        x = self.blocks[5](x)
        torch._dynamo.graph_break()
        return Cut.forward(self, x)


def test_equal_blocks_in_graphs_of_their_own_are_searched_once(asked):
    counts = []
    for kind, graphs in ((Cut, 4), (Six, 6)):
        forget()
        asked.clear()
        with fresh_dynamo():
            model, x = kind(depth=graphs), torch.randn(64, 32, requires_grad=True)
            step = torch.compile(model, backend="fxmem", options={"budget": "min"})
            for _ in range(2):
                step(x).backward()
            assert len(fxmem.plans(step)) == graphs
        counts.append(len(asked))
    assert counts[0] == counts[1] > 0
