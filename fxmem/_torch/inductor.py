"""Private functions of torch that lead to Inductor, each behind one small function of ours.

Compiled and run on torch 2.13.0, 2.11.0 and 2.15.0.  Imported when somebody asks for Inductor, because
that takes a second.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import math
import operator
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any, NamedTuple, ParamSpec, TypeVar
from unittest import mock

import torch
from torch import fx
from torch._dispatch.python import enable_python_dispatcher
from torch._functorch import config as functorch_config
from torch._functorch.partitioners import (
    get_default_op_list,
    min_cut_rematerialization_partition,
    reordering_to_mimic_autograd_engine,
)
from torch._guards import TracingContext, detect_fake_mode, tracing
from torch._inductor import codecache, compile_fx, config, ir
from torch._inductor.codegen import wrapper
from torch._inductor.codegen.common import Kernel
from torch._inductor.compile_fx import compile_fx_inner
from torch._inductor.decomposition import select_decomp_table
from torch._inductor.fx_passes.joint_graph import joint_graph_passes
from torch._inductor.lowering import lowerings, make_fallback
from torch._inductor.scheduler import NopKernelSchedulerNode, Scheduler
from torch._inductor.utils import BoxedBool
from torch._inductor.virtualized import V
from torch._prims import rng_prims
from torch.compiler import config as compiler_config
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.experimental.symbolic_shapes import ShapeEnv
from torch.utils._python_dispatch import _disable_current_modes
from torch.utils.checkpoint import CheckpointPolicy

from fxmem._torch import (
    COMPILE_LOCK,
    BoxedCallable,
    as_in_a_step,
    known_to_compile,
    random_as_in_eager,
)
from fxmem._torch.average_pools import DIVIDED_AS_EAGER, divided_as_eager
from fxmem._torch.concatenations import ONE_AT_A_TIME, one_concatenation_at_a_time
from fxmem._torch.convolutions import AS_THEY_LIE, operands_as_they_lie
from fxmem._torch.draws import DRAWS_IN_ORDER, draws_in_order
from fxmem._torch.reductions import reductions_early
from fxmem._torch.unity_build import unity_build

_P = ParamSpec("_P")
_T = TypeVar("_T")

Strides = dict[str, tuple[Any, ...]]
"""Name of a value -> the strides that it is given by."""

_INDICES = torch.ops.prims._low_memory_max_pool_offsets_to_indices.default

_graphs = itertools.count()


def _alone(function: Callable[_P, _T]) -> Callable[_P, _T]:
    """No other thread compiles meanwhile: some of torch's own functions are replaced for the time."""

    @functools.wraps(function)
    def locked(*args: _P.args, **kwargs: _P.kwargs) -> _T:
        with COMPILE_LOCK, known_to_compile():
            return function(*args, **kwargs)

    return locked


@contextlib.contextmanager
def _fake_generator_states(mode: Any) -> Iterator[None]:
    """Inside, an operator that is traced with the generator's state gives a fake one.

    torch gives the real one, which no graph of fake tensors can be traced with.
    """

    def fake(read: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
        return lambda *args: mode.from_tensor(read(*args), static_shapes=True)

    on_cuda = {**vars(torch.cuda), "get_rng_state": fake(torch.cuda.get_rng_state)}
    ours = {
        **vars(torch),
        "get_rng_state": fake(torch.get_rng_state),
        "cuda": SimpleNamespace(**on_cuda),
    }
    with mock.patch.object(rng_prims, "torch", SimpleNamespace(**ours)):
        yield


_PHASE = "partitioner_tag"


class _Instead(fx.Interpreter):
    """Runs what a table has in the place of a node."""

    def __init__(
        self, module: fx.GraphModule, instead: Callable[[fx.Node], Callable[..., Any] | None]
    ) -> None:
        super().__init__(module)
        self.instead = instead

    def run_node(self, n: fx.Node) -> Any:
        self.now = n
        return super().run_node(n)

    def call_function(self, target: Any, args: Any, kwargs: Any) -> Any:
        target = self.instead(self.now) or target
        if target is torch.ops.aten.view.default and not args[0].is_contiguous():
            # What an operator became may lie otherwise than its result did when the step was captured.
            target = torch.ops.aten.reshape.default
        return super().call_function(target, args, kwargs)


@_alone
def decomposed(
    module: fx.GraphModule, instead: Callable[[fx.Node], Callable[..., Any] | None]
) -> fx.GraphModule:
    """The graph in the operators that Inductor has code for.

    Placeholders keep their names; what an operator becomes keeps its metadata, phase and source line.
    instead: what to trace in the place of a node, where that is not its own target.
    """
    given = module.graph.find_nodes(op="placeholder")
    values = [node.meta.get("val") for node in given]
    table = _without_random(select_decomp_table())
    with (
        random_as_in_eager(),
        _fake_generator_states(_fake_mode(module)),
        fx.traceback.preserve_node_meta(),
        enable_python_dispatcher(),
    ):
        traced = make_fx(
            _Instead(module, instead).run, decomposition_table=table, _allow_non_fake_inputs=True
        )(*values)
    for node, like in zip(traced.graph.find_nodes(op="placeholder"), given, strict=True):
        node.target = like.target
        node._rename(like.name)
        node.meta = {**like.meta, **{k: v for k, v in node.meta.items() if k == "val"}}
    traced.graph.output_node().meta = dict(module.graph.output_node().meta)
    traced.meta = dict(module.meta)
    return traced


def _without_random(table: dict[Any, Any]) -> dict[Any, Any]:
    """A random operator is drawn whole, as in eager; taken apart it would draw other numbers."""
    random = {op for op in table if torch.Tag.nondeterministic_seeded in getattr(op, "tags", ())}
    for op in random - lowerings.keys():
        make_fallback(op, warn=False, override_decomp=True)
    return {op: how for op, how in table.items() if op not in random}


def read_offsets_of_pools(module: fx.GraphModule, encoder: Any) -> None:
    """In place: what codes a pool's indices as offsets reads those that Inductor's pool makes first."""
    for node in module.graph.find_nodes(op="call_function", target=encoder):
        indices: Any = node.args[0]
        if indices.target is not _INDICES:
            continue
        convert = torch.ops.prims.convert_element_type.default
        with module.graph.inserting_before(node):
            offsets = module.graph.call_function(convert, (indices.args[0], torch.uint8))
        offsets.meta = dict(node.meta)
        node.replace_all_uses_with(offsets)
        module.graph.erase_node(node)
        if not indices.users:
            module.graph.erase_node(indices)


def indices_of_offsets(offsets: torch.Tensor, *how: list[int]) -> torch.Tensor:
    """What codes as offsets stand for, as Inductor's own pools say it: arithmetic in what reads them.

    how: height and width of kernels, of the pool's input, of strides, padding and dilation.
    """
    # Loops take what is negative for counted from the end, and 8 bits hold no offset above 127.
    short = torch.int8 if math.prod(how[0]) <= 128 else torch.int32
    found: torch.Tensor = _INDICES(offsets.to(short), *how)
    return found


@_alone
def optimize_joint(module: fx.GraphModule) -> None:
    """Inductor's own rewrites of a joint graph, in place: constants, patterns of attention.

    Each node that is left stays in its phase.  Where the backward adds zero to what the forward made, that
    takes the place of the sum, and its metadata.
    """
    phases = {node: node.meta.get(_PHASE) for node in module.graph.nodes}
    with random_as_in_eager(), V.set_fake_mode(_fake_mode(module)):
        joint_graph_passes(module)
    for node in module.graph.nodes:
        if phases.get(node) is not None:
            node.meta[_PHASE] = phases[node]
        elif node in phases:
            node.meta.pop(_PHASE, None)


@_alone
def min_cut(
    module: fx.GraphModule,
    num_forward_outputs: int,
    static_inputs: Sequence[int],
    stays_behind: Callable[[fx.Node], bool],
    saves_least: bool = False,
) -> list[str]:
    """Names of the values to save, so that what is cheap to make again within a kernel is not.

    stays_behind: does a node belong to the backward, though it may read no tangent?  saves_least: is all
    made again that kernels can, though it costs them time?  The module is changed: give a copy.
    """
    known = get_default_op_list() if saves_least else None
    for node in module.graph.nodes:
        # What a user's checkpoint would make again is the plan's to say; the cut would draw once more.
        node.meta.pop("recompute", None)
        if node.op != "call_function":
            continue
        if stays_behind(node):
            node.meta[_PHASE] = "must_be_in_backward"
        elif known and not (known.is_recomputable(node) or node.target is operator.getitem):
            # torch would make anything again then that it does not know, such as what draws.
            node.meta["recompute"] = CheckpointPolicy.MUST_SAVE
    # Values that are made twice would be merged into one, which would then live all along.
    as_planned = functorch_config.patch(
        cse=False, activation_memory_budget=1.0, aggressive_recomputation=saves_least
    )
    with random_as_in_eager(), as_planned, V.set_fake_mode(_fake_mode(module)):
        forward, _ = min_cut_rematerialization_partition(
            module,
            [],
            num_fwd_outputs=num_forward_outputs,
            static_lifetime_input_indices=list(static_inputs),
        )
    returned: Any = forward.graph.output_node().args[0]
    return [node.name for node in returned[num_forward_outputs:]]


def just_in_time(backward: fx.GraphModule) -> fx.GraphModule:
    """What is made again comes right before its first reader, not first of all."""
    return reordering_to_mimic_autograd_engine(backward)


@_alone
def inductor(
    module: fx.GraphModule,
    *,
    backward: bool,
    static_inputs: Sequence[int],
    visible: Sequence[int],
    strides: Strides,
    lowered: Any = None,
    freed_at_once: bool = False,
) -> tuple[BoxedCallable, Strides]:
    """Code for one half, and the strides of what it returns.

    static_inputs: places of the inputs that lie where they are from step to step.  visible: of
    outputs whose strides must stay.  strides: of inputs, where those are not as they were traced.
    lowered: what ``schedule`` found of the same half, which can be made code of once.  freed_at_once: is
    a buffer let go when it was read last, or does it wait for another of its size, which takes less time?
    """
    mode = _fake_mode(module)
    given = module.graph.find_nodes(op="placeholder")
    for node in given:
        value = node.meta.get("val")
        if node.name in strides and tuple(value.stride()) != strides[node.name]:
            with mode:
                node.meta["val"] = value.as_strided(value.size(), strides[node.name])
    output = module.graph.output_node()
    output.meta["user_visible_output_idxs"] = list(visible)
    context = TracingContext(mode)
    # Strides are then reported in the sizes that may change, not in what those are now.
    context.fakify_first_call = True
    with (
        random_as_in_eager(),
        _disable_current_modes(),
        tracing(context),
        V.set_fake_mode(mode),
        _fake_generator_states(mode),
        _for_the_cache(mode, given),
        TracingContext.report_output_strides() as found,
        _keyed_by(visible, freed_at_once),
        reductions_early(),
        draws_in_order(),
        operands_as_they_lie(),
        divided_as_eager(),
        unity_build(),
        one_concatenation_at_a_time() if backward else contextlib.nullcontext(),
        _freed_at_once() if freed_at_once else contextlib.nullcontext(),
        _lowered_before(lowered) if lowered is not None else contextlib.nullcontext(),
    ):
        code: Any = compile_fx_inner(
            module,
            [node.meta.get("val") for node in given],
            static_input_idxs=list(static_inputs),
            cudagraphs=BoxedBool(False),
            is_backward=backward,
            graph_id=next(_graphs),
        )
    returned: Any = output.args[0]
    made = {
        node.name: tuple(given)
        for node, given in zip(returned, found or [], strict=False)
        if isinstance(node, fx.Node) and given is not None
    }
    return code, made


def _for_the_cache(mode: Any, given: Sequence[fx.Node]) -> contextlib.AbstractContextManager[Any]:
    """Inside, torch's cache of compiled graphs can say for which sizes it has code, and which it lacks.

    Shapes could be guarded: where they cannot, torch caches no graph, not even a static one.  What code
    takes for granted is checked by the sizes that are inputs, and torch makes all of them inputs.  Of ours
    some are sizes of tensors alone.
    """
    if mode.shape_env is None:
        return mock.patch.object(mode, "shape_env", ShapeEnv())
    sizes = _sizes_of(given, mode.shape_env)
    return mock.patch.object(codecache.FxGraphCache, "_filter_backed_symints", return_value=sizes)


def _sizes_of(given: Sequence[fx.Node], env: ShapeEnv) -> list[torch.SymInt]:
    """Each size that may change, once: numbers that are inputs, and all that tensors lie by."""
    values = [node.meta.get("val") for node in given]
    parts = [part for value in values for part in _numbers(value) if isinstance(part, torch.SymInt)]
    symbols = dict.fromkeys(s for p in parts for s in sorted(p.node.expr.free_symbols, key=str))
    sizes = [env.create_symintnode(symbol, hint=None) for symbol in symbols]
    return [size for size in sizes if isinstance(size, torch.SymInt) and size.node.has_hint()]


def _numbers(value: Any) -> Iterator[Any]:
    if isinstance(value, torch.Tensor):
        yield from (*value.size(), *value.stride(), value.storage_offset())
    else:
        yield value


@contextlib.contextmanager
def _freed_at_once() -> Iterator[None]:
    """Inside, a buffer takes the memory of one that was just read last, and of no other.

    torch lets one wait that was read earlier, where the peak of the half stays below what it takes that
    to be: without what kernels write over, and without the other half.
    """

    def just_read(line: Any, freed: Any, _: int) -> bool:
        return line.comm_buffer or freed.scheduler_node_index + 1 == line.scheduler_node_index

    with mock.patch.object(wrapper.AllocateLine, "should_reuse_buffer", just_read):
        yield


def _keyed_by(
    visible: Sequence[int], freed_at_once: bool
) -> contextlib.AbstractContextManager[Any]:
    """Inside, torch's cache of compiled graphs knows which outputs have to keep their strides, and when
    buffers are let go.

    All else that a plan changes is in the graph's own code, by which that cache is keyed.
    """
    before = compiler_config.cache_key_tag
    ours = f"{DRAWS_IN_ORDER} {AS_THEY_LIE} {DIVIDED_AS_EAGER} {ONE_AT_A_TIME}"
    tag = f"{before} fxmem {ours} {list(visible)} {freed_at_once}"
    compiler: Any = compiler_config
    patch: contextlib.AbstractContextManager[Any] = compiler.patch(cache_key_tag=tag)
    return patch


# -- What kernels there will be, before there is code of them ----------------------------------------


class Made(NamedTuple):
    """A buffer is allocated."""

    name: str
    nbytes: int


class Moved(NamedTuple):
    """A buffer takes the memory of one that nothing reads any more."""

    name: str
    source: str


class Freed(NamedTuple):
    """A buffer or an input is let go."""

    name: str


class Called(NamedTuple):
    """An operator runs as it is; it may hold more meanwhile.

    operands: shapes and strides, in order; they are lowered to other strides than were traced.
    """

    node: fx.Node
    operands: list[tuple[tuple[int, ...], tuple[int, ...]]]


@dataclass(frozen=True)
class Schedule:
    """What the code of one half will do to memory.

    returned: of each output the buffer or input that it lies in.  strides: of what it returns.  lowered:
    Inductor's graph, of which code may be made.
    """

    events: list[Made | Moved | Freed | Called]
    returned: list[str | None]
    strides: Strides
    lowered: Any = None


class _Scheduled(BaseException):
    """Ends a compilation where its kernels are known and none is written."""

    def __init__(self, found: Schedule) -> None:
        super().__init__()
        self.found = found


@_alone
def schedule(module: fx.GraphModule, *, lowered: Any = None, **how: Any) -> Schedule | None:
    """What ``inductor`` would make of a half, at a small share of its time; None where that is no kernel.

    Torch's cache is not asked: what is in it would decide which plans are looked at, and so which is taken.
    lowered: what an earlier look found.  The module is changed: give a copy.
    """

    def stop(scheduler: Any) -> None:
        raise _Scheduled(_read(scheduler, module))

    with mock.patch.object(Scheduler, "codegen", stop), config.patch(fx_graph_cache=False):
        try:
            inductor(module, lowered=lowered, **how)
        except _Scheduled as stopped:
            return stopped.found
    return None


@contextlib.contextmanager
def _lowered_before(graph: Any) -> Iterator[None]:
    """Inside, a half is rewritten, lowered and fused as it was when ``schedule`` looked.

    What torch would find out for that, the types of all values, is known, and stays as it is.
    """

    def rewrite(module: fx.GraphModule, *_: Any, **__: Any) -> None:
        module.graph = graph.module.graph

    def known(module: fx.GraphModule, *_: Any) -> Any:
        return _fake_mode(module)

    with (
        mock.patch.object(compile_fx, "fake_tensor_prop", known),
        mock.patch.object(compile_fx, "_recursive_post_grad_passes", rewrite),
        mock.patch.object(compile_fx, "GraphLowering", return_value=graph),
        mock.patch.object(graph, "run", return_value=None),
        mock.patch.object(graph, "_update_scheduler", return_value=None),
    ):
        yield


def _read(scheduler: Any, module: fx.GraphModule) -> Schedule:
    """The wrapper around the kernels is written and planned as it always is, without the kernels."""
    graph: Any = V.graph
    before = {
        name: getattr(graph, name).copy() for name in ("removed_buffers", "inplaced_to_remove")
    }
    for node in scheduler.nodes:
        _without_kernel(scheduler, node)
    scheduler.free_buffers()
    graph.wrapper_code.run_wrapper_ir_passes(is_inference=False)
    events = [event for line in graph.wrapper_code.lines for event in _events(line)]
    vars(graph).update(before)  # as if nothing had been written, so that the code may still be
    scheduler.completed_operations.clear()
    scheduler.current_node = None
    returned: Any = module.graph.output_node().args[0]
    made = [out if _is_tensor(out) else None for out in graph.graph_outputs]
    strides = {
        node.name: tuple(map(_symbolic, out.get_stride()))
        for node, out in zip(returned, made, strict=True)
        if isinstance(node, fx.Node) and out is not None
    }
    roots = [None if out is None else _root(scheduler, out.get_name()) for out in made]
    return Schedule(events, roots, strides, graph)


def _symbolic(size: Any) -> Any:
    """A size that Inductor computes with, as sizes of tensors are."""
    if isinstance(size, int):
        return size
    return V.graph.sizevars.shape_env.create_symintnode(size, hint=_hints([size])[0])


def _is_tensor(out: Any) -> bool:
    return isinstance(out, ir.IRNode) and out.has_tensor_output()


def _without_kernel(scheduler: Any, node: Any) -> None:
    """What ``Scheduler.codegen`` does for a node, but for the code of its kernel."""
    device = node.get_device()
    alone = node.is_extern() or node.is_template()
    if alone:
        scheduler.free_buffers()  # what is written in C++ is one function up to here
    scheduler.current_node = node
    scheduler.buffer_names_to_free.update(node.last_usage)
    kernel = Kernel(increase_kernel_count=False)
    with V.set_kernel_handler(kernel):
        for one in node.get_nodes():
            if not isinstance(one, NopKernelSchedulerNode):
                one.decide_inplace_update()
            one.mark_run()
        if node.is_extern():
            V.graph.wrapper_code.writeline(_Call(node))
        elif not isinstance(node, NopKernelSchedulerNode):
            kernel.store_buffer_names.update(node.get_buffer_names())
            kernel.remove_kernel_local_buffers()
    V.graph.removed_buffers |= kernel.removed_buffers
    V.graph.inplaced_to_remove |= kernel.inplaced_to_remove
    if alone or (device is not None and device.type != "cpu"):
        scheduler.free_buffers()
    scheduler.completed_operations.update(node.get_operation_names())


class _Call(wrapper.WrapperLine):
    """Stands in the wrapper for the call of an operator.  node: the scheduler's."""

    def __init__(self, node: Any) -> None:
        self.node = node


def _events(line: Any) -> Iterator[Made | Moved | Freed | Called]:
    if isinstance(line, wrapper.AllocateLine):
        yield _made(line.node)
    elif isinstance(line, wrapper.ReuseLine):
        yield Moved(line.reused_as.get_name(), line.node.get_name())
    elif isinstance(line, (wrapper.FreeIfNotReusedLine, wrapper.FreeLine)):
        if not getattr(line, "is_reused", False):
            yield Freed(line.node.get_name())
    elif isinstance(line, _Call):
        yield from map(_made, _made_by(line.node))
        node = _operator(line.node.node)
        if node is not None:
            given = filter(_is_tensor, getattr(line.node.node, "inputs", ()))
            yield Called(node, [(_hints(x.get_size()), _hints(x.get_stride())) for x in given])


def _operator(kernel: Any) -> fx.Node | None:
    """The node that a kernel was made for; torch notes it for operators with one result alone."""
    noted: fx.Node | None = kernel.get_origin_node()
    if noted is not None:
        return noted if noted.target is not operator.getitem else None
    target = getattr(kernel, "op_overload", None)
    return next((node for node in kernel.origins if node.target is target), None)


def _hints(sizes: Any) -> tuple[int, ...]:
    return tuple(map(V.graph.sizevars.optimization_hint, sizes))


def _made_by(node: Any) -> Iterator[Any]:
    """The buffers that an operator allocates itself."""
    for out in node.get_outputs():
        buffer = out.node
        if isinstance(buffer.layout, ir.MultiOutputLayout):
            users = (user.node.node for user in out.users if hasattr(user.node, "node"))
            yield from (b for b in users if isinstance(b, ir.MultiOutput) and _is_new(b))
        elif isinstance(buffer, ir.ExternKernelAlloc) and _is_new(buffer):
            yield buffer


def _is_new(buffer: Any) -> bool:
    """Has it memory of its own?"""
    known = buffer.get_inputs_that_alias_output() or buffer.get_mutation_names()
    return not known and not isinstance(buffer.layout, ir.NoneLayout)


def _made(buffer: Any) -> Made:
    numel = V.graph.sizevars.optimization_hint(V.graph.get_allocation_storage_size(buffer))
    return Made(buffer.get_name(), numel * buffer.get_dtype().itemsize)


def _root(scheduler: Any, name: str) -> str:
    """The buffer or input in whose memory a buffer lies."""
    found = scheduler.mutation_real_name.get(name, name)
    if found in scheduler.name_to_buf:
        buffer = scheduler.name_to_buf[found].node
        if isinstance(buffer.layout, ir.NonOwningLayout):
            return _root(scheduler, buffer.layout.view.get_name())
        for other in buffer.get_inputs_that_alias_output():
            return _root(scheduler, other)
    return str(found)


# -- In a step ---------------------------------------------------------------------------------------


@contextlib.contextmanager
def for_real() -> Iterator[None]:
    """Inside, operators run as in a step, though one is compiled around."""
    with _disable_current_modes(), tracing(None), as_in_a_step(), torch.no_grad():
        yield


def _fake_mode(module: fx.GraphModule) -> Any:
    values = [node.meta.get("val") for node in module.graph.nodes if node.op != "output"]
    mode = detect_fake_mode(values)
    assert mode is not None  # the step was traced in one
    return mode
