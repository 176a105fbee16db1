"""Shapes and strides, held to what real tensors say."""

import math

import torch
from hypothesis import given
from hypothesis import strategies as st

from fxmem.basics.sizes import can_view

SIZES = st.lists(st.sampled_from([1, 1, 2, 2, 3, 4]), min_size=1, max_size=5)


@st.composite
def views(draw):
    """A tensor without data, in any layout, and a shape of as many elements."""
    shape = draw(SIZES)
    order = draw(st.permutations(range(len(shape))))
    tensor = torch.empty([shape[d] for d in order], device="meta")
    tensor = tensor.permute([order.index(d) for d in range(len(shape))])
    if draw(st.booleans()):
        tensor = tensor[: draw(st.integers(1, 2))]
    if draw(st.booleans()):
        tensor = tensor.expand(2, *tensor.shape)
    factors = [f for n in tensor.shape for f in {4: (2, 2)}.get(n, (n,))]
    wanted = []
    for factor in draw(st.permutations(factors)):
        if wanted and draw(st.booleans()):
            wanted[-1] *= factor
        else:
            wanted.append(factor)
    if draw(st.booleans()):
        wanted[draw(st.integers(0, len(wanted) - 1))] = -1
    return tensor, wanted


@given(views())
def test_a_view_is_possible_where_torch_says_so(case):
    tensor, wanted = case
    try:
        tensor.view(wanted)
        possible = True
    except RuntimeError:
        possible = False
    assert can_view(tensor.shape, tensor.stride(), wanted) == possible


def test_nothing_can_be_looked_at_in_any_shape_of_nothing():
    tensor = torch.empty(2, 0, 3, device="meta").transpose(0, 2)
    for wanted in ([0], [3, 0, 7]):
        assert math.prod(tensor.view(wanted).shape) == 0
        assert can_view(tensor.shape, tensor.stride(), wanted)
