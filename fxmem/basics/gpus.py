"""GPUs by the names that they report: memory, bandwidth and arithmetic rates, from their makers' pages."""

from __future__ import annotations

import re
from dataclasses import dataclass


@dataclass(frozen=True)
class Gpu:
    """One product.  What the driver takes of its memory, one to eight per cent, is not subtracted.

    gib: memory, GiB.  bandwidth: bytes per second.  fp32, tf32, half: dense operations per second,
    multiply-adds counted as two, of matrix products in float32, in float32 with TF32 allowed, and in
    16 bits with sums in float32.  reported: words that its driver's name for it contains.
    """

    name: str
    gib: int
    bandwidth: float
    fp32: float
    tf32: float
    half: float
    source: str
    reported: str = ""

    @property
    def nbytes(self) -> int:
        return self.gib * 2**30

    @property
    def words(self) -> frozenset[str]:
        return _words(self.reported or self.name)


def _gpu(
    name: str,
    gib: int,
    gigabytes: float,
    fp32: float,
    tf32: float | None,
    half: float | None,
    source: str,
    reported: str = "",
) -> Gpu:
    """Rates in units of 10^12 and bandwidth of 10^9, as makers print them; None: there is no faster way."""
    fp32, tf32, half = (rate * 1e12 for rate in (fp32, tf32 or fp32, half or fp32))
    return Gpu(name, gib, gigabytes * 1e9, fp32, tf32, half, source, reported)


_TURING = "NVIDIA Turing GPU architecture whitepaper, WP-09183, table 1"
_GA102 = "NVIDIA Ampere GA102 GPU architecture whitepaper, appendix A"
_ADA = "NVIDIA Ada GPU architecture whitepaper, appendix A"
_BLACKWELL = "NVIDIA RTX Blackwell GPU architecture whitepaper, appendix A"

GPUS = (
    _gpu("K80", 12, 240, 4.37, None, None, "NVIDIA Tesla K80 datasheet, one of its two GPUs"),
    _gpu("GTX 1080 Ti", 11, 484, 11.3, None, None, "NVIDIA GeForce GTX 1080 Ti product page"),
    _gpu("P100", 16, 732, 9.3, None, 18.7, "NVIDIA Tesla P100 datasheet, PCIe"),
    _gpu("V100 16GB", 16, 900, 15.7, None, 125, "NVIDIA Tesla V100 datasheet, SXM2"),
    _gpu("V100 32GB", 32, 900, 15.7, None, 125, "NVIDIA Tesla V100 datasheet, SXM2"),
    _gpu("RTX 2080", 8, 448, 10.1, None, 40.3, _TURING),
    _gpu("RTX 2080 Ti", 11, 616, 13.4, None, 53.8, _TURING),
    _gpu("T4", 16, 320, 8.1, None, 65, "NVIDIA T4 datasheet"),
    _gpu("RTX 3090", 24, 936, 35.6, 35.6, 71, _GA102),
    _gpu("A10", 24, 600, 31.2, 62.5, 125, "NVIDIA A10 datasheet"),
    _gpu("A10G", 24, 600, 35, 35, 70, "NVIDIA A10G datasheet"),
    _gpu("A30", 24, 933, 10.3, 82, 165, "NVIDIA A30 datasheet"),
    _gpu("A40", 48, 696, 37.4, 74.8, 149.7, "NVIDIA A40 datasheet"),
    _gpu("RTX A6000", 48, 768, 38.7, 77.4, 154.8, "NVIDIA RTX A6000 datasheet"),
    _gpu("A100 40GB", 40, 1555, 19.5, 156, 312, "NVIDIA A100 datasheet"),
    _gpu("A100 80GB", 80, 2039, 19.5, 156, 312, "NVIDIA A100 datasheet, SXM"),
    _gpu("RTX 4090", 24, 1008, 82.6, 82.6, 165.2, _ADA),
    _gpu("RTX 6000 Ada", 48, 960, 91.1, 182.1, 364.2, "NVIDIA RTX 6000 Ada datasheet"),
    _gpu("L4", 24, 300, 30.3, 60, 121, "NVIDIA L4 datasheet"),
    _gpu("L40S", 48, 864, 91.6, 183, 362, "NVIDIA L40S datasheet"),
    _gpu("H100 PCIe", 80, 2000, 51, 378, 756, "NVIDIA H100 datasheet"),
    _gpu("H100 SXM", 80, 3350, 67, 494, 989, "NVIDIA H100 datasheet", "H100 80GB HBM3"),
    _gpu("H200", 141, 4800, 67, 494, 989, "NVIDIA H200 datasheet"),
    _gpu("RTX 5090", 32, 1792, 104.8, 104.8, 209.5, _BLACKWELL),
    _gpu("B200", 180, 7700, 75, 1125, 2250, "NVIDIA HGX B200 datasheet, one GPU"),
    _gpu("MI300X", 192, 5300, 163.4, 653.7, 1307.4, "AMD Instinct MI300X datasheet"),
)

_OTHERS = frozenset({"ti", "super", "laptop", "max", "d", "mig", "vgpu", "ada", "grid"})
"""Words that make another product of one, or a part of one."""


def find_gpu(reported: str) -> Gpu | None:
    """The product behind a driver's name such as ``NVIDIA A100-SXM4-80GB``; None if it is not known."""
    words = _words(reported)
    fitting = [g for g in GPUS if g.words <= words and not (words - g.words) & _OTHERS]
    return max(fitting, key=lambda gpu: len(gpu.words), default=None)


def _words(name: str) -> frozenset[str]:
    return frozenset(re.findall(r"[a-z0-9]+", name.lower()))
