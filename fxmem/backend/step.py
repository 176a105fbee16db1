"""The step that is going on: its forwards so far, and what code that is in no graph left between them."""

from __future__ import annotations

import threading
import warnings
import weakref
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from fxmem import _torch
from fxmem._torch.saved import leads_to_ours, look_at_backwards
from fxmem.analysis.shards import resident_bytes
from fxmem.backend.outside import Outside, outside_of, storages
from fxmem.backend.schedule import Path, Seen, Use, path_of, residents
from fxmem.graphs.capture import StepCall
from fxmem.steps.analyze import device_of

if TYPE_CHECKING:
    from fxmem.backend.graph import Graph
    from fxmem.backend.program import Program

_MANY = 256
_MANY_WAITING = (
    f"fxmem: {_MANY} forwards wait for their backward, and what they saved is held until then. "
    "Where no backward follows, as in an evaluation, call the model under torch.no_grad()."
)


class Step:
    """Forwards that wait for their backward.

    longest: the most of them at once since the last step was planned.
    """

    def __init__(self, lock: threading.RLock) -> None:
        self.longest: list[Seen] = []
        self._lock = lock
        self._uses: list[weakref.ref[Use]] = []
        self._before: dict[Path, Outside] = {}
        self._after: dict[Path, Outside] = {}

    def outstanding(self) -> list[Seen]:
        """Forwards whose backward has not run, oldest first."""
        return [use.seen for use in self._waiting()]

    def _waiting(self) -> list[Use]:
        alive = [use for ref in self._uses if (use := ref()) is not None and not use.finished]
        self._uses = [weakref.ref(use) for use in alive]
        return alive

    def path(self, graph: Graph, args: Sequence[Any]) -> Path:
        """Where in this step the graph is called."""
        uses, frame = self._waiting(), _torch.checkpoint_around()
        key = graph.key(args)
        if frame is not None:
            last = uses[-1].seen.key.checkpoint if uses and uses[-1].frame == frame else 0
            new = 1 + max((use.seen.key.checkpoint for use in uses), default=0)
            key = key._replace(checkpoint=last or new)
        return path_of([use.seen for use in uses], key)

    def begin(self, path: Path, program: Program, args: Sequence[Any]) -> Use:
        """A forward that this step waits for from now on."""
        use = Use(self._seen(path, program, args), _torch.checkpoint_around())
        # The same in each step: there may be a whole model to walk through before a graph.
        self._before[path] = use.seen.outside
        self._uses.append(weakref.ref(use))
        if not any(keys[: len(path)] == path for keys in self._after):
            look_at_backwards(self._backward_begins)
        seen = self.outstanding()
        if len(seen) > len(self.longest):
            self.longest = seen
        if len(seen) == _MANY:
            warnings.warn(_MANY_WAITING, stacklevel=5)
        return use

    def up_to(self, path: Path, program: Program, args: Sequence[Any]) -> list[Seen]:
        """Its forwards, with one that may come next."""
        return [*self.outstanding(), self._seen(path, program, args)]

    def _seen(self, path: Path, program: Program, args: Sequence[Any]) -> Seen:
        outside = self.before(path, args)
        return Seen(path[-1], program, {**storages(args), **outside.leaves}, outside)

    # -- Code outside of its graphs ----------------------------------------------------------------------

    def before(self, path: Path, args: Sequence[Any]) -> Outside:
        """What code before this graph, and after those that wait for their backward, left there."""
        known = self._before.get(path)
        if known is not None:
            return known
        found = outside_of(args, self._known() | storages(args).keys(), device_of_inputs(args))
        # A leaf's second gradient is added to the first one at once.
        return replace(found, again=0)

    def seen_before(self, path: Path) -> Outside:
        """The same of a graph that has run at this place."""
        return self._before.get(path, Outside())

    def after(self, uses: Sequence[Seen]) -> Outside | None:
        """What code after the last of these left there, if more than is assumed of any loss."""
        found = self._after.get(tuple(seen.key for seen in uses))
        if found is None:
            return None
        last = uses[-1].program.part
        loss = last.boundary - last.held - last.tangents
        return found if found.gradients or found.nbytes > loss else None

    def _backward_begins(self, roots: Any) -> bool:
        """See what code after the last graph left there; was this the backward of graphs of a step?"""
        with self._lock:
            seen = self.outstanding()
            if not seen or not leads_to_ours(roots):
                return False
            device = torch.device(seen[-1].program.plan.device)
            keys = tuple(use.key for use in seen)
            self._after[keys] = outside_of(roots, self._known(), device)
            return True

    def _known(self) -> set[int]:
        """Storages that the graphs of this step are given, have made, or found there."""
        found: set[int] = set()
        for use in self.outstanding():
            found |= use.read.keys() | use.made | use.outside.saved.keys()
        return found

    def given(self, path: Path, args: Sequence[Any]) -> int:
        """Bytes of what the graphs of this step are given, up to one that is called with these."""
        uses = self.outstanding()
        given = {**residents(uses), **storages(args), **self.before(path, args).leaves}
        for use in uses:
            for key in use.made:
                given.pop(key, None)
        return resident_bytes(given)


def device_of_inputs(args: Sequence[Any]) -> torch.device:
    return device_of(StepCall(nn.Module(), tuple(args)))
