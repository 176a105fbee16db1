"""Lossless encodings: the operators against aten's, the pass as text, and what forms of a step buy."""

# ruff: noqa: E501 (a node is one line of text, however long)

import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from expecttest import assert_expected_inline
from test_passes import assert_same_outputs, captured, changed, tensor
from torch import nn

import fxmem
from fxmem import encodings
from fxmem.encodings import pool_shape
from fxmem.passes.encode import EncodePass
from fxmem.passes.identities import IdentitiesPass
from fxmem.passes.rectify import RectifyPass
from fxmem.passes.unread import UnreadPass

aten = torch.ops.aten

SHAPES = [(), (0,), (1,), (7,), (8,), (9,), (3, 5, 7, 11), (2, 3, 400, 300)]
"""Empty, single, odd tails, and more than is worked on at a time."""

STRANGE = [math.nan, math.inf, -math.inf, 0.0, -0.0, 1e-45, -1e-45]


def laid_out(x, channels_last):
    return x.contiguous(memory_format=torch.channels_last) if channels_last and x.ndim == 4 else x


def strange(shape, channels_last=False, seed=0):
    x = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    values = torch.tensor(STRANGE[: x.numel()])
    x.view(-1)[: len(values)] = values
    return laid_out(x, channels_last)


def same(a, b):
    """Bit for bit, signs of zeros and what is not a number included."""
    return a.stride() == b.stride() and torch.equal(
        a.contiguous().view(torch.int32), b.contiguous().view(torch.int32)
    )


# -- Operators -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_a_threshold_is_a_bit(shape, channels_last):
    x, grad = strange(shape, channels_last), strange(shape, channels_last, seed=1)
    for threshold in (0, 0.5, -1.0):
        bits = encodings.pack_above(x, threshold)
        assert bits.dtype is torch.uint8
        assert bits.numel() == math.ceil(x.numel() / 8)
        want = aten.threshold_backward(grad, x, threshold)
        assert same(encodings.threshold_backward(grad, bits), want)
        over = grad.clone()
        assert same(encodings.threshold_backward_out(over, bits, grad_input=over), want)


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_a_mask_is_a_bit(shape, channels_last):
    mask = strange(shape, channels_last) > 0
    bits = encodings.pack(mask)
    back = encodings.unpack(bits, mask.shape, mask.stride())
    assert torch.equal(back, mask)
    assert back.stride() == mask.stride()
    grad = strange(shape, channels_last, seed=1)
    want = aten.native_dropout_backward(grad, mask, 1 / 0.9)
    assert same(encodings.dropout_backward(grad, bits, 1 / 0.9), want)


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("kernel", [(1, 1), (2, 2), (3, 3), (2, 3), (5, 4)], ids=str)
def test_the_place_in_a_window_is_a_byte(kernel, channels_last):
    tried = 0
    for stride, padding, dilation, ceil_mode in itertools.product(
        ([], [1, 1], [2, 1], [3, 3]), ([0, 0], [1, 1]), ([1, 1], [2, 2]), (False, True)
    ):
        if padding[0] > min(kernel) // 2:
            continue
        x = strange((3, 2, 12, 9), channels_last)
        x[0, 1] = -math.inf
        out, indices = aten.max_pool2d_with_indices(x, kernel, stride, padding, dilation, ceil_mode)
        how = pool_shape(list(kernel), stride, padding, dilation)
        offsets = encodings.pool_offsets(indices, 9, *how)
        assert offsets.dtype is torch.uint8
        grad = laid_out(torch.randn(out.shape, generator=torch.Generator()), channels_last)
        got = encodings.pool_backward(grad, offsets, x.shape, x.stride(), *how, ceil_mode)
        want = aten.max_pool2d_with_indices_backward(grad, x, *how, ceil_mode, indices)
        assert same(got, want)
        tried += 1
    assert tried >= 8


def test_codes_that_no_pool_made_do_no_harm():
    """Workspaces are measured on zeros, and the first window's first place is in the padding."""
    how = pool_shape([3, 3], [2, 2], [1, 1], [1, 1])
    for value in (0, 8, 255):
        codes = torch.full((1, 1, 4, 4), value, dtype=torch.uint8)
        got = encodings.pool_backward(
            torch.ones(1, 1, 4, 4), codes, [1, 1, 8, 8], [64, 64, 8, 1], *how, False
        )
        assert got.sum() == 16


def test_a_window_of_more_than_a_byte_is_left_alone():
    assert pool_shape([16, 16], [], 0, 1) == [[16, 16], [16, 16], [0, 0], [1, 1]]
    assert pool_shape([16, 17], [], 0, 1) is None


# -- The passes ----------------------------------------------------------------------------------------


def rectified():
    """The first rectifier's result is read by a product's backward, too; the second's is not."""

    def body(m, x):
        return (F.relu(F.relu(x @ m.w) @ m.v) * 2).sum()

    graph = captured(body, tensor(64, 64), w=tensor(64, 64), v=tensor(64, 64))
    return IdentitiesPass().apply(graph)  # the backward reads a copy of a view of each


def test_a_rectifier_leaves_bits():
    graph = rectified()
    after, text = changed(graph, EncodePass())
    assert_expected_inline(
        text,
        """\
+ relu_code: u8[512] = pack_above(relu, 0)
+ relu_1_code: u8[512] = pack_above(relu_1, 0)
- threshold_backward: f32[64, 64] = threshold_backward(mul_1, relu_1, 0)
+ threshold_backward_coded: f32[64, 64] = threshold_backward(mul_1, relu_1_code)
- mm_2: f32[64, 64] = mm(t, threshold_backward)
+ mm_2: f32[64, 64] = mm(t, threshold_backward_coded)
- mm_3: f32[64, 64] = mm(threshold_backward, t_1)
+ mm_3: f32[64, 64] = mm(threshold_backward_coded, t_1)
- threshold_backward_1: f32[64, 64] = threshold_backward(mm_3, relu, 0)
+ threshold_backward_1_coded: f32[64, 64] = threshold_backward(mm_3, relu_code)
- mm_4: f32[64, 64] = mm(t_2, threshold_backward_1)
+ mm_4: f32[64, 64] = mm(t_2, threshold_backward_1_coded)""",
    )
    assert_same_outputs(graph, after)


def test_alone_only_what_nobody_else_reads():
    graph = rectified()
    after, text = changed(graph, EncodePass(alone=True))
    assert_expected_inline(
        text,
        """\
+ relu_1_code: u8[512] = pack_above(relu_1, 0)
- threshold_backward: f32[64, 64] = threshold_backward(mul_1, relu_1, 0)
+ threshold_backward_coded: f32[64, 64] = threshold_backward(mul_1, relu_1_code)
- mm_2: f32[64, 64] = mm(t, threshold_backward)
+ mm_2: f32[64, 64] = mm(t, threshold_backward_coded)
- mm_3: f32[64, 64] = mm(threshold_backward, t_1)
+ mm_3: f32[64, 64] = mm(threshold_backward_coded, t_1)""",
    )
    assert_same_outputs(graph, after)


def pooled():
    def body(m, x):
        return F.avg_pool2d(F.max_pool2d(m.conv(x), 2), 2).square().sum()

    return captured(body, tensor(2, 3, 32, 32), conv=nn.Conv2d(3, 8, 3, padding=1))


def test_pools_look_at_shapes():
    graph = pooled()
    after, text = changed(graph, UnreadPass())
    assert_expected_inline(
        text,
        """\
- avg_pool2d_backward: f32[2, 8, 16, 16] = avg_pool2d_backward(mul_1, getitem, [2, 2], [], [0, 0], False, True, None)
+ avg_pool2d_backward_unread: f32[2, 8, 16, 16] = avg_pool2d_backward(mul_1, [2, 8, 16, 16], [2048, 256, 16, 1], [2, 2], [], [0, 0], False, True, None)
- max_pool2d_with_indices_backward: f32[2, 8, 32, 32] = max_pool2d_with_indices_backward(avg_pool2d_backward, convolution, [2, 2], [], [0, 0], [1, 1], False, getitem_1)
+ max_pool2d_with_indices_backward_unread: f32[2, 8, 32, 32] = max_pool2d_backward(avg_pool2d_backward_unread, getitem_1, [2, 8, 32, 32], [8192, 1024, 32, 1], [2, 2], [], [0, 0], [1, 1], False)
- convolution_backward: (NoneType, f32[8, 3, 3, 3], f32[8]) = convolution_backward(max_pool2d_with_indices_backward, primals_3, primals_1, [8], [1, 1], [1, 1], [1, 1], False, [0, 0], 1, [False, True, True])
+ convolution_backward: (NoneType, f32[8, 3, 3, 3], f32[8]) = convolution_backward(max_pool2d_with_indices_backward_unread, primals_3, primals_1, [8], [1, 1], [1, 1], [1, 1], False, [0, 0], 1, [False, True, True])""",
    )
    assert_same_outputs(graph, after)


def test_a_max_pool_leaves_bytes():
    graph = UnreadPass().apply(pooled())
    after, text = changed(graph, EncodePass())
    assert_expected_inline(
        text,
        """\
+ getitem_1_code: u8[2, 8, 16, 16] = pool_offsets(getitem_1, 32, [2, 2], [2, 2], [0, 0], [1, 1])
- max_pool2d_with_indices_backward_unread: f32[2, 8, 32, 32] = max_pool2d_backward(avg_pool2d_backward_unread, getitem_1, [2, 8, 32, 32], [8192, 1024, 32, 1], [2, 2], [], [0, 0], [1, 1], False)
+ max_pool2d_with_indices_backward_unread_coded: f32[2, 8, 32, 32] = pool_backward(avg_pool2d_backward_unread, getitem_1_code, [2, 8, 32, 32], [8192, 1024, 32, 1], [2, 2], [2, 2], [0, 0], [1, 1], False)
- convolution_backward: (NoneType, f32[8, 3, 3, 3], f32[8]) = convolution_backward(max_pool2d_with_indices_backward_unread, primals_3, primals_1, [8], [1, 1], [1, 1], [1, 1], False, [0, 0], 1, [False, True, True])
+ convolution_backward: (NoneType, f32[8, 3, 3, 3], f32[8]) = convolution_backward(max_pool2d_with_indices_backward_unread_coded, primals_3, primals_1, [8], [1, 1], [1, 1], [1, 1], False, [0, 0], 1, [False, True, True])""",
    )
    assert_same_outputs(graph, after)


def test_a_convolution_and_its_rectifier_are_one():
    def body(m, x):
        return F.relu(m.conv(x)).square().sum()

    graph = captured(body, tensor(2, 3, 8, 8), conv=nn.Conv2d(3, 4, 3))
    after, text = changed(IdentitiesPass().apply(graph), RectifyPass())
    assert_expected_inline(
        text,
        """\
+ relu_joined: f32[2, 4, 6, 6] = convolution_relu(primals_3, primals_1, primals_2, [1, 1], [0, 0], [1, 1], False, [0, 0], 1)
- convolution: f32[2, 4, 6, 6] = convolution(primals_3, primals_1, primals_2, [1, 1], [0, 0], [1, 1], False, [0, 0], 1)
- relu: f32[2, 4, 6, 6] = relu(convolution)
- pow_1: f32[2, 4, 6, 6] = pow(relu, 2)
+ pow_1: f32[2, 4, 6, 6] = pow(relu_joined, 2)
- pow_2: f32[2, 4, 6, 6] = pow(relu, 1.0)
+ pow_2: f32[2, 4, 6, 6] = pow(relu_joined, 1.0)
- threshold_backward: f32[2, 4, 6, 6] = threshold_backward(mul_1, relu, 0)
+ threshold_backward: f32[2, 4, 6, 6] = threshold_backward(mul_1, relu_joined, 0)""",
    )
    assert_same_outputs(graph, after)


def test_a_convolution_that_others_read_stays():
    def body(m, x):
        y = m.conv(x)
        return (F.relu(y) * y).sum()

    graph = captured(body, tensor(2, 3, 8, 8), conv=nn.Conv2d(3, 4, 3))
    assert changed(graph, RectifyPass())[1] == ""


def test_what_is_too_small_or_the_callers_is_left_alone():
    def body(m, x):
        y = F.relu(x @ m.w)
        return (y * 2).sum(), y

    def returned(m, x):
        return body(m, x)[0]

    for function, n, coded in ((returned, 64, True), (returned, 63, False), (body, 64, False)):
        graph = IdentitiesPass().apply(captured(function, tensor(n, n), w=tensor(n, n)))
        assert ("_coded" in changed(graph, EncodePass())[1]) == coded, (function, n)


# -- Steps ---------------------------------------------------------------------------------------------


class Convolutions(nn.Module):
    """As VGG: every rectifier's result is what the next convolution's backward reads."""

    def __init__(self):
        super().__init__()
        widths = (3, 16, 16, 32, 32)
        self.layers = nn.ModuleList(
            nn.Conv2d(a, b, 3, padding=1) for a, b in itertools.pairwise(widths)
        )

    def forward(self, x):
        for i, layer in enumerate(self.layers):
            x = F.relu(layer(x), inplace=True)
            x = F.max_pool2d(x, 2) if i % 2 else x
        return x.square().mean()


def gradients(module, model, x):
    model.zero_grad(set_to_none=True)
    module(x).backward()
    return [p.grad for p in model.parameters()]


@pytest.mark.parametrize("channels_last", [False, True])
def test_codes_lower_the_smallest_peak(channels_last):
    torch.manual_seed(0)
    model = Convolutions()
    x = laid_out(torch.randn(8, 3, 48, 48), channels_last)
    eager = gradients(model, model, x)
    peaks = []
    for allow in (("recompute",), ("recompute", "lossless")):
        opt = fxmem.optimize(model, "min", (x,), allow=allow)
        assert all(map(torch.equal, eager, gradients(opt, model, x)))
        peaks.append(opt.plan.predicted_peak)
    # In channels_last the gradients are laid out otherwise than what they would meet.
    assert peaks[1] < peaks[0] or (channels_last and peaks[1] == peaks[0])


class Strided(nn.Module):
    """Pools that look at overlapping windows, or at one channel many times."""

    def __init__(self, expanded):
        super().__init__()
        self.expanded = expanded
        self.conv = nn.Conv2d(2, 1, 1) if expanded else nn.Conv1d(2, 4, 1)

    def forward(self, x):
        total = 0.0
        for i in range(1, 5):
            y = self.conv(x) * i
            y = y.expand(-1, 32, -1, -1) if self.expanded else y.unfold(2, 64, 8)
            total = total + F.max_pool2d(y, 2).square().mean()
        return total


@pytest.mark.parametrize("allow", [("recompute", "lossless"), ("lossless",)], ids=len)
@pytest.mark.parametrize("expanded", [False, True])
def test_pools_of_overlapping_memory(expanded, allow):
    torch.manual_seed(0)
    model = Strided(expanded)
    x = torch.randn(4, 2, 40, 40) if expanded else torch.randn(4, 2, 1024)
    eager = gradients(model, model, x)
    for budget in ("0.8x", "0.65x", "min"):
        opt = fxmem.optimize(model, budget, (x,), allow=allow, on_infeasible="best")
        assert all(map(torch.equal, eager, gradients(opt, model, x))), budget


@pytest.mark.parametrize("pool", [False, True])
@pytest.mark.parametrize("batch", [1, 4])
def test_one_channel_last(batch, pool):
    """The step of a dimension of size 1 decides which kernel the next convolution takes."""
    torch.manual_seed(0)
    layers = [nn.Conv2d(1, 1, 3), nn.ReLU(), nn.Conv2d(1, 1, 3), nn.ReLU()]
    model = nn.Sequential(*layers, *([nn.MaxPool2d(2)] * pool))
    x = torch.randn(batch, 1, 90, 90).to(memory_format=torch.channels_last)
    call = lambda module: lambda x: module(x).square().mean()  # noqa: E731
    eager = gradients(call(model), model, x)
    for budget in ("2.0x", "0.8x", "min"):
        opt = fxmem.optimize(model, budget, (x,), on_infeasible="best")
        assert all(map(torch.equal, eager, gradients(call(opt), model, x))), budget


def test_a_plan_with_codes_is_replayed(tmp_path):
    torch.manual_seed(0)
    model, x = Convolutions(), torch.randn(8, 3, 48, 48)
    eager = gradients(model, model, x)
    plan = fxmem.plan(model, "min", (x,))
    codes = [d for d in plan.decisions if d.action == "encode"]
    assert codes
    assert all(d.reason.startswith("in place of ") for d in codes)
    plan.save(tmp_path / "plan.json")
    opt = fxmem.optimize(model, plan.predicted_peak, (x,), plan=tmp_path / "plan.json")
    assert opt.plan.predicted_peak == plan.predicted_peak
    assert all(map(torch.equal, eager, gradients(opt, model, x)))
