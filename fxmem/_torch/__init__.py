"""Every private function of torch that fxmem calls, each behind one small function of ours.

Run on torch 2.11.0, 2.13.0 and 2.15.0.  When a torch release moves one of these, this is the only file
to mend.
"""

from __future__ import annotations

import builtins
import contextlib
import copy
import gc
import logging
import re
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import FrameType
from typing import Any
from unittest import mock

import sympy
import torch
from torch import fx, nn
from torch._dispatch.python import no_python_dispatcher
from torch._dynamo.backends.common import aot_autograd
from torch._dynamo.convert_frame import compile_lock, fullgraph_capture
from torch._dynamo.external_utils import wrap_inline
from torch._dynamo.hooks import Hooks
from torch._dynamo.utils import dynamo_timed, get_metrics_context
from torch._dynamo.variables.torch import tracing_state_functions
from torch._dynamo.variables.torch_function import torch_function_mode_stack_state_mgr
from torch._functorch.aot_autograd import (
    aot_compile_joint_with_descriptors,
    aot_export_joint_with_descriptors,
)
from torch._functorch.partitioners import _extract_fwd_bwd_modules
from torch._guards import TracingContext, tracing
from torch._inductor import config as inductor_config
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    FakeTensor,
    FakeTensorMode,
)
from torch._subclasses.functional_tensor import FunctionalTensor
from torch.fx import _lazy_graph_module
from torch.fx.experimental.symbolic_shapes import ShapeEnv
from torch.utils._ordered_set import OrderedSet
from torch.utils._python_dispatch import _disable_current_modes

from fxmem._torch.hooks import (
    GLOBAL_FORWARD_HOOKS,
    has_hooks,
    hooks_of_all_modules,
    is_empty_hook_table,
    is_tracker,
)
from fxmem._torch.saved import PREPARED, nodes_before
from fxmem._torch.written_inputs import without_outputs, writing

CHECKED_VERSIONS = ("2.11.0", "2.13.0", "2.15.0")
_VERSION = tuple(int(part) for part in torch.__version__.split(".")[:2])

# torch's compiler stack is not thread-safe, so every capture and compilation holds this lock.
COMPILE_LOCK = compile_lock

ReadsAValue = DataDependentOutputException
"""Raised by a trace on fake tensors where an operator reads what is in one."""

run_and_save_rng_state = torch.ops.higher_order.run_and_save_rng_state
run_with_rng_state = torch.ops.higher_order.run_with_rng_state


# -- Faster tracing ------------------------------------------------------------------------------


@contextlib.contextmanager
def quick_tracing() -> Iterator[None]:
    """Inside, tracing takes less time and finds the same.  For one thread at a time."""
    with collector_paused(), mock.patch.object(sympy.Expr, "is_number", property(_is_number)):
        yield


@contextlib.contextmanager
def collector_paused() -> Iterator[None]:
    """Nearly all that tracing makes stays, and the collector would walk over it again and again."""
    paused = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if paused:
            gc.enable()


def _is_number(self: sympy.Expr) -> bool:
    """``sympy.Expr.is_number``, which is asked millions of times, without a generator."""
    for part in self.args:  # noqa: SIM110
        if not part.is_number:
            return False
    return True


_make_wrapper = torch.Tensor._make_wrapper_subclass
_BEFORE_STORAGE_SIZE = 13  # arguments after the class


def _wrappers_of_no_bytes() -> contextlib.AbstractContextManager[Any]:
    """The storage of a functional wrapper is a mere identity, of whose size nobody asks.

    torch works it out from symbolic sizes and strides for each operator: a third of the time of a joint
    graph, and nodes that go again.
    """
    return mock.patch.object(torch.Tensor, "_make_wrapper_subclass", staticmethod(_wrapper))


def _wrapper(kind: Any, *args: Any, **kwargs: Any) -> Any:
    if kind is FunctionalTensor and len(args) == _BEFORE_STORAGE_SIZE and not kwargs:
        args = (*args, 0)
    return _make_wrapper(kind, *args, **kwargs)


# -- Dynamo: Python to one flat graph ------------------------------------------------------------


def dynamo_capture(function: Callable[..., Any], args: tuple[Any, ...]) -> Any:
    """Trace ``function(*args)`` into one graph; the arguments are only read, never computed with.

    Raises whatever Dynamo raises when the function does not fit into one graph.
    """
    static = torch._dynamo.config.patch(
        # A float attribute turned into an input would make AOTAutograd ask for a second capture.
        specialize_float=True,
        assume_static_by_default=True,
        automatic_dynamic_shapes=False,
        # A line in a log is no reason to refuse a model; it is written at the first call alone.
        ignore_logger_methods=_logging_functions(),
        # Eager adds and multiplies in one kernel, which rounds once.
        enable_dynamo_decompositions=False,
    )
    with (
        static,
        _metrics_kept_to_themselves(),
        random_as_in_eager(),
        _function_modes_noted(),
        _compiling_not_exporting(),
        get_metrics_context(),
        dynamo_timed("fxmem_capture"),
    ):
        return fullgraph_capture(function, args, {})


def random_as_in_eager() -> contextlib.AbstractContextManager[Any]:
    """Inside, what torch traces and compiles draws the numbers that eager draws.

    Else torch takes random operators whose result nobody reads for dead code, and all later ones would
    draw other numbers; and Inductor's code would draw by a generator of its own.
    """
    patch: contextlib.AbstractContextManager[Any] = inductor_config.patch(fallback_random=True)
    return patch


def _function_modes_noted() -> contextlib.AbstractContextManager[Any]:
    """Let Dynamo know which modes are on, such as a default device; before torch 2.13 it looks itself."""
    if _VERSION < (2, 13):
        return contextlib.nullcontext()
    noted: contextlib.AbstractContextManager[Any] = torch_function_mode_stack_state_mgr
    return noted


def known_to_compile() -> contextlib.AbstractContextManager[Any]:
    """Inside, what is compiled may run in other threads, as while torch.compile works.

    torch takes a trace by fx for one of the user's otherwise, and refuses to run it.
    """
    return mock.patch.object(torch.compiler, "_is_compiling_flag", True)


@contextlib.contextmanager
def _compiling_not_exporting() -> Iterator[None]:
    """Models that are exported make masks that eager does without, and take slower kernels for them.

    Before torch 2.13 Dynamo answers True to ``torch.compiler.is_exporting()`` whatever it does.
    """
    answers = tracing_state_functions()
    with (
        known_to_compile(),
        mock.patch.dict(answers, {torch.compiler.is_exporting: False}),
    ):
        yield


@contextlib.contextmanager
def _metrics_kept_to_themselves() -> Iterator[None]:
    """torch 2.11 and 2.12 cannot write the set of functions above as JSON, and log an error about it."""
    log = logging.getLogger("torch._dynamo.metrics_context")
    disabled, log.disabled = log.disabled, True
    try:
        yield
    finally:
        log.disabled = disabled


def _logging_functions() -> set[Any]:
    """What warns or logs, packages' additions such as ``Logger.warning_once`` included."""
    levels = ("debug", "info", "warn", "error", "exception", "critical", "fatal", "log")
    functions = [*vars(logging.Logger).items(), *vars(logging).items()]
    return {warnings.warn, *(f for name, f in functions if name.startswith(levels) and callable(f))}


def dispatch_state() -> Callable[[], contextlib.AbstractContextManager[Any]]:
    """The thread's dispatch keys as they are now; the result puts them back for a while."""
    included = torch._C._dispatch_tls_local_include_set()
    excluded = torch._C._dispatch_tls_local_exclude_set()
    return lambda: torch._C._ForceDispatchKeyGuard(included, excluded)


def is_view_of_another(tensor: torch.Tensor) -> bool:
    """Does autograd know it as a view, so that changing it changes what it is a view of?"""
    return tensor._is_view()


def modes_unchanged() -> Callable[[], bool]:
    """Are the thread's settings, such as autocast and the default dtype, as they are now?"""
    found: Callable[[], bool] = torch._C._dynamo.guards.GlobalStateGuard().check
    return found


def dynamo_guards(
    output: Any,
    function: Callable[..., Any],
    as_called: Callable[[], contextlib.AbstractContextManager[Any]],
    replaced: str,
    model: nn.Module,
) -> Callable[[dict[str, Any]], bool]:
    """A predicate on the function's local variables: does the captured graph still apply to them?

    as_called: ``dispatch_state`` of the caller.  Guards compare tensors by the dispatch keys that
    are active, and while the joint graph is traced others are.  replaced: a global that was another
    while the step was traced.  model: what the function's variable ``model`` was.
    """
    code = function.__code__
    # A hook that is put on a submodule later must not be passed over: the step is captured anew.
    watched = torch._dynamo.config.patch(skip_nnmodule_hook_guards=False)
    # Of a model without any we see to it ourselves, in half the time of a guard for each table.
    ours = not has_hooks(model)

    def is_kept(guard: Any) -> bool:
        return replaced not in guard.name and not (ours and is_empty_hook_table(guard))

    hooks = Hooks(guard_filter_fn=lambda guards: list(map(is_kept, guards)))
    with as_called(), watched, get_metrics_context(), dynamo_timed("fxmem_guards"):
        manager = output.graph_capture_output.build_guards(code, hooks).guard_manager
    chosen = (_attention_backends(), hooks_of_all_modules())
    return lambda local: (
        (_attention_backends(), hooks_of_all_modules()) == chosen
        and not (ours and has_hooks(local["model"]))
        and manager.check(local)
    )


def _attention_backends() -> tuple[bool, ...]:
    """Which kernels attention may take; tracing has chosen one, and Dynamo does not guard the choice."""
    enabled = torch.backends.cuda
    return (
        enabled.flash_sdp_enabled(),
        enabled.mem_efficient_sdp_enabled(),
        enabled.math_sdp_enabled(),
        enabled.cudnn_sdp_enabled(),
    )


def dynamo_callable(
    output: Any, function: Callable[..., Any], compiled: Callable[..., Any]
) -> Callable[..., Any]:
    """``function`` again, with its captured graph replaced by ``compiled(*flat_inputs)``.

    Releases before 2.13 look for the built-in functions that it calls among its globals.
    """
    known = {**vars(builtins), **function.__globals__}
    return output.forward_callable(compiled_fn=compiled, extra_globals=known)


def dynamo_graph_copy(graph: fx.Graph) -> fx.Graph:
    """A copy whose placeholders still know how the user's code reaches them."""
    found = copy.deepcopy(graph)
    pairs = zip(found.find_nodes(op="placeholder"), graph.find_nodes(op="placeholder"), strict=True)
    for ours, theirs in pairs:
        ours._dynamo_source = getattr(theirs, "_dynamo_source", None)
    return found


def dynamo_source_name(placeholder: fx.Node) -> str:
    """How the user's code reaches a graph input, such as ``args[0]`` or ``kwargs['labels']``."""
    source = getattr(placeholder, "_dynamo_source", None)
    if source is None:
        return placeholder.name
    name = source.name if isinstance(source.name, str) else source.name()
    return name.replace("L['", "", 1).replace("']", "", 1) if name.startswith("L['") else name


# -- AOTAutograd: flat graph to joint graph, joint graph to a callable -----------------------------


@contextlib.contextmanager
def joint_export(output: Any) -> Iterator[Any]:
    """The joint graph of a Dynamo capture, traced on fake tensors; compile it inside the context."""
    backend_input = output.backend_input
    context = TracingContext(backend_input.fake_mode)
    context.tensor_to_context = backend_input.tensor_to_context
    # Autocast is for the forward: users leave it before they call backward().
    outside = torch._functorch.config.patch(backward_pass_autocast="off")
    with tracing(context), random_as_in_eager(), outside, contextlib.ExitStack() as stack:
        yield _exported(backend_input, stack)


def _exported(backend_input: Any, stack: contextlib.ExitStack) -> Any:
    """Traced with wrappers of no bytes; anew without where an operator looks into a wrapper's storage.

    Under ``vmap`` some operators do, and what sets strides does: views in place, and pools down to one
    element in channels_last.
    """
    with contextlib.ExitStack() as mine:
        try:
            with _wrappers_of_no_bytes():
                exported = _joint(backend_input, mine)
        except RuntimeError as error:
            if "storage" not in str(error):
                raise
        else:
            stack.enter_context(mine.pop_all())
            return exported
    return _joint(backend_input, stack)


def _joint(backend_input: Any, stack: contextlib.ExitStack) -> Any:
    with _levels_of_functorch_kept(), known_to_compile():
        return aot_export_joint_with_descriptors(
            stack, backend_input.graph_module, tuple(backend_input.example_inputs)
        )


@contextlib.contextmanager
def modes_kept() -> Iterator[None]:
    """A graph of Dynamo's enters and leaves ``no_grad`` and ``autocast`` step by step, too: the thread's
    settings are as they were when this is left, also after an error in between.
    """
    grad, kept = torch.is_grad_enabled(), dispatch_state()
    dtypes = {device: torch.get_autocast_dtype(device) for device in _CAST}
    enabled = {device: torch.is_autocast_enabled(device) for device in _CAST}
    cache, depth = torch.is_autocast_cache_enabled(), _depth_of_autocast()
    try:
        with kept():
            yield
    finally:
        torch.set_grad_enabled(grad)
        torch.set_autocast_cache_enabled(cache)
        for device in _CAST:
            torch.set_autocast_dtype(device, dtypes[device])
            torch.set_autocast_enabled(device, enabled[device])
        for _ in range(_depth_of_autocast() - depth):
            torch.autocast_decrement_nesting()


_CAST = ("cpu", "cuda")


def _depth_of_autocast() -> int:
    torch.autocast_increment_nesting()
    return int(torch.autocast_decrement_nesting())


@contextlib.contextmanager
def _levels_of_functorch_kept() -> Iterator[None]:
    """A graph enters and leaves ``vmap`` and ``grad`` step by step: an error inside would leave them on."""
    functorch: Any = torch._C._functorch
    depth = functorch.get_dynamic_layer_stack_depth()
    try:
        yield
    finally:
        functorch.pop_dynamic_layer_stack_and_undo_to_depth(depth)


BoxedCallable = Callable[[list[Any]], Any]


def joint_compile(
    exported: Any,
    forward: fx.GraphModule,
    backward: fx.GraphModule,
    run_forward: BoxedCallable,
    run_backward: BoxedCallable,
    written: Mapping[int, int],
) -> Callable[..., Any]:
    """AOTAutograd's runtime around two graphs.

    run_forward, run_backward: called with their arguments in a list, in place of the graphs themselves.
    written: see ``written_by_code``.
    """
    shown = without_outputs(forward, written)
    code = mark_boxed(writing(run_forward, written)) if written else run_forward

    # No buffer is donated: our backward writes into no saved tensor, so it may run twice.
    exported._aot_state.fw_metadata.bw_donated_idxs = []
    with torch._functorch.config.patch(donated_buffer=False):
        compiled = aot_compile_joint_with_descriptors(
            exported,
            partition_fn=lambda *_, **__: (shown, backward),
            fw_compiler=lambda *_: code,
            bw_compiler=lambda *_: mark_boxed(run_backward),
        )
    return _on_flat_inputs(compiled)


def _on_flat_inputs(compiled: Callable[..., Any]) -> Callable[..., Any]:
    """AOTAutograd's function without its pytree of arguments: Dynamo passes them flat already."""
    flat = getattr(compiled, "__wrapped__", None)
    if flat is None or not getattr(flat, "_boxed_call", False):
        return compiled
    return lambda *args: flat(list(args))


# -- What a backend of torch.compile needs (run on torch 2.13.0) ------------------------------------


def aot_compile(
    module: fx.GraphModule,
    example_inputs: Sequence[Any],
    partition: Callable[..., tuple[fx.GraphModule, fx.GraphModule]],
    compile_graph: Callable[[fx.GraphModule], BoxedCallable],
    backward: Callable[[], BoxedCallable],
) -> Callable[..., Any]:
    """AOTAutograd around a graph of Dynamo's, called with the graph's inputs.

    partition: given the joint graph.  compile_graph: what makes a callable of the forward, or of a graph
    in which nothing needs a gradient.  backward: gives, once the graph is cut, what runs as its backward.
    """
    as_in_capture = torch._functorch.config.patch(
        backward_pass_autocast="off", donated_buffer=False, force_non_lazy_backward_lowering=True
    )

    def compile_backward(*_: Any) -> BoxedCallable:
        metadata = TracingContext.get().fw_metadata
        if metadata is not None:
            metadata.bw_donated_idxs = []  # as in ``joint_compile``
        return mark_boxed(backward())

    backend = aot_autograd(
        fw_compiler=lambda graph, _: compile_graph(graph),
        bw_compiler=compile_backward,
        partition_fn=partition,
    )
    with as_in_capture, random_as_in_eager(), known_to_compile():
        run: Callable[..., Any] = backend(module, list(example_inputs))
    return run


def not_traced(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function, so that Dynamo runs it and looks at none of its frames."""
    found: Callable[..., Any] = torch._dynamo.disable(function, reason="fxmem runs a planned graph")
    return found


def options_of_compiled(function: Callable[..., Any]) -> Any:
    """The options that ``torch.compile`` was given for the function that it returned, or None."""
    names = getattr(getattr(function, "__code__", None), "co_freevars", ())
    cells = dict(zip(names, getattr(function, "__closure__", None) or (), strict=True))
    if "callback" not in cells:
        return None
    backend = cells["callback"].cell_contents
    while hasattr(backend, "_torchdynamo_orig_backend"):
        backend = backend._torchdynamo_orig_backend
    return getattr(backend, "kwargs", {}).get("options")


def inlined(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function, so that Dynamo traces it also where it stands in one of torch's own files."""
    found: Callable[..., Any] = wrap_inline(function)
    return found


def traced_anew() -> contextlib.AbstractContextManager[Any]:
    """Inside, AOTAutograd traces as if no trace of Dynamo's were going on; sizes are constants."""
    return tracing(TracingContext(FakeTensorMode(allow_non_fake_inputs=True)))


def outside_of_tracing() -> contextlib.AbstractContextManager[Any]:
    """Inside, fake tensors are made as if no trace were going on."""
    return tracing(None)


def trace_artifact(name: str, text: Callable[[], str]) -> None:
    """Put a text into torch's structured trace, which tlparse shows; nothing where none is written."""
    torch._logging.trace_structured(
        "artifact",
        metadata_fn=lambda: {"name": name, "encoding": "string"},
        payload_fn=text,
    )


def follows_a_break(module: fx.GraphModule) -> bool:
    """Did Dynamo end this graph because it could not go on, so that more of the step follows?"""
    reason = getattr(module, "compile_subgraph_reason", None)
    return bool(reason is not None and reason.graph_break)


def autograd_off() -> contextlib.AbstractContextManager[Any]:
    """Inside, no operator looks whether autograd records; views still share version counters."""
    return torch._C._AutoDispatchBelowAutograd()


@contextlib.contextmanager
def as_in_a_step() -> Iterator[None]:
    """Inside, operators are called as in a captured step, also while one is captured around.

    Tracing sends every call through Python's dispatcher, which takes longer than a small operator.
    """
    with no_python_dispatcher(), autograd_off():
        yield


def mark_boxed(function: BoxedCallable) -> BoxedCallable:
    """Tell AOTAutograd that the function takes its arguments in a list and empties it."""
    function._boxed_call = True  # type: ignore[attr-defined]
    return function


BACKWARD_NODE = "CompiledFunctionBackward"


def prepare_backward(
    outputs: Any,
    check: Callable[[Sequence[Any]], None],
    twice: Callable[[], None],
    done: Callable[[], None] | None = None,
) -> None:
    """Ask autograd to pass None, not zeros, for gradients that nobody sends into ``outputs``.

    check: called before their backward runs, with the gradients that come and the modes in force that its
    caller set.  twice: called before a backward of that backward.  done: called when it has run; whatever
    it refers to lives as long as what autograd saved.
    """

    def ran(gradients: Sequence[Any], _: Any) -> None:
        if torch.is_grad_enabled():  # as under ``create_graph=True`` alone
            for gradient in gradients:
                if gradient is not None and gradient.grad_fn is not None:
                    gradient.grad_fn.register_prehook(lambda _: twice())
        if done is not None:
            done()

    def is_graph(node: Any) -> bool:
        return bool(node.name() == BACKWARD_NODE)

    # An output that is a view of another one hangs below it; an input that is returned leads to the
    # backward of an earlier call.
    for node in nodes_before(outputs, is_graph):
        if is_graph(node) and not hasattr(node, PREPARED):
            setattr(node, PREPARED, True)
            node.set_materialize_grads(False)
            node.register_prehook(check)
            node.register_hook(ran)


def is_a_batch(gradient: Any) -> bool:
    """Does it stand for many gradients at once, as under ``is_grads_batched=True``?"""
    functorch = torch._C._functorch
    return isinstance(gradient, torch.Tensor) and (
        functorch.is_batchedtensor(gradient) or functorch.is_legacy_batchedtensor(gradient)
    )


def is_any_autocast_on() -> bool:
    """Are operators of any kind of device cast, in this thread and now?"""
    return bool(torch._C._is_any_autocast_enabled())


def autocast_off() -> contextlib.AbstractContextManager[Any]:
    """Inside, no operator is cast: how a backward runs, whatever is around it."""
    return torch._C._DisableAutocast()


def extract_modules(
    joint: fx.GraphModule,
    saved: Sequence[fx.Node],
    saved_symints: Sequence[fx.Node],
    num_forward_outputs: int,
    static_inputs: Sequence[fx.Node],
) -> tuple[fx.GraphModule, fx.GraphModule]:
    """Cut a joint graph into a forward that returns ``saved`` and a backward that takes it."""
    with _lazy_graph_module._use_lazy_graph_module(True):
        return _extract_fwd_bwd_modules(
            joint,
            list(saved),
            saved_sym_nodes=list(saved_symints),
            num_fwd_outputs=num_forward_outputs,
            static_lifetime_input_nodes=OrderedSet(static_inputs),
        )


def graph_module(root: fx.GraphModule, graph: fx.Graph) -> fx.GraphModule:
    """A module whose code is written when somebody asks for it: passes change graphs, not code."""
    with _lazy_graph_module._use_lazy_graph_module(True):
        return _lazy_graph_module._make_graph_module(root, graph)


# -- Convolutions ----------------------------------------------------------------------------------

_MKLDNN_TRANSPOSE = 9  # a kernel that Python's enumeration has no name for


def convolution_kernel(
    x: torch.Tensor, weight: torch.Tensor, bias_sizes: Any, how: tuple[Any, ...]
) -> tuple[str, torch.memory_format]:
    """The kernel that a convolution's backward runs, and the memory format that it runs in.

    how: stride, padding, dilation, transposed, output padding and groups.
    """
    kernel = torch._C._select_conv_backend(x, weight, None, *how, bias_sizes)
    if weight.ndim == 3:
        x, weight = x.unsqueeze(2), weight.unsqueeze(2)
    memory_format = torch._C._conv_determine_backend_memory_format(x, weight, kernel)
    name = "MkldnnTranspose" if kernel.value == _MKLDNN_TRANSPOSE else kernel.name
    return name, memory_format


def with_batch(size: list[int], grad: torch.Tensor) -> list[int]:
    """The size of an input, whose batch is the gradient's where it is given as -1."""
    return [grad.shape[0], *size[1:]] if size[0] == -1 else size


def without_bytes(size: list[int], strides: list[int], like: torch.Tensor) -> torch.Tensor:
    """A tensor of that shape, type and device with a storage of 0 bytes: no element may be read."""
    nothing = like.new_empty(0)
    found: torch.Tensor = torch.ops.inductor._reinterpret_tensor.default(nothing, size, strides)
    return found


def cudnn_normalizes(
    x: torch.Tensor, statistics: Sequence[torch.Tensor | None], eps: float
) -> bool:
    """Does eager train this batch normalization with cuDNN's kernel?

    statistics: weight, bias, running mean and running variance.
    """
    if x.device.type != "cuda":
        return False
    private: Any = torch._C
    backend = private._select_batch_norm_backend(x, *statistics, True, eps)
    return bool(backend == private._BatchNormBackend.Cudnn)


def cudnn_reserve_nbytes(x: torch.Tensor) -> int:
    """Bytes that cuDNN's batch normalization keeps for its backward."""
    private: Any = torch._C
    return int(private._get_cudnn_batch_norm_reserve_space_size(x, True))


# -- Fake tensors ----------------------------------------------------------------------------------


def fake_mode_of(output: Any) -> FakeTensorMode:
    return output.backend_input.fake_mode


def is_fake(value: object) -> bool:
    return isinstance(value, FakeTensor)


def new_fake_mode() -> FakeTensorMode:
    # Tensors that hide in a model's lists and dictionaries stay real and are only read, as a learning
    # rate is that is a tensor.
    return FakeTensorMode(allow_non_fake_inputs=True)


def symbolic_fake_mode() -> FakeTensorMode:
    """A mode whose tensors Dynamo takes as they are, symbolic sizes included."""
    return FakeTensorMode(shape_env=ShapeEnv(), allow_non_fake_inputs=True)


def symbol_hint(shape_env: ShapeEnv, symbol: sympy.Symbol) -> int:
    """What a symbol of a trace is in the example."""
    size: Any = shape_env.create_symintnode(symbol, hint=None)
    return int(size.node.hint)


@dataclass(frozen=True)
class ShapeGuard:
    """A relation between sizes that tracing took for granted, and the line that made it do so."""

    relation: Any
    place: str


def shape_guards(module: fx.GraphModule) -> tuple[list[ShapeGuard], dict[Any, tuple[int, Any]]]:
    """What a traced graph assumes of its sizes: relations, and each symbol's smallest and largest.

    A largest of None is none.
    """
    env = None
    for node in module.graph.nodes:
        env = env or getattr(getattr(node.meta.get("val"), "fake_mode", None), "shape_env", None)
    if env is None:
        return [], {}
    ranges = {
        symbol: (int(r.lower), int(r.upper) if r.upper.is_Integer else None)
        for symbol, r in env.var_to_range.items()
        if r.lower.is_Integer
    }
    return [ShapeGuard(g.expr, _user_place(g.sloc)) for g in env.guards], ranges


def _user_place(sloc: Any) -> str:
    """``conv.py:560 in _conv_forward``"""
    found = re.search(r"#\s*(\S+):(\d+) in (\w+)", str(sloc))
    return f"{found[1].rsplit('/', 1)[-1]}:{found[2]} in {found[3]}" if found else ""


@contextlib.contextmanager
def unwatched() -> Iterator[None]:
    """Without the dispatch modes and hooks by which counters, profilers and offloading follow a step.

    They would see the tracing as if it ran, Dynamo cannot trace the global hooks, and its guards
    compare both.  What was captured without them runs under them.
    """
    if not _is_watched():
        yield
        return
    tables = GLOBAL_FORWARD_HOOKS
    trackers = [{key: h for key, h in table.items() if is_tracker(h)} for table in tables]
    for table, hooks in zip(tables, trackers, strict=True):
        for key in hooks:
            table.pop(key, None)  # another thread may have been here
    try:
        with _disable_current_modes(), _saved_tensors_hooks_off():
            yield
    finally:
        for table, hooks in zip(tables, trackers, strict=True):
            table.update(hooks)


def _is_watched() -> bool:
    """Is there anything for ``unwatched`` to take away?  At most steps there is not."""
    return bool(
        any(GLOBAL_FORWARD_HOOKS)
        or torch._C._len_torch_dispatch_stack()
        or torch._ops._len_torch_dispatch_stack_pre_dispatch()
        or torch._C._autograd._top_saved_tensors_default_hooks(True) is not None
    )


@contextlib.contextmanager
def _saved_tensors_hooks_off() -> Iterator[list[Any]]:
    """``checkpoint`` around a step counts what is packed, ``save_on_cpu`` moves it.  Gives the hooks."""
    autograd = torch._C._autograd
    hooks: list[Any] = []
    while (top := autograd._top_saved_tensors_default_hooks(True)) is not None:
        autograd._pop_saved_tensors_default_hooks()
        hooks.append(top)
    try:
        yield hooks
    finally:
        for pack, unpack in reversed(hooks):
            autograd._push_saved_tensors_default_hooks(pack, unpack)


def makes_again() -> bool:
    """Does this forward make again what a checkpoint dropped?"""
    return any(map(_recomputes, _checkpoint_hooks()))


def checkpoint_around() -> int | None:
    """The outermost checkpoint that drops what autograd saves now, by identity as long as its backward is
    to come; None where there is none, or where one is making again what it dropped.
    """
    hooks = _checkpoint_hooks()
    if not hooks or any(map(_recomputes, hooks)):
        return None
    names = hooks[-1].__code__.co_freevars
    return id(hooks[-1].__closure__[names.index("frame")].cell_contents)


def _recomputes(pack: Any) -> bool:
    return "recomputation" in pack.__qualname__


def _checkpoint_hooks() -> list[Any]:
    """What packs saved tensors for a checkpoint, the innermost first."""
    with _saved_tensors_hooks_off() as hooks:
        return [pack for pack, _ in hooks if pack.__module__ == "torch.utils.checkpoint"]


@contextlib.contextmanager
def quiet_fake_tensors() -> Iterator[None]:
    """Keep torch from logging the trace of an operator that refuses fake tensors: we raise or handle it."""
    logger = logging.getLogger("torch._subclasses.fake_tensor")

    def other(record: logging.LogRecord) -> bool:
        refused = ("failed while attempting to run meta", "fake tensor raised")
        return not any(words in str(record.msg) for words in refused)

    logger.addFilter(other)
    try:
        yield
    finally:
        logger.removeFilter(other)


def storage_key(tensor: torch.Tensor) -> int:
    """Identity of the bytes behind a tensor: equal for a tensor and its views."""
    return tensor.untyped_storage()._cdata


def fake_tensors_off() -> contextlib.AbstractContextManager[Any]:
    """Inside, operators run for real even while a fake mode is active around."""
    return torch._subclasses.fake_tensor.unset_fake_temporarily()


_BETWEEN_OPERATOR_AND_MODE = ("/torch/_compile.py", "/torch/_dynamo/eval_frame.py")


def is_called_by_engine() -> bool:
    """Is the operator that a mode sees called by autograd's engine, or by one of its C++ nodes?

    Neither a forward nor a user's own backward function stands between then.  The engine runs in
    the thread that called ``backward``, or in one of its own that has no Python.
    """
    frame: FrameType | None = sys._getframe()
    while frame is not None and frame.f_code.co_name != "__torch_dispatch__":
        frame = frame.f_back
    frame = frame and frame.f_back
    while frame is not None and frame.f_code.co_filename.endswith(_BETWEEN_OPERATOR_AND_MODE):
        frame = frame.f_back
    return frame is None or frame.f_code.co_name == "_engine_run_backward"
