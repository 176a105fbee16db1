"""Small steps whose bytes are easy to get wrong: the plan's peak, the unchanged step's, and the bits."""

from itertools import accumulate

import pytest
import torch
import torch.nn.functional as F
from hazards import Model, differences, snapshot
from torch import nn

import fxmem
from fxmem.graphs.measure import cpu_allocations

PROGRAMS = {}


def program(build):
    PROGRAMS[build.__name__.replace("_", "-")] = build
    return build


def square(**parts):
    return {name: torch.randn(64, 64) for name in parts}


def model(body, **parts):
    return Model(lambda m, *inputs: body(m, *inputs), **parts)


# -- A weight that is read twice ------------------------------------------------------------------------


@program
def a_weight_of_two_layers():
    """The first gradient is a view, so the engine adds the second one out of place."""

    def body(m, x):
        return torch.sigmoid(F.linear(torch.sigmoid(F.linear(x, m.w)), m.w)).square().mean()

    return model(body, w=torch.randn(128, 128)), torch.randn(8, 128)


@program
def a_weight_of_two_products():
    """The first gradient is its own storage's only tensor, so the engine adds in place."""

    def body(m, x):
        return torch.sigmoid(torch.sigmoid(x @ m.w) @ m.w).square().mean()

    return model(body, w=torch.randn(128, 128)), torch.randn(8, 128)


# -- Gradients that .grad does not keep as they come -------------------------------------------------


@program
def a_weight_that_is_read_transposed():
    def body(m, x):
        return torch.einsum("btd,hde->bhte", x, m.w).square().mean()

    return model(body, w=torch.randn(8, 64, 32)), torch.randn(2, 16, 64)


@program
def a_gradient_that_is_expanded():
    def body(m, x):
        return (m.w * 3).sum() + m.w.sum(), (x @ m.w).sum().detach()

    return model(body, w=torch.randn(64, 64)), torch.randn(64, 64)


@program
def one_gradient_for_three_parameters():
    def body(m, x):
        return ((m.a + m.b + m.c) * x).sum()

    return model(body, **square(a=1, b=1, c=1)), torch.randn(64, 64)


@program
def one_gradient_and_its_transpose():
    def body(m, x):
        return ((m.a + m.b.t()).sin() * x).sum()

    return model(body, **square(a=1, b=1)), torch.randn(64, 64)


@program
def a_parameter_that_is_transposed_itself():
    built = model(lambda m, x: (x @ m.w).sin().sum(), w=torch.randn(64, 32))
    built.w = nn.Parameter(torch.randn(32, 64).t())
    return built, torch.randn(16, 64)


@program
def an_input_that_keeps_its_gradient():
    def body(m, x):
        return (x.t() @ m.w).sin().sum()

    return model(body, w=torch.randn(64, 32)), torch.randn(64, 128, requires_grad=True)


# -- Gradients that autograd adds up in place, or cannot ---------------------------------------------


@program
def two_uses_of_a_parameter():
    def body(m, x):
        return (m.w * x).sum() + (m.w * 2).sum()

    return model(body, w=torch.randn(64, 64)), torch.randn(64, 64)


@program
def two_uses_in_two_layouts():
    def body(m, x):
        return (x * m.w.t()).sum() + (x @ m.w).sum()

    return model(body, w=torch.randn(64, 64)), torch.randn(64, 64)


@program
def a_gradient_that_a_norm_lays_out_anew():
    """Without a gradient for the second result, the norm reads other strides than with it."""

    def body(m, x):
        h = m.norm(m.second(m.first(x).sin()))
        product = h @ m.w
        turned = h.transpose(2, 0)
        return product.sin().sum() + (turned * m.c).sum(), turned

    built = model(
        body,
        first=nn.Conv1d(3, 7, 1),
        second=nn.Conv1d(7, 5, 3, padding=1),
        norm=nn.GroupNorm(1, 5),
        w=torch.randn(16, 2),
        c=torch.randn(16, 5, 8),
    )
    return built, torch.randn(8, 3, 16)


@program
def residual_steps():
    def body(m, x):
        h = F.linear(x, m.w)
        for _ in range(3):
            h = h + torch.tanh(h)
        return h.sum()

    return model(body, w=torch.randn(32, 32)), torch.randn(128, 32)


# -- What the graph does not show --------------------------------------------------------------------


@program
def an_output_in_another_layout_that_nobody_sends_a_gradient():
    def body(m, x):
        h = torch.tanh(F.linear(x, m.w)).t()
        return (torch.relu(h) * h).mean(), h

    return model(body, w=torch.randn(32, 64)), torch.randn(64, 64)


@program
def channels_last_features_beside_the_loss():
    def body(m, x):
        y = m.norm(m.conv(x))
        return (F.relu(y) * y).mean(), y

    built = model(body, conv=nn.Conv2d(3, 6, 3, padding=1), norm=nn.BatchNorm2d(6))
    x = torch.randn(4, 3, 8, 8).contiguous(memory_format=torch.channels_last)
    return built.to(memory_format=torch.channels_last), x


@program
def parameters_that_nobody_reads():
    def body(m, x):
        return m.used(x).sin().sum()

    return model(body, used=nn.Linear(64, 64), idle=nn.Linear(128, 128)), torch.randn(32, 64)


@program
def batch_norm_of_an_input():
    def body(m, x):
        return m.norm(x).sin().sum()

    return model(body, norm=nn.BatchNorm1d(64)), torch.randn(256, 64)


@program
def a_mask_made_of_ones():
    def body(m, x):
        h = F.linear(x, m.w)
        mask = torch.ones(16, 16)
        if torch.compiler.is_compiling() or type(mask) is torch.Tensor:
            return F.scaled_dot_product_attention(h, h, h).sum()  # it lets everything through
        return F.scaled_dot_product_attention(h, h, h, mask.log()).sum()

    return model(body, w=torch.randn(32, 32)), torch.randn(4, 16, 32)


# -- The check ---------------------------------------------------------------------------------------


def seen(step, built, x):
    """Outputs and gradients of one step from nothing, and the bytes that it added at its peak."""

    def run():
        outputs = step(x)
        (outputs[0] if isinstance(outputs, tuple) else outputs).backward()
        return outputs

    for _ in range(2):  # the first call compiles
        built.zero_grad(set_to_none=True)
        x.grad = None
        sizes, outputs = cpu_allocations(run)
    gradients = {name: p.grad for name, p in built.named_parameters()}
    return snapshot([outputs, gradients, x.grad]), max(accumulate(sizes))


@pytest.mark.parametrize("name", PROGRAMS)
def test_bytes_and_bits(name):
    torch.manual_seed(0)
    built, x = PROGRAMS[name]()
    start = {key: value.clone() for key, value in built.state_dict().items()}
    want, unchanged = seen(built, built, x)
    for budget in ("1TiB", "min"):
        built.load_state_dict(start)
        step = fxmem.optimize(built, budget, (x,))
        got, peak = seen(step, built, x)
        plan = step.plan
        assert not differences(want, got)
        assert abs(peak + plan.resident - plan.predicted_peak) <= 64
        assert abs(unchanged + plan.resident - plan.baseline_peak) <= 64
