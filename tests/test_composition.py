"""What people put into a model that has a mind of its own about autograd: equal to eager, or refused."""

import pytest
import torch
from dynamo import fresh_dynamo
from hazards import differences, mlp, train
from torch import nn
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    create_selective_checkpoint_contexts,
)

import fxmem
from fxmem import backend

pytestmark = pytest.mark.filterwarnings("ignore:fxmem. no plan fits")

X = (16, 8)


@pytest.fixture(autouse=True)
def _clean():
    with fresh_dynamo():
        yield


def optimized(model, inputs):
    return fxmem.optimize(model, "0.9x", inputs, on_infeasible="best")


def compiled(model, inputs):
    options = {"budget": "0.9x", "on_infeasible": "best"}
    return torch.compile(model, backend=backend.fxmem, options=options)


class Selective(nn.Module):
    """Products are saved, and all else is made again."""

    def __init__(self):
        super().__init__()
        self.layers = mlp(depth=1)

    def forward(self, x):
        return checkpoint(self.layers, x, use_reentrant=False, context_fn=products_saved)


def products_saved():
    def policy(ctx, op, *args, **kwargs):
        products = (torch.ops.aten.mm.default, torch.ops.aten.addmm.default)
        return CheckpointPolicy.MUST_SAVE if op in products else CheckpointPolicy.PREFER_RECOMPUTE

    return create_selective_checkpoint_contexts(policy)


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


WORKS = (Selective, Reentrant, OwnOperator)
WORKS_TOO = (OwnGradient, Mapped, Called, OwnFunction)


@pytest.mark.parametrize("apply", [optimized, compiled])
@pytest.mark.parametrize(
    "make", [*WORKS, *(pytest.param(make, marks=pytest.mark.slow) for make in WORKS_TOO)]
)
def test_it_works(make, apply):
    found = []
    for how in (lambda model, inputs: model, apply):
        torch.manual_seed(0)
        model, x = make(), torch.randn(X)
        found.append(train(how(model, (x,)), (x,)))
    wrong = differences(*found)
    assert not wrong, "\n".join(wrong)


def test_hooks_inside_are_refused_with_a_way_out_that_works():
    torch.manual_seed(0)
    model, x = HooksInside(), torch.randn(X)
    with pytest.raises(fxmem.CaptureError, match="hooks around the call") as caught:
        optimized(model, (x,))
    assert 'torch.compile(model, backend="fxmem")' in str(caught.value)
    want = train(model, (x,))
    model.zero_grad()
    assert not differences(want, train(compiled(model, (x,)), (x,)))
