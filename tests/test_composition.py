"""What people put into a model that has a mind of its own about autograd: equal to eager, or refused."""

import functools

import pytest
import torch
import torch.nn.functional as F
from dynamo import fresh_dynamo
from hazards import differences, mlp, train
from quick import but_slow
from torch import nn
from torch._higher_order_ops.scan import scan
from torch.nn.attention.flex_attention import flex_attention
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    create_selective_checkpoint_contexts,
)

import fxmem
from fxmem import _torch, backend

pytestmark = pytest.mark.filterwarnings("ignore:fxmem. no plan fits")

X = (16, 8)


@pytest.fixture(autouse=True)
def _clean():
    with fresh_dynamo():
        yield


def optimized(model, inputs):
    return fxmem.optimize(model, "min", inputs, on_infeasible="best")


def compiled(model, inputs):
    options = {"budget": "min", "on_infeasible": "best"}
    return torch.compile(model, backend=backend.fxmem, options=options)


PRODUCTS = [torch.ops.aten.mm.default, torch.ops.aten.addmm.default]


class Selective(nn.Module):
    """Products are saved, and all else is made again."""

    policies = (CheckpointPolicy.MUST_SAVE, CheckpointPolicy.PREFER_RECOMPUTE)

    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(8, 8), nn.Dropout(0.5), mlp(depth=1))

    def forward(self, x):
        contexts = functools.partial(by_policy, *self.policies)
        return checkpoint(self.layers, x, use_reentrant=False, context_fn=contexts)


def by_policy(of_products, of_others):
    def policy(ctx, op, *args, **kwargs):
        return of_products if op in PRODUCTS else of_others

    return create_selective_checkpoint_contexts(policy)


class SelectiveOfNothing(Selective):
    policies = (CheckpointPolicy.MUST_RECOMPUTE, CheckpointPolicy.PREFER_RECOMPUTE)


class SelectiveAtWill(Selective):
    policies = (CheckpointPolicy.PREFER_SAVE, CheckpointPolicy.MUST_RECOMPUTE)


class SelectiveByList(Selective):
    def forward(self, x):
        contexts = functools.partial(create_selective_checkpoint_contexts, PRODUCTS)
        return checkpoint(self.layers, x, use_reentrant=False, context_fn=contexts)


class Nested(nn.Module):
    """A checkpoint in a checkpoint."""

    def __init__(self):
        super().__init__()
        self.first, self.layers = nn.Linear(8, 8), mlp(depth=1)

    def forward(self, x):
        return checkpoint(self.outer, x, use_reentrant=False)

    def outer(self, x):
        return checkpoint(self.layers, self.first(x).sin(), use_reentrant=False).cos()


class Reentrant(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.layers = nn.Linear(8, 8), mlp(depth=1)

    def forward(self, x):
        return checkpoint(self.layers, self.first(x), use_reentrant=True)


class HooksInside(nn.Module):
    """What is saved is packed by the model."""

    def __init__(self):
        super().__init__()
        self.layers = mlp(depth=1)

    def forward(self, x):
        with torch.autograd.graph.saved_tensors_hooks(lambda t: t * 2, lambda t: t / 2):
            return self.layers(x)


class OwnGradient(nn.Module):
    """A gradient of torch.func's inside the forward."""

    def __init__(self):
        super().__init__()
        self.layers = mlp(depth=1)

    def forward(self, x):
        slope = torch.func.grad(lambda t: self.layers(t).square().sum())(x)
        return self.layers(x).sum() + slope.square().sum()


class Mapped(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = mlp(depth=1)

    def forward(self, x):
        return torch.func.vmap(lambda row: self.layers(row).tanh())(x)


class MappedDraws(nn.Module):
    """Each row draws its own numbers."""

    def __init__(self):
        super().__init__()
        self.layers = mlp(depth=1)

    def forward(self, x):
        return torch.func.vmap(lambda row: F.dropout(self.layers(row)), randomness="different")(x)


class GradientsByRow(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = mlp(depth=1)

    def forward(self, x):
        def loss(parameters, row):
            return torch.func.functional_call(self.layers, parameters, (row,)).square().sum()

        parameters = dict(self.layers.named_parameters())
        by_row = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0))(parameters, x)
        return self.layers(x).sum() + sum(g.square().sum() for g in by_row.values())


class Jacobians(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = mlp(depth=1)

    def forward(self, x):
        return torch.func.vmap(torch.func.jacrev(self.layers))(x).sum(1).sin()


class Pushed(nn.Module):
    """A derivative forwards inside the forward."""

    def __init__(self):
        super().__init__()
        self.layers = mlp(depth=1)

    def forward(self, x):
        outputs, slopes = torch.func.jvp(self.layers, (x,), (torch.ones_like(x),))
        return outputs.sum() + slopes.square().sum()


class Scanned(nn.Module):
    """A loop in one operator, with a graph of its own."""

    def __init__(self):
        super().__init__()
        self.first = nn.Linear(8, 8)

    def forward(self, x):
        return scan(lambda sums, row: (sums + row.sin(), sums * row), x.new_zeros(8), self.first(x))


class Region(nn.Module):
    """Compiled by itself, once for all such blocks."""

    def __init__(self):
        super().__init__()
        self.linear, self.drop = nn.Linear(8, 8), nn.Dropout(0.5)

    @torch.compiler.nested_compile_region
    def forward(self, x):
        return x + self.drop(self.linear(x).sin())


class Regions(nn.Module):
    def __init__(self):
        super().__init__()
        self.blocks = nn.Sequential(*(Region() for _ in range(3)))

    def forward(self, x):
        return self.blocks(x).cos()


class RegionsWithin(nn.Module):
    """In a region, in a checkpoint, and in what an operator chooses from."""

    def __init__(self):
        super().__init__()
        self.first, self.second, self.third = Regions(), Regions(), Regions().eval()

    @torch.compiler.nested_compile_region
    def in_a_region(self, x):
        return self.first(x).sin()

    def forward(self, x):
        for _ in range(2):
            x = self.in_a_region(x)
        x = checkpoint(self.second, x, use_reentrant=False)
        return torch.cond(x.sum() < 1e9, lambda x: self.third(x), torch.sin, (x,))


class Called(nn.Module):
    """Its layers with other parameters in their place."""

    def __init__(self):
        super().__init__()
        self.layers = mlp(depth=1)

    def forward(self, x):
        doubled = {name: p * 2 for name, p in self.layers.named_parameters()}
        return torch.func.functional_call(self.layers, doubled, (x,))


@torch.library.custom_op("fxmem_test::cubed", mutates_args=())
def cubed(x: torch.Tensor) -> torch.Tensor:
    return x * x * x


cubed.register_fake(torch.empty_like)
cubed.register_autograd(
    lambda ctx, g: g * 3 * ctx.saved_tensors[0].square(),
    setup_context=lambda ctx, inputs, output: ctx.save_for_backward(*inputs),
)


class OwnOperator(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = mlp(depth=1)

    def forward(self, x):
        return self.layers(cubed(x.sin())).cos()


class Doubled(torch.autograd.Function):
    """Marks what has no gradient, is given None, and keeps what is no tensor."""

    @staticmethod
    def forward(ctx, x, by, nothing):
        ctx.by = by
        ctx.save_for_backward(x, x.sign())
        signs = x.sign()
        ctx.mark_non_differentiable(signs)
        return x.abs() * by, signs

    @staticmethod
    def backward(ctx, gradient, _):
        _, signs = ctx.saved_tensors
        return gradient * signs * ctx.by, None, None


class OwnFunction(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = mlp(depth=1)

    def forward(self, x):
        value, signs = Doubled.apply(self.layers(x), 2.0, None)
        return value * signs.detach()


class InPlace(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.mark_dirty(x)
        x.mul_(2)
        return x

    @staticmethod
    def backward(ctx, gradient):
        return 2 * gradient


class Unsent(torch.autograd.Function):
    """Is given None for what nobody sends a gradient into."""

    @staticmethod
    def forward(ctx, x, y):
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(x, y)
        return x * y, x + y

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, product, total):
        x, y = ctx.saved_tensors
        rest = 0 if total is None else total
        return product * y + rest, product * x + rest


class Drawing(torch.autograd.Function):
    """Draws in its forward."""

    @staticmethod
    def forward(x, share):
        mask = (torch.rand_like(x) > share).to(x.dtype)
        return x * mask, mask

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(output[1])

    @staticmethod
    def backward(ctx, gradient, _):
        return gradient * ctx.saved_tensors[0], None


class DrawingBackwards(torch.autograd.Function):
    """Draws in its backward, before it reads a gradient."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x.sin()

    @staticmethod
    def backward(ctx, gradient):
        (x,) = ctx.saved_tensors
        noise = 0.1 * torch.randn(gradient.shape)
        return gradient * F.dropout(x.cos()) + noise


class NoiseInBackward(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.layers = nn.Linear(8, 8), mlp(depth=1)

    def forward(self, x):
        return self.layers(DrawingBackwards.apply(DrawingBackwards.apply(self.first(x))))


class BranchUnderModes(nn.Module):
    """A choice by what is computed, under ``no_grad`` and autocast: it does not run on fake tensors."""

    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x):
        x = self.first(x)
        with torch.no_grad():
            scale = torch.cond(x.sum() > 0, torch.sin, torch.cos, (x,))
        with torch.autocast("cpu", torch.bfloat16):
            y = torch.cond(x.sum() > 0, self.last, lambda x: self.last(x).cos(), (x * scale,))
        return self.last(y.float())


class OwnFunctions(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.layers = nn.Linear(8, 8), mlp(depth=1)

    def forward(self, x):
        x = InPlace.apply(self.first(x).sin())
        x, _ = Unsent.apply(x.sin(), x.cos())
        x, mask = Drawing.apply(x.tanh(), 0.5)
        return self.layers(x) + mask.sum()


WORKS = (
    Selective,
    Reentrant,
    OwnOperator,
    OwnFunctions,
    MappedDraws,
    Scanned,
    Regions,
    RegionsWithin,
    NoiseInBackward,
    BranchUnderModes,
)
WORKS_TOO = (
    SelectiveOfNothing,
    SelectiveAtWill,
    SelectiveByList,
    Nested,
    OwnGradient,
    GradientsByRow,
    Jacobians,
    Pushed,
    Mapped,
    Called,
    OwnFunction,
)


@pytest.mark.parametrize("apply", [optimized, compiled])
@pytest.mark.parametrize("make", but_slow([*WORKS, *WORKS_TOO], WORKS))
def test_it_works(make, apply):
    found = []
    for how in (lambda model, inputs: model, apply):
        torch.manual_seed(0)
        model, x = make(), torch.randn(X)
        found.append(train(how(model, (x,)), (x,)))
    wrong = differences(*found)
    assert not wrong, "\n".join(wrong)


def assert_refused_but_by_the_backend(model, x, words):
    with pytest.raises(fxmem.CaptureError, match=words) as caught:
        optimized(model, (x,))
    assert 'torch.compile(model, backend="fxmem")' in str(caught.value)
    want = train(model, (x,))
    model.zero_grad()
    assert not differences(want, train(compiled(model, (x,)), (x,)))


def test_hooks_inside_are_refused_with_a_way_out_that_works():
    torch.manual_seed(0)
    assert_refused_but_by_the_backend(HooksInside(), torch.randn(X), "hooks around the call")


def test_backward_hooks_of_modules_are_refused_with_ways_out_that_work():
    torch.manual_seed(0)
    model, x = mlp(depth=1), torch.randn(X)
    hook = model[0].register_full_backward_hook(lambda module, inner, outer: (inner[0],))
    assert_refused_but_by_the_backend(model, x, "take the module's backward hook off")
    hook.remove()
    doubled = model[0].weight.register_hook(lambda gradient: 2 * gradient)
    model.zero_grad()
    step = optimized(model, (x,))
    want = train(model, (x,))
    model.zero_grad()
    assert not differences(want, train(step, (x,)))
    doubled.remove()


class SavedOnCpu(HooksInside):
    def forward(self, x):
        with torch.autograd.graph.save_on_cpu():
            return self.layers(x)


class Flexible(nn.Module):
    """Attention whose scores the model changes."""

    def __init__(self):
        super().__init__()
        self.first = nn.Linear(8, 8)

    def forward(self, x):
        heads = self.first(x).reshape(1, 2, 8, 8)
        return flex_attention(heads, heads, heads, lambda score, b, h, i, j: score + 0.1 * (i - j))


@pytest.mark.parametrize(
    ("make", "text"),
    [
        (SavedOnCpu, "enter the hooks around the call"),
        (Flexible, "NotImplementedError: FlexAttention does not support backward on CPU"),
    ],
)
def test_what_does_not_work_is_refused_in_the_words_of_its_cause(make, text):
    model, x = make(), torch.randn(X)
    with pytest.raises(fxmem.CaptureError) as caught:
        optimized(model, (x,))
    assert text in str(caught.value)


def test_flex_attention_trains_nowhere_on_the_cpu_and_evaluates_as_it_is():
    model, x = Flexible(), torch.randn(X)
    for step in (model, compiled(model, (x,))):
        with pytest.raises(NotImplementedError, match="does not support backward on CPU"):
            step(x)
    with torch.no_grad():
        want = torch.compile(model, backend="aot_eager")(x)
        assert torch.equal(compiled(model, (x,))(x), want)


def test_hooks_of_all_modules_count_from_when_they_are_there():
    model, x = mlp(depth=1), torch.randn(X)
    step = optimized(model, (x,))
    assert torch.equal(step(x), model(x))

    def doubled(module, args, output):
        return output * 2 if isinstance(module, nn.Linear) else None

    hook = torch.nn.modules.module.register_module_forward_hook(doubled)
    try:
        assert torch.equal(step(x), model(x))
    finally:
        hook.remove()
    assert torch.equal(step(x), model(x))


def test_what_a_thread_has_set_is_kept_where_a_trace_fails():
    def failing():
        torch.set_grad_enabled(False)
        torch.autocast("cpu", torch.float16).__enter__()
        raise ValueError

    with pytest.raises(ValueError), _torch.modes_kept():  # noqa: PT011
        failing()
    assert torch.is_grad_enabled()
    assert not torch.is_autocast_enabled("cpu")
    assert torch.get_autocast_dtype("cpu") == torch.bfloat16
    assert torch.autocast_increment_nesting() == 1
    torch.autocast_decrement_nesting()


class DrawsInABranch(nn.Module):
    def __init__(self):
        super().__init__()
        self.first = nn.Linear(8, 8)

    def forward(self, x):
        return torch.cond(x.sum() < 1e9, F.dropout, torch.sin, (self.first(x),))


class DrawsInAMap(DrawsInABranch):
    def forward(self, x):
        return torch._higher_order_ops.map(lambda row: F.dropout(row).sin(), self.first(x))


@pytest.mark.parametrize("make", [DrawsInABranch, DrawsInAMap])
def test_what_draws_other_numbers_in_its_backward_is_refused(make):
    x = torch.randn(X)
    for apply in (optimized, compiled):
        with pytest.raises(fxmem.CaptureError, match="draws other numbers then") as caught:
            apply(make(), (x,))(x)
        assert "try     drawing before" in str(caught.value)
        assert "test_composition.py" in str(caught.value)


def test_what_the_model_itself_raises_is_quoted():
    class Picky(nn.Linear):
        def forward(self, x):
            if x.shape[0] > 1:
                raise ValueError("one row, and one alone")
            return super().forward(x)

    with pytest.raises(fxmem.CaptureError) as caught:
        optimized(Picky(8, 8), (torch.randn(X),))
    assert "reason  ValueError: one row, and one alone\n" in str(caught.value)
    assert "without fxmem" in str(caught.value)


def test_an_error_inside_vmap_leaves_no_level_of_it_on(monkeypatch):
    def failing(*_):
        torch._C._functorch._vmap_increment_nesting(16, "error")
        raise RuntimeError("in the middle of it")

    monkeypatch.setattr(_torch, "aot_export_joint_with_descriptors", failing)
    with pytest.raises(fxmem.CaptureError, match="in the middle of it"):
        optimized(Mapped(), (torch.randn(X),))
    assert torch._C._functorch.get_dynamic_layer_stack_depth() == 0


@pytest.mark.parametrize(
    "strided",
    [
        lambda h: F.adaptive_avg_pool2d(h, 1).flatten(1),
        lambda h: F.adaptive_avg_pool3d(h.unsqueeze(2), 1).flatten(1),
        lambda h: h.sin().transpose_(2, 3).mean((2, 3)),
        lambda h: h.sin().unsqueeze_(0).squeeze_(0).mean((2, 3)),
    ],
    ids=["pool2d", "pool3d", "transpose_", "squeeze_"],
)
def test_operators_that_set_strides_are_captured(strided):
    """They look whether the storage is large enough; that of a wrapper while it is traced has no bytes."""

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(3, 8, 3, padding=1)

        def forward(self, x):
            return strided(self.conv(x).relu()).square().mean()

    model = Net().to(memory_format=torch.channels_last)
    x = torch.randn(4, 3, 6, 6).to(memory_format=torch.channels_last)
    step = fxmem.optimize(model, "2x", (x,))
    model(x).backward()
    exact = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    step(x).backward()
    assert all(torch.equal(p.grad, g) for p, g in zip(model.parameters(), exact, strict=True))
