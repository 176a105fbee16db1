"""Out of memory, explained: who held what when an allocation failed, and which budget would fit.

The figures are those of torch's message, which rounds them to two decimals.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

from fxmem.basics.errors import BudgetInfeasibleError, FxmemError
from fxmem.basics.tables import BYTES, WIDTH, clean, percent, scale, table, wrapped
from fxmem.basics.units import format_bytes, shown
from fxmem.planning.plan import Plan
from fxmem.reports.report import live_lines, remedy_lines

_LONGEST = 20_000
"""Characters of a message that are read."""


@dataclass(frozen=True)
class OutOfMemory:
    """An allocation that failed, in bytes; None is what the message does not say.

    device: ``CUDA``, ``CPU`` and so on, as torch calls the backend.  index: of the device.
    asked: what the failing allocation was for.  allocated: held by tensors.  unallocated: kept by
    torch's allocator beside them.  process: all that this process holds, kernels and libraries
    included.  allowed: what ``set_per_process_memory_fraction`` leaves.
    """

    device: str
    asked: int | None = None
    index: int | None = None
    total: int | None = None
    free: int | None = None
    process: int | None = None
    allocated: int | None = None
    unallocated: int | None = None
    allowed: int | None = None

    @property
    def room(self) -> int | None:
        """The most that this process's tensors could hold: what they held, what was kept, what was free."""
        if self.allocated is None or self.free is None:
            return None
        kept = self.unallocated or 0
        room = self.allocated + kept + self.free
        return room if self.allowed is None else min(room, self.allowed)

    @property
    def rows(self) -> list[tuple[str, int]]:
        """Who held the device's memory; the rows add up to its total."""
        if self.total is None or self.free is None or self.allocated is None:
            return []
        kept = self.unallocated or 0
        rest = max(0, self.total - self.free - self.allocated - kept)
        rows = [("tensors", self.allocated), ("kept by torch's allocator", kept)]
        if self.process is None:
            rows.append(("driver, libraries, other processes", rest))
        else:
            own = min(rest, max(0, self.process - self.allocated - kept))
            rows += [("driver and libraries of this process", own), ("all else", rest - own)]
        return [*rows, ("free", self.free)]


@dataclass(frozen=True)
class Explanation:
    """What failed, or may; ``str()`` prints the tables.

    error: the allocation that failed, if one did.  plan: of the step, if there is one.
    """

    error: OutOfMemory | None = None
    plan: Plan | None = None

    @property
    def budget(self) -> int | None:
        """The largest that the device bears, less the plan's reserve; without a failure, the plan's own."""
        if self.error is None:
            return None if self.plan is None else self.plan.predicted_peak
        room = self.error.room
        return None if room is None else max(0, room - (self.plan.reserve if self.plan else 0))

    @property
    def fits(self) -> bool | None:
        """Does the plan fit where the allocation failed?  None where that cannot be told."""
        if self.error is None or self.plan is None or self.budget is None:
            return None
        return self.plan.predicted_peak <= self.budget

    def __str__(self) -> str:
        lines = [*_failure(self), *_step(self)]
        return "\n".join(line.rstrip() for line in lines)

    def to_dict(self) -> dict[str, Any]:
        """Ready for JSON; bytes are integers."""
        return {
            "error": None if self.error is None else asdict(self.error),
            "memory": None if self.error is None else dict(self.error.rows),
            "budget": self.budget,
            "fits": self.fits,
            "plan": None if self.plan is None else self.plan.to_dict(),
        }


def explain_oom(what: Any, plan: Plan | None = None) -> Explanation:
    """Categories of the memory, and the budget that would fit.

    what: a ``torch.OutOfMemoryError``, or its message as a string, or the RuntimeError of the CPU's
    allocator, or a ``BudgetInfeasibleError``, or a Plan.  plan: of the step that failed; with it the
    answer says what the step needs and whether the plan would have fitted.

    Raises ``FxmemError`` for anything else.
    """
    if plan is not None and not isinstance(plan, Plan):
        raise FxmemError(f"plan should be a Plan, not {type(plan).__name__}\n  {_TRY}")
    if isinstance(what, Plan):
        if plan is not None:
            raise FxmemError("two plans: give one, or an error and its plan")
        return Explanation(plan=what)
    if isinstance(what, BudgetInfeasibleError):
        return Explanation(plan=plan or what.best_plan)
    for message in _messages(what):
        found = read_message(message)
        if found is not None:
            return Explanation(found, plan)
    raise FxmemError(
        f"{shown(what)} is no out-of-memory error that can be read\n"
        "  accepted: torch.OutOfMemoryError or its message, the CPU allocator's RuntimeError, "
        f"BudgetInfeasibleError, Plan\n  {_TRY}"
    )


_TRY = 'try: fxmem.explain_oom(error, fxmem.plan(model, "min", (x,)))'


def _messages(what: Any) -> Iterator[str]:
    """The text of an error and of those that it was raised from."""
    if isinstance(what, str):
        yield what
    seen: set[int] = set()
    while isinstance(what, BaseException) and id(what) not in seen:
        seen.add(id(what))
        yield str(what)
        what = what.__cause__ or what.__context__


# -- Torch's messages --------------------------------------------------------------------------------

_AMOUNT = r"([0-9]{1,20}(?:\.[0-9]{1,6})?) (bytes|B|[KMGTP]i?B)\b"
_UNITS = {
    "bytes": 1,
    "B": 1,
    **{f"{c}{i}B": 1024**n for n, c in enumerate("KMGTP", 1) for i in ("i", "")},
}

_CPU = re.compile(
    r"DefaultCPUAllocator: (?:can't allocate memory|not enough memory)[^0-9]{0,80}([0-9]{1,20}) bytes"
)
_ACCELERATOR = re.compile(r"\b(\w{2,12}) (?:backend )?out of memory\b")
_ASKED = re.compile(rf"Tried to allocate {_AMOUNT}")
_INDEX = re.compile(r"\bGPU ([0-9]{1,4})\b")

_FIGURES = {
    "total": (rf"total capacity of {_AMOUNT}", rf"; {_AMOUNT} total capacity"),
    "free": (rf"of which {_AMOUNT} is free", rf"; {_AMOUNT} free"),
    "process": (rf"this process has {_AMOUNT} memory in use",),
    "allowed": (rf"{_AMOUNT} allowed",),
    "allocated": (rf"{_AMOUNT} is allocated by PyTorch", rf"; {_AMOUNT} already allocated"),
    "unallocated": (rf"{_AMOUNT} is reserved by PyTorch but unallocated",),
    "reserved": (rf"; {_AMOUNT} reserved in total by PyTorch",),
}
"""Field -> how torch words it: since 2.1, and before."""


def read_message(message: str) -> OutOfMemory | None:
    """What an allocator's message says; None if it is none."""
    message = message[:_LONGEST]
    if cpu := _CPU.search(message):
        return OutOfMemory("CPU", int(cpu[1]))
    known = _ACCELERATOR.search(message)
    asked = _ASKED.search(message)
    if known is None or asked is None:
        return None
    figures = {name: _figure(message, forms) for name, forms in _FIGURES.items()}
    reserved = figures.pop("reserved")
    if figures["unallocated"] is None and reserved is not None:
        figures["unallocated"] = max(0, reserved - (figures["allocated"] or 0))
    index = _INDEX.search(message)
    return OutOfMemory(known[1], _bytes(asked), int(index[1]) if index else None, **figures)


def _figure(message: str, forms: tuple[str, ...]) -> int | None:
    for form in forms:
        if found := re.search(form, message):
            return _bytes(found)
    return None


def _bytes(found: re.Match[str]) -> int:
    return round(float(found[1]) * _UNITS[found[2]])


# -- Text --------------------------------------------------------------------------------------------


def _failure(explanation: Explanation) -> list[str]:
    error = explanation.error
    if error is None:
        return []
    where = error.device if error.index is None else f"{error.device} device {error.index}"
    had = "" if error.free is None else f"; {format_bytes(error.free)} were free"
    asked = "unknown bytes" if error.asked is None else format_bytes(error.asked)
    lines = [clean(f"Out of memory on {where}: {asked} were asked for{had}.")]
    if error.rows:
        lines += ["", *_memory(error)]
    return [*lines, *_room(error)]


def _memory(error: OutOfMemory) -> list[str]:
    total = sum(nbytes for _, nbytes in error.rows)
    unit = scale(BYTES, [[nbytes for _, nbytes in error.rows]])
    rows = [*error.rows, ("TOTAL", total)]
    cells = [(name, unit.text(nbytes), percent(nbytes, total)) for name, nbytes in rows]
    return table(("when it failed", unit.name, "%"), cells, "lrr")


def _room(error: OutOfMemory) -> list[str]:
    if error.room is None:
        return ["The message does not say who held the rest."]
    lines = wrapped(
        f"Tensors can hold {format_bytes(error.room)} here at most: budget {error.room} bytes "
        f'("{error.room}B") for everything, less where blocks of the allocator do not fit together.'
    )
    if error.allocated is not None and error.asked is not None:
        needed = error.allocated + error.asked
        lines += wrapped(
            f"The program needed {format_bytes(needed)} at that moment, or more later."
        )
    if error.unallocated and error.asked and error.unallocated >= error.asked:
        lines += wrapped(
            "As many bytes were kept by the allocator, in pieces that were too small: "
            "PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True helps against that."
        )
    return lines


def _step(explanation: Explanation) -> list[str]:
    plan = explanation.plan
    if plan is None:
        return wrapped(f"What of it is the step's, and what a plan would save: {_TRY[5:]}")
    peaks = (
        f"{clean(plan.model)}: the step peaks at {format_bytes(plan.baseline_peak)} as it is, at "
        f"{format_bytes(plan.predicted_peak)} with this plan (+{100 * plan.predicted_overhead:.1f} % "
        "time)."
    )
    gap = [""] if explanation.error else []
    lines = [*gap, *wrapped(peaks), "", *live_lines(plan), "", *_verdict(explanation, plan)]
    if plan.certificate and plan.certificate.remedies and explanation.fits is not True:
        lines += ["What would lower it, each alone:"]
        lines += [f"  {line}" for line in remedy_lines(plan.certificate, WIDTH - 2)]
    return lines


def _verdict(explanation: Explanation, plan: Plan) -> list[str]:
    outside = f" beside a reserve of {format_bytes(plan.reserve)}" if plan.reserve else ""
    lines: list[str] = []
    if explanation.fits is not None:
        room = format_bytes(explanation.budget or 0)
        verdict = "would have fitted" if explanation.fits else "would not fit either"
        lines += wrapped(f"This plan {verdict}: {room} are there for the step{outside}.")
    budget = plan.predicted_peak
    lines += wrapped(f'A budget of {budget} bytes ("{budget}B"){outside} fits with this plan.')
    if plan.floor is not None and plan.floor < budget:
        lines += wrapped(
            f'The smallest that was shown to be in reach is {plan.floor} bytes ("min").'
        )
    return lines
