"""How much noise that travels upstream adds to gradients: a run of the step, differentiated.

Noise in an operand of a product whose result goes on reaches every gradient upstream.  To first order
gradients are linear in it, and the variance that a code of a tensor x adds is

    V = sum over elements of  (expected squared error of the element) * ||its column||^2

as for noise that stays, but a column is now all that a change of the element changes in all gradients.
For signs r at random, one for each element of the gradients g, the expected square of the derivative of
r.g by the element is that norm (Hutchinson 1990, doi:10.1080/03610919008812866).  So one differentiation
of the backward estimates it for all tensors and all encodings at once, and no tensor needs runs of its own.
"""

from __future__ import annotations

import logging
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._pytree import tree_map_only

from fxmem._torch import fake_tensors_off
from fxmem.basics.sizes import tensors_in
from fxmem.codes.gradient_noise import (
    Sensitivity,
    Variances,
    again,
    encodings_of,
    given,
    in_double,
    parameter_gradients,
)
from fxmem.codes.seeds import step_seed
from fxmem.graphs.activations import ACTIVATIONS
from fxmem.graphs.consumers import Reader, Saved
from fxmem.graphs.graph import JointGraph, is_backward
from fxmem.graphs.untouched import copies, untouched

log = logging.getLogger(__name__)

PROBES = 4
"""Directions, each of which takes one more backward than the run itself."""

ALL = ""
"""Where variances are by parameter: of all gradients, where it is not known of which."""


def sensitivities(
    graph: JointGraph, examples: Mapping[str, Any], model: nn.Module, saved: Sequence[Saved]
) -> tuple[Sensitivity, ...]:
    """What each encoding of these values adds to the variance of all gradients.

    graph: of the step, without codes.  None where an operator's derivative is not known.
    """
    with fake_tensors_off(), untouched(model, copies(model)):
        run = _Differentiated(graph, saved)
        try:
            columns = run.squared_columns(examples)
        except (RuntimeError, NotImplementedError) as error:
            log.info("noise that travels is not known: %s", str(error).splitlines()[0])
            return ()
        found = []
        for s in saved:
            x, squares = run.values[s.node.name], columns[s.node.name]
            variances = {
                e.name: {ALL: float((e.variance(x) * squares).sum(dtype=torch.float64))}
                for e in encodings_of(s)
            }
            found.append(Sensitivity(s.node.name, s.use, variances))
        return tuple(found)


class _Differentiated(fx.Interpreter):
    """Runs the step so that its gradients have derivatives by what readers of saved values read."""

    def __init__(self, graph: JointGraph, saved: Sequence[Saved]) -> None:
        super().__init__(graph.module)
        self.joint = graph
        self.values: dict[str, torch.Tensor] = {}
        self.leaves: dict[str, torch.Tensor] = {}
        self.sources = {s.node.name: s for s in saved}
        self.read: dict[str, list[tuple[str, Reader]]] = defaultdict(list)
        for s in saved:
            for reader in s.readers:
                self.read[reader.node.name].append((s.node.name, reader))

    def squared_columns(self, examples: Mapping[str, Any]) -> dict[str, torch.Tensor]:
        """For each saved value, an estimate of what ``columns`` are in this file's first lines."""
        constants = tree_map_only(torch.Tensor, torch.Tensor.detach, given(self.joint, examples))
        results = self.run(*constants, enable_io_processing=False)
        gradients = parameter_gradients(self.joint, results)
        noisy = [g for g in gradients.values() if g.requires_grad]
        found = {name: torch.zeros_like(x, dtype=torch.float32) for name, x in self.leaves.items()}
        for seed in range(PROBES if noisy else 0):
            directions = [_signs(g, seed, n) for n, g in enumerate(noisy)]
            columns = torch.autograd.grad(
                noisy, list(self.leaves.values()), directions, retain_graph=True, allow_unused=True
            )
            for name, column in zip(self.leaves, columns, strict=True):
                if column is not None:
                    found[name] += column.float().square() / PROBES
        return found

    def run_node(self, node: fx.Node) -> Any:
        with torch.set_grad_enabled(is_backward(node)):
            multiplies = any(reader.activation for _, reader in self.read.get(node.name, ()))
            result = self._multiplied(node) if multiplies else super().run_node(node)
        if _is_attention(node.target) and any(t.requires_grad for t in tensors_in(result)):
            shapes = node.meta["val"]
            result = tuple(_laid_out(t, like) for t, like in zip(result, shapes, strict=False))
        if node.name in self.sources:
            self.values[node.name] = result
            self.leaves[node.name] = self._leaf(result, self.sources[node.name]).requires_grad_()
        return result

    def _leaf(self, x: torch.Tensor, saved: Saved) -> torch.Tensor:
        """What the backward is linear in: the value, or an activation's derivative there."""
        if saved.activation is None:
            return x.detach()
        return ACTIVATIONS[saved.activation].derivative(x.float())

    def _multiplied(self, node: fx.Node) -> torch.Tensor:
        """An activation's backward, of the derivative in the place of what it is computed from."""
        (grad, derivative, *_), _ = self.fetch_args_kwargs_from_env(node)
        found: torch.Tensor = torch.mul(grad, derivative).to(grad.dtype)
        return found

    def fetch_args_kwargs_from_env(self, node: fx.Node) -> Any:
        """Readers of saved values read the leaves in their place."""
        mine = self.read.get(node.name)
        if not mine:
            return super().fetch_args_kwargs_from_env(node)
        seen = {}
        for name, reader in mine:
            leaf, operand = self.leaves[name], name
            for view in reader.views:
                with torch.enable_grad():
                    leaf, operand = again(view, leaf), view.name
            seen[operand] = leaf
        known = {n: seen.get(n.name, self.env[n]) for n in node.all_input_nodes}
        return fx.node.map_arg((node.args, dict(node.kwargs)), lambda n: known[n])

    def call_function(self, target: Any, args: Any, kwargs: Any) -> Any:
        differentiated = torch.is_grad_enabled() and any(
            t.requires_grad for t in tensors_in((args, kwargs))
        )
        if not differentiated or not isinstance(target, torch._ops.OpOverload):
            return super().call_function(target, args, kwargs)
        if target.namespace != "aten":
            raise NotImplementedError(f"the derivative of {target}")
        if target is torch.ops.aten.silu_backward.default:
            grad, x = args
            return grad * target(torch.ones_like(x), x.detach())
        if _is_attention(target):
            return _attention_backward(target, args, kwargs)
        return super().call_function(target, args, kwargs)


def _signs(like: torch.Tensor, seed: int, n: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1000 * seed + n)
    parts = torch.view_as_real(like.resolve_conj()) if like.is_complex() else like
    signs = torch.randint(2, parts.shape, generator=generator, dtype=torch.int8) * 2 - 1
    return torch.view_as_complex(signs.to(parts)) if like.is_complex() else signs.to(like)


def _is_attention(target: Any) -> bool:
    return isinstance(target, torch._ops.OpOverload) and "dot_product" in target._schema.name


def _laid_out(x: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """With its dimensions in memory in the order of another tensor's."""
    strides = like.stride()
    order = sorted(range(x.ndim), key=lambda d: (-strides[d], d))
    return x.permute(order).contiguous().permute([order.index(d) for d in range(x.ndim)])


def _attention_backward(target: Any, args: Any, kwargs: Any) -> tuple[torch.Tensor, ...]:
    """By operators that have derivatives."""
    names = (a.name for a in target._schema.arguments)
    all_given = {**dict(zip(names, args, strict=False)), **kwargs}
    if all_given.get("dropout_p"):
        raise NotImplementedError("the derivative of attention with dropout")
    q, k, v = (all_given[name].detach().requires_grad_() for name in ("query", "key", "value"))
    mask = all_given.get("attn_mask", all_given.get("attn_bias"))
    with sdpa_kernel(SDPBackend.MATH):
        out = F.scaled_dot_product_attention(
            q,
            k,
            v,
            attn_mask=None if mask is None else mask.detach(),
            is_causal=all_given["is_causal"],
            scale=all_given.get("scale"),
        )
    grad = all_given.get("grad_out", all_given.get("grad_out_"))
    return torch.autograd.grad(out, (q, k, v), grad, create_graph=True)


# -- Drawn -------------------------------------------------------------------------------------------

DRAWS = 2
"""Steps with the codes of a plan, each of which takes one backward."""


class Draws:
    """Gradients of steps with codes, beside those of the step without, for one state of the generator.

    backwards: that it took so far.
    """

    def __init__(self, exact: JointGraph, examples: Mapping[str, Any], model: nn.Module) -> None:
        self.examples, self.model, self.backwards = examples, model, 0
        self.state = torch.get_rng_state()
        self.right = self._gradients(exact)

    def distances(self, coded: JointGraph, draws: int = DRAWS) -> dict[str, float]:
        """Parameter -> the mean squared distance of its gradient with codes from the one without."""
        found: Variances = defaultdict(float)
        for seed in range(draws):
            for name, gradient in self._gradients(coded, seed).items():
                with fake_tensors_off():
                    error = in_double(gradient) - in_double(self.right[name])
                    found[name] += float(error.square().sum()) / draws
        return dict(found)

    def _gradients(self, graph: JointGraph, seed: int = 0) -> dict[str, torch.Tensor]:
        self.backwards += 1
        with fake_tensors_off(), torch.no_grad(), untouched(self.model, copies(self.model)):
            torch.set_rng_state(self.state)
            run = _Seeded(graph.module, seed)
            results = run.run(*given(graph, self.examples), enable_io_processing=False)
            return parameter_gradients(graph, results)


class _Seeded(fx.Interpreter):
    """Runs a step by a seed of ours, which the generator has no part in."""

    def __init__(self, module: fx.GraphModule, seed: int) -> None:
        super().__init__(module)
        self.seed = seed

    def call_function(self, target: Any, args: Any, kwargs: Any) -> Any:
        if target is step_seed:
            return torch.tensor(self.seed)
        return super().call_function(target, args, kwargs)
