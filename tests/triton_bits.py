"""Compares Triton's kernels with the operators' torch code.  Run with TRITON_INTERPRET=1, or on a GPU.

With --compile they are compiled for an H100 instead, of which none need be there.
"""

import itertools
import sys
import warnings
from pathlib import Path

import torch

sys.path[:0] = [str(Path(__file__).resolve().parent.parent), str(Path(__file__).resolve().parent)]

from fxmem.basics.noise import keys  # noqa: E402
from fxmem.codes import quantizers, triton_kernels  # noqa: E402
from fxmem.codes.bits import pack_by_torch  # noqa: E402
from fxmem.codes.packing import FLOATS, flat  # noqa: E402

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def samples(dtype):
    """Whole groups and tails; every kind of group."""
    generator = torch.Generator().manual_seed(0)
    yield "normal", torch.randn(64 * 130 + 17, generator=generator)
    yield "one", torch.randn(1, generator=generator)
    yield "none", torch.randn(0, generator=generator)
    yield "scales", torch.randn(64, 256, generator=generator) * torch.logspace(-30, 30, 64)[:, None]
    yield "far", torch.randn(16, 256, generator=generator) + torch.logspace(-3, 6, 16)[:, None]
    odd = torch.randn(12, 256, generator=generator)
    values = [0.1, -3.0, float("inf"), float("-inf"), float("nan"), 0.0]
    odd[:6] = torch.tensor(values)[:, None]
    for row, value in zip(odd[6:], values, strict=True):
        row[5] = value
    yield "odd", odd
    yield "largest", torch.randn(8, 256, generator=generator) * torch.finfo(dtype).max / 4
    yield "subnormal", torch.randn(8, 256, generator=generator) * torch.finfo(dtype).tiny
    yield "relu", torch.randn(8, 256, generator=generator).relu()


def same(a, b):
    a, b = (t.contiguous().view(torch.uint8) for t in (a, b))
    return torch.equal(a, b)


def compare(x, bits, group, seed, stream):
    """Codes, and what comes back."""
    want = quantizers.quantize_by_torch(x, bits, group, seed, stream)
    got = torch.full_like(want, 0xA5)
    groups = -(-x.numel() // group)
    key = None if seed is None else keys(seed.to(x.device), stream, 0)
    triton_kernels.quantize(
        flat(x), quantizers.parts_of(got, groups, bits, group), bits, group, key
    )
    back = torch.full_like(flat(x), 123.0)
    triton_kernels.dequantize(back, quantizers.parts_of(want, groups, bits, group), bits, group)
    given = list(x.shape), list(x.stride()), x.dtype
    returned = flat(quantizers.dequantize_by_torch(want, bits, group, *given))
    nans = torch.equal(back.isnan(), returned.isnan())
    return same(got, want), nans and same(back.nan_to_num(), returned.nan_to_num())


def main():
    warnings.simplefilter("ignore", RuntimeWarning)  # numpy's, of Infs and NaNs that are meant
    count, wrong = 0, []
    for dtype, (bits, group) in itertools.product(FLOATS, ((8, 256), (4, 64), (2, 64), (2, 16))):
        for name, x in samples(dtype):
            x = x.to(dtype).to(DEVICE)
            for seed in (None, torch.tensor(7)):
                encoded, decoded = compare(x, bits, group, seed, 3)
                count += 1
                if not (encoded and decoded):
                    wrong.append((str(dtype), bits, group, name, seed, encoded, decoded))
    for n in (0, 1, 7, 8, 9, 8192, 10001):
        mask = torch.rand(n, generator=torch.Generator().manual_seed(n)).gt(0.5).to(DEVICE)
        want = pack_by_torch(mask)
        bits, back = torch.full_like(want, 0xA5), torch.zeros_like(mask)
        triton_kernels.pack(mask, bits)
        triton_kernels.unpack(want, back)
        count += 1
        if not (torch.equal(bits, want) and torch.equal(back, mask)):
            wrong.append(("mask", n))
    for line in wrong:
        print("not the same:", *line)
    if not wrong:
        print(f"the same: {count} comparisons on {DEVICE}")
    return bool(wrong)


def ptx_of(kernel, types, constants):
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource, compile

    names = kernel.arg_names
    signature = {n: types.get(n, "constexpr") for n in names}
    given = {(names.index(n),): value for n, value in constants.items()}
    source = ASTSource(fn=kernel, signature=signature, constexprs=given)
    options = {"enable_fp_fusion": False}
    return compile(source, target=GPUTarget("cuda", 90, 32), options=options).asm["ptx"]


def compile_all():
    lengths = {"length": "i32", "groups": "i32", "nbytes": "i32"}
    parts = {"steps": "*i16", "firsts": "*fp16", "words": "*u8", "keys": "*i32", **lengths}
    kernels = triton_kernels
    for kind, bits in (("*fp32", 2), ("*i16", 4), ("*fp16", 8)):
        how = {"bits": bits, "group": 64, "rows": 64}
        yield kernels._quantize, {"x": kind, **parts}, {**how, "seeded": True}
        yield kernels._dequantize, {"found": kind, **parts}, how
    masks = {"mask": "*u8", "bits": "*u8", **lengths}
    yield kernels._pack, masks, {"block": 1024}
    yield kernels._unpack, masks, {"block": 1024}


if __name__ == "__main__":
    if "--compile" in sys.argv:
        for kernel, types, constants in compile_all():
            fused = ptx_of(kernel, types, constants).count("fma.rn")
            print(kernel.__name__, fused, "fused")
    else:
        sys.exit(main())
