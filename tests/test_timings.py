"""Measured operator times: what is measured, what is remembered, what stands in for the rest."""

import json

import pytest
import torch
from torch import nn
from torch._dispatch.python import enable_python_dispatcher

import fxmem
from fxmem.analysis import timings
from fxmem.analysis.cost import CPU
from fxmem.analysis.timings import MeasuredCost, load_timings, timings_path
from fxmem.graphs.workspace import Call, TensorSpec

CPU_DEVICE = torch.device("cpu")


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setenv("FXMEM_CACHE_DIR", str(tmp_path))
    return tmp_path


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(16, 32), nn.Linear(32, 1)

    def forward(self, x):
        return self.b(torch.tanh(self.a(x))).sum()


def planned(cost):
    return fxmem.plan(Model(), "1TiB", (torch.zeros(8, 16),), cost=cost)


def test_a_step_takes_what_its_operators_were_measured_at(folder):
    plan = planned("measure")
    table = load_timings(CPU_DEVICE)
    assert plan.cost_model == "measured"
    assert any(signature.startswith("aten.tanh.default") for signature in table)
    assert all(0 < times.hot < 1 and 0 < times.cold < 1 for times in table.values())
    longest = sum(max(times) for times in table.values())
    assert 0 < plan.seconds <= longest * 4  # some run several times


def test_what_was_measured_is_not_measured_again(folder, monkeypatch):
    first = planned("measure")
    monkeypatch.setattr(timings, "time_call", lambda call, device: pytest.fail(f"again: {call}"))
    assert planned("measure").seconds == first.seconds


def write(table):
    timings_path(CPU_DEVICE).write_text(json.dumps(table))


def test_the_file_decides(folder):
    planned("measure")
    table = load_timings(CPU_DEVICE)
    write(dict.fromkeys(table, (1.0, 2.0)))
    assert planned("measure").seconds >= 2.0 * 4


def test_what_is_made_again_takes_the_time_of_calls_in_a_row(folder):
    layers = [layer for _ in range(6) for layer in (nn.Linear(16, 16), nn.Tanh())]
    model, x = nn.Sequential(*layers, Model()), torch.zeros(4096, 16)
    fxmem.plan(model, "1TiB", (x,), cost="measure")
    write(dict.fromkeys(load_timings(CPU_DEVICE), (1.0, 1000.0)))
    plan = fxmem.plan(model, "min", (x,), cost="measure")
    assert plan.recomputed
    assert plan.added_seconds == sum(d.seconds for d in plan.recomputed) >= 1.0
    assert plan.added_seconds < 1000.0 <= plan.seconds
    assert plan.seconds % 1000.0 == 0.0


def test_operators_are_timed_outside_pythons_dispatcher(monkeypatch):
    """Under a capture it is on, and takes longer than a small operator itself."""
    seen = set()

    def operator(x):
        seen.add(torch._C._dispatch_tls_is_dispatch_key_included("PythonDispatcher"))

    call = Call(operator, (TensorSpec((2,), (1,), torch.float32),), {})
    with enable_python_dispatcher():
        operator(None)
        assert seen == {True}
        seen.clear()
        assert timings.time_call(call, CPU_DEVICE) is not None
    assert seen == {False}


def test_a_file_of_an_older_layout_counts_as_none(folder):
    planned("measure")
    write(dict.fromkeys(load_timings(CPU_DEVICE), 2.0))
    assert planned("measure").seconds < 1


def test_a_broken_file_counts_as_none(folder):
    timings_path(CPU_DEVICE).parent.mkdir(exist_ok=True)
    timings_path(CPU_DEVICE).write_text("[1, 2")
    assert planned("measure").seconds < 1


def test_what_cannot_be_measured_takes_the_rooflines_time(folder, monkeypatch):
    monkeypatch.setattr(timings, "time_call", lambda call, device: None)
    assert planned("measure").seconds == pytest.approx(planned("roofline").seconds)


def test_a_plan_by_measured_times_keeps_its_budget(folder):
    model, x = Model(), torch.zeros(4096, 16)
    optimized = fxmem.optimize(model, "0.9x", (x,), cost="measure", verify=True)
    assert optimized.plan.predicted_peak <= optimized.plan.budget


def test_views_take_no_time():
    graph = torch.fx.Graph()
    x = graph.placeholder("x")
    assert MeasuredCost(CPU).seconds(x) == 0.0
