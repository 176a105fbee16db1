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

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch

from fxmem.errors import EncodingError
from fxmem.sizes import is_dense

_LIBRARY = torch.library.Library("fxmem", "FRAGMENT")

FLOATS = (torch.float32, torch.bfloat16, torch.float16)
"""What is encoded.  Not float64: the points of a grid are computed in float32."""

_STRETCH = {"cpu": 1 << 16}
_LARGE_STRETCH = 1 << 25
"""Elements that are worked on at a time, a multiple of every group."""

_LEAST_GROUP, _LARGEST_GROUP = 16, 1 << 16


# -- Noise -------------------------------------------------------------------------------------------


def _signed(value: int, bits: int) -> int:
    """The integer of so many bits, two's complement, that has these low bits."""
    value &= (1 << bits) - 1
    return value - (1 << bits) if value >> (bits - 1) else value


def keys(seed: torch.Tensor, stream: int, place: int) -> torch.Tensor:
    """int32[2]: what the hash of places from a multiple of 2^32 on is keyed with.

    The finalizer of splitmix64 (Steele et al. 2014, doi:10.1145/2660193.2660195).
    """
    salt = (stream + 1) * 0x9E3779B97F4A7C15 + (place >> 32) * 0xD1342543DE82EF95
    z = seed.reshape(1) + _signed(salt, 64)
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB), (31, 1)):
        z = (z ^ ((z >> shift) & ((1 << (64 - shift)) - 1))) * _signed(factor, 64)
    return z.view(torch.int32)


def uniform(places: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
    """float32 in [0, 1), a multiple of 2^-24, of each place, an int32.

    Two rounds of multiplication (constants: C. Wellons, "lowbias32"), one key before each.
    """
    h = places ^ key[0]
    for shift, factor, more in ((16, 0x7FEB352D, key[1]), (15, 0x846CA68B, None)):
        h ^= (h >> shift).bitwise_and_((1 << (32 - shift)) - 1)
        h *= _signed(factor, 32)
        if more is not None:
            h ^= more
    h ^= (h >> 16).bitwise_and_(0xFFFF)
    h >>= 8
    return h.bitwise_and_(0xFFFFFF).to(torch.float32).mul_(2.0**-24)


class Noise:
    """The draws of one tensor, by place."""

    def __init__(self, seed: torch.Tensor, stream: int, device: torch.device) -> None:
        self.seed, self.stream = seed.to(device), stream
        self._keys: dict[int, torch.Tensor] = {}
        self._places: torch.Tensor | None = None

    def at(self, start: int, count: int) -> torch.Tensor:
        """float32[count], of places that do not cross a multiple of 2^32."""
        if start >> 32 not in self._keys:
            self._keys = {start >> 32: keys(self.seed, self.stream, start)}
        if self._places is None or len(self._places) < count:
            self._places = torch.arange(count, dtype=torch.int32, device=self.seed.device)
        places = self._places[:count] + _signed(start, 32)
        return uniform(places, self._keys[start >> 32])


# -- Grids -------------------------------------------------------------------------------------------


class Grid(NamedTuple):
    """Points (first + code) * step + constant, of each group: float32[G, 1] all three."""

    step: torch.Tensor
    first: torch.Tensor
    constant: torch.Tensor

    def points(self, codes: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """In float32, of values that ``dtype`` holds.  Codes are float32 without fractions."""
        found = torch.addcmul(self.constant, codes + self.first, self.step)
        return found if dtype is torch.float32 else found.to(dtype).to(torch.float32)


_TINY, _LARGEST_FIRST = 2.0**-126, 65000.0


def _fit(x: torch.Tensor, bits: int, dtype: torch.dtype) -> Grid:
    """The grid of each row."""
    low, high = torch.aminmax(x, dim=1, keepdim=True)
    levels = 2.0**bits - 1
    # A little more than the width, for float32 rounds, and for the first point, which is rounded down.
    step = (high / levels - low / levels).mul_(1 + 2.0**-20).add_(low.abs() * (2.0**-10 / levels))
    step = _round_up(torch.maximum(step, low.abs() / _LARGEST_FIRST).clamp_min_(_TINY))
    first = _round_down(low / step)
    ends = torch.cat([first, first + levels], 1).mul_(step).to(dtype)
    spans = ends.isfinite().all(1, keepdim=True) & low.isfinite() & high.isfinite()
    flat = low == high
    step = torch.where(spans, step, torch.nan).masked_fill_(flat, 0.0)
    return Grid(step, first.masked_fill_(flat | ~spans, 0.0), low * 0.0 + torch.where(flat, low, 0))


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
    below = torch.addcmul(-grid.first, x, grid.step.reciprocal()).floor_()
    below.nan_to_num_(0.0).clamp_(0, 2**bits - 2)
    return below, grid.points(below, dtype), grid.points(below + 1, dtype)


# -- Groups ------------------------------------------------------------------------------------------


def _check(x: torch.Tensor, bits: int, group: int) -> None:
    check_float(x)
    check_layout(bits, group)


def check_float(x: torch.Tensor) -> None:
    if x.dtype not in FLOATS:
        raise EncodingError(
            f"a tensor of {x.dtype} has no lossy code: only float32, bfloat16 and float16 have"
        )


def check_dense(x: torch.Tensor) -> None:
    if not is_dense(x):
        raise EncodingError(
            f"a tensor of strides {tuple(x.stride())} and shape {tuple(x.shape)} has gaps, or "
            "elements in one place: encode x.contiguous()"
        )


def check_layout(bits: int, group: int) -> None:
    if bits not in (2, 4, 8):
        raise EncodingError(f"codes have 2, 4 or 8 bits, not {bits}")
    if not _LEAST_GROUP <= group <= _LARGEST_GROUP or group & (group - 1):
        raise EncodingError(f"a group is a power of two from 16 to 65536 elements, not {group}")


def check_seed(seed: torch.Tensor | None) -> None:
    if seed is not None and (seed.dtype is not torch.int64 or seed.numel() != 1):
        raise EncodingError(f"a seed is one int64, not {seed.dtype} of shape {tuple(seed.shape)}")


def _stretches(groups: int, group: int, device: torch.device) -> Iterator[tuple[int, int]]:
    """The first group of each stretch, and the one after its last."""
    step = max(1, _STRETCH.get(device.type, _LARGE_STRETCH) // group)
    return ((at, min(at + step, groups)) for at in range(0, groups, step))


def _flat(tensor: torch.Tensor) -> torch.Tensor:
    """All elements in the order of memory, in which there are no gaps."""
    return tensor.as_strided((tensor.numel(),), (1,))


def _rows(flat: torch.Tensor, at: int, end: int, group: int) -> torch.Tensor:
    """float32[end - at, group] of those groups, the last one filled up with its last element."""
    part = flat[at * group : end * group].to(torch.float32)
    missing = (end - at) * group - len(part)
    if missing:
        part = torch.cat([part, part[-1:].expand(missing)])
    return part.view(end - at, group)


def _parts(
    code: torch.Tensor, groups: int, bits: int, group: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Views of a code: steps as int16, first points as float16, and bytes of codes by group."""
    steps, firsts = code[: 2 * groups], code[2 * groups : 4 * groups]
    words = code[4 * groups :].view(groups, group * bits // 8)
    return steps.view(torch.int16), firsts.view(torch.float16), words


def _join(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """uint8[G, g] below 2^bits -> uint8[G, g bits / 8]."""
    if bits == 8:
        return codes
    count = 8 // bits
    quarters = codes.view(len(codes), count, -1)
    found = quarters[:, 0].clone()
    for n in range(1, count):
        found |= quarters[:, n] << (bits * n)
    return found


def _split(words: torch.Tensor, bits: int) -> torch.Tensor:
    """uint8[G, g bits / 8] -> float32[G, g]."""
    if bits == 8:
        return words.to(torch.float32)
    count, mask = 8 // bits, 2**bits - 1
    found = words.new_empty((len(words), count, words.shape[1]), dtype=torch.float32)
    for n in range(count):
        found[:, n] = (words >> (bits * n)).bitwise_and_(mask)
    return found.view(len(words), -1)


def _quantize(
    x: torch.Tensor, bits: int, group: int, seed: torch.Tensor | None, stream: int
) -> torch.Tensor:
    _check(x, bits, group)
    check_dense(x)
    check_seed(seed)
    code, flat = _fake_quantize(x, bits, group, seed, stream), _flat(x)
    groups = -(-x.numel() // group)
    steps, firsts, words = _parts(code, groups, bits, group)
    noise = None if seed is None else Noise(seed, stream, x.device)
    for at, end in _stretches(groups, group, x.device):
        rows = _rows(flat, at, end, group)
        grid = _fit(rows, bits, x.dtype)
        below, a, b = _sides(rows, grid, bits, x.dtype)
        share = (rows - a).div_(b.sub_(a))  # NaN where both points are one: then the lower will do
        draw = noise.at(at * group, rows.numel()).view_as(rows) if noise else 0.5
        codes = _join(below.add_(share > draw).to(torch.uint8), bits)
        flat_step = grid.step == 0
        codes[:, :4] = torch.where(flat_step, grid.constant.view(torch.uint8), codes[:, :4])
        words[at:end] = codes
        steps[at:end] = _step_word(grid.step)
        firsts[at:end] = grid.first[:, 0]
    return code


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
    check_layout(bits, group)
    found = code.new_empty_strided(size, stride, dtype=dtype)
    check_float(found)
    check_dense(found)
    groups = -(-found.numel() // group)
    check_code(code, groups * (4 + group * bits // 8), found)
    flat, (steps, firsts, words) = _flat(found), _parts(code, groups, bits, group)
    for at, end in _stretches(groups, group, code.device):
        grid = _stored(steps[at:end], firsts[at:end], words[at:end])
        values = _split(words[at:end], bits).add_(grid.first)
        values = torch.addcmul(grid.constant, values, grid.step).view(-1)
        part = flat[at * group : end * group]
        part.copy_(values[: len(part)])
    return found


def check_code(code: torch.Tensor, nbytes: int, found: torch.Tensor) -> None:
    if code.dtype is not torch.uint8 or code.shape != (nbytes,) or not code.is_contiguous():
        raise EncodingError(
            f"a tensor of shape {tuple(found.shape)} has a code of {nbytes} bytes, "
            f"not {code.dtype} of shape {tuple(code.shape)}"
        )


def _stored(steps: torch.Tensor, firsts: torch.Tensor, words: torch.Tensor) -> Grid:
    step = (steps[:, None].to(torch.int32) & 0xFFFF).bitwise_left_shift_(15).view(torch.float32)
    constant = words[:, :4].contiguous().view(torch.float32)
    return Grid(step, firsts[:, None].to(torch.float32), constant.masked_fill_(step != 0, 0.0))


# -- Errors ------------------------------------------------------------------------------------------


def group_variance(x: torch.Tensor, bits: int, group: int) -> torch.Tensor:
    """The expected squared error of each element, exactly: float32, laid out as ``x``.

    NaN where the element comes back as NaN.
    """
    return _by_rows(x, bits, group, _exact)


def group_variance_average(x: torch.Tensor, bits: int, group: int) -> torch.Tensor:
    """The same for an element at random between two points: step^2 / 6."""
    return _by_rows(x, bits, group, lambda rows, grid, *_: (grid.step**2 / 6).expand_as(rows))


def _exact(rows: torch.Tensor, grid: Grid, bits: int, dtype: torch.dtype) -> torch.Tensor:
    _, a, b = _sides(rows, grid, bits, dtype)
    found = (rows - a).clamp_min_(0.0) * (b - rows).clamp_min_(0.0)
    return found.masked_fill_(grid.step == 0, 0.0)


def _by_rows(x: torch.Tensor, bits: int, group: int, function: Any) -> torch.Tensor:
    _check(x, bits, group)
    check_dense(x)
    found = torch.empty_like(x, dtype=torch.float32)  # which keeps the strides of what has no gaps
    flat, result = _flat(x), _flat(found)
    for at, end in _stretches(-(-x.numel() // group), group, x.device):
        rows = _rows(flat, at, end, group)
        part = result[at * group : end * group]
        part.copy_(
            function(rows, _fit(rows, bits, x.dtype), bits, x.dtype).reshape(-1)[: len(part)]
        )
    return found


# -- As operators ------------------------------------------------------------------------------------


def _fake_quantize(
    x: torch.Tensor, bits: int, group: int, seed: torch.Tensor | None, stream: int
) -> torch.Tensor:
    _check(x, bits, group)
    groups = (x.numel() + group - 1) // group
    return x.new_empty((groups * (4 + group * bits // 8),), dtype=torch.uint8)


def _fake_dequantize(
    code: torch.Tensor, bits: int, group: int, size: Any, stride: Any, dtype: torch.dtype
) -> torch.Tensor:
    return code.new_empty_strided(size, stride, dtype=dtype)


for _signature, _real, _fake in (
    (
        "quantize_groups(Tensor x, int bits, int group, Tensor? seed, int stream) -> Tensor",
        _quantize,
        _fake_quantize,
    ),
    (
        "dequantize_groups(Tensor code, int bits, int group, SymInt[] size, SymInt[] stride, "
        "ScalarType dtype) -> Tensor",
        _dequantize,
        _fake_dequantize,
    ),
):
    _LIBRARY.define(_signature)
    _name = _signature.partition("(")[0]
    _LIBRARY.impl(_name, _real, "CompositeExplicitAutograd")
    torch.library.register_fake(f"fxmem::{_name}", _fake, lib=_LIBRARY)

quantize_groups = torch.ops.fxmem.quantize_groups.default
"""x, bits, group, seed (one int64, or None to round to the nearest), stream -> code."""
dequantize_groups = torch.ops.fxmem.dequantize_groups.default
"""code, bits, group, size, strides, type -> the tensor, laid out as it was."""
