"""Where in its window a max pool's largest element is: a byte, where eager saves an index of 64 bits."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from fxmem._torch import with_batch, without_bytes
from fxmem.codes import native
from fxmem.codes.packing import stretch

aten = torch.ops.aten


def pool_offsets(
    indices: torch.Tensor,
    width: int,
    kernel: list[int],
    stride: list[int],
    padding: list[int],
    dilation: list[int],
) -> torch.Tensor:
    window = native.Window(kernel, stride, padding, dilation)
    offsets = fake_pool_offsets(indices)
    if native.on_native(indices, _native_agrees, torch.int64):
        native.pool_offsets(indices, width, window, offsets)
    else:
        _offsets_by_torch(indices, width, window, offsets)
    return offsets


def fake_pool_offsets(indices: torch.Tensor, *_: Any) -> torch.Tensor:
    return torch.empty_like(indices, dtype=torch.uint8)


def _offsets_by_torch(
    indices: torch.Tensor, width: int, window: native.Window, offsets: torch.Tensor
) -> None:
    top, left = _corners(indices, window)
    for at in _images(indices):
        row, column = indices[at] // width, indices[at] % width
        row.sub_(top).floor_divide_(window.dilation[0]).mul_(window.kernel[1])
        offsets[at] = column.sub_(left).floor_divide_(window.dilation[1]).add_(row)


def pool_backward(
    grad: torch.Tensor,
    offsets: torch.Tensor,
    size: list[int],
    strides: list[int],
    kernel: list[int],
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    ceil_mode: bool,
) -> torch.Tensor:
    window = native.Window(kernel, stride, padding, dilation)
    found = fake_pool_backward(grad, offsets, size, strides)
    if native.on_native(grad, _native_agrees):
        native.pool_backward(grad, offsets, window, found)
    else:
        _backward_by_torch(grad, offsets, window, ceil_mode, found)
    return found


def fake_pool_backward(
    grad: torch.Tensor, offsets: torch.Tensor, size: list[Any], strides: list[Any], *_: Any
) -> torch.Tensor:
    return grad.new_empty_strided(with_batch(size, grad), strides)


def _backward_by_torch(
    grad: torch.Tensor,
    offsets: torch.Tensor,
    window: native.Window,
    ceil_mode: bool,
    found: torch.Tensor,
) -> None:
    kernel, dilation = window.kernel, window.dilation
    height, width = found.shape[-2:]
    top, left = _corners(offsets, window)
    for at in _images(offsets):
        code = offsets[at].long()
        # Clamped, for the kernel trusts what it is given, also where an operator is tried on zeros.
        indices = code.div(kernel[1], rounding_mode="floor").mul_(dilation[0]).add_(top)
        code.remainder_(kernel[1]).mul_(dilation[1]).add_(left).clamp_(0, width - 1)
        indices.clamp_(0, height - 1).mul_(width).add_(code)
        x = without_bytes([len(indices), *found.shape[1:]], [*found.stride()], grad)
        how = (kernel, window.stride, window.padding, dilation, ceil_mode, indices)
        found[at] = aten.max_pool2d_with_indices_backward.default(grad[at], x, *how)


def _images(tensor: torch.Tensor) -> Iterator[slice]:
    """Stretches of whole images."""
    count = len(tensor)
    step = stretch(tensor.device)
    step = max(1, step * count // max(1, tensor.numel()))
    return (slice(at, min(at + step, count)) for at in range(0, count, step))


def _corners(like: torch.Tensor, window: native.Window) -> tuple[torch.Tensor, torch.Tensor]:
    """The first row, and column, of each window; they may lie in the padding."""
    rows, columns = (torch.arange(n, device=like.device) for n in like.shape[-2:])
    stride, padding = window.stride, window.padding
    return (rows * stride[0] - padding[0])[:, None], columns * stride[1] - padding[1]


# -- Do they agree? --------------------------------------------------------------------------------------


@native.proof
def _native_agrees(device: torch.device) -> bool:
    """Of windows that overlap, with padding and without, in either layout."""
    x = torch.linspace(0, 40, 2 * 3 * 9 * 11, device=device).sin().view(2, 3, 9, 11)
    layouts = x, x.contiguous(memory_format=torch.channels_last)
    windows = (
        native.Window([2, 2], [2, 2], [0, 0], [1, 1]),
        native.Window([3, 2], [1, 2], [1, 1], [2, 1]),
    )
    return all(_agrees_on(x, window) for x in layouts for window in windows)


def _agrees_on(x: torch.Tensor, window: native.Window) -> bool:
    how = (window.kernel, window.stride, window.padding, window.dilation)
    y, indices = aten.max_pool2d_with_indices.default(x, *how)
    grad = y.exp()
    offsets = fake_pool_offsets(indices), fake_pool_offsets(indices)
    native.pool_offsets(indices, x.shape[-1], window, offsets[0])
    _offsets_by_torch(indices, x.shape[-1], window, offsets[1])
    found = torch.empty_like(x), torch.empty_like(x)
    native.pool_backward(grad, offsets[1], window, found[0])
    _backward_by_torch(grad, offsets[1], window, False, found[1])
    return torch.equal(*offsets) and torch.equal(*found)
