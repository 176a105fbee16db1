"""Narrow floating point numbers with a scale for each block of neighbours in memory, or for the tensor.

Casts round to the nearest, with a bias: float8 of both kinds, bfloat16, float16.  One uint8 tensor holds a
float32 scale for each block, then the elements.  A float8's scale is such that the largest finite element
of the block becomes the largest number.  Of the 16-bit ones it is 1, or for float16 the power of two that
keeps the largest element from becoming an Inf.  What is not a number, or infinite, is so afterwards.

Block formats are rounded at random, without bias:

    mxfp8   blocks of 32, scale E8M0, elements E4M3     mxfp4   blocks of 32, scale E8M0, elements E2M1
    nvfp4   blocks of 16, scale E4M3 times a power of two for the tensor, elements E2M1

One uint8 tensor holds nvfp4's float32 for the tensor, the scales of all blocks, and their elements, the
last block filled up; byte j of a block of E2M1 has elements j, lowest, and j + half a block.  Scales are
rounded up, so that no element is cut off; OCP's rule rounds down, and cuts off.  As with groups, the points
between which an element is drawn are those that the decoder makes.  A block with an Inf or a NaN, or with a
point past what the tensor's type holds, has scale NaN and comes back as NaN.

Sources: OCP Microscaling Formats 1.0; Mishra et al. 2025, arXiv:2506.08027 (scales up); NVIDIA 2025,
arXiv:2509.25149 (NVFP4).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

from fxmem.basics.errors import EncodingError
from fxmem.basics.noise import Noise
from fxmem.codes import native
from fxmem.codes.packing import (
    by_rows,
    check_code,
    check_dense,
    check_float,
    define,
    fake_decoder,
    flat,
    group_count,
    join,
    over,
    put,
    rows,
    split,
    stretches,
)

_TINY = 2.0**-126
_E4M3 = torch.float8_e4m3fn


class Numbers(NamedTuple):
    """Floating point numbers: bits of mantissa, the smallest step between two, the largest one."""

    mantissa: int
    least: float
    largest: float

    def spacing(self, x: torch.Tensor) -> torch.Tensor:
        """From the number at or below each, none negative, to the next one."""
        power = x.view(torch.int32).bitwise_and(0x7F800000).view(torch.float32)
        return power.mul_(2.0**-self.mantissa).clamp_min_(self.least)


E4M3 = Numbers(3, 2.0**-9, 448.0)
E2M1 = Numbers(1, 0.5, 6.0)

CASTS = {
    torch.float8_e4m3fn: E4M3,
    torch.float8_e5m2: Numbers(2, 2.0**-16, 57344.0),
    torch.bfloat16: Numbers(7, 2.0**-133, torch.finfo(torch.bfloat16).max),
    torch.float16: Numbers(10, 2.0**-24, 65504.0),
}


def _power_of_two_up(x: torch.Tensor) -> torch.Tensor:
    """At least 2^-126; an Inf as it is."""
    whole = x.clamp_min(_TINY).view(torch.int32).add(0x7FFFFF).bitwise_and_(0x7F800000)
    return whole.view(torch.float32)


def _largest(part: torch.Tensor) -> torch.Tensor:
    """Of the finite elements of each row, without signs: float32[G, 1]."""
    return part.abs().nan_to_num_(0.0, 0.0, 0.0).amax(1, keepdim=True)


def _largest_of_all(x: torch.Tensor) -> torch.Tensor:
    """float32[1, 1]"""
    found, group = x.new_zeros((1, 1), dtype=torch.float32), 1 << 12
    for at, end in stretches(group_count(x, group), group, x.device):
        part = _largest(rows(flat(x), at, end, group))
        found = torch.maximum(found, part.amax(0, keepdim=True))
    return found


# -- Casts -------------------------------------------------------------------------------------------


_TOGETHER = 1 << 12
"""Elements in a row where all have one scale."""


def _check_cast(dtype: torch.dtype, narrow: torch.dtype, block: int | None) -> None:
    check_float(dtype)
    if narrow not in CASTS:
        raise EncodingError(f"a cast is to one of {', '.join(map(str, CASTS))}, not {narrow}")
    if block is not None and (not 1 <= block <= 1 << 16 or block & (block - 1)):
        raise EncodingError(f"a block is a power of two up to 65536 elements, not {block}")


def _cast_scale(largest: torch.Tensor, narrow: torch.dtype) -> torch.Tensor:
    ratio = over(largest, CASTS[narrow].largest)
    if narrow.itemsize == 1:
        return torch.where(largest > 0, ratio.clamp_min_(_TINY), 1.0)
    return torch.where(ratio > 1, _power_of_two_up(ratio), 1.0)


def _scale_count(x: torch.Tensor, block: int | None) -> Any:
    return 1 if block is None else group_count(x, block)


def _cast(x: torch.Tensor, narrow: torch.dtype, block: int | None) -> torch.Tensor:
    code = _fake_cast(x, narrow, block)
    check_dense(x)
    group, count = block or _TOGETHER, _scale_count(x, block)
    scales, elements = code[: 4 * count].view(torch.float32), code[4 * count :].view(narrow)
    if block is None:
        scales.copy_(_cast_scale(_largest_of_all(x), narrow).view(1))
    for at, end in stretches(group_count(x, group), group, x.device):
        part = rows(flat(x), at, end, group)
        if block is None:
            scale = scales[:, None]
        else:
            scale = _cast_scale(_largest(part), narrow)
            scales[at:end] = scale[:, 0]
        scaled = part / scale
        if narrow is _E4M3:  # which has no Inf: torch makes it 448
            scaled.masked_fill_(part.isinf(), torch.nan)
        put(scaled.to(narrow), elements, at, group)
    return code


def _uncast(
    code: torch.Tensor,
    narrow: torch.dtype,
    block: int | None,
    size: list[int],
    stride: list[int],
    dtype: torch.dtype,
) -> torch.Tensor:
    _check_cast(dtype, narrow, block)
    found = code.new_empty_strided(size, stride, dtype=dtype)
    check_dense(found)
    group, count = block or _TOGETHER, _scale_count(found, block)
    check_code(code, 4 * count + found.numel() * narrow.itemsize, found)
    scales, elements = code[: 4 * count].view(torch.float32), code[4 * count :].view(narrow)
    for at, end in stretches(group_count(found, group), group, code.device):
        scale = scales[:, None] if block is None else scales[at:end, None]
        put(rows(elements, at, end, group) * scale, flat(found), at, group)
    return found


def cast_error(x: torch.Tensor, narrow: torch.dtype, block: int | None) -> torch.Tensor:
    """The squared error of each element, exactly: nothing is drawn."""
    code = cast_blocks(x, narrow, block)
    back = uncast_blocks(code, narrow, block, list(x.shape), list(x.stride()), x.dtype)
    return (back.to(torch.float32) - x.to(torch.float32)).square_()


def cast_error_average(x: torch.Tensor, narrow: torch.dtype, block: int | None) -> torch.Tensor:
    """The same for an element at random between two numbers: step^2 / 12."""
    numbers, whole = CASTS[narrow], None
    if block is None:
        whole = _cast_scale(_largest_of_all(x), narrow)

    def of(part: torch.Tensor) -> torch.Tensor:
        scale = _cast_scale(_largest(part), narrow) if whole is None else whole
        return numbers.spacing((part / scale).abs_()).mul_(scale).square_().div_(12)

    _check_cast(x.dtype, narrow, block)
    check_dense(x)
    return by_rows(x, block or _TOGETHER, of)


# -- Block formats -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class BlockFormat:
    """block: elements with one scale.  two_scales: is the tensor scaled too?"""

    block: int
    numbers: Numbers
    two_scales: bool = False

    @property
    def element_bits(self) -> int:
        return 8 if self.numbers is E4M3 else 4

    @property
    def block_nbytes(self) -> int:
        """Of one block, with its scale."""
        return 1 + self.block * self.element_bits // 8

    @property
    def tensor_nbytes(self) -> int:
        """Of what there is once."""
        return 4 if self.two_scales else 0

    # Scales of blocks, as float32 and as bytes

    def scale(self, largest: torch.Tensor) -> torch.Tensor:
        """Of blocks whose largest element is so large in units of the tensor's scale."""
        ratio = over(largest, self.numbers.largest)
        if not self.two_scales:
            return _power_of_two_up(ratio)
        step = E4M3.spacing(ratio)
        return (ratio / step).ceil_().mul_(step).clamp_(E4M3.least, E4M3.largest)

    def scale_bytes(self, scale: torch.Tensor) -> torch.Tensor:
        if self.two_scales:
            return scale.to(_E4M3).view(torch.uint8)
        word = scale.view(torch.int32) >> 23
        return torch.where(scale.isnan(), 255, word).to(torch.uint8)

    def scale_of(self, found: torch.Tensor) -> torch.Tensor:
        if self.two_scales:
            return found.view(_E4M3).to(torch.float32)
        power = (found.to(torch.int32) << 23).view(torch.float32)
        return power.masked_fill_(found == 255, torch.nan)

    # Elements, in units of the scale, without fractions of a step

    def element_bytes(self, values: torch.Tensor) -> torch.Tensor:
        if self.numbers is E4M3:
            return values.to(_E4M3).view(torch.uint8)
        size = values.abs()
        index = size * 2
        torch.minimum(index, size + 2, out=index)
        torch.minimum(index, size.mul_(0.5).add_(4), out=index)
        return join(index.add_(values.signbit(), alpha=8), 4)

    def elements_of(self, words: torch.Tensor) -> torch.Tensor:
        if self.numbers is E4M3:
            return words.view(_E4M3).to(torch.float32)
        index = split(words, 4)
        negative = torch.ge(index, 8, out=torch.empty_like(index))
        size = index.sub_(negative, alpha=8)
        found = size * 0.5
        torch.maximum(found, size - 2, out=found)
        torch.maximum(found, size.mul_(2).sub_(8), out=found)
        return found.mul_(negative.mul_(-2).add_(1))


FORMATS = {
    "mxfp8": BlockFormat(32, E4M3),
    "mxfp4": BlockFormat(32, E2M1),
    "nvfp4": BlockFormat(16, E2M1, two_scales=True),
}


def _format(name: str) -> BlockFormat:
    if name not in FORMATS:
        raise EncodingError(f"a block format is one of {', '.join(FORMATS)}, not {name!r}")
    return FORMATS[name]


class _Sides(NamedTuple):
    """The numbers beside each element, without signs: in units of the scale, and as they come back."""

    low: torch.Tensor
    high: torch.Tensor
    a: torch.Tensor
    b: torch.Tensor


def _sides(size: torch.Tensor, scale: torch.Tensor, numbers: Numbers, dtype: torch.dtype) -> _Sides:
    units = (size / scale).clamp_max_(numbers.largest)
    step = numbers.spacing(units)
    low = units.div_(step).floor_().mul_(step)
    high = step.add_(low).clamp_max_(numbers.largest)
    a, b = low * scale, high * scale
    if dtype is not torch.float32:
        a, b = a.to(dtype).to(torch.float32), b.to(dtype).to(torch.float32)
    return _Sides(low, high, a, b)


def _whole_scale(x: torch.Tensor, how: BlockFormat) -> torch.Tensor:
    """The tensor's: float32[1, 1]."""
    if not how.two_scales:
        return x.new_ones((1, 1), dtype=torch.float32)
    largest = over(_largest_of_all(x), E4M3.largest * E2M1.largest)
    return _power_of_two_up(largest).clamp_min_(2.0**-100)


def _block_scale(
    part: torch.Tensor, whole: torch.Tensor, how: BlockFormat, dtype: torch.dtype
) -> torch.Tensor:
    """Of each block, in units of the tensor's; NaN where the block has no code."""
    largest = part.abs().amax(1, keepdim=True)
    scale = how.scale(largest / whole)
    top = _sides(largest, scale * whole, how.numbers, dtype).b
    return scale.masked_fill_(~(largest.isfinite() & top.isfinite()), torch.nan)


def _quantize(x: torch.Tensor, format: str, seed: torch.Tensor | None, stream: int) -> torch.Tensor:
    if format == _COMPILED and native.on_native(x, _native_agrees):
        return _quantize_natively(x, format, seed, stream)
    return quantize_by_torch(x, format, seed, stream)


_COMPILED = "mxfp4"
"""The format that there is a loop for."""


def _quantize_natively(
    x: torch.Tensor, format: str, seed: torch.Tensor | None, stream: int
) -> torch.Tensor:
    code = _fake_quantize(x, format, seed, stream)
    check_dense(x)
    native.quantize_mxfp4(x, code, Noise(seed, stream, x.device))
    return code


@native.proof
def _native_agrees(device: torch.device) -> bool:
    """With the torch code, with a last block that is not full?"""
    seed, how = torch.full((1,), 3, dtype=torch.int64, device=device), ([5003], [1], torch.float32)
    x = torch.linspace(-3, 2, 5003, device=device).square().sub_(2)
    code = quantize_by_torch(x, _COMPILED, seed, 1)
    back = dequantize_by_torch(code, _COMPILED, *how)
    same = torch.equal(code, _quantize_natively(x, _COMPILED, seed, 1))
    return same and torch.equal(back, _dequantize_natively(code, _COMPILED, *how))


def quantize_by_torch(
    x: torch.Tensor, format: str, seed: torch.Tensor | None, stream: int
) -> torch.Tensor:
    """As the operator, on any device."""
    how, code = _format(format), _fake_quantize(x, format, seed, stream)
    check_dense(x)
    noise, source, groups = Noise(seed, stream, x.device), flat(x), group_count(x, how.block)
    whole = _whole_scale(x, how)
    once, scales, words = _parts(code, groups, how)
    once.copy_(whole[0].view(torch.uint8)[: len(once)])
    for at, end in stretches(groups, how.block, x.device):
        part = rows(source, at, end, how.block)
        scale = _block_scale(part, whole, how, x.dtype)
        values = _drawn(part, scale * whole, how.numbers, x.dtype, noise, at * how.block)
        scales[at:end] = how.scale_bytes(scale)[:, 0]
        words[at:end] = how.element_bytes(values)
        del values  # before the next stretch takes room
    return code


def _drawn(
    part: torch.Tensor,
    scale: torch.Tensor,
    numbers: Numbers,
    dtype: torch.dtype,
    noise: Noise,
    start: int,
) -> torch.Tensor:
    """One of the two numbers beside each element, in units of the scale, by the draws from a place on."""
    draws, size = noise.at(start, part.numel()), part.abs()
    low, high, a, b = _sides(size, scale, numbers, dtype)
    drawn = b.sub_(a).view(-1).mul_(draws)
    above = size.sub_(a).view(-1) > drawn
    found = torch.where(above.view_as(low), high, low, out=low)
    return found.copysign_(part).nan_to_num_(0.0)


def _dequantize(
    code: torch.Tensor, format: str, size: list[int], stride: list[int], dtype: torch.dtype
) -> torch.Tensor:
    like = code.new_empty((0,), dtype=dtype)
    if format == _COMPILED and native.on_native(like, _native_agrees):
        return _dequantize_natively(code, format, size, stride, dtype)
    return dequantize_by_torch(code, format, size, stride, dtype)


def _dequantize_natively(
    code: torch.Tensor, format: str, size: list[int], stride: list[int], dtype: torch.dtype
) -> torch.Tensor:
    found = _room(code, format, size, stride, dtype)
    native.dequantize_mxfp4(code, found)
    return found


def _room(
    code: torch.Tensor, format: str, size: list[int], stride: list[int], dtype: torch.dtype
) -> torch.Tensor:
    """Memory for what the code is of."""
    how, found = _format(format), code.new_empty_strided(size, stride, dtype=dtype)
    check_float(dtype)
    check_dense(found)
    groups = group_count(found, how.block)
    check_code(code, how.tensor_nbytes + groups * how.block_nbytes, found)
    return found


def dequantize_by_torch(
    code: torch.Tensor, format: str, size: list[int], stride: list[int], dtype: torch.dtype
) -> torch.Tensor:
    """As the operator, on any device."""
    how, found = _format(format), _room(code, format, size, stride, dtype)
    groups = group_count(found, how.block)
    once, scales, words = _parts(code, groups, how)
    whole = once.clone().view(torch.float32) if how.two_scales else 1.0
    for at, end in stretches(groups, how.block, code.device):
        scale = how.scale_of(scales[at:end, None]) * whole
        put(how.elements_of(words[at:end]).mul_(scale), flat(found), at, how.block)
    return found


def _parts(code: torch.Tensor, groups: int, how: BlockFormat) -> tuple[torch.Tensor, ...]:
    """What there is once, scales, and bytes of elements by block."""
    begin = how.tensor_nbytes
    words = code[begin + groups :].view(groups, how.block_nbytes - 1)
    return code[:begin], code[begin : begin + groups], words


def block_variance(x: torch.Tensor, format: str) -> torch.Tensor:
    """The expected squared error of each element, exactly; NaN where the element comes back as NaN."""
    return _by_blocks(
        x, format, lambda size, s: (size - s.a).clamp_min_(0).mul_((s.b - size).clamp_(0))
    )


def block_variance_average(x: torch.Tensor, format: str) -> torch.Tensor:
    """The same for an element at random between two numbers: step^2 / 6."""
    return _by_blocks(x, format, lambda _, s: (s.b - s.a).square_().div_(6))


def _by_blocks(x: torch.Tensor, format: str, function: Any) -> torch.Tensor:
    how = _format(format)
    check_float(x.dtype)
    check_dense(x)
    whole = _whole_scale(x, how)

    def of(part: torch.Tensor) -> torch.Tensor:
        scale, size = _block_scale(part, whole, how, x.dtype) * whole, part.abs()
        found: torch.Tensor = function(size, _sides(size, scale, how.numbers, x.dtype))
        return found

    return by_rows(x, how.block, of)


# -- As operators ------------------------------------------------------------------------------------


def _fake_cast(x: torch.Tensor, narrow: torch.dtype, block: int | None) -> torch.Tensor:
    _check_cast(x.dtype, narrow, block)
    nbytes = 4 * _scale_count(x, block) + x.numel() * narrow.itemsize
    return x.new_empty((nbytes,), dtype=torch.uint8)


def _fake_quantize(
    x: torch.Tensor, format: str, seed: torch.Tensor | None, stream: int
) -> torch.Tensor:
    how = _format(format)
    check_float(x.dtype)
    nbytes = how.tensor_nbytes + group_count(x, how.block) * how.block_nbytes
    return x.new_empty((nbytes,), dtype=torch.uint8)


cast_blocks = define(
    "cast_blocks(Tensor x, ScalarType narrow, int? block) -> Tensor", _cast, _fake_cast
)
"""x, narrow type, elements with one scale (None: all) -> code."""

uncast_blocks = define(
    "uncast_blocks(Tensor code, ScalarType narrow, int? block, SymInt[] size, SymInt[] stride, "
    "ScalarType dtype) -> Tensor",
    _uncast,
    fake_decoder,
)

quantize_blocks = define(
    "quantize_blocks(Tensor x, str format, Tensor? seed, int stream) -> Tensor",
    _quantize,
    _fake_quantize,
)
"""x, name of the format, seed (one int64, or None to round to the nearest), stream -> code."""

dequantize_blocks = define(
    "dequantize_blocks(Tensor code, str format, SymInt[] size, SymInt[] stride, ScalarType dtype) "
    "-> Tensor",
    _dequantize,
    fake_decoder,
)
