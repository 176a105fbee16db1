"""What other tools say of the same training step's memory, beside what the allocator held.

    pip install torchinfo accelerate
    python benchmarks/views.py --out benchmarks/results/views-cpu.json

Each tool is asked the way its manual does it.  A tool that is not installed, or that needs a device
that is not here, has no figure.
"""

import argparse
import contextlib
import copy
import datetime
import importlib.metadata
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from steps import FAMILIES, loss_of

import fxmem

NAMES = ("gpt2", "vit", "resnet")
SIZE = "bench"

Built = tuple[torch.nn.Module, tuple[Any, ...], dict[str, Any]]


def measured(model: torch.nn.Module, args: Any, kwargs: Any) -> int:
    """Bytes that the allocator held at most, of a second step: a first one sets things up for good."""
    for _ in range(2):
        model.zero_grad(set_to_none=True)
        found = fxmem.measure(lambda: loss_of(model(*args, **kwargs)).backward())
    return found.peak - (found.at_start - resident(model, args, kwargs))


def resident(model: torch.nn.Module, args: Any, kwargs: Any) -> int:
    leaves = [
        *model.parameters(),
        *model.buffers(),
        *torch.utils._pytree.tree_leaves((args, kwargs)),
    ]
    storages = {t.untyped_storage() for t in leaves if isinstance(t, torch.Tensor)}
    return sum(s.nbytes() for s in {s.data_ptr(): s for s in storages}.values())


def by_fxmem(model: torch.nn.Module, args: Any, kwargs: Any) -> int:
    return fxmem.plan(model, "1TiB", args, example_kwargs=kwargs).baseline_peak


def by_mem_tracker(model: torch.nn.Module, args: Any, kwargs: Any) -> int:
    """torch.distributed._tools: a dispatch mode around a step, here on fake tensors."""
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.distributed._tools.mem_tracker import MemTracker

    mode = FakeTensorMode(allow_non_fake_inputs=True)
    memo: dict[int, Any] = {}
    for t in (*model.parameters(), *model.buffers()):
        fake = mode.from_tensor(t.detach())
        is_parameter = isinstance(t, torch.nn.Parameter)
        memo[id(t)] = torch.nn.Parameter(fake, t.requires_grad) if is_parameter else fake
    twin = copy.deepcopy(model, memo)
    args, kwargs = torch.utils._pytree.tree_map_only(torch.Tensor, mode.from_tensor, (args, kwargs))
    tracker = MemTracker()
    tensors = [
        t for t in torch.utils._pytree.tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)
    ]
    tracker.track_external(twin, *tensors)
    with mode, tracker:
        loss_of(twin(*args, **kwargs)).backward()
    (snapshot,) = tracker.get_tracker_snapshot("peak").values()
    return int(snapshot["Total"])


def by_torchinfo(model: torch.nn.Module, args: Any, kwargs: Any) -> int:
    """Its estimated total size: parameters, inputs, and each layer's output twice."""
    from torchinfo import summary

    found = summary(model, input_data=args or None, verbose=0, **kwargs)
    return int(found.total_param_bytes + found.total_input + found.total_output_bytes)


def by_accelerate(model: torch.nn.Module, args: Any, kwargs: Any) -> int:
    """Its figure for training in float32, with Adam: four times the parameters."""
    from accelerate.commands.estimate import estimate_training_usage
    from accelerate.utils import calculate_maximum_sizes

    return max(estimate_training_usage(calculate_maximum_sizes(model)[0], "float32").values())


def by_snapshot(model: torch.nn.Module, args: Any, kwargs: Any) -> int:
    """torch.cuda.memory: every allocation of a step that runs, and so fits, on a CUDA device."""
    if not torch.cuda.is_available():
        raise ImportError("no CUDA device")
    model = copy.deepcopy(model).cuda()
    args, kwargs = torch.utils._pytree.tree_map_only(
        torch.Tensor, lambda t: t.cuda(), (args, kwargs)
    )
    torch.cuda.reset_peak_memory_stats()
    loss_of(model(*args, **kwargs)).backward()
    return torch.cuda.max_memory_allocated()


TOOLS: dict[str, tuple[Callable[..., int], str, str, str]] = {
    "fxmem": (by_fxmem, "no", "a tensor, its module and your line", "yes"),
    "MemTracker": (by_mem_tracker, "no", "a module and a category", "no"),
    "torchinfo": (by_torchinfo, "the forward", "a layer", "no"),
    "accelerate estimate": (by_accelerate, "no", "the model", "no"),
    "torch.cuda.memory snapshot": (by_snapshot, "yes", "an allocation and its stack", "no"),
}
"""Tool -> its figure, whether the step has to run for it, what its smallest unit is, sizes as symbols."""


def ask(tool: Callable[..., int], built: Built) -> int | str:
    """The figure, or why there is none."""
    try:
        with contextlib.redirect_stdout(None):
            return tool(*built)
    except Exception as error:  # of another tool, whatever it is
        return f"{type(error).__name__}: {error}"[:200]


def version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    rows = []
    for name in NAMES:
        built = FAMILIES[name].build(SIZE)
        row = {"family": name, "measured": measured(*built)}
        row["says"] = {tool: ask(how[0], built) for tool, how in TOOLS.items()}
        print(name, row["measured"], row["says"], flush=True)
        rows.append(row)
    result = {
        "date": datetime.date.today().isoformat(),
        "torch": torch.__version__,
        "versions": {name: version(name) for name in ("torchinfo", "accelerate")},
        "size": SIZE,
        "tools": {tool: list(how[1:]) for tool, how in TOOLS.items()},
        "rows": rows,
    }
    if options.out:
        options.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
