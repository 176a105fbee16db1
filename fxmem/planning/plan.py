"""The plan: what happens to each saved tensor, what it was promised to cost, and its form on disk."""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
import stat
from collections import Counter
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from torch import fx

from fxmem.basics.errors import FxmemError, PlanMismatchError
from fxmem.basics.units import shown
from fxmem.graphs.graph import (
    JointGraph,
    is_backward,
    is_view,
    module_name,
    operator_name,
    type_text,
)
from fxmem.planning.schema import plan_schema, problems

SCHEMA_VERSION = 5
ACTIONS = ("keep", "recompute", "encode")
TIERS = ("exact", "unbiased", "bounded")
_MAX_FILE_BYTES = 64 << 20
_LARGEST = 2**63


@dataclass(frozen=True)
class Key:
    """Where a value comes from, in terms that outlive a rename of nodes.

    module: qualified name.  operator: short name.  ordinal: among the module's nodes of that
    operator.  output: place in the operator's result.
    """

    module: str
    operator: str
    ordinal: int
    output: int = 0


@dataclass(frozen=True)
class Decision:
    """What happens to one value that the backward needs.

    value: the node's name.  type: ``f32[4, 128]``.  nbytes: of its storage; nbytes_stored: of what
    is saved in its place.  seconds: added to the step.  times: how often it is made again.
    dropped: positions of the backward operators after which a copy made again is let go, because it
    is made once more for its next reader.  error: None when exact; else the variance that it adds to
    gradients / the minibatch's own.
    """

    key: Key
    value: str
    type: str
    module: str
    source: str
    action: str
    nbytes: int
    nbytes_stored: int
    seconds: float
    reason: str
    times: int = 0
    dropped: tuple[int, ...] = ()
    error: float | None = None


@dataclass(frozen=True)
class PeakPoint:
    """Where a step peaks: the operator, its module and line, and what is live there in bytes."""

    nbytes: int
    operator: str
    module: str
    source: str
    phase: str
    step: int
    steps: int
    live: dict[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class LiveTensor:
    """One storage that is live at a peak, or the workspace of the operator that runs there."""

    name: str
    type: str
    nbytes: int
    category: str
    module: str
    source: str


@dataclass(frozen=True)
class Remedy:
    """What the user can change, and the bytes of the peak that it saves.

    kind: "batch", "loss", "outputs", "gradients", "encodings" or "optimizer", which saves bytes of
    the reserve.  accuracy: "about" for an estimate, "up to" where a new plan decides, "" if exact.
    """

    kind: str
    accuracy: str
    what: str
    saves: int


@dataclass(frozen=True)
class Certificate:
    """Why a peak is what it is, in bytes.

    tensors: the largest that are live there; others: how many more, of ``others_nbytes``.  least: no
    plan that recomputes goes below, because ``least_operator`` runs; least_own: what that operator
    itself reads, makes and works in.  remedies: the most saving first; looked for only where no
    plan fits or the smallest was asked for.
    """

    tensors: tuple[LiveTensor, ...]
    others: int
    others_nbytes: int
    least: int
    least_own: int
    least_operator: str
    least_module: str
    least_source: str
    remedies: tuple[Remedy, ...] = ()

    @property
    def nbytes(self) -> int:
        """The peak."""
        return sum(t.nbytes for t in self.tensors) + self.others_nbytes


@dataclass(frozen=True)
class CodeOf:
    """A value that the plan could store with noise, and the encoding that it would take."""

    key: Key
    encoding: str


@dataclass(frozen=True)
class NoiseOf:
    """Variances of the gradients of alike parameters, added up over all of them.

    parameters: their name, with ``*`` for what differs.  added: by codes.  own: the minibatch's.
    moved: square of how far codes that do not keep the mean move the gradients on the example's batch.
    square: of their length there.
    """

    parameters: str
    n: int
    added: float
    own: float
    moved: float
    square: float

    @property
    def error(self) -> float:
        """How far codes move the mean of these gradients, as a share of their length."""
        return relative_error(self.moved, self.square)

    @staticmethod
    def group_of(parameter: str) -> str:
        """Of one parameter: ``*`` for each number in its name."""
        return re.sub(r"\d+", "*", parameter)


@dataclass(frozen=True)
class GradientNoise:
    """What a plan's codes do to gradients: sampled on the example's batch, no worst case.

    predicted: variance that they add / the minibatch's own; at most ``ceiling``.  tier: "exact" where
    no lossy code is kept, "unbiased" where the mean of many steps is the exact gradient, else
    "bounded": no group's mean moves farther than ``bounded`` times its length.  parameters: by
    group.  codes: all that was weighed, kept or not.  backwards: that it took.
    """

    ceiling: float
    predicted: float
    tier: str
    parameters: tuple[NoiseOf, ...]
    codes: tuple[CodeOf, ...]
    backwards: int
    bounded: float


def relative_error(added: float, square: float) -> float:
    """Of a gradient of length sqrt(square) that is off by sqrt(added)."""
    return math.sqrt(added / square) if square else math.inf if added else 0.0


@dataclass(frozen=True)
class Plan:
    """Bytes unless said.

    budget: what the step may hold, after ``reserve``; for ``"min"`` the smallest peak found.
    asked: the budget as the user wrote it.  baseline_peak: of the user's step as it is today.
    keep_all_peak: of the captured step with everything saved.  resident: parameters, buffers,
    inputs.  floor: smallest peak that a plan was shown to reach, or None where nobody looked.
    predicted_overhead: added time / unchanged time.  gap: the step's time over a lower bound on any
    plan's, less 1: of all plans that fit, run the backward in this order and hold what is saved
    until its last reader; None where nobody looked.  symbols: name -> value in the example.
    fingerprint: of the graph that the plan is for; step: of the step before convolutions were split.
    valid_for: symbol -> (smallest, largest) size.  certificate: why the peak is not lower; None
    where the step fits as it is.  noise: None where no value may be stored with noise.
    """

    budget: int
    asked: str
    reserve: int
    predicted_peak: int
    baseline_peak: int
    keep_all_peak: int
    resident: int
    floor: int | None
    seconds: float
    added_seconds: float
    gap: float | None
    decisions: tuple[Decision, ...]
    symbols: dict[str, int]
    valid_for: dict[str, tuple[int, int]]
    peak: PeakPoint
    before: PeakPoint
    fingerprint: str
    step: str
    device: str
    model: str
    torch_version: str
    cost_model: str
    certificate: Certificate | None = None
    noise: GradientNoise | None = None

    @property
    def smallest(self) -> bool:
        """Was the smallest peak asked for, so that the budget is whatever that turned out to be?"""
        return self.asked == "min"

    @property
    def predicted_overhead(self) -> float:
        return self.added_seconds / self.seconds if self.seconds else 0.0

    @property
    def recomputed(self) -> tuple[Decision, ...]:
        return tuple(d for d in self.decisions if d.action == "recompute")

    def diff(self, other: Plan) -> str:
        """What changes from this plan to ``other``: the totals, then one line a changed decision.

        Raises ``PlanMismatchError`` when the plans are for different graphs.
        """
        if not isinstance(other, Plan):
            raise PlanMismatchError(
                f"diff compares with another plan, got {type(other).__name__}\n"
                "  try: plan.diff(fxmem.Plan.load(path))"
            )
        if self.step != other.step:
            raise PlanMismatchError(
                f"these plans are for different graphs: {self.model} ({self.step}) and "
                f"{other.model} ({other.step}).\n"
                "  try: make both plans for the same model, mode and input shapes"
            )
        mine = {d.key: d for d in self.decisions}
        theirs = {d.key: d for d in other.decisions}
        lines = [
            f"peak {self.predicted_peak:,} -> {other.predicted_peak:,} bytes, "
            f"overhead {self.predicted_overhead:.1%} -> {other.predicted_overhead:.1%}"
        ]
        for key in dict.fromkeys((*mine, *theirs)):
            before, after = _action(mine.get(key)), _action(theirs.get(key))
            if before != after:
                known = mine.get(key) or theirs[key]
                lines.append(f"  {known.module or '(root)'} {known.value}: {before} -> {after}")
        return "\n".join(lines)

    # -- On disk -----------------------------------------------------------------------------------

    def to_dict(self) -> dict[str, Any]:
        return {"schema": SCHEMA_VERSION, **asdict(self)}

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the plan as JSON, in one step: a reader never sees half of it.

        Raises ``FxmemError`` where that cannot be written.
        """
        text = json.dumps(self.to_dict(), indent=1, allow_nan=False) + "\n"
        try:
            draft = Path(path).with_name(Path(path).name + ".part")
            draft.write_text(text)
            os.replace(draft, path)
        except (OSError, TypeError, ValueError) as error:
            raise FxmemError(
                f"cannot write the plan to {path}: {getattr(error, 'strerror', error)}\n"
                "  try: a file in a folder that exists and may be written to"
            ) from error

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Plan:
        """Read a plan file.  Raises ``PlanMismatchError`` for a file that is not a plan of ours.

        Nothing in the file is ever run: its strings are only compared and printed.
        """
        try:
            return _plan_from(_read(path))
        except FileNotFoundError:
            raise PlanMismatchError(
                f"no plan file at {path}\n  try: plan.save({str(path)!r}) first"
            ) from None
        except (OSError, ValueError, TypeError, KeyError, RecursionError) as error:
            raise PlanMismatchError(
                f"{path} is not a plan that this version can read: {error}\n"
                f"  accepted: JSON written by Plan.save, schema {SCHEMA_VERSION}\n"
                "  try: make the plan again with fxmem.plan(...).save(path)"
            ) from error

    @classmethod
    def parse(cls, text: str) -> Plan:
        """A plan from the text of a plan file.  Raises ``PlanMismatchError`` as ``load`` does."""
        try:
            return _plan_from(_parsed(text))
        except (ValueError, TypeError, KeyError, RecursionError) as error:
            raise PlanMismatchError(f"not a plan that this version can read: {error}") from None

    @classmethod
    def validate(cls, path: str | os.PathLike[str]) -> list[str]:
        """What is wrong with a plan file, a line each; empty if ``load`` takes it.

        The form is that of ``plan.schema.json`` beside this file.  Whether a plan fits a step is another
        question: ``optimize(..., plan=path)`` asks it.
        """
        try:
            found = problems(_read(path), plan_schema())
        except (OSError, ValueError, RecursionError) as error:
            return [str(error) or type(error).__name__]
        if not found:
            try:
                cls.load(path)
            except PlanMismatchError as error:
                return [str(error).splitlines()[0]]
        return found

    def __str__(self) -> str:
        counts = Counter(d.action for d in self.decisions)
        return (
            f"Plan(peak {self.predicted_peak:,} bytes, unchanged {self.baseline_peak:,}, "
            f"+{self.predicted_overhead:.1%} time, {counts['recompute']} recomputed, "
            f"{counts['keep']} kept{self._codes(counts['encode'])})"
        )

    def _codes(self, n: int) -> str:
        """How many values are codes, and what that does to gradients, if any are."""
        if not n:
            return ""
        noise = self.noise
        if noise is None or noise.tier == "exact":
            return f", {n} encoded"
        return f", {n} encoded, {noise.tier} noise of {100 * noise.predicted:.3g} %"


def _action(decision: Decision | None) -> str:
    if decision is None:
        return "not saved"
    again = f" {decision.times} times" if decision.times > 1 else ""
    return f"{decision.action}{again}"


# -- Keys and fingerprints -----------------------------------------------------------------------


def keys(graph: JointGraph) -> dict[Key, fx.Node]:
    """A key for each forward node that makes a value; getitems stand for tuple elements."""
    seen: Counter[tuple[str, str]] = Counter()
    ordinals: dict[fx.Node, tuple[str, str, int]] = {}
    found: dict[Key, fx.Node] = {}
    for node in graph.nodes:
        if node.op != "call_function" or is_backward(node):
            continue
        if operator_name(node) == "getitem" and node.args[0] in ordinals:
            found[Key(*ordinals[node.args[0]], int(node.args[1]))] = node  # type: ignore[arg-type,index]
        elif not is_view(node):
            place = (module_name(node), operator_name(node))
            ordinals[node] = (*place, seen[place])
            found[Key(*ordinals[node])] = node
            seen[place] += 1
    return found


def fingerprint(graph: JointGraph) -> str:
    """A hash of the step's operators, modules, shapes and types; names of nodes do not count."""
    digest = hashlib.sha256()
    for node in graph.nodes:
        if node.op == "call_function":
            text = f"{node.target}|{module_name(node)}|{type_text(node.meta.get('val'))}\n"
            digest.update(text.encode())
    return digest.hexdigest()[:16]


# -- Reading, with every claim checked ---------------------------------------------------------------


def _read(path: str | os.PathLike[str]) -> Any:
    """The file as JSON.  Raises ``OSError``, ``ValueError`` or ``RecursionError``.

    Only a regular file is read, and no more of it than a plan could have: a pipe or a device may never
    end.
    """
    if os.path.isdir(path):
        raise ValueError("it is a directory")
    # Opening a pipe waits for a writer, unless told not to.
    number = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0))
    with open(number, "rb") as file:
        if not stat.S_ISREG(os.fstat(number).st_mode):
            raise ValueError("it is no regular file")
        text = file.read(_MAX_FILE_BYTES + 1)
    if len(text) > _MAX_FILE_BYTES:
        raise ValueError(f"larger than {_MAX_FILE_BYTES} bytes")
    return _parsed(text.decode())


def _parsed(text: str) -> Any:
    return json.loads(text, object_pairs_hook=_no_duplicates, parse_constant=_refuse_constant)


def _refuse_constant(text: str) -> Any:
    raise ValueError(f"{text} is no number")


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        names = [name for name, _ in pairs]
        twice = sorted({name for name in names if names.count(name) > 1})
        raise ValueError(f"an object names a field twice: {twice!r:.200}")
    return found


def _plan_from(data: Any) -> Plan:
    if not isinstance(data, dict):
        raise ValueError("the file holds no object")
    data = dict(data)
    version = data.pop("schema", None)
    if version != SCHEMA_VERSION:
        raise ValueError(f"schema {shown(version)}")
    data["decisions"] = _decisions(data["decisions"])
    data["peak"], data["before"] = (
        _record(PeakPoint, data["peak"]),
        _record(PeakPoint, data["before"]),
    )
    data["certificate"] = _certificate(data["certificate"])
    data["noise"] = _noise(data["noise"])
    data["symbols"] = _sizes(data["symbols"], "symbols")
    ranges = _object(data["valid_for"], "valid_for")
    data["valid_for"] = {k: _range(v) for k, v in ranges.items()}
    return _record(Plan, data)


def _certificate(data: Any) -> Certificate | None:
    if data is None:
        return None
    data = dict(_object(data, "certificate"))
    for name, kind in (("tensors", LiveTensor), ("remedies", Remedy)):
        data[name] = tuple(_record(kind, entry) for entry in _list(data[name], name))
    found: Certificate = _record(Certificate, data)
    return found


def _noise(data: Any) -> GradientNoise | None:
    if data is None:
        return None
    data = dict(_object(data, "noise"))
    data["parameters"] = tuple(
        _record(NoiseOf, entry) for entry in _list(data["parameters"], "parameters")
    )
    codes = [dict(_object(entry, "a code")) for entry in _list(data["codes"], "codes")]
    data["codes"] = tuple(
        _record(CodeOf, {**code, "key": _record(Key, code["key"])}) for code in codes
    )
    found: GradientNoise = _record(GradientNoise, data)
    if found.tier not in TIERS:
        raise ValueError(f"unknown tier {found.tier!r:.80}, known are {TIERS}")
    return found


def _decisions(data: Any) -> tuple[Decision, ...]:
    found = tuple(_decision(entry) for entry in _list(data, "decisions"))
    if twice := [key for key, n in Counter(d.key for d in found).items() if n > 1]:
        raise ValueError(f"two decisions about one value: {twice[0]!r:.200}")
    return found


def _decision(data: Any) -> Decision:
    data = dict(_object(data, "a decision"))
    data["key"] = _record(Key, data["key"])
    data["dropped"] = _positions(data["dropped"])
    decision = _record(Decision, data)
    if decision.action not in ACTIONS:
        raise ValueError(f"unknown action {shown(decision.action)}, known are {ACTIONS}")
    return decision


_CHECKS: dict[str, tuple[type, ...]] = {
    "str": (str,),
    "int": (int,),
    "int | None": (int, type(None)),
    "float": (int, float),
    "float | None": (int, float, type(None)),
    "bool": (bool,),
}


def _record(kind: Any, data: Any) -> Any:
    """Build a dataclass from a dict that has exactly its fields, each of its type and in range."""
    if not isinstance(data, dict):
        raise ValueError(f"{kind.__name__} should be an object")
    names = {f.name for f in fields(kind)}
    if set(data) != names:
        raise ValueError(
            f"{kind.__name__}: unknown {sorted(set(data) - names)!r:.200}, "
            f"missing {sorted(names - set(data))}"
        )
    for f in fields(kind):
        _check(kind, f.name, str(f.type), data[f.name])
        if str(f.type) == "dict[str, int]":
            _sizes(data[f.name], f"{kind.__name__}.{f.name}")
    return kind(**data)


def _check(kind: Any, name: str, declared: str, value: Any) -> None:
    allowed = _CHECKS.get(declared)
    if allowed is None:
        return
    if not isinstance(value, allowed) or (isinstance(value, bool) and bool not in allowed):
        raise ValueError(f"{kind.__name__}.{name} should be {declared}, not {value!r:.80}")
    if isinstance(value, (int, float)) and not 0 <= value < _LARGEST:
        raise ValueError(f"{kind.__name__}.{name} should be finite and not negative: {value!r}")


def _object(value: Any, what: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise ValueError(f"{what} should be an object")
    return value


def _sizes(value: Any, what: str) -> dict[str, int]:
    for name, size in _object(value, what).items():
        if isinstance(size, bool) or not isinstance(size, int) or not 0 <= size < _LARGEST:
            raise ValueError(f"{what}[{name!r:.80}] should be a size, not {size!r:.80}")
    return value


def _positions(value: Any) -> tuple[int, ...]:
    positions = tuple(_list(value, "dropped"))
    _sizes({str(n): position for n, position in enumerate(positions)}, "dropped")
    return positions


def _range(value: Any) -> tuple[int, int]:
    smallest, largest = _list(value, "a range of valid_for")
    sizes = _sizes({"smallest": smallest, "largest": largest}, "valid_for")
    return sizes["smallest"], sizes["largest"]


def _list(value: Any, what: str) -> Iterable[Any]:
    if not isinstance(value, list):
        raise ValueError(f"{what} should be a list")
    return value
