"""Measured operator times: what is measured, what is remembered, what stands in for the rest."""

import json

import pytest
import torch
from torch import nn

import fxmem
from fxmem import timings
from fxmem.cost import CPU
from fxmem.timings import MeasuredCost, load_timings, timings_path

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
    assert all(0 < seconds < 1 for seconds in table.values())
    assert 0 < plan.seconds <= sum(table.values()) * 4  # some run several times


def test_what_was_measured_is_not_measured_again(folder, monkeypatch):
    first = planned("measure")
    monkeypatch.setattr(timings, "time_call", lambda call, device: pytest.fail(f"again: {call}"))
    assert planned("measure").seconds == first.seconds


def test_the_file_decides(folder):
    planned("measure")
    table = load_timings(CPU_DEVICE)
    timings_path(CPU_DEVICE).write_text(json.dumps(dict.fromkeys(table, 2.0)))
    assert planned("measure").seconds >= 2.0 * 4


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
