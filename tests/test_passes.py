"""The passes: graphs before and after as text, and each hazard with and without its guard."""

# ruff: noqa: E501 (a node is one line of text, however long)

import contextlib
import difflib
import functools
import operator

import pytest
import torch
import torch.nn.functional as F
from expecttest import assert_expected_inline
from hazards import differences
from test_engine import capture_once
from torch import fx, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    create_selective_checkpoint_contexts,
)

import fxmem
from fxmem.analysis.dynamic import marked
from fxmem.basics.errors import VerificationError
from fxmem.graphs import batch_norm as cudnn
from fxmem.graphs import operators
from fxmem.graphs.capture import StepCall, capture
from fxmem.graphs.graph import JointGraph, OutputKind, is_backward
from fxmem.graphs.operators import recomputable_nodes, refusal, second_call, second_call_outputs
from fxmem.graphs.partition import saved_tensors, split
from fxmem.passes import cudnn_batch_norm, recompute
from fxmem.passes.cleanup import CleanupPass
from fxmem.passes.cudnn_batch_norm import CudnnBatchNormPass
from fxmem.passes.gradient_layouts import GradientLayoutsPass
from fxmem.passes.identities import IdentitiesPass
from fxmem.passes.recompute import Recompute, RecomputePass
from fxmem.passes.tangents import UndefinedTangentsPass
from fxmem.steps import analyze

aten = torch.ops.aten

# -- Small graphs ------------------------------------------------------------------------------------


class Body(nn.Module):
    """A forward written as a function of the module and its inputs; ``b_`` names are buffers."""

    def __init__(self, body, **tensors):
        super().__init__()
        self.body = body
        for name, value in tensors.items():
            if isinstance(value, nn.Module):
                self.add_module(name, value)
            elif name.startswith("b_"):
                self.register_buffer(name, value)
            else:
                self.register_parameter(name, nn.Parameter(value))

    def forward(self, *args):
        return self.body(self, *args)


def tensor(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def captured(body, *inputs, **tensors):
    with capture(StepCall(Body(body, **tensors), inputs)) as found:
        return found.graph


def two_layers():
    def body(m, x):
        return (F.relu(x @ m.a) @ m.b).sum()

    return captured(body, tensor(5, 4), a=tensor(4, 3), b=tensor(3, 2))


def test_a_cut_may_not_draw_once_more():
    """Without its mask, the backward would make it again, from numbers that no generator gives twice."""

    def body(m, x):
        return F.dropout(x @ m.a, 0.5).sin().sum()

    graph = captured(body, tensor(5, 4), a=tensor(4, 3))
    saved = saved_tensors(graph)
    split(graph, saved)
    product = next(n for n in graph.nodes if n.target is aten.mm.default)
    inputs = [n for n in saved if n.op == "placeholder"]
    with pytest.raises(VerificationError, match=r"draw once more .*native_dropout"):
        split(graph, [*inputs, product])


def diff(before, after):
    lines = difflib.ndiff(str(before).splitlines(), str(after).splitlines())
    return "\n".join(line for line in lines if line[0] in "+-")


def changed(graph, a_pass):
    """The pass's effect as text, after checking that the graph it was given stayed as it was."""
    text = str(graph)
    after = a_pass.apply(graph)
    assert str(graph) == text
    return after, diff(graph, after)


def arguments(graph):
    """A value for each placeholder, from its example value alone."""
    values = [n.meta["val"] for n in graph.module.graph.find_nodes(op="placeholder")]
    return [
        tensor(*v.shape, seed=i)
        if v.dtype.is_floating_point
        else torch.ones(v.shape, dtype=v.dtype)
        for i, v in enumerate(values)
    ]


def run(graph, seed=0):
    """One step: forward, then the input changes it asked for, then backward.  All that they return."""
    halves = split(graph)
    names = [n.name for n in graph.module.graph.find_nodes(op="placeholder")]
    values = dict(zip(names, arguments(graph), strict=True))
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(seed)
        forward = [n.name for n in halves.forward.graph.find_nodes(op="placeholder")]
        made = halves.forward(*[values[n] for n in forward])
        outputs, saved = made[: graph.num_forward_outputs], made[graph.num_forward_outputs :]
        outputs = [o.clone() for o in outputs]
        news = [
            o
            for o, kind in zip(outputs, graph.output_kinds, strict=False)
            if kind is OutputKind.MUTATION
        ]
        for name, new in zip(graph.module.meta.get("fxmem_mutated", ()), news, strict=True):
            values[name].copy_(new)
        backward = [n.name for n in halves.backward.graph.find_nodes(op="placeholder")]
        known = dict(zip(backward, saved, strict=False))
        late = halves.backward(*[known.get(n, values.get(n)) for n in backward])
        return {"forward": outputs, "backward": list(late)}


def assert_same_values(a, b):
    """The same numbers, in whatever layout."""
    for left, right in zip(run(a)["backward"], run(b)["backward"], strict=True):
        assert left is right is None or torch.equal(left, right)


def assert_same_outputs(a, b):
    wrong = differences(run(a), run(b))
    assert not wrong, "\n".join(wrong)


# -- Gradient layouts --------------------------------------------------------------------------------


def test_a_gradient_in_another_layout_is_copied_as_soon_as_it_is_there():
    def body(m, x):
        return ((m.w.t() @ x) * m.v.sum()).sum()

    graph = captured(body, tensor(5, 4), w=tensor(5, 3), v=tensor(2, 2))
    after, text = changed(graph, GradientLayoutsPass())
    assert_expected_inline(
        text,
        """\
+ expand_1_kept: f32[2, 2] = clone(expand_1, memory_format=torch.contiguous_format)
- return sum_2, t_3, None, expand_1
+ return sum_2, t_3, None, expand_1_kept""",
    )
    assert_same_values(graph, after)
    assert changed(after, GradientLayoutsPass())[1] == ""


def test_a_gradient_of_two_parameters_is_copied_once():
    graph = captured(lambda m, x: ((m.w + m.v) * x).sum(), tensor(5), w=tensor(5), v=tensor(5))
    after, text = changed(graph, GradientLayoutsPass())
    assert_expected_inline(
        text,
        """\
+ mul_1_kept: f32[5] = clone(mul_1, memory_format=torch.contiguous_format)
- return sum_1, mul_1, mul_1, None
+ return sum_1, mul_1, mul_1_kept, None""",
    )
    assert_same_values(graph, after)


def test_a_transposed_parameter_gets_a_transposed_gradient():
    graph = captured(lambda m, x: m.w.sum(), tensor(5), w=tensor(4, 3).t())
    after = GradientLayoutsPass().apply(graph)
    assert after.backward_outputs()[0].meta["val"].stride() == (1, 3)
    assert_same_values(graph, after)


# -- Cleanup -----------------------------------------------------------------------------------------


def batch_norm():
    def body(m, x):
        return m.norm(x @ m.w).exp().sum()

    return captured(body, tensor(5, 4), w=tensor(4, 3), norm=nn.BatchNorm1d(3))


def test_batch_norm_backward_forgets_the_running_statistics():
    graph = batch_norm()
    after, text = changed(graph, CleanupPass())
    assert_expected_inline(
        text,
        """\
- native_batch_norm_backward: (f32[5, 3], f32[3], f32[3]) = native_batch_norm_backward(mul, mm, primals_6, getitem_3, getitem_4, getitem_1, getitem_2, True, 1e-05, [True, True, True])
+ native_batch_norm_backward: (f32[5, 3], f32[3], f32[3]) = native_batch_norm_backward(mul, mm, primals_6, None, None, getitem_1, getitem_2, True, 1e-05, [True, True, True])""",
    )
    assert_same_outputs(graph, after)


def test_on_cuda_batch_norm_is_cudnns(monkeypatch):
    monkeypatch.setattr(cudnn_batch_norm, "cudnn_normalizes", lambda *_: True)
    monkeypatch.setattr(cudnn, "cudnn_reserve_nbytes", lambda _: 24)
    graph = CleanupPass().apply(batch_norm())
    after, text = changed(graph, CudnnBatchNormPass())
    assert_expected_inline(
        text,
        """\
- _native_batch_norm_legit_functional: (f32[5, 3], f32[3], f32[3], f32[3], f32[3]) = _native_batch_norm_legit_functional(mm, primals_6, primals_7, primals_4, primals_5, True, 0.1, 1e-05)
+ _native_batch_norm_legit_functional_cudnn: (f32[5, 3], f32[3], f32[3], u8[24], f32[3], f32[3]) = cudnn_batch_norm(mm, primals_6, primals_7, primals_4, primals_5, 0.1, 1e-05)
+ _native_batch_norm_legit_functional_cudnn_reserve: u8[24] = getitem(_native_batch_norm_legit_functional_cudnn, 3)
- getitem: f32[5, 3] = getitem(_native_batch_norm_legit_functional, 0)
+ getitem: f32[5, 3] = getitem(_native_batch_norm_legit_functional_cudnn, 0)
- getitem_1: f32[3] = getitem(_native_batch_norm_legit_functional, 1)
+ getitem_1: f32[3] = getitem(_native_batch_norm_legit_functional_cudnn, 1)
- getitem_2: f32[3] = getitem(_native_batch_norm_legit_functional, 2)
+ getitem_2: f32[3] = getitem(_native_batch_norm_legit_functional_cudnn, 2)
- getitem_3: f32[3] = getitem(_native_batch_norm_legit_functional, 3)
+ getitem_3: f32[3] = getitem(_native_batch_norm_legit_functional_cudnn, 4)
- getitem_4: f32[3] = getitem(_native_batch_norm_legit_functional, 4)
+ getitem_4: f32[3] = getitem(_native_batch_norm_legit_functional_cudnn, 5)
- native_batch_norm_backward: (f32[5, 3], f32[3], f32[3]) = native_batch_norm_backward(mul, mm, primals_6, None, None, getitem_1, getitem_2, True, 1e-05, [True, True, True])
+ native_batch_norm_backward_cudnn: (f32[5, 3], f32[3], f32[3]) = cudnn_batch_norm_backward(mul, mm, primals_6, getitem_1, getitem_2, _native_batch_norm_legit_functional_cudnn_reserve, 1e-05)
- getitem_5: f32[5, 3] = getitem(native_batch_norm_backward, 0)
+ getitem_5: f32[5, 3] = getitem(native_batch_norm_backward_cudnn, 0)
- getitem_6: f32[3] = getitem(native_batch_norm_backward, 1)
+ getitem_6: f32[3] = getitem(native_batch_norm_backward_cudnn, 1)
- getitem_7: f32[3] = getitem(native_batch_norm_backward, 2)
+ getitem_7: f32[3] = getitem(native_batch_norm_backward_cudnn, 2)""",
    )
    norm = next(n for n in after.nodes if n.target is cudnn.cudnn_batch_norm)
    again, _, _ = second_call(norm)
    assert again is cudnn.cudnn_batch_norm_again
    assert second_call_outputs(norm) == 4


def test_elsewhere_batch_norm_stays():
    _, text = changed(CleanupPass().apply(batch_norm()), CudnnBatchNormPass())
    assert text == ""


def test_an_input_that_the_step_changes_is_copied_for_the_backward():
    def body(m, x, s):
        return (x @ m.w * s).sum(), s + 1

    graph = captured(body, tensor(5, 4), tensor(5, 3), w=tensor(4, 3))
    plain = run(graph)
    # The captured step returns s + 1; now let it write it into s.
    changed_input = graph.node("mul").args[1].name
    graph.module.meta["fxmem_mutated"] = (changed_input,)
    kinds = [
        OutputKind.MUTATION if getattr(n, "name", "") == "add" else kind
        for n, kind in zip(graph.outputs(), graph.output_kinds, strict=True)
    ]
    graph.output_kinds = tuple(kinds)
    after, text = changed(graph, CleanupPass())
    assert_expected_inline(
        text,
        """\
+ primals_3_before: f32[5, 3] = clone(primals_3)
- mul: f32[5, 3] = mul(mm, primals_3)
+ mul: f32[5, 3] = mul(mm, primals_3_before)
- add: f32[5, 3] = add(primals_3, 1)
+ add: f32[5, 3] = add(primals_3_before, 1)
- mul_1: f32[5, 3] = mul(expand, primals_3)
+ mul_1: f32[5, 3] = mul(expand, primals_3_before)""",
    )
    assert not differences(plain, run(after))
    assert differences(plain, run(graph))  # what reading the changed input would give
    copy = after.node(f"{changed_input}_before")
    assert refusal(copy) == "the step changes this input"


def test_sizes_of_forward_tensors_are_asked_for_in_the_forward():
    def body(m, x):
        return F.gelu(x.view(-1, 4, 8) @ m.w).square().sum()

    names = {"args[0]": {0: "B"}}
    model, x = Body(body, w=tensor(8, 8)), tensor(64, 8)
    with capture(marked(StepCall(model, (x,)), names), names) as found:
        graph = found.graph
    late = [n for n in graph.nodes if is_backward(n) and isinstance(n.meta["val"], torch.SymInt)]
    assert late
    after = CleanupPass().apply(graph)
    order = {name: n for n, name in enumerate(node.name for node in after.nodes)}
    for node in map(after.node, (n.name for n in late)):
        assert not is_backward(node)
        assert all(order[s.name] < order[node.name] for s in node.all_input_nodes)


def test_cleanup_leaves_other_graphs_alone():
    _, text = changed(two_layers(), CleanupPass())
    assert text == ""


# -- Identities --------------------------------------------------------------------------------------


def linear_layers():
    def body(m, x):
        return F.linear(F.relu(F.linear(x, m.a)), m.b).sum()

    return captured(body, tensor(5, 4), a=tensor(3, 4), b=tensor(2, 3))


def test_a_weight_that_is_transposed_twice_is_read_itself():
    graph = linear_layers()
    after, text = changed(graph, IdentitiesPass())
    assert_expected_inline(
        text,
        """\
- detach: f32[5, 3] = detach(relu)
- t_4: f32[2, 3] = t(t_1)
- mm_3: f32[5, 3] = mm(expand, t_4)
+ mm_3: f32[5, 3] = mm(expand, primals_3)
- detach_1: f32[5, 3] = detach(detach)
- threshold_backward: f32[5, 3] = threshold_backward(mm_3, detach_1, 0)
+ threshold_backward: f32[5, 3] = threshold_backward(mm_3, relu, 0)""",
    )
    assert_same_outputs(graph, after)


def test_doing_it_again_changes_nothing():
    _, text = changed(IdentitiesPass().apply(linear_layers()), IdentitiesPass())
    assert text == ""


def same_view(h):
    return h.view(5, 3)


def whole_slice(h):
    return h[:]


def only_piece(h):
    return h.split(5)[0]


@pytest.mark.parametrize("look", [same_view, whole_slice, only_piece])
def test_a_view_that_changes_nothing_disappears(look):
    graph = captured(lambda m, x: look(x @ m.w).sin().sum(), tensor(5, 4), w=tensor(4, 3))
    after = IdentitiesPass().apply(graph)
    mm = after.node("mm")
    assert after.node("sin").args == (mm,)
    assert after.node("cos").args == (mm,)
    assert_same_outputs(graph, after)


def test_a_chain_of_views_that_comes_back_disappears_from_its_first_value_on():
    def body(m, x):
        h = x @ m.w
        return h.view(15).view(3, 5).view(5, 3).sin().sum()

    graph = captured(body, tensor(5, 4), w=tensor(4, 3))
    after, text = changed(graph, IdentitiesPass())
    assert_expected_inline(
        text,
        """\
- view: f32[15] = view(mm, [15])
- view_1: f32[3, 5] = view(view, [3, 5])
- view_2: f32[5, 3] = view(view_1, [5, 3])
- sin: f32[5, 3] = sin(view_2)
+ sin: f32[5, 3] = sin(mm)
- cos: f32[5, 3] = cos(view_2)
+ cos: f32[5, 3] = cos(mm)
- view_3: f32[3, 5] = view(mul, [3, 5])
- view_4: f32[15] = view(view_3, [15])
- view_5: f32[5, 3] = view(view_4, [5, 3])
- mm_1: f32[4, 3] = mm(t, view_5)
+ mm_1: f32[4, 3] = mm(t, mul)""",
    )
    assert_same_outputs(graph, after)


def test_two_conjugations_cancel_and_one_stays():
    def body(m, x):
        z = torch.view_as_complex(x * m.w)
        return torch.view_as_real(z.conj().conj().sin() * z.conj()).sum()

    graph = captured(body, tensor(4, 2), w=tensor(4, 2, seed=1))
    after, text = changed(graph, IdentitiesPass())
    assert_expected_inline(
        text,
        """\
- _conj: c64[4] = _conj(view_as_complex)
+ sin: c64[4] = sin(view_as_complex)
- _conj_1: c64[4] = _conj(_conj)
- sin: c64[4] = sin(_conj_1)
- _conj_4: c64[4] = _conj(_conj_2)
- mul_3: c64[4] = mul(view_as_complex_1, _conj_4)
+ mul_3: c64[4] = mul(view_as_complex_1, view_as_complex)
- cos: c64[4] = cos(_conj_1)
+ cos: c64[4] = cos(view_as_complex)
- _conj_7: c64[4] = _conj(mul_4)
- _conj_8: c64[4] = _conj(_conj_7)
- add: c64[4] = add(clone_4, _conj_8)
+ add: c64[4] = add(clone_4, mul_4)""",
    )
    assert_same_outputs(graph, after)


def test_a_view_as_another_type_stays_and_one_back_disappears():
    def body(m, x):
        bits = x.view(torch.int32)
        return (x @ m.w).sum() + bits.view(torch.float32).sum(), bits + 1

    graph = captured(body, tensor(5, 4), w=tensor(4, 3))
    after, text = changed(graph, IdentitiesPass())
    assert_expected_inline(
        text,
        """\
- detach: i32[5, 4] = detach(view)
- view_1: f32[5, 4] = view(detach, torch.float32)
- detach_1: f32[5, 4] = detach(view_1)
- sum_2: f32[] = sum(detach_1)
+ sum_2: f32[] = sum(primals_1)
- add_1: i32[5, 4] = add(detach, 1)
+ add_1: i32[5, 4] = add(view, 1)""",
    )
    assert_same_outputs(graph, after)


def shifted(h):
    return h[1:]


def strided(h):
    return h[:, ::2]


def transposed(h):
    return h.t()


def widened(h):
    return h.unsqueeze(0)


def as_strided(h):
    return h.as_strided((3, 3), (3, 1))


@pytest.mark.parametrize("look", [shifted, strided, transposed, widened, as_strided])
def test_a_view_that_changes_something_stays(look):
    graph = captured(lambda m, x: look(x @ m.w).sin().sum(), tensor(3, 4), w=tensor(4, 3))
    _, text = changed(graph, IdentitiesPass())
    assert text == ""


def test_an_offset_alone_makes_another_value():
    def body(m, x):
        first, second = (x @ m.w).split(3)
        return (first.sin() * second).sum()

    graph = captured(body, tensor(6, 4), w=tensor(4, 3))
    _, text = changed(graph, IdentitiesPass())
    assert text == ""


def test_an_output_stays_a_tensor_of_its_own():
    def body(m, x):
        h = x @ m.w
        return h, h.view(5, 3), h.detach(), x.view(5, 4)

    graph = captured(body, tensor(5, 4), w=tensor(4, 3))
    _, text = changed(graph, IdentitiesPass())
    assert text == ""


def test_a_gradient_stays_a_tensor_of_its_own():
    def body(m, x):
        return F.linear(x, m.w)

    graph = captured(body, tensor(5, 4), w=tensor(3, 4))
    gradient = graph.backward_outputs()[0]
    assert gradient.target is aten.t.default
    after = IdentitiesPass().apply(graph)
    assert after.backward_outputs()[0].name == gradient.name
    assert_same_outputs(graph, after)


def test_what_reads_an_output_may_read_what_it_shows():
    def body(m, x):
        h = x @ m.w
        out = h.detach()
        return h.sin().sum(), out, out.detach().exp()

    graph = captured(body, tensor(5, 4), w=tensor(4, 3))
    after, text = changed(graph, IdentitiesPass())
    assert_expected_inline(
        text,
        """\
- detach_1: f32[5, 3] = detach(detach)
- exp: f32[5, 3] = exp(detach_1)
+ exp: f32[5, 3] = exp(mm)""",
    )
    assert_same_outputs(graph, after)


def test_identities_leave_graphs_without_views_alone():
    graph = captured(lambda m, x: (x * m.w).sum(), tensor(5, 4), w=tensor(5, 4))
    _, text = changed(graph, IdentitiesPass())
    assert text == ""


def test_a_copy_that_only_the_graph_sees_is_its_source():
    def body(m, x):
        return (F.relu(x @ m.w).clone() * 3).sin().sum()

    graph = captured(body, tensor(5, 4), w=tensor(4, 3))
    after, text = changed(graph, IdentitiesPass())
    assert_expected_inline(
        text,
        """\
- detach: f32[5, 3] = detach(relu)
- clone: f32[5, 3] = clone(relu)
- mul: f32[5, 3] = mul(clone, 3)
+ mul: f32[5, 3] = mul(relu, 3)
- detach_1: f32[5, 3] = detach(detach)
- threshold_backward: f32[5, 3] = threshold_backward(mul_2, detach_1, 0)
+ threshold_backward: f32[5, 3] = threshold_backward(mul_2, relu, 0)""",
    )
    assert_same_outputs(graph, after)


@pytest.mark.parametrize(
    "body",
    [
        lambda m, x: (x.clone() @ m.w).sin().sum(),
        lambda m, x: (m.w.t().clone() @ x.t()).sin().sum(),
        lambda m, x: ((x @ m.w)[:2].clone().sin()).sum(),
        lambda m, x: ((x @ m.w).t().clone(memory_format=torch.contiguous_format).sin()).sum(),
        lambda m, x: (lambda y: (y, y.clone().sin().sum()))(x @ m.w),
        lambda m, x: (lambda y: (y, y.sin().sum()))((x @ m.w).clone()),
    ],
    ids=["input", "parameter", "part", "layout", "of-result", "result"],
)
def test_a_copy_that_matters_stays(body):
    graph = captured(body, tensor(5, 4), w=tensor(4, 3))
    after = IdentitiesPass().apply(graph)
    assert "clone" in str(after)
    assert_same_outputs(graph, after)


# -- Undefined tangents ------------------------------------------------------------------------------


def two_results():
    def body(m, x):
        h = F.relu(x @ m.a)
        return (h @ m.b).sum(), h

    return captured(body, tensor(5, 4), a=tensor(4, 3), b=tensor(3, 2))


def test_a_sum_with_an_undefined_tangent_is_skipped():
    graph = two_results()
    _, text = changed(graph, UndefinedTangentsPass(("tangents_2",)))
    assert_expected_inline(
        text,
        """\
- add: f32[5, 3] = add(tangents_2, mm_3)
- threshold_backward: f32[5, 3] = threshold_backward(add, detach_1, 0)
+ threshold_backward: f32[5, 3] = threshold_backward(mm_3, detach_1, 0)""",
    )


def test_gradients_of_an_undefined_tangent_are_none():
    graph = two_results()
    _, text = changed(graph, UndefinedTangentsPass(("tangents_1",)))
    assert_expected_inline(
        text,
        """\
- expand: f32[5, 2] = expand(tangents_1, [5, 2])
- t: f32[3, 5] = t(relu)
- mm_2: f32[3, 2] = mm(t, expand)
- t_1: f32[2, 3] = t(primals_3)
- mm_3: f32[5, 3] = mm(expand, t_1)
- add: f32[5, 3] = add(tangents_2, mm_3)
- threshold_backward: f32[5, 3] = threshold_backward(add, detach_1, 0)
+ threshold_backward: f32[5, 3] = threshold_backward(tangents_2, detach_1, 0)
- return sum_1, relu, mm_4, None, mm_2
+ return sum_1, relu, mm_4, None, None""",
    )


def test_zeros_are_made_where_zero_is_not_known_to_stay_zero():
    def body(m, x):
        h = x @ m.w
        return h.sum(), h.cumsum(0)

    graph = captured(body, tensor(5, 4), w=tensor(4, 3))
    _, text = changed(graph, UndefinedTangentsPass(("tangents_2",)))
    assert_expected_inline(
        text,
        """\
- flip: f32[5, 3] = flip(tangents_2, [0])
+ flip_zeros: f32[5, 3] = full([5, 3], 0, dtype=torch.float32, device=cpu)
- cumsum_1: f32[5, 3] = cumsum(flip, 0)
+ cumsum_1: f32[5, 3] = cumsum(flip_zeros, 0)""",
    )


@pytest.mark.parametrize("undefined", ["tangents_1", "tangents_2"])
def test_undefined_is_what_zero_gives(undefined):
    graph = two_results()
    after = UndefinedTangentsPass((undefined,)).apply(graph)
    names = [n.name for n in graph.module.graph.find_nodes(op="placeholder")]
    values = arguments(graph)
    values[names.index(undefined)].zero_()
    want = fx.Interpreter(graph.module).run(*values, enable_io_processing=False)
    got = fx.Interpreter(after.module).run(*values, enable_io_processing=False)
    for a, b in zip(want, got, strict=True):
        assert (a is None and b is None) or torch.equal(a, torch.zeros_like(a) if b is None else b)


def transposed_result(*shape):
    """The sum's other term is contiguous, the tangent is laid out as the transposed result."""

    def body(m, x):
        h = (x @ m.w).transpose(0, -1)
        return (F.relu(h) * h).mean(), h

    return captured(body, tensor(*shape), w=tensor(4, 3))


def test_a_sum_that_is_skipped_leaves_the_layout_of_what_remains():
    after, text = changed(transposed_result(5, 4), UndefinedTangentsPass(("tangents_2",)))
    assert_expected_inline(
        text,
        """\
- add: f32[3, 5] = add(tangents_2, mul_1)
- add_1: f32[3, 5] = add(add, threshold_backward)
+ add_1: f32[3, 5] = add(mul_1, threshold_backward)""",
    )
    (total,) = [n for n in after.nodes if n.name == "add_1"]
    assert total.meta["val"].stride() == (5, 1)


@pytest.mark.skipif(
    torch.__version__ < "2.13", reason="earlier releases trace this gradient in another layout"
)
def test_zeros_are_made_where_a_view_needs_the_old_layout():
    _, text = changed(transposed_result(2, 5, 4), UndefinedTangentsPass(("tangents_2",)))
    assert_expected_inline(
        text,
        """\
+ tangents_2_zeros: f32[2, 5, 3] = full([2, 5, 3], 0, dtype=torch.float32, device=cpu)
+ tangents_2_zeros_like: f32[3, 5, 2] = permute(tangents_2_zeros, [2, 1, 0])
- add: f32[3, 5, 2] = add(tangents_2, mul_1)
+ add: f32[3, 5, 2] = add(tangents_2_zeros_like, mul_1)""",
    )


@pytest.mark.skipif(
    torch.__version__ < "2.13", reason="earlier releases trace this gradient in another layout"
)
def test_zeros_are_made_where_only_fake_tensors_accept_the_view():
    def body(m, x):
        h = (x @ m.w).transpose(0, 2)
        return (F.relu(h) * h).mean(), h

    graph = captured(body, tensor(2, 1, 2, 4), w=tensor(4, 1))
    after, text = changed(graph, UndefinedTangentsPass(("tangents_2",)))
    assert_expected_inline(
        text,
        """\
+ tangents_2_zeros: f32[1, 2, 2, 1] = full([1, 2, 2, 1], 0, dtype=torch.float32, device=cpu)
+ tangents_2_zeros_like: f32[2, 1, 2, 1] = permute(tangents_2_zeros, [2, 0, 1, 3])
- add: f32[2, 1, 2, 1] = add(tangents_2, mul_1)
+ add: f32[2, 1, 2, 1] = add(tangents_2_zeros_like, mul_1)""",
    )
    fx.Interpreter(after.module).run(*arguments(graph), enable_io_processing=False)


def test_no_undefined_tangent_changes_nothing():
    _, text = changed(two_results(), UndefinedTangentsPass(()))
    assert text == ""


# -- Recompute ---------------------------------------------------------------------------------------


def test_recompute_runs_the_producer_again_in_the_backward():
    graph = two_layers()
    after, text = changed(graph, RecomputePass((Recompute("relu", "mm_2"),), frozenset({"mm"})))
    assert_expected_inline(
        text,
        """\
- detach: f32[5, 3] = detach(relu)
- t: f32[3, 5] = t(relu)
+ relu_recompute: f32[5, 3] = relu(mm)
+ t_recompute: f32[3, 5] = t(relu_recompute)
- mm_2: f32[3, 2] = mm(t, expand)
+ mm_2: f32[3, 2] = mm(t_recompute, expand)
+ detach_recompute: f32[5, 3] = detach(relu_recompute)
- detach_1: f32[5, 3] = detach(detach)
+ detach_1_recompute: f32[5, 3] = detach(detach_recompute)
- threshold_backward: f32[5, 3] = threshold_backward(mm_3, detach_1, 0)
+ threshold_backward: f32[5, 3] = threshold_backward(mm_3, detach_1_recompute, 0)""",
    )
    assert_same_outputs(graph, after)


def test_a_chain_is_made_again_in_order():
    graph = two_layers()
    again = (Recompute("mm", "mm_2"), Recompute("relu", "mm_2"))
    after, text = changed(graph, RecomputePass(again, frozenset()))
    assert_expected_inline(
        text,
        """\
- detach: f32[5, 3] = detach(relu)
- t: f32[3, 5] = t(relu)
+ mm_recompute: f32[5, 3] = mm(primals_2, primals_1)
+ relu_recompute: f32[5, 3] = relu(mm_recompute)
+ t_recompute: f32[3, 5] = t(relu_recompute)
- mm_2: f32[3, 2] = mm(t, expand)
+ mm_2: f32[3, 2] = mm(t_recompute, expand)
+ detach_recompute: f32[5, 3] = detach(relu_recompute)
- detach_1: f32[5, 3] = detach(detach)
+ detach_1_recompute: f32[5, 3] = detach(detach_recompute)
- threshold_backward: f32[5, 3] = threshold_backward(mm_3, detach_1, 0)
+ threshold_backward: f32[5, 3] = threshold_backward(mm_3, detach_1_recompute, 0)""",
    )
    assert_same_outputs(graph, after)


def test_nothing_to_recompute_gives_the_graph_itself():
    graph = two_layers()
    assert RecomputePass((), frozenset()).apply(graph) is graph


def test_a_twin_remembers_where_it_comes_from():
    graph = two_layers()
    after = RecomputePass((Recompute("relu", "mm_2"),), frozenset({"mm"})).apply(graph)
    twin, first = after.node("relu_recompute"), after.node("relu")
    assert twin.meta["fxmem_origin"] == "relu"
    assert twin.meta["stack_trace"] == first.meta["stack_trace"]
    assert twin.meta["val"].shape == first.meta["val"].shape
    assert twin.meta["val"].untyped_storage()._cdata != first.meta["val"].untyped_storage()._cdata


# -- Hazards: random numbers -------------------------------------------------------------------------


def dropout():
    def body(m, x):
        return F.dropout(x @ m.w, 0.5).sin().sum()

    return captured(body, tensor(16, 16), w=tensor(16, 16))


DROPOUT_AGAIN = RecomputePass((Recompute("native_dropout", "cos"),), frozenset({"mm"}))


def test_dropout_is_replayed():
    graph = dropout()
    after, text = changed(graph, DROPOUT_AGAIN)
    assert_expected_inline(
        text,
        """\
+ native_dropout_run: (u8[5056], (f32[16, 16], bool[16, 16])) = run_and_save_rng_state(native_dropout, mm, 0.5, True)
+ native_dropout_state: u8[5056] = getitem(native_dropout_run, 0)
- native_dropout: (f32[16, 16], bool[16, 16]) = native_dropout(mm, 0.5, True)
+ native_dropout_result: (f32[16, 16], bool[16, 16]) = getitem(native_dropout_run, 1)
- getitem: f32[16, 16] = getitem(native_dropout, 0)
+ getitem: f32[16, 16] = getitem(native_dropout_result, 0)
- getitem_1: bool[16, 16] = getitem(native_dropout, 1)
+ native_dropout_result_recompute: (f32[16, 16], bool[16, 16]) = run_with_rng_state(native_dropout_state, native_dropout, mm, 0.5, True)
+ getitem_recompute: f32[16, 16] = getitem(native_dropout_result_recompute, 0)
+ getitem_1_recompute: bool[16, 16] = getitem(native_dropout_result_recompute, 1)
- cos: f32[16, 16] = cos(getitem)
+ cos: f32[16, 16] = cos(getitem_recompute)
- native_dropout_backward: f32[16, 16] = native_dropout_backward(mul, getitem_1, 2.0)
+ native_dropout_backward: f32[16, 16] = native_dropout_backward(mul, getitem_1_recompute, 2.0)""",
    )
    assert_same_outputs(graph, after)


def test_dropout_without_replay_would_be_wrong(monkeypatch):
    graph = dropout()
    monkeypatch.setattr(recompute, "is_random", lambda node: False)
    assert differences(run(graph), run(DROPOUT_AGAIN.apply(graph)))


def test_the_generator_ends_where_it_would_have():
    graph = dropout()
    ends = []
    for g in (graph, DROPOUT_AGAIN.apply(graph)):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            fx.Interpreter(g.module).run(*arguments(g), enable_io_processing=False)
            ends.append(torch.get_rng_state())
    assert torch.equal(*ends)


# -- Hazards: statistics and changed inputs ----------------------------------------------------------


def norm_again(graph):
    norm = next(n.name for n in graph.nodes if "batch_norm_legit" in n.name)
    reader = next(n.name for n in graph.nodes if n.name.startswith("native_batch_norm_backward"))
    return RecomputePass((Recompute(norm, reader),), frozenset({"mm", "exp"}))


def test_a_second_batch_norm_counts_no_statistics():
    graph = CleanupPass().apply(batch_norm())
    after, text = changed(graph, norm_again(graph))
    assert_expected_inline(
        text,
        """\
- getitem_1: f32[3] = getitem(_native_batch_norm_legit_functional, 1)
- getitem_2: f32[3] = getitem(_native_batch_norm_legit_functional, 2)
+ _native_batch_norm_legit_functional_recompute: (f32[5, 3], f32[3], f32[3]) = _native_batch_norm_legit(mm, primals_6, primals_7, True, 0.1, 1e-05)
+ getitem_1_recompute: f32[3] = getitem(_native_batch_norm_legit_functional_recompute, 1)
+ getitem_2_recompute: f32[3] = getitem(_native_batch_norm_legit_functional_recompute, 2)
- native_batch_norm_backward: (f32[5, 3], f32[3], f32[3]) = native_batch_norm_backward(mul, mm, primals_6, None, None, getitem_1, getitem_2, True, 1e-05, [True, True, True])
+ native_batch_norm_backward: (f32[5, 3], f32[3], f32[3]) = native_batch_norm_backward(mul, mm, primals_6, None, None, getitem_1_recompute, getitem_2_recompute, True, 1e-05, [True, True, True])""",
    )
    assert_same_outputs(graph, after)


def test_a_second_batch_norm_with_statistics_would_be_refused(monkeypatch):
    graph = CleanupPass().apply(batch_norm())
    norm = next(n for n in graph.nodes if "batch_norm_legit" in n.name)
    assert norm in recomputable_nodes(graph)
    monkeypatch.setattr(operators, "second_call", lambda n: (n.target, n.args, dict(n.kwargs)))
    assert norm not in recomputable_nodes(graph)


def counter():
    def body(m, x):
        y = torch.sin(x * (m.b_count * 2)) @ m.w
        m.b_count.add_(1)
        return y.sum()

    x = tensor(5, 4).requires_grad_()
    return CleanupPass().apply(captured(body, x, w=tensor(4, 3), b_count=tensor(4)))


COUNTER_AGAIN = RecomputePass((Recompute("mul", "cos"),), frozenset({"mul_1", "sin"}))


def test_what_reads_a_changed_input_is_not_made_again(monkeypatch):
    graph = counter()
    doubled = graph.node("mul")
    assert doubled not in recomputable_nodes(graph)
    monkeypatch.setattr(JointGraph, "mutated_inputs", lambda self: set())
    assert doubled in recomputable_nodes(graph)
    assert differences(run(graph), run(COUNTER_AGAIN.apply(graph)))


# -- Hazards: operators that must not run twice ------------------------------------------------------


@torch.library.custom_op("fxmem_test_passes::scale", mutates_args=())
def scale(x: torch.Tensor) -> torch.Tensor:
    return x * 3


@scale.register_fake
def _(x):
    return torch.empty_like(x)


scale.register_autograd(lambda ctx, g: g * 3)


def custom():
    def body(m, x):
        return torch.ops.fxmem_test_passes.scale(x @ m.w).sin().sum()

    return captured(body, tensor(5, 4), w=tensor(4, 3))


def test_a_custom_operator_runs_again_only_if_declared_pure(monkeypatch):
    monkeypatch.setattr(operators, "_declared_pure", set())
    graph = custom()
    node = graph.node("scale")
    assert "call fxmem.declare_pure if it is pure" in refusal(node)
    assert node not in recomputable_nodes(graph)
    fxmem.declare_pure(torch.ops.fxmem_test_passes.scale)
    assert refusal(node) is None
    assert node in recomputable_nodes(graph)
    after, text = changed(graph, RecomputePass((Recompute("scale", "cos"),), frozenset({"mm"})))
    assert_expected_inline(
        text,
        """\
+ scale_recompute: f32[5, 3] = scale(mm)
- cos: f32[5, 3] = cos(scale)
+ cos: f32[5, 3] = cos(scale_recompute)""",
    )
    assert_same_outputs(graph, after)


def test_declare_pure_takes_operators_only():
    with pytest.raises(TypeError, match="takes an operator"):
        fxmem.declare_pure(lambda x: x)


def made_node(target, device, *, returns_tensor=True):
    """A forward node with an example value on ``device``, whether or not there is such a device."""
    graph = fx.Graph()
    x = graph.placeholder("x")
    node = graph.call_function(target, (x,))
    if returns_tensor:
        node.meta["val"] = FakeTensor(
            FakeTensorMode(), torch.empty(4, device="meta"), torch.device(device)
        )
    return node


@pytest.mark.parametrize(
    "target",
    [
        aten.scatter_add.default,
        aten.index_add.default,
        aten.index_put.default,
        aten.cumsum.default,
    ],
)
def test_operators_that_add_in_any_order_on_cuda(target):
    assert refusal(made_node(target, "cpu")) is None
    assert refusal(made_node(target, "cuda")) == (
        "runs in a different order each time on this device"
    )


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_ordinary_operators_may_run_again(device):
    assert refusal(made_node(aten.relu.default, device)) is None


def test_a_random_operator_on_an_unknown_generator_is_refused():
    node = made_node(aten.rand_like.default, "cpu")
    assert refusal(node) is None
    node.kwargs = {"generator": torch.Generator()}
    assert "generator" in refusal(node)


def test_operators_that_change_their_arguments_are_refused():
    assert refusal(made_node(aten.relu_.default, "cpu")) == "changes its arguments"


def test_collectives_are_refused():
    pytest.importorskip("torch.distributed._functional_collectives")
    node = made_node(torch.ops._c10d_functional.all_reduce.default, "cpu")
    assert refusal(node) == "talks to other processes"


def test_effects_and_python_functions_are_refused():
    for target in (torch.ops.higher_order.with_effects, print):
        assert refusal(made_node(target, "cpu")) == "not an operator fxmem knows to be pure"
    assert refusal(made_node(operator.getitem, "cpu")) is None


# -- The user's own checkpoint policies --------------------------------------------------------------


class Tagged(nn.Module):
    """One region under a policy that gives ``tag`` to one operator and leaves the rest open."""

    def __init__(self, packet, tag):
        super().__init__()
        self.a = nn.Linear(16, 64)
        self.b = nn.Linear(64, 16)

        def policy(ctx, op, *args, **kwargs):
            return tag if op is packet else CheckpointPolicy.PREFER_RECOMPUTE

        self.contexts = functools.partial(create_selective_checkpoint_contexts, policy)

    def region(self, x):
        return torch.tanh(self.b(F.gelu(self.a(x))))

    def forward(self, x):
        h = checkpoint(self.region, x, use_reentrant=False, context_fn=self.contexts)
        return h.pow(2).sum()


@contextlib.contextmanager
def tagged(packet, tag):
    torch.manual_seed(0)
    with capture_once(Tagged(packet, tag), (tensor(32, 16),)) as found:
        yield found


def again(found, budget):
    return {d.key.operator for d in found.decide(budget).plan.decisions if d.action == "recompute"}


def test_must_save_is_kept_at_every_budget(monkeypatch):
    with tagged(aten.addmm.default, CheckpointPolicy.MUST_SAVE) as found:
        assert "addmm" not in again(found, "min")
    monkeypatch.setattr(analyze, "tagged_values", lambda flow: (frozenset(), frozenset()))
    with tagged(aten.addmm.default, CheckpointPolicy.MUST_SAVE) as found:
        assert "addmm" in again(found, "min")


def test_must_recompute_is_made_again_at_every_budget(monkeypatch):
    with tagged(aten.gelu.default, CheckpointPolicy.MUST_RECOMPUTE) as found:
        assert again(found, "1TiB") == {"gelu"}
    monkeypatch.setattr(analyze, "tagged_values", lambda flow: (frozenset(), frozenset()))
    with tagged(aten.gelu.default, CheckpointPolicy.MUST_RECOMPUTE) as found:
        assert not again(found, "1TiB")


def test_prefer_leaves_the_choice_to_the_plan():
    with tagged(aten.gelu.default, CheckpointPolicy.PREFER_RECOMPUTE) as found:
        assert not again(found, "1TiB")
    with tagged(aten.addmm.default, CheckpointPolicy.PREFER_SAVE) as found:
        assert "addmm" in again(found, "min")
