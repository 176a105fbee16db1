"""Bytes as polynomials in the sizes: many at once as rows of integers, and the few that can be largest.

A row holds one coefficient for each monomial.  What is no polynomial, such as a rounded division,
counts as one more variable of which nothing is known but its sign.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache
from typing import Any

import numpy as np
import sympy

from fxmem.basics.sizes import Size

Ranges = Mapping[sympy.Symbol, tuple[int, "int | None"]]
"""Symbol -> smallest and largest size; None: any from the smallest on."""


@lru_cache(maxsize=100_000)
def terms(size: Size) -> tuple[tuple[sympy.Expr, int], ...]:
    """Monomials and their whole coefficients; an expression that has none such is one monomial."""
    if isinstance(size, int):
        return ((sympy.S.One, size),) if size else ()
    found = sympy.expand(size).as_coefficients_dict()
    if any(not c.is_Integer for c in found.values()):
        return ((size, 1),)
    return tuple((m, int(c)) for m, c in found.items() if c)


class Monomials:
    """Numbers for monomials, in the order in which they are met."""

    def __init__(self) -> None:
        self.index: dict[sympy.Expr, int] = {}

    def row(self, size: Size) -> dict[int, int]:
        """Number of each monomial -> coefficient."""
        return {self.index.setdefault(m, len(self.index)): c for m, c in terms(size)}

    def matrix(self, rows: Iterable[Mapping[int, int]]) -> np.ndarray:
        """Python integers, exact at any size: one row each."""
        rows = list(rows)
        found = np.zeros((len(rows), len(self.index)), dtype=object)
        for i, row in enumerate(rows):
            for j, c in row.items():
                found[i, j] += c
        return found

    def values(self, bindings: Mapping[sympy.Symbol, int]) -> np.ndarray:
        """Each monomial at given sizes."""
        # One that divides with rounding is evaluated by sympy, plain ones by multiplication.
        return np.array([_value(m, bindings) for m in self.index], dtype=object)

    def expression(self, row: Sequence[int]) -> sympy.Expr:
        pairs = zip(self.index, row, strict=True)
        return sympy.Add(*(sympy.Integer(c) * m for m, c in pairs if c))


def _value(monomial: sympy.Expr, bindings: Mapping[sympy.Symbol, int]) -> int:
    product = 1
    for base, exponent in monomial.as_powers_dict().items():
        if base.is_Symbol:
            product *= bindings[base] ** int(exponent)
        else:
            product *= int(base.subs(bindings)) ** int(exponent)
    return product


# -- Which of many can be the largest ----------------------------------------------------------------


def undominated(matrix: np.ndarray, monomials: Monomials, ranges: Ranges) -> list[int]:
    """Rows that may be the largest somewhere in the ranges; of equal ones the first.

    The others are nowhere larger than one that is listed, which is proven: their difference, written
    around the smallest sizes (between the smallest and the largest, where there is one), has no
    negative coefficient.
    """
    coordinates = matrix @ _transform(list(monomials.index), ranges)
    order = sorted(range(len(matrix)), key=lambda i: (-sum(coordinates[i]), i))
    kept: list[int] = []
    seen: set[tuple[int, ...]] = set()
    for i in order:
        row = tuple(coordinates[i])
        if row in seen:
            continue
        seen.add(row)
        if not any(_covers(coordinates[k], row) for k in reversed(kept)):
            kept.append(i)
    return _without_mixtures(kept, coordinates)


def _without_mixtures(kept: list[int], coordinates: np.ndarray) -> list[int]:
    """Without rows that a mixture of two others covers: nothing is larger than both of its parts."""
    left = list(kept)
    for small in reversed(kept):
        others = [k for k in left if k != small]
        pairs = itertools.combinations(others, 2)
        target = coordinates[small]
        if any(_mixture_covers(coordinates[a], coordinates[b], target) for a, b in pairs):
            left = others
    return left


def _mixture_covers(a: Sequence[int], b: Sequence[int], small: Sequence[int]) -> bool:
    """Is there a share from 0 to 1 such that share * a + (1 - share) * b covers ``small``?"""
    low, high = Fraction(0), Fraction(1)
    for x, y, z in zip(a, b, small, strict=True):
        if x == y:
            if y < z:
                return False
            continue
        bound = Fraction(z - y, x - y)
        low, high = (max(low, bound), high) if x > y else (low, min(high, bound))
        if low > high:
            return False
    return True


def _covers(large: Sequence[int], small: Sequence[int]) -> bool:
    return all(a >= b for a, b in zip(large, small, strict=True))


@dataclass(frozen=True)
class _Variable:
    """A symbol, or an expression that is taken for one.  signed: it may be negative."""

    base: sympy.Expr
    low: int
    high: int | None
    degree: int
    signed: bool = False


def _transform(monomials: list[sympy.Expr], ranges: Ranges) -> np.ndarray:
    """A matrix that turns coefficients into ones whose signs tell of the sign on the ranges."""
    powers = [{b: int(e) for b, e in m.as_powers_dict().items() if b != 1} for m in monomials]
    degrees: dict[sympy.Expr, int] = {}
    for power in powers:
        for base, exponent in power.items():
            degrees[base] = max(degrees.get(base, 0), exponent)
    variables = [_variable(base, degree, ranges) for base, degree in degrees.items()]
    signed = {v.base for v in variables if v.signed}
    plain = [v for v in variables if not v.signed]
    tables = [_table(v) for v in plain]
    # Of all products of powers only those that occur: rounded sizes are many variables.
    columns: dict[Any, int] = {}
    entries: list[tuple[int, int, int]] = []
    for i, power in enumerate(powers):
        if signed & power.keys():  # a difference that has it proves nothing: it must not differ
            for sign in (1, -1):
                entries.append((i, columns.setdefault((i, sign), len(columns)), sign))
            continue
        rows = (t[power.get(v.base, 0)] for t, v in zip(tables, plain, strict=True))
        for term in itertools.product(*([(k, c) for k, c in enumerate(row) if c] for row in rows)):
            column = tuple((n, k) for n, (k, _) in enumerate(term) if k)
            at = columns.setdefault(column, len(columns))
            entries.append((i, at, math.prod(c for _, c in term)))
    found = np.zeros((len(monomials), len(columns)), dtype=object)
    for i, at, coefficient in entries:
        found[i, at] = coefficient
    return found


def _variable(base: sympy.Expr, degree: int, ranges: Ranges) -> _Variable:
    if base in ranges:
        low, high = ranges[base]
        return _Variable(base, low, high, degree)
    return _Variable(base, 0, None, degree, signed=not _is_positive(base, ranges))


_KEEP_SIGN = {"Add", "CeilDiv", "CleanDiv", "FloorDiv", "Max", "Min", "Mod", "Mul", "Pow", "PythonMod",
              "ceiling", "floor"}  # fmt: skip
"""What makes nothing negative of what is not: sympy's, and those that tracing adds."""


def _is_positive(expression: sympy.Expr, ranges: Ranges) -> bool:
    """Is it certainly not negative?"""
    if expression.is_Number:
        return bool(expression >= 0)
    if expression.is_Symbol:
        return expression in ranges
    known = type(expression).__name__ in _KEEP_SIGN
    return known and all(_is_positive(part, ranges) for part in expression.args)


def _table(v: _Variable) -> list[list[int]]:
    """x^i around ``low``, by i: powers of x - low; or Bernstein coefficients up to ``high``."""
    shifted = [
        [math.comb(i, k) * v.low ** (i - k) if k <= i else 0 for k in range(v.degree + 1)]
        for i in range(v.degree + 1)
    ]
    if v.high is None:
        return shifted
    width, d = v.high - v.low, v.degree
    scale = math.lcm(*(math.comb(d, i) for i in range(d + 1)))
    bernstein = [
        [
            math.comb(j, k) * scale // math.comb(d, k) * width**k if k <= j else 0
            for j in range(d + 1)
        ]
        for k in range(d + 1)
    ]
    return [
        [sum(row[k] * bernstein[k][j] for k in range(d + 1)) for j in range(d + 1)]
        for row in shifted
    ]


# -- Where each is the largest -----------------------------------------------------------------------

FAR = 1 << 24
"""Sizes beyond this are not looked at."""


def reigns(
    rows: Sequence[sympy.Expr], symbol: sympy.Symbol, low: int, high: int | None
) -> list[list[tuple[int, int | None]]]:
    """For expressions in one symbol, the stretches of sizes where each is the largest, ties to the first.

    Exact for polynomials; where an expression is none, at the sizes that were looked at.
    """
    end = min(high or FAR, FAR)
    points = {low, end}
    for a, b in itertools.combinations(rows, 2):
        for root in _roots(a - b, symbol):
            points.update(p for p in (math.floor(root), math.ceil(root)) if low <= p <= end)
            points.update(p for p in (math.floor(root) + 1,) if low <= p <= end)
    evaluate = [sympy.lambdify(symbol, row, "math") for row in rows]
    found: list[list[tuple[int, int | None]]] = [[] for _ in rows]
    ordered = sorted(points)
    winners = [max(range(len(rows)), key=lambda r: (evaluate[r](p), -r)) for p in ordered]
    start = 0
    for i in range(1, len(ordered) + 1):
        if i < len(ordered) and winners[i] == winners[start]:
            continue
        last = ordered[i - 1] if i < len(ordered) else end
        open_end = i == len(ordered) and high is None
        found[winners[start]].append((ordered[start], None if open_end else last))
        start = i
    return found


def _roots(difference: sympy.Expr, symbol: sympy.Symbol) -> list[float]:
    try:
        coefficients: Any = sympy.Poly(difference, symbol).all_coeffs()
    except sympy.PolynomialError:
        return []
    if len(coefficients) < 2:
        return []
    return [r.real for r in np.roots([float(c) for c in coefficients]) if abs(r.imag) < 1e-6]
