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

from fxmem.basics.errors import EncodingError
from fxmem.codes import derivatives, narrow_floats, quantizers
from fxmem.codes.encoding_trials import check_encoding
from fxmem.codes.lossless import ELEMENTS
from fxmem.codes.packing import FLOATS
from fxmem.graphs.activations import ACTIVATIONS

ErrorModel: TypeAlias = Callable[[torch.Tensor], torch.Tensor]
"""Expected squared error of each element of a tensor, in float32 and laid out as the tensor is."""


@dataclass(frozen=True)
class LossyEncoding:
    """A form of a tensor in fewer bytes, with an error that is known.

    nbytes: of the code of a tensor of ``ELEMENTS`` elements.  encoder: operator from the tensor,
    ``settings`` and, where ``seeded``, a seed and the tensor's own stream, to the code.  decoder: operator
    from the code, ``settings``, size, strides and type to the tensor.  dtypes: what it saves bytes of.
    unbiased: is the mean over seeds the tensor?  variance: the expected squared error given the tensor,
    exactly; average: the same for elements that lie at random between the points of a grid.  reader: where
    the code is of a derivative, the operator that reads it in place of the activation's backward, from the
    gradient, the code, the order in which its elements lie, and ``settings``.
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
    dtypes: tuple[torch.dtype, ...] = FLOATS
    reader: Any = None

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


def _cast(name: str, narrow: torch.dtype, block: int | None) -> LossyEncoding:
    scales = 1 if block is None else sympy.ceiling(ELEMENTS / block)
    return LossyEncoding(
        name,
        4 * scales + narrow.itemsize * ELEMENTS,
        narrow_floats.cast_blocks,
        narrow_floats.uncast_blocks,
        (narrow, block),
        seeded=False,
        unbiased=False,
        dtypes=FLOATS if narrow.itemsize == 1 else (torch.float32,),
        variance=lambda x: narrow_floats.cast_error(x, narrow, block),
        average=lambda x: narrow_floats.cast_error_average(x, narrow, block),
    )


def _blocks(name: str) -> LossyEncoding:
    how = narrow_floats.FORMATS[name]
    return LossyEncoding(
        name,
        how.tensor_nbytes + sympy.ceiling(ELEMENTS / how.block) * how.block_nbytes,
        narrow_floats.quantize_blocks,
        narrow_floats.dequantize_blocks,
        (name,),
        variance=lambda x: narrow_floats.block_variance(x, name),
        average=lambda x: narrow_floats.block_variance_average(x, name),
    )


LOSSY: tuple[LossyEncoding, ...] = (
    _cast("float16", torch.float16, None),
    _cast("bfloat16", torch.bfloat16, None),
    _blocks("mxfp8"),
    _cast("e4m3 g128", torch.float8_e4m3fn, 128),
    _integers(8, 256),
    _cast("e4m3", torch.float8_e4m3fn, None),
    _cast("e5m2 g128", torch.float8_e5m2, 128),
    _cast("e5m2", torch.float8_e5m2, None),
    _integers(4, 64),
    _blocks("nvfp4"),
    _blocks("mxfp4"),
    _integers(2, 64),
)
"""Codes of a tensor, from the most bytes to the fewest."""


def _derivative(activation: str, bits: int) -> LossyEncoding:
    group = derivatives.GROUP
    return LossyEncoding(
        f"{activation}' {bits}",
        4 + sympy.ceiling(ELEMENTS / group) * (group * bits // 8),
        derivatives.encode_derivative,
        derivatives.decode_derivative,
        (activation, bits),
        variance=lambda x: derivatives.derivative_variance(x, activation, bits),
        average=lambda x: derivatives.derivative_variance_average(x, activation, bits),
        reader=derivatives.derivative_backward,
    )


DERIVATIVES: dict[str, tuple[LossyEncoding, ...]] = {
    activation: tuple(_derivative(activation, bits) for bits in (8, 4, 2))
    for activation in ACTIVATIONS
}
"""By activation: codes of the derivative at what its backward saves, which is what they decode to.

The backward itself becomes ``derivative_backward`` (fxmem.derivatives), of the gradient and the code, which
reads derivatives in float32; decoded to a narrower type they are rounded to it.
"""


# -- Registered by users -----------------------------------------------------------------------------

_REGISTERED: dict[str, LossyEncoding] = {}


def encodings() -> tuple[LossyEncoding, ...]:
    """Ours and those that were registered."""
    return (*LOSSY, *_REGISTERED.values())


def all_encodings() -> tuple[LossyEncoding, ...]:
    """Those of tensors, and those of derivatives."""
    return (*encodings(), *(e for row in DERIVATIVES.values() for e in row))


def register_encoding(encoding: LossyEncoding) -> LossyEncoding:
    """Let plans choose an encoding of your own.  It is tried first, on small tensors on the CPU.

    Raises ``EncodingError`` where it is not what it says: bytes, layout, fake kernels, repeatability,
    errors, and the mean over seeds.  Sampled: a rare mistake may pass.
    """
    if encoding.name in [e.name for e in all_encodings()]:
        raise EncodingError(f"there is an encoding {encoding.name!r} already")
    check_encoding(encoding)
    _REGISTERED[encoding.name] = encoding
    return encoding
