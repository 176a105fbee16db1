"""Architectures of transformers, tiny: does a plan keep its bytes, and whose bits does it give?

    python benchmarks/architectures.py --budget 0.6x

Each model is built from a configuration, no weights are loaded.  ``bits``: loss and gradients are
``eager``'s to the bit; or ``captured``, those that torch's own tracing gives for the same step with
no plan at all, where that differs from eager already; or ``neither``, which must not happen.
"""

import argparse
import copy
import dataclasses
import datetime
import json
import time
import warnings
from collections.abc import Callable
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch
import transformers
from steps import same
from tabulate import tabulate
from torch import Tensor

import fxmem
from fxmem.graphs.measure import cpu_allocations
from fxmem.planning.remembered import forget

RESULTS = Path(__file__).resolve().parent / "results" / "architectures-cpu.json"

BATCH, SEQ, VOCAB, PIXELS = 4, 48, 128, 32

# -- Models ------------------------------------------------------------------------------------------

Inputs = dict[str, Tensor]


def tokens(**extra: Tensor) -> Inputs:
    ids = torch.randint(3, VOCAB, (BATCH, SEQ))
    return {"input_ids": ids, "labels": ids.clone(), **extra}


def label() -> Tensor:
    return torch.randint(0, 2, (BATCH,))


def classified() -> Inputs:
    return {"input_ids": torch.randint(3, VOCAB, (BATCH, SEQ)), "labels": label()}


def image() -> Tensor:
    return torch.randn(BATCH, 3, PIXELS, PIXELS)


def pictures() -> Inputs:
    return {"pixel_values": image(), "labels": label()}


def pairs() -> Inputs:
    ids = torch.randint(3, VOCAB - 1, (BATCH, SEQ))
    ids[:, -1] = VOCAB - 1  # the end of the text, where CLIP reads its meaning
    return {"input_ids": ids, "pixel_values": image(), "return_loss": True}


WIDTH = {"hidden_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4}
BERT = {**WIDTH, "intermediate_size": 128, "vocab_size": VOCAB}
GPT2 = {"n_embd": 64, "n_layer": 3, "n_head": 4, "vocab_size": VOCAB}
GROUPED = {**BERT, "num_key_value_heads": 2}
LLAMA = {**BERT, "num_key_value_heads": 4}
PATCHES = {**WIDTH, "intermediate_size": 128, "image_size": PIXELS, "patch_size": 8}
CLIP = {"text_config": {**BERT, "eos_token_id": VOCAB - 1}, "vision_config": PATCHES}
DISTILBERT = {"dim": 64, "n_layers": 3, "n_heads": 4, "hidden_dim": 128, "vocab_size": VOCAB}
BLOOM = {"hidden_size": 64, "n_layer": 3, "n_head": 4, "vocab_size": VOCAB}
OPT = {**WIDTH, "ffn_dim": 128, "vocab_size": VOCAB, "word_embed_proj_dim": 64}
SEQ2SEQ = {
    "d_model": 64,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 128,
    "decoder_ffn_dim": 128,
    "vocab_size": VOCAB,
}
T5 = {"d_model": 64, "d_kv": 16, "d_ff": 128, "num_layers": 2, "num_heads": 4, "vocab_size": VOCAB}
STAGES = {"embedding_size": 16, "hidden_sizes": [16, 32, 48, 64], "depths": [1, 1, 2, 1]}
SWIN = {
    "embed_dim": 24,
    "depths": [2, 2],
    "num_heads": [2, 4],
    "image_size": PIXELS,
    "patch_size": 2,
    "window_size": 4,
}
MOBILEVIT = {
    "hidden_sizes": [32, 48, 64],
    "neck_hidden_sizes": [8, 16, 24, 32, 48, 64, 64],
    "image_size": 64,
}

# Class name -> the configuration's arguments, and what makes a step's inputs.
ARCHITECTURES: dict[str, tuple[dict[str, Any], Callable[[], Inputs]]] = {
    "AlbertForMaskedLM": ({**BERT, "embedding_size": 32}, tokens),
    "BartForConditionalGeneration": (SEQ2SEQ, tokens),
    "BeitForImageClassification": (PATCHES, pictures),
    "BertForMaskedLM": (BERT, tokens),
    "BloomForCausalLM": (BLOOM, tokens),
    "CLIPModel": (CLIP, pairs),
    "ConvNextForImageClassification": (
        {"hidden_sizes": [16, 32, 48, 64], "depths": [2, 2, 2, 2]},
        pictures,
    ),
    "DebertaV2ForMaskedLM": (BERT, tokens),
    "DeiTForImageClassification": (PATCHES, pictures),
    "DistilBertForMaskedLM": (DISTILBERT, tokens),
    "ElectraForMaskedLM": ({**BERT, "embedding_size": 64}, tokens),
    "FalconForCausalLM": ({**WIDTH, "vocab_size": VOCAB}, tokens),
    "GPT2LMHeadModel": (GPT2, tokens),
    "GPTJForCausalLM": ({**GPT2, "rotary_dim": 8}, tokens),
    "GPTNeoXForCausalLM": (BERT, tokens),
    "GemmaForCausalLM": ({**LLAMA, "head_dim": 16}, tokens),
    "LlamaForCausalLM": (LLAMA, tokens),
    "LlamaForCausalLM, grouped": (GROUPED, tokens),
    "MistralForCausalLM": (LLAMA, tokens),
    "MobileViTForImageClassification": (MOBILEVIT, pictures),
    "OPTForCausalLM": (OPT, tokens),
    "PegasusForConditionalGeneration": (SEQ2SEQ, tokens),
    "PhiForCausalLM": (LLAMA, tokens),
    "Qwen2ForCausalLM": (LLAMA, tokens),
    "Qwen3ForCausalLM": ({**GROUPED, "head_dim": 16}, tokens),
    "RegNetForImageClassification": ({**STAGES, "groups_width": 8}, pictures),
    "ResNetForImageClassification": (STAGES, pictures),
    "RobertaForSequenceClassification": (BERT, classified),
    "SegformerForImageClassification": (
        {"hidden_sizes": [16, 32, 64, 64], "depths": [1, 1, 1, 1]},
        pictures,
    ),
    "SwinForImageClassification": (SWIN, pictures),
    "T5ForConditionalGeneration": (T5, tokens),
    "ViTForImageClassification": (PATCHES, pictures),
    "XLMRobertaForMaskedLM": (BERT, tokens),
}


def build(name: str) -> tuple[torch.nn.Module, Inputs]:
    """The model, training, and a step's inputs."""
    arguments, inputs = ARCHITECTURES[name]
    torch.manual_seed(0)
    kind = getattr(transformers, name.partition(",")[0])
    config = kind.config_class(**arguments)
    if hasattr(config, "use_cache"):
        config.use_cache = False
    if hasattr(config, "pad_token_id"):
        config.pad_token_id, config.decoder_start_token_id = 0, 1
    return kind(config).train(), inputs()


# -- One step ----------------------------------------------------------------------------------------


def seen(module: Callable[..., Any], model: torch.nn.Module, inputs: Inputs) -> list[Tensor | None]:
    """Loss and gradients of one step."""
    model.zero_grad(set_to_none=True)
    torch.manual_seed(1)
    loss = module(**inputs).loss
    loss.backward()
    return [loss.detach(), *(p.grad for p in model.parameters())]


def added_peak(module: Callable[..., Any], model: torch.nn.Module, inputs: Inputs) -> int:
    model.zero_grad(set_to_none=True)
    torch.manual_seed(1)

    def step() -> Any:
        outputs = module(**inputs)
        outputs.loss.backward()
        return outputs

    sizes, outputs = cpu_allocations(step)
    del outputs
    return max(accumulate(sizes), default=0)


@dataclasses.dataclass
class Row:
    """bits: whose loss and gradients.  budget: bytes, or the smallest peak where that is larger.

    predicted: predicted / measured peak.  baseline: the same of the unchanged step.
    """

    model: str
    bits: str = ""
    kept: bool | None = None
    budget: int | None = None
    peak: int | None = None
    predicted: float | None = None
    baseline: float | None = None
    optimize_seconds: float | None = None
    error: str = ""


def row_of(name: str, budget: str) -> Row:
    row = Row(name)
    try:
        fill(row, budget)
    except Exception as error:  # the other models' rows are wanted, too
        row.error = f"{type(error).__name__}: {error}".splitlines()[0]
    return row


def fill(row: Row, budget: str) -> None:
    """Train one step unchanged, one under the budget (or at the smallest peak), and compare."""
    model, inputs = build(row.model)
    start = copy.deepcopy(model.state_dict())

    def afresh(function: Callable[..., Any], module: Callable[..., Any]) -> Any:
        model.load_state_dict(start)
        return function(module, model, inputs)

    eager, eager_peak = afresh(seen, model), afresh(added_peak, model)
    model.load_state_dict(start)
    forget()
    began = time.perf_counter()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "fxmem: no plan fits")
        step = fxmem.optimize(model, budget, (), example_kwargs=inputs, on_infeasible="best")
    row.optimize_seconds = time.perf_counter() - began
    got, peak = afresh(seen, step), afresh(added_peak, step)
    row.bits = "eager"
    if not same(eager, got):
        torch._dynamo.reset()
        captured = afresh(seen, torch.compile(model, backend="aot_eager"))
        row.bits = "captured" if same(captured, got) else "neither"
    plan = step.plan
    row.budget, row.peak = max(plan.budget, plan.predicted_peak), peak + plan.resident
    row.kept = row.peak <= row.budget
    row.predicted = plan.predicted_peak / row.peak
    row.baseline = plan.baseline_peak / (eager_peak + plan.resident)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", default=";".join(ARCHITECTURES), help="names, by semicolons")
    parser.add_argument("--budget", default="0.6x")
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args()
    rows = []
    for name in options.models.split(";"):
        rows.append(row_of(name, options.budget))
        print(rows[-1].model, rows[-1].bits or rows[-1].error, flush=True)
    print(tabulate([dataclasses.asdict(row) for row in rows], headers="keys"))
    results = {
        "device": "cpu",
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "date": datetime.date.today().isoformat(),
        "budget": options.budget,
        "rows": [dataclasses.asdict(row) for row in rows],
    }
    options.out.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
