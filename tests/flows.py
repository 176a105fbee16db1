"""Random dataflows: the planner's problem without a model."""

import random
from dataclasses import replace
from typing import cast

from torch import fx

from fxmem.analysis.dataflow import NOISE_CEILING, Dataflow, Operator, Value
from fxmem.graphs.graph import LOSS_OUTSIDE

NODE = cast(fx.Node, None)  # no graph stands behind these


def random_flow(seed: int, forward: int | None = None) -> Dataflow:
    """A step with a few forward operators, their backward and all that the simulator knows of."""
    rng = random.Random(f"flow {seed}")
    forward = rng.randint(2, 12) if forward is None else forward
    values = [Value(rng.randint(0, 9), NODE, resident=True) for _ in range(rng.randint(1, 2))]
    operators: list[Operator] = []
    ready = list(range(len(values)))
    for i in range(forward):
        operators.append(_operator(rng, i, ready, values))
        _write_over(operators[-1], values)
    forward_values = [v for op in operators for v in op.remakes]
    values[forward_values[-1]].result = True
    for v in forward_values:
        values[v].result |= rng.random() < 0.05
        values[v].update |= rng.random() < 0.05
    values.append(Value(rng.randint(0, 3), NODE, tangent=True, held=rng.random() < 0.3))
    gradients = [len(values) - 1]
    for i in reversed(range(forward)):
        if rng.random() < 0.2:
            continue
        op = operators[i]
        wanted = {v for v in (*op.reads, *op.remakes) if values[v].producer >= 0}
        reads = {v for v in wanted if rng.random() < 0.6} | {gradients[-1]}
        if rng.random() < 0.2:
            reads.add(rng.choice(gradients))
        j = len(operators)
        values.append(Value(rng.randint(0, 5), NODE, producer=j, gradient=rng.random() < 0.4))
        gradients.append(len(values) - 1)
        operators.append(
            Operator(NODE, True, tuple(sorted(reads)), (len(values) - 1,), _workspace(rng), 1e-6)
        )
    if rng.random() < 0.1:
        values[rng.choice(forward_values)].gradient = True
    sent = sum(v.nbytes for v in values if v.tangent and not v.held)
    return Dataflow(operators, values, forward, loss_outside=LOSS_OUTSIDE * sent)


def coded_flow(seed: int, forward: int | None = None) -> Dataflow:
    """The same where half of what the backward reads of the forward may be read as a code."""
    rng = random.Random(f"codes {seed}")
    flow = random_flow(seed, forward)
    backward = flow.operators[flow.num_forward :]
    made = {v for op in flow.operators[: flow.num_forward] for v in op.remakes}
    codes: dict[int, int] = {}
    for op in backward:
        for v in sorted(made.intersection(op.reads)):
            if rng.random() < 0.5:
                if v not in codes:
                    codes[v] = len(flow.values)
                    size = rng.randint(0, flow.values[v].nbytes)
                    keeping = rng.randint(0, 3) * 1e-6
                    flow.values.append(Value(size, NODE, code=True, keeping=keeping))
                op.reads = tuple(sorted({codes[v], *op.reads} - {v}))
    operators: list[Operator] = []
    for op in flow.operators:
        operators.append(op)
        for v in sorted(codes.keys() & set(op.makes)):
            code = (codes[v],)
            operators.append(Operator(NODE, False, (v,), code, 0, 0.0, True, remakes=code))
    for i, op in enumerate(operators):
        for v in op.makes:
            flow.values[v].producer = i
    return replace(flow, operators=operators, num_forward=flow.num_forward + len(codes))


def noisy_flow(seed: int, forward: int | None = None) -> Dataflow:
    """The same where some of it may be read as a lossy code: by the reader itself, or decoded before it."""
    rng = random.Random(f"noise {seed}")
    flow = random_flow(seed, forward)
    values, backward = flow.values, flow.operators[flow.num_forward :]
    made = {v for op in flow.operators[: flow.num_forward] for v in op.remakes}
    read = sorted(made.intersection(v for op in backward for v in op.reads))
    values.append(Value(1, NODE))
    seeds = (len(values) - 1,)
    codes: dict[int, int] = {}
    for v in read:
        if rng.random() < 0.6 and not values[v].gradient:
            codes[v] = len(values)
            noise = rng.choice((1, NOISE_CEILING // 4, NOISE_CEILING // 2))
            keeping = rng.randint(0, 3) * 1e-6
            size = rng.randint(0, values[v].nbytes)
            values.append(Value(size, NODE, code=True, keeping=keeping, noise=noise))
    operators: list[Operator] = [Operator(NODE, False, (), seeds, 0, 0.0, False, remakes=seeds)]
    for op in flow.operators:
        coded = sorted(codes.keys() & set(op.reads)) if op.backward else []
        if coded and rng.random() < 0.3:
            v = coded.pop()
            op.reads = tuple(sorted({codes[v], *op.reads} - {v}))
        for v in coded:
            values.append(Value(values[v].nbytes, NODE))
            decoded = (len(values) - 1,)
            operators.append(
                Operator(NODE, True, (codes[v],), decoded, _workspace(rng), 0.0, decodes=True)
            )
            op.reads = tuple(sorted({*decoded, *op.reads} - {v}))
        direct = set(op.reads).intersection(codes.values())
        if coded and not direct and rng.random() < 0.3:  # it writes over what is decoded
            op.reads = tuple(sorted({codes[coded[0]], *op.reads}))
        operators.append(op)
        for v in sorted(codes.keys() & set(op.makes)):
            code, work = (codes[v],), _workspace(rng)
            operators.append(
                Operator(NODE, False, (*seeds, v), code, work, 0.0, True, remakes=code)
            )
    for i, op in enumerate(operators):
        for v in op.makes:
            values[v].producer = i
    forward = flow.num_forward + len(codes) + 1
    return replace(flow, operators=operators, values=values, num_forward=forward)


def _operator(rng: random.Random, i: int, ready: list[int], values: list[Value]) -> Operator:
    reads = {rng.choice(ready[-4:]) for _ in range(rng.randint(1, 3))}
    if rng.random() < 0.2:
        reads.add(rng.choice(ready))
    makes = []
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        makes.append(len(values))
        values.append(Value(rng.choice((0, 5, 8, 8, rng.randint(0, 20))), NODE, producer=i))
    remakes = tuple(makes)
    ready += makes
    if rng.random() < 0.1:  # a statistic that only the first run returns
        makes.append(len(values))
        values.append(Value(rng.randint(0, 5), NODE, producer=i, update=True))
        if rng.random() < 0.5:
            ready.append(makes[-1])
    return Operator(
        NODE,
        False,
        tuple(sorted(reads)),
        tuple(makes),
        _workspace(rng),
        rng.randint(1, 9) * 1e-6,
        recomputable=rng.random() < 0.9,
        rng_state=rng.choice((0, 0, 0, 4)),
        remakes=remakes,
    )


def _write_over(op: Operator, values: list[Value]) -> None:
    """Every other operator may write its result over those of its operands that are as large."""
    made = [v for v in op.reads if values[v].producer >= 0]
    if made and len(op.makes) == 1 and op.makes[0] % 2:
        nbytes = values[op.makes[0]].nbytes = values[made[0]].nbytes
        op.writes_over = tuple(v for v in made if values[v].nbytes == nbytes)


def _workspace(rng: random.Random) -> int:
    return rng.choice((0, 0, 0, rng.randint(1, 10)))
