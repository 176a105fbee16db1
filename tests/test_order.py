"""The order of the backward: what comes early, what comes late, what stays, and that no bit changes."""

import itertools

import pytest
import torch
import torch.nn.functional as F
from expecttest import assert_expected_inline
from families import FAMILIES
from hazards import differences
from test_passes import assert_same_outputs, batch_norm, captured, changed, run, tensor
from torch import nn

from fxmem.analysis.liveness import timeline
from fxmem.graphs.capture import StepCall, capture
from fxmem.graphs.graph import is_backward, node_line, operator_name
from fxmem.graphs.operators import is_random
from fxmem.graphs.partition import split
from fxmem.graphs.workspace import Workspaces
from fxmem.passes import order
from fxmem.passes.gradient_layouts import GradientLayoutsPass
from fxmem.passes.identities import IdentitiesPass
from fxmem.passes.in_place import InPlacePass
from fxmem.passes.order import OrderPass
from fxmem.steps import analyze
from fxmem.steps.analyze import BEFORE_PLANNING


def live_bytes(graph):
    """Bytes while each step of the backward runs."""
    line = timeline(split(InPlacePass().apply(graph)), Workspaces())
    live = line.live_bytes(graph.bindings())
    return live[[step.phase == "backward" for step in line.steps]]


def ordered(graph):
    """The graph in its new order, after checking that it computes the same in no more bytes."""
    after, _ = changed(graph, OrderPass())
    lines = [[node_line(n) for n in g.nodes] for g in (graph, after)]
    assert sorted(lines[0]) == sorted(lines[1])
    forward = [[n.name for n in g.nodes if not is_backward(n)] for g in (graph, after)]
    assert forward[0] == forward[1]
    assert live_bytes(after).max() <= live_bytes(graph).max()
    assert str(OrderPass().apply(graph)) == str(after)
    return after


def backward(graph):
    lines = [node_line(n) for n in graph.nodes if n.op == "call_function" and is_backward(n)]
    return "\n".join(lines)


def layers(batch, width):
    def body(m, x):
        return F.linear(F.linear(x, m.a, m.c).sin(), m.b, m.d).cos().sum()

    weights = {"a": tensor(width, width), "b": tensor(width, width, seed=1)}
    biases = {"c": tensor(width), "d": tensor(width, seed=1)}
    return IdentitiesPass().apply(captured(body, tensor(batch, width), **weights, **biases))


# -- Early and late ----------------------------------------------------------------------------------


def test_the_gradient_of_a_small_weight_comes_before_that_of_its_input():
    graph = layers(batch=64, width=4)
    after = ordered(graph)
    assert_expected_inline(
        backward(graph),
        """\
expand: f32[64, 4] = expand(tangents_1, [64, 4])
sin_1: f32[64, 4] = sin(addmm_1)
neg: f32[64, 4] = neg(sin_1)
mul: f32[64, 4] = mul(expand, neg)
mm: f32[64, 4] = mm(mul, primals_4)
t_3: f32[4, 64] = t(mul)
mm_1: f32[4, 4] = mm(t_3, sin)
t_4: f32[4, 4] = t(mm_1)
sum_2: f32[1, 4] = sum(mul, [0], True)
view: f32[4] = view(sum_2, [4])
t_5: f32[4, 4] = t(t_4)
cos_1: f32[64, 4] = cos(addmm)
mul_1: f32[64, 4] = mul(mm, cos_1)
t_6: f32[4, 64] = t(mul_1)
mm_2: f32[4, 4] = mm(t_6, primals_3)
t_7: f32[4, 4] = t(mm_2)
sum_3: f32[1, 4] = sum(mul_1, [0], True)
view_1: f32[4] = view(sum_3, [4])
t_8: f32[4, 4] = t(t_7)""",
    )
    assert_expected_inline(
        backward(after),
        """\
sin_1: f32[64, 4] = sin(addmm_1)
neg: f32[64, 4] = neg(sin_1)
expand: f32[64, 4] = expand(tangents_1, [64, 4])
mul: f32[64, 4] = mul(expand, neg)
t_3: f32[4, 64] = t(mul)
mm_1: f32[4, 4] = mm(t_3, sin)
sum_2: f32[1, 4] = sum(mul, [0], True)
mm: f32[64, 4] = mm(mul, primals_4)
cos_1: f32[64, 4] = cos(addmm)
mul_1: f32[64, 4] = mul(mm, cos_1)
sum_3: f32[1, 4] = sum(mul_1, [0], True)
t_6: f32[4, 64] = t(mul_1)
mm_2: f32[4, 4] = mm(t_6, primals_3)
t_4: f32[4, 4] = t(mm_1)
view: f32[4] = view(sum_2, [4])
t_5: f32[4, 4] = t(t_4)
t_7: f32[4, 4] = t(mm_2)
view_1: f32[4] = view(sum_3, [4])
t_8: f32[4, 4] = t(t_7)""",
    )
    assert live_bytes(after).sum() < live_bytes(graph).sum()
    assert_same_outputs(graph, after)


def test_the_gradient_of_a_large_weight_comes_late():
    """That of ``b`` is larger than all that could go once it is there, but for what comes last."""

    def body(m, x):
        h = F.linear(x.sin(), m.a)
        return (F.linear(h, m.b) * 2).sum() + h.exp().sin().sum()

    inputs = {"a": tensor(4, 4), "b": tensor(64, 4)}
    graph = IdentitiesPass().apply(captured(body, tensor(8, 4), **inputs))
    after = ordered(graph)
    assert_expected_inline(
        backward(graph),
        """\
expand: f32[8, 4] = expand(tangents_1, [8, 4])
cos: f32[8, 4] = cos(exp)
mul_1: f32[8, 4] = mul(expand, cos)
mul_2: f32[8, 4] = mul(mul_1, exp)
expand_1: f32[8, 64] = expand(tangents_1, [8, 64])
mul_3: f32[8, 64] = mul(expand_1, 2)
t_2: f32[64, 8] = t(mul_3)
mm_2: f32[64, 4] = mm(t_2, mm)
t_3: f32[4, 64] = t(mm_2)
mm_3: f32[8, 4] = mm(mul_3, primals_3)
add_1: f32[8, 4] = add(mul_2, mm_3)
t_5: f32[64, 4] = t(t_3)
t_6: f32[4, 8] = t(add_1)
mm_4: f32[4, 4] = mm(t_6, sin)
t_7: f32[4, 4] = t(mm_4)
t_8: f32[4, 4] = t(t_7)""",
    )
    assert_expected_inline(
        backward(after),
        """\
cos: f32[8, 4] = cos(exp)
expand: f32[8, 4] = expand(tangents_1, [8, 4])
mul_1: f32[8, 4] = mul(expand, cos)
mul_2: f32[8, 4] = mul(mul_1, exp)
expand_1: f32[8, 64] = expand(tangents_1, [8, 64])
mul_3: f32[8, 64] = mul(expand_1, 2)
mm_3: f32[8, 4] = mm(mul_3, primals_3)
add_1: f32[8, 4] = add(mul_2, mm_3)
t_6: f32[4, 8] = t(add_1)
mm_4: f32[4, 4] = mm(t_6, sin)
t_2: f32[64, 8] = t(mul_3)
mm_2: f32[64, 4] = mm(t_2, mm)
t_3: f32[4, 64] = t(mm_2)
t_5: f32[64, 4] = t(t_3)
t_7: f32[4, 4] = t(mm_4)
t_8: f32[4, 4] = t(t_7)""",
    )
    assert live_bytes(after).max() < live_bytes(graph).max()
    assert_same_outputs(graph, after)


def test_a_product_that_is_only_summed_up_goes_with_the_sum():
    def body(m, x):
        return ((x * m.a).sin() * m.b).sum()

    graph = captured(body, tensor(64, 8), a=tensor(8), b=tensor(8))
    after = ordered(graph)
    assert_expected_inline(
        backward(after),
        """\
expand: f32[64, 8] = expand(tangents_1, [64, 8])
mul_2: f32[64, 8] = mul(expand, sin)
sum_2: f32[1, 8] = sum(mul_2, [0], True)
mul_3: f32[64, 8] = mul(expand, primals_3)
cos: f32[64, 8] = cos(mul)
mul_4: f32[64, 8] = mul(mul_3, cos)
mul_5: f32[64, 8] = mul(mul_4, primals_2)
sum_3: f32[1, 8] = sum(mul_5, [0], True)
view: f32[8] = view(sum_2, [8])
view_1: f32[8] = view(sum_3, [8])""",
    )
    assert_same_outputs(graph, after)


def test_an_order_that_is_good_stays():
    after = ordered(layers(batch=64, width=4))
    assert changed(after, OrderPass())[1] == ""


# -- What stays in its order -------------------------------------------------------------------------


class Noisy(torch.autograd.Function):
    """Draws in the backward."""

    @staticmethod
    def forward(ctx, x):
        return x * 2

    @staticmethod
    def backward(ctx, g):
        return g * torch.rand_like(g)


def draws():
    """The gradient of ``w`` is all held and draws first: one had better make it last."""

    def body(m, x):
        return Noisy.apply((x @ m.a).sin()).sum() + Noisy.apply(m.w).sum()

    return captured(body, tensor(64, 4), a=tensor(4, 4), w=tensor(100, 100))


def test_draws_stay_in_their_order(monkeypatch):
    graph = draws()
    drawn = [n.name for n in graph.nodes if is_random(n)]
    assert len(drawn) == 2
    after = ordered(graph)
    assert [n.name for n in after.nodes if is_random(n)] == drawn
    assert_same_outputs(graph, after)
    monkeypatch.setattr(order, "is_random", lambda node: False)
    unguarded = OrderPass().apply(graph)
    assert [n.name for n in unguarded.nodes if is_random(n)] == drawn[::-1]


def test_what_reads_a_gradient_comes_before_what_writes_over_it(monkeypatch):
    def body(m, x):
        return ((x @ m.a).sin() + (m.e * 2).sum(0)).cos().sum()

    graph = captured(body, tensor(64, 4), a=tensor(4, 4), e=tensor(10, 64, 4))
    assert backward(OrderPass().apply(graph)) != backward(graph)  # the large gradient comes late
    graph = InPlacePass().apply(graph)
    assert_same_outputs(graph, ordered(graph))
    monkeypatch.setattr(order._Turns, "before", lambda *_: set())
    assert differences(run(graph), run(OrderPass().apply(graph)))


def test_statistics_that_the_step_moves():
    graph = batch_norm()
    assert_same_outputs(graph, ordered(graph))


def test_a_tuple_is_taken_apart_at_once():
    def body(m, x):
        return m.norm(x @ m.w).sin().sum()

    graph = captured(body, tensor(64, 4), w=tensor(4, 4), norm=nn.LayerNorm(4))
    nodes = ordered(graph).nodes
    for node, following in itertools.pairwise(nodes):
        if operator_name(node) == "native_layer_norm_backward":
            assert operator_name(following) == "getitem"
            return
    raise AssertionError("no tuple")


# -- Whole steps -------------------------------------------------------------------------------------


def test_an_order_in_which_the_step_peaks_higher_is_not_taken(monkeypatch):
    """The copy of one number for each of the many weights had better come last."""

    def planned(graph):
        for a_pass in BEFORE_PLANNING:
            graph = a_pass.apply(graph)
        return analyze._ordered(graph, Workspaces(), torch.device("cpu"))[0]

    def body(m, x):
        return (x @ m.a).sin().sum() + m.w.sum()

    graph = captured(body, tensor(64, 4), a=tensor(4, 4), w=tensor(100, 100))
    worse = GradientLayoutsPass().apply(graph)
    better = planned(graph)
    assert live_bytes(better).max() < live_bytes(worse).max()
    monkeypatch.setattr(OrderPass, "apply", lambda *_: worse)
    assert str(planned(better)) == str(better)


@pytest.mark.parametrize("name", FAMILIES)
def test_family(name):
    model, args, kwargs = FAMILIES[name].build("tiny")
    with capture(StepCall(model, args, kwargs)) as found:
        graph = found.graph
    for a_pass in BEFORE_PLANNING:
        graph = a_pass.apply(graph)
    ordered(graph)
