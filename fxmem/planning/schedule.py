"""The incremental simulator: a choice whose bytes and seconds stay up to date as it changes.

The backward is cut into slots: one backward operator, and before it what is made again for it.  A
move (keep a value or not, let a remade copy outlive a slot or not) changes a few slots; only those
are planned again, and only the spans of bytes that they moved.  A move can be taken back.

``tests/test_schedule.py`` holds it to the exact simulator, slot by slot.
"""

from __future__ import annotations

import heapq
import itertools
from bisect import bisect_left, bisect_right, insort
from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from fxmem.analysis.simulate import Drop, Forward, Simulator

_FORWARD = -1
"""The slot that a kept value comes from."""

Span = tuple[int, int]
"""A copy's life: the slot that it comes from, the last slot that reads it."""


@dataclass(frozen=True)
class Mark:
    """A point to come back to."""

    length: int


class Schedule:
    """One choice over one dataflow, and its slots.

    kept: values saved in the forward.  drops: (value, slot) after which a remade copy is let go.
    seconds: added by recomputation.  noise: of the codes that are kept.  work: values looked at so
    far, a clock that runs alike everywhere.
    """

    def __init__(
        self, simulator: Simulator, kept: Iterable[int], drops: Iterable[Drop] = ()
    ) -> None:
        flow = simulator.flow
        self.simulator = simulator
        self.flow = flow
        self.step = simulator.numbers
        self.kept: set[int] = set(simulator.always_kept.union(kept))
        self.dropped: dict[int, tuple[int, ...]] = {}
        for v, j in sorted(drops):
            self.dropped[v] = (*self.dropped.get(v, ()), j)
        slots = len(self.step.reads)
        self.remade: list[tuple[int, ...]] = [()] * slots
        self.arrives: list[dict[int, bool]] = [{} for _ in range(slots)]
        self.read_in: dict[int, tuple[int, ...]] = {}
        self.made_in: dict[int, tuple[int, ...]] = {}
        self.spans: dict[int, tuple[Span, ...]] = {}
        self.seconds = simulator.seconds_of_keeping(self.kept)
        self.noise = simulator.noise_of_keeping(self.kept)
        self.work = 0
        self._journal: list[tuple[Any, Any, Any]] = []
        self._through = np.zeros(slots, dtype=np.int64)
        self._local = np.zeros(slots, dtype=np.int64)
        self._dying = [0] * slots
        self._extras = frozenset(filter(simulator.is_extra, self.kept))
        self._plan_all()
        self._count_all()
        self._start_forward()

    # -- What a choice costs -------------------------------------------------------------------------

    @property
    def peak(self) -> int:
        """Bytes at the fullest step, residents included."""
        backward = int((self._through + self._local).max(initial=0))
        return max(backward, int(self._forward_live.max(initial=0)))

    def overflow(self, budget: int) -> int:
        """Bytes above the budget, summed over forward steps and slots: how far from fitting."""
        above = np.maximum(self._through + self._local - budget, 0).sum()
        return int(above + np.maximum(self._forward_live - budget, 0).sum())

    def slot_peaks(self) -> np.ndarray:
        """int64[slots]: bytes at the fullest step of each slot."""
        return self._through + self._local

    def transients(self) -> np.ndarray:
        """int64[slots]: bytes by which making again peaks above the slot's own operator."""
        at = [self._at_operator(j) for j in range(len(self.remade))]
        return np.maximum(self._local - np.array(at, dtype=np.int64), 0)

    def _at_operator(self, j: int) -> int:
        """Bytes while the slot's operator runs, without the copies that pass through."""
        reads = self._read_last(j)
        made = (v for i in self.remade[j] for v in self.step.remakes[i])
        total = self._static_at(j)
        for v in {*reads, *made}:
            for start, end in self._span_at(v, j):
                if (start == j or end == j) and (end > j or v in reads):
                    total += self._nbytes(v, start)
        return total

    def _span_at(self, v: int, j: int) -> tuple[Span, ...]:
        """The life of the copy of ``v`` that is there in slot ``j``, if one is."""
        return tuple(span for span in self.spans.get(v, ()) if span[0] <= j <= span[1])[-1:]

    def forward_peaks(self) -> np.ndarray:
        """int64[forward steps]: bytes while each runs."""
        return self._forward_live

    def recomputed(self) -> tuple[tuple[int, int], ...]:
        """(operator, slot), in the order in which they run."""
        return tuple((i, j) for j, remade in enumerate(self.remade) for i in remade)

    def passing(self, slot: int, values: Iterable[int]) -> Iterator[Drop]:
        """The copies of ``values`` that are there in ``slot`` for later ones: where last read before."""
        for v in values:
            for start, end in self.spans.get(v, ()):
                if v not in self.kept and start <= slot < end:
                    reads = [j for j in self.read_in[v] if start <= j < slot]
                    yield v, reads[-1] if reads else start

    def drops(self) -> frozenset[Drop]:
        return frozenset((v, j) for v, slots in self.dropped.items() for j in slots)

    def useful_drops(self) -> frozenset[Drop]:
        """The drops that let something go: a copy was there, and a later slot makes it again."""
        return frozenset(
            (v, j)
            for v, j in self.drops()
            if v not in self.kept
            and any(p <= j < q for p, q in itertools.pairwise(self.made_in.get(v, ())))
        )

    # -- Moves ---------------------------------------------------------------------------------------

    def keep(self, v: int) -> None:
        """Save ``v`` in the forward."""
        self._journal.append((self.kept, "add", v))
        self.kept.add(v)
        self._kept_changed(v)

    def remake(self, v: int) -> None:
        """Do not save ``v``: make it again for its readers."""
        self._journal.append((self.kept, "discard", v))
        self.kept.discard(v)
        self._kept_changed(v)

    def drop(self, v: int, j: int) -> None:
        """Let a remade copy of ``v`` go after slot ``j``."""
        slots = list(self.dropped.get(v, ()))
        insort(slots, j)
        self._drops_changed(v, j, tuple(slots))

    def retain(self, v: int, j: int) -> None:
        """Take a ``drop`` back."""
        self._drops_changed(v, j, tuple(k for k in self.dropped.get(v, ()) if k != j))

    def forget(self, v: int) -> None:
        """Do not save ``v``, and let go at once whatever is made again because of that."""
        before = list(self.remade)
        self.remake(v)
        at = -1
        while (j := self._changed_after(at, before)) is not None:
            at = j
            for i in set(self.remade[j]).difference(before[j]):
                for w in self.step.remakes[i]:
                    if w not in self.kept and any(s == j < e for s, e in self.spans[w]):
                        self.drop(w, j)

    def _changed_after(self, j: int, before: list[tuple[int, ...]]) -> int | None:
        slots = range(j + 1, len(before))
        return next((k for k in slots if self.remade[k] is not before[k]), None)

    def mark(self) -> Mark:
        return Mark(len(self._journal))

    def undo(self, mark: Mark) -> None:
        """Go back to how things were at ``mark``."""
        while len(self._journal) > mark.length:
            container, key, old = self._journal.pop()
            kind = type(container)
            if kind is list or (kind is dict and old is not None):
                container[key] = old
            elif kind is dict:
                del container[key]
            elif kind is np.ndarray:
                container[key] -= old
            elif container is self:
                setattr(self, key, old)
            else:
                (self.kept.discard if key == "add" else self.kept.add)(old)

    def commit(self) -> None:
        """Forget how to go back."""
        self._journal.clear()

    # -- From nothing --------------------------------------------------------------------------------

    def _plan_all(self) -> None:
        """Find out what is made and read in each slot, the first slot first."""
        step, read_in = self.step, defaultdict[int, list[int]](list)
        for j in range(len(self.remade)):
            remade, arrives = self._needed(j, {})
            self.remade[j], self.arrives[j] = remade, arrives
            for v in arrives:
                read_in[v].append(j)
            self.seconds += sum(step.seconds[i] for i in remade)
            for i in remade:
                for v in step.remakes[i]:
                    self.made_in[v] = (*self.made_in.get(v, ()), j)
        self.read_in = {v: tuple(slots) for v, slots in read_in.items()}

    def _count_all(self) -> None:
        """Count every value's bytes."""
        change = np.zeros(len(self.remade) + 1, dtype=np.int64)
        for v in self.read_in.keys() | self.made_in.keys():
            self.spans[v] = self._spans_of(v)
            for start, end in self.spans[v]:
                if end > start:
                    nbytes = self._nbytes(v, start)
                    change[start + 1] += nbytes
                    change[end] -= nbytes
                    self._dying[end] += nbytes
        self._through = np.cumsum(change)[:-1]
        for j in range(len(self.remade)):
            self._local[j] = self._local_peak(j)

    # -- Keeping up ----------------------------------------------------------------------------------

    def _kept_changed(self, v: int) -> None:
        extra = self.simulator.is_extra(v)
        if v in self.simulator.codes:
            keeping = self.flow.values[v].keeping
            self._set_attribute("seconds", self.seconds + (keeping if v in self.kept else -keeping))
        if v in self.simulator.lossy:
            noise = self.flow.values[v].noise
            self._set_attribute("noise", self.noise + (noise if v in self.kept else -noise))
        if extra:
            self._set_attribute("_extras", self._extras ^ {v})
            self._set_attribute("_forward", self._forward)
            self._set_attribute("_forward_live", np.zeros(0, dtype=np.int64))
        self._update({j: {v} for j in self._may_miss(v)}, (v,))
        if extra:
            self._start_forward()

    def _may_miss(self, v: int) -> set[int]:
        """The readers of ``v`` to which its copy may not come unless it is kept.

        The first reader makes it; what comes after a drop may make it again.
        """
        readers = self.read_in.get(v, ())
        if v in self.simulator.lossy:
            return set(readers)
        after_drops = (self._next_reader(v, j) for j in self.dropped.get(v, ()))
        return {*readers[:1], *itertools.chain.from_iterable(after_drops)}

    def _drops_changed(self, v: int, j: int, slots: tuple[int, ...]) -> None:
        self._set(self.dropped, v, slots)
        self._update({k: {v} for k in self._next_reader(v, j)}, ())

    def _update(self, doubtful: dict[int, set[int]], values: Iterable[int]) -> None:
        """Plan slots again, and whatever that changes; then count ``values``' bytes again."""
        changed, moved = self._replan(doubtful)
        moved.update(values)
        for v in moved:
            changed |= self._respan(v)
        for j in changed:
            self._set_number(self._local, j, self._local_peak(j))

    def _replan(self, doubtful: dict[int, set[int]]) -> tuple[set[int], set[int]]:
        """Find out again what is made in each slot: changed slots, changed values.

        doubtful: by slot, the values of which a copy may arrive there now, or arrive no more.
        """
        queue = sorted(doubtful)
        changed: set[int] = set()
        values: set[int] = set()
        while queue:
            j = heapq.heappop(queue)
            before, doubts = self.arrives[j], doubtful.pop(j)
            differ = {v for v in doubts if v in before and self._arrives(v, j) != before[v]}
            if before and not differ:
                continue
            known = {**before, **{v: not before[v] for v in differ}}
            remade, arrives = self._needed(j, known)
            self.work += len(arrives)
            values |= self._record_reads(j, before, arrives)
            made = self._record_makes(j, self.remade[j], remade)
            values |= made
            changed.add(j)
            self._set(self.arrives, j, arrives)
            self._set(self.remade, j, remade)
            for v in made | differ:
                for k in self._next_reader(v, j):
                    if k not in doubtful:
                        doubtful[k] = set()
                        heapq.heappush(queue, k)
                    doubtful[k].add(v)
        return changed, values

    def _next_reader(self, v: int, j: int) -> tuple[int, ...]:
        readers = self.read_in.get(v, ())
        p = bisect_right(readers, j)
        return readers[p : p + 1]

    def _arrives(self, v: int, j: int) -> bool:
        """Is there a copy of ``v`` when slot ``j`` starts?"""
        if v in self.kept or v >= len(self.flow.values):
            return True
        made = self.made_in.get(v)
        if not made or v in self.simulator.lossy:
            return False
        p = bisect_left(made, j)
        if p == 0:
            return False
        dropped = self.dropped.get(v)
        if not dropped:
            return True
        q = bisect_left(dropped, made[p - 1])
        return q == len(dropped) or dropped[q] >= j

    def _needed(self, j: int, known: dict[int, bool]) -> tuple[tuple[int, ...], dict[int, bool]]:
        """What slot ``j`` makes again, in order; and for all that it reads, whether it arrives.

        known: of some values, whether they do.
        """
        step = self.step
        arrives: dict[int, bool] = {}
        operators: set[int] = set()
        reads: Iterable[int] = step.reads[j]
        while reads:
            stack: list[int] = []
            for v in reads:
                if v in arrives:
                    continue
                there = known[v] if v in known else self._arrives(v, j)
                arrives[v] = there
                if not there and (i := step.producer[v]) not in operators:
                    operators.add(i)
                    stack += step.inputs[i]
            reads = stack
        return tuple(sorted(operators)), arrives

    def _record_reads(self, j: int, old: dict[int, bool], new: dict[int, bool]) -> set[int]:
        changed = old.keys() ^ new.keys()
        for v in changed:
            self._set(self.read_in, v, _with_or_without(self.read_in.get(v, ()), j, v in new))
        return changed

    def _record_makes(self, j: int, old: tuple[int, ...], new: tuple[int, ...]) -> set[int]:
        changed: set[int] = set()
        gone, come = set(old).difference(new), set(new).difference(old)
        if gone or come:
            seconds = self.step.seconds
            total = self.seconds - sum(seconds[i] for i in gone) + sum(seconds[i] for i in come)
            self._set_attribute("seconds", total)
        for operators, added in ((gone, False), (come, True)):
            for i in operators:
                for v in self.step.remakes[i]:
                    slots = _with_or_without(self.made_in.get(v, ()), j, added)
                    self._set(self.made_in, v, slots)
                    changed.add(v)
        return changed

    # -- Spans and bytes -------------------------------------------------------------------------------

    def _spans_of(self, v: int) -> tuple[Span, ...]:
        readers = self.read_in.get(v, ())
        if v in self.kept or v >= len(self.flow.values):
            return ((_FORWARD, readers[-1]),) if readers else ()
        made = self.made_in.get(v, ())
        found = []
        for start, until in itertools.pairwise((*made, len(self.remade))):
            q = bisect_left(readers, until)
            last = readers[q - 1] if q else start
            found.append((start, last if last > start else start))
        return tuple(found)

    def _respan(self, v: int) -> set[int]:
        """Count the bytes of ``v`` again; returns the slots where a span of it began or ended."""
        old, new = self.spans.get(v, ()), self._spans_of(v)
        self.work += len(new)
        if old == new:
            return set()
        touched: set[int] = set()
        for spans, sign in ((set(old).difference(new), -1), (set(new).difference(old), 1)):
            for start, end in spans:
                touched.add(end)
                if start != _FORWARD:
                    touched.add(start)
                if end > start:
                    nbytes = sign * self._nbytes(v, start)
                    self._set(self._dying, end, self._dying[end] + nbytes)
                    self._add_through(start, end, nbytes)
        was, now = bool(old) and old[0][0] == _FORWARD, bool(new) and new[0][0] == _FORWARD
        if was != now:
            self._add_saved(v, 1 if now else -1)
        self._set(self.spans, v, new)
        return touched

    def _add_through(self, start: int, end: int, nbytes: int) -> None:
        """A copy fills the slots between the one that it comes from and the one that it dies in."""
        if nbytes and end > start + 1:
            between = slice(start + 1, end)
            self._through[between] += nbytes
            self._journal.append((self._through, between, nbytes))

    def _local_peak(self, j: int) -> int:
        """Bytes at the fullest step of a slot, without the copies that pass through."""
        step, remade = self.step, self.remade[j]
        read_last = self._read_last(j)
        if not remade:
            return step.static_at[j] + self._dying[j]
        self.work += len(remade)
        last = {v: p for p, i in enumerate(remade) for v in step.inputs[i]}
        delta = [0] * (len(remade) + 1)
        delta[0] = self._dying[j]
        for v, p in last.items():
            if v not in read_last:
                delta[p + 1] -= self._ending(v, j)
        for p, i in enumerate(remade):
            for v in step.remakes[i]:
                delta[p] += step.remade_nbytes[v]
                if v in self.kept:  # a copy that nobody reads
                    delta[p + 1] -= step.remade_nbytes[v]
                elif v not in read_last and self._dies_at(v, j) == j:
                    delta[last.get(v, p) + 1] -= step.remade_nbytes[v]
        return self._fullest(j, delta)

    def _ending(self, v: int, j: int) -> int:
        """Bytes of the copy of ``v`` that arrives in slot ``j`` and dies there."""
        spans = self.spans[v]
        p = bisect_left(spans, (j,))
        if p and spans[p - 1][1] == j:
            return self._nbytes(v, spans[p - 1][0])
        return 0

    def _dies_at(self, v: int, j: int) -> int:
        """The slot in which the copy of ``v`` that slot ``j`` makes dies."""
        spans = self.spans[v]
        return spans[bisect_left(spans, (j,))][1]

    def _nbytes(self, v: int, start: int) -> int:
        return (self.step.saved_nbytes if start == _FORWARD else self.step.remade_nbytes)[v]

    def _static_at(self, j: int) -> int:
        """Bytes while the slot's operator runs that no choice changes, but for codes to decode."""
        code = self.simulator.decoded.get(j, -1)
        if code >= 0 and code not in self.kept:
            return self.step.static_before[j]
        return self.step.static_at[j] - (self._plain(j) is not None) * self.step.workspace_at[j]

    def _plain(self, j: int) -> int | None:
        """What the slot reads in place of a lossy code that is not kept."""
        code, operand = self.simulator.read_plain.get(j, (-1, None))
        return None if code in self.kept else operand

    def _read_last(self, j: int) -> frozenset[int]:
        """What the slot's own operator reads."""
        plain = self._plain(j)
        return self.step.read_last[j] if plain is None else self.step.read_last[j] | {plain}

    def _fullest(self, j: int, delta: list[int]) -> int:
        step, remade = self.step, self.remade[j]
        *lives, last = itertools.accumulate(delta)
        fullest = max(live + step.workspace[i] for live, i in zip(lives, remade, strict=True))
        return max(step.static_before[j] + fullest, self._static_at(j) + last)

    # -- The forward -----------------------------------------------------------------------------------

    def _start_forward(self) -> None:
        """The forward's own bytes; what it saves is added by ``_add_saved``."""
        simulator = self.simulator
        self._forward: Forward = simulator.forward_with(self._extras)
        live = simulator.forward_bytes(self._forward)
        saved = {v for v in self.spans if self._is_saved(v)}
        change = np.zeros(len(live) + 1, dtype=np.int64)
        for v in saved:
            change[self._saved_from(v)] += self.step.saved_nbytes[v]
        live += np.cumsum(change)[:-1]
        for v in saved & self.simulator.lossy:
            p, nbytes = self._forward.moment(v)
            live[p] += nbytes
        for p in self._forward.needs_room(saved):
            live[p] += self.step.nbytes[self._forward.takes[p][0]]
        self._forward_live = live

    def _add_saved(self, v: int, sign: int) -> None:
        """A saved value stays from its last forward reader to the end of the forward."""
        nbytes = sign * self.step.saved_nbytes[v]
        if nbytes and len(self._forward_live):
            late = slice(self._saved_from(v), None)
            self._forward_live[late] += nbytes
            self._journal.append((self._forward_live, late, nbytes))
            self._add_room(v, nbytes)
        if v in self.simulator.lossy and len(self._forward_live):
            p, moment = self._forward.moment(v)
            now = int(self._forward_live[p])
            self._set_number(self._forward_live, p, now + sign * moment)

    def _add_room(self, v: int, nbytes: int) -> None:
        """The last reader of a saved value cannot write over it, and perhaps over nothing else."""
        p = self._forward.last.get(v, -1)
        taken = self._forward.takes.get(p, ())
        if v in taken and all(self._is_saved(w) for w in taken if w != v):
            self._set_number(self._forward_live, p, int(self._forward_live[p]) + nbytes)

    def _is_saved(self, v: int) -> bool:
        spans = self.spans.get(v, ())
        return bool(spans) and spans[0][0] == _FORWARD

    def _saved_from(self, v: int) -> int:
        random = v - len(self.flow.values)
        if random >= 0:
            return self._forward.position[random]
        return self._forward.last[v] + 1

    # -- The journal -----------------------------------------------------------------------------------

    def _set(self, container: Any, key: Any, new: Any) -> None:
        old = container[key] if type(container) is list else container.get(key)
        self._journal.append((container, key, old))
        container[key] = new

    def _set_attribute(self, name: str, new: Any) -> None:
        self._journal.append((self, name, getattr(self, name)))
        setattr(self, name, new)

    def _set_number(self, array: np.ndarray, key: int, new: int) -> None:
        change = new - int(array[key])
        if change:
            array[key] = new
            self._journal.append((array, key, change))


def _with_or_without(slots: tuple[int, ...], j: int, added: bool) -> tuple[int, ...]:
    p = bisect_left(slots, j)
    return (*slots[:p], j, *slots[p:]) if added else (*slots[:p], *slots[p + 1 :])
