"""Lossy codes: who reads what, the pass as text, the noise that is predicted, and what a plan promises."""

# ruff: noqa: E501 (a node is one line of text, however long)

import copy
import re
from dataclasses import replace
from itertools import accumulate

import pytest
import torch
import torch.nn.functional as F
from expecttest import assert_expected_inline
from quick import but_slow
from test_passes import captured, changed, tensor
from torch import fx, nn

import fxmem
from fxmem._torch import fake_tensors_off
from fxmem.analysis.dataflow import NOISE_CEILING
from fxmem.api import analyzed, read_options
from fxmem.codes import derivatives, travelling
from fxmem.codes.gradient_noise import Sensitivity, Statistics
from fxmem.codes.lossless import ELEMENTS
from fxmem.graphs.consumers import Use, saved_values
from fxmem.graphs.measure import cpu_allocations
from fxmem.passes.quantize import Code, QuantizePass
from fxmem.passes.recompute import Recompute, RecomputePass
from fxmem.passes.uncode import UncodePass
from fxmem.planning.allotment import Allotment, Candidate, encoding_named
from fxmem.steps import pipeline

ALLOW = ("recompute", "lossless", "quantize")
CODES = ("lossless", "quantize")
"""Without recomputation there is not much to plan."""
INT4 = encoding_named("int4 g64")


# -- Who reads what ------------------------------------------------------------------------------------


def uses(graph):
    return "\n".join(
        f"{saved.node.name} {saved.use.name.lower()}: "
        + ", ".join(f"{r.node.name} {r.use.name.lower()}" for r in saved.readers)
        for saved in saved_values(graph)
    )


def test_consumers_of_a_block():
    def body(m, x):
        h = m.norm(x)
        a = torch.softmax(h @ h.mT, -1) @ (h @ m.v)
        return (F.gelu(a @ m.w).bfloat16() @ m.u.bfloat16()).float().sum()

    graph = captured(
        body, tensor(2, 8, 16), norm=nn.LayerNorm(16), **{n: tensor(16, 16) for n in "vwu"}
    )
    assert_expected_inline(
        uses(graph),
        """\
getitem travelling: bmm_5 travelling, bmm_4 travelling, mm_7 linear
_softmax smooth: _softmax_backward_data smooth, bmm_2 travelling
mm travelling: bmm_3 travelling
bmm_1 linear: mm_5 linear
mm_1 travelling: gelu_backward travelling
_to_copy linear: mm_3 linear
_to_copy_1 travelling: mm_4 travelling""",
    )


def test_noise_must_reach_a_gradient_once():
    """Two products in one gradient; a product with itself, whose gradients go upstream; and one of the third."""

    def body(m, x):
        h = F.gelu(x * m.c)
        twice = (h @ m.a).sin().sum() + (h.t() @ m.a).cos().sum()
        k = F.silu(x * m.c)
        own = F.hardswish(x * m.c)
        return twice + (k.t() @ k).sum() + (own * m.b).exp().sum()

    graph = captured(body, tensor(8, 8), **{n: tensor(8, 8) for n in "abc"})
    found = {saved.node.name: saved.use for saved in saved_values(graph)}
    assert found["gelu"] is Use.TRAVELLING
    assert found["silu"] is Use.TRAVELLING
    assert found["hardswish"] is Use.LINEAR


def test_squares_of_a_product_count_where_its_elements_come_apart():
    """An element's noise that meets itself in a sum, or is there several times, is not that of the product."""

    def body(m, x):
        h = [torch.tanh(x * scale) for scale in (1, 2, 3, 4, 5, 6, 7)]
        one = h[0] @ (m.a + m.b)
        repeated = h[1] @ m.c.sum(0)
        same = h[2].expand(4, 8, 8) @ m.d.expand(4, 8, 8)
        single = h[3].view(64, 1) * m.e.expand(8)
        other = h[4] * m.f
        twice = h[5] @ (m.g + m.g)
        parts = [half @ m.a[:4] for half in h[6].chunk(2, 1)]
        return sum(t.sin().sum() for t in (one, repeated, same, single, other, twice, *parts))

    parts = {n: tensor(8, 8) for n in "abdg"}
    given = dict(parts, c=tensor(3, 8, 8), e=tensor(1), f=tensor(8))
    graph = captured(body, tensor(8, 8), **given)
    assert_expected_inline(
        "\n".join(line for line in uses(graph).splitlines() if line.startswith("tanh")),
        """\
tanh linear: mm_9 linear
tanh_1 travelling: mm_8 travelling
tanh_2 travelling: bmm_1 travelling
tanh_3 travelling: mul_18 travelling
tanh_4 linear: mul_17 linear
tanh_5 travelling: mm_7 travelling
tanh_6 travelling: mm_6 travelling, mm_5 travelling""",
    )


class Clip(torch.autograd.Function):
    """Its backward bends the gradient."""

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        return grad.clamp(-1, 1)


def test_noise_that_travels_must_keep_its_mean():
    """What it reaches is linear in it, and no product meets the noise of its own operand again."""

    def gated(m, x):
        return (F.silu(x @ m.a) * (x @ m.b)).sin().sum()

    def clipped(m, x):
        return (F.silu(x @ m.a) * Clip.apply(x @ m.b)).sin().sum()

    def twice(m, x):
        h = F.silu(x @ m.a)
        return (h * (h * (x @ m.b))).sin().sum()

    use = {}
    for body in (gated, clipped, twice):
        graph = captured(body, tensor(8, 8), **{n: tensor(8, 8) for n in "ab"})
        use[body] = {saved.node.name: saved.use for saved in saved_values(graph)}
    assert use[gated]["silu"] is Use.TRAVELLING
    assert use[clipped]["silu"] is Use.NONLINEAR
    assert use[twice]["silu"] is Use.NONLINEAR


def test_what_somebody_holds_is_no_candidate():
    def body(m, x):
        h = (x @ m.a).relu()
        return (h @ m.b).sum(), h

    graph = captured(body, tensor(8, 8), a=tensor(8, 8), b=tensor(8, 8))
    assert uses(graph) == ""


# -- The passes ----------------------------------------------------------------------------------------


def linear():
    def body(m, x):
        return (F.gelu(x @ m.w) @ m.v).sin().sum()

    return captured(body, tensor(64, 64), w=tensor(64, 64), v=tensor(64, 32))


def quantized(graph, encoding=INT4):
    names = [s.node.name for s in saved_values(graph) if s.use is Use.LINEAR]
    return QuantizePass(tuple(Code(name, encoding, n) for n, name in enumerate(names)))


def test_a_linear_operand_leaves_a_code():
    def body(m, x):
        return (m.drop(x @ m.w).view(4, 16, 64) @ m.v).sin().sum()

    graph = captured(body, tensor(64, 64), w=tensor(64, 64), v=tensor(64, 32), drop=nn.Dropout())
    after, text = changed(graph, quantized(graph))
    assert_expected_inline(
        text,
        """\
+ step_seed: i64[] = step_seed(primals_1)
+ getitem_quantized: u8[2304] = quantize_groups(getitem, 4, 64, step_seed, 0)
- t: f32[64, 64] = t(view_1)
+ mm_2_dequantized: f32[64, 64] = dequantize_groups(getitem_quantized, 4, 64, [64, 64], [64, 1], torch.float32)
+ view_dequantized: f32[4, 16, 64] = view(mm_2_dequantized, [4, 16, 64])
+ view_1_dequantized: f32[64, 64] = view(view_dequantized, [64, 64])
+ t_dequantized: f32[64, 64] = t(view_1_dequantized)
- mm_2: f32[64, 32] = mm(t, view_2)
+ mm_2: f32[64, 32] = mm(t_dequantized, view_2)""",
    )
    code = after.node("getitem_quantized")
    assert code.meta["val"].nbytes == INT4.nbytes.subs(ELEMENTS, 64 * 64)


def test_a_code_that_is_not_kept_is_none():
    """Nor is it held for a second reader: both read what it is made of."""

    def body(m, x):
        h = F.gelu(x @ m.w)
        return (h @ m.v).sin().sum() + (h @ m.u).cos().sum()

    graph = captured(body, tensor(64, 64), w=tensor(64, 64), v=tensor(64, 32), u=tensor(64, 32))
    coded = QuantizePass((Code("gelu", INT4, 0),)).apply(graph)
    decodes = [n.name for n in coded.nodes if "dequantized" in n.name and "quant" in str(n.target)]
    kept = {n.name for n in coded.nodes if n.op == "call_function"} - {"gelu_quantized"}
    again = RecomputePass(
        tuple(Recompute("gelu_quantized", d) for d in decodes), frozenset(kept)
    ).apply(coded)
    plain = UncodePass().apply(again)
    assert not [n for n in plain.nodes if "quant" in str(n.target)]
    assert [n.target for n in plain.nodes if "seed" not in n.name] == [
        n.target for n in graph.nodes
    ]


def test_an_activation_leaves_a_code_of_its_derivative():
    """Also where the backward sees what is saved through a view; a code that is not kept is none."""

    def body(m, x):
        h = (x @ m.w).view(4, 16, 64)
        return F.gelu(h, approximate="tanh").sin().sum()

    graph = captured(body, tensor(64, 64), w=tensor(64, 64))
    code = Code("mm", encoding_named("gelu tanh' 4"), 7)
    after, text = changed(graph, QuantizePass((code,)))
    assert_expected_inline(
        text,
        """\
+ step_seed: i64[] = step_seed(primals_1)
+ view_quantized: u8[2052] = encode_derivative(view, gelu tanh, 4, step_seed, 7)
- gelu_backward: f32[4, 16, 64] = gelu_backward(mul, view, approximate=tanh)
+ gelu_backward_quantized: f32[4, 16, 64] = derivative_backward(mul, view_quantized, [0, 1, 2], gelu tanh, 4)
- view_1: f32[64, 64] = view(gelu_backward, [64, 64])
+ view_1: f32[64, 64] = view(gelu_backward_quantized, [64, 64])""",
    )
    reader = next(n for n in after.nodes if n.target is derivatives.derivative_backward)
    kept = {n.name for n in after.nodes if n.op == "call_function"} - {"view_quantized"}
    again = RecomputePass((Recompute("view_quantized", reader.name),), frozenset(kept)).apply(after)
    plain = UncodePass().apply(again)
    assert [(n.target, n.kwargs) for n in plain.nodes if "seed" not in n.name] == [
        (n.target, n.kwargs) for n in graph.nodes
    ]


# -- Noise -----------------------------------------------------------------------------------------------


class Shell(nn.Module):
    def __init__(self, body, **parts):
        super().__init__()
        self.body = body
        for name, part in parts.items():
            setattr(self, name, nn.Parameter(part) if isinstance(part, torch.Tensor) else part)

    def forward(self, x):
        return self.body(self, x)


def convolutions():
    parts = {"a": nn.Conv2d(3, 8, 3, padding=1), "b": nn.Conv2d(8, 8, 3, stride=2, groups=2)}
    model = Shell(lambda m, x: m.b(F.gelu(m.a(x))).square().mean(), **parts)
    return model, torch.randn(8, 3, 16, 16)


def products():
    parts = {"w": torch.randn(32, 48) / 6, "v": torch.randn(48, 40) / 7}
    return Shell(lambda m, x: (F.gelu(x @ m.w) @ m.v).sin().mean(), **parts), torch.randn(256, 32)


def batched_products():
    """One weight for each of four parts; two of them share what they read."""
    parts = {
        "w": torch.randn(4, 32, 48) / 6,
        "v": torch.randn(4, 48, 8),
        "u": torch.randn(4, 48, 4),
    }

    def body(m, x):
        h = F.gelu(x.view(4, -1, 32) @ m.w)
        return (h @ m.v).sin().mean() + (h @ m.u).cos().mean()

    return Shell(body, **parts), torch.randn(256, 32)


def gains():
    """Of a product with numbers along one dimension, whose gradient is a sum over the other."""
    model = Shell(lambda m, x: (x.exp() * m.g).sin().mean(), g=torch.ones(64))
    return model, torch.randn(256, 64)


def added_weights():
    """Two parameters have the gradient of one product each."""
    parts = {"w": torch.randn(32, 48) / 6, "v": torch.randn(48, 40) / 7, "u": torch.ones(48, 40)}
    model = Shell(lambda m, x: (F.gelu(x @ m.w) @ (m.v + m.u)).sin().mean(), **parts)
    return model, torch.randn(256, 32)


def mixed_precision():
    parts = {"w": torch.randn(32, 48) / 6, "v": torch.randn(48, 40) / 7}

    def body(m, x):
        h = F.gelu(x @ m.w).bfloat16()
        return (h @ m.v.bfloat16()).float().sin().mean()

    return Shell(body, **parts), torch.randn(256, 32)


def gated():
    """Both factors of a product are what travels, to two weights each and on through attention."""
    parts = {n: torch.randn(32, 48) / 6 for n in "wu"} | {n: torch.randn(48, 48) / 7 for n in "vqk"}

    def body(m, x):
        q, k = ((x @ m.w @ p).view(-1, 1, 32, 48) for p in (m.q, m.k))
        v = (x @ m.u).view(-1, 1, 32, 48)
        h = F.scaled_dot_product_attention(q, k, v, is_causal=True).reshape(-1, 48)
        return ((F.silu(h @ m.v) * h.sin()) @ m.v).sin().mean()

    return Shell(body, **parts), torch.randn(256, 32)


def options_for(model, budget="min", **changes):
    given = {
        "allow": ALLOW, "noise": 0.01, "reserve": 0, "on_infeasible": "raise", "compiler": "eager",
        "cost": "auto", "plan": None, **changes,
    }  # fmt: skip
    return read_options(model, budget, **given)


def named(candidate, bits):
    """The code in so many bits of a candidate: of the tensor, or of a derivative there."""
    return next(name for name, _ in candidate.choices if re.search(rf"int{bits} |' {bits}$", name))


class Drawn:
    """A step whose every candidate of these uses is a code of so many bits, to be run for any seed."""

    def __init__(self, model, x, bits, uses=(Use.LINEAR, Use.TRAVELLING)):
        options = options_for(model)
        with analyzed(model, options, (x,), None, None, None, ()) as (analysis, _):
            allotment = analysis.allotted(options.noise)
            candidates = [c for c in allotment.candidates if c.sensitivity.use in uses]
            assert {c.sensitivity.use for c in candidates} == set(uses)
            self.names = {c.source: named(c, bits) for c in candidates}
            self.predicted = sum(c.sensitivity.variance(self.names[c.source]) for c in candidates)
            codes = [
                Code(c.source, encoding_named(self.names[c.source]), c.stream) for c in candidates
            ]
            self.graph = QuantizePass(tuple(codes)).apply(analysis.graph)
            with fake_tensors_off():
                one = torch.ones(())
            known = analysis.examples
            self.given = [known.get(n.name, one) for n in analysis.graph.placeholders()]
            self.exact = self.run(analysis.graph)

    def run(self, graph):
        with torch.no_grad(), fake_tensors_off():
            results = fx.Interpreter(graph.module).run(*self.given, enable_io_processing=False)
            return [g.double() for g in results[graph.num_forward_outputs :] if g is not None]

    def errors(self, draws):
        for seed in range(draws):
            torch.manual_seed(seed)
            yield [g - e for g, e in zip(self.run(self.graph), self.exact, strict=True)]


@pytest.mark.parametrize("bits", [4, 2])
@pytest.mark.parametrize(
    "program",
    [products, convolutions, batched_products, gains, added_weights, mixed_precision],
    ids=lambda p: p.__name__,
)
def test_predicted_variance_is_measured_variance(program, bits):
    torch.manual_seed(0)
    drawn = Drawn(*program(), bits, (Use.LINEAR,))
    draws = 96
    measured = sum(float(e.square().sum()) for found in drawn.errors(draws) for e in found) / draws
    assert drawn.predicted / measured == pytest.approx(1, abs=0.05)


def activations():
    """Derivatives at a product, at a view of one, and at what a tanh itself made."""
    parts = {n: torch.randn(48, 48) / 5 for n in "wvut"}

    def body(m, x):
        h = F.gelu((x @ m.w).view(4, -1, 48), approximate="tanh")
        h = F.silu(h @ m.v).view(-1, 48)
        return (torch.tanh(F.gelu(h @ m.u) @ m.t).exp() * 0.1).mean()

    return Shell(body, **parts), torch.randn(256, 48)


@pytest.mark.parametrize("bits", [4, 2])
@pytest.mark.parametrize("program", [gated, activations], ids=lambda p: p.__name__)
def test_predicted_variance_of_what_travels_is_measured_variance(program, bits):
    torch.manual_seed(0)
    drawn = Drawn(*program(), bits)
    assert any("'" in name for name in drawn.names.values())
    draws = 32
    measured = sum(float(e.square().sum()) for found in drawn.errors(draws) for e in found) / draws
    assert 0.8 < drawn.predicted / measured < 1.25


MORE = (gated, 4), (activations, 2)


@pytest.mark.parametrize(
    ("program", "bits"),
    [(products, 2), *(pytest.param(*more, marks=pytest.mark.slow) for more in MORE)],
)
def test_the_mean_of_many_draws_is_the_gradient(program, bits):
    torch.manual_seed(0)
    drawn = Drawn(*program(), bits)
    total = [torch.zeros_like(e) for e in drawn.exact]
    for n, found in enumerate(drawn.errors(256), 1):
        total = [t + e for t, e in zip(total, found, strict=True)]
        if n in (16, 64, 256):
            distance = sum(float((t / n).square().sum()) for t in total)
            assert distance * n / drawn.predicted == pytest.approx(1, abs=0.4)


def test_the_nearest_point_would_not_converge():
    """What the test above would see if codes were biased."""
    torch.manual_seed(0)
    drawn = Drawn(*products(), 2, (Use.LINEAR,))
    with torch.no_grad():
        for node in drawn.graph.nodes:
            if "quantize_groups" in str(node.target) and "dequant" not in str(node.target):
                node.args = (*node.args[:3], None, node.args[4])
    drawn.graph.module.recompile()
    (found,) = drawn.errors(1)
    distance = sum(float(e.square().sum()) for e in found)
    assert distance * 256 / drawn.predicted > 20


def test_gradients_of_a_sum_grow_with_their_batch():
    """A loss that is a sum has the same share of noise as the one that is its mean."""
    found = []
    for reduction in ("mean", "sum"):
        torch.manual_seed(0)
        model, x = (
            nn.Sequential(nn.Linear(32, 64), nn.GELU(), nn.Linear(64, 4)),
            torch.randn(128, 32),
        )
        y = torch.randint(4, (128,))
        loss = nn.CrossEntropyLoss(reduction=reduction)
        with analyzed(model, options_for(model), (x,), None, None, loss, (y,)) as (analysis, _):
            known = analysis.allotted(options_for(model).noise).statistics
            found.append(
                [known.share(s.variance(n)) for s in known.sensitivities for n in s.variances]
            )
    assert found[0]
    assert found[1] == pytest.approx(found[0], rel=0.01)


def test_the_minibatch_is_measured_as_if_batches_were_drawn_anew():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 64), nn.Softplus(), nn.Linear(64, 1))
    batches = [torch.randn(64, 16) for _ in range(40)]

    def loss(out):
        return out.square().mean()

    seen = {}
    for name, noise in (
        ("parts", fxmem.Noise(0.01)),
        ("batches", fxmem.Noise(0.01, tuple((b,) for b in batches[1:]))),
    ):
        options = options_for(model, noise=noise)
        with analyzed(model, options, (batches[0],), None, None, loss, ()) as (analysis, _):
            seen[name] = analysis.allotted(options.noise).statistics
    assert seen["parts"].backwards == 9
    assert seen["batches"].backwards == 9
    assert seen["parts"].variance / seen["batches"].variance == pytest.approx(1, abs=0.5)


# -- Sharing it out --------------------------------------------------------------------------------------


def statistics_of(*variances):
    levels = ("int8 g256", "int4 g64", "int2 g64")
    found = [
        Sensitivity(f"x{n}", Use.LINEAR, {e: {"w": v * 17**i} for i, e in enumerate(levels)})
        for n, v in enumerate(variances)
    ]
    sizes = tuple(zip(levels, (1000, 560, 310), strict=True))
    return Statistics({"w": 1.0}, tuple(found), 9), [
        Candidate(s, n, sizes) for n, s in enumerate(found)
    ]


def test_noise_goes_where_it_is_cheap():
    known, candidates = statistics_of(1e-5, 1e-4, 1e-6)
    shared = Allotment.of(known, 0.01, candidates)
    assert shared.encodings == ("int2 g64", "int4 g64", "int2 g64")
    assert sum(shared.units(c.source) for c in candidates) <= NOISE_CEILING
    assert shared.among({"x1"}).encodings == ("int4 g64",)
    assert Allotment.of(known, 0.1, candidates).encodings == ("int2 g64",) * 3
    tight = Allotment.of(known, 1e-5, candidates)
    assert tight.encodings == ("int8 g256",) * 3  # the planner keeps what fits
    assert tight.units("x1") > NOISE_CEILING


# -- Plans -----------------------------------------------------------------------------------------------


def perceptron(layers=4, dropout=0.0, rows=2048, width=256):
    torch.manual_seed(0)
    parts = []
    for _ in range(layers):
        parts += [nn.Linear(width, width), nn.ReLU()]
    if dropout:
        parts.append(nn.Dropout(dropout))
    model = nn.Sequential(*parts, nn.Linear(width, 4))
    x, y = torch.randn(rows, width), torch.randint(4, (rows,))
    return model, x, y, {"loss_fn": F.cross_entropy, "loss_inputs": (y,)}


def step_of(model, run, seed=0):
    model.zero_grad(set_to_none=True)
    torch.manual_seed(seed)
    loss = run()
    loss.backward()
    return loss.detach(), {name: p.grad.clone() for name, p in model.named_parameters()}


@pytest.fixture(scope="module")
def smallest():
    model, x, y, loss = perceptron(dropout=0.1)
    return model, x, y, loss, fxmem.optimize(model, "min", (x,), allow=CODES, **loss)


def test_codes_take_fewer_bytes(smallest):
    model, x, _, loss, step = smallest
    exact = fxmem.plan(model, "min", (x,), allow="lossless", **loss)
    assert step.plan.predicted_peak < 0.75 * exact.predicted_peak
    assert step.plan.noise.tier == "unbiased"
    assert 0 < step.plan.noise.predicted <= 0.01
    assert exact.noise is None


def test_the_floor_is_lower_and_plans_are_no_slower():
    model, x, _, loss = perceptron(layers=6)
    exact, ours = (fxmem.plan(model, "min", (x,), allow=a, **loss) for a in (ALLOW[:2], ALLOW))
    assert ours.predicted_peak < exact.predicted_peak
    again = fxmem.plan(model, exact.predicted_peak, (x,), allow=ALLOW, **loss)
    assert again.predicted_peak <= exact.predicted_peak
    assert again.added_seconds < exact.added_seconds
    assert 0 < again.noise.predicted <= 0.01


def test_the_budget_is_kept(smallest):
    model, x, y, _, step = smallest
    step(x, y).backward()
    model.zero_grad(set_to_none=True)
    sizes, _ = cpu_allocations(lambda: step(x, y).backward())
    model.zero_grad(set_to_none=True)
    peak = max(accumulate(sizes)) + step.plan.resident
    assert peak <= step.plan.predicted_peak
    assert peak == pytest.approx(step.plan.predicted_peak, rel=0.001)


def test_the_forward_is_eagers_and_steps_repeat(smallest):
    model, x, y, _, step = smallest
    loss, exact = step_of(model, lambda: F.cross_entropy(model(x), y))
    eager = torch.get_rng_state()
    again, first = step_of(model, lambda: step(x, y))
    assert torch.equal(loss, again)
    assert not torch.equal(eager, torch.get_rng_state())
    torch.set_rng_state(eager)
    torch.empty((), dtype=torch.int64).random_()
    drawn = torch.get_rng_state()
    _, second = step_of(model, lambda: step(x, y))
    assert torch.equal(drawn, torch.get_rng_state())  # one draw more than eager's
    noisy = {name for name in exact if not torch.equal(exact[name], first[name])}
    assert noisy
    assert all(torch.equal(first[name], second[name]) for name in first)
    stored = {re.sub("[^0-9]", "", d.module) for d in step.plan.decisions if d.error}
    # A rectifier's result is read by the weight of the layer after it, or after the dropout.
    assert noisy <= {f"{int(n) + k}.weight" for n in stored for k in (1, 2)}


def test_another_step_draws_other_noise():
    model, x, y, loss = perceptron()
    step = fxmem.optimize(model, "min", (x,), allow=CODES, **loss)
    torch.manual_seed(0)
    seen = []
    for _ in range(2):  # without dropout nothing but the step's own draw moves the generator
        model.zero_grad(set_to_none=True)
        step(x, y).backward()
        seen.append(torch.cat([p.grad.flatten() for p in model.parameters()]))
    assert not torch.equal(*seen)


def test_noise_is_measured(smallest):
    model, x, y, _, step = smallest
    exact = [step_of(model, lambda: F.cross_entropy(model(x), y), seed)[1] for seed in range(8)]
    noisy = [step_of(model, lambda: step(x, y), seed)[1] for seed in range(8)]
    added = sum(
        float((a[n] - b[n]).double().square().sum()) / 8
        for a, b in zip(exact, noisy, strict=True)
        for n in a
    )
    predicted = sum(group.added for group in step.plan.noise.parameters)
    # Dropout differs from the batch that the prediction is of.
    assert predicted / added == pytest.approx(1, abs=0.1)


def test_a_plan_says_in_a_line_that_it_is_noisy(smallest):
    plan = smallest[-1].plan
    assert str(plan).endswith(f" encoded, unbiased noise of {100 * plan.noise.predicted:.3g} %)")


def test_where_nothing_is_gained_nothing_is_noisy():
    model, x, _, loss = perceptron(layers=3)
    assert fxmem.plan(model, "2x", (x,), allow=ALLOW, **loss).noise is None
    quiet = fxmem.plan(model, "min", (x,), allow=CODES, noise=0, **loss)
    assert quiet.noise is None or quiet.noise.tier == "exact"


def test_a_plan_file_says_which_codes(smallest, tmp_path):
    model, x, y, loss, step = smallest
    path = tmp_path / "plan.json"
    step.plan.save(path)
    assert fxmem.Plan.validate(path) == []
    assert fxmem.Plan.load(path) == step.plan
    budget = step.plan.predicted_peak
    again = fxmem.optimize(model, budget, (x,), allow=CODES, plan=path, **loss)
    assert again.plan.predicted_peak == step.plan.predicted_peak
    assert again.plan.noise == step.plan.noise
    mine, theirs = (step_of(model, lambda s=s: s(x, y))[1] for s in (step, again))
    assert all(torch.equal(mine[name], theirs[name]) for name in mine)
    with pytest.raises(fxmem.PlanMismatchError, match="not allowed here"):
        fxmem.plan(model, budget, (x,), allow="lossless", plan=path, **loss)
    with pytest.raises(fxmem.PlanMismatchError, match="more noise"):
        fxmem.plan(model, budget, (x,), allow=CODES, noise=1e-8, plan=path, **loss)
    codes = step.plan.noise.codes
    forged = replace(codes[0], key=replace(codes[0].key, operator="native_layer_norm"))
    noise = replace(step.plan.noise, codes=(forged, *codes[1:]))
    with pytest.raises(fxmem.PlanMismatchError, match="gradients wrong"):
        fxmem.plan(model, budget, (x,), allow=CODES, plan=replace(step.plan, noise=noise), **loss)


def gated_perceptron(layers=3, rows=2048, width=128):
    """Gates keep two factors each, whose noise goes upstream."""
    torch.manual_seed(0)

    class Gated(nn.Module):
        def __init__(self):
            super().__init__()
            self.gate, self.up = nn.Linear(width, width), nn.Linear(width, width)

        def forward(self, x):
            return F.relu(self.gate(x)) * self.up(x)

    model = nn.Sequential(*(Gated() for _ in range(layers)), nn.Linear(width, 4))
    x, y = torch.randn(rows, width), torch.randint(4, (rows,))
    return model, x, {"loss_fn": F.cross_entropy, "loss_inputs": (y,)}


def test_noise_that_travels_is_drawn_and_measured():
    model, x, loss = gated_perceptron()
    step = fxmem.optimize(model, "min", (x,), allow=CODES, verify=True, **loss)
    exact = fxmem.plan(model, "min", (x,), allow="lossless", **loss)
    noise = step.plan.noise
    assert noise.tier == "unbiased"
    assert noise.backwards <= 20
    # Where nothing travels, what reads a gate's factors and its result would be full.
    assert step.plan.predicted_peak < 0.6 * exact.predicted_peak
    added, own = (sum(getattr(g, n) for g in noise.parameters) for n in ("added", "own"))
    assert added / own == pytest.approx(noise.predicted, rel=0.25)
    assert any(g.added for g in noise.parameters if g.parameters.endswith("gate.bias"))
    measured = sum(step.report().noise.values())
    assert measured == pytest.approx(added, rel=0.25)


class Mlp(nn.Module):
    def __init__(self, width=64):
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.wide, self.back = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x):
        return x + self.back(F.gelu(self.wide(self.norm(x))))


def test_plans_take_codes_of_derivatives():
    torch.manual_seed(0)
    model = nn.Sequential(*(Mlp() for _ in range(3)), nn.Linear(64, 4))
    x, y = torch.randn(2048, 64), torch.randint(4, (2048,))
    loss = {"loss_fn": F.cross_entropy, "loss_inputs": (y,)}
    exact = fxmem.plan(model, "min", (x,), allow="lossless", **loss)
    step = fxmem.optimize(model, "min", (x,), allow=CODES, verify=True, **loss)
    codes = [c.encoding for c in step.plan.noise.codes]
    assert sum("gelu'" in name for name in codes) == 3
    assert step.plan.predicted_peak < 0.7 * exact.predicted_peak
    assert step.report().measured_peak <= step.plan.predicted_peak
    added = sum(g.added for g in step.plan.noise.parameters)
    assert sum(step.report().noise.values()) == pytest.approx(added, rel=0.25)
    grown = fxmem.plan(model, step.plan.predicted_peak + 150_000, (x,), allow=ALLOW, **loss)
    assert grown.predicted_peak <= step.plan.predicted_peak + 150_000


@pytest.mark.parametrize("share", but_slow([0.8, 0.6, 0.5], [0.6]))
def test_what_is_written_over_is_not_what_a_code_that_is_not_kept_was_made_of(share):
    """Then there is nothing decoded to write over, and the plan knows: it is not made a second time."""
    model, x, loss = gated_perceptron(layers=3)
    given = (None, None, loss["loss_fn"], loss["loss_inputs"])
    with analyzed(model, options_for(model, on_infeasible="best"), (x,), *given) as (analysis, _):
        kept = analysis.planner.keep_all().outcome.peak
        budget = int(share * kept)
        options = options_for(model, on_infeasible="best", budget=budget)
        applied = pipeline._applied(analysis, options, budget)
        assert applied.form.allotment is not None
        assert not applied.settled
        bindings = applied.form.expected.bindings()
        assert applied.line.peak(bindings).nbytes <= applied.choice.outcome.peak <= budget


class Mixer(Mlp):
    """Normalizations and a softmax are read in ways that are not linear."""

    def forward(self, x):
        p = torch.softmax(self.norm(x), -1)
        return super().forward(x + p * x)


def mixers():
    torch.manual_seed(0)
    model = nn.Sequential(*(Mixer() for _ in range(3)), nn.Linear(64, 4))
    x, y = torch.randn(2048, 64), torch.randint(4, (2048,))
    return model, x, {"loss_fn": F.cross_entropy, "loss_inputs": (y,), "allow": CODES}


def test_what_moves_means_is_taken_where_it_is_allowed(tmp_path):
    model, x, given = mixers()
    unbiased = fxmem.plan(model, "min", (x,), **given)
    bounded = fxmem.Noise(0.01, bounded=0.02)
    step = fxmem.optimize(model, "min", (x,), noise=bounded, verify=True, **given)
    noise = step.plan.noise
    assert (unbiased.noise.tier, noise.tier) == ("unbiased", "bounded")
    assert step.plan.predicted_peak < 0.9 * unbiased.predicted_peak
    assert 0 < max(group.error for group in noise.parameters) <= 0.02
    assert all(group.error == 0 for group in unbiased.noise.parameters)
    assert noise.backwards <= 20
    text = str(step.report())
    assert re.search(
        r"NOISE  bounded: adds .* moves their mean by [\d.]+ %, 2 % allowed", text, re.S
    )
    assert "The mean over many steps is the exact gradient" not in text
    step.plan.save(tmp_path / "plan.json")
    file = str(tmp_path / "plan.json")
    with pytest.raises(fxmem.PlanMismatchError, match="would make its gradients wrong"):
        fxmem.plan(model, "min", (x,), plan=file, **given)
    again = fxmem.plan(model, "min", (x,), plan=file, noise=bounded, **given)
    assert again.predicted_peak == step.plan.predicted_peak


def test_gradients_that_are_complex_have_two_parts():
    def body(m, x):
        h = torch.tanh(x @ m.a)
        z = torch.complex(h, F.gelu(h @ m.b)) @ m.w
        return (z * m.v).abs().square().mean()

    torch.manual_seed(0)
    parts = {"a": torch.randn(32, 32) / 6, "b": torch.randn(32, 32) / 6}
    parts["w"] = torch.randn(32, 32, dtype=torch.complex64) / 6
    model = Shell(body, **parts, v=torch.randn(32, dtype=torch.complex64))
    x = torch.randn(512, 32)
    noise = fxmem.Noise(0.1, bounded=0.02)
    step = fxmem.optimize(model, "min", (x,), allow=CODES, noise=noise)
    group = next(g for g in step.plan.noise.parameters if g.parameters == "w")
    model(x).backward()
    exact, model.w.grad = model.w.grad, None
    assert group.square == pytest.approx(float(exact.abs().square().sum()), rel=1e-4)
    step(x).backward()
    moved = float((model.w.grad - exact).abs().square().sum())
    assert moved > 0
    assert group.added == pytest.approx(moved, rel=0.2)


def test_means_that_move_too_far_are_left_alone(monkeypatch):
    """What is seen has the last word: less of it is tried once, then none."""
    model, x, given = mixers()
    calls = []

    def distances(self, coded, draws=2):
        calls.append(draws)
        self.backwards += draws
        return {"0.norm.weight": 1e9} if draws == 1 else {}

    monkeypatch.setattr(travelling.Draws, "distances", distances)
    plan = fxmem.plan(model, "min", (x,), noise=fxmem.Noise(0.01, bounded=0.02), **given)
    assert calls == [1, 1, 2]
    assert plan.noise.tier == "unbiased"
    assert plan.noise.backwards <= 20


def test_noise_that_travels_too_much_stays_out(monkeypatch):
    """The draws have the last word."""
    model, x, loss = gated_perceptron(layers=2)
    loud = fxmem.plan(model, "min", (x,), allow=CODES, **loss)
    monkeypatch.setattr(travelling.Draws, "distances", lambda *_: {"0.gate.weight": 1e9})
    quiet = fxmem.plan(model, "min", (x,), allow=CODES, **loss)
    assert any(g.added for g in loud.noise.parameters if g.parameters.endswith("bias"))
    assert loud.predicted_peak < quiet.predicted_peak
    groups = quiet.noise.parameters if quiet.noise else ()
    assert not any(g.added for g in groups if g.parameters.endswith("bias"))


def test_verification_measures_the_noise():
    model, x, _, loss = perceptron()
    step = fxmem.optimize(model, "min", (x,), allow=CODES, verify=True, **loss)
    text = str(step.report())
    noise = step.plan.noise
    assert (
        f"NOISE  unbiased: adds {100 * noise.predicted:.3g} % to the variance of gradients" in text
    )
    assert "sampled, not worst case" in text
    assert "parameters bitwise equal to the unchanged step" in text
    row = next(line for line in text.splitlines() if line.startswith("*.weight"))
    predicted, measured = map(float, re.findall(r"([\d.e-]+) %", row))
    assert measured == pytest.approx(predicted, rel=0.05)
    assert "int" in text or "fp4" in text


# -- Refusals --------------------------------------------------------------------------------------------


def refused(match, model, x, kind=fxmem.FxmemError, **options):
    with pytest.raises(kind, match=match):
        fxmem.plan(model, "min", x, allow=CODES, **options)


def test_what_cannot_be_measured_is_refused():
    model, x, y, loss = perceptron()
    refused("needs the loss", model, (x,))
    refused("of 1 row", model, (x[:1],), loss_fn=F.cross_entropy, loss_inputs=(y[:1],))
    refused("should be a tuple of 2", model, (x,), noise=fxmem.Noise(0.01, ((x,),)), **loss)
    refused("from 0 to below 1", model, (x,), noise=1.5, **loss)
    refused("from 0 to below 1", model, (x,), noise=fxmem.Noise(-1), **loss)
    refused("bounded should be", model, (x,), noise=fxmem.Noise(bounded=1), **loss)
    refused("list of tuples", model, (x,), noise=fxmem.Noise(0.01, iter([(x, y)])), **loss)
    narrow = fxmem.Noise(0.01, [(x[:, 1:], y)])
    refused("batches of fxmem.Noise, and the model refuses", model, (x,), noise=narrow, **loss)
    frozen = copy.deepcopy(model).requires_grad_(False)
    refused("no parameter", frozen, (x.clone().requires_grad_(),), **loss)
    meta = {"loss_fn": F.cross_entropy, "loss_inputs": (y.to("meta"),)}
    refused("real parameters", model.to("meta"), (x.to("meta"),), **meta)


def test_an_example_whose_gradients_are_zero_says_nothing_of_noise():
    """As where all targets are padding; any code would add nothing to nothing there."""
    model, x, y, _ = perceptron(layers=2)
    loss = {"loss_fn": F.cross_entropy, "loss_inputs": (torch.full_like(y, -100),)}
    assert fxmem.plan(model, "min", (x,), allow=CODES, **loss).noise is None


def test_an_infeasible_budget_names_the_one_that_works(smallest):
    model, x, _, loss, step = smallest
    floor = step.plan.predicted_peak
    with pytest.raises(fxmem.BudgetInfeasibleError) as found:
        fxmem.plan(model, floor - 1, (x,), allow=CODES, **loss)
    assert found.value.smallest_peak == floor
    assert found.value.best_plan.noise.tier == "unbiased"
    assert fxmem.plan(model, floor, (x,), allow=CODES, **loss).predicted_peak <= floor


def test_reports_take_the_ceiling():
    model, x, _, loss = perceptron(rows=512, width=64)
    codes = ("lossless", "quantize")
    found = fxmem.report(model, (x,), "min", allow=codes, noise=0.2, **loss)
    assert "ceiling 20 %" in str(found)


class Gated(nn.Module):
    """Its sizes follow from the batch's through views."""

    def __init__(self):
        super().__init__()
        self.ups = nn.ModuleList(nn.Linear(64, 64) for _ in range(3))
        self.gates = nn.ModuleList(nn.Linear(64, 64) for _ in range(3))

    def forward(self, x):
        x = x.view(-1, 4, 64)
        for up, gate in zip(self.ups, self.gates, strict=True):
            x = x + F.gelu(up(x)) * F.silu(gate(x))
        return x.square().mean()


def test_sizes_that_change_have_codes():
    """One plan serves them; at each size its bytes are kept, and the noise is what it is at the others."""
    torch.manual_seed(0)
    model, x = Gated(), torch.randn(512, 64)
    how = {"dynamic_shapes": {0: {0: "B"}}, "allow": CODES, "noise": 0.02}
    step = fxmem.optimize(model, "0.7x", (x,), **how)
    plan = step.plan
    assert plan.noise.tier == "unbiased"
    assert plan.valid_for["B"][1] >= 512
    off = []
    for rows in (512, 256, 128):
        some = torch.randn(rows, 64)
        want = gradients_of(model, model, some)
        got = gradients_of(step, model, some)
        errors = sum(float((g - w).square().sum()) for g, w in zip(got, want, strict=True))
        off.append(errors / sum(float(w.square().sum()) for w in want))
        sizes, loss = cpu_allocations(lambda some=some: backward_of(step, model, some))
        del loss
        less = (512 - rows) * 64 * 4
        assert plan.resident - less + max(accumulate(sizes)) <= plan.predicted_peak
    assert all(0 < error < 0.1 for error in off)
    assert max(off) < 3 * min(off)
    assert len(step._session.programs) == 1


def backward_of(run, model, x):
    model.zero_grad(set_to_none=True)
    torch.manual_seed(0)
    loss = run(x)
    loss.backward()
    return loss


def gradients_of(run, model, x):
    backward_of(run, model, x)
    return [p.grad.clone() for p in model.parameters()]


def test_hooks_of_gradients_do_not_run_while_noise_is_measured():
    model, x, _, loss = perceptron(layers=2)
    seen = []
    for p in model.parameters():
        p.register_post_accumulate_grad_hook(seen.append)
    fxmem.plan(model, "min", (x,), allow=CODES, **loss)
    assert not seen
    assert all(p.grad is None for p in model.parameters())


def test_room_that_is_left_makes_codes_finer(smallest):
    model, x, _, loss, step = smallest
    floor = step.plan
    wide = fxmem.plan(model, int(1.08 * floor.predicted_peak), (x,), allow=CODES, **loss)
    assert wide.predicted_peak <= wide.budget
    assert floor.predicted_peak < wide.predicted_peak
    assert 0 < wide.noise.predicted < floor.noise.predicted
