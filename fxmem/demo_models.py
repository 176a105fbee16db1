"""The demo's models and data: a small GPT on Python's own sources, a small ResNet on digits."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice, pairwise
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fxmem.basics.errors import FxmemError

Batch = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class Task:
    """A model whose forward gives the loss of a batch, and the batches to train it on."""

    name: str
    model: nn.Module
    batches: list[Batch]
    learning_rate: float


def task(name: str, steps: int) -> Task:
    """The task called "gpt" or "resnet", with ``steps`` batches; the same each time."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return {"gpt": _gpt, "resnet": _resnet}[name](steps)


def samples() -> list[tuple[nn.Module, Batch]]:
    """Both models with a batch of zeros: what their operators are like, without any data."""
    text = torch.zeros(8, 128, dtype=torch.long)
    images, labels = torch.zeros(32, 1, 32, 32), torch.zeros(32, dtype=torch.long)
    with torch.random.fork_rng(devices=[]):
        return [(GPT(128), (text, text)), (ResNet(), (images, labels))]


# -- A character-level GPT -------------------------------------------------------------------------

ASCII = 128


class Block(nn.Module):
    """Pre-norm attention and MLP, each behind dropout and a residual."""

    def __init__(self, width: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.heads = heads
        self.dropout = dropout
        self.norm1 = nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)
        self.norm2 = nn.LayerNorm(width)
        self.mlp = nn.Sequential(
            nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width)
        )

    def forward(self, x: Tensor) -> Tensor:
        x = x + F.dropout(self.attention(self.norm1(x)), self.dropout, self.training)
        return x + F.dropout(self.mlp(self.norm2(x)), self.dropout, self.training)

    def attention(self, x: Tensor) -> Tensor:
        """f32[B, S, D] to f32[B, S, D]; each place looks at itself and what is before it."""
        batch, length, width = x.shape
        shape = (batch, length, 3, self.heads, width // self.heads)
        q, k, v = self.qkv(x).view(shape).permute(2, 0, 3, 1, 4)
        y = F.scaled_dot_product_attention(
            q, k, v, dropout_p=self.dropout if self.training else 0.0, is_causal=True
        )
        return self.out(y.transpose(1, 2).reshape(batch, length, width))


class GPT(nn.Module):
    """Decoder-only transformer over characters (Radford et al. 2019, at a small size)."""

    def __init__(
        self, length: int, width: int = 96, heads: int = 4, layers: int = 5, dropout: float = 0.1
    ) -> None:
        super().__init__()
        self.characters = nn.Embedding(ASCII, width)
        self.places = nn.Embedding(length, width)
        self.h = nn.Sequential(*(Block(width, heads, dropout) for _ in range(layers)))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, ASCII)

    def forward(self, text: Tensor, following: Tensor) -> Tensor:
        """text, following: i64[B, S].  The mean loss over all places, a scalar."""
        places = torch.arange(text.shape[1], device=text.device)
        x = self.h(self.characters(text) + self.places(places))
        logits = self.head(self.norm(x))
        return F.cross_entropy(logits.flatten(0, 1), following.flatten())


def _gpt(steps: int) -> Task:
    batch, length = 8, 128
    batches = list(islice(_passages(_sources(), batch, length), steps))
    return Task("gpt", GPT(length), batches, learning_rate=1e-3)


def _sources(limit: int = 2_000_000) -> Tensor:
    """i64[N]: the first ``limit`` ASCII characters of the standard library's own modules."""
    folder = Path(os.__file__).parent
    text = bytearray()
    for path in sorted(folder.glob("*.py")):
        text += bytes(c for c in path.read_bytes() if c < ASCII)
        if len(text) >= limit:
            break
    if len(text) < 10_000:
        raise FxmemError(
            f"found too little text to train on in {folder}\n  try: demo --model resnet"
        )
    return torch.frombuffer(text[:limit], dtype=torch.uint8).long()


def _passages(text: Tensor, batch: int, length: int) -> Iterator[Batch]:
    """i64[batch, length] at random places of ``text``, and the same moved on by one."""
    window = torch.arange(length + 1)
    while True:
        starts = torch.randint(len(text) - length, (batch, 1))
        passages = text[starts + window]
        yield passages[:, :-1].contiguous(), passages[:, 1:].contiguous()


# -- A ResNet with batch normalisation -------------------------------------------------------------


class Residual(nn.Module):
    """Two 3x3 convolutions with batch norm and in-place ReLU around a shortcut (He et al. 2015)."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.relu = nn.ReLU(inplace=True)
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or inputs != outputs:
            self.shortcut = nn.Sequential(
                nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs)
            )

    def forward(self, x: Tensor) -> Tensor:
        y = self.relu(self.bn1(self.conv1(x)))
        y = self.bn2(self.conv2(y))
        y += self.shortcut(x)
        return self.relu(y)


class ResNet(nn.Module):
    """Three stages of two residual blocks over images of one channel."""

    def __init__(self, width: int = 16, classes: int = 10) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, width, 3, padding=1, bias=False)
        widths = [width, width, 2 * width, 4 * width]
        self.stages = nn.Sequential(
            *(
                nn.Sequential(Residual(a, b, 2 if a != b else 1), Residual(b, b, 1))
                for a, b in pairwise(widths)
            )
        )
        self.head = nn.Linear(widths[-1], classes)

    def forward(self, images: Tensor, labels: Tensor) -> Tensor:
        """images: f32[B, 1, H, W], labels: i64[B].  The mean loss, a scalar."""
        features = self.stages(self.stem(images)).mean((2, 3))
        return F.cross_entropy(self.head(features), labels)


def _resnet(steps: int) -> Task:
    images, labels = _digits()
    picks = [torch.randint(len(images), (32,)) for _ in range(steps)]
    return Task("resnet", ResNet(), [(images[p], labels[p]) for p in picks], learning_rate=1e-3)


def _digits() -> Batch:
    """f32[1797, 1, 32, 32] in 0..1 and i64[1797]: scikit-learn's handwritten digits, enlarged."""
    try:
        from sklearn.datasets import load_digits
    except ImportError:
        raise FxmemError(
            "demo --model resnet trains on scikit-learn's digits, which are not installed\n"
            "  try: pip install scikit-learn, or demo --model gpt, which needs nothing more"
        ) from None
    digits = load_digits()
    images = torch.from_numpy(digits.images).float()[:, None] / 16
    images = F.interpolate(images, scale_factor=4, mode="bilinear")
    return images, torch.from_numpy(digits.target).long()
