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
from torch._decomp import decomposition_table
from torch._prims_common import suggest_memory_format
from torch._subclasses.fake_tensor import FakeTensorMode

aten = torch.ops.aten

_KEYS = (DispatchKey.Autograd, DispatchKey.CompositeImplicitAutograd)
_DECOMPOSED = re.compile(r"_?upsample_|multi_margin_loss|multilabel_margin_loss_forward")


@contextlib.contextmanager
def eager_decompositions() -> Iterator[None]:
    """Inside, tracing sees the operators that eager runs.  For one thread at a time."""
    ours = {aten.dropout.default: _dropout, aten.bernoulli_.float: _bernoulli_}
    before = [(op, dict(op.py_kernels)) for op in (*_overloads(), *ours)]
    for op, kernels in before:
        own = dict.fromkeys(_KEYS, ours[op]) if op in ours else {}
        _put(op, {**_without(kernels), **own})
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


# -- Layouts -----------------------------------------------------------------------------------------

# Fake results keep the operands' strides; the kernels on the CPU return the layout that the normalized
# operand, whose place this is, suggests.  A view that was traced for the one may not exist for the other.
_NORMALIZED: dict[Any, int] = {
    aten._native_batch_norm_legit.default: 0,
    aten._native_batch_norm_legit.no_stats: 0,
    aten._native_batch_norm_legit_functional.default: 0,
    aten.native_batch_norm.default: 0,
    aten.native_batch_norm_backward.default: 1,
}


@contextlib.contextmanager
def real_layouts() -> Iterator[None]:
    """Inside, fake results have the strides of real ones.  For one thread at a time."""
    table: dict[Any, Callable[..., Any]] = decomposition_table
    before = {op: table[op] for op in _NORMALIZED}
    table.update({op: _in_suggested_layout(before[op], _NORMALIZED[op]) for op in before})
    FakeTensorMode.cache_clear()
    try:
        yield
    finally:
        table.update(before)
        FakeTensorMode.cache_clear()


def _in_suggested_layout(decomposition: Callable[..., Any], place: int) -> Callable[..., Any]:
    @functools.wraps(decomposition)  # fake tensors ask for its module and its name
    def on_suggested_layout(*args: Any, **kwargs: Any) -> Any:
        layout = suggest_memory_format(args[place])
        operands = [
            torch.empty_like(a, memory_format=layout) if _is_laid_out_otherwise(a, layout) else a
            for a in args[: place + 1]
        ]
        return _asked_for(decomposition(*operands, *args[place + 1 :], **kwargs), args)

    return on_suggested_layout


def _asked_for(results: Any, args: tuple[Any, ...]) -> Any:
    """Without the gradients that the call's mask leaves out, which fake backwards may return."""
    mask = args[-1]
    if not isinstance(mask, list) or len(mask) != len(results):
        return results
    return tuple(result if asked else None for result, asked in zip(results, mask, strict=True))


def _is_laid_out_otherwise(operand: torch.Tensor, layout: torch.memory_format) -> bool:
    return operand.device.type == "cpu" and not operand.is_contiguous(memory_format=layout)


# -- Kernels -----------------------------------------------------------------------------------------


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
    return input * _drawn(input, 1 - p).to(input.dtype).div_(1 - p)


def _bernoulli_(
    self: torch.Tensor, p: float = 0.5, *, generator: torch.Generator | None = None
) -> torch.Tensor:
    if self.device.type == "cpu" and generator is None and 0 < p < 1:
        return self.copy_(_drawn(self, p))
    return self.copy_(torch.bernoulli(self, p, generator=generator))


def _drawn(like: torch.Tensor, p: float) -> torch.Tensor:
    """Bytes, ones with probability p, drawn as in eager: in the order of the layout of ``like``."""
    like = like.detach()
    if like.is_contiguous():
        return torch.bernoulli(torch.empty_like(like, dtype=torch.bool), p)
    # ``bernoulli`` returns contiguous memory.  The fused operator does not, but its product rounds
    # otherwise.
    return torch.native_dropout(like, 1 - p, True)[1]


def _scale_is_exact(p: float, dtype: torch.dtype) -> bool:
    """Is 1 / (1 - p), rounded once to ``dtype``, what a division in ``dtype`` gives?"""
    if dtype is torch.float64:
        return True
    single = np.float32
    return dtype is torch.float32 and bool(single(1) / single(1 - p) == single(1 / (1 - p)))
