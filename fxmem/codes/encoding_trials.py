"""Is an encoding what it says?  Trials on small tensors, of what a user registers."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import sympy
import torch

from fxmem._torch import new_fake_mode
from fxmem.basics.errors import EncodingError
from fxmem.codes.lossless import ELEMENTS

if TYPE_CHECKING:
    from fxmem.codes.lossy import LossyEncoding

SHAPES = ((0,), (), (1,), (63,), (5, 67), (2, 3, 9, 11))
"""Of tensors that are tried; the last one in channels_last."""

DRAWS = 64


def check_encoding(encoding: LossyEncoding) -> None:
    """Raises ``EncodingError`` where a trial fails."""
    try:
        for failed in (_declaration, _layouts, _seeds, _errors):
            reason = failed(encoding)
            if reason:
                raise EncodingError(f"encoding {encoding.name!r}: {reason}")
    except EncodingError:
        raise
    except Exception as e:  # of a user's code, whatever it may be
        what = f"{type(e).__name__}: {e}"
        raise EncodingError(f"encoding {encoding.name!r} fails on a small tensor: {what}") from e


def _declaration(encoding: LossyEncoding) -> str | None:
    if not isinstance(encoding.name, str) or not encoding.name:
        return "its name should be a word"
    for role in ("encoder", "decoder"):
        operator = getattr(encoding, role)
        if not isinstance(operator, torch._ops.OpOverload):
            return (
                f"its {role} is {operator!r}; make an operator of it with torch.library.custom_op "
                "and give torch.ops.<namespace>.<name>.default"
            )
        if operator._schema.is_mutable:
            return f"its {role} writes to its operands: {operator._schema}"
    nbytes = sympy.sympify(encoding.nbytes)
    if not nbytes.free_symbols <= {ELEMENTS}:
        return f"its bytes, {nbytes}, may depend on fxmem.ELEMENTS alone"
    if encoding.unbiased and not encoding.seeded:
        return "it is called unbiased, but there is no seed to take a mean over"
    if not encoding.dtypes:
        return "it is of no type of tensor"
    return None


def _sample(shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(dtype)
    return x.contiguous(memory_format=torch.channels_last) if len(shape) == 4 else x


def _seed(value: int) -> torch.Tensor:
    return torch.tensor(value)


def _layouts(encoding: LossyEncoding) -> str | None:
    """Bytes as stated, results laid out as what went in, and fake kernels that know both."""
    for dtype in encoding.dtypes:
        for shape in SHAPES:
            x = _sample(shape, dtype)
            code = encoding.encode(x, _seed(1))
            what = f"of {dtype} {list(shape)}"
            stated = int(sympy.sympify(encoding.nbytes).subs(ELEMENTS, x.numel()))
            if code.untyped_storage().nbytes() != stated:
                return f"a code {what} has {code.untyped_storage().nbytes()} bytes, not {stated}"
            back = encoding.decode(code, x)
            if _form(back) != _form(x):
                return f"what comes back {what} is {_form(back)}, not {_form(x)}"
            with new_fake_mode() as mode:
                fake = encoding.encode(mode.from_tensor(x), mode.from_tensor(_seed(1)))
                undone = encoding.decode(fake, mode.from_tensor(x))
            if _form(fake) != _form(code) or _form(undone) != _form(back):
                return f"its fake kernels give {_form(fake)} and {_form(undone)} {what}"
    return None


def _form(x: torch.Tensor) -> tuple[Any, ...]:
    return tuple(x.shape), x.stride(), x.dtype


def _seeds(encoding: LossyEncoding) -> str | None:
    if not encoding.seeded:
        return None
    x = _sample((64, 32), encoding.dtypes[0])
    first = encoding.encode(x, _seed(1))
    if not torch.equal(first, encoding.encode(x, _seed(1))):
        return "one seed gives two codes"
    if torch.equal(first, encoding.encode(x, _seed(2))):
        return "two seeds give one code"
    if torch.equal(first, encoding.encode(x, _seed(1), 1)):
        return "two streams give one code"
    return None


def _errors(encoding: LossyEncoding) -> str | None:
    """Errors as stated, and a mean over seeds that converges."""
    x = _sample((64, 32), encoding.dtypes[0])
    stated = encoding.variance(x)
    if stated.shape != x.shape or encoding.average(x).shape != x.shape:
        return "its variance and average are one figure for each element"
    expected = float(stated.double().sum())
    draws = DRAWS if encoding.seeded else 1
    errors = torch.stack(
        [encoding.decode(encoding.encode(x, _seed(n)), x).double() - x for n in range(draws)]
    )
    measured = float(errors.square().sum()) / draws
    if not expected * 0.9 <= measured <= expected * 1.1:
        return f"its squared error is {measured:.4g} on a sample, not {expected:.4g}"
    rest = float(errors.mean(0).square().mean()) ** 0.5
    allowed = (expected / draws / x.numel()) ** 0.5
    if encoding.unbiased and rest > 1.5 * allowed:
        return (
            f"the mean of {draws} draws is off by {rest:.4g} an element, root mean square, where "
            f"without bias it would be by {allowed:.4g}"
        )
    return _together(errors, expected) if encoding.unbiased else None


_SUMS = (("all elements", [1, 2], 4.0), ("rows", [2], 1.25), ("columns", [1], 1.25))
"""Over what errors are added up, and how far their variance may be off: one sum of a draw varies more."""


def _together(errors: torch.Tensor, expected: float) -> str | None:
    """Do errors of elements come apart, so that variances of sums over them add up?"""
    for what, dims, times in _SUMS:
        measured = float(errors.sum(dims).square().sum()) / len(errors)
        if not expected / times <= measured <= expected * times:
            return (
                f"the errors of its elements are not independent: the variance of sums over {what} is "
                f"{measured:.4g}, not {expected:.4g}"
            )
    return None
