"""Where tracing takes an operator apart otherwise than eager does, and so rounds otherwise.

Checked on torch 2.13.0.  torch registers Python decompositions for some operators on the autograd
key.  They serve code generators; run operator by operator they give other bits than the C++ kernels
that eager runs, and hold more.
"""

from __future__ import annotations

import contextlib
import functools
import re
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from torch._C import DispatchKey

aten = torch.ops.aten

_KEYS = (DispatchKey.Autograd, DispatchKey.CompositeImplicitAutograd)
_DECOMPOSED = re.compile(r"_?upsample_|multi_margin_loss|multilabel_margin_loss_forward")


@contextlib.contextmanager
def eager_decompositions() -> Iterator[None]:
    """Inside, tracing sees the operators that eager runs.  For one thread at a time."""
    before = [(op, dict(op.py_kernels)) for op in (*_overloads(), aten.dropout.default)]
    for op, _ in before:
        ours: dict[Any, Callable[..., Any]] = {}
        if op is aten.dropout.default:
            ours = dict.fromkeys(_KEYS, _dropout)
        _put(op, {**_without(op.py_kernels), **ours})
    try:
        yield
    finally:
        for op, kernels in before:
            _put(op, kernels)


@functools.cache
def _overloads() -> tuple[Any, ...]:
    """The decomposed operators that this torch has."""
    found = []
    for name in torch._C._dispatch_get_all_op_names():
        base, _, overload = name.removeprefix("aten::").partition(".")
        if name.startswith("aten::") and _DECOMPOSED.match(base) and "backward" not in base:
            found.append(getattr(getattr(aten, base), overload or "default"))
    return tuple(found)


def _without(kernels: dict[Any, Any]) -> dict[Any, Any]:
    return {key: kernel for key, kernel in kernels.items() if key not in _KEYS}


def _put(op: Any, kernels: dict[Any, Any]) -> None:
    op.py_kernels.clear()
    op.py_kernels.update(kernels)
    op._dispatch_cache.clear()


def _dropout(input: torch.Tensor, p: float, train: bool) -> torch.Tensor:
    """Eager's dropout, with a mask of bytes wherever that gives eager's bits."""
    if not train or p == 0:
        return input.clone()
    if p == 1:  # eager draws nothing
        return input * torch.zeros((), dtype=input.dtype, device=input.device)
    if input.device.type != "cpu" or _scale_is_exact(p, input.dtype):
        return torch.native_dropout(input, p, train)[0]
    return input * _mask(input, p).to(input.dtype).div_(1 - p)


def _mask(input: torch.Tensor, p: float) -> torch.Tensor:
    """Bytes drawn in the order in which eager draws its noise, which is the layout's."""
    if input.is_contiguous():
        return torch.empty_like(input, dtype=torch.bool).bernoulli_(1 - p)
    # Traced, ``bernoulli_`` makes a contiguous tensor.  The fused operator does not, but its product
    # rounds otherwise.
    return torch.native_dropout(input, p, True)[1]


def _scale_is_exact(p: float, dtype: torch.dtype) -> bool:
    """Is 1 / (1 - p), rounded once to ``dtype``, what a division in ``dtype`` gives?"""
    if dtype is torch.float64:
        return True
    single = np.float32
    return dtype is torch.float32 and bool(single(1) / single(1 - p) == single(1 / (1 - p)))
