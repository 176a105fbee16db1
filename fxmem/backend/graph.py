"""One graph of Dynamo's behind the backend: planned while AOTAutograd works on it, then run by its plan."""

from __future__ import annotations

import contextlib
import itertools
import json
import logging
import re
import weakref
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import fx, nn

from fxmem import _torch
from fxmem._torch.eager import compiling, eager_decompositions
from fxmem.analysis.shards import reads_gathered
from fxmem.backend.schedule import Key, Path
from fxmem.backend.twins import Form, form_of, names_of, renamed
from fxmem.basics.errors import CaptureError, FxmemError
from fxmem.basics.sizes import evaluate, hint, storages_in
from fxmem.graphs.capture import StepCall, examples_of, joint_graph
from fxmem.graphs.emit import boxed
from fxmem.graphs.graph import INSTEAD_OF_LOSS, Input, JointGraph, Role, Symbol
from fxmem.graphs.regions import without_regions
from fxmem.planning.ledger import Around, Part, part_of
from fxmem.planning.plan import Plan
from fxmem.planning.whole_step import in_step
from fxmem.reports.report import Report
from fxmem.steps.analyze import Analysis, Unchanged, analyze, unchanged_step
from fxmem.steps.backward import (
    Backward,
    Coded,
    Phases,
    refuse_autocast,
    refuse_double_backward,
)
from fxmem.steps.code import decided_for_code, step_code
from fxmem.steps.decisions import peak_point
from fxmem.steps.options import Options
from fxmem.steps.pipeline import Planned, decide
from fxmem.steps.validity import Validity

if TYPE_CHECKING:
    from fxmem.backend.session import Session

log = logging.getLogger("fxmem.backend")

_numbers = itertools.count()


@dataclass(frozen=True)
class Program:
    """A graph as it runs by one plan.

    around: what it leaves room for.  part, whole: its bytes as planned, and with everything kept.
    symbols: name -> place among the sizes.  fixed: are those of its first call constants in its code?
    phases: what its code was measured to hold.  lasting: does it keep everything, so that it may stay once
    somebody has seen what follows?  replan: the bytes of the smallest plan with something else around it.
    names: of the graph that was planned.  said: of these, what the graph that it runs for has in place of
    them, where that is a twin.
    """

    number: int
    graph: int
    run: Callable[..., Any]
    plan: Plan
    planned: Planned
    around: Around
    part: Part
    whole: Part
    sizes: tuple[int, ...]
    validity: Validity | None
    symbols: dict[str, int]
    fixed: bool
    phases: Phases | None
    lasting: bool
    replan: Callable[[Around], Part] = field(repr=False)
    names: tuple[str, ...] = field(repr=False)
    said: dict[str, str] = field(default_factory=dict, repr=False)

    @property
    def provisional(self) -> bool:
        """Was it made when nobody had seen yet what follows?"""
        return not self.around.known

    def smallest(self, needed: Around) -> Part:
        """The graph's bytes by the plan with the smallest peak of it and of what follows."""
        if (
            self.holds_least
            and needed.meanwhile is not None
            and self.part.peak(needed) > self.part.least
        ):
            return self.part  # others make the peak
        return min(self.part, self.replan(needed), key=lambda part: part.peak(needed))

    @property
    def holds_least(self) -> bool:
        """Was it planned to hold as little as can be while other graphs run, whatever it takes itself?"""
        return self.provisional and self.around.meanwhile is None and not self.lasting

    def peak(self, needed: Around) -> int:
        """Bytes of the step while this graph runs, with that around it."""
        return needed.always + self.part.resident + self.part.peak(needed)

    def kept(self, needed: Around, budget: int | None) -> Program:
        """The same, to stay with something else around it."""
        loss = self.part.boundary - self.part.held - self.part.tangents
        between = loss if needed.meanwhile is None else needed.meanwhile - needed.spare
        plan = _with_between(self.planned, self.phases, between)
        plan = renamed(in_step(plan, needed, budget), self.said)
        program = replace(self, around=needed, plan=plan)
        _tell(program.graph, program.plan)
        return program

    def of(self, graph: Graph) -> Program:
        """The same to run for a twin of its graph."""
        if graph.number == self.graph:
            return self
        said = dict(zip(self.names, graph.names, strict=True))
        here = {self.said.get(name, name): said[name] for name in self.names}
        return replace(self, graph=graph.number, said=said, plan=renamed(self.plan, here))

    def serves(self, sizes: tuple[int, ...]) -> bool:
        """Does it compute with these sizes, and keep the budget at them?"""
        if self.fixed:
            return sizes == self.sizes
        if all(size <= here for size, here in zip(sizes, self.sizes, strict=True)):
            return True
        named = {name: sizes[place] for name, place in self.symbols.items()}
        return self.validity is not None and self.validity.fits(named)

    def leaves_room(self, needed: Around) -> bool:
        mine = self.around
        return (
            mine.known
            and mine.always >= needed.always
            and (mine.meanwhile or 0) >= (needed.meanwhile or 0)
        )


class Graph:
    """One graph of Dynamo's.  Called like it; runs the program for what else the step holds."""

    def __init__(self, module: fx.GraphModule, example_inputs: list[Any], session: Session) -> None:
        self.number = next(_numbers)
        self.module = without_regions(module)
        self.session = session
        self.more_follows = _torch.follows_a_break(module) or reads_gathered(example_inputs)
        self.name = _title(module)
        self.programs: dict[Path, Program] = {}
        self.checkpointed: dict[Key, Program | None] = {}
        self.unchanged: dict[tuple[int, ...], Unchanged] = {}
        self.plain: Callable[..., Any] | None = None
        self.error: FxmemError | None = None
        self.tracing = False
        self.met = False
        self.form: Form | None = None
        self.kind: int | None = None
        if not any(map(_torch.is_fake, example_inputs)):
            self._meet(example_inputs)
            self._find_twins(example_inputs)
        session.graphs.append(weakref.ref(self))
        if self.met:
            self._trace(example_inputs)

    def _meet(self, inputs: Sequence[Any]) -> None:
        """See the tensors that it is given.

        Where DDP cuts a model at its buckets, Dynamo shows the graphs stand-ins, and runs the module on
        them for what the next graph is given: such a graph meets its inputs at its first call.
        """
        nodes = self.module.graph.find_nodes(op="placeholder")
        values = list(zip(nodes, inputs, strict=True))
        self.roles = [_role(node, value) for node, value in values]
        self.names = names_of(self.name, self.module, self.roles)
        self.states = _references(inputs)
        self.size_places = [
            i for i, (_, v) in enumerate(values) if isinstance(v, (int, torch.SymInt))
        ]
        self.met = True

    def _find_twins(self, inputs: Sequence[Any]) -> None:
        """Graphs for which the same is compiled have the same number as their ``kind``."""
        self.form = form_of(self.module, inputs, self.roles)
        self.modes_unchanged = _torch.modes_unchanged()
        if self.form is not None:
            alike = [one for one in self.session.living() if one.form == self.form]
            twin = next((one for one in alike if one.modes_unchanged()), self)
            self.kind = self.number if twin is self else twin.kind

    def known(self) -> list[Program]:
        """Programs that it could run: its own, and those of its twins."""
        twins = [
            one
            for one in self.session.living()
            if self.kind is not None and one.kind == self.kind and one is not self
        ]
        return [*self.programs.values(), *(p for one in twins for p in one.programs.values())]

    def _trace(self, inputs: Sequence[Any]) -> None:
        """While Dynamo works on the graph: what tracing assumes of sizes becomes guards of Dynamo's."""
        self.tracing = True
        try:
            self.session.program_for(self, inputs)
        except FxmemError as error:
            self.error = error
        self.tracing = False

    def run(self, *args: Any) -> Any:
        if not self.met:
            self._meet(args)
        if self.error is not None:
            error, self.error = self.error, None
            try:
                raise error
            finally:
                # This frame is in the error's traceback: together they would outlive who handles it.
                del error
        use = None
        if self.plain is None:
            with self.session.lock:
                use = self.session.enter(self, args)
        if use is None:
            assert self.plain is not None
            return self.plain(*args)
        outputs = use.seen.program.run(*args)
        use.returned(outputs)
        _torch.prepare_backward(outputs, refuse_autocast, refuse_double_backward, use.done)
        return outputs

    def reads(self, tensors: set[int]) -> bool:
        """Is one of these, by identity, among the tensors that it is given?"""
        return any(key in tensors and ref() is not None for key, ref in self.states.items())

    def sizes(self, args: Sequence[Any]) -> tuple[int, ...]:
        return tuple(int(hint(args[i])) for i in self.size_places)

    def key(self, args: Sequence[Any]) -> Key:
        return Key(self.number, self.sizes(args))

    # -- Building ------------------------------------------------------------------------------------

    def build(
        self,
        args: Sequence[Any],
        around: Around,
        options: Options,
        *,
        room: int | None = None,
        fitting: Sequence[Program] = (),
    ) -> Program | None:
        """Trace, plan and compile; None where nothing needs a gradient.

        room: bytes; a graph that keeps everything within them does, as a step of its own would; any other
        gets its smallest plan.  fitting: programs that could stay; if the plan is that of one of them, no
        code is made.  Once Dynamo has finished with the graph, the sizes of further inputs are constants.
        """
        call, unchanged = self._unchanged(args)
        without_data = replace(call, args=())  # what is compiled refers to it as long as it lives
        builder = _Builder(self, self.sizes(args), around, options, without_data, unchanged, room)
        builder.examples, builder.fitting = args, fitting
        context = contextlib.nullcontext() if self.tracing else _torch.traced_anew()
        try:
            with compiling(), eager_decompositions(), context, self._numbers_explained():
                run = _torch.aot_compile(
                    self.module, args, builder.partition, builder.forward, builder.backward
                )
        except _PlannedAlike as found:
            return found.program.of(self).kept(around, found.budget)
        finally:
            builder.examples, builder.fitting = (), ()
        if builder.planned is None:
            # Compiled later than Dynamo traced, it would serve the sizes of this call alone.
            self.plain = run if self.tracing else self.module
            return None
        return builder.program(run)

    def unchanged_peak(self, args: Sequence[Any]) -> int | None:
        """Bytes at the peak of the graph as a step of its own, run by eager PyTorch, if they are known."""
        return self._unchanged(args)[1].peak

    def _unchanged(self, args: Sequence[Any]) -> tuple[StepCall, Unchanged]:
        call, sizes = (
            StepCall(_bare(self.module), _concrete(args), name=self.name),
            self.sizes(args),
        )
        if sizes not in self.unchanged:
            with _torch.outside_of_tracing():
                self.unchanged[sizes] = unchanged_step(call)
        return call, self.unchanged[sizes]

    @contextlib.contextmanager
    def _numbers_explained(self) -> Iterator[None]:
        """What Dynamo knew of a number that it passes as a tensor is gone when it has finished."""
        try:
            yield
        except _torch.ReadsAValue as error:
            if self.tracing:
                raise
            raise CaptureError(
                "these sizes need a plan of their own, for which the graph is traced once more; but it "
                "reads a number from a tensor, such as dropout's p: so Dynamo gives it under dynamic=True\n"
                "  try: torch._dynamo.config.specialize_float = True, or dynamic=None"
            ) from error


class _PlannedAlike(Exception):
    """The plan is that of a program that is there already.  budget: bytes, of the plan."""

    def __init__(self, program: Program, budget: int) -> None:
        super().__init__()
        self.program, self.budget = program, budget


class _Builder:
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
                raise _PlannedAlike(program, plan.budget + self.around.always)

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
            plan = _with_between(planned, phases, around.meanwhile - around.spare)
        plan = in_step(plan, around)
        if self.around.known:
            _tell(self.graph.number, plan)
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


def _tell(number: int, plan: Plan) -> None:
    """Log a plan that is there to stay, and put it into torch's structured trace."""
    if log.isEnabledFor(logging.INFO):
        log.info("the plan of graph %d\n%s", number, Report(plan))
    _torch.trace_artifact(f"fxmem_plan_{number}", lambda: json.dumps(plan.to_dict(), indent=1))


def _with_between(planned: Planned, phases: Phases | None, between: int) -> Plan:
    """The plan with the peak that is there when what follows its graph holds so much at the boundary.

    It was made with more there, to spare for them, or for another place.
    """
    bindings = planned.graph.bindings()
    made_for = evaluate(planned.line.steps[planned.line.boundary].workspace, bindings)
    line = planned.line.with_less_between(made_for - between)
    point = peak_point(line, planned.graph, bindings)
    if phases is None:
        return replace(planned.plan, predicted_peak=point.nbytes, peak=point)
    phases = replace(phases, outside=between)
    return replace(planned.plan, predicted_peak=planned.plan.resident + phases.peak, peak=point)


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


def _references(values: Sequence[Any]) -> dict[int, weakref.ref[torch.Tensor]]:
    return {id(v): weakref.ref(v) for v in values if isinstance(v, torch.Tensor)}


def _bare(module: fx.GraphModule) -> fx.GraphModule:
    """The graph without what Dynamo hangs on it, to be copied and run on fake tensors."""
    return fx.GraphModule(module, module.graph)


def _concrete(args: Sequence[Any]) -> tuple[Any, ...]:
    """The inputs as a step of its own would be given them: sizes as numbers, activations as leaves."""

    def concrete(value: Any) -> Any:
        if isinstance(value, torch.Tensor):
            return value if value.is_leaf else value.detach().requires_grad_(value.requires_grad)
        return int(hint(value)) if isinstance(value, torch.SymInt) else value

    return tuple(map(concrete, args))


_ROOT = re.compile(r"[LG]\['\w+'\]")
_STEP = re.compile(r"\._(?:modules|parameters|buffers)\['([^']+)'\]")


def _role(node: fx.Node, value: Any) -> Input:
    source = _torch.dynamo_source_name(node)
    name = ".".join(_STEP.findall(source)) or source
    leaf = isinstance(value, torch.Tensor) and value.requires_grad and value.is_leaf
    if isinstance(value, nn.Parameter):
        return Input(Role.PARAMETER, name, leaf)
    if "._buffers['" in source:
        return Input(Role.BUFFER, name, leaf)
    return Input(Role.INPUT, source, leaf)


def _title(module: fx.GraphModule) -> str:
    """The class of the outermost module whose forward is in the graph."""
    for node in module.graph.nodes:
        for path, kind in (node.meta.get("nn_module_stack") or {}).values():
            if _ROOT.fullmatch(path):
                return str(getattr(kind, "__name__", kind)).rsplit(".", 1)[-1]
    return "graph"
