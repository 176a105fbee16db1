"""One graph of Dynamo's behind the backend: what it is given, and the programs that it runs by."""

from __future__ import annotations

import contextlib
import itertools
import re
import weakref
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import fx, nn

from fxmem import _torch
from fxmem._torch.eager import compiling, eager_decompositions
from fxmem.analysis.shards import reads_gathered
from fxmem.backend.builder import Builder, PlannedAlike
from fxmem.backend.program import Program
from fxmem.backend.schedule import Key, Path
from fxmem.backend.twins import Form, form_of, names_of
from fxmem.basics.errors import CaptureError, FxmemError
from fxmem.basics.sizes import hint
from fxmem.graphs.capture import StepCall
from fxmem.graphs.graph import Input, Role
from fxmem.graphs.regions import without_regions
from fxmem.planning.ledger import Around
from fxmem.steps.analyze import Unchanged, unchanged_step
from fxmem.steps.backward import refuse, refuse_double_backward
from fxmem.steps.options import Options

if TYPE_CHECKING:
    from fxmem.backend.session import Session

_numbers = itertools.count()


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
        self.state_places = [
            place for place, role in enumerate(self.roles) if role.role is not Role.INPUT
        ]
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
        self._see_states(args)
        use = None
        if self.plain is None:
            with self.session.lock:
                use = self.session.enter(self, args)
        if use is None:
            assert self.plain is not None
            return self.plain(*args)
        outputs = use.seen.program.run(*args)
        use.returned(outputs)
        _torch.prepare_backward(outputs, refuse, refuse_double_backward, use.done)
        return outputs

    def _see_states(self, args: Sequence[Any]) -> None:
        """A block's graph runs for others of its class, too, with their parameters and buffers."""
        states = [args[place] for place in self.state_places]
        if not all((ref := self.states.get(id(t))) and ref() is t for t in states):
            self.states |= _references(states)

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
        builder = Builder(self, self.sizes(args), around, options, without_data, unchanged, room)
        builder.examples, builder.fitting = args, fitting
        context = contextlib.nullcontext() if self.tracing else _torch.traced_anew()
        try:
            with compiling(), eager_decompositions(), context, self._numbers_explained():
                run = _torch.aot_compile(
                    self.module, args, builder.partition, builder.forward, builder.backward
                )
        except PlannedAlike as found:
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
