"""Small programs, one per known way in which memory planning breaks a training step.

Each entry of ``HAZARDS`` makes a fresh, seeded ``Case``: a model, example inputs, and
``run(step)``, which does to ``step`` what the hazard needs and returns all that can be seen from
outside: outputs, gradients, buffers, generator state, hook calls, errors.  ``step`` is the model or
what replaces it; ``differences`` compares the two dictionaries bit for bit.
"""

import contextlib
import copy
import gc
import io
import pickle
import threading
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

Seen = dict[str, Any]
Step = Callable[..., Any]


@dataclass(frozen=True)
class Case:
    """``right``: the run whose result is as good as the error, where eager raises.

    ``context``: in force at capture as well as at the calls.  ``dynamic_shapes``: as ``optimize``
    takes it.
    """

    model: nn.Module
    inputs: tuple[Any, ...]
    run: Callable[[Step], Seen]
    kwargs: dict[str, Any] = field(default_factory=dict)
    dynamic_shapes: Any = None
    context: Callable[[], AbstractContextManager] = nullcontext
    right: Callable[[Step], Seen] | None = None


@dataclass(frozen=True)
class Hazard:
    """``expect``: "equal", "equal-or-refuses" (a clear error is fine), or "raises"."""

    name: str
    build: Callable[[], Case] = field(repr=False)
    expect: str

    @property
    def refusal_ok(self) -> bool:
        return self.expect == "equal-or-refuses"

    def make(self) -> Case:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            return self.build()


HAZARDS: dict[str, Hazard] = {}


def hazard(expect: str = "equal") -> Callable[[Callable[[], Case]], Callable[[], Case]]:
    def register(build: Callable[[], Case]) -> Callable[[], Case]:
        name = build.__name__.replace("_", "-")
        HAZARDS[name] = Hazard(name, build, expect)
        return build

    return register


# Seeing and comparing.


def snapshot(value: Any) -> Any:
    """A detached copy with the same strides, all the way down."""
    if isinstance(value, Tensor):
        return value.detach().clone()
    if isinstance(value, dict):
        return {k: snapshot(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [snapshot(v) for v in value]
    return value


def tensors(value: Any) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, dict):
        value = list(value.values())
    return [t for v in value for t in tensors(v)] if isinstance(value, (list, tuple)) else []


def fresh(value: Any, memo: dict[int, Tensor] | None = None) -> Any:
    """New leaves with the same values, strides and identities among themselves."""
    memo = {} if memo is None else memo
    if isinstance(value, Tensor):
        if id(value) not in memo:
            memo[id(value)] = value.detach().clone().requires_grad_(value.requires_grad)
        return memo[id(value)]
    if isinstance(value, dict):
        return {k: fresh(v, memo) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(fresh(v, memo) for v in value)
    return value


def total(outputs: Any) -> Tensor:
    """A scalar to which every floating or complex output contributes with fixed random weights."""
    loss = torch.zeros(())
    for out in tensors(outputs):
        if out.is_complex():
            out = torch.view_as_real(out)
        if out.is_floating_point():
            weight = torch.randn(out.shape, generator=torch.Generator().manual_seed(out.numel()))
            loss = loss + (out.float() * weight).sum()
    return loss


def plain(name: str) -> str:
    return name.replace("_orig_mod.", "")


def gradients(step: nn.Module) -> Seen:
    return {
        f"grad {plain(n)}": snapshot(p.grad.to_dense() if p.grad is not None else None)
        for n, p in step.named_parameters()
    }


def buffers(step: nn.Module) -> Seen:
    return {f"buffer {plain(n)}": snapshot(b) for n, b in step.named_buffers()}


def train(
    step: Step, inputs: tuple, kwargs: dict | None = None, seed: int = 7, results: int | None = None
) -> Seen:
    """One step; the generator is seeded anew before backward, as a shared one would have moved.

    results: how many of them are sent a gradient, the first ones; all if it is None.
    """
    inputs, kwargs = fresh((inputs, kwargs or {}))
    torch.manual_seed(seed)
    outputs = step(*inputs, **kwargs)
    seen: Seen = {"rng after forward": torch.get_rng_state(), "outputs": snapshot(outputs)}
    torch.manual_seed(seed + 1)
    loss = total(list(tensors(outputs))[:results])
    seen["requires_grad"] = [t.requires_grad for t in tensors(outputs)]
    if loss.requires_grad:
        loss.backward()
    seen["rng after backward"] = torch.get_rng_state()
    seen["inputs after"] = snapshot(inputs)
    seen["input grads"] = [snapshot(t.grad) for t in tensors((inputs, kwargs))]
    return {**seen, **gradients(step), **buffers(step)}


def trains(model: nn.Module, *inputs: Any, steps: int = 1, **options: Any) -> Case:
    """The usual case: ``steps`` training steps, gradients accumulating, all of them seen."""

    def run(step: Step) -> Seen:
        kwargs = options.get("kwargs")
        return {f"step {i}": train(step, inputs, kwargs, seed=7 + 10 * i) for i in range(steps)}

    return Case(model, inputs, run, **options)


def first_result_and_all(model: nn.Module, *inputs: Tensor) -> Case:
    """The first result alone is sent a gradient, then all are."""

    def run(step):
        return {"first": train(step, inputs, results=1), "all": train(step, inputs)}

    return Case(model, inputs, run)


def layout(t: Tensor) -> tuple:
    """Type, shape and strides, where a dimension of size 1 or nothing at all has no stride."""
    strides = [
        n if size > 1 and t.numel() else 0 for n, size in zip(t.stride(), t.shape, strict=True)
    ]
    return t.dtype, list(t.shape), strides


def bits(t: Tensor) -> Tensor:
    t = torch.view_as_real(t) if t.is_complex() else t
    return t.clone(memory_format=torch.contiguous_format).view(-1).view(torch.uint8)


def same_bits(a: Tensor, b: Tensor) -> bool:
    return layout(a) == layout(b) and (a.numel() == 0 or torch.equal(bits(a), bits(b)))


def differences(want: Any, got: Any, where: str = "") -> list[str]:
    """Where ``got`` is not what was wanted, one line each; empty when they agree bit for bit."""
    if isinstance(want, Tensor) and isinstance(got, Tensor):
        if want.layout != got.layout:
            return [f"{where}: {want.layout} wanted, {got.layout} found"]
        if want.layout is not torch.strided:  # values, not how they are stored
            want, got = want.to_dense(), got.to_dense()
        if same_bits(want, got):
            return []
        if layout(want) != layout(got):
            return [f"{where}: {layout(want)} wanted, {layout(got)} found"]
        unequal = int((want != got).sum())
        return [f"{where}: {unequal} of {want.numel()} elements differ"]
    if isinstance(want, dict) and isinstance(got, dict):
        lines = [f"{where}: missing {k}" for k in want.keys() - got.keys()]
        lines += [f"{where}: unexpected {k}" for k in got.keys() - want.keys()]
        for key in want:
            if key in got:
                lines += differences(want[key], got[key], f"{where}/{key}")
        return lines
    if isinstance(want, list) and isinstance(got, list) and len(want) == len(got):
        pairs = enumerate(zip(want, got, strict=True))
        return [line for i, (w, g) in pairs for line in differences(w, g, f"{where}[{i}]")]
    if type(want) is type(got) and want == got:
        return []
    return [f"{where}: {want!r} wanted, {got!r} found"]


def error_of(call: Callable[[], Any]) -> str:
    """Whether ``call`` raises; the wording is not compared."""
    try:
        call()
    except RuntimeError:
        return "raised"
    return "passed"


# Building.


class Model(nn.Module):
    """``body(self, *inputs)`` over the given parameters, buffers (``b_...``) and modules."""

    def __init__(self, body: Callable[..., Any], **parts: Any):
        super().__init__()
        self.body = body
        for name, part in parts.items():
            if isinstance(part, nn.Module):
                setattr(self, name, part)
            elif name.startswith("b_"):
                self.register_buffer(name, part)
            else:
                setattr(self, name, nn.Parameter(part))

    def forward(self, *inputs: Any, **kwargs: Any) -> Any:
        return self.body(self, *inputs, **kwargs)


def leaf(*shape: int) -> Tensor:
    return torch.randn(shape, requires_grad=True)


def matrix(rows: int, columns: int) -> Tensor:
    return torch.randn(rows, columns) / rows**0.5


def mlp(width: int = 8, depth: int = 3) -> nn.Sequential:
    layers = [layer for _ in range(depth) for layer in (nn.Linear(width, width), nn.GELU())]
    return nn.Sequential(*layers, nn.Linear(width, 2))


# Random numbers.


@hazard()
def draws_that_nobody_reads() -> Case:
    """They move the generator on for those that come later."""

    def body(m, x):
        torch.rand(3)
        h = F.dropout(x @ m.w)
        torch.rand_like(h)
        return F.dropout(torch.sin(h) @ m.v)

    return trains(Model(body, w=matrix(8, 4), v=matrix(4, 3)), leaf(6, 8), steps=2)


@hazard()
def draws_behind_one_of_two_results() -> Case:
    """The backward for that one's gradient is made when it comes; it draws nothing."""

    def body(m, x):
        return F.dropout(x.masked_fill(x < 0, 0.25)) @ m.w, torch.sin(torch.cat([x, x]))

    return first_result_and_all(Model(body, w=matrix(8, 4)), leaf(6, 8))


@hazard()
def inputs_that_the_gradient_sent_does_not_reach() -> Case:
    """Their gradients stay None, whatever lies on the way to them."""

    def body(m, x, y):
        return torch.sin(x @ m.w), torch.cumsum(torch.sin(y * m.v), 0)

    model = Model(body, w=matrix(8, 4), v=torch.randn(4))
    return first_result_and_all(model, leaf(6, 8), leaf(6, 4))


@hazard()
def a_norm_that_the_gradient_sent_does_not_reach() -> Case:
    """What is left of the gradients' sum lies in another order, so that the norm reads a copy."""

    def body(m, x, y):
        h = m.norm(x)
        turned = torch.where(m.b_mask.transpose(1, 2), h, torch.zeros(())).transpose(1, 2)
        return torch.sin(y * m.v), h @ m.w, turned

    mask = torch.randn(1, 4, 16) > 0
    model = Model(body, norm=nn.GroupNorm(4, 16), w=matrix(4, 5), v=torch.randn(4), b_mask=mask)
    return first_result_and_all(model, leaf(1, 16, 4), leaf(6, 4))


@hazard()
def a_dropout_whose_gradient_comes_transposed_at_times() -> Case:
    """Alone, the first result's gradient is laid out otherwise than the sum of both."""

    def body(m, x):
        h = F.dropout(x @ m.w)
        return torch.sin(h.transpose(0, 1)) @ m.u, h @ m.v

    model = Model(body, w=matrix(3, 6), u=matrix(6, 4), v=matrix(6, 2))
    return first_result_and_all(model, leaf(5, 4, 3))


@hazard()
def rng_dropout() -> Case:
    def body(m, x):
        return torch.sin(F.dropout(x @ m.w)) @ m.v

    return trains(Model(body, w=matrix(8, 8), v=matrix(8, 3)), leaf(6, 8))


def dropouts(p: float, dtype: torch.dtype) -> Case:
    """Two dropouts: what the first one draws decides what the second one gets."""

    def body(m, x):
        first = F.dropout(x @ m.w, p)
        return torch.sin(F.dropout(torch.sin(first), 0.3) @ m.v)

    model = Model(body, w=matrix(8, 8), v=matrix(8, 3)).to(dtype)
    return trains(model, torch.randn(6, 8, dtype=dtype, requires_grad=True))


@hazard()
def rng_dropout_rounds_otherwise() -> Case:
    """float32(1 / (1 - p)) is not 1 / float32(1 - p) here, and eager divides."""
    return dropouts(0.15, torch.float32)


@hazard()
def rng_dropout_of_everything() -> Case:
    """Eager draws nothing for it."""
    return dropouts(1.0, torch.float32)


@hazard()
def rng_dropout_of_nothing() -> Case:
    return dropouts(0.0, torch.float32)


@hazard()
def rng_dropout_bfloat16() -> Case:
    return dropouts(0.1, torch.bfloat16)


@hazard()
def rng_dropout_float16() -> Case:
    return dropouts(0.42, torch.float16)


@hazard()
def rng_dropout_of_a_transposed_bfloat16() -> Case:
    """Eager draws in the order of the memory, not of the rows."""

    def body(m, x):
        return torch.sin(F.dropout((x @ m.w).t(), 0.3)).t() @ m.v

    model = Model(body, w=matrix(8, 8), v=matrix(8, 3)).to(torch.bfloat16)
    return trains(model, torch.randn(6, 8, dtype=torch.bfloat16, requires_grad=True))


@hazard()
def rng_alpha_dropout_of_a_transposed() -> Case:
    def body(m, x):
        h = F.alpha_dropout((x @ m.w).t(), 0.3, training=True)
        noise = torch.empty_like(h).bernoulli_(0.7)
        return torch.sin(h * noise).t() @ m.v

    return trains(Model(body, w=matrix(8, 8), v=matrix(8, 3)), leaf(6, 8))


def upsampling(mode: str) -> Case:
    def body(m, x):
        corners = {} if mode == "nearest" else {"align_corners": False}
        return m.out(F.interpolate(F.relu(m.conv(x)), scale_factor=2, mode=mode, **corners))

    model = Model(body, conv=nn.Conv2d(3, 4, 3), out=nn.Conv2d(4, 2, 3))
    return trains(model, leaf(2, 3, 8, 8))


@hazard()
def upsampling_nearest() -> Case:
    return upsampling("nearest")


@hazard()
def upsampling_bilinear() -> Case:
    return upsampling("bilinear")


@hazard()
def upsampling_bicubic() -> Case:
    return upsampling("bicubic")


@hazard()
def rng_rand_like() -> Case:
    def body(m, x):
        h = torch.tanh(x @ m.w)
        return torch.sin(h * torch.rand_like(h)) @ m.v

    return trains(Model(body, w=matrix(8, 8), v=matrix(8, 3)), leaf(6, 8))


@hazard()
def rng_rrelu() -> Case:
    def body(m, x):
        return torch.sin(F.rrelu(x @ m.w, training=True)) @ m.v

    return trains(Model(body, w=matrix(8, 8), v=matrix(8, 3)), leaf(6, 8))


@hazard()
def rng_attention() -> Case:
    def body(m, x):
        q, k, v = (x @ m.w).view(2, 5, 3, 2, 4).permute(2, 0, 3, 1, 4)
        return torch.sin(F.scaled_dot_product_attention(q, k, v, dropout_p=0.3))

    return trains(Model(body, w=matrix(8, 24)), leaf(2, 5, 8))


@hazard()
def rng_per_call() -> Case:
    """Two forwards before two backwards, last in first out: each backward has its own mask."""

    def body(m, x):
        return torch.sin(F.dropout(x @ m.w)) @ m.v

    x = leaf(6, 8)

    def run(step):
        torch.manual_seed(3)
        a, b = fresh(x), fresh(x)
        loss_a, loss_b = total(step(a)), total(step(b))
        loss_b.backward()
        first = gradients(step)
        loss_a.backward()
        return {"a": snapshot(a.grad), "b": snapshot(b.grad), "first": first, **gradients(step)}

    return Case(Model(body, w=matrix(8, 8), v=matrix(8, 3)), (x,), run)


@hazard()
def rng_advanced() -> Case:
    """What the next draw after forward, and after backward, gives."""

    def body(m, x):
        return F.dropout(torch.sin(F.dropout(x @ m.w, 0.2)), 0.3) @ m.v

    x = leaf(6, 8)

    def run(step):
        torch.manual_seed(3)
        seen = {}
        for i in range(3):
            loss = total(step(x.detach()))
            seen[f"after forward {i}"] = torch.rand(4)
            loss.backward()
            seen[f"after backward {i}"] = torch.rand(4)
        return {**seen, "state": torch.get_rng_state(), **gradients(step)}

    return Case(Model(body, w=matrix(8, 8), v=matrix(8, 3)), (x.detach(),), run)


# Running statistics, buffers and inputs that change.


def conv_bn(momentum: float | None = 0.1) -> nn.Sequential:
    return nn.Sequential(
        *(nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4, momentum=momentum), nn.ReLU()),
        *(nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4, momentum=momentum), nn.ReLU()),
    )


@hazard()
def batchnorm_three_steps() -> Case:
    return trains(conv_bn(), leaf(2, 3, 6, 6), steps=3)


@hazard("equal-or-refuses")
def batchnorm_cumulative() -> Case:
    """Without momentum the number of batches seen enters the statistics, read by ``item``."""
    return trains(conv_bn(momentum=None), leaf(2, 3, 6, 6), steps=3)


@hazard()
def batchnorm_inplace_relu() -> Case:
    layers = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(inplace=True))
    return trains(nn.Sequential(layers, nn.Conv2d(4, 2, 3)), leaf(2, 3, 8, 8), steps=2)


@hazard()
def batchnorm_of_transposed() -> Case:
    """Its result is contiguous on the CPU, though fake tensors say that it is transposed, too."""

    def body(m, x):
        h = m.norm((x @ m.w).transpose(1, 2)).transpose(1, 2)
        return torch.sin(F.linear(h, m.v))

    norm = nn.BatchNorm1d(8)
    return trains(Model(body, w=matrix(8, 8), v=matrix(3, 8), norm=norm), leaf(4, 5, 8), steps=2)


@hazard()
def train_eval_train() -> Case:
    x = leaf(2, 3, 6, 6)

    def run(step):
        seen = {"train": train(step, (x,))}
        step.eval()
        seen["eval"] = train(step, (x,))
        step.train()
        return {**seen, "again": train(step, (x,))}

    return Case(nn.Sequential(conv_bn(), nn.Dropout()), (x,), run)


@hazard()
def input_read_before_write() -> Case:
    def body(m, x, s):
        t = s * 2
        y = torch.sin(x * t) @ m.w
        s.add_(1)
        return y.cos()

    return trains(Model(body, w=matrix(8, 4)), leaf(6, 8), torch.randn(6, 8), steps=2)


@hazard()
def buffer_read_before_write() -> Case:
    def body(m, x):
        t = m.b_scale * 2
        y = torch.sin(x * t) @ m.w
        m.b_scale.add_(1)
        return y.cos()

    return trains(Model(body, w=matrix(8, 4), b_scale=torch.randn(8)), leaf(6, 8), steps=3)


@hazard()
def buffer_moving_average() -> Case:
    """The statistic written depends on the step's own activations."""

    def body(m, x):
        h = torch.tanh(x @ m.w)
        y = h / (1 + m.b_mean.abs())
        with torch.no_grad():
            m.b_mean.mul_(0.9).add_(h.mean(0), alpha=0.1)
        return torch.sin(y) @ m.v

    parts = {"w": matrix(8, 8), "v": matrix(8, 2), "b_mean": torch.zeros(8)}
    return trains(Model(body, **parts), leaf(6, 8), steps=3)


@hazard()
def inplace_chain() -> Case:
    def body(m, x):
        h = x @ m.w
        h.add_(1).mul_(0.5)
        g = torch.sigmoid(h)
        h = h.relu_() * g
        h[:, 1:3].mul_(2)
        return h @ m.v

    return trains(Model(body, w=matrix(8, 8), v=matrix(8, 2)), leaf(6, 8))


@hazard("raises")
def user_writes_saved_input() -> Case:
    """The input is read again by the backward: a write in between must not pass unseen."""

    def body(m, x):
        return torch.sin(x @ m.w) @ m.v

    x = torch.randn(6, 8)

    def run(step):
        given = fresh(x)
        loss = total(step(given))
        given.mul_(3)
        seen = {"backward": error_of(loss.backward)}
        return seen if seen["backward"] == "raised" else {**seen, **gradients(step)}

    return Case(Model(body, w=matrix(8, 8), v=matrix(8, 3)), (x,), run)


@hazard("raises")
def user_writes_saved_output() -> Case:
    """As above for a result; who computes it again may answer with the right gradient instead."""

    def body(m, x):
        k = torch.exp(x @ m.w)
        return k, k @ m.v

    x = torch.randn(6, 8)

    def run(step, factor=3.0):
        k, y = step(fresh(x))
        loss = total(y)
        if factor != 1:
            with torch.no_grad():
                k.mul_(factor)
        seen = {"backward": error_of(loss.backward)}
        return seen if seen["backward"] == "raised" else {**seen, **gradients(step)}

    model = Model(body, w=matrix(8, 8), v=matrix(8, 3))
    return Case(model, (x,), run, right=lambda step: run(step, factor=1.0))


# Effects.


@hazard()
def checks_in_both_halves() -> Case:
    """An inverse raises if there is none, and so does the backward of eigenvalues: once, in order."""

    def body(m, x):
        return torch.linalg.eigvals(torch.linalg.inv(x @ m.w)).abs() @ m.v

    model, x = Model(body, w=matrix(5, 5), v=matrix(5, 3)), torch.randn(2, 5, 5)

    def run(step):
        total(step(fresh(x))).backward()
        return {**gradients(step), "singular": error_of(lambda: step(torch.zeros(2, 5, 5)))}

    return Case(model, (x,), run)


# Aliases.


@hazard()
def aliased_outputs() -> Case:
    def body(m, x):
        h = torch.tanh(x @ m.w)
        return h, h[1:], h.t()

    x = leaf(6, 8)

    def run(step):
        outputs = step(fresh(x))
        storages = {t.untyped_storage().data_ptr() for t in outputs}
        return {"storages": len(storages), **train(step, (x,))}

    return Case(Model(body, w=matrix(8, 8)), (x,), run)


@hazard()
def same_output_twice() -> Case:
    def body(m, x):
        h = torch.tanh(x @ m.w)
        return h, h

    return trains(Model(body, w=matrix(8, 8)), leaf(6, 8))


@hazard()
def view_of_large_base() -> Case:
    def body(m, x):
        return torch.sin(torch.exp(x @ m.w)[:1]) @ m.v

    return trains(Model(body, w=matrix(8, 64) / 4, v=matrix(64, 2)), leaf(16, 8))


@hazard()
def output_is_input() -> Case:
    def body(m, x, y):
        return x.view(-1), torch.sin(x @ m.w), y

    return trains(Model(body, w=matrix(8, 8)), leaf(6, 8), leaf(3))


@hazard()
def duplicate_inputs() -> Case:
    def body(m, a, b):
        return torch.sin(a @ m.w) * b  # two gradients to add: their order cannot matter

    x = leaf(6, 8)
    return trains(Model(body, w=matrix(8, 8)), x, x)


@hazard()
def inputs_share_storage() -> Case:
    def body(m, a, b):
        return torch.sin(a @ m.w) * b

    base = torch.randn(6, 16)
    model = Model(body, w=matrix(8, 8))

    def run(step):
        given = fresh(base).requires_grad_()
        y = step(given[:, :8], given[:, 8:])
        total(y).backward()
        return {"y": snapshot(y), "dx": snapshot(given.grad), **gradients(step)}

    return Case(model, (base[:, :8], base[:, 8:]), run)


@hazard()
def saved_is_output() -> Case:
    def body(m, x):
        h = torch.exp(x @ m.w)
        return h, (h * h).sum()

    return trains(Model(body, w=matrix(8, 8)), leaf(6, 8))


# Precision and foreign autograd.


@hazard()
def autocast_inside() -> Case:
    """Each weight is used once: eager caches casts, so a shared one adds gradients in bf16."""

    def body(m, x):
        with torch.autocast("cpu", torch.bfloat16):
            h = torch.sin(x @ m.w) @ m.v
        return torch.tanh(h.float()) @ m.u

    return trains(Model(body, w=matrix(8, 8), v=matrix(8, 8), u=matrix(8, 3)), leaf(6, 8))


@hazard("equal-or-refuses")
def autocast_around_call() -> Case:
    """Captured outside autocast, called inside it: the step must not keep the old precision."""
    x = leaf(6, 8)

    def run(step):
        given = fresh(x)
        with torch.autocast("cpu", torch.bfloat16):
            y = step(given)
        total(y).backward()
        return {"y": snapshot(y), "dx": snapshot(given.grad), **gradients(step)}

    return Case(mlp(), (x,), run)


@hazard()
def autocast_around_capture() -> Case:
    """Autocast at capture and in the forward, not in the backward, as the manual says to do."""
    x = leaf(6, 8)

    def run(step):
        given = fresh(x)
        with torch.autocast("cpu", torch.bfloat16):
            y = step(given)
        total(y).backward()
        return {"y": snapshot(y), "dx": snapshot(given.grad), **gradients(step)}

    return Case(mlp(), (x,), run, context=lambda: torch.autocast("cpu", torch.bfloat16))


@hazard()
def attention_under_autocast() -> Case:
    """With dropout, attention is put together of products that autocast would cast in the backward."""
    x = leaf(2, 8, 16)

    def body(m, x):
        q, k, v = (x @ m.w).view(2, 8, 3, 2, 8).permute(2, 0, 3, 1, 4)
        return F.scaled_dot_product_attention(q, k, v, dropout_p=0.1)

    def run(step):
        given = fresh(x)
        torch.manual_seed(1)
        with torch.autocast("cpu", torch.bfloat16):
            y = step(given)
        y.float().square().mean().backward()
        return {"y": snapshot(y), "dx": snapshot(given.grad), **gradients(step)}

    model = Model(body, w=matrix(16, 48))
    return Case(model, (x,), run, context=lambda: torch.autocast("cpu", torch.bfloat16))


class ScaledExp(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, scale):
        y = torch.exp(x * scale)
        ctx.scale = scale
        ctx.save_for_backward(y)
        return y

    @staticmethod
    def backward(ctx, grad):
        (y,) = ctx.saved_tensors
        return grad * y * ctx.scale * 0.5, None  # not the true gradient, so a retrace would show


class Ranked(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        y, order = x.sort(dim=-1)
        ctx.mark_non_differentiable(order)
        ctx.save_for_backward(order)
        return y, order

    @staticmethod
    def backward(ctx, grad, _):
        (order,) = ctx.saved_tensors
        return torch.zeros_like(grad).scatter(-1, order, grad)


@hazard()
def custom_function() -> Case:
    def body(m, x):
        return ScaledExp.apply(torch.tanh(x @ m.w), 0.25) @ m.v

    return trains(Model(body, w=matrix(8, 8), v=matrix(8, 3)), leaf(6, 8))


@hazard()
def custom_function_two_outputs() -> Case:
    def body(m, x):
        y, order = Ranked.apply(torch.tanh(x @ m.w))
        return torch.sin(y) @ m.v, order

    return trains(Model(body, w=matrix(8, 8), v=matrix(8, 3)), leaf(6, 8))


# Hooks.


@hazard()
def hook_on_tensors() -> Case:
    """Two hooks on the input, one on the output: each runs once and in order."""
    x = leaf(6, 8)

    def run(step):
        given, calls = fresh(x), []

        def hook(name, factor):
            return lambda g: calls.append(name) or g * factor

        given.register_hook(hook("first", 2))
        given.register_hook(hook("second", 3))
        y = step(given)
        y.register_hook(hook("output", 0.5))
        total(y).backward()
        return {"calls": calls, "dx": snapshot(given.grad), **gradients(step)}

    return Case(mlp(), (x,), run)


@hazard()
def hook_on_parameters() -> Case:
    """A gradient hook and a post-accumulate hook on each, over two accumulating steps."""
    x = leaf(6, 8)

    def run(step):
        calls = []

        def watch(name, p):
            def halve(p):
                calls.append(f"{name} accumulated")
                p.grad.mul_(0.5)

            yield p.register_hook(lambda g: calls.append(name) or g * 2)
            yield p.register_post_accumulate_grad_hook(halve)

        handles = [h for name, p in step.named_parameters() for h in watch(plain(name), p)]
        seen = {f"step {i}": train(step, (x,)) for i in range(2)}
        for handle in handles:
            handle.remove()
        return {"calls": sorted(calls), **seen}

    return Case(mlp(), (x,), run)


@hazard()
def hook_on_module() -> Case:
    x = leaf(6, 8)

    def run(step):
        calls = []
        before = step.register_forward_pre_hook(lambda m, a: calls.append("before") or (a[0] * 2,))
        after = step.register_forward_hook(lambda m, a, y: calls.append("after") or y * 3)
        seen = train(step, (x,))
        before.remove()
        after.remove()
        return {"calls": calls, **seen}

    return Case(mlp(), (x,), run)


@hazard()
def hook_on_submodule() -> Case:
    """Part of the model at capture."""
    model = mlp()
    model[2].register_forward_hook(lambda m, a, y: torch.sin(y) * 2)
    return trains(model, leaf(6, 8))


@hazard("equal-or-refuses")
def hook_backward_on_submodule() -> Case:
    model = mlp()
    model[2].register_full_backward_hook(lambda m, dx, dy: (dx[0] * 2,))
    return trains(model, leaf(6, 8))


@hazard("equal-or-refuses")
def hook_inside_forward() -> Case:
    def body(m, x):
        h = torch.tanh(x @ m.w)
        h.register_hook(lambda g: g * 2)
        return torch.sin(h) @ m.v

    return trains(Model(body, w=matrix(8, 8), v=matrix(8, 3)), leaf(6, 8))


@hazard()
def saved_tensor_hooks_around() -> Case:
    x = leaf(6, 8)

    def run(step):
        given = fresh(x)
        pack, unpack = lambda t: t.detach().clone(), lambda t: t
        with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
            y = step(given)
        total(y).backward()
        return {"y": snapshot(y), "dx": snapshot(given.grad), **gradients(step)}

    return Case(mlp(), (x,), run)


@hazard()
def save_on_cpu_around() -> Case:
    x = leaf(6, 8)

    def run(step):
        given = fresh(x)
        with torch.autograd.graph.save_on_cpu():
            y = step(given)
        total(y).backward()
        return {"y": snapshot(y), "dx": snapshot(given.grad), **gradients(step)}

    return Case(mlp(), (x,), run)


@hazard()
def checkpoint_inside() -> Case:
    def body(m, x):
        return m.tail(checkpoint(m.mid, m.head(x), use_reentrant=False))

    parts = {"head": nn.Linear(8, 8), "mid": mlp(), "tail": nn.Linear(2, 2)}
    return trains(Model(body, **parts), leaf(6, 8))


@hazard()
def checkpoint_with_dropout() -> Case:
    def body(m, x):
        return m.tail(checkpoint(m.mid, m.head(x), use_reentrant=False))

    mid = nn.Sequential(nn.Linear(8, 8), nn.Dropout(0.4), nn.Tanh(), nn.Dropout(0.2))
    parts = {"head": nn.Linear(8, 8), "mid": mid, "tail": nn.Linear(8, 2)}
    return trains(Model(body, **parts), leaf(6, 8), steps=2)


# Unusual backwards.


@hazard("equal-or-refuses")
def double_backward() -> Case:
    x = leaf(6, 8)

    def run(step):
        given = fresh(x)
        loss = total(step(given))
        (slope,) = torch.autograd.grad(loss, given, create_graph=True)
        (slope.pow(2).sum() + loss).backward()
        return {"slope": snapshot(slope), "dx": snapshot(given.grad), **gradients(step)}

    return Case(mlp(), (x,), run)


@hazard("equal-or-refuses")
def retain_graph() -> Case:
    x = leaf(6, 8)

    def run(step):
        given = fresh(x)
        torch.manual_seed(3)
        loss = total(step(given))
        loss.backward(retain_graph=True)
        first = {"dx": snapshot(given.grad), **gradients(step)}
        loss.backward()
        return {"first": first, "dx": snapshot(given.grad), **gradients(step)}

    return Case(nn.Sequential(mlp(), nn.Dropout(), nn.Linear(2, 4)), (x,), run)


@hazard()
def backward_twice_raises() -> Case:
    x = leaf(6, 8)

    def run(step):
        loss = total(step(fresh(x)))
        loss.backward()
        return {"second": error_of(loss.backward), **gradients(step)}

    return Case(mlp(), (x,), run)


@hazard()
def unused_parameter_and_input() -> Case:
    """Their gradients stay None, not zero."""

    def body(m, x, y):
        return torch.sin(x @ m.w)

    return trains(Model(body, w=matrix(8, 8), unused=matrix(3, 3)), leaf(6, 8), leaf(2))


@hazard()
def unused_output() -> Case:
    """No gradient reaches the first output, nor the parameter behind it."""

    def body(m, x):
        return torch.sin(x @ m.w), torch.cos(x @ m.v)

    x = leaf(6, 8)

    def run(step):
        given = fresh(x)
        _, y = step(given)
        total(y).backward()
        return {"y": snapshot(y), "dx": snapshot(given.grad), "v": snapshot(step.v.grad)}

    return Case(Model(body, w=matrix(8, 8), v=matrix(8, 8)), (x,), run)


@hazard()
def tied_weights() -> Case:
    def body(m, ids):
        h = m.embed(ids)
        return F.cross_entropy(m.head(torch.tanh(m.mid(h))).flatten(0, 1), ids.flatten())

    model = Model(body, embed=nn.Embedding(10, 8), mid=nn.Linear(8, 8), head=nn.Linear(8, 10))
    model.head.weight = model.embed.weight
    return trains(model, torch.randint(10, (3, 5)), steps=2)


@hazard()
def accumulation() -> Case:
    x, z = leaf(6, 8), leaf(6, 8)

    def run(step):
        seen = {"first": train(step, (x,)), "second": train(step, (z,))}
        for p in step.parameters():
            p.grad.zero_()
        return {**seen, "zeroed": train(step, (x,))}

    return Case(mlp(), (x,), run)


@hazard()
def optimizer_steps() -> Case:
    x = leaf(6, 8)

    def run(step):
        optimizer = torch.optim.AdamW(step.parameters(), lr=0.1)
        seen = {}
        for i in range(4):
            optimizer.zero_grad(set_to_none=bool(i % 2))
            seen[f"step {i}"] = train(step, (x,))
            optimizer.step()
        weights = [snapshot(p) for p in step.parameters()]
        return {**seen, "weights": weights}

    return Case(mlp(), (x,), run)


@hazard()
def no_grad_call() -> Case:
    x = leaf(2, 3, 6, 6)

    def run(step):
        with torch.no_grad():
            y = step(fresh(x))
        with torch.inference_mode():
            z = step(fresh(x))
        seen = {"y": snapshot(y), "z": snapshot(z.clone()), "requires_grad": y.requires_grad}
        return {**seen, **train(step, (x,))}

    return Case(conv_bn(), (x,), run)


@hazard()
def no_grad_inside() -> Case:
    def body(m, x):
        with torch.no_grad():
            target = torch.tanh(x @ m.w)
        return ((torch.sin(x @ m.w) - target) ** 2).mean() + (x @ m.v).detach().sum()

    return trains(Model(body, w=matrix(8, 8), v=matrix(8, 8)), leaf(6, 8))


@hazard()
def eval_mode() -> Case:
    model = nn.Sequential(conv_bn(), nn.Dropout(), nn.Flatten(), nn.Linear(144, 2)).eval()
    return trains(model, leaf(2, 3, 6, 6), steps=2)


@hazard()
def frozen_parameters() -> Case:
    model = mlp()
    for p in model[:4].parameters():
        p.requires_grad_(False)
    return trains(model, torch.randn(6, 8))


@hazard()
def frozen_all() -> Case:
    """Only the input asks for a gradient."""
    return trains(mlp().requires_grad_(False), leaf(6, 8))


@hazard("equal-or-refuses")
def frozen_after_capture() -> Case:
    x = leaf(6, 8)

    def run(step):
        before = train(step, (x,))
        for p in list(step.parameters())[:4]:
            p.requires_grad_(False)
            p.grad = None
        return {"before": before, "after": train(step, (x,))}

    return Case(mlp(), (x,), run)


# Capture.


@hazard("equal-or-refuses")
def graph_break() -> Case:
    def body(m, x):
        h = torch.tanh(x @ m.w)
        torch._dynamo.graph_break()
        return torch.sin(h) @ m.v

    return trains(Model(body, w=matrix(8, 8), v=matrix(8, 3)), leaf(6, 8))


@hazard("equal-or-refuses")
def data_branch() -> Case:
    """Both branches are taken, one after the other."""

    def body(m, x):
        h = torch.tanh(x @ m.w)
        if x.sum() > 0:
            h = torch.sin(h)
        return h @ m.v

    x = torch.rand(6, 8)

    def run(step):
        return {"plus": train(step, (x,)), "minus": train(step, (-x,))}

    return Case(Model(body, w=matrix(8, 8), v=matrix(8, 3)), (x,), run)


def batches(step: Step, *sizes: int, tail: tuple[int, ...] = (8,)) -> Seen:
    generator = torch.Generator().manual_seed(5)
    return {
        f"batch {n}": train(step, (torch.randn(n, *tail, generator=generator, requires_grad=True),))
        for n in sizes
    }


@hazard()
def dynamic_batch() -> Case:
    def run(step):
        return batches(step, 4, 6, 9, 1, 4)

    return Case(mlp(), (leaf(4, 8),), run, dynamic_shapes={0: {0: "B"}})


@hazard()
def dynamic_batch_and_length() -> Case:
    """Sizes enter the arithmetic: two symbols must not be exchanged among the saved ones."""

    def body(m, x):
        b, s, d = x.shape
        h = torch.tanh(x @ m.w).view(b, s, 2, d // 2).transpose(1, 2)
        scores = (h @ h.transpose(2, 3) / s).softmax(-1)
        y = (scores @ h).transpose(1, 2).reshape(b * s, d)
        return torch.sin(y) @ m.v * b

    def run(step):
        shapes = ((2, 5), (5, 2), (3, 3), (4, 7))
        return {f"{b} by {s}": batches(step, b, tail=(s, 8)) for b, s in shapes}

    model = Model(body, w=matrix(8, 8), v=matrix(8, 3))
    return Case(model, (leaf(2, 5, 8),), run, dynamic_shapes={0: {0: "B", 1: "S"}})


@hazard("equal-or-refuses")
def other_batch_than_captured() -> Case:
    return Case(mlp(), (leaf(4, 8),), lambda step: batches(step, 4, 6, 9, 1))


@hazard()
def empty_batch() -> Case:
    return trains(mlp(), leaf(0, 8))


@hazard()
def keyword_inputs() -> Case:
    def body(m, x, *, scale, shift=None):
        return {"y": torch.sin(x @ m.w) * scale, "nested": [x * 2, (shift,)]}

    kwargs = {"scale": leaf(8), "shift": torch.randn(3)}
    return trains(Model(body, w=matrix(8, 8)), leaf(6, 8), kwargs=kwargs)


# Layouts and element types.


@hazard()
def transposed_inputs() -> Case:
    x = torch.randn(8, 6).t().requires_grad_()
    return trains(mlp(), x)


@hazard()
def channels_last() -> Case:
    x = torch.randn(2, 3, 6, 6).to(memory_format=torch.channels_last).requires_grad_()
    return trains(conv_bn().to(memory_format=torch.channels_last), x, steps=2)


@hazard("equal-or-refuses")
def other_strides_than_captured() -> Case:
    x = torch.randn(2, 3, 6, 6)

    def run(step):
        last = x.to(memory_format=torch.channels_last)
        return {"plain": train(step, (x,)), "channels last": train(step, (last,))}

    return Case(conv_bn(), (x,), run)


@hazard()
def expanded_input() -> Case:
    def body(m, x, bias):
        return torch.sin(x @ m.w + bias) @ m.v

    x = leaf(6, 8)
    bias = torch.randn(1, 8)

    def run(step):
        given = fresh(x)
        y = step(given, bias.expand(6, 8))
        total(y).backward()
        return {"y": snapshot(y), "dx": snapshot(given.grad), **gradients(step)}

    model = Model(body, w=matrix(8, 8), v=matrix(8, 3))
    return Case(model, (x, bias.expand(6, 8)), run)


@hazard()
def complex_values() -> Case:
    def body(m, x):
        h = torch.fft.rfft(x @ m.w) * torch.view_as_complex(m.filter)
        return torch.fft.irfft(h, n=8).tanh(), h

    return trains(Model(body, w=matrix(8, 8), filter=torch.randn(5, 2)), leaf(6, 8))


@hazard()
def integer_and_bool_values() -> Case:
    def body(m, x):
        h = x @ m.w
        best = h.argmax(-1, keepdim=True)
        mask = (h > 0) & (h < 1)
        bins = (h * 3).long() % 5
        picked = h.gather(1, best) + m.table[bins].sum(-1)
        return torch.where(mask, torch.sin(h), h * 2) * picked, best, mask, bins

    return trains(Model(body, w=matrix(8, 8), table=torch.randn(5, 8)), leaf(6, 8))


@hazard()
def topk_ties() -> Case:
    """A router with equal scores: whoever ranks them twice may rank them differently."""

    def body(m, x):
        scores = (x @ m.w).round()
        top, index = scores.topk(2, dim=-1)
        experts = torch.einsum("bd,edf->bef", x, m.experts)
        chosen = experts.gather(1, index.unsqueeze(-1).expand(-1, -1, 4))
        return (torch.tanh(chosen) * torch.softmax(top, -1).unsqueeze(-1)).sum(1)

    model = Model(body, w=matrix(8, 6), experts=torch.randn(6, 8, 4))
    return trains(model, leaf(6, 8))


@hazard("equal-or-refuses")
def sparse_embedding() -> Case:
    model = nn.Sequential(nn.Embedding(10, 8, sparse=True), mlp())
    return trains(model, torch.randint(10, (3, 5)))


@hazard()
def outlier_rows() -> Case:
    x = torch.randn(6, 8)
    x[1, 2], x[1, 3], x[4] = 3e4, 1e-30, 1e-38
    return trains(nn.Sequential(mlp(), nn.LayerNorm(2)), x.requires_grad_())


@hazard()
def constant_and_zero_rows() -> Case:
    x = torch.randn(6, 8)
    x[1], x[3], x[5] = 0.0, 1.5, -0.0
    return trains(nn.Sequential(nn.LayerNorm(8), mlp()), x.requires_grad_())


@hazard()
def not_finite() -> Case:
    x = torch.randn(6, 8)
    x[1, 2], x[2, 3] = float("inf"), float("nan")
    return trains(mlp(), x.requires_grad_())


# Lifetime and identity.


def growth(action: Callable[[], Any], times: int = 20) -> int:
    """Bytes the allocator holds more after ``times`` calls of ``action`` than after two."""
    gc.collect()
    activity = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activity, profile_memory=True) as profile:
        for i in range(2 + times):
            if i == 2:  # what the first calls leave may stay, and its release is seen
                gc.collect()
                with torch.profiler.record_function("warm"):
                    pass
            action()
        gc.collect()
    events = profile.profiler.kineto_results.events()
    warm = next(e.start_ns() for e in events if e.name() == "warm")
    return sum(e.nbytes() for e in events if e.name() == "[memory]" and e.start_ns() > warm)


class Failure(Exception):
    pass


@hazard()
def failed_backward() -> Case:
    x = leaf(32, 8)

    def run(step):
        train(step, (x,))
        weights = list(step.parameters())

        def fail(grad):
            raise Failure

        def before():
            y = step(fresh(x))
            y.register_hook(fail)
            with contextlib.suppress(Failure):
                total(y).backward()

        def behind():
            handle = weights[0].register_hook(fail)
            with contextlib.suppress(Failure):
                total(step(fresh(x))).backward()
            handle.remove()

        seen = {"before": growth(before), "behind": growth(behind)}
        for p in weights:
            p.grad = None
        return {**seen, **train(step, (x,))}

    return Case(mlp(), (x,), run)


@hazard()
def dropped_graph() -> Case:
    """Forwards whose backward never comes."""
    x = leaf(32, 8)

    def run(step):
        train(step, (x,))
        return {"growth": growth(lambda: step(fresh(x))), **train(step, (x,))}

    return Case(mlp(), (x,), run)


@hazard()
def threads() -> Case:
    """One step called from two threads at once."""
    x, z = leaf(6, 8), leaf(6, 8)

    def run(step):
        seen: Seen = {}
        weights = tuple(step.parameters())

        def work(name, given):
            for i in range(5):
                grads = torch.autograd.grad(total(step(fresh(given) * (i + 1))), weights)
                seen[f"{name} {i}"] = snapshot(grads)

        workers = [threading.Thread(target=work, args=a) for a in (("x", x), ("z", z))]
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join()
        return seen

    return Case(mlp(), (x,), run)


@hazard()
def deep_copy() -> Case:
    """The copy trains alone: neither its weights nor its gradients are the original's."""
    x = leaf(2, 3, 6, 6)

    def run(step):
        twin = copy.deepcopy(step)
        with torch.no_grad():
            for p in twin.parameters():
                p.mul_(2)
        seen = {"twin": train(twin, (x,))}
        seen["untouched"] = [p.grad is None for p in step.parameters()]
        return {**seen, "original": train(step, (x,)), "twin again": train(twin, (x,))}

    return Case(nn.Sequential(conv_bn(), nn.Dropout()), (x,), run)


@hazard()
def state_dict() -> Case:
    """Keys and order are the model's own; a strict load is seen by the next step."""
    x = leaf(2, 3, 6, 6)

    def run(step):
        state = {k: v.clone() for k, v in step.state_dict().items()}
        seen = {"keys": list(state), "first": train(step, (x,))}
        step.zero_grad()
        step.load_state_dict({k: v * 2 for k, v in state.items()}, strict=True)
        seen["loaded"] = train(step, (x,))
        fits = conv_bn().load_state_dict(step.state_dict(), strict=True)
        return {**seen, "fits": str(fits)}

    return Case(conv_bn(), (x,), run)


@hazard("equal-or-refuses")
def pickled() -> Case:
    x = leaf(6, 8)

    def run(step):
        return train(pickle.loads(pickle.dumps(step)), (x,))

    return Case(mlp(), (x,), run)


@hazard("equal-or-refuses")
def saved_whole() -> Case:
    """torch.save of the whole module and back."""
    x = leaf(6, 8)

    def run(step):
        file = io.BytesIO()
        torch.save(step, file)
        file.seek(0)
        return train(torch.load(file, weights_only=False), (x,))

    return Case(mlp(), (x,), run)
