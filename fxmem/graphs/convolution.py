"""The gradient of a convolution's input from the shape of that input alone.

``aten.convolution_backward`` takes the input even where only the input's own gradient is asked for.
Some kernels then look at its sizes and its memory format and at no element: they get a tensor that
has both and no bytes.  All others get memory with nothing in it, and so does a stand-in that a kernel
would copy into another format first: that costs bytes for as long as the call takes, and no bits.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.utils.flop_counter import conv_flop_count, register_flop_formula

from fxmem._torch import convolution_kernel, with_batch, without_bytes

aten = torch.ops.aten

_READ_THE_SHAPE = frozenset({"Mkldnn", "MkldnnTranspose", "Cudnn", "CudnnTranspose"})
"""Kernels that make the input's gradient from ``input.sizes()`` and the format that goes with it.

Source: convolution_backward in aten/src/ATen/native/Convolution.cpp, and the files of the kernels.
"""

_LIBRARY = torch.library.Library("fxmem", "DEF")
_LIBRARY.define(
    "convolution_input_backward(Tensor grad, Tensor weight, int[] input_size, int[] input_stride, "
    "int[]? bias_sizes, int[] stride, int[] padding, int[] dilation, bool transposed, "
    "int[] output_padding, int groups) -> Tensor"
)


def reads_shape_alone(
    x: torch.Tensor, weight: torch.Tensor, bias_sizes: Any, how: tuple[Any, ...]
) -> bool:
    """May ``x`` be without bytes where its gradient alone is asked for?

    how: stride, padding, dilation, transposed, output padding and groups.
    """
    kernel, memory_format = convolution_kernel(x, weight, bias_sizes, how)
    if kernel not in _READ_THE_SHAPE:
        return False
    seen = x.unsqueeze(2) if weight.ndim == 3 else x
    return seen.is_contiguous(memory_format=memory_format)


def _input_backward(
    grad: torch.Tensor,
    weight: torch.Tensor,
    size: list[int],
    strides: list[int],
    bias_sizes: list[int] | None,
    *how: Any,
) -> torch.Tensor:
    size = with_batch(size, grad)
    if weight.ndim == 3:  # it is run as two dimensions, and a tensor without bytes has no views
        wide = (grad.unsqueeze(2), weight.unsqueeze(2), *_widened(size, strides), bias_sizes)
        return _input_backward(*wide, *_widened_how(*how)).squeeze(2)
    x = without_bytes(size, strides, grad)
    if not reads_shape_alone(x, weight, bias_sizes, how):
        x = grad.new_empty_strided(size, strides)
    return _input_gradient(grad, x, weight, bias_sizes, how)


def _fake_input_backward(
    grad: torch.Tensor,
    weight: torch.Tensor,
    size: list[int],
    strides: list[int],
    bias_sizes: list[int] | None,
    *how: Any,
) -> torch.Tensor:
    x = grad.new_empty_strided(with_batch(size, grad), strides)
    return _input_gradient(grad, x, weight, bias_sizes, how)


def _input_gradient(
    grad: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, bias_sizes: Any, how: tuple[Any, ...]
) -> torch.Tensor:
    mask = [True, False, False]
    found: torch.Tensor = aten.convolution_backward.default(
        grad, x, weight, bias_sizes, *how, mask
    )[0]
    return found


def _widened(size: list[int], strides: list[int]) -> tuple[list[int], list[int]]:
    """[N, C, L] as [N, C, 1, L], with the strides that ``unsqueeze`` gives."""
    batch, channels, length = strides
    return [*size[:2], 1, size[2]], [batch, channels, size[2] * length, length]


def _widened_how(
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    transposed: bool,
    output_padding: list[int],
    groups: int,
) -> tuple[Any, ...]:
    return [1, *stride], [0, *padding], [1, *dilation], transposed, [0, *output_padding], groups


_LIBRARY.define(
    "convolution_relu(Tensor x, Tensor weight, Tensor? bias, SymInt[] stride, SymInt[] padding, "
    "SymInt[] dilation, bool transposed, SymInt[] output_padding, SymInt groups) -> Tensor"
)


def _convolution_relu(*args: Any) -> torch.Tensor:
    found: torch.Tensor = aten.convolution.default(*args)
    return found.relu_()


def _fake_convolution_relu(*args: Any) -> torch.Tensor:
    found: torch.Tensor = aten.convolution.default(*args)
    return found


_LIBRARY.impl("convolution_relu", _convolution_relu, "CompositeExplicitAutograd")
torch.library.register_fake("fxmem::convolution_relu", _fake_convolution_relu, lib=_LIBRARY)

convolution_relu = torch.ops.fxmem.convolution_relu.default
"""A convolution, rectified where it lies; arguments as aten's."""

_LIBRARY.impl("convolution_input_backward", _input_backward, "CompositeExplicitAutograd")
torch.library.register_fake("fxmem::convolution_input_backward", _fake_input_backward, lib=_LIBRARY)

convolution_input_backward = torch.ops.fxmem.convolution_input_backward.default
"""``convolution_input_backward(grad, weight, input_size, input_stride, ...)``, the rest as aten's.

A batch of -1 is the gradient's.
"""


@register_flop_formula(torch.ops.fxmem.convolution_input_backward)
def _flops(
    grad_shape: Any,
    weight_shape: Any,
    size: Any,
    strides: Any,
    bias_sizes: Any,
    stride: Any,
    padding: Any,
    dilation: Any,
    transposed: bool,
    *_: Any,
    **__: Any,
) -> int:
    """What torch counts for this part of ``aten.convolution_backward``."""
    found: int = conv_flop_count(grad_shape, weight_shape, size, not transposed)
    return found
