"""Codes in the order of memory: which tensors have one, groups of neighbours, small numbers in bytes."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from functools import cache
from importlib.util import find_spec
from typing import Any

import torch

from fxmem.basics.errors import EncodingError
from fxmem.basics.sizes import is_dense

_LIBRARY = torch.library.Library("fxmem", "FRAGMENT")

FLOATS = (torch.float32, torch.bfloat16, torch.float16)
"""What has a lossy code.  Not float64: its grids would have to be computed in float64."""

_STRETCH = {"cpu": 1 << 16}
_LARGE_STRETCH = 1 << 25
"""Elements: what caches hold, or what keeps an accelerator busy."""


_HAS_TRITON = find_spec("triton") is not None


def on_triton(x: torch.Tensor, agrees: Callable[[torch.device], bool]) -> bool:
    """Is the tensor where Triton's kernels run, and give what the torch code gives?

    agrees: compares the two on a device.
    """
    return x.is_cuda and _HAS_TRITON and is_proven(agrees, x.device)


@cache
def is_proven(agrees: Callable[[torch.device], bool], device: torch.device) -> bool:
    """Tried once on each device: there are more drivers, compilers and processors than anybody tests."""
    try:
        right, why = agrees(device), "give other bits than torch"
    except Exception as error:
        right, why = False, f"fail with {type(error).__name__}: {error}"
    if not right:
        text = f"fxmem: kernels for codes {why} on {device}; torch's run in their place"
        warnings.warn(text, stacklevel=2)
    return right


def define(signature: str, real: Callable[..., Any], fake: Callable[..., Any]) -> Any:
    """An operator of ours, for every device."""
    _LIBRARY.define(signature)
    name = signature.partition("(")[0]
    _LIBRARY.impl(name, real, "CompositeExplicitAutograd")
    torch.library.register_fake(f"fxmem::{name}", fake, lib=_LIBRARY)
    operator, _, overload = name.partition(".")
    return getattr(getattr(torch.ops.fxmem, operator), overload or "default")


# -- What has a code -----------------------------------------------------------------------------------


def check_float(dtype: torch.dtype) -> None:
    if dtype not in FLOATS:
        raise EncodingError(
            f"a tensor of {dtype} has no lossy code: only float32, bfloat16 and float16 have"
        )


def check_dense(x: torch.Tensor) -> None:
    if x.numel() and not is_dense(x):
        raise EncodingError(
            f"a tensor of strides {tuple(x.stride())} and shape {tuple(x.shape)} has gaps, or "
            "elements in one place: encode x.contiguous()"
        )


def check_code(code: torch.Tensor, nbytes: int, of: torch.Tensor) -> None:
    if code.dtype is not torch.uint8 or code.shape != (nbytes,) or not code.is_contiguous():
        raise EncodingError(
            f"a tensor of shape {tuple(of.shape)} has a code of {nbytes} bytes, "
            f"not {code.dtype} of shape {tuple(code.shape)}"
        )


def check_bits(bits: int) -> None:
    if bits not in (2, 4, 8):
        raise EncodingError(f"codes have 2, 4 or 8 bits, not {bits}")


def fake_decoder(code: torch.Tensor, *given: Any) -> torch.Tensor:
    """Of any decoder: its last arguments are the size, the strides and the type of what it gives."""
    *_, size, stride, dtype = given
    return code.new_empty_strided(size, stride, dtype=dtype)


# -- Memory ----------------------------------------------------------------------------------------------


def flat(tensor: torch.Tensor) -> torch.Tensor:
    """All elements in the order of memory, in which there are no gaps."""
    return tensor.as_strided((tensor.numel(),), (1,))


def laid_out(grad: torch.Tensor, order: Sequence[int]) -> torch.Tensor:
    """Memory for a tensor like the gradient whose dimensions lie in this order, the outermost first."""
    within = grad.new_empty([grad.shape[d] for d in order])
    return within.permute([order.index(d) for d in range(len(order))])


def stretch(device: torch.device) -> int:
    """Elements that are worked on at a time."""
    return _STRETCH.get(device.type, _LARGE_STRETCH)


# -- Groups ----------------------------------------------------------------------------------------------


def group_count(x: torch.Tensor, group: int) -> Any:
    return (x.numel() + group - 1) // group


def stretches(groups: int, group: int, device: torch.device) -> Iterator[tuple[int, int]]:
    """The first group of each stretch, and the one after its last."""
    step = max(1, stretch(device) // group)
    return ((at, min(at + step, groups)) for at in range(0, groups, step))


def rows(flat: torch.Tensor, at: int, end: int, group: int) -> torch.Tensor:
    """float32[end - at, group] of those groups, the last one filled up with its last element.

    A view where it can be.
    """
    part = flat[at * group : end * group].to(torch.float32)
    missing = (end - at) * group - len(part)
    if missing:
        part = torch.cat([part, part[-1:].expand(missing)])
    return part.view(end - at, group)


def put(rows: torch.Tensor, flat: torch.Tensor, at: int, group: int) -> None:
    """Rows to where those groups lie, less what filled up the last one."""
    part = flat[at * group : at * group + rows.numel()]
    part.copy_(rows.reshape(-1)[: len(part)])


def by_rows(
    x: torch.Tensor, group: int, function: Callable[[torch.Tensor], torch.Tensor]
) -> torch.Tensor:
    """float32, laid out as ``x``: what a function of float32[groups, group] makes of all groups."""
    found = torch.empty_like(x, dtype=torch.float32)  # which keeps the strides of what has no gaps
    source, result = flat(x), flat(found)
    for at, end in stretches(group_count(x, group), group, x.device):
        put(function(rows(source, at, end, group)), result, at, group)
    return found


def over(x: torch.Tensor, y: float) -> torch.Tensor:
    """x / y, rounded once.  On a GPU torch multiplies by the reciprocal of a number that is no tensor."""
    return x / x.new_full((), y)


# -- Small numbers in bytes ------------------------------------------------------------------------------


def join(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """float32[G, g] below 2^bits, without fractions -> uint8[G, g bits / 8].  Overwrites the codes.

    Byte j has the codes j, j + g bits / 8, ... of its row, the first one lowest.
    """
    parts = codes.view(len(codes), 8 // bits, -1)
    found = parts[:, 0]
    for n in range(1, 8 // bits):
        found.add_(parts[:, n], alpha=2 ** (bits * n))
    return found.to(torch.uint8)


def split(words: torch.Tensor, bits: int) -> torch.Tensor:
    """uint8[G, g bits / 8] -> float32[G, g]."""
    if bits == 8:
        return words.to(torch.float32)
    count, mask = 8 // bits, 2**bits - 1
    found = torch.stack([words >> (bits * n) for n in range(count)], 1).bitwise_and_(mask)
    return found.view(len(words), -1).to(torch.float32)
