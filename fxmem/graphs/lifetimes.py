"""The memory of a step as a value: steps in program order, storages with their lifetimes, no graph.

Sizes are expressions in symbols that carry the user's names, so the same step can be looked at for
other sizes.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np

from fxmem.basics.errors import FxmemError
from fxmem.basics.sizes import Bindings, Size, evaluate, symbols

WORKSPACE = "workspace"
CATEGORIES = (
    "parameters",
    "buffers",
    "inputs",
    "constants",
    "outputs",
    "gradients",
    "saved activations",
    "transients",
    WORKSPACE,
)
"""What a byte can be, from what always stays to what goes at once; a loss outside works, too."""


@dataclass(frozen=True)
class Point:
    """One operator that runs, in the user's words.  workspace: bytes that it holds while it runs."""

    operator: str
    module: str
    source: str
    phase: str
    workspace: Size


@dataclass(frozen=True)
class Lifetime:
    """One storage.

    born, dies: steps, both included.  origin: the node that it is made again for; empty where it is
    made for the first time.  values: all that the storage is called, one of which a decision may be about.
    """

    name: str
    type: str
    nbytes: Size
    born: int
    dies: int
    category: str
    module: str
    source: str
    origin: str = ""
    values: tuple[str, ...] = ()


@dataclass(frozen=True)
class Memory:
    """One step.  symbols: the user's name -> size in the example."""

    points: tuple[Point, ...]
    lifetimes: tuple[Lifetime, ...]
    symbols: dict[str, int] = field(default_factory=dict)

    def live_bytes(self, **sizes: int) -> np.ndarray:
        """int64[steps]: bytes held while each step runs; sizes not given are the example's.

        Workspaces of operators are those of the example where they are numbers.
        """
        nothing = np.zeros(len(self.points), dtype=np.int64)
        return sum(self.by_category(**sizes).values(), start=nothing)

    def by_category(self, **sizes: int) -> dict[str, np.ndarray]:
        """``live_bytes`` of each category that has any, in a fixed order."""
        bindings = self._bindings(sizes)
        changes: dict[str, np.ndarray] = defaultdict(
            lambda: np.zeros(len(self.points) + 1, dtype=np.int64)
        )
        for one in self.lifetimes:
            nbytes = evaluate(one.nbytes, bindings)
            changes[one.category][one.born] += nbytes
            changes[one.category][one.dies + 1] -= nbytes
        found = {name: np.cumsum(change)[:-1] for name, change in changes.items()}
        work = np.array([evaluate(p.workspace, bindings) for p in self.points], dtype=np.int64)
        found[WORKSPACE] = found.get(WORKSPACE, 0) + work
        return {name: found[name] for name in CATEGORIES if name in found and found[name].any()}

    def peak_at(self, **sizes: int) -> int:
        """Bytes at the peak.  Raises ``FxmemError`` for a symbol that the step does not have."""
        return int(self.live_bytes(**sizes).max(initial=0))

    @cached_property
    def live(self) -> np.ndarray:
        """``live_bytes`` at the example."""
        return self.live_bytes()

    @property
    def peak(self) -> int:
        """The step at which the example peaks."""
        return int(self.live.argmax()) if len(self.live) else 0

    def _bindings(self, sizes: dict[str, int]) -> Bindings:
        unknown = sorted(set(sizes) - set(self.symbols))
        if unknown:
            raise FxmemError(f"no symbol {', '.join(unknown)}; known: {sorted(self.symbols)}")
        return symbols({**self.symbols, **sizes})


@dataclass(frozen=True)
class BeforeAfter:
    """A step with everything kept, and as it was planned."""

    before: Memory
    after: Memory
