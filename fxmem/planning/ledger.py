"""One budget for all the graphs of a step: what each of them holds while the others run.

A step in several graphs is nested: the backward of the first graph ends last, so all that it saved is
there while the others run.  Seen from the first graph, the others are what a loss outside of it is: at
the boundary between its forward and its backward they hold some bytes.  So each graph is planned like
a step of its own, with less room, and with those bytes at its boundary.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from fxmem.analysis.liveness import MemoryTimeline
from fxmem.basics.sizes import evaluate, storages_in
from fxmem.graphs.graph import (
    LOSS_OUTSIDE,
    JointGraph,
    bytes_of_scalars,
    is_held_tangent,
)


@dataclass(frozen=True)
class Part:
    """One graph of a step.  Bytes beside its parameters, buffers and inputs, which are ``resident``.

    held: from its forward's end until its backward, saved or returned.  gradients: of parameters, which
    stay.  forward, boundary, backward: the most that is there in each; boundary: if no more graphs follow,
    while the caller computes the loss.  tangents: the gradients that come in.  outside: of what is held,
    what code before the graph saved.  returned: of what is held, what the caller was given.
    """

    resident: int
    held: int
    gradients: int
    forward: int
    boundary: int
    backward: int
    tangents: int
    outside: int = 0
    returned: int = 0

    def after(self, outside: int, gradients: int = 0) -> Part:
        """The same graph after code that is in no graph, which saved so much.

        gradients: bytes of those that this code's own backward makes.
        """
        return replace(
            self,
            held=self.held + outside,
            gradients=self.gradients + gradients,
            forward=self.forward + outside,
            boundary=self.boundary + outside,
            backward=self.backward + outside,
            outside=outside,
        )

    @property
    def least(self) -> int:
        return max(self.forward, self.backward)

    def peak(self, around: Around) -> int:
        """The most that is there of this graph and of those that follow, beside ``around.always``."""
        if around.meanwhile is None:
            return max(self.least, self.boundary)
        return max(self.least, self.held + self.tangents + around.meanwhile)

    def as_measured(self, forward: int, held: int, backward: int) -> Part:
        """The same graph as code that was measured to hold so much."""
        boundary = self.boundary - self.held + held
        return replace(self, forward=forward, held=held, boundary=boundary, backward=backward)


def part_of(line: MemoryTimeline, graph: JointGraph, sizes: Mapping[Any, int]) -> Part:
    """The bytes of a graph that runs by this timeline, at these values of its shape symbols."""
    bindings = dict(sizes)
    live, cut = line.live_bytes(bindings), line.boundary
    resident = line.resident(bindings)

    def total(storages: Any) -> int:
        return sum(evaluate(s.nbytes, bindings) for s in storages)

    kept = _gradients_that_stay(graph)
    tangents = [s for s in line.storages if s.born == cut]
    sent = [s for s in tangents if not is_held_tangent(s.node)]
    loss = LOSS_OUTSIDE * total(sent)
    loss += max((bytes_of_scalars(s.node.meta["val"].device) for s in sent), default=0)
    at_boundary = int(live[cut]) - evaluate(line.steps[cut].workspace, bindings) - resident
    return Part(
        resident=resident,
        held=total(s for s in line.storages if 0 <= s.born < cut < s.dies),
        gradients=total(s for s in line.storages if s.key in kept and not s.resident),
        forward=int(live[:cut].max(initial=resident)) - resident,
        boundary=at_boundary + loss,
        backward=int(live[cut + 1 :].max(initial=resident)) - resident,
        tangents=total(tangents),
        returned=total(s for s in line.storages if 0 <= s.born < cut and s.held),
    )


def in_a_checkpoint(parts: Sequence[Part]) -> list[Part]:
    """The graphs within one ``torch.utils.checkpoint``, in forward order, as the step sees them.

    Until the backward they hold what they return.  Then all of them run once more, as a step of their
    own, while the gradients that come in are there; that is counted at the first of them.
    """
    *others, last = parts
    again = beyond([*others, replace(last, boundary=0)]) + last.tangents
    gradients = sum(part.gradients for part in parts)
    first, *rest = (
        replace(
            part,
            held=part.returned,
            boundary=part.boundary - part.held + part.returned,
            backward=0,
            gradients=0,
        )
        for part in parts
    )
    return [replace(first, backward=again, gradients=gradients), *rest]


def _gradients_that_stay(graph: JointGraph) -> set[int]:
    """Keys of the storages that autograd keeps in ``.grad``."""
    return {
        key
        for node, source in zip(graph.gradients(), graph.leaves(), strict=True)
        if node is not None and graph.inputs[source.name].keeps_gradient
        for key in storages_in(node.meta.get("val"))
    }


def step_peak(parts: Sequence[Part], resident: int) -> int:
    """Bytes at the peak of a step of these graphs, in forward order; resident: what is always there."""
    return resident + beyond(parts)


def beyond(parts: Sequence[Part]) -> int:
    """The most that these graphs hold, beside what is always there and what is held when they begin."""
    before, peak = 0, 0
    after = sum(part.gradients for part in parts)
    for part in parts:
        after -= part.gradients
        peak = max(peak, before + part.forward, before + after + part.backward)
        before += part.held
    if parts:
        peak = max(peak, before - parts[-1].held + parts[-1].boundary)
    return peak


@dataclass(frozen=True)
class Around:
    """What the rest of a step holds, seen from one graph.  Bytes.

    always: while this graph runs, beside its own residents.  meanwhile: at its boundary, beside that and
    what it holds itself; None where no graph follows and the caller computes the loss there.
    spare: what of that is left to the graphs that follow, beyond their smallest plans.
    known: has anybody seen what follows?  If not, meanwhile is what a first step hopes it to be, None for
    more than all that this graph has.
    unchanged: of the whole step, at its peak with everything kept, if that is known.
    """

    always: int = 0
    meanwhile: int | None = None
    spare: int = 0
    known: bool = True
    unchanged: int | None = None


def around(
    parts: Sequence[Part], place: int, earlier: Sequence[Part], resident: int, spare: int = 0
) -> Around:
    """What the graph at a place has around it.

    parts: all graphs as they were first seen.  earlier: those before the place as they now run.
    resident: of the whole step.  spare: bytes to leave for graphs that follow.
    """
    later = parts[place + 1 :]
    after = sum(part.gradients for part in later)
    always = sum(part.held for part in earlier) + after + resident - parts[place].resident
    always += parts[place].outside
    if not later:
        return Around(always)
    # The gradients are counted as there all along, so not once more while the others run.
    needed = max(beyond(later) - after - parts[place].tangents + spare, 0)
    return Around(always, needed, min(spare, needed))


def shares(smallest: Sequence[Part], whole: Sequence[Part]) -> list[float]:
    """Of the room that is left when every graph is as small as can be, each one's share.

    Room is for what graphs hold while others run, and for what the last one takes at its peak: each gets
    as large a part of what it would use.  whole: the graphs with everything kept.
    """
    more = [keep.held - least.held for least, keep in zip(smallest, whole, strict=True)]
    more[-1] = whole[-1].peak(Around()) - smallest[-1].peak(Around())
    more = [max(nbytes, 0) for nbytes in more]
    total = sum(more)
    return [nbytes / total if total else 0.0 for nbytes in more]
