"""How much memory a device has, and how much of it is free now. Bytes throughout."""

from __future__ import annotations

import os
import re
from pathlib import Path

import torch

from fxmem.basics.errors import BudgetError

_MEMINFO = Path("/proc/meminfo")


def total_memory(device: torch.device) -> int:
    """All memory of ``device``; for "cpu" the machine's physical memory.

    Raises BudgetError where the platform does not say.
    """
    if device.type == "cuda":
        return _cuda_memory(device)[1]
    if device.type == "cpu":
        return _sysconf_bytes("SC_PHYS_PAGES") or _unknown("total", device)
    return _unknown("total", device)


def free_memory(device: torch.device) -> int:
    """What ``device`` could still hand out, now.

    cuda: what the driver has free; blocks that torch's allocator caches are not counted.
    cpu: Linux's MemAvailable, else the free physical pages.
    Raises BudgetError where the platform does not say.
    """
    if device.type == "cuda":
        return _cuda_memory(device)[0]
    if device.type == "cpu":
        return _mem_available() or _sysconf_bytes("SC_AVPHYS_PAGES") or _unknown("free", device)
    return _unknown("free", device)


def library_memory(device: torch.device) -> int:
    """What cuBLAS holds through torch's allocator from the first matrix product to the process's end.

    One workspace for the thread that runs the forward, one for the thread that runs the backward.
    0 on other devices.
    Source: torch's aten/src/ATen/cuda/CublasHandlePool.cpp; checked on an H100 with torch 2.11.
    """
    if device.type != "cuda":
        return 0
    asked = os.environ.get("CUBLAS_WORKSPACE_CONFIG", "")
    kib = sum(int(size) * int(count) for size, count in _WORKSPACES.findall(asked))
    if not kib:
        kib = _WORKSPACE_SINCE_HOPPER if _capability(device) >= 9 else _WORKSPACE_BEFORE_HOPPER
    return 2 * kib * 1024


_WORKSPACES = re.compile(r":(\d+):(\d+)")
_WORKSPACE_BEFORE_HOPPER, _WORKSPACE_SINCE_HOPPER = 2 * 4096 + 8 * 16, 8 * 4096
"""KiB."""


def _capability(device: torch.device) -> int:
    """The major number of the device's compute capability; 0 where there is no such device."""
    try:
        return torch.cuda.get_device_capability(device)[0]
    except (RuntimeError, AssertionError, ValueError):
        return 0


def _cuda_memory(device: torch.device) -> tuple[int, int]:
    try:
        return torch.cuda.mem_get_info(device)
    # torch raises AssertionError when built without CUDA, RuntimeError without a driver.
    except (RuntimeError, AssertionError, ValueError) as error:
        raise BudgetError(
            f"cannot find the memory of {device}: {error}\n"
            '  try a budget in bytes, such as "20GiB", which needs no device'
        ) from error


def _mem_available() -> int:
    """MemAvailable of /proc/meminfo in bytes; 0 where there is no such line."""
    try:
        lines = _MEMINFO.read_text().splitlines()
    except OSError:
        return 0
    for line in lines:
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    return 0


def _sysconf_bytes(pages: str) -> int:
    """``pages`` times the page size; 0 where the platform has no such name."""
    try:
        return max(0, os.sysconf(pages)) * os.sysconf("SC_PAGE_SIZE")
    # AttributeError: Windows has no os.sysconf at all.
    except (AttributeError, ValueError, OSError):
        return 0


def _unknown(what: str, device: torch.device) -> int:
    raise BudgetError(
        f"cannot find the {what} memory of {device}: fxmem asks cpu and cuda devices only, and "
        'this platform may not say\n  try a budget in bytes, such as "20GiB"'
    )
