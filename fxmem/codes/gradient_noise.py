"""How much noise codes add to gradients, and how much the minibatch adds anyway: both as variances.

The gradient of a weight is linear in what its product reads: each element x of a saved tensor enters it
times a column of numbers that the upstream gradient G gives.  If the errors of the elements are
independent and have mean zero, the variance that a code adds is

    V = sum over elements of  (expected squared error of the element) * ||its column||^2

exactly; for a product of a matrix with G, ||its column||^2 is ||G_t||^2, t the element's row.  One run of
the joint graph on the user's batch gives this for all tensors and all encodings at once.

The gradient's own variance comes from the same step on parts of the batch, or on other batches.
Source of the formula's form: Chen et al. 2021, arXiv:2104.14129, with equality in place of a bound.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import fx
from torch.utils import _pytree as pytree

from fxmem._torch import autocast_off, fake_tensors_off, is_fake
from fxmem.basics.errors import FxmemError
from fxmem.basics.sizes import hint, is_dense, tensors_in
from fxmem.codes.lossless import ELEMENTS
from fxmem.codes.lossy import DERIVATIVES, LossyEncoding, encodings
from fxmem.graphs.capture import StepCall, training_step
from fxmem.graphs.consumers import CASTS, Product, Saved, Use, saved_values
from fxmem.graphs.graph import JointGraph, Role, is_backward
from fxmem.graphs.untouched import copies, untouched
from fxmem.graphs.workspace import LAYOUT

aten = torch.ops.aten

MOST_PARTS = 8
"""Of a batch, each of which takes one backward."""

MOST_BATCHES = 8
"""That are looked at if more are given."""

Variances = dict[str, float]
"""Parameter -> variance of its gradient, summed over its elements."""


@dataclass(frozen=True)
class Noise:
    """What the ``noise`` argument may be in place of its ceiling.

    ceiling: variance that codes may add to the gradient, as a share of the minibatch's own: what is
    predicted of a plan is at most that, and what two draws of it show at most a quarter more.
    batches: more arguments like the example's, ``(*inputs, *loss_inputs)`` each, to find the latter
    from; without them the example is cut into parts along its first dimension.  bounded: how far codes
    whose mean gradients do not keep may move the gradient of any group of parameters, as a share of its
    length; at 0 none are taken.
    """

    ceiling: float = 0.01
    batches: tuple[tuple[Any, ...], ...] = ()
    bounded: float = 0.0


@dataclass(frozen=True)
class Sensitivity:
    """What each encoding of one saved value adds to the gradients' variances, by the encoding's name."""

    source: str
    use: Use
    variances: dict[str, Variances] = field(repr=False)

    def variance(self, encoding: str) -> float:
        return sum(self.variances[encoding].values())


@dataclass(frozen=True)
class Statistics:
    """minibatch: the gradients' own variances.  backwards: how many it took to find all of this.

    squares: of the lengths of the example's gradients.
    """

    minibatch: Variances
    sensitivities: tuple[Sensitivity, ...]
    backwards: int
    squares: Variances = field(default_factory=dict)

    @property
    def variance(self) -> float:
        """The minibatch's, of all gradients."""
        return sum(self.minibatch.values())

    def share(self, variance: float) -> float:
        """A variance as a share of the minibatch's."""
        if variance == 0:
            return 0.0
        return variance / self.variance if self.variance else math.inf


LEAST = 4096
"""Elements below which a tensor is not worth two more operators."""


def candidates(graph: JointGraph) -> list[Saved]:
    """Saved values of floats whose noise goes where it is known what it does."""
    return [s for s in saved_values(graph) if s.use <= Use.SMOOTH and _is_worth_it(s.node)]


def encodings_of(saved: Saved) -> list[LossyEncoding]:
    """Those that leave the mean of the gradients alone; where none does, those of 8 bits and more."""
    dtype = saved.node.meta["val"].dtype
    known = DERIVATIVES[saved.activation] if saved.activation else encodings()
    fine = saved.use is Use.SMOOTH
    return [e for e in known if dtype in e.dtypes and (_is_fine(e) if fine else e.unbiased)]


def _is_fine(encoding: LossyEncoding) -> bool:
    """Has it a byte for each element?"""
    return bool(encoding.nbytes.subs(ELEMENTS, LEAST) >= LEAST)


def _is_worth_it(node: fx.Node) -> bool:
    """Floats in one piece of memory whose size is known, and which operators lay out in one way."""
    value = node.meta["val"]
    if not value.is_floating_point() or LAYOUT in node.meta:
        return False
    return is_dense(value) and hint(value.numel()) >= LEAST


def statistics(
    graph: JointGraph,
    examples: Mapping[str, torch.Tensor],
    call: StepCall,
    noise: Noise,
    saved: Sequence[Saved],
) -> Statistics:
    """Run the step on the user's batch and on parts of it.

    graph: of the step, for the tangents that come.  examples: its inputs' values, by placeholder.
    saved: linear ones.  Raises ``FxmemError`` where there is nothing to compute with.
    """
    check_measurable(graph, examples, call, noise)
    with fake_tensors_off(), untouched(call.model, copies(call.model)):
        run = _Recorder(graph, saved)
        full = run.gradients(examples)
        minibatch, backwards = _minibatch(call, noise, full)
        squares = {name: float(in_double(g).square().sum()) for name, g in full.items()}
    return Statistics(minibatch, tuple(run.sensitivities()), backwards + 1, squares)


def check_measurable(
    graph: JointGraph, examples: Mapping[str, Any], call: StepCall, noise: Noise
) -> None:
    """Raise ``FxmemError`` where there is nothing to compute gradients, or their variance, with."""
    tensors = [t for t in examples.values() if isinstance(t, torch.Tensor)]
    if any(is_fake(t) or t.device.type == "meta" for t in tensors):
        raise FxmemError(
            'allow="quantize" measures gradients on your batch, so it needs real parameters and '
            "example inputs, not ones on the meta device or fake ones\n"
            "  try: the model and a batch of data on the device that trains, or plan without "
            '"quantize"'
        )
    tangents = [n for n in graph.placeholders(Role.TANGENT) if n.users]
    if len(tangents) != 1 or tangents[0].meta["val"].ndim != 0:
        raise FxmemError(
            'allow="quantize" compares the noise that it adds with that of your gradients, so it '
            "needs the loss\n  try: loss_fn=..., loss_inputs=(...), or a model that returns its loss"
        )
    if not any(p.requires_grad for p in call.model.parameters()):
        raise FxmemError(
            'allow="quantize" compares the noise that it adds with that of the parameters\' gradients, '
            'and no parameter of this model trains\n  try: plan without "quantize"'
        )
    with fake_tensors_off():
        _others(call, noise) if noise.batches else _parts(call)


def given(graph: JointGraph, examples: Mapping[str, Any]) -> list[Any]:
    """What a run of the step takes: the examples and their sizes, and one for the gradient of the loss."""
    return [_given(node, examples) for node in graph.placeholders()]


def _given(node: fx.Node, examples: Mapping[str, Any]) -> Any:
    value = node.meta["val"]
    if not isinstance(value, torch.Tensor):
        return hint(value)
    if is_backward(node):
        return torch.ones((), dtype=value.dtype, device=value.device)
    return examples[node.name]


def parameter_gradients(graph: JointGraph, results: Sequence[Any]) -> dict[str, torch.Tensor]:
    """Of what a run of the step returns."""
    leaves = [graph.inputs[n.name] for n in graph.leaves()]
    late = results[graph.num_forward_outputs :][: len(leaves)]
    return {
        leaf.name: gradient
        for leaf, gradient in zip(leaves, late, strict=True)
        if gradient is not None and leaf.keeps_gradient
    }


def in_double(gradient: torch.Tensor) -> torch.Tensor:
    """In float64; of a complex one, both parts."""
    parts = torch.view_as_real(gradient.resolve_conj()) if gradient.is_complex() else gradient
    return parts.to(torch.float64)


# -- What codes add -----------------------------------------------------------------------------------


class _Recorder(fx.Interpreter):
    """Runs the step, and at each product looks at what codes of its operand would do to it."""

    def __init__(self, graph: JointGraph, saved: Iterable[Saved]) -> None:
        super().__init__(graph.module)
        self.joint = graph
        known = {node.name for node in graph.nodes}
        self.sources: dict[str, Saved] = {s.node.name: s for s in saved}
        self.values: dict[str, torch.Tensor] = {}
        self.products: dict[str, list[tuple[str, Product]]] = defaultdict(list)
        self.waiting: dict[str, int] = defaultdict(int)
        for name, s in self.sources.items():
            for reader in s.readers:
                for product in reader.products:
                    if product.node.name in known:
                        self.products[product.node.name].append((name, product))
                        self.waiting[name] += 1
        self.found: dict[str, dict[str, Variances]] = {
            name: {e.name: defaultdict(float) for e in encodings_of(s)}
            for name, s in self.sources.items()
        }

    def sensitivities(self) -> Iterator[Sensitivity]:
        for name, s in self.sources.items():
            variances = {e: dict(found) for e, found in self.found[name].items()}
            yield Sensitivity(name, s.use, variances)

    def gradients(self, examples: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """The gradients of the parameters."""
        with torch.no_grad():
            results = self.run(*given(self.joint, examples), enable_io_processing=False)
        return parameter_gradients(self.joint, results)

    def run_node(self, node: fx.Node) -> Any:
        for name, product in self.products.get(node.name, ()):
            self._look(name, product, node)
            self.waiting[name] -= 1
            if not self.waiting[name]:
                del self.values[name]
        result = super().run_node(node)
        if node.name in self.sources and self.waiting[node.name]:
            self.values[node.name] = result
        return result

    def _look(self, name: str, product: Product, node: fx.Node) -> None:
        x = self.values[name]
        columns = self._squared_columns(x, product, node)
        for encoding in encodings():
            if encoding.name in self.found[name]:
                variance = float((encoding.variance(x) * columns).sum(dtype=torch.float64))
                for parameter in product.parameters:
                    self.found[name][encoding.name][parameter] += variance

    def _squared_columns(self, x: torch.Tensor, product: Product, node: fx.Node) -> torch.Tensor:
        """For each element of ``x``, the squared norm of what a change of it changes in the result.

        The product with all other operands squared sums the squares; its derivative tells them apart.
        """
        others = [
            self.env[n] if n.name != product.operand.name else None for n in node.all_input_nodes
        ]
        with torch.enable_grad():
            leaf = torch.zeros_like(x, dtype=_wide(x.dtype)).requires_grad_()
            seen: Any = leaf
            for step in product.path:
                seen = seen if step.target in CASTS else again(step, seen)
            given = iter([seen if o is None else _squared(o) for o in others])
            values = dict(zip(node.all_input_nodes, given, strict=True))
            args = list(fx.node.map_arg(tuple(node.args), lambda n: values[n]))
            if node.target is aten.convolution_backward.default:
                args[-1] = [False, True, False]
            result: Any = node.target(*args)  # type: ignore[operator]
            affected = result if isinstance(result, torch.Tensor) else result[1]
            (columns,) = torch.autograd.grad(affected.sum(), leaf)
        return columns


def again(view: fx.Node, seen: torch.Tensor) -> torch.Tensor:
    """The view of another tensor than the one that the graph has there."""

    def taken(node: fx.Node) -> Any:
        value = node.meta["val"]
        return seen if isinstance(value, torch.Tensor) else hint(value)

    args, kwargs = fx.node.map_arg((view.args, dict(view.kwargs)), taken)
    result: torch.Tensor = view.target(*args, **kwargs)  # type: ignore[operator]
    return result


def _squared(value: Any) -> Any:
    if isinstance(value, torch.Tensor) and value.is_floating_point():
        return value.to(_wide(value.dtype)).square()
    return value


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


# -- What the minibatch has anyway --------------------------------------------------------------------


def _minibatch(
    call: StepCall, noise: Noise, full: Mapping[str, torch.Tensor]
) -> tuple[Variances, int]:
    """The variances of the batch's gradients, and the backwards that it took to find them.

    full: the gradients of the example.
    """
    if noise.batches:
        calls = _others(call, noise)
        spread = _Spread()
        spread.add(full)
        for one in calls:
            spread.add(_gradients_of_batch(one))
        return spread.variances(), len(calls)
    parts, rows, batch = _parts(call)
    spread = _Spread()
    for one in parts:
        spread.add(_gradients_of_part(one))
    share = rows / batch
    if spread.is_summed(full, 1 / share):
        share = 1 / share  # a loss that is a sum grows with its batch
    return {name: v * share for name, v in spread.variances().items()}, len(parts)


class _Spread:
    """Mean and variance of gradients that come one after the other."""

    def __init__(self) -> None:
        self.count = 0
        self.sums: dict[str, torch.Tensor] = {}
        self.squares: Variances = defaultdict(float)

    def add(self, gradients: Mapping[str, torch.Tensor]) -> None:
        self.count += 1
        for name, gradient in gradients.items():
            wide = in_double(gradient.detach())
            self.squares[name] += float(wide.square().sum())
            self.sums[name] = self.sums[name] + wide if name in self.sums else wide.clone()

    def variances(self) -> Variances:
        found = {}
        for name, total in self.sums.items():
            about_mean = self.squares[name] - float(total.square().sum()) / self.count
            found[name] = max(about_mean, 0.0) / (self.count - 1)
        return found

    def is_summed(self, full: Mapping[str, torch.Tensor], times: float) -> bool:
        """Is the gradient of the whole batch the sum of those of its parts, rather than the mean?"""
        means = {name: total / self.count for name, total in self.sums.items() if name in full}
        both = sum(float((in_double(full[name]) * m).sum()) for name, m in means.items())
        own = sum(float(m.square().sum()) for m in means.values())
        return own > 0 and both / own > math.sqrt(times)


def _gradients(call: StepCall) -> dict[str, torch.Tensor]:
    """Without ``backward``, which would run hooks that wait for the gradients of a step."""
    named = {n: p for n, p in call.model.named_parameters() if p.requires_grad}
    with torch.enable_grad():
        outputs = training_step(*call.values())
        (loss,) = (t for t in tensors_in(outputs) if t.requires_grad and t.numel() == 1)
        with autocast_off():
            found = torch.autograd.grad(loss, list(named.values()), allow_unused=True)
    return {n: g for n, g in zip(named, found, strict=True) if g is not None}


def _gradients_of_batch(call: StepCall) -> dict[str, torch.Tensor]:
    return _gradients_or_refusal(
        call,
        "the batches of fxmem.Noise",
        "tuples of (*inputs, *loss_inputs), like the example",
    )


def _gradients_of_part(call: StepCall) -> dict[str, torch.Tensor]:
    return _gradients_or_refusal(
        call,
        "parts of the example, cut along the first dimension",
        "noise=fxmem.Noise(0.01, batches=[(x, y), ...]) with more batches like the example",
    )


def _gradients_or_refusal(call: StepCall, source: str, remedy: str) -> dict[str, torch.Tensor]:
    """source: where the step's inputs are from.  Raises ``FxmemError`` where the model refuses them."""
    try:
        return _gradients(call)
    except (RuntimeError, ValueError, IndexError, TypeError) as error:
        raise FxmemError(
            f"the noise of gradients is found from {source}, and the model refuses one: "
            f"{str(error).splitlines()[0]}\n  try: {remedy}"
        ) from error


def _others(call: StepCall, noise: Noise) -> list[StepCall]:
    return [_with_batch(call, batch) for batch in noise.batches[:MOST_BATCHES]]


def _with_batch(call: StepCall, batch: Any) -> StepCall:
    inputs, late = len(call.args), len(call.loss_inputs)
    if not isinstance(batch, (tuple, list)) or len(batch) != inputs + late:
        raise FxmemError(
            f"each of the batches of fxmem.Noise should be a tuple of {inputs + late}: the model's "
            f"{inputs} inputs and the loss's {late}"
        )
    return replace(call, args=tuple(batch[:inputs]), loss_inputs=tuple(batch[inputs:]))


def _parts(call: StepCall) -> tuple[list[StepCall], int, int]:
    """The step on parts of the batch, the rows of each, and those of the batch."""
    inputs = tensors_in((call.args, call.kwargs, call.loss_inputs))
    batch = next((len(t) for t in inputs if t.ndim), 0)
    count = min(MOST_PARTS, batch // 2) if batch > 3 else batch
    if count < 2:
        raise FxmemError(
            f"the noise of gradients cannot be found from an example of {batch} row\n"
            "  try: noise=fxmem.Noise(0.01, batches=[(x, y), ...]) with more batches, or a larger one"
        )
    rows = batch // count

    def part(value: Any, n: int, late: bool) -> Any:
        if not isinstance(value, torch.Tensor) or not value.ndim or len(value) % batch:
            return value
        each = rows * (len(value) // batch)
        if len(value) > batch and not late:
            return value
        return value[n * each : (n + 1) * each]  # targets of sequences may be one long row

    def parted(n: int) -> StepCall:
        args, kwargs = pytree.tree_map(lambda v: part(v, n, False), (call.args, call.kwargs))
        late = pytree.tree_map(lambda v: part(v, n, True), call.loss_inputs)
        return replace(call, args=args, kwargs=kwargs, loss_inputs=late)

    return [parted(n) for n in range(count)], rows, batch
