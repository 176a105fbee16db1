"""Operator workspaces as functions of the sizes.

A table knows what an operator holds at the sizes where it ran.  Here each operator with symbolic
operands is measured at a few sizes around the example's, and polynomials in the monomials of its
operands and results are fitted; one that does not meet every measurement counts for nothing.  Then the
operator is measured again at every size that somebody asks for, and its formula is only a bound on
what was seen.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from fractions import Fraction
from typing import Any

import numpy as np
import sympy
import torch
from torch import fx
from torch.utils import _pytree as pytree

from fxmem._torch import storage_key
from fxmem.basics.polynomials import Monomials, Ranges, terms
from fxmem.basics.sizes import Size, by_stride, evaluate, hint, in_blocks, storages_in, tensors_in
from fxmem.graphs.workspace import LAYOUT, Call, Entry, TensorSpec, Workspaces, has_workspace

Rename = Callable[[Any], Any]
"""A size of a fake tensor -> an ``int``, or an expression in the user's symbols."""

MOST = 1 << 30
"""Bytes of operands beyond which an operator is not run to learn what it holds: formulas have to do."""

FAR, CHEAP = 8, 16 << 20
"""A far size is so many times the example's, where operands have at most so many bytes then."""

TOLERANCE = 0.0005
"""Of the bytes that an operator reads and makes; what a formula may be off by."""


@dataclass(frozen=True)
class Form:
    """What an operator holds beyond operands and results, and bytes of its results' storages.

    how: "constant", "fitted", "estimated" (nobody could measure it), or "measured": no formula fits,
    and ``nbytes`` is the largest share of the operands that was seen.  call: what to measure at other
    sizes; extra: bytes beside the operator's own, a generator's state.
    """

    nbytes: Size
    storages: tuple[Size, ...]
    how: str
    call: Call | None = None
    extra: int = 0


@dataclass
class Scaling:
    """Forms of the operators of one graph.  Measurements go into ``table``."""

    table: Workspaces
    device: torch.device
    ranges: Ranges
    example: Mapping[sympy.Symbol, int]
    rename: Rename
    allowed: Callable[[Mapping[sympy.Symbol, int]], bool] = lambda _: True
    forms: dict[fx.Node, Form] = field(default_factory=dict)
    _known: dict[Any, Form] = field(default_factory=dict)

    def look_at(self, graph: fx.Graph) -> None:
        """Find the forms of all operators of a graph that was calibrated at the example's sizes."""
        for node in graph.nodes:
            if node not in self.forms and has_workspace(node):
                self.forms[node] = self._form(node)

    def nbytes(self, node: fx.Node) -> Size:
        """The workspace of a node, as ``Workspaces.nbytes`` but for any size."""
        form = self.forms.get(node)
        return self.table.nbytes(node) if form is None else form.nbytes

    def storages(self) -> dict[int, Size]:
        """Storage key -> bytes, where the real storage is larger than its tensor."""
        found: dict[int, Size] = {}
        for node, form in self.forms.items():
            tensors = list(tensors_in(node.meta.get("val")))
            for tensor, nbytes in zip(tensors, form.storages, strict=False):
                found[storage_key(tensor)] = in_blocks(nbytes, tensor.device)
        return found

    def nbytes_at(self, node: fx.Node, bindings: Mapping[sympy.Symbol, int]) -> int | None:
        """The workspace at given sizes, measured there; None where it cannot be."""
        form = self.forms[node]
        if form.call is None:
            return None
        call = at(form.call, bindings)
        if call.signature not in self.table.table and call.operand_bytes() > MOST:
            return None
        entry = self.table.look_up(call, self.device)
        return None if entry is None else entry.nbytes + form.extra

    # -- One operator ----------------------------------------------------------------------------------

    def _form(self, node: fx.Node) -> Form:
        call = symbolic_call(node, self.rename)
        if call is None or not _symbols_of(call):
            return self._constant(node)
        key = (call.target, *map(_hashable, pytree.tree_leaves((call.args, call.kwargs))))
        if key not in self._known:
            self._known[key] = self._fitted(node, call)
        return self._known[key]

    def _constant(self, node: fx.Node) -> Form:
        return Form(self.table.nbytes(node), (), "constant")

    def _fitted(self, node: fx.Node, call: Call) -> Form:
        known = self.table.nbytes(node)
        here = self.table.look_up(at(call, self.example), self.device)
        points = self._diagonal(call)
        measured = self._measured(call, points)
        if here is None or len(measured) < 2:
            return Form(_in_proportion(known, self._held(node), self.example), (), "estimated")
        extra = known - here.nbytes  # beside the operator's own: the state of a generator
        if len({e.nbytes for e in measured}) > 1 or not self._as_fake(node, measured, points):
            points += [p for p in self._around(call) if p not in points]
            measured = self._measured(call, points)
        points = points[: len(measured)]
        basis = _basis([*self._operands(call), *self._held(node)])
        slack = [int(TOLERANCE * e.held) for e in measured]
        storages = self._storages(node, measured, basis, points)
        found = _fit([e.nbytes for e in measured], basis, points, slack)
        if found is not None:
            how = "constant" if found.is_Integer else "fitted"
            return Form(found + extra, storages, how, call, extra)
        worst = max(range(len(points)), key=lambda i: measured[i].nbytes / max(measured[i].held, 1))
        bound = _in_proportion(measured[worst].nbytes, self._held(node, call), points[worst])
        return Form(bound + extra, storages, "measured", call, extra)

    def _measured(self, call: Call, points: list[dict[sympy.Symbol, int]]) -> list[Entry]:
        """What the operator does at these sizes, up to the first where it cannot be measured."""
        found: list[Entry] = []
        for point in points:
            entry = self.table.look_up(at(call, point), self.device)
            if entry is None:
                break
            found.append(entry)
        return found

    def _as_fake(
        self, node: fx.Node, measured: list[Entry], points: list[dict[sympy.Symbol, int]]
    ) -> bool:
        """Are the results' storages as large as the fake ones at all these sizes?"""
        fake = [self.rename(t.untyped_storage().nbytes()) for t in tensors_in(node.meta.get("val"))]
        return all(
            evaluate(size, point) == real
            for entry, point in zip(measured, points, strict=False)
            for size, real in zip(fake, entry.storages, strict=False)
        )

    def _storages(
        self,
        node: fx.Node,
        measured: list[Entry],
        basis: list[sympy.Expr],
        points: list[dict[sympy.Symbol, int]],
    ) -> tuple[Size, ...]:
        """Storages of the results, where any is larger than fake tensors say."""
        fake = [self.rename(t.untyped_storage().nbytes()) for t in tensors_in(node.meta.get("val"))]
        found: list[Size] = []
        for i, size in enumerate(fake):
            if any(i >= len(e.storages) for e in measured):
                return ()
            real = [e.storages[i] for e in measured]
            # The fake storage was enlarged to the example's bytes, so its own size tells nothing.
            fitted = _fit(real, basis, points, [0] * len(real))
            found.append(size if fitted is None else fitted)
        return tuple(found)

    def _diagonal(self, call: Call) -> list[dict[sympy.Symbol, int]]:
        """The example's sizes, and about half and double of all at once."""
        symbols = sorted(_symbols_of(call), key=str)
        sizes = [self._sizes(s, call) for s in symbols]
        ends = [dict(zip(symbols, (s[i] for s in sizes), strict=True)) for i in (0, -1)]
        return self._distinct([{}, *ends])

    def _around(self, call: Call) -> list[dict[sympy.Symbol, int]]:
        """Sizes along each symbol, and the corners of each two."""
        symbols = sorted(_symbols_of(call), key=str)
        steps = {s: self._sizes(s, call) for s in symbols}
        changes = [{s: size} for s in symbols for size in steps[s]]
        changes += [
            {a: steps[a][i], b: steps[b][-1 - i]}
            for a, b in itertools.combinations(symbols, 2)
            for i in (0, -1)
        ]
        return self._distinct(changes)

    def _distinct(self, changes: list[dict[sympy.Symbol, int]]) -> list[dict[sympy.Symbol, int]]:
        found: list[dict[sympy.Symbol, int]] = []
        for change in changes:
            point = {**self.example, **change}
            if self.allowed(point) and point not in found:
                found.append(point)
        return found

    def _sizes(self, symbol: sympy.Symbol, call: Call) -> list[int]:
        """About half, once and twice the example's size, and a far one if that costs little."""
        low, high = self.ranges[symbol]
        here = self.example[symbol]
        wanted = {here, max(low, here // 2), here + max(1, here // 2), 2 * here}
        far = FAR * here if high is None else min(FAR * here, high)
        if at(call, {**self.example, symbol: far}).operand_bytes() <= CHEAP:
            wanted.add(far)
        return sorted(s for s in wanted if s >= low and (high is None or s <= high))

    def covers(self, bindings: Mapping[sympy.Symbol, int]) -> bool:
        """Are these sizes among those that every operator was measured at, or between them?"""
        return all(
            self.example[s] // 2 <= size <= 2 * self.example[s]
            for s, size in bindings.items()
            if s in self.example
        )

    def _operands(self, call: Call) -> Iterator[Size]:
        for spec in pytree.tree_leaves((call.args, call.kwargs)):
            if isinstance(spec, TensorSpec):
                yield _product(spec.shape) * spec.dtype.itemsize

    def _held(self, node: fx.Node, call: Call | None = None) -> list[Size]:
        results = [self.rename(n) for n in storages_in(node.meta.get("val")).values()]
        operands = [] if call is None else list(self._operands(call))
        inputs = [
            self.rename(n)
            for source in node.all_input_nodes
            for n in storages_in(source.meta.get("val")).values()
        ]
        return [*results, *(operands or inputs)]


# -- Calls with symbols --------------------------------------------------------------------------------


def symbolic_call(node: fx.Node, rename: Rename) -> Call | None:
    """The operator that a node runs, with sizes as expressions; None where strides have no formula."""
    try:
        return Call.of_node(node, lambda source: _symbolic_specs(source, rename))
    except _NoFormula:
        return None


class _NoFormula(Exception):
    pass


def _symbolic_specs(node: fx.Node, rename: Rename) -> Any:
    real = iter(node.meta[LAYOUT]) if LAYOUT in node.meta else None

    def spec(tensor: torch.Tensor) -> TensorSpec:
        shape = tuple(rename(s) for s in tensor.shape)
        strides = tuple(rename(s) for s in tensor.stride())
        if real is not None:
            strides = _strides_like(shape, next(real), tensor)
        room = rename(tensor.untyped_storage().nbytes()) // tensor.element_size()
        return TensorSpec(shape, strides, tensor.dtype, room - rename(tensor.storage_offset()))

    return pytree.tree_map(
        lambda v: (
            spec(v)
            if isinstance(v, torch.Tensor) and v.layout == torch.strided
            else (rename(v) if isinstance(v, torch.SymInt) else v)
        ),
        node.meta.get("val"),
    )


def _strides_like(shape: tuple[Any, ...], real: tuple[int, ...], tensor: torch.Tensor) -> Any:
    """Strides for any size, of a dense tensor whose strides at the example's sizes are ``real``."""
    found: list[Any] = [0] * len(shape)
    step: Any = 1
    expected = 1
    for d in reversed(by_stride(tensor.shape, real)):
        if real[d] != expected and hint(tensor.shape[d]) != 1:
            raise _NoFormula
        found[d] = step
        step = step * shape[d]
        expected *= hint(tensor.shape[d])
    return tuple(found)


def at(call: Call, bindings: Mapping[sympy.Symbol, int]) -> Call:
    """The call at given sizes."""
    sizes = dict(bindings)

    def number(value: Any) -> Any:
        return evaluate(value, sizes) if isinstance(value, sympy.Expr) else value

    def leaf(value: Any) -> Any:
        if not isinstance(value, TensorSpec):
            return number(value)
        shape, strides = tuple(map(number, value.shape)), tuple(map(number, value.strides))
        return replace(value, shape=shape, strides=strides, room=number(value.room))

    args, kwargs = pytree.tree_map(leaf, (call.args, call.kwargs))
    return Call(call.target, args, kwargs)


def _symbols_of(call: Call) -> set[sympy.Symbol]:
    found: set[sympy.Symbol] = set()
    for leaf in pytree.tree_leaves((call.args, call.kwargs)):
        parts = (*leaf.shape, *leaf.strides, leaf.room) if isinstance(leaf, TensorSpec) else (leaf,)
        found |= {s for p in parts if isinstance(p, sympy.Expr) for s in p.free_symbols}
    return found


def _hashable(leaf: Any) -> Any:
    try:
        hash(leaf)
    except TypeError:
        return repr(leaf)
    return (type(leaf), leaf)  # 1, 1.0 and True are different arguments


# -- Fitting -------------------------------------------------------------------------------------------


def _product(sizes: Iterable[Any]) -> Any:
    product: Any = 1
    for size in sizes:
        product = product * size
    return product


def _basis(sizes: list[Size]) -> list[sympy.Expr]:
    """One and the monomials of these sizes, and what divides those: B and S of B*S."""
    found: dict[sympy.Expr, None] = {sympy.S.One: None}
    for size in sizes:
        for monomial, _ in terms(size):
            powers = [
                [base**e for e in range(int(exponent) + 1)] if exponent.is_Integer else [base]
                for base, exponent in monomial.as_powers_dict().items()
                if base != 1
            ]
            for parts in itertools.product(*powers):
                found.setdefault(sympy.Mul(*parts), None)
    return sorted(found, key=lambda m: (_degree(m), str(m)))


def _degree(monomial: sympy.Expr) -> int:
    return sum(int(e) if e.is_Integer else 1 for e in monomial.as_powers_dict().values())


def _fit(
    values: list[int],
    basis: list[sympy.Expr],
    points: list[dict[sympy.Symbol, int]],
    slack: list[int],
) -> sympy.Expr | None:
    """A polynomial with whole coefficients through all values, the fewest monomials first.

    It must be met at more points than it has coefficients: a curve through as many proves nothing.
    """
    if len(set(values)) == 1:
        return sympy.Integer(values[0])
    monomials = Monomials()
    for m in basis:
        monomials.row(m)
    columns = np.array([[float(v) for v in monomials.values(p)] for p in points])
    names = list(monomials.index)
    for size in range(1, min(len(names), len(points) - 1) + 1):
        for chosen in itertools.combinations(range(len(names)), size):
            found = _solved(columns[:, chosen], values, slack)
            if found is not None:
                return sympy.Add(*(c * names[j] for c, j in zip(found, chosen, strict=True)))
        if size == 3:
            break
    return None


def _solved(columns: np.ndarray, values: list[int], slack: list[int]) -> list[int] | None:
    scale = np.abs(columns).max(axis=0)
    solution, _, rank, _ = np.linalg.lstsq(columns / scale, np.array(values, float), rcond=None)
    if rank < columns.shape[1]:
        return None
    whole = [round(c) for c in solution / scale]
    if any(c == 0 for c in whole):
        return None
    for row, value, off in zip(columns, values, slack, strict=True):
        if abs(sum(int(x) * c for x, c in zip(row, whole, strict=True)) - value) > off:
            return None
    return whole


def _in_proportion(
    nbytes: int, held: list[Size], bindings: Mapping[sympy.Symbol, int]
) -> sympy.Expr:
    """So many bytes at these sizes, growing as ``held`` does, rounded up."""
    whole: Any = sum(held, start=0)
    there = evaluate(whole, dict(bindings)) if isinstance(whole, sympy.Expr) else whole
    if not nbytes or not there or not isinstance(whole, sympy.Expr):
        return sympy.Integer(nbytes)
    share = Fraction(nbytes, there)
    return sympy.Add(*(-(-c * share.numerator // share.denominator) * m for m, c in terms(whole)))
