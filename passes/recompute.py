"""Recompute: drop an activation after its last forward use; run its node again in the backward.

before                        after, relu made again before t
  a = relu(h)                   a = relu(h)
  y = mm(a, v)                  y = mm(a, v)             # a dies here
  # backward                    # backward
  at = t(a)                     a_recompute = relu(h)    # h lives until here
  gv = mm(at, gy)               at = t(a_recompute)
                                gv = mm(at, gy)

Seconds: the node's own cost once more, each time.  Error: none, to the bit.
Random nodes are run again from the generator state that their first run started from.
Source: Chen et al. 2016, arXiv:1604.06174.
"""

from __future__ import annotations

import operator
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import fx

from fxmem._torch import run_and_save_rng_state, run_with_rng_state
from fxmem.basics.sizes import storages_in
from fxmem.graphs.fakes import fake_empty_bytes, fake_value
from fxmem.graphs.graph import JointGraph, has_effect, is_backward, is_symbolic_scalar, is_view
from fxmem.graphs.operators import is_random, recomputable_nodes, rng_state_nbytes, second_call
from fxmem.passes.base import insert_like


@dataclass(frozen=True)
class Recompute:
    """Run the forward node ``target`` again right before the backward node ``before``."""

    target: str
    before: str


@dataclass(frozen=True)
class RecomputePass:
    """recomputes: in the order in which they run.

    kept: the forward nodes whose values stay saved; whatever else a backward node reads must have
    been made again before it.  A node may be made again several times: each reader takes the
    latest.
    """

    recomputes: tuple[Recompute, ...]
    kept: frozenset[str]
    name: ClassVar[str] = "recompute"

    def apply(self, graph: JointGraph) -> JointGraph:
        if not self.recomputes:
            return graph
        graph = graph.copy()
        _Rewriter(graph, self).rewrite()
        graph.module.graph.eliminate_dead_code(has_effect)
        return graph.verified()


class _Rewriter:
    """Walks the backward; ``latest`` maps a storage to the node that last made it again."""

    def __init__(self, graph: JointGraph, choice: RecomputePass) -> None:
        self.graph = graph
        self.fx: fx.Graph = graph.module.graph
        self.choice = choice
        self.by_name = {n.name: n for n in self.fx.nodes}
        self.recomputable = recomputable_nodes(graph)
        kept = [self.by_name[name] for name in choice.kept]
        self.available = _storages(kept) | _storages(
            n for n in self.fx.nodes if n.op in ("placeholder", "get_attr")
        )
        self.states: dict[fx.Node, fx.Node] = {}  # random node -> its generator state
        self.calls: dict[fx.Node, Any] = {}  # random node -> how to call it again
        self.again: dict[fx.Node, fx.Node] = {}  # forward node -> its latest twin

    def rewrite(self) -> None:
        for node in self._may_run_again():
            if is_random(node):
                self._save_rng_state(node)
        self.before: dict[str, list[fx.Node]] = defaultdict(list)
        for recompute in self.choice.recomputes:
            self.before[recompute.before].append(self.by_name[recompute.target])
        backward = [n for n in self.fx.nodes if is_backward(n) and n.op == "call_function"]
        self.forward_storages = _storages(n for n in self.fx.nodes if not is_backward(n))
        for node in backward:
            if self._shows_forward_value(node):
                continue
            for target in self.before.get(node.name, ()):
                self._recompute(target, node)
            self._rewire(node, node)
        output = self.fx.output_node()
        split = self.graph.num_forward_outputs
        values = self.graph.outputs()
        forward = values[:split]
        late: Any = fx.node.map_arg(values[split:], lambda n: self._source(n, output))
        output.args = ((*forward, *late),)

    def _may_run_again(self) -> list[fx.Node]:
        """The scheduled nodes, and those that a reader outside the schedule would ask for."""
        found = {self.by_name[r.target] for r in self.choice.recomputes}
        stack = [i for n in self.fx.nodes if is_backward(n) for i in n.all_input_nodes]
        seen: set[fx.Node] = set()
        while stack:
            node = stack.pop()
            if node in seen or is_backward(node) or node.op != "call_function":
                continue
            seen.add(node)
            if self._dropped(node) and (is_view(node) or node in self.recomputable):
                stack += node.all_input_nodes
                if not is_view(node):
                    found.add(node)
        return [n for n in self.fx.nodes if n in found]

    def _rewire(self, node: fx.Node, before: fx.Node) -> None:
        node.args, node.kwargs = fx.node.map_arg(
            (node.args, node.kwargs), lambda n: self._source(n, before)
        )

    def _recompute(self, target: fx.Node, before: fx.Node) -> None:
        """A twin of ``target`` in front of ``before``, and of the tuple accesses behind it."""
        function, args, kwargs = self.calls.get(target) or second_call(target)
        args, kwargs = fx.node.map_arg((args, kwargs), lambda n: self._source(n, before))
        with self.fx.inserting_before(before):
            twin = self._run_again(target, function, args, kwargs)
        self._forget_views_of(target)
        self.again[target] = twin
        for user in list(target.users):
            if _takes_out_of(user, twin) and self._dropped(user):
                self.again[user] = self._twin_view(user, before)

    def _run_again(
        self, target: fx.Node, function: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> fx.Node:
        state = self.states.get(target)
        if state is None:
            return insert_like(
                self.fx, target, function, args, kwargs, suffix="recompute", backward=True
            )
        twin = self.fx.create_node(
            "call_function",
            run_with_rng_state,
            (state, function, *args),
            kwargs,
            name=f"{target.name}_recompute",
        )
        twin.meta = dict(target.meta)
        twin.meta.update(
            val=fake_value(function, args, kwargs),
            partitioner_tag="is_backward",
            fxmem_origin=target.name,
        )
        return twin

    def _source(self, node: fx.Node, before: fx.Node) -> fx.Node:
        """What a reader at ``before`` takes in place of a forward node."""
        if node.op in ("placeholder", "get_attr") or is_symbolic_scalar(node):
            return node
        if is_backward(node) and not self._shows_forward_value(node):
            return node
        if not self._dropped(node):
            return node
        if node in self.again:
            return self.again[node]
        # What a draw returns is taken out of a tuple, too, beside the generator's state.
        if is_view(node) and node not in self.states:
            twin = self._twin_view(node, before)
            if all(i in self.again or not self._dropped(i) for i in node.all_input_nodes):
                self.again[node] = twin
            return twin
        if node not in self.recomputable:
            return node
        return self._on_demand(node, before)

    def _on_demand(self, node: fx.Node, before: fx.Node) -> fx.Node:
        """A twin for a reader that the schedule does not serve.

        The schedule is made for the gradients that are expected to come; readers on the way of
        another gradient get twins of their own, which never run unless that gradient is sent.
        """
        latest = self.again
        self.again = dict(latest)
        try:
            self._recompute(node, before)
            return self.again[node]
        finally:
            self.again = latest

    def _twin_view(self, view: fx.Node, before: fx.Node) -> fx.Node:
        target: Any = view.target
        args, kwargs = fx.node.map_arg((view.args, view.kwargs), lambda n: self._source(n, before))
        with self.fx.inserting_before(before):
            return insert_like(
                self.fx, view, target, args, kwargs, suffix="recompute", backward=True
            )

    def _shows_forward_value(self, node: fx.Node) -> bool:
        """A view in the backward of what the forward made: it moves to where it is read."""
        return is_view(node) and self.forward_storages.issuperset(storages_in(node.meta.get("val")))

    def _dropped(self, node: fx.Node) -> bool:
        """Is one of the node's storages neither kept nor an input's?"""
        return not self.available.issuperset(storages_in(node.meta.get("val")))

    def _forget_views_of(self, target: fx.Node) -> None:
        """Views of an earlier twin show the earlier twin."""
        mine = set(storages_in(target.meta.get("val")))
        for node in [n for n in self.again if is_view(n)]:
            if mine.intersection(storages_in(node.meta.get("val"))):
                del self.again[node]

    def _save_rng_state(self, node: fx.Node) -> None:
        """Let the first run of a random node return the generator state that it started from."""
        value = node.meta["val"]
        state_value = fake_empty_bytes(node, rng_state_nbytes(node))
        call = second_call(node)
        with self.fx.inserting_before(node):
            both = self._first_run(node, run_and_save_rng_state, (node.target, *node.args), "run")
            state = self._first_run(node, operator.getitem, (both, 0), "state")
            result = self._first_run(node, operator.getitem, (both, 1), "result")
        both.kwargs = dict(node.kwargs)
        both.meta["val"], state.meta["val"] = (state_value, value), state_value
        node.replace_all_uses_with(result, propagate_meta=False)
        self.fx.erase_node(node)
        self.by_name[node.name] = result
        self.states[result], self.calls[result] = state, call
        self.recomputable.add(result)

    def _first_run(self, node: fx.Node, target: Any, args: tuple[Any, ...], what: str) -> fx.Node:
        new = self.fx.create_node("call_function", target, args, name=f"{node.name}_{what}")
        new.meta = dict(node.meta, fxmem_origin=node.name)
        return new


def _takes_out_of(user: fx.Node, twin: fx.Node) -> bool:
    """Is ``user`` a tuple access that the twin's result can serve, too?

    The second run of a batch norm returns no updated statistics, so its tuple is shorter.
    """
    if user.target is not operator.getitem or is_backward(user):
        return False
    return int(user.args[1]) < len(twin.meta["val"])  # type: ignore[arg-type]


def _storages(nodes: Iterable[fx.Node]) -> set[int]:
    return {key for node in nodes for key in storages_in(node.meta.get("val"))}


def made_again(graph: JointGraph) -> Iterable[fx.Node]:
    """The nodes that a rewritten graph runs a second time."""
    return [n for n in graph.nodes if is_backward(n) and "fxmem_origin" in n.meta]
