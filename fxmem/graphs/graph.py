"""The joint graph: forward and backward of one step in one FX graph, with roles and origins."""

from __future__ import annotations

import enum
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import sympy
import torch
from torch import fx

from fxmem import _torch
from fxmem.basics.errors import VerificationError
from fxmem.basics.sizes import in_blocks, storage_keys, storages_in


class Role(enum.Enum):
    """What a placeholder of the joint graph stands for."""

    PARAMETER = "parameter"
    BUFFER = "buffer"
    INPUT = "input"
    TOKEN = "token"  # of no bytes: what keeps calls that have an effect in their order
    TANGENT = "tangent"


class OutputKind(enum.Enum):
    """What the caller does with an output of the joint graph."""

    RESULT = "result"  # the user holds it until the end of the step
    MUTATION = "mutation"  # copied into an input when the forward ends, then freed
    GRADIENT = "gradient"  # accumulated into ``.grad``, held until the end of the step
    TOKEN = "token"  # of no bytes: says that what has an effect in the backward ran


@dataclass(frozen=True)
class Input:
    """A placeholder: its role, and the name under which the user knows it.

    keeps_gradient: a leaf, whose gradient autograd keeps in ``.grad``.
    """

    role: Role
    name: str
    keeps_gradient: bool = False


@dataclass
class JointGraph:
    """One training step.

    module: the FX graph; forward nodes, then backward nodes, then one flat output tuple.
    num_forward_outputs: how many of the outputs the forward returns; the rest are gradients.
    inputs: placeholder name -> what it is.
    output_kinds: one per output, in order.
    symbols: shape symbol -> the user's name for it and its value in the example.
    """

    module: fx.GraphModule
    num_forward_outputs: int
    inputs: dict[str, Input]
    output_kinds: tuple[OutputKind, ...]
    symbols: dict[sympy.Symbol, Symbol] = field(default_factory=dict)

    @property
    def nodes(self) -> list[fx.Node]:
        return list(self.module.graph.nodes)

    def node(self, name: str) -> fx.Node:
        """The node of that name.  Raises ``KeyError``."""
        for node in self.module.graph.nodes:
            if node.name == name:
                return node
        raise KeyError(name)

    def placeholders(self, *roles: Role) -> Iterator[fx.Node]:
        for node in self.module.graph.find_nodes(op="placeholder"):
            if not roles or self.inputs[node.name].role in roles:
                yield node

    def outputs(self) -> list[Any]:
        """The flat outputs; an entry is a node, or None where an input gets no gradient."""
        return output_values(self.module)

    def forward_outputs(self) -> list[Any]:
        return self.outputs()[: self.num_forward_outputs]

    def backward_outputs(self) -> list[Any]:
        return self.outputs()[self.num_forward_outputs :]

    def leaves(self) -> list[fx.Node]:
        """The placeholders that ``gradients`` are of."""
        return list(self.placeholders(Role.PARAMETER, Role.BUFFER, Role.INPUT))

    def gradients(self) -> list[Any]:
        """One for each of the leaves; None where it gets none."""
        return self.backward_outputs()[: len(self.leaves())]

    def mutated_inputs(self) -> set[fx.Node]:
        """Placeholders whose value changes when the forward ends: not to be read in the backward."""
        return {self.node(n) for n in self.module.meta.get("fxmem_mutated", ())}

    def written_inputs(self) -> Mapping[int, int]:
        """Places of outputs that code of the forward is to write, and of the inputs that they go over."""
        written: Mapping[int, int] = self.module.meta.get("fxmem_written", {})
        return written

    def bindings(self) -> dict[sympy.Symbol, int]:
        """The symbols' values in the example inputs."""
        return {symbol: info.hint for symbol, info in self.symbols.items()}

    def copy(self) -> JointGraph:
        """A graph that may be changed; the nodes' example values are shared with this one."""
        graph = fx.Graph()
        graph.output(graph.graph_copy(self.module.graph, {}))
        copied = graph.output_node()
        original = self.module.graph.output_node()
        copied.meta = dict(original.meta)
        for mine, theirs in zip(self.module.graph.nodes, graph.nodes, strict=True):
            theirs.meta = dict(mine.meta)
            if mine.name != theirs.name:
                raise VerificationError(f"copying renamed {mine.name} to {theirs.name}")
        module = _torch.graph_module(self.module, graph)
        module.meta = dict(self.module.meta)
        return JointGraph(
            module, self.num_forward_outputs, self.inputs, self.output_kinds, self.symbols
        )

    def verified(self) -> JointGraph:
        """This graph, after checking that it is well formed.  Raises ``VerificationError``."""
        try:
            self.module.graph.lint()
        except RuntimeError as error:
            raise VerificationError(f"malformed graph: {error}") from error
        if len(self.outputs()) != len(self.output_kinds):
            raise VerificationError(
                f"the graph returns {len(self.outputs())} values, expected {len(self.output_kinds)}"
            )
        self._check_phases()
        return self

    def _check_phases(self) -> None:
        """No forward node may read what only the backward computes."""
        for node in self.module.graph.nodes:
            if node.op == "output" or is_backward(node):
                continue
            late = [i.name for i in node.all_input_nodes if is_backward(i)]
            if late:
                raise VerificationError(f"forward node {node.name} reads backward nodes {late}")

    def __str__(self) -> str:
        return "\n".join(line for node in self.module.graph.nodes if (line := node_line(node)))


@dataclass(frozen=True)
class Symbol:
    """A shape symbol: the user's name for it, its value in the example, and where it comes from."""

    name: str
    hint: int
    source: str


def output_values(module: fx.GraphModule) -> list[Any]:
    """What a graph returns, as a flat list."""
    values: Any = module.graph.output_node().args[0]
    return list(values)


# -- Questions about one node ---------------------------------------------------------------------


def has_effect(node: fx.Node) -> bool:
    """Must the node stay, even if nobody reads it?  A second run repeats no effect."""
    second = is_backward(node) and "fxmem_origin" in node.meta
    return node.op in ("placeholder", "output") or (not second and node.is_impure())


def is_backward(node: fx.Node) -> bool:
    """Does the node run in the backward?  Tangents and what autograd traced for them."""
    if node.op == "placeholder":
        return node.name.startswith("tangents")
    return node.meta.get("partitioner_tag") == "is_backward"


def is_held_tangent(node: fx.Node) -> bool:
    """The gradient of a scalar loss: ``backward()`` makes it and holds it until it returns."""
    value = node.meta.get("val")
    return node.op == "placeholder" and is_backward(node) and getattr(value, "ndim", None) == 0


LOSS_OUTSIDE = 2
"""Bytes of a loss that the step does not contain, for each byte of gradient that it sends.

Cross-entropy's: beside the gradient it sends, it holds its logarithms and their gradient.
"""


def bytes_of_scalars(device: torch.device) -> int:
    """Bytes of a loss outside the model, which are there all along: itself, its weight, its gradient."""
    return 4 * int(in_blocks(16, device))


INSTEAD_OF_LOSS = "fxmem_instead_of_loss"
"""Metadata of a tangent: bytes that the caller holds while it makes it, if more graphs do and no loss."""


def bytes_of_loss(tangent: fx.Node) -> Any:
    """Bytes that the caller holds while it makes a tangent, beside those that it sends."""
    if INSTEAD_OF_LOSS in tangent.meta:
        return tangent.meta[INSTEAD_OF_LOSS]
    if is_held_tangent(tangent):
        return 0
    return LOSS_OUTSIDE * sum(storages_in(tangent.meta.get("val")).values(), start=0)


def is_symbolic_scalar(node: fx.Node) -> bool:
    """A node that computes a size, not a tensor: free to keep and to pass on."""
    return isinstance(node.meta.get("val"), (int, float, bool)) or hasattr(
        node.meta.get("val"), "node"
    )


def is_view(node: fx.Node) -> bool:
    """Does the node only give another look at storages that its inputs already hold?"""
    if node.op != "call_function" or is_in_place(node):
        return False
    mine = storage_keys(node.meta.get("val"))
    inputs = (storage_keys(source.meta.get("val")) for source in node.all_input_nodes)
    return bool(mine) and mine.keys() <= {key for keys in inputs for key in keys}


def is_in_place(node: fx.Node) -> bool:
    """Does the node write over one of its operands?  Only nodes of ``InPlacePass`` do."""
    return isinstance(node.target, torch._ops.OpOverload) and node.target._schema.is_mutable


_FRAME = re.compile(r'File "(?P<file>[^"]+)", line (?P<line>\d+), in (?P<function>\S+)')


def source_line(node: fx.Node) -> str:
    """Where the user's code made the node, as ``file.py:12 in forward``; empty if unknown."""
    trace = node.meta.get("stack_trace") or ""
    frames = [f for f in _FRAME.findall(trace) if not f[0].endswith("fxmem/graphs/capture.py")]
    if not frames:
        return ""
    file, line, function = frames[-1]
    return f"{file.rsplit('/', 1)[-1]}:{line} in {function}"


_ROOT = re.compile(r"^[LG]\['\w+'\]")  # how the traced function reaches the model
_MODULE_STEP = re.compile(r"\['([^']+)'\]|\[(\d+)\]|\.(\w+)")


def module_name(node: fx.Node) -> str:
    """The qualified name of the module whose forward made the node; empty at the root."""
    stack = node.meta.get("nn_module_stack") or node.meta.get("fwd_nn_module_stack")
    if not stack:
        return ""
    path = list(stack.values())[-1][0]
    steps = ["".join(step) for step in _MODULE_STEP.findall(_ROOT.sub("", path))]
    return ".".join(step for step in steps if step != "_modules")


def operator_name(node: fx.Node) -> str:
    """The operator's short name: ``addmm``, not ``aten.addmm.default``."""
    target = node.target
    if hasattr(target, "overloadpacket"):
        return str(target.overloadpacket).rsplit(".", 1)[-1]
    return getattr(target, "__name__", str(target)).rsplit(".", 1)[-1]


def node_line(node: fx.Node) -> str:
    """One node as text: ``relu: f32[4, 8] = relu(mm)``; the output as ``return a, b``."""
    if node.op == "output":
        values: Any = node.args[0]
        return "return " + ", ".join(map(str, values))
    if node.op == "placeholder":
        return f"{node.name}: {type_text(node.meta.get('val'))} = input"
    arguments = [_text(a) for a in node.args]
    arguments += [f"{k}={_text(v)}" for k, v in node.kwargs.items()]
    return (
        f"{node.name}: {type_text(node.meta.get('val'))} = "
        f"{operator_name(node)}({', '.join(arguments)})"
    )


_DTYPES = {"float": "f", "bfloat": "bf", "int": "i", "uint": "u", "complex": "c"}


def dtype_text(dtype: Any) -> str:
    name = str(dtype).removeprefix("torch.")
    if name == "bool":
        return "bool"
    match = re.fullmatch(r"([a-z]+)(\d+)", name)
    return f"{_DTYPES.get(match[1], match[1])}{match[2]}" if match else name


def type_text(value: Any) -> str:
    """dtype[shape] of a tensor, a tuple of them for several results."""
    if hasattr(value, "dtype") and hasattr(value, "shape"):
        return f"{dtype_text(value.dtype)}[{', '.join(str(d) for d in value.shape)}]"
    if isinstance(value, (tuple, list)):
        return "(" + ", ".join(type_text(v) for v in value) + ")"
    return type(value).__name__


def _text(argument: Any) -> str:
    if isinstance(argument, (tuple, list)):
        return "[" + ", ".join(_text(a) for a in argument) + "]"
    if hasattr(argument, "overloadpacket"):
        return str(argument.overloadpacket).rsplit(".", 1)[-1]
    return str(argument)
