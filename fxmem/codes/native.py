"""Codes of masks and of float32 on the CPU in one pass each: ``kernels.c``, where there is a compiler.

torch takes some sixty operators for what a loop does in registers, and memory beside the tensor for each.
The loop is compiled when it is first needed, in less than a second, and kept in the cache's folder; where
that does not work, or gives other bits, torch's operators run.  ``FXMEM_NATIVE=0`` asks for these.
"""

from __future__ import annotations

import ctypes
import hashlib
import logging
import os
import platform
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import NamedTuple

import torch

from fxmem._torch import fake_tensors_off
from fxmem.basics.noise import Noise
from fxmem.codes.packing import is_proven
from fxmem.graphs.workspace import IMPLEMENTATIONS, cache_folder

log = logging.getLogger(__name__)

SOURCE = Path(__file__).with_name("kernels.c")

_FLAGS: tuple[str, ...] = ("-O3", "-shared", "-fPIC", "-fno-strict-aliasing", "-fno-math-errno")
_FLAGS += ("-fno-trapping-math", "-ffp-contract=off")
"""No products and sums in one rounding: the bits are torch's."""


def on_native(
    x: torch.Tensor, agrees: Callable[[torch.device], bool], dtype: torch.dtype = torch.float32
) -> bool:
    """Is it a tensor that the compiled loops know, and do they give what the torch code gives?"""
    plain = x.device.type == "cpu" and x.dtype is dtype
    return plain and library() is not None and is_proven(agrees, x.device)


@cache
def library() -> ctypes.CDLL | None:
    """The compiled loops; None where there is no compiler, or nowhere to put what it makes."""
    if os.environ.get("FXMEM_NATIVE") == "0":
        return None
    try:
        found = ctypes.CDLL(str(_compiled()))
    except (OSError, subprocess.SubprocessError) as error:
        log.info("codes are computed by torch's operators: %s", error)
        return None
    pointer, count, small = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int
    found.fxmem_pool_offsets.argtypes = (pointer,) * 3 + (count, pointer, pointer)
    found.fxmem_pool_backward.argtypes = (pointer,) * 9
    found.fxmem_quantize_groups.argtypes = (pointer, count, pointer, count, small, pointer, count)
    found.fxmem_dequantize_groups.argtypes = (pointer, count, pointer, count, small)
    found.fxmem_quantize_mxfp4.argtypes = (pointer, count, pointer, pointer, count)
    found.fxmem_dequantize_mxfp4.argtypes = (pointer, count, pointer)
    real = ctypes.c_float
    found.fxmem_pack.argtypes = (pointer, count, pointer)
    found.fxmem_pack_above.argtypes = (pointer, count, real, pointer)
    found.fxmem_pack_positive.argtypes = (pointer, count, pointer)
    found.fxmem_unpack.argtypes = (pointer, count, pointer)
    found.fxmem_threshold_backward.argtypes = (pointer, count, pointer, pointer)
    found.fxmem_leaky_relu_backward.argtypes = (pointer, count, pointer, real, pointer)
    found.fxmem_dropout_backward.argtypes = (pointer, count, pointer, real, pointer)
    found.fxmem_round_derivatives.argtypes = (
        *(pointer, count, pointer, real, real, small),
        *(pointer, count, count),
    )
    found.fxmem_multiply_derivatives.argtypes = (
        *(pointer, count, pointer, real, real, real, small),
        pointer,
    )
    return found


PROOFS: list[Callable[[torch.device], bool]] = []
"""What compares loops with torch's operators, for ``on_native``."""


def proof(agrees: Callable[[torch.device], bool]) -> Callable[[torch.device], bool]:
    """Decorator of these."""
    PROOFS.append(agrees)
    return agrees


@cache
def implementation() -> str:
    """Which code the operators of ours run: a hash of all of it, and whether the loops are compiled.

    The loops are proven here, so that it is no part of what an operator is seen to hold, or of a step.
    """
    if library() is not None:
        with fake_tensors_off(), torch.no_grad():
            for agrees in PROOFS:
                is_proven(agrees, torch.device("cpu"))
    files = sorted(p for p in SOURCE.parent.iterdir() if p.suffix in (".py", ".c"))
    digest = hashlib.sha256(b"".join(p.read_bytes() for p in files)).hexdigest()[:12]
    return f"@{digest}{'' if library() is None else '+loops'}"


IMPLEMENTATIONS["fxmem"] = implementation


def _compiled() -> Path:
    """The file, made where it is not there yet.  Its name is a hash of all that it depends on."""
    compiler = os.environ.get("CC") or shutil.which("cc") or shutil.which("gcc")
    wide = torch.backends.cpu.get_cpu_capability() in ("AVX2", "AVX512")
    flags = (*_FLAGS, "-mavx2") if wide else _FLAGS
    about = (platform.platform(), platform.machine(), *flags)
    name = hashlib.sha256(SOURCE.read_bytes() + "\0".join(about).encode()).hexdigest()[:16]
    target = cache_folder() / f"kernels-{name}.so"
    if target.exists():
        return target
    if compiler is None:
        raise FileNotFoundError("there is no C compiler")
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent) as folder:
        made = Path(folder) / "kernels.so"
        command = [compiler, *flags, "-o", str(made), str(SOURCE), "-lm"]
        subprocess.run(command, check=True, capture_output=True, timeout=60)
        os.replace(made, target)  # others that look for it see all of it or nothing
    return target


# -- The operators ---------------------------------------------------------------------------------------


def _loops() -> ctypes.CDLL:
    found = library()
    assert found is not None
    return found


def pack(mask: torch.Tensor, bits: torch.Tensor) -> None:
    _loops().fxmem_pack(*_memory(mask), bits.data_ptr())


def pack_above(x: torch.Tensor, threshold: float, bits: torch.Tensor) -> None:
    _loops().fxmem_pack_above(*_memory(x), threshold, bits.data_ptr())


def pack_positive(x: torch.Tensor, bits: torch.Tensor) -> None:
    _loops().fxmem_pack_positive(*_memory(x), bits.data_ptr())


def unpack(bits: torch.Tensor, mask: torch.Tensor) -> None:
    _loops().fxmem_unpack(bits.data_ptr(), mask.numel(), mask.data_ptr())


def threshold_backward(grad: torch.Tensor, bits: torch.Tensor, found: torch.Tensor) -> None:
    _loops().fxmem_threshold_backward(*_memory(grad), bits.data_ptr(), found.data_ptr())


def leaky_relu_backward(
    grad: torch.Tensor, bits: torch.Tensor, slope: float, found: torch.Tensor
) -> None:
    _loops().fxmem_leaky_relu_backward(*_memory(grad), bits.data_ptr(), slope, found.data_ptr())


def dropout_backward(
    grad: torch.Tensor, bits: torch.Tensor, scale: float, found: torch.Tensor
) -> None:
    _loops().fxmem_dropout_backward(*_memory(grad), bits.data_ptr(), scale, found.data_ptr())


class Window(NamedTuple):
    """A pool's, in rows and columns."""

    kernel: Sequence[int]
    stride: Sequence[int]
    padding: Sequence[int]
    dilation: Sequence[int]

    def numbers(self) -> ctypes.Array[ctypes.c_int64]:
        """As the loops take them, which need not know how many rows there are."""
        return _numbers([self.kernel[1], *self.stride, *self.padding, *self.dilation])


def pool_offsets(indices: torch.Tensor, width: int, window: Window, offsets: torch.Tensor) -> None:
    """width: of what the indices are into.  offsets: laid out as the indices."""
    given = _in_four_dimensions(indices)
    _loops().fxmem_pool_offsets(
        *(given.data_ptr(), _numbers(given.shape), _numbers(given.stride()), width),
        *(window.numbers(), offsets.data_ptr()),
    )


def pool_backward(
    grad: torch.Tensor, offsets: torch.Tensor, window: Window, found: torch.Tensor
) -> None:
    grad, offsets, whole = map(_in_four_dimensions, (grad, offsets, found.zero_()))
    _loops().fxmem_pool_backward(
        *(grad.data_ptr(), _numbers(grad.shape), _numbers(grad.stride())),
        *(offsets.data_ptr(), _numbers(offsets.stride()), window.numbers()),
        *(whole.data_ptr(), _numbers(whole.shape), _numbers(whole.stride())),
    )


def _in_four_dimensions(images: torch.Tensor) -> torch.Tensor:
    return images if images.ndim == 4 else images.unsqueeze(0)


def _numbers(given: Sequence[int]) -> ctypes.Array[ctypes.c_int64]:
    return (ctypes.c_int64 * len(given))(*given)


def quantize_groups(
    x: torch.Tensor, code: torch.Tensor, bits: int, group: int, noise: Noise
) -> None:
    _loops().fxmem_quantize_groups(
        *_memory(x), code.data_ptr(), group, bits, _seed(noise), noise.stream
    )


def dequantize_groups(code: torch.Tensor, found: torch.Tensor, bits: int, group: int) -> None:
    _loops().fxmem_dequantize_groups(*_memory(found), code.data_ptr(), group, bits)


def quantize_mxfp4(x: torch.Tensor, code: torch.Tensor, noise: Noise) -> None:
    _loops().fxmem_quantize_mxfp4(*_memory(x), code.data_ptr(), _seed(noise), noise.stream)


def dequantize_mxfp4(code: torch.Tensor, found: torch.Tensor) -> None:
    _loops().fxmem_dequantize_mxfp4(*_memory(found), code.data_ptr())


def round_derivatives(
    derivatives: torch.Tensor,
    words: torch.Tensor,
    grid: tuple[float, float],
    bits: int,
    noise: Noise,
    place: int,
) -> None:
    """Of whole groups of derivatives, the first of which is at this place."""
    _loops().fxmem_round_derivatives(
        *(derivatives.data_ptr(), len(derivatives), words.data_ptr(), *grid, bits),
        *(_seed(noise), noise.stream, place),
    )


def multiply_derivatives(
    grad: torch.Tensor,
    code: torch.Tensor,
    header: int,
    grid: tuple[float, float],
    bits: int,
    found: torch.Tensor,
) -> None:
    """header: bytes of the code before the words; a float32 that is added to each derivative."""
    added = float(code[:header].view(torch.float32))
    _loops().fxmem_multiply_derivatives(
        *_memory(grad), code.data_ptr() + header, *grid, added, bits, found.data_ptr()
    )


def _memory(x: torch.Tensor) -> tuple[int, int]:
    return x.data_ptr(), x.numel()


def _seed(noise: Noise) -> int | None:
    return None if noise.seed is None else noise.seed.data_ptr()
