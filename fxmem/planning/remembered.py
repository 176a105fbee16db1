"""Searches for plans, remembered: steps that are the same in numbers are searched once.

So are the equal blocks of a model that is compiled in several graphs, a step that is planned again for
what follows it, and a model that somebody tries at several budgets.
"""

from __future__ import annotations

from dataclasses import fields
from functools import cached_property, lru_cache
from typing import Any, cast

from torch import fx

from fxmem.analysis.dataflow import Dataflow, Operator, Value
from fxmem.planning.planner import Choice, Planner

_MANY = 16
"""Steps that are remembered."""

_NO_NUMBERS = ("node", "storage")


def _numbers(kind: type) -> tuple[str, ...]:
    return tuple(field.name for field in fields(kind) if field.name not in _NO_NUMBERS)


_OF_OPERATORS, _OF_VALUES = _numbers(Operator), _numbers(Value)

_NO_NODE = cast(fx.Node, None)
"""Of what is remembered: the planner looks at numbers alone, and a node would keep its graph alive."""

Rows = tuple[tuple[Any, ...], ...]


class RememberingPlanner(Planner):
    """A planner whose searches are those of the first one that was asked with the same numbers.

    What it finds is the same: nothing that a planner finds depends on what it was asked before.
    """

    def fit(self, budget: int) -> Choice | None:
        return self._first.fit(budget)

    def smallest(self) -> Choice:
        return self._first.smallest()

    @cached_property
    def _first(self) -> Planner:
        flow = self.flow
        return _planner(
            _rows(flow.operators, _OF_OPERATORS),
            _rows(flow.values, _OF_VALUES),
            (flow.num_forward, flow.waiting, flow.loss_outside),
            self.must_keep,
            self.must_remake,
            self.solver.limit,
        )


def forget() -> None:
    """Search anew from here on, as measurements of planning time must."""
    _planner.cache_clear()


@lru_cache(_MANY)
def _planner(
    operators: Rows,
    values: Rows,
    rest: tuple[int, float, int],
    must_keep: frozenset[int],
    must_remake: frozenset[int],
    limit: int,
) -> Planner:
    flow = Dataflow(
        [Operator(_NO_NODE, **dict(zip(_OF_OPERATORS, row, strict=True))) for row in operators],
        [Value(node=_NO_NODE, **dict(zip(_OF_VALUES, row, strict=True))) for row in values],
        *rest,
    )
    return Planner(flow, must_keep, must_remake, limit)


def _rows(items: list[Any], names: tuple[str, ...]) -> Rows:
    return tuple(tuple(getattr(item, name) for name in names) for item in items)
