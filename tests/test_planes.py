"""Codes in operators that fuse: their bits against our operators', the graphs as text, the code counted."""

import re
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from dynamo import fresh_dynamo
from expecttest import assert_expected_inline
from test_encodings import order, same, strange
from test_inductor import assert_close, seeded, stepped
from torch import fx, nn
from torch._inductor import config as inductor_config
from torch._inductor.graph import GraphLowering

import fxmem
from fxmem._torch import inductor as _torch_inductor
from fxmem._torch import new_fake_mode
from fxmem.codes import encodings, planes
from fxmem.graphs.emit import boxed
from fxmem.steps import inductor

aten = torch.ops.aten


@pytest.fixture(autouse=True)
def _clean():
    with fresh_dynamo():
        yield


# -- Bits ----------------------------------------------------------------------------------------------

EVEN = [((16, 3, 5, 7), (8, 1, 1, 1)), ((2, 64, 5), (2, 4, 1)), ((6, 4, 10), (2, 4, 1))]
EVEN += [((3, 8, 9, 1), (1, 8, 1, 1)), ((8, 1), None), ((1, 8, 1, 3), (1, 8, 1, 1))]


@pytest.mark.parametrize(("shape", "parts"), EVEN, ids=str)
def test_dimensions_but_the_innermost_are_cut_in_eight(shape, parts):
    assert planes._blocks(shape) == (parts and list(parts))


@pytest.mark.parametrize("shape", [(), (0, 8), (8,), (3, 3, 8), (4, 3, 2), (2, 2, 9)], ids=str)
def test_what_cannot_be_cut_stays_as_it_is(shape):
    assert planes._blocks(shape) is None


def called(operator, *args):
    """What runs in the place of a call, given the same arguments."""
    graph = fx.Graph()
    nodes = [graph.placeholder(f"x{i}") if torch.is_tensor(a) else a for i, a in enumerate(args)]
    for node, value in zip(nodes, args, strict=True):
        if isinstance(node, fx.Node):
            node.meta["val"] = value
    instead = planes.fusible(graph.call_function(operator, tuple(nodes)))
    assert instead is not None
    return instead(*args)


LAYOUTS = [((16, 3, 5, 7), False), ((2, 8, 6, 4), True), ((2, 64, 5), False), ((8, 3, 3, 2), True)]


@pytest.mark.parametrize(("shape", "channels_last"), LAYOUTS, ids=str)
def test_what_reads_bits_gives_the_same_bits(shape, channels_last):
    x, grad = strange(shape, channels_last), strange(shape, channels_last, seed=1)
    for threshold in (0, 0.5):
        bits = called(encodings.pack_above, x, threshold)
        assert bits.dtype is torch.uint8
        assert bits.shape == (x.numel() // 8,)
        want = aten.threshold_backward(grad, x, threshold)
        assert same(called(encodings.threshold_backward, grad, bits, order(x)), want)
    bits = called(encodings.pack_positive, x)
    want = aten.leaky_relu_backward(grad, x, 0.1, False)
    assert same(called(encodings.leaky_relu_backward, grad, bits, order(x), 0.1), want)
    mask = x > 0
    bits = called(encodings.pack, mask)
    assert torch.equal(planes._packed(mask, order(mask)), bits)  # from memory, or fused
    want = aten.native_dropout_backward(grad, mask, 1 / 0.9)
    assert same(called(encodings.dropout_backward, grad, bits, order(x), 1 / 0.9), want)
    back = called(encodings.unpack, bits, list(mask.shape), list(mask.stride()))
    assert torch.equal(back, mask)
    assert back.stride() == mask.stride()


def test_a_gradient_that_is_laid_out_otherwise_meets_its_bits():
    x, grad = strange((2, 8, 6, 4), True), strange((2, 8, 6, 4), seed=1)
    bits = called(encodings.pack_above, x, 0)
    want = aten.threshold_backward(grad, x, 0)
    got = called(encodings.threshold_backward, grad, bits, order(x))
    assert same(got.contiguous(), want.contiguous())


def test_indices_become_short_and_long_again():
    indices = torch.arange(200).view(8, 25)
    code = called(encodings.shorten, indices, torch.uint8)
    assert code.dtype is torch.uint8
    assert torch.equal(called(encodings.lengthen, code, torch.int64), indices)


def test_a_mask_in_memory_is_packed_by_one_operator_on_a_cpu():
    graph = fx.Graph()
    x = graph.placeholder("x")
    dropped = graph.call_function(aten.native_dropout.default, (x, 0.1, True))
    lies = graph.call_function(encodings.pack, (graph.call_function(lambda p: p[1], (dropped,)),))
    computed = graph.call_function(encodings.pack, (graph.call_function(aten.gt.Scalar, (x, 0)),))
    for node in graph.nodes:
        node.meta["val"] = torch.ones(16, 4, dtype=torch.bool)
    with mock.patch.object(planes, "pack_planes", wraps=planes.pack_planes) as by_operator:
        bits = planes.fusible(lies)(torch.ones(16, 4, dtype=torch.bool))
        assert by_operator.call_count == 1
        assert torch.equal(planes.fusible(computed)(torch.ones(16, 4, dtype=torch.bool)), bits)
        assert by_operator.call_count == 1


# -- Graphs --------------------------------------------------------------------------------------------


def traced(body, *args):
    """The body's graph in Inductor's operators, as text."""
    with new_fake_mode() as mode:
        fakes = [mode.from_tensor(a) for a in args]
        graph = fx.Graph()
        nodes = [graph.placeholder(f"x{i}") for i in range(len(args))]
        graph.output((body(graph, *nodes),))
        module = fx.GraphModule({}, graph)
        for node in graph.nodes:
            if node.op == "placeholder":
                node.meta["val"] = fakes[int(node.name[1:])]
        fx.Interpreter(module).run(*fakes)
        for node, fake in zip(nodes, fakes, strict=True):
            node.meta["val"] = fake
    made = _torch_inductor.decomposed(module, planes.fusible)
    return "\n".join(
        f"{n.name} = {n.target}({', '.join(map(str, n.args))})"
        for n in made.graph.nodes
        if n.op == "call_function"
    )


def test_a_reader_of_bits_as_text():
    def body(graph, grad, bits):
        return graph.call_function(encodings.threshold_backward, (grad, bits, [0, 1]))

    text = traced(body, torch.randn(16, 4), torch.zeros(8, dtype=torch.uint8))
    assert_expected_inline(
        text,
        """\
iota = prims.iota.default(8)
view = aten.view.default(iota, [8, 1, 1, 1])
view_1 = aten.view.default(x1, [1, 2, 1, 4])
convert_element_type = prims.convert_element_type.default(view_1, torch.int32)
rshift = aten.__rshift__.Tensor(convert_element_type, view)
bitwise_and = aten.bitwise_and.Scalar(rshift, 1)
ne = aten.ne.Scalar(bitwise_and, 0)
view_2 = aten.view.default(ne, [16, 4])
permute = aten.permute.default(view_2, [0, 1])
scalar_tensor = aten.scalar_tensor.default(0.0)
where = aten.where.self(permute, x0, scalar_tensor)""",
    )


# -- Steps ---------------------------------------------------------------------------------------------


class Rectified(nn.Module):
    """Rectifiers, dropout and comparisons between products: of each the backward needs a bit."""

    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(16, 256), nn.Linear(256, 16)

    def forward(self, x):
        for _ in range(5):
            y = F.dropout(F.relu(self.up(x)), 0.1)
            x = x + self.down(torch.where(y < 0.5, y, 0.5 * y))
        return x.square().mean()


def rows():
    return torch.randn(256, 16, generator=torch.Generator().manual_seed(3))


CODED = ("fxmem.pack", "fxmem.dropout_backward", "fxmem.threshold_backward", "fxmem.unpack")


def operators(*graphs):
    return [str(n.target) for g in graphs for n in g.graph.nodes if n.op == "call_function"]


def test_gradients_are_those_of_our_operators_to_the_bit(monkeypatch):
    monkeypatch.setattr(_torch_inductor, "inductor", lambda module, **_: (boxed(module), {}))
    seen, own, saved = [], [], []
    for instead in (lambda _: None, planes.fusible):
        monkeypatch.setattr(inductor, "fusible", instead)
        model, x = seeded(Rectified), rows()
        step = fxmem.optimize(model, "min", (x,), allow=("lossless",), compiler="inductor")
        seen.append(stepped(step, model, x))
        names = operators(step.forward_graph, step.backward_graph)
        own.append(sum(name.startswith(CODED) for name in names))
        given = step.backward_graph.graph.find_nodes(op="placeholder")
        saved.append(sum(n.meta["val"].nbytes for n in given))
    assert own[0] > own[1]
    assert saved[0] == saved[1]  # codes are saved, not made again from what is larger
    for name, gradient in seen[0]["gradients"].items():
        assert torch.equal(gradient, seen[1]["gradients"][name]), name


def test_codes_fuse_within_the_budget():
    """One operator packs a mask that lies in memory; all other codes are inside of Inductor's kernels."""
    model, x = seeded(Rectified), rows()
    want = stepped(eager := seeded(Rectified), eager, x)
    written = []
    with (
        mock.patch.object(GraphLowering, "save_output_code", staticmethod(written.append)),
        inductor_config.patch(fx_graph_cache=False),
    ):
        step = fxmem.optimize(model, "min", (x,), allow=("lossless",), compiler="inductor")
    assert any(d.action == "encode" for d in step.plan.decisions)
    assert step.plan.predicted_peak <= step.plan.budget
    assert_close(want, stepped(step, model, x))
    calls = re.findall(r"= torch\.ops\.(fxmem\.\w+)", "".join(written[-2:]))
    assert not [name for name in calls if name.startswith(CODED) and "planes" not in name]
    assert "<<" in written[-2] or "fxmem.pack_planes" in calls
    assert ">>" in written[-1]
