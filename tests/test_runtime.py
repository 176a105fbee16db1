"""The optimized module as users meet it: lifetimes in the backward, modes, errors, copies, plans."""

import ast
import copy
import dataclasses
import functools
import gc
import inspect
import json
import pickle
import threading
from collections import OrderedDict
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
import torch.nn.functional as F
from hazards import differences
from test_engine import capture_once
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

import fxmem
from fxmem._torch.hooks import has_hooks
from fxmem.basics.units import format_bytes
from fxmem.graphs import workspace
from fxmem.steps import verify
from fxmem.steps.backward import Backward

# -- Models ------------------------------------------------------------------------------------------


class Mlp(nn.Module):
    """Its loss is the mean square of what the layers make."""

    def __init__(self, width=64, depth=2, dropout=0.0):
        super().__init__()
        layers = []
        for _ in range(depth):
            layers += [nn.Linear(width, width), nn.Tanh(), nn.GELU(), nn.Dropout(dropout)]
        self.net = nn.Sequential(*layers)

    def forward(self, x):
        return self.net(x).pow(2).mean()


class Dropping(Mlp):
    def __init__(self):
        super().__init__(dropout=0.3)


class Classifier(nn.Module):
    """Returns (loss, logits); ``second`` serves the logits alone."""

    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Linear(16, 64), nn.GELU(), nn.Linear(64, 64), nn.GELU())
        self.first = nn.Linear(64, 4)
        self.second = nn.Linear(64, 4)

    def forward(self, x):
        h = self.body(x)
        return self.first(h).pow(2).mean(), self.second(h)


class Regressor(nn.Module):
    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(16, 64), nn.GELU(), nn.Linear(64, 4))

    def forward(self, x):
        return self.net(x)


def seeded(make, *args, **kwargs):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return make(*args, **kwargs)


def batch(rows=32, width=64, seed=1):
    return torch.randn(rows, width, generator=torch.Generator().manual_seed(seed))


def gradients(model):
    return {n: None if p.grad is None else p.grad.clone() for n, p in model.named_parameters()}


def trained(step, model, *inputs, seed=7):
    """Loss and gradients of one step from fresh gradients."""
    model.zero_grad(set_to_none=True)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        loss = step(*inputs)
        loss.backward()
    return {"loss": loss.detach().clone(), "gradients": gradients(model)}


def assert_same(want, got):
    wrong = differences(want, got)
    assert not wrong, "\n".join(wrong)


def optimized(make=Mlp, budget="min", inputs=None, **options):
    model = seeded(make)
    inputs = (batch(),) if inputs is None else inputs
    return model, fxmem.optimize(model, budget, inputs, **options)


@functools.cache
def shared(budget="min"):
    """One for all tests that leave parameters and mode as they are."""
    return optimized(Dropping, budget)


@functools.cache
def classifier(budget):
    return optimized(Classifier, budget, (batch(width=16),))


@functools.cache
def plan_of(rows, budget="min"):
    return fxmem.plan(seeded(Mlp), budget, (batch(rows),))


def live_tensors():
    gc.collect()
    return sum(issubclass(type(o), torch.Tensor) for o in gc.get_objects())


# -- Lifetimes in the backward -----------------------------------------------------------------------


class Watch(TorchDispatchMode):
    """Before each operator: which of the watched storages are still alive."""

    def __init__(self, storages):
        super().__init__()
        self.storages = storages
        self.alive = []
        self.last_use = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        step = len(self.alive)
        self.alive.append([not s.expired() for s in self.storages])
        for tensor in torch.utils._pytree.tree_leaves((args, kwargs)):
            if isinstance(tensor, torch.Tensor):
                for i, storage in enumerate(self.storages):
                    if storage == StorageWeakRef(tensor.untyped_storage()):
                        self.last_use[i] = step
        return func(*args, **(kwargs or {}))


class StopAt(TorchDispatchMode):
    """Raises instead of running the n-th operator."""

    def __init__(self, n):
        super().__init__()
        self.left = n

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.left -= 1
        if self.left < 0:
            raise RuntimeError("the machine is on fire")
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("budget", ["1GiB", "min"])
def test_a_saved_tensor_dies_at_its_last_use(budget):
    model = seeded(Mlp)
    with capture_once(model, (batch(),)) as captured:
        planned = captured.decide(budget)
        backward = Backward(planned, captured.capture.graph)
    graph = captured.capture.graph
    parameters = dict(model.named_parameters())
    inputs = [
        parameters.get(graph.inputs[n.name].name, batch()).detach()
        for n in planned.split.forward.graph.find_nodes(op="placeholder")
    ]
    resident = {t.untyped_storage()._cdata for t in inputs}
    saved = planned.split.forward(*inputs)[planned.split.num_forward_outputs :]
    args = [*saved, torch.ones(())]
    watched = [
        StorageWeakRef(t.untyped_storage())
        for t in saved
        if t.untyped_storage()._cdata not in resident
    ]
    assert len(watched) >= 3
    del saved
    watch = Watch(watched)
    with watch:
        backward(args)
    assert args == []
    steps = len(watch.alive)
    for i in range(len(watched)):
        last = watch.last_use[i]
        assert all(watch.alive[s][i] for s in range(last + 1))
        assert not any(watch.alive[s][i] for s in range(last + 1, steps))
    died_early = [last for last in watch.last_use.values() if last < steps - 5]
    assert len(died_early) >= len(watched) - 1


def test_autograd_keeps_no_second_reference():
    _, opt = shared("1GiB")
    loss = opt(batch())
    resident = {p.untyped_storage()._cdata for p in opt.parameters()}
    watched = [
        StorageWeakRef(t.untyped_storage())
        for t in loss.grad_fn.saved_tensors
        if t.untyped_storage()._cdata not in resident
    ]
    watch = Watch(watched)
    with watch:
        loss.backward()
    counts = [sum(alive) for alive in watch.alive]
    assert counts[0] == len(watched)
    assert counts[-1] <= 1  # the batch itself
    assert sorted(counts, reverse=True) == counts
    assert len(set(counts)) > 3


def test_the_peak_is_the_measured_one():
    _, opt = shared()
    x = batch()
    opt(x).backward()
    opt.zero_grad(set_to_none=True)
    start = fxmem.measure(lambda: None).at_start
    peak = fxmem.measure(lambda: opt(x).backward()).peak
    assert peak - start + opt.plan.resident == opt.plan.predicted_peak


def test_a_copy_below_a_slice_is_as_large_as_what_the_slice_is_of():
    class Shifting(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(32, 64), nn.Linear(64, 32)

        def forward(self, x):
            h = self.a(x) * 2
            h[:, :3] = h[:, 3:6].clone()
            return self.b(F.dropout(h.sin(), 0.3)).mean()

    x = torch.randn(16, 64, 32)
    opt = fxmem.optimize(seeded(Shifting), "min", (x,), verify=True)
    assert opt.report().to_dict()["measured_peak"] == opt.plan.predicted_peak


# -- Like the model ----------------------------------------------------------------------------------


@pytest.mark.parametrize("budget", ["1GiB", "min"])
def test_gradients_are_those_of_the_model(budget):
    model, opt = shared(budget)
    assert_same(trained(model, model, batch()), trained(opt, opt, batch()))


def test_train_eval_and_no_grad():
    model, opt = optimized(Dropping)
    x = batch()
    want = trained(model, model, x)
    assert_same(want, trained(opt, opt, x))
    opt.eval()
    assert not any(m.training for m in opt.modules())
    quiet = trained(model, model, x)
    assert_same(quiet, trained(opt, opt, x))
    assert not torch.equal(want["loss"], quiet["loss"])
    with torch.no_grad():
        loss = opt(x)
    assert not loss.requires_grad
    assert torch.equal(loss, quiet["loss"])
    opt.train()
    assert all(m.training for m in opt.modules())
    assert_same(want, trained(opt, opt, x))


def test_model_and_optimized_module_have_one_mode():
    model, opt = shared()
    try:
        opt.eval()
        assert not model.training
        model.train()
        assert opt.training
    finally:
        model.train()
        opt.train()


def test_gradients_accumulate():
    model, opt = shared()

    def accumulated(step):
        model.zero_grad(set_to_none=True)
        torch.manual_seed(5)
        for seed in range(3):
            (step(batch(seed=seed)) / 3).backward()
        return gradients(model)

    assert_same(accumulated(model), accumulated(opt))


def test_two_models_side_by_side():
    a, opt_a = shared()
    b, opt_b = shared("1GiB")
    want = trained(a, a, batch(), seed=3), trained(b, b, batch(seed=2), seed=4)
    a.zero_grad(set_to_none=True)
    b.zero_grad(set_to_none=True)
    torch.manual_seed(3)
    loss_a = opt_a(batch())
    torch.manual_seed(4)
    loss_b = opt_b(batch(seed=2))
    loss_a.backward()
    loss_b.backward()
    got = [
        {"loss": loss.detach(), "gradients": gradients(model)}
        for loss, model in ((loss_a, a), (loss_b, b))
    ]
    assert_same(list(want), got)


def test_four_threads_share_one_module():
    model = seeded(Mlp)
    opt = fxmem.optimize(model, "min")  # captured by whichever thread comes first
    start = threading.Barrier(4)

    def work(seed):
        start.wait()
        seen = []
        for _ in range(3):
            seen.append(torch.autograd.grad(opt(batch(seed=seed)), list(opt.parameters())))
        return seen

    with ThreadPoolExecutor(4) as pool:
        got = list(pool.map(work, range(4)))
    for seed in range(4):
        want = torch.autograd.grad(model(batch(seed=seed)), list(model.parameters()))
        for seen in got[seed]:
            assert_same(list(want), list(seen))
    assert len(opt._session.programs) == 1


def test_guards_compare_tensors_as_the_caller_sees_them():
    _, opt = shared()
    opt(batch())
    (program,) = opt._session.programs
    guards = str(inspect.getclosurevars(program.matches).nonlocals["manager"])
    assert "TENSOR_MATCH" in guards
    assert "PythonDispatcher" not in guards  # active while tracing only


def test_the_first_call_may_be_profiled(monkeypatch, tmp_path):
    monkeypatch.setenv("FXMEM_CACHE_DIR", str(tmp_path))
    want = fxmem.plan(seeded(Mlp), "min", (batch(),))
    monkeypatch.setenv("FXMEM_CACHE_DIR", str(tmp_path / "empty"))
    model = seeded(Mlp)
    opt = fxmem.optimize(model, "min")
    with torch.profiler.profile(profile_memory=True) as profile:
        opt(batch()).backward()
    assert any(event.key == "aten::addmm" for event in profile.key_averages())
    assert opt.plan.predicted_peak == want.predicted_peak
    assert (tmp_path / "empty").exists()  # the workspaces were measured nevertheless


def counted_flops(step, x) -> int:
    with FlopCounterMode(display=False) as counter:
        step(x).backward()
    return counter.get_total_flops()


def test_flops_are_counted_as_they_run():
    model, x = seeded(Mlp), batch(rows=256)
    eager = counted_flops(model, x)
    opt = fxmem.optimize(model, "1TiB")
    assert counted_flops(opt, x) == eager  # the capture, at this first call, is not counted
    opt(x).backward()
    assert counted_flops(opt, x) == eager
    assert len(opt._session.programs) == 1
    assert counted_flops(fxmem.optimize(model, "min", (x,)), x) > eager


def doubled(module, args, output):
    return output * 2


def halved(module, args):
    return (args[0] / 2,)


def test_hooks_that_come_and_go_are_heeded():
    model, x = seeded(Mlp), batch()
    opt = fxmem.optimize(model, "1TiB", (x,))
    plain = trained(model, model, x)
    assert_same(plain, trained(opt, opt, x))
    for register, function in (
        (model.net[1].register_forward_hook, doubled),
        (model.net[2].register_forward_pre_hook, halved),
        (model.register_forward_hook, doubled),
    ):
        hook = register(function)
        want = trained(model, model, x)
        assert not torch.equal(want["loss"], plain["loss"])
        assert_same(want, trained(opt, opt, x))
        hook.remove()
        assert_same(plain, trained(opt, opt, x))


def put_on_a_copy(opt):
    other = copy.deepcopy(opt)
    other.net[1].register_forward_hook(doubled)
    return other


def with_another_submodule(opt):
    """Of the same class, and with a hook on it before it is there."""
    opt.net[1] = nn.Tanh()
    opt.net[1].register_forward_hook(doubled)
    return opt


def after_all_were_taken_off(opt):
    """By a new table, as is often done."""
    opt.net[1]._forward_hooks = OrderedDict()
    opt.net[1].register_forward_hook(doubled)
    return opt


def on_what_is_not_registered(opt):
    opt.hidden[0].register_forward_hook(doubled)
    return opt


def on_what_was_a_submodule(opt):
    """The forward finds it in a list."""
    del opt._fxmem_model.known
    opt.hidden[1].register_forward_hook(doubled)
    return opt


class Hiding(Mlp):
    """Of its layers two are in a list of Python's, one of them a submodule besides."""

    def __init__(self):
        super().__init__()
        self.known = nn.Tanh()
        self.hidden = [nn.Tanh(), self.known]

    def forward(self, x):
        return super().forward(self.hidden[1](self.hidden[0](x)))


@pytest.mark.parametrize(
    "put",
    [
        put_on_a_copy,
        with_another_submodule,
        after_all_were_taken_off,
        on_what_is_not_registered,
        on_what_was_a_submodule,
    ],
)
def test_a_hook_is_heeded_wherever_it_comes_from(put):
    model, x = seeded(Hiding), batch()
    opt = fxmem.optimize(model, "1TiB", (x,))
    plain = trained(model, model, x)
    assert_same(plain, trained(opt, opt, x))
    assert len(opt._session.programs) == 1
    opt = put(opt)
    model = opt._fxmem_model
    want = trained(model, model, x)
    assert not torch.equal(want["loss"], plain["loss"])
    assert_same(want, trained(opt, opt, x))


def test_modules_may_refer_to_each_other():
    model, x = seeded(Mlp), batch()
    model.net[1].parent = model
    opt = fxmem.optimize(model, "1TiB", (x,))
    want = trained(model, model, x)
    assert_same(want, trained(opt, opt, x))


def test_each_module_is_looked_at_once_for_hooks():
    """Not once for each of the million paths to it."""
    model = nn.Linear(2, 2)
    for _ in range(20):
        model, below = nn.Module(), model
        model.left = model.right = below
    assert not has_hooks(model)
    below.register_forward_hook(doubled)
    assert has_hooks(model)


def test_a_default_device_may_be_set():
    model, x = seeded(Mlp), batch()
    want = trained(model, model, x)
    before = fxmem.optimize(model, "min", (x,))
    with torch.device("cpu"):
        within = fxmem.optimize(model, "min", (x,))
        assert_same(want, trained(before, before, x))
        assert_same(want, trained(within, within, x))
    assert_same(want, trained(within, within, x))


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.project = nn.Linear(16, 48)

    def forward(self, x):
        q, k, v = self.project(x).view(2, 4, 8, 12).chunk(3, -1)
        return F.scaled_dot_product_attention(q, k, v).sin().sum()


def test_attention_takes_the_kernel_that_is_asked_for():
    model, x = seeded(Attention), batch(16, 16).view(2, 8, 16)
    opt = fxmem.optimize(model, "min", (x,))
    free = trained(model, model, x)
    assert_same(free, trained(opt, opt, x))
    with sdpa_kernel(SDPBackend.MATH):
        assert_same(trained(model, model, x), trained(opt, opt, x))
    assert_same(free, trained(opt, opt, x))
    assert len(opt._session.programs) == 2


class Shift(nn.Module):
    """Its backward has nothing to compute: the parameter's gradient is the one that is sent."""

    def __init__(self):
        super().__init__()
        self.shift = nn.Parameter(torch.randn(8, 16))

    def forward(self, x):
        return x + self.shift


@pytest.mark.parametrize("budget", ["1TiB", "min"])
def test_a_backward_without_operators(budget):
    model, x = seeded(Shift), torch.randn(8, 16)
    opt = fxmem.optimize(model, budget, (x,), verify=True)
    for module in (model, opt):
        module.zero_grad()
        module(x).backward(batch(8, 16))
        assert_same([batch(8, 16)], [model.shift.grad])


def test_state_dict_goes_both_ways():
    model, opt = optimized()
    assert list(opt.state_dict()) == list(model.state_dict())
    assert all(a is b for a, b in zip(opt.parameters(), model.parameters(), strict=True))
    other = Mlp()
    other.load_state_dict(opt.state_dict(), strict=True)
    assert_same(dict(model.state_dict()), dict(other.state_dict()))
    changed = {k: v + 1 for k, v in other.state_dict().items()}
    opt.load_state_dict(changed, strict=True)
    other.load_state_dict(changed)
    assert_same(trained(other, other, batch()), trained(opt, opt, batch()))


def test_a_deep_copy_trains_on_its_own():
    model, opt = shared()
    twin = copy.deepcopy(opt)
    want = trained(model, model, batch())
    model.zero_grad(set_to_none=True)
    assert_same(want, trained(twin, twin, batch()))
    assert all(p.grad is None for p in opt.parameters())
    with torch.no_grad():
        for p in twin.parameters():
            p.mul_(2)
    assert_same(want, trained(opt, opt, batch()))
    assert not torch.equal(trained(twin, twin, batch())["loss"], want["loss"])


def test_pickle_and_back():
    model, opt = shared()
    again = pickle.loads(pickle.dumps(opt))
    assert list(again.state_dict()) == list(opt.state_dict())
    assert_same(trained(model, model, batch()), trained(again, again, batch()))
    assert again.plan.predicted_peak == opt.plan.predicted_peak


def test_forward_takes_part_in_modules_and_parameters():
    _, opt = shared()
    assert isinstance(opt, torch.fx.GraphModule)
    assert isinstance(opt.net[0], nn.Linear)
    assert [n for n, _ in opt.named_modules()][:2] == ["", "net"]


# -- The backward's own rules ------------------------------------------------------------------------


def test_retain_graph_runs_the_same_backward_twice():
    model, opt = shared()
    parameters = list(model.parameters())
    torch.manual_seed(3)
    want = torch.autograd.grad(model(batch()), parameters)
    torch.manual_seed(3)
    loss = opt(batch())
    first = torch.autograd.grad(loss, parameters, retain_graph=True)
    second = torch.autograd.grad(loss, parameters)
    assert_same(list(want), list(first))
    assert_same(list(want), list(second))


def test_a_second_backward_without_the_graph_raises():
    _, opt = shared()
    loss = opt(batch())
    loss.backward()
    with pytest.raises(RuntimeError, match="second time"):
        loss.backward()


@pytest.mark.parametrize("share", ["0.7x", "0.5x"])
def test_a_draw_that_an_unexpected_gradient_makes_again(share):
    """A gradient is expected of the loss alone; dropout's product is a value out of a tuple there."""

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.wide, self.narrow = nn.Linear(64, 256), nn.Linear(256, 64)
            self.last = nn.Linear(64, 64)

        def forward(self, x):
            h = self.narrow(F.gelu(self.wide(x))) + x
            h = self.narrow(F.gelu(self.wide(h))) + h
            return F.dropout(F.relu(self.last(h)), 0.3), h.sum()

    def gradients(step, x):
        torch.manual_seed(1)
        drawn, loss = step(x)
        return torch.autograd.grad(drawn.sum() + loss, [x, *model.parameters()])

    torch.manual_seed(0)
    model, x = Net(), torch.randn(64, 64, requires_grad=True)
    step = fxmem.optimize(model, share, (x,), on_infeasible="best")
    assert all(map(torch.equal, gradients(step, x), gradients(model, x)))


@pytest.mark.parametrize("door", ["optimize", "backend"])
def test_a_batch_of_gradients_is_refused(door):
    model, x = nn.Sequential(nn.Linear(8, 8), nn.Tanh()), torch.randn(2, 8, requires_grad=True)
    if door == "optimize":
        step = fxmem.optimize(model, "1GiB", (x,))
    else:
        step = torch.compile(model, backend="fxmem", options={"budget": "1GiB"})
    ones = torch.eye(16).view(16, 2, 8)
    with pytest.raises(fxmem.FxmemError, match=r"is_grads_batched=True.*\n  try: one call"):
        torch.autograd.grad(step(x), x, ones, is_grads_batched=True)
    (want,) = torch.autograd.grad(model(x), x, ones, is_grads_batched=True)
    got = [torch.autograd.grad(step(x), x, one)[0] for one in ones]
    assert torch.equal(torch.stack(got), want)


def test_double_backward_is_refused():
    _, opt = shared()
    grads = torch.autograd.grad(opt(batch()), list(opt.parameters()), create_graph=True)
    with pytest.raises(fxmem.FxmemError, match=r"create_graph=True.*\n  try: the model itself"):
        grads[0].sum().backward()


def test_an_error_inside_the_backward_leaves_nothing_behind():
    model, opt = shared()
    x = batch()
    want = trained(model, model, x)
    assert_same(want, trained(opt, opt, x))
    opt.zero_grad(set_to_none=True)
    before = live_tensors()
    for n in (3, 9, 15):
        loss = opt(x)
        with pytest.raises(RuntimeError, match="on fire"), StopAt(n):
            loss.backward()
        del loss
        opt.zero_grad(set_to_none=True)
    assert live_tensors() == before
    assert_same(want, trained(opt, opt, x))


def test_a_hook_that_raises_leaves_nothing_behind():
    model, opt = shared()
    x = batch()
    want = trained(model, model, x)
    assert_same(want, trained(opt, opt, x))
    opt.zero_grad(set_to_none=True)
    before = live_tensors()

    def fail(_):
        raise ValueError("no")

    handle = model.net[4].weight.register_hook(fail)
    for _ in range(3):
        with pytest.raises(ValueError, match="no"):
            opt(x).backward()
    handle.remove()
    assert_same(want, trained(opt, opt, x))  # autograd itself forgets a failed step at the next one
    opt.zero_grad(set_to_none=True)
    assert live_tensors() == before


def test_a_forward_without_backward_leaves_nothing_behind():
    _, opt = shared()
    x = batch()
    opt(x)
    before = live_tensors()
    for _ in range(3):
        opt(x)
    assert live_tensors() == before


# -- Gradients that nobody sends ---------------------------------------------------------------------


def total(outputs, way):
    loss, logits = outputs
    return {"loss": loss, "both": loss + logits.sum(), "logits": logits.sum()}[way]


@pytest.mark.parametrize("budget", ["1GiB", "min"])
@pytest.mark.parametrize("way", ["loss", "both", "logits"])
def test_gradients_of_what_is_sent(way, budget):
    x = batch(width=16)
    model, opt = classifier(budget)
    want = trained(lambda x: total(model(x), way), model, x)
    assert_same(want, trained(lambda x: total(opt(x), way), opt, x))
    unused = {"loss": "second.weight", "both": None, "logits": "first.weight"}[way]
    assert {n for n, g in want["gradients"].items() if g is None} == (
        {unused, unused.replace("weight", "bias")} if unused else set()
    )


def test_the_ways_take_turns():
    x = batch(width=16)
    model, opt = classifier("min")
    for way in ("both", "loss", "logits", "both", "loss"):
        want = trained(lambda x, way=way: total(model(x), way), model, x)
        assert_same(want, trained(lambda x, way=way: total(opt(x), way), opt, x))


# -- Calls other than the example --------------------------------------------------------------------


def test_capture_at_the_first_call():
    model = seeded(Mlp)
    opt = fxmem.optimize(model, "min")
    with pytest.raises(fxmem.FxmemError, match="no plan yet"):
        opt.plan  # noqa: B018
    want = trained(model, model, batch())
    assert_same(want, trained(opt, opt, batch()))
    assert opt.plan.predicted_peak == plan_of(32).predicted_peak


def test_another_batch_size_gets_a_plan_of_its_own():
    model = seeded(Mlp)
    small, large = batch(16), batch(128)
    budget = (plan_of(128).predicted_peak + plan_of(128, "1TiB").predicted_peak) // 2
    opt = fxmem.optimize(model, budget, (small,))
    assert_same(trained(model, model, small), trained(opt, opt, small))
    assert_same(trained(model, model, large), trained(opt, opt, large))
    plans = [program.plan for program in opt._session.programs]
    assert [p.budget for p in plans] == [budget, budget]
    assert all(p.predicted_peak <= budget for p in plans)
    assert [any(d.action == "recompute" for d in p.decisions) for p in plans] == [False, True]
    trained(opt, opt, small)
    assert len(opt._session.programs) == 2


def test_a_batch_that_does_not_fit_raises_at_its_call():
    model = seeded(Mlp)
    budget = plan_of(32).predicted_peak
    opt = fxmem.optimize(model, budget, (batch(),))
    with pytest.raises(fxmem.BudgetInfeasibleError):
        opt(batch(512))
    assert_same(trained(model, model, batch()), trained(opt, opt, batch()))


def test_loss_outside_the_model():
    x, y = batch(width=16), batch(width=4)
    model = seeded(Regressor)
    opt = fxmem.optimize(model, "min", (x,), loss_fn=F.mse_loss, loss_inputs=(y,))
    want = trained(lambda x, y: F.mse_loss(model(x), y), model, x, y)
    assert_same(want, trained(opt, opt, x, y))
    with torch.no_grad():
        assert torch.equal(opt(x, y), want["loss"])
    again = pickle.loads(pickle.dumps(opt))
    assert_same(want, trained(again, again, x, y))


# -- Options -----------------------------------------------------------------------------------------


def recomputed(plan):
    return [d.value for d in plan.decisions if d.action == "recompute"]


def test_allow_nothing_rewrites_nothing():
    model, whole = shared("1GiB")
    small = shared()[1].plan.predicted_peak
    opt = fxmem.optimize(model, "min", (batch(),), allow=())
    assert not recomputed(opt.plan)
    assert opt.backward_graph.code == whole.backward_graph.code
    with pytest.raises(fxmem.BudgetInfeasibleError):
        fxmem.optimize(model, small, (batch(),), allow=())
    with pytest.warns(UserWarning, match="no plan fits"):
        opt = fxmem.optimize(model, small, (batch(),), allow=(), on_infeasible="best")
    assert not recomputed(opt.plan)


def test_the_best_plan_comes_with_a_warning():
    model, opt = shared()
    best = opt.plan
    with pytest.raises(fxmem.BudgetInfeasibleError) as error:
        fxmem.optimize(model, 1000, (batch(),))
    assert error.value.smallest_peak == best.predicted_peak
    with pytest.warns(UserWarning, match="no plan fits") as seen:
        opt = fxmem.optimize(model, 1000, (batch(),), on_infeasible="best")
    assert opt.plan.predicted_peak == best.predicted_peak
    assert format_bytes(1000) in str(seen[0].message)
    assert format_bytes(best.predicted_peak) in str(seen[0].message)
    assert_same(trained(model, model, batch()), trained(opt, opt, batch()))


def test_a_plan_is_replayed(tmp_path):
    model, opt = shared()
    path = tmp_path / "plan.json"
    opt.plan.save(path)
    for plan in (str(path), fxmem.Plan.load(path)):
        again = fxmem.optimize(model, "1GiB", (batch(),), plan=plan)
        assert again.forward_graph.code == opt.forward_graph.code
        assert again.backward_graph.code == opt.backward_graph.code
        assert again.plan.predicted_peak == opt.plan.predicted_peak
    assert_same(trained(model, model, batch()), trained(again, again, batch()))


def test_a_plan_for_another_model_is_refused(tmp_path):
    model, opt = shared()
    opt.plan.save(tmp_path / "plan.json")
    with pytest.raises(fxmem.PlanMismatchError):
        fxmem.optimize(seeded(Mlp, depth=1), "1GiB", (batch(),), plan=tmp_path / "plan.json")
    with pytest.raises(fxmem.PlanMismatchError):
        fxmem.optimize(model, "1GiB", (batch(16),), plan=opt.plan)


def test_verify_measures_the_step():
    model, opt = optimized(verify=True)
    text = str(opt.report())
    assert "measured" in text
    assert "bitwise equal" in text
    seen = opt.report().to_dict()
    assert seen["measured_peak"] == opt.plan.predicted_peak
    assert all(p.grad is None for p in model.parameters())


def test_verify_leaves_parameters_that_the_step_writes_as_they_were():
    model = seeded(lambda: nn.Sequential(nn.Embedding(20, 16, max_norm=1.0), nn.Linear(16, 8)))
    before = [p.detach().clone() for p in model.parameters()]
    fxmem.optimize(model, "min", (torch.arange(12),), verify=True)
    assert_same(before, list(model.parameters()))


def test_verify_notices_a_wrong_prediction(monkeypatch):
    def twice(step):
        found = measure(step)
        return dataclasses.replace(found, peak=2 * found.peak)

    measure = verify.measure
    monkeypatch.setattr(verify, "measure", twice)
    with pytest.raises(fxmem.VerificationError, match="peaked"):
        optimized(budget=plan_of(32).predicted_peak, verify=True)


# -- Looking -----------------------------------------------------------------------------------------


def test_graphs_are_readable_python():
    _, opt = shared()
    for graph in (opt.forward_graph, opt.backward_graph):
        assert isinstance(graph, torch.fx.GraphModule)
        graph.graph.lint()
        ast.parse(graph.code.strip())
    forward, backward = opt.forward_graph.code, opt.backward_graph.code
    for name in ("net_0_weight", "net_4_bias", "args_0", "tanh_1", "gelu"):
        assert name in forward
    for name in ("grad_1", "_recompute = torch.ops.aten.", "gelu_backward", "= None"):
        assert name in backward
    assert "net_0_weight" in opt.code
    assert "primals" not in forward + backward
    assert "tangents" not in forward + backward


def test_names_of_keyword_inputs():
    class Two(Mlp):
        def forward(self, x, *, scale):
            return super().forward(x * scale)

    opt = fxmem.optimize(seeded(Two), "min", (batch(),), example_kwargs={"scale": batch(seed=3)})
    placeholders = [n.name for n in opt.forward_graph.graph.find_nodes(op="placeholder")]
    assert {"args_0", "scale", "net_0_weight"} <= set(placeholders)


def test_a_backward_inside_autocast_is_refused():
    net, x = nn.Linear(8, 4), torch.randn(2, 8)
    step = fxmem.optimize(net, "1TiB", (x,))
    with torch.autocast("cpu", torch.bfloat16):
        loss = step(x).float().sum()
        with pytest.raises(fxmem.FxmemError, match="leave the autocast context"):
            loss.backward()
    step(x).sum().backward()
    assert net.weight.grad is not None


def test_saved_tensors_hooks_see_the_step_and_not_its_capture():
    net, x = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 4)), torch.randn(2, 8)
    step = fxmem.optimize(net, "1TiB")
    packed = []
    for _ in range(2):
        packed.append(0)

        def pack(tensor):
            packed[-1] += 1
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            step(x).sum().backward()
    assert packed[0] == packed[1] > 0


def test_the_first_call_may_be_inside_a_checkpoint():
    net = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 4))
    x = torch.randn(2, 8, requires_grad=True)
    net(x).sum().backward()
    want = [p.grad for p in net.parameters()]
    net.zero_grad()
    step = fxmem.optimize(net, "1TiB")
    torch.utils.checkpoint.checkpoint(step, x, use_reentrant=False).sum().backward()
    assert all(torch.equal(p.grad, w) for p, w in zip(net.parameters(), want, strict=True))


def test_names_that_are_spelt_alike():
    """Python's arguments are letters, digits and underscores, so that names may meet."""

    class Twins(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.a_ = (nn.Parameter(torch.randn(8, 8)) for _ in range(2))

        def forward(self, x):
            return ((x @ self.a).relu() @ self.a_).sum()

    opt = fxmem.optimize(Twins(), "4.0x", (torch.randn(8, 8),))
    names = [n.target for n in opt.forward_graph.graph.find_nodes(op="placeholder")]
    assert sorted(names) == ["a", "a_1", "args_0"]


def test_what_another_process_measured_is_read_and_nothing_is_read_twice(monkeypatch, tmp_path):
    monkeypatch.setenv("FXMEM_CACHE_DIR", str(tmp_path))
    cpu = torch.device("cpu")
    entry = workspace.Entry(8, 16, ((1,),), (4,))
    workspace.save_workspaces(workspace.Workspaces({"a": entry}), cpu)
    workspace.load_workspaces(cpu).table["mine"] = entry
    with monkeypatch.context() as patch:
        patch.setattr(workspace.json, "loads", lambda _: pytest.fail("read again"))
        assert workspace.load_workspaces(cpu).table == {"a": entry}
    text = json.dumps({"b": [8, 16, [[1]], [4]]})
    workspace.cache_path(cpu).write_text(text + " " * 100)
    assert workspace.load_workspaces(cpu).table == {"b": entry}
