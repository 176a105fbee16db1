"""The model families under budgets: what was promised is what the allocator sees, and eager's bits."""

import contextlib
import copy
import dataclasses
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import accumulate
from typing import Any, TypeVar

from torch import nn

import fxmem
from fxmem.budget import Budget
from fxmem.capture import Capture, StepCall, capture
from fxmem.measure import cpu_allocations
from fxmem.pipeline import Analysis, Options, Planned, analyze, decide, unchanged_step
from fxmem.runtime import Backward, OptimizedModule, Program, Session

T = TypeVar("T")

# -- One capture, many budgets -----------------------------------------------------------------------


@dataclass(frozen=True)
class Step:
    """A model under a plan."""

    module: OptimizedModule
    plan: fxmem.Plan


@dataclass(frozen=True)
class Captured:
    """A captured step that may be planned and compiled for one budget after another."""

    model: nn.Module
    capture: Capture
    analysis: Analysis

    def decide(self, budget: Any, on_infeasible: str = "raise") -> Planned:
        return decide(self.analysis, Options(Budget.parse(budget), on_infeasible=on_infeasible))

    def step(self, budget: Any, on_infeasible: str = "raise") -> Step:
        planned = self.decide(budget, on_infeasible)
        return Step(self.compile(planned), planned.plan)

    def compile(self, planned: Planned) -> OptimizedModule:
        backward = Backward(planned, self.capture.graph)
        forward = planned.split.forward
        run = again(self.capture).compile(forward, planned.split.backward, backward)
        program = Program(self.capture.matches, run, planned.plan, forward, backward.module)
        session = Session(Options(Budget.parse("min")), programs=[program])
        return OptimizedModule(self.model, session)


@contextlib.contextmanager
def capture_once(
    model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any] | None = None
) -> Iterator[Captured]:
    call = StepCall(model, args, kwargs or {})
    unchanged = unchanged_step(call)
    with capture(call) as captured:
        yield Captured(model, captured, analyze(captured.graph, call, unchanged))


def again(captured: Capture) -> Capture:
    """A capture that may be compiled; AOTAutograd uses its records up, so it gets copies."""
    exported = copy.copy(captured._exported)
    exported._aot_state = copy.copy(exported._aot_state)
    exported._aot_state.fw_metadata = copy.copy(exported._aot_state.fw_metadata)
    exported._aot_graph_capture = copy.copy(exported._aot_graph_capture)
    exported._aot_graph_capture.wrappers = list(exported._aot_graph_capture.wrappers)
    return dataclasses.replace(captured, _exported=exported)


def measured_peak(run: Callable[[], T], forget: Callable[[], None]) -> tuple[int, T]:
    """Bytes that ``run`` adds at its peak, and what it returns; ``forget`` drops its traces."""
    forget()
    sizes, outputs = cpu_allocations(run)
    forget()
    return max(accumulate(sizes), default=0), outputs
