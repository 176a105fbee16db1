"""What the graphs of one ``torch.compile`` share: a budget, dealt out in the order of their forwards."""

from __future__ import annotations

import logging
import threading
import warnings
import weakref
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from fractions import Fraction
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from fxmem import _torch
from fxmem.analysis.shards import resident_bytes
from fxmem.basics.budget import Budget
from fxmem.basics.device import library_memory
from fxmem.basics.errors import BudgetInfeasibleError, FxmemError
from fxmem.basics.sizes import storages_in
from fxmem.basics.units import format_bytes
from fxmem.graphs.capture import StepCall
from fxmem.planning.ledger import Around, Part, around, shares, step_peak
from fxmem.steps.analyze import device_of
from fxmem.steps.options import Options

if TYPE_CHECKING:
    from fxmem.backend.graph import Graph, Program

log = logging.getLogger("fxmem.backend")

Key = tuple[int, tuple[int, ...]]
"""A graph's number and the sizes that it is called with, where those may change."""

_CHECKPOINT: Key = (-1, ())
"""Stands in a path for a checkpoint around the graph."""

_MANY = 256
_MANY_WAITING = (
    f"fxmem: {_MANY} forwards wait for their backward, and what they saved is held until then. "
    "Where no backward follows, as in an evaluation, call the model under torch.no_grad()."
)


@dataclass(frozen=True)
class Seen:
    """What is remembered of a forward.  read: storage -> bytes of its inputs.  made: its outputs'."""

    key: Key
    program: Program
    read: dict[int, int]
    made: set[int] = field(default_factory=set)


@dataclass(eq=False)
class Use:
    """One forward, until its backward has run or can run no more: what autograd saved refers to it."""

    seen: Seen
    finished: bool = False

    def returned(self, outputs: Any) -> None:
        self.seen.made.update(_storages(outputs).keys() - self.seen.read.keys())

    def done(self) -> None:
        self.finished = True


@dataclass(frozen=True)
class Schedule:
    """Graphs of one step in forward order, as seen in its first run.  resident, budget: bytes."""

    keys: tuple[Key, ...]
    parts: tuple[Part, ...]
    wanted: tuple[int, ...]
    resident: int
    budget: int | None

    def around(self, place: int, earlier: Sequence[Part]) -> Around:
        spare = 0
        if self.budget is not None:
            room = self.budget - step_peak(self.parts, self.resident)
            later = shares(self.parts, self.wanted)[place + 1 :]
            spare = int(sum(later) * max(room, 0))
        return around(self.parts, place, earlier, self.resident, spare)


class Session:
    """What one ``torch.compile`` with its options has compiled, and the step that is going on."""

    def __init__(self, given: Mapping[str, Any] | None, options: Options) -> None:
        self.given = given  # whose identity names the session
        self.options = options
        self.graphs: list[weakref.ref[Graph]] = []
        self.lock = threading.RLock()
        self.schedules: dict[tuple[Key, ...], Schedule] = {}
        self._uses: list[weakref.ref[Use]] = []
        self._longest: list[Seen] = []

    def living(self) -> list[Graph]:
        return [graph for ref in self.graphs if (graph := ref()) is not None]

    def outstanding(self) -> list[Seen]:
        """Forwards whose backward has not run, oldest first."""
        alive = [use for ref in self._uses if (use := ref()) is not None and not use.finished]
        self._uses = [weakref.ref(use) for use in alive]
        return [use.seen for use in alive]

    def enter(self, graph: Graph, args: Sequence[Any]) -> Use | None:
        """A forward begins; None where nothing in it needs a gradient."""
        program = self.program_for(graph, args)
        if program is None:
            return None
        use = Use(Seen(graph.key(args), program, _storages(args)))
        if _torch.is_checkpointed():
            return use
        self._uses.append(weakref.ref(use))
        seen = self.outstanding()
        if len(seen) > len(self._longest):
            self._longest = seen
        if len(seen) == _MANY:
            warnings.warn(_MANY_WAITING, stacklevel=4)
        return use

    def program_for(self, graph: Graph, args: Sequence[Any]) -> Program | None:
        """The program that a call of the graph runs now; made if there is none yet.

        Raises ``BudgetInfeasibleError`` where the graph finds no room.
        """
        key = graph.key(args)
        if _torch.is_checkpointed():
            return self._checkpointed(graph, args, key)
        outstanding = self.outstanding()
        if not outstanding:
            self._plan_last_step()
        path = (*(use.key for use in outstanding), key)
        needed = self._around(path, [use.program.part for use in outstanding])
        if needed is None and not outstanding and not graph.more_follows:
            return self._alone(graph, args, path)
        known = graph.programs.get(path)
        if known is not None and (needed is None or known.leaves_room(needed)):
            return known
        made = self._made(graph, args, path, needed, known)
        if made is not None:
            graph.programs[path] = made
        return made

    def _checkpointed(self, graph: Graph, args: Sequence[Any], key: Key) -> Program | None:
        """The forward, and the one that makes again what a checkpoint around it dropped, save the same.

        So both run one program, whatever else is outstanding then: as a step of its own.
        """
        if key not in graph.checkpointed:
            graph.checkpointed[key] = self._alone(graph, args, (_CHECKPOINT, key))
        return graph.checkpointed[key]

    def _alone(self, graph: Graph, args: Sequence[Any], path: tuple[Key, ...]) -> Program | None:
        """A graph that is the whole step, as far as is known: planned as by ``optimize``."""
        sizes = graph.sizes(args)
        serving = [
            program
            for at, program in graph.programs.items()
            if len(at) == 1 and program.around == Around() and program.serves(sizes)
        ]
        if serving:
            return min(serving, key=lambda program: program.plan.predicted_overhead)
        # A plan that was given is for the first step; further ones are planned.
        first = not any(other.programs for other in self.living())
        options = self.options if first else replace(self.options, plan=None)
        try:
            made = graph.build(args, Around(), options)
        except BudgetInfeasibleError as error:
            if options.budget.kind != "baseline_share":
                raise
            raise _of_a_share(error) from error
        if made is not None:
            graph.programs[path] = made
        return made

    def _made(
        self,
        graph: Graph,
        args: Sequence[Any],
        path: tuple[Key, ...],
        needed: Around | None,
        known: Program | None,
    ) -> Program | None:
        smallest = replace(
            self.options, budget=Budget.parse("min"), on_infeasible="best", plan=None
        )
        if needed is None:
            sizes = graph.sizes(args)
            others = (p for p in graph.programs.values() if p.provisional and p.sizes == sizes)
            first = next(others, None) or graph.build(args, None, smallest)
            if first is not None:
                self._check_first(graph, first, path, args)
            return first
        budget = self._budget(path)
        if budget is None:
            return graph.build(args, needed, smallest)
        room = budget - needed.always
        outside = self.options.reserve + library_memory(_device(args))
        if room > 0:
            asked = Budget("bytes", Fraction(room + outside), self.options.budget.asked)
            options = replace(self.options, budget=asked, plan=None)
            try:
                return graph.build(args, needed, options)
            except BudgetInfeasibleError as error:
                if known is None or _peak(known, needed) > budget:
                    raise _in_a_step(error, needed, budget) from error
        if known is None or _peak(known, needed) > budget:
            raise _no_room(known, needed, budget)
        return replace(known, around=needed)

    # -- The step that is going on ---------------------------------------------------------------------

    def _plan_last_step(self) -> None:
        """The step before this one is over: from now on its graphs share the budget."""
        uses, self._longest = self._longest, []
        keys = tuple(seen.key for seen in uses)
        if all(not seen.program.provisional for seen in uses):
            return  # nothing ran, or all of it as planned for this step
        resident = resident_bytes(_residents(uses))
        parts = tuple(seen.program.part for seen in uses)
        whole = [seen.program.whole for seen in uses]
        budget = self._resolved(step_peak(whole, resident), uses[0].program)
        if budget is not None and step_peak(parts, resident) > budget:
            log.info("the smallest plans of %d graphs need more than the budget", len(uses))
        wanted = tuple(part.least for part in whole)
        self.schedules[keys] = Schedule(keys, parts, wanted, resident, budget)

    def _resolved(self, baseline: int, program: Program) -> int | None:
        """The budget of the whole step, in bytes; None for "min"."""
        device = torch.device(program.plan.device)
        reserve = self.options.reserve + library_memory(device)
        return self.options.budget.resolve(device=device, baseline_peak=baseline, reserve=reserve)

    def _of(self, path: tuple[Key, ...]) -> list[Schedule]:
        return [s for keys, s in self.schedules.items() if keys[: len(path)] == path]

    def _around(self, path: tuple[Key, ...], earlier: Sequence[Part]) -> Around | None:
        """What a graph at the end of the path leaves room for, whatever of the known steps this is."""
        place = len(path) - 1
        found = [schedule.around(place, earlier) for schedule in self._of(path)]
        if not found:
            return None
        following = [(a.meanwhile, a.spare) for a in found if a.meanwhile is not None]
        return Around(max(a.always for a in found), *max(following, default=(None, 0)))

    def _budget(self, path: tuple[Key, ...]) -> int | None:
        budgets = [s.budget for s in self._of(path) if s.budget is not None]
        return min(budgets) if budgets else None

    def _check_first(
        self, graph: Graph, program: Program, path: tuple[Key, ...], args: Sequence[Any]
    ) -> None:
        """In a first step, too, what is seen so far keeps a budget that is known by then."""
        if self.options.budget.kind in ("min", "baseline_share"):
            return
        budget = self._resolved(0, program)
        uses = self.outstanding()
        residents = {**_residents(uses), **_storages(args)}
        for use in uses:
            for key in use.made:
                residents.pop(key, None)
        parts = [*(use.program.part for use in uses), program.part]
        peak = step_peak(parts, resident_bytes(residents))
        if budget is not None and peak > budget:
            # The graphs before may have been planned as if nothing followed: next time they know.
            graph.programs[path] = program
            self._longest = [*uses, Seen(path[-1], program, _storages(args))]
            raise _first_step(program, peak, budget)


def _residents(uses: Sequence[Seen]) -> dict[int, int]:
    """Storage -> bytes of all that the graphs of a step are given and that none of them made."""
    made = {key for use in uses for key in use.made}
    return {k: n for use in uses for k, n in use.read.items() if k not in made}


def _storages(values: Any) -> dict[int, int]:
    tensors = [t for t in torch.utils._pytree.tree_leaves(values) if isinstance(t, torch.Tensor)]
    return {key: int(n) for t in tensors for key, n in storages_in(t).items()}


def _device(args: Sequence[Any]) -> torch.device:
    return device_of(StepCall(nn.Module(), tuple(args)))


def _peak(program: Program, needed: Around) -> int:
    part = program.part
    boundary = (
        part.boundary if needed.meanwhile is None else part.held + part.tangents + needed.meanwhile
    )
    return needed.always + part.resident + max(part.least, boundary)


# -- Errors --------------------------------------------------------------------------------------------


def _of_a_share(error: BudgetInfeasibleError) -> BudgetInfeasibleError:
    return BudgetInfeasibleError(
        f"{error}\n  note    the share is of this one graph; where more make the step, as with blocks that "
        "are compiled one by one, ask for bytes",
        smallest_peak=error.smallest_peak,
        best_plan=error.best_plan,
        why=error.why,
    )


def _in_a_step(error: BudgetInfeasibleError, needed: Around, budget: int) -> BudgetInfeasibleError:
    return BudgetInfeasibleError(
        f"this is one of several graphs of a step; of the budget of {format_bytes(budget)}, the others "
        f"hold {format_bytes(needed.always)} while it runs.\n{error}",
        smallest_peak=error.smallest_peak + needed.always,
        best_plan=error.best_plan,
        why=error.why,
    )


def _no_room(known: Program | None, needed: Around, budget: int) -> FxmemError:
    peak = needed.always if known is None else _peak(known, needed)
    text = (
        f"the step runs in several graphs, and the smallest plans of all of them need "
        f"{format_bytes(peak)} ({peak} bytes); the budget is {format_bytes(budget)} ({budget} bytes).\n"
        f"  try: a budget of {peak} bytes, or fewer graph breaks "
        "(torch._dynamo.explain lists them)"
    )
    if known is None:
        return FxmemError(text)
    return BudgetInfeasibleError(text, smallest_peak=peak, best_plan=known.plan, why="")


def _first_step(program: Program, peak: int, budget: int) -> BudgetInfeasibleError:
    return BudgetInfeasibleError(
        f"the step runs in several graphs; those seen so far, with the smallest plan for the last, need "
        f"{format_bytes(peak)} ({peak} bytes); the budget is {format_bytes(budget)} ({budget} bytes).\n"
        "  try: the step once more, if an earlier graph took room that a later one needs: it now knows of "
        f"all of them; or a budget above {peak} bytes, since graphs that follow, which nobody has seen "
        "yet, add to what these need",
        smallest_peak=peak,
        best_plan=program.plan,
        why="",
    )
