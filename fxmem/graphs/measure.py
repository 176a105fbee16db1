"""What a step really holds, as the allocator saw it. Bytes throughout.

CUDA: the caching allocator's own counters. CPU: the allocations and frees that torch's profiler
records, added up from what was alive before. The profiler does not tell of frees of memory that
is older than its session, so each storage alive at the start is watched, and the moment it dies
is marked among the events. What this cannot see is counted as still held, hence a CPU ``peak``
may err upwards, by memory from before the step that dies in it and that no Python object can
reach at the start (values that autograd saved for a backward pass), or that is resized.
"""

from __future__ import annotations

import gc
import threading
import weakref
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

import torch

from fxmem._torch.profiler import (
    Event,
    gradient_of,
    is_recording,
    mark,
    record,
    session_if_free,
    sizes_apart,
    storage_of,
)
from fxmem.basics.errors import FxmemError
from fxmem.basics.units import format_bytes

Result = TypeVar("Result")

_FREED = "fxmem: freed "
_SECOND = "fxmem: second phase"
_measuring = threading.Lock()


@dataclass(frozen=True)
class Measurement(Generic[Result]):
    """Bytes that the allocator held on ``device``: everything alive there, not the step's alone."""

    peak: int
    at_start: int
    at_end: int
    device: str
    result: Result = field(repr=False, compare=False)

    def __str__(self) -> str:
        return (
            f"peak {format_bytes(self.peak)} on {self.device} "
            f"(start {format_bytes(self.at_start)}, end {format_bytes(self.at_end)})"
        )


def measure(step: Callable[[], Result]) -> Measurement[Result]:
    """Run ``step`` once and say what the allocator held before, at most, and after.

    The device is the CUDA device that peaks highest, if the process holds anything on one, and
    the CPU otherwise. Garbage is collected first. An exception of ``step`` passes through.
    Raises FxmemError if ``step`` is not callable, within another measurement, or within a profiler.
    """
    if not callable(step):
        raise FxmemError(
            f"measure needs a callable without arguments, not {type(step).__name__}\n"
            "  try measure(lambda: train_step(batch))"
        )
    if not _measuring.acquire(blocking=False):
        raise FxmemError("measure is already running in this process; measurements do not nest")
    try:
        return _measure(step)
    finally:
        _measuring.release()


def cpu_allocations(function: Callable[[], Result]) -> tuple[list[int], Result]:
    """Run ``function``; the bytes it allocates (above 0) and frees (below 0) on the CPU, in order.

    Frees of memory that ``function`` did not allocate are left out. Raises FxmemError within a
    profiler session.
    """
    _refuse_profiler()
    events, result = record(function)
    return _own_sizes(events), result


def cpu_phases(first: Callable[[], Any], second: Callable[[], Any]) -> tuple[list[int], list[int]]:
    """``cpu_allocations`` of two functions, run one after the other: the second may free the first's.

    Also within a session of somebody else's, or beside another thread's.
    """

    def both() -> None:
        first()
        mark(_SECOND)
        second()

    with session_if_free() as free:
        if not free:
            return sizes_apart(first)[0], sizes_apart(second)[0]
        events, _ = record(both)
    cut = next(at for at, event in enumerate(events) if event.mark == _SECOND)
    sizes = _own_sizes(events)
    of_first = len(_own_sizes(events[:cut]))
    return sizes[:of_first], sizes[of_first:]


def _measure(step: Callable[[], Result]) -> Measurement[Result]:
    gc.collect()
    if not torch.cuda.is_initialized():
        before = [0]
    else:
        before = _cuda_start()
        if any(before):
            return _cuda_end(before, step())
    measured = _measure_cpu(step)
    if torch.cuda.is_initialized():
        # The first use of CUDA may be the step's own.
        before += [0] * (torch.cuda.device_count() - len(before))
        on_cuda = _cuda_end(before, measured.result)
        return on_cuda if on_cuda.peak else measured
    return measured


# CUDA


def _cuda_start() -> list[int]:
    """Bytes held on each device, with the record of the peak cleared."""
    for index in range(torch.cuda.device_count()):
        torch.cuda.synchronize(index)
        torch.cuda.reset_peak_memory_stats(index)
    return [torch.cuda.memory_allocated(index) for index in range(torch.cuda.device_count())]


def _cuda_end(before: list[int], result: Result) -> Measurement[Result]:
    for index in range(len(before)):
        torch.cuda.synchronize(index)
    peaks = [torch.cuda.max_memory_allocated(index) for index in range(len(before))]
    index = peaks.index(max(peaks))
    at_end = torch.cuda.memory_allocated(index)
    return Measurement(peaks[index], before[index], at_end, f"cuda:{index}", result)


# CPU


def _measure_cpu(step: Callable[[], Result]) -> Measurement[Result]:
    _refuse_profiler()
    before, watches = _watch_storages()
    at_start = sum(before.values())
    events, result = record(step)
    # Dropped here, not sooner: without its weak reference a storage dies unheard.
    del watches
    levels = _levels(events, before)
    at_end = levels[-1] if levels else at_start
    return Measurement(max([at_start, *levels]), at_start, at_end, "cpu", result)


def _levels(events: list[Event], before: dict[int, int]) -> list[int]:
    """Bytes held after each event. before: bytes by address, of what was alive at the start."""
    older, newer = dict(before), dict[int, int]()
    held = sum(before.values())
    levels = []
    for event in events:
        if event.mark.startswith(_FREED):
            held -= older.pop(int(event.mark.removeprefix(_FREED)), 0)
        elif event.nbytes > 0:
            # A new block at an old one's address proves that the old one is gone.
            held -= older.pop(event.address, 0) + newer.pop(event.address, 0)
            newer[event.address] = event.nbytes
            held += event.nbytes
        elif event.nbytes < 0:
            # Blocks of an earlier session are reported when freed; a mark may have told already.
            block = newer if event.address in newer else older
            held -= block.pop(event.address, 0)
        levels.append(held)
    return levels


def _own_sizes(events: list[Event]) -> list[int]:
    """Signed bytes of ``events``, without frees of what they did not allocate."""
    alive = set()
    sizes = []
    for event in events:
        if event.nbytes > 0:
            alive.add(event.address)
            sizes.append(event.nbytes)
        elif event.nbytes < 0 and event.address in alive:
            alive.discard(event.address)
            sizes.append(event.nbytes)
    return sizes


def _watch_storages() -> tuple[dict[int, int], list[weakref.ref]]:
    """Bytes by address of every CPU storage alive now, and references that mark their deaths."""
    nbytes: dict[int, int] = {}
    watches = []
    for storage in _live_storages():
        address = storage.data_ptr()
        if address not in nbytes:
            nbytes[address] = storage.nbytes()
            watches.append(weakref.ref(storage, _mark_freed(address)))
    return nbytes, watches


def _mark_freed(address: int) -> Callable[[weakref.ref], None]:
    return lambda _: mark(f"{_FREED}{address}")


def _live_storages() -> list[torch.UntypedStorage]:
    """CPU storages that Python can reach, the gradients of leaves among them; may repeat."""
    storages = []
    for tensor in _live_tensors():
        # A gradient that Python never asked for has no Python object yet, so gc cannot list it.
        for one in (tensor, gradient_of(tensor)):
            storage = None if one is None else storage_of(one)
            if storage is not None:
                storages.append(storage)
    return storages


def _live_tensors() -> list[torch.Tensor]:
    # By type: isinstance() asks proxies for __class__, and some of them run code to answer.  Each type is
    # looked at once: there are half a million objects, and a hundredth as many types.
    kinds: dict[type, bool] = {}
    found = []
    for obj in gc.get_objects():
        kind = type(obj)
        if kind not in kinds:
            kinds[kind] = issubclass(kind, torch.Tensor)
        if kinds[kind]:
            found.append(obj)
    return found


def _refuse_profiler() -> None:
    if is_recording():
        raise FxmemError(
            "a profiler is already running on this thread, and torch allows one at a time\n"
            "  try to measure outside the torch.profiler block"
        )
