"""Private functions of torch with which a convolution's backward reads its operands as they lie.

before                                     after
  x1 = copy(x), strides of the weight's      dx, dw, db = convolution_backward(dy, x, w)
  dy1 = copy(dy), strides of the weight's
  dy2 = copy(dy1), strides of the input's
  dx, dw, db = convolution_backward(dy2, x1, w)

From 2.13 on Inductor first lays operands out for kernels of Triton, in the order in which the gradients'
dimensions lie, and then calls the operator all the same where there are no such kernels.  On a CPU there
never are.  The copies take bytes, and where input and gradient lie differently by then, as in 2.13 with a
depthwise weight, the operator takes two to three times as long.  Where they lie differently from the start,
one of them is copied anyway, by Inductor or by the operator, and Inductor may write over it later: that
stays as it is, but for sizes that may change, which the copies make constants of.

Compiled and run on torch 2.13.0, 2.11.0 and 2.15.0.
"""

from __future__ import annotations

from typing import Any
from unittest import mock

import torch
from torch._inductor.ir import get_device_type, get_stride_order
from torch._inductor.lowering import fallback_handler, lowerings

_BACKWARD = torch.ops.aten.convolution_backward.default

AS_THEY_LIE = "convolutions' operands as they lie"
"""What code that was made so is known by in torch's cache."""


def operands_as_they_lie() -> Any:
    """A context in which Inductor calls the backward of a convolution on a CPU without copies before."""
    as_torch_does = lowerings[_BACKWARD]
    as_it_is = fallback_handler(_BACKWARD, add_to_fallback_set=False)

    def lowered(gradient: Any, source: Any, *rest: Any, **how: Any) -> Any:
        plain = get_device_type(source) == "cpu" and _are_read_as_they_lie(gradient, source)
        lower = as_it_is if plain else as_torch_does
        return lower(gradient, source, *rest, **how)

    return mock.patch.dict(lowerings, {_BACKWARD: lowered})


def _are_read_as_they_lie(first: Any, second: Any) -> bool:
    """Does the operator read both without a copy, or may their sizes change?

    It does if their dimensions are in the same order in memory, and if the channels are innermost in both.
    """
    strides = [x.maybe_get_stride() for x in (first, second)]
    if None in strides:
        return False
    if not all(map(_is_constant, (*strides[0], *strides[1]))):
        return True
    one, other = map(get_stride_order, strides)
    return bool(one == other or one[1] == other[1] == 0)


def _is_constant(size: Any) -> bool:
    return not getattr(size, "free_symbols", ())
