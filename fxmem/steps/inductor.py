"""A planned step as Inductor's code: the plan's graph in Inductor's operators, cut anew and measured.

Inductor fuses, so two things differ from the plan.  What a kernel can make again at no cost is not
saved: a minimum cut of the rewritten graph says what that is, with every twin where the plan put it.
And what is never written to memory does not count, so the peak that was predicted operator by operator
is only about right.  Inductor's schedule of the kernels says what that will peak at (fused.py), before
there is code of them; which plan to make code of is chosen in code_search.py.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from torch import fx

from fxmem import _torch
from fxmem._torch import inductor as _torch_inductor
from fxmem.analysis.cost import CPU
from fxmem.basics.sizes import Size, evaluate, hint, storages_in, tensors_in
from fxmem.codes import planes, pool_gradients
from fxmem.codes.encodings import ENCODERS, pool_offsets
from fxmem.graphs.capture import tag_backward
from fxmem.graphs.graph import (
    JointGraph,
    Role,
    has_effect,
    is_backward,
    is_view,
    operator_name,
    output_values,
)
from fxmem.graphs.operators import is_random
from fxmem.graphs.partition import Split, split
from fxmem.graphs.workspace import Workspaces
from fxmem.passes.tangents import UndefinedTangentsPass
from fxmem.steps.backward import without_unread
from fxmem.steps.compile_errors import explained
from fxmem.steps.fused import peak_of
from fxmem.steps.measured_step import loss_outside
from fxmem.steps.pipeline import Planned


class Inductor:
    """Code for both halves of a planned step; see ``Code`` in backward.py.

    saves_least: is all made again that kernels can, though it costs them time?  like: code of the same
    plan, which is not taken apart once more then.
    """

    def __init__(
        self, planned: Planned, *, saves_least: bool = False, like: Inductor | None = None
    ) -> None:
        with explained("taking the step apart into Inductor's operators", planned.graph.module):
            self.whole: JointGraph = like.whole if like else _in_inductors_operators(planned)
            self.graph, self.saved = _cut(self.whole, saves_least)
            self.split = self._halves(self.graph)
        self.saves_least = saves_least
        self.written = _written_by_kernels(self.split.forward, self.graph.written_inputs())
        self.strides: _torch_inductor.Strides = {}
        self.lowered: list[Any] = []
        self.freed_at_once = False
        self._backwards: dict[tuple[str, ...], fx.GraphModule] = {}

    def forward(self) -> _torch.BoxedCallable:
        module = self._forward_as_written()
        with explained("making code of the step's forward with Inductor", module):
            code, self.strides = _torch_inductor.inductor(
                module,
                **self._of_forward(module),
                lowered=self.lowered[0] if self.lowered else None,
            )
        if self.written:
            code = _counting_what_it_wrote(code, [*self.written.values()])
        return _each_its_own(code, self._repeated())

    def _repeated(self) -> list[int]:
        """Places of outputs that are the same value as an earlier one, in Inductor's operators."""
        outputs = output_values(self.split.forward)[: self.split.num_forward_outputs]
        return [at for at, out in enumerate(outputs) if out in outputs[:at]]

    def backward_for(self, undefined: tuple[str, ...]) -> fx.GraphModule:
        if undefined not in self._backwards:
            half = self.split.backward
            if undefined:
                half = self._halves(UndefinedTangentsPass(undefined).apply(self.graph)).backward
            self._backwards[undefined] = without_unread(_copy(half))
        return self._backwards[undefined]

    def backward(self, module: fx.GraphModule) -> _torch.BoxedCallable:
        module = _copy(module)
        with explained("making code of the step's backward with Inductor", module):
            code, _ = _torch_inductor.inductor(
                module,
                **self._of_backward(module, self.strides),
                lowered=self.lowered[1] if self.lowered else None,
            )
            self.lowered = []
        return code

    @cached_property
    def held(self) -> Held:
        """What the code holds between its halves, and the time of what it makes again."""
        return _held(self.graph, self.saved)

    def foreseen(self, planned: Planned, table: Workspaces, device: torch.device) -> int | None:
        """Bytes that the step will peak at; None where a half of it has no kernels.

        That buffers are let go at once takes time, and is asked for where the budget is not kept without.
        table: gets what it lacks about operators.
        """
        peak = self._foreseen(planned, table, device)
        if peak is not None and peak > planned.plan.budget:
            self.freed_at_once = True
            peak = self._foreseen(planned, table, device)
        return peak

    def _foreseen(self, planned: Planned, table: Workspaces, device: torch.device) -> int | None:
        lowered = self.lowered or [None, None]
        module = self._forward_as_written()
        how = self._of_forward(module)
        first = _torch_inductor.schedule(module, **how, lowered=lowered[0])
        if first is None:
            return None
        backward = self.backward_for(planned.undefined)
        module = _copy(backward)
        how = self._of_backward(module, first.strides)
        second = _torch_inductor.schedule(module, **how, lowered=lowered[1])
        if second is None:
            return None
        self.lowered = [first.lowered, second.lowered]
        halves = replace(self.split, backward=backward)
        added = peak_of(first, second, halves, table, loss_outside(planned), device)
        return planned.plan.resident + added

    def _forward_as_written(self) -> fx.GraphModule:
        """The forward's graph, to be changed; what its kernels write over inputs it does not return."""
        module = _copy(self.split.forward)
        given, output = module.graph.find_nodes(op="placeholder"), module.graph.output_node()
        with module.graph.inserting_before(output):
            for place, at in self.written.items():
                over = (given[at], output_values(module)[place])
                copied = module.graph.call_function(torch.ops.aten.copy_.default, over)
                copied.meta["val"] = given[at].meta["val"]
        left = [None if i in self.written else v for i, v in enumerate(output_values(module))]
        output.args = (tuple(left),)
        return module

    def _of_forward(self, module: fx.GraphModule) -> dict[str, Any]:
        return {
            "backward": False,
            "static_inputs": _static(module, self.graph),
            "visible": range(self.split.num_forward_outputs),
            "strides": {},
            "freed_at_once": self.freed_at_once,
        }

    def _of_backward(
        self, module: fx.GraphModule, strides: _torch_inductor.Strides
    ) -> dict[str, Any]:
        return {
            "backward": True,
            "static_inputs": _static(module, self.graph),
            "visible": range(len(output_values(module))),
            "strides": strides,
            "freed_at_once": self.freed_at_once,
        }

    def _halves(self, graph: JointGraph) -> Split:
        nodes = {node.name: node for node in graph.nodes}
        halves = split(graph, [nodes[name] for name in self.saved if name in nodes])
        return replace(halves, backward=_torch_inductor.just_in_time(halves.backward))


def _each_its_own(code: _torch.BoxedCallable, places: Sequence[int]) -> _torch.BoxedCallable:
    """Code that returns tensors of their own at these places.

    A value and its ``detach`` are one to Inductor.  Autograd would take the gradient of the first away
    where it is told that the second has none.
    """
    if not places:
        return code

    def run(args: list[Any]) -> Any:
        outputs = list(code(args))
        for at in places:
            if isinstance(outputs[at], torch.Tensor):
                outputs[at] = outputs[at].detach()
        return outputs

    return _torch.mark_boxed(run)


def _counting_what_it_wrote(code: _torch.BoxedCallable, places: Sequence[int]) -> Any:
    """Code that writes these inputs, and says so to autograd where it fails in the midst."""

    def run(args: list[Any]) -> Any:
        inputs = [args[at] for at in places]
        try:
            return code(args)
        except BaseException:
            torch.autograd.graph.increment_version(inputs)
            raise

    return _torch.mark_boxed(run)


def _written_by_kernels(forward: fx.GraphModule, written: Mapping[int, int]) -> dict[int, int]:
    """Of the outputs that go over inputs, those that kernels may write there.

    Nothing but its own new value may depend on such an input: Inductor hands out what is only a copy of
    it, or a view, as the input itself, and by then that would be written.
    """
    given, outputs = forward.graph.find_nodes(op="placeholder"), output_values(forward)
    over = {given[at]: place for place, at in written.items() if _is_apart(given[at])}
    of = dict[Any, frozenset[fx.Node]]()
    for node in forward.graph.nodes:
        parts = [of[source] for source in node.all_input_nodes if node.op != "output"]
        of[node] = frozenset([node] if node in over else []).union(*parts)
    read = {
        source
        for place, value in enumerate(outputs)
        for source in of.get(value, ())
        if over[source] != place
    }
    return {place: at for place, at in written.items() if given[at] in over.keys() - read}


def _is_apart(node: fx.Node) -> bool:
    """Does each of its elements lie in a place of its own, as far as strides say?"""
    value = node.meta["val"]
    lies = zip(map(hint, value.shape), map(hint, value.stride()), strict=True)
    return all(stride for size, stride in lies if size != 1)


def _in_inductors_operators(planned: Planned) -> JointGraph:
    graph = _codes_marked(planned.functional)
    module = _torch_inductor.decomposed(graph.module, fusible)
    _torch_inductor.read_offsets_of_pools(module, pool_offsets)
    graph = replace(graph, module=module)
    if not any(map(_is_twin, graph.nodes)) and not _of_what_changes(graph):
        # They would take what is made again for what it was made of first, and a copy for the original.
        _torch_inductor.optimize_joint(module)
        tag_backward(module)
    return graph.verified()


def fusible(node: fx.Node) -> Callable[..., Any] | None:
    """What of aten's to trace in the place of an operator of ours, which is closed to a compiler."""
    return planes.fusible(node) or pool_gradients.fusible(node)


def _of_what_changes(graph: JointGraph) -> set[fx.Node]:
    """What the forward makes of inputs before it changes them, and the backward needs: it is saved.

    Made again it would be another value, though an input lies there at no cost.
    """
    found, stack = set[fx.Node](), [n for changed in graph.mutated_inputs() for n in changed.users]
    needed = _needed(graph) if stack else found
    while stack:
        node = stack.pop()
        if is_backward(node) or node not in needed:
            continue
        if is_view(node) or not isinstance(node.meta.get("val"), torch.Tensor):
            stack += node.users
        else:
            found.add(node)
    return found


_CODE = "fxmem_code"


def _codes_marked(graph: JointGraph) -> JointGraph:
    """With a mark on the codes that the forward makes; what they become inherits it."""
    graph = graph.copy()
    for node in graph.nodes:
        if node.target in ENCODERS and not is_backward(node):
            node.meta["custom"] = {**node.meta.get("custom", {}), _CODE: True}
    return graph


def _codes(graph: JointGraph) -> list[str]:
    """Names of the codes: of what was marked, what the backward reads."""
    marked = [n for n in graph.nodes if _CODE in n.meta.get("custom", {})]
    return [node.name for node in marked if any(map(is_backward, node.users))]


def _is_twin(node: fx.Node) -> bool:
    return is_backward(node) and "fxmem_origin" in node.meta


def _cut(graph: JointGraph, saves_least: bool) -> tuple[JointGraph, list[str]]:
    """The graph, and names of the values to save: codes, which are few bytes, what could not be made
    again, and what the minimum cut says beside them.
    """
    cut = _torch_inductor.min_cut(
        graph.copy().module,
        graph.num_forward_outputs,
        _static(graph.module, graph),
        _stays_behind,
        saves_least,
    )
    early = {node.name for node in _of_what_changes(graph)}
    graph = _made_before(graph, set(cut))
    return graph, _reached(graph, {*_codes(graph), *cut, *early})


def _stays_behind(node: fx.Node) -> bool:
    """Does a node of the backward belong there, even if it reads no tangent?

    Sizes do, and on a CPU all: what could be made before are masks, and Inductor's loops over these are
    slow there.
    """
    if not is_backward(node) or _device(node) in (None, *_SLOW_WITH_MASKS):
        return is_backward(node)
    return _is_twin(node) or is_random(node) or has_effect(node)


_SLOW_WITH_MASKS = ("cpu",)


def _device(node: fx.Node) -> str | None:
    return next((t.device.type for t in tensors_in(node.meta.get("val"))), None)


def _made_before(graph: JointGraph, saved: set[str]) -> JointGraph:
    """What is saved of the backward's own nodes is made in the forward, right after what it is made of.

    A mask is such: ReLU's backward compares what the forward made, and so can the kernel that made it.
    """
    if not any(node.name in saved and is_backward(node) for node in graph.nodes):
        return graph
    graph = graph.copy()
    moved = {node for node in graph.nodes if node.name in saved and is_backward(node)}
    for node in reversed(list(graph.nodes)):
        if node in moved:
            moved.update(filter(is_backward, node.all_input_nodes))
    order = {node: place for place, node in enumerate(graph.nodes)}
    start = next(node for node in graph.nodes if node.op == "call_function")
    last: dict[fx.Node, fx.Node] = {}  # of those that were moved after a node
    after: dict[fx.Node, fx.Node] = {}
    for node in [n for n in graph.nodes if n in moved]:
        node.meta["partitioner_tag"] = "is_forward"
        sources = [after.get(source, source) for source in node.all_input_nodes]
        anchor = max(sources, key=order.__getitem__, default=start)
        if order[anchor] < order[start]:
            anchor = start
        if node is not anchor:
            last.get(anchor, anchor).append(node)
        after[node], last[anchor] = anchor, node
    return graph.verified()


def _reached(graph: JointGraph, saved: set[str]) -> list[str]:
    """Those that the backward reads where all of them are saved, in program order."""
    found = _needed(graph, saved)
    return [n.name for n in graph.nodes if n in found and n.name in saved and not is_backward(n)]


def _needed(graph: JointGraph, saved: Collection[str] = ()) -> set[fx.Node]:
    """What the backward reads, and what makes that again of what is saved."""
    gradients = output_values(graph.module)[graph.num_forward_outputs :]
    found = {node for node in gradients if isinstance(node, fx.Node)}
    for node in reversed(list(graph.nodes)):
        if is_backward(node) or (node in found and node.name not in saved):
            found.update(node.all_input_nodes)
    return found


@dataclass(frozen=True)
class Held:
    """What Inductor's code of a step holds between its halves: inputs and what is saved, in bytes.

    heavy: seconds for what it makes again with functions such as ``exp``, each as if on its own: within a
    kernel they take about what it takes to read and write as many elements.
    """

    nbytes: int
    heavy: float


def held(graph: JointGraph, *, saves_least: bool = False) -> Held:
    """Of a step as it was captured."""
    return _held(*_cut(taken_apart(graph), saves_least))


def _held(graph: JointGraph, saved: Collection[str]) -> Held:
    given = graph.placeholders(Role.PARAMETER, Role.BUFFER, Role.INPUT)
    nbytes = _bytes_of(graph, {n.name for n in given} | {*saved})
    return Held(nbytes, _heavy(graph, saved))


def _bytes_of(graph: JointGraph, names: Collection[str]) -> int:
    """Bytes of the storages of these values."""
    found: dict[int, Size] = {}
    for node in graph.nodes:
        if node.name in names:
            found |= storages_in(node.meta.get("val"))
    bindings = graph.bindings()
    return sum(int(evaluate(nbytes, bindings)) for nbytes in found.values())


def taken_apart(graph: JointGraph) -> JointGraph:
    """In the operators that were captured, which is quick, but for those of which only parts may be made
    again.
    """
    if any(operator_name(n).endswith(_WHOLE) for n in graph.nodes if n.op == "call_function"):
        return replace(graph, module=_torch_inductor.decomposed(graph.module, fusible))
    return graph


def _heavy(graph: JointGraph, saved: Collection[str]) -> float:
    """Seconds for what kernels make again that takes a CPU more than arithmetic."""
    made = (
        node
        for node in _needed(graph, saved)
        if node.op == "call_function" and node.name not in saved and not is_backward(node)
    )
    return sum(CPU.seconds(n) for n in made if operator_name(n) in _HEAVY and _device(n) == "cpu")


_HEAVY = frozenset(
    (
        *("exp", "exp2", "expm1", "log", "log10", "log1p", "log2", "pow", "erf", "erfc", "erfinv"),
        *("sin", "cos", "tan", "asin", "acos", "atan", "sinh", "cosh", "tanh", "asinh", "acosh"),
        *("atanh", "sigmoid", "silu", "gelu", "elu", "celu", "mish", "softplus", "logit"),
        *("_softmax", "_log_softmax", "log_sigmoid_forward", "lgamma", "digamma"),
    )
)
"""Functions that take a processor several times as long as reading what was saved."""


_WHOLE = ("batch_norm", "batch_norm_legit_functional", "group_norm")
"""Operators that the cut never makes again, though it does all that they are made of."""


def _static(module: fx.GraphModule, graph: JointGraph) -> list[int]:
    """Places of the parameters and buffers, which lie where they are."""
    given = module.graph.find_nodes(op="placeholder")
    known = {n.name for n in graph.placeholders(Role.PARAMETER, Role.BUFFER)}
    return [place for place, node in enumerate(given) if node.name in known]


def _copy(module: fx.GraphModule) -> fx.GraphModule:
    """A module whose graph may be changed."""
    graph, copies = fx.Graph(), dict[fx.Node, fx.Node]()
    graph.output(graph.graph_copy(module.graph, copies))
    for node, other in zip(module.graph.nodes, graph.nodes, strict=True):
        other.meta = dict(node.meta)
    return _torch.graph_module(module, graph)
