"""Regions that are compiled by themselves (``nested_compile_region``), put in place of their calls.

Such a region is one graph for all its calls.  A plan decides for each call by itself what is saved of
it, so the calls have to be operators of the graph around them like all others.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import fx

from fxmem._torch import dynamo_graph_copy

_CALL = torch.ops.higher_order.invoke_subgraph


def without_regions(module: fx.GraphModule) -> fx.GraphModule:
    """The graph with its regions inlined, also where they are within others or within what a higher-order
    operator runs; itself where there are none.
    """
    inner = {name: without_regions(child) for name, child in _graphs_in(module)}
    calls = module.graph.find_nodes(op="call_function", target=_CALL)
    if not calls and all(child is getattr(module, name) for name, child in inner.items()):
        return module
    flat = fx.GraphModule(module, dynamo_graph_copy(module.graph))
    for name, child in inner.items():
        setattr(flat, name, child)
    first: dict[Any, str] = {}  # identifier -> path of the module whose call was traced
    for call in flat.graph.find_nodes(op="call_function", target=_CALL):
        region, identifier, *_ = cast("tuple[Any, ...]", call.args)
        here = _path(call)
        _inline(
            flat.graph, call, getattr(flat, region.target), first.setdefault(identifier, here), here
        )
    flat.delete_all_unused_submodules()
    flat.graph.lint()
    flat.recompile()
    return flat


def _graphs_in(module: fx.GraphModule) -> list[tuple[str, fx.GraphModule]]:
    return [(n, child) for n, child in module.named_children() if isinstance(child, fx.GraphModule)]


def _inline(graph: fx.Graph, call: fx.Node, region: fx.GraphModule, traced: str, here: str) -> None:
    """Put a region's operators in place of a call of it.

    traced: path of the module whose call was traced.  here: of the one that is called.
    """
    code, _, *operands = cast("tuple[Any, ...]", call.args)
    inputs = region.graph.find_nodes(op="placeholder")
    env: dict[fx.Node, Any] = dict(zip(inputs, operands, strict=True))
    with graph.inserting_before(call):
        for node in region.graph.nodes:
            if node.op in ("placeholder", "output"):
                continue
            new = env[node] = graph.node_copy(node, env.__getitem__)
            if node.op == "get_attr":
                new.target = f"{code.target}.{node.target}"
            if "nn_module_stack" in node.meta:
                new.meta["nn_module_stack"] = _moved(node.meta["nn_module_stack"], traced, here)
    results: Any = fx.map_arg(region.graph.output_node().args[0], env.__getitem__)
    for user in list(call.users):  # each takes one of the results
        user.replace_all_uses_with(results[cast(int, user.args[1])])
        graph.erase_node(user)
    graph.erase_node(call)
    if not code.users:
        graph.erase_node(code)


def _path(call: fx.Node) -> str:
    """Of the innermost module that calls a region."""
    stack = list(call.meta.get("nn_module_stack", {}).values())
    return str(stack[-1][0]) if stack else ""


def _moved(stack: dict[str, Any], traced: str, here: str) -> dict[str, Any]:
    """Modules around an operator, named as in the call that it is now part of."""
    return {
        key: (here + path[len(traced) :] if traced and path.startswith(traced) else path, kind)
        for key, (path, kind) in stack.items()
    }
