"""What ``optimize`` hands back: a GraphModule that trains like the model, under its plan.

One program is one captured step: Dynamo's guards say which calls it serves.  A call that none
serves (another shape, ``eval()``, autocast) is captured and planned for the same budget.
"""

from __future__ import annotations

import copy
import threading
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import fx, nn

from fxmem import _torch
from fxmem.analysis.dynamic import Bounds, Names, Sizes, corners, marked, sizes_by_name, sizes_of
from fxmem.basics.errors import FxmemError
from fxmem.codes.seeds import next_step, step_seed
from fxmem.graphs.capture import StepCall, capture
from fxmem.graphs.graph import Role
from fxmem.graphs.lifetimes import BeforeAfter
from fxmem.graphs.readable import readable
from fxmem.graphs.standins import at_sizes
from fxmem.planning.plan import Plan
from fxmem.reports.report import Report
from fxmem.steps.analyze import analyze, unchanged_step
from fxmem.steps.backward import refuse, refuse_double_backward
from fxmem.steps.code import decided_for_code, step_code
from fxmem.steps.options import Options
from fxmem.steps.validity import Validity


@dataclass(frozen=True)
class Program:
    """A captured step, ready to run.  plan and graphs are None where nothing needs a gradient.

    sizes: what it was planned for.  validity: at which other sizes it keeps the budget.  seeded: does
    its forward draw a seed for codes?
    """

    matches: Callable[[dict[str, Any]], bool]
    run: Callable[..., Any]
    plan: Plan | None
    forward_graph: fx.GraphModule | None
    backward_graph: fx.GraphModule | None
    sizes: Sizes = field(default_factory=dict)
    validity: Validity | None = None
    memory: BeforeAfter | None = field(default=None, repr=False)
    seeded: bool = False

    def serves(self, call: StepCall, sizes: Sizes, named: Mapping[str, int]) -> bool:
        """Was the program captured for such a call, and does it keep the budget at its sizes?"""
        if not self.matches(call.locals()):
            return False
        if sizes == self.sizes:
            return True
        return self.validity is not None and self.validity.fits(named)

    @property
    def overhead(self) -> float:
        return self.plan.predicted_overhead if self.plan is not None else 0.0


_MANY = 8
_MANY_PROGRAMS = (
    f"fxmem: the step has been captured and planned {_MANY} times, each time for inputs or "
    "attributes that no earlier plan serves. If a size changes from call to call, name it in "
    "dynamic_shapes; if the model counts its calls in a Python number, use a tensor buffer."
)


@dataclass
class Session:
    """Options and programs; shared by copies of an optimized module, which share nothing else."""

    options: Options
    loss_fn: Callable[..., Any] | None = None
    num_loss_inputs: int = 0
    dynamic: Names = field(default_factory=dict)
    programs: list[Program] = field(default_factory=list)
    lock: threading.RLock = field(default_factory=threading.RLock)

    def program_for(self, call: StepCall) -> Program:
        """The program that serves a call; captured and planned if there is none yet."""
        with _torch.unwatched():
            return self._program_for(call)

    def prepare(self, call: StepCall, bounds: Bounds) -> None:
        """Build now what the sizes within the bounds need, so that no call of them is captured later.

        Raises ``BudgetInfeasibleError`` where the largest sizes do not fit.
        """
        for sizes in corners(sizes_by_name(call, self.dynamic), bounds):
            self.program_for(at_sizes(call, self.dynamic, sizes))

    def _program_for(self, call: StepCall) -> Program:
        sizes, named = sizes_of(call, self.dynamic), sizes_by_name(call, self.dynamic)
        if program := self._known(call, sizes, named):
            return program
        with self.lock:
            if program := self._known(call, sizes, named):
                return program
            # A plan that was given is for the first step; further ones are planned.
            options = replace(self.options, plan=None) if self.programs else self.options
            program = build_program(marked(call, self.dynamic), options, self.dynamic)
            self.programs.append(program)
            if len(self.programs) == _MANY:
                warnings.warn(_MANY_PROGRAMS, stacklevel=4)
            return program

    def _known(self, call: StepCall, sizes: Sizes, named: Mapping[str, int]) -> Program | None:
        """Of the programs that serve a call, the one that adds the least time."""
        serving = (p for p in self.programs if p.serves(call, sizes, named))
        if not self.dynamic:
            return next(serving, None)
        return min(serving, key=lambda p: p.overhead, default=None)

    def __deepcopy__(self, memo: dict[int, Any]) -> Session:
        return self  # programs hold no parameter: the module is an argument of every call


def build_program(call: StepCall, options: Options, names: Names) -> Program:
    """Capture, plan and compile one step."""
    unchanged = unchanged_step(call)
    with capture(call, names) as captured:
        if not any(True for _ in captured.graph.placeholders(Role.TANGENT)):
            return Program(captured.matches, _run_eagerly, None, None, None)
        analysis = analyze(captured.graph, call, unchanged, options.cost, captured.examples)
        here = sizes_by_name(call, names)
        found = decided_for_code(analysis, options, here, memory=True)
        coded, validity = step_code(analysis, options, captured.graph, found, here)
        planned, backward, forward = coded.planned, coded.backward, coded.split.forward
        shown = readable(captured.graph, forward, backward.module)
        run = captured.compile(forward, coded.split.backward, backward, coded.forward)
        sizes = sizes_of(call, names)
        seeded = any(n.target is step_seed for n in forward.graph.nodes)
        return Program(
            captured.matches, run, planned.plan, *shown, sizes, validity, planned.memory, seeded
        )


def _run_eagerly(
    model: nn.Module, loss_fn: Any, args: Any, kwargs: dict[str, Any], loss_inputs: Any
) -> Any:
    """Nothing in this step needs a gradient, so nothing is saved and nothing is to be planned."""
    outputs = model(*args, **kwargs)
    return outputs if loss_fn is None else loss_fn(outputs, *loss_inputs)


class OptimizedModule(fx.GraphModule):
    """A model under a plan.

    It holds the model's own parameters, buffers and submodules, under the same names.  ``graph``
    is the rewritten forward; calls run it through AOTAutograd, which pairs it with
    ``backward_graph``.
    """

    def __init__(self, model: nn.Module, session: Session) -> None:
        super().__init__({}, _empty_graph())
        self.__dict__["_fxmem_model"] = model
        self.__dict__["_fxmem_session"] = session
        self._adopt(model)

    def _adopt(self, model: nn.Module) -> None:
        # The dictionaries themselves are shared: whoever replaces a parameter in one replaces it
        # in both, so the captured code and the user see the same tensors.
        for name in ("_parameters", "_buffers", "_modules", "_non_persistent_buffers_set"):
            self.__dict__[name] = model.__dict__[name]

    @property
    def training(self) -> bool:
        """One mode, the model's: ``opt.eval()`` and ``model.eval()`` are the same."""
        model = self.__dict__.get("_fxmem_model")
        return model is None or model.training

    @training.setter
    def training(self, mode: bool) -> None:
        if "_fxmem_model" in self.__dict__:  # nn.Module sets it before there is a model
            self.__dict__["_fxmem_model"].training = mode

    def recompile(self) -> Any:
        code = super().recompile()
        type(self).forward = OptimizedModule._step
        return code

    # -- Running ---------------------------------------------------------------------------------------

    def _step(self, *args: Any, **kwargs: Any) -> Any:
        call = self._call(args, kwargs)
        if not torch.is_grad_enabled():
            return _run_eagerly(*call.values())
        program = self._session.program_for(call)
        outputs = program.run(*call.values())
        if program.seeded:
            next_step()
        _torch.prepare_backward(outputs, refuse, refuse_double_backward)
        return outputs

    def _call(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> StepCall:
        """With a ``loss_fn``, its inputs come last: ``opt(*inputs, *loss_inputs)`` is the loss."""
        model = self.__dict__["_fxmem_model"]
        session = self._session
        if session.loss_fn is None:
            return StepCall(model, args, kwargs)
        split = len(args) - session.num_loss_inputs
        if split < 0:
            raise FxmemError(
                f"this module computes its loss from {session.num_loss_inputs} further inputs: "
                f"call it with the model's inputs and then those; got {len(args)} in all"
            )
        return StepCall(model, args[:split], kwargs, session.loss_fn, args[split:])

    @property
    def _session(self) -> Session:
        return self.__dict__["_fxmem_session"]

    # -- Looking -----------------------------------------------------------------------------------------

    def _planned_program(self) -> Program:
        for program in self._session.programs:
            if program.plan is not None:
                return program
        raise FxmemError(
            "there is no plan yet: the module is captured at its first call.\n"
            "  try: call it once, or pass example_inputs to optimize"
        )

    @property
    def plan(self) -> Plan:
        """The plan of the first step that was captured."""
        plan = self._planned_program().plan
        assert plan is not None
        return plan

    @property
    def forward_graph(self) -> fx.GraphModule:
        """The forward that runs, with the user's names."""
        graph = self._planned_program().forward_graph
        assert graph is not None
        return graph

    @property
    def backward_graph(self) -> fx.GraphModule:
        """The backward that runs, with the user's names; nodes made again end in ``_recompute``."""
        graph = self._planned_program().backward_graph
        assert graph is not None
        return graph

    def report(self) -> Report:
        """What was decided, why, and what it costs."""
        memory = self._planned_program().memory
        outside = self._session.options.outside.categories
        return Report(
            self.plan, memory=memory, outside=outside, **self.__dict__.get("_fxmem_checked", {})
        )

    # -- Being a module ------------------------------------------------------------------------------------

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            model = self.__dict__.get("_fxmem_model")
            if model is None:
                raise
            return getattr(model, name)

    def __setattr__(self, name: str, value: Any) -> None:
        """What is not a graph module's own is the model's: its forward reads it there."""
        model = self.__dict__.get("_fxmem_model")
        if model is None or name in self.__dict__ or hasattr(type(self), name):
            super().__setattr__(name, value)
        else:
            setattr(model, name, value)

    def __deepcopy__(self, memo: dict[int, Any]) -> OptimizedModule:
        model = copy.deepcopy(self.__dict__["_fxmem_model"], memo)
        return OptimizedModule(model, self._session).show_graph()

    def __reduce__(self) -> Any:
        session = self._session
        return _rebuild, (
            self.__dict__["_fxmem_model"],
            session.options,
            session.loss_fn,
            session.num_loss_inputs,
            session.dynamic,
        )

    def show_graph(self) -> OptimizedModule:
        """Let ``graph`` and ``code`` show the captured forward, once there is one."""
        program = next((p for p in self._session.programs if p.forward_graph is not None), None)
        if program is not None and program.forward_graph is not None:
            self.graph = copy.deepcopy(program.forward_graph.graph)
        return self


def _rebuild(model: nn.Module, options: Options, *rest: Any) -> OptimizedModule:
    """An unpickled module captures its step at the first call."""
    return OptimizedModule(model, Session(options, *rest))


def _empty_graph() -> fx.Graph:
    graph = fx.Graph()
    graph.output(None)
    return graph
