"""The steps that were seen to their end, and what a graph leaves room for in them."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Sequence

from fxmem.analysis.shards import resident_bytes
from fxmem.backend.outside import Outside
from fxmem.backend.schedule import (
    Key,
    Path,
    Schedule,
    Seen,
    as_small_as_can_be,
    coverage,
    keeping_all,
    parts_of,
    residents,
)
from fxmem.planning.ledger import Around, Part, step_peak

log = logging.getLogger("fxmem.backend")


class KnownSteps:
    """schedules: of whole steps.

    coming: of steps that were refused before all of their graphs were seen, bytes that came after a path.
    to_be_seen_again: paths of theirs that were not run since.
    """

    def __init__(self) -> None:
        self.schedules: dict[Path, Schedule] = {}
        self.coming: dict[Path, int] = {}
        self.to_be_seen_again: set[Path] = set()

    def learn(
        self,
        uses: Sequence[Seen],
        after: Outside | None,
        limit: Callable[[int], int | None],
        asked: int | None,
    ) -> None:
        """A step of these forwards is over: from now on its graphs share the budget.

        after: code after the last of them, if it counts.  limit: of bytes at the peak of the step with
        everything kept, the budget.  asked: the budget, if it is one of bytes.
        """
        keys = tuple(seen.key for seen in uses)
        # Within checkpoints, one program may have to wait until all else of a step is planned.
        new = [seen for seen in uses if not (seen.key.checkpoint and keys in self.schedules)]
        planned = all(not seen.program.provisional for seen in new)
        if planned and (after is None or keys in self.schedules):
            return  # nothing ran, or all of it as planned for this step
        last = [] if after is None else [after.last]
        parts = [*parts_of(uses), *last]
        resident = resident_bytes({**residents(uses), **(after or Outside()).leaves})
        if planned and asked is not None and step_peak(parts, resident) <= asked:
            return
        whole = [*parts_of(uses, keeping_all), *last]
        log.info(coverage(uses, after or Outside()))
        budget = limit(step_peak(whole, resident))
        if budget is None or step_peak(parts, resident) > budget:
            parts = as_small_as_can_be(uses, last, resident)
        if budget is not None and step_peak(parts, resident) > budget:
            log.info("the smallest plans of %d graphs need more than the budget", len(uses))
        inside = tuple(seen.program.whole for seen in uses)
        self.schedules[keys] = Schedule(keys, tuple(parts), tuple(whole), inside, resident, budget)

    def broken_off(self, seen: Sequence[Seen]) -> None:
        """A step was refused where more would have followed: none of its beginnings is a whole step."""
        path = tuple(use.key for use in seen)
        for place in range(len(path)):
            self.schedules.pop(path[:place], None)
        resident = resident_bytes(residents(seen))
        parts = parts_of(seen)
        for place in range(len(path)):
            after = sum(part.gradients for part in parts[place + 1 :])
            given = resident_bytes(residents(seen[: place + 1]))
            self.coming[path[: place + 1]] = after + resident - given
            self.to_be_seen_again.add(path[: place + 1])

    def beginning(self, path: Path) -> list[Schedule]:
        """Steps that begin so."""
        return _fitting_first(s for s in self.schedules.values() if s.keys[: len(path)] == path)

    def around(self, path: Path, earlier: Sequence[Part]) -> Around | None:
        """What a graph at the end of the path leaves room for, whatever of the known steps this is."""
        place = len(path) - 1
        found = [schedule.around(place, earlier) for schedule in self.beginning(path)]
        if not found:
            return None
        following = [(a.meanwhile, a.spare) for a in found if a.meanwhile is not None]
        meanwhile, spare = max(following, default=(None, 0))
        unchanged = max(a.unchanged or 0 for a in found)
        return Around(max(a.always for a in found), meanwhile, spare, unchanged=unchanged)

    def budget(self, path: Path) -> int | None:
        """In bytes; None for "min"."""
        return min((s.budget for s in self.beginning(path) if s.budget is not None), default=None)

    # -- Checkpoints -------------------------------------------------------------------------------------

    def with_checkpointed(self, call: Key) -> list[Schedule]:
        """Steps with this call of a graph in a checkpoint."""
        every = self.schedules.values()
        return _fitting_first(s for s in every if any(key.is_checkpointed(call) for key in s.keys))

    def around_checkpoints(
        self, call: Key, as_planned: Callable[[Schedule, int], Part | None]
    ) -> tuple[Around | None, int | None]:
        """What a graph in checkpoints leaves room for, wherever in the known steps, and the budget.

        as_planned: the bytes of a graph of a step, None if its plan is to come.  As long as one of them
        is needed and not there, nothing is known.
        """
        found, budgets = list[Around](), list[int | None]()
        for schedule in self.with_checkpointed(call):
            for place, key in enumerate(schedule.keys):
                if not key.is_checkpointed(call):
                    continue
                earlier = [as_planned(schedule, before) for before in range(place)]
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


def _fitting_first(schedules: Iterable[Schedule]) -> list[Schedule]:
    """Steps that count: such as were refused do where no others are left."""
    found = list(schedules)
    return [schedule for schedule in found if schedule.fits] or found
