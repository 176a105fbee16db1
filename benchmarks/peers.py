"""What else shrinks a step: torch's checkpoint by block, its selective policy, its ratio.

Each peer is a context: inside, the step's model (or the module that is given) runs that way.
"""

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import torch
import torch._inductor.config
from steps import Step
from torch import nn
from torch._dynamo.backends.common import aot_autograd
from torch._dynamo.backends.debugging import boxed_nop
from torch._functorch import partitioners
from torch._functorch.partitioners import min_cut_rematerialization_partition
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    create_selective_checkpoint_contexts,
)

SHARES = (1.0, 0.8, 0.6, 0.4, 0.2, 0.1, 0.05, 0.0)
"""Values of ``activation_memory_budget`` to try."""

EVERY = (1, 2, 3, 4)
"""Checkpoint every so many blocks."""

BLOCKS = {
    "llama": ("LlamaDecoderLayer",),
    "gpt2": ("GPT2Block",),
    "encdec": ("T5Block",),
    "vit": ("ViTLayer",),
    "convnext": ("ConvNextLayer",),
    "resnet": ("Bottleneck",),
    "unet": ("DoubleConv",),
    "densenet": ("DenseLayer",),
}
"""What a user of each family would checkpoint, by class."""

_PRODUCTS = {
    torch.ops.aten.mm.default,
    torch.ops.aten.bmm.default,
    torch.ops.aten.addmm.default,
    torch.ops.aten.convolution.default,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default,
    torch.ops.aten._scaled_dot_product_flash_attention.default,
    torch.ops.aten._scaled_dot_product_efficient_attention.default,
    torch.ops.aten._scaled_dot_product_cudnn_attention.default,
}
"""What selective policies save: the operators that cost arithmetic."""


def blocks_of(step: Step) -> list[nn.Module]:
    classes = BLOCKS[step.family.removesuffix("-dropout")]
    return [m for m in step.model.modules() if type(m).__name__ in classes]


@contextlib.contextmanager
def with_checkpoints(step: Step, every: int, share: float = 0.0) -> Iterator[nn.Module]:
    """Every so many blocks run under ``torch.utils.checkpoint``; ``share`` of products are saved."""
    chosen = blocks_of(step)[::every]
    contexts = {"context_fn": functools.partial(_policy_contexts, share)} if share else {}
    for block in chosen:
        run = functools.partial(checkpoint, block.forward, use_reentrant=False, **contexts)
        block.forward = functools.partial(_with_own_lists, run)  # type: ignore[method-assign]
    try:
        yield step.model
    finally:
        for block in chosen:
            del block.forward


def _with_own_lists(run: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """A model that appends to the list it gave would run its block again on more than it did."""
    return run(*(list(a) if type(a) is list else a for a in args), **kwargs)


def _policy_contexts(share: float) -> Any:
    """Save all products, or every second one."""
    seen = {False: 0, True: 0}

    def policy(context: Any, operator: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
        if operator not in _PRODUCTS:
            return CheckpointPolicy.PREFER_RECOMPUTE
        again = context.is_recompute
        seen[again] += 1
        saved = share == 1.0 or seen[again] % 2 == 0
        return CheckpointPolicy.MUST_SAVE if saved else CheckpointPolicy.PREFER_RECOMPUTE

    return create_selective_checkpoint_contexts(policy)


@contextlib.contextmanager
def with_ratio(step: Step, share: float) -> Iterator[Any]:
    """The compiled step, run op by op with boxed calls, at one ``activation_memory_budget``."""
    torch._dynamo.reset()
    backend = aot_autograd(
        fw_compiler=boxed_nop,
        bw_compiler=boxed_nop,
        partition_fn=min_cut_rematerialization_partition,
    )
    try:
        with torch._functorch.config.patch(activation_memory_budget=share):
            yield torch.compile(step.model, backend=backend)
    finally:
        torch._dynamo.reset()


LEAST_MIB = 4096 * 4 / 2**20
"""Below which fxmem stores nothing with noise, so torch's pass does not either."""


@contextlib.contextmanager
def with_fp8(step: Step, kind: str, scaled: bool | None, masks: bool) -> Iterator[Any]:
    """The compiled step, run op by op, with torch's own pass that saves activations in eight bits.

    kind: "e4m3fn" or "e5m2".  scaled: None leaves ``use_scaling`` out, as one might who trusts defaults.
    masks: also what ``where`` makes, whose infinities its scales do not survive.
    """
    how: dict[str, Any] = {
        "quant_type": f"torch.float8_{kind}",
        "size_in_mb": LEAST_MIB,
        "allowed_dtypes": "torch.float32",
        "exclude_primals": True,  # parameters are there anyway
    }
    if scaled is not None:
        how["use_scaling"] = scaled
    options = {"activation_quantization_aten_pass": how}
    asked = partitioners.should_quantize

    def chosen(node: Any) -> bool:
        return asked(node) and (masks or node.target is not torch.ops.aten.where.self)

    with (
        torch._inductor.config.patch(post_grad_fusion_options=options),
        mock.patch.object(partitioners, "should_quantize", chosen),
        with_ratio(step, 1.0) as module,
    ):
        yield module
