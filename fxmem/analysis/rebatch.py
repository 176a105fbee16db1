"""A step's numbers at a smaller batch, without capturing it again: about, and mostly to the byte.

The graph runs once more on fake tensors whose first dimension is the smaller batch.  Sizes that
the capture wrote into the graph as constants follow their operands.  Where that contradicts itself,
there is no answer.
"""

from __future__ import annotations

import logging
import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import sympy
import torch
from torch import fx
from torch.utils import _pytree as pytree

from fxmem._torch import new_fake_mode, quiet_fake_tensors, storage_key
from fxmem.analysis.dataflow import Dataflow, Operator
from fxmem.basics.sizes import as_expr, evaluate, storages_in, tensors_in
from fxmem.codes.encodings import avg_pool2d_backward, max_pool2d_backward, pool_backward
from fxmem.graphs.convolution import convolution_input_backward
from fxmem.graphs.graph import JointGraph, OutputKind, Role, is_backward

log = logging.getLogger(__name__)
aten = torch.ops.aten
Shape = tuple[int, ...]
Ratios = dict[int, tuple[int, int]]
"""Storage -> elements of the tensor that it was made for: at the example's batch, at the other one."""


def batch_of(graph: JointGraph) -> int | None:
    """The size that most inputs have as their first dimension, if it can be smaller."""
    leading = Counter(shape[0] for node in _inputs(graph) if (shape := _shape(graph, node)))
    size = leading.most_common(1)[0][0] if leading else 1
    return size if size > 1 else None


def at_batch(graph: JointGraph, flow: Dataflow, batch: int, smaller: int) -> Dataflow | None:
    """The numbers of ``flow``, which is the graph's, with ``smaller`` in the place of ``batch``.

    Bytes of tensors are those of the smaller batch; workspaces shrink as what their operators read
    and make.  None where shapes do not tell which dimensions belong to the batch.
    """
    try:
        sizes = _symbolic(graph, flow, batch, smaller)
        if sizes is None:
            with quiet_fake_tensors():
                sizes = _static(graph, flow, batch, smaller)
    # Operators may refuse a shape in any way.
    except Exception as error:
        log.info("the step's sizes at a batch of %s are not known: %s", smaller, error)
        return None
    return resized(flow, _with_elements(flow, sizes))


def resized(flow: Dataflow, sizes: Sequence[int]) -> Dataflow:
    """The same operators over values of other sizes; workspaces go by what is read and made."""
    values = [replace(v, nbytes=n) for v, n in zip(flow.values, sizes, strict=True)]
    operators = [replace(op, workspace=_workspace(flow, op, sizes)) for op in flow.operators]
    return Dataflow(operators, values, flow.num_forward)


def _with_elements(flow: Dataflow, sizes: list[int]) -> list[int]:
    """A mean that stays in the storage of its elements: they are as many as the operand's."""
    sizes = list(sizes)
    for op in flow.operators:
        for v in op.makes:
            value = flow.values[v]
            leaves = [t for t in tensors_in(value.node.meta["val"]) if t.ndim == 0]
            if leaves and op.reads and value.nbytes > leaves[0].nbytes:
                source = max(op.reads, key=lambda r: flow.values[r].nbytes)
                sizes[v] = value.nbytes * sizes[source] // flow.values[source].nbytes
    return sizes


def _workspace(flow: Dataflow, op: Operator, sizes: Sequence[int]) -> int:
    touched = [v for v in (*op.reads, *op.makes) if not _is_state(flow, v)]
    before = sum(flow.values[v].nbytes for v in touched)
    after = sum(sizes[v] for v in touched)
    return op.workspace * after // before if before else op.workspace


def _is_state(flow: Dataflow, v: int) -> bool:
    """Parameters and their gradients, which any batch has."""
    return flow.values[v].resident or flow.values[v].gradient


def _inputs(graph: JointGraph) -> list[fx.Node]:
    return list(graph.placeholders(Role.INPUT))


def _shape(graph: JointGraph, node: fx.Node) -> Shape:
    value = node.meta.get("val")
    if not isinstance(value, torch.Tensor):
        return ()
    return tuple(evaluate(as_expr(n), graph.bindings()) for n in value.shape)


# -- Where the batch is a symbol -----------------------------------------------------------------------


def _symbolic(graph: JointGraph, flow: Dataflow, batch: int, smaller: int) -> list[int] | None:
    """Sizes from the closed forms; None where no input's first dimension is a symbol."""
    leading = {
        as_expr(node.meta["val"].shape[0])
        for node in _inputs(graph)
        if _shape(graph, node)[:1] == (batch,)
    }
    symbols = [size for size in leading if isinstance(size, sympy.Symbol)]
    if not symbols:
        return None
    if len(symbols) < len(leading):
        raise ValueError("some inputs have the batch as a symbol, some as a number")
    bindings = {**graph.bindings(), **dict.fromkeys(symbols, smaller)}
    return [
        evaluate(storages_in(value.node.meta["val"])[value.storage], bindings)
        for value in flow.values
    ]


# -- Where it is a number ------------------------------------------------------------------------------


def _static(graph: JointGraph, flow: Dataflow, batch: int, smaller: int) -> list[int]:
    ratios = _Resizing(graph, batch, smaller).run()
    sizes = []
    for value in flow.values:
        before, after = ratios[value.storage]
        sizes.append(value.nbytes * after // before if before else value.nbytes)
    return sizes


class _Resizing:
    """One run of the graph on fake tensors; ``env`` holds each node's value at the other batch."""

    def __init__(self, graph: JointGraph, batch: int, smaller: int) -> None:
        if graph.symbols:
            raise ValueError("the batch is a number among symbols")
        self.graph, self.batch, self.smaller = graph, batch, smaller
        self.env: dict[fx.Node, Any] = {}
        self.ratios: Ratios = {}

    def run(self) -> Ratios:
        nodes = self.graph.nodes
        with new_fake_mode(), torch.no_grad():
            for node in nodes:
                if node.op in ("placeholder", "get_attr") and not is_backward(node):
                    self._add(node, self._source(node))
            for node in nodes:
                if node.op == "call_function" and not is_backward(node):
                    self._add(node, self._call(node))
            self._tangents()
            for node in nodes:
                if node.op == "call_function" and is_backward(node):
                    self._add(node, self._call(node))
        self._check_gradients()
        return self.ratios

    def _add(self, node: fx.Node, value: Any) -> None:
        self.env[node] = value
        before = list(tensors_in(node.meta.get("val")))
        for old, new in zip(before, tensors_in(value), strict=True):
            if len(old.shape) != len(new.shape) or not all(
                m == n or n * self.batch == m * self.smaller
                for m, n in zip(old.shape, new.shape, strict=True)
            ):
                raise ValueError(f"{node.name}: {tuple(old.shape)} became {tuple(new.shape)}")
            # Later looks at a storage may be expanded, or see a part of it.
            self.ratios.setdefault(storage_key(old), (old.numel(), new.numel()))

    def _source(self, node: fx.Node) -> Any:
        value = node.meta.get("val")
        if not isinstance(value, torch.Tensor):
            return value
        shape = tuple(value.shape)
        if node.op == "placeholder" and self.graph.inputs[node.name].role is Role.INPUT:
            shape = self._led(shape)
        return _empty(value, shape)

    def _led(self, shape: Sequence[int]) -> Shape:
        """The shape with the other batch in front, if the batch is there."""
        shape = tuple(shape)
        return (self.smaller, *shape[1:]) if shape[:1] == (self.batch,) else shape

    def _tangents(self) -> None:
        """A gradient that is sent has the shape of its output; they come in the same order."""
        pairs = zip(self.graph.outputs(), self.graph.output_kinds, strict=True)
        results = [o for o, kind in pairs if kind is OutputKind.RESULT and isinstance(o, fx.Node)]
        for node in self.graph.placeholders(Role.TANGENT):
            value = node.meta["val"]
            while results and self._before(results[0]) != tuple(value.shape):
                results.pop(0)
            shape = tuple(self.env[results.pop(0)].shape) if results else tuple(value.shape)
            self._add(node, _empty(value, shape))

    def _before(self, node: fx.Node) -> Shape:
        return tuple(getattr(node.meta.get("val"), "shape", ()))

    def _call(self, node: fx.Node) -> Any:
        target: Any = node.target
        args = list(pytree.tree_map_only(fx.Node, self.env.__getitem__, tuple(node.args)))
        kwargs = pytree.tree_map_only(fx.Node, self.env.__getitem__, dict(node.kwargs))
        fix = _FIXES.get(getattr(target, "overloadpacket", None))
        if fix is not None:
            target, args = fix(self, node, args)
        return target(*args, **kwargs)

    def _check_gradients(self) -> None:
        """Whatever the batch is, a gradient has the shape of what it is of."""
        for source, gradient in zip(self.graph.leaves(), self.graph.gradients(), strict=True):
            if isinstance(gradient, fx.Node):
                mine, theirs = self.env[gradient].shape, self.env[source].shape
                if mine != theirs:
                    raise ValueError(f"{source.name} is {theirs}, its gradient {mine}")


def _empty(like: torch.Tensor, shape: Shape) -> torch.Tensor:
    if shape == tuple(like.shape):
        return torch.empty_strided(shape, like.stride(), dtype=like.dtype, device=like.device)
    return torch.empty(shape, dtype=like.dtype, device=like.device)


# -- Constants that follow the batch -------------------------------------------------------------------

Fix = Callable[[_Resizing, fx.Node, list[Any]], tuple[Any, list[Any]]]


def _view(run: _Resizing, node: fx.Node, args: list[Any]) -> tuple[Any, list[Any]]:
    before = run._before(node.all_input_nodes[0])
    wanted = viewed(before, tuple(args[0].shape), tuple(node.meta["val"].shape))
    return aten.reshape.default, [args[0], wanted]  # strides may differ, bytes do not


def viewed(before: Shape, after: Shape, shape: Shape) -> Shape:
    """What ``shape``, a view of ``before``, is as a view of ``after``.

    A step along a dimension has a stride, which tells it apart in both shapes: the one whose span
    of strides holds the resized dimension's outer end is resized.
    """
    found = list(shape)
    for size, new, stride in zip(before, after, _dense_strides(before), strict=True):
        if size == new:
            continue
        spans = enumerate(zip(shape, _dense_strides(shape), strict=True))
        d = next(d for d, (n, step) in spans if step < size * stride <= step * n)
        if found[d] * new % size:
            raise ValueError(f"{before} to {after}: {shape} cannot follow")
        found[d] = found[d] * new // size
    return tuple(found)


def _dense_strides(shape: Shape) -> list[int]:
    return [math.prod(shape[d + 1 :]) for d in range(len(shape))]


def _expand(run: _Resizing, node: fx.Node, args: list[Any]) -> tuple[Any, list[Any]]:
    out = tuple(node.meta["val"].shape)
    before = run._before(node.all_input_nodes[0])
    extra = len(out) - len(before)
    sizes = list(run._led(out))
    for d, (old, new) in enumerate(zip(before, args[0].shape, strict=True), start=extra):
        sizes[d] = new if old == out[d] else sizes[d]
    return node.target, [args[0], sizes, *args[2:]]


def _created(place: int) -> Fix:
    """New tensors of a given shape have the batch in front or not at all."""

    def fix(run: _Resizing, node: fx.Node, args: list[Any]) -> tuple[Any, list[Any]]:
        args[place] = run._led(args[place])
        return node.target, args

    return fix


def _arange(run: _Resizing, node: fx.Node, args: list[Any]) -> tuple[Any, list[Any]]:
    """Numbers of the samples, as masks are made of them."""
    if args == [run.batch]:
        args = [run.smaller]
    return node.target, args


def _slice_backward(run: _Resizing, node: fx.Node, args: list[Any]) -> tuple[Any, list[Any]]:
    gradient, sizes, dim = args[:3]
    sizes = [n if d == dim % len(sizes) else gradient.shape[d] for d, n in enumerate(sizes)]
    return node.target, [gradient, sizes, *args[2:]]


def _select_backward(run: _Resizing, node: fx.Node, args: list[Any]) -> tuple[Any, list[Any]]:
    gradient, sizes, dim = args[:3]
    shape = list(gradient.shape)
    shape.insert(dim % len(sizes), sizes[dim])
    return node.target, [gradient, shape, *args[2:]]


def _sized(place: int) -> Fix:
    """The shape of the result is an argument, with as many samples as the gradient has."""

    def fix(run: _Resizing, node: fx.Node, args: list[Any]) -> tuple[Any, list[Any]]:
        args[place] = [args[0].shape[0], *args[place][1:]]
        return node.target, args

    return fix


def _group_norm(place: int) -> Fix:
    """The number of samples is an argument of its own."""

    def fix(run: _Resizing, node: fx.Node, args: list[Any]) -> tuple[Any, list[Any]]:
        args[place] = args[0].shape[0]
        return node.target, args

    return fix


_FIXES: dict[Any, Fix] = {
    aten.view: _view,
    aten._unsafe_view: _view,
    aten.reshape: _view,
    aten.expand: _expand,
    **dict.fromkeys((aten.full, aten.zeros, aten.ones, aten.empty, aten.rand), _created(0)),
    **dict.fromkeys((aten.new_zeros, aten.new_ones, aten.new_empty, aten.new_full), _created(1)),
    aten.repeat: _created(1),
    aten.arange: _arange,
    aten.slice_backward: _slice_backward,
    aten.select_backward: _select_backward,
    **dict.fromkeys(
        (aten.upsample_nearest2d_backward, aten.upsample_bilinear2d_backward), _sized(2)
    ),
    **dict.fromkeys((pool_backward.overloadpacket, max_pool2d_backward.overloadpacket), _sized(2)),
    avg_pool2d_backward.overloadpacket: _sized(1),
    convolution_input_backward.overloadpacket: _sized(2),
    aten.native_group_norm: _group_norm(3),
    aten.native_group_norm_backward: _group_norm(5),
}
