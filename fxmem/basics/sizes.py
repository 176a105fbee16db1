"""Bytes of fake tensors, as integers where shapes are fixed and as sympy expressions where not."""

from __future__ import annotations

import math
import weakref
from collections.abc import Iterator, Mapping, Sequence
from functools import lru_cache
from typing import Any, TypeAlias

import sympy
import torch
from torch.utils import _pytree as pytree

from fxmem._torch import storage_key

Size: TypeAlias = int | sympy.Expr
"""Bytes: an ``int``, or a sympy polynomial in the shape symbols."""


Bindings: TypeAlias = dict[sympy.Symbol, int]
"""The size that each symbol stands for."""


def symbol(name: str) -> sympy.Symbol:
    """The symbol of that name in sizes that carry the user's names."""
    return sympy.Symbol(name, integer=True, positive=True)


def symbols(sizes: Mapping[str, int]) -> Bindings:
    return {symbol(name): size for name, size in sizes.items()}


CUDA_BLOCK = 512
"""Bytes that torch's CUDA allocator rounds each request up to.

Source: c10/cuda/CUDACachingAllocator.cpp, kMinBlockSize; checked with ``memory_stats`` on an H100.
"""


def as_expr(value: int | torch.SymInt) -> Size:
    """An ``int`` as it is; a symbolic one as its expanded sympy expression."""
    if isinstance(value, torch.SymInt):
        return _expanded(value.node.expr)
    return int(value)


_expanded = lru_cache(maxsize=100_000)(sympy.expand)


def tensors_in(value: Any) -> Iterator[torch.Tensor]:
    """The strided tensors in a node's value, which may be a tensor, a tuple or anything nested."""
    for leaf in (value,) if isinstance(value, torch.Tensor) else pytree.tree_leaves(value):
        # Sparse tensors have no storage of their own; their parts are not visible to the graph.
        if isinstance(leaf, torch.Tensor) and leaf.layout == torch.strided:
            yield leaf


def storages_in(value: Any) -> dict[int, Size]:
    """Storage key -> bytes, one entry for each distinct storage in a node's value."""
    return {storage_key(t): storage_nbytes(t) for t in tensors_in(value)}


def storage_keys(value: Any) -> dict[int, None]:
    """The keys of ``storages_in`` alone, in the same order: bytes take longer to tell."""
    return {storage_key(t): None for t in tensors_in(value)}


def storage_nbytes(tensor: torch.Tensor) -> Size:
    """Bytes of the whole storage behind a tensor, which a small view keeps alive in full.

    They are what the allocator hands out: on CUDA whole blocks.
    """
    return in_blocks(in_known_sizes(tensor.untyped_storage().nbytes()), tensor.device)


_INSTEAD: weakref.WeakKeyDictionary[Any, dict[sympy.Symbol, sympy.Expr]] = (
    weakref.WeakKeyDictionary()
)
"""What symbols of a trace stand for in bytes, where they are no size of a tensor that a step is given."""


def in_known_sizes(value: int | torch.SymInt) -> Size:
    """As ``as_expr``, but in the sizes that a step is given."""
    instead = _INSTEAD.get(value.node.shape_env) if isinstance(value, torch.SymInt) else None
    if not instead:
        return as_expr(value)
    return _expanded(value.node.expr.xreplace(instead))  # type: ignore[union-attr]


def stand_for(shape_env: Any, instead: Mapping[sympy.Symbol, sympy.Expr]) -> None:
    """From now on, ``in_known_sizes`` has something else in the place of these symbols of a trace."""
    _INSTEAD.setdefault(shape_env, {}).update(instead)


def in_blocks(nbytes: Size, device: torch.device) -> Size:
    """What the device's allocator takes for so many bytes."""
    if device.type != "cuda":
        return nbytes
    if isinstance(nbytes, int):
        return -(-nbytes // CUDA_BLOCK) * CUDA_BLOCK
    return CUDA_BLOCK * sympy.ceiling(nbytes / CUDA_BLOCK)


def evaluate(size: Size, bindings: dict[Any, int]) -> int:
    """Bytes at given values of the symbols.  Raises ``KeyError`` for a symbol without a value."""
    return size if isinstance(size, int) else _evaluated(size, tuple(bindings.items()))


@lru_cache(maxsize=100_000)
def _evaluated(size: sympy.Expr, bindings: tuple[tuple[Any, int], ...]) -> int:
    missing = size.free_symbols - {s for s, _ in bindings}
    if missing:
        raise KeyError(f"no value for {sorted(map(str, missing))} in {size}")
    return int(size.subs(bindings))


def hint(value: int | torch.SymInt) -> int:
    """The value in the example inputs."""
    return int(value.node.hint) if isinstance(value, torch.SymInt) else int(value)


def as_numbers(tensor: torch.Tensor, gradient: torch.Tensor) -> tuple[list[int], list[int]] | None:
    """Sizes and strides; -1 for a batch that is no constant, and the gradient's, too.

    None where something else is no constant.
    """
    shape, strides = list(tensor.shape), list(tensor.stride())
    if shape and isinstance(shape[0], torch.SymInt):
        if as_expr(shape[0]) != as_expr(gradient.shape[0]):
            return None
        shape[0] = -1
    return (shape, strides) if all(isinstance(n, int) for n in (*shape, *strides)) else None


def by_stride(shape: Sequence[Any], strides: Sequence[Any]) -> list[int]:
    """The dimensions, the one with the largest steps first; among equal steps, the longest."""
    return sorted(range(len(shape)), key=lambda d: (-hint(strides[d]), -hint(shape[d])))


def is_dense(tensor: torch.Tensor) -> bool:
    """Do the elements fill their stretch of memory, each in a place of its own?"""
    expected = 1
    for d in reversed(by_stride(tensor.shape, tensor.stride())):
        if hint(tensor.shape[d]) != 1:
            if hint(tensor.stride(d)) != expected:
                return False
            expected *= hint(tensor.shape[d])
    return True


def is_plain(tensor: torch.Tensor) -> bool:
    """Is the tensor laid out as operators lay their results out: contiguous, or in channels_last?

    Not in channels_last with a dimension of size 1, whose step means nothing and which operators
    choose each in their own way.
    """
    shape, strides = [hint(n) for n in tensor.shape], [hint(n) for n in tensor.stride()]
    if strides == list(torch.empty(shape, device="meta").stride()):
        return True
    if len(shape) != 4 or 1 in shape:
        return False
    packed = torch.empty(shape, device="meta", memory_format=torch.channels_last)
    return strides == list(packed.stride())


def can_view(shape: Sequence[Any], strides: Sequence[Any], new_shape: Sequence[Any]) -> bool:
    """May a tensor be looked at in a new shape (which may hold one -1) without a copy?"""
    sizes, wanted = [hint(s) for s in shape], [hint(s) for s in new_shape]
    if 0 in sizes:
        return True
    if -1 in wanted:
        known = -math.prod(wanted)
        wanted = [math.prod(sizes) // known if s == -1 else s for s in wanted]
    runs = _even_runs(sizes, [hint(s) for s in strides])
    left = 1
    for size in (s for s in wanted if s != 1):
        left = runs.pop(0) if left == 1 and runs else left
        if left % size:
            return False
        left //= size
    return left == 1 and not runs


def _even_runs(sizes: list[int], strides: list[int]) -> list[int]:
    """The elements of each stretch of dimensions that one step walks through, outermost first."""
    runs: list[int] = []
    expected = None
    for size, stride in reversed([d for d in zip(sizes, strides, strict=True) if d[0] != 1]):
        if stride == expected:
            runs[0] *= size
        else:
            runs.insert(0, size)
        expected = stride * size
    return runs
