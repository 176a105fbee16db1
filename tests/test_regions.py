"""Regions that are compiled by themselves are operators like all others to a plan."""

from itertools import accumulate

import pytest
import torch
from dynamo import fresh_dynamo
from expecttest import assert_expected_inline
from hazards import differences, train
from torch import nn
from torch._dynamo.testing import EagerAndRecordGraphs

import fxmem
from fxmem import backend
from fxmem.graphs.measure import cpu_allocations
from fxmem.graphs.regions import without_regions


@pytest.fixture(autouse=True)
def _clean():
    with fresh_dynamo():
        yield


class Block(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.linear, self.drop = nn.Linear(width, width), nn.Dropout(0.5)

    @torch.compiler.nested_compile_region
    def forward(self, x):
        return x + self.drop(self.linear(x).sin())


class Net(nn.Module):
    def __init__(self, width=8):
        super().__init__()
        self.blocks = nn.Sequential(*(Block(width) for _ in range(3)))

    def forward(self, x):
        return self.blocks(x).square().mean()


def operators(module):
    """What is called, after the module that it is called in."""
    nodes = [node for node in module.graph.nodes if node.op.startswith("call")]
    return "\n".join(f"{module_of(node)}: {node.name}" for node in nodes)


def module_of(node):
    stack = list(node.meta.get("nn_module_stack", {}).values())
    return stack[-1][0].rpartition("].")[2] if stack else ""


def traced(model, *inputs):
    seen = EagerAndRecordGraphs()
    torch.compile(model, backend=seen, fullgraph=True)(*inputs)
    (module,) = seen.graphs
    return module


def test_a_region_is_put_in_place_of_each_call_with_the_modules_of_that_call():
    module = traced(Net(), torch.randn(4, 8))
    flat = without_regions(module)
    assert_expected_inline(
        operators(module),
        """\
blocks.0.linear: linear
blocks.0: sin
blocks.0.drop: dropout
blocks.0: add
blocks.1: invoke_subgraph_1
blocks.1: input_2
blocks.2: invoke_subgraph_2
blocks.2: input_3
: square
: mean""",
    )
    assert_expected_inline(
        operators(flat),
        """\
blocks.0.linear: linear
blocks.0: sin
blocks.0.drop: dropout
blocks.0: add
blocks.1.linear: linear_1
blocks.1: sin_1
blocks.1.drop: dropout_1
blocks.1: add_1
blocks.2.linear: linear_2
blocks.2: sin_2
blocks.2.drop: dropout_2
blocks.2: add_2
: square
: mean""",
    )
    assert not any(isinstance(child, torch.fx.GraphModule) for child in flat.children())


def test_a_graph_without_regions_is_itself():
    module = traced(nn.Sequential(nn.Linear(8, 8)), torch.randn(4, 8))
    assert without_regions(module) is module


@pytest.mark.parametrize("share", [0.9, 0.75])
def test_regions_keep_a_budget(share):
    torch.manual_seed(0)
    model, x = Net(64), torch.randn(512, 64)
    want = train(model, (x,))
    eager = peak(model, model, x)
    budget = int(share * eager)
    step = torch.compile(model, backend=backend.fxmem, options={"budget": budget})
    assert not differences(want, train(step, (x,)))
    found = peak(step, model, x)
    (plan,) = fxmem.plans(model)
    assert found <= plan.predicted_peak <= budget < eager


def test_a_report_names_the_parameters_of_regions():
    torch.manual_seed(0)
    model, x = Net(64), torch.randn(8, 64)
    torch.compile(model, backend=backend.fxmem, options={"budget": "min"})(x)
    (plan,) = fxmem.plans(model)
    named = [t.name for t in plan.certificate.tensors if t.category == "parameters"]
    assert {"blocks.0.linear.weight", "blocks.2.linear.weight"} <= set(named)


def peak(step, model, x):
    model.zero_grad()
    sizes, _ = cpu_allocations(lambda: step(x).backward())
    model.zero_grad()
    return sum(t.nbytes for t in (*model.parameters(), x)) + max(accumulate(sizes))
