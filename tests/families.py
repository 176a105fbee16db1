"""The model families that tests and benchmarks train: eight architectures, each also with dropout.

``FAMILIES[name].build(size)`` gives ``(model, args, kwargs)``, the loss is inside the model, and
``loss_of(model(*args, **kwargs))`` is the scalar to run backward on.  Sizes: ``tiny`` for fuzzing
(milliseconds), ``small`` for CI (activations outweigh parameters), ``bench`` for comparisons,
``wide`` for as many channels as models in use have, and few layers.

Weights and inputs are seeded by the build alone; dropout draws from the global generator, so a
comparison seeds it before each step.
"""

import itertools
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Built = tuple[nn.Module, tuple[Any, ...], dict[str, Any]]
SIZES = ("tiny", "small", "bench", "wide")


@dataclass(frozen=True)
class Family:
    """One architecture at four sizes; ``batch`` holds the batch size of each."""

    name: str
    make: Callable[..., Built] = field(repr=False)
    sizes: dict[str, dict[str, Any]] = field(repr=False)
    dropout: float = 0.0

    @property
    def has_dropout(self) -> bool:
        return self.dropout > 0

    @property
    def batch(self) -> dict[str, int]:
        return {size: dims["batch"] for size, dims in self.sizes.items()}

    def build(self, size: str = "small", **changes: Any) -> Built:
        """The model in training mode and its inputs; ``changes`` override dimensions (batch=2)."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            model, args, kwargs = self.make(**{**self.sizes[size], "p": self.dropout, **changes})
        return model.train(), args, kwargs


def loss_of(output: Any) -> Tensor:
    """The scalar loss in what a family's model returns."""
    if isinstance(output, Tensor):
        return output
    return output["loss"] if isinstance(output, dict) else output.loss


# Language models, from transformers.


def llama(batch: int, seq: int, dim: int, ffn: int, heads: int, layers: int, p: float) -> Built:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=256,
        hidden_size=dim,
        intermediate_size=ffn,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=heads,
        max_position_embeddings=seq,
        attention_dropout=p,
        use_cache=False,
    )
    ids = torch.randint(256, (batch, seq))
    return LlamaForCausalLM(config), (ids,), {"labels": ids.clone(), "use_cache": False}


def gpt2(batch: int, seq: int, dim: int, heads: int, layers: int, p: float) -> Built:
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(
        vocab_size=256,
        n_positions=seq,
        n_embd=dim,
        n_layer=layers,
        n_head=heads,
        resid_pdrop=p,
        embd_pdrop=p,
        attn_pdrop=p,
        use_cache=False,
        bos_token_id=0,
        eos_token_id=0,
    )
    ids = torch.randint(256, (batch, seq))
    model = GPT2LMHeadModel(config)
    model.loss_type = "ForCausalLM"  # its class's name does not tell, and a warning stops capture
    return model, (ids,), {"labels": ids.clone(), "use_cache": False}


def encdec(
    batch: int, source: int, target: int, dim: int, ffn: int, heads: int, layers: int, p: float
) -> Built:
    """T5: relative positions, cross attention, one embedding shared by both sides and the head."""
    from transformers import T5Config, T5ForConditionalGeneration

    config = T5Config(
        vocab_size=128,
        d_model=dim,
        d_kv=dim // heads,
        d_ff=ffn,
        num_layers=layers,
        num_decoder_layers=layers,
        num_heads=heads,
        dropout_rate=p,
        use_cache=False,
        tie_word_embeddings=True,
        pad_token_id=0,
        eos_token_id=1,
        decoder_start_token_id=0,
    )
    kwargs = {
        "input_ids": torch.randint(2, 128, (batch, source)),
        "labels": torch.randint(2, 128, (batch, target)),
        "use_cache": False,
    }
    return T5ForConditionalGeneration(config), (), kwargs


# Vision models.


def images(batch: int, pixels: int, classes: int) -> tuple[Tensor, Tensor]:
    return torch.randn(batch, 3, pixels, pixels), torch.randint(classes, (batch,))


def vit(
    batch: int, pixels: int, patch: int, dim: int, ffn: int, heads: int, layers: int, p: float
) -> Built:
    from transformers import ViTConfig, ViTForImageClassification

    config = ViTConfig(
        hidden_size=dim,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        intermediate_size=ffn,
        hidden_dropout_prob=p,
        attention_probs_dropout_prob=p,
        image_size=pixels,
        patch_size=patch,
        num_labels=10,
        problem_type="single_label_classification",
    )
    x, labels = images(batch, pixels, 10)
    return ViTForImageClassification(config), (x,), {"labels": labels}


def convnext(batch: int, pixels: int, widths: list[int], depths: list[int], p: float) -> Built:
    from transformers import ConvNextConfig, ConvNextForImageClassification

    config = ConvNextConfig(
        patch_size=2,
        hidden_sizes=widths,
        depths=depths,
        num_stages=len(widths),
        image_size=pixels,
        drop_path_rate=p,
        layer_scale_init_value=0.1,
        num_labels=10,
        problem_type="single_label_classification",
    )
    x, labels = images(batch, pixels, 10)
    return ConvNextForImageClassification(config), (x,), {"labels": labels}


class Bottleneck(nn.Module):
    """1x1, 3x3, 1x1 with BatchNorm and in-place ReLU around a shortcut (He et al. 2015)."""

    expansion = 4

    def __init__(self, inputs: int, width: int, stride: int, p: float):
        super().__init__()
        outputs = self.expansion * width
        self.conv1 = nn.Conv2d(inputs, width, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, stride, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.conv3 = nn.Conv2d(width, outputs, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(outputs)
        self.relu = nn.ReLU(inplace=True)
        self.drop = nn.Dropout2d(p)
        self.shortcut = nn.Identity()
        if stride != 1 or inputs != outputs:
            self.shortcut = nn.Sequential(
                nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs)
            )

    def forward(self, x: Tensor) -> Tensor:
        y = self.relu(self.bn1(self.conv1(x)))
        y = self.relu(self.bn2(self.conv2(y)))
        y = self.drop(self.bn3(self.conv3(y)))
        y += self.shortcut(x)
        return self.relu(y)


class ResNet(nn.Module):
    def __init__(self, width: int, depths: list[int], p: float):
        super().__init__()
        self.stem = nn.Sequential(
            nn.Conv2d(3, width, 7, 2, padding=3, bias=False),
            nn.BatchNorm2d(width),
            nn.ReLU(inplace=True),
            nn.MaxPool2d(3, 2, padding=1),
        )
        blocks, channels = [], width
        for stage, depth in enumerate(depths):
            for i in range(depth):
                stride = 2 if stage and not i else 1
                blocks.append(Bottleneck(channels, width << stage, stride, p))
                channels = Bottleneck.expansion * (width << stage)
        self.blocks = nn.Sequential(*blocks)
        self.drop = nn.Dropout(p)
        self.fc = nn.Linear(channels, 10)

    def forward(self, x: Tensor, labels: Tensor) -> Tensor:
        features = F.adaptive_avg_pool2d(self.blocks(self.stem(x)), 1).flatten(1)
        return F.cross_entropy(self.fc(self.drop(features)), labels)


def resnet(batch: int, pixels: int, width: int, depths: list[int], p: float) -> Built:
    return ResNet(width, depths, p), images(batch, pixels, 10), {}


class DoubleConv(nn.Sequential):
    def __init__(self, inputs: int, outputs: int, p: float):
        super().__init__(
            nn.Conv2d(inputs, outputs, 3, padding=1),
            nn.GroupNorm(4, outputs),
            nn.SiLU(),
            nn.Dropout2d(p),
            nn.Conv2d(outputs, outputs, 3, padding=1),
            nn.GroupNorm(4, outputs),
            nn.SiLU(),
        )


class UNet(nn.Module):
    """Every level's features wait on the way down for their twin on the way up."""

    def __init__(self, width: int, levels: int, p: float):
        super().__init__()
        widths = [width << i for i in range(levels + 1)]
        self.enter = DoubleConv(3, width, p)
        self.down = nn.ModuleList(DoubleConv(a, b, p) for a, b in itertools.pairwise(widths))
        # One learnt and one fixed way up, since their backwards keep different things.
        self.rise = nn.ModuleList(
            nn.ConvTranspose2d(widths[i + 1], widths[i], 2, 2)
            if i % 2
            else nn.Sequential(
                nn.Upsample(scale_factor=2, mode="nearest"),
                nn.Conv2d(widths[i + 1], widths[i], 1),
            )
            for i in range(levels)
        )
        self.up = nn.ModuleList(DoubleConv(2 * widths[i], widths[i], p) for i in range(levels))
        self.leave = nn.Conv2d(width, 3, 1)

    def forward(self, x: Tensor, target: Tensor) -> Tensor:
        y = self.enter(x)
        skips = []
        for block in self.down:
            skips.append(y)
            y = block(F.max_pool2d(y, 2))
        for i in reversed(range(len(skips))):
            y = self.up[i](torch.cat([skips[i], self.rise[i](y)], dim=1))
        return F.mse_loss(self.leave(y), target)


def unet(batch: int, pixels: int, width: int, levels: int, p: float) -> Built:
    x = torch.randn(batch, 3, pixels, pixels)
    return UNet(width, levels, p), (x, torch.randn_like(x)), {}


class DenseLayer(nn.Module):
    """Reads all earlier features of its block, adds ``growth`` channels (Huang et al. 2016)."""

    def __init__(self, inputs: int, growth: int, p: float):
        super().__init__()
        self.bn1 = nn.BatchNorm2d(inputs)
        self.conv1 = nn.Conv2d(inputs, 4 * growth, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(4 * growth)
        self.conv2 = nn.Conv2d(4 * growth, growth, 3, padding=1, bias=False)
        self.p = p

    def forward(self, features: list[Tensor]) -> Tensor:
        y = self.conv1(F.relu(self.bn1(torch.cat(features, dim=1)), inplace=True))
        y = self.conv2(F.relu(self.bn2(y), inplace=True))
        return F.dropout(y, self.p, self.training) if self.p else y


class DenseNet(nn.Module):
    def __init__(self, width: int, growth: int, depths: list[int], p: float):
        super().__init__()
        self.stem = nn.Conv2d(3, width, 3, padding=1, bias=False)
        self.blocks, self.shrink = nn.ModuleList(), nn.ModuleList()
        channels = width
        for stage, depth in enumerate(depths):
            layers = [DenseLayer(channels + i * growth, growth, p) for i in range(depth)]
            self.blocks.append(nn.ModuleList(layers))
            channels += depth * growth
            if stage < len(depths) - 1:
                self.shrink.append(
                    nn.Sequential(
                        nn.BatchNorm2d(channels),
                        nn.ReLU(inplace=True),
                        nn.Conv2d(channels, channels // 2, 1, bias=False),
                        nn.AvgPool2d(2),
                    )
                )
                channels //= 2
        self.norm = nn.BatchNorm2d(channels)
        self.fc = nn.Linear(channels, 10)

    def forward(self, x: Tensor, labels: Tensor) -> Tensor:
        y = self.stem(x)
        for stage, block in enumerate(self.blocks):
            features = [y]
            for layer in block:
                features.append(layer(features))
            y = torch.cat(features, dim=1)
            if stage < len(self.shrink):
                y = self.shrink[stage](y)
        y = F.relu(self.norm(y), inplace=True).mean((2, 3))
        return F.cross_entropy(self.fc(y), labels)


def densenet(
    batch: int, pixels: int, width: int, growth: int, depths: list[int], p: float
) -> Built:
    return DenseNet(width, growth, depths, p), images(batch, pixels, 10), {}


def sizes(dims: str, **rows: tuple[Any, ...]) -> dict[str, dict[str, Any]]:
    """One row of dimensions per size, named as in ``dims``."""
    return {size: dict(zip(dims.split(), row, strict=True)) for size, row in rows.items()}


# make, dropout of the variant that has it, dimensions
TABLE: tuple[tuple[Callable[..., Built], float, dict[str, dict[str, Any]]], ...] = (
    (
        llama,
        0.1,
        sizes(
            "batch seq dim ffn heads layers",
            tiny=(2, 16, 16, 40, 2, 2),
            small=(4, 128, 64, 172, 4, 4),
            bench=(4, 256, 128, 344, 4, 12),
            wide=(4, 256, 512, 1376, 8, 2),
        ),
    ),
    (
        gpt2,
        0.1,
        sizes(
            "batch seq dim heads layers",
            tiny=(2, 16, 16, 2, 2),
            small=(4, 128, 64, 4, 4),
            bench=(4, 256, 128, 4, 12),
            wide=(4, 256, 512, 8, 2),
        ),
    ),
    (
        vit,
        0.1,
        sizes(
            "batch pixels patch dim ffn heads layers",
            tiny=(2, 16, 4, 16, 32, 2, 2),
            small=(8, 32, 4, 64, 128, 4, 6),
            bench=(16, 64, 4, 128, 256, 4, 8),
            wide=(16, 64, 8, 512, 2048, 8, 2),
        ),
    ),
    (
        resnet,
        0.1,
        sizes(
            "batch pixels width depths",
            tiny=(2, 16, 4, [1, 1]),
            small=(8, 96, 8, [2, 2, 2]),
            bench=(32, 128, 16, [3, 4, 6]),
            wide=(8, 128, 64, [1, 1, 1]),
        ),
    ),
    (
        convnext,
        0.2,
        sizes(
            "batch pixels widths depths",
            tiny=(2, 16, [8, 16], [1, 1]),
            small=(6, 48, [16, 32], [3, 3]),
            bench=(16, 128, [24, 48, 96], [3, 3, 6]),
            wide=(8, 64, [96, 192], [2, 2]),
        ),
    ),
    (
        unet,
        0.1,
        sizes(
            "batch pixels width levels",
            tiny=(2, 16, 4, 2),
            small=(4, 48, 8, 3),
            bench=(8, 128, 16, 4),
            wide=(4, 64, 32, 3),
        ),
    ),
    (
        densenet,
        0.1,
        sizes(
            "batch pixels width growth depths",
            tiny=(2, 8, 8, 4, [2, 2]),
            small=(8, 24, 16, 8, [4, 4, 4]),
            bench=(16, 64, 24, 12, [6, 6, 6]),
            wide=(8, 32, 64, 32, [4, 4, 4]),
        ),
    ),
    (
        encdec,
        0.1,
        sizes(
            "batch source target dim ffn heads layers",
            tiny=(2, 12, 10, 16, 32, 2, 1),
            small=(4, 96, 64, 48, 96, 4, 4),
            bench=(8, 256, 192, 96, 192, 4, 6),
            wide=(4, 160, 128, 384, 1536, 8, 2),
        ),
    ),
)

FAMILIES: dict[str, Family] = {
    family.name: family
    for make, p, dims in TABLE
    for family in (
        Family(make.__name__, make, dims),
        Family(f"{make.__name__}-dropout", make, dims, p),
    )
}
