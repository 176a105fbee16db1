"""The report as one page: a file that needs no network, whose data cannot run as script.

What comes from the model goes into one block of JSON with ``<``, ``>`` and ``&`` escaped, and the page's
own script, the only one that its policy lets run, sets it as text.
"""

from __future__ import annotations

import base64
import hashlib
import html
import json
import os
import re
from collections.abc import Iterable
from importlib.resources import files
from pathlib import Path
from typing import Any

import sympy

from fxmem.basics.errors import FxmemError
from fxmem.basics.sizes import Size
from fxmem.basics.tables import clean, cut
from fxmem.graphs.lifetimes import CATEGORIES, WORKSPACE, BeforeAfter, Memory
from fxmem.planning.plan import Decision, Plan
from fxmem.reports.plots import BUDGET_COLOUR, COLOURS

_LONGEST = 200
"""Characters of one name or source line that the page shows."""


def write_page(path: str | os.PathLike[str], text: str) -> None:
    """Write the page in one step.  Raises ``FxmemError`` where that cannot be done."""
    try:
        draft = Path(path).with_name(Path(path).name + ".part")
        draft.write_text(text, encoding="utf-8")
        os.replace(draft, path)
    except (OSError, ValueError) as error:
        raise FxmemError(
            f"cannot write the page to {path}: {getattr(error, 'strerror', error)}\n"
            "  try: a file in a folder that exists and may be written to"
        ) from error


def page(report: str, plan: Plan, memory: BeforeAfter, other: Plan | None = None) -> str:
    """The page as text.

    report: the whole report as text.  other: a plan for the same step to compare with; raises
    ``PlanMismatchError`` if it is for another one.
    """
    style, script = _part("page.css"), _part("page.js")
    title = f"fxmem: {clean(plan.model)}"
    blanks = {
        "policy": _policy(style, script),
        "title": html.escape(cut(title, _LONGEST)),
        "style": style,
        "report": html.escape(report),
        "data": _embedded(page_data(plan, memory, other)),
        "script": script,
    }
    # In one pass: what a name contains is never looked at for blanks again.
    return re.sub(r"\{\{(\w+)\}\}", lambda blank: blanks[blank[1]], _part("page.html"))


def _part(name: str) -> str:
    return files("fxmem.reports").joinpath(name).read_text(encoding="utf-8")


def _policy(style: str, script: str) -> str:
    """Nothing from anywhere, and no script or style but these."""
    return (
        f"default-src 'none'; script-src '{_hash(script)}'; style-src '{_hash(style)}'; "
        "base-uri 'none'; form-action 'none'"
    )


def _hash(text: str) -> str:
    digest = hashlib.sha256(text.encode()).digest()
    return f"sha256-{base64.b64encode(digest).decode()}"


def _embedded(data: dict[str, Any]) -> str:
    text = json.dumps(data, separators=(",", ":"), allow_nan=False)
    for char in "<>&":
        text = text.replace(char, f"\\u{ord(char):04x}")
    return text


# -- The data --------------------------------------------------------------------------------------


def page_data(plan: Plan, memory: BeforeAfter, other: Plan | None = None) -> dict[str, Any]:
    """What the page's script reads: strings and sizes once each, everything else by their number."""
    names = list(dict.fromkeys((*memory.before.symbols, *memory.after.symbols)))
    known = {**memory.before.symbols, **memory.after.symbols}
    sizes = _Sizes(names, known)
    strings = _Strings()
    decided = {decision.value: n for n, decision in enumerate(plan.decisions)}
    steps = {
        "before": _step(memory.before, strings, sizes, {}),
        "after": _step(memory.after, strings, sizes, decided),
    }
    return {
        "symbols": [{"name": _short(name), "size": known[name]} for name in names],
        "budget": None if plan.smallest else plan.budget,
        "categories": list(CATEGORIES),
        "colours": [COLOURS[name] for name in CATEGORIES],
        "budgetColour": BUDGET_COLOUR,
        "workspace": CATEGORIES.index(WORKSPACE),
        **steps,
        "decisions": [_decision(decision, strings) for decision in plan.decisions],
        "changes": None if other is None else _changes(plan, other),
        "strings": strings.all,
        "sizes": sizes.trees,
        "formulas": sizes.formulas,
    }


def _step(
    memory: Memory, strings: _Strings, sizes: _Sizes, decided: dict[str, int]
) -> dict[str, Any]:
    """Columns: a number stands for a string, a size, a category or a decision."""
    points, lives = memory.points, memory.lifetimes
    phases = {"forward": 0, "boundary": 1, "backward": 2}
    return {
        "points": {
            "operator": strings.numbers(point.operator for point in points),
            "module": strings.numbers(point.module for point in points),
            "source": strings.numbers(point.source for point in points),
            "phase": [phases[point.phase] for point in points],
            "workspace": [sizes.number(point.workspace) for point in points],
        },
        "lives": {
            "name": strings.numbers(one.name for one in lives),
            "type": strings.numbers(one.type for one in lives),
            "size": [sizes.number(one.nbytes) for one in lives],
            "born": [one.born for one in lives],
            "dies": [one.dies for one in lives],
            "category": [CATEGORIES.index(one.category) for one in lives],
            "module": strings.numbers(one.module for one in lives),
            "source": strings.numbers(one.source for one in lives),
            "origin": strings.numbers(one.origin for one in lives),
            # Of values that write over one another, the last is the one that stays.
            "decision": [
                next((decided[name] for name in reversed(one.values) if name in decided), -1)
                for one in lives
            ],
        },
    }


_WORDS = ("value", "type", "action", "module", "source", "reason")


def _decision(decision: Decision, strings: _Strings) -> list[float]:
    """Bytes, times, milliseconds, and the strings of ``_WORDS``."""
    words = strings.numbers(getattr(decision, name) for name in _WORDS)
    return [decision.nbytes, decision.times, round(1e3 * decision.seconds, 6), *words]


def _changes(plan: Plan, other: Plan) -> dict[str, Any]:
    """What ``plan.diff(other)`` says, as rows."""
    totals = plan.diff(other).splitlines()[0]
    mine = {decision.key: decision for decision in plan.decisions}
    theirs = {decision.key: decision for decision in other.decisions}
    rows = []
    for key in dict.fromkeys((*mine, *theirs)):
        before, after = _action(mine.get(key)), _action(theirs.get(key))
        if before != after:
            known = mine.get(key) or theirs[key]
            shown = {name: _short(getattr(known, name)) for name in ("value", "module", "source")}
            rows.append({**shown, "bytes": known.nbytes, "from": before, "to": after})
    return {"totals": clean(totals), "rows": rows}


def _action(decision: Decision | None) -> str:
    if decision is None:
        return "not saved"
    return decision.action + (f" x{decision.times}" if decision.times > 1 else "")


def _short(text: str) -> str:
    return cut(clean(text), _LONGEST)


class _Strings:
    """Each string once; the empty one is -1."""

    def __init__(self) -> None:
        self.all: list[str] = []
        self._numbers: dict[str, int] = {"": -1}

    def numbers(self, texts: Iterable[str]) -> list[int]:
        return [self._number(text) for text in texts]

    def _number(self, text: str) -> int:
        if text not in self._numbers:
            self._numbers[text] = len(self.all)
            self.all.append(_short(text))
        return self._numbers[text]


# -- Sizes as trees --------------------------------------------------------------------------------


class _Sizes:
    """Each size once, as a tree that the page evaluates, beside its formula as text."""

    def __init__(self, names: list[str], example: dict[str, int]) -> None:
        self.names = {name: number for number, name in enumerate(names)}
        self.example = example
        self.trees: list[Any] = []
        self.formulas: list[str] = []
        self._numbers: dict[Size, int] = {}

    def number(self, size: Size) -> int:
        if size not in self._numbers:
            self._numbers[size] = len(self.trees)
            self.trees.append(self._tree(size))
            self.formulas.append("" if isinstance(size, int) else _short(str(size)))
        return self._numbers[size]

    def _tree(self, size: Any) -> Any:
        if isinstance(size, int) or size.is_Integer:
            return int(size)
        if size.is_Symbol:
            return ["symbol", self.names[size.name]]
        if size.is_Rational:
            return ["/", int(size.p), int(size.q)]
        operator = _OPERATORS.get(type(size).__name__)
        if operator is None:
            # A function of the sizes that the page does not know stays what it is in the example.
            return int(size.subs({s: self.example[s.name] for s in size.free_symbols}))
        return [operator, *(self._tree(part) for part in size.args)]


_OPERATORS = {
    sympy.Add.__name__: "+",
    sympy.Mul.__name__: "*",
    sympy.Pow.__name__: "^",
    "FloorDiv": "//",
    "CleanDiv": "//",
    "Mod": "%",
    "PythonMod": "%",
    "ModularIndexing": "//%",
    "Max": "max",
    "Min": "min",
}
