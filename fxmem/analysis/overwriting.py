"""Overwriting: the operands whose memory an operator's result may take, once nobody reads them again.

A phase writes only over what it made itself: never over a saved tensor in the backward, a tangent
or anything that the caller has or gets.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from fxmem._torch import run_and_save_rng_state
from fxmem.basics.sizes import storage_keys, storages_in
from fxmem.codes import derivatives, encodings
from fxmem.graphs.fakes import look
from fxmem.graphs.graph import JointGraph, is_backward, is_view
from fxmem.graphs.workspace import LAYOUT

aten = torch.ops.aten

# Elementwise operators on TensorIterator, which reads an element before it writes there and accepts
# a destination that is one of the operands: ATen/MemoryOverlap.h.  Each with the variant that takes
# a destination, and the keyword for it, or None if it is always the first operand.  ``mul_.Scalar``
# is none: it rounds the scalar to half first.  ``relu.out`` is none: it copies.
DESTINATIONS: dict[Any, tuple[Any, str | None]] = {
    aten.add.Tensor: (aten.add.out, "out"),
    aten.sub.Tensor: (aten.sub.out, "out"),
    aten.mul.Tensor: (aten.mul.out, "out"),
    aten.mul.Scalar: (aten.mul.out, "out"),
    aten.div.Tensor: (aten.div.out, "out"),
    aten.div.Scalar: (aten.div.out, "out"),
    aten.neg.default: (aten.neg.out, "out"),
    aten.where.self: (aten.where.self_out, "out"),
    aten.elu.default: (aten.elu.out, "out"),
    aten.gelu.default: (aten.gelu.out, "out"),
    aten.hardtanh.default: (aten.hardtanh.out, "out"),
    aten.leaky_relu.default: (aten.leaky_relu.out, "out"),
    aten.relu.default: (aten.relu_.default, None),
    aten.sigmoid.default: (aten.sigmoid.out, "out"),
    aten.silu.default: (aten.silu.out, "out"),
    aten.tanh.default: (aten.tanh.out, "out"),
    aten.elu_backward.default: (aten.elu_backward.grad_input, "grad_input"),
    aten.gelu_backward.default: (aten.gelu_backward.grad_input, "grad_input"),
    aten.hardtanh_backward.default: (aten.hardtanh_backward.grad_input, "grad_input"),
    aten.leaky_relu_backward.default: (aten.leaky_relu_backward.grad_input, "grad_input"),
    aten.sigmoid_backward.default: (aten.sigmoid_backward.grad_input, "grad_input"),
    aten.silu_backward.default: (aten.silu_backward.grad_input, "grad_input"),
    aten.softplus_backward.default: (aten.softplus_backward.grad_input, "grad_input"),
    aten.tanh_backward.default: (aten.tanh_backward.grad_input, "grad_input"),
    aten.threshold_backward.default: (aten.threshold_backward.grad_input, "grad_input"),
    encodings.threshold_backward: (encodings.threshold_backward_out, "grad_input"),
    encodings.leaky_relu_backward: (encodings.leaky_relu_backward_out, "grad_input"),
    derivatives.derivative_backward: (derivatives.derivative_backward_out, "grad_input"),
}


def overwritable(graph: JointGraph, backward: bool) -> dict[fx.Node, tuple[fx.Node, ...]]:
    """Operator of one phase -> the operands whose place its result may take, the first choice first.

    Whether one of them is read again later is not asked here: that depends on what is kept.
    """
    ours = _made_in_phase(graph, backward)
    found: dict[fx.Node, tuple[fx.Node, ...]] = {}
    for node in graph.nodes:
        if node.target not in DESTINATIONS or is_backward(node) != backward:
            continue
        operands = (a for a in node.args if isinstance(a, fx.Node))
        fitting = tuple(
            a
            for a in operands
            if ours.issuperset(storage_keys(a.meta.get("val"))) and _fits(node, a)
        )
        if fitting:
            found[node] = fitting
    return found


def _made_in_phase(graph: JointGraph, backward: bool) -> set[int]:
    """Storages of what the phase makes: not of inputs or tangents, nor of values made again.

    torch's own operators and ours return memory that nobody else has; others need not.
    """
    made: set[int] = set()
    for node in graph.nodes:
        if node.op != "call_function" or is_backward(node) != backward or is_view(node):
            continue
        again = backward and "fxmem_origin" in node.meta
        if not again and getattr(_operator(node), "namespace", "") in ("aten", "fxmem"):
            made.update(storage_keys(node.meta.get("val")))
    return made


def _operator(node: fx.Node) -> Any:
    """What the node runs, be it to return its generator state as well."""
    return node.args[0] if node.target is run_and_save_rng_state else node.target


def _fits(node: fx.Node, operand: fx.Node) -> bool:
    """Does the result look just like the operand, in a storage that no other operand looks at?"""
    mine, theirs = look(node), look(operand)
    if mine is None or theirs is None or mine[1:] != theirs[1:]:
        return False
    if LAYOUT in node.meta or LAYOUT in operand.meta:
        return False  # the real strides are others
    if operand.meta["val"].is_complex():
        return (
            False  # compilers round a complex product otherwise where its result overlaps a factor
        )
    made, taken = storages_in(node.meta["val"]), storages_in(operand.meta["val"])
    shared = (taken.keys() & storage_keys(i.meta.get("val")) for i in node.all_input_nodes)
    return list(made.values()) == list(taken.values()) and sum(map(bool, shared)) == 1
