"""Closed forms of a step's bytes: at each step a polynomial in the sizes, the peak the largest of a few.

Lifetimes do not depend on sizes, so the bytes that are live at a step are a sum of storages' sizes, and
the peak is the maximum over steps.  Of the steps only those stay that are somewhere the largest.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import sympy

from fxmem.basics.polynomials import Monomials, Ranges, reigns, undominated
from fxmem.basics.sizes import Size

Sizes = Mapping[sympy.Symbol, int]
Reign = tuple[int, "int | None"]


@dataclass(frozen=True)
class Bytes:
    """Bytes that are live from the step ``born`` (-1: before the first) to ``dies``, both included."""

    nbytes: Size
    born: int
    dies: int
    category: str


@dataclass(frozen=True)
class Work:
    """What the operator of a step holds beside them.

    at: measures that at given sizes, None where it cannot.  loose: ``nbytes`` is no formula, only the
    largest share of its operands that was seen.
    """

    nbytes: Size
    category: str = "operator workspace"
    at: Callable[[Sizes], int | None] | None = None
    loose: bool = False


@dataclass(frozen=True)
class Ruler:
    """A step that is the peak for some sizes.

    rules: symbol -> the stretches of its sizes for which it is, all others being the example's.
    """

    expression: sympy.Expr
    step: int
    nbytes: int
    rules: dict[str, list[Reign]]


class Forms:
    """The closed forms of one step over ranges of sizes."""

    def __init__(self, storages: list[Bytes], work: list[Work], ranges: Ranges, here: Sizes):
        self.storages = storages
        self.work = work
        self.ranges = ranges
        self.here = here
        self.monomials = Monomials()
        changes: list[dict[int, int]] = [defaultdict(int) for _ in range(len(work) + 1)]
        for storage in storages:
            for j, c in self.monomials.row(storage.nbytes).items():
                changes[max(storage.born, 0)][j] += c
                changes[storage.dies + 1][j] -= c
        worked = [self.monomials.row(w.nbytes) for w in work]
        held = np.cumsum(self.monomials.matrix(changes), axis=0)[:-1]
        self._held = held
        self._live = held + self.monomials.matrix(worked)

    @property
    def coefficients(self) -> np.ndarray:
        """One row a step, one column a monomial: the bytes that are live."""
        return self._live

    def live(self, sizes: Sizes) -> np.ndarray:
        """Bytes while each step runs, Python integers, by the forms."""
        return self._live @ self.monomials.values(sizes)

    def by_form(self, sizes: Sizes) -> int:
        """Bytes at the peak as the forms say, which need not hold far from where they were fitted."""
        return int(max(self._live[self._rulers] @ self.monomials.values(sizes), default=0))

    def peak_at(self, sizes: Sizes, near: bool = True) -> int:
        """Bytes at the peak: the operators there are measured at these sizes, if they can be.

        near: formulas are trusted to tell which those are; otherwise every operator is measured.
        """
        values = self.monomials.values(sizes)
        held, live = self._held @ values, self._live @ values
        likely = live + np.array([w.loose for w in self.work], dtype=object) * (live - held)
        best = 0
        for i in sorted(range(len(live)), key=lambda i: -likely[i]):
            if near and likely[i] <= best:
                break
            exact = self.work[i].at
            work = exact(sizes) if exact is not None else None
            best = max(best, int(live[i] if work is None else held[i] + work))
        return best

    @cached_property
    def _rulers(self) -> list[int]:
        """Steps that may be the peak, the one that is it in the example first."""
        rows: dict[tuple[int, ...], int] = {}
        for i, row in enumerate(self._live):
            rows.setdefault(tuple(row), i)
        steps = list(rows.values())
        kept = undominated(self._live[steps], self.monomials, self.ranges)
        live = self._live @ self.monomials.values(self.here)
        return sorted((steps[k] for k in kept), key=lambda i: (-live[i], i))

    @cached_property
    def peak(self) -> sympy.Expr:
        """The peak as an expression: one polynomial, or the ``Max`` of a few."""
        found = [self.expression(i) for i in self._rulers]
        return found[0] if len(found) == 1 else sympy.Max(*found, evaluate=False)

    @cached_property
    def rulers(self) -> list[Ruler]:
        """The steps of ``peak``, the example's peak first."""
        steps = self._rulers
        expressions = [self.expression(i) for i in steps]
        rules: list[dict[str, list[Reign]]] = [{} for _ in steps]
        for symbol, (low, high) in self.ranges.items():
            others = {s: n for s, n in self.here.items() if s != symbol}
            lines = [e.subs(others) for e in expressions]
            for entry, stretches in zip(rules, reigns(lines, symbol, low, high), strict=True):
                entry[str(symbol)] = stretches
        live = self._live @ self.monomials.values(self.here)
        entries = zip(expressions, steps, rules, strict=True)
        return [Ruler(e, i, int(live[i]), rule) for e, i, rule in entries]

    def expression(self, step: int) -> sympy.Expr:
        """Bytes that are live while a step runs."""
        return self.monomials.expression(self._live[step])

    def categories(self, step: int) -> dict[str, sympy.Expr]:
        """What is live at a step, by category; they add up to ``expression(step)``."""
        found: dict[str, sympy.Expr] = {}
        for storage in self.storages:
            if storage.born <= step <= storage.dies:
                found[storage.category] = found.get(storage.category, 0) + storage.nbytes
        work = self.work[step]
        if work.nbytes != 0:
            found[work.category] = found.get(work.category, 0) + work.nbytes
        return {c: sympy.expand(e) for c, e in found.items() if e != 0}
