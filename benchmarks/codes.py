"""Encodings: bytes, error and bias against their formulas, speed against a copy of the same bytes.

    python benchmarks/codes.py --elements 4194304 --draws 64

On the CPU and, where there is one, on a CUDA device.  The tensors are normal, or Student's t of three
degrees of freedom, which has outliers.  Lossless codes are timed beside the backward that reads what eager
saves, and give its bits.  Writes JSON.
"""

import argparse
import dataclasses
import datetime
import json
import sys
import time
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from tabulate import tabulate

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent)]

import fxmem  # noqa: E402
from fxmem.codes import encodings as lossless  # noqa: E402
from fxmem.codes.lossy import DERIVATIVES, LOSSY, LossyEncoding  # noqa: E402
from fxmem.graphs.activations import ACTIVATIONS  # noqa: E402

SAMPLES = ("normal", "heavy-tailed")
DTYPES = {str(d)[6:]: d for d in (torch.float32, torch.bfloat16, torch.float16)}


@dataclasses.dataclass
class Row:
    """bytes: of an element; stated: by the formula.  error: of one draw, root mean square, relative to
    what is coded.  predicted: the same by the formula, and average by the cheaper one.  bias: the squared
    error of the mean of all draws over what an unbiased code has, 1 without bias, the number of draws
    where all errors are the same.  encode, decode: nanoseconds an element.  encode_share,
    decode_share: the time of a copy that moves as many bytes over that time.
    """

    encoding: str
    device: str
    dtype: str
    sample: str
    bytes: float
    stated: float
    error: float
    predicted: float
    average: float
    bias: float
    unbiased: bool
    encode: float | None = None
    decode: float | None = None
    encode_share: float | None = None
    decode_share: float | None = None


def sample_of(name: str, elements: int, dtype: torch.dtype, device: str) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(elements // 1024, 1024, generator=generator)
    if name == "heavy-tailed":
        squares = (torch.randn(x.shape, generator=generator).square() for _ in range(3))
        x = x / (sum(squares) / 3).sqrt()
    return x.to(dtype).to(device)


def coded(encoding: LossyEncoding, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """What the backward saves, and something laid out as what is decoded.

    Derivatives are decoded in float32, as the backward reads them.
    """
    if encoding.settings[0] in ("tanh", "sigmoid"):
        x = getattr(torch, encoding.settings[0])(x)
    return x, (x.float() if encoding.settings[0] in ACTIVATIONS else x)


def wanted(encoding: LossyEncoding, saved: torch.Tensor) -> torch.Tensor:
    """What the code is of, in float64."""
    activation = ACTIVATIONS.get(encoding.settings[0])
    return activation.derivative(saved.double()) if activation else saved.double()


def errors_of(encoding: LossyEncoding, sample: str, draws: int, **how: Any) -> Row:
    saved, like = coded(encoding, sample_of(sample, **how))
    want = wanted(encoding, saved)
    stated = float(encoding.nbytes.subs(fxmem.ELEMENTS, saved.numel())) / saved.numel()
    count, total, one = (draws if encoding.seeded else 1), 0.0, 0.0
    for seed in range(count):
        code = encoding.encode(saved, torch.tensor(seed))
        error = encoding.decode(code, like).double().sub_(want)
        total = error if seed == 0 else total.add_(error)
        one += float(error.square().sum()) / count
    variance = float(encoding.variance(saved).double().sum())
    average = float(encoding.average(saved).double().sum())
    scale = float(want.square().sum())
    mean_square = float(total.square().sum()) / count**2
    return Row(
        encoding.name,
        str(how["device"]),
        str(how["dtype"])[6:],
        sample,
        code.untyped_storage().nbytes() / saved.numel(),
        stated,
        (one / scale) ** 0.5,
        (variance / scale) ** 0.5,
        (average / scale) ** 0.5,
        mean_square * draws / variance if variance else 0.0,
        encoding.unbiased,
    )


# -- Speed -------------------------------------------------------------------------------------------


def seconds(call: Callable[[], Any], device: str, runs: int) -> float:
    """The least of several runs."""
    call()
    best = float("inf")
    for _ in range(runs):
        if device == "cuda":
            torch.cuda.synchronize()
        began = time.perf_counter()
        call()
        if device == "cuda":
            torch.cuda.synchronize()
        best = min(best, time.perf_counter() - began)
    return best


def timed(row: Row, encoding: LossyEncoding, elements: int, dtype: torch.dtype, runs: int) -> None:
    saved, like = coded(encoding, sample_of(row.sample, elements, dtype, row.device))
    seed = torch.tensor(1, device=row.device)
    code = encoding.encode(saved, seed)
    # A copy reads a byte for each that it writes.
    moved = saved.numel() * saved.itemsize + code.numel()
    source = torch.zeros(moved // 2, dtype=torch.uint8, device=row.device)
    target = torch.empty_like(source)
    copy = seconds(lambda: target.copy_(source), row.device, runs)
    encode = seconds(lambda: encoding.encode(saved, seed), row.device, runs)
    decode = seconds(lambda: encoding.decode(code, like), row.device, runs)
    row.encode, row.decode = encode / saved.numel() * 1e9, decode / saved.numel() * 1e9
    row.encode_share, row.decode_share = copy / encode, copy / decode


def rows_of(options: argparse.Namespace, device: str) -> Iterator[Row]:
    for encoding in (*LOSSY, *(e for each in DERIVATIVES.values() for e in each)):
        for name in options.dtypes.split(","):
            dtype = DTYPES[name]
            if dtype not in encoding.dtypes:
                continue
            for sample in SAMPLES:
                how = {"elements": options.sample, "dtype": dtype, "device": device}
                row = errors_of(encoding, sample, options.draws, **how)
                if sample == "normal":
                    timed(row, encoding, options.elements, dtype, options.runs)
                yield row


# -- Lossless ----------------------------------------------------------------------------------------

aten = torch.ops.aten


@dataclasses.dataclass
class Lossless:
    """bytes, saved: of an element of the code, and of what eager saves in its place.  same: are the
    gradients equal to the bit?  encode, backward, eager: nanoseconds an element of the gradient that comes;
    eager is the backward that reads what eager saves.
    """

    encoding: str
    device: str
    bytes: float
    saved: float
    same: bool
    encode: float
    backward: float
    eager: float


Steps = tuple[torch.Tensor, torch.Tensor, Any, Any, Any]
"""What eager saves, the gradient that comes, and what encodes, reads the code, and reads what is saved."""


def rectified(x: torch.Tensor) -> Steps:
    return (
        *(x, x.flip(0), lossless.pack_positive),
        lambda grad, code: lossless.threshold_backward(grad, code, [0]),
        lambda grad, saved: aten.threshold_backward(grad, saved, 0),
    )


def dropped(x: torch.Tensor) -> Steps:
    return (
        *(x > -1, x.flip(0), lossless.pack),
        lambda grad, code: lossless.dropout_backward(grad, code, [0], 1 / 0.9),
        lambda grad, saved: aten.native_dropout_backward(grad, saved, 1 / 0.9),
    )


def pooled(x: torch.Tensor) -> Steps:
    images = x[: len(x) // 1024 * 1024].view(-1, 16, 8, 8)
    how = [3, 3], [2, 2], [1, 1], [1, 1]
    largest, indices = aten.max_pool2d_with_indices(images, *how)
    size, strides = list(images.shape), list(images.stride())
    return (
        *(indices, largest, lambda saved: lossless.pool_offsets(saved, 8, *how)),
        lambda grad, code: lossless.pool_backward(grad, code, size, strides, *how, False),
        lambda grad, saved: aten.max_pool2d_with_indices_backward(grad, images, *how, False, saved),
    )


LOSSLESS = {"relu": rectified, "dropout": dropped, "max pool": pooled}


def lossless_rows(options: argparse.Namespace, device: str) -> Iterator[Lossless]:
    for name, steps in LOSSLESS.items():
        x = sample_of("normal", options.elements, torch.float32, device).flatten()
        saved, grad, encode, backward, eager = steps(x)
        code = encode(saved)
        clocks = {
            "encode": lambda e=encode, s=saved: e(s),
            "backward": lambda b=backward, g=grad, c=code: b(g, c),
            "eager": lambda b=eager, g=grad, s=saved: b(g, s),
        }
        yield Lossless(
            name,
            device,
            bytes=code.nbytes / grad.numel(),
            saved=saved.nbytes / grad.numel(),
            same=torch.equal(backward(grad, code), eager(grad, saved)),
            **{n: seconds(c, device, options.runs) / grad.numel() * 1e9 for n, c in clocks.items()},
        )


# -- Said ----------------------------------------------------------------------------------------------


def table(rows: list[Row]) -> str:
    headers = ["encoding", "device", "type", "sample", "B/elt", "error", "error/formula"]
    headers += ["average/formula", "bias", "encode ns", "decode ns", "of a copy", "of a copy"]
    lines = [
        [
            row.encoding,
            row.device,
            row.dtype,
            row.sample,
            f"{row.bytes:.4f}" if row.bytes == row.stated else f"{row.bytes} IS NOT {row.stated}",
            f"{row.error:.3%}",
            f"{row.error / row.predicted:.3f}" if row.predicted else "",
            f"{row.average / row.predicted:.3f}" if row.predicted else "",
            f"{row.bias:.2f}" + ("" if row.unbiased else " (biased)"),
            *(
                form.format(value) if value is not None else ""
                for form, value in (
                    ("{:.2f}", row.encode),
                    ("{:.2f}", row.decode),
                    ("{:.2%}", row.encode_share),
                    ("{:.2%}", row.decode_share),
                )
            ),
        ]
        for row in rows
    ]
    return tabulate(lines, headers, disable_numparse=True)


def document_of(
    device: str, options: argparse.Namespace, rows: list[Row], exact: list[Lossless]
) -> dict[str, Any]:
    return {
        "device": torch.cuda.get_device_name() if device == "cuda" else "cpu",
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "triton": device == "cuda" and find_spec("triton") is not None,
        "date": datetime.date.today().isoformat(),
        "elements": options.elements,
        "sample": options.sample,
        "draws": options.draws,
        "rows": [dataclasses.asdict(row) for row in rows],
        "lossless": [dataclasses.asdict(row) for row in exact],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--elements", type=int, default=1 << 22, help="of tensors that are timed")
    parser.add_argument("--sample", type=int, default=1 << 16, help="elements for errors")
    parser.add_argument("--draws", type=int, default=64)
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--dtypes", default="float32,bfloat16")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--devices", default="cpu,cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--out", type=Path, default=HERE / "results")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    for device in options.devices.split(","):
        exact = list(lossless_rows(options, device))
        print(tabulate(map(dataclasses.asdict, exact), "keys", floatfmt=".3f"))
        rows: list[Row] = []
        for row in rows_of(options, device):
            rows.append(row)
            print(table([row]).splitlines()[-1], flush=True)
        print(table(rows))
        options.out.mkdir(parents=True, exist_ok=True)
        path = options.out / f"encodings-{device}.json"
        path.write_text(json.dumps(document_of(device, options, rows, exact), indent=1) + "\n")


if __name__ == "__main__":
    main()
