"""What the graphs of one ``torch.compile`` share: a budget, dealt out in the order of their forwards."""

from __future__ import annotations

import gc
import logging
import threading
import warnings
import weakref
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from fxmem import _torch
from fxmem._torch.saved import leads_to_ours, look_at_backwards
from fxmem.analysis.shards import resident_bytes
from fxmem.backend.outside import Outside, outside_of, storages
from fxmem.backend.refusals import first_step, in_figures_of_the_step, of_a_share
from fxmem.backend.schedule import (
    Key,
    Path,
    Schedule,
    Seen,
    Use,
    as_small_as_can_be,
    coverage,
    keeping_all,
    parts_of,
    path_of,
    residents,
)
from fxmem.basics.device import library_memory
from fxmem.basics.errors import BudgetInfeasibleError
from fxmem.graphs.capture import StepCall
from fxmem.planning.ledger import Around, Part, step_peak
from fxmem.steps.analyze import device_of
from fxmem.steps.options import Options

if TYPE_CHECKING:
    from fxmem.backend.graph import Graph, Program

log = logging.getLogger("fxmem.backend")

_TIGHT = 0.8
"""Of the budget: a graph of a first step that takes more at its peak is planned once more, to take less."""

_HOPED = 0.25
"""Of the budget: within it, graphs of a first step keep everything, in the hope that all others can."""

_UNUSED = 0.04
"""Of the budget: a program that is there already may leave so much unused."""

_MANY = 256
_MANY_WAITING = (
    f"fxmem: {_MANY} forwards wait for their backward, and what they saved is held until then. "
    "Where no backward follows, as in an evaluation, call the model under torch.no_grad()."
)


class Session:
    """What one ``torch.compile`` with its options has compiled, and the step that is going on."""

    def __init__(self, given: Mapping[str, Any] | None, options: Options) -> None:
        self.given = given  # whose identity names the session
        self.options = options
        self.graphs: list[weakref.ref[Graph]] = []
        self.lock = threading.RLock()
        self.schedules: dict[Path, Schedule] = {}
        self._uses: list[weakref.ref[Use]] = []
        self._longest: list[Seen] = []
        self._refused = False
        # Of steps that were refused before all of their graphs were seen: bytes that came after a path.
        self._coming: dict[Path, int] = {}
        self._to_be_seen_again: set[Path] = set()
        self._outside_before: dict[Path, Outside] = {}
        self._outside_after: dict[Path, Outside] = {}

    def living(self) -> list[Graph]:
        return [graph for ref in self.graphs if (graph := ref()) is not None]

    def outstanding(self) -> list[Seen]:
        """Forwards whose backward has not run, oldest first."""
        return [use.seen for use in self._waiting()]

    def _waiting(self) -> list[Use]:
        alive = [use for ref in self._uses if (use := ref()) is not None and not use.finished]
        self._uses = [weakref.ref(use) for use in alive]
        return alive

    def _path(self, graph: Graph, args: Sequence[Any]) -> Path:
        """Where in this step the graph is called."""
        uses, frame = self._waiting(), _torch.checkpoint_around()
        key = graph.key(args)
        if frame is not None:
            last = uses[-1].seen.key.checkpoint if uses and uses[-1].frame == frame else 0
            new = 1 + max((use.seen.key.checkpoint for use in uses), default=0)
            key = key._replace(checkpoint=last or new)
        return path_of([use.seen for use in uses], key)

    def enter(self, graph: Graph, args: Sequence[Any]) -> Use | None:
        """A forward begins; None where nothing in it needs a gradient."""
        program = self.program_for(graph, args)
        if program is None:
            return None
        if _torch.makes_again():
            return Use(Seen(graph.key(args), program, storages(args)))
        path = self._path(graph, args)
        use = Use(self._seen(path, program, args), _torch.checkpoint_around())
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

    def _seen(self, path: Path, program: Program, args: Sequence[Any]) -> Seen:
        outside = self._before(path, args)
        return Seen(path[-1], program, {**storages(args), **outside.leaves}, outside)

    def _before(self, path: Path, args: Sequence[Any]) -> Outside:
        """What code before this graph, and after those that wait for their backward, left there."""
        known = self._outside_before.get(path)
        if known is not None:
            return known
        found = outside_of(args, self._known() | storages(args).keys(), _device(args))
        # A leaf's second gradient is added to the first one at once.
        return replace(found, again=0)

    def _backward_begins(self, roots: Any) -> bool:
        """See what code after the last graph left there; was this the backward of graphs of a step?"""
        with self.lock:
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
        call = graph.key(args)
        if _torch.makes_again():
            if call not in graph.checkpointed:  # compiled since its first forward
                graph.checkpointed[call] = self._alone(graph, args, (call,))
            return graph.checkpointed[call]
        outstanding = self.outstanding()
        if not outstanding:
            self._plan_last_step()
        path = self._path(graph, args)
        if path[-1].checkpoint:
            return self._checkpointed(graph, args, path)
        needed = self._around(path, parts_of(outstanding))
        if needed is None and not outstanding and not graph.more_follows:
            return self._alone(graph, args, path)
        known = graph.programs.get(path)
        if known is not None and self._may_stay(known, path, needed):
            return known
        if needed is None:
            made = self._provisional(graph, args, path)
        else:
            made = self._planned(graph, args, path, needed, known)
        self._to_be_seen_again.discard(path)
        if made is not None:
            graph.programs[path] = made
        return made

    def _may_stay(self, known: Program, path: Path, needed: Around | None) -> bool:
        return path not in self._to_be_seen_again if needed is None else known.leaves_room(needed)

    def _planned(
        self,
        graph: Graph,
        args: Sequence[Any],
        path: Path,
        needed: Around,
        known: Program | None,
    ) -> Program | None:
        """The program of a graph once it is known what follows: one that is there already, if that is as
        good here as a new one would be.

        Blocks of one class are one graph, called at many places, or twins: code is made for a few of them.
        """
        budget = self._budget(path)
        fitting = [] if budget is None else self._fitting(graph, args, needed, budget)
        if budget is not None and fitting:
            best = min(fitting, key=lambda program: program.plan.added_seconds)
            if best.plan.added_seconds <= 0 or budget - best.peak(needed) <= _UNUSED * budget:
                return best.of(graph).kept(needed, budget)
        return self._made(graph, args, needed, budget, known, fitting)

    def _fitting(
        self, graph: Graph, args: Sequence[Any], needed: Around, budget: int
    ) -> list[Program]:
        """Programs that are there already and keep the budget here."""
        sizes = graph.sizes(args)
        return [
            program
            for program in graph.known()
            if (program.lasting or not program.provisional)
            and program.sizes == sizes
            and program.peak(needed) <= budget
        ]

    def _checkpointed(self, graph: Graph, args: Sequence[Any], path: Path) -> Program | None:
        """The forward, and the one that makes again what the checkpoint around it dropped, save the same.

        So all calls run one program, and another one only while none of them waits for its backward.
        Until all else is planned, that is the smallest.
        """
        call = graph.key(args)
        known = graph.checkpointed.get(call)
        if not any(use.key.is_checkpointed(call) for use in self.outstanding()):
            needed, budget = self._around_checkpoints(call)
            if needed is not None and not (known and known.leaves_room(needed)):
                known = self._made_again(graph, args, needed, budget, known)
        if known is None:
            smallest = self.options.for_the_smallest()
            known = graph.build(args, Around(meanwhile=0, known=False), smallest)
        graph.checkpointed[call] = known
        asked = None if known is None or self._of(path) else self._budget_in_bytes(_device(args))
        if known is not None and asked is not None:
            self._check_so_far(graph, args, path, known, asked)
        return known

    def _made_again(
        self,
        graph: Graph,
        args: Sequence[Any],
        needed: Around,
        budget: int | None,
        known: Program | None,
    ) -> Program | None:
        """As ``_made``; but with others in one checkpoint, which are taken to keep everything, a graph may
        find no room and yet all of them have enough with their smallest plans.
        """
        try:
            return self._made(graph, args, needed, budget, known)
        except BudgetInfeasibleError:
            call = graph.key(args)
            uses = [s for s in self._with_checkpointed(call) if s.shares_a_checkpoint(call)]
            if known is None or not uses or not all(one.fits for one in uses):
                raise
            return known.kept(needed, budget)

    def _around_checkpoints(self, call: Key) -> tuple[Around | None, int | None]:
        """What a graph in checkpoints leaves room for, wherever in the known steps, and the budget.

        None as long as that is not known of one of its places.
        """
        found, budgets = list[Around](), list[int | None]()
        for schedule in self._with_checkpointed(call):
            for place, key in enumerate(schedule.keys):
                if not key.is_checkpointed(call):
                    continue
                earlier = [self._as_planned(schedule, before) for before in range(place)]
                if None in earlier:
                    return None, None
                planned = [part for part in earlier if part is not None]
                found.append(schedule.around_in_checkpoint(place, planned))
                budgets.append(schedule.budget)
        if not found:
            return None, None
        limits = [budget for budget in budgets if budget is not None]
        always = max(one.always for one in found)
        meanwhile = max(one.meanwhile or 0 for one in found)
        unchanged = max(one.unchanged or 0 for one in found)
        return Around(always, meanwhile, unchanged=unchanged), min(limits, default=None)

    def _with_checkpointed(self, call: Key) -> list[Schedule]:
        """Steps with this call of a graph in a checkpoint."""
        every = self.schedules.values()
        return _fitting_first(s for s in every if any(key.is_checkpointed(call) for key in s.keys))

    def _as_planned(self, schedule: Schedule, place: int) -> Part | None:
        """A graph of a known step by its last plan; None if that is to come.

        What one in a checkpoint holds is the same by all plans.
        """
        path = schedule.keys[: place + 1]
        if path[-1].checkpoint:
            return schedule.parts[place]
        graph = next((one for one in self.living() if one.number == path[-1].graph), None)
        program = None if graph is None else graph.programs.get(path)
        if program is None or program.provisional:
            return None
        before = self._outside_before.get(path, Outside())
        return program.part.after(before.nbytes, before.gradients)

    def _alone(self, graph: Graph, args: Sequence[Any], path: Path) -> Program | None:
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
            raise of_a_share(error) from error
        if made is not None:
            graph.programs[path] = made
        return made

    def _within(
        self, graph: Graph, args: Sequence[Any], needed: Around, options: Options
    ) -> Program | None:
        """Of what was asked for the step, the graph gets what the code before it does not hold."""
        if not needed.always or options.budget.kind == "min":
            return graph.build(args, needed, options)
        baseline = 0
        if options.budget.kind == "baseline_share":
            unchanged = graph.unchanged_peak(args)
            if unchanged is None:
                return graph.build(args, needed, options)  # a share of the planner's own baseline
            baseline = needed.always + unchanged
        budget = self._resolved(baseline, _device(args))
        assert budget is not None
        try:
            return _built_within(graph, args, needed, budget, options)
        except BudgetInfeasibleError as error:
            raise in_figures_of_the_step(error, needed, budget) from error

    def _made(
        self,
        graph: Graph,
        args: Sequence[Any],
        needed: Around,
        budget: int | None,
        known: Program | None,
        fitting: Sequence[Program] = (),
    ) -> Program | None:
        if budget is None:
            return graph.build(args, needed, self.options.for_the_smallest())
        options = replace(self.options, plan=None)
        try:
            return _built_within(graph, args, needed, budget, options, fitting)
        except BudgetInfeasibleError as error:
            if known is None or known.peak(needed) > budget:
                raise in_figures_of_the_step(error, needed, budget) from error
        return known.kept(needed, budget)

    def _provisional(self, graph: Graph, args: Sequence[Any], path: Path) -> Program | None:
        """A program for a first step, when nobody knows what follows: it leaves the most room for that.

        Raises ``BudgetInfeasibleError`` if what is seen so far breaks a budget that is known by then.
        """
        budget = self._budget_in_bytes(_device(args))
        if budget is None:
            return self._holding_least(graph, args)
        found = self._keeping_all(graph, args, path, budget)
        if found is None or found.lasting:
            return found
        *earlier, last = parts_of([*self.outstanding(), self._seen(path, found, args)])
        here = sum(part.held for part in earlier) + self._given(path, args) + last.least
        if here + self._coming.get(path, 0) > _TIGHT * budget:
            found = self._balanced(graph, args, found)
        self._check_so_far(graph, args, path, found, budget)
        return found

    def _check_so_far(
        self, graph: Graph, args: Sequence[Any], path: Path, last: Program, budget: int
    ) -> None:
        seen = [*self.outstanding(), self._seen(path, last, args)]
        peak = step_peak(parts_of(seen), self._given(path, args))
        if peak > budget:
            self._remember(graph, last, path, args)
            raise first_step(last, peak, budget)

    def _keeping_all(
        self, graph: Graph, args: Sequence[Any], path: Path, budget: int
    ) -> Program | None:
        """The graph so that it keeps everything, if that is a small part of the budget; else as little as
        can be.
        """
        sizes = graph.sizes(args)
        programs = [p for p in graph.known() if p.provisional and p.sizes == sizes]
        earlier = parts_of(self.outstanding())
        held = sum(part.held for part in earlier) + self._before(path, args).nbytes
        room = int(_HOPED * budget) - held - self._given(path, args)
        if path in self._coming:  # there was hope, and it was refused
            room = 0
        for program in programs:
            if program.lasting and program.part.least <= room:
                return program.of(graph)
        if programs or room <= 0:
            return self._holding_least(graph, args)
        room += resident_bytes(storages(args))
        options = replace(self.options, plan=None)
        return graph.build(args, Around(known=False), options, room=room)

    def _holding_least(self, graph: Graph, args: Sequence[Any]) -> Program | None:
        """The graph so that it holds as little as can be while others run."""
        sizes = graph.sizes(args)
        known = [p for p in graph.known() if p.holds_least and p.sizes == sizes]
        if known:
            return known[0].of(graph)
        return graph.build(args, Around(known=False), self.options.for_the_smallest())

    def _balanced(self, graph: Graph, args: Sequence[Any], most: Program) -> Program:
        """The graph so that it holds little while others run, and takes little itself: as near as can be
        to the least of both.

        most: that holds the least.
        """
        known = (p for p in graph.known() if p.provisional and not p.holds_least)
        found = next((p for p in known if p.sizes == most.sizes), None)
        if found is not None:
            return found.of(graph)
        least = most.replan(Around(meanwhile=0)).least
        beside = max(least - most.part.held - most.part.tangents, 0)
        around = Around(meanwhile=beside, known=False)
        return graph.build(args, around, self.options.for_the_smallest()) or most

    def _remember(self, graph: Graph, last: Program, path: Path, args: Sequence[Any]) -> None:
        """What was seen of a step that was refused: its next run knows what follows its graphs.

        Where more would have followed, none of its beginnings is a whole step.
        """
        seen = [*self.outstanding(), self._seen(path, last, args)]
        if not path[-1].checkpoint:
            graph.programs[path] = last
        if not graph.more_follows:
            self._longest = seen
            return
        self._longest = []
        for place in range(len(path)):
            self.schedules.pop(path[:place], None)
        resident = resident_bytes(residents(seen))
        parts = parts_of(seen)
        for place in range(len(path)):
            after = sum(part.gradients for part in parts[place + 1 :])
            given = resident_bytes(residents(seen[: place + 1]))
            self._coming[path[: place + 1]] = after + resident - given
            self._to_be_seen_again.add(path[: place + 1])

    # -- The step that is going on ---------------------------------------------------------------------

    def _plan_last_step(self) -> None:
        """The step before this one is over: from now on its graphs share the budget."""
        uses, self._longest = self._longest, []
        keys = tuple(seen.key for seen in uses)
        after = self._follows(uses)
        # Within checkpoints, one program may have to wait until all else of a step is planned.
        new = [seen for seen in uses if not (seen.key.checkpoint and keys in self.schedules)]
        planned = all(not seen.program.provisional for seen in new)
        if planned and (after is None or keys in self.schedules):
            return  # nothing ran, or all of it as planned for this step
        last = [] if after is None else [after.last]
        parts = [*parts_of(uses), *last]
        resident = resident_bytes({**residents(uses), **(after or Outside()).leaves})
        if planned and self._keeps(parts, resident, uses):
            return
        whole = [*parts_of(uses, keeping_all), *last]
        log.info(coverage(uses, after or Outside()))
        unchanged = step_peak(whole, resident)
        budget = self._resolved(unchanged, torch.device(uses[0].program.plan.device))
        if budget is None or step_peak(parts, resident) > budget:
            parts = as_small_as_can_be(uses, last, resident)
        if budget is not None and step_peak(parts, resident) > budget:
            log.info("the smallest plans of %d graphs need more than the budget", len(uses))
        inside = tuple(seen.program.whole for seen in uses)
        self.schedules[keys] = Schedule(keys, tuple(parts), tuple(whole), inside, resident, budget)

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
        budget = self._budget_in_bytes(torch.device(uses[0].program.plan.device))
        return budget is not None and step_peak(parts, resident) <= budget

    def _resolved(self, baseline: int, device: torch.device) -> int | None:
        """The budget of the whole step, in bytes; None for "min"."""
        reserve = self.options.reserve + library_memory(device)
        return self.options.budget.resolve(device=device, baseline_peak=baseline, reserve=reserve)

    def _of(self, path: Path) -> list[Schedule]:
        """Steps that begin so."""
        return _fitting_first(s for s in self.schedules.values() if s.keys[: len(path)] == path)

    def _around(self, path: Path, earlier: Sequence[Part]) -> Around | None:
        """What a graph at the end of the path leaves room for, whatever of the known steps this is."""
        place = len(path) - 1
        found = [schedule.around(place, earlier) for schedule in self._of(path)]
        if not found:
            return None
        following = [(a.meanwhile, a.spare) for a in found if a.meanwhile is not None]
        meanwhile, spare = max(following, default=(None, 0))
        unchanged = max(a.unchanged or 0 for a in found)
        return Around(max(a.always for a in found), meanwhile, spare, unchanged=unchanged)

    def _budget(self, path: Path) -> int | None:
        budgets = [s.budget for s in self._of(path) if s.budget is not None]
        return min(budgets) if budgets else None

    def _budget_in_bytes(self, device: torch.device) -> int | None:
        """Of the whole step, where it is known before all of its graphs are."""
        if self.options.budget.kind in ("min", "baseline_share"):
            return None
        return self._resolved(0, device)

    def _given(self, path: Path, args: Sequence[Any]) -> int:
        """Bytes of what the graphs of this step are given, up to one that is called with these."""
        uses = self.outstanding()
        given = {**residents(uses), **storages(args), **self._before(path, args).leaves}
        for use in uses:
            for key in use.made:
                given.pop(key, None)
        return resident_bytes(given)


def _fitting_first(schedules: Iterable[Schedule]) -> list[Schedule]:
    """Steps that count: such as were refused do where no others are left."""
    found = list(schedules)
    return [schedule for schedule in found if schedule.fits] or found


def _built_within(
    graph: Graph,
    args: Sequence[Any],
    needed: Around,
    budget: int,
    options: Options,
    fitting: Sequence[Program] = (),
) -> Program | None:
    """The graph by the plan for what is left of the step's budget, in bytes."""
    asked = options.for_bytes(max(budget - needed.always, 1), _device(args))
    made = graph.build(args, needed, asked, fitting=fitting)
    return made and replace(made, plan=replace(made.plan, budget=budget))


def _device(args: Sequence[Any]) -> torch.device:
    return device_of(StepCall(nn.Module(), tuple(args)))
