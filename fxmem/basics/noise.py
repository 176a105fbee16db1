"""Noise that depends on where it is asked for alone: a hash of (seed, stream, place).

The same on every device and however the work is cut up, and another for each stream.  Two rounds of a
multiplicative hash of 32 bits (constants: C. Wellons, "lowbias32"), keyed before each with 32 of the 64
bits that splitmix64 makes of seed and stream (Steele et al. 2014, doi:10.1145/2660193.2660195).
"""

from __future__ import annotations

import torch

from fxmem.basics.errors import EncodingError


def _signed(value: int, bits: int) -> int:
    """The integer of so many bits, two's complement, that has these low bits."""
    value &= (1 << bits) - 1
    return value - (1 << bits) if value >> (bits - 1) else value


def keys(seed: torch.Tensor, stream: int, place: int) -> torch.Tensor:
    """int32[2]: what the hash of places from a multiple of 2^32 on is keyed with."""
    salt = (stream + 1) * 0x9E3779B97F4A7C15 + (place >> 32) * 0xD1342543DE82EF95
    z = seed.reshape(1) + _signed(salt, 64)
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB), (31, 1)):
        z = (z ^ ((z >> shift) & ((1 << (64 - shift)) - 1))) * _signed(factor, 64)
    return z.view(torch.int32)


def uniform(places: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
    """float32 in [0, 1), a multiple of 2^-24, of each place, an int32.  Overwrites the places."""
    h = places.bitwise_xor_(key[0])
    for shift, factor, more in ((16, 0x7FEB352D, key[1]), (15, 0x846CA68B, None)):
        h ^= (h >> shift).bitwise_and_((1 << (32 - shift)) - 1)
        h *= _signed(factor, 32)
        if more is not None:
            h ^= more
    h ^= (h >> 16).bitwise_and_(0xFFFF)
    h >>= 8
    return h.bitwise_and_(0xFFFFFF).to(torch.float32).mul_(2.0**-24)


class Noise:
    """The draws of one tensor, by place.  Without a seed all are 1/2, which takes the nearer of two."""

    def __init__(self, seed: torch.Tensor | None, stream: int, device: torch.device) -> None:
        if seed is not None and (seed.dtype is not torch.int64 or seed.numel() != 1):
            raise EncodingError(
                f"a seed is one int64, not {seed.dtype} of shape {tuple(seed.shape)}"
            )
        self.seed, self.stream = None if seed is None else seed.to(device), stream
        self._keys: dict[int, torch.Tensor] = {}

    def keys(self, count: int) -> torch.Tensor | None:
        """int32[., 2]: of every 2^32 places of so many; None without a seed."""
        if self.seed is None:
            return None
        starts = range(0, max(count, 1), 1 << 32)
        return torch.stack([keys(self.seed, self.stream, start) for start in starts])

    def at(self, start: int, count: int) -> torch.Tensor | float:
        """float32[count], of places that do not cross a multiple of 2^32."""
        if self.seed is None:
            return 0.5
        if start >> 32 not in self._keys:
            self._keys = {start >> 32: keys(self.seed, self.stream, start)}
        places = torch.arange(count, dtype=torch.int32, device=self.seed.device)
        return uniform(places.add_(_signed(start, 32)), self._keys[start >> 32])
