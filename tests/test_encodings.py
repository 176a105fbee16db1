"""Lossless encodings: the operators against aten's, the pass as text, and what forms of a step buy."""

# ruff: noqa: E501 (a node is one line of text, however long)

import copy
import dataclasses
import itertools
import math
import random

import pytest
import torch
import torch.nn.functional as F
from expecttest import assert_expected_inline
from families import FAMILIES
from hazards import differences, train
from quick import but_slow
from test_engine import capture_once
from test_passes import assert_same_outputs, captured, changed, tensor
from test_simulate import rewritten
from torch import nn

import fxmem
from fxmem.basics.sizes import by_stride
from fxmem.codes import encodings, lossless
from fxmem.codes.encodings import pool_shape
from fxmem.codes.lossless import ELEMENTS, LOSSLESS
from fxmem.passes.encode import EncodePass
from fxmem.passes.identities import IdentitiesPass
from fxmem.passes.recompute import Recompute, RecomputePass
from fxmem.passes.rectify import RectifyPass
from fxmem.passes.uncode import UncodePass
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


def order(x):
    return by_stride(x.shape, x.stride())


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
        assert same(encodings.threshold_backward(grad, bits, order(x)), want)
        over = grad.clone()
        assert same(encodings.threshold_backward_out(over, bits, order(x), grad_input=over), want)


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
    assert same(encodings.dropout_backward(grad, bits, order(mask), 1 / 0.9), want)


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


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_a_clipped_or_leaky_element_is_a_bit(shape):
    x, grad = strange(shape), strange(shape, seed=1)
    bits = encodings.pack_positive(x)
    for slope in (0.01, 1.5):
        want = aten.leaky_relu_backward(grad, x, slope, False)
        assert same(encodings.leaky_relu_backward(grad, bits, order(x), slope), want)
        over = grad.clone()
        assert same(
            encodings.leaky_relu_backward_out(over, bits, order(x), slope, grad_input=over), want
        )


def layouts():
    """Gradients of one shape: in both orders, with gaps, and all of one element."""
    whole = strange((6, 8, 10, 12))
    dense = whole[:3, :4, :5, :6].contiguous()
    yield from (dense, laid_out(dense, True), whole[::2, ::2, ::2, ::2])
    yield torch.ones(()).expand(3, 4, 5, 6)


@pytest.mark.parametrize("channels_last", [False, True])
def test_a_gradient_may_be_laid_out_otherwise(channels_last):
    """Where other results than expected get a gradient, it is another sum."""
    x = strange((3, 4, 5, 6), channels_last, seed=1)
    mask = x > 0
    above, masked = encodings.pack_above(x, 0), encodings.pack(mask)
    for grad in layouts():
        where = order(x)
        for got, want in (
            (encodings.threshold_backward(grad, above, where), aten.threshold_backward(grad, x, 0)),
            (
                encodings.leaky_relu_backward(grad, masked, where, 0.1),
                aten.leaky_relu_backward(grad, x, 0.1, False),
            ),
            (
                encodings.dropout_backward(grad, masked, where, 2.0),
                aten.native_dropout_backward(grad, mask, 2.0),
            ),
        ):
            assert same(got, want)
        over = torch.empty_strided(grad.shape, x.stride())
        encodings.threshold_backward_out(grad, above, where, grad_input=over)
        assert torch.equal(over.nan_to_num(), aten.threshold_backward(grad, x, 0).nan_to_num())


@pytest.mark.parametrize(
    ("most", "dtype"),
    [
        (0, torch.uint8),
        (255, torch.uint8),
        (256, torch.int16),
        (2**15 - 1, torch.int16),
        (2**15, torch.int32),
        (2**31 - 1, torch.int32),
        (2**31, torch.int64),
    ],
)
def test_integers_take_what_the_largest_needs(most, dtype):
    assert encodings.short_type(most) is dtype
    ids = torch.tensor([[0, most // 2], [1, most]]).t()[:, :1].clamp(max=most)
    back = encodings.lengthen(encodings.shorten(ids, dtype), torch.int64)
    assert torch.equal(back, ids)


def test_a_code_takes_the_bytes_that_are_stated():
    x = torch.randn(1001)
    makers = {
        "above": lambda: encodings.pack_above(x, 0),
        "positive": lambda: encodings.pack_positive(x),
        "mask": lambda: encodings.pack(x > 0),
        "offset": lambda: encodings.pool_offsets(
            torch.zeros(7, 11, 13, dtype=torch.int64), 26, [2, 2], [2, 2], [0, 0], [1, 1]
        ),
    }
    for size, dtype in ((1, torch.uint8), (2, torch.int16), (4, torch.int32)):
        makers[f"short {size}"] = lambda dtype=dtype: encodings.shorten(torch.arange(1001), dtype)
    assert set(makers) == {encoding.name for encoding in LOSSLESS}
    for encoding in LOSSLESS:
        assert makers[encoding.name]().nbytes == encoding.nbytes.subs(ELEMENTS, 1001)


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
+ threshold_backward_coded: f32[64, 64] = threshold_backward(mul_1, relu_1_code, [0, 1])
- mm_2: f32[64, 64] = mm(t, threshold_backward)
+ mm_2: f32[64, 64] = mm(t, threshold_backward_coded)
- mm_3: f32[64, 64] = mm(threshold_backward, t_1)
+ mm_3: f32[64, 64] = mm(threshold_backward_coded, t_1)
- threshold_backward_1: f32[64, 64] = threshold_backward(mm_3, relu, 0)
+ threshold_backward_1_coded: f32[64, 64] = threshold_backward(mm_3, relu_code, [0, 1])
- mm_4: f32[64, 64] = mm(t_2, threshold_backward_1)
+ mm_4: f32[64, 64] = mm(t_2, threshold_backward_1_coded)""",
    )
    assert_same_outputs(graph, after)


def test_what_reads_a_code_that_is_made_there_reads_its_operand():
    coded = EncodePass().apply(rectified())
    graph = RecomputePass(
        (
            Recompute("relu_1", "threshold_backward_coded"),
            Recompute("relu_1_code", "threshold_backward_coded"),
        ),
        frozenset({"mm", "mm_1", "relu", "relu_code"}),
    ).apply(coded)
    after, text = changed(graph, UncodePass())
    assert_expected_inline(
        text,
        """\
- relu_1_code_recompute: u8[512] = pack_above(relu_1_recompute, 0)
- threshold_backward_coded: f32[64, 64] = threshold_backward(mul_1, relu_1_code_recompute, [0, 1])
+ threshold_backward_coded_plain: f32[64, 64] = threshold_backward(mul_1, relu_1_recompute, 0)
- mm_2: f32[64, 64] = mm(t, threshold_backward_coded)
+ mm_2: f32[64, 64] = mm(t, threshold_backward_coded_plain)
- mm_3: f32[64, 64] = mm(threshold_backward_coded, t_1)
+ mm_3: f32[64, 64] = mm(threshold_backward_coded_plain, t_1)""",
    )
    assert_same_outputs(rectified(), after)
    assert changed(graph, UncodePass(frozenset({"threshold_backward_coded"})))[1] == ""


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


def test_a_mask_of_any_reader_is_unpacked_for_it():
    def body(m, x):
        return torch.where(x > 0.5, x @ m.w, 0.0).sum()

    graph = captured(body, tensor(64, 64), w=tensor(64, 64))
    after, text = changed(graph, EncodePass())
    assert_expected_inline(
        text,
        """\
+ gt_code: u8[512] = pack(gt)
+ where_1_decoded: bool[64, 64] = unpack(gt_code, [64, 64], [64, 1])
- where_1: f32[64, 64] = where(gt, expand, scalar_tensor_1)
+ where_1: f32[64, 64] = where(where_1_decoded, expand, scalar_tensor_1)""",
    )
    assert_same_outputs(graph, after)


def test_indices_into_a_dimension_are_short():
    def body(m, x):
        return (x @ m.w).topk(33, 1).values.square().sum()

    graph = captured(body, tensor(128, 64), w=tensor(64, 64))
    after, text = changed(graph, EncodePass())
    assert_expected_inline(
        text,
        """\
+ getitem_1_code: u8[128, 33] = shorten(getitem_1, torch.uint8)
+ scatter_decoded: i64[128, 33] = lengthen(getitem_1_code, torch.int64)
- scatter: f32[128, 64] = scatter(new_zeros, 1, getitem_1, mul_1)
+ scatter: f32[128, 64] = scatter(new_zeros, 1, scatter_decoded, mul_1)""",
    )
    assert_same_outputs(graph, after)


@pytest.mark.parametrize(
    ("act", "coded"),
    [
        (F.leaky_relu, "pack_positive"),
        (lambda x: F.threshold(x, 0.1, 0.0), "pack_above"),
    ],
)
def test_other_activations_leave_bits(act, coded):
    graph = captured(lambda m, x: act(x @ m.w).sin().sum(), tensor(64, 64), w=tensor(64, 64))
    after, text = changed(graph, EncodePass())
    assert coded in text
    assert_same_outputs(graph, after)


@pytest.mark.parametrize(
    "act",
    [
        lambda x: F.threshold(
            x.bfloat16(), 0.3, 0.0
        ),  # compared in float32 with what bfloat16 rounds
        F.hardtanh,  # what is not a number gets a gradient or none by where it stands
    ],
)
def test_no_bits_where_a_kernel_asks_more_than_one_question(act):
    graph = captured(lambda m, x: act(x @ m.w).sin().sum(), tensor(64, 64), w=tensor(64, 64))
    _, text = changed(graph, EncodePass())
    assert text == ""


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_bounds_that_a_type_holds(dtype):
    """Next to zero and to a half, on either side."""
    steps = torch.arange(-2, 3, dtype=dtype) * torch.finfo(dtype).tiny
    for bound in (0.0, 0.5):
        x = torch.cat([steps, steps * 2**10 + 0.5]).to(dtype).repeat(500)
        grad = torch.ones_like(x)
        bits = encodings.pack_above(x, bound)
        want = aten.threshold_backward(grad, x, bound)
        assert torch.equal(encodings.threshold_backward(grad, bits, [0]), want)


def test_a_gradient_that_is_laid_out_otherwise_meets_its_bits():
    def body(m, x):
        return (F.relu(x @ m.w).t().contiguous() @ m.v).sum()

    graph = captured(body, tensor(64, 64), w=tensor(64, 64), v=tensor(64, 64))
    graph = IdentitiesPass().apply(graph)
    after, text = changed(graph, EncodePass())
    assert "threshold_backward(t_3, relu_code, [0, 1])" in text
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
@pytest.mark.parametrize("expanded", but_slow([False, True], [True]))
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
    plan = fxmem.plan(model, "min", (x,), allow=("lossless",))
    codes = [d for d in plan.decisions if d.action == "encode"]
    assert codes
    assert all(d.reason.startswith("in place of ") for d in codes)
    plan.save(tmp_path / "plan.json")
    opt = fxmem.optimize(model, plan.predicted_peak, (x,), plan=tmp_path / "plan.json")
    assert opt.plan.predicted_peak == plan.predicted_peak
    assert all(map(torch.equal, eager, gradients(opt, model, x)))


CODED = ("resnet", "unet-dropout", "densenet-dropout", "gpt2-dropout", "encdec-dropout")


@pytest.mark.parametrize("name", but_slow(CODED, CODED[:3]))
def test_any_choice_of_codes_gives_the_bits_in_the_bytes(name, monkeypatch):
    monkeypatch.setattr(lossless, "LEAST", 1)
    model, args, kwargs = FAMILIES[name].build("tiny")
    start = copy.deepcopy(model.state_dict())

    def seen(step):
        model.load_state_dict(start)
        model.zero_grad(set_to_none=True)
        return train(step, args, kwargs)

    rng, wrong = random.Random(name), []
    with capture_once(model, args, kwargs) as found:
        coded = dataclasses.replace(found, analysis=found.analysis.coded)
        assert coded.analysis is not found.analysis
        whole, planner = coded.decide("1TiB"), coded.analysis.planner
        candidates, codes = planner.simulator.candidates(), planner.simulator.codes
        assert len(codes) >= 2
        steps = [coded.compile(whole)]
        for share in (0.0, 0.3, 0.6):
            kept = [v for v in candidates if rng.random() < (0.5 if v in codes else share)]
            planned, line = rewritten(coded, whole, planner.choice(kept))
            steps.append(coded.compile(planned))
            peak, real = planner.choice(kept).outcome.peak, line.peak({}).nbytes
            wrong += [f"{share}: {real} bytes of {peak}"] * (real > peak)
    want = seen(steps[0])
    for step in steps[1:]:
        wrong += differences(want, seen(step))
    assert not wrong, "\n".join(wrong)


def test_in_a_plan_codes_are_kept_where_they_pay():
    """Some values of the same kind as such, others as they are."""
    torch.manual_seed(0)
    model, x = Convolutions(), torch.randn(8, 3, 48, 48)
    with capture_once(model, (x,)) as found:
        planner = found.analysis.coded.planner
        codes = planner.simulator.codes
        low, high = planner.smallest().outcome.peak, planner.keep_all().outcome.peak
        kept = set()
        for n in range(9):
            plan = planner.fit(low + (high - low) * n // 8)
            kept.add(len(codes & plan.kept))
            plain = found.analysis.planner.fit(low + (high - low) * n // 8)
            assert plain is None or plan.outcome.seconds <= 1.001 * plain.outcome.seconds + 1e-5
        assert 0 in kept
        assert any(0 < n < len(codes) for n in kept)
        assert planner.keep_all().outcome.seconds == 0
        assert planner.flow.seconds == pytest.approx(found.analysis.flow.seconds)


@pytest.mark.parametrize("allow", [("lossless",), ()])
def test_codes_without_recomputation(allow):
    torch.manual_seed(0)
    model, x = Convolutions(), torch.randn(8, 3, 48, 48)
    eager = gradients(model, model, x)
    opt = fxmem.optimize(model, "min", (x,), allow=allow)
    assert all(map(torch.equal, eager, gradients(opt, model, x)))
    actions = {d.action for d in opt.plan.decisions}
    assert "recompute" not in actions
    assert ("encode" in actions) == ("lossless" in allow)
    assert (opt.plan.predicted_peak < opt.plan.keep_all_peak) == ("lossless" in allow)
