"""Numbers in 8, 4 or 2 bits, by groups of neighbours in memory, rounded at random without bias.

A group is so many elements that follow each other in memory, in whatever order the dimensions lie there.
A grid of 2^bits points spans it from its smallest element to its largest.  Each element becomes one of the
two points beside it, the nearer one more often, so that the mean of what comes back is the element:

    x between a and b -> b with probability (x - a) / (b - a), else a.     Variance: (x - a) (b - x).

The points are those that the decoder makes, rounded to the tensor's type, so the mean is right also
where that type is coarser than the grid.  The draw is a hash of (seed, stream, place in memory): the same
on every device, for every stretch, and another for each stream.  Without a seed the nearer point is
taken, with bias.

One uint8 tensor holds it all, for G groups of g elements, the last one filled up:

    2 G bytes    step of each grid: eight bits of exponent, eight of mantissa, rounded up
    2 G bytes    its first point in steps, as float16, rounded down
    G g bits / 8 codes; byte j of a group has those of elements j, j + g bits / 8, ..., the first one lowest

Both are rounded outward before anything is coded, so nothing is cut off at an end.  The grid of a group
far from zero for its width is wider than the group, for its first point is no finer than 2^-10 of itself.
A group of one value has step 0, the value itself as float32 in place of its first codes, and no error.  A
group with an Inf or a NaN, or whose grid passes the largest number of the tensor's type, has step NaN and
comes back as NaN.  No step is below 2^-126, so where a group is that narrow its error is of that order.

Source of the idea: Chen et al. 2021, arXiv:2104.14129 (ActNN).
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch

from fxmem.basics.errors import EncodingError
from fxmem.basics.noise import Noise
from fxmem.codes import native
from fxmem.codes.packing import (
    FLOATS,
    by_rows,
    check_bits,
    check_code,
    check_dense,
    check_float,
    define,
    fake_decoder,
    flat,
    group_count,
    join,
    on_triton,
    put,
    rows,
    split,
    stretches,
)

_LEAST_GROUP, _LARGEST_GROUP = 16, 1 << 16


# -- Grids -------------------------------------------------------------------------------------------


class Grid(NamedTuple):
    """Points (first + code) * step + constant, of each group: float32[G, 1] all three.

    The constant is 0 but where the step is.
    """

    step: torch.Tensor
    first: torch.Tensor
    constant: torch.Tensor

    def points(self, codes: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """In float32, of values that ``dtype`` holds, less the constant.  Codes have no fractions."""
        found = (codes + self.first).mul_(self.step)
        return found if dtype is torch.float32 else found.to(dtype).to(torch.float32)


_TINY, _LARGEST_FIRST = 2.0**-126, 65000.0


def _fit(x: torch.Tensor, bits: int, dtype: torch.dtype) -> Grid:
    """The grid of each row."""
    low, high = x.amin(1, keepdim=True), x.amax(1, keepdim=True)  # on a CPU faster than aminmax
    levels = 2.0**bits - 1
    # A little more than the width, for float32 rounds, and for the first point, which is rounded down.
    step = (high * (1 / levels) - low * (1 / levels)).mul_(1 + 2.0**-20)
    step.add_(low.abs() * (2.0**-10 / levels))
    step = _round_up(torch.maximum(step, low.abs() * (1 / _LARGEST_FIRST)).clamp_min_(_TINY))
    first = _round_down(low / step)
    ends = torch.cat([first, first + levels], 1).mul_(step).to(dtype)
    spans = ends.isfinite().all(1, keepdim=True) & low.isfinite() & high.isfinite()
    flat = low == high
    step = torch.where(spans, step, torch.nan).masked_fill_(flat, 0.0)
    return Grid(step, first.masked_fill_(flat | ~spans, 0.0), torch.where(flat, low, 0.0) + 0.0)


def _round_up(step: torch.Tensor) -> torch.Tensor:
    """To eight bits of mantissa."""
    whole = step.view(torch.int32).add(0x7FFF).bitwise_and_(~0x7FFF)
    return whole.view(torch.float32)


def _round_down(first: torch.Tensor) -> torch.Tensor:
    """To what float16 holds."""
    word = first.view(torch.int32)
    away = word + torch.where(first < 0, 0x1FFF, 0).to(torch.int32)
    normal = away.bitwise_and_(~0x1FFF).view(torch.float32)
    small = (first * 2.0**24).floor_().mul_(2.0**-24)
    return torch.where(first.abs() < 2.0**-14, small, normal)


def _sides(x: torch.Tensor, grid: Grid, bits: int, dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
    """The code of the point at or below each element, that point, and the next one."""
    below = (x * grid.step.reciprocal()).sub_(grid.first).floor_()
    below.nan_to_num_(0.0).clamp_(0, 2**bits - 2)
    after = grid.points(below + 1, dtype)  # first, while there is less beside it
    return below, grid.points(below, dtype), after


# -- Groups ------------------------------------------------------------------------------------------


def _check(dtype: torch.dtype, bits: int, group: int) -> None:
    check_float(dtype)
    check_bits(bits)
    if not _LEAST_GROUP <= group <= _LARGEST_GROUP or group & (group - 1):
        raise EncodingError(f"a group is a power of two from 16 to 65536 elements, not {group}")


def parts_of(
    code: torch.Tensor, groups: int, bits: int, group: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Views of a code: steps as int16, first points as float16, and bytes of codes by group."""
    steps, firsts = code[: 2 * groups], code[2 * groups : 4 * groups]
    words = code[4 * groups :].view(groups, group * bits // 8)
    return steps.view(torch.int16), firsts.view(torch.float16), words


def _quantize(
    x: torch.Tensor, bits: int, group: int, seed: torch.Tensor | None, stream: int
) -> torch.Tensor:
    if on_triton(x, _triton_agrees):
        return _quantize_by_triton(x, bits, group, seed, stream)
    if native.on_native(x, _native_agrees):
        return _quantize_natively(x, bits, group, seed, stream)
    return quantize_by_torch(x, bits, group, seed, stream)


def _quantize_natively(
    x: torch.Tensor, bits: int, group: int, seed: torch.Tensor | None, stream: int
) -> torch.Tensor:
    code = _fake_quantize(x, bits, group, seed, stream)
    check_dense(x)
    native.quantize_groups(x, code, bits, group, Noise(seed, stream, x.device))
    return code


def _quantize_by_triton(
    x: torch.Tensor, bits: int, group: int, seed: torch.Tensor | None, stream: int
) -> torch.Tensor:
    from fxmem.codes import triton_kernels

    code = _fake_quantize(x, bits, group, seed, stream)
    check_dense(x)
    parts = parts_of(code, group_count(x, group), bits, group)
    triton_kernels.quantize(
        flat(x), parts, bits, group, Noise(seed, stream, x.device).keys(x.numel())
    )
    return code


def quantize_by_torch(
    x: torch.Tensor, bits: int, group: int, seed: torch.Tensor | None, stream: int
) -> torch.Tensor:
    """As the operator, on any device."""
    code = _fake_quantize(x, bits, group, seed, stream)
    check_dense(x)
    noise, source, groups = Noise(seed, stream, x.device), flat(x), group_count(x, group)
    steps, firsts, words = parts_of(code, groups, bits, group)
    for at, end in stretches(groups, group, x.device):
        part = rows(source, at, end, group)
        grid = _fit(part, bits, x.dtype)
        words[at:end] = _drawn_codes(part, grid, bits, x.dtype, noise, at * group)
        steps[at:end] = _step_word(grid.step)
        firsts[at:end] = grid.first[:, 0]
    return code


def _drawn_codes(
    part: torch.Tensor, grid: Grid, bits: int, dtype: torch.dtype, noise: Noise, start: int
) -> torch.Tensor:
    """Bytes of the codes of groups that begin at this place.  Draws come first: they take most room."""
    draws = noise.at(start, part.numel())
    below, a, b = _sides(part, grid, bits, dtype)
    drawn = b.sub_(a).view(-1).mul_(draws)
    above = torch.gt(torch.sub(part, a, out=a).view(-1), drawn, out=drawn)
    codes = join(below.add_(above.view_as(below)), bits)
    constant = grid.constant.view(torch.uint8)
    codes[:, :4] = torch.where(grid.step == 0, constant, codes[:, :4])
    return codes


def _step_word(step: torch.Tensor) -> torch.Tensor:
    word = torch.where(step.isnan(), 0xFFFF, step.view(torch.int32) >> 15)
    return word[:, 0].to(torch.int16)


def _dequantize(
    code: torch.Tensor,
    bits: int,
    group: int,
    size: list[int],
    stride: list[int],
    dtype: torch.dtype,
) -> torch.Tensor:
    if on_triton(code, _triton_agrees):
        return _dequantize_by_triton(code, bits, group, size, stride, dtype)
    if native.on_native(code.new_empty((0,), dtype=dtype), _native_agrees):
        return _dequantize_natively(code, bits, group, size, stride, dtype)
    return dequantize_by_torch(code, bits, group, size, stride, dtype)


def _dequantize_natively(
    code: torch.Tensor,
    bits: int,
    group: int,
    size: list[int],
    stride: list[int],
    dtype: torch.dtype,
) -> torch.Tensor:
    found = _room(code, bits, group, size, stride, dtype)
    native.dequantize_groups(code, found, bits, group)
    return found


def _triton_agrees(device: torch.device) -> bool:
    return all(_agree(_quantize_by_triton, _dequantize_by_triton, d, device) for d in FLOATS)


@native.proof
def _native_agrees(device: torch.device) -> bool:
    return _agree(_quantize_natively, _dequantize_natively, torch.float32, device)


def _agree(quantize: Any, dequantize: Any, dtype: torch.dtype, device: torch.device) -> bool:
    """With the torch code, of each number of bits, with a last group that is not full?"""
    seed, how = torch.full((1,), 3, dtype=torch.int64, device=device), ([5003], [1])
    x = torch.linspace(-3, 2, 5003, device=device).square().sub_(2).to(dtype)
    for bits in (2, 4, 8):
        code = quantize_by_torch(x, bits, 64, seed, 1)
        again = dequantize_by_torch(code, bits, 64, *how, dtype)
        if not torch.equal(code, quantize(x, bits, 64, seed, 1)):
            return False
        if not torch.equal(again, dequantize(code, bits, 64, *how, dtype)):
            return False
    return True


def _dequantize_by_triton(
    code: torch.Tensor,
    bits: int,
    group: int,
    size: list[int],
    stride: list[int],
    dtype: torch.dtype,
) -> torch.Tensor:
    from fxmem.codes import triton_kernels

    found = _room(code, bits, group, size, stride, dtype)
    parts = parts_of(code, group_count(found, group), bits, group)
    triton_kernels.dequantize(flat(found), parts, bits, group)
    return found


def _room(
    code: torch.Tensor,
    bits: int,
    group: int,
    size: list[int],
    stride: list[int],
    dtype: torch.dtype,
) -> torch.Tensor:
    """Memory for what the code is of."""
    _check(dtype, bits, group)
    found = code.new_empty_strided(size, stride, dtype=dtype)
    check_dense(found)
    check_code(code, group_count(found, group) * (4 + group * bits // 8), found)
    return found


def dequantize_by_torch(
    code: torch.Tensor,
    bits: int,
    group: int,
    size: list[int],
    stride: list[int],
    dtype: torch.dtype,
) -> torch.Tensor:
    """As the operator, on any device."""
    found = _room(code, bits, group, size, stride, dtype)
    groups = group_count(found, group)
    target, (steps, firsts, words) = flat(found), parts_of(code, groups, bits, group)
    for at, end in stretches(groups, group, code.device):
        grid = _stored(steps[at:end], firsts[at:end], words[at:end])
        put(_decoded(words[at:end], grid, bits), target, at, group)
    return found


def _decoded(words: torch.Tensor, grid: Grid, bits: int) -> torch.Tensor:
    return split(words, bits).add_(grid.first).mul_(grid.step).add_(grid.constant)


def _stored(steps: torch.Tensor, firsts: torch.Tensor, words: torch.Tensor) -> Grid:
    step = (steps[:, None].to(torch.int32) & 0xFFFF).bitwise_left_shift_(15).view(torch.float32)
    constant = words[:, :4].contiguous().view(torch.float32)
    return Grid(step, firsts[:, None].to(torch.float32), torch.where(step == 0, constant, 0.0))


# -- Errors ------------------------------------------------------------------------------------------


def group_variance(x: torch.Tensor, bits: int, group: int) -> torch.Tensor:
    """The expected squared error of each element, exactly: float32, laid out as ``x``.

    NaN where the element comes back as NaN.
    """

    def of(part: torch.Tensor) -> torch.Tensor:
        grid = _fit(part, bits, x.dtype)
        _, a, b = _sides(part, grid, bits, x.dtype)
        found = (part - a).clamp_min_(0.0).mul_((b - part).clamp_min_(0.0))
        return found.masked_fill_(grid.step == 0, 0.0)

    _check(x.dtype, bits, group)
    check_dense(x)
    return by_rows(x, group, of)


def group_variance_average(x: torch.Tensor, bits: int, group: int) -> torch.Tensor:
    """The same for an element at random between two points: step^2 / 6."""
    _check(x.dtype, bits, group)
    check_dense(x)
    return by_rows(x, group, lambda part: (_fit(part, bits, x.dtype).step ** 2 / 6).expand_as(part))


# -- As operators ------------------------------------------------------------------------------------


def _fake_quantize(
    x: torch.Tensor, bits: int, group: int, seed: torch.Tensor | None, stream: int
) -> torch.Tensor:
    _check(x.dtype, bits, group)
    nbytes = group_count(x, group) * (4 + group * bits // 8)
    return x.new_empty((nbytes,), dtype=torch.uint8)


quantize_groups = define(
    "quantize_groups(Tensor x, int bits, int group, Tensor? seed, int stream) -> Tensor",
    _quantize,
    _fake_quantize,
)
"""x, bits, group, seed (one int64, or None to round to the nearest), stream -> code."""

dequantize_groups = define(
    "dequantize_groups(Tensor code, int bits, int group, SymInt[] size, SymInt[] stride, "
    "ScalarType dtype) -> Tensor",
    _dequantize,
    fake_decoder,
)
"""code, bits, group, size, strides, type -> the tensor, laid out as it was."""
