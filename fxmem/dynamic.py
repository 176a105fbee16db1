"""Dynamic shapes as the user names them: which dimension of which input is which symbol."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from fxmem.capture import StepCall
from fxmem.errors import FxmemError

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
    place = _place(key, model, call)
    value = call.kwargs[key] if key in call.kwargs else call.args[int(place[5:-1])]
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


def marked(call: StepCall, names: Names) -> StepCall:
    """The call with its dynamic dimensions marked, on aliases: the user's tensors stay unmarked."""
    if not names:
        return call
    args = tuple(_mark(a, names.get(f"args[{i}]")) for i, a in enumerate(call.args))
    kwargs = {k: _mark(a, names.get(f"kwargs['{k}']")) for k, a in call.kwargs.items()}
    return replace(call, args=args, kwargs=kwargs)


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
        inputs: Any = call.args if place.startswith("args") else call.kwargs
        key: Any = place[place.index("[") + 1 : -1]
        value = inputs[int(key)] if place.startswith("args") else inputs[key.strip("'")]
        found.update({(place, dim): int(value.shape[dim]) for dim in dims})
    return found
