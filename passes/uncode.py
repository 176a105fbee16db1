"""Uncode: what reads a code that is made right before it reads what the code is made of.

before                                        after
  # backward                                    # backward
  a_recompute = relu(h)                         a_recompute = relu(h)
  b_recompute = pack_above(a_recompute, 0)      d = threshold_backward(g, a_recompute, 0)
  d = threshold_backward(g, b_recompute)

Plans are made of steps whose backwards read codes wherever they can; a code that is not kept is none.
Seconds: those of both operators, less.  Error: none, to the bit.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from torch import fx

from fxmem.codes.encodings import ENCODERS
from fxmem.codes.lossy import all_encodings
from fxmem.graphs.fakes import replace_uses
from fxmem.graphs.graph import JointGraph, is_backward, is_view
from fxmem.passes.base import insert_like
from fxmem.passes.encode import PLAIN


def lossy_coders() -> frozenset[Any]:
    """Operators whose result is a code, with errors, of their first operand."""
    return frozenset(encoding.encoder for encoding in all_encodings())


def coders() -> frozenset[Any]:
    """Operators whose result is a code of their first operand."""
    return ENCODERS | lossy_coders()


@dataclass(frozen=True)
class UncodePass:
    """but: readers that stay, for what they would read takes bytes that are not there.

    Not those of lossy codes, which must be as few as the plan says.
    """

    but: frozenset[str] = frozenset()
    name: ClassVar[str] = "uncode"

    def apply(self, graph: JointGraph) -> JointGraph:
        graph = graph.copy()
        for code in graph.nodes:
            reader = reader_of(code)
            if reader is not None and reader.name not in self.but:
                _uncode(graph.module.graph, code, reader)
        return graph.verified()


def without_codes(graph: JointGraph) -> JointGraph:
    """The step that reads, in place of each code that it makes in its forward, what that is made of."""
    graph = graph.copy()
    for code in list(graph.nodes):
        if code.target in coders() and not is_backward(code):
            for reader in [r for r in code.users if PLAIN in r.meta]:
                _read_plain(graph.module.graph, reader, code.args[0])
            if not code.users:
                graph.module.graph.erase_node(code)
    return graph.verified()


def reader_of(code: fx.Node) -> fx.Node | None:
    """The node that alone reads a code, right after it is made in the backward."""
    if not is_backward(code) or len(code.users) != 1 or code.target not in coders():
        return None
    (reader,) = code.users
    after = code.next
    while after is not reader and is_view(after):
        after = after.next
    return reader if after is reader and PLAIN in reader.meta else None


_SUFFIX = "plain"


def plain_name(reader: fx.Node) -> str:
    """The name of what takes the reader's place; of what reads it, where it decodes."""
    if reader.meta[PLAIN].target is None:
        return next(iter(reader.users)).name
    return f"{reader.name}_{_SUFFIX}"


def _uncode(graph: fx.Graph, code: fx.Node, reader: fx.Node) -> None:
    _read_plain(graph, reader, code.args[0])
    graph.erase_node(code)


def _read_plain(graph: fx.Graph, reader: fx.Node, source: Any) -> None:
    """The reader of a code becomes one of what the code is made of."""
    plain = reader.meta[PLAIN]
    if plain.target is None:
        replace_uses(reader, source)
        graph.erase_node(reader)
        return
    args = plain.given(reader, source)
    with graph.inserting_before(reader):
        ours = insert_like(
            graph, reader, plain.target, args, plain.kwargs, suffix=_SUFFIX, backward=True
        )
    del ours.meta["fxmem_origin"], ours.meta[PLAIN]  # it is made once
    replace_uses(reader, ours)
    graph.erase_node(reader)
