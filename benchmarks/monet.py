"""MONeT's published points beside plans for the same models: predicted peaks and predicted times.

    python benchmarks/monet.py --models resnet50,vgg16 --devices P100

MONeT (Shah et al., ICLR 2021) chooses what to make again and how convolutions are run, on a P100 with
16 GB.  Its "schedule zoo" lists memory and time beside PyTorch's: https://github.com/utsaslab/MONeT.
Here ResNet-50, U-Net and VGG-16 at its sizes are planned on the meta device for the same shares of
the unchanged step's memory.  Nothing runs, and times are of a roofline: of the GPU, and of a CPU.

Shares are of what activations, gradients and transients hold at the peak; of ``whole`` steps, which
parameters and inputs are part of, too.  Workspaces of convolutions are left out: without the GPU
nobody knows them.  Writes JSON.
"""

import argparse
import dataclasses
import datetime
import itertools
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from tabulate import tabulate
from torch import Tensor, nn

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent)]

from fxmem.analysis.cost import CPU, CostModel, model_of  # noqa: E402
from fxmem.api import read_options  # noqa: E402
from fxmem.basics.gpus import GPUS  # noqa: E402
from fxmem.graphs.capture import StepCall, capture  # noqa: E402
from fxmem.graphs.standins import without_meta  # noqa: E402
from fxmem.steps.analyze import analyze, unchanged_step  # noqa: E402
from fxmem.steps.pipeline import decide  # noqa: E402

PUBLISHED: dict[str, tuple[tuple[float, float], ...]] = {
    "resnet50": ((10.01 / 15.06, 1.0322), (6.00 / 15.06, 1.0931), (4.99 / 15.06, 1.1195)),
    "unet": ((7.00 / 14.32, 1.0139), (6.01 / 14.32, 1.0495), (5.01 / 14.32, 1.1151)),
    "vgg16": ((6.82 / 14.12, 1.0199), (5.90 / 14.12, 1.0544), (5.51 / 14.12, 1.0911)),
}
"""Memory and time of MONeT's schedules over PyTorch's, from its README."""

# -- Models ------------------------------------------------------------------------------------------


def convolution(inputs: int, outputs: int, size: int, stride: int = 1) -> list[nn.Module]:
    """Convolution and normalization; what follows is up to the caller."""
    conv = nn.Conv2d(inputs, outputs, size, stride, padding=size // 2, bias=False)
    return [conv, nn.BatchNorm2d(outputs)]


class Residual(nn.Module):
    """A bottleneck of 1x1, 3x3 (which strides) and 1x1, four times as wide at its end."""

    def __init__(self, inputs: int, width: int, stride: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            *convolution(inputs, width, 1),
            nn.ReLU(inplace=True),
            *convolution(width, width, 3, stride),
            nn.ReLU(inplace=True),
            *convolution(width, 4 * width, 1),
        )
        changes = stride != 1 or inputs != 4 * width
        self.shortcut = nn.Sequential(*(convolution(inputs, 4 * width, 1, stride) * changes))

    def forward(self, x: Tensor) -> Tensor:
        y = self.body(x)
        y += self.shortcut(x)
        return F.relu(y, inplace=True)


class Classifier(nn.Module):
    """Features, then classes and their cross-entropy."""

    def __init__(self, features: nn.Module, head: nn.Module, pooled: int) -> None:
        super().__init__()
        self.features, self.head, self.pooled = features, head, pooled

    def forward(self, x: Tensor, labels: Tensor) -> Tensor:
        y = F.adaptive_avg_pool2d(self.features(x), self.pooled).flatten(1)
        return F.cross_entropy(self.head(y), labels)


def resnet50() -> nn.Module:
    """He et al. 2015: stages of 3, 4, 6 and 3 bottlenecks, 64 to 2048 channels."""
    layers = [*convolution(3, 64, 7, 2), nn.ReLU(inplace=True), nn.MaxPool2d(3, 2, padding=1)]
    channels = 64
    for stage, depth in enumerate((3, 4, 6, 3)):
        for i in range(depth):
            layers.append(Residual(channels, 64 << stage, 2 if stage and not i else 1))
            channels = 4 * (64 << stage)
    return Classifier(nn.Sequential(*layers), nn.Linear(channels, 1000), 1)


def vgg16() -> nn.Module:
    """Simonyan and Zisserman 2014, configuration D, without normalization, with dropout."""
    layers: list[nn.Module] = []
    channels = 3
    for width, depth in ((64, 2), (128, 2), (256, 3), (512, 3), (512, 3)):
        for _ in range(depth):
            layers += [nn.Conv2d(channels, width, 3, padding=1), nn.ReLU(inplace=True)]
            channels = width
        layers.append(nn.MaxPool2d(2))
    head = nn.Sequential(
        nn.Linear(512 * 49, 4096),
        nn.ReLU(inplace=True),
        nn.Dropout(),
        nn.Linear(4096, 4096),
        nn.ReLU(inplace=True),
        nn.Dropout(),
        nn.Linear(4096, 1000),
    )
    return Classifier(nn.Sequential(*layers), head, 7)


def twice(inputs: int, middle: int, outputs: int) -> nn.Sequential:
    """Two 3x3 convolutions, each normalized and rectified."""
    layers: list[nn.Module] = []
    for a, b in ((inputs, middle), (middle, outputs)):
        layers += [nn.Conv2d(a, b, 3, padding=1), nn.BatchNorm2d(b), nn.ReLU(inplace=True)]
    return nn.Sequential(*layers)


class UNet(nn.Module):
    """Ronneberger et al. 2015 as MONeT has it: five levels, adaptive pooling on the way up."""

    def __init__(self) -> None:
        super().__init__()
        self.enter = twice(3, 64, 64)
        widths = (64, 128, 256, 512, 512)
        self.down = nn.ModuleList(twice(a, b, b) for a, b in itertools.pairwise(widths))
        rises = ((1024, 256), (512, 128), (256, 64), (128, 64))
        self.up = nn.ModuleList(twice(a, a // 2, b) for a, b in rises)
        self.leave = nn.Conv2d(64, 1, 1)

    def forward(self, x: Tensor, target: Tensor) -> Tensor:
        y = self.enter(x)
        skips = []
        for block in self.down:
            skips.append(y)
            y = block(F.max_pool2d(y, 2))
        for block, skip in zip(self.up, reversed(skips), strict=True):
            y = block(torch.cat([skip, F.adaptive_avg_pool2d(y, skip.shape[2:])], dim=1))
        return F.binary_cross_entropy_with_logits(self.leave(y), target)


def pictures(batch: int) -> tuple[Tensor, ...]:
    return torch.empty(batch, 3, 224, 224), torch.empty(batch, dtype=torch.long)


def masks(batch: int) -> tuple[Tensor, ...]:
    return torch.empty(batch, 3, 416, 608), torch.empty(batch, 1, 416, 608)


MODELS: dict[str, tuple[Callable[[], nn.Module], Callable[[int], tuple[Tensor, ...]], int]] = {
    "resnet50": (resnet50, pictures, 184),
    "unet": (UNet, masks, 11),
    "vgg16": (vgg16, pictures, 176),
}
"""The model, its inputs, and MONeT's batch size."""

# -- Plans -------------------------------------------------------------------------------------------


@dataclasses.dataclass
class Point:
    """One published point and what is planned for its share of memory.

    memory: bytes over the unchanged step's; ``whole`` says whether parameters and inputs count.
    theirs: MONeT's time over PyTorch's, measured.  ours: predicted; None where no plan fits.
    lower: a bound on any plan's.  smallest: the least share that a plan was found for.
    """

    model: str
    device: str
    whole: bool
    memory: float
    theirs: float
    ours: float | None
    lower: float | None
    smallest: float
    baseline_gb: float
    seconds: float


def points_of(name: str, cost: CostModel) -> list[Point]:
    """Captured and analyzed once, as ``fxmem.plan`` does."""
    make, inputs, batch = MODELS[name]
    with torch.device("meta"):
        model, args = make().train(), inputs(batch)
    call = StepCall(model, args)
    options = options_of(model, "min", cost)
    unchanged = unchanged_step(call)
    with torch.enable_grad(), capture(without_meta(call)) as captured:
        analysis = analyze(captured.graph, call, unchanged, options.cost)
        smallest = decide(analysis, options).plan
        base, resident = smallest.baseline_peak, smallest.resident
        points = []
        for whole in (False, True):
            apart = 0 if whole else resident
            for memory, theirs in PUBLISHED[name]:
                began = time.perf_counter()
                budget = apart + int(memory * (base - apart))
                plan = None
                if budget >= smallest.predicted_peak:
                    plan = decide(analysis, options_of(model, budget, cost)).plan
                ours = None if plan is None else 1 + plan.predicted_overhead
                points.append(
                    Point(
                        name,
                        cost.name,
                        whole,
                        memory,
                        theirs,
                        ours,
                        None if plan is None or plan.gap is None else ours / (1 + plan.gap),
                        (smallest.predicted_peak - apart) / (base - apart),
                        base / 1e9,
                        time.perf_counter() - began,
                    )
                )
    return points


def options_of(model: nn.Module, budget: Any, cost: CostModel) -> Any:
    return read_options(
        model, budget, allow=("recompute", "lossless"), noise=0.01, reserve=0,
        on_infeasible="best", compiler="eager", cost=cost, plan=None,
    )  # fmt: skip


def cost_of(device: str) -> CostModel:
    if device == "cpu":
        return CPU
    return model_of(next(gpu for gpu in GPUS if gpu.name == device))


# -- Results -----------------------------------------------------------------------------------------


def table(points: list[Point]) -> str:
    headers = ["model", "roofline", "memory of", "memory", "MONeT", "fxmem", "any plan", "smallest"]
    return tabulate(
        [
            [
                p.model,
                p.device,
                "the whole step" if p.whole else "activations, gradients",
                f"{p.memory:.2f}",
                f"{p.theirs:.3f}",
                "no plan" if p.ours is None else f"{p.ours:.3f}",
                "" if p.lower is None else f">= {p.lower:.3f}",
                f"{p.smallest:.2f}",
            ]
            for p in points
        ],
        headers,
        disable_numparse=True,
    )


def above(points: list[Point]) -> list[str]:
    """Where MONeT's time is the smaller one."""
    return [
        f"{p.model}, {p.device}, {'whole, ' * p.whole}{p.memory:.2f}: {p.ours} > {p.theirs}"
        for p in points
        if p.ours is None or p.ours > p.theirs
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", default=",".join(MODELS), help="names, by commas")
    parser.add_argument(
        "--devices", default="P100,cpu", help="'cpu' and names in fxmem/basics/gpus.py"
    )
    parser.add_argument("--out", type=Path, default=HERE / "results" / "monet.json")
    options = parser.parse_args()
    points: list[Point] = []
    with tempfile.TemporaryDirectory() as folder:
        os.environ["FXMEM_CACHE_DIR"] = folder  # no workspaces, whatever was measured here before
        for name in options.models.split(","):
            for device in options.devices.split(","):
                points += points_of(name, cost_of(device))
                print(points[-1].model, points[-1].device, flush=True)
    print(table(points))
    print("\n".join(above(points)) or "below MONeT everywhere")
    results = {
        "torch": torch.__version__,
        "date": datetime.date.today().isoformat(),
        "points": [dataclasses.asdict(p) for p in points],
        "above": above(points),
    }
    options.out.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
