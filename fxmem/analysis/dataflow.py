"""The joint graph as plain numbers: operators, the storages they read and make, bytes and seconds.

Views and tuple accesses vanish here; what is left is what the planner may move.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Container
from dataclasses import dataclass, field, replace
from typing import Any

import sympy
from torch import fx

from fxmem.analysis.cost import Cost
from fxmem.analysis.overwriting import overwritable
from fxmem.basics.sizes import evaluate, storages_in
from fxmem.graphs.graph import (
    JointGraph,
    OutputKind,
    Role,
    bytes_of_loss,
    is_backward,
    is_held_tangent,
    is_view,
)
from fxmem.graphs.operators import rng_state_nbytes, second_call_outputs
from fxmem.graphs.workspace import Workspaces

INSTEAD_OF = "fxmem_instead_of"
"""Node metadata: the name of the node of the step without codes that this one stands for; "" for none."""

NOISE = "fxmem_noise"
"""Node metadata of a lossy code: the noise that it adds if it is kept, in ``NOISE_CEILING``-ths."""

NOISE_CEILING = 10**9
"""The noise that the kept codes of a plan may add up to.  Whole numbers: sums do not drift."""


@dataclass
class Value:
    """One storage.

    producer: index of the operator that makes it, or -1 for a resident or a tangent.
    result: the caller holds it to the end.  update: copied into an input when the forward ends.
    held: a tangent that the autograd engine keeps to the end.  storage: its key in the graph.
    code: what readers that could read its producer's operand read in its place, if it is kept; it takes
    no time to make it again, for they can do without.  keeping: seconds that the step takes longer then.
    noise: of a lossy code, what it takes of ``NOISE_CEILING`` if it is kept: one at least.  If not, it
    is never held between two readers, for both read what it is made of.
    """

    nbytes: int
    node: fx.Node
    producer: int = -1
    resident: bool = False
    tangent: bool = False
    held: bool = False
    result: bool = False
    update: bool = False
    gradient: bool = False
    storage: int = -1
    code: bool = False
    keeping: float = 0.0
    noise: int = 0


@dataclass
class Operator:
    """One operator: indices of the values that it reads and makes, in the graph's order.

    remakes: what a second run makes, which may leave out what only the first one returns.
    rng_state: bytes of generator state to keep if the operator is to run again; 0 if not random.
    writes_over: of these forward values, the first that nobody reads again gives its bytes to the
    result of a forward operator.  decodes: does it make again, of a code, what the code is made of?
    overwrites: does it write over what was decoded?
    """

    node: fx.Node
    backward: bool
    reads: tuple[int, ...]
    makes: tuple[int, ...]
    workspace: int
    seconds: float
    recomputable: bool = False
    rng_state: int = 0
    remakes: tuple[int, ...] = ()
    writes_over: tuple[int, ...] = ()
    decodes: bool = False
    overwrites: bool = False


@dataclass
class Dataflow:
    """Operators in graph order, forward ones first, and the values between them.

    waiting: seconds of the unchanged step beside what its operators take.
    loss_outside: bytes that the caller's loss holds beside the gradients that it sends into the step.
    """

    operators: list[Operator] = field(default_factory=list)
    values: list[Value] = field(default_factory=list)
    num_forward: int = 0
    waiting: float = 0.0
    loss_outside: int = 0

    @property
    def resident(self) -> int:
        return sum(v.nbytes for v in self.values if v.resident)

    @property
    def seconds(self) -> float:
        """Seconds of the unchanged step."""
        return sum(op.seconds for op in self.operators) + self.waiting


def dataflow(
    graph: JointGraph,
    workspaces: Workspaces,
    cost: Cost,
    recomputable: set[fx.Node],
    bindings: dict[sympy.Symbol, int] | None = None,
) -> Dataflow:
    """Numbers for one joint graph at given sizes (the example's, if none are given)."""
    sizes = graph.bindings() if bindings is None else bindings
    flow = Dataflow()
    index: dict[int, int] = {}

    def value_of(key: int, nbytes: object, node: fx.Node) -> int:
        if key not in index:
            index[key] = len(flow.values)
            flow.values.append(Value(evaluate(nbytes, sizes), node, storage=key))
        return index[key]

    def values_of(node: fx.Node) -> list[int]:
        return [value_of(k, n, node) for k, n in storages_in(node.meta.get("val")).items()]

    for node in graph.nodes:
        if is_backward(node) and node.op == "placeholder" and not node.users:
            continue  # an undefined tangent: nobody sends it
        if node.op in ("placeholder", "get_attr"):
            for v in values_of(node):
                flow.values[v].tangent = is_backward(node)
                flow.values[v].held = is_held_tangent(node)
                flow.values[v].resident = not is_backward(node)
            if is_backward(node):
                flow.loss_outside += evaluate(bytes_of_loss(node), sizes)
        elif node.op == "call_function":
            _add_operator(flow, node, values_of, workspaces, cost, node in recomputable, sizes)
            flow.waiting += cost.waiting(node)
    if not any(op.backward for op in flow.operators):
        flow.operators.append(_return(graph, values_of))
    flow.operators.sort(key=lambda op: op.backward)  # stable: keeps the graph's order in each phase
    flow.num_forward = sum(not op.backward for op in flow.operators)
    for i, op in enumerate(flow.operators):
        for v in op.makes:
            flow.values[v].producer = i
    written = overwritable(graph, backward=False)
    for op in flow.operators:
        operands = written.get(op.node, ())
        op.writes_over = tuple(dict.fromkeys(v for node in operands for v in values_of(node)))
    for output, kind in zip(graph.outputs(), graph.output_kinds, strict=True):
        for v in values_of(output) if isinstance(output, fx.Node) else ():
            flow.values[v].result |= kind is OutputKind.RESULT
            flow.values[v].update |= kind is OutputKind.MUTATION
            flow.values[v].gradient |= kind is OutputKind.GRADIENT
    return flow


def with_codes(flow: Dataflow, plain: Dataflow, cost: Cost, encoders: Container[Any]) -> Dataflow:
    """``flow`` priced as ``plain``, the same step without codes; what they cost is for keeping them.

    A code that is not kept is none: what would read it reads what it is made of.
    """
    instead_of = {op.node.name: op for op in plain.operators}
    operators, values = list(flow.operators), list(flow.values)
    keeping: dict[int, float] = {}
    waiting = flow.waiting
    for i, op in enumerate(flow.operators):
        encodes = op.node.target in encoders and not op.backward
        if not encodes and INSTEAD_OF not in op.node.meta:
            continue
        other = instead_of.get(op.node.meta.get(INSTEAD_OF, ""))
        seconds = 0.0 if other is None else other.seconds
        waits = cost.waiting(op.node) - (0.0 if other is None else cost.waiting(other.node))
        for v in op.makes if encodes else keeping.keys() & op.reads:
            keeping[v] = keeping.get(v, 0.0) + op.seconds - seconds + waits
        waiting -= waits
        operators[i] = replace(op, seconds=seconds, decodes=op.backward and other is None)
    for v, more in keeping.items():
        noise = values[v].node.meta.get(NOISE, 0)
        values[v] = replace(values[v], code=True, keeping=max(more, 0.0), noise=noise)
    _read_by_overwriters(operators, values)
    return replace(flow, operators=operators, values=values, waiting=waiting)


def _read_by_overwriters(operators: list[Operator], values: list[Value]) -> None:
    """What writes over a decoded value reads the code, too: if that is not kept, nothing is decoded.

    The operator then reads what the code is made of, which is saved or made again, and may not be written
    over.
    """
    codes: dict[int, int] = {}
    for i, op in enumerate(operators):
        lossy = [v for v in op.reads if values[v].noise]
        if op.decodes and lossy:
            codes |= {values[v].storage: lossy[0] for v in op.makes}
        elif op.backward and not op.makes:
            written = [k for k in storages_in(op.node.meta.get("val")) if k in codes]
            if written:
                code = codes.pop(written[0])  # what writes there next writes over no decoded value
                operators[i] = replace(op, reads=tuple(sorted({code, *op.reads})), overwrites=True)


def _add_operator(
    flow: Dataflow,
    node: fx.Node,
    values_of: Callable[[fx.Node], list[int]],
    workspaces: Workspaces,
    cost: Cost,
    recomputable: bool,
    sizes: dict[sympy.Symbol, int],
) -> None:
    known = len(flow.values)
    touched = values_of(node)
    makes = tuple(v for v in touched if v >= known)
    if not makes and (is_view(node) or not touched):
        _name_tuple_element(flow, node, touched)
        return
    reads = {v for source in node.all_input_nodes for v in values_of(source)}
    flow.operators.append(
        Operator(
            node,
            is_backward(node),
            tuple(sorted(reads)),
            makes,
            evaluate(workspaces.nbytes(node), sizes),
            cost.seconds(node),
            recomputable,
            rng_state_nbytes(node),
            makes[: second_call_outputs(node)],
        )
    )


def _return(graph: JointGraph, values_of: Callable[[fx.Node], list[int]]) -> Operator:
    """The one step of a backward that only hands on what it is given."""
    output = graph.module.graph.output_node()
    given = {v for n in graph.placeholders(Role.TANGENT) if n.users for v in values_of(n)}
    return Operator(output, True, tuple(sorted(given)), (), workspace=0, seconds=0.0)


def _name_tuple_element(flow: Dataflow, node: fx.Node, touched: list[int]) -> None:
    """A result of a multi-output operator is known by the node that takes it out of the tuple."""
    if node.target is operator.getitem and len(touched) == 1:
        value = flow.values[touched[0]]
        if value.node is node.args[0]:
            value.node = node
