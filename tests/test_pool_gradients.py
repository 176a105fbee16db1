"""Gradients of pools fuse: the graph as text, the code counted, steps against eager's."""

import contextlib
import re
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from dynamo import fresh_dynamo
from expecttest import assert_expected_inline
from quick import but_slow
from test_inductor import assert_close, seeded, stepped
from torch import nn
from torch._inductor import config as inductor_config
from torch._inductor.graph import GraphLowering

import fxmem
from fxmem._torch import inductor as _torch_inductor
from fxmem._torch import new_fake_mode
from fxmem.codes import pool_gradients
from fxmem.codes.encodings import avg_pool2d_backward, max_pool2d_backward, pool_backward

FIRST, LAST = torch.contiguous_format, torch.channels_last


@pytest.fixture(autouse=True)
def _clean():
    with fresh_dynamo():
        yield


# -- The graph -----------------------------------------------------------------------------------------


def traced(function, *values):
    """Its calls in Inductor's operators."""
    module = torch.fx.symbolic_trace(function)
    with new_fake_mode() as mode:
        for node, value in zip(module.graph.find_nodes(op="placeholder"), values, strict=True):
            node.meta["val"] = mode.from_tensor(value)
    found = _torch_inductor.decomposed(module, pool_gradients.fusible)
    return [n for n in found.graph.nodes if n.op == "call_function"]


def largest(kernel, stride, dilation=1):
    def gradient(g, i):
        pairs = [[n, n] for n in (kernel, stride, 0, dilation)]
        return max_pool2d_backward(g, i, [-1, 8, 9, 9], [648, 81, 9, 1], *pairs, False)

    return gradient


def average(g):
    how = [2, 2], [2, 2], [0, 0], False, True, None
    return avg_pool2d_backward(g, [-1, 8, 9, 9], [648, 81, 9, 1], *how)


def pooled(lie, side=4):
    return torch.empty(2, 8, side, side).contiguous(memory_format=lie)


def told(calls):
    calls = [f"{n.name} = {n.target.overloadpacket.__name__}{n.args}" for n in calls]
    return "\n".join(calls).replace("_backward = ", " = ")


def test_a_pool_reads_the_shape_of_a_tensor_that_is_never_made():
    assert_expected_inline(
        told(traced(average, pooled(FIRST))),
        """\
constant_pad_nd = constant_pad_nd(g, [0, 5, 0, 5])
avg_pool2d = avg_pool2d_backward(g, constant_pad_nd, [2, 2], [2, 2], [0, 0], False, True, None)""",
    )


@pytest.mark.skipif(torch.__version__ < "2.13", reason="Inductor has loops of another form")
def test_the_largest_elements_get_their_gradients_by_their_indices():
    calls = traced(largest(2, 2), pooled(FIRST), pooled(FIRST).long())
    assert_expected_inline(
        told(calls),
        """\
constant_pad_nd = constant_pad_nd(g, [0, 5, 0, 5])
full = full([16, 81], 0)
view = view(g, [16, 16])
view_1 = view(i, [16, 16])
scatter_add = scatter_add(full, 1, view_1, view)
view_2 = view(scatter_add, [2, 8, 9, 9])""",
    )


@pytest.mark.skipif(torch.__version__ < "2.13", reason="Inductor has loops of another form")
def test_offsets_become_indices_by_arithmetic():
    def gradient(g, o):
        window = [3, 3], [2, 2], [0, 0], [1, 1]
        return pool_backward(g, o, [-1, 8, 9, 9], [648, 81, 9, 1], *window, False)

    calls = traced(gradient, pooled(FIRST), pooled(FIRST).to(torch.uint8))
    assert_expected_inline(
        told(calls).replace("_low_memory_max_pool_offsets_to_indices", "indices"),
        """\
convert_element_type = convert_element_type(o, torch.int8)
indices = indices(convert_element_type, [3, 3], [9, 9], [2, 2], [0, 0], [1, 1])
constant_pad_nd = constant_pad_nd(g, [0, 5, 0, 5])
full = full([16, 81], 0)
view = view(g, [16, 16])
view_1 = view(indices, [16, 16])
scatter_add = scatter_add(full, 1, view_1, view)
view_2 = view(scatter_add, [2, 8, 9, 9])""",
    )


@pytest.mark.parametrize(("side", "dtype"), [(11, torch.int8), (12, torch.int32)])
def test_offsets_in_a_large_window_do_not_become_negative(side, dtype):
    def gradient(g, o):
        window = [side, side], [4, 4], [0, 0], [1, 1]
        return pool_backward(g, o, [-1, 8, 24, 24], [4608, 576, 24, 1], *window, False)

    convert, *_ = traced(gradient, pooled(FIRST), pooled(FIRST).to(torch.uint8))
    assert convert.args[1] == dtype


@pytest.mark.parametrize("lie", [FIRST, LAST])
def test_it_lies_as_the_gradient_does(lie):
    pad, _ = traced(average, pooled(lie))
    assert pad.meta["val"].is_contiguous(memory_format=lie)
    assert pad.meta["val"].shape == (2, 8, 9, 9)


@pytest.mark.parametrize("how", [(6, 1), (2, 2, 2)], ids=["many windows", "dilated"])
def test_what_inductor_has_no_loops_for_keeps_our_operator(how):
    (call,) = traced(largest(*how), pooled(FIRST), pooled(FIRST).long())
    assert call.target is max_pool2d_backward


# -- Steps ---------------------------------------------------------------------------------------------


class Pooled(nn.Module):
    """Convolutions between pools; each pool's input is of no use but for its shape."""

    def __init__(self, pool, lie=FIRST):
        super().__init__()
        self.first, self.last = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1)
        self.pool, self.lie = pool, lie

    def forward(self, x):
        x = x.contiguous(memory_format=self.lie)
        return self.pool(F.gelu(self.last(self.pool(F.gelu(self.first(x)))))).sin().square().mean()


POOLS = {
    "max": nn.MaxPool2d(2),
    "overlapping": nn.MaxPool2d(3, stride=2, padding=1),
    "larger than what it pools": nn.MaxPool2d(2, stride=1, padding=1),
    "rounded up": nn.MaxPool2d(3, stride=2, ceil_mode=True),
    "many windows": nn.MaxPool2d(6, stride=1),
    "average": nn.AvgPool2d(2),
    "without the padding": nn.AvgPool2d(3, stride=2, padding=1, count_include_pad=False),
    "average, rounded up": nn.AvgPool2d(3, stride=2, ceil_mode=True),
}


def images(batch=4):
    return torch.randn(batch, 3, 18, 18, generator=torch.Generator().manual_seed(5))


KEEP = "many windows", "average, rounded up"
"""Our operators, each for its reason."""


@contextlib.contextmanager
def code():
    """Gives what Inductor writes inside."""
    written = []
    noted = mock.patch.object(GraphLowering, "save_output_code", staticmethod(written.append))
    with noted, inductor_config.patch(fx_graph_cache=False):
        yield written


@pytest.mark.parametrize("lie", but_slow([FIRST, LAST], [LAST]))
@pytest.mark.parametrize("name", but_slow(POOLS, ["overlapping"]))
def test_steps_are_eagers(name, lie):
    model, x = seeded(Pooled, POOLS[name], lie), images()
    want = stepped(model, model, x)
    with code() as written:
        step = fxmem.optimize(model, "0.9x", (x,), compiler="inductor")
    assert step.plan.predicted_peak <= step.plan.budget
    assert_close(want, stepped(step, model, x))
    called = re.findall(r"= torch\.ops\.fxmem\.(\w+pool2d_backward)", "".join(written))
    assert bool(called) == (name in KEEP)


class Pools(nn.Module):
    """A pool after each convolution: of all that is saved, most are indices."""

    def __init__(self, lie):
        super().__init__()
        self.layers = nn.ModuleList(nn.Conv2d(n, 8, 3, padding=1) for n in (3, 8, 8, 8))
        self.pool, self.lie = nn.MaxPool2d(3, stride=1, padding=1), lie

    def forward(self, x):
        x = x.contiguous(memory_format=self.lie)
        for layer in self.layers:
            x = self.pool(F.gelu(layer(x)))
        return x.sin().square().mean()


@pytest.mark.parametrize("lie", but_slow([FIRST, LAST], [FIRST]))
def test_gradients_by_offsets_fuse(lie):
    model, x = seeded(Pools, lie), torch.randn(16, 3, 32, 32)
    want = stepped(model, model, x)
    plan = fxmem.plan(model, "0.6x", (x,))
    assert any("pool_offsets" in str(decision) for decision in plan.decisions)
    with code() as written:
        step = fxmem.optimize(model, plan.budget, (x,), compiler="inductor", plan=plan)
    assert_close(want, stepped(step, model, x))
    assert step.plan.predicted_peak <= step.plan.budget
    assert "pool_offsets" in "".join(written)
    assert not re.findall(r"= torch\.ops\.fxmem\.\w+", "".join(written))


def test_a_batch_may_change():
    model = seeded(Pooled, POOLS["max"])
    step = fxmem.optimize(
        model, "1MiB", (images(),), compiler="inductor", dynamic_shapes={"x": {0: "B"}}
    )
    for batch in (4, 3, 6):
        x = images(batch)
        assert_close(stepped(model, model, x), stepped(step, model, x))
    assert len(step._session.programs) == 1
