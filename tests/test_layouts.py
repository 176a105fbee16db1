"""Strides of fake results against those of real ones, for every elementwise operator and backward.

A fake result that is laid out otherwise lets a view be traced that does not exist when it runs.
"""

import itertools

import pytest
import torch
from torch._decomp import decomposition_table
from torch._subclasses.fake_tensor import FakeTensorMode

from fxmem._torch.eager import real_layouts

aten = torch.ops.aten

SHAPES = ((3, 2), (3, 2, 1, 1))


def operators():
    """Elementwise operators and backwards of two tensors or more."""
    for name in sorted(dir(aten)):
        packet = getattr(aten, name)
        if not isinstance(packet, torch._ops.OpOverloadPacket):
            continue
        for overload in packet.overloads():
            op = getattr(packet, overload)
            tensors = sum(str(a.type) == "Tensor" for a in op._schema.arguments)
            wanted = torch.Tag.pointwise in op.tags or "backward" in name
            if wanted and tensors > 1 and not op._schema.is_mutable:
                yield op


PLAIN = {"number": 0.5, "float": 0.5, "int": 0, "bool": False}


def calls(op, shape):
    """Arguments for each mix of layouts; nothing for an operator that takes what we cannot guess."""
    straight = tuple(range(len(shape)))
    layouts = (straight, (1, 0, *straight[2:]), straight[::-1])
    required = [a for a in op._schema.arguments if not a.has_default_value()]
    if any(a.kwarg_only or str(a.type) not in ("Tensor", *PLAIN) for a in required):
        return
    places = [n for n, a in enumerate(required) if str(a.type) == "Tensor"]
    for mix in itertools.product(layouts, repeat=len(places)):
        order = dict(zip(places, mix, strict=True))
        yield [
            laid_out(shape, order[n]) if n in order else PLAIN[str(a.type)]
            for n, a in enumerate(required)
        ]


def laid_out(shape, order):
    """Numbers between 0.1 and 0.5, with the dimensions of ``shape`` in ``order`` in memory."""
    tensor = torch.rand([shape[d] for d in order]) * 0.4 + 0.1
    return tensor.permute([order.index(d) for d in range(len(shape))])


def strides(op, args):
    """Of each result, where there is a step to take."""
    result = op(*args)
    results = result if isinstance(result, tuple) else (result,)
    results = [r for r in results if isinstance(r, torch.Tensor)]
    return [[n for n, size in zip(r.stride(), r.shape, strict=True) if size > 1] for r in results]


def fake(args):
    mode = FakeTensorMode()
    with mode:
        return mode, [mode.from_tensor(a) if isinstance(a, torch.Tensor) else a for a in args]


def differs(op):
    for shape in SHAPES:
        for args in calls(op, shape):
            try:
                real = strides(op, args)
            except (RuntimeError, IndexError, TypeError, ValueError):
                return False  # not the arguments that it wants
            mode, fake_args = fake(args)
            with mode:
                try:
                    if strides(op, fake_args) != real:
                        return True
                except torch._subclasses.fake_tensor.DataDependentOutputException:
                    return False
    return False


@pytest.fixture(scope="module")
def candidates():
    found = list(operators())
    assert len(found) > 100
    return found


def test_fake_results_are_laid_out_as_real_ones(candidates):
    with real_layouts():
        assert not {str(op) for op in candidates if differs(op)}


def test_without_care_more_of_them_differ(candidates):
    assert {str(op) for op in candidates if differs(op)} >= {
        "aten.copysign.Tensor",
        "aten.softplus_backward.default",
        "aten._log_softmax_backward_data.default",
        "aten.binary_cross_entropy_backward.default",
    }


def normalized(batch_norm):
    x, ones = torch.randn(2, 4, 6, 3).permute(0, 3, 2, 1), torch.ones(3)
    return batch_norm(x, ones, ones, ones.clone(), ones.clone(), True, 0.1, 1e-5)[0]


LAID_OUT = {
    aten.mse_loss_backward.default: lambda op: op(
        torch.tensor(2.0), torch.randn(6, 4).t(), torch.randn(6, 4).t(), 1
    ),
    aten.native_dropout_backward.default: lambda op: op(
        torch.randn(4, 6), torch.rand(6, 4).t() > 0.3, 1.5
    ),
    aten.native_batch_norm.default: normalized,
}


@pytest.mark.parametrize("op", LAID_OUT, ids=str)
def test_what_is_laid_out_otherwise_has_the_same_values(op):
    """Where somebody copies torch's table meanwhile, its functions compute."""
    torch.manual_seed(0)
    want = LAID_OUT[op](op)
    with real_layouts():
        ours = decomposition_table[op]
    torch.manual_seed(0)
    got = LAID_OUT[op](ours)
    assert got.stride() == want.stride()
    torch.testing.assert_close(got, want)


SCATTERS = {
    "diagonal": lambda v: aten.diagonal_scatter.default(v, v.diagonal(0, 0, 1) * 2, 0, 0, 1),
    "select": lambda v: aten.select_scatter.default(v, v[0] * 2, 0, 0),
    "slice": lambda v: aten.slice_scatter.default(v, v[:, :1] * 2, 1, 0, 1),
}

PLACES = {
    "all": lambda t: t,
    "a part": lambda t: t[3:7, 2:],
    "transposed": lambda t: t.t()[1:],
    "expanded": lambda t: t[0].expand(4, 8),
}


@pytest.mark.parametrize("scatter", SCATTERS)
@pytest.mark.parametrize("place", PLACES)
def test_a_scatter_into_a_view_copies_what_is_behind_the_view(scatter, place):
    def made(tensor):
        result = SCATTERS[scatter](PLACES[place](tensor))
        nbytes = result.untyped_storage().nbytes()
        return nbytes, result.stride(), result.storage_offset()

    with real_layouts(), FakeTensorMode():
        predicted = made(torch.empty(16, 8))
    assert predicted == made(torch.randn(16, 8))
