"""What the graphs of one ``torch.compile`` share: a budget, dealt out in the order of their forwards.

``Session`` says which program each call of a graph runs; ``Step`` knows what is going on, ``KnownSteps``
what follows.
"""

from __future__ import annotations

import gc
import threading
import weakref
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch

from fxmem import _torch
from fxmem.analysis.shards import resident_bytes
from fxmem.backend.known_steps import KnownSteps
from fxmem.backend.outside import storages
from fxmem.backend.refusals import (
    first_step,
    in_figures_of_the_step,
    of_a_share,
    of_several_graphs,
    within_a_checkpoint,
)
from fxmem.backend.schedule import Path, Schedule, Seen, Use, parts_of
from fxmem.backend.step import Step, device_of_inputs
from fxmem.basics.device import library_memory
from fxmem.basics.errors import BudgetInfeasibleError
from fxmem.planning.ledger import Around, Part, step_peak
from fxmem.steps.options import Options

if TYPE_CHECKING:
    from fxmem.backend.graph import Graph
    from fxmem.backend.program import Program

_TIGHT = 0.8
"""Of the budget: a graph of a first step that takes more at its peak is planned once more, to take less."""

_HOPED = 0.25
"""Of the budget: within it, graphs of a first step keep everything, in the hope that all others can."""

_UNUSED = 0.04
"""Of the budget: a program that is there already may leave so much unused."""


class Session:
    """What one ``torch.compile`` with its options has compiled, and the step that is going on."""

    def __init__(self, given: Mapping[str, Any] | None, options: Options) -> None:
        self.given = given  # whose identity names the session
        self.options = options
        self.graphs: list[weakref.ref[Graph]] = []
        self.lock = threading.RLock()
        self.step = Step(self.lock)
        self.steps = KnownSteps()
        self._refused = False

    def living(self) -> list[Graph]:
        return [graph for ref in self.graphs if (graph := ref()) is not None]

    def enter(self, graph: Graph, args: Sequence[Any]) -> Use | None:
        """A forward begins; None where nothing in it needs a gradient."""
        program = self.program_for(graph, args)
        if program is None:
            return None
        if _torch.makes_again():
            return Use(Seen(graph.key(args), program, storages(args)))
        return self.step.begin(self.step.path(graph, args), program, args)

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
            self._check_no_plan_in_a_checkpoint()
            if call not in graph.checkpointed:  # compiled since its first forward
                graph.checkpointed[call] = self._alone(graph, args, (call,))
            return graph.checkpointed[call]
        outstanding = self.step.outstanding()
        if not outstanding:
            self._plan_last_step()
        path = self.step.path(graph, args)
        if path[-1].checkpoint:
            self._check_no_plan_in_a_checkpoint()
            return self._checkpointed(graph, args, path)
        needed = self.steps.around(path, parts_of(outstanding))
        if needed is None and not outstanding and not graph.more_follows:
            return self._alone(graph, args, path)
        known = graph.programs.get(path)
        if known is not None and self._may_stay(known, path, needed):
            return known
        if needed is None:
            made = self._provisional(graph, args, path)
            if made is not None:
                self._check_no_plan_given(graph, outstanding)
        else:
            made = self._planned(graph, args, path, needed, known)
        self.steps.to_be_seen_again.discard(path)
        if made is not None:
            graph.programs[path] = made
        return made

    def _check_no_plan_given(self, graph: Graph, outstanding: Sequence[Seen]) -> None:
        """Raises ``PlanMismatchError`` where a plan was given for a step that is in several graphs."""
        others = any(use.key.graph != graph.number for use in outstanding)
        if self.options.plan is not None and (graph.more_follows or others):
            raise of_several_graphs()

    def _check_no_plan_in_a_checkpoint(self) -> None:
        if self.options.plan is not None:
            raise within_a_checkpoint()

    def _may_stay(self, known: Program, path: Path, needed: Around | None) -> bool:
        return (
            path not in self.steps.to_be_seen_again if needed is None else known.leaves_room(needed)
        )

    # -- A graph of a step that was seen before -----------------------------------------------------------

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
        budget = self.steps.budget(path)
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

    # -- Within checkpoints -------------------------------------------------------------------------------

    def _checkpointed(self, graph: Graph, args: Sequence[Any], path: Path) -> Program | None:
        """The forward, and the one that makes again what the checkpoint around it dropped, save the same.

        So all calls run one program, and another one only while none of them waits for its backward.
        Until all else is planned, that is the smallest.
        """
        call = graph.key(args)
        known = graph.checkpointed.get(call)
        if not any(use.key.is_checkpointed(call) for use in self.step.outstanding()):
            needed, budget = self.steps.around_checkpoints(call, self._as_planned)
            if needed is not None and not (known and known.leaves_room(needed)):
                known = self._made_again(graph, args, needed, budget, known)
        if known is None:
            smallest = self.options.for_the_smallest()
            known = graph.build(args, Around(meanwhile=0, known=False), smallest)
        graph.checkpointed[call] = known
        if known is not None and not self.steps.beginning(path):
            budget = self._budget_in_bytes(device_of_inputs(args))
            if budget is not None:
                self._check_so_far(graph, args, path, known, budget)
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
            uses = [s for s in self.steps.with_checkpointed(call) if s.shares_a_checkpoint(call)]
            if known is None or not uses or not all(one.fits for one in uses):
                raise
            return known.kept(needed, budget)

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
        before = self.step.seen_before(path)
        return program.part.after(before.nbytes, before.gradients)

    # -- A graph that is the whole step -------------------------------------------------------------------

    def _alone(self, graph: Graph, args: Sequence[Any], path: Path) -> Program | None:
        """A graph that is the whole step, as far as is known: planned as by ``optimize``, with what code
        before it holds.
        """
        before = self.step.before(path, args)
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
        budget = self._resolved(baseline, device_of_inputs(args))
        assert budget is not None
        try:
            return _built_within(graph, args, needed, budget, options)
        except BudgetInfeasibleError as error:
            raise in_figures_of_the_step(error, needed, budget) from error

    # -- The first step -----------------------------------------------------------------------------------

    def _provisional(self, graph: Graph, args: Sequence[Any], path: Path) -> Program | None:
        """A program for a first step, when nobody knows what follows: it leaves the most room for that.

        Raises ``BudgetInfeasibleError`` if what is seen so far breaks a budget that is known by then.
        """
        budget = self._budget_in_bytes(device_of_inputs(args))
        if budget is None:
            return self._holding_least(graph, args)
        found = self._keeping_all(graph, args, path, budget)
        if found is None or found.lasting:
            return found
        *earlier, last = parts_of(self.step.up_to(path, found, args))
        here = sum(part.held for part in earlier) + self.step.given(path, args) + last.least
        if here + self.steps.coming.get(path, 0) > _TIGHT * budget:
            found = self._balanced(graph, args, found)
        self._check_so_far(graph, args, path, found, budget)
        return found

    def _check_so_far(
        self, graph: Graph, args: Sequence[Any], path: Path, last: Program, budget: int
    ) -> None:
        seen = self.step.up_to(path, last, args)
        peak = step_peak(parts_of(seen), self.step.given(path, args))
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
        earlier = parts_of(self.step.outstanding())
        held = sum(part.held for part in earlier) + self.step.before(path, args).nbytes
        room = int(_HOPED * budget) - held - self.step.given(path, args)
        if path in self.steps.coming:  # there was hope, and it was refused
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
        seen = self.step.up_to(path, last, args)
        if not path[-1].checkpoint:
            graph.programs[path] = last
        if not graph.more_follows:
            self.step.longest = seen
            return
        self.step.longest = []
        self.steps.broken_off(seen)

    # -- The budget of the step --------------------------------------------------------------------------

    def _plan_last_step(self) -> None:
        """The step before this one is over."""
        uses, self.step.longest = self.step.longest, []
        if not uses:
            return
        device = torch.device(uses[0].program.plan.device)
        self.steps.learn(
            uses,
            self.step.after(uses),
            lambda unchanged: self._resolved(unchanged, device),
            self._budget_in_bytes(device),
        )

    def _resolved(self, baseline: int, device: torch.device) -> int | None:
        """The budget of the whole step, in bytes; None for "min"."""
        reserve = self.options.reserve + library_memory(device)
        return self.options.budget.resolve(device=device, baseline_peak=baseline, reserve=reserve)

    def _budget_in_bytes(self, device: torch.device) -> int | None:
        """Of the whole step, where it is known before all of its graphs are."""
        if self.options.budget.kind in ("min", "baseline_share"):
            return None
        return self._resolved(0, device)


def _built_within(
    graph: Graph,
    args: Sequence[Any],
    needed: Around,
    budget: int,
    options: Options,
    fitting: Sequence[Program] = (),
) -> Program | None:
    """The graph by the plan for what is left of the step's budget, in bytes."""
    asked = options.for_bytes(max(budget - needed.always, 1), device_of_inputs(args))
    made = graph.build(args, needed, asked, fitting=fitting)
    return made and replace(made, plan=replace(made.plan, budget=budget))
