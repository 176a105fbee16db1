"""What a step saves for its backward, as it is today: eager autograd on fake tensors, each save seen.

Nothing large is allocated and nothing of the model changes.  One line is one storage: a value that
several operators save exists once.  What a region under ``torch.utils.checkpoint`` or under saved-tensor
hooks of the model's own puts elsewhere is not listed, for it is not saved.
"""

from __future__ import annotations

import contextlib
import re
import sys
import weakref
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fxmem._torch import is_fake, new_fake_mode, storage_key
from fxmem._torch.eager import compiling
from fxmem.basics.errors import CaptureError, FxmemError
from fxmem.basics.sizes import hint, tensors_in
from fxmem.basics.tables import BYTES, ROUNDED, clean, scale, starred, table, unnumbered, wrapped
from fxmem.basics.units import format_bytes
from fxmem.graphs.capture import StepCall, training_step
from fxmem.graphs.graph import type_text
from fxmem.graphs.standins import fake_call, without_meta

_OWN = str(Path(__file__).parent.parent)
_TORCH = str(Path(torch.__file__).parent)


@dataclass(frozen=True)
class SavedTensor:
    """One storage that the backward keeps alive.

    nbytes: of the whole storage, which a small view keeps alive in full.  operator: the first that
    saved it; also: the others.  module: qualified name.  source: ``file.py:12 in forward``, the
    innermost line that is not torch's; empty where all of them are.
    """

    type: str
    nbytes: int
    operator: str
    also: tuple[str, ...]
    module: str
    source: str


@dataclass(frozen=True)
class Saved:
    """What a step saves for its backward, in the order in which it is saved.

    resident: bytes of parameters, buffers and inputs that the backward reads, too; they are there
    anyway and no part of ``total``.
    """

    model: str
    rows: tuple[SavedTensor, ...]
    resident: int

    @property
    def total(self) -> int:
        """Bytes that exist only because the backward will read them."""
        return sum(row.nbytes for row in self.rows)

    def __str__(self) -> str:
        return self.text()

    def text(self, fold: bool = False) -> str:
        """The table.  fold: equal lines of equal blocks as one, with their number."""
        title = f"{clean(self.model)} saves {format_bytes(self.total)} for its backward"
        if not self.rows:
            return title + "."
        groups = self._groups(fold)
        size = scale(BYTES, [[sum(row.nbytes for row in group) for group in groups]])
        cells = [
            (
                group[0].type.replace(", ", ","),
                *([str(len(group))] if fold else []),
                size.text(sum(row.nbytes for row in group)),
                ", ".join((group[0].operator, *group[0].also)),
                starred([row.module for row in group]),
                group[0].source.split(" in ")[0],
            )
            for group in groups
        ]
        count = [str(len(self.rows))] if fold else []
        cells.append(("TOTAL", *count, size.text(self.total), "", "", ""))
        headers = ("type", *(["n"] if fold else []), size.name, "saved by", "module", "source")
        needs = {0: 16, 2 + fold: 16, 3 + fold: 20, 4 + fold: 16}
        lines = [title, *table(headers, cells, "l" + "r" * (1 + fold) + "lll", needs)]
        if not size.adds_up:
            lines.append(ROUNDED)
        if self.resident:
            lines += wrapped(
                f"The backward also reads {format_bytes(self.resident)} of parameters, buffers and "
                "inputs, which are there anyway."
            )
        return "\n".join(lines)

    def _groups(self, fold: bool) -> list[list[SavedTensor]]:
        """The rows in their order, those that differ in nothing but the number of their block together."""
        groups: dict[object, list[SavedTensor]] = {}
        for number, row in enumerate(self.rows):
            place = unnumbered(row.module)
            like = (row.type, row.nbytes, row.operator, row.also, place, row.source)
            groups.setdefault(like if fold else number, []).append(row)
        return list(groups.values())

    def to_dict(self) -> dict[str, Any]:
        """Ready for JSON; bytes are integers."""
        rows = [{**asdict(row), "also": list(row.also)} for row in self.rows]
        return {"model": self.model, "total": self.total, "resident": self.resident, "rows": rows}


def saved(
    model: nn.Module,
    *inputs: Any,
    loss_fn: Callable[..., Any] | None = None,
    loss_inputs: tuple[Any, ...] = (),
    **kwargs: Any,
) -> Saved:
    """What ``model(*inputs, **kwargs)`` saves for its backward.

    The model runs once, on fake tensors: it may be on the meta device.  loss_fn: called as
    ``loss_fn(outputs, *loss_inputs)`` when the loss is outside the model.

    Raises ``FxmemError`` for what is no module, ``CaptureError`` where the model fails on fake tensors.
    """
    if not isinstance(model, nn.Module):
        raise FxmemError(
            f"saved takes a torch.nn.Module and its inputs, not {type(model).__name__}\n"
            "  try: fxmem.saved(model, x)"
        )
    call = StepCall(model, inputs, kwargs, loss_fn, loss_inputs)
    try:
        with compiling():
            return _watched(call)
    except Exception as error:  # whatever a model's own code may raise
        raise CaptureError(
            f"{type(model).__name__} does not run on fake tensors: {type(error).__name__}: "
            f"{str(error)[:400]}\n  try: run it once on the same inputs; sizes must not depend on data"
        ) from error


def _watched(call: StepCall) -> Saved:
    call = without_meta(call)  # whose kernels are not those of the device that it will run on
    fakes = [t for t in tensors_in(list(_state(call))) if is_fake(t)]
    mode: Any = getattr(fakes[0], "fake_mode", None) if fakes else new_fake_mode()
    fake = call if fakes else fake_call(call, mode)
    resident = {storage_key(t) for t in tensors_in(list(_state(fake)))}
    watch = _Watch(_names(fake.model))
    with torch.random.fork_rng(devices=[]), mode, torch.enable_grad(), watch.watching(fake.model):
        outputs = training_step(*fake.values())
    _name_operators(outputs)
    alive = [record for record in (ref() for ref in watch.records) if record is not None]
    return _report(type(call.model).__name__, alive, resident)


def _state(call: StepCall) -> Iterator[Any]:
    yield from call.model.parameters()
    yield from call.model.buffers()
    yield call.args, call.kwargs, call.loss_inputs


def _names(model: nn.Module) -> dict[int, str]:
    return {id(module): name for name, module in model.named_modules()}


def _report(model: str, records: list[_Record], resident: set[int]) -> Saved:
    """One row a storage, in the order of the first save."""
    groups: dict[int, list[_Record]] = {}
    for record in records:
        groups.setdefault(storage_key(record.tensor), []).append(record)
    sizes = {key: hint(group[0].tensor.untyped_storage().nbytes()) for key, group in groups.items()}
    rows = [_row(group, sizes[key]) for key, group in groups.items() if key not in resident]
    there = sum(sizes[key] for key in groups if key in resident)
    return Saved(model, tuple(row for row in rows if row.nbytes), there)


def _row(group: list[_Record], nbytes: int) -> SavedTensor:
    first = group[0]
    # A view may be saved before its base is: the tensor that fills the storage says what it is.
    whole = max(group, key=lambda record: record.tensor.numel()).tensor
    operators = list(dict.fromkeys(record.operator for record in group if record.operator))
    return SavedTensor(
        type=type_text(whole),
        nbytes=nbytes,
        operator=operators[0] if operators else "unknown operator",
        also=tuple(operators[1:]),
        module=first.module,
        source=first.source,
    )


# -- Seeing the saves ------------------------------------------------------------------------------


@dataclass(eq=False)
class _Record:
    """A save: autograd holds this in the tensor's place, for as long as the backward may come."""

    tensor: torch.Tensor
    module: str
    source: str
    operator: str = ""


@dataclass
class _Watch:
    """Hears of each save, and knows in which module it happens."""

    names: dict[int, str]
    records: list[weakref.ref[_Record]] = field(default_factory=list)
    inside: list[str] = field(default_factory=list)

    def watching(self, model: nn.Module) -> contextlib.ExitStack:
        stack = _hooks_on(model, self._enter, self._leave)
        stack.enter_context(
            torch.autograd.graph.saved_tensors_hooks(self._pack, lambda record: record.tensor)
        )
        return stack

    def _enter(self, module: nn.Module, *_: Any) -> None:
        self.inside.append(self.names.get(id(module), ""))

    def _leave(self, *_: Any) -> None:
        self.inside.pop()

    def _pack(self, tensor: torch.Tensor) -> _Record:
        source, operator = _place()
        if tensor.grad_fn is not None:
            # An output that leads back to its own node would keep what nobody needs any more.
            tensor = tensor.detach()
        record = _Record(tensor, self.inside[-1] if self.inside else "", source, operator)
        self.records.append(weakref.ref(record))
        return record


def _hooks_on(model: nn.Module, enter: Any, leave: Any) -> contextlib.ExitStack:
    """A stack of contexts in which every submodule tells that it is entered and left."""
    stack = contextlib.ExitStack()
    for module in model.modules():
        first = module.register_forward_pre_hook(enter, prepend=True)
        last = module.register_forward_hook(leave, always_call=True)
        stack.callback(first.remove)
        stack.callback(last.remove)
    return stack


def _place() -> tuple[str, str]:
    """The innermost line that is neither torch's nor ours, and who saves if autograd will not say.

    No line below the call of ``saved`` is the model's.
    """
    operator = ""
    frame: Any = sys._getframe(2)
    while frame is not None and not frame.f_code.co_filename.startswith(_OWN):
        file = frame.f_code.co_filename
        if not file.startswith(_TORCH):
            return f"{Path(file).name}:{frame.f_lineno} in {frame.f_code.co_name}", operator
        if file.endswith("utils/checkpoint.py"):
            operator = "checkpoint"  # the inputs of its region, outside autograd's graph
        frame = frame.f_back
    return "", operator


# -- Which operator saved it -----------------------------------------------------------------------


def _name_operators(outputs: Any) -> None:
    """Walk autograd's graph from the outputs and tell each record who holds it."""
    stack = [t.grad_fn for t in tensors_in(outputs) if t.grad_fn is not None]
    seen = set(stack)
    while stack:
        node = stack.pop()
        for record in _held_by(node):
            record.operator = _operator(node.name())
        for other, _ in node.next_functions:
            if other is not None and other not in seen:
                seen.add(other)
                stack.append(other)


def _held_by(node: Any) -> Iterator[_Record]:
    """The records in a node's raw saved tensors: unpacking those of others might run their code."""
    for name in dir(node):
        if name.startswith("_raw_saved_"):
            held = getattr(node, name)
            for one in held if isinstance(held, (tuple, list)) else (held,):
                record = getattr(one, "data", None)
                if isinstance(record, _Record):
                    yield record


_WORD = re.compile(r"(?<=[a-z0-9])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])")


def _operator(node: str) -> str:
    """``NativeLayerNormBackward0`` is ``native_layer_norm``'s; a class of the user's keeps its name."""
    name = node.removeprefix("torch::autograd::")
    own = re.fullmatch(r"(\w+?)Backward(\d+)", name)
    if own:
        return _WORD.sub("_", own[1]).lower()
    return name.removesuffix("Backward")
