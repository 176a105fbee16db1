"""Dynamic shapes as the user names them: which dimension of which input is which symbol."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from fxmem.basics.errors import FxmemError
from fxmem.graphs.capture import StepCall

Names = dict[str, dict[int, str]]
"""Input, as the captured function reaches it (``args[0]``), -> dimension -> symbol."""


_FORMS = 'accepted is {"x": {0: "B"}}'


def dynamic_names(shapes: Any, model: nn.Module, call: StepCall | None) -> Names:
    """Read ``dynamic_shapes``: ``{"x": {0: "B"}}``, ``{0: {0: "B"}}``, or a tuple as torch.export's.

    Raises ``FxmemError`` for an input or a dimension that does not exist.
    """
    if not shapes:
        return {}
    if call is None:
        raise FxmemError("dynamic_shapes names dimensions of the example inputs, so it needs them")
    if not isinstance(shapes, (Mapping, tuple, list)):
        raise FxmemError(
            f"dynamic_shapes should be a mapping or a tuple, not {shapes!r:.80}; {_FORMS}"
        )
    entries = shapes.items() if isinstance(shapes, Mapping) else enumerate(shapes)
    return {
        _place(key, model, call): _dimensions(key, dims, _tensor(key, model, call))
        for key, dims in entries
        if dims
    }


def _place(key: Any, model: nn.Module, call: StepCall) -> str:
    """Where the captured function reads an input; loss inputs follow the model's, as in a call."""
    late = key - len(call.args) if isinstance(key, int) and not isinstance(key, bool) else -1
    if 0 <= late < len(call.loss_inputs):
        return f"loss_inputs[{late}]"
    if isinstance(key, int) and 0 <= key < len(call.args):
        return f"args[{key}]"
    if key in call.kwargs:
        return f"kwargs['{key}']"
    names = list(inspect.signature(model.forward).parameters)
    if key in names and names.index(key) < len(call.args):
        return f"args[{names.index(key)}]"
    known = [*names[: len(call.args)], *call.kwargs]
    raise FxmemError(f"dynamic_shapes names the input {key!r}; this call has {known}")


def _tensor(key: Any, model: nn.Module, call: StepCall) -> torch.Tensor:
    value = _at(_place(key, model, call), call)
    if not isinstance(value, torch.Tensor):
        raise FxmemError(f"dynamic_shapes[{key!r}] names dimensions of a {type(value).__name__}")
    return value


def _dimensions(key: Any, dims: Any, tensor: torch.Tensor) -> dict[int, str]:
    """torch.export writes a sequence with None for static dimensions, or a mapping; both do."""
    if not isinstance(dims, (Mapping, tuple, list)):
        raise FxmemError(
            f"dynamic_shapes[{key!r}] should map dimensions, not {dims!r:.80}; {_FORMS}"
        )
    items = dims.items() if isinstance(dims, Mapping) else enumerate(dims)
    named = {d: _symbol(key, d, name) for d, name in items if name is not None}
    for d in named:
        if not isinstance(d, int) or not 0 <= d < tensor.ndim:
            raise FxmemError(
                f"dynamic_shapes[{key!r}] names dimension {d!r} of a tensor of shape "
                f"{tuple(tensor.shape)}"
            )
    return named


def _symbol(key: Any, dim: Any, name: Any) -> str:
    if isinstance(name, str) and name.isidentifier():
        return name
    if hasattr(name, "__name__"):  # torch.export.Dim("B")
        return str(name.__name__)
    raise FxmemError(
        f"dynamic_shapes[{key!r}][{dim!r}] should be a name, not {name!r:.80}; {_FORMS}"
    )


def _at(place: str, call: StepCall) -> Any:
    """The input at a place such as ``args[0]`` or ``kwargs['mask']``."""
    key = place[place.index("[") + 1 : -1]
    if place.startswith("kwargs"):
        return call.kwargs[key.strip("'")]
    return (call.loss_inputs if place.startswith("loss_inputs") else call.args)[int(key)]


Bounds = dict[str, tuple[int, "int | None"]]
"""Symbol -> the smallest and the largest size that the user gave; None: no largest."""


def given_bounds(shapes: Any) -> Bounds:
    """The ranges in ``dynamic_shapes``, where it holds ``torch.export.Dim("B", min=2, max=64)``."""
    found: Bounds = {}
    for dims in shapes.values() if isinstance(shapes, Mapping) else shapes or ():
        for dim in dims.values() if isinstance(dims, Mapping) else dims or ():
            if hasattr(dim, "__name__") and hasattr(dim, "min"):
                high = dim.max if isinstance(dim.max, int) else None
                found[str(dim.__name__)] = (max(int(dim.min), 0), high)
    return found


def corners(here: dict[str, int], bounds: Bounds) -> list[dict[str, int]]:
    """Sizes whose plans serve all within the bounds: all the largest, all the smallest, and ones.

    A size of 1 is a constant to tracing, so it has a plan of its own if the user's range begins there.
    """
    highs = {n: most for n, (_, most) in bounds.items() if n in here and most is not None}
    if not highs:
        return []
    lows = {n: max(2, low) for n, (low, _) in bounds.items() if n in here}
    ones = [n for n in highs if bounds[n][0] == 1]
    largest = {**here, **highs}
    return [largest, {**here, **lows}, *({**largest, n: 1} for n in ones)]


# -- Names by position -------------------------------------------------------------------------------


def default_names(call: StepCall) -> Names:
    """Names for a call whose user gave none: B for the first dimension of the inputs.

    S for the second one of token ids (integers) and of sequences (three dimensions); both only where
    an input agrees with the first one that has them.
    """
    first = next((t for _, t in _inputs(call) if t.ndim), None)
    if first is None:
        return {}
    seed: dict[int, str] = {0: "B"}
    if first.ndim == 3 or (first.ndim == 2 and not first.is_floating_point()):
        seed[1] = "S"
    place = next(p for p, t in _inputs(call) if t is first)
    return {place: seed}


def with_likely(names: Names, call: StepCall) -> Names:
    """The names, and the same for the dimensions of other inputs that stand alike and are as long.

    A label that goes with an input has its batch size; equal sizes at other positions are chance.
    """
    sizes: dict[tuple[int, int], str] = {}
    for place, dims in names.items():
        shape = _at(place, call).shape
        sizes.update({(d, int(shape[d])): name for d, name in dims.items()})
    found = dict(names)
    for place, tensor in _inputs(call):
        if place not in names:
            dims = {d: sizes[d, n] for d, n in enumerate(tensor.shape) if (d, n) in sizes}
            found.update({place: dims} if dims else {})
    return found


def _inputs(call: StepCall) -> list[tuple[str, torch.Tensor]]:
    """The tensors among the inputs that may have names, and their places."""
    places = [f"args[{i}]" for i in range(len(call.args))]
    places += [f"kwargs['{k}']" for k in call.kwargs]
    places += [f"loss_inputs[{i}]" for i in range(len(call.loss_inputs))]
    return [(p, v) for p in places if isinstance(v := _at(p, call), torch.Tensor)]


def sizes_by_name(call: StepCall, names: Names) -> dict[str, int]:
    """Symbol -> its size in the call.  Raises ``FxmemError`` where two inputs disagree."""
    found: dict[str, int] = {}
    for (place, dim), size in sizes_of(call, names).items():
        name = names[place][dim]
        if found.setdefault(name, size) != size:
            raise FxmemError(
                f"dynamic_shapes calls two sizes {name}: {found[name]}, and {size} in dimension "
                f"{dim} of {place}\n  try: another name for one of them"
            )
    return found


# -- On the call -------------------------------------------------------------------------------------


def marked(call: StepCall, names: Names) -> StepCall:
    """The call with its dynamic dimensions marked, on aliases: the user's tensors stay unmarked."""
    if not names:
        return call
    args = tuple(_mark(a, names.get(f"args[{i}]")) for i, a in enumerate(call.args))
    kwargs = {k: _mark(a, names.get(f"kwargs['{k}']")) for k, a in call.kwargs.items()}
    late = tuple(_mark(a, names.get(f"loss_inputs[{i}]")) for i, a in enumerate(call.loss_inputs))
    return replace(call, args=args, kwargs=kwargs, loss_inputs=late)


def _mark(value: Any, dims: dict[int, str] | None) -> Any:
    if not dims:
        return value
    alias = value.detach().requires_grad_(value.requires_grad)
    for dim in dims:
        torch._dynamo.mark_dynamic(alias, dim)
    return alias


Sizes = dict[tuple[str, int], int]
"""Input and dimension -> size."""


def sizes_of(call: StepCall, names: Names) -> Sizes:
    """The call's sizes in the dynamic dimensions."""
    found: Sizes = {}
    for place, dims in names.items():
        value = _at(place, call)
        found.update({(place, dim): int(value.shape[dim]) for dim in dims})
    return found
