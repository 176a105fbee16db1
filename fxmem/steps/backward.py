"""The two halves of a step as code, and the backward that runs: one for each set of gradients that come."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from torch import fx

from fxmem import _torch
from fxmem._torch.eager import compiling
from fxmem.basics.errors import FxmemError
from fxmem.graphs.emit import boxed
from fxmem.graphs.graph import JointGraph, Role
from fxmem.graphs.partition import Split
from fxmem.steps.pipeline import Planned, backward_for


class Code(Protocol):
    """What makes code of a planned step.  split: the halves that a runtime pairs, for every tangent."""

    @property
    def split(self) -> Split: ...

    def forward(self) -> _torch.BoxedCallable:
        """The forward's code."""

    def backward_for(self, undefined: tuple[str, ...]) -> fx.GraphModule:
        """The backward to run when exactly these tangents are undefined."""

    def backward(self, module: fx.GraphModule) -> _torch.BoxedCallable:
        """Code for such a backward."""


@dataclass(frozen=True)
class OpByOp:
    """Operator by operator, as eager runs them."""

    planned: Planned

    @property
    def split(self) -> Split:
        return self.planned.split

    def forward(self) -> _torch.BoxedCallable:
        return boxed(self.split.forward)

    def backward_for(self, undefined: tuple[str, ...]) -> fx.GraphModule:
        return backward_for(self.planned, undefined)

    def backward(self, module: fx.GraphModule) -> _torch.BoxedCallable:
        return boxed(module)


class Backward:
    """The backward of a program.

    Called with the saved tensors and the tangents in a list; a tangent that nobody sent is None.
    """

    def __init__(self, planned: Planned, graph: JointGraph, code: Code | None = None) -> None:
        self.code = code or OpByOp(planned)
        placeholders = self.code.split.backward.graph.find_nodes(op="placeholder")
        self.names = [n.name for n in placeholders]
        tangents = {n.name for n in graph.placeholders(Role.TANGENT)}
        self.tangents = [(i, name) for i, name in enumerate(self.names) if name in tangents]
        self.variants: dict[tuple[str, ...], tuple[list[int], _torch.BoxedCallable]] = {}
        self.module = self._prepare(planned.undefined)

    def __call__(self, args: list[Any]) -> Any:
        undefined = tuple(name for i, name in self.tangents if args[i] is None)
        if undefined not in self.variants:
            with compiling():
                self._prepare(undefined)
        places, run = self.variants[undefined]
        wanted = [args[i] for i in places]
        args.clear()  # what this variant does not read must not outlive this line
        return run(wanted)

    def _prepare(self, undefined: tuple[str, ...]) -> fx.GraphModule:
        module = without_unread(self.code.backward_for(undefined))
        places = [self.names.index(n.name) for n in module.graph.find_nodes(op="placeholder")]
        display = copy.copy(module)
        self.variants[undefined] = (places, self.code.backward(module))
        return display


def without_unread(module: fx.GraphModule) -> fx.GraphModule:
    """The same module, changed in place: it takes no input that it does not read."""
    for node in module.graph.find_nodes(op="placeholder"):
        if not node.users:
            module.graph.erase_node(node)
    module.recompile()
    return module


@dataclass(frozen=True)
class Coded:
    """A planned step with its code.  split: the halves as they run.

    phases: what they were measured to hold, where that is not as planned.  written: places of inputs that
    the forward writes itself.
    """

    planned: Planned
    split: Split
    forward: _torch.BoxedCallable
    backward: Backward
    phases: Phases | None = None
    written: tuple[int, ...] = ()


@dataclass(frozen=True)
class Phases:
    """Bytes that a step of code holds beside what it is given.

    forward, backward: at most.  held: between them, saved or returned; outside: what a loss outside of the
    step holds there.
    """

    forward: int
    held: int
    backward: int
    outside: int = 0

    @property
    def peak(self) -> int:
        return max(self.forward, self.held + self.outside, self.backward)


def op_by_op(planned: Planned, graph: JointGraph) -> Coded:
    code = OpByOp(planned)
    return Coded(planned, code.split, code.forward(), Backward(planned, graph, code))


def refuse(gradients: Sequence[Any]) -> None:
    """Raises ``FxmemError`` for a backward that the captured one is not."""
    _refuse_autocast()
    _refuse_batches(gradients)


def _refuse_autocast() -> None:
    """Eager's backward would be cast inside autocast; the captured one is as it is outside."""
    if _torch.is_any_autocast_on():
        raise FxmemError(
            "backward() ran inside autocast; the step was captured for a backward outside it.\n"
            "  try: leave the autocast context after the loss is computed, and call backward() "
            "then, as PyTorch's manual advises"
        )


def _refuse_batches(gradients: Sequence[Any]) -> None:
    """Operators of a plan write into memory of one gradient's size."""
    if any(map(_torch.is_a_batch, gradients)):
        raise FxmemError(
            "many gradients were sent at once (is_grads_batched=True, or vectorize=True of a Jacobian); "
            "the captured backward is of one.\n"
            "  try: one call for each gradient, or the model itself, without fxmem, for this part"
        )


def refuse_double_backward() -> None:
    raise FxmemError(
        "a backward of this step's gradients was asked for (create_graph=True); they were computed by a "
        "captured graph, which has none, as under torch.compile.\n"
        "  try: the model itself, without fxmem, for the part whose gradients are differentiated again, "
        "such as a gradient penalty"
    )
