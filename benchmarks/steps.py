"""One training step, unchanged or as a peer or fxmem runs it: its bits, its peak, its time, its FLOPs."""

import contextlib
import copy
import ctypes
import statistics
import sys
import time
from collections.abc import Callable
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent), str(HERE.parent / "tests")]

from families import FAMILIES, SIZES, Family, loss_of  # noqa: E402

from fxmem.analysis.cost import flop_formula  # noqa: E402
from fxmem.graphs.measure import cpu_allocations, measure  # noqa: E402

__all__ = [
    "FAMILIES",
    "HERE",
    "SIZES",
    "Family",
    "Step",
    "alternating_seconds",
    "keep_freed_memory",
    "same",
    "side_by_side",
]


def keep_freed_memory() -> None:
    """Let freed blocks stay with the process (glibc), as they do on a GPU.

    Else steps pay the kernel for pages or not, by what the heap's end looks like when they begin.
    """
    with contextlib.suppress(OSError, AttributeError):
        mallopt = ctypes.CDLL("libc.so.6").mallopt
        mallopt(_TRIM_THRESHOLD, 2**31 - 1)
        mallopt(_MMAP_MAX, 0)


_TRIM_THRESHOLD, _MMAP_MAX = -1, -4


class Step:
    """A family's model and inputs on a device, to be trained unchanged or by something else."""

    def __init__(self, family: str, size: str, device: str):
        model, args, kwargs = FAMILIES[family].build(size)
        self.family, self.device = family, device
        self.model: nn.Module = model.to(device)
        self.args, self.kwargs = pytree.tree_map_only(
            Tensor, lambda t: t.to(device), (args, kwargs)
        )
        self.start = copy.deepcopy(self.model.state_dict())

    def reset(self) -> None:
        """Parameters, buffers, gradients and the generator as before any step."""
        self.model.load_state_dict(self.start)
        self.model.zero_grad(set_to_none=True)
        torch.manual_seed(0)

    def run(self, module: Callable[..., Any]) -> Any:
        """Forward and backward; the outputs, so that they are held."""
        outputs = module(*self.args, **self.kwargs)
        loss_of(outputs).backward()
        return outputs

    def seen(self, module: Callable[..., Any]) -> list[Tensor | None]:
        """Loss, gradients and buffers after one step from the start."""
        self.reset()
        loss = loss_of(self.run(module)).detach()
        gradients = [p.grad for p in self.model.parameters()]
        buffers = [b.clone() for b in self.model.buffers()]
        self.model.zero_grad(set_to_none=True)
        return [loss, *gradients, *buffers]

    def added_peak(self, module: Callable[..., Any]) -> int:
        """Bytes that one step holds at its peak, beyond what was there before it."""
        self.reset()
        if self.device == "cpu":
            sizes, outputs = cpu_allocations(lambda: self.run(module))
            peak = max(accumulate(sizes), default=0)
        else:
            measured = measure(lambda: self.run(module))
            outputs, peak = measured.result, measured.peak - measured.at_start
        del outputs
        self.reset()
        return peak

    def flops(self, module: Callable[..., Any]) -> int:
        """Floating-point operations of matrix products, convolutions and attention in one step."""
        self.reset()
        with _Counter() as counter:
            self.run(module)
        self.reset()
        return counter.total

    def seconds(self, module: Callable[..., Any]) -> float:
        """Wall time of one step."""
        self.reset()
        self._wait()
        began = time.perf_counter()
        self.run(module)
        self._wait()
        return time.perf_counter() - began

    def _wait(self) -> None:
        if self.device != "cpu":
            torch.cuda.synchronize()


class _Counter(TorchDispatchMode):
    """Adds up what runs.

    Under torch's own counter, and ever after, a compiled module runs as if it were not compiled.
    """

    supports_higher_order_operators = True

    @classmethod
    def ignore_compile_internals(cls) -> bool:
        return True

    def __init__(self) -> None:
        super().__init__()
        self.total = 0

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = function(*args, **(kwargs or {}))
        formula = flop_formula(getattr(function, "overloadpacket", None))
        if formula is not None:
            self.total += formula(*args, **(kwargs or {}), out_val=result)
        return result


def same(left: list[Tensor | None], right: list[Tensor | None]) -> bool:
    """Bitwise equality, tensor by tensor; None equals None."""
    return all(
        a is b if a is None or b is None else torch.equal(a, b)
        for a, b in zip(left, right, strict=True)
    )


def side_by_side(
    clocks: list[Callable[[], float]], runs: int, seconds: float = 0.0
) -> list[tuple[float, ...]]:
    """Rounds of what each clock says, at least ``runs`` and until so many seconds have passed.

    Each round begins with another one, because what runs next finds other caches.
    """
    rounds: list[tuple[float, ...]] = []
    began = time.perf_counter()
    while len(rounds) < runs or time.perf_counter() - began < seconds:
        first = len(rounds) % len(clocks)
        order = [*range(first, len(clocks)), *range(first)]
        took = {i: clocks[i]() for i in order}
        rounds.append(tuple(took[i] for i in range(len(clocks))))
    return rounds


def alternating_seconds(
    step: Step, module: Callable[..., Any], runs: int, seconds: float = 0.0
) -> tuple[float, float]:
    """Eager's median seconds, and the median ratio of the module's seconds to eager's beside them."""
    clocks = [lambda: step.seconds(step.model), lambda: step.seconds(module)]
    pairs = side_by_side(clocks, runs, seconds)
    return (
        statistics.median(eager for eager, _ in pairs),
        statistics.median(planned / eager for eager, planned in pairs),
    )
