"""Graphs that compute the same run what was compiled for the first of them; others do not."""

import copy
from itertools import accumulate

import pytest
import torch
import torch.nn.functional as F
from dynamo import fresh_dynamo
from hazards import differences, train
from quick import but_slow
from torch import nn

import fxmem
from fxmem import backend
from fxmem.backend.graph import Graph
from fxmem.backend.twins import renamed
from fxmem.graphs.measure import cpu_allocations
from fxmem.planning.plan import Decision, Key


@pytest.fixture(autouse=True)
def _clean():
    with fresh_dynamo():
        yield


class Layer(nn.Module):
    def __init__(self, width=32):
        super().__init__()
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)
        self.drop = nn.Dropout(0.2)

    def forward(self, x):
        return x + self.drop(self.down(F.gelu(self.up(x))))


class Cut(nn.Module):
    """A graph for each of its layers, all equal but for the first one's input, which needs no gradient."""

    def __init__(self, depth=4):
        super().__init__()
        self.layers = nn.ModuleList(Layer() for _ in range(depth))

    def forward(self, x):
        x = self.layers[0](x)
        torch._dynamo.graph_break()
        x = self.layers[1](x)
        torch._dynamo.graph_break()
        x = self.layers[2](x)
        torch._dynamo.graph_break()
        return self.layers[3](x)


def trained(model, budget, x, steps=3, **how):
    """What is compiled of a model, and its graphs in forward order; each step was equal to eager's."""
    eager, options = copy.deepcopy(model), {"budget": budget}
    step = torch.compile(model, backend=backend.fxmem, options=options, **how)
    for seed in range(steps):
        eager.zero_grad()
        model.zero_grad()
        wrong = differences(train(eager, (x,), seed=seed), train(step, (x,), seed=seed))
        assert not wrong, "\n".join(wrong)
    return step, backend._sessions[id(options)].living()


def layers(change=None, of=2):
    torch.manual_seed(0)
    model = Cut()
    if change is not None:
        change(model.layers[of])
    return model


def runs(graphs):
    """What is compiled: how many functions, of all programs of these graphs."""
    return len({id(program.run) for graph in graphs for program in graph.programs.values()})


X = (64, 32)


def test_twins_run_what_was_compiled_for_the_first_of_them():
    _step, graphs = trained(layers(), "1GiB", torch.randn(X))
    first, second, *others = [graph.kind for graph in graphs]
    assert first != second
    assert others == [second, second]
    assert runs(graphs) == 2


def test_twins_are_planned_once_where_one_plan_is_as_good_for_all(monkeypatch):
    x = torch.randn(1024, 32)
    model = layers()
    budget = int(0.75 * peak(model, model, x))
    made, build = [], Graph.build
    monkeypatch.setattr(Graph, "build", lambda *args, **how: made.append(1) or build(*args, **how))
    step = torch.compile(model, backend=backend.fxmem, options={"budget": budget})
    for _ in range(3):
        assert peak(step, model, x) <= budget
    # Of each kind a smallest one; then, of three twins, perhaps two plans.
    assert len(made) <= 2 + 3
    plans = fxmem.plans(model)
    assert len(plans) == 4
    assert any(plan.recomputed for plan in plans)
    assert 0.95 * budget < max(plan.predicted_peak for plan in plans) <= budget


def peak(step, model, x):
    model.zero_grad()
    sizes, _ = cpu_allocations(lambda: F.mse_loss(step(x), x).backward())
    model.zero_grad()
    return sum(t.nbytes for t in (*model.parameters(), x)) + max(accumulate(sizes))


def test_a_plan_speaks_of_the_modules_of_its_own_graph():
    model = layers()
    _step, _ = trained(model, "min", torch.randn(X))
    for place, plan in enumerate(fxmem.plans(model)):
        modules = {decision.module.removesuffix(".up") for decision in plan.decisions}
        assert modules <= {f"layers.{place}", f"layers.{place}.down", f"layers.{place}.drop"}
        assert {d.key.module for d in plan.decisions} == {d.module for d in plan.decisions}
        parameters = [t.name for t in plan.certificate.tensors if t.category == "parameters"]
        assert all(name.startswith(f"layers.{place}.") for name in parameters)


def other_share(layer):
    layer.drop.p = 0.3


def frozen(layer):
    layer.up.requires_grad_(False)


def evaluated(layer):
    layer.drop.eval()


def tied(layer):
    layer.up.bias = nn.Parameter(torch.zeros(128))
    layer.down.bias = nn.Parameter(layer.up.bias.detach()[:32])


def of_another_shape(layer):
    layer.up, layer.down = nn.Linear(32, 64), nn.Linear(64, 32)


def strided(layer):
    layer.up.weight = nn.Parameter(layer.up.weight.detach().t().contiguous().t())


CHANGES = other_share, tied, strided, frozen, evaluated, of_another_shape


@pytest.mark.parametrize("change", but_slow(CHANGES, CHANGES[:3]))
def test_what_differs_is_compiled_by_itself(change):
    _step, graphs = trained(layers(change), "min", torch.randn(X))
    kinds = [graph.kind for graph in graphs]
    assert kinds[1] == kinds[3] != kinds[2]


class ByOwnFunction(Layer):
    """Calls what is somebody's own, and may do something else at the next trace."""

    def forward(self, x):
        return cubed(super().forward(x))


@torch._dynamo.allow_in_graph
def cubed(x):
    return x * x * x


def test_graphs_that_are_not_wholly_known_have_no_twins():
    model = layers()
    model.layers = nn.ModuleList(ByOwnFunction() for _ in range(4))
    _step, graphs = trained(model, "min", torch.randn(X))
    assert [graph.kind for graph in graphs] == [None] * 4


def test_graphs_of_sizes_that_change_have_no_twins():
    _step, graphs = trained(layers(), "min", torch.randn(X), dynamic=True)
    assert all(graph.kind is None for graph in graphs)


class HalfInBfloat16(Cut):
    def forward(self, x):
        x = self.layers[0](x)
        torch._dynamo.graph_break()
        x = self.layers[1](x)
        torch._dynamo.graph_break()
        with torch.autocast("cpu", torch.bfloat16):
            x = self.layers[2](x)
        torch._dynamo.graph_break()
        return self.layers[3](x)


def test_modes_around_a_graph_count():
    torch.manual_seed(0)
    _step, graphs = trained(HalfInBfloat16(), "min", torch.randn(X))
    kinds = [graph.kind for graph in graphs]
    assert kinds[2] not in (kinds[1], kinds[3])


def test_names_change_where_they_are_names_alone():
    key = Key("keep", "mm", 0)
    mine = Decision(key, "mm", "f32[2]", "keep", "a.py:1 in forward", "keep", 8, 8, 0.0, "keep")
    names = {"keep": "other", "a.py:1 in forward": "b.py:2 in forward", "mm": "no"}
    (found,) = renamed((mine,), names)
    assert found == Decision(
        Key("other", "mm", 0),
        "mm",
        "f32[2]",
        "other",
        "b.py:2 in forward",
        "keep",
        8,
        8,
        0.0,
        "keep",
    )
