"""Dropout as a mask that is drawn and a product, which a compiler fuses with its neighbours.

Eager's fused operator makes a mask of bytes and a product that both lie in memory, and to make the
product again is to draw again.  Of the two apart, the mask alone is drawn and saved: the product is
made within the kernels that read it.  Error: none, to the bit, for the operator on the CPU is these two.
Source: aten/src/ATen/native/Dropout.cpp, native_dropout_cpu.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor, fx

from fxmem._torch import run_and_save_rng_state, run_with_rng_state

aten = torch.ops.aten


def mask_and_product(node: fx.Node) -> Callable[..., Any] | None:
    """What to run in the node's place, on its arguments; None where it is no dropout to be taken apart.

    On other devices a kernel draws and multiplies at once, and draws otherwise than one for masks alone.
    """
    target: Any = node.target
    before = _BEFORE.get(target)
    if before is None or (target, *node.args)[before] is not aten.native_dropout.default:
        return None
    x, p, train = cast(tuple[fx.Node, Any, Any], node.args[before:])
    value = x.meta["val"]
    if value.device.type != "cpu" or value.dtype not in _ROUNDED_ALIKE or not value.is_contiguous():
        return None
    return _INSTEAD[target] if train and isinstance(p, float) and 0 < p < 1 else None


_ROUNDED_ALIKE = (torch.float32, torch.float64)
"""Types in which the fused operator rounds its product as two operators do."""


def _apart(x: Tensor, p: float, _: bool) -> tuple[Tensor, Tensor]:
    mask = aten.bernoulli.p(_to_draw_like(x), 1 - p)
    return _product(x, mask, p), mask


def _apart_and_state(_: Any, x: Tensor, p: float, __: bool) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    state, mask = run_and_save_rng_state(aten.bernoulli.p, _to_draw_like(x), 1 - p)
    return state, (_product(x, mask, p), mask)


def _apart_from_state(
    state: Tensor, _: Any, x: Tensor, p: float, __: bool
) -> tuple[Tensor, Tensor]:
    mask = run_with_rng_state(state, aten.bernoulli.p, _to_draw_like(x), 1 - p)
    return _product(x, mask, p), mask


_INSTEAD: dict[Any, Callable[..., Any]] = {
    aten.native_dropout.default: _apart,
    run_and_save_rng_state: _apart_and_state,
    run_with_rng_state: _apart_from_state,
}

_BEFORE: dict[Any, int] = {
    aten.native_dropout.default: 0,
    run_and_save_rng_state: 1,
    run_with_rng_state: 2,
}
"""So many arguments come before those of the operator that draws."""


def _to_draw_like(x: Tensor) -> Tensor:
    """What ``bernoulli`` takes sizes and type from; it has one element, for nobody reads more of it."""
    return x.new_zeros((), dtype=torch.bool).expand(x.shape)


def _product(x: Tensor, mask: Tensor, p: float) -> Tensor:
    return x * mask * (1 / (1 - p))
