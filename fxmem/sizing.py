"""How large may a size be: the questions that invert a peak, ``max_batch`` and ``min_budget``."""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from fxmem.analysis.dynamic import Bounds, Names, sizes_by_name
from fxmem.api import named_call, read_options
from fxmem.basics.budget import Budget, read_reserve
from fxmem.basics.device import library_memory
from fxmem.basics.errors import BudgetError, FxmemError
from fxmem.basics.units import format_bytes
from fxmem.graphs.boundary import largest
from fxmem.graphs.capture import StepCall, capture
from fxmem.graphs.standins import at_sizes, without_meta
from fxmem.planning.plan import Plan
from fxmem.steps.analyze import analyze, device_of, unchanged_step
from fxmem.steps.footprint import liveness_of
from fxmem.steps.inventory import Liveness
from fxmem.steps.pipeline import decide

log = logging.getLogger(__name__)


def max_batch(
    model: nn.Module,
    budget: Any,
    example_inputs: Any = None,
    *,
    example_kwargs: Mapping[str, Any] | None = None,
    dynamic_shapes: Any = None,
    symbol: str = "B",
    sizes: Mapping[str, int] | None = None,
    loss_fn: Callable[..., Any] | None = None,
    loss_inputs: Any = (),
    allow: Any = (),
    reserve: Any = 0,
) -> int:
    """The largest size of ``symbol`` for which a training step fits ``budget``; one more does not fit.

    With ``allow=()`` it is the model's own step, as eager PyTorch runs it.  With ``allow=("recompute",
    "lossless")`` it is the step under the best plan that ``optimize`` finds.  Closed forms of the
    traced step say about where the boundary is; at the boundary itself both sizes are looked at, the
    model's own step on fake tensors, a plan by planning it.  Nothing large is allocated.

    symbol: of ``dynamic_shapes``, or by default B, the first dimension of the inputs, or S; see
    ``liveness``.  sizes: of the other symbols, ``{"S": 2048}``; by default the example's.
    ``torch.export.Dim`` bounds in ``dynamic_shapes`` limit the answer.
    Raises ``BudgetError`` where not even size 1 fits, ``FixedSizeError`` (a ``CaptureError``) where the
    size is a constant in the model's code, and ``FxmemError`` for a symbol that the step does not have,
    or whose size changes nothing.
    """
    question = _Question.of(
        model, example_inputs, example_kwargs, dynamic_shapes, loss_fn, loss_inputs, sizes, allow
    )
    return question.largest(symbol, Budget.parse(budget), read_reserve(reserve).nbytes)


def min_budget(
    model: nn.Module,
    example_inputs: Any = None,
    *,
    example_kwargs: Mapping[str, Any] | None = None,
    dynamic_shapes: Any = None,
    sizes: Mapping[str, int] | None = None,
    loss_fn: Callable[..., Any] | None = None,
    loss_inputs: Any = (),
    allow: Any = (),
    reserve: Any = 0,
) -> int:
    """The smallest budget in bytes for a step of these sizes; arguments as ``max_batch`` takes them.

    With ``allow=()`` what the model's own step peaks at, else the smallest peak that a plan reaches;
    ``reserve`` is added, and what torch's own libraries hold outside the step.
    """
    question = _Question.of(
        model, example_inputs, example_kwargs, dynamic_shapes, loss_fn, loss_inputs, sizes, allow
    )
    outside = read_reserve(reserve).nbytes + library_memory(device_of(question.call))
    return question.peak_at({}) + outside


@dataclass(frozen=True)
class _Question:
    """A step, its sizes where no others are asked for, those that stay, and what may be done to it.

    sizes: the example's, which need not be the ones that its forms were traced at.
    """

    call: StepCall
    names: Names
    liveness: Liveness
    sizes: dict[str, int]
    given: dict[str, int]
    bounds: Bounds
    allow: tuple[str, ...]

    @classmethod
    def of(
        cls, model: nn.Module, inputs: Any, kwargs: Any, shapes: Any, loss_fn: Any,
        loss_inputs: Any, sizes: Mapping[str, int] | None, allow: Any,
    ) -> _Question:  # fmt: skip
        allow = read_options(
            model, "min", allow=allow, noise=0.01, reserve=0, on_infeasible="best",
            compiler="eager", cost="auto", plan=None,
        ).allow  # fmt: skip
        call, names, bounds = named_call(model, inputs, kwargs, shapes, loss_fn, loss_inputs)
        with torch.enable_grad():
            found = liveness_of(call, names, device_of(call), bounds)
        found.sizes(sizes or {})  # which refuses what is none
        given = dict(sizes or {})
        example = sizes_by_name(call, names)
        return cls(call, names, found, {**example, **given}, given, bounds, allow)

    def largest(self, symbol: str, budget: Budget, reserve: int) -> int:
        self.liveness.sizes({symbol: 1})
        if symbol in self.given:
            raise FxmemError(
                f"{symbol} is what is asked for, and sizes fixes it at {self.given[symbol]}\n"
                f"  try: no {symbol} among the sizes, or another symbol="
            )
        if symbol in self.liveness.fixed:
            raise self.liveness.fixed[symbol]
        info = self.liveness.symbols[symbol]
        peak = self._memo(symbol)
        limit = budget.resolve(
            device=device_of(self.call),
            baseline_peak=self.peak_at({}) if budget.kind == "baseline_share" else 0,
            reserve=reserve + library_memory(device_of(self.call)),
        )
        if limit is None:
            raise BudgetError('"min" names no bytes, so every size fits\n  try: "24GiB"')
        self._grows(symbol, info.hint)
        # The range of the closed forms is no limit: what lies beyond is looked at as well.
        low, high = self.bounds.get(symbol, (1, None))
        low = max(low, 1)
        found = largest(peak, limit, self._guess(symbol, limit), low, high)
        if found is None:
            raise BudgetError(
                f"not even {symbol}={low} fits: it peaks at {format_bytes(peak(low))} "
                f"({peak(low)} bytes); the budget is {format_bytes(limit)} ({limit} bytes)"
            )
        return found

    def _memo(self, symbol: str) -> Callable[[int], int]:
        return functools.cache(lambda size: self.peak_at({symbol: size}))

    def _grows(self, symbol: str, hint: int) -> None:
        """Raises ``FxmemError`` where the step takes the same bytes for every size."""
        sizes = {**self.liveness.hint, **self.sizes}
        form = self.liveness.form_at
        if form({**sizes, symbol: hint}) == form({**sizes, symbol: 2 * hint}):
            raise FxmemError(
                f"the peak does not depend on {symbol}, so every size fits\n"
                f"  found: {self.liveness.peak}"
            )

    def _guess(self, symbol: str, limit: int) -> int:
        """Where the traced step's closed form meets the limit; it and the peak asked for differ little."""
        hint = self.liveness.symbols[symbol].hint
        if self.allow:
            return hint
        exact = self.peak_at({symbol: hint})
        others = {name: size for name, size in self.sizes.items() if name != symbol}
        return self.liveness.largest(symbol, limit, sizes=others, peak=exact) or 1

    # -- One shape -------------------------------------------------------------------------------------

    def peak_at(self, sizes: Mapping[str, int]) -> int:
        """Bytes at the peak of what is asked about."""
        whole = {**self.sizes, **sizes}
        if self.allow:
            return self._planned(whole).predicted_peak
        try:
            return self.liveness.unchanged_at(**whole)
        except FxmemError as error:
            log.info("the captured step stands for the model's own: %s", error)
            return self.liveness.peak_at(**whole)

    def _planned(self, sizes: Mapping[str, int]) -> Plan:
        """The smallest plan for these sizes."""
        call = at_sizes(self.call, self.names, sizes)
        options = read_options(
            call.model, "min", allow=self.allow, noise=0.01, reserve=0, on_infeasible="best",
            compiler="eager", cost="auto", plan=None,
        )  # fmt: skip
        unchanged = unchanged_step(call)
        call = without_meta(call)
        with torch.enable_grad(), capture(call, guarded=False) as captured:
            analysis = analyze(captured.graph, call, unchanged, options.cost, captured.examples)
            return decide(analysis, options).plan
