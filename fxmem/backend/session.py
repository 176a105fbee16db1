"""What the graphs of one ``torch.compile`` share: a budget, dealt out in the order of their forwards."""

from __future__ import annotations

import gc
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
from fxmem._torch.saved import leads_to_ours, look_at_backwards
from fxmem.analysis.shards import resident_bytes
from fxmem.backend.outside import Outside, outside_of, storages
from fxmem.basics.budget import Budget
from fxmem.basics.device import library_memory
from fxmem.basics.errors import BudgetInfeasibleError
from fxmem.basics.units import format_bytes
from fxmem.graphs.capture import StepCall
from fxmem.planning.ledger import Around, Part, around, shares, step_peak
from fxmem.planning.whole_step import REST, in_step
from fxmem.steps.analyze import device_of
from fxmem.steps.decisions import infeasible
from fxmem.steps.options import Options

if TYPE_CHECKING:
    from fxmem.backend.graph import Graph, Program

log = logging.getLogger("fxmem.backend")

Key = tuple[int, tuple[int, ...]]
"""A graph's number and the sizes that it is called with, where those may change."""

_CHECKPOINT: Key = (-1, ())
"""Stands in a path for a checkpoint around the graph."""

_TIGHT = 0.8
"""Of the budget: a graph of a first step that takes more at its peak is planned once more, to take less."""

_MANY = 256
_MANY_WAITING = (
    f"fxmem: {_MANY} forwards wait for their backward, and what they saved is held until then. "
    "Where no backward follows, as in an evaluation, call the model under torch.no_grad()."
)


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

    @property
    def part(self) -> Part:
        return self.surrounded(self.program.part)

    def surrounded(self, part: Part) -> Part:
        """The bytes of its graph by some plan, after the code before it."""
        return part.after(self.outside.nbytes, self.outside.gradients)


@dataclass(eq=False)
class Use:
    """One forward, until its backward has run or can run no more: what autograd saved refers to it."""

    seen: Seen
    finished: bool = False

    def returned(self, outputs: Any) -> None:
        self.seen.made.update(storages(outputs).keys() - self.seen.read.keys())

    def done(self) -> None:
        self.finished = True


@dataclass(frozen=True)
class Schedule:
    """Graphs of one step in forward order, as seen in its first run; and code after them, if that counts.

    Bytes.  wanted: of each part at its peak, with everything kept.  resident: what is always there.
    unchanged: at the peak of the step with everything kept.
    """

    keys: tuple[Key, ...]
    parts: tuple[Part, ...]
    wanted: tuple[int, ...]
    resident: int
    unchanged: int
    budget: int | None

    def around(self, place: int, earlier: Sequence[Part]) -> Around:
        spare = 0
        if self.budget is not None:
            room = self.budget - step_peak(self.parts, self.resident)
            later = shares(self.parts, self.wanted)[place + 1 :]
            spare = int(sum(later) * max(room, 0))
        found = around(self.parts, place, earlier, self.resident, spare)
        return replace(found, unchanged=self.unchanged)


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
        self._refused = False
        # Of steps that were refused before all of their graphs were seen: bytes that came after a path.
        self._coming: dict[tuple[Key, ...], int] = {}
        self._to_be_seen_again: set[tuple[Key, ...]] = set()
        self._outside_before: dict[tuple[Key, ...], Outside] = {}
        self._outside_after: dict[tuple[Key, ...], Outside] = {}

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
        if _torch.is_checkpointed():
            return Use(Seen(graph.key(args), program, storages(args)))
        path = _path(self.outstanding(), graph.key(args))
        use = Use(self._seen(path, program, args))
        # The same in each step: there may be a whole model to walk through before a graph.
        self._outside_before[path] = use.seen.outside
        self._uses.append(weakref.ref(use))
        if not any(keys[: len(path)] == path for keys in self._outside_after):
            look_at_backwards(self._backward_begins)
        seen = self.outstanding()
        if len(seen) > len(self._longest):
            self._longest = seen
        if len(seen) == _MANY:
            warnings.warn(_MANY_WAITING, stacklevel=4)
        return use

    def _seen(self, path: tuple[Key, ...], program: Program, args: Sequence[Any]) -> Seen:
        outside = self._before(path, args)
        return Seen(path[-1], program, {**storages(args), **outside.leaves}, outside)

    def _before(self, path: tuple[Key, ...], args: Sequence[Any]) -> Outside:
        """What code before this graph, and after those that wait for their backward, left there."""
        known = self._outside_before.get(path)
        if known is not None:
            return known
        found = outside_of(args, self._known() | storages(args).keys(), _device(args))
        # A leaf's second gradient is added to the first one at once.
        return replace(found, again=0)

    def _backward_begins(self, roots: Any) -> bool:
        """See what code after the last graph left there; was this the backward of graphs of a step?"""
        seen = self.outstanding()
        if not seen or not leads_to_ours(roots):
            return False
        device = torch.device(seen[-1].program.plan.device)
        keys = tuple(use.key for use in seen)
        self._outside_after[keys] = outside_of(roots, self._known(), device)
        return True

    def _known(self) -> set[int]:
        """Storages that the graphs of this step are given, have made, or found there."""
        found: set[int] = set()
        for use in self.outstanding():
            found |= use.read.keys() | use.made | use.outside.saved.keys()
        return found

    def program_for(self, graph: Graph, args: Sequence[Any]) -> Program | None:
        """The program that a call of the graph runs now; made if there is none yet.

        Raises ``BudgetInfeasibleError`` where the graph finds no room.
        """
        if self._refused:
            gc.collect()  # Dynamo leaves cycles that hold what a step has saved that was refused midway
        self._refused = True
        program = self._program_for(graph, args)
        self._refused = False
        return program

    def _program_for(self, graph: Graph, args: Sequence[Any]) -> Program | None:
        key = graph.key(args)
        if _torch.is_checkpointed():
            return self._checkpointed(graph, args, key)
        outstanding = self.outstanding()
        if not outstanding:
            self._plan_last_step()
        path = _path(outstanding, key)
        needed = self._around(path, [use.part for use in outstanding])
        if needed is None and not outstanding and not graph.more_follows:
            return self._alone(graph, args, path)
        known = graph.programs.get(path)
        if known is not None and self._may_stay(known, path, needed):
            return known
        made = self._made(graph, args, path, needed, known)
        self._to_be_seen_again.discard(path)
        if made is not None:
            graph.programs[path] = made
        return made

    def _may_stay(self, known: Program, path: tuple[Key, ...], needed: Around | None) -> bool:
        return path not in self._to_be_seen_again if needed is None else known.leaves_room(needed)

    def _checkpointed(self, graph: Graph, args: Sequence[Any], key: Key) -> Program | None:
        """The forward, and the one that makes again what a checkpoint around it dropped, save the same.

        So both run one program, whatever else is outstanding then: as a step of its own.
        """
        if key not in graph.checkpointed:
            graph.checkpointed[key] = self._alone(graph, args, (_CHECKPOINT, key))
        return graph.checkpointed[key]

    def _alone(self, graph: Graph, args: Sequence[Any], path: tuple[Key, ...]) -> Program | None:
        """A graph that is the whole step, as far as is known: planned as by ``optimize``, with what code
        before it holds.
        """
        before = self._before(path, args)
        needed = Around(before.nbytes + resident_bytes(before.leaves))
        sizes = graph.sizes(args)
        serving = [
            program
            for at, program in graph.programs.items()
            if len(at) == 1
            and program.around.meanwhile is None
            and program.leaves_room(needed)
            and program.serves(sizes)
        ]
        if serving:
            return min(serving, key=lambda program: program.plan.predicted_overhead)
        # A plan that was given is for the first step; further ones are planned.
        first = not any(other.programs for other in self.living())
        options = self.options if first else replace(self.options, plan=None)
        try:
            made = self._within(graph, args, needed, options)
        except BudgetInfeasibleError as error:
            if options.budget.kind != "baseline_share":
                raise
            raise _of_a_share(error) from error
        if made is not None:
            graph.programs[path] = made
        return made

    def _within(
        self, graph: Graph, args: Sequence[Any], needed: Around, options: Options
    ) -> Program | None:
        """Of what was asked for the step, the graph gets what the code before it does not hold."""
        if not needed.always or options.budget.kind == "min":
            return graph.build(args, needed, options)
        device = _device(args)
        reserve = options.reserve + library_memory(device)
        baseline = 0
        if options.budget.kind == "baseline_share":
            unchanged = graph.unchanged_peak(args)
            if unchanged is None:
                return graph.build(args, needed, options)  # a share of the planner's own baseline
            baseline = needed.always + unchanged
        budget = options.budget.resolve(device=device, baseline_peak=baseline, reserve=reserve)
        assert budget is not None
        try:
            return _built_within(graph, args, needed, budget, options)
        except BudgetInfeasibleError as error:
            raise _in_a_step(error, needed, budget) from error

    def _made(
        self,
        graph: Graph,
        args: Sequence[Any],
        path: tuple[Key, ...],
        needed: Around | None,
        known: Program | None,
    ) -> Program | None:
        if needed is None:
            return self._provisional(graph, args, path)
        budget = self._budget(path)
        if budget is None:
            return graph.build(args, needed, self.options.for_the_smallest())
        try:
            return _built_within(graph, args, needed, budget, replace(self.options, plan=None))
        except BudgetInfeasibleError as error:
            if known is None or _peak(known, needed) > budget:
                raise _in_a_step(error, needed, budget) from error
        return replace(known, around=needed)

    def _provisional(
        self, graph: Graph, args: Sequence[Any], path: tuple[Key, ...]
    ) -> Program | None:
        """A program for a first step, when nobody knows what follows: it leaves the most room for that.

        Raises ``BudgetInfeasibleError`` if what is seen so far breaks a budget that is known by then.
        """
        found = self._holding_least(graph, args)
        budget = None if found is None else self._budget_in_bytes(found)
        if found is None or budget is None:
            return found
        parts = [use.part for use in self.outstanding()]
        last = self._seen(path, found, args)
        resident = self._given(args, last.outside)
        here = sum(part.held for part in parts) + resident + last.part.least
        if here + self._coming.get(path, 0) > _TIGHT * budget:
            found = self._balanced(graph, args, found)
        peak = step_peak([*parts, last.surrounded(found.part)], resident)
        if peak > budget:
            self._remember(graph, found, path, args)
            raise _first_step(found, peak, budget)
        return found

    def _holding_least(self, graph: Graph, args: Sequence[Any]) -> Program | None:
        """The graph so that it holds as little as can be while others run."""
        sizes = graph.sizes(args)
        known = (p for p in graph.programs.values() if p.holds_least and p.sizes == sizes)
        return next(known, None) or graph.build(
            args, Around(known=False), self.options.for_the_smallest()
        )

    def _balanced(self, graph: Graph, args: Sequence[Any], most: Program) -> Program:
        """The graph so that it holds little while others run, and takes little itself: as near as can be
        to the least of both.

        most: that holds the least.
        """
        known = (p for p in graph.programs.values() if p.provisional and not p.holds_least)
        found = next((p for p in known if p.sizes == most.sizes), None)
        if found is not None:
            return found
        least = most.replan(Around(meanwhile=0)).least
        beside = max(least - most.part.held - most.part.tangents, 0)
        around = Around(meanwhile=beside, known=False)
        return graph.build(args, around, self.options.for_the_smallest()) or most

    def _remember(
        self, graph: Graph, last: Program, path: tuple[Key, ...], args: Sequence[Any]
    ) -> None:
        """What was seen of a step that was refused: its next run knows what follows its graphs.

        Where more would have followed, none of its beginnings is a whole step.
        """
        seen = [*self.outstanding(), self._seen(path, last, args)]
        graph.programs[path] = last
        if not graph.more_follows:
            self._longest = seen
            return
        self._longest = []
        for place in range(len(path)):
            self.schedules.pop(path[:place], None)
        resident = resident_bytes(_residents(seen))
        for place in range(len(path)):
            after = sum(use.part.gradients for use in seen[place + 1 :])
            given = resident_bytes(_residents(seen[: place + 1]))
            self._coming[path[: place + 1]] = after + resident - given
            self._to_be_seen_again.add(path[: place + 1])

    # -- The step that is going on ---------------------------------------------------------------------

    def _plan_last_step(self) -> None:
        """The step before this one is over: from now on its graphs share the budget."""
        uses, self._longest = self._longest, []
        keys = tuple(seen.key for seen in uses)
        after = self._follows(uses)
        last = [] if after is None else [after.last]
        parts = [*(seen.part for seen in uses), *last]
        resident = resident_bytes({**_residents(uses), **(after or Outside()).leaves})
        if all(not seen.program.provisional for seen in uses) and (
            after is None or keys in self.schedules or self._keeps(parts, resident, uses)
        ):
            return  # nothing ran, or all of it as planned for this step
        whole = [*(seen.surrounded(seen.program.whole) for seen in uses), *last]
        log.info(_coverage(uses, after or Outside()))
        unchanged = step_peak(whole, resident)
        budget = self._resolved(unchanged, uses[0].program)
        if budget is None or step_peak(parts, resident) > budget:
            parts = _as_small_as_can_be(uses, last, resident)
        if budget is not None and step_peak(parts, resident) > budget:
            log.info("the smallest plans of %d graphs need more than the budget", len(uses))
        wanted = tuple(part.least for part in whole)
        self.schedules[keys] = Schedule(keys, tuple(parts), wanted, resident, unchanged, budget)

    def _follows(self, uses: Sequence[Seen]) -> Outside | None:
        """What code after the last graph left there, if more than is assumed of any loss."""
        found = self._outside_after.get(tuple(seen.key for seen in uses))
        if found is None:
            return None
        last = uses[-1].program.part
        loss = last.boundary - last.held - last.tangents
        return found if found.gradients or found.nbytes > loss else None

    def _keeps(self, parts: Sequence[Part], resident: int, uses: Sequence[Seen]) -> bool:
        """Do the graphs, as they run, keep a budget of bytes?"""
        budget = self._budget_in_bytes(uses[0].program)
        return budget is not None and step_peak(parts, resident) <= budget

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
        meanwhile, spare = max(following, default=(None, 0))
        unchanged = max(a.unchanged or 0 for a in found)
        return Around(max(a.always for a in found), meanwhile, spare, unchanged=unchanged)

    def _budget(self, path: tuple[Key, ...]) -> int | None:
        budgets = [s.budget for s in self._of(path) if s.budget is not None]
        return min(budgets) if budgets else None

    def _budget_in_bytes(self, program: Program) -> int | None:
        """Of the whole step, where it is known before all of its graphs are."""
        if self.options.budget.kind in ("min", "baseline_share"):
            return None
        return self._resolved(0, program)

    def _given(self, args: Sequence[Any], outside: Outside) -> int:
        """Bytes of what the graphs of this step are given, up to one that is called with these."""
        uses = self.outstanding()
        residents = {**_residents(uses), **storages(args), **outside.leaves}
        for use in uses:
            for key in use.made:
                residents.pop(key, None)
        return resident_bytes(residents)


def _path(uses: Sequence[Seen], key: Key) -> tuple[Key, ...]:
    """Where in a step a graph is called: after these."""
    return (*(use.key for use in uses), key)


def _built_within(
    graph: Graph, args: Sequence[Any], needed: Around, budget: int, options: Options
) -> Program | None:
    """The graph by the plan for what is left of the step's budget, in bytes."""
    outside = options.reserve + library_memory(_device(args))
    left = max(budget - needed.always, 1)
    asked = Budget("bytes", Fraction(left + outside), options.budget.asked)
    made = graph.build(args, needed, replace(options, budget=asked))
    return made and replace(made, plan=replace(made.plan, budget=budget))


def _as_small_as_can_be(uses: Sequence[Seen], last: Sequence[Part], resident: int) -> list[Part]:
    """The graphs of a step by the plans with the smallest peak of all of it; last: what follows them.

    What a graph and those that follow hold at most depends on these alone: so each is planned for that,
    from the last one on.
    """
    parts = [*(use.part for use in uses), *last]
    for place in reversed(range(len(uses))):
        use = uses[place]
        parts[place] = use.surrounded(use.program.smallest(around(parts, place, [], resident)))
    return parts


def _coverage(uses: Sequence[Seen], after: Outside) -> str:
    """Of the bytes that wait for a backward in a step that keeps everything, those of graphs."""
    seen = sum(use.program.whole.held for use in uses)
    outside = sum(use.outside.nbytes for use in uses) + after.nbytes
    share = 100 * seen / ((seen + outside) or 1)
    graphs = "1 graph" if len(uses) == 1 else f"{len(uses)} graphs"
    return f"{graphs}, {share:.0f} % of saved bytes seen"


def _residents(uses: Sequence[Seen]) -> dict[int, int]:
    """Storage -> bytes of all that the graphs of a step are given and that none of them made."""
    made = {key for use in uses for key in use.made}
    return {k: n for use in uses for k, n in use.read.items() if k not in made}


def _device(args: Sequence[Any]) -> torch.device:
    return device_of(StepCall(nn.Module(), tuple(args)))


def _peak(program: Program, needed: Around) -> int:
    return needed.always + program.part.resident + program.part.peak(needed)


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
    """The error of a graph, in the figures of the step."""
    plan = replace(in_step(error.best_plan, needed), budget=budget)
    found = infeasible(plan)
    sizes = [line for line in str(error).split("\n") if line.startswith("  fits ")]
    note = f"  note    {REST}: what other graphs hold while this one runs, and code that is in none"
    return BudgetInfeasibleError(
        "\n".join([str(found), note, *sizes]),
        smallest_peak=plan.predicted_peak,
        best_plan=plan,
        why=found.why,
    )


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
