"""Batch normalization on CUDA by cuDNN's kernels, which eager runs and tracing replaces.

before                                          after
  n = _native_batch_norm_legit_functional(x, ..)  n = cudnn_batch_norm(x, ...)
  y, mean, var, new_mean, new_var = n             y, mean, var, reserve, new_mean, new_var = n
  # backward                                      # backward
  d = native_batch_norm_backward(g, x, ...)       d = cudnn_batch_norm_backward(g, x, ..., reserve)

Error: none against eager; torch's own kernel sums in another order.  Seconds: eager's.
"""

from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import fx

from fxmem._torch import cudnn_normalizes
from fxmem.graphs.batch_norm import cudnn_batch_norm, cudnn_batch_norm_backward
from fxmem.graphs.fakes import refresh, views_below
from fxmem.graphs.graph import JointGraph
from fxmem.passes.base import insert_like

aten = torch.ops.aten

_PLACES = {0: 0, 1: 1, 2: 2, 3: 4, 4: 5}
"""Of the results, aten's -> ours, which has the reserve before the running statistics."""


@dataclass(frozen=True)
class CudnnBatchNormPass:
    name: ClassVar[str] = "cudnn_batch_norm"

    def apply(self, graph: JointGraph) -> JointGraph:
        graph = graph.copy()
        for node in graph.nodes:
            if _is_cudnns(node):
                _replace(graph.module.graph, node)
        return graph.verified()


def _is_cudnns(node: fx.Node) -> bool:
    if node.target is not aten._native_batch_norm_legit_functional.default:
        return False
    x, *statistics, training, _, eps = node.args
    if training is not True or not all(isinstance(s, fx.Node) for s in statistics):
        return False
    values = [s.meta["val"] for s in statistics]  # type: ignore[union-attr]
    return cudnn_normalizes(x.meta["val"], values, eps)  # type: ignore[union-attr,arg-type]


def _replace(graph: fx.Graph, node: fx.Node) -> None:
    x, weight, bias, mean, var, _, momentum, eps = node.args
    with graph.inserting_before(node):
        args = (x, weight, bias, mean, var, momentum, eps)
        ours = insert_like(graph, node, cudnn_batch_norm, args, suffix="cudnn", backward=False)
    saved = []
    for result in list(node.users):
        place: Any = result.args[1]
        saved += [result] if place in (1, 2) else []
        _take(result, ours, _PLACES[place])
    graph.erase_node(node)
    for backward in {user: None for result in saved for user in result.users}:
        if backward.target is aten.native_batch_norm_backward.default:
            _replace_backward(graph, backward, ours)


def _replace_backward(graph: fx.Graph, node: fx.Node, forward: fx.Node) -> None:
    grad, x, weight, _, _, mean, var, _, eps, _ = node.args
    with graph.inserting_after(forward):
        reserve = insert_like(
            graph, forward, operator.getitem, (forward, 3), suffix="reserve", backward=False
        )
    with graph.inserting_before(node):
        args = (grad, x, weight, mean, var, reserve, eps)
        ours = insert_like(
            graph, node, cudnn_batch_norm_backward, args, suffix="cudnn", backward=True
        )
    for result in list(node.users):
        _take(result, ours, result.args[1])
    graph.erase_node(node)


def _take(result: fx.Node, source: fx.Node, place: Any) -> None:
    """Let the node that took a result out of aten's tuple take it out of ours."""
    views = views_below(result)
    result.args = (source, place)
    result.meta["val"] = source.meta["val"][place]
    refresh(views)
