"""``torch.compile(model, backend="fxmem", options={"budget": "20GiB"})``: the same plans, another door.

Dynamo hands over one graph at a time, and AOTAutograd, on the way to its two halves, the joint graph that
``optimize`` would have captured.  From there on the pipeline is the same.  A model that Dynamo cuts into
several graphs runs its first step with the smallest plans, but for what fits into a quarter of the budget,
because nobody knows yet what follows; from the second step on all its graphs share the budget
(``fxmem.planning.ledger``).
"""

from __future__ import annotations

import copy
import difflib
import inspect
import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from torch import fx, nn

from fxmem import _torch
from fxmem.analysis.shards import gathered, with_parallelism
from fxmem.api import options_of
from fxmem.backend.graph import Graph
from fxmem.backend.session import Session
from fxmem.basics.errors import FxmemError
from fxmem.basics.units import shown
from fxmem.planning.plan import Plan
from fxmem.steps.options import Options


def fxmem(
    module: fx.GraphModule,
    example_inputs: Sequence[Any],
    *,
    options: Mapping[str, Any] | None = None,
    mode: str | None = None,
) -> Callable[..., Any]:
    """The backend.  options: ``optimize``'s keywords, the budget among them.

    What it raises on purpose, it raises when the graph is called, so that it is not wrapped in an error of
    Dynamo's: ``BudgetError``, ``BudgetInfeasibleError``, ``CaptureError``, ``CompileError``,
    ``PlanMismatchError``.
    """
    try:
        session = _session(options, mode, example_inputs)
        graph = Graph(module, list(example_inputs), session)
    except FxmemError as error:
        return _raising(error)
    return _torch.not_traced(graph.run)


def _raising(error: FxmemError) -> Callable[..., Any]:
    """A graph that cannot be; each call raises a copy, since an error holds what its callers hold."""
    bare = copy.copy(error)

    def run(*_: Any) -> Any:
        raise copy.copy(bare)

    return _torch.not_traced(run)


def plans(compiled: nn.Module | Callable[..., Any]) -> list[Plan]:
    """The plans of what was compiled with this backend, in the order they were made.

    One for each graph that trains; of a function, all that were made with its dictionary of options.
    Raises ``FxmemError`` if there is none yet.
    """
    if isinstance(compiled, nn.Module):
        states = (*compiled.parameters(), *compiled.buffers())
        mine = {id(tensor) for tensor in (*states, *gathered(states))}
        # The module may be compiled in other ways, too.
        options = _torch.options_of_compiled(compiled.forward)
        one = None if options is None else _sessions.get(id(options))
        sessions = list(_sessions.values()) if one is None else [one]
        living = [graph for session in sessions for graph in session.living()]
        graphs = [graph for graph in living if graph.reads(mine)]
    else:
        options = _torch.options_of_compiled(compiled)
        if options is None:
            raise FxmemError(
                f'plans takes what torch.compile(..., backend="fxmem", options=...) returned, '
                f"not {shown(compiled)}\n  try: the compiled module or function itself"
            )
        session = _sessions.get(id(options))
        graphs = [] if session is None else session.living()
    every = [(*graph.programs.values(), *graph.checkpointed.values()) for graph in graphs]
    programs = [program for some in every for program in some if program is not None]
    found = [(p.number, p.plan) for p in programs if not p.provisional]
    if not found:
        raise FxmemError(
            "there is no plan yet: torch.compile captures a module at its first call, and one that it "
            "cuts into several graphs is planned at the second.\n"
            '  try: call it on a batch before; and check that it was compiled with backend="fxmem", and '
            "that Dynamo does not skip it, as it does with a function that breaks in a loop and with "
            "nn.LSTM: fullgraph=True says why, and blocks can be compiled one by one"
            + (_OF_TORCH if type(compiled).__module__.startswith("torch.nn.") else "")
        )
    return [plan for _, plan in sorted(found, key=lambda pair: pair[0])]


_OF_TORCH = (
    "; of a class of torch.nn's own, Sequential for one, module.compile() compiles nothing: use "
    "torch.compile(module), or a class of yours around it"
)


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
    found = options_of(**{"compiler": None, **given})
    if "quantize" in found.allow:
        raise FxmemError(
            'allow="quantize" is not for the backend: it measures the noise of your gradients on a batch '
            "before it compiles\n  try: fxmem.optimize(model, budget, batch, allow=...)"
        )
    return found


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
