"""Capture: a model and example inputs become the joint graph of one training step.

Dynamo traces the Python, AOTAutograd the autograd, both on fake tensors: nothing is computed and
no activation is allocated.  Dynamo's guards say later whether a call is still the captured one.
"""

from __future__ import annotations

import contextlib
import re
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import sympy
import torch
from torch import fx, nn
from torch._dynamo.exc import TorchDynamoException
from torch.utils import _pytree as pytree

from fxmem import _torch
from fxmem._torch import transformers as _transformers
from fxmem._torch.eager import compiling, eager_decompositions
from fxmem._torch.written_inputs import written_by_code
from fxmem.basics.errors import CaptureError, FxmemError
from fxmem.basics.sizes import stand_for, storages_in, tensors_in
from fxmem.graphs.emit import boxed
from fxmem.graphs.fakes import fake_like, refresh, views_below
from fxmem.graphs.graph import (
    Input,
    JointGraph,
    OutputKind,
    Role,
    Symbol,
    is_backward,
    operator_name,
    output_values,
    source_line,
)
from fxmem.graphs.operators import draws_within
from fxmem.graphs.regions import without_regions


def training_step(
    model: nn.Module,
    loss_fn: Callable[..., Any] | None,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    loss_inputs: tuple[Any, ...],
) -> Any:
    """What is captured.  The parameters' names are part of the guards, so they stay."""
    outputs = model(*args, **kwargs)
    return outputs if loss_fn is None else loss_fn(outputs, *loss_inputs)


@dataclass(frozen=True)
class StepCall:
    """One call of the training step."""

    model: nn.Module
    args: tuple[Any, ...] = ()
    kwargs: dict[str, Any] = field(default_factory=dict)
    loss_fn: Callable[..., Any] | None = None
    loss_inputs: tuple[Any, ...] = ()
    name: str = ""

    def values(self) -> tuple[Any, ...]:
        return (self.model, self.loss_fn, self.args, self.kwargs, self.loss_inputs)

    @property
    def title(self) -> str:
        """What the user calls the model."""
        return self.name or type(self.model).__name__

    def locals(self) -> dict[str, Any]:
        names = ("model", "loss_fn", "args", "kwargs", "loss_inputs")
        return dict(zip(names, self.values(), strict=True))


@dataclass
class Capture:
    """A captured step.  ``compile`` works only while the capture's context is open.

    examples: what was captured with, by placeholder.
    """

    graph: JointGraph
    matches: Callable[[dict[str, Any]], bool]
    examples: dict[str, Any]
    _output: Any
    _exported: Any

    def compile(
        self,
        forward: fx.GraphModule,
        backward: fx.GraphModule,
        run_backward: _torch.BoxedCallable,
        run_forward: _torch.BoxedCallable | None = None,
    ) -> Callable[..., Any]:
        """The step again, called as ``step(model, loss_fn, args, kwargs, loss_inputs)``.

        run_forward: code of the forward, where it does not run operator by operator.
        """

        compiled = _torch.joint_compile(
            self._exported,
            forward,
            backward,
            run_forward or boxed(forward),
            run_backward,
            self.graph.written_inputs(),
        )
        return _torch.dynamo_callable(self._output, training_step, compiled)


@contextlib.contextmanager
def capture(
    call: StepCall, names: dict[str, dict[int, str]] | None = None, guarded: bool = True
) -> Iterator[Capture]:
    """Capture one training step; nothing is run.

    names: input -> {dimension: symbol}, for the dimensions that were marked as dynamic.  guarded:
    with a ``matches`` that tells other calls apart; without, a marked dimension may turn out fixed.
    Raises ``CaptureError`` with the user's line and a way out.
    """
    with compiling():
        as_called = _torch.dispatch_state()
        try:
            with _torch.quick_tracing():
                output = _captured(call)
        except FxmemError:
            raise
        except Exception as error:
            raise _capture_error(error, call.model) from error
        if output.backend_input is None:
            raise CaptureError(
                "the step computes no tensor, so there is nothing to capture.\n"
                "  try: pass a model whose forward uses its parameters on the inputs"
            )
        output.backend_input.graph_module = without_regions(output.backend_input.graph_module)
        roles = _roles(output, call.model)
        with contextlib.ExitStack() as stack:
            try:
                with eager_decompositions(), _torch.quick_tracing():
                    exported = stack.enter_context(_torch.joint_export(output))
                graph = joint_graph(exported.graph_module, roles, names or {})
                written = written_by_code(exported, len(graph.leaves()))
                graph.module.meta["fxmem_written"] = written
                without_sizes_of_bases(graph)
                matches = (
                    _torch.dynamo_guards(
                        output, training_step, as_called, _transformers.ASKED, call.model
                    )
                    if guarded
                    else lambda _: True
                )
            except FxmemError:
                raise
            except Exception as error:
                raise _capture_error(error, call.model) from error
            examples = examples_of(graph, output.backend_input.example_inputs)
            yield Capture(graph, matches, examples, output, exported)


def _captured(call: StepCall) -> Any:
    with _transformers.one_sequence_a_row() as told:
        output = _torch.dynamo_capture(training_step, call.values())
    if not told or output.backend_input is None:
        return output
    if _transformers.are_right(output.backend_input.graph_module):
        return output
    return _torch.dynamo_capture(training_step, call.values())


# -- From the traced graph to ours ----------------------------------------------------------------


def _roles(output: Any, model: nn.Module) -> list[Input]:
    """One ``Input`` for each placeholder of the captured forward, by identity of the tensors."""
    parameters = {id(p): name for name, p in model.named_parameters()}
    buffers = {id(b): name for name, b in model.named_buffers()}
    roles = []
    placeholders = output.backend_input.graph_module.graph.find_nodes(op="placeholder")
    for node, value in zip(placeholders, output.backend_input.example_inputs, strict=True):
        leaf = isinstance(value, torch.Tensor) and value.requires_grad and value.is_leaf
        if id(value) in parameters:
            roles.append(Input(Role.PARAMETER, parameters[id(value)], leaf))
        elif id(value) in buffers:
            roles.append(Input(Role.BUFFER, buffers[id(value)], leaf))
        else:
            roles.append(Input(Role.INPUT, _torch.dynamo_source_name(node), leaf))
    return roles


_OUTPUT_KINDS = {
    "InputMutationAOTOutput": OutputKind.MUTATION,
    "ForwardTokenAOTOutput": OutputKind.MUTATION,  # and dropped likewise when the forward ends
    "BackwardTokenAOTOutput": OutputKind.TOKEN,
    "GradAOTOutput": OutputKind.GRADIENT,
    "NoneType": OutputKind.GRADIENT,  # the empty place of an input that gets no gradient
}

_OF_BACKWARD = (OutputKind.GRADIENT, OutputKind.TOKEN)


def _kinds(module: fx.GraphModule) -> tuple[OutputKind, ...]:
    """What AOTAutograd says of each output of its joint graph."""
    descriptions = module.graph.output_node().meta["desc"]
    return tuple(_OUTPUT_KINDS.get(type(d).__name__, OutputKind.RESULT) for d in descriptions)


def joint_graph(
    module: fx.GraphModule, roles: list[Input], names: dict[str, dict[int, str]]
) -> JointGraph:
    """AOTAutograd's graph of a step with what its placeholders and outputs are; it is changed for that.

    roles: one for each input of the graph that was differentiated.
    """
    _refuse_subclasses(module, roles)
    _refuse_unknown_sizes(module)
    _tag_own_backwards(module)
    tag_backward(module)
    _refuse_other_draws(module)
    _own_tangents(module)
    descriptions = module.graph.output_node().meta["desc"]
    kinds = _without_regenerated(module, _kinds(module))
    num_forward = sum(1 for kind in kinds if kind not in _OF_BACKWARD)
    inputs = {n.name: _input(n, roles) for n in module.graph.find_nodes(op="placeholder")}
    module.meta["fxmem_mutated"] = _mutated(module, descriptions)
    graph = JointGraph(module, num_forward, inputs, kinds)
    graph.symbols.update(_symbols(graph, names))
    return graph.verified()


def _refuse_subclasses(module: fx.GraphModule, roles: list[Input]) -> None:
    """Tensors made of others, such as DTensor's, come apart, and gradients no longer pair with inputs."""
    nodes = module.graph.find_nodes(op="placeholder")
    outputs = module.graph.output_node().meta.get("desc", ())
    for description in (*(n.meta.get("desc") for n in nodes), *outputs):
        if not type(description).__name__.startswith("Subclass"):
            continue
        while hasattr(description, "base"):
            description = description.base
        place = getattr(description, "idx", None)
        whose = roles[place].name if isinstance(place, int) and place < len(roles) else "a result"
        raise CaptureError(
            f"{whose} is a tensor made of other tensors, as DTensor's of tensor parallelism are, and the "
            "bytes of such parts are not planned yet.\n"
            "  try     plain tensors where the plan should be: fully_shard or DistributedDataParallel with "
            'torch.compile(block, backend="fxmem") on blocks that are not parallelized themselves, and '
            "read no parallelized one's result before another operator has (x + parallel(x)); or "
            'backend="inductor" for the model as it is'
        )


def _refuse_unknown_sizes(module: fx.GraphModule) -> None:
    """Bytes can be planned only where sizes follow from the shapes of the inputs."""
    for node in module.graph.nodes:
        for leaf in pytree.tree_leaves(node.meta.get("val")):
            sizes = leaf.shape if isinstance(leaf, torch.Tensor) else (leaf,)
            if any(isinstance(s, torch.SymInt) and s.node.hint is None for s in sizes):
                raise CaptureError(
                    "the step makes tensors whose sizes depend on data, so their bytes cannot be "
                    f"planned.\n  at      {source_line(node) or operator_name(node)}\n"
                    "  try     torch.where or a mask in place of selecting elements, or optimize "
                    "the submodules around it one by one"
                )


def _refuse_other_draws(module: fx.GraphModule) -> None:
    """``cond`` and ``map`` run their code once more for its gradient, which draws other numbers there."""
    for node in module.graph.nodes:
        if is_backward(node) and draws_within(node):
            name = operator_name(node)
            raise CaptureError(
                f"torch's {name} runs its code a second time in the backward, and what is random in there "
                "draws other numbers then: the gradients are not those of what was computed, without fxmem "
                f"either.\n  at      {source_line(node) or name}\n"
                f"  try     drawing before {name}, as a mask that is passed into it"
            )


def _without_regenerated(
    module: fx.GraphModule, kinds: tuple[OutputKind, ...]
) -> tuple[OutputKind, ...]:
    """A returned view of an input that the step changes is made again from that input.

    What the graph returns in its place is dropped when the forward ends, as the update is.
    """
    outputs = list(zip(output_values(module), kinds, strict=True))
    updated = {
        key
        for node, kind in outputs
        if kind is OutputKind.MUTATION and isinstance(node, fx.Node)
        for key in storages_in(node.meta.get("val"))
    }
    return tuple(
        OutputKind.MUTATION
        if kind is OutputKind.RESULT
        and isinstance(node, fx.Node)
        and updated.intersection(storages_in(node.meta.get("val")))
        else kind
        for node, kind in outputs
    )


def tag_backward(module: fx.GraphModule) -> None:
    """Whatever depends on a tangent runs in the backward."""
    for node in module.graph.nodes:
        if node.op == "call_function" and any(map(is_backward, node.all_input_nodes)):
            node.meta["partitioner_tag"] = "is_backward"


def _tag_own_backwards(module: fx.GraphModule) -> None:
    """Autograd's tags miss the body of a user's own backward function, which may draw before it reads a
    tangent.  It is traced after all of the forward; so are views of what was written over, but those are
    returned.
    """
    nodes = list(module.graph.nodes)
    tags = [node.meta.get("partitioner_tag") for node in nodes]
    if "is_forward" not in tags:
        return
    last = max(place for place, tag in enumerate(tags) if tag == "is_forward")
    returned = _returned_by_forward(module)
    for node, tag in zip(nodes[last + 1 :], tags[last + 1 :], strict=True):
        if node.op == "call_function" and tag is None and node not in returned:
            node.meta["partitioner_tag"] = "is_backward"


def _returned_by_forward(module: fx.GraphModule) -> set[fx.Node]:
    """What the forward returns, and what that is made of."""
    outputs = zip(output_values(module), _kinds(module), strict=True)
    found = {n for n, kind in outputs if isinstance(n, fx.Node) and kind not in _OF_BACKWARD}
    for node in reversed(module.graph.nodes):
        if node in found:
            found.update(node.all_input_nodes)
    return found


def _own_tangents(module: fx.GraphModule) -> None:
    """Tangents come from the caller, though their example values alias the outputs'."""
    for node in module.graph.find_nodes(op="placeholder"):
        if is_backward(node) and isinstance(node.meta.get("val"), torch.Tensor):
            views = views_below(node)
            node.meta["val"] = fake_like(node.meta["val"])
            refresh(views)


def _input(node: fx.Node, roles: list[Input]) -> Input:
    description = node.meta.get("desc")
    index = getattr(description, "idx", None)
    if type(description).__name__ == "PlainAOTInput" and index is not None:
        return roles[index]
    if type(description).__name__ in ("ForwardTokenAOTInput", "BackwardTokenAOTInput"):
        return Input(Role.TOKEN, "token")
    if is_backward(node):
        return Input(Role.TANGENT, node.name)
    return Input(Role.INPUT, node.name)


def examples_of(graph: JointGraph, values: Sequence[Any]) -> dict[str, Any]:
    """What the graph that was differentiated was given, by placeholder of the joint graph."""
    found = {}
    for node in graph.placeholders():
        description = node.meta.get("desc")
        index = getattr(description, "idx", None)
        if type(description).__name__ == "PlainAOTInput" and index is not None:
            found[node.name] = values[index]
    return found


def _mutated(module: fx.GraphModule, descriptions: Any) -> tuple[str, ...]:
    mutated = {
        repr(d.mutated_input) for d in descriptions if type(d).__name__ == "InputMutationAOTOutput"
    }
    placeholders = module.graph.find_nodes(op="placeholder")
    return tuple(n.name for n in placeholders if repr(n.meta.get("desc")) in mutated)


def _symbols(graph: JointGraph, names: dict[str, dict[int, str]]) -> dict[Any, Symbol]:
    """Each free shape symbol, named by the first input dimension that carries it."""
    symbols: dict[Any, Symbol] = {}
    for node in graph.placeholders(Role.INPUT, Role.BUFFER, Role.PARAMETER):
        where = graph.inputs[node.name].name
        for tensor in tensors_in(node.meta.get("val")):
            for dim, size in enumerate(tensor.shape):
                if not isinstance(size, torch.SymInt) or not size.node.expr.is_Symbol:
                    continue
                given = names.get(where, {}).get(dim)
                symbols.setdefault(
                    size.node.expr,
                    Symbol(
                        given or f"{where}.shape[{dim}]", int(size.node.hint), f"{where}, {dim}"
                    ),
                )
    return symbols


def without_sizes_of_bases(graph: JointGraph) -> None:
    """An input may be a view whose base or steps have symbols of their own, as ``ids[:, :-1]``.

    No size with a name tells those.  In bytes and steps, such a symbol stands for the size that is as large
    in the example, the batch of both, say; or else for a number.
    """
    placeholders = graph.placeholders(Role.INPUT, Role.BUFFER, Role.PARAMETER)
    known = graph.bindings()
    alike = {size: symbol for symbol, size in reversed(known.items())}
    for tensor in tensors_in([node.meta.get("val") for node in placeholders]):
        for value in (tensor.untyped_storage().nbytes(), *tensor.stride()):
            if isinstance(value, torch.SymInt):
                env = value.node.shape_env
                others = value.node.expr.free_symbols - known.keys()
                sizes = {symbol: _torch.symbol_hint(env, symbol) for symbol in others}
                stand_for(env, {s: alike.get(n, sympy.Integer(n)) for s, n in sizes.items()})


# -- Errors in the user's words ---------------------------------------------------------------------


_USER_FRAME = re.compile(
    r'File "(?P<file>[^"]+)", line (?P<line>\d+), in (?P<function>\S+)\n\s+(?P<code>.+)'
)
_GOT = re.compile(r"""got \w+\((?P<quote>["'])(?P<said>.+?)(?P=quote)\)""")
_RAISED = re.compile(  # by the traced code; before torch 2.13 with what Dynamo made of the words
    r"raised exception (?P<kind>\w+)\((?:\[ConstantVariable\(str: )?"
    r"(?P<quote>[\"'])(?P<said>.+?)(?P=quote)\)"
)
_OWN_FILES = ("/fxmem/", "/torch/", "<frozen", "<string>", "<eval_with_key>")


def _capture_error(error: Exception, model: nn.Module) -> CaptureError:
    reason = f"{type(error).__name__}: {_first_lines(str(error)) or type(error).__name__}"
    if raised := _RAISED.search(str(error)):
        reason = f"{raised['kind']}: {raised['said']}"
    where = _user_line(error) or _forward_line(model)
    return CaptureError(
        f"the training step could not be captured as one graph.\n"
        f"  reason  {reason}\n"
        f"  at      {where or 'unknown line'}\n"
        f"  try     {_way_out(error)}",
        reason=reason,
        place=where,
    )


def _first_lines(text: str) -> str:
    inner = _GOT.search(text)
    if inner:  # what the operator said, in Dynamo's long sentence about it
        return inner["said"]
    lines = [line.strip() for line in text.split("from user code", 1)[0].splitlines()]
    return " ".join(line for line in lines if line)[:400]


def _user_line(error: Exception) -> str:
    """The innermost line of the user's code: from Dynamo's message, else from the traceback."""
    text = str(error)
    if stack := getattr(error, "real_stack", None):  # Dynamo's, of the user's code
        text = "".join(traceback.format_list(stack))
    elif "from user code" in text:
        text = text.split("from user code", 1)[1]
    else:
        text = "".join(traceback.format_exception(error))
    frames = [m for m in _USER_FRAME.finditer(text) if not _is_own(m["file"])]
    if not frames:
        return ""
    last = frames[-1]
    return f"{last['file']}:{last['line']} in {last['function']}: {last['code'].strip()}"


def _forward_line(model: nn.Module) -> str:
    """Where the model's forward stands: for an error that has no line of its own."""
    code = getattr(type(model).forward, "__code__", None)
    if code is None:
        return ""
    return f"{code.co_filename}:{code.co_firstlineno} in {type(model).__name__}.forward"


def _is_own(file: str) -> bool:
    return any(part in file for part in _OWN_FILES)


def _way_out(error: Exception) -> str:
    name, text = type(error).__name__, str(error).lower()
    if "saved_tensors_hooks" in text or "save_on_cpu" in text:
        return (
            "enter the hooks around the call of the optimized module, where they see what a plan saves; or "
            'torch.compile(model, backend="fxmem"), which leaves the part inside them as it is'
        )
    if "backwards hooks require" in text:
        return (
            "take the module's backward hook off, or hook its parameters instead (register_hook); or "
            'torch.compile(model, backend="fxmem"), which leaves the module with the hook as it is'
        )
    if "data-dependent" in text or "datadependent" in name.lower() or ".item()" in text:
        return (
            "replace Python control flow on tensor values with torch.where or torch.cond, "
            "or optimize the submodules around it one by one"
        )
    if _RAISED.search(str(error)):
        return "run the model once without fxmem on the same inputs: its own code raises this"
    if name == "TorchRuntimeError":
        return (
            "run the model once without fxmem on the same inputs: the operator itself refuses them"
        )
    if isinstance(error, TorchDynamoException):
        return (
            "torch.compile(model, fullgraph=True) must accept the step; move the reported call out "
            "of forward, or optimize the submodules around it one by one"
        )
    return "run the model once without fxmem on the same inputs; if that works, report this message"
