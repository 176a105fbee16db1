"""Inductor's code for a planned step: the plan survives, the budget is kept, gradients are eager's."""

import copy
import logging
import operator
import subprocess
import sys
from dataclasses import replace
from itertools import accumulate
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from dynamo import fresh_dynamo
from test_backend import Block, Cut, Net, batch, peak_of, predicted, seeded, stepped
from test_engine import capture_once
from torch import nn
from torch._dynamo.backends.common import aot_autograd
from torch._dynamo.utils import counters
from torch._functorch.partitioners import min_cut_rematerialization_partition
from torch._inductor import lowering
from torch._inductor.decomposition import select_decomp_table
from torch._inductor.exc import CppCompileError, InductorError
from torch._inductor.utils import fresh_inductor_cache
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils.checkpoint import checkpoint

import fxmem
from fxmem import backend
from fxmem._torch import inductor as _torch_inductor
from fxmem._torch import symbolic_fake_mode
from fxmem.analysis.cost import CPU
from fxmem.backend.session import Session
from fxmem.graphs.emit import boxed
from fxmem.graphs.graph import operator_name
from fxmem.graphs.measure import cpu_allocations
from fxmem.steps import code_search, inductor, inductor_step, looks, measured_step
from fxmem.steps.backward import Phases
from fxmem.steps.looks import MARGIN


@pytest.fixture(autouse=True)
def _clean():
    with fresh_dynamo():
        yield


@pytest.fixture
def interpreted(monkeypatch):
    """Inductor's graphs without its kernels: what it would compile runs operator by operator."""
    monkeypatch.setattr(_torch_inductor, "inductor", lambda module, **_: (boxed(module), {}))


@pytest.fixture
def compiled(monkeypatch):
    """What code was made of, as it was tried, and the plan as it was measured."""
    seen, make = [], inductor_step._compiled

    def noted(tried, *rest):
        coded = make(tried, *rest)
        seen.append((tried, coded.planned.plan))
        return coded

    monkeypatch.setattr(inductor_step, "_compiled", noted)
    return seen


def assert_close(want, got):
    """Random numbers are the same ones; sums may be rounded otherwise."""
    assert torch.equal(want["generator"], got["generator"])
    for name, gradient in want["gradients"].items():
        other = got["gradients"][name]
        assert (gradient is None) == (other is None), name
        if gradient is not None:
            assert other.stride() == gradient.stride(), name
            rounded = 1e-5 * gradient.abs().max().item()
            torch.testing.assert_close(other, gradient, rtol=0, atol=rounded)
    torch.testing.assert_close(got["loss"], want["loss"])
    for name, buffer in want["buffers"].items():
        torch.testing.assert_close(got["buffers"][name], buffer)


def measured(step, model, x):
    def run():
        torch.manual_seed(7)
        loss = step(x)
        loss.backward()
        return loss

    model.zero_grad(set_to_none=True)
    return max(accumulate(cpu_allocations(run)[0]))


def products(module):
    names = ("mm", "addmm", "bmm", "convolution")
    return sum(getattr(n.target, "_opname", "") in names for n in module.graph.nodes)


# -- With Inductor's kernels -------------------------------------------------------------------------


def test_a_step_keeps_its_budget_and_eagers_dropout(compiled):
    model, x = seeded(Net), batch(256)
    want = stepped(eager := copy.deepcopy(model), eager, x)
    with fresh_inductor_cache():
        step = fxmem.optimize(model, "0.6x", (x,), compiler="inductor")
    ((tried, kept),) = compiled  # code was made once, of the plan that was kept
    assert tried.foreseen == pytest.approx(step.plan.predicted_peak, rel=0.005)
    assert kept is step.plan
    assert_close(want, stepped(step, model, x))
    assert step.plan.recomputed
    peak = measured(step, model, x) + step.plan.resident
    assert peak <= step.plan.budget
    assert peak == pytest.approx(step.plan.predicted_peak, rel=0.03)
    assert "FITS" in str(step.report())


def test_four_graphs_of_inductors_share_a_budget():
    """By what their code was measured to hold: one that only fits fused leaves room to the others."""
    model, x = seeded(Cut, depth=4), batch(256)
    want = stepped(eager := copy.deepcopy(model), eager, x)
    resident = sum(p.nbytes for p in model.parameters()) + x.nbytes
    budget = int(0.7 * (peak_of(eager, eager, x) + resident))
    step = torch.compile(model, backend="fxmem", options={"budget": budget, "compiler": "inductor"})
    for _ in range(2):
        assert_close(want, stepped(step, model, x))
    peak = peak_of(step, model, x) + resident
    assert peak <= budget
    assert predicted(model) == pytest.approx(peak, rel=0.03)


class Attends(nn.Module):
    """Two layers with masks of two sizes: which draws come first shows in the loss."""

    def __init__(self):
        super().__init__()
        self.inner = nn.ModuleList(nn.Linear(32, 96) for _ in range(2))
        self.outer = nn.ModuleList(nn.Linear(32, 32) for _ in range(2))

    def forward(self, x):
        for inner, outer in zip(self.inner, self.outer, strict=True):
            q, k, v = inner(x).view(16, 64, 3, 4, 8).permute(2, 0, 3, 1, 4)
            w = F.dropout(torch.softmax(q @ k.transpose(-1, -2) / 3, -1), 0.2)
            x = x + (w @ v).transpose(1, 2).reshape(16, 64, 32)
            x = x + F.dropout(outer(x), 0.1) * torch.rand_like(x)
        return x.square().mean()


class Words(nn.Module):
    """Sizes of its input are among the strides of what it saves."""

    def __init__(self):
        super().__init__()
        self.table, self.linear = nn.Embedding(50, 16), nn.Linear(16, 16)

    def forward(self, words):
        return F.gelu(self.linear(self.table(words)))


@pytest.mark.parametrize("door", ["optimize", "backend"])
def test_strides_change_with_the_sizes(door):
    def gradients(step, model, words):
        model.zero_grad(set_to_none=True)
        step(words).square().sum().backward()
        return [p.grad for p in model.parameters()]

    def words(length):
        return torch.randint(50, (8, length), generator=torch.manual_seed(length))

    model = seeded(Words)
    options = {"budget": "1MiB", "compiler": "inductor"}
    with fresh_inductor_cache():
        if door == "optimize":
            sizes = {"words": {0: "B", 1: "S"}}
            options["example_inputs"] = (words(64),)
            step = fxmem.optimize(model, dynamic_shapes=sizes, **options)
        else:
            step = torch.compile(model, backend="fxmem", dynamic=True, options=options)
        for length in (64, 33, 40, 21):
            want = gradients(model, model, words(length))
            got = gradients(step, model, words(length))
            torch.testing.assert_close(got, want)
    assert door == "optimize" or len(fxmem.plans(step)) == 1


def test_draws_come_in_the_order_of_the_step():
    """Nothing that Inductor orders kernels by is between them, and one also saves the state."""
    model, x = seeded(Attends), torch.randn(16, 64, 32)
    want = stepped(eager := copy.deepcopy(model), eager, x)
    with fresh_inductor_cache():
        step = fxmem.optimize(model, "0.7x", (x,), compiler="inductor")
        assert step.plan.recomputed
        assert_close(want, stepped(step, model, x))


def test_a_mask_is_drawn_before_it_is_read():
    """Inductor fuses what a mask of its own is made of with its reader, across the draw."""

    class Masked(nn.Linear):
        def forward(self, x):
            visible = torch.ones(16, 16, dtype=torch.bool).tril()
            h = super().forward(x) / 2 @ (x.transpose(-1, -2) / 2)
            h = h + torch.where(visible, 0.0, float("-inf"))
            h = torch.ops.aten._safe_softmax(h, -1)
            mask = torch.bernoulli(torch.zeros((), dtype=torch.bool).expand(h.shape), 0.8)
            return ((h * mask * 1.25) @ x).square().sum()

    model, x = seeded(lambda: Masked(16, 16)), torch.randn(8, 4, 16, 16)
    want = stepped(eager := copy.deepcopy(model), eager, x)
    with fresh_inductor_cache():
        step = fxmem.optimize(model, "1GiB", (x,), compiler="inductor")
        assert_close(want, stepped(step, model, x))


def test_the_backend_takes_what_torch_compile_would_save_where_there_is_room():
    model, x = seeded(Net), batch(256)
    with torch._inductor.config.patch(fallback_random=True):
        compiled = torch.compile(plain := copy.deepcopy(model))
        want = stepped(compiled, plain, x)
        theirs = measured(compiled, plain, x)
    step = torch.compile(model, backend="fxmem", options={"budget": "1GiB", "compiler": "inductor"})
    assert_close(want, stepped(step, model, x))
    (plan,) = fxmem.plans(step)
    mine = measured(step, model, x)
    assert mine == pytest.approx(plan.predicted_peak - plan.resident, rel=0.03)
    assert mine == pytest.approx(theirs, rel=0.03)
    loss = step(x)
    loss.backward(retain_graph=True)  # no saved tensor was written over
    loss.backward()


def _saved_by_torch_compile(model, x):
    """Bytes that the forward of plain ``torch.compile`` holds for its backward."""
    seen = []

    def partition(*args, **kwargs):
        forward, backward = min_cut_rematerialization_partition(*args, **kwargs)
        seen.append(_saved_bytes(forward, kwargs["num_fwd_outputs"]))
        return forward, backward

    to_nothing = aot_autograd(
        fw_compiler=lambda module, _: module,
        partition_fn=partition,
        decompositions=select_decomp_table(),
    )
    torch.compile(model, backend=to_nothing)(x)
    return seen[0]


def _saved_bytes(forward, num_outputs):
    saved = forward.graph.output_node().args[0][num_outputs:]
    made = [n.meta["val"] for n in saved if n.op != "placeholder"]
    return sum(value.untyped_storage().nbytes() for value in made)


class Masked(nn.Sequential):
    def __init__(self):
        wide = (nn.Linear(32, 128), nn.ReLU(), nn.Linear(128, 128), nn.Hardtanh())
        super().__init__(*wide, nn.Linear(128, 32), nn.LayerNorm(32), nn.LeakyReLU())

    def forward(self, x):
        return super().forward(x).square().mean()


def test_with_room_no_more_is_saved_than_torch_compile_saves(interpreted, compiled, monkeypatch):
    """Masks are made by the forward, but on a CPU, where loops over them are slow."""
    monkeypatch.setattr(inductor, "_SLOW_WITH_MASKS", ())
    model, x = seeded(Masked), batch(256)
    want = stepped(eager := copy.deepcopy(model), eager, x)
    theirs = _saved_by_torch_compile(copy.deepcopy(model), x)
    step = fxmem.optimize(model, "1GiB", (x,), compiler="inductor")
    (tried, _) = compiled[0]
    halves = tried.code.split
    assert _saved_bytes(halves.forward, halves.num_forward_outputs) == theirs
    assert_close(want, stepped(step, model, x))


class DrawsBack(torch.autograd.Function):
    """Its backward draws before it reads the gradient."""

    @staticmethod
    def forward(ctx, x):
        return x.sin()

    @staticmethod
    def backward(ctx, gradient):
        return torch.rand(256, 32).gt(0.5) * gradient


def test_what_a_backward_draws_is_drawn_there(interpreted, monkeypatch):
    monkeypatch.setattr(inductor, "_SLOW_WITH_MASKS", ())

    class Drawn(nn.Sequential):
        def forward(self, x):
            return F.dropout(super().forward(DrawsBack.apply(x)), 0.3).square().mean()

    model, x = seeded(lambda: Drawn(nn.Linear(32, 32), nn.ReLU())), batch(256).requires_grad_()
    want = stepped(eager := copy.deepcopy(model), eager, x)
    (wanted,) = torch.autograd.grad(_as_seeded(eager, x), x)
    step = fxmem.optimize(model, "1GiB", (x,), compiler="inductor")
    assert_close(want, stepped(step, model, x))
    (got,) = torch.autograd.grad(_as_seeded(step, x), x)
    torch.testing.assert_close(got, wanted)


def _as_seeded(step, x):
    torch.manual_seed(5)
    return step(x)


class Checkpointed(nn.Module):
    """A user's checkpoint, of blocks with dropout, within one graph."""

    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList(Block(dropout=0.3) for _ in range(2))

    def forward(self, x):
        for block in self.blocks:
            x = checkpoint(block, x, use_reentrant=False)
        return x.square().mean()


@pytest.mark.parametrize("budget", ["1GiB", "0.8x"])
def test_what_a_checkpoint_in_a_graph_drew_is_not_drawn_once_more(budget, interpreted):
    model, x = seeded(Checkpointed), batch(256)
    want = stepped(eager := copy.deepcopy(model), eager, x)
    step = fxmem.optimize(copy.deepcopy(model), budget, (x,), compiler="inductor")
    assert_close(want, stepped(step, step, x))
    options = {"budget": budget, "compiler": "inductor"}
    compiled = torch.compile(model, backend="fxmem", options=options)
    assert_close(want, stepped(compiled, model, x))


class Changing(nn.Module):
    """The backward needs what the forward made of a buffer before it changed that."""

    def __init__(self, forward):
        super().__init__()
        self.layer, self.body = nn.Linear(32, 64), forward
        self.register_buffer("state", torch.rand(64))

    def forward(self, x):
        h = self.body(self, self.layer(x))
        self.state.mul_(0.9)
        return h.square().mean()


CHANGING = {
    "a copy": lambda m, h: h * m.state.clone(),
    "a mask": lambda m, h: torch.where(m.state > 0.4, h, h * 0.1),
    "of a view": lambda m, h: (h.view(-1, 8, 8) * m.state.view(8, 8).t().exp()).sin(),
    "twice": lambda m, h: h * m.state.add_(0.1).clone() * m.state.mul_(2).cos(),
}


@pytest.mark.parametrize("name", CHANGING)
def test_what_the_forward_changes_is_read_before(name, interpreted):
    model, x = seeded(lambda: Changing(CHANGING[name])), batch(64)
    want = stepped(eager := copy.deepcopy(model), eager, x)
    step = fxmem.optimize(model, "1GiB", (x,), compiler="inductor")
    assert_close(want, stepped(step, model, x))


class Returned(nn.Module):
    """Returns one value more than once, with a gradient and without, which Inductor's operators hide."""

    def __init__(self, outputs):
        super().__init__()
        self.layer, self.outputs = nn.Linear(32, 32), outputs
        self.register_buffer("last", torch.zeros(64, 32))

    def forward(self, x):
        return self.outputs(self, self.layer(x).sin())


def _remembering(model, h):
    model.last.mul_(0).add_(h.detach())
    return h, h.sum()


def _views_of_what_was_written_over(_, h):
    t = h * 2
    t.relu_()
    return t.view(-1), t.t()


def _rows_of_a_buffer_that_was_changed(model, h):
    model.last[0].copy_(h[0].detach())
    return h.square(), model.last[:2]


RETURNED = {
    "view and detached": lambda _, h: (h.square().mean().view(1), h.square().mean().detach()),
    "transposed and detached": lambda _, h: (h.t(), h.square(), h.detach()),
    "detached first": lambda _, h: (h.detach(), h.view(-1), h.square()),
    "all the same": lambda _, h: (h, h.detach(), h.float(), h * 1),
    "in a buffer": _remembering,
    "views of what was written over": _views_of_what_was_written_over,
    "rows of a buffer that was changed": _rows_of_a_buffer_that_was_changed,
}


@pytest.mark.parametrize("name", RETURNED)
def test_a_value_that_is_returned_twice_has_its_gradient(name, interpreted):
    def gradients(step, model):
        outputs = step(batch(64))
        needed = [out.requires_grad for out in outputs]
        sum(out.cos().sum() * at for at, out in enumerate(outputs, 1) if needed[at - 1]).backward()
        return needed, outputs, [p.grad for p in model.parameters()], model.last

    model = seeded(Returned, RETURNED[name])
    want = gradients(eager := copy.deepcopy(model), eager)
    for door in ("optimize", "backend"):
        torch._dynamo.reset()
        mine = copy.deepcopy(model)
        if door == "optimize":
            step = fxmem.optimize(mine, "1GiB", (batch(64),), compiler="inductor")
        else:
            options = {"budget": "1GiB", "compiler": "inductor"}
            step = torch.compile(mine, backend="fxmem", options=options)
        got = gradients(step, mine)
        assert got[0] == want[0], door
        torch.testing.assert_close(got[1:], want[1:])


def test_the_layouts_of_our_fake_tensors_do_not_get_into_inductors_table():
    """Which is a copy of torch's, made when it is first imported."""
    code = """
import torch, fxmem
assert "torch._inductor.decomposition" not in __import__("sys").modules
fxmem.optimize(torch.nn.Linear(4, 4), "1GiB", (torch.ones(2, 4),), compiler="inductor")
from torch._inductor.decomposition import decompositions
files = {getattr(getattr(f, "__code__", None), "co_filename", "") for f in decompositions.values()}
assert files and not [file for file in files if "fxmem" in file], files
"""
    subprocess.run([sys.executable, "-c", code], check=True)


# -- The graphs that it compiles -----------------------------------------------------------------------


def test_twins_survive(interpreted):
    model, x = seeded(Net), batch(256)
    want = stepped(eager := copy.deepcopy(model), eager, x)
    roomy = fxmem.optimize(copy.deepcopy(model), "1TiB", (x,), compiler="inductor")
    tight = fxmem.optimize(model, "0.6x", (x,), compiler="inductor")
    assert tight.plan.recomputed
    assert products(tight.backward_graph) > products(roomy.backward_graph)
    assert products(tight.forward_graph) == products(roomy.forward_graph)
    assert_close(want, stepped(tight, model, x))
    targets = [n.target for n in tight.forward_graph.graph.nodes]
    assert torch.ops.aten.gelu.default not in targets  # in Inductor's operators


class Heads(nn.Module):
    """Returns a loss and what it is of; batch normalization, masks and a view between."""

    def __init__(self):
        super().__init__()
        self.up, self.norm, self.out = nn.Linear(32, 64), nn.BatchNorm1d(64), nn.Linear(64, 8)

    def forward(self, x):
        for _ in range(3):
            x = F.relu(self.norm(self.up(x))).view(-1, 2, 32).sum(1)
        logits = self.out(F.relu(self.up(x)))
        return logits.square().mean(), logits


@pytest.mark.parametrize("budget", ["1TiB", "min"])
def test_gradients_that_come_or_do_not(interpreted, budget):
    model, x = seeded(Heads), batch(256)

    def both(step):
        return lambda x: operator.add(*(y.sum() for y in step(x)))

    def first(step):
        return lambda x: step(x)[0]

    eager = copy.deepcopy(model)
    step = fxmem.optimize(model, budget, (x,), compiler="inductor", on_infeasible="best")
    for run in (first, both, first):
        assert_close(stepped(run(eager), eager, x), stepped(run(step), model, x))


class Pooled(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 16, 3, padding=1), nn.Conv2d(16, 8, 3, padding=1)

    def forward(self, x):
        return self.b(F.max_pool2d(F.relu(self.a(x)), 2)).square().mean()


def test_a_pools_code_is_what_inductors_pool_makes_first(interpreted):
    torch.manual_seed(0)
    model, x = Pooled(), torch.randn(4, 3, 32, 32)
    want = stepped(eager := copy.deepcopy(model), eager, x)
    step = fxmem.optimize(model, "min", (x,), compiler="inductor", allow=("lossless",))
    assert [d.action for d in step.plan.decisions].count("encode") == 2
    assert_close(want, stepped(step, model, x))
    targets = [str(n.target) for n in step.forward_graph.graph.nodes]
    assert "prims._low_memory_max_pool_with_offsets.default" in targets
    assert not any("offsets_to_indices" in t or "pool_offsets" in t for t in targets)


def test_sizes_that_change(interpreted):
    model = seeded(Net)
    shapes = {"x": {0: "B"}}
    step = fxmem.optimize(model, "0.7x", (batch(64),), dynamic_shapes=shapes, compiler="inductor")
    for rows in (64, 48):
        want = stepped(eager := copy.deepcopy(model), eager, batch(rows))
        assert_close(want, stepped(step, model, batch(rows)))
    assert len(step._session.programs) == 1


def test_a_size_that_became_a_constant(interpreted):
    """A larger batch than the plan serves: planned once more, when Dynamo has gone on."""
    model = seeded(Net)
    options = {"budget": 300_000, "compiler": "inductor"}
    step = torch.compile(model, backend="fxmem", dynamic=True, options=options)
    for rows in (8, 120, 100):
        want = stepped(eager := copy.deepcopy(model), eager, batch(rows))
        assert_close(want, stepped(step, model, batch(rows)))
    assert len(fxmem.plans(step)) > 1


def test_a_step_is_measured_within_a_profile(interpreted):
    model, x = seeded(Net), batch()
    want = fxmem.optimize(model, "1TiB", (x,), compiler="inductor").plan
    with torch.profiler.profile(profile_memory=True) as profile:
        x.sin()
        found = fxmem.optimize(model, "1TiB", (x,), compiler="inductor").plan
        x.cos()
    assert found.predicted_peak == want.predicted_peak
    assert {"aten::sin", "aten::cos"} <= {event.name for event in profile.events()}


def test_the_measured_step_runs_on_what_the_call_was_given(interpreted, monkeypatch):
    """Zeros in its place would be there beside it, at the first call."""
    seen, make = set(), measured_step._Step.__init__

    def noting(self, coded, given):
        seen.update(t.data_ptr() for t in given if isinstance(t, torch.Tensor))
        make(self, coded, given)

    monkeypatch.setattr(measured_step._Step, "__init__", noting)
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(16, 16), nn.BatchNorm1d(16)), torch.randn(8, 16)
    weight = model[0].weight.detach().clone()
    options = {"budget": "1GiB", "compiler": "inductor"}
    step = torch.compile(lambda x: model(x).square().mean(), backend="fxmem", options=options)
    step(x).backward()
    assert seen.issuperset(t.data_ptr() for t in (*model.parameters(), x))
    assert torch.equal(model[0].weight, weight)
    assert int(model[1].num_batches_tracked) == 1


def test_a_step_that_does_not_fit_runs_op_by_op(interpreted, monkeypatch, caplog):
    measures(monkeypatch, 1 << 20)
    model, x = seeded(Net), batch(256)
    want = stepped(eager := copy.deepcopy(model), eager, x)
    with caplog.at_level(logging.WARNING, logger="fxmem"):
        step = fxmem.optimize(model, "0.7x", (x,), compiler="inductor")
    assert "runs operator by operator" in caplog.text
    got = stepped(step, model, x)
    assert all(torch.equal(want["gradients"][n], g) for n, g in got["gradients"].items())
    assert step.plan.predicted_peak <= step.plan.budget


# -- Taking a step apart -------------------------------------------------------------------------------


class LiesOtherwise(nn.Module):
    """Dropout's operator lies as its input does, and what it is taken apart into does not."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(1, 2))

    def forward(self, x):
        return F.dropout((x @ self.weight).transpose(0, 1), 0.5).relu().sum()


class NothingAdded(nn.Module):
    """The backward takes zeros from what the forward made, once more."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(1, 4)

    def forward(self, x):
        h = self.layer(x)
        return F.smooth_l1_loss(h, torch.zeros(h.shape), reduction="none").sum()


@pytest.mark.parametrize("of", [LiesOtherwise, NothingAdded])
def test_a_step_is_taken_apart_where_operators_come_to_lie_otherwise_or_to_nothing(of, interpreted):
    model, x = seeded(of), torch.randn(5, 8, 1, requires_grad=True)
    want = stepped(eager := copy.deepcopy(model), eager, x)
    step = fxmem.optimize(model, "1TiB", (x,), compiler="inductor")
    assert_close(want, stepped(step, model, x))


# -- Planning again -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("predicted", "measured", "added", "target"),
    [
        (900, 950, 1.0, None),  # it fits, and little room is left
        (900, 1050, 1.0, 840),  # 50 too many, and the margin of 10
        (900, 600, 0.0, None),  # nothing to gain
        (900, 600, 1.0, 1250),  # 400 of room, less half of what may be left
    ],
)
def test_when_to_plan_again(predicted, measured, added, target):
    plan = SimpleNamespace(budget=1000, predicted_peak=predicted, added_seconds=added)
    assert code_search._target(plan, measured) == target


def foresees(monkeypatch, of, saving_least=lambda plan: 9 * plan.budget):
    """Let each plan's code be foreseen to peak at what ``of`` says of the plan."""
    seen = []

    def foreseen(self, planned, *_):
        if self.saves_least:
            return saving_least(planned.plan)
        seen.append(planned.plan)
        return of(planned.plan)

    monkeypatch.setattr(inductor.Inductor, "foreseen", foreseen)
    return seen


def measures(monkeypatch, share):
    """Let all code be measured to peak at this share of what was predicted operator by operator."""

    def measured(coded, _):
        plan = coded.planned.plan
        return Phases(0, 0, int(share * plan.predicted_peak) - plan.resident)

    monkeypatch.setattr(inductor_step, "measured", measured)


def holds(monkeypatch, usual, least, heavy=0.0):
    """Let code hold so many bytes between its halves; as it usually does, or where it saves the least.

    heavy: seconds that the latter takes more.
    """
    usual, least = inductor.Held(usual, 0.0), inductor.Held(least, heavy)
    found = property(lambda code: least if code.saves_least else usual)
    monkeypatch.setattr(inductor.Inductor, "held", found)


def test_a_plan_whose_code_would_not_fit_gets_none(interpreted, compiled, monkeypatch):
    seen = foresees(monkeypatch, lambda plan: int(1.2 * plan.predicted_peak))
    measures(monkeypatch, 1)
    step = fxmem.optimize(seeded(Net), "0.7x", (batch(256),), compiler="inductor")
    assert len(seen) == 2
    assert 1.2 * seen[0].predicted_peak > step.plan.budget >= 1.2 * seen[1].predicted_peak
    assert [tried.plan for tried, _ in compiled] == seen[1:]
    assert step.plan.decisions == seen[1].decisions


def test_a_plan_whose_code_would_leave_room_is_planned_for_more(interpreted, compiled, monkeypatch):
    seen = foresees(monkeypatch, lambda plan: int(0.7 * plan.predicted_peak))
    measures(monkeypatch, 0.5)
    step = fxmem.optimize(seeded(Net), "0.5x", (batch(256),), compiler="inductor")
    assert 1 < len(seen) <= code_search.PLANS
    assert seen[0].added_seconds > seen[-1].added_seconds
    ((tried, _),) = compiled  # half of the budget is free as measured, which is not tried again
    assert tried.plan is seen[-1]
    assert step.plan.budget == seen[0].budget


def test_code_that_does_not_keep_what_was_foreseen_is_planned_again(
    interpreted, compiled, monkeypatch
):
    seen = foresees(monkeypatch, lambda plan: plan.predicted_peak)
    measures(monkeypatch, 1.2)
    step = fxmem.optimize(seeded(Net), "0.7x", (batch(256),), compiler="inductor")
    assert [tried.plan for tried, _ in compiled] == seen
    assert len(compiled) == 2
    assert compiled[0][1].predicted_peak > step.plan.budget >= step.plan.predicted_peak
    assert step.plan is compiled[1][1]


def test_one_that_was_seen_before_may_fit_where_code_does_not(interpreted, compiled, monkeypatch):
    """With as many bytes more as the code had that was measured."""
    seen = foresees(monkeypatch, lambda plan: int(0.7 * plan.predicted_peak))
    measures(monkeypatch, 0.85)
    step = fxmem.optimize(seeded(Net), "0.5x", (batch(256),), compiler="inductor")
    first, second = (tried.plan for tried, _ in compiled)
    assert first is seen[-1]
    assert 0.85 * first.predicted_peak > step.plan.budget >= 0.85 * second.predicted_peak
    assert second in seen[:-1]


@pytest.mark.parametrize(("share", "looks"), [(1.05, 2), (2, 1)])
def test_where_smaller_plans_will_not_do_none_is_lowered(share, looks, interpreted, monkeypatch):
    """As seen, where code gets no smaller with its plan; or where it would not even with the smallest."""
    seen = foresees(monkeypatch, lambda plan: int(share * plan.budget))
    step = fxmem.optimize(seeded(Net), "0.7x", (batch(256),), compiler="inductor")
    assert len(seen) == looks
    assert step.plan.decisions == seen[0].decisions
    assert step.plan.predicted_peak == seen[0].predicted_peak  # operator by operator


def test_what_code_gives_for_each_byte_of_its_plan_is_learned():
    """Where half of it is seen to arrive, the next plan is for twice as much less."""
    plan = SimpleNamespace(budget=1000, predicted_peak=900, added_seconds=1.0)
    assert code_search._target(plan, 1050, gives=0.5) == 780
    seen = [
        SimpleNamespace(plan=SimpleNamespace(predicted_peak=planned), foreseen=code)
        for planned, code in ((900, 1100), (800, 1050))
    ]
    search = SimpleNamespace(seen=seen, _is_as_it_is=lambda one: False)
    assert code_search.CodeSearch._gives(search) == 0.5


def test_buffers_are_let_go_at_once_where_that_keeps_the_budget(compiled, monkeypatch):
    model, x = seeded(Net), batch(256)
    want = stepped(eager := copy.deepcopy(model), eager, x)
    before, codes = inductor.Inductor._foreseen, []

    def foreseen(self, planned, *given):
        found = before(self, planned, *given)
        codes.append(self)
        return found if self.freed_at_once else planned.plan.budget + 1

    monkeypatch.setattr(inductor.Inductor, "_foreseen", foreseen)
    with fresh_inductor_cache():
        step = fxmem.optimize(model, "0.6x", (x,), compiler="inductor")
    ((tried, _),) = compiled
    assert codes == [tried.code] * 2  # lowered once, and looked at twice
    assert tried.foreseen == pytest.approx(step.plan.predicted_peak, rel=0.005)
    assert_close(want, stepped(step, model, x))
    peak = measured(step, model, x) + step.plan.resident
    assert peak == pytest.approx(step.plan.predicted_peak, rel=0.001)


class Pointwise(nn.Module):
    """Most of its bytes are between operators that Inductor makes one kernel of."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(64, 256), nn.Linear(256, 64)

    def forward(self, x):
        h = self.a(x)
        h = (h.sin() * h.cos()).exp() * (h.square() + 1).rsqrt()
        return self.b(h).square().mean()


def test_code_may_keep_a_budget_that_operators_do_not():
    torch.manual_seed(0)
    model, x = Pointwise(), torch.randn(512, 64)
    least = fxmem.plan(model, "min", (x,)).predicted_peak
    with pytest.raises(fxmem.BudgetInfeasibleError):
        fxmem.optimize(model, int(0.97 * least), (x,))
    step = fxmem.optimize(model, int(0.97 * least), (x,), compiler="inductor")
    assert step.plan.predicted_peak <= step.plan.budget < least
    seen = step.plan.resident + measured(step, model, x)
    assert seen == pytest.approx(step.plan.predicted_peak, abs=16)  # of scalars
    with pytest.raises(fxmem.BudgetInfeasibleError) as found:
        fxmem.optimize(model, least // 2, (x,), compiler="inductor")
    assert found.value.smallest_peak <= least


def test_the_step_as_it_is_comes_first_where_what_its_code_saves_is_within_the_budget(
    interpreted, compiled, monkeypatch
):
    torch.manual_seed(0)
    model, x = Pointwise(), torch.randn(512, 64)
    assert fxmem.plan(model, "0.7x", (x,)).added_seconds > 0
    seen = foresees(monkeypatch, lambda plan: plan.budget)
    measures(monkeypatch, 0.5)
    step = fxmem.optimize(model, "0.7x", (x,), compiler="inductor")
    assert [plan.added_seconds for plan in seen] == [0]
    assert len(compiled) == 1
    assert step.plan.added_seconds == 0


def test_after_the_step_as_it_is_comes_what_was_decided(interpreted, compiled, monkeypatch):
    """Whether its code is foreseen not to fit or is measured not to."""
    torch.manual_seed(0)
    model, x = Pointwise(), torch.randn(512, 64)
    decided = fxmem.plan(model, "0.7x", (x,))
    seen = foresees(monkeypatch, lambda plan: plan.predicted_peak)
    measures(monkeypatch, 1)
    step = fxmem.optimize(model, "0.7x", (x,), compiler="inductor")
    assert [plan.added_seconds for plan in seen] == [0, decided.added_seconds]
    assert [tried.plan for tried, _ in compiled] == [seen[1]]
    assert step.plan.decisions == decided.decisions
    seen.clear()
    compiled.clear()
    foresees(monkeypatch, lambda plan: plan.budget)
    step = fxmem.optimize(model, "0.7x", (x,), compiler="inductor")
    assert [tried.plan.added_seconds for tried, _ in compiled] == [0, decided.added_seconds]
    assert step.plan.decisions == decided.decisions


def test_where_code_of_a_plan_does_not_fit_it_may_save_the_least(
    interpreted, compiled, monkeypatch
):
    decided = fxmem.plan(seeded(Net), "0.7x", (batch(256),))
    seen = foresees(monkeypatch, lambda plan: plan.budget + 1, lambda plan: plan.budget)
    holds(monkeypatch, usual=1, least=0)
    measures(monkeypatch, 0.5)
    step = fxmem.optimize(seeded(Net), "0.7x", (batch(256),), compiler="inductor")
    ((tried, _),) = compiled
    assert tried.code.saves_least
    assert [plan.decisions for plan in seen] == [step.plan.decisions] == [decided.decisions]
    compiled.clear()
    again = fxmem.optimize(
        seeded(Net), step.plan.budget, (batch(256),), compiler="inductor", plan=step.plan
    )
    assert again.plan.decisions == step.plan.decisions
    assert [tried.code.saves_least for tried, _ in compiled] == [True]


def test_what_would_save_too_little_less_is_not_lowered(interpreted, compiled, monkeypatch):
    least = []
    foresees(monkeypatch, lambda plan: plan.budget + 2, least.append)
    holds(monkeypatch, usual=1, least=0)
    fxmem.optimize(seeded(Net), "0.7x", (batch(256),), compiler="inductor")
    assert not least


def test_the_largest_plan_is_sought_whose_code_fits_where_it_saves_the_least(
    interpreted, compiled, monkeypatch
):
    least = []

    def saving_least(plan):
        least.append(plan)
        return int(0.87 * plan.predicted_peak)

    foresees(monkeypatch, lambda plan: int(1.01 * plan.budget), saving_least)
    holds(monkeypatch, usual=10**9, least=0)
    measures(monkeypatch, 0.8)
    monkeypatch.setattr(code_search.CodeSearch, "_seems_to_fit_as_it_is", lambda search: False)
    torch.manual_seed(0)
    step = fxmem.optimize(Light(), "0.8x", (torch.randn(1024, 64),), compiler="inductor")
    budget = step.plan.budget
    assert len(least) == code_search.PLANS
    assert least[0].added_seconds == 0  # the step as it is
    assert [0.87 * plan.predicted_peak <= budget for plan in least] == [False, True, True]
    assert least[0].predicted_peak > least[2].predicted_peak > least[1].predicted_peak > budget
    ((tried, _),) = compiled
    assert tried.plan is least[2]


def test_larger_plans_that_save_the_least_are_sought_from_what_was_decided_alone(
    interpreted, compiled, monkeypatch
):
    """Not from a smaller one, after code of the first held too much even so."""
    least, budget = [], fxmem.plan(seeded(Net), "0.7x", (batch(256),)).budget
    seen = foresees(monkeypatch, lambda plan: int(1.2 * plan.predicted_peak), least.append)
    holds(monkeypatch, usual=10**9, least=10**9 - 2 * int(MARGIN * budget))
    measures(monkeypatch, 1)
    step = fxmem.optimize(seeded(Net), budget, (batch(256),), compiler="inductor")
    assert len(seen) == 2
    assert step.plan.decisions == seen[1].decisions
    assert not least


@pytest.mark.parametrize(("heavy", "faster"), [(0.0, True), (1.0, False)])
def test_code_that_saves_the_least_takes_the_place_of_such_that_fits_in_less_time(
    heavy, faster, interpreted, compiled, monkeypatch
):
    foresees(monkeypatch, lambda plan: plan.budget, lambda plan: plan.budget)
    holds(monkeypatch, usual=10**9, least=0, heavy=heavy)
    measures(monkeypatch, 0.5)
    monkeypatch.setattr(code_search.CodeSearch, "_seems_to_fit_as_it_is", lambda search: False)
    torch.manual_seed(0)
    step = fxmem.optimize(Light(), "0.8x", (torch.randn(1024, 64),), compiler="inductor")
    ((tried, _),) = compiled
    assert tried.code.saves_least == (step.plan.added_seconds == 0) == faster


def test_functions_cost_the_time_of_their_elements_where_kernels_make_them_again():
    def held(function):
        torch.manual_seed(0)
        with capture_once(Light(function), (torch.randn(1024, 64),)) as captured:
            return inductor.held(captured.analysis.graph, saves_least=True).heavy

    assert held(F.relu) == 0
    each = CPU.launch + 2 * 4 * 1024 * 128 / CPU.bandwidth  # read and written once
    assert held(F.gelu) == pytest.approx(8 * each)


class Light(nn.Module):
    """Between products there is arithmetic alone."""

    def __init__(self, function=F.relu, width=128):
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(64, width), nn.Linear(width, 64)] * 8)
        self.function = function

    def forward(self, x):
        for up, down in zip(self.layers[::2], self.layers[1::2], strict=True):
            h = up(x)
            g = self.function(h * 2 + 1) * h
            x = x + down(g + g.mean(1, keepdim=True)) * (g.amax(1, keepdim=True) - 0.5)
        return x.square().mean()


@pytest.mark.parametrize("light", [True, False])
def test_the_step_as_it_is_saves_the_least_where_that_takes_about_no_time(
    light, interpreted, compiled, monkeypatch
):
    torch.manual_seed(0)
    model, x = Light(), torch.randn(1024, 64)
    with capture_once(model, (x,)) as captured:
        graph = captured.analysis.graph
    usual, least = inductor.held(graph), inductor.held(graph, saves_least=True)
    assert least.nbytes < 0.9 * usual.nbytes
    seconds = fxmem.plan(model, "1TiB", (x,)).seconds
    heavy = (0.9 if light else 1.1) * code_search.LIGHT * seconds
    least = replace(least, heavy=heavy)
    held = lambda _, saves_least=False: least if saves_least else usual  # noqa: E731
    monkeypatch.setattr(looks, "held", held)
    as_least = 1 if light else 2
    seen = foresees(monkeypatch, lambda plan: plan.budget, lambda plan: as_least * plan.budget)
    measures(monkeypatch, 0.1)
    budget = int(1.08 * least.nbytes)
    step = fxmem.optimize(model, budget, (x,), compiler="inductor")
    ((tried, _),) = compiled
    assert tried.code.saves_least == light
    assert (tried.plan.added_seconds == 0) == light
    assert len(seen) == (not light)
    assert step.plan.budget == budget


class Unsafe(nn.Module):
    """What must not be made again, or is no kernel's to make, between what may be."""

    def __init__(self):
        super().__init__()
        self.a, self.norm, self.b = (
            nn.Linear(16, 64, bias=False),
            nn.BatchNorm1d(64),
            nn.Linear(64, 16),
        )

    def forward(self, x):
        h = F.dropout(F.relu(self.norm(self.a(x))), 0.2)
        h = h * torch.bernoulli(torch.full_like(h, 0.5)) + torch.rand_like(h)
        order = h.argsort(1)
        h = h.gather(1, order).cumsum(1).tanh() + F.rrelu(h, training=True)
        return self.b(h.softmax(1)).square().mean()


def test_what_draws_is_made_once_where_the_least_is_saved(monkeypatch):
    how = inductor.Inductor.__init__
    least = lambda self, planned, **_: how(self, planned, saves_least=True)  # noqa: E731
    monkeypatch.setattr(inductor.Inductor, "__init__", least)
    model, x = seeded(Unsafe), torch.randn(64, 16)
    want = stepped(eager := copy.deepcopy(model), eager, x)
    step = fxmem.optimize(model, "1TiB", (x,), compiler="inductor")
    backward = {
        operator_name(n) for n in step.backward_graph.graph.nodes if n.op == "call_function"
    }
    assert not backward & {"bernoulli", "rand_like", "native_dropout", "sort", "rrelu_with_noise"}
    assert_close(want, stepped(step, model, x))


@pytest.mark.parametrize(("share", "as_it_is"), [("0.8x", False), ("0.9x", True)])
def test_with_a_loss_outside_the_step_as_it_is_comes_first_where_that_too_has_room(
    share, as_it_is, interpreted, compiled, monkeypatch
):
    layers = [layer for _ in range(4) for layer in (nn.Linear(64, 64), nn.GELU())]
    model, x = nn.Sequential(*layers), torch.randn(4096, 64)
    seen = foresees(monkeypatch, lambda plan: plan.budget)
    measures(monkeypatch, 0.5)
    step = fxmem.optimize(model, share, (x,), compiler="inductor")
    with capture_once(model, (x,)) as captured:
        held = inductor.held(captured.analysis.graph).nbytes
    outside = 2 * x.nbytes  # what a loss of such a tensor holds
    assert held < 0.95 * step.plan.budget
    assert (held + outside < 0.95 * step.plan.budget) == as_it_is
    assert [plan.added_seconds == 0 for plan in seen] == [as_it_is]


def test_what_a_norm_is_made_of_is_not_counted_as_saved(monkeypatch):
    """Inductor makes a normalized value again from its operand; the cut of whole operators does not."""
    model = nn.Sequential(nn.Linear(64, 64), nn.GroupNorm(8, 64), nn.GELU(), nn.Linear(64, 64))
    x = torch.randn(512, 64)
    with capture_once(model, (x,)) as captured:
        graph = captured.analysis.graph
        taken_apart = inductor.held(graph).nbytes
        monkeypatch.setattr(inductor, "_WHOLE", ("nothing",))
        assert inductor.held(graph).nbytes - taken_apart >= x.nbytes


def test_what_goes_with_the_device():
    options = backend.read({"budget": "1GiB"})
    assert options.uses_inductor(torch.device("cuda"))
    assert not options.uses_inductor(torch.device("cpu"))
    asked = Session(None, backend.read({"budget": "1GiB", "compiler": "eager"})).options
    assert not asked.uses_inductor(torch.device("cuda"))


# -- Torch's cache of compiled graphs ------------------------------------------------------------------


def _found():
    """How many graphs came from the cache, and how many were compiled; counts from here on."""
    counts = {name: counters["inductor"][f"fxgraph_cache_{name}"] for name in ("hit", "miss")}
    counters.clear()
    return counts


def test_each_plan_has_graphs_of_its_own_in_the_cache(monkeypatch):
    """And once they are there, as many plans are looked at, so that the same one is taken."""
    x, seen, foreseen, looks = batch(256), [], inductor.Inductor.foreseen, []

    def noted(*given):
        looks.append(foreseen(*given))
        return looks[-1]

    monkeypatch.setattr(inductor.Inductor, "foreseen", noted)
    want = stepped(eager := seeded(Net), eager, x)
    with fresh_inductor_cache():
        _found()
        for budget in ("1TiB", "0.6x", "1TiB", "0.6x"):
            torch._dynamo.reset()
            model = seeded(Net)
            step = fxmem.optimize(model, budget, (x,), compiler="inductor")
            plan = step.plan
            seen.append((_found(), plan.predicted_peak, len(plan.recomputed), [*looks]))
            looks.clear()
            assert_close(want, stepped(step, model, x))
    (roomy, tight, roomy_again, tight_again) = seen
    assert roomy[0]["hit"] == tight[0]["hit"] == 0
    assert roomy[0]["miss"] >= 2
    assert tight[0]["miss"] >= 2
    for first, again in ((roomy, roomy_again), (tight, tight_again)):
        assert again[0]["miss"] == 0
        assert again[0]["hit"] >= 2
        assert again[1:] == first[1:]
    assert tight[1] < roomy[1]
    assert tight[3]
    assert None not in tight[3]


def test_which_outputs_keep_their_strides_is_part_of_the_key():
    with fresh_inductor_cache():
        _found()
        for visible in (range(1), range(0), range(1)):
            x = symbolic_fake_mode().from_tensor(torch.randn(8, 4), static_shapes=True)
            module = make_fx(lambda x: (x.sin(),))(x)
            _torch_inductor.inductor(
                module, backward=False, static_inputs=[], visible=visible, strides={}
            )
        assert _found() == {"hit": 1, "miss": 2}


class Halves(Net):
    """Two graphs that are the same."""

    def forward(self, x):
        x = self.blocks[0](x)
        torch._dynamo.graph_break()
        x = self.blocks[1](x)
        torch._dynamo.graph_break()
        return x.square().mean()


def test_graphs_that_are_planned_later_use_the_cache():
    """In a second step graphs are traced outside of Dynamo's work on them."""
    x = batch(256)
    with fresh_inductor_cache():
        for again in (False, True):
            torch._dynamo.reset()
            model = seeded(Halves)
            options = {"budget": "0.9x", "compiler": "inductor"}
            step = torch.compile(model, backend="fxmem", options=options)
            stepped(step, model, x)
            _found()
            stepped(step, model, x)
            found = _found()
            assert found["hit"] + found["miss"] >= 4
            assert not again or found["hit"] >= 2


# -- Errors --------------------------------------------------------------------------------------------

_KERNELS = torch.library.Library("fxmem_tests_inductor", "FRAGMENT")
_KERNELS.define("twice(Tensor x) -> Tensor")
_KERNELS.impl("twice", lambda x: 2 * x, "CompositeExplicitAutograd")
torch.library.register_fake("fxmem_tests_inductor::twice", torch.empty_like, lib=_KERNELS)
_twice = torch.ops.fxmem_tests_inductor.twice.default


class Twice(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return _twice(x)

    @staticmethod
    def backward(ctx, gradient):
        return _twice(gradient)


class Doubled(nn.Module):
    def __init__(self):
        super().__init__()
        self.up = nn.Linear(32, 32)

    def forward(self, x):
        return Twice.apply(self.up(x)).square().mean()


def _optimized(model, x):
    return fxmem.optimize(model, "1TiB", (x,), compiler="inductor")(x)


def _by_torch_compile(model, x):
    options = {"budget": "1TiB", "compiler": "inductor"}
    return torch.compile(model, backend="fxmem", options=options)(x)


def _refuses(*_):
    raise NotImplementedError("not on this machine")


def test_a_draw_that_inductor_would_take_apart_stays_whole():
    class Drawn(nn.Linear):
        def forward(self, x):
            h = super().forward(x)
            return (h * torch.bernoulli(h.detach().sigmoid().t()).t()).square().mean()

    model, x = seeded(lambda: Drawn(32, 32)), batch(64)
    want = stepped(eager := copy.deepcopy(model), eager, x)
    with fresh_inductor_cache():
        step = fxmem.optimize(model, "1GiB", (x,), compiler="inductor")
        assert_close(want, stepped(step, model, x))


@pytest.mark.parametrize("door", [_optimized, _by_torch_compile])
def test_what_inductor_has_no_code_for_is_said_with_the_line(door, monkeypatch):
    monkeypatch.setitem(lowering.lowerings, _twice, _refuses)
    with pytest.raises(fxmem.CompileError) as caught:
        door(seeded(Doubled), batch(8))
    assert isinstance(caught.value.__cause__, InductorError)
    assert caught.value.reason == "NotImplementedError: not on this machine"
    lines = str(caught.value).splitlines()
    assert lines[0] == "making code of the step's forward with Inductor failed."
    assert lines[2].startswith("  at      fxmem_tests_inductor.twice.default (test_inductor.py:")
    assert lines[2].endswith("in forward)")
    assert 'compiler="eager"' in lines[3]


def test_what_a_cpp_compiler_says_is_cut_to_its_error(monkeypatch):
    said = (
        "kernel.cpp: In function 'void kernel()':\nkernel.cpp:3:1: error: no such type\n"
        + "x" * 9000
    )

    def broken(*_, **__):
        raise InductorError(CppCompileError(["g++", "-O3"], said), None)

    monkeypatch.setattr(_torch_inductor, "compile_fx_inner", broken)
    with pytest.raises(fxmem.CompileError) as caught:
        _optimized(seeded(Net), batch(8))
    assert caught.value.reason == "CppCompileError: kernel.cpp:3:1: error: no such type"
    assert "unknown operator" in str(caught.value)


def test_a_backward_that_cannot_be_made_later_is_an_error_too(interpreted, monkeypatch):
    model, x = seeded(Heads), batch(64)
    step = fxmem.optimize(model, "1TiB", (x,), compiler="inductor")
    monkeypatch.setattr(_torch_inductor, "inductor", lambda *_, **__: 1 // 0)
    with pytest.raises(fxmem.CompileError, match="ZeroDivisionError") as caught:
        step(x)[1].sum().backward()  # the loss, for which it was made, gets no gradient
    assert isinstance(caught.value.__cause__, ZeroDivisionError)


def test_no_memory_for_the_measured_step_is_torchs_own_error(interpreted, monkeypatch):
    def full(*_):
        raise torch.OutOfMemoryError("Tried to allocate 2.00 GiB.")

    monkeypatch.setattr(inductor_step, "measured", full)
    with pytest.raises(torch.OutOfMemoryError):
        fxmem.optimize(seeded(Net), "1TiB", (batch(8),), compiler="inductor")
