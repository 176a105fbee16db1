"""Groups of integers and masks of bits in one kernel each, for CUDA.

The results are those of the operators' own torch code, bit for bit: the same roundings in the same order,
which fused multiplications and additions would not keep, and the same noise of each place.  To be imported
only where Triton is.  Under TRITON_INTERPRET=1 tensors may be on the CPU.
"""

# mypy: ignore-errors
# A kernel's arguments are pointers and constants that Python's types do not describe.

from __future__ import annotations

import torch
import triton
import triton.language as tl

_ELEMENTS = 4096
"""That one program works on."""

_BITS = 1024
"""Bytes of bits that one program works on."""

_TINY = tl.constexpr(2.0**-126)
_LEAST_FIRST = tl.constexpr(2.0**-14)


@triton.jit
def _uniform(place, low_key, high_key):
    """As fxmem.noise.uniform.  Keys and places are uint32."""
    h = place ^ low_key
    h = (h ^ (h >> 16)) * 0x7FEB352D
    h = h ^ high_key
    h = (h ^ (h >> 15)) * 0x846CA68B
    h = h ^ (h >> 16)
    return (h >> 8).to(tl.int32).to(tl.float32) * (2.0**-24)


# bfloat16 is converted by hand, an int16 in memory: the interpreter rounds it otherwise than a GPU.


@triton.jit
def _load(pointer, mask):
    if pointer.dtype.element_ty == tl.int16:
        word = tl.load(pointer, mask=mask, other=0).to(tl.int32) << 16
        return word.to(tl.float32, bitcast=True)
    else:
        return tl.load(pointer, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def _store(pointer, x, mask):
    """Of what ``_rounded`` gave."""
    if pointer.dtype.element_ty == tl.int16:
        tl.store(pointer, (x.to(tl.int32, bitcast=True) >> 16).to(tl.int16), mask=mask)
    else:
        tl.store(pointer, x.to(pointer.dtype.element_ty), mask=mask)


@triton.jit
def _rounded(x, dtype: tl.constexpr):
    """float32, of values that the type in memory holds."""
    if dtype == tl.int16:
        word = x.to(tl.int32, bitcast=True)
        word = (word + 0x7FFF + ((word >> 16) & 1)) & -0x10000
        x = tl.where(x == x, word.to(tl.float32, bitcast=True), x)
    elif dtype == tl.float16:
        x = x.to(tl.float16).to(tl.float32)
    return x


@triton.jit
def _points(codes, first, step, dtype: tl.constexpr):
    return _rounded((codes + first) * step, dtype)


@triton.jit
def _round_down(first):
    """To what float16 holds."""
    word = first.to(tl.int32, bitcast=True)
    away = word + tl.where(first < 0, 0x1FFF, 0)
    normal = (away & -0x2000).to(tl.float32, bitcast=True)
    small = tl.floor(first * (2.0**24)) * (2.0**-24)
    return tl.where(tl.abs(first) < _LEAST_FIRST, small, normal)


@triton.jit
def _is_finite(x):
    return tl.abs(x) < float("inf")


@triton.jit
def _quantize(
    x,
    steps,
    firsts,
    words,
    keys,
    length,
    groups,
    bits: tl.constexpr,
    group: tl.constexpr,
    rows: tl.constexpr,
    seeded: tl.constexpr,
):
    parts: tl.constexpr = 8 // bits
    width: tl.constexpr = group // parts
    levels: tl.constexpr = 2**bits - 1
    dtype: tl.constexpr = x.dtype.element_ty
    row = tl.program_id(0).to(tl.int64) * rows + tl.arange(0, rows).to(tl.int64)[:, None]
    there = row < groups
    within = tl.arange(0, width).to(tl.int64)[None, :]

    # The grid, from a first reading
    low = tl.full((rows, 1), float("inf"), tl.float32)
    high = tl.full((rows, 1), float("-inf"), tl.float32)
    wrong = tl.full((rows, 1), 0, tl.int32)
    for n in tl.static_range(parts):
        at = tl.minimum(row * group + n * width + within, length - 1)
        value = _load(x + at, there)
        wrong = tl.maximum(wrong, tl.max((value != value).to(tl.int32), 1, keep_dims=True))
        low = tl.minimum(low, tl.min(value, 1, keep_dims=True))
        high = tl.maximum(high, tl.max(value, 1, keep_dims=True))
    step = (high * (1 / levels) - low * (1 / levels)) * (1 + 2.0**-20)
    step = step + tl.abs(low) * (2.0**-10 / levels)
    step = tl.maximum(tl.maximum(step, tl.abs(low) * (1 / 65000.0)), _TINY)
    step = ((step.to(tl.int32, bitcast=True) + 0x7FFF) & -0x8000).to(tl.float32, bitcast=True)
    first = _round_down(tl.div_rn(low, step))
    spans = _is_finite(_points(0.0, first, step, dtype)) & _is_finite(low) & _is_finite(high)
    spans = spans & _is_finite(_points(levels * 1.0, first, step, dtype)) & (wrong == 0)
    flat = (low == high) & (wrong == 0)
    step = tl.where(flat, 0.0, tl.where(spans, step, float("nan")))
    first = tl.where(flat | (spans == 0), 0.0, first)

    # The codes, from a second one
    inverse = tl.div_rn(tl.full((rows, 1), 1.0, tl.float32), step)
    if seeded:
        key = keys + 2 * ((row * group) >> 32)
        low_key = tl.load(key, mask=there, other=0).to(tl.uint32, bitcast=True)
        high_key = tl.load(key + 1, mask=there, other=0).to(tl.uint32, bitcast=True)
    packed = tl.zeros((rows, width), tl.int32)
    for n in tl.static_range(parts):
        place = row * group + n * width + within
        at = tl.minimum(place, length - 1)
        value = _load(x + at, there)
        below = tl.floor(value * inverse - first)
        below = tl.where(below == below, below, 0.0)
        below = tl.minimum(tl.maximum(below, 0.0), levels - 1.0)
        a = _points(below, first, step, dtype)
        b = _points(below + 1, first, step, dtype)
        draw = _uniform(place.to(tl.uint32), low_key, high_key) if seeded else 0.5
        above = value - a > draw * (b - a)
        packed = packed | ((below.to(tl.int32) + above.to(tl.int32)) << (bits * n))

    # A group of one value has it in place of its first codes
    byte = tl.minimum(within, 3).to(tl.int32)
    low = tl.where(low == 0, 0.0, low)
    constant = (low.to(tl.int32, bitcast=True) >> (8 * byte)) & 0xFF
    packed = tl.where(flat & (within < 4), constant, packed)
    tl.store(words + row * width + within, packed.to(tl.uint8), mask=there)
    word = tl.where(step == step, step.to(tl.int32, bitcast=True) >> 15, 0xFFFF)
    tl.store(steps + row, word.to(tl.int16), mask=there)
    tl.store(firsts + row, first.to(tl.float16), mask=there)


@triton.jit
def _dequantize(
    found,
    steps,
    firsts,
    words,
    length,
    groups,
    bits: tl.constexpr,
    group: tl.constexpr,
    rows: tl.constexpr,
):
    parts: tl.constexpr = 8 // bits
    width: tl.constexpr = group // parts
    dtype: tl.constexpr = found.dtype.element_ty
    row = tl.program_id(0).to(tl.int64) * rows + tl.arange(0, rows).to(tl.int64)[:, None]
    there = row < groups
    within = tl.arange(0, width).to(tl.int64)[None, :]
    word = tl.load(steps + row, mask=there, other=0).to(tl.int32) & 0xFFFF
    step = (word << 15).to(tl.float32, bitcast=True)
    first = tl.load(firsts + row, mask=there, other=0.0).to(tl.float32)
    constant = tl.zeros((rows, 1), tl.int32)
    for n in tl.static_range(4):
        byte = tl.load(words + row * width + n, mask=there, other=0).to(tl.int32)
        constant = constant | (byte << (8 * n))
    constant = tl.where(step == 0, constant.to(tl.float32, bitcast=True), 0.0)
    packed = tl.load(words + row * width + within, mask=there, other=0).to(tl.int32)
    for n in tl.static_range(parts):
        codes = ((packed >> (bits * n)) & (2**bits - 1)).to(tl.float32)
        value = _rounded((codes + first) * step + constant, dtype)
        at = row * group + n * width + within
        _store(found + at, value, there & (at < length))


@triton.jit
def _pack(mask, bits, length, nbytes, block: tl.constexpr):
    byte = tl.program_id(0).to(tl.int64) * block + tl.arange(0, block).to(tl.int64)[:, None]
    n = tl.arange(0, 8)[None, :]
    at = byte * 8 + n
    value = tl.load(mask + at, mask=at < length, other=0).to(tl.int32)
    found = tl.sum(value << n, 1, keep_dims=True)
    tl.store(bits + byte, found.to(tl.uint8), mask=byte < nbytes)


@triton.jit
def _unpack(bits, mask, length, nbytes, block: tl.constexpr):
    byte = tl.program_id(0).to(tl.int64) * block + tl.arange(0, block).to(tl.int64)[:, None]
    n = tl.arange(0, 8)[None, :]
    at = byte * 8 + n
    value = tl.load(bits + byte, mask=byte < nbytes, other=0).to(tl.int32)
    tl.store(mask + at, ((value >> n) & 1).to(tl.uint8), mask=at < length)


def _in_memory(x: torch.Tensor) -> torch.Tensor:
    return x.view(torch.int16) if x.dtype is torch.bfloat16 else x


def _rows(group: int) -> int:
    return max(1, _ELEMENTS // group)


def quantize(
    x: torch.Tensor,
    parts: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
    bits: int,
    group: int,
    keys: torch.Tensor | None,
) -> None:
    """Writes steps, first points and codes.  x: flat; keys: int32[., 2], of every 2^32 places."""
    steps, firsts, words = parts
    if not len(steps):
        return
    rows, seeded = _rows(group), keys is not None
    given = (_in_memory(x), steps, firsts, words, keys if seeded else steps, x.numel(), len(steps))
    grid = (triton.cdiv(len(steps), rows),)
    _quantize[grid](*given, bits, group, rows, seeded, enable_fp_fusion=False)


def dequantize(
    found: torch.Tensor,
    parts: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
    bits: int,
    group: int,
) -> None:
    """Writes to a flat tensor."""
    steps, firsts, words = parts
    if not len(steps):
        return
    rows = _rows(group)
    given = (_in_memory(found), steps, firsts, words, found.numel(), len(steps))
    grid = (triton.cdiv(len(steps), rows),)
    _dequantize[grid](*given, bits, group, rows, enable_fp_fusion=False)


def pack(mask: torch.Tensor, bits: torch.Tensor) -> None:
    """bool, flat -> uint8[ceil(n / 8)], the first one lowest."""
    if len(bits):
        grid = (triton.cdiv(len(bits), _BITS),)
        _pack[grid](mask.view(torch.uint8), bits, len(mask), len(bits), _BITS)


def unpack(bits: torch.Tensor, mask: torch.Tensor) -> None:
    """The other way."""
    if len(bits):
        grid = (triton.cdiv(len(bits), _BITS),)
        _unpack[grid](bits, mask.view(torch.uint8), len(mask), len(bits), _BITS)
