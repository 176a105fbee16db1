"""Certificates: the tensors that make a peak, what no plan goes below, and what would lower it.

A remedy is a change that the user can make and the planner cannot.  Each one's figure comes from the
same decisions judged over changed numbers, and from what no decisions go below with them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace

import torch
from torch import fx

from fxmem._torch import storage_key
from fxmem.analysis.categories import LOSS
from fxmem.analysis.dataflow import Dataflow, Value
from fxmem.analysis.rebatch import at_batch, batch_of, resized
from fxmem.analysis.simulate import Drop, Outcome, Simulator
from fxmem.basics.units import format_bytes
from fxmem.graphs.graph import (
    JointGraph,
    OutputKind,
    module_name,
    operator_name,
    source_line,
)
from fxmem.planning.plan import Certificate, LiveTensor, Remedy

MOST_TENSORS = 6
LOSS_PARTS = 8
_LEAST_SHARE = 100
"""A remedy of less than a hundredth of the peak is not worth a line."""

_LEAST_FOR_KERNELS = 10
"""Nor is a batch, where a convolution works in a tenth of the peak: its kernel may change with it."""


def certificate(
    simulator: Simulator, peak: int, tensors: Iterable[LiveTensor], remedies: Iterable[Remedy] = ()
) -> Certificate:
    """For a plan that peaks at ``peak`` bytes, with ``tensors`` live there.

    The remedies come sorted by what they save; those that save next to nothing are left out.
    """
    tensors = sorted(tensors, key=lambda t: -t.nbytes)
    rest = tensors[MOST_TENSORS:]
    worth = [r for r in remedies if r.saves * _LEAST_SHARE >= peak]
    least = simulator.least
    node = None if least.operator is None else simulator.flow.operators[least.operator].node
    return Certificate(
        tensors=tuple(tensors[:MOST_TENSORS]),
        others=len(rest),
        others_nbytes=sum(t.nbytes for t in rest),
        # What was simulated and what is rewritten differ by bytes.
        least=min(least.nbytes, peak),
        least_own=min(_own(simulator.flow, least.operator), peak),
        least_operator=LOSS if node is None else operator_name(node),
        least_module=module_name(node) if node else "",
        least_source=source_line(node) if node else "",
        remedies=tuple(sorted(worth, key=lambda r: -r.saves)),
    )


def _own(flow: Dataflow, operator: int | None) -> int:
    """Bytes that an operator itself reads, makes and works in."""
    if operator is None:
        return flow.loss_outside + sum(v.nbytes for v in flow.values if v.tangent)
    op = flow.operators[operator]
    return op.workspace + sum(flow.values[v].nbytes for v in {*op.reads, *op.makes})


# -- What would lower a peak ---------------------------------------------------------------------------


@dataclass(frozen=True)
class Judge:
    """Decisions, and what they lead to, to be judged again over other numbers.

    budget: bytes that were asked for, if any.
    """

    graph: JointGraph
    simulator: Simulator
    kept: frozenset[int]
    drops: frozenset[Drop]
    outcome: Outcome
    budget: int | None = None

    @property
    def flow(self) -> Dataflow:
        return self.simulator.flow

    def remedies(self, tensors: Iterable[LiveTensor]) -> Iterator[Remedy]:
        """What the graph and the tensors that are live at the peak call for, in no order."""
        yield from self._smaller_batch()
        yield from self._loss_in_parts()
        yield from self._outputs_let_go()
        yield from self._gradients_let_go()
        yield from self._encoded(tensors)

    def peak_with(self, flow: Dataflow) -> int:
        """Bytes that the same decisions peak at over other numbers."""
        return Simulator(flow).run(self.kept, self.drops).peak

    def freed_by(self, flow: Dataflow) -> int:
        """Bytes gone from the fullest step, as far as what every plan needs allows it."""
        other = Simulator(flow)
        found, step = other.run(self.kept, self.drops), int(self.outcome.live.argmax())
        # Where nobody holds its result, an operator may not run at all, and steps have other numbers.
        is_alike = len(found.live) == len(self.outcome.live)
        there = int(found.live[step]) if is_alike else found.peak
        return self.outcome.peak - max(there, min(other.least.nbytes, self.outcome.peak))

    # -- One method a remedy -----------------------------------------------------------------------

    def _smaller_batch(self) -> Iterator[Remedy]:
        batch = batch_of(self.graph)
        if batch is None or self._kernels_matter():
            return
        half = batch // 2
        flow = at_batch(self.graph, self.flow, batch, half)
        if flow is None:
            return
        saves = self.outcome.peak - self.peak_with(flow)
        what = f"a batch of {half} for {batch}"
        fitting = self._largest_that_fits(flow, batch, half)
        if fitting:
            what += f"; the largest that fits is about {fitting}"
        yield Remedy("batch", "about", what, saves)

    def _kernels_matter(self) -> bool:
        """Do convolutions work in so much that another kernel, for another batch, may tell?"""
        works = (op.workspace for op in self.flow.operators if "convolution" in str(op.node.target))
        return max(works, default=0) * _LEAST_FOR_KERNELS >= self.outcome.peak

    def _largest_that_fits(self, half: Dataflow, batch: int, smaller: int) -> int:
        """The largest batch whose peak fits, 0 if none does: sizes lie on a line through two."""
        if self.budget is None:
            return 0
        low, high = 0, batch  # fits, or is nothing; does not fit
        while high - low > 1:
            middle = (low + high) // 2
            sizes = [
                max(0, v.nbytes + (w.nbytes - v.nbytes) * (batch - middle) // (batch - smaller))
                for v, w in zip(self.flow.values, half.values, strict=True)
            ]
            if self.peak_with(resized(self.flow, sizes)) <= self.budget:
                low = middle
            else:
                high = middle
        return low

    def _loss_in_parts(self) -> Iterator[Remedy]:
        for loss in filter(_is_loss_over_classes, self.graph.nodes):
            classes, nodes = scores(loss)
            values = {self._value_of[node] for node in nodes if node in self._value_of}
            part = [
                -(-v.nbytes // LOSS_PARTS) if i in values and not v.result else v.nbytes
                for i, v in enumerate(self.flow.values)
            ]
            saves = self.freed_by(resized(self.flow, part))
            what = f"the loss over {classes} classes in {LOSS_PARTS} parts, a part of the rows each"
            yield Remedy("loss", "up to", what, saves)

    def _outputs_let_go(self) -> Iterator[Remedy]:
        pairs = zip(self.graph.outputs(), self.graph.output_kinds, strict=True)
        results = [n for n, kind in pairs if kind is OutputKind.RESULT and isinstance(n, fx.Node)]
        losses = {storage_key(n.meta["val"]) for n in results if n.meta["val"].ndim == 0}
        if len(losses) != 1:
            return  # the loss is made of them
        flow = self._changed(lambda v: replace(v, result=v.result and v.storage in losses))
        what = "a step that returns the loss alone, so that nobody holds its other outputs"
        yield Remedy("outputs", "up to", what, self.freed_by(flow))

    def _gradients_let_go(self) -> Iterator[Remedy]:
        flow = self._changed(lambda v: replace(v, gradient=False) if v.gradient else v)
        what = "an optimizer that steps within the backward and lets each gradient go"
        yield Remedy("gradients", "up to", what, self.freed_by(flow))

    def _changed(self, change: Callable[[Value], Value]) -> Dataflow:
        values = [change(value) for value in self.flow.values]
        return Dataflow(self.flow.operators, values, self.flow.num_forward)

    def _encoded(self, tensors: Iterable[LiveTensor]) -> Iterator[Remedy]:
        """Nothing encodes them today: what they would take, no more."""
        saved = sum(
            t.nbytes
            for t in tensors
            if t.category == "saved activations" and t.type.startswith("f32[")
        )
        room = self.outcome.peak - self.simulator.least.nbytes
        what = (
            f"{format_bytes(saved)} of saved f32 activations would take {format_bytes(saved // 2)} "
            f"in bf16, {format_bytes(saved // 4)} in 8 bits (fxmem stores them as they are)"
        )
        yield Remedy("encodings", "up to", what, min(saved - saved // 4, max(room, 0)))

    @property
    def _value_of(self) -> dict[fx.Node, int]:
        """The node that first names each value."""
        return {value.node: i for i, value in enumerate(self.flow.values)}


def optimizer_in_8_bits(reserve: int, freed: int) -> Iterator[Remedy]:
    """For a reserve that is an optimizer's state, of which 8-bit moments free so many bytes."""
    if freed:
        what = (
            f"8-bit moments in the optimizer, whose state takes {format_bytes(reserve)} of reserve"
        )
        yield Remedy("optimizer", "", what, freed)


# -- Scores of classes -----------------------------------------------------------------------------------

_LOSSES = {"nll_loss_forward", "nll_loss2d_forward"}
_CONTRACTIONS = {"mm", "addmm", "bmm", "baddbmm", "convolution", "convolution_backward"}


def _is_loss_over_classes(node: fx.Node) -> bool:
    return node.op == "call_function" and operator_name(node) in _LOSSES


def scores_of_losses(graph: JointGraph) -> set[fx.Node]:
    """The nodes with a score, or its gradient, for each class of a loss in the step."""
    losses = filter(_is_loss_over_classes, graph.nodes)
    return {node for loss in losses for node in (*scores(loss)[1], loss)}


def scores(loss: fx.Node) -> tuple[int, set[fx.Node]]:
    """The number of classes of a loss, and the nodes with a score, or its gradient, for each.

    They hang together from the loss, over operators that keep the rows apart: from the product that
    makes the scores to the product that reads their gradient.
    """
    start = loss.all_input_nodes[0]
    classes, most = start.meta["val"].shape[1], start.meta["val"].numel()
    found: set[fx.Node] = set()
    stack = [start, *(user for user in start.users)]
    while stack:
        node = stack.pop()
        if node in found or not _has_scores(node, classes, most):
            continue
        made = operator_name(node) in _CONTRACTIONS
        found.add(node)
        stack += [] if made else node.all_input_nodes
        stack += [user for user in node.users if operator_name(user) not in _CONTRACTIONS]
    return int(classes), found


def _has_scores(node: fx.Node, classes: int, most: int) -> bool:
    """A tensor that is about as large as the scores, with the classes as a dimension."""
    value = node.meta.get("val")
    if node.op != "call_function" or not isinstance(value, torch.Tensor):
        return False
    return classes in tuple(value.shape) and most <= 2 * value.numel() <= 4 * most
