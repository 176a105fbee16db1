"""The two calls that most people make: ``optimize`` and ``plan``."""

from __future__ import annotations

import contextlib
import inspect
import os
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from typing import Any, Literal

import torch
from torch import nn
from torch.utils import _pytree as pytree

from fxmem.analysis.cost import CostModel
from fxmem.analysis.dynamic import (
    Bounds,
    Names,
    default_names,
    dynamic_names,
    given_bounds,
    marked,
    sizes_by_name,
    with_likely,
)
from fxmem.basics.budget import Budget, read_reserve
from fxmem.basics.errors import CaptureError, FixedSizeError, FxmemError
from fxmem.basics.units import format_bytes, shown
from fxmem.codes.gradient_noise import Noise
from fxmem.graphs.capture import StepCall, capture
from fxmem.graphs.graph import Role
from fxmem.graphs.standins import without_meta
from fxmem.planning.plan import Plan
from fxmem.steps.analyze import Analysis, analyze, device_of, unchanged_step
from fxmem.steps.footprint import liveness_of
from fxmem.steps.inventory import Liveness
from fxmem.steps.options import Options
from fxmem.steps.runtime import OptimizedModule, Session
from fxmem.steps.validity import decided
from fxmem.steps.verify import verify_step

DEFAULT = ("recompute", "lossless")
ALLOWED = (*DEFAULT, "quantize")
LATER = ("offload",)
COMPILERS = ("eager", "inductor")

NOTHING_TO_PLAN = (
    "nothing in this step needs a gradient, so nothing is saved for a backward.\n"
    "  try: check requires_grad of the parameters, torch.no_grad() in forward, and that loss_fn "
    "returns a tensor with a gradient"
)


def optimize(
    model: nn.Module,
    budget: Any,
    example_inputs: Any = None,
    *,
    example_kwargs: Mapping[str, Any] | None = None,
    dynamic_shapes: Any = None,
    loss_fn: Callable[..., Any] | None = None,
    loss_inputs: Any = (),
    allow: Any = DEFAULT,
    noise: float | Noise = 0.01,
    reserve: Any = 0,
    on_infeasible: str = "raise",
    compiler: str = "eager",
    cost: Any = "auto",
    plan: Plan | str | os.PathLike[str] | None = None,
    verify: bool = False,
) -> OptimizedModule:
    """The model again, as a GraphModule whose training step peaks within ``budget``.

    model: in the mode (train or eval) that it will run in.
    budget: of the whole step: an ``int`` of bytes, ``"20GiB"``, ``"80%"`` of the device, ``"0.5x"``
    of what the unchanged step peaks at, ``"auto"``, ``"min"``.
    example_inputs, example_kwargs: arguments of one call; without them, the first call is captured.
    dynamic_shapes: sizes that change from call to call, ``{"input_ids": {0: "B", 1: "S"}}``; inputs that
    go with a named one need no name.  A plan serves every size at which it keeps the budget.  With
    ``torch.export.Dim("B", min=1, max=64)`` for a name, all sizes of the range are planned now.
    loss_fn: called as ``loss_fn(outputs, *loss_inputs)`` when the loss is outside the model; then
    ``opt(*inputs, *loss_inputs)`` returns the loss.
    allow: what a plan may do.  With ``"quantize"`` in it tensors may be stored in a few bits, which adds
    noise to gradients; the example is then run, forward and backward, at most 20 times.
    noise: with that, the ceiling on the variance that is added / the gradients' own from minibatch to
    minibatch; or a ``Noise``, with more batches to find the latter from.
    reserve: bytes outside the step, or the optimizer whose state they are.  On CUDA, what cuBLAS
    keeps for itself is added: 64 MiB on an H100.
    on_infeasible: ``"raise"``, or ``"best"``: take the smallest plan and warn.
    compiler: ``"eager"`` runs operator by operator; ``"inductor"`` fuses, and runs one step to measure it.
    plan: a Plan, or the path of one, to replay instead of planning.
    verify: run one step, compare predicted and measured peak, and gradients with the unchanged step.

    Gradients are bitwise those of the step without a plan, unless ``"quantize"`` is allowed; with
    Inductor they are those up to what fused arithmetic rounds otherwise.
    Raises ``BudgetError``, ``BudgetInfeasibleError``, ``CaptureError``, ``CompileError``,
    ``PlanMismatchError``, ``VerificationError``.
    """
    if not isinstance(verify, bool):
        raise FxmemError(f"verify should be True or False, not {shown(verify)}")
    loss_inputs = _read_loss_inputs(loss_inputs)
    options = read_options(
        model, budget, allow=allow, noise=noise, reserve=reserve, on_infeasible=on_infeasible,
        compiler=compiler, cost=cost, plan=plan,
    )  # fmt: skip
    call = example_call(model, example_inputs, example_kwargs, loss_fn, loss_inputs)
    names = _all_names(dynamic_shapes, model, call)
    if call is not None and device_of(call).type == "meta":
        raise FxmemError(
            "the model is on the meta device, where nothing can run\n"
            "  try: fxmem.plan to plan it, or model.to_empty(device=...) to train it"
        )
    session = Session(options, loss_fn, len(loss_inputs), names)
    optimized = OptimizedModule(model, session)
    if call is None:
        if verify:
            raise FxmemError("verify=True runs one step, so it needs example_inputs")
        return optimized
    with torch.enable_grad():
        first = session.program_for(call)
        if first.plan is None:
            raise CaptureError(NOTHING_TO_PLAN)
        session.prepare(call, given_bounds(dynamic_shapes))
        _warn_if_over(first.plan)
        optimized.show_graph()
        if verify:
            optimized.__dict__["_fxmem_checked"] = verify_step(optimized, call)
    return optimized


def plan(
    model: nn.Module,
    budget: Any,
    example_inputs: Any = None,
    *,
    example_kwargs: Mapping[str, Any] | None = None,
    dynamic_shapes: Any = None,
    loss_fn: Callable[..., Any] | None = None,
    loss_inputs: Any = (),
    allow: Any = DEFAULT,
    noise: float | Noise = 0.01,
    reserve: Any = 0,
    on_infeasible: str = "raise",
    cost: Any = "auto",
    plan: Plan | str | os.PathLike[str] | None = None,
) -> Plan:
    """What ``optimize`` would decide, without compiling anything; arguments as there.

    Raises ``CaptureError`` also where nothing in the step needs a gradient.
    """
    options = read_options(
        model, budget, allow=allow, noise=noise, reserve=reserve, on_infeasible=on_infeasible,
        compiler="eager", cost=cost, plan=plan,
    )  # fmt: skip
    with analyzed(
        model, options, example_inputs, example_kwargs, dynamic_shapes, loss_fn, loss_inputs
    ) as (analysis, names):
        found = decided(analysis, options, sizes_by_name(analysis.call, names))[0].plan
    _warn_if_over(found)
    return found


@contextlib.contextmanager
def analyzed(
    model: nn.Module,
    options: Options,
    example_inputs: Any,
    example_kwargs: Mapping[str, Any] | None,
    dynamic_shapes: Any,
    loss_fn: Callable[..., Any] | None,
    loss_inputs: Any,
) -> Iterator[tuple[Analysis, Names]]:
    """The captured step and its dynamic sizes, to decide about while the context is open.

    Arguments as in ``plan``.
    """
    call = example_call(
        model, example_inputs, example_kwargs, loss_fn, _read_loss_inputs(loss_inputs)
    )
    if call is None:
        raise CaptureError(
            "plan needs the arguments of one call\n"
            "  try: fxmem.plan(model, budget, (batch,)) or example_kwargs={...}"
        )
    names = _all_names(dynamic_shapes, model, call)
    unchanged = unchanged_step(call)
    call = without_meta(call)
    with torch.enable_grad(), capture(marked(call, names), names) as captured:
        if not any(True for _ in captured.graph.placeholders(Role.TANGENT)):
            raise CaptureError(NOTHING_TO_PLAN)
        yield analyze(captured.graph, call, unchanged, options.cost, captured.examples), names


def liveness(
    model: nn.Module,
    example_inputs: Any = None,
    *,
    example_kwargs: Mapping[str, Any] | None = None,
    dynamic_shapes: Any = None,
    loss_fn: Callable[..., Any] | None = None,
    loss_inputs: Any = (),
    reserve: Any = 0,
) -> Liveness:
    """When each storage of one training step is born and dies, and closed forms of its peak.

    Nothing is allocated and no budget is needed; the model may be on the meta device.  The step is the
    captured one with everything kept, which is what ``optimize`` runs when the budget leaves room.

    dynamic_shapes: names of sizes, ``{"input_ids": {0: "B", 1: "S"}}``; a ``torch.export.Dim`` with
    bounds narrows the range.  Without it, B is the first dimension of the inputs, and S the second one
    of token ids and sequences.  Another input's dimension that stands alike and is as long has the
    same name; equal sizes elsewhere are chance and stay apart.
    reserve: an optimizer, whose state is a category then, or bytes; they are beside the step's peak.
    Raises ``CaptureError`` where the step cannot be captured, ``FxmemError`` for arguments it cannot read.
    """
    call, names, bounds = named_call(
        model, example_inputs, example_kwargs, dynamic_shapes, loss_fn, loss_inputs
    )
    outside = read_reserve(reserve).categories
    with torch.enable_grad():
        try:
            found = liveness_of(call, names, device_of(call), bounds)
        except CaptureError as error:
            if dynamic_shapes or not names:
                raise
            # Nobody asked for symbols, and the step works with these sizes alone.
            found = liveness_of(call, {}, device_of(call))
            fixed = {error.fixed: error} if isinstance(error, FixedSizeError) else {}
            found = replace(found, notes=(_why_no_symbols(error), *found.notes), fixed=fixed)
    return replace(found, outside=outside)


def _why_no_symbols(error: CaptureError) -> str:
    if isinstance(error, FixedSizeError):
        return f"all sizes are constants here: {error.short}"
    return "the step cannot be traced with sizes that change, so all are constants here"


# -- Reading what the user wrote ---------------------------------------------------------------------


def read_options(
    model: Any,
    budget: Any,
    *,
    allow: Any,
    noise: float | Noise,
    reserve: Any,
    on_infeasible: str,
    compiler: str,
    cost: Any,
    plan: Any,
) -> Options:
    """Checked options, for a model that can be optimized; see ``options_of``."""
    _check_model(model)
    return options_of(
        budget, allow=allow, noise=noise, reserve=reserve, on_infeasible=on_infeasible,
        compiler=compiler, cost=cost, plan=plan,
    )  # fmt: skip


def options_of(
    budget: Any,
    *,
    allow: Any = DEFAULT,
    noise: float | Noise = 0.01,
    reserve: Any = 0,
    on_infeasible: str = "raise",
    compiler: str | None = "eager",
    cost: Any = "auto",
    plan: Any = None,
) -> Options:
    """Checked options.  Raises ``FxmemError`` naming what was read and what is accepted."""
    if on_infeasible not in ("raise", "best"):
        raise FxmemError(f"on_infeasible should be 'raise' or 'best', not {on_infeasible!r}")
    if compiler not in (None, *COMPILERS):
        raise FxmemError(f"compiler should be 'eager' or 'inductor', not {shown(compiler)}")
    return Options(
        budget=Budget.parse(budget),
        outside=read_reserve(reserve),
        allow=_read_allow(allow),
        on_infeasible=on_infeasible,
        cost=_read_cost(cost),
        plan=_read_plan(plan),
        noise=_read_noise(noise),
        compiler=compiler,
    )


def _check_model(model: Any) -> None:
    if not isinstance(model, nn.Module):
        raise FxmemError(
            f"model should be a torch.nn.Module, not {type(model).__name__}\n"
            "  try: wrap a function in a module whose forward calls it"
        )
    if isinstance(model, OptimizedModule):
        raise FxmemError(
            "the model is optimized already\n  try: pass the model that it was made of"
        )
    if isinstance(model, torch.jit.ScriptModule):
        raise FxmemError(
            "the model is a TorchScript module, which cannot be traced\n"
            "  try: pass the module that it was made of"
        )
    if any(nn.parameter.is_lazy(t) for t in (*model.parameters(), *model.buffers())):
        raise FxmemError(
            "the model has lazy parameters, whose shapes are not known yet\n"
            "  try: call it once on an example before"
        )
    if torch.is_inference_mode_enabled():
        raise FxmemError(
            "in torch.inference_mode() nothing has a gradient, so there is no step to plan\n"
            "  try: call fxmem outside of it"
        )


def _read_loss_inputs(loss_inputs: Any) -> tuple[Any, ...]:
    if not isinstance(loss_inputs, (tuple, list)):
        raise FxmemError(
            f"loss_inputs should be a tuple, not {type(loss_inputs).__name__}\n  try: (target,)"
        )
    return tuple(loss_inputs)


def _read_allow(allow: Any) -> tuple[str, ...]:
    if not isinstance(allow, (str, tuple, list, set, frozenset)):
        raise FxmemError(f"allow takes names from {ALLOWED}, not {allow!r}")
    names = (allow,) if isinstance(allow, str) else tuple(allow)
    for name in names:
        if name in LATER:
            raise FxmemError(f"allow={name!r} is not available in this version; known: {ALLOWED}")
        if name not in ALLOWED:
            raise FxmemError(f"allow takes names from {ALLOWED}, not {name!r}")
    return names


def _read_cost(cost: Any) -> CostModel | Literal["measure"] | None:
    if isinstance(cost, CostModel):
        return cost
    if cost in ("auto", "roofline"):
        return None
    if cost == "measure":
        return "measure"
    raise FxmemError(f"cost should be 'auto', 'roofline', 'measure' or a CostModel, not {cost!r}")


def _read_noise(noise: Any) -> Noise:
    found = noise if isinstance(noise, Noise) else Noise(noise)
    ceiling: Any = found.ceiling
    if isinstance(ceiling, bool) or not isinstance(ceiling, (int, float)) or not 0 <= ceiling < 1:
        raise FxmemError(f"noise should be a number from 0 to below 1, not {ceiling!r}")
    bounded: Any = found.bounded
    if isinstance(bounded, bool) or not isinstance(bounded, (int, float)) or not 0 <= bounded < 1:
        raise FxmemError(f"bounded should be a number from 0 to below 1, not {bounded!r}")
    batches: Any = found.batches
    if not isinstance(batches, (list, tuple)):
        raise FxmemError(
            "the batches of fxmem.Noise should be a list of tuples, (*inputs, *loss_inputs) each, not "
            f"{type(batches).__name__}"
        )
    return found


def _read_plan(plan: Any) -> Plan | None:
    if plan is None or isinstance(plan, Plan):
        return plan
    if isinstance(plan, (str, os.PathLike)) and str(plan):
        return Plan.load(plan)
    if plan == "":
        raise FxmemError('plan is the empty string; it should be the path of a plan, "plan.json"')
    raise FxmemError(f"plan should be a Plan or the path of one, not {type(plan).__name__}")


def _all_names(shapes: Any, model: nn.Module, call: StepCall | None) -> Names:
    """The user's names, and the same for inputs that go with those that have them."""
    names = dynamic_names(shapes, model, call)
    return with_likely(names, call) if call is not None and names else names


def named_call(
    model: Any, inputs: Any, kwargs: Any, dynamic_shapes: Any, loss_fn: Any, loss_inputs: Any
) -> tuple[StepCall, Names, Bounds]:
    """The call to trace, the names of its sizes, and the bounds that the user gave them."""
    _check_model(model)
    call = example_call(model, inputs, kwargs, loss_fn, _read_loss_inputs(loss_inputs))
    if call is None:
        raise CaptureError(
            "the arguments of one call are needed\n"
            "  try: fxmem.liveness(model, (batch,)) or example_kwargs={...}"
        )
    given = dynamic_names(dynamic_shapes, model, call)
    return call, with_likely(given or default_names(call), call), given_bounds(dynamic_shapes)


def example_call(
    model: nn.Module, inputs: Any, kwargs: Any, loss_fn: Any, loss_inputs: Any
) -> StepCall | None:
    """The call to capture; None if the user gave no example."""
    if inputs is None and kwargs is None:
        return None
    if isinstance(inputs, torch.Tensor):
        raise FxmemError(
            "example_inputs should be a tuple of the model's arguments, not a single tensor\n"
            "  try: (x,)"
        )
    if inputs is not None and not isinstance(inputs, (tuple, list)):
        raise FxmemError(
            f"example_inputs should be a tuple of the model's arguments, not {type(inputs).__name__}"
        )
    if kwargs is not None and not isinstance(kwargs, Mapping):
        raise FxmemError(f"example_kwargs should be a dict, not {type(kwargs).__name__}")
    if loss_fn is not None and not callable(loss_fn):
        raise FxmemError(f"loss_fn should be callable, not {type(loss_fn).__name__}")
    if loss_fn is None and loss_inputs:
        raise FxmemError("loss_inputs are for loss_fn, which is missing\n  try: loss_fn=...")
    call = StepCall(model, tuple(inputs or ()), dict(kwargs or {}), loss_fn, loss_inputs)
    _check_arguments(call)
    _check_loss_inputs(call)
    _check_devices(call)
    return call


def _check_arguments(call: StepCall) -> None:
    """Does ``forward`` take what the example gives?"""
    if misfit := _misfit(call.model.forward, call.args, call.kwargs):
        raise FxmemError(
            f"{type(call.model).__name__}.forward{misfit[0]} cannot be called with the example: "
            f"{misfit[1]}\n  try: example_inputs and example_kwargs as in model(*inputs, **kwargs)"
        )


def _check_loss_inputs(call: StepCall) -> None:
    """Does ``loss_fn`` take the model's outputs and what else is given for it?"""
    if call.loss_fn is None:
        return
    loss = getattr(call.loss_fn, "forward", call.loss_fn)
    if misfit := _misfit(loss, (None, *call.loss_inputs), {}):
        raise FxmemError(
            f"loss_fn{misfit[0]} cannot be called with the model's outputs and "
            f"{len(call.loss_inputs)} loss_inputs: {misfit[1]}\n"
            "  try: loss_inputs=(targets,), so that loss_fn(outputs, *loss_inputs) is the loss"
        )


def _misfit(
    function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[inspect.Signature, TypeError] | None:
    """The signature, and why it does not take the arguments; None if it does, or cannot be known."""
    try:
        signature = inspect.signature(function)
    except (TypeError, ValueError):
        return None  # a callable that does not say what it takes
    try:
        signature.bind(*args, **kwargs)
    except TypeError as error:
        return signature, error
    return None


def _check_devices(call: StepCall) -> None:
    """A model on one device and inputs on another would only fail deep inside an operator."""
    parameters = {p.device for p in call.model.parameters()}
    leaves = pytree.tree_leaves((call.args, call.kwargs, call.loss_inputs))
    tensors = {t.device for t in leaves if isinstance(t, torch.Tensor) and t.ndim}
    if len(parameters) == 1 and tensors and not tensors & parameters:
        raise FxmemError(
            f"the model is on {next(iter(parameters))}, the example inputs on "
            f"{', '.join(sorted(map(str, tensors)))}\n  try: move them to the same device"
        )


def _warn_if_over(plan: Plan) -> None:
    if plan.predicted_peak > plan.budget:
        warnings.warn(
            f"fxmem: no plan fits {format_bytes(plan.budget)}; the smallest one found, which "
            f"peaks at {format_bytes(plan.predicted_peak)}, is applied",
            stacklevel=3,
        )
