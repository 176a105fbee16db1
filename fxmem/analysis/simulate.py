"""The exact simulator: what a choice of kept values costs in bytes and seconds, step by step.

It walks the backward once.  A forward value that a backward operator reads is either kept, or made
again just before: its producer runs, and first the producers of whatever that needs and is neither
kept nor still alive.  A value made again stays until its last reader, unless a ``Drop`` says that
it goes after an earlier backward operator; then it is made once more for the next reader.

``tests/test_simulate.py`` holds it to the liveness of the rewritten graphs, byte for byte.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Container, Iterable, Set
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from fxmem.analysis.dataflow import Dataflow

Drop = tuple[int, int]
"""A value, and the backward operator (by position) after which a copy made again is let go."""


@dataclass(frozen=True)
class Outcome:
    """What a choice leads to.

    live: int64[steps], bytes while each step runs, residents included.
    seconds: added by recomputation.  recomputed: (operator, backward operator that it runs before).
    """

    live: np.ndarray
    seconds: float
    recomputed: tuple[tuple[int, int], ...]
    num_forward_steps: int

    @property
    def peak(self) -> int:
        return int(self.live.max(initial=0))

    def overflow(self, budget: int) -> int:
        """Bytes above the budget, summed over steps: how far a plan is from fitting."""
        return int(np.maximum(self.live - budget, 0).sum())


@dataclass(frozen=True)
class Least:
    """Bytes that every choice needs, and the operator that needs them; None: the loss outside."""

    nbytes: int
    operator: int | None


class Simulator:
    """Judges choices over one dataflow."""

    def __init__(self, flow: Dataflow) -> None:
        self.flow = flow
        self.read_by_backward = self._reads()
        self.always_kept = frozenset(
            v
            for v, value in enumerate(flow.values)
            if 0 <= value.producer < flow.num_forward
            and not (
                flow.operators[value.producer].recomputable
                and v in flow.operators[value.producer].remakes
            )
        )
        self.readable = self._readable()
        # A code that is not kept costs a moment's bytes here, and none when the step runs.
        self.codes = frozenset(v for v, value in enumerate(flow.values) if value.code)
        self.lossy = frozenset(v for v in self.codes if flow.values[v].noise)
        slots = self._lossy_slots()
        self.decoded = {j: v for j, v in slots.items() if self._decodes(j)}
        self.read_plain = {
            j: (v, self.operand(v)) for j, v in slots.items() if not self._decodes(j)
        }
        made = [*self._result_values(), *self._random_values(), *self.codes]
        self._base = self._forward_slice(made)
        self._static = _Static(flow, self._base)

    # -- What may be chosen ------------------------------------------------------------------------

    def candidates(self) -> list[int]:
        """Forward values that the backward may need and that could be made again, in graph order."""
        return sorted(self.readable - self.always_kept)

    def directly_read(self) -> frozenset[int]:
        """Forward values that a backward operator reads: what is saved when nothing is recomputed."""
        return frozenset(v for reads in self.read_by_backward for v in reads)

    def read_without(self, codes: Set[int]) -> frozenset[int]:
        """The same if these codes are not kept, so that their readers read what they are made of."""
        read = self.directly_read()
        return read - codes | {self.operand(v) for v in read & codes}

    def operand(self, code: int) -> int:
        """What the code is made of; the seed that it may read, too, is older."""
        return self.flow.operators[self.flow.values[code].producer].reads[-1]

    # -- Judging -------------------------------------------------------------------------------------

    def run(self, kept: Iterable[int], drops: Iterable[Drop] = ()) -> Outcome:
        """Simulate the step with ``kept`` values saved, and copies made again let go at ``drops``."""
        return _Walk(self, self.always_kept.union(kept), drops).outcome()

    @cached_property
    def numbers(self) -> Numbers:
        return _numbers(self)

    @cached_property
    def least(self) -> Least:
        """What no choice goes below: at each operator what it reads, makes and works in.

        Beside that counts what is there whatever is chosen: residents, results, gradients.
        """
        numbers, forward = self.numbers, self.forward_with(frozenset())
        reads = [
            sum(numbers.saved_nbytes[v] for v in slot if v not in self.lossy)
            for slot in numbers.reads
        ]
        backward = self.static_least + np.array(reads, dtype=np.int64)
        needs = np.concatenate([self.forward_bytes(forward), backward])
        step = int(needs.argmax())
        if step == forward.steps - 1:
            return Least(int(needs[step]), None)
        late = step - forward.steps
        operator = forward.order[step] if late < 0 else self.flow.num_forward + late
        return Least(int(needs[step]), operator)

    @cached_property
    def static_least(self) -> np.ndarray:
        """int64[slots]: bytes while each slot's operator runs that no choice changes.

        A slot that decodes holds what is decoded; or what it stands for, if there is no code.
        """
        found = np.array(self.numbers.static_at, dtype=np.int64)
        for j in (*self.decoded, *self.read_plain):
            found[j] -= self.flow.operators[self.flow.num_forward + j].workspace
        return found

    def seconds_of_keeping(self, kept: Iterable[int]) -> float:
        """What codes cost that are kept, beside what is made again."""
        return sum(self.flow.values[v].keeping for v in sorted(self.codes.intersection(kept)))

    def noise_of_keeping(self, kept: Iterable[int]) -> int:
        """What kept codes take of ``NOISE_CEILING``."""
        return sum(self.flow.values[v].noise for v in self.lossy.intersection(kept))

    def is_extra(self, v: int) -> bool:
        """Does the forward make ``v`` only if it is kept?"""
        return v in self.readable and self.flow.values[v].producer not in self._base

    def forward_bytes(self, forward: Forward) -> np.ndarray:
        """int64[forward steps]: bytes while each runs, but for what is saved for the backward."""
        live = np.cumsum(forward.live)[:-1] + self.flow.resident
        live += np.array(forward.workspace, dtype=np.int64)
        live[-1] += self.numbers.tangents
        return live

    def forward_with(self, extras: frozenset[int]) -> Forward:
        """The forward phase when these extra values are kept."""
        if not extras:
            return self._static.forward
        return Forward(self.flow, self._base | self._forward_slice(extras))

    def _is_forward(self, v: int) -> bool:
        producer = self.flow.values[v].producer
        return 0 <= producer < self.flow.num_forward

    def _result_values(self) -> list[int]:
        values = enumerate(self.flow.values)
        return [v for v, value in values if (value.result or value.update) and self._is_forward(v)]

    def _random_values(self) -> list[int]:
        """Whatever happens to these, their producers run in the forward: they draw there."""
        forward = self.flow.operators[: self.flow.num_forward]
        return [v for op in forward if op.rng_state for v in op.makes]

    def _reads(self) -> list[tuple[int, ...]]:
        """For each backward operator, the forward values that it reads."""
        backward = self.flow.operators[self.flow.num_forward :]
        reads = [tuple(v for v in op.reads if self._is_forward(v)) for op in backward]
        # A gradient that is a forward value is read when the backward returns.
        late = [v for v, x in enumerate(self.flow.values) if x.gradient and self._is_forward(v)]
        if late and reads:
            reads[-1] = tuple(dict.fromkeys((*reads[-1], *late)))
        return reads

    def _lossy_slots(self) -> dict[int, int]:
        """Slot -> the lossy code that it reads.

        Where the code is not kept, a slot that decodes it does nothing, for its readers read what the
        code is made of (``decoded``); any other reads that itself (``read_plain``, with what it reads).
        """
        found = {}
        for j, reads in enumerate(self.read_by_backward):
            lossy = self.lossy.intersection(reads)
            if lossy:
                (found[j],) = lossy
        return found

    def _decodes(self, j: int) -> bool:
        return self.flow.operators[self.flow.num_forward + j].decodes

    def _readable(self) -> frozenset[int]:
        """Forward values that a backward operator, or an operator made again for one, may read."""
        found: set[int] = set()
        stack = [v for reads in self.read_by_backward for v in reads]
        while stack:
            v = stack.pop()
            if v in found:
                continue
            found.add(v)
            producer = self.flow.operators[self.flow.values[v].producer]
            stack += [r for r in producer.reads if self._is_forward(r)]
        return frozenset(found)

    def _forward_slice(self, values: Iterable[int]) -> frozenset[int]:
        """Operators that must run in the forward so that ``values`` exist."""
        operators: set[int] = set()
        stack = [self.flow.values[v].producer for v in values]
        while stack:
            i = stack.pop()
            if i < 0 or i in operators:
                continue
            operators.add(i)
            stack += [self.flow.values[v].producer for v in self.flow.operators[i].reads]
        return frozenset(operators)


class _Static:
    """What no choice changes: the backward's own values, and the forward that computes the results."""

    def __init__(self, flow: Dataflow, base: frozenset[int]) -> None:
        backward = flow.operators[flow.num_forward :]
        self.workspace = np.array([op.workspace for op in backward], dtype=np.int64)
        last = {v: j for j, op in enumerate(backward) for v in op.reads}
        own = [
            (v, x)
            for v, x in enumerate(flow.values)
            if x.producer >= flow.num_forward and (x.nbytes or x.gradient)
        ]
        self.born = np.array([x.producer - flow.num_forward for _, x in own], dtype=np.int64)
        self.dies = np.array(
            [
                len(backward) - 1 if x.gradient else last.get(v, x.producer - flow.num_forward)
                for v, x in own
            ],
            dtype=np.int64,
        )
        self.nbytes = np.array([x.nbytes for _, x in own], dtype=np.int64)
        self.tangents = [
            (x.nbytes, len(backward) - 1 if x.held else last.get(v, 0))
            for v, x in enumerate(flow.values)
            if x.tangent
        ]
        self.forward = Forward(flow, base)


class Forward:
    """The forward phase for one set of operators that run: positions, lives, bytes.

    takes: by position, the values that the operator there reads last and may write its result over.
    live: change of bytes at each step while nothing is saved, so that each such operator does, and no
    lossy code is made.
    """

    def __init__(self, flow: Dataflow, executed: frozenset[int]) -> None:
        self.order = sorted(executed)
        self.position = {i: p for p, i in enumerate(self.order)}
        self.steps = len(self.order) + 1  # and the boundary
        self.last: dict[int, int] = {}
        for p, i in enumerate(self.order):
            for v in (*flow.operators[i].makes, *flow.operators[i].reads):
                self.last[v] = p
        self.live = np.zeros(self.steps + 1, dtype=np.int64)
        self.results: list[int] = []
        for i in self.order:
            for v in flow.operators[i].makes:
                value = flow.values[v]
                if value.result or value.update:
                    self.last[v] = self.steps - 1
                if value.result:
                    self.results.append(v)
                if value.noise:
                    continue
                self.live[self.position[i]] += value.nbytes
                self.live[self.last[v] + 1] -= value.nbytes
        self.takes: dict[int, tuple[int, ...]] = {}
        for p, i in enumerate(self.order):
            dying = tuple(v for v in flow.operators[i].writes_over if self.last[v] == p)
            if dying:
                self.takes[p] = dying
                self.live[p] -= flow.values[dying[0]].nbytes
                self.live[p + 1] += flow.values[dying[0]].nbytes
        self.flow = flow
        lossy = {x.producer for x in flow.values if x.noise}
        workspace = [0 if i in lossy else flow.operators[i].workspace for i in self.order]
        self.workspace = [*workspace, flow.loss_outside]

    def moment(self, v: int) -> tuple[int, int]:
        """The step that makes a lossy code, if it is kept, and the bytes that it takes there."""
        value = self.flow.values[v]
        workspace = self.flow.operators[value.producer].workspace
        return self.position[value.producer], value.nbytes + workspace

    def saved_from(self, v: int) -> int:
        """The first step where it costs bytes to save ``v``: where it would be gone otherwise."""
        last = self.last.get(v, self.steps - 1)
        return last if self.takes.get(last) == (v,) else last + 1

    def needs_room(self, saved: Container[int]) -> list[int]:
        """Positions where an operator cannot write over anything, because all of it is saved."""
        return [p for p, values in self.takes.items() if all(v in saved for v in values)]


class _Walk:
    """One pass over the backward for one choice."""

    def __init__(self, simulator: Simulator, kept: frozenset[int], drops: Iterable[Drop]) -> None:
        self.flow = simulator.flow
        self.simulator = simulator
        self.kept = kept
        self.drops: dict[int, list[int]] = defaultdict(list)
        for v, j in drops:
            self.drops[j].append(v)
        self.forward = simulator.forward_with(frozenset(filter(simulator.is_extra, kept)))
        self.now = self.forward.steps
        self.workspace: list[int] = []
        self.backward_position: list[int] = []
        self.idle: list[bool] = []  # by slot: is there nothing to decode?
        self.alive: dict[int, list[int]] = {}  # made again: value -> [born, last read]
        self.closed: list[tuple[int, int, int]] = []  # value, born, last read
        self.kept_last: dict[int, int] = {}
        self.recomputed: list[tuple[int, int]] = []
        self.seconds = simulator.seconds_of_keeping(kept)
        for j, reads in enumerate(simulator.read_by_backward):
            self._backward_operator(j, reads)
        self.closed += [(v, born, last) for v, (born, last) in self.alive.items()]

    def _backward_operator(self, j: int, reads: tuple[int, ...]) -> None:
        missing = [v for v in reads if v not in self.kept and v not in self.alive]
        if missing:
            self._remake(missing, j)
        now = self.now
        for v in reads:
            if v in self.kept:
                self.kept_last[v] = now
            else:
                self.alive[v][1] = now
        self.backward_position.append(now)
        idle = self.simulator.decoded.get(j, -1) in self.alive
        self.idle.append(idle)
        plain = self._read_plain(j, now)
        workspace = self.flow.operators[self.flow.num_forward + j].workspace
        self.workspace.append(0 if idle or plain else workspace)
        self.now = now + 1
        for v in (*self.drops.get(j, ()), *self.simulator.lossy.intersection(reads)):
            if v in self.alive:
                self._close(v)
                del self.alive[v]

    def _read_plain(self, j: int, now: int) -> bool:
        """Does the slot read, in place of a code that is not kept, what that is made of?"""
        code, operand = self.simulator.read_plain.get(j, (-1, -1))
        if code not in self.alive:
            return False
        if operand in self.kept:
            self.kept_last[operand] = now
        else:
            self.alive[operand][1] = now
        return True

    def _close(self, v: int) -> None:
        born, last = self.alive[v]
        self.closed.append((v, born, last))

    def _remake(self, missing: list[int], j: int) -> None:
        for i in sorted(self._producers(missing)):
            op = self.flow.operators[i]
            now = self.now
            for v in op.reads:
                if v in self.kept:
                    self.kept_last[v] = now
                elif v in self.alive:
                    self.alive[v][1] = now
            for v in op.remakes:
                if v in self.kept:
                    self.closed.append((v, now, now))  # a copy that nobody reads
                    continue
                if v in self.alive:  # later readers take the latest
                    self._close(v)
                self.alive[v] = [now, now]
            self.recomputed.append((i, j))
            self.seconds += op.seconds
            self.workspace.append(self.simulator.numbers.workspace[i])
            if op.rng_state:
                self.kept_last[-1 - i] = now
            self.now = now + 1

    def _producers(self, missing: list[int]) -> set[int]:
        producers: set[int] = set()
        stack = list(missing)
        values, operators = self.flow.values, self.flow.operators
        while stack:
            i = values[stack.pop()].producer
            if i in producers:
                continue
            producers.add(i)
            for v in operators[i].reads:
                if v not in self.kept and v not in self.alive and values[v].producer >= 0:
                    stack.append(v)
        return producers

    # -- Adding it up ----------------------------------------------------------------------------------

    def outcome(self) -> Outcome:
        live = np.zeros(self.now + 1, dtype=np.int64)
        live[0] += self.flow.resident
        live[: len(self.forward.live)] += self.forward.live
        self._add_kept(live)
        self._add_remade(live)
        self._add_backward(live)
        np.cumsum(live, out=live)
        live[: self.forward.steps] += self.forward.workspace
        live[self.forward.steps : -1] += self.workspace
        return Outcome(live[:-1], self.seconds, tuple(self.recomputed), self.forward.steps)

    def _add_kept(self, live: np.ndarray) -> None:
        """A kept value lives on from its last forward reader to its last backward reader."""
        values, last = self.flow.values, self.forward.last
        for v, end in self.kept_last.items():
            if v < 0:
                self._add_rng_state(live, -1 - v, end)
            elif not values[v].result:
                live[last[v] + 1] += values[v].nbytes
                live[end + 1] -= values[v].nbytes
        for v in self.simulator.lossy.intersection(self.kept_last):
            p, nbytes = self.forward.moment(v)
            live[p] += nbytes
            live[p + 1] -= nbytes
        for p in self.forward.needs_room(self.kept_last):
            nbytes = values[self.forward.takes[p][0]].nbytes
            live[p] += nbytes
            live[p + 1] -= nbytes
        for v in self.forward.results:
            live[last[v] + 1] += values[v].nbytes  # held by the caller: to the end

    def _add_rng_state(self, live: np.ndarray, i: int, end: int) -> None:
        nbytes = self.flow.operators[i].rng_state
        live[self.forward.position[i]] += nbytes
        live[end + 1] -= nbytes

    def _add_remade(self, live: np.ndarray) -> None:
        nbytes = self.simulator.numbers.remade_nbytes
        for v, born, end in self.closed:
            live[born] += nbytes[v]
            live[end + 1] -= nbytes[v]

    def _add_backward(self, live: np.ndarray) -> None:
        static = self.simulator._static
        position = np.array(self.backward_position, dtype=np.int64)
        if len(position):
            idle = np.array(self.idle, dtype=np.int64)
            np.add.at(live, position[static.born] + idle[static.born], static.nbytes)
            np.subtract.at(live, position[static.dies] + 1, static.nbytes)
        for nbytes, end in static.tangents:
            live[self.forward.steps - 1] += nbytes
            live[(position[end] if len(position) else self.forward.steps - 1) + 1] -= nbytes


@dataclass(frozen=True)
class Numbers:
    """What an incremental simulator looks up, by slot, by forward operator or by value.

    A slot is one backward operator with what is made again before it.  The generator state of the
    random operator i counts as a value: number ``len(flow.values) + i``, kept while i runs again.

    reads: forward values, by slot; read_last: the same, to look one up.  static_before, static_at:
    bytes that no choice changes, while a slot makes values again and while its operator runs, with
    ``workspace_at``.
    inputs, remakes, workspace (where it runs again), seconds: by forward operator.  producer, nbytes,
    saved_nbytes (none for what the caller holds), remade_nbytes (none for a lossy code): by value.
    """

    reads: list[tuple[int, ...]]
    read_last: list[frozenset[int]]
    static_before: list[int]
    static_at: list[int]
    workspace_at: list[int]
    inputs: list[tuple[int, ...]]
    remakes: list[tuple[int, ...]]
    workspace: list[int]
    seconds: list[float]
    producer: list[int]
    nbytes: list[int]
    saved_nbytes: list[int]
    remade_nbytes: list[int]
    tangents: int


def _numbers(simulator: Simulator) -> Numbers:
    flow = simulator.flow
    forward = flow.operators[: flow.num_forward]
    states = [op.rng_state for op in forward]
    nbytes = [v.nbytes for v in flow.values]
    before, at = _static_bytes(simulator)
    sets = {reads: frozenset(reads) for reads in simulator.read_by_backward}
    return Numbers(
        reads=simulator.read_by_backward,
        read_last=[sets[reads] for reads in simulator.read_by_backward],
        static_before=before.tolist(),
        static_at=at.tolist(),
        workspace_at=simulator._static.workspace.tolist(),
        inputs=[
            (
                *(v for v in op.reads if flow.values[v].producer >= 0),
                *((len(nbytes) + i,) if op.rng_state else ()),
            )
            for i, op in enumerate(forward)
        ],
        remakes=[op.remakes for op in forward],
        workspace=[
            0 if simulator.lossy.intersection(op.makes) else op.workspace + op.rng_state
            for op in forward
        ],
        seconds=[op.seconds for op in forward],
        producer=[v.producer for v in flow.values],
        nbytes=nbytes + states,
        saved_nbytes=[0 if v.result else v.nbytes for v in flow.values] + states,
        remade_nbytes=[0 if v in simulator.lossy else n for v, n in enumerate(nbytes)] + states,
        tangents=sum(nbytes for nbytes, _ in simulator._static.tangents),
    )


def _static_bytes(simulator: Simulator) -> tuple[np.ndarray, np.ndarray]:
    """Bytes that no choice changes: while each slot makes values again, while its operator runs."""
    flow, static = simulator.flow, simulator._static
    held = flow.resident + sum(flow.values[v].nbytes for v in static.forward.results)
    slots = len(static.workspace)
    before = np.zeros(slots + 1, dtype=np.int64)
    at = np.zeros(slots + 1, dtype=np.int64)
    before[0] = at[0] = held + sum(nbytes for nbytes, _ in static.tangents)
    for nbytes, end in static.tangents:
        before[end + 1] -= nbytes
        at[end + 1] -= nbytes
    np.add.at(at, static.born, static.nbytes)
    np.add.at(before, np.minimum(static.born + 1, slots), static.nbytes)
    np.subtract.at(at, static.dies + 1, static.nbytes)
    np.subtract.at(before, static.dies + 1, static.nbytes)
    return np.cumsum(before)[:-1], np.cumsum(at)[:-1] + static.workspace
