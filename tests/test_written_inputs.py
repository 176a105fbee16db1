"""A step's code writes the running statistics itself: its kernels do, or all are written at once."""

import copy
from unittest import mock

import pytest
import torch
from dynamo import fresh_dynamo
from quick import but_slow
from torch import fx, nn
from torch.utils._python_dispatch import TorchDispatchMode

import fxmem
from fxmem._torch.written_inputs import without_outputs, writing
from fxmem.steps.inductor import _counting_what_it_wrote, _written_by_kernels

aten = torch.ops.aten


class Normalized(nn.Module):
    """Statistics that are written and a count, a buffer that is read alone, one that a gradient reaches."""

    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(8, 16), nn.BatchNorm1d(16), nn.Tanh())
        self.register_buffer("offset", torch.full((16,), 0.5))
        self.register_buffer("seen", torch.zeros(()))
        self.register_buffer("last", torch.zeros(16))

    def forward(self, x):
        y = self.layers(x) + self.offset
        self.seen += 1
        self.last = y.detach().mean(0)
        return (y * self.seen).square().mean()


class Copies(TorchDispatchMode):
    """Counts what is copied."""

    def __init__(self):
        super().__init__()
        self.counts = {"one": 0, "many": 0}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.counts["one"] += function is aten.copy_.default
        self.counts["many"] += function is aten._foreach_copy_.default
        return function(*args, **(kwargs or {}))


def buffers(model):
    return {name: buffer.clone() for name, buffer in model.named_buffers()}


@pytest.mark.parametrize("compiler", but_slow(["eager", "inductor"], ["eager"]))
def test_statistics_are_those_of_eager_and_written_by_the_code(compiler):
    torch.manual_seed(0)
    model, x = Normalized(), torch.randn(32, 8)
    other = copy.deepcopy(model)
    with fresh_dynamo():
        step = fxmem.optimize(other, "1TiB", (x,), compiler=compiler)
        # Inductor's code is run to be measured, but not on the model's own buffers.
        assert all(torch.equal(b, buffers(other)[name]) for name, b in buffers(model).items())
        for _ in range(3):
            loss = model(x)
            loss.backward()
            versions = {name: b._version for name, b in other.named_buffers() if name != "last"}
            with Copies() as seen:
                got = step(x)
            got.backward()
            torch.testing.assert_close(got, loss)
            assert seen.counts == {"one": 0, "many": 1}
            written = {n for n, b in other.named_buffers() if b._version > versions.get(n, 1e9)}
            statistics = ("running_mean", "running_var", "num_batches_tracked")
            assert written == {"seen", *(f"layers.1.{name}" for name in statistics)}
    for name, buffer in buffers(model).items():
        torch.testing.assert_close(dict(other.named_buffers())[name], buffer)


class Written(nn.Module):
    """Two buffers that change places, one with gaps, one that is returned as it was, a count."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(8, 8)
        for name in ("first", "second", "before"):
            self.register_buffer(name, torch.randn(8))
        self.register_buffer("gaps", torch.randn(16)[::2])
        self.register_buffer("count", torch.zeros((), dtype=torch.int64))

    def forward(self, x):
        y = self.layer(x)
        first, before = self.first.clone(), self.before.clone()
        self.first.copy_(self.second)
        self.second.copy_(first)
        self.gaps.mul_(0.9).add_(y.detach().mean(0))
        self.before.add_(1)
        self.count.add_(1)
        return y.square().mean(), before


def test_kernels_write_what_nothing_else_is_made_of():
    torch.manual_seed(0)
    model, x = Written(), torch.randn(32, 8)
    other = copy.deepcopy(model)
    assert other.gaps.stride() == (2,)
    with (
        fresh_dynamo(),
        mock.patch.object(torch, "_foreach_copy_", wraps=torch._foreach_copy_) as copied,
    ):
        step = fxmem.optimize(other, "1TiB", (x,), compiler="inductor")
        # The code is run to be measured, but not on the model's own buffers.
        torch.testing.assert_close(buffers(other), buffers(model), rtol=0, atol=0)
        for _ in range(3):
            loss, before = model(x)
            loss.backward()
            got, other_before = step(x)
            got.backward()
            torch.testing.assert_close((got, other_before), (loss, before))
            torch.testing.assert_close(buffers(other), buffers(model))
    assert [len(call.args[0]) for call in copied.call_args_list] == [3, 3, 3]  # of five


def test_which_inputs_kernels_may_write():
    class Step(nn.Module):
        def forward(self, a, b, c, d, e):
            return b, a.clone(), c * 0.9, d + 1, e + 1, d.view(-1)

    module = fx.symbolic_trace(Step())
    for node in module.graph.find_nodes(op="placeholder"):
        node.meta["val"] = torch.zeros(4).expand(2, 4) if node.name == "e" else torch.zeros(4)
    # a and b are made of each other, d is returned, e lies over itself.
    assert _written_by_kernels(module, {place: place for place in range(5)}) == {2: 2}


def test_what_fails_in_the_midst_counts_as_written():
    def code(args):
        args[0].add_(1)
        raise MemoryError

    held, other = torch.zeros(2), torch.zeros(2)
    with pytest.raises(MemoryError):
        _counting_what_it_wrote(code, [0])([held, other])
    assert (held._version, other._version) == (2, 0)


def test_what_code_has_written_is_not_written_again():
    def code(args):
        args[0].add_(1)
        return None, args[1] + 1, args[1]

    held, count, x = torch.zeros(2), torch.zeros(2), torch.ones(2)
    with Copies() as seen:
        (returned,) = writing(code, {0: 0, 1: 1})([held, count, x])
    assert returned is count
    assert torch.equal(held, torch.ones(2))
    assert torch.equal(count, torch.ones(2))
    assert seen.counts == {"one": 0, "many": 1}


def test_a_failing_step_writes_nothing():
    def code(args):
        raise MemoryError

    held = torch.zeros(2)
    with pytest.raises(MemoryError):
        writing(code, {0: 0})([held])
    assert torch.equal(held, torch.zeros(2))


def test_outputs_that_are_written_are_returned_no_more():
    class Step(nn.Module):
        def forward(self, mean, count, x):
            return mean * 0.9 + x * 0.1, x.sin(), count + 1, x.cos()

    module = fx.symbolic_trace(Step())
    before = module.code
    places = {0: 0, 2: 1}
    mean, count, x = torch.zeros(3), torch.zeros(3, dtype=torch.int64), torch.randn(3)
    shown = without_outputs(module, places)
    assert [n.name for n in shown.graph.output_node().args[0]] == ["sin", "cos"]
    returned = writing(lambda args: module(*args), places)([mean, count, x])
    assert [*map(torch.equal, returned, (x.sin(), x.cos()))] == [True, True]
    assert torch.equal(mean, x * 0.1)
    assert torch.equal(count, torch.ones(3, dtype=torch.int64))
    assert module.code == before
