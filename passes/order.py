"""Order: independent operators of the backward run in the order that holds fewer bytes.

before                              after
  gx = mm(gy, w)                      gw = mm(t(gy), a)      # the last reader of a
  gw = mm(t(gy), a)                   gx = mm(gy, w)         # a is gone when gx is made
  return gx, gw                       return gx, gw

Autograd often makes the gradient of a layer's input first, beside all that only the weight's reads.
The other way round, a gradient that is larger than what making it lets go of had better come late,
since it is held to the end: that of a large weight and a small batch.

One operator at a time is put where bytes are lowest while it and those that it passes run: first
the most of them counts, then their sum.  So no peak grows, neither the step's nor those between.
No operator changes, so no bit does.  Operators that draw, write or talk to others keep their order.
"""

from __future__ import annotations

import operator
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any, ClassVar

import numpy as np
import torch
from torch import fx

from fxmem.analysis.overwriting import overwritable
from fxmem.basics.sizes import evaluate, storage_keys, storages_in
from fxmem.graphs.graph import (
    JointGraph,
    OutputKind,
    Role,
    is_backward,
    is_held_tangent,
    is_symbolic_scalar,
    is_view,
)
from fxmem.graphs.operators import is_random
from fxmem.graphs.workspace import Workspaces


@dataclass(frozen=True)
class OrderPass:
    """workspaces: what operators hold while they run.  sweeps: how often each may be moved."""

    workspaces: Workspaces = field(default_factory=Workspaces, repr=False)
    sweeps: int = 2
    name: ClassVar[str] = "order"

    def apply(self, graph: JointGraph) -> JointGraph:
        graph = graph.copy()
        held = _held(graph)
        tasks = _joined(_tasks(graph, self.workspaces), held)
        search = _Search(tasks, held, _storages(graph.placeholders(Role.TANGENT)))
        if search.improve(self.sweeps):
            _write(graph, [node for t in search.order for node in tasks[t].operators])
        return graph.verified()


# -- What may be moved -------------------------------------------------------------------------------


@dataclass
class _Task:
    """One operator; or several in a row that together make a gradient.

    after: tasks that must come before.  reads, makes: storage -> bytes, of what lives outside it.
    peak: bytes that it holds at most, beside what it reads.  overwrites: storages in whose place
    its result goes if nobody reads them again.
    """

    operators: list[fx.Node]
    after: set[int]
    reads: dict[int, int]
    makes: dict[int, int]
    peak: int
    overwrites: frozenset[int] = frozenset()


def _tasks(graph: JointGraph, workspaces: Workspaces) -> list[_Task]:
    """The backward's operators in their order; views, tuple accesses and sizes are none."""
    sizes = graph.bindings()
    written = overwritable(graph, backward=True)
    turns = _Turns()
    tasks: list[_Task] = []
    makers: dict[fx.Node, set[int]] = {}  # node of the backward -> tasks that it comes from
    for node in _backward_nodes(graph):
        after = {t for source in node.all_input_nodes for t in makers.get(source, ())}
        if _is_free(node):
            makers[node] = after
            continue
        makers[node] = {len(tasks)}
        reads = _bytes((i.meta.get("val") for i in node.all_input_nodes), sizes)
        makes = _bytes((node.meta.get("val"),), sizes)
        makes = {key: nbytes for key, nbytes in makes.items() if key not in reads}
        after |= turns.before(len(tasks), node, reads)
        peak = sum(makes.values()) + evaluate(workspaces.nbytes(node), sizes)
        over = {key for o in written.get(node, ()) for key in storage_keys(o.meta.get("val"))}
        tasks.append(_Task([node], after, reads, makes, peak, frozenset(over)))
    return tasks


def _backward_nodes(graph: JointGraph) -> Iterator[fx.Node]:
    return (n for n in graph.nodes if n.op == "call_function" and is_backward(n))


def _is_free(node: fx.Node) -> bool:
    """A view, a tuple access or a size: it holds nothing of its own and goes where it is read."""
    return not _keeps_its_turn(node) and (is_view(node) or _is_taken_at_once(node))


def _is_taken_at_once(node: fx.Node) -> bool:
    """Does the node hold all of a tuple or a tensor for a part or a size of it?"""
    return node.target is operator.getitem or is_symbolic_scalar(node)


def _keeps_its_turn(node: fx.Node) -> bool:
    """Can anybody tell in what order such operators run?"""
    target = node.target
    if not isinstance(target, torch._ops.OpOverload):
        return not _is_taken_at_once(node)
    known = target.namespace in ("aten", "prims", "fxmem")
    return not known or target._schema.is_mutable or is_random(node) or node.is_impure(False)


class _Turns:
    """Who must wait for whom, beyond what the arguments say."""

    def __init__(self) -> None:
        self.latest: int | None = None  # of those that keep their turn
        self.writer: dict[int, int] = {}  # storage -> who may have written there last
        self.readers: dict[int, set[int]] = {}  # storage -> who has read it since

    def before(self, task: int, node: fx.Node, reads: Iterable[int]) -> set[int]:
        """The earlier tasks that this one must come after."""
        found = {self.writer[key] for key in reads if key in self.writer}
        if _keeps_its_turn(node):
            if self.latest is not None:
                found.add(self.latest)
            self.latest = task
            for key in reads:
                found |= self.readers.pop(key, set())
                self.writer[key] = task
        for key in reads:
            self.readers.setdefault(key, set()).add(task)
        return found


def _bytes(values: Iterable[Any], sizes: dict[Any, int]) -> dict[int, int]:
    """Storage -> bytes."""
    found = {key: nbytes for value in values for key, nbytes in storages_in(value).items()}
    return {key: evaluate(nbytes, sizes) for key, nbytes in found.items()}


def _held(graph: JointGraph) -> set[int]:
    """Storages that stay whatever the backward does: inputs, and what the caller gets."""
    held = [n for n in graph.nodes if n.op in ("placeholder", "get_attr") and not is_backward(n)]
    held += [n for n in graph.nodes if is_held_tangent(n)]
    held += [
        output
        for output, kind in zip(graph.outputs(), graph.output_kinds, strict=True)
        if isinstance(output, fx.Node) and kind is not OutputKind.MUTATION
    ]
    return _storages(held)


def _storages(nodes: Iterable[fx.Node]) -> set[int]:
    return {key for node in nodes for key in storage_keys(node.meta.get("val"))}


# -- Reductions go together --------------------------------------------------------------------------


def _joined(tasks: list[_Task], held: set[int]) -> list[_Task]:
    """What is made only to be turned into a gradient next is one task with that."""
    readers = _readers(tasks)
    joined: list[_Task] = []  # the last task first
    number: dict[int, int] = {}
    ends = False  # does the task made last end in what nobody but the caller reads?
    for t in reversed(range(len(tasks))):
        task = tasks[t]
        used = [readers.get(key, []) for key in task.makes]
        only = bool(used) and not held.intersection(task.makes) and all(r == [t + 1] for r in used)
        if ends and only and sum(task.makes.values()) >= sum(joined[-1].makes.values()):
            joined[-1] = _both(task, joined[-1])
        else:
            joined.append(task)
            ends = not any(used)
        number[t] = len(joined) - 1
    last = len(joined) - 1
    for j, task in enumerate(joined):
        task.after = {last - number[t] for t in task.after} - {last - j}
    return joined[::-1]


def _both(first: _Task, second: _Task) -> _Task:
    between = sum(first.makes.values())
    over = sum(first.makes.get(key, 0) for key in second.overwrites)
    outside = {key: n for key, n in second.reads.items() if key not in first.makes}
    return _Task(
        first.operators + second.operators,
        first.after | second.after,
        first.reads | outside,
        second.makes,
        max(first.peak, between + second.peak - over),
    )


def _readers(tasks: list[_Task]) -> dict[int, list[int]]:
    """Storage -> the tasks that read it, in their order."""
    readers: dict[int, list[int]] = {}
    for t, task in enumerate(tasks):
        for key in task.reads:
            readers.setdefault(key, []).append(t)
    return readers


# -- The search --------------------------------------------------------------------------------------

_REACH = 500
"""Tasks that one may pass in one move, so that time grows with the graph and not with its square."""


class _Search:
    """An order of tasks, its bytes, and better ones.

    Bytes come in two rows: with all that the forward made kept until its last reader, and with all
    of it made again right before its first.  Plans lie in between, so that neither may grow.

    carry: by position, the bytes that live on from before it.  own: by task, what it adds to them.
    """

    def __init__(self, tasks: list[_Task], held: set[int], tangents: set[int]) -> None:
        self.tasks, self.held = tasks, held
        self.readers = _readers(tasks)
        self.maker = {key: t for t, task in enumerate(tasks) for key in task.makes}
        self.again = self.readers.keys() - self.maker.keys() - held - tangents
        self.users: list[set[int]] = [set() for _ in tasks]
        for t, task in enumerate(tasks):
            for before in task.after:
                self.users[before].add(t)
        self.order = np.arange(len(tasks))
        self.position = np.arange(len(tasks))
        self.carry = self._carried()
        self.own = np.array([self._own(t) for t in range(len(tasks))], dtype=np.int64).T

    def improve(self, sweeps: int) -> bool:
        """Move each task to its best place, so many times.  Was any moved?"""
        moved = False
        for _ in range(sweeps):
            moves = sum([self._improve(t) for t in self.order.tolist()])
            moved |= moves > 0
            if not moves:
                break
        return moved

    def uses_but(self, key: int, t: int) -> list[int]:
        """Where other tasks than this one make and read a storage."""
        others = [int(self.position[r]) for r in self.readers[key] if r != t]
        if key in self.maker:
            others.append(int(self.position[self.maker[key]]))
        return others

    def stays(self, key: int) -> bool:
        """Is a storage there after the task that makes it?"""
        return key in self.held or key in self.readers

    def _carried(self) -> np.ndarray:
        change = np.zeros((2, len(self.tasks) + 2), dtype=np.int64)
        sizes = {key: n for task in self.tasks for key, n in (task.reads | task.makes).items()}
        for key, nbytes in sizes.items():
            if not self.stays(key):
                continue
            born = self.maker.get(key, -1)
            change[:, born + 1] += nbytes
            if key in self.again:
                change[1, 0] -= nbytes
                change[1, self.readers[key][0] + 1] += nbytes
            if key not in self.held:
                change[:, self.readers[key][-1] + 1] -= nbytes
        return np.cumsum(change, axis=1)

    def _own(self, t: int) -> tuple[int, int]:
        task, here = self.tasks[t], self.position[t]
        taken = (k for k in task.overwrites if max(self.uses_but(k, t), default=-1) < here)
        kept = task.peak - max([task.reads[key] for key in taken], default=0)
        first = (k for k in self.again.intersection(task.reads) if self._is_first(k, t))
        return kept, kept + sum(task.reads[key] for key in first)

    def _is_first(self, key: int, t: int) -> bool:
        return min(self.uses_but(key, t), default=len(self.tasks)) > self.position[t]

    def _improve(self, t: int) -> bool:
        # What reads the forward alone comes no earlier: until then, the forward's value may go.
        here = int(self.position[t])
        first = max([int(self.position[a]) + 1 for a in self.tasks[t].after], default=here)
        end = min([int(self.position[u]) for u in self.users[t]], default=len(self.tasks)) - 1
        first, end = max(first, here - _REACH), min(end, here + _REACH)
        if first == end:
            return False
        places = _Places(self, t, first, end)
        best = places.best()
        if best != here:
            self.carry[:, first : end + 2] = places.carried(best)
            self._move(t, here, best)
        return best != here

    def _move(self, t: int, here: int, there: int) -> None:
        low, high = min(here, there), max(here, there)
        turned = np.roll(self.order[low : high + 1], -1 if here < there else 1)
        self.order[low : high + 1] = turned
        self.position[turned] = np.arange(low, high + 1)
        for other in {t, *(r for key in self.tasks[t].reads for r in self.readers[key])}:
            self.own[:, other] = self._own(other)


class _Places:
    """Where one task may stand: at place p, from ``first`` to ``end``, p others come before it.

    before, after: by place, the bytes that live on there until this task ran, and from then on.
    waiting, done: by place, bytes while the other task there runs, before this one did and after.
    running: by place, bytes while this one runs.  marks: places where what it lets go of changes.
    """

    def __init__(self, search: _Search, t: int, first: int, end: int) -> None:
        task, here = search.tasks[t], int(search.position[t])
        self.first, self.here, self.marks = first, here, {first, end}
        others = np.delete(search.order[first : end + 1], here - first)
        waiting, done = search.own[:, others], search.own[:, others]
        shape = (2, end - first + 1)
        running = np.full(shape, task.peak, dtype=np.int64)
        needs = np.zeros(shape, dtype=np.int64)  # what is there only until this task ran
        gives = np.zeros(shape, dtype=np.int64)  # what is there only from then on
        gives += sum(nbytes for key, nbytes in task.makes.items() if search.stays(key))
        for key, nbytes in task.reads.items():
            if key in search.held:
                continue
            uses = [use - first - (use > here) for use in search.uses_but(key, t)]
            last = max(uses, default=-1)
            gone = max(last + 1, 0)
            needs[0, gone:] += nbytes
            if key in task.overwrites:
                running[:, gone:] = task.peak - nbytes
            if 0 <= last < len(others):
                self.marks |= {first + last, first + last + 1}
                reader = search.tasks[others[last]]
                if key in reader.overwrites:  # only if this task ran before
                    saved = reader.peak - search.own[0, others[last]]
                    if here - first <= last:
                        waiting[:, last] += saved
                    else:
                        done[:, last] -= nbytes - saved
            if key not in search.again:
                needs[1, gone:] += nbytes
            elif not uses:
                running[1] += nbytes
            else:
                soonest = min(uses)
                needs[1, gone:] += nbytes
                gives[1, : max(soonest + 1, 0)] += nbytes
                running[1, : max(soonest + 1, 0)] += nbytes
                if 0 <= soonest < len(others):  # makes it again only if this task did not
                    self.marks |= {first + soonest, first + soonest + 1}
                    if here - first <= soonest:
                        waiting[1, soonest] += nbytes
                    else:
                        done[1, soonest] -= nbytes
        carry, split = search.carry, here + 1 - first
        base = np.concatenate((carry[:, first : here + 1], carry[:, here + 2 : end + 2]), axis=1)
        base[:, :split] -= needs[:, :split]
        base[:, split:] -= gives[:, split:]
        self.before, self.after = base + needs, base + gives
        self.waiting, self.done = waiting + self.before[:, :-1], done + self.after[:, :-1]
        self.running = running + self.before

    def best(self) -> int:
        """A place where neither row holds more than it does here, and one of them less."""
        best = self.here
        for place in sorted(self.marks - {best}):
            early, late = self._compared(min(place, best), max(place, best))
            old, new = (late, early) if place < best else (early, late)
            if new != old and all(n <= o for n, o in zip(new, old, strict=True)):
                best = place
        return best

    def _compared(self, early: int, late: int) -> tuple[list[tuple[int, int]], ...]:
        """For two places, by row, the most bytes and their sum while the tasks in between run."""
        a, b = early - self.first, late - self.first
        found = []
        for steps, place in ((self.done, a), (self.waiting, b)):
            between, own = steps[:, a:b], self.running[:, place]
            most = np.maximum(between.max(axis=1), own).tolist()
            found.append(list(zip(most, (between.sum(axis=1) + own).tolist(), strict=True)))
        return tuple(found)

    def carried(self, place: int) -> np.ndarray:
        """What lives on from position to position, with the task at that place."""
        here = place - self.first
        return np.concatenate((self.before[:, : here + 1], self.after[:, here:]), axis=1)


# -- The graph in another order ----------------------------------------------------------------------


def _write(graph: JointGraph, order: list[fx.Node]) -> None:
    """Let the operators of the backward follow each other so, and the others go along with them.

    A view comes right before what reads it first; what holds a tuple or a tensor for a part or a
    size of it comes right after that.
    """
    nodes = list(_backward_nodes(graph))
    rank = {node: i for i, node in enumerate(nodes)}
    output = graph.module.graph.output_node()
    written: set[fx.Node] = set()
    for reader in [*order, *nodes]:
        for node in [*_views_for(reader, rank, written), reader]:
            for found in (node, *_parts(node)):
                if found not in written:
                    output.prepend(found)
                    written.add(found)


def _views_for(node: fx.Node, rank: dict[fx.Node, int], written: set[fx.Node]) -> list[fx.Node]:
    """What is still to be written before a node."""
    found: set[fx.Node] = set()
    stack = [node]
    while stack:
        missing = {i for i in stack.pop().all_input_nodes if i in rank and i not in written}
        stack += missing - found
        found |= missing
    return sorted(found, key=rank.__getitem__)


def _parts(node: fx.Node) -> Iterator[fx.Node]:
    for user in node.users:
        if is_backward(user) and _is_taken_at_once(user) and len(user.all_input_nodes) == 1:
            yield user
            yield from _parts(user)
