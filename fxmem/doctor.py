"""What fxmem finds on this machine: versions, devices, files, and whether its parts work here."""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import highspy
import torch
from torch import nn

from fxmem._torch import CHECKED_VERSIONS
from fxmem.api import plan
from fxmem.basics.budget import Budget
from fxmem.basics.device import free_memory, total_memory
from fxmem.basics.errors import FxmemError
from fxmem.basics.gpus import find_gpu
from fxmem.basics.tables import clean
from fxmem.basics.units import format_bytes
from fxmem.graphs.workspace import cache_path, device_at_hand

SUPPORTED = (2, 11), (2, 15)
"""The oldest and the newest torch that the package may be installed beside."""

_PACKAGES = ("sympy", "numpy", "highspy", "tabulate", "tqdm", "triton", "matplotlib")


@dataclass(frozen=True)
class Finding:
    """One line of the examination.

    value: ready for JSON.  problem: what is wrong and what to do, empty where nothing is.  A problem
    that is only a warning does not make the examination fail.
    """

    name: str
    value: Any
    problem: str = ""
    fatal: bool = False


@dataclass(frozen=True)
class Examination:
    """All findings, in a fixed order."""

    findings: tuple[Finding, ...]

    @property
    def healthy(self) -> bool:
        return not any(found.fatal for found in self.findings)

    def __str__(self) -> str:
        width = max(len(found.name) for found in self.findings)
        lines = []
        for found in self.findings:
            first, *more = map(clean, _texts(found.value))
            lines.append(f"{found.name:<{width}}  {first}".rstrip())
            lines += [f"{'':{width}}  {text}" for text in more]
            if found.problem:
                mark = "problem" if found.fatal else "note"
                lines += [f"{'':{width}}  {mark}: {clean(found.problem)}"]
        verdict = "all parts work" if self.healthy else "fxmem does not work here: see the problems"
        return "\n".join([*lines, verdict])

    def to_dict(self) -> dict[str, Any]:
        """Ready for JSON: the values by name, and the problems."""
        problems = [f"{found.name}: {found.problem}" for found in self.findings if found.problem]
        values = {found.name: found.value for found in self.findings}
        return {**values, "healthy": self.healthy, "problems": problems}


def examine() -> Examination:
    """Look at everything.  Plans a step of a few kilobytes, which may write to the calibration cache."""
    return Examination(
        (
            Finding("python", platform.python_version()),
            Finding("torch", torch.__version__),
            _torch_checked(),
            Finding("fxmem", _version("fxmem") or "not installed: run from a checkout"),
            *(Finding(name, _version(name) or "not installed") for name in _PACKAGES),
            *_device(),
            *_caches(),
            _working("solver", _solve),
            _working("planning", _plan),
        )
    )


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _torch_checked() -> Finding:
    """Is this a version that fxmem was checked with?  It calls private parts of torch."""
    number = torch.__version__.split("+")[0]
    checked = ", ".join(CHECKED_VERSIONS)
    if number in CHECKED_VERSIONS:
        return Finding("torch checked", "yes")
    oldest, newest = SUPPORTED
    release = tuple(int(part) for part in number.split(".")[:2] if part.isdecimal())
    outside = not oldest <= release <= newest
    span = f"{oldest[0]}.{oldest[1]} to {newest[0]}.{newest[1]}"
    why = f"fxmem was checked with torch {checked}"
    if outside:
        why += f" and is made for {span}: pip install torch=={CHECKED_VERSIONS[-1]}"
    return Finding("torch checked", f"no: checked with {checked}", why, fatal=False)


# -- The device ----------------------------------------------------------------------------------------


def _device() -> Iterator[Finding]:
    device = device_at_hand()
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
        yield Finding("device", name)
        gpu = find_gpu(name)
        unknown = "its rates are guessed, so times are rough: cost='measure' measures them"
        yield Finding("known as", gpu.name if gpu else "unknown", "" if gpu else unknown)
    else:
        yield Finding("device", "cpu")
    for what, ask in (("memory", total_memory), ("free memory", free_memory)):
        try:
            yield Finding(what, ask(device))
        except FxmemError as error:
            yield Finding(what, None, f'budgets such as "80%" and "auto" do not work: {error}')
    yield Finding("threads", torch.get_num_threads())


# -- Calibration -----------------------------------------------------------------------------------------


def _caches() -> Iterator[Finding]:
    device = device_at_hand()
    current = cache_path(device)
    yield Finding("calibration cache", str(current))
    yield Finding("cache exists", current.is_file())
    entries = {path.name: _entries(path) for path in sorted(current.parent.glob("*.json"))}
    broken = [name for name, count in entries.items() if count is None]
    problem = f"unreadable, and measured again: {', '.join(broken)}" if broken else ""
    yield Finding("cache entries", entries, problem)
    if not _writable(current.parent):
        yield Finding(
            "cache folder",
            str(current.parent),
            "it cannot be written to, so operators are measured anew in every process: set "
            "FXMEM_CACHE_DIR",
        )


def _entries(path: Path) -> int | None:
    """Operators in a table; None where it is no table."""
    try:
        table = json.loads(path.read_text())
    except (OSError, ValueError, RecursionError):
        return None
    return len(table) if isinstance(table, dict) else None


def _writable(folder: Path) -> bool:
    """May files be made there, or the folder itself?"""
    while not folder.exists() and folder != folder.parent:
        folder = folder.parent
    return os.access(folder, os.W_OK)


# -- Do the parts work? ------------------------------------------------------------------------------------


def _working(name: str, use: Callable[[], str]) -> Finding:
    try:
        return Finding(name, use())
    except Exception as error:  # whatever it is, it is what the user has to know
        return Finding(name, "fails", f"{type(error).__name__}: {error}", fatal=True)


def _solve() -> str:
    """The smallest program that the planner's kind of solver can get wrong: max x + y, x + 2 y <= 3."""
    solver = highspy.Highs()
    solver.setOptionValue("output_flag", False)
    solver.addVar(0.0, 1.0)
    solver.addVar(0.0, 4.0)
    solver.changeColCost(0, -1.0)
    solver.changeColCost(1, -1.0)
    solver.addRow(-highspy.kHighsInf, 3.0, 2, [0, 1], [1.0, 2.0])
    solver.run()
    best = -solver.getInfo().objective_function_value
    if abs(best - 2.0) > 1e-6:
        raise FxmemError(f"HiGHS finds {best:g} where the optimum is 2")
    return "HiGHS works"


def _plan() -> str:
    """A step that has to be captured, planned and rewritten."""
    layers = [nn.Sequential(nn.Linear(16, 64), nn.GELU(), nn.Linear(64, 16)) for _ in range(3)]
    found = plan(nn.Sequential(*layers), Budget.parse("min"), (torch.ones(64, 16),))
    if not found.predicted_peak < found.keep_all_peak:
        raise FxmemError("no smaller plan was found for a step that has one")
    before, after = format_bytes(found.keep_all_peak), format_bytes(found.predicted_peak)
    return f"a step of {before} planned to {after}"


def _texts(value: Any) -> list[str]:
    """A line, or one for each entry of a table."""
    if isinstance(value, dict):
        return [f"{name}: {_texts(count)[0]}" for name, count in value.items()] or ["none"]
    if isinstance(value, bool):
        return ["yes" if value else "no"]
    if isinstance(value, int) and value > 10**6:
        return [f"{format_bytes(value)} ({value} bytes)"]
    return ["unknown" if value is None else str(value)]
