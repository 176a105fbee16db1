"""The largest plan whose code keeps the budget where kernels make again all that they can.

So the least is saved.  Within a kernel that takes less time than operators that are made again, so a plan
for more bytes, with fewer such operators, may take the place of one whose code saves what it usually does:

    code      plan: bytes     added      code peaks at
    usual           5.5 MB    0.78 ms    5.60 MB of 5.59, too many
    least           9.3       0          5.71, too many
    least           8.1       0.20       5.46

It is sought by bisection, from the step as it is, or from where the code is expected to keep the budget.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

from fxmem.planning.plan import Plan
from fxmem.steps.inductor import Inductor
from fxmem.steps.looks import GAIN, PLANS, UNSURE, Looks, Tried, is_new


class Point(NamedTuple):
    """A plan: bytes that were planned for, bytes that its code peaks at, and seconds that it adds."""

    planned: int
    code: int
    seconds: float


def larger_saving_least(
    looks: Looks, tried: Tried, least: Inductor, seen: Sequence[Tried]
) -> list[Tried]:
    """Plans for more bytes than one that was tried, in turn, as code that saves the least.

    least: such code of that plan.  seen: what was lowered before.  What comes on top of what is held
    between the halves is taken to be about the same for all of them, until it is seen.
    """
    plan, on_top, looked = tried.plan, (tried.foreseen or 0) - tried.code.held.nbytes, list[Tried]()
    low = Point(plan.predicted_peak, least.held.nbytes + on_top, tried.seconds)
    most = looks.held_least
    high = Point(plan.keep_all_peak, most.nbytes + on_top, most.heavy)
    if low.code >= plan.budget:
        return []
    may_fit = high.code <= (1 + UNSURE) * plan.budget
    target = high.planned if may_fit else _between(low, high, plan.budget)
    while len(looked) < PLANS and low.seconds - high.seconds > GAIN * plan.seconds:
        one = _look(looks, target, [tried, *looked], seen)
        if one is None or one.foreseen is None or one.seconds >= low.seconds:
            break
        looked.append(one)
        point = Point(target, one.foreseen, one.seconds)
        low, high = (point, high) if one.fits else (low, point)
        target = min((low.planned + high.planned) // 2, _between(low, high, plan.budget))
    return looked


def _look(
    looks: Looks, target: int, looked: Iterable[Tried], seen: Iterable[Tried]
) -> Tried | None:
    """At a plan for so many bytes, if it is another one; the step as it is may have been lowered so."""
    found = looks.planned(target, looked)
    if found is None:
        return None
    before = _with_decisions(found[0].plan, (one for one in seen if one.code.saves_least))
    return before or looks.at(*found, Inductor(found[0], saves_least=True))


def _with_decisions(plan: Plan, seen: Iterable[Tried]) -> Tried | None:
    return next((one for one in seen if not is_new(plan, [one])), None)


def _between(low: Point, high: Point, budget: int) -> int:
    """Bytes to plan for so that code keeps the budget: a plan's of which it does, to a larger one's."""
    share = (budget - low.code) / max(high.code - low.code, 1)
    return int(low.planned + (high.planned - low.planned) * min(max(share, 0.0), 1.0))
