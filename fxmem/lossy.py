"""Lossy encodings: what a saved tensor may be kept as, and how large its error is.

Where a backward reads a tensor linearly, an unbiased code leaves the mean of the gradient alone, and adds
the variance that ``variance`` states.  A biased one moves the gradient itself.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import sympy
import torch

from fxmem import quantizers
from fxmem.lossless import ELEMENTS

ErrorModel: TypeAlias = Callable[[torch.Tensor], torch.Tensor]
"""Expected squared error of each element of a tensor, in float32 and laid out as the tensor is."""


@dataclass(frozen=True)
class LossyEncoding:
    """A form of a tensor in fewer bytes, with an error that is known.

    nbytes: of the code of a tensor of ``ELEMENTS`` elements.  encoder: operator from the tensor,
    ``settings`` and, where ``seeded``, a seed and the tensor's own stream, to the code.  decoder: operator
    from the code, ``settings``, size, strides and type to the tensor.  dtypes: what it is made of.
    unbiased: is the mean over seeds the tensor?  variance: the expected squared error given the tensor,
    exactly; average: a cheaper estimate of it, that of an element at random on the grid.
    """

    name: str
    nbytes: sympy.Expr
    encoder: Any
    decoder: Any
    settings: tuple[Any, ...] = ()
    seeded: bool = True
    unbiased: bool = True
    variance: ErrorModel = field(kw_only=True, repr=False)
    average: ErrorModel = field(kw_only=True, repr=False)
    dtypes: tuple[torch.dtype, ...] = quantizers.FLOATS

    def to_encode(self, x: Any, seed: Any, stream: int) -> tuple[Any, ...]:
        """The encoder's arguments, of tensors or of nodes."""
        return (x, *self.settings, seed, stream) if self.seeded else (x, *self.settings)

    def to_decode(self, code: Any, size: Any, stride: Any, dtype: torch.dtype) -> tuple[Any, ...]:
        """The decoder's arguments."""
        return (code, *self.settings, size, stride, dtype)

    def encode(self, x: torch.Tensor, seed: torch.Tensor, stream: int = 0) -> torch.Tensor:
        code: torch.Tensor = self.encoder(*self.to_encode(x, seed, stream))
        return code

    def decode(self, code: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
        """``like``: a tensor of the size, strides and type of what was encoded."""
        given = self.to_decode(code, list(like.shape), list(like.stride()), like.dtype)
        x: torch.Tensor = self.decoder(*given)
        return x


def _integers(bits: int, group: int) -> LossyEncoding:
    return LossyEncoding(
        f"int{bits} g{group}",
        sympy.ceiling(ELEMENTS / group) * (4 + group * bits // 8),
        quantizers.quantize_groups,
        quantizers.dequantize_groups,
        (bits, group),
        variance=lambda x: quantizers.group_variance(x, bits, group),
        average=lambda x: quantizers.group_variance_average(x, bits, group),
    )


LOSSY: tuple[LossyEncoding, ...] = (
    _integers(8, 256),
    _integers(4, 64),
    _integers(2, 64),
)
"""From the finest to the coarsest."""
