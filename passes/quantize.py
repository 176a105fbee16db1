"""Quantize: the backward reads a code of a few bits an element in place of a saved tensor.

before                          after
                                  s = step_seed(w)
  a = gelu(h)                     a = gelu(h)
  y = mm(a, v)                    q = quantize_groups(a, 4, 64, s, 0)
  # backward                      y = mm(a, v)
  at = t(a)                       # backward
  gv = mm(at, g)                  a1 = dequantize_groups(q, 4, 64, ...)
  gh = gelu_backward(ga, h)       at = t(a1)
                                  gv = mm(at, g)
                                  gh = derivative_backward(ga, d, ...)

where d = encode_derivative(h, 'gelu', 4, s, 1) is made right after h, which the backward reads no more.

Codes are rounded at random, so that their mean over steps is the tensor; each tensor draws from a
stream of its own.  A code is a value like any other; where it is not kept, its readers read the tensor.
Seconds: one reading of the tensor and one of the code, and the same for each reader.
Error: the noise that the code's node says.
Source of the idea: Chen et al. 2021, arXiv:2104.14129 (ActNN).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import fx

from fxmem.analysis.dataflow import INSTEAD_OF, NOISE
from fxmem.basics.sizes import by_stride
from fxmem.codes.lossy import LossyEncoding
from fxmem.codes.seeds import step_seed
from fxmem.graphs.consumers import Reader, saved_values
from fxmem.graphs.fakes import fake_value, replace_uses
from fxmem.graphs.graph import JointGraph, Role, has_effect
from fxmem.passes.base import insert_like, sizes_and_strides
from fxmem.passes.encode import PLAIN, Plain, plain_call


@dataclass(frozen=True)
class Code:
    """A code of the forward node ``source``.  stream: of random numbers, its own.  noise: see ``NOISE``."""

    source: str
    encoding: LossyEncoding
    stream: int
    noise: int = 1


@dataclass(frozen=True)
class QuantizePass:
    codes: tuple[Code, ...]
    name: ClassVar[str] = "quantize"

    def apply(self, graph: JointGraph) -> JointGraph:
        if not self.codes:
            return graph
        graph = graph.copy()
        readers = {saved.node.name: saved.readers for saved in saved_values(graph)}
        seed = _seed(graph)
        for code in self.codes:
            source = _encoded(graph.node(code.source), code, readers[code.source])
            q = _encode(graph.module.graph, source, code, seed)
            read = _read_decoded if code.encoding.reader is None else _read_derivative
            read(readers[code.source], source, code, q)
        graph.module.graph.eliminate_dead_code(has_effect)
        return graph.verified()


def _seed(graph: JointGraph) -> fx.Node:
    """The step's seed, drawn before anything else is."""
    like = next(graph.placeholders(Role.PARAMETER))
    first = next(n for n in graph.nodes if n.op != "placeholder")
    with graph.module.graph.inserting_before(first):
        seed = graph.module.graph.create_node("call_function", step_seed, (like,), name="step_seed")
    seed.meta.update(
        val=fake_value(step_seed, (like,), {}),
        partitioner_tag="is_forward",
        fxmem_keep="the step's seed is drawn once",
    )
    seed.meta[INSTEAD_OF] = ""
    return seed


def _encoded(value: fx.Node, code: Code, readers: Sequence[Reader]) -> fx.Node:
    """The value; as its readers see it, if they are to read a code in its place."""
    return value if code.encoding.reader is None else readers[0].products[0].operand


def _encode(graph: fx.Graph, source: fx.Node, code: Code, seed: fx.Node) -> fx.Node:
    args = code.encoding.to_encode(source, seed, code.stream)
    with graph.inserting_after(source):
        q = insert_like(
            graph, source, code.encoding.encoder, args, suffix="quantized", backward=False
        )
    del q.meta["fxmem_origin"]
    q.meta.pop("recompute", None)  # what a checkpoint says of the tensor
    q.meta[NOISE] = code.noise
    return q


def _read_decoded(readers: Sequence[Reader], source: fx.Node, code: Code, q: fx.Node) -> None:
    """Each reader decodes right before it reads, through views of its own of what is decoded."""
    layout = (*sizes_and_strides(source), source.meta["val"].dtype)
    for reader in dict.fromkeys(r.node for r in readers):
        args = code.encoding.to_decode(q, *layout)
        decoded = _insert(reader, code.encoding.decoder, args, {}, "dequantized")
        decoded.meta[INSTEAD_OF] = ""
        decoded.meta[PLAIN] = Plain(None, None)
        for ways in [r.views for r in readers if r.node is reader]:
            shown, now = source, decoded
            for view in ways:
                shown, now = view, _view_again(view, shown, now, reader)
            reader.replace_input_with(shown, now)


def _read_derivative(readers: Sequence[Reader], source: fx.Node, code: Code, q: fx.Node) -> None:
    """Each reader, the backward of an activation, becomes one that reads the code."""
    for node in dict.fromkeys(r.node for r in readers):
        (grad, *_), value = node.args, source.meta["val"]
        order = by_stride(value.shape, value.stride())
        args = (grad, q, order, *code.encoding.settings)
        ours = _insert(node, code.encoding.reader, args, {}, "quantized")
        ours.meta[INSTEAD_OF] = node.name
        ours.meta[PLAIN] = plain_call(node, source, ours)
        replace_uses(node, ours)
        node.graph.erase_node(node)


def _view_again(view: fx.Node, source: fx.Node, other: fx.Node, reader: fx.Node) -> fx.Node:
    """The same view of another tensor than ``source``, for one reader."""

    def taken(node: fx.Node) -> fx.Node:
        return other if node is source else node

    args, kwargs = fx.node.map_arg((view.args, dict(view.kwargs)), taken)
    return _insert(reader, view.target, args, kwargs, "dequantized", view)


def _insert(
    reader: fx.Node, target: Any, args: Any, kwargs: Any, suffix: str, like: fx.Node | None = None
) -> fx.Node:
    origin = like or reader
    with reader.graph.inserting_before(reader):
        ours = insert_like(
            reader.graph, origin, target, tuple(args), kwargs, suffix=suffix, backward=True
        )
    del ours.meta["fxmem_origin"]  # it is made once
    return ours
