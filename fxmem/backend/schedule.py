"""What was seen of a step, and how its graphs share the budget."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import groupby
from typing import TYPE_CHECKING, Any, NamedTuple

from fxmem.backend.outside import Outside, storages
from fxmem.planning.ledger import Around, Part, around, beyond, in_a_checkpoint, shares, step_peak

if TYPE_CHECKING:
    from fxmem.backend.program import Program


class Key(NamedTuple):
    """A call of a graph.

    graph: its number.  sizes: that it is called with, where those may change.  checkpoint: which of the
    step's ``torch.utils.checkpoint`` it is in, from 1; 0 for none.
    """

    graph: int
    sizes: tuple[int, ...]
    checkpoint: int = 0

    def is_checkpointed(self, call: Key) -> bool:
        """Is it this call of a graph, within a checkpoint?"""
        return self.checkpoint > 0 and self._replace(checkpoint=0) == call


Path = tuple[Key, ...]
"""Where in a step a graph is called: last, after the others."""


@dataclass(frozen=True)
class Seen:
    """What is remembered of a forward.

    read: storage -> bytes of its inputs.  outside: of what the code before it saved.  made: its outputs'.
    """

    key: Key
    program: Program
    read: dict[int, int]
    outside: Outside = field(default_factory=Outside)
    made: set[int] = field(default_factory=set)


@dataclass(eq=False)
class Use:
    """One forward, until its backward has run or can run no more: what autograd saved refers to it.

    frame: of the checkpoint around it, by identity.
    """

    seen: Seen
    frame: int | None = None
    finished: bool = False

    def returned(self, outputs: Any) -> None:
        self.seen.made.update(storages(outputs).keys() - self.seen.read.keys())

    def done(self) -> None:
        self.finished = True


@dataclass(frozen=True)
class Schedule:
    """Graphs of one step in forward order, as seen in its first run; and code after them, if that counts.

    whole: the same with everything kept; inside: and as if in no checkpoint.  resident, budget: bytes;
    resident: what is always there.
    """

    keys: Path
    parts: tuple[Part, ...]
    whole: tuple[Part, ...]
    inside: tuple[Part, ...]
    resident: int
    budget: int | None

    def around(self, place: int, earlier: Sequence[Part]) -> Around:
        """What is around the graph at a place; earlier: those before it as they now run."""
        found = around(self.parts, place, earlier, self.resident, self._spares[place])
        return replace(found, unchanged=self._unchanged)

    @cached_property
    def _unchanged(self) -> int:
        """Bytes at the peak of the step with everything kept."""
        return step_peak(self.whole, self.resident)

    @cached_property
    def fits(self) -> bool:
        """Are the smallest plans within the budget?"""
        return self.budget is None or step_peak(self.parts, self.resident) <= self.budget

    def around_in_checkpoint(self, place: int, earlier: Sequence[Part]) -> Around:
        """The same for a graph in a checkpoint as that runs once more, where others in it keep all."""
        places = self._of_checkpoint(self.keys[place].checkpoint)
        mates = [self.inside[at] for at in places]
        own = places.index(place)
        here = self.around(place, earlier)
        inner = around(mates, own, mates[:own], mates[own].resident)
        # The gradients that come into the checkpoint are there all the while.
        always = here.always + inner.always + mates[-1].tangents
        return Around(always, inner.meanwhile or 0, unchanged=here.unchanged)

    def shares_a_checkpoint(self, call: Key) -> bool:
        """Is a call of a graph in one checkpoint with others?"""
        here = [key.checkpoint for key in self.keys if key.is_checkpointed(call)]
        return any(len(self._of_checkpoint(checkpoint)) > 1 for checkpoint in here)

    def _of_checkpoint(self, checkpoint: int) -> list[int]:
        return [place for place, key in enumerate(self.keys) if key.checkpoint == checkpoint]

    @cached_property
    def _spares(self) -> list[int]:
        """Bytes to leave for what follows each place, beyond its smallest plans: no more than it needs
        to keep everything.
        """
        if self.budget is None:
            return [0] * len(self.parts)
        room = max(self.budget - step_peak(self.parts, self.resident), 0)
        all_shares = shares(self.parts, self.whole)
        found = []
        for after in range(1, len(self.parts) + 1):
            most = max(beyond(self.whole[after:]) - beyond(self.parts[after:]), 0)
            found.append(min(int(sum(all_shares[after:]) * room), most))
        return found


def path_of(uses: Sequence[Seen], key: Key) -> Path:
    return (*(use.key for use in uses), key)


def as_run(use: Seen) -> Part:
    return use.program.part


def keeping_all(use: Seen) -> Part:
    return use.program.whole


def parts_of(uses: Sequence[Seen], part: Callable[[Seen], Part] = as_run) -> list[Part]:
    """The bytes of each forward's graph by some plan, after the code before it."""
    found: list[Part] = []
    for checkpoint, group in groupby(uses, key=lambda use: use.key.checkpoint):
        here = [part(use) for use in group]
        found += in_a_checkpoint(here) if checkpoint else here
    return [
        one.after(use.outside.nbytes, use.outside.gradients)
        for one, use in zip(found, uses, strict=True)
    ]


def as_small_as_can_be(uses: Sequence[Seen], last: Sequence[Part], resident: int) -> list[Part]:
    """The graphs of a step by the plans with the smallest peak of all of it; last: what follows them.

    What a graph and those that follow hold at most depends on these alone: so each is planned for that,
    from the last one on.  Those in checkpoints have been, for they hold nothing then.
    """
    parts = [*parts_of(uses), *last]
    for place in reversed(range(len(uses))):
        use = uses[place]
        if not use.key.checkpoint:
            smallest = use.program.smallest(around(parts, place, [], resident))
            (parts[place],) = parts_of([use], lambda _, part=smallest: part)  # type: ignore[misc]
    return parts


def coverage(uses: Sequence[Seen], after: Outside) -> str:
    """Of the bytes that wait for a backward in a step that keeps everything, those of graphs."""
    seen = sum(part.held - part.outside for part in parts_of(uses, keeping_all))
    outside = sum(use.outside.nbytes for use in uses) + after.nbytes
    share = 100 * seen / ((seen + outside) or 1)
    graphs = "1 graph" if len(uses) == 1 else f"{len(uses)} graphs"
    return f"{graphs}, {share:.0f} % of saved bytes seen"


def residents(uses: Sequence[Seen]) -> dict[int, int]:
    """Storage -> bytes of all that the graphs of a step are given and that none of them made."""
    made = {key for use in uses for key in use.made}
    return {k: n for use in uses for k, n in use.read.items() if k not in made}
