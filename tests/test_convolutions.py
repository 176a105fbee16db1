"""A convolution's backward reads its operands as they lie."""

import contextlib
from dataclasses import replace

import pytest
import torch
from dynamo import fresh_dynamo
from quick import but_slow
from test_backend import peak_of, seeded, stepped
from test_fused import scheduled, told
from test_inductor import assert_close as assert_all_close
from torch import nn
from torch._dynamo.utils import counters
from torch._inductor.utils import fresh_inductor_cache

import fxmem
from fxmem._torch import inductor as _torch_inductor
from fxmem._torch.inductor import Called
from fxmem.graphs.workspace import Workspaces
from fxmem.steps.fused import run

OPERATOR = torch.ops.aten.convolution_backward.default
FIRST = torch.contiguous_format
LAST = torch.channels_last

copies = pytest.mark.skipif(
    not "2.13" <= torch.__version__ < "2.15", reason="Inductor lays depthwise ones out otherwise"
)


def backward(gradient, x, weight):
    """Of a 3x3 convolution, whose gradient and input kernels make before."""
    pair, groups = [1, 1], x.shape[1] // weight.shape[1]
    how = None, pair, pair, pair, False, [0, 0], groups, [True, True, False]
    return OPERATOR(gradient.sin(), x.cos(), weight, *how)[:2]


def images(lie):
    return torch.empty(2, 8, 4, 4).contiguous(memory_format=lie)


def depthwise():
    return images(LAST), images(LAST), torch.empty(8, 1, 3, 3)


OURS = [(128, 1, 32, 8), (128, 1, 32, 8), (9, 9, 3, 1)]
"""The strides that the operator reads these by."""


def before_the_call(*given):
    """Buffers that are made until the operator is called, and the strides of what it then reads."""
    found = scheduled(backward, *given, backward=True)
    at, call = next((i, e) for i, e in enumerate(found.events) if _is_call(e))
    results = 2
    made = [e for e in told(found)[:at] if e.startswith("Made")][:-results]
    return made, [strides for _, strides in call.operands]


def _is_call(event):
    return isinstance(event, Called) and event.node.target is OPERATOR


def test_nothing_is_copied_where_both_have_their_channels_innermost():
    assert before_the_call(*depthwise()) == (["Made buf0 1024", "Made buf1 1024"], OURS)


@copies
def test_torch_copies_both(monkeypatch):
    monkeypatch.setattr(_torch_inductor, "operands_as_they_lie", contextlib.nullcontext)
    made, read = before_the_call(*depthwise())
    assert made == [f"Made buf{i} 1024" for i in range(5)]
    assert read == [(128, 16, 4, 1), (128, 4, 32, 1), (9, 9, 3, 1)]


@pytest.mark.parametrize("lie", [(FIRST, LAST), (LAST, FIRST)])
@pytest.mark.parametrize("per_group", [1, 8])
def test_operands_that_lie_differently_are_laid_out_as_torch_does(lie, per_group, monkeypatch):
    given = *map(images, lie), torch.empty(8, per_group, 3, 3)
    ours = before_the_call(*given)
    monkeypatch.setattr(_torch_inductor, "operands_as_they_lie", contextlib.nullcontext)
    assert ours == before_the_call(*given)


def test_what_the_operator_works_in_is_looked_up_by_each_operands_own_strides():
    """Gradient and input have one shape here, and different strides."""
    looked_up = []

    class Noting(Workspaces):
        def look_up(self, call, device):
            looked_up.append([spec.strides for spec in call.args[:3]])
            return super().look_up(call, device)

    found = scheduled(backward, *depthwise(), backward=True)
    strides = [images(FIRST).stride(), images(LAST).stride(), (9, 9, 3, 1)]
    events = [_read_by(event, strides) if _is_call(event) else event for event in found.events]
    run(replace(found, events=events), {}, found.returned, Noting(), torch.device("cpu"))
    assert looked_up == [strides]


def _read_by(call, strides):
    shapes = [shape for shape, _ in call.operands]
    return call._replace(operands=list(zip(shapes, strides, strict=True)))


def assert_close(want, got):
    """Strides of dimensions of one are Inductor's own, as those of a depthwise weight's gradient."""
    assert_all_close(*map(_without_ones, (want, got)))


def _without_ones(step):
    gradients = {name: gradient.squeeze() for name, gradient in step["gradients"].items()}
    return {**step, "gradients": gradients}


class Mixed(nn.Module):
    """Convolutions of all kinds, with channels innermost before and after some."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 4, stride=2)
        self.depthwise = nn.Conv2d(8, 8, 5, padding=2, groups=8)
        self.linear = nn.Linear(8, 8)
        self.grouped = nn.Conv2d(8, 16, 3, dilation=2, groups=4, bias=False)
        self.up = nn.ConvTranspose2d(16, 8, 3, stride=2, output_padding=1)
        self.flat = nn.Conv1d(8, 8, 3, padding=1, groups=8)
        self.deep = nn.Conv3d(2, 4, (2, 3, 3))

    def forward(self, x):
        x = self.stem(x)
        for _ in range(2):
            x = x + self.linear(self.depthwise(x).permute(0, 2, 3, 1)).sin().permute(0, 3, 1, 2)
        x = self.up(self.grouped(x).relu()).tanh()
        lines = self.flat(x.flatten(2)).sin()
        return self.deep(lines.reshape(len(lines), 2, 4, 8, -1)).square().mean()


def in_images(lie):
    model = seeded(Mixed)
    for module in (model.stem, model.depthwise, model.grouped, model.up):
        module.to(memory_format=lie)
    return model, torch.randn(2, 3, 24, 24).contiguous(memory_format=lie)


@pytest.mark.parametrize("lie", [FIRST, LAST])
def test_gradients_are_eagers_and_the_peak_is_foreseen(lie):
    model, x = in_images(lie)
    want = stepped(model, model, x)
    with fresh_inductor_cache():
        step = fxmem.optimize(model, "1TiB", (x,), compiler="inductor")
    assert_close(want, stepped(step, model, x))
    peak = peak_of(step, model, x) + step.plan.resident
    assert peak == pytest.approx(step.plan.predicted_peak, rel=0.005)


class Depthwise(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3, groups=8)

    def forward(self, x):
        return self.second(self.first(x).tanh()).square().mean()


SIZES = 24, 32, 44


def channels_last(size):
    return torch.randn(2, 3, size, size).contiguous(memory_format=LAST)


@pytest.mark.parametrize("by", but_slow(["backend", "optimize"], ["optimize"]))
def test_no_size_becomes_a_constant(by):
    model = seeded(Depthwise)
    with fresh_dynamo(), fresh_inductor_cache():
        graphs = counters["stats"]["unique_graphs"]
        step = changing(by, model)
        for x in map(channels_last, SIZES):
            assert_close(stepped(model, model, x), stepped(step, model, x))
        if by == "backend":
            assert counters["stats"]["unique_graphs"] == graphs + 1
        else:
            assert len(step._session.programs) == 1


@copies
@pytest.mark.parametrize("by", but_slow(["optimize", "backend"], ["optimize"]))
def test_what_inductor_takes_for_granted_of_sizes_is_asked_again(by, monkeypatch):
    """torch's own copies make constants of sizes; torch finds code of other ones in its cache."""
    monkeypatch.setattr(_torch_inductor, "operands_as_they_lie", contextlib.nullcontext)
    model = seeded(Depthwise)
    with fresh_dynamo(), fresh_inductor_cache():
        step = changing(by, model)
        for x in map(channels_last, SIZES if by == "backend" else SIZES[:2]):
            assert_close(stepped(model, model, x), stepped(step, model, x))
        assert by == "backend" or len(step._session.programs) == 2


def changing(by, model):
    if by == "backend":
        options = {"budget": "1TiB", "compiler": "inductor"}
        return torch.compile(model, backend="fxmem", dynamic=True, options=options)
    shapes = {0: {2: "H", 3: "W"}}
    return fxmem.optimize(
        model, "1TiB", (channels_last(24),), dynamic_shapes=shapes, compiler="inductor"
    )
