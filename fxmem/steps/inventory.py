"""The bytes of a training step as a table and as closed forms: what ``fxmem.liveness`` returns."""

from __future__ import annotations

import difflib
import html
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import sympy
from tabulate import tabulate, tabulate_formats

from fxmem.analysis.forms import Reign
from fxmem.basics.errors import FixedSizeError, FxmemError
from fxmem.basics.sizes import symbol, symbols
from fxmem.basics.tables import WIDTH, clean, cut, starred, table, unnumbered
from fxmem.basics.units import format_bytes
from fxmem.graphs.boundary import FARTHEST, largest


@dataclass(frozen=True)
class Row:
    """One storage, or ``n`` equal ones of equal blocks.

    node: name of the node that makes it, or the user's name of a parameter or an input.  shape: of the
    tensor that fills it.  bytes: in the symbols; nbytes: at the hint, of one.  born, dies: steps, -1
    before the first.  at_peak: is it live at the peak at the hint?  aliases: nodes that look at it
    through views.  users: the operators that read it.
    """

    node: str
    operator: str
    shape: tuple[str, ...]
    dtype: str
    bytes: sympy.Expr
    nbytes: int
    born: int
    dies: int
    at_peak: bool
    category: str
    aliases: tuple[str, ...]
    users: tuple[str, ...]
    module: str
    source: str
    ordinal: int = 0
    n: int = 1

    @property
    def mib(self) -> float:
        return self.nbytes / 2**20

    @property
    def total(self) -> int:
        """Bytes of all ``n`` at the hint."""
        return self.n * self.nbytes

    def to_dict(self) -> dict[str, Any]:
        return {**asdict(replace(self, bytes=sympy.S.Zero)), "bytes": str(self.bytes)}


@dataclass(frozen=True)
class Point:
    """One step of the program: the operator that runs, and the bytes that are live at the hint."""

    node: str
    operator: str
    module: str
    source: str
    phase: str
    nbytes: int


@dataclass(frozen=True)
class Peak:
    """A program point that is the peak for some sizes.

    expression: the bytes that are live there, ``categories`` adding up to it.  nbytes: at the hint.
    rules: symbol -> stretches of its sizes for which this is the peak, the others at the hint; (2,
    None) is from 2 on.
    """

    expression: sympy.Expr
    nbytes: int
    step: int
    point: Point
    rules: Mapping[str, Sequence[Reign]]
    categories: Mapping[str, sympy.Expr]

    @property
    def node(self) -> str:
        return self.point.node

    def where(self) -> str:
        """``B from 2 on; S from 5 to 942``"""
        parts = [
            f"{name} {' and '.join(_stretch(s) for s in stretches)}"
            for name, stretches in self.rules.items()
            if stretches
        ]
        return "; ".join(parts) or "elsewhere"


def _stretch(reign: Reign) -> str:
    low, high = reign
    if high is None:
        return f"from {low} on"
    return str(low) if low == high else f"from {low} to {high}"


@dataclass(frozen=True)
class SymbolInfo:
    """A symbol: its size in the table, the sizes for which the forms hold, and where it comes from."""

    name: str
    hint: int
    low: int
    high: int | None
    where: tuple[str, ...]


COLUMNS = (
    "node", "shape", "dtype", "bytes", "MiB", "n", "born", "dies", "at peak", "category", "aliases",
    "users", "module", "source",
)  # fmt: skip

_SORTS: dict[str, Callable[[Row], Any]] = {
    "bytes": lambda r: -r.total,
    "born": lambda r: r.born,
    "dies": lambda r: r.dies,
    "life": lambda r: r.born - r.dies,
    "node": lambda r: r.node,
    "module": lambda r: r.module,
    "category": lambda r: r.category,
}


@dataclass(frozen=True)
class Liveness:
    """When each storage of a training step is born and dies, and what the step peaks at.

    The step is the captured one with everything kept: what ``fxmem.optimize`` runs when the budget
    leaves room.  Sizes in bytes; expressions are sympy's, in the symbols of ``symbols``.

    model, device: of the step.  peak: the largest bytes of any step, a polynomial or the ``Max`` of a
    few.  peaks: those, each with its program point, the peak at the hint first.  points: the steps in
    program order.  outside: bytes beside the step, such as the optimizer's state, by category; they are in
    no peak.  rough: what some operators hold follows no polynomial, so that far from the hint ``peak`` may
    be off, and ``peak_at`` is not.  assumptions: relations between sizes for which alone the forms hold.
    notes: what a reader should know, such as sizes that are constants.  fixed: symbols whose size is a
    constant in the user's code, and what to say of it.
    """

    model: str
    device: str
    symbols: Mapping[str, SymbolInfo]
    peak: sympy.Expr
    peaks: tuple[Peak, ...]
    points: tuple[Point, ...]
    storages: tuple[Row, ...]
    assumptions: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    outside: Mapping[str, int] = field(default_factory=dict)
    rough: bool = False
    fixed: Mapping[str, FixedSizeError] = field(default_factory=dict)
    monomials: tuple[sympy.Expr, ...] = ()
    live: Iterable[Sequence[int]] = field(default=(), repr=False)
    peak_of: Callable[[Mapping[str, int]], int] = field(default=lambda _: 0, repr=False)
    unchanged_of: Callable[[Mapping[str, int]], int] = field(default=lambda _: 0, repr=False)

    @property
    def hint(self) -> dict[str, int]:
        return {name: info.hint for name, info in self.symbols.items()}

    @property
    def peak_nbytes(self) -> int:
        """Bytes at the peak at the hint."""
        return self.peak_at()

    @property
    def categories(self) -> dict[str, sympy.Expr]:
        """What is live at the peak at the hint, by category; and what is there beside the step."""
        beside = {name: sympy.Integer(nbytes) for name, nbytes in self.outside.items()}
        return {**self.peaks[0].categories, **beside}

    def peak_at(self, **sizes: int) -> int:
        """Bytes at the peak for these sizes; symbols that are not named have their hint's.

        By the closed forms, where they hold for these sizes; otherwise (a size of 1, a kernel that
        serves small batches alone) the step is traced once more, for a form that does.  What operators
        hold inside is measured at the sizes asked for, where the device is at hand and has room.
        Raises ``FxmemError`` for an unknown symbol or a size that is no positive integer.
        """
        return self.peak_of(self.sizes(sizes))

    def form_at(self, sizes: Mapping[str, int]) -> int:
        """``peak`` at these sizes of all symbols, whether it holds for them or not."""
        values = {symbol: sizes[str(symbol)] for symbol in self.peak.free_symbols}
        parts = self.peak.args if isinstance(self.peak, sympy.Max) else (self.peak,)
        return max(int(part.subs(values)) for part in parts)

    def unchanged_at(self, **sizes: int) -> int:
        """Bytes at the peak of the model's own step, as eager PyTorch runs it without fxmem.

        Found by running it on fake tensors of these sizes.  Raises as ``peak_at``.
        """
        return self.unchanged_of(self.sizes(sizes))

    def sizes(self, given: Mapping[str, int]) -> dict[str, int]:
        """These sizes and the hint's.  Raises ``FxmemError`` for what is none."""
        for name, size in given.items():
            if name not in self.symbols:
                near = difflib.get_close_matches(name, self.symbols, 1)
                known = ", ".join(self.symbols) or "none: no size is a symbol here"
                hint = f"; did you mean {near[0]}?" if near else ""
                raise FxmemError(f"there is no symbol {name!r}; the step has {known}{hint}")
            if isinstance(size, bool) or not isinstance(size, int) or size < 1:
                raise FxmemError(f"{name} should be a positive integer, not {size!r:.80}")
        return {**self.hint, **given}

    def largest(
        self,
        name: str,
        budget: int,
        *,
        sizes: Mapping[str, int] | None = None,
        peak: int | None = None,
        high: int | None = None,
    ) -> int | None:
        """The largest size of a symbol that fits by the closed form alone; ``max_batch`` settles it.

        budget: bytes.  sizes: of the other symbols, by default the hint's.  peak: bytes of another step at
        these and the hint of ``name``, such as the model's own: the form is taken in proportion to it.
        high: no size above is looked for.  0 where not even 1 fits, None where all sizes do.
        """
        if symbol(name) not in self.peak.free_symbols:
            return None
        here = {**self.sizes(sizes or {}), name: self.hint[name]}
        whole = self.form_at(here)
        within = budget if peak is None else budget * whole // max(peak, 1)
        found = largest(
            lambda size: self.form_at({**here, name: size}), within, here[name], 1, high
        )
        return None if found == FARTHEST else found or 0

    # -- Rows ------------------------------------------------------------------------------------------

    def rows(
        self,
        sort: str = "born",
        *,
        where: Callable[[Row], bool] | None = None,
        category: str | None = None,
        module: str | None = None,
        at_peak: bool | None = None,
        top: int | None = None,
        fold: bool = False,
    ) -> list[Row]:
        """The storages: one row each; with ``fold``, one for equal ones of equal blocks.

        sort: "bytes" (most first), "born", "dies", "life" (longest first), "node", "module" or
        "category".  where: keeps rows for which it is true.  category, module (and what is below
        it), at_peak: keep rows that have these.  top: only so many.
        Raises ``FxmemError`` for an unknown sort.
        """
        if sort not in _SORTS:
            near = difflib.get_close_matches(str(sort), _SORTS, 1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise FxmemError(f"sort should be one of {', '.join(_SORTS)}, not {sort!r}{hint}")
        found: Iterable[Row] = self.storages
        if category is not None:
            found = (r for r in found if r.category == category)
        if module is not None:
            found = (r for r in found if f"{r.module}.".startswith(f"{module}."))
        if at_peak is not None:
            found = (r for r in found if r.at_peak == at_peak)
        if where is not None:
            found = filter(where, found)
        rows = folded_rows(found) if fold else list(found)
        return sorted(rows, key=_SORTS[sort])[:top]

    def table(
        self,
        format: str = "plain",
        *,
        columns: Sequence[str] = COLUMNS,
        sort: str = "born",
        top: int | None = None,
        fold: bool = False,
        **filters: Any,
    ) -> str:
        """The rows as text in one of tabulate's formats: "plain", "github", "html", "latex", ...

        columns: some of ``COLUMNS``; the others as ``rows`` takes them.
        Raises ``FxmemError`` for an unknown format or column.
        """
        if format not in tabulate_formats:
            near = difflib.get_close_matches(str(format), tabulate_formats, 1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise FxmemError(f"unknown table format {format!r}{hint}")
        if unknown := [c for c in columns if c not in COLUMNS]:
            raise FxmemError(f"unknown columns {unknown}; known are {', '.join(COLUMNS)}")
        rows = self.rows(sort, top=top, fold=fold, **filters)
        cells = [[clean(_cell(row, column)) for column in columns] for row in rows]
        sides = ["right" if c in ("MiB", "n", "born", "dies") else "left" for c in columns]
        return tabulate(
            cells,
            headers=list(columns),
            tablefmt=format,
            disable_numparse=True,
            colalign=sides if cells else None,
        )

    # -- Out -------------------------------------------------------------------------------------------

    def to_dict(self, steps: bool = True) -> dict[str, Any]:
        """Everything, ready for JSON; expressions as text.

        ``{"schema": 1, "model", "device", "symbols": {name: {"name", "hint", "low", "high", "where"}},
        "peak": {"expression", "nbytes"}, "peaks": [{"expression", "nbytes", "step", "node", "operator",
        "module", "source", "phase", "rules": {symbol: [[low, high or null], ...]}, "categories": {name:
        expression}}], "categories": {name: {"expression", "nbytes"}}, "rows": [...] (the fields of
        ``Row``), "assumptions": [...], "notes": [...]}``.  With ``steps`` also ``"steps": [{"node",
        "operator", "module", "source", "phase", "nbytes"}, ...]``, and the bytes that are live at each
        as a polynomial: ``"monomials": [{"text": "B*S", "powers": {"B": 1, "S": 1}}, ...]`` (powers is
        null for what is no product of symbols) and ``"live": [[coefficient, ...], ...]``, one row a
        step, one column a monomial.
        """
        here = symbols(self.hint)
        found: dict[str, Any] = {
            "schema": 1,
            "model": self.model,
            "device": self.device,
            "symbols": {name: asdict(info) for name, info in self.symbols.items()},
            "peak": {"expression": str(self.peak), "nbytes": self.peak_nbytes},
            "peaks": [_peak_dict(p) for p in self.peaks],
            "categories": {
                name: {"expression": str(e), "nbytes": int(e.subs(here))}
                for name, e in self.categories.items()
            },
            "rows": [row.to_dict() for row in self.storages],
            "assumptions": list(self.assumptions),
            "notes": list(self.notes),
        }
        if steps:
            found["steps"] = [asdict(point) for point in self.points]
            found["monomials"] = [_monomial(m) for m in self.monomials]
            found["live"] = [[int(c) for c in row] for row in self.live]
        return found

    def __str__(self) -> str:
        return "\n".join((*self.head(), "", self.narrow()))

    def head(self) -> list[str]:
        """The peak, its closed form and what to know about it, in lines of at most 100 columns."""
        sizes = ", ".join(f"{n}={info.hint}" for n, info in self.symbols.items())
        at = f" at {sizes}" if sizes else ""
        point = self.peaks[0].point
        place = " ".join(filter(None, (point.operator, point.source, point.module)))
        lines = [
            f"{self.model} on {self.device}: peak {format_bytes(self.peak_nbytes)}{at}, at step "
            f"{self.peaks[0].step} of {len(self.points)}, {place}",
            f"peak = {self.peak}" if len(self.peaks) == 1 else f"peak = Max of {len(self.peaks)}:",
        ]
        if len(self.peaks) > 1:
            shown = [p for p in self.peaks if any(p.rules.values())]
            lines += [f"  {p.expression}   {p.point.operator}: {p.where()}" for p in shown]
            if rest := len(self.peaks) - len(shown):
                lines.append(f"  {rest} more, each the largest at other sizes, if anywhere")
        lines += [f"{what}: {format_bytes(n)} beside that" for what, n in self.outside.items()]
        lines += [f"note: {note}" for note in self.notes]
        return [cut(clean(line), WIDTH) for line in lines]

    def narrow(self, sort: str = "born", **filters: Any) -> str:
        """The rows as a table of at most 100 columns, its text cut; arguments as ``rows`` takes them."""
        columns = (
            "node",
            "shape",
            "dtype",
            "bytes",
            "MiB",
            "born",
            "dies",
            "at peak",
            "aliases",
            "users",
            "module",
            "source",
        )
        rows = [[_cell(row, column) for column in columns] for row in self.rows(sort, **filters)]
        if not rows:
            return "no storages"
        needs = {0: 12, 1: 9, 2: WIDTH, 3: 9, 7: WIDTH, 8: 6, 9: 8, 10: 8, 11: 8}
        lines = table(columns, rows, "llllrrrlllll", needs)
        return "\n".join(line[:WIDTH] for line in lines)

    def _repr_html_(self) -> str:
        head = html.escape("\n".join(self.head()))
        return f"<pre>{head}</pre>{self.table('html', sort='bytes', top=50, fold=True)}"


def _peak_dict(peak: Peak) -> dict[str, Any]:
    point = {k: v for k, v in asdict(peak.point).items() if k != "nbytes"}
    return {
        "expression": str(peak.expression),
        "nbytes": peak.nbytes,
        "step": peak.step,
        **point,
        "rules": {name: [list(s) for s in stretches] for name, stretches in peak.rules.items()},
        "categories": {name: str(e) for name, e in peak.categories.items()},
    }


def _monomial(monomial: sympy.Expr) -> dict[str, Any]:
    powers = {b: e for b, e in monomial.as_powers_dict().items() if b != 1}
    plain = all(b.is_Symbol and e.is_Integer for b, e in powers.items())
    return {
        "text": str(monomial),
        "powers": {str(b): int(e) for b, e in powers.items()} if plain else None,
    }


def _cell(row: Row, column: str) -> str:
    if column == "MiB":
        return f"{row.mib:.3f}"
    if column == "shape":
        return f"[{', '.join(row.shape)}]"
    if column == "at peak":
        return "yes" if row.at_peak else "no"
    if column == "source":
        return row.source.split(" in ")[0]
    value = getattr(row, column)
    if isinstance(value, tuple):
        more = f" +{len(value) - 3}" if len(value) > 3 else ""
        return ", ".join(value[:3]) + more or "-"
    return str(value) or "-"


def folded_rows(rows: Iterable[Row]) -> list[Row]:
    """Equal storages of blocks that differ in their number alone, as one row each.

    ``layers.0`` and ``layers.1`` become ``layers.*``; born and dies are those of the first.
    """
    groups: dict[tuple[Any, ...], list[Row]] = {}
    for row in rows:
        what = unnumbered(row.node) if row.born < 0 else (row.operator, row.ordinal, row.source)
        key = (
            unnumbered(row.module),
            what,
            row.shape,
            row.dtype,
            row.bytes,
            row.category,
            row.at_peak,
        )
        groups.setdefault(key, []).append(row)
    return [_folded(group) for group in groups.values()]


def _folded(group: Sequence[Row]) -> Row:
    if len(group) == 1:
        return group[0]
    first = group[0]
    return replace(
        first,
        n=len(group),
        node=starred([r.node for r in group]) if first.born < 0 else first.node,
        module=starred([r.module for r in group]),
    )
