"""Dropout taken apart for a compiler: the same mask, the same product, the same generator afterwards."""

import pytest
import torch
from torch import fx

from fxmem._torch import run_and_save_rng_state, run_with_rng_state
from fxmem.graphs.dropout import mask_and_product

aten = torch.ops.aten
DROPOUT = aten.native_dropout.default


def taken_apart(target, *args):
    """What would run in the place of a node on these arguments."""
    graph = fx.Graph()

    def node(value):
        if not isinstance(value, torch.Tensor):
            return value
        given = graph.placeholder("x")
        given.meta["val"] = value
        return given

    return mask_and_product(graph.call_function(target, tuple(map(node, args))))


def seeded(function, *args):
    torch.manual_seed(3)
    found = function(*args)
    return found, torch.get_rng_state()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("p", [0.1, 0.5, 0.3])
def test_the_mask_and_the_product_are_eagers(dtype, p):
    x = torch.randn(7, 33, dtype=dtype)
    (want, mask), after = seeded(DROPOUT, x, p, True)
    (got, drawn), state = seeded(taken_apart(DROPOUT, x, p, True), x, p, True)
    assert torch.equal(got, want)
    assert torch.equal(drawn, mask)
    assert torch.equal(state, after)


def test_a_second_run_draws_the_same():
    x = torch.randn(7, 33)
    args = (DROPOUT, x, 0.1, True)
    first = taken_apart(run_and_save_rng_state, *args)
    (state, (want, mask)), after = seeded(first, *args)
    again = taken_apart(run_with_rng_state, state, *args)
    got, drawn = again(state, *args)
    assert torch.equal(got, want)
    assert torch.equal(drawn, mask)
    assert torch.equal(torch.get_rng_state(), after)
    assert torch.equal(seeded(DROPOUT, x, 0.1, True)[0][0], want)


@pytest.mark.parametrize(
    ("x", "p", "train"),
    [
        (torch.ones(4, 8).t(), 0.1, True),  # draws in the order of its memory
        (torch.ones(4, dtype=torch.bfloat16), 0.1, True),  # rounds otherwise
        (torch.ones(4), 0.0, True),
        (torch.ones(4), torch.tensor(0.1), True),  # a number that is known when it runs
        (torch.ones(4), 1.0, True),
        (torch.ones(4), 0.1, False),
        (torch.ones(4, device="meta"), 0.1, True),  # as on CUDA, where a kernel does both
    ],
)
def test_what_stays_whole(x, p, train):
    assert taken_apart(DROPOUT, x, p, train) is None


def test_other_operators_stay():
    assert taken_apart(aten.relu.default, torch.ones(4)) is None
    assert taken_apart(run_and_save_rng_state, aten.bernoulli.p, torch.ones(4), 0.5) is None
