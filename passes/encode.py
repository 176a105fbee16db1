"""Encode: the backward reads a code of one bit or one byte in place of a saved tensor.

before                                    after
  a = relu(h)                               a = relu(h)
  # backward                                b = pack_above(a, 0)
  d = threshold_backward(g, a, 0)           # backward
                                            d = threshold_backward(g, b)

  y, i = max_pool2d_with_indices(a, ...)    y, i = max_pool2d_with_indices(a, ...)
  # backward                                o = pool_offsets(i, ...)
  d = max_pool2d_backward(g, i, ...)        # backward
                                            d = pool_backward(g, o, ...)

  y, m = native_dropout(x, p)               y, m = native_dropout(x, p)
  # backward                                b = pack(m)
  d = native_dropout_backward(g, m, s)      # backward
                                            d = dropout_backward(g, b, s)

  c = lt(x, 3)                              c = lt(x, 3)
  # backward                                b = pack(c)
  d = where(c, g, z)                        # backward
                                            c1 = unpack(b, ...)
                                            d = where(c1, g, z)

The code is a value like any other: the planner keeps it, or lets it be made again.  Seconds: one reading
of the tensor and one of the code.  Error: none, to the bit.
Source of the idea: Jain et al. 2018, doi:10.1109/ISCA.2018.00070.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar

from torch import fx
from torch.utils import _pytree as pytree

from fxmem.analysis.dataflow import INSTEAD_OF
from fxmem.basics.sizes import storages_in
from fxmem.codes.lossless import LOSSLESS, Encoding, Reading
from fxmem.graphs.fakes import refresh, replace_uses, views_below
from fxmem.graphs.graph import JointGraph, is_backward, is_view
from fxmem.passes.base import insert_like, sizes_and_strides


@dataclass(frozen=True)
class EncodePass:
    """encodings: the first that a node may read is taken."""

    encodings: tuple[Encoding, ...] = LOSSLESS
    name: ClassVar[str] = "encode"

    def apply(self, graph: JointGraph) -> JointGraph:
        graph = graph.copy()
        held = _held(graph)
        codes = _Codes(graph.module.graph)
        for node in graph.nodes:
            if is_backward(node) and node.op == "call_function":
                self._encode(node, held, codes)
        return graph.verified()

    def _encode(self, node: fx.Node, held: set[int], codes: _Codes) -> None:
        for encoding in self.encodings:
            for how in list(encoding.readings(node)):
                if held.intersection(storages_in(how.source.meta["val"])):
                    continue
                code = codes.of(encoding, how)
                if how.reader is not None:
                    _replace(node, how, code)
                    return
                _decode(node, how, code)


def _held(graph: JointGraph) -> set[int]:
    """Storages that are there to the end, or the caller's, whatever the backward reads."""
    outputs = [o for o in graph.forward_outputs() if isinstance(o, fx.Node)]
    nodes = [*graph.placeholders(), *outputs]
    return {key for node in nodes for key in storages_in(node.meta.get("val"))}


# -- Rewriting ---------------------------------------------------------------------------------------

PLAIN = "fxmem_plain"
"""Node metadata of a node that reads a code: how to read what the code is made of."""


@dataclass(frozen=True)
class Operand:
    """One of the nodes that a node reads, by its place among them; None for what is encoded."""

    place: int | None


@dataclass(frozen=True)
class Plain:
    """A call, with operands in place of nodes; no target: what is decoded is what was encoded."""

    target: Any
    args: Any
    kwargs: dict[str, Any] = field(default_factory=dict)

    def given(self, reader: fx.Node, source: fx.Node) -> Any:
        """The arguments that read ``source``, and what else the reader of the code reads now."""
        now = reader.all_input_nodes
        return pytree.tree_map_only(
            Operand, lambda o: source if o.place is None else now[o.place], self.args
        )


def plain_call(node: fx.Node, source: fx.Node, coded: fx.Node) -> Plain:
    """``node``, which reads ``source``, in the place of ``coded``, which reads all else that it does."""
    read = coded.all_input_nodes
    args = fx.node.map_arg(
        tuple(node.args),
        lambda n: Operand(None if n is source else read.index(n)),  # type: ignore[arg-type,return-value]
    )
    return Plain(node.target, args, dict(node.kwargs))


class _Codes:
    """The codes that are there already, for several readers of the same."""

    def __init__(self, graph: fx.Graph) -> None:
        self.graph = graph
        self.made: dict[tuple[Any, ...], fx.Node] = {}

    def of(self, encoding: Encoding, how: Reading) -> fx.Node:
        call = (how.source, encoding.encoder, *map(str, how.more))
        if call not in self.made:
            self.made[call] = self._new(encoding, how)
        return self.made[call]

    def _new(self, encoding: Encoding, how: Reading) -> fx.Node:
        args = (how.source, *how.more)
        with self.graph.inserting_after(how.source):
            code = insert_like(
                self.graph, how.source, encoding.encoder, args, suffix="code", backward=False
            )
        del code.meta["fxmem_origin"]
        code.meta.pop("recompute", None)  # what a checkpoint says of the tensor
        return code


def _replace(node: fx.Node, how: Reading, code: fx.Node) -> None:
    """A reader of the code in the node's place."""
    args = tuple(code if a is None else a for a in how.arguments)
    ours = _insert(node, how.reader, args, "coded")
    ours.meta[INSTEAD_OF] = node.name
    ours.meta[PLAIN] = plain_call(node, how.source, ours)
    replace_uses(node, ours)
    node.graph.erase_node(node)


def _decode(node: fx.Node, how: Reading, code: fx.Node) -> None:
    """The node reads what is decoded before it."""
    views = [n for n in (node, *views_below(node)) if is_view(n)]
    given = sizes_and_strides(how.source) if how.decoded is None else how.decoded
    decoded = _insert(node, how.decoder, (code, *given), "decoded")
    decoded.meta[INSTEAD_OF] = ""
    decoded.meta[PLAIN] = Plain(None, None)
    node.replace_input_with(how.source, decoded)
    refresh(views)


def _insert(node: fx.Node, target: Any, args: tuple[Any, ...], suffix: str) -> fx.Node:
    with node.graph.inserting_before(node):
        ours = insert_like(node.graph, node, target, args, suffix=suffix, backward=True)
    del ours.meta["fxmem_origin"]  # it is made once
    return ours
