"""A part of ``benchmarks/sweep.py``: operators that torch tests itself with, through the backend."""

import copy
import functools
import sys
from pathlib import Path

import pytest
import torch
from quick import but_slow
from torch import nn

sys.path.insert(0, str(Path(__file__).parent.parent / "benchmarks"))

import sweep

OPS = (
    "cumsum",
    "einsum",
    "gather",
    "index_select",
    "logsumexp",
    "matmul",
    "nn.functional.batch_norm",
    "nn.functional.conv2d",
    "nn.functional.cross_entropy",
    "nn.functional.dropout",
    "nn.functional.embedding",
    "nn.functional.gelu",
    "nn.functional.group_norm",
    "nn.functional.layer_norm",
    "nn.functional.linear_cross_entropy.chunked",
    "nn.functional.max_pool2d",
    "nn.functional.rrelu",
    "prod",
    "scatter_add",
    "softmax",
    "sort",
    "topk",
    "where",
)


OTHERS = (
    "functions/NumpySortAutogradFunction",
    "custom-ops/NumpySortCustomOp",
    "higher-order/cond.simple",
)


@functools.cache
def entries():
    suites = (sweep.ops, sweep.functions, sweep.custom_ops, sweep.higher_order)
    return {name: trials for suite in suites for name, trials in suite(samples=1, budget="min")}


@pytest.fixture(autouse=True)
def _own_generator():
    with torch.random.fork_rng(devices=[]):
        yield
    torch._dynamo.reset()


QUICK = {
    "cumsum",
    "gather",
    "matmul",
    "nn.functional.batch_norm",
    "nn.functional.dropout",
    "sort",
    "topk",
}


@pytest.mark.parametrize("name", but_slow(OPS, QUICK))
def test_an_operator_is_planned_and_gives_the_same_bits(name):
    if f"ops/{name}" not in entries():
        pytest.skip("not in this torch")
    result = sweep.entry(entries()[f"ops/{name}"])
    assert (result.status, result.why) == ("equal", "")


@pytest.mark.parametrize("name", OTHERS)
def test_what_users_write_themselves_is_planned_and_gives_the_same_bits(name):
    result = sweep.entry(entries()[name])
    if result.why == "not captured" and torch.__version__ >= "2.14":
        pytest.skip("later releases leave numpy's part of it to Python")
    assert (result.status, result.why) == ("equal", "")


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.one, self.two = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x):
        return self.two(self.one(x).tanh()).sum()


def judged(model):
    def program(how):
        mine = copy.deepcopy(model)  # whose gradients are not yet there
        return sweep.trained(how(mine), (torch.ones(4, 8),), {}, mine.parameters())

    return sweep.judged(program, "min")


def test_the_sweep_tells_right_from_wrong_and_from_what_is_not_captured():
    torch.manual_seed(0)
    assert judged(Net()).status == "equal"
    hidden = Net()
    hidden.forward = torch.compiler.disable(hidden.forward)
    assert judged(hidden).status == "skipped"


def test_the_sweep_asks_for_a_plan_of_the_entry_itself():
    torch.manual_seed(0)
    kept = torch.compile(Net(), backend="fxmem", options={"budget": "min"})
    kept(torch.ones(4, 8)).backward()
    view = nn.Flatten()  # nothing is saved, so there is nothing to plan

    def program(how):
        return sweep.trained(how(view), (torch.ones(4, 8, requires_grad=True),), {})

    assert sweep.judged(program, "min").why == "nothing to plan"


def test_the_sweep_compares_sparse_results_by_value():
    eye = torch.eye(3).to_sparse()
    assert not sweep.differences(eye, eye.to_dense().to_sparse())
    assert sweep.differences(eye, 2 * eye)
    assert sweep.differences(eye, eye.to_dense())


def test_the_sweep_sees_a_wrong_gradient(monkeypatch):
    prepare = sweep.backend._torch.aot_compile

    def wrong(module, inputs, partition, compile_graph, backward):
        def doubled():
            run = backward()
            return lambda args: [None if g is None else 2 * g for g in run(args)]

        return prepare(module, inputs, partition, compile_graph, doubled)

    monkeypatch.setattr(sweep.backend._torch, "aot_compile", wrong)
    torch.manual_seed(0)
    assert judged(Net()).status == "wrong"
