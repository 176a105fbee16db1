"""Private parts of torch that measuring needs, each behind one small function.

Checked on torch 2.13.0 and 2.15.0.
Why not torch.profiler.profile: it records every operator. Below, allocations are all that is
recorded, a session costs well under a millisecond, and each allocation carries its address, which
the public event list leaves out.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any, NamedTuple, TypeVar

import torch
from torch._C._profiler import (
    ProfilerActivity,
    ProfilerConfig,
    ProfilerState,
    RecordScope,
    _EventType,
    _ExperimentalConfig,
)

Result = TypeVar("Result")


class Event(NamedTuple):
    """One allocation (nbytes > 0), one free (nbytes < 0), or a mark, which has a name."""

    nbytes: int
    address: int
    mark: str


# Two sessions in two threads crash the process, so ours take turns.
SESSION = threading.RLock()

# Operators and users' scopes are of others.  A collective of gloo's is a user scope that its thread
# ends after the future that DDP waits for: in a session that has ended by then, this writes to memory
# that is free.
_NOBODYS_SCOPE = RecordScope.LITE_INTERPRETER

_marks: list[tuple[torch.UntypedStorage, str]] = []
"""Those of the session that runs: a mark is an allocation, alive until the session has ended."""


def is_recording() -> bool:
    """Whether a profiler session, ours or anyone's, runs on this thread."""
    return torch.autograd._profiler_enabled()


def record(function: Callable[[], Result]) -> tuple[list[Event], Result]:
    """Run ``function``; what it allocates and frees on the CPU in the order of time, its result.

    Threads of autograd are heard, other threads are not. The session ends if ``function`` raises.
    It begins when no other thread of ours has one.
    """
    with SESSION:
        return _record(function)


def _record(function: Callable[[], Result]) -> tuple[list[Event], Result]:
    activities = {ProfilerActivity.CPU}
    config = ProfilerConfig(
        ProfilerState.KINETO,
        False,  # shapes
        True,  # memory
        False,  # stacks
        False,  # flops
        False,  # modules
        _ExperimentalConfig(),
    )
    with _quiet_kineto():
        torch.autograd._prepare_profiler(config, activities)
    # torch's stub leaves the last argument out.
    torch.autograd._enable_profiler(config, activities, {_NOBODYS_SCOPE})  # type: ignore[call-arg]
    try:
        result = function()
    finally:
        session = torch.autograd._disable_profiler()
        marks = {storage.data_ptr(): name for storage, name in _marks}
        _marks.clear()
    return _marked(_events(session), marks), result


@contextmanager
def session_if_free() -> Iterator[bool]:
    """May a session be opened inside?  Not within one of this thread, nor beside another thread's.

    Waiting for another thread's to end might take forever: its step may be waiting for this one.
    """
    if is_recording() or not SESSION.acquire(blocking=False):
        yield False
        return
    try:
        yield True
    finally:
        SESSION.release()


def sizes_apart(function: Callable[[], Result]) -> tuple[list[int], Result]:
    """``function`` run on a thread of its own; the bytes it allocates and frees on the CPU there.

    For use within someone's profiler session: sessions belong to a thread, and this older kind of
    profiler shares nothing with them.  It tells no addresses.
    """
    config = ProfilerConfig(
        ProfilerState.CPU, False, True, False, False, False, _ExperimentalConfig()
    )

    def run() -> tuple[Any, Result]:
        torch.autograd._enable_profiler_legacy(config)
        try:
            result = function()
        finally:
            records = torch.autograd._disable_profiler_legacy()
        return records, result

    with ThreadPoolExecutor(1) as thread:
        records, result = thread.submit(run).result()
    events = [event for of_thread in records for event in of_thread]
    return [e.cpu_memory_usage() for e in events if e.kind() == "memory_alloc"], result


def mark(name: str) -> None:
    """Leave ``name`` among the recorded events."""
    if is_recording():
        # No operator: whatever mode the step is in, none hears of it.
        _marks.append((torch.UntypedStorage(1), name))


def storage_of(tensor: torch.Tensor) -> torch.UntypedStorage | None:
    """The CPU storage of ``tensor``; None if it has none of its own (fake, sparse, wrapper)."""
    try:
        # A subclass must not see this call: it may log it, refuse it, or allocate.
        with torch._C.DisableTorchFunctionSubclass():
            storage = torch.Tensor.untyped_storage(tensor)
            held = storage.device.type == "cpu" and storage.nbytes() and storage.data_ptr()
    # Subclasses raise what they like when asked for a storage that they do not have.
    except Exception:
        return None
    return storage if held else None


def gradient_of(tensor: torch.Tensor) -> torch.Tensor | None:
    """``tensor.grad``, for leaves only: asking any other tensor warns."""
    try:
        with torch._C.DisableTorchFunctionSubclass():
            return tensor.grad if tensor.is_leaf else None
    except Exception:
        return None


def _events(session: Any) -> list[Event]:
    timed: list[tuple[int, Event]] = []
    waiting = list(reversed(session.experimental_event_tree()))
    while waiting:
        node = waiting.pop()
        waiting.extend(reversed(node.children))
        if node.tag == _EventType.Allocation:
            fields = node.extra_fields
            if fields.device.type == "cpu":
                event = Event(fields.alloc_size, fields.ptr or 0, "")
                timed.append((node.start_time_ns, event))
    # Stable: events of one nanosecond stay as the tree has them.
    timed.sort(key=lambda pair: pair[0])
    return [event for _, event in timed]


def _marked(events: list[Event], marks: dict[int, str]) -> list[Event]:
    """The events, with marks for their allocations.  marks: names by address."""
    if not marks:
        return events
    # Nothing comes to the address of a mark after it: the last that is allocated there is the mark.
    at = {event.address: n for n, event in enumerate(events) if event.nbytes > 0}
    found = list(events)
    for address, name in marks.items():
        if address in at:
            found[at[address]] = Event(0, 0, name)
    return found


@contextmanager
def _quiet_kineto() -> Iterator[None]:
    """Keep kineto from printing "profiler_start" and "profiler_stop" to stderr (seen in 2.13.0).

    Kineto reads the variable once, when the process's first session is prepared; 6 is the lowest
    level that hides these two lines. A level that the user has set stays.
    """
    name = "KINETO_LOG_LEVEL"
    if name in os.environ:
        yield
        return
    os.environ[name] = "6"
    try:
        yield
    finally:
        del os.environ[name]
