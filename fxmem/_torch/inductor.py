"""Private functions of torch that lead to Inductor, each behind one small function of ours.

Compiled and run on torch 2.13.0; on 2.11.0 and 2.15.0 graphs were traced and cut.  Imported when
somebody asks for Inductor, because that takes a second.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Iterator, Sequence
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
from torch import fx
from torch._dispatch.python import enable_python_dispatcher
from torch._functorch import config as functorch_config
from torch._functorch.partitioners import (
    min_cut_rematerialization_partition,
    reordering_to_mimic_autograd_engine,
)
from torch._guards import TracingContext, detect_fake_mode, tracing
from torch._inductor.compile_fx import compile_fx_inner
from torch._inductor.decomposition import select_decomp_table
from torch._inductor.fx_passes.joint_graph import joint_graph_passes
from torch._inductor.utils import BoxedBool
from torch._inductor.virtualized import V
from torch._prims import rng_prims
from torch.compiler import config as compiler_config
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._python_dispatch import _disable_current_modes

from fxmem._torch import BoxedCallable, as_in_a_step, random_as_in_eager

Strides = dict[str, tuple[Any, ...]]
"""Name of a value -> the strides that it is given by."""

_graphs = itertools.count()


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
        return super().call_function(self.instead(self.now) or target, args, kwargs)


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
        node.meta = {**like.meta, "val": node.meta["val"]}
    traced.graph.output_node().meta = dict(module.graph.output_node().meta)
    traced.meta = dict(module.meta)
    return traced


def _without_random(table: dict[Any, Any]) -> dict[Any, Any]:
    """A random operator is drawn whole, as in eager; taken apart it would draw other numbers."""
    return {
        op: how
        for op, how in table.items()
        if torch.Tag.nondeterministic_seeded not in getattr(op, "tags", ())
    }


def read_offsets_of_pools(module: fx.GraphModule, encoder: Any) -> None:
    """In place: what codes a pool's indices as offsets reads those that Inductor's pool makes first."""
    for node in module.graph.find_nodes(op="call_function", target=encoder):
        indices: Any = node.args[0]
        if indices.target is not torch.ops.prims._low_memory_max_pool_offsets_to_indices.default:
            continue
        convert = torch.ops.prims.convert_element_type.default
        with module.graph.inserting_before(node):
            offsets = module.graph.call_function(convert, (indices.args[0], torch.uint8))
        offsets.meta = dict(node.meta)
        node.replace_all_uses_with(offsets)
        module.graph.erase_node(node)
        if not indices.users:
            module.graph.erase_node(indices)


def optimize_joint(module: fx.GraphModule) -> None:
    """Inductor's own rewrites of a joint graph, in place: constants, patterns of attention."""
    with random_as_in_eager(), V.set_fake_mode(_fake_mode(module)):
        joint_graph_passes(module)


def min_cut(
    module: fx.GraphModule,
    num_forward_outputs: int,
    static_inputs: Sequence[int],
    is_backward: Callable[[fx.Node], bool],
) -> list[str]:
    """Names of the values to save, so that what is cheap to make again within a kernel is not.

    Nodes of the backward stay there.  The module is changed: give a copy.
    """
    for node in module.graph.nodes:
        if node.op == "call_function" and is_backward(node):
            node.meta["partitioner_tag"] = "must_be_in_backward"
    # Values that are made twice would be merged into one, which would then live all along.
    as_planned = functorch_config.patch(cse=False, activation_memory_budget=1.0)
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


def inductor(
    module: fx.GraphModule,
    *,
    backward: bool,
    static_inputs: Sequence[int],
    visible: Sequence[int],
    strides: Strides,
) -> tuple[BoxedCallable, Strides]:
    """Code for one half, and the strides of what it returns.

    static_inputs: places of the inputs that lie where they are from step to step.  visible: of
    outputs whose strides must stay.  strides: of inputs, where those are not as they were traced.
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
    with (
        random_as_in_eager(),
        _disable_current_modes(),
        tracing(context),
        V.set_fake_mode(mode),
        _fake_generator_states(mode),
        TracingContext.report_output_strides() as found,
        _keyed_by(visible),
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


def _keyed_by(visible: Sequence[int]) -> contextlib.AbstractContextManager[Any]:
    """Inside, torch's cache of compiled graphs knows which outputs have to keep their strides.

    All else that a plan changes is in the graph's own code, by which that cache is keyed.
    """
    tag = f"{compiler_config.cache_key_tag} fxmem {list(visible)}"
    config: Any = compiler_config
    patch: contextlib.AbstractContextManager[Any] = config.patch(cache_key_tag=tag)
    return patch


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
