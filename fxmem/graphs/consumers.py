"""How the backward uses what the forward saves: linearly in a weight's gradient, or in other ways.

    x is an operand of                                   its use is
    a product that only makes a parameter's gradient     linear: noise in x stays in that gradient
    another product                                      travelling: noise goes upstream, unbiased
    the backward of an activation and nothing else       travelling: noise of the derivative there is
    an operator that is smooth in it                     smooth: noise is biased, by little if it is small
    anything else                                        nonlinear: noise may do anything

Views and casts are looked through.  Only operators that are known to be linear in an operand count as
products, or as smooth; all others are nonlinear.  Noise that travels has mean zero wherever it arrives
if all on its way is linear in it and no product meets noise of its own operand again; else the use is
nonlinear, too.
"""

from __future__ import annotations

import enum
import operator
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import fx

from fxmem.basics.sizes import hint, is_dense, storages_in
from fxmem.graphs.activations import activation_of
from fxmem.graphs.graph import JointGraph, Role, is_backward, is_view

aten = torch.ops.aten


class Use(enum.IntEnum):
    """From the most harmless on."""

    LINEAR = 0
    TRAVELLING = 1
    SMOOTH = 2
    NONLINEAR = 3


@dataclass(frozen=True)
class Product:
    """An operator that is linear in ``operand``.

    path: views and casts from the saved value to the operand, in order.  parameters: those whose
    gradients the product is part of; none where it is part of something else, too.
    """

    node: fx.Node
    operand: fx.Node
    path: tuple[fx.Node, ...] = ()
    parameters: tuple[str, ...] = ()


@dataclass(frozen=True)
class Reader:
    """One operator of the backward that reads a saved value.

    views: from the value to what it reads, in order.  products: what it feeds, itself or behind casts.
    activation: of which it is the backward, so that it is linear in the derivative at what it reads.
    """

    node: fx.Node
    views: tuple[fx.Node, ...]
    use: Use
    products: tuple[Product, ...] = ()
    activation: str | None = None


@dataclass(frozen=True)
class Saved:
    """A value that the forward makes, as one tensor with a storage of its own, and its readers."""

    node: fx.Node
    readers: tuple[Reader, ...]

    @property
    def use(self) -> Use:
        """The worst of its readers' uses.

        Two products that are part of one gradient are not independent: their noises add up before
        they are squared.
        """
        reached = [p for r in self.readers for product in r.products for p in product.parameters]
        worst = max(reader.use for reader in self.readers)
        if worst is Use.LINEAR and len(set(reached)) < len(reached):
            return Use.TRAVELLING
        return worst

    @property
    def activation(self) -> str | None:
        """The one whose derivative at the value is all that the backward needs, if there is one."""
        if self.use is not Use.TRAVELLING:
            return None
        return self.readers[0].activation


def saved_values(graph: JointGraph) -> list[Saved]:
    """The values that the backward reads and that nobody else holds, in graph order.

    Left out are parameters, inputs, what the caller gets, and what is not the first result of its
    operator: statistics, logarithms of sums, states of generators.
    """
    return list(_Consumers(graph).saved())


_LINEAR_IN: dict[Any, tuple[int, ...]] = {
    aten.mm.default: (0, 1),
    aten.bmm.default: (0, 1),
    aten.addmm.default: (1, 2),
    aten.baddbmm.default: (1, 2),
    aten.mul.Tensor: (0, 1),
    aten.convolution_backward.default: (1,),
}
"""Operators, and the places of the operands that each is linear in, one at a time."""

_RESULT_OF_OPERAND: dict[Any, int] = {aten.convolution_backward.default: 1}
"""Which of several results the operand is part of: the weight's gradient."""

_SUMS = {aten.add.Tensor, aten.sum.dim_IntList, aten.clone.default}
"""What adds up, each element once and as it is."""

CASTS = {aten._to_copy.default, torch.ops.prims.convert_element_type.default}

_ADDITIVE = {
    *_SUMS,
    *CASTS,
    aten.sub.Tensor,
    aten.neg.default,
    aten.sum.default,
    aten.mean.dim,
    aten.cat.default,
    aten.stack.default,
    aten.zeros_like.default,
    aten.constant_pad_nd.default,
}
"""Operators that are linear in all their tensors at once."""

_ONE_OF_TWO: dict[Any, tuple[int, ...]] = {
    **_LINEAR_IN,
    aten.div.Tensor: (0,),
    aten.div.Scalar: (0,),
    aten.mul.Scalar: (0,),
    aten.where.self: (1, 2),
    aten.masked_fill.Scalar: (0,),
}
"""Operators that noise comes by, and where it may come in."""


_SMOOTH = {
    aten.native_layer_norm_backward.default,
    aten.native_group_norm_backward.default,
    aten.native_batch_norm_backward.default,
    aten._softmax_backward_data.default,
    aten._log_softmax_backward_data.default,
    aten.gelu_backward.default,
    aten.silu_backward.default,
    aten.tanh_backward.default,
    aten.sigmoid_backward.default,
    aten.softplus_backward.default,
    aten.mish_backward.default,
    aten.mul.Tensor,
    aten.div.Tensor,
    aten.pow.Tensor_Scalar,
    aten.exp.default,
    aten.sin.default,
    aten.cos.default,
    aten.tanh.default,
    aten.sigmoid.default,
}
"""Operators that are smooth in each of their operands, with derivatives that torch knows.

Not the backward of fused attention, which exponentiates what it reads and divides by what was summed
before.
"""


class _Consumers:
    def __init__(self, graph: JointGraph) -> None:
        self.graph = graph
        self.views = {node for node in graph.nodes if is_view(node)}
        forward = [o for o in graph.forward_outputs() if isinstance(o, fx.Node)]
        self.held = {
            key
            for node in (*graph.placeholders(), *forward)
            for key in storages_in(node.meta.get("val"))
        }
        self.gradients = [graph.inputs[n.name] for n in graph.leaves()]

    def saved(self) -> Iterator[Saved]:
        for node in self.graph.nodes:
            if self._is_own(node):
                readers = tuple(self._readers(node, node, ()))
                if readers:
                    yield self._settled(Saved(node, readers))

    def _is_own(self, node: fx.Node) -> bool:
        """Is it the first result of a forward operator, which nobody holds?"""
        value = node.meta.get("val")
        if node.op != "call_function" or is_backward(node) or not isinstance(value, torch.Tensor):
            return False
        if self.held.intersection(storages_in(value)):
            return False
        if getattr(node.target, "__name__", "") == "getitem":
            return bool(node.args[1] == 0)
        return node not in self.views

    def _readers(
        self, value: fx.Node, node: fx.Node, views: tuple[fx.Node, ...]
    ) -> Iterator[Reader]:
        """What reads ``value`` through ``node``, which is one of its views."""
        for user in node.users:
            if user in self.views:
                yield from self._readers(value, user, (*views, user))
            elif user.op == "output":
                yield Reader(user, views, Use.NONLINEAR)
            elif is_backward(user):
                products = self._products(value, user, node, views)
                name = None if products else _activation(user, node, value)
                if name is not None:
                    products = (Product(user, node, views),)
                known = products is not None
                travels = known and not all(p.parameters for p in products or ())
                use = Use.TRAVELLING if travels else Use.LINEAR if known else _other_use(user)
                yield Reader(user, views, use, products or (), name)

    def _products(
        self, value: fx.Node, reader: fx.Node, operand: fx.Node, path: tuple[fx.Node, ...]
    ) -> tuple[Product, ...] | None:
        """The products that a reader is, or feeds; None if it is none, or feeds something else."""
        if reader.target in CASTS:
            behind = tuple(self._readers(reader, reader, ()))
            if any(r.use > Use.TRAVELLING or r.activation for r in behind):
                return None
            inner = [p for r in behind for p in r.products]
            return tuple(replace(p, path=(*path, reader, *p.path)) for p in inner)
        keys = set(storages_in(value.meta["val"]))
        reads = [n for n in reader.all_input_nodes if keys & set(storages_in(n.meta.get("val")))]
        places = [i for i, a in enumerate(reader.args) if a is operand]
        linear = _LINEAR_IN.get(reader.target, ())
        if reads != [operand] or len(places) != 1 or places[0] not in linear or reader.kwargs:
            return None
        return (Product(reader, operand, path, self._reached(reader, operand, path)),)

    def _settled(self, saved: Saved) -> Saved:
        """With worse uses for travelling where noise would not keep its mean."""
        named = {(r.activation, r.activation and r.views) for r in saved.readers}
        alike = len(named) == 1
        if saved.use is not Use.TRAVELLING or (alike and self._keeps_mean(saved)):
            return saved
        worse = Use.NONLINEAR if alike else Use.SMOOTH
        doubtful = [r.use is Use.TRAVELLING and (alike or r.activation) for r in saved.readers]
        pairs = zip(saved.readers, doubtful, strict=True)
        readers = tuple(replace(r, use=worse) if doubt else r for r, doubt in pairs)
        return replace(saved, readers=readers)

    def _keeps_mean(self, saved: Saved) -> bool:
        """Is all that the products' noise reaches linear in it, without any of the products?"""
        products = {p.node for r in saved.readers for p in r.products}
        noisy: set[fx.Node] = set(products)
        for node in self._after(products):
            if not noisy.intersection(node.all_input_nodes):
                continue
            if node in products or not _is_linear(node, noisy, self.views):
                return False
            noisy.add(node)
        return True

    def _after(self, products: set[fx.Node]) -> Iterator[fx.Node]:
        """The graph from the first of them on, without the output."""
        begun = False
        for node in self.graph.nodes:
            begun = begun or node in products
            if begun and node.op != "output":
                yield node

    def _reached(
        self, product: fx.Node, operand: fx.Node, path: tuple[fx.Node, ...]
    ) -> tuple[str, ...]:
        """The parameters whose gradients the product is part of; none if it goes anywhere else.

        None also where noises of one element meet, or one noise is there several times: their squares
        are then not those of the product.
        """
        if any(_repeats(view.all_input_nodes[0], view) for view in path):
            return ()
        place = _RESULT_OF_OPERAND.get(product.target)
        apart = product.target is aten.mul.Tensor and not _repeats(operand, product)
        found: set[str] = set()
        seen: set[fx.Node] = set()
        stack = [(u, product) for u in product.users if place is None or u.args[1] == place]
        while stack:
            node, source = stack.pop()
            if node.op == "output":
                names = self._parameters(source)
                if not names:
                    return ()
                found.update(names)
                continue
            sums = node.target in _SUMS and not node.kwargs.get("alpha")
            if node in seen or not (sums or node.target in CASTS or node in self.views):
                return ()  # also where two ways from the product meet
            if node.target is aten.sum.dim_IntList and not apart:
                return ()
            if node.args.count(source) > 1 or _repeats(source, node):
                return ()
            seen.add(node)
            stack += [(user, node) for user in node.users]
        return tuple(sorted(found))

    def _parameters(self, node: fx.Node) -> list[str]:
        """The leaves whose gradient the graph returns as ``node``; none if it is another result."""
        first = self.graph.num_forward_outputs
        names = []
        for place, value in enumerate(self.graph.outputs()):
            if value is node:
                leaf = self.gradients[place - first] if place >= first else None
                if leaf is None or leaf.role is not Role.PARAMETER or not leaf.keeps_gradient:
                    return []
                names.append(leaf.name)
        return names


def _repeats(source: fx.Node, node: fx.Node) -> bool:
    """Is an element of ``source`` several ones of the node's result?"""
    value, seen = source.meta["val"], node.meta["val"]
    if not isinstance(value, torch.Tensor) or not isinstance(seen, torch.Tensor):
        return False  # one of several results, or several parts of one
    return bool(hint(seen.numel()) > hint(value.numel()))


def _other_use(reader: fx.Node) -> Use:
    """Of an operand that the reader is not linear in."""
    return Use.SMOOTH if reader.target in _SMOOTH else Use.NONLINEAR


def _activation(node: fx.Node, saved: fx.Node, value: fx.Node) -> str | None:
    """The activation at ``value``, seen as ``saved``, whose backward the node is."""
    found = activation_of(node)
    if found is None or found[1] is not saved:
        return None
    grad, seen = found[0].meta["val"], saved.meta["val"]
    whole = is_dense(seen) and hint(seen.numel()) == hint(value.meta["val"].numel())
    own = set(storages_in(seen)) & set(storages_in(grad))
    same = grad.shape == seen.shape and grad.dtype == seen.dtype
    return found[2] if whole and same and not own and is_backward(found[0]) else None


def _is_linear(node: fx.Node, noisy: set[fx.Node], views: set[fx.Node]) -> bool:
    """Is the operator linear in those of its operands that are noisy?"""
    if node in views or node.target in _ADDITIVE or node.target is operator.getitem:
        return True
    places = [i for i, a in enumerate(node.args) if isinstance(a, fx.Node) and a in noisy]
    if len(noisy.intersection(node.all_input_nodes)) > 1 or len(places) != 1:
        return False
    if places[0] in _ONE_OF_TWO.get(node.target, ()):
        return True
    return places == [0] and _is_backward_of_an_operator(node)


def _is_backward_of_an_operator(node: fx.Node) -> bool:
    """These are linear in the gradient, which comes first."""
    if not isinstance(node.target, torch._ops.OpOverload):
        return False
    space, name = node.target.namespace, node.target._schema.name
    return space in ("aten", "fxmem") and "backward" in name
