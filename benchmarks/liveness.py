"""What ``fxmem.liveness`` takes for a llama of 7 billion parameters on the meta device.

python benchmarks/liveness.py [--layers 32] [--report]

Prints the parameters, the bytes of them that were allocated, seconds (of the clock and of the processor),
the largest resident memory of the process, and the closed form of the peak.
"""

import argparse
import json
import resource
import time

import torch
from transformers import LlamaConfig, LlamaForCausalLM

import fxmem


def build(layers):
    config = LlamaConfig(
        vocab_size=32000,
        hidden_size=4096,
        intermediate_size=11008,
        num_hidden_layers=layers,
        num_attention_heads=32,
        num_key_value_heads=32,
        max_position_embeddings=4096,
        use_cache=False,
    )
    with torch.device("meta"):
        model = LlamaForCausalLM(config).to(torch.bfloat16).train()
        ids = torch.empty(4, 2048, dtype=torch.long)
    return model, (ids,), {"labels": ids.clone(), "use_cache": False}


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--report", action="store_true", help="print the whole report as well")
    options = parser.parse_args()
    model, args, kwargs = build(options.layers)
    clock, processor = time.perf_counter(), time.process_time()
    found = fxmem.liveness(
        model, args, example_kwargs=kwargs, dynamic_shapes={"input_ids": {0: "B", 1: "S"}}
    )
    figures = {
        "parameters": sum(p.numel() for p in model.parameters()),
        "parameters on the meta device": all(p.is_meta for p in model.parameters()),
        "seconds": round(time.perf_counter() - clock, 1),
        "processor seconds": round(time.process_time() - processor, 1),
        "largest resident MiB": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024,
        "operators": len(found.points),
        "storages": len(found.storages),
        "peak": str(found.peak),
        "peak at B=4, S=2048": found.peak_at(),
    }
    print(json.dumps(figures, indent=1))
    if options.report:
        print(fxmem.report(model, args, example_kwargs=kwargs))


if __name__ == "__main__":
    main()
