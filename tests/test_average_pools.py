"""With Inductor, gradients of average pools that round their size up are divided as eager divides them."""

import pytest
import torch
import torch.nn.functional as F
from dynamo import fresh_dynamo
from quick import but_slow
from test_fused import scheduled
from test_inductor import assert_close, seeded, stepped
from torch import nn

import fxmem
from fxmem._torch.inductor import Called

aten = torch.ops.aten

GRADIENTS = {2: aten.avg_pool2d_backward.default, 3: aten.avg_pool3d_backward.default}


def operators(dimensions, **how):
    """What is called in a gradient of windows of three, every two, over eight."""
    threes, twos = [3] * dimensions, [2] * dimensions
    ceil_mode, counts, divisor = (
        how.get(name, usual)
        for name, usual in (("ceil_mode", True), ("counts", True), ("divisor", None))
    )

    def gradient(g, x):
        padding = [0] * dimensions
        backward = GRADIENTS[dimensions]
        return (backward(g.sin(), x, threes, twos, padding, ceil_mode, counts, divisor).cos(),)

    sides = [[2, 3, *[n] * dimensions] for n in (4 if ceil_mode else 3, 8)]
    found = scheduled(gradient, *map(torch.empty, sides), backward=True)
    return {event.node.target for event in found.events if isinstance(event, Called)}


@pytest.mark.parametrize("dimensions", [2, 3])
def test_the_operator_is_called_where_loops_would_divide_by_whole_windows(dimensions):
    assert operators(dimensions) == {GRADIENTS[dimensions]}


@pytest.mark.parametrize("how", [{"ceil_mode": False}, {"counts": False}, {"divisor": 7}], ids=str)
def test_loops_serve_where_they_divide_as_it_does(how):
    assert operators(2, **how) == set()


POOLS = {1: F.avg_pool1d, 2: F.avg_pool2d, 3: F.avg_pool3d}


class Averaged(nn.Module):
    """The last windows reach beyond what they pool by one element in each dimension."""

    def __init__(self, dimensions, how):
        super().__init__()
        self.scale, self.how = nn.Parameter(torch.randn(3, *[8] * dimensions)), how

    def forward(self, x):
        pool = POOLS[self.scale.ndim - 1]
        return pool((x * self.scale).sin(), 3, 2, ceil_mode=True, **self.how).sin().sum()


HOWS = {
    "plain": {},
    "padded": {"padding": 1},
    "padding not counted": {"padding": 1, "count_include_pad": False},
}


@pytest.mark.parametrize("how", but_slow(HOWS, ["padded"]))
@pytest.mark.parametrize("dimensions", but_slow(POOLS, [3]))
@pytest.mark.parametrize("batch", but_slow([(2,), ()], [()]), ids=["batch", "one alone"])
def test_gradients_are_eagers(dimensions, how, batch):
    model = seeded(Averaged, dimensions, HOWS[how])
    x = torch.randn(*batch, 3, *[8] * dimensions, generator=torch.Generator().manual_seed(2))
    want = stepped(model, model, x)
    with fresh_dynamo():
        step = fxmem.optimize(model, "1TiB", (x,), compiler="inductor")
        assert_close(want, stepped(step, model, x))
    with fresh_dynamo():
        options = {"budget": "1TiB", "compiler": "inductor"}
        compiled = torch.compile(model, backend="fxmem", options=options)
        assert_close(want, stepped(compiled, model, x))
