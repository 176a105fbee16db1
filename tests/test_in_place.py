"""Writing over gradients: what is written over, what never is, and that no bit changes."""

import pytest
import torch
import torch.nn.functional as F
from expecttest import assert_expected_inline
from test_passes import assert_same_outputs, captured, changed, tensor

from fxmem.analysis.overwriting import DESTINATIONS
from fxmem.graphs.graph import is_in_place, operator_name
from fxmem.graphs.measure import cpu_allocations
from fxmem.passes.in_place import InPlacePass

aten = torch.ops.aten

ATENS = [op for op in DESTINATIONS if op.namespace == "aten"]
"""Without ours, which works on a code and has its own tests beside it."""


def written_over(graph):
    """The operators that write over an operand after the pass, which changes no result."""
    after = InPlacePass().apply(graph)
    assert_same_outputs(graph, after)
    return [operator_name(n) for n in after.nodes if is_in_place(n)]


def test_a_sum_of_gradients_and_what_reads_it():
    def body(m, x):
        h = F.gelu(x @ m.a)
        return (h @ m.b).sum() + (h @ m.c).sum()

    graph = captured(body, tensor(5, 4), a=tensor(4, 3), b=tensor(3, 2), c=tensor(3, 2, seed=1))
    after, text = changed(graph, InPlacePass())
    assert_expected_inline(
        text,
        """\
- add_1: f32[5, 3] = add(mm_4, mm_6)
+ add_1: f32[5, 3] = add(mm_4, mm_6, out=mm_4)
- gelu_backward: f32[5, 3] = gelu_backward(add_1, mm)
+ gelu_backward: f32[5, 3] = gelu_backward(add_1, mm, grad_input=add_1)""",
    )
    assert_same_outputs(graph, after)


def test_the_storage_lives_on_under_the_new_name():
    graph = captured(lambda m, x: (x @ m.w).sin().cos().sum(), tensor(5, 4), w=tensor(4, 3))
    after = InPlacePass().apply(graph)
    for node in after.nodes:
        if is_in_place(node):
            assert any(node.meta["val"] is i.meta["val"] for i in node.all_input_nodes)


def test_a_view_of_the_result_is_a_view_of_what_was_written_over():
    def body(m, x):
        h = (x @ m.w).sin()
        return (h.view(15).cos() * m.v).sum()

    graph = captured(body, tensor(5, 4), w=tensor(4, 3), v=tensor(15))
    after = InPlacePass().apply(graph)
    assert written_over(graph)
    assert_same_outputs(graph, after)
    again = InPlacePass().apply(after)
    assert str(again) == str(after)


def test_complex_numbers_stay():
    """In a product of them the last bits depend on whether it overlaps a factor."""

    def body(m, x):
        wave = torch.fft.rfft(x @ m.a, dim=0) * m.w
        return torch.fft.irfft(wave, n=64, dim=0).sum()

    w = torch.complex(tensor(33, 16), tensor(33, 16, seed=1))
    graph = captured(body, tensor(64, 8), a=tensor(8, 16), w=w)
    assert "mul.Tensor" in {str(n.target).removeprefix("aten.") for n in graph.nodes}
    assert written_over(graph) == []


def test_a_gradient_that_is_returned_stays():
    def body(m, x):
        return (m.w.sin() + m.v).sin().sum()

    graph = captured(body, tensor(5, 4), w=tensor(5, 4), v=tensor(5, 4, seed=1))
    after, text = changed(graph, InPlacePass())
    assert_expected_inline(
        text,
        """\
- mul: f32[5, 4] = mul(expand, cos)
+ mul: f32[5, 4] = mul(expand, cos, out=cos)
- mul_1: f32[5, 4] = mul(mul, cos_1)
+ mul_1: f32[5, 4] = mul(mul, cos_1, out=cos_1)""",
    )
    assert after.backward_outputs()[1].name == "mul"
    assert_same_outputs(graph, after)


def test_a_tangent_stays():
    # The caller has it: d.backward(gradient=g) must leave g as it was.
    graph = captured(lambda m, x: (x * m.w).sin(), tensor(5, 4), w=tensor(5, 4))
    after = InPlacePass().apply(graph)
    tangents = [n for n in after.nodes if n.op == "placeholder" and "tangents" in n.name]
    for node in after.nodes:
        assert not (is_in_place(node) and node.meta["val"] is tangents[0].meta["val"])
    assert_same_outputs(graph, after)


def test_a_saved_tensor_stays():
    # backward(retain_graph=True) or the caller may read it once more.
    graph = captured(lambda m, x: (x * m.w).sigmoid().sum(), tensor(5, 4), w=tensor(5, 4))
    after = InPlacePass().apply(graph)
    saved = after.node("sigmoid").meta["val"]
    assert not [n for n in after.nodes if is_in_place(n) and n.meta["val"] is saved]
    assert_same_outputs(graph, after)


def test_a_gradient_that_is_read_later_stays():
    def body(m, x):
        h = x @ m.w
        # mul's backward reads one gradient twice: the second reader may write over it, the first not.
        return (h.sin() * h.cos() @ m.v).sum()

    graph = captured(body, tensor(5, 4), w=tensor(4, 3), v=tensor(3, 2))
    after, text = changed(graph, InPlacePass())
    assert_expected_inline(
        text,
        """\
- mul_2: f32[5, 3] = mul(mm_3, cos)
+ mul_2: f32[5, 3] = mul(mm_3, cos, out=mm_3)
- neg: f32[5, 3] = neg(sin_1)
+ neg: f32[5, 3] = neg(sin_1, out=sin_1)
- mul_3: f32[5, 3] = mul(mul_1, neg)
+ mul_3: f32[5, 3] = mul(mul_1, neg, out=mul_1)
- mul_4: f32[5, 3] = mul(mul_2, cos_1)
+ mul_4: f32[5, 3] = mul(mul_2, cos_1, out=mul_2)
- add: f32[5, 3] = add(mul_3, mul_4)
+ add: f32[5, 3] = add(mul_3, mul_4, out=mul_3)""",
    )
    assert_same_outputs(graph, after)


def test_another_layout_type_or_size_stays():
    def body(m, x):
        h = (x @ m.w).t().to(torch.float64)
        return (h * m.v).sum()

    graph = captured(body, tensor(5, 4), w=tensor(4, 3), v=tensor(3, 5).double())
    assert_expected_inline(str(written_over(graph)), """[]""")


def test_the_forward_writes_over_what_dies_there():
    def body(m, x):
        h = (x @ m.w) + m.v
        return (F.relu(h) @ m.u).sum()

    graph = captured(body, tensor(5, 4), w=tensor(4, 3), v=tensor(5, 3), u=tensor(3, 2))
    assert str(InPlacePass().apply(graph)).count("out=") == 0
    after, text = changed(graph, InPlacePass("forward"))
    assert_expected_inline(
        text,
        """\
- add: f32[5, 3] = add(mm, primals_3)
+ add: f32[5, 3] = add(mm, primals_3, out=mm)
- relu: f32[5, 3] = relu(add)
+ relu: f32[5, 3] = relu_(add)""",
    )
    assert_same_outputs(graph, after)


def test_the_forward_leaves_what_is_saved_returned_or_given():
    def body(m, x):
        given = torch.relu(x)  # x is the caller's
        saved = torch.relu(torch.sin(given @ m.w))  # sin's operand is, its result is not
        returned = saved @ m.u
        return torch.tanh(returned).sum(), returned

    graph = captured(body, tensor(5, 4), w=tensor(4, 3), u=tensor(3, 2))
    after, text = changed(graph, InPlacePass("forward"))
    assert_expected_inline(
        text,
        """\
- relu_1: f32[5, 3] = relu(sin)
+ relu_1: f32[5, 3] = relu_(sin)""",
    )
    assert_same_outputs(graph, after)


@torch.library.custom_op("fxmem_in_place::stored", mutates_args=())
def stored(x: torch.Tensor) -> torch.Tensor:
    """What somebody else holds, too."""
    return STORED.setdefault("tensor", x.clone())


@stored.register_fake
def _(x):
    return torch.empty_like(x)


STORED: dict[str, torch.Tensor] = {}


def test_memory_of_other_peoples_operators_stays():
    def body(m, x):
        return (torch.relu(stored(x)) @ m.w).sum()

    graph = captured(body, tensor(5, 4), w=tensor(4, 3))
    after = InPlacePass("forward").apply(graph)
    assert not [n for n in after.nodes if is_in_place(n)]


def test_memory_of_unknown_origin_stays():
    graph = captured(lambda m, x: (x @ m.w).sin().cos().sum(), tensor(5, 4), w=tensor(4, 3))
    assert written_over(graph)
    for node in graph.nodes:
        node.meta["fxmem_origin"] = "made again"
    assert not written_over(graph)


# -- The operators -----------------------------------------------------------------------------------

ARGUMENTS = {
    "add": lambda t: (t(), t()),
    "sub": lambda t: (t(), t()),
    "mul.Tensor": lambda t: (t(), t()),
    "mul.Scalar": lambda t: (t(), 0.3),
    "div.Tensor": lambda t: (t(), t()),
    "div.Scalar": lambda t: (t(), 0.3),
    "neg": lambda t: (t(),),
    "where": lambda t: (t() > 0, t(), t()),
    "elu": lambda t: (t(), 0.5),
    "gelu": lambda t: (t(),),
    "hardtanh": lambda t: (t(), -0.5, 0.5),
    "leaky_relu": lambda t: (t(), 0.1),
    "relu": lambda t: (t(),),
    "sigmoid": lambda t: (t(),),
    "silu": lambda t: (t(),),
    "tanh": lambda t: (t(),),
    "elu_backward": lambda t: (t(), 1.0, 1.0, 1.0, False, t()),
    "gelu_backward": lambda t: (t(), t()),
    "hardtanh_backward": lambda t: (t(), t(), -0.5, 0.5),
    "leaky_relu_backward": lambda t: (t(), t(), 0.1, False),
    "sigmoid_backward": lambda t: (t(), t()),
    "silu_backward": lambda t: (t(), t()),
    "softplus_backward": lambda t: (t(), t(), 1.0, 20.0),
    "tanh_backward": lambda t: (t(), t()),
    "threshold_backward": lambda t: (t(), t(), 0.0),
}


def arguments_of(operator, make):
    name = operator.overloadpacket.__name__
    return ARGUMENTS.get(name, ARGUMENTS.get(f"{name}.{operator._overloadname}"))(make)


LAYOUTS = {
    "plain": lambda x: x,
    "transposed": lambda x: x.transpose(1, 2).contiguous().transpose(1, 2),
    "channels_last": lambda x: x.contiguous(memory_format=torch.channels_last),
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("operator", ATENS, ids=str)
def test_an_operator_gives_the_same_bits_without_memory(operator, dtype, layout):
    seeds = iter(range(9))

    def make():
        return LAYOUTS[layout](tensor(3, 5, 7, 33, seed=next(seeds)).to(dtype))

    arguments = arguments_of(operator, make)
    want = operator(*arguments)
    variant, keyword = DESTINATIONS[operator]
    places = [
        i for i, a in enumerate(arguments) if isinstance(a, torch.Tensor) and a.dtype == dtype
    ]
    for place in places:
        given = [a.clone() if isinstance(a, torch.Tensor) else a for a in arguments]
        named = {keyword: given[place]} if keyword else {}
        sizes, got = cpu_allocations(lambda g=given, n=named: variant(*g, **n))
        assert got.data_ptr() == given[place].data_ptr()
        assert torch.equal(got, want)
        assert got.stride() == want.stride()
        assert sum(n for n in sizes if n > 0) <= 16  # a constant as a tensor
