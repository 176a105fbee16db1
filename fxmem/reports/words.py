"""A graph's steps and storages in the user's words, so that they outlive the graph."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from fxmem.analysis.categories import category
from fxmem.analysis.liveness import MemoryTimeline, Step, Storage
from fxmem.basics.sizes import Size, storage_nbytes, symbol, tensors_in
from fxmem.graphs.graph import (
    JointGraph,
    is_backward,
    module_name,
    operator_name,
    source_line,
    type_text,
)
from fxmem.graphs.lifetimes import BeforeAfter, Lifetime, Memory, Point

if TYPE_CHECKING:
    from fxmem.steps.analyze import Analysis


def memory_of(analysis: Analysis, before: MemoryTimeline, line: MemoryTimeline) -> BeforeAfter:
    """The step with everything kept and as it was planned, without the graphs behind them."""
    whole = analysis.whole or analysis
    return BeforeAfter(_memory(before, whole.expected), _memory(line, analysis.expected))


def _memory(line: MemoryTimeline, graph: JointGraph) -> Memory:
    words = Words(graph)
    return Memory(
        tuple(words.point(step) for step in line.steps),
        tuple(words.lifetime(storage, line) for storage in line.storages),
        {info.name: info.hint for info in graph.symbols.values()},
    )


class Words:
    """Steps and storages of one graph in the user's words, symbols by the user's names."""

    def __init__(self, graph: JointGraph) -> None:
        self.graph = graph
        self.names = {s: symbol(info.name) for s, info in graph.symbols.items()}
        self.texts = {str(s): info.name for s, info in graph.symbols.items()}

    def point(self, step: Step) -> Point:
        node, workspace = step.node, self._size(step.workspace)
        if node is None:
            return Point("end of the forward", "", "", step.phase, workspace)
        where = (operator_name(node), module_name(node), source_line(node))
        return Point(*where, step.phase, workspace)

    def lifetime(self, storage: Storage, line: MemoryTimeline) -> Lifetime:
        node = storage.node
        info = self.graph.inputs.get(node.name) if storage.resident else None
        names = [node.name, *storage.aliases]
        origin = node.meta.get("fxmem_origin", "") if is_backward(node) else ""
        if origin:  # made again: decided as what it is made again for
            names = [name.rsplit("_recompute", 1)[0] for name in names]
        return Lifetime(
            name=info.name if info else node.name,
            type=self._type(storage),
            nbytes=self._size(storage.nbytes),
            born=max(storage.born, 0),
            dies=storage.dies,
            category=category(storage, self.graph, line),
            module=module_name(node),
            source=source_line(node),
            origin=origin,
            values=tuple(names),
        )

    def _size(self, size: Size) -> Size:
        return size if isinstance(size, int) else size.xreplace(self.names)

    def _type(self, storage: Storage) -> str:
        return self.named(type_of(storage))

    def named(self, text: str) -> str:
        """A type with the user's names in its shape."""
        if not self.texts:
            return text
        return re.sub(r"\b\w+\b", lambda word: self.texts.get(word[0], word[0]), text)


def type_of(storage: Storage) -> str:
    """The type of the tensor in the storage; of several results, of the one that fills it."""
    leaves = list(tensors_in(storage.node.meta.get("val")))
    filling = [t for t in leaves if storage_nbytes(t) == storage.nbytes]
    return type_text(next(iter((*filling, *leaves)), None))
