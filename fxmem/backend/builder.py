"""How a graph of Dynamo's is planned in the middle of AOTAutograd's work on it."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import fx

from fxmem import _torch
from fxmem.backend.program import Program, tell, with_between
from fxmem.basics.sizes import evaluate, storages_in
from fxmem.graphs.capture import (
    StepCall,
    examples_of,
    joint_graph,
    without_sizes_of_bases,
)
from fxmem.graphs.emit import boxed
from fxmem.graphs.graph import INSTEAD_OF_LOSS, JointGraph, Role, Symbol
from fxmem.planning.ledger import Around, Part, part_of
from fxmem.planning.plan import Plan
from fxmem.planning.whole_step import in_step
from fxmem.steps.analyze import Analysis, Unchanged, analyze
from fxmem.steps.backward import Backward, Coded
from fxmem.steps.code import decided_for_code, step_code
from fxmem.steps.options import Options
from fxmem.steps.pipeline import Planned, decide
from fxmem.steps.validity import Validity

if TYPE_CHECKING:
    from fxmem.backend.graph import Graph

_numbers = itertools.count()


class PlannedAlike(Exception):
    """The plan is that of a program that is there already.  budget: bytes, of the plan."""

    def __init__(self, program: Program, budget: int) -> None:
        super().__init__()
        self.program, self.budget = program, budget


class Builder:
    """Plans a graph in the middle of AOTAutograd's work on it."""

    def __init__(
        self,
        graph: Graph,
        sizes: tuple[int, ...],
        around: Around,
        options: Options,
        call: StepCall,
        unchanged: Unchanged,
        room: int | None,
    ) -> None:
        self.graph, self.sizes, self.around, self.options = graph, sizes, around, options
        self.call, self.unchanged, self.room = call, unchanged, room
        self.lasting = False
        self.examples: Sequence[Any] = ()  # until the graph is cut: its code is measured on them
        self.fitting: Sequence[Program] = ()
        self.places: dict[str, int] = {}
        self.planned: Planned | None = None
        self.validity: Validity | None = None
        self.joint: JointGraph | None = None
        self.coded: Coded | None = None

    def partition(
        self, module: fx.GraphModule, _: Any, *, num_fwd_outputs: int, **__: Any
    ) -> tuple[fx.GraphModule, fx.GraphModule]:
        self.joint = joint_graph(module, self.graph.roles, {})
        self._name_sizes(self.joint)
        without_sizes_of_bases(self.joint)
        examples, self.examples = examples_of(self.joint, self.examples), ()
        analysis, options = self._asked(self.joint)
        analysis = replace(analysis, examples=examples)
        here = {info.name: info.hint for info in self.joint.symbols.values()}
        if not self.around.known and not self.lasting:  # it runs once
            options = replace(options, compiler="eager")
        try:
            found = decided_for_code(analysis, options, here)
            self._check_new(found[0].plan)
            self.coded, self.validity = step_code(analysis, options, self.joint, found, here)
        finally:
            examples.clear()  # forms of an analysis know each other, and so outlive this line
        self.planned = self.coded.planned
        return self.coded.split.forward, self.coded.split.backward

    def _check_new(self, plan: Plan) -> None:
        for program in self.fitting:
            if _decided(program.planned.plan) == _decided(plan):
                raise PlannedAlike(program, plan.budget + self.around.always)

    def _asked(self, graph: JointGraph) -> tuple[Analysis, Options]:
        """What to plan, and for how many bytes."""
        if self.room is None:
            return self._analysis(graph, self.around), self.options
        if (self.unchanged.peak or 0) <= self.room:
            alone = self._analysis(graph, Around())
            self.lasting = alone.planner.keep_all().outcome.peak <= self.room
            if self.lasting:
                return alone, self.options.for_bytes(self.room, alone.device)
        return self._analysis(graph, self.around), self.options.for_the_smallest()

    def _analysis(self, graph: JointGraph, around: Around) -> Analysis:
        surrounded = _surrounded(graph, around)
        return analyze(surrounded, self.call, self.unchanged, self.options.cost)

    def replanned(self, around: Around) -> Part:
        """Bytes of the smallest plan with this around it; no code is made of it."""
        assert self.joint is not None
        with _torch.outside_of_tracing():
            planned = decide(self._analysis(self.joint, around), self.options.for_the_smallest())
        return part_of(planned.line, planned.graph, self.joint.bindings())

    def forward(self, module: fx.GraphModule) -> _torch.BoxedCallable:
        return boxed(module) if self.coded is None else self.coded.forward

    def backward(self) -> Backward:
        assert self.coded is not None
        return self.coded.backward

    def program(self, run: Callable[..., Any]) -> Program:
        planned, graph = self.planned, self.joint
        assert planned is not None
        assert graph is not None
        bindings = graph.bindings()
        phases = None if self.coded is None else self.coded.phases
        plan, around = planned.plan, self.around
        if around.known and around.meanwhile is not None:
            plan = with_between(planned, phases, around.meanwhile - around.spare)
        plan = in_step(plan, around)
        if self.around.known:
            tell(self.graph.number, plan)
        part = part_of(planned.line, planned.graph, bindings)
        if phases is not None:
            part = part.as_measured(phases.forward, phases.held, phases.backward)
        return Program(
            next(_numbers),
            self.graph.number,
            run,
            plan,
            planned,
            self.around,
            part,
            part_of(planned.before, planned.graph, bindings),
            self.sizes,
            self.validity,
            self.places,
            not self.graph.tracing,
            phases,
            self.lasting,
            self.replanned,
            self.graph.names,
        )

    def _name_sizes(self, graph: JointGraph) -> None:
        """Every size that Dynamo passes is a symbol of the graph; those have the names of inputs."""
        nodes = list(graph.placeholders(Role.PARAMETER, Role.BUFFER, Role.INPUT))
        for place, i in enumerate(self.graph.size_places):
            value = nodes[i].meta.get("val")
            if not isinstance(value, torch.SymInt):
                continue
            name = self.graph.roles[i].name
            symbol = Symbol(name, int(value.node.hint), name)
            self.places[graph.symbols.setdefault(value.node.expr, symbol).name] = place


def _decided(plan: Plan) -> list[tuple[Any, ...]]:
    """What a plan does, by names that twins have in common."""
    return [(d.value, d.action, d.nbytes_stored, d.times, d.dropped) for d in plan.decisions]


def _surrounded(graph: JointGraph, around: Around) -> JointGraph:
    """The graph, at whose boundary is what the graphs that follow hold; if unknown, more than all else."""
    nbytes = around.meanwhile
    if nbytes is None and around.known:
        return graph
    if nbytes is None:
        every = {k: n for node in graph.nodes for k, n in storages_in(node.meta.get("val")).items()}
        nbytes = sum(int(evaluate(n, graph.bindings())) for n in every.values())
    graph = graph.copy()
    for tangent in graph.placeholders(Role.TANGENT):
        tangent.meta[INSTEAD_OF_LOSS], nbytes = nbytes, 0
    return graph
