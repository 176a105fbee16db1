"""The unchanged step's peak: eager PyTorch run on fake tensors, every storage watched until it dies.

Eager saves other tensors than the joint graph does, and Python's local variables hold some longer,
so the figure comes from running the model's own code: on a copy whose tensors are fake.  Nothing
large is allocated, no parameter, buffer, generator or attribute of the user's model changes.

Integers that the model is given are real, and so is what it makes of these or of nothing: models
look at positions and masks to choose their path, and one that sees fake tensors believes itself
traced and takes another.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from fxmem import _torch
from fxmem._torch import fake_tensors_off, is_fake, new_fake_mode, storage_key
from fxmem.basics.sizes import hint, in_blocks, is_dense, tensors_in
from fxmem.graphs.capture import StepCall, training_step
from fxmem.graphs.graph import LOSS_OUTSIDE
from fxmem.graphs.standins import backward, fake_call, is_small
from fxmem.graphs.workspace import Call, Workspaces


@dataclass
class _Moment:
    """What is live when an operator runs.  call is None where no operator with a workspace runs."""

    live: int
    call: Call | None


def eager_peak(call: StepCall, workspaces: Workspaces, device: torch.device) -> int:
    """Bytes at the peak of one eager training step, the parameters and inputs that it reads included.

    Operators that the table does not know yet are measured on ``device``.  To be called within
    ``compiling``, but not within a capture, where models believe themselves traced.
    """
    moments = _watched_step(call, workspaces, device)
    peak = 0
    for moment in sorted(moments, key=lambda m: -m.live):
        entry = workspaces.look_up(moment.call, device) if moment.call else None
        peak = max(peak, moment.live + (entry.nbytes if entry else 0))
    return peak


def _watched_step(call: StepCall, workspaces: Workspaces, device: torch.device) -> list[_Moment]:
    mode = new_fake_mode()
    fake = fake_call(call, mode)
    watch = _StorageWatch(workspaces, device)
    watch.hold(tensors_in(list(_state(fake))))
    with torch.random.fork_rng(devices=[]), mode, watch:
        outputs = training_step(*fake.values())
        backward(outputs, watch.lose)
    watch.settle()
    return [_Moment(m.live - sum(watch.unread.values()), m.call) for m in watch.moments]


def _state(call: StepCall) -> Any:
    yield from call.model.parameters()
    yield from call.model.buffers()
    yield from pytree.tree_leaves((call.args, call.kwargs, call.loss_inputs))


# -- Watching storages -----------------------------------------------------------------------------------


def _run(func: Callable[..., Any], args: Any, kwargs: Any) -> Any:
    """Run an operator: for real if it starts from nothing or from real tensors, else on fakes."""
    given = list(tensors_in((args, kwargs)))
    if given and all(is_small(t) and not is_fake(t) for t in given):
        with fake_tensors_off():
            return func(*args, **kwargs)
    result = func(*args, **kwargs)
    made = list(tensors_in(result))
    if not given and made and all(is_small(t) for t in made):
        with fake_tensors_off():
            return func(*args, **kwargs)
    return result


aten = torch.ops.aten

_EAGER_DROPOUT = {aten.native_dropout.default, aten.native_dropout_backward.default}


def _accumulates(func: Any, args: Any) -> bool:
    """May this be autograd's engine, which adds a second gradient to a first one?

    Under a dispatch mode it makes a new tensor.  Without one it adds in place if the first one is
    dense and nobody else has its storage, as the tensor that a view is of has.
    Source: torch/csrc/autograd/input_buffer.cpp, can_accumulate_inplace.
    """
    if func is not aten.add.Tensor or not _torch.is_called_by_engine():
        return False
    first = args[0]
    return isinstance(first, torch.Tensor) and is_dense(first) and not first._is_view()


@dataclass(frozen=True)
class _Sum:
    """Two gradients were added: the first one's storage, and the live bytes before and after."""

    first: int
    before: int
    after: int


@dataclass
class _StorageWatch(TorchDispatchMode):
    """Adds up the storages that are alive after each operator; a weak reference tells of deaths."""

    workspaces: Workspaces
    device: torch.device
    live: int = 0
    moments: list[_Moment] = field(default_factory=list)
    unread: dict[int, int] = field(default_factory=dict)  # storage key of what is held -> bytes
    _sum: _Sum | None = None
    _alive: dict[int, weakref.ref[Any]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        super().__init__()

    def hold(self, tensors: Any) -> None:
        """Tensors that are there before the step and after it."""
        for tensor in tensors:
            self._meet(tensor)
            self.unread[storage_key(tensor)] = _nbytes(tensor)

    def lose(self, sent: int) -> None:
        """The caller's loss is at work, while it sends gradients of so many bytes."""
        self.moments.append(_Moment(self.live + LOSS_OUTSIDE * sent, None))

    def __torch_dispatch__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        self.settle()
        for tensor in tensors_in((args, kwargs)):
            self.unread.pop(storage_key(tensor), None)
        before = self.live
        call = Call.of(func, args, kwargs)
        result = _run(func, args, kwargs)
        self._enlarge(func, call, result)
        for tensor in tensors_in(result):
            self._meet(tensor)
        if _accumulates(func, args):
            self._sum = _Sum(storage_key(args[0]), before, self.live)
        else:
            busy = self.live >= before and func not in _EAGER_DROPOUT
            self.moments.append(_Moment(self.live, call if busy else None))
        return result

    def settle(self) -> None:
        """A first gradient that is gone by now had one owner: eager would have added in place."""
        if self._sum is not None:
            first, before, after = self._sum.first, self._sum.before, self._sum.after
            self.moments.append(_Moment(after if first in self._alive else before, None))
            self._sum = None

    def _enlarge(self, func: Any, call: Call, result: Any) -> None:
        """Give fake results the storages that eager's real ones have."""
        tensors = [t for t in tensors_in(result) if is_fake(t)]
        if func is aten.native_dropout.default and self.device.type == "cpu" and len(tensors) == 2:
            # Eager on the CPU multiplies by noise of the input's type; tracing takes the fused
            # operator with its mask of bytes.
            tensors[1].untyped_storage().resize_(tensors[0].untyped_storage().nbytes())
        elif len(tensors) == 1 and tensors[0].ndim == 0 and tensors[0].is_floating_point():
            entry = self.workspaces.look_up(call, self.device)
            if entry and len(entry.storages) == 1 and entry.storages[0] > tensors[0].element_size():
                tensors[0].untyped_storage().resize_(entry.storages[0])

    def _meet(self, tensor: torch.Tensor) -> None:
        key = storage_key(tensor)
        if key in self._alive:
            return
        storage = tensor.untyped_storage()
        nbytes = _nbytes(tensor)
        self.live += nbytes

        def died(_: Any, key: int = key, nbytes: int = nbytes) -> None:
            self.live -= nbytes
            self._alive.pop(key, None)

        self._alive[key] = weakref.ref(storage, died)


def _nbytes(tensor: torch.Tensor) -> int:
    """What the allocator hands out for the storage behind it."""
    return int(in_blocks(hint(tensor.untyped_storage().nbytes()), tensor.device))
