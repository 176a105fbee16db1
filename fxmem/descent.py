"""Plans on the way down: a fixed ladder of budgets, and between its rungs plans of three kinds.

The rungs lie at fixed shares of the room above what every choice needs.

* Where the linear program at a rung leads to a plan close to its bound, programs above do, too.
* Where they do not, so that programs say little about what is possible, local search walks from rung
  to rung, a little at a time: one that starts far above its target takes what is cheap at first
  sight and is left with what is dear.  What walks arrive with and what programs give compete.
* Where there are few values to choose, each plan is looked for right below the one before.

Nothing here depends on the budget that somebody asks for.  So the fastest plan on the ladder that
fits is never slower for a larger budget.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from fxmem.relaxation import Bound
from fxmem.schedule import Schedule
from fxmem.simulate import Drop
from fxmem.solver import FEW, Solver

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

_BETWEEN = 8
"""Programs from one rung to the next where they lead to plans near their bounds."""

_MANY = 600
"""Values among which walks take minutes: they are left for where programs lead to nothing."""

_SMOOTH = 0.01
"""And how near it a program's plan needs no walk beside it."""

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
    """Some plans on the way down.

    rung: bytes; every plan peaks at or below.  bound: on plans at the rung, and below.  last: the
    plans that walks ended with which reached the next rung.
    """

    rung: int
    bound: Bound
    plans: tuple[Found, ...]
    last: tuple[Found, ...] = ()


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
        self._posts: dict[int, Stage | None] = {}
        self._walks: dict[int, Stage | None] = {}
        self._links: dict[int, Stage | None] = {}

    @property
    def lowest(self) -> Found:
        """The plan with the smallest peak at any rung, or on a walk from one to the next."""
        plans = [self.top]
        for n in range(len(self.rungs)):
            stage = self._link(self.rungs[n]) if self._smooth(n) else self._walk(n)
            if stage is None:
                break
            plans += stage.plans
        return min(plans, key=lambda plan: (plan.peak, plan.seconds))

    def stages(self, budget: int) -> Iterator[Stage]:
        """From around the budget down, as far as there are plans."""
        first = max((n for n, rung in enumerate(self.rungs) if rung >= budget), default=0)
        for n in range(first, len(self.rungs)):
            walks = not self._smooth(n)
            if len(self.solver.free) <= FEW:
                yield from self._chained(n, budget)
                continue
            for rung in () if walks else self._between(n, budget):
                stage = self._link(rung)
                walks |= stage is None
                if stage is not None:
                    yield stage
            if walks and (stage := self._walk(n)) is not None:
                yield stage
            elif walks:
                return

    # -- Where programs lead to good plans -----------------------------------------------------------

    def _smooth(self, n: int) -> bool:
        """Does the program at the next rung lead to a plan near its bound?"""
        if len(self.solver.free) > _MANY:
            return True
        below = min(n + 1, len(self.rungs) - 1)
        stage = self._link(self.rungs[below])
        return stage is not None and self._is_near(stage, _SMOOTH)

    def _between(self, n: int, budget: int) -> Iterator[int]:
        """Rungs between this one and the next, not above the budget."""
        end = self.rungs[n + 1] if n + 1 < len(self.rungs) else self.rungs[n] - 1
        rungs = (
            self.rungs[n] - (self.rungs[n] - end) * part // _BETWEEN for part in range(_BETWEEN)
        )
        return (rung for rung in dict.fromkeys(rungs) if rung <= budget)

    def _link(self, budget: int) -> Stage | None:
        """What the program at a budget leads to; None if that is nothing."""
        if budget not in self._links:
            program = self.solver.program(budget)
            schedule = self.solver.best(program) if program.feasible else None
            found = None if schedule is None else Stage(budget, program.bound, (_found(schedule),))
            self._links[budget] = found
        return self._links[budget]

    def _is_near(self, stage: Stage, share: float = _NEAR) -> bool:
        limit = self.solver.near(stage.bound, share)
        return any(plan.seconds <= limit for plan in stage.plans)

    def _post(self, n: int) -> Stage | None:
        """What small programs at a rung lead to; None if there is no plan."""
        if n not in self._posts:
            self._posts[n] = self._posted(n)
        return self._posts[n]

    def _posted(self, n: int) -> Stage | None:
        rung = self.rungs[n]
        if n == 0:
            return Stage(rung, Bound(rung, 0.0, 0.0), (self.top,))
        every = 1 if len(self.solver.free) <= _FEW else _POST
        if n % every:  # programs say little here: no more than every so many rungs ask
            post = self._post(n - n % every)
            if post is None:
                return None
            if not self._is_near(post):
                return Stage(rung, post.bound, ())
        answer = self.solver.rung(rung, _NEAR)
        if answer is None:
            return None
        schedules, bound = answer
        return Stage(rung, bound, tuple(_found(schedule) for schedule in schedules))

    # -- Where there are few values ------------------------------------------------------------------

    def _chained(self, n: int, budget: int) -> Iterator[Stage]:
        """Each plan right below the one before, from a rung to the next."""
        end = self.rungs[n + 1] if n + 1 < len(self.rungs) else -1
        rung = self.rungs[n]
        while rung > end and (stage := self._link(rung)) is not None:
            (plan,) = stage.plans
            if plan.peak <= budget:
                yield stage
            rung = plan.peak - 1

    # -- Where walks compete -------------------------------------------------------------------------

    def _walk(self, n: int) -> Stage | None:
        """None where no plan was found that fits the rung."""
        if n not in self._walks:
            self._walks[n] = self._walked(n)
        return self._walks[n]

    def _walked(self, n: int) -> Stage | None:
        post = self._post(n)
        if post is None:
            return None
        near = self._is_near(post)
        starts = [min(post.plans, key=_rank)] if near else self._competing(n, post)
        plans: list[Found] = []
        last: list[Found] = []
        for start in starts:
            found, arrived = self._descended(n, start)
            plans += found
            if arrived:
                last.append(found[-1])
        return Stage(self.rungs[n], post.bound, tuple(plans), tuple(last)) if plans else None

    def _competing(self, n: int, post: Stage) -> list[Found]:
        """The best of what programs give and what walks from above arrive with."""
        above = self._walk(n - 1)
        arrived = above.last if above is not None else ()
        link = self._link(self.rungs[n]) if n % _POST == 0 else None
        linked = link.plans if link is not None else ()
        plans = [self._faster(plan, self.rungs[n]) for plan in (*post.plans, *linked, *arrived)]
        if not plans:
            plans = self._rescued(self.rungs[n])
        return sorted(dict.fromkeys(plans), key=_rank)[:_WALKERS]

    def _rescued(self, rung: int) -> list[Found]:
        """Where no walk arrives and small programs give nothing: what a large program leads to."""
        program = self.solver.program(rung)
        schedule = self.solver.quick(program) if program.feasible else None
        return [] if schedule is None else [_found(schedule)]

    def _faster(self, plan: Found, budget: int) -> Found:
        schedule = Schedule(self.solver.simulator, plan.kept, plan.drops)
        self.solver.search(schedule).swap(budget)
        return _found(schedule)

    def _descended(self, n: int, start: Found) -> tuple[list[Found], bool]:
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


def _rank(plan: Found) -> tuple[float, int]:
    return (plan.seconds, plan.peak)
