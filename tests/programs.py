"""Random small training programs, printed as plain modules so that a failure is a file.

``random_program(seed)`` draws 3 to 30 statements over small shapes; ``program.source`` is what ran.
A draw is thrown away when eager refuses it (a write to what autograd saved), when it trains
nothing, and when it is no fair question: not finite, or a double-precision reference moves more
than a thousand times a change of 1e-6 in the inputs.
"""

import copy
import linecache
import math
import random
import re
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from hazards import Seen, fresh, total, train
from torch import Tensor, nn

SIZES = (1, 2, 3, 5, 8, 16)
MAX_NUMEL = 2048
ATTEMPTS = 50

HEADER = """\
import torch
import torch.nn.functional as F
from torch import nn
"""


@dataclass(frozen=True)
class Program:
    """``discarded``: draws thrown away before this one."""

    source: str
    model: nn.Module = field(repr=False)
    inputs: tuple[Tensor, ...] = field(repr=False)
    seed: int
    discarded: int = 0

    def run(self, step: nn.Module | None = None, steps: int = 1) -> Seen:
        """What can be seen of ``steps`` training steps of ``step``, the model if not given."""
        step = self.model if step is None else step
        return {f"step {i}": train(step, self.inputs, seed=7 + 10 * i) for i in range(steps)}


def loss_of(outputs: object) -> Tensor:
    return total(outputs)


def random_program(seed: int) -> Program:
    for attempt in range(ATTEMPTS):
        rng = random.Random(f"{seed}/{attempt}")
        dtype = rng.choices((torch.float32, torch.float64, torch.bfloat16), (8, 1, 1))[0]
        draft = Draft(rng)
        source = draft.write(rng.randint(3, 30))
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            model = module_of(source, f"<random program {seed}>").to(dtype)
            inputs = tuple(
                torch.randn(shape, dtype=dtype).requires_grad_(wants_grad)
                for shape, wants_grad in draft.inputs
            )
            if is_fair(model, inputs):
                return Program(source, model, inputs, seed, attempt)
    raise ValueError(f"seed {seed}: no fair program in {ATTEMPTS} draws")


def module_of(source: str, filename: str = "<random program>") -> nn.Module:
    """The module that ``source`` defines; tracebacks find its lines."""
    linecache.cache[filename] = (len(source), None, source.splitlines(keepends=True), filename)
    space: dict[str, type[nn.Module]] = {}
    exec(compile(source, filename, "exec"), space)
    return space["Program"]()


def is_fair(model: nn.Module, inputs: tuple[Tensor, ...]) -> bool:
    def step(precision: torch.dtype | None, change: float) -> tuple[list[Tensor], nn.Module]:
        twin = copy.deepcopy(model)
        given = fresh(inputs)
        if precision is not None:
            twin = twin.to(precision)
            given = tuple(
                (t.detach().to(precision) + change * torch.ones_like(t, dtype=precision).cumsum(-1))
                .detach()
                .requires_grad_(t.requires_grad)
                for t in given
            )
        torch.manual_seed(1)
        outputs = twin(*given)
        loss_of(outputs).backward()
        grads = [t.grad for t in (*given, *twin.parameters()) if t.grad is not None]
        return [t.detach() for t in (*outputs, *grads)], twin

    try:
        seen, twin = step(None, 0.0)
        if all(p.grad is None for p in twin.parameters()):
            return False
        if any(not t.isfinite().all() or t.abs().max() > 1e4 for t in seen if t.numel()):
            return False
        plain, _ = step(torch.float64, 0.0)
        moved, _ = step(torch.float64, 1e-6)
    except RuntimeError:
        return False
    return all(
        (b - a).abs().max() <= 1e-3 * max(1.0, float(a.abs().max()))
        for a, b in zip(plain, moved, strict=True)
        if a.numel()
    )


@dataclass(frozen=True)
class Value:
    """A floating tensor the program holds under ``name``."""

    name: str
    shape: tuple[int, ...]

    @property
    def rank(self) -> int:
        return len(self.shape)

    @property
    def numel(self) -> int:
        return math.prod(self.shape)


class Draft:
    """A program in the making: statements, what they define, and the shapes of the values."""

    def __init__(self, rng: random.Random):
        self.rng = rng
        self.setup: list[str] = []
        self.body: list[str] = []
        self.values: list[Value] = []
        self.inputs: list[tuple[tuple[int, ...], bool]] = []
        self.weights: list[tuple[str, tuple[int, int]]] = []
        self.count = 0

    def name(self, stem: str) -> str:
        self.count += 1
        return f"{stem}{self.count}"

    def size(self) -> int:
        return self.rng.choice(SIZES)

    def pick(self, low: int = 1, high: int = 4) -> Value | None:
        """A value of suitable rank, recent ones more often."""
        fitting = [v for v in self.values if low <= v.rank <= high]
        if not fitting:
            return None
        return self.rng.choice(fitting[-4:] if self.rng.random() < 0.7 else fitting)

    def let(self, code: str, *shape: int, stem: str = "h") -> Value:
        value = Value(self.name(stem), tuple(shape))
        self.body.append(f"{value.name} = {code}")
        self.values.append(value)
        return value

    def part(self, code: str, stem: str) -> str:
        """An attribute of the module made by ``code``."""
        name = self.name(stem)
        self.setup.append(f"self.{name} = {code}")
        return f"self.{name}"

    def weight(self, rows: int, columns: int) -> str:
        """A matrix to multiply from the right: new, or one met before, perhaps transposed."""
        for name, shape in self.weights:
            if shape == (rows, columns) and self.rng.random() < 0.5:
                return name
            if shape == (columns, rows) and self.rng.random() < 0.5:
                return f"{name}.t()"
        scale = f"{max(rows, 1) ** -0.5:.3f}"
        name = self.part(f"nn.Parameter({scale} * torch.randn({rows}, {columns}))", "w")
        self.weights.append((name, (rows, columns)))
        return name

    def buffer(self, size: int) -> str:
        name = self.name("b")
        self.setup.append(f'self.register_buffer("{name}", torch.randn({size}))')
        return f"self.{name}"

    def write(self, statements: int) -> str:
        for i in range(self.rng.randint(1, 3)):
            rank = self.rng.choices((2, 3, 4), (3, 2, 2))[0]
            shape = tuple(self.size() for _ in range(rank))
            while math.prod(shape) > MAX_NUMEL:
                shape = tuple(self.size() for _ in range(rank))
            self.inputs.append((shape, i == 0 or self.rng.random() < 0.5))
            self.values.append(Value(f"x{i}", shape))
        names = [v.name for v in self.values]
        PRODUCT(self)
        tries = 0
        while len(self.body) < statements and tries < 10 * statements:
            tries += 1
            before = len(self.values), len(self.body), len(self.setup)
            self.rng.choices(OPERATIONS, WEIGHTS)[0](self)
            if any(v.numel > MAX_NUMEL for v in self.values[before[0] :]):
                del self.values[before[0] :], self.body[before[1] :], self.setup[before[2] :]
                self.weights = [w for w in self.weights if self.is_set(w[0])]
        return "\n".join(
            [
                HEADER,
                "",
                "class Program(nn.Module):",
                "    def __init__(self):",
                "        super().__init__()",
                *(f"        {line}" for line in self.setup),
                "",
                f"    def forward(self, {', '.join(names)}):",
                *(f"        {line}" for line in self.body),
                f"        return {self.results(names)}",
                "",
            ]
        )

    def is_set(self, weight: str) -> bool:
        return any(line.startswith(f"{weight} = ") for line in self.setup)

    def results(self, names: list[str]) -> str:
        """The last value, most that nothing reads, sometimes a view, an input, one thing twice."""
        results = [self.values[-1].name]
        text = "\n".join(self.body)
        sinks = [v for v in self.values[:-1] if len(re.findall(rf"\b{v.name}\b", text)) == 1]
        results += [v.name for v in sinks if self.rng.random() < 0.6]  # the rest is dead code
        for value in self.rng.sample(self.values, min(len(self.values), self.rng.randint(0, 2))):
            results.append(self.rng.choice((value.name, value.name, f"{value.name}.unsqueeze(0)")))
        if self.rng.random() < 0.15:
            results.append(self.rng.choice(names))
        if self.rng.random() < 0.1:
            results.append(f"{self.rng.choice(names)}.view(-1)")
        if self.rng.random() < 0.1:
            results.append(results[0])
        results += self.unread_draws(results)
        return ", ".join(results) + ","

    def unread_draws(self, results: list[str]) -> list[str]:
        """Random values no result depends on: capture drops dead code, and the generator's state
        would then differ for a reason that is not the plan's."""
        live, unread = set(re.findall(r"\w+", " ".join(results))), []
        for line in reversed(self.body):
            left, _, right = line.removeprefix("with torch.no_grad(): ").partition(" = ")
            names = re.findall(r"\w+", left)
            is_draw = re.search(r"drop\d|F.dropout|rand_like|dropout_p=0.2", right)
            if is_draw and not live.intersection(names):
                unread.append(names[0])
                live.add(names[0])
            if live.intersection(names) and "[" not in left:
                live.update(re.findall(r"\w+", right))
        return unread


Operation = Callable[[Draft], object]
OPERATIONS: list[Operation] = []
WEIGHTS: list[float] = []


def operation(weight: float = 1.0) -> Callable[[Operation], Operation]:
    def register(function: Operation) -> Operation:
        OPERATIONS.append(function)
        WEIGHTS.append(weight)
        return function

    return register


def on(low: int = 1, high: int = 4) -> Callable[[Callable[[Draft, Value], object]], Operation]:
    """Runs the operation on a value of suitable rank, or does nothing where there is none."""

    def wrap(function: Callable[[Draft, Value], object]) -> Operation:
        def apply(d: Draft) -> object:
            value = d.pick(low, high)
            return None if value is None else function(d, value)

        return apply

    return wrap


# Products.


@operation(3)
@on(2)
def product(d: Draft, v: Value) -> Value:
    n = d.size()
    return d.let(f"{v.name} @ {d.weight(v.shape[-1], n)}", *v.shape[:-1], n)


PRODUCT = product


@operation(2)
@on(2)
def linear(d: Draft, v: Value) -> Value:
    n = d.size()
    layer = d.part(f"nn.Linear({v.shape[-1]}, {n})", "linear")
    return d.let(f"{layer}({v.name})", *v.shape[:-1], n)


@operation(0.7)
@on(2)
def gram(d: Draft, v: Value) -> Value:
    rows = v.shape[-2]
    code = f"{v.name} @ {v.name}.transpose(-1, -2) / {v.shape[-1]}"
    return d.let(code, *v.shape[:-2], rows, rows)


@operation(0.7)
@on(3)
def attention(d: Draft, v: Value) -> Value:
    p = d.rng.choice((0.0, 0.2))
    args = ", ".join([v.name] * 3)
    return d.let(f"F.scaled_dot_product_attention({args}, dropout_p={p})", *v.shape)


@operation(2)
@on(3)
def convolution(d: Draft, v: Value) -> Value:
    channels, n, dims = v.shape[1], d.size(), v.rank - 2
    groups = channels if d.rng.random() < 0.3 else 1
    n = channels if groups > 1 else n
    layer = f"nn.Conv{dims}d({channels}, {n}, 3, padding=1, groups={groups})"
    return d.let(f"{d.part(layer, 'conv')}({v.name})", v.shape[0], n, *v.shape[2:])


# Norms.


@operation(1.5)
@on(2)
def layer_norm(d: Draft, v: Value) -> Value | None:
    if v.shape[-1] < 3:
        return None
    return d.let(f"{d.part(f'nn.LayerNorm({v.shape[-1]})', 'norm')}({v.name})", *v.shape)


@operation(1.5)
@on(2)
def batch_norm(d: Draft, v: Value) -> Value | None:
    if v.numel // v.shape[1] < 3:
        return None
    kind = 2 if v.rank == 4 else 1
    return d.let(f"{d.part(f'nn.BatchNorm{kind}d({v.shape[1]})', 'norm')}({v.name})", *v.shape)


@operation()
@on(3)
def group_norm(d: Draft, v: Value) -> Value | None:
    channels = v.shape[1]
    groups = d.rng.choice([g for g in (1, 2, 4) if channels % g == 0])
    if v.numel // v.shape[0] // groups < 3:
        return None
    return d.let(f"{d.part(f'nn.GroupNorm({groups}, {channels})', 'norm')}({v.name})", *v.shape)


# Pointwise.

SCALAR_MAPS = (
    *("torch.relu({})", "F.gelu({})", "F.silu({})", "torch.tanh({})", "torch.sigmoid({})"),
    *("torch.sin({})", "F.softplus({})", "F.leaky_relu({}, 0.1)", "{}.abs()", "F.hardtanh({})"),
    *("torch.exp(-{}.abs())", "torch.sqrt({0} * {0} + 1)", "{}.clamp(-1, 1)", "{} * 0.5 + 1"),
)


@operation(5)
@on()
def activation(d: Draft, v: Value) -> Value:
    return d.let(d.rng.choice(SCALAR_MAPS).format(v.name), *v.shape)


@operation()
@on()
def softmax(d: Draft, v: Value) -> Value:
    name = d.rng.choice(("softmax", "log_softmax"))
    return d.let(f"F.{name}({v.name}, dim={d.rng.choice((-1, 0))})", *v.shape)


@operation(2)
@on()
def dropout(d: Draft, v: Value) -> Value:
    p = d.rng.choice((0.1, 0.5))
    layer = f"{d.part(f'nn.Dropout({p})', 'drop')}({v.name})"
    code = (
        layer,
        f"F.dropout({v.name}, {p}, self.training)",
        f"{v.name} * torch.rand_like({v.name})",
    )
    return d.let(d.rng.choice(code), *v.shape)


@operation(3)
@on()
def residual(d: Draft, v: Value) -> Value:
    """With another value of that shape, or one that broadcasts, or with itself transformed."""
    fits = [u for u in d.values if u.shape == v.shape or u.shape == v.shape[-u.rank :]]
    other = d.rng.choice(fits)
    if other.name == v.name:
        return d.let(f"{v.name} + {d.rng.choice(SCALAR_MAPS).format(v.name)}", *v.shape)
    return d.let(f"{v.name} {d.rng.choice('+-*')} {other.name}", *v.shape)


@operation()
@on()
def where(d: Draft, v: Value) -> Value:
    code = (
        f"torch.where({v.name} > 0, torch.sin({v.name}), 0.5 * {v.name})",
        f"{v.name}.masked_fill({v.name} < 0, 0.25)",
    )
    return d.let(d.rng.choice(code), *v.shape)


@operation(0.4)
@on()
def other_precision(d: Draft, v: Value) -> Value:
    return d.let(f"torch.tanh({v.name}.double()).to({v.name}.dtype)", *v.shape)


# Views and layouts.


@operation(2)
@on(2)
def transpose(d: Draft, v: Value) -> Value:
    a, b = d.rng.sample(range(v.rank), 2)
    shape = list(v.shape)
    shape[a], shape[b] = shape[b], shape[a]
    tail = d.rng.choice(("", "", ".contiguous()"))
    return d.let(f"{v.name}.transpose({a}, {b}){tail}", *shape)


@operation(2)
@on(1, 4)
def reshape(d: Draft, v: Value) -> Value:
    dim = d.rng.randrange(v.rank)
    kind = d.rng.random()
    if kind < 0.4 and v.rank < 4:
        return d.let(f"{v.name}.unsqueeze({dim})", *v.shape[:dim], 1, *v.shape[dim:])
    if kind < 0.7 and v.rank > 2:
        return d.let(f"{v.name}.flatten(0, 1)", v.shape[0] * v.shape[1], *v.shape[2:])
    if v.rank < 4 and v.shape[-1] % 2 == 0:
        half = v.shape[-1] // 2
        return d.let(
            f"{v.name}.reshape({', '.join(map(str, (*v.shape[:-1], 2, half)))})",
            *v.shape[:-1],
            2,
            half,
        )
    return d.let(f"{v.name}.reshape({v.shape[0]}, -1)", v.shape[0], v.numel // v.shape[0])


@operation(2)
@on(2)
def cut(d: Draft, v: Value) -> Value:
    """A slice or one entry of a dimension."""
    dim = d.rng.randrange(v.rank)
    size, shape = v.shape[dim], list(v.shape)
    if v.rank > 2 and d.rng.random() < 0.3:
        del shape[dim]
        return d.let(f"{v.name}.select({dim}, {d.rng.randrange(size)})", *shape)
    start = d.rng.randrange(size)
    shape[dim] = d.rng.randint(1, size - start)
    return d.let(f"{v.name}.narrow({dim}, {start}, {shape[dim]})", *shape)


@operation(0.7)
@on(1, 3)
def expand(d: Draft, v: Value) -> Value:
    n = d.rng.choice((2, 3))
    return d.let(f"{v.name}.expand({', '.join(map(str, (n, *v.shape)))})", n, *v.shape)


@operation(1.5)
@on(2)
def cat(d: Draft, v: Value) -> Value:
    dim = d.rng.randrange(v.rank)
    rest = (*v.shape[:dim], *v.shape[dim + 1 :])
    fits = [
        u for u in d.values if u.rank == v.rank and (*u.shape[:dim], *u.shape[dim + 1 :]) == rest
    ]
    other = d.rng.choice(fits)
    n = v.shape[dim] + other.shape[dim]
    return d.let(
        f"torch.cat([{v.name}, {other.name}], {dim})", *v.shape[:dim], n, *v.shape[dim + 1 :]
    )


@operation(1.5)
@on(2)
def split(d: Draft, v: Value) -> None:
    """In two parts, both live on: by a split at a place, or a chunk."""
    dim = d.rng.randrange(v.rank)
    n = v.shape[dim]
    if n < 2:
        return
    first = (n + 1) // 2 if d.rng.random() < 0.5 else d.rng.randint(1, n - 1)
    code = f"chunk(2, {dim})" if first == (n + 1) // 2 else f"split([{first}, {n - first}], {dim})"
    names = d.name("h"), d.name("h")
    d.body.append(f"{', '.join(names)} = {v.name}.{code}")
    for name, part in zip(names, (first, n - first), strict=True):
        d.values.append(Value(name, (*v.shape[:dim], part, *v.shape[dim + 1 :])))


# Indices.


@operation()
@on(2)
def gather(d: Draft, v: Value) -> Value:
    code = (
        f"{v.name}.gather(-1, {v.name}.argsort(-1))",
        f"{v.name}.sort(-1).values",
        f"{v.name}.gather(-1, torch.zeros_like({v.name}, dtype=torch.long))",
    )
    return d.let(d.rng.choice(code), *v.shape)


@operation()
@on(2)
def topk(d: Draft, v: Value) -> Value:
    k = d.rng.randint(1, v.shape[-1])
    values, index = d.name("h"), d.name("i")
    d.body.append(f"{values}, {index} = {v.name}.topk({k}, -1)")
    d.values.append(Value(values, (*v.shape[:-1], k)))
    return d.let(f"{v.name}.tanh().gather(-1, {index})", *v.shape[:-1], k)


@operation()
@on(2)
def index_select(d: Draft, v: Value) -> Value:
    index = d.name("index")
    picked = [d.rng.randrange(v.shape[0]) for _ in range(d.rng.randint(1, 5))]
    d.setup.append(f'self.register_buffer("{index}", torch.tensor({picked}))')
    code = d.rng.choice((f"{v.name}.index_select(0, self.{index})", f"{v.name}[self.{index}]"))
    return d.let(code, len(picked), *v.shape[1:])


@operation()
@on(2)
def scatter_add(d: Draft, v: Value) -> Value:
    index = f"({v.name} > 0).long()"
    shape = (*v.shape[:-1], 2)
    zeros = f"{v.name}.new_zeros({', '.join(map(str, shape))})"
    return d.let(f"{zeros}.scatter_add(-1, {index}, {v.name})", *shape)


# Reductions.


@operation(1.5)
@on(2)
def reduction(d: Draft, v: Value) -> Value:
    dim = d.rng.randrange(v.rank)
    keep = d.rng.random() < 0.6
    name = d.rng.choice(("sum", "mean", "amax", "logsumexp"))
    shape = (*v.shape[:dim], *((1,) if keep else ()), *v.shape[dim + 1 :])
    return d.let(f"{v.name}.{name}({dim}, keepdim={keep})", *shape)


@operation(0.7)
@on(2)
def running_mean(d: Draft, v: Value) -> Value:
    return d.let(f"{v.name}.cumsum(-1) / {v.shape[-1]}", *v.shape)


# Writes.


@operation(2)
@on(1)
def write(d: Draft, v: Value) -> Value:
    """In place, on the value itself or on one made for it."""
    if v.name.startswith("x") or d.rng.random() < 0.6:
        v = d.let(f"{v.name} * {d.rng.choice((0.5, 2.0))}", *v.shape)
    code = (
        *(
            "{}.relu_()",
            "{}.add_(1)",
            "{}.mul_(0.5)",
            "{}.clamp_(-2, 2)",
            "F.relu({}, inplace=True)",
        ),
        *("{}[..., :1].mul_(2)", "{}[..., 0] = 0.5", "{}.view(-1)[0].add_(1)"),
    )
    d.body.append(d.rng.choice(code).format(v.name))
    d.values.append(v)
    return v


@operation(1.5)
@on(2)
def buffer_write(d: Draft, v: Value) -> Value:
    """Read before, written, perhaps read after."""
    b = d.buffer(v.shape[-1])
    h = d.let(f"torch.sin({v.name} * {b})", *v.shape)
    update = (
        f"{b}.add_(1)",
        f"{b}.mul_(0.9).add_({h.name}.detach().flatten(0, -2).mean(0), alpha=0.1)",
        f"{b}.copy_({h.name}.detach().flatten(0, -2).amax(0))",
    )
    d.body.append(d.rng.choice(update))
    return d.let(f"{h.name} + {b}", *v.shape) if d.rng.random() < 0.5 else h


@operation(0.7)
def input_write(d: Draft) -> Value | None:
    """On an input that asks for no gradient; its old value was read."""
    free = [i for i, (_, wants_grad) in enumerate(d.inputs) if not wants_grad]
    if not free:
        return None
    i = d.rng.choice(free)
    shape = d.inputs[i][0]
    h = d.let(f"torch.sin(x{i} @ {d.weight(shape[-1], shape[-1])}) * (x{i} * 2)", *shape)
    d.body.append(f"x{i}.{d.rng.choice(('add_(1)', 'mul_(0.5)'))}")
    return h


# Cuts in the graph of gradients.


@operation()
@on()
def no_grad(d: Draft, v: Value) -> Value:
    name = d.name("h")
    code = d.rng.choice(SCALAR_MAPS).format(v.name)
    d.body.append(f"with torch.no_grad(): {name} = {code}")
    d.values.append(Value(name, v.shape))
    return d.let(f"{v.name} * {name}", *v.shape)


@operation(0.7)
@on()
def detach(d: Draft, v: Value) -> Value:
    return d.let(f"{v.name} - 0.5 * {v.name}.detach()", *v.shape)
