"""A graph of Dynamo's as it runs by one plan."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from fxmem import _torch
from fxmem.backend.twins import renamed
from fxmem.basics.sizes import evaluate
from fxmem.planning.ledger import Around, Part
from fxmem.planning.plan import Plan
from fxmem.planning.whole_step import in_step
from fxmem.reports.report import Report
from fxmem.steps.backward import Phases
from fxmem.steps.decisions import peak_point
from fxmem.steps.pipeline import Planned
from fxmem.steps.validity import Validity

if TYPE_CHECKING:
    from fxmem.backend.graph import Graph

log = logging.getLogger("fxmem.backend")


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
        plan = with_between(self.planned, self.phases, between)
        plan = renamed(in_step(plan, needed, budget), self.said)
        program = replace(self, around=needed, plan=plan)
        tell(program.graph, program.plan)
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


def tell(number: int, plan: Plan) -> None:
    """Log a plan that is there to stay, and put it into torch's structured trace."""
    if log.isEnabledFor(logging.INFO):
        log.info("the plan of graph %d\n%s", number, Report(plan))
    _torch.trace_artifact(f"fxmem_plan_{number}", lambda: json.dumps(plan.to_dict(), indent=1))


def with_between(planned: Planned, phases: Phases | None, between: int) -> Plan:
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
