"""The emitted functions: their source as text, what they hold while they run, what they compute."""

import gc
import linecache
import math
import operator
import traceback

import pytest
import torch
import torch.nn.functional as F
from expecttest import assert_expected_inline
from torch import fx, nn
from torch.fx.experimental.proxy_tensor import make_fx
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from fxmem import _torch
from fxmem.graphs import emit

aten = torch.ops.aten

# -- Small graphs ------------------------------------------------------------------------------------


def tensor(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def module_of(build, *names, **attributes):
    """A module whose graph is what ``build(graph, *placeholders)`` makes and returns."""
    root = nn.Module()
    for name, value in attributes.items():
        setattr(root, name, value)
    graph = fx.Graph()
    graph.output(build(graph, *[graph.placeholder(n) for n in names]))
    return fx.GraphModule(root, graph)


def emitted(build, *names, **attributes):
    return emit.emit(module_of(build, *names, **attributes))


def source(function):
    return "".join(linecache.cache[function.__code__.co_filename][2])


def linear(g, x, w):
    t = g.call_function(aten.t.default, (w,))
    mm = g.call_function(aten.mm.default, (x, t))
    return (g.call_function(aten.view.default, (mm, [2, 2, 3])),)


def keep(value):
    return value


# -- The source --------------------------------------------------------------------------------------


def test_the_source_goes_with_the_function():
    function = emitted(linear, "x", "w")
    file = function.__code__.co_filename
    assert file in linecache.cache
    del function
    gc.collect()
    assert file not in linecache.cache


def test_a_linear_layer():
    assert_expected_inline(
        source(emitted(linear, "x", "w")),
        """\
def run(fxmem_args):
    x, w, = fxmem_args
    fxmem_args.clear()
    t_default = w.t(); w = None
    mm_default = fxmem_0_aten_mm_default(x, t_default); t_default = x = None
    view_default = mm_default.view([2, 2, 3]); mm_default = None
    return [view_default]
""",
    )


def test_constants_with_and_without_a_literal():
    def build(g, x):
        full = g.call_function(
            aten.full.default, ([2, -1], math.inf), {"dtype": torch.float64, "device": None}
        )
        kept = g.call_function(keep, ({"a": [x, (1.5, "b")], "c": slice(None, -1, None)},))
        again = g.call_function(aten.full.default, ([], -math.inf), {"dtype": torch.float64})
        return full, kept, None, 3, again

    assert_expected_inline(
        source(emitted(build, "x")),
        """\
def run(fxmem_args):
    x, = fxmem_args
    fxmem_args.clear()
    full_default = fxmem_2_aten_full_default([2, -1], fxmem_0_float, dtype=fxmem_1_dtype, device=None)
    keep = fxmem_3_keep({'a': [x, (1.5, 'b', )], 'c': slice(None, -1, None)}); x = None
    full_default_1 = fxmem_2_aten_full_default([], fxmem_4_float, dtype=fxmem_1_dtype)
    return [full_default, keep, None, 3, full_default_1]
""",
    )


def test_what_nobody_reads_is_let_go_at_once():
    def build(g, x, unused):
        pair = g.call_function(aten.topk.default, (x, 1))
        g.call_function(operator.getitem, (pair, 1))
        return (g.call_function(operator.getitem, (pair, 0)),)

    assert_expected_inline(
        source(emitted(build, "x", "unused")),
        """\
def run(fxmem_args):
    x, unused, = fxmem_args
    fxmem_args.clear()
    unused = None
    topk_default = fxmem_0_aten_topk_default(x, 1); x = None
    getitem = topk_default[1]; getitem = None
    getitem_1 = topk_default[0]; topk_default = None
    return [getitem_1]
""",
    )


def test_a_graph_without_inputs():
    function = emitted(lambda g: (g.call_function(aten.ones.default, ([2],)), None))
    assert_expected_inline(
        source(function),
        """\
def run(fxmem_args):
    fxmem_args.clear()
    ones_default = fxmem_0_aten_ones_default([2])
    return [ones_default, None]
""",
    )
    result, none = function([])
    assert torch.equal(result, torch.ones(2))
    assert none is None


def test_each_function_has_a_file_of_its_own():
    first, second = emitted(linear, "x", "w"), emitted(linear, "x", "w")
    assert first.__code__.co_filename != second.__code__.co_filename
    linecache.checkcache()
    assert source(first) == source(second)


def test_other_kinds_of_nodes_are_refused():
    with pytest.raises(NotImplementedError, match="no call_method nodes: %relu"):
        emitted(lambda g, x: (g.call_method("relu", (x,)),), "x")


# -- Lifetimes ---------------------------------------------------------------------------------------


class Watch(TorchDispatchMode):
    """Notes at each operator which of the storages made so far are still there."""

    def __init__(self, **inputs):
        super().__init__()
        self.storages = {n: StorageWeakRef(t.untyped_storage()) for n, t in inputs.items()}
        self.lines = []

    def alive(self):
        return " ".join(n for n, storage in self.storages.items() if not storage.expired())

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        self.lines.append(f"{name}: {self.alive()}")
        result = func(*args, **(kwargs or {}))
        leaves = tree_leaves(result)
        for i, leaf in enumerate(leaves):
            label = f"{name}[{i}]" if len(leaves) > 1 else name
            self.storages[label] = StorageWeakRef(leaf.untyped_storage())
        return result


def lifetimes(build, **shapes):
    """What is alive when each operator starts, and at the end, where nobody else holds anything."""
    function = emitted(build, *shapes)
    inputs = {name: tensor(*shape) for name, shape in shapes.items()}
    watch = Watch(**inputs)
    args = list(inputs.values())
    inputs.clear()
    with watch:
        results = function(args)
    assert args == []
    lines = [*watch.lines, f"returned: {watch.alive()}"]
    del results
    assert watch.alive() == ""
    return "\n".join(lines)


def test_a_value_dies_before_the_operator_after_its_last_reader():
    def build(g, x, w):
        mm = g.call_function(aten.mm.default, (x, w))
        exp = g.call_function(aten.exp.default, (mm,))
        mul = g.call_function(aten.mul.Tensor, (exp, mm))
        return (g.call_function(aten.sin.default, (mul,)),)

    assert_expected_inline(
        lifetimes(build, x=(2, 3), w=(3, 4)),
        """\
mm: x w
exp: mm
mul: mm exp
sin: mul
returned: sin""",
    )


def test_an_input_lives_to_its_last_reader_and_an_unused_one_not_at_all():
    def build(g, x, unused, late):
        exp = g.call_function(aten.exp.default, (x,))
        sin = g.call_function(aten.sin.default, (exp,))
        return (g.call_function(aten.mul.Tensor, (sin, late)),)

    assert_expected_inline(
        lifetimes(build, x=(2,), unused=(2,), late=(2,)),
        """\
exp: x late
sin: late exp
mul: late sin
returned: mul""",
    )


def test_a_storage_lives_as_long_as_a_view_of_it():
    def build(g, w):
        t = g.call_function(aten.t.default, (w,))
        ones = g.call_function(aten.ones.default, ([2],))
        exp = g.call_function(aten.exp.default, (t,))
        return (g.call_function(aten.sin.default, (exp,)), ones)

    assert_expected_inline(
        lifetimes(build, w=(2, 3)),
        """\
t: w
ones: w t
exp: w t ones
sin: ones exp
returned: ones sin""",
    )


def test_results_that_nobody_reads_die_with_their_maker():
    def build(g, x):
        g.call_function(aten.exp.default, (x,))
        pair = g.call_function(aten.topk.default, (x, 1))
        values = g.call_function(operator.getitem, (pair, 0))
        return (g.call_function(aten.sin.default, (values,)),)

    assert_expected_inline(
        lifetimes(build, x=(2,)),
        """\
exp: x
topk: x
sin: topk[0]
returned: sin""",
    )


def test_what_is_read_twice_by_its_last_reader():
    def build(g, x):
        square = g.call_function(aten.mul.Tensor, (x, x))
        joined = g.call_function(aten.cat.default, ([square, square],))
        return (g.call_function(aten.sin.default, (joined,)),)

    assert_expected_inline(
        lifetimes(build, x=(2,)),
        """\
mul: x
cat: mul
sin: cat
returned: sin""",
    )


def test_an_output_that_is_read_stays():
    def build(g, x):
        exp = g.call_function(aten.exp.default, (x,))
        sin = g.call_function(aten.sin.default, (exp,))
        return (exp, g.call_function(aten.cos.default, (sin,)), exp)

    assert_expected_inline(
        lifetimes(build, x=(2,)),
        """\
exp: x
sin: exp
cos: exp sin
returned: exp cos""",
    )


def test_the_list_is_empty_before_the_first_operator():
    lengths = []

    def look(x):
        lengths.append(len(args))
        return x

    function = emitted(lambda g, x: (g.call_function(look, (x,)),), "x")
    args = [tensor(2)]
    function(args)
    assert lengths == [0]


def test_a_constant_of_the_module_stays():
    function = emitted(
        lambda g, x: (g.call_function(aten.add.Tensor, (x, g.get_attr("c"))),), "x", c=tensor(2)
    )
    x = tensor(2, seed=1)
    first, second = function([x])[0], function([x])[0]
    assert torch.equal(first, x + tensor(2))
    assert torch.equal(first, second)


# -- Constants ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "value",
    [
        None,
        True,
        0,
        -3,
        2**63 - 1,
        1.5,
        -0.0,
        1e-300,
        math.inf,
        -math.inf,
        math.nan,
        2 - 3j,
        "sum",
        'it\'s a "quote"\n\\',
        torch.float16,
        torch.contiguous_format,
        torch.strided,
        torch.device("cpu"),
        torch.device("meta"),
        ...,
        slice(None),
        slice(1, -1, 2),
        slice(None, math.inf, torch.int8),
        [],
        (),
        {},
        (1,),
        [[1, 2], [-3]],
        [(1, [None, math.nan]), {"a": (torch.int8, [slice(0, 2)])}],
        {"from": 1, "two words": {"c": -math.inf}},
    ],
    ids=repr,
)
def test_a_constant_arrives_as_it_was(value):
    function = emitted(lambda g: (g.call_function(keep, (value,), {}),))
    assert repr(function([])) == repr([value])
    as_keyword = emitted(lambda g: (g.call_function(keep, (), {"value": value}),))
    assert repr(as_keyword([])) == repr([value])


def test_nodes_inside_nested_arguments_and_slices():
    def build(g, x, n):
        nested = g.call_function(keep, ([(x, {"a": [n, None]})],))
        part = g.call_function(operator.getitem, (x, (slice(n, None, None), slice(None, n, 2))))
        return nested, part

    x = tensor(4, 5)
    nested, part = emitted(build, "x", "n")([x, 3])
    assert nested == [(x, {"a": [3, None]})]
    assert torch.equal(part, x[3:, :3:2])


def test_one_name_for_one_object_and_another_for_another():
    dtypes = [torch.int8, torch.int16, torch.int8]
    function = emitted(lambda g: (g.call_function(keep, (dtypes,)),))
    assert function([]) == [dtypes]
    assert "keep([fxmem_0_dtype, fxmem_1_dtype, fxmem_0_dtype])" in source(function)


def test_attributes_of_the_module_and_of_its_children():
    child = nn.Module()
    child.register_buffer("b", tensor(3))
    parameter = nn.Parameter(tensor(3, seed=1))
    attributes = {"child": child, "p": parameter}

    def build(g):
        return tuple(g.get_attr(name) for name in ("child.b", "p", "child", "p"))

    found = emitted(build, **attributes)([])
    assert found[0] is child.b
    assert found[1] is found[3] is parameter
    assert found[2] is child


def replayed(g, x):
    run = g.call_function(
        _torch.run_and_save_rng_state, (aten.native_dropout.default, x, 0.5, True)
    )
    state = g.call_function(operator.getitem, (run, 0))
    pair = g.call_function(operator.getitem, (run, 1))
    again = g.call_function(
        _torch.run_with_rng_state, (state, aten.native_dropout.default, x, 0.5, True)
    )
    return tuple(g.call_function(operator.getitem, (made, 0)) for made in (pair, again))


def test_a_higher_order_operator_replays_an_operator():
    first, second = emitted(replayed, "x")([tensor(64)])
    assert torch.equal(first, second)
    assert 0 < int((first == 0).sum()) < 64


def test_the_same_operator_called_first_and_then_replayed():
    def build(g, x):
        pair = g.call_function(aten.native_dropout.default, (x, 0.5, True))
        return (g.call_function(operator.getitem, (pair, 0)), *replayed(g, x))

    other, first, second = emitted(build, "x")([tensor(64)])
    assert torch.equal(first, second)
    assert not torch.equal(other, first)


def test_an_operator_that_was_called_before_is_passed_on_as_it_is():
    def build(g, x):
        return g.call_function(aten.exp.default, (x,)), g.call_function(keep, (aten.exp.default,))

    assert emitted(build, "x")([tensor(2)])[1] is aten.exp.default


# -- Results -----------------------------------------------------------------------------------------


def assert_same_results(module, *args):
    want, got = module(*args), emit.emit(module)(list(args))
    assert len(want) == len(got)
    for a, b in zip(want, got, strict=True):
        assert type(a) is type(b)
        if isinstance(a, torch.Tensor):
            assert torch.equal(a, b)
            assert (a.dtype, a.stride(), a.storage_offset()) == (
                b.dtype,
                b.stride(),
                b.storage_offset(),
            )
        else:
            assert a == b


def mlp(x, w, b):
    h = F.gelu(F.linear(x, w, b))
    return h.softmax(-1), h.sum(), None


def several_results(x):
    values, indices = x.topk(2)
    first, _, third = x.split(1, 0)
    mean, var = torch.var_mean(x, 1)
    return values, indices, first, third, mean - var, *x.unbind(1)


def views(x):
    y = x.t().reshape(3, 5).unsqueeze(1).expand(3, 2, 5)
    return y, y.permute(2, 0, 1), x[1:, ::2], x.transpose(0, 1), x.view(-1)


def keywords(x):
    y = x.to(torch.float64).sum(1, keepdim=True, dtype=torch.float32)
    return (
        torch.add(y, y, alpha=2),
        x.masked_fill(x > 0, -math.inf),
        torch.full_like(x, math.nan).isnan(),
    )


def constants(x):
    return (
        x + torch.tensor([1.0, 2.0, 3.0]),
        x[:, torch.tensor([2, 0])],
        torch.arange(3, device="cpu"),
    )


@pytest.mark.parametrize(
    ("body", "shapes"),
    [
        (mlp, [(5, 4), (3, 4), (3,)]),
        (several_results, [(3, 5)]),
        (views, [(5, 3)]),
        (keywords, [(5, 3)]),
        (constants, [(5, 3)]),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_the_results_are_those_of_fx(body, shapes):
    args = [tensor(*shape, seed=i) for i, shape in enumerate(shapes)]
    assert_same_results(make_fx(body)(*args), *args)


def test_the_results_are_those_of_fx_for_a_backward():
    def step(x, w):
        with torch.enable_grad():
            w = w.detach().requires_grad_()
            loss = F.layer_norm(F.relu(x @ w), (3,)).pow(2).sum()
        return loss.detach(), *torch.autograd.grad(loss, w)

    args = tensor(5, 4), tensor(4, 3, seed=1)
    assert_same_results(make_fx(step)(*args), *args)


def test_the_results_are_those_of_fx_for_sizes_that_are_computed():
    def body(x):
        return x.view(x.shape[0] * x.shape[1]).expand(x.shape[0], -1), x.shape[1] * 2

    module = make_fx(body, tracing_mode="symbolic")(tensor(5, 3))
    assert_same_results(module, tensor(4, 7))


VIEWS = {
    aten.expand.default: [((2, 3, 4),), ((-1, -1, 4),), ((2, 3, 4), {"implicit": True})],
    aten.permute.default: [((2, 0, 1),), ((-1, 1, 0),)],
    aten.t.default: [()],
    aten.transpose.int: [(0, 1), (-1, 0)],
    aten.unsqueeze.default: [(0,), (-1,)],
    aten.view.default: [((6,),), ((1, -1),), ((3, 2, 1),)],
}


def test_every_method_has_an_example():
    assert set(VIEWS) == set(emit._METHODS)


def viewed(target):
    """A contiguous tensor or a strided one, each in the middle of a storage."""
    storage = torch.arange(48.0)
    if target is aten.t.default:
        return [storage[5:11].view(2, 3), storage[3:].as_strided((2, 3), (9, 2)), storage[7:9]]
    if target is aten.view.default:
        return [storage[5:11].view(2, 3), storage[3:].as_strided((2, 3), (6, 2))]
    return [storage[5:11].view(2, 3, 1), storage[3:].as_strided((2, 3, 1), (9, 2, 7))]


@pytest.mark.parametrize(
    ("target", "arguments"),
    [(target, arguments) for target, examples in VIEWS.items() for arguments in examples],
    ids=str,
)
def test_a_method_gives_the_view_that_the_operator_gives(target, arguments):
    args = [list(a) if isinstance(a, tuple) else a for a in arguments if not isinstance(a, dict)]
    kwargs = next((a for a in arguments if isinstance(a, dict)), {})
    function = emitted(lambda g, x: (g.call_function(target, (x, *args), kwargs),), "x")
    assert f"x.{emit._METHODS[target]}(" in source(function)
    for x in viewed(target):
        (got,), want = function([x]), target(x, *args, **kwargs)
        assert torch.equal(got, want)
        assert (got.shape, got.stride()) == (want.shape, want.stride())
        assert got.storage_offset() == want.storage_offset() == x.storage_offset()
        assert got.untyped_storage()._cdata == x.untyped_storage()._cdata


@pytest.mark.parametrize(
    ("target", "args"),
    [
        (aten.expand.default, ([],)),
        (aten.permute.default, ([],)),
        (aten.t.default, ()),
        (aten.transpose.int, (0, -1)),
        (aten.view.default, ([],)),
    ],
    ids=str,
)
def test_a_method_takes_a_scalar_tensor(target, args):
    (got,) = emitted(lambda g, x: (g.call_function(target, (x, *args)),), "x")([torch.tensor(3.0)])
    assert got.shape == ()
    assert got.item() == 3


def test_a_method_takes_the_names_of_the_operator():
    function = emitted(
        lambda g, x: (
            g.call_function(aten.view.default, (x,), {"size": [3, 2]}),
            g.call_function(aten.permute.default, (x,), {"dims": [1, 0]}),
            g.call_function(aten.transpose.int, (x,), {"dim0": 0, "dim1": 1}),
            g.call_function(aten.unsqueeze.default, (x,), {"dim": 1}),
        ),
        "x",
    )
    x = tensor(2, 3)
    for got, want in zip(function([x]), (x.view(3, 2), x.t(), x.t(), x[:, None]), strict=True):
        assert torch.equal(got, want)


# -- Errors ------------------------------------------------------------------------------------------


def test_an_error_shows_the_line_of_the_operator():
    with pytest.raises(RuntimeError, match="mat1 and mat2") as raised:
        emitted(linear, "x", "w")([tensor(4, 5), tensor(3, 6)])
    text = "".join(traceback.format_exception(raised.value))
    line = "mm_default = fxmem_0_aten_mm_default(x, t_default); t_default = x = None"
    assert f"in run\n    {line}\n" in text


def test_an_error_in_a_method_shows_its_line():
    with pytest.raises(RuntimeError, match="shape") as raised:
        emitted(linear, "x", "w")([tensor(5, 4), tensor(3, 4)])
    text = "".join(traceback.format_exception(raised.value))
    assert "view_default = mm_default.view([2, 2, 3]); mm_default = None" in text


def test_the_wrong_number_of_arguments_is_an_error():
    with pytest.raises(ValueError, match="expected 2"):
        emitted(linear, "x", "w")([tensor(4, 5)])


# -- Names -------------------------------------------------------------------------------------------


def exponential(g, x):
    part = g.call_function(operator.getitem, (x, (slice(0, 2), None)))
    return (g.call_function(aten.exp.default, (part,)),)


COLLISIONS = [
    "fxmem_args",
    "fxmem_0_aten_exp_default",
]


@pytest.mark.parametrize(
    "name",
    ["args", "run", "slice", "list", "inf", "nan", "torch", "device", "fxmem", "exp", *COLLISIONS],
)
def test_a_node_may_have_any_name(name):
    x = tensor(3)
    (got,) = emitted(exponential, name)([x])
    assert torch.equal(got, x[:2, None].exp())


def test_results_may_be_named_like_what_we_call():
    def build(g, x):
        runs = g.create_node("call_function", aten.exp.default, (x,), name="run")
        part = g.create_node("call_function", operator.getitem, (runs, slice(1, 3)), name="slice")
        return (g.create_node("call_function", aten.sin.default, (part,), name="keep"),)

    x = tensor(4)
    (got,) = emitted(build, "x")([x])
    assert torch.equal(got, x.exp()[1:3].sin())
