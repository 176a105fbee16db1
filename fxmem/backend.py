"""``torch.compile(model, backend="fxmem", options={"budget": "20GiB"})``: the same plans, another door.

Dynamo hands over one graph at a time, and AOTAutograd, on the way to its two halves, the joint graph that
``optimize`` would have captured.  From there on the pipeline is the same.  A model that Dynamo cuts into
several graphs runs its first step with the smallest plans, because nobody knows yet what follows; from
the second step on all its graphs share the budget (``fxmem.ledger``).
"""

from __future__ import annotations

import contextlib
import difflib
import inspect
import itertools
import json
import logging
import re
import threading
import warnings
import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from fractions import Fraction
from typing import Any

import torch
from torch import fx, nn

from fxmem import _torch
from fxmem._torch_eager import compiling, eager_decompositions
from fxmem.api import options_of
from fxmem.backward import Backward, refuse_autocast
from fxmem.budget import Budget
from fxmem.capture import StepCall, joint_graph
from fxmem.device import library_memory
from fxmem.emit import boxed
from fxmem.errors import BudgetInfeasibleError, CaptureError, FxmemError
from fxmem.graph import INSTEAD_OF_LOSS, Input, JointGraph, Role, Symbol
from fxmem.ledger import Around, Part, around, part_of, shares, step_peak
from fxmem.pipeline import Options, Planned, Unchanged, analyze, device_of, unchanged_step
from fxmem.plan import Plan
from fxmem.report import Report
from fxmem.shards import gathered, reads_gathered, resident_bytes, with_parallelism
from fxmem.sizes import hint, storages_in
from fxmem.units import format_bytes, shown
from fxmem.validity import Validity, decided

log = logging.getLogger(__name__)


def fxmem(
    module: fx.GraphModule,
    example_inputs: Sequence[Any],
    *,
    options: Mapping[str, Any] | None = None,
    mode: str | None = None,
) -> Callable[..., Any]:
    """The backend.  options: ``optimize``'s keywords, the budget among them.

    What it raises on purpose, it raises when the graph is called, so that it is not wrapped in an error of
    Dynamo's: ``BudgetError``, ``BudgetInfeasibleError``, ``CaptureError``, ``PlanMismatchError``.
    """
    try:
        _refuse_buckets(example_inputs)
        session = _session(options, mode, example_inputs)
        graph = Graph(module, list(example_inputs), session)
    except FxmemError as error:
        return _raising(error)
    return _torch.not_traced(graph.run)


def _raising(error: FxmemError) -> Callable[..., Any]:
    def run(*_: Any) -> Any:
        raise error

    return _torch.not_traced(run)


def _refuse_buckets(inputs: Sequence[Any]) -> None:
    """DDP cuts what it compiles at its buckets, and runs the graphs on stand-ins between compilations."""
    if any(map(_torch.is_fake, inputs)):
        raise CaptureError(
            "DistributedDataParallel cuts the model into a graph for each of its buckets, for which the "
            "backend fxmem has no common plan yet\n"
            "  try: DistributedDataParallel(fxmem.optimize(model, budget, (batch,))), whose gradients are "
            "reduced while the backward goes on, too"
        )


def plans(compiled: nn.Module) -> list[Plan]:
    """The plans of a module that was compiled with this backend, in the order they were made.

    One for each graph that trains.  Raises ``FxmemError`` if there is none yet.
    """
    if not isinstance(compiled, nn.Module):
        raise FxmemError(
            f"plans takes a module that torch.compile returned, not {type(compiled).__name__}"
        )
    states = (*compiled.parameters(), *compiled.buffers())
    mine = {id(tensor) for tensor in (*states, *gathered(states))}
    found = [
        (program.number, program.plan)
        for session in list(_sessions.values())
        for graph in session.living()
        for program in graph.programs.values()
        if not program.provisional and graph.reads(mine)
    ]
    if not found:
        raise FxmemError(
            "there is no plan yet: torch.compile captures a module at its first call, and one that it "
            "cuts into several graphs is planned at the second.\n"
            '  try: call it on a batch before; and check that it was compiled with backend="fxmem"'
        )
    return [plan for _, plan in sorted(found, key=lambda pair: pair[0])]


# -- Options -----------------------------------------------------------------------------------------


_KNOWN = tuple(inspect.signature(options_of).parameters)
_ELSEWHERE = {
    "example_inputs": "the backend sees those of the first call",
    "example_kwargs": "the backend sees those of the first call",
    "dynamic_shapes": "use torch.compile's dynamic=True, or torch._dynamo.mark_dynamic on an input",
    "loss_fn": "the backend sees what the compiled function computes: put the loss into it",
    "loss_inputs": "the backend sees what the compiled function computes: put the loss into it",
    "verify": "a backend runs no step of its own: compare with fxmem.measure, or use fxmem.optimize",
}


def read(options: Mapping[str, Any] | None, mode: str | None = None) -> Options:
    """Checked options.  Raises ``FxmemError`` for what is unknown, misplaced or missing."""
    if mode is not None:
        raise FxmemError(
            f"mode={shown(mode)} chooses among Inductor's settings; the backend fxmem has none\n"
            '  try: torch.compile(model, backend="fxmem", options={"budget": "8GiB"})'
        )
    given = dict(options or {})
    for name in given:
        if name in _ELSEWHERE:
            raise FxmemError(f"the option {name!r} is not for the backend: {_ELSEWHERE[name]}")
        if name not in _KNOWN:
            near = difflib.get_close_matches(str(name), _KNOWN, n=1)
            meant = f"did you mean {near[0]!r}? " if near else ""
            raise FxmemError(f"unknown option {name!r}; {meant}known: {', '.join(_KNOWN)}")
    if "budget" not in given:
        raise FxmemError(
            "the backend fxmem needs a budget: how many bytes a training step may hold\n"
            '  try: torch.compile(model, backend="fxmem", options={"budget": "8GiB"}), or "0.5x" for '
            "half of what the step peaks at today"
        )
    found = options_of(**given)
    if "quantize" in found.allow:
        raise FxmemError(
            'allow="quantize" is not for the backend: it measures the noise of your gradients on a batch '
            "before it compiles\n  try: fxmem.optimize(model, budget, batch, allow=...)"
        )
    return found


# -- Graphs and the programs made of them ------------------------------------------------------------


Key = tuple[int, tuple[int, ...]]
"""A graph's number and the sizes that it is called with, where those may change."""

_numbers = itertools.count()


@dataclass(frozen=True)
class Program:
    """A graph as it runs by one plan.

    around: what it leaves room for; None if more graphs may follow that nobody has seen yet.
    part, whole: its bytes as planned, and with everything kept.
    """

    number: int
    run: Callable[..., Any]
    plan: Plan
    planned: Planned
    around: Around | None
    part: Part
    whole: Part
    sizes: tuple[int, ...]
    validity: Validity | None
    symbols: dict[str, int]

    @property
    def provisional(self) -> bool:
        return self.around is None

    def serves(self, sizes: tuple[int, ...]) -> bool:
        """Does it keep the budget at these sizes?  named: symbol -> place among them."""
        if all(size <= here for size, here in zip(sizes, self.sizes, strict=True)):
            return True
        named = {name: sizes[place] for name, place in self.symbols.items()}
        return self.validity is not None and self.validity.fits(named)

    def leaves_room(self, needed: Around) -> bool:
        mine = self.around
        return mine is not None and (
            mine.always >= needed.always and (mine.meanwhile or 0) >= (needed.meanwhile or 0)
        )


class Graph:
    """One graph of Dynamo's.  Called like it; runs the program for what else the step holds."""

    def __init__(self, module: fx.GraphModule, example_inputs: list[Any], session: Session) -> None:
        self.number = next(_numbers)
        self.module = module
        self.session = session
        self.more_follows = _torch.follows_a_break(module) or reads_gathered(example_inputs)
        self.name = _title(module)
        nodes = module.graph.find_nodes(op="placeholder")
        values = list(zip(nodes, example_inputs, strict=True))
        self.roles = [_role(node, value) for node, value in values]
        self.states = _references(example_inputs)
        self.size_places = [
            i for i, (_, v) in enumerate(values) if isinstance(v, (int, torch.SymInt))
        ]
        self.programs: dict[tuple[Key, ...], Program] = {}
        self.plain: Callable[..., Any] | None = None
        self.error: FxmemError | None = None
        session.graphs.append(weakref.ref(self))
        # Now, because what tracing assumes of sizes becomes guards of Dynamo's.
        self.tracing = True
        try:
            session.program_for(self, example_inputs)
        except FxmemError as error:
            self.error = error
        self.tracing = False

    def run(self, *args: Any) -> Any:
        if self.plain is not None:
            return self.plain(*args)
        if self.error is not None:
            error, self.error = self.error, None
            raise error
        with self.session.lock:
            use = self.session.enter(self, args)
        outputs = use.seen.program.run(*args)
        use.returned(outputs)
        _torch.prepare_backward(outputs, refuse_autocast, use.done)
        return outputs

    def reads(self, tensors: set[int]) -> bool:
        """Is one of these, by identity, among the tensors that it is given?"""
        return any(key in tensors and ref() is not None for key, ref in self.states.items())

    def sizes(self, args: Sequence[Any]) -> tuple[int, ...]:
        return tuple(int(hint(args[i])) for i in self.size_places)

    def key(self, args: Sequence[Any]) -> Key:
        return self.number, self.sizes(args)

    # -- Building ------------------------------------------------------------------------------------

    def build(self, args: Sequence[Any], around: Around | None, options: Options) -> Program | None:
        """Trace, plan and compile; None where nothing needs a gradient.

        Once Dynamo has finished with the graph, the sizes of further inputs are constants.
        """
        call = StepCall(_bare(self.module), _concrete(args), name=self.name)
        with _torch.outside_of_tracing():
            unchanged = unchanged_step(call)
        builder = _Builder(self, args, around, options, call, unchanged)
        context = contextlib.nullcontext() if self.tracing else _torch.traced_anew()
        with compiling(), eager_decompositions(), context:
            run = _torch.aot_compile(
                self.module, args, builder.partition, boxed, builder.the_backward
            )
        if builder.planned is None:
            self.plain = run
            return None
        return builder.program(run)


class _Builder:
    """Plans a graph in the middle of AOTAutograd's work on it."""

    def __init__(
        self,
        graph: Graph,
        args: Sequence[Any],
        around: Around | None,
        options: Options,
        call: StepCall,
        unchanged: Unchanged,
    ) -> None:
        self.graph, self.args, self.around, self.options = graph, args, around, options
        self.call, self.unchanged = call, unchanged
        self.places: dict[str, int] = {}
        self.planned: Planned | None = None
        self.validity: Validity | None = None
        self.joint: JointGraph | None = None
        self.backward: Backward | None = None

    def partition(
        self, module: fx.GraphModule, _: Any, *, num_fwd_outputs: int, **__: Any
    ) -> tuple[fx.GraphModule, fx.GraphModule]:
        if _torch.is_of_a_region(module):
            raise CaptureError(
                "the model has a region that is compiled by itself (nested_compile_region), whose bytes "
                "the backend fxmem cannot plan\n  try: the model without the decorator"
            )
        graph = joint_graph(module, self.graph.roles, {})
        self._name_sizes(graph)
        _surround(graph, self.around)
        analysis = analyze(graph, self.call, self.unchanged, self.options.cost)
        here = {info.name: info.hint for info in graph.symbols.values()}
        self.planned, self.validity = decided(analysis, self.options, here)
        self.joint = graph
        self.backward = Backward(self.planned, graph)
        halves = self.planned.split
        return halves.forward, halves.backward

    def the_backward(self) -> Backward:
        assert self.backward is not None
        return self.backward

    def program(self, run: Callable[..., Any]) -> Program:
        planned, graph = self.planned, self.joint
        assert planned is not None
        assert graph is not None
        sizes, bindings = self.graph.sizes(self.args), graph.bindings()
        plan = planned.plan
        if self.around is not None and self.around.always:
            always = self.around.always
            plan = replace(
                plan,
                budget=plan.budget + always,
                predicted_peak=plan.predicted_peak + always,
                resident=plan.resident + always,
            )
        if self.around is not None:
            _tell(self.graph.number, plan)
        return Program(
            next(_numbers),
            run,
            plan,
            planned,
            self.around,
            part_of(planned.line, planned.graph, bindings),
            part_of(planned.before, planned.graph, bindings),
            sizes,
            self.validity,
            self.places,
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


def _tell(number: int, plan: Plan) -> None:
    """Log a plan that is there to stay, and put it into torch's structured trace."""
    if log.isEnabledFor(logging.INFO):
        log.info("the plan of graph %d\n%s", number, Report(plan))
    _torch.trace_artifact(f"fxmem_plan_{number}", lambda: json.dumps(plan.to_dict(), indent=1))


def _surround(graph: JointGraph, around: Around | None) -> None:
    """Let the graph's boundary hold what the graphs that follow hold; if unknown, more than all else."""
    if around is not None and around.meanwhile is None:
        return
    nbytes = around.meanwhile if around is not None and around.meanwhile is not None else 0
    if around is None:
        every = {k: n for node in graph.nodes for k, n in storages_in(node.meta.get("val")).items()}
        nbytes = sum(int(hint(n)) for n in every.values())
    for tangent in graph.placeholders(Role.TANGENT):
        tangent.meta[INSTEAD_OF_LOSS], nbytes = nbytes, 0


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


_MANY = 256
_MANY_WAITING = (
    f"fxmem: {_MANY} forwards wait for their backward, and what they saved is held until then. "
    "Where no backward follows, as in an evaluation, call the model under torch.no_grad()."
)


# -- Sessions: what shares one budget ----------------------------------------------------------------


@dataclass(frozen=True)
class Seen:
    """What is remembered of a forward.  read: storage -> bytes of its inputs.  made: its outputs'."""

    key: Key
    program: Program
    read: dict[int, int]
    made: set[int] = field(default_factory=set)


@dataclass(eq=False)
class Use:
    """One forward, until its backward has run or can run no more: what autograd saved refers to it."""

    seen: Seen
    finished: bool = False

    def returned(self, outputs: Any) -> None:
        self.seen.made.update(_storages(outputs).keys() - self.seen.read.keys())

    def done(self) -> None:
        self.finished = True


@dataclass(frozen=True)
class Schedule:
    """Graphs of one step in forward order, as seen in its first run.  resident, budget: bytes."""

    keys: tuple[Key, ...]
    parts: tuple[Part, ...]
    wanted: tuple[int, ...]
    resident: int
    budget: int | None

    def around(self, place: int, earlier: Sequence[Part]) -> Around:
        spare = 0
        if self.budget is not None:
            room = self.budget - step_peak(self.parts, self.resident)
            later = shares(self.parts, self.wanted)[place + 1 :]
            spare = int(sum(later) * max(room, 0))
        return around(self.parts, place, earlier, self.resident, spare)


class Session:
    """What one ``torch.compile`` with its options has compiled, and the step that is going on."""

    def __init__(self, given: Mapping[str, Any] | None, options: Options) -> None:
        self.given = given  # whose identity names the session
        self.options = options
        self.graphs: list[weakref.ref[Graph]] = []
        self.lock = threading.RLock()
        self.schedules: dict[tuple[Key, ...], Schedule] = {}
        self._uses: list[weakref.ref[Use]] = []
        self._longest: list[Seen] = []

    def living(self) -> list[Graph]:
        return [graph for ref in self.graphs if (graph := ref()) is not None]

    def outstanding(self) -> list[Seen]:
        """Forwards whose backward has not run, oldest first."""
        alive = [use for ref in self._uses if (use := ref()) is not None and not use.finished]
        self._uses = [weakref.ref(use) for use in alive]
        return [use.seen for use in alive]

    def enter(self, graph: Graph, args: Sequence[Any]) -> Use:
        """A forward begins."""
        program = self.program_for(graph, args)
        assert program is not None
        use = Use(Seen(graph.key(args), program, _storages(args)))
        self._uses.append(weakref.ref(use))
        seen = self.outstanding()
        if len(seen) > len(self._longest):
            self._longest = seen
        if len(seen) == _MANY:
            warnings.warn(_MANY_WAITING, stacklevel=4)
        return use

    def program_for(self, graph: Graph, args: Sequence[Any]) -> Program | None:
        """The program that a call of the graph runs now; made if there is none yet.

        Raises ``BudgetInfeasibleError`` where the graph finds no room.
        """
        outstanding = self.outstanding()
        if not outstanding:
            self._plan_last_step()
        key = graph.key(args)
        path = (*(use.key for use in outstanding), key)
        needed = self._around(path, [use.program.part for use in outstanding])
        if needed is None and not outstanding and not graph.more_follows:
            return self._alone(graph, args, path)
        known = graph.programs.get(path)
        if known is not None and (needed is None or known.leaves_room(needed)):
            return known
        made = self._made(graph, args, path, needed, known)
        if made is not None:
            graph.programs[path] = made
        return made

    def _alone(self, graph: Graph, args: Sequence[Any], path: tuple[Key, ...]) -> Program | None:
        """A graph that is the whole step, as far as is known: planned as by ``optimize``."""
        sizes = graph.sizes(args)
        serving = [
            program
            for at, program in graph.programs.items()
            if len(at) == 1 and program.around == Around() and program.serves(sizes)
        ]
        if serving:
            return min(serving, key=lambda program: program.plan.predicted_overhead)
        # A plan that was given is for the first step; further ones are planned.
        first = not any(other.programs for other in self.living())
        options = self.options if first else replace(self.options, plan=None)
        try:
            made = graph.build(args, Around(), options)
        except BudgetInfeasibleError as error:
            if options.budget.kind != "baseline_share":
                raise
            raise _of_a_share(error) from error
        if made is not None:
            graph.programs[path] = made
        return made

    def _made(
        self,
        graph: Graph,
        args: Sequence[Any],
        path: tuple[Key, ...],
        needed: Around | None,
        known: Program | None,
    ) -> Program | None:
        smallest = replace(
            self.options, budget=Budget.parse("min"), on_infeasible="best", plan=None
        )
        if needed is None:
            sizes = graph.sizes(args)
            others = (p for p in graph.programs.values() if p.provisional and p.sizes == sizes)
            first = next(others, None) or graph.build(args, None, smallest)
            if first is not None:
                self._check_first(graph, first, path, args)
            return first
        budget = self._budget(path)
        if budget is None:
            return graph.build(args, needed, smallest)
        room = budget - needed.always
        outside = self.options.reserve + library_memory(_device(args))
        if room > 0:
            asked = Budget("bytes", Fraction(room + outside), self.options.budget.asked)
            options = replace(self.options, budget=asked, plan=None)
            try:
                return graph.build(args, needed, options)
            except BudgetInfeasibleError as error:
                if known is None or _peak(known, needed) > budget:
                    raise _in_a_step(error, needed, budget) from error
        if known is None or _peak(known, needed) > budget:
            raise _no_room(known, needed, budget)
        return replace(known, around=needed)

    # -- The step that is going on ---------------------------------------------------------------------

    def _plan_last_step(self) -> None:
        """The step before this one is over: from now on its graphs share the budget."""
        uses, self._longest = self._longest, []
        keys = tuple(seen.key for seen in uses)
        if all(not seen.program.provisional for seen in uses):
            return  # nothing ran, or all of it as planned for this step
        resident = resident_bytes(_residents(uses))
        parts = tuple(seen.program.part for seen in uses)
        whole = [seen.program.whole for seen in uses]
        budget = self._resolved(step_peak(whole, resident), uses[0].program)
        if budget is not None and step_peak(parts, resident) > budget:
            log.info("the smallest plans of %d graphs need more than the budget", len(uses))
        wanted = tuple(part.least for part in whole)
        self.schedules[keys] = Schedule(keys, parts, wanted, resident, budget)

    def _resolved(self, baseline: int, program: Program) -> int | None:
        """The budget of the whole step, in bytes; None for "min"."""
        device = torch.device(program.plan.device)
        reserve = self.options.reserve + library_memory(device)
        return self.options.budget.resolve(device=device, baseline_peak=baseline, reserve=reserve)

    def _of(self, path: tuple[Key, ...]) -> list[Schedule]:
        return [s for keys, s in self.schedules.items() if keys[: len(path)] == path]

    def _around(self, path: tuple[Key, ...], earlier: Sequence[Part]) -> Around | None:
        """What a graph at the end of the path leaves room for, whatever of the known steps this is."""
        place = len(path) - 1
        found = [schedule.around(place, earlier) for schedule in self._of(path)]
        if not found:
            return None
        following = [a.meanwhile for a in found if a.meanwhile is not None]
        return Around(max(a.always for a in found), max(following) if following else None)

    def _budget(self, path: tuple[Key, ...]) -> int | None:
        budgets = [s.budget for s in self._of(path) if s.budget is not None]
        return min(budgets) if budgets else None

    def _check_first(
        self, graph: Graph, program: Program, path: tuple[Key, ...], args: Sequence[Any]
    ) -> None:
        """In a first step, too, what is seen so far keeps a budget that is known by then."""
        if self.options.budget.kind in ("min", "baseline_share"):
            return
        budget = self._resolved(0, program)
        uses = self.outstanding()
        residents = {**_residents(uses), **_storages(args)}
        for use in uses:
            for key in use.made:
                residents.pop(key, None)
        parts = [*(use.program.part for use in uses), program.part]
        peak = step_peak(parts, resident_bytes(residents))
        if budget is not None and peak > budget:
            # The graphs before may have been planned as if nothing followed: next time they know.
            graph.programs[path] = program
            self._longest = [*uses, Seen(path[-1], program, _storages(args))]
            raise _first_step(program, peak, budget)


def _residents(uses: Sequence[Seen]) -> dict[int, int]:
    """Storage -> bytes of all that the graphs of a step are given and that none of them made."""
    made = {key for use in uses for key in use.made}
    return {k: n for use in uses for k, n in use.read.items() if k not in made}


def _storages(values: Any) -> dict[int, int]:
    tensors = [t for t in torch.utils._pytree.tree_leaves(values) if isinstance(t, torch.Tensor)]
    return {key: int(n) for t in tensors for key, n in storages_in(t).items()}


def _device(args: Sequence[Any]) -> torch.device:
    return device_of(StepCall(nn.Module(), tuple(args)))


def _peak(program: Program, needed: Around) -> int:
    part = program.part
    boundary = (
        part.boundary if needed.meanwhile is None else part.held + part.tangents + needed.meanwhile
    )
    return needed.always + part.resident + max(part.least, boundary)


# -- Errors --------------------------------------------------------------------------------------------


def _of_a_share(error: BudgetInfeasibleError) -> BudgetInfeasibleError:
    return BudgetInfeasibleError(
        f"{error}\n  note    the share is of this one graph; where more make the step, as with blocks that "
        "are compiled one by one, ask for bytes",
        smallest_peak=error.smallest_peak,
        best_plan=error.best_plan,
        why=error.why,
    )


def _in_a_step(error: BudgetInfeasibleError, needed: Around, budget: int) -> BudgetInfeasibleError:
    return BudgetInfeasibleError(
        f"this is one of several graphs of a step; of the budget of {format_bytes(budget)}, the others "
        f"hold {format_bytes(needed.always)} while it runs.\n{error}",
        smallest_peak=error.smallest_peak + needed.always,
        best_plan=error.best_plan,
        why=error.why,
    )


def _no_room(known: Program | None, needed: Around, budget: int) -> FxmemError:
    peak = needed.always if known is None else _peak(known, needed)
    text = (
        f"the step runs in several graphs, and the smallest plans of all of them need "
        f"{format_bytes(peak)} ({peak} bytes); the budget is {format_bytes(budget)} ({budget} bytes).\n"
        f"  try: a budget of {peak} bytes, or fewer graph breaks "
        "(torch._dynamo.explain lists them)"
    )
    if known is None:
        return FxmemError(text)
    return BudgetInfeasibleError(text, smallest_peak=peak, best_plan=known.plan, why="")


def _first_step(program: Program, peak: int, budget: int) -> BudgetInfeasibleError:
    return BudgetInfeasibleError(
        f"the step runs in several graphs; those seen so far, with the smallest plan for the last, need "
        f"{format_bytes(peak)} ({peak} bytes); the budget is {format_bytes(budget)} ({budget} bytes).\n"
        "  try: the step once more, if an earlier graph took room that a later one needs: it now knows of "
        f"all of them; or a budget of {peak} bytes",
        smallest_peak=peak,
        best_plan=program.plan,
        why="",
    )


# -- All sessions ----------------------------------------------------------------------------------------


_sessions: weakref.WeakValueDictionary[int, Session] = weakref.WeakValueDictionary()
"""By the identity of the options' dictionary, which ``torch.compile`` hands on unchanged."""


def _session(options: Mapping[str, Any] | None, mode: str | None, inputs: Sequence[Any]) -> Session:
    known = _sessions.get(id(options))
    if known is None or known.given is not options:
        found = read(options, mode)
        found = replace(found, outside=with_parallelism(found.outside, inputs))
        known = Session(options, found)
        _sessions[id(options)] = known
    return known


def _reset() -> None:
    """``torch._dynamo.reset`` calls this."""
    _sessions.clear()


fxmem.reset = _reset  # type: ignore[attr-defined]
