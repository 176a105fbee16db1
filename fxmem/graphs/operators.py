"""What fxmem knows about operators: which may run twice, which are random, which run differently again."""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import fx
from torch.utils import _pytree as pytree

from fxmem.basics.sizes import tensors_in
from fxmem.graphs.batch_norm import cudnn_batch_norm, cudnn_batch_norm_again
from fxmem.graphs.graph import JointGraph, is_backward, is_symbolic_scalar, is_view

aten = torch.ops.aten

_PURE_NAMESPACES = {"aten", "prims", "fxmem"}
# A second call would wait for partners that do not call a second time.
_OF_PROCESSES = {
    "_c10d_functional",
    "_c10d_functional_autograd",
    "c10d_functional",
    "c10d",
    "symm_mem",
}
_declared_pure: set[Any] = set()

# Atomics add in any order on CUDA, so that running these again changes low bits.
_NONDETERMINISTIC_ON_CUDA = {
    aten.scatter_add,
    aten.scatter_reduce,
    aten.index_add,
    aten.index_put,
    aten.index_reduce,
    aten.bincount,
    aten.histc,
    aten.cumsum,
    aten.put,
    aten.embedding_bag,
    aten._embedding_bag,
    aten.grid_sampler_2d_backward,
}

# The kernels are seeded only when they drop something; without dropout they are functions.
_SEEDED_BY_DROPOUT = {
    aten._scaled_dot_product_flash_attention: 3,
    aten._scaled_dot_product_flash_attention_for_cpu: 3,
    aten._scaled_dot_product_efficient_attention: 5,
    aten._scaled_dot_product_cudnn_attention: 5,
    aten._scaled_dot_product_fused_attention_overrideable: 4,
}


def declare_pure(operator: Any) -> None:
    """Allow fxmem to run a custom operator again in the backward.

    operator: ``torch.ops.ns.name`` or ``torch.ops.ns.name.overload``; its result must depend on
    its arguments alone, and it must change nothing.  Raises ``TypeError`` for anything else.
    """
    packet = getattr(operator, "overloadpacket", operator)
    if not isinstance(packet, torch._ops.OpOverloadPacket):
        raise TypeError(
            f"declare_pure takes an operator such as torch.ops.mylib.scale, not {operator!r}"
        )
    _declared_pure.add(packet)


def recomputable_nodes(graph: JointGraph) -> set[fx.Node]:
    """Forward nodes that may run again in the backward and give the same bits."""
    mutated = graph.mutated_inputs()
    return {
        node
        for node in graph.nodes
        if node.op == "call_function"
        and not is_backward(node)
        and refusal(node) is None
        and not mutated.intersection(_bases(node))
    }


def _bases(node: fx.Node) -> set[fx.Node]:
    """What a second run of the node would read, looked at through views."""
    bases: set[fx.Node] = set()
    _, args, kwargs = second_call(node)
    stack = [a for a in pytree.tree_leaves((args, kwargs)) if isinstance(a, fx.Node)]
    while stack:
        source = stack.pop()
        bases.add(source)
        if is_view(source):
            stack += source.all_input_nodes
    return bases


def refusal(node: fx.Node) -> str | None:
    """Why a node must not run a second time; None if it may."""
    target = node.target
    if node.meta.get("fxmem_keep"):
        return str(node.meta["fxmem_keep"])
    if not isinstance(target, torch._ops.OpOverload):
        return None if _is_plain_python(node) else "not an operator fxmem knows to be pure"
    if target.namespace in _OF_PROCESSES:
        return "talks to other processes"
    if target.namespace not in _PURE_NAMESPACES and target.overloadpacket not in _declared_pure:
        return f"custom operator {target.overloadpacket}: call fxmem.declare_pure if it is pure"
    if target._schema.is_mutable:
        return "changes its arguments"
    if any(not isinstance(_device(t), torch.device) for t in tensors_in(node.meta.get("val"))):
        return "lives on an unknown device"
    if _has_unbacked_size(node):
        return "its size depends on data"
    if is_nondeterministic(node):
        return "runs in a different order each time on this device"
    if is_random(node) and not _replayable(node):
        return "random on a device whose generator fxmem cannot replay"
    return None


def _is_plain_python(node: fx.Node) -> bool:
    return is_symbolic_scalar(node) or getattr(node.target, "__name__", "") == "getitem"


def _device(tensor: torch.Tensor) -> torch.device:
    return tensor.device


def _has_unbacked_size(node: fx.Node) -> bool:
    return any(
        isinstance(d, torch.SymInt) and not d.node.has_hint()
        for t in tensors_in(node.meta.get("val"))
        for d in (*t.shape, *t.stride())
    )


def is_random(node: fx.Node) -> bool:
    """Does the node draw from a generator?"""
    target = node.target
    if not isinstance(target, torch._ops.OpOverload):
        return False
    if torch.Tag.nondeterministic_seeded not in target.tags:
        return False
    place = _SEEDED_BY_DROPOUT.get(target.overloadpacket)
    if place is not None:
        return _argument(node, place, "dropout_p", 0.0) != 0.0
    if target.overloadpacket is aten.native_dropout:
        return node.args[2] is not False
    return True


def draws_within(node: fx.Node) -> bool:
    """Does a graph that the node's higher-order operator runs draw from a generator?"""
    if not isinstance(node.target, torch._ops.HigherOrderOperator):
        return False
    owner = node.graph.owning_module
    names = [str(given.target) for given in node.all_input_nodes if given.op == "get_attr"]
    codes = [operator.attrgetter(name)(owner) for name in names]
    inner = [n for code in codes if isinstance(code, fx.GraphModule) for n in code.graph.nodes]
    return any(is_random(n) or draws_within(n) for n in inner)


def _argument(node: fx.Node, place: int, name: str, default: Any) -> Any:
    if name in node.kwargs:
        return node.kwargs[name]
    return node.args[place] if len(node.args) > place else default


def is_nondeterministic(node: fx.Node) -> bool:
    packet = getattr(node.target, "overloadpacket", None)
    on_cuda = any(t.device.type == "cuda" for t in tensors_in(node.meta.get("val")))
    return on_cuda and packet in _NONDETERMINISTIC_ON_CUDA


def _replayable(node: fx.Node) -> bool:
    if _argument(node, 10**6, "generator", None) is not None:
        return False  # a generator of the user's own: its state is not ours to rewind
    return all(t.device.type in ("cpu", "cuda") for t in tensors_in(node.meta.get("val")))


def rng_state_nbytes(node: fx.Node) -> int:
    """Bytes of the generator state that a replay of the node keeps; 0 if it is not random."""
    if not is_random(node) or not _replayable(node):
        return 0
    device = next(iter(tensors_in(node.meta.get("val")))).device
    return 16 if device.type == "cuda" else torch.get_rng_state().numel()


def second_call(node: fx.Node) -> tuple[Any, tuple[Any, ...], dict[str, Any]]:
    """The call that gives the node's values once more without repeating what it did to the world.

    Batch normalization in training also returns updated running statistics: only the first run
    may do so, or a step would count twice.
    """
    if node.target is aten._native_batch_norm_legit_functional.default and node.args[5] is True:
        x, weight, bias, _, _, training, momentum, eps = node.args
        return (
            aten._native_batch_norm_legit.no_stats,
            (x, weight, bias, training, momentum, eps),
            {},
        )
    if node.target is cudnn_batch_norm:
        x, weight, bias, _, _, _, eps = node.args
        return cudnn_batch_norm_again, (x, weight, bias, eps), {}
    return node.target, tuple(node.args), dict(node.kwargs)


def second_call_outputs(node: fx.Node) -> int | None:
    """How many results a second run returns, where that is fewer than the first; else None."""
    return _FEWER.get(second_call(node)[0])


_FEWER = {aten._native_batch_norm_legit.no_stats: 3, cudnn_batch_norm_again: 4}
