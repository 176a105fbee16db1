"""Plans on the way down: a fixed ladder of budgets, and between its rungs plans move by move.

The rungs lie at fixed shares of the room above what every choice needs.  At a rung the linear
program gives a plan; where that is far from its bound, so that programs say little about what is
possible, the plan that the walk from the rung above arrived with competes with it.  From each rung
local search walks to the next, a little at a time: one that starts far above its target takes what
is cheap at first sight and is left with what is dear.

Nothing here depends on the budget that somebody asks for.  So the fastest plan on the ladder that
fits is never slower for a larger budget.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from fxmem.relaxation import Bound
from fxmem.schedule import Schedule
from fxmem.simulate import Drop
from fxmem.solver import Solver

_RUNG = 0.9
"""Of a rung's room above what every choice needs: what the next rung has."""

_RUNGS = 36
"""The last but one has a fortieth of the room; below, every search is for itself."""

_POST = 3
"""Where programs give no plans near their bounds, only every so many rungs ask for one."""

_FEW = 150
"""Values among which every rung asks."""

_WALKERS = 3
"""Plans that go on from a rung, where programs say little."""

_STEPS = 4
"""From one rung to the next."""

_NEAR = 0.005
"""Of the unchanged step's time: how near its bound a rung's plan needs no other to compete with."""

_RESOLUTION = 400
"""Plans that a walk remembers differ by so many parts of the room, or more."""


@dataclass(frozen=True)
class Found:
    """One plan: what it keeps and lets go early, its peak in bytes, the seconds that it adds."""

    kept: frozenset[int]
    drops: frozenset[Drop]
    peak: int
    seconds: float


@dataclass(frozen=True)
class Stage:
    """The plans from one rung to the next.

    rung: bytes; every plan peaks at or below.  bound: on plans at the rung, and below.  near: the
    first plan is.  last: the plans that the walks ended with which reached the next rung.
    """

    rung: int
    bound: Bound
    plans: tuple[Found, ...]
    near: bool
    last: tuple[Found, ...]


class Descent:
    """The ladder below one way to run a step: ``top``, what is saved when nothing is made again."""

    def __init__(self, solver: Solver) -> None:
        self.solver = solver
        top = Schedule(solver.simulator, solver.all_read)
        self.top = _found(top)
        least = solver.least_possible
        room = max(self.top.peak - least, 0)
        rungs = [least + int(room * _RUNG**k) for k in range(_RUNGS)]
        self.rungs = tuple(dict.fromkeys((*rungs, least)))
        self._apart = room / _RESOLUTION
        self._stages: dict[int, Stage | None] = {}

    @property
    def lowest(self) -> Found:
        """The plan with the smallest peak on the whole way down."""
        plans = [plan for stage in self.stages(0) for plan in stage.plans]
        for known in self._stages.values():
            plans += known.plans if known is not None else ()
        return min((self.top, *plans), key=lambda plan: (plan.peak, plan.seconds))

    def stages(self, budget: int) -> Iterator[Stage]:
        """From the one around the budget down, as far as there are plans."""
        first = max((n for n, rung in enumerate(self.rungs) if rung >= budget), default=0)
        for n in range(first, len(self.rungs)):
            stage = self._stage(n)
            if stage is None:
                return
            yield stage

    def _stage(self, n: int) -> Stage | None:
        """None where no plan was found that fits the rung."""
        if n not in self._stages:
            self._stages[n] = self._made(n)
        return self._stages[n]

    def _made(self, n: int) -> Stage | None:
        rung, solver = self.rungs[n], self.solver
        if n == 0:
            return self._walked(n, Bound(rung, 0.0, 0.0), True, [self.top])
        every = 1 if len(solver.free) <= _FEW else _POST
        post = self._stage(n - n % every) if n % every else None
        if n % every and post is None:
            return None
        if post is not None and not post.near:  # programs say little here: no more than posts ask
            return self._arrived(n, post.bound, [])
        answer = solver.rung(rung, _NEAR)
        if answer is None:
            return None
        schedules, bound = answer
        plans = [_found(schedule) for schedule in schedules]
        if plans and min(p.seconds for p in plans) <= solver.near(bound, _NEAR):
            return self._walked(n, bound, True, plans)
        return self._arrived(n, bound, plans)

    def _arrived(self, n: int, bound: Bound, plans: list[Found]) -> Stage | None:
        """A rung where the walks from above compete."""
        above = self._stage(n - 1)
        arrived = above.last if above is not None else ()
        plans = [self._faster(plan, self.rungs[n]) for plan in (*plans, *arrived)]
        if not plans:
            plans = self._rescued(self.rungs[n])
        return self._walked(n, bound, False, plans) if plans else None

    def _rescued(self, rung: int) -> list[Found]:
        """Where no walk arrives and small programs give nothing: what a large program leads to."""
        program = self.solver.program(rung)
        schedule = self.solver.quick(program) if program.feasible else None
        return [] if schedule is None else [_found(schedule)]

    def _faster(self, plan: Found, budget: int) -> Found:
        schedule = Schedule(self.solver.simulator, plan.kept, plan.drops)
        self.solver.search(schedule).swap(budget)
        return _found(schedule)

    def _walked(self, n: int, bound: Bound, near: bool, starts: list[Found]) -> Stage:
        """Walk from a rung's best plans to the next rung."""
        starts = sorted(dict.fromkeys(starts), key=lambda plan: (plan.seconds, plan.peak))
        plans: list[Found] = []
        last: list[Found] = []
        for start in starts[: 1 if near else _WALKERS]:
            found, arrived = self._walk(n, start)
            plans += found
            if arrived:
                last.append(found[-1])
        return Stage(self.rungs[n], bound, tuple(plans), near, tuple(last))

    def _walk(self, n: int, start: Found) -> tuple[list[Found], bool]:
        """The plans from ``start`` to the next rung; False if they end before it."""
        plans = [start]
        schedule = Schedule(self.solver.simulator, start.kept, start.drops)

        def remember() -> None:
            if schedule.peak <= plans[-1].peak - self._apart:
                plans.append(_found(schedule))

        if n + 1 == len(self.rungs):
            return plans, False
        apart = self.rungs[n] - self.rungs[n + 1]
        for step in range(1, _STEPS + 1):
            target = self.rungs[n] - apart * step // _STEPS
            search = self.solver.search(schedule)
            if not search.repair(target, remember):
                return plans, False
            search.improve(target)
            schedule.commit()
            plans.append(_found(schedule))
        return plans, True


def _found(schedule: Schedule) -> Found:
    return Found(frozenset(schedule.kept), schedule.useful_drops(), schedule.peak, schedule.seconds)
