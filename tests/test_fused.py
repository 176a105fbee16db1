"""What a step will peak at as Inductor's kernels: the schedule of each half, run through in numbers."""

import contextlib
import threading
from types import SimpleNamespace

import pytest
import torch
from torch import fx
from torch._dynamo.convert_frame import compile_lock
from torch._inductor import config, metrics
from torch._inductor.graph import GraphLowering
from torch.fx.experimental.proxy_tensor import make_fx

from fxmem._torch import inductor as _torch_inductor
from fxmem._torch import symbolic_fake_mode
from fxmem._torch.inductor import Called, Freed, Made, Moved, Schedule
from fxmem._torch.reductions import EarlyReductions, _Order, reductions_early
from fxmem.graphs.graph import OutputKind
from fxmem.graphs.workspace import Workspaces
from fxmem.steps.fused import peak_of, run

CPU = torch.device("cpu")


def scheduled(function, *tensors, backward=False, **how):
    mode = symbolic_fake_mode()
    given = [mode.from_tensor(t, static_shapes=True) for t in tensors]
    module = make_fx(function)(*given)
    kernels = metrics.generated_kernel_count
    with config.patch(fx_graph_cache=False):
        found = _torch_inductor.schedule(
            module, backward=backward, static_inputs=[], visible=range(1), strides={}, **how
        )
    assert metrics.generated_kernel_count == kernels  # no code was made
    return found


def centred(x):
    return ((x - x.sum(1, keepdim=True)).exp(),)


def told(schedule):
    """Events as text, operators without their nodes."""
    return [f"{type(e).__name__} {' '.join(map(str, e[:2]))}" for e in map(_plain, schedule.events)]


def _plain(event):
    return Called(event.node.target, []) if isinstance(event, Called) else event


def test_what_lives_within_one_kernel_takes_no_memory():
    found = scheduled(centred, torch.randn(8, 64))
    assert [e for e in told(found) if e.startswith("Made")] == ["Made buf1 2048"]
    assert found.returned == ["buf1"]
    assert found.strides == {"exp": (64, 1)}


def test_operators_make_their_results_and_a_kernel_writes_over_what_it_read_last():
    def function(x):
        y = torch.mm(x, x)
        return (torch.mm(y.sin(), x),)

    found = scheduled(function, torch.randn(8, 8))
    assert told(found) == [
        "Made buf0 256",
        "Called aten.mm.default []",
        "Moved buf1 buf0",
        "Made buf2 256",
        "Called aten.mm.default []",
        "Freed buf1",
        "Freed x_1",
    ]
    assert run(found, {}, found.returned, Workspaces(), CPU)[0] == 512


def test_what_an_operator_of_several_results_works_in_counts():
    """Dropout multiplies by its mask as numbers of the operand's type, which is 4096 bytes more."""

    def function(x):
        dropped, mask = torch.ops.aten.native_dropout.default(x, 0.5, True)
        return dropped.sin(), mask

    found = scheduled(function, torch.randn(32, 32))
    assert told(found)[:3] == [
        "Made buf1 4096",
        "Made buf2 1024",
        "Called aten.native_dropout.default []",
    ]
    assert run(found, {}, found.returned, Workspaces(), CPU)[0] == 4096 + 1024 + 4096


def test_the_generators_state_is_held_while_draws_are_made_again():
    def function(state, x):
        replay = torch.ops.higher_order.run_with_rng_state
        return (replay(state, torch.ops.aten.rand_like.default, x),)

    state = torch.get_rng_state()
    with _torch_inductor._fake_generator_states(mode := symbolic_fake_mode()):
        given = [mode.from_tensor(t, static_shapes=True) for t in (state, torch.randn(8, 8))]
        module = make_fx(function)(*given)
    found = _torch_inductor.schedule(
        module, backward=True, static_inputs=[], visible=[], strides={}
    )
    assert run(found, {}, found.returned, Workspaces(), CPU)[0] == 256 + state.nbytes


def far_apart(x, w, v, u):
    """Two results of one size: when the second is made, nothing has read the first for a while."""
    wide = torch.mm(torch.mm(x, w), v)  # the peak
    first = torch.mm(torch.mm(x, x), u)
    meanwhile = torch.mm(x, first * wide)
    return (torch.mm(torch.mm(x, x * meanwhile), u),)


def test_a_buffer_waits_for_another_of_its_size_or_is_let_go_at_once():
    given = torch.randn(64, 64), torch.randn(64, 512), torch.randn(512, 1), torch.randn(64, 1)
    waits, at_once = (told(scheduled(far_apart, *given, freed_at_once=x)) for x in (False, True))
    assert "Freed buf2" not in waits
    assert "Moved buf6 buf2" in waits
    product = at_once.index("Made buf3 256")  # the last that reads it
    assert at_once[product + 1 : product + 3] == ["Called aten.mm.default []", "Freed buf2"]
    assert "Made buf6 16384" in at_once
    assert "Moved buf5 buf1" in at_once  # that one was just read


def a_norms_backward(gradient, x, scale, weight):
    """One product of what is made again, and one whose gradients flow on and into a weight."""
    h = x * scale
    made_again = torch.mm(weight, h * 2)
    flowing = torch.mm(gradient, weight)
    return made_again, flowing * h.cos(), (flowing * x).sum(0)


def test_a_reduction_runs_before_what_can_be_written_over_its_operands(monkeypatch):
    """A quarter less, and its kernel is in one function with the next one."""
    given = [torch.randn(64, 64) for _ in range(4)]
    found = scheduled(a_norms_backward, *given, backward=True)
    kernels = ["Made buf4 256", "Made buf0 16384", "Moved buf3 buf2", "Freed scale_1", "Freed x_1"]
    assert [e for e in told(found) if "gradient" not in e] == [
        "Made buf2 16384",
        "Called aten.mm.default []",
        *kernels,
        "Made buf1 16384",
        "Called aten.mm.default []",
        "Freed buf0",
        "Freed weight_1",
    ]
    assert run(found, {}, found.returned, Workspaces(), CPU)[0] == 49_408
    monkeypatch.setattr(_torch_inductor, "reductions_early", contextlib.nullcontext)
    late = scheduled(a_norms_backward, *given, backward=True)
    assert told(late)[-3:] == ["Made buf4 256", "Freed buf2", "Freed x_1"]
    assert run(late, {}, late.returned, Workspaces(), CPU)[0] == 65_536


def two_layers(gradient, weight, up, down, x, p, q):
    """Sums that read one tensor, before and after a gradient of a weight: they become one kernel."""
    scale = (gradient * p).sum(0)
    h = gradient.sin()
    of_weight = torch.mm(x, h)
    flowing = gradient + torch.mm(torch.mm(h, up), down) * 2
    return scale, of_weight, (flowing * q).sum(0), torch.mm(flowing.cos(), weight)


@config.patch(reorder_for_peak_memory=False)  # of these few kernels torch finds an order as good
def test_the_gradient_of_a_weight_is_made_before_its_operand_is_in_the_way(monkeypatch):
    shapes = (256, 64), (64, 64), (64, 512), (512, 64), (64, 256), (256, 64), (256, 64)
    given = [*map(torch.randn, shapes)]
    found = scheduled(two_layers, *given, backward=True)
    assert told(found)[:6] == [
        *("Made buf1 65536", "Made buf2 16384", "Called aten.mm.default []", "Freed x_1"),
        *("Made buf3 524288", "Called aten.mm.default []"),
    ]
    held = {"x_1": 65_536}
    assert run(found, held, found.returned, Workspaces(), CPU)[0] == 606_208
    monkeypatch.setattr(_Order, "_shrinks", lambda *_: False)
    late = scheduled(two_layers, *given, backward=True)
    assert told(late).index("Freed x_1") > told(late).index("Freed q_1")
    assert run(late, held, late.returned, Workspaces(), CPU)[0] == 720_896


@config.patch(reorder_for_peak_memory=False)
def test_what_makes_more_than_it_lets_go_of_stays_where_it_is():
    shapes = (32, 64), (64, 64), (64, 512), (512, 64), (64, 32), (32, 64), (32, 64)
    found = told(scheduled(two_layers, *map(torch.randn, shapes), backward=True))
    assert found.index("Freed x_1") > found.index("Freed q_1")


def test_another_pass_over_inductors_kernels_still_runs():
    seen = []

    def other(nodes):
        seen.append(len(nodes))
        return nodes

    with config.patch(_post_fusion_custom_pass=other):
        scheduled(centred, torch.randn(8, 64))
        assert config._post_fusion_custom_pass is other
        with reductions_early():  # torch would cache what a pass of its own kind has ordered
            assert not isinstance(config._post_fusion_custom_pass, EarlyReductions)
    assert seen == [1]


def test_no_other_thread_compiles_meanwhile():
    """What ends a compilation where its kernels are known would end every thread's."""
    found = []
    thread = threading.Thread(target=lambda: found.append(scheduled(centred, torch.ones(8, 64))))
    with compile_lock:  # as Dynamo does
        thread.start()
        thread.join(2)
        assert not found
    thread.join()
    assert found[0].returned == ["buf1"]


def test_code_of_what_was_lowered_before_is_the_same_code(monkeypatch):
    """Byte for byte, and without lowering again."""
    written, lowered = [], []

    def without_compiler(graph, code):
        written.append(code.value)
        return SimpleNamespace(call=lambda args: args, __file__=__file__)

    def noted(graph, *args):
        lowered.append(graph)
        return run_graph(graph, *args)

    run_graph = GraphLowering.run
    monkeypatch.setattr(GraphLowering, "_compile_to_module_lines", without_compiler)
    monkeypatch.setattr(GraphLowering, "run", noted)
    given = [symbolic_fake_mode().from_tensor(torch.randn(64, 64), static_shapes=True)]
    how = {"backward": False, "static_inputs": [], "visible": range(1), "strides": {}}

    def traced():
        return make_fx(lambda x: (*centred(torch.mm(x.sin(), x)), x.sum(0)))(*given)

    with config.patch(fx_graph_cache=False):
        _torch_inductor.inductor(traced(), **how)
        found = _torch_inductor.schedule(traced(), **how)
        _torch_inductor.inductor(traced(), **how, lowered=found.lowered)
    assert len(lowered) == 2
    first, second = ([x for x in code.splitlines() if x[:1] != "#"] for code in written)
    assert first == second


# -- In numbers --------------------------------------------------------------------------------------


def test_a_buffer_in_the_memory_of_another_adds_nothing():
    events = [Made("a", 100), Moved("b", "a"), Made("c", 10), Freed("b"), Made("d", 50), Freed("c")]
    assert run(Schedule(events, [], {}), {}, ["d"], Workspaces(), CPU) == (110, {"d": 50})


def test_on_cuda_buffers_take_whole_blocks():
    cuda = torch.device("cuda")
    assert run(Schedule([Made("a", 513)], [], {}), {}, [], Workspaces(), cuda)[0] == 1024


def _half(inputs, outputs):
    graph = fx.Graph()
    nodes = {name: graph.placeholder(name) for name in inputs}
    graph.output([nodes[name] for name in outputs])
    return fx.GraphModule({}, graph)


@pytest.mark.parametrize(
    ("kind", "peak"),
    [
        (OutputKind.RESULT, 250),  # the caller holds it: 100 + 50 and the gradient
        (OutputKind.MUTATION, 150),  # it goes with its last reader
    ],
)
def test_saved_tensors_end_with_the_last_reader_of_their_buffer(kind, peak):
    forward = Schedule([Made("r", 100), Made("s", 50)], ["r", "r", "s", "s"], {})
    events = [Freed("x"), Freed("y"), Made("g", 100), Freed("z")]
    backward = Schedule(events, ["g"], {})
    halves = SimpleNamespace(
        forward=_half(["o", "x", "y", "z"], ["o", "x", "y", "z"]),
        backward=_half(["x", "y", "z"], ["x"]),
        num_forward_outputs=1,
        output_kinds=[kind],
    )
    assert peak_of(forward, backward, halves, Workspaces(), 0, CPU) == peak
    assert peak_of(forward, backward, halves, Workspaces(), 999, CPU) == 1149
