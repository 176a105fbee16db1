"""Where tracing takes an operator apart otherwise than eager does, and so rounds otherwise.

Checked on torch 2.13.0.  torch registers Python decompositions for some operators on the autograd
key.  They serve code generators; run operator by operator they give other bits than the C++ kernels
that eager runs, and hold more.
"""

from __future__ import annotations

import contextlib
import functools
import re
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch._C import DispatchKey
from torch._decomp import decomposition_table, decompositions
from torch._decomp.decompositions import upsample_compute_output_size
from torch._library.simple_registry import singleton
from torch._library.utils import Kernel
from torch._prims_common import compute_elementwise_output_strides, suggest_memory_format
from torch._subclasses.fake_tensor import FakeTensorMode

from fxmem._torch import COMPILE_LOCK, modes_kept, quiet_fake_tensors, unwatched

aten = torch.ops.aten

_KEYS = (DispatchKey.Autograd, DispatchKey.CompositeImplicitAutograd)
_DECOMPOSED = re.compile(r"_?upsample_|multi_margin_loss|multilabel_margin_loss_forward")


@contextlib.contextmanager
def eager_decompositions() -> Iterator[None]:
    """Inside, tracing sees the operators that eager runs.  For one thread at a time."""
    ours = {aten.dropout.default: _dropout, aten.bernoulli_.float: _bernoulli_, **_resizing()}
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


# Fake results of these are laid out as one operand or another where the operands differ: the kernels
# take the first operand that decides, memory without gaps, or the operand at the given place.
_IN_ORDER = (
    aten.copysign.Tensor,
    aten.elu_backward.default,
    aten.hardsigmoid_backward.default,
    aten.hardswish_backward.default,
    aten.hardtanh_backward.default,
    aten.logit_backward.default,
    aten.native_dropout_backward.default,
    aten.softplus_backward.default,
    aten.special_xlog1py.default,
    aten.xlogy.Tensor,
)
_CONTIGUOUS = (
    aten._log_softmax_backward_data.default,
    aten.huber_loss_backward.default,
    aten.mse_loss_backward.default,
    aten.smooth_l1_loss_backward.default,
)
_LIKE: dict[Any, int] = {aten.binary_cross_entropy_backward.default: 1}

# These copy the whole storage behind a view; the fake result's ends where the view does.
_COPIES_STORAGE = (
    aten.diagonal_scatter.default,
    aten.select_scatter.default,
    aten.slice_scatter.default,
)


@contextlib.contextmanager
def compiling() -> Iterator[None]:
    """One thread at a time, with fake tensors that are laid out as real ones will be."""
    with COMPILE_LOCK, modes_kept(), unwatched(), quiet_fake_tensors(), real_layouts():
        yield


@contextlib.contextmanager
def real_layouts() -> Iterator[None]:
    """Inside, fake results have the strides and bytes of real ones.  For one thread at a time."""
    # Inductor's table is a copy of this one, from when it is first imported, and must not be of ours.
    from torch._inductor import decomposition  # noqa: F401

    table: dict[Any, Callable[..., Any]] = decomposition_table
    normalized = {op: _in_suggested_layout(table[op], at) for op, at in _NORMALIZED.items()}
    strided = {op: _with_strides(table[op], strides) for op, strides in _strides().items()}
    ours = {op: _preferred(function) for op, function in (normalized | strided).items()}
    before = {op: table[op] for op in ours}
    table.update(ours)
    kernels = [singleton.find(op.name()).fake_impl.kernels for op in _COPIES_STORAGE]
    for stack in kernels:
        stack.append(Kernel(_in_a_whole_storage, __file__))
    FakeTensorMode.cache_clear()
    try:
        yield
    finally:
        table.update(before)
        for stack in kernels:
            stack.pop()
        FakeTensorMode.cache_clear()


def _preferred(decomposition: Callable[..., Any]) -> Callable[..., Any]:
    """Fake tensors take a decomposition only if it calls itself one of those of this module."""
    decomposition.__module__ = decompositions.__name__
    decomposition.__name__ = decompositions.softplus_backward.__name__
    return decomposition


def _in_a_whole_storage(view: torch.Tensor, *_: Any, **__: Any) -> torch.Tensor:
    """What a scatter returns: a copy of all that is behind the view, or of a view on itself alone."""
    if any(size > 1 and step == 0 for size, step in zip(view.shape, view.stride(), strict=True)):
        return view.clone()
    whole = view.new_empty(view.untyped_storage().nbytes() // view.element_size())
    return whole.as_strided(view.shape, view.stride(), view.storage_offset())


_Strides = Callable[[tuple[Any, ...], torch.Tensor], Sequence[Any]]
"""An operator's arguments and its fake result -> the strides of the real one."""


def _strides() -> dict[Any, _Strides]:
    def in_order(args: tuple[Any, ...], _: torch.Tensor) -> Sequence[Any]:
        tensors = [a for a in args if isinstance(a, torch.Tensor)]
        return compute_elementwise_output_strides(*torch.broadcast_tensors(*tensors))

    def contiguous(_: tuple[Any, ...], result: torch.Tensor) -> Sequence[Any]:
        return torch.empty(result.shape, device="meta").stride()

    def like(place: int) -> _Strides:
        return lambda args, _: torch.empty_like(args[place], device="meta").stride()

    found: dict[Any, _Strides] = dict.fromkeys(_IN_ORDER, in_order)
    found.update(dict.fromkeys(_CONTIGUOUS, contiguous))
    found.update({op: like(place) for op, place in _LIKE.items()})
    return found


def _with_strides(decomposition: Callable[..., Any], strides: _Strides) -> Callable[..., Any]:
    def with_strides(*args: Any, **kwargs: Any) -> Any:
        result = decomposition(*args, **kwargs)
        wanted = tuple(strides(args, result))
        if result.stride() == wanted:
            return result
        return result.new_empty_strided(result.shape, wanted).copy_(result)

    return with_strides


def _in_suggested_layout(decomposition: Callable[..., Any], place: int) -> Callable[..., Any]:
    def on_suggested_layout(*args: Any, **kwargs: Any) -> Any:
        layout = suggest_memory_format(args[place])
        operands = [
            a.contiguous(memory_format=layout) if _is_laid_out_otherwise(a, layout) else a
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


@functools.cache
def _resizing() -> dict[Any, Callable[..., Any]]:
    """Those that compute a size from a factor: C++ reads all sizes as constants, symbols included."""
    return {op: _resized_by(op) for op in _overloads() if op._overloadname == "vec"}


def _resized_by(op: Any) -> Callable[..., Any]:
    def resize(input: torch.Tensor, output_size: Any, *rest: Any) -> torch.Tensor:
        *flags, factors = rest
        sizes = input.shape[2:]
        if output_size is None:
            output_size = upsample_compute_output_size(input.size(), None, factors)
        scales = [None] * len(sizes) if factors is None else list(factors)
        return op.overloadpacket.default(input, output_size, *flags, *scales)

    return resize


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
