"""Does ``fxmem.max_batch`` tell the largest batch?  Measured: it fits the budget, and one more does not.

python benchmarks/max_batch.py [--sizes tiny small] [--families gpt2 ...] [--out FILE]

Every family, without and with dropout, and budgets of so many times what its own step peaks at, by the
allocator.  The exit status is 1 if any answer is wrong.
"""

import argparse
import datetime
import json
import sys
from pathlib import Path
from typing import Any

import torch
from steps import FAMILIES, loss_of

import fxmem
from fxmem.graphs.measure import measure

TIMES = (1.7, 4.0)


def batch_of(name: str, size: str) -> int:
    return FAMILIES[name].batch[size]


def measured(name: str, size: str, batch: int) -> int:
    """Bytes at the peak of the model's own step, its parameters and inputs included."""
    model, args, kwargs = FAMILIES[name].build(size, batch=batch)

    def run() -> Any:
        outputs = model(*args, **kwargs)
        loss_of(outputs).backward()
        return outputs

    for _ in range(2):  # a first step sets things up for good
        model.zero_grad(set_to_none=True)
        found = measure(run)
        peak = found.peak - found.at_start
        del found
        model.zero_grad(set_to_none=True)
    return peak + resident(model, args, kwargs)


def resident(model: torch.nn.Module, args: Any, kwargs: Any) -> int:
    leaves = torch.utils._pytree.tree_leaves((args, kwargs))
    tensors = [t for t in leaves if isinstance(t, torch.Tensor)]
    storages = (t.untyped_storage() for t in (*model.parameters(), *model.buffers(), *tensors))
    return sum({s.data_ptr(): s.nbytes() for s in storages}.values())


def answer(name: str, size: str, times: float) -> dict[str, Any]:
    budget = int(times * measured(name, size, batch_of(name, size)))
    model, args, kwargs = FAMILIES[name].build(size)
    most = fxmem.max_batch(model, budget, args, example_kwargs=kwargs)
    peaks = [measured(name, size, batch) for batch in (most, most + 1)]
    return {
        "family": name,
        "size": size,
        "times": times,
        "budget": budget,
        "max_batch": most,
        "peaks": peaks,
        "right": peaks[0] <= budget < peaks[1],
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--families", nargs="+", default=list(FAMILIES))
    parser.add_argument("--sizes", nargs="+", default=["tiny", "small"])
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    rows: list[dict[str, Any]] = []
    for size in options.sizes:
        for name in options.families:
            for times in TIMES:
                rows.append(answer(name, size, times))
                print(json.dumps(rows[-1]), flush=True)
                write(rows, options.out)
    wrong = [row for row in rows if not row["right"]]
    print(f"{len(rows) - len(wrong)} of {len(rows)} are right")
    return 1 if wrong else 0


def write(rows: list[dict[str, Any]], out: Path | None) -> None:
    today = datetime.date.today().isoformat()
    if out:
        result = {"date": today, "torch": torch.__version__, "rows": rows}
        out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    sys.exit(main())
