"""Training on two processes, for tests/test_distributed.py: ``python data_parallel.py PROGRAM FILE``.

Both ranks run the program, then each writes what it saw to FILE.RANK as JSON.
"""

import copy
import json
import sys
import threading
import time
from collections import Counter
from datetime import timedelta
from itertools import accumulate
from pathlib import Path
from unittest import mock

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.distributed import _functional_collectives as collectives
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.nn.parallel import DistributedDataParallel
from torch.utils._python_dispatch import TorchDispatchMode

import fxmem
from fxmem import backend
from fxmem._torch import distributed as _torch_distributed
from fxmem._torch.profiler import mark, record
from fxmem.graphs.measure import cpu_allocations
from fxmem.planning import ranks

WIDTH, ROWS = 64, 256


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(WIDTH, 2 * WIDTH), nn.Linear(2 * WIDTH, WIDTH)
        self.drop = nn.Dropout(0.1)

    def forward(self, x):
        return x + self.drop(self.down(F.gelu(self.up(x)).tanh()))


class Net(nn.Module):
    def __init__(self, depth=3):
        super().__init__()
        self.blocks = nn.ModuleList(Block() for _ in range(depth))

    def forward(self, x):
        for block in self.blocks:
            x = block(x)
        return x.square().mean()


def made(make, *args):
    torch.manual_seed(0)
    return make(*args)


def batch(width=WIDTH, rows=ROWS):
    return torch.randn(rows, width, generator=torch.Generator().manual_seed(dist.get_rank()))


def step(run, x):
    torch.manual_seed(7 + dist.get_rank())
    loss = run(x)
    loss.backward()
    return loss


def by_hand(model, x):
    """Gradients of the model as it is, averaged over the ranks by hand."""
    model = copy.deepcopy(model)
    step(model, x)
    found = {name: p.grad / 2 for name, p in model.named_parameters()}
    for gradient in found.values():
        dist.all_reduce(gradient)
    return found


def whole(tensor):
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def trained(run, model, x, want, steps=20):
    """Names of gradients that were not what was wanted in one of the steps."""
    wrong = set()
    for _ in range(steps):
        model.zero_grad(set_to_none=True)
        step(run, x)
        for name, p in model.named_parameters():
            if p.grad is None or not torch.equal(whole(p.grad), want[name]):
                wrong.add(name)
    return sorted(wrong)


def held(run, model, x):
    """Bytes at the peak of a step: what is there when it begins, and what it adds."""
    model.zero_grad(set_to_none=True)
    sizes, loss = cpu_allocations(lambda: step(run, x))
    del loss
    model.zero_grad(set_to_none=True)
    states = [*model.parameters(), *model.buffers(), x]
    local = [t.to_local() if isinstance(t, DTensor) else t for t in states]
    return sum(t.nbytes for t in local) + max(accumulate(sizes))


def first_steps(make, model, x, steps=3):
    """What ``make`` gives, and bytes at the peak of its first steps.

    Measured in one go, so that memory that one step lets go of, and no tensor of Python's, is heard of.
    """

    def training():
        run = make()
        for _ in range(steps):
            model.zero_grad(set_to_none=True)
            mark("step")
            step(run, x)
        return run

    model.zero_grad(set_to_none=True)
    events, run = record(training)
    alive, peaks, resident = {}, [], sum(t.nbytes for t in (*model.parameters(), x))
    for event in events:
        if event.mark == "step":
            peaks.append(0)
        elif event.nbytes > 0:
            alive[event.address] = event.nbytes
        else:
            alive.pop(event.address, None)
        if peaks:
            peaks[-1] = max(peaks[-1], resident + sum(alive.values()))
    return run, peaks


def plans_of(run):
    return [[ranks.hashed(p), p.predicted_peak, p.budget] for p in fxmem.plans(run)]


def eager_peak(model, x):
    return held(copy.deepcopy(model), copy.deepcopy(model), x)


# -- Programs ----------------------------------------------------------------------------------------


def ddp_around_optimized():
    """Gradients, budget and state under DDP around an optimized module."""
    model, x = made(Net), batch()
    want = by_hand(model, x)
    step_ = fxmem.optimize(model, "0.7x", (x,))
    run = DistributedDataParallel(step_)
    wrong = trained(run, model, x, want)
    return {
        "wrong": wrong,
        "held": held(run, model, x),
        "unchanged": eager_peak(model, x),
        "budget": step_.plan.budget,
        "plans": [ranks.hashed(step_.plan)],
    }


def small_buckets(model):
    dist._DEFAULT_FIRST_BUCKET_BYTES = 1024  # so that a small model has more than one
    return DistributedDataParallel(model, bucket_cap_mb=0.13)


def compiled_ddp():
    """Compiled around DDP, a model comes in a graph for each bucket."""
    model, x = made(Net, 4), batch()
    plain = small_buckets(copy.deepcopy(model))
    step(plain, x)
    want = {name: p.grad for name, p in plain.module.named_parameters()}
    unchanged = eager_peak(model, x) + bytes_of(model)
    budget = int(0.8 * unchanged)

    def compiled():
        ddp = small_buckets(model)
        return torch.compile(ddp, backend="fxmem", options={"budget": budget})

    run, first = first_steps(compiled, model, x)  # in the second, DDP makes its buckets anew
    wrong = trained(run, model, x, want)
    return {
        "wrong": wrong,
        "first": first,
        "held": held(run, model, x) + bytes_of(model),
        "unchanged": unchanged,
        "budget": budget,
        "plans": plans_of(run),
    }


class Normed(nn.Module):
    """Running statistics and dropout; all its sizes follow the batch's."""

    def __init__(self):
        super().__init__()
        self.ups = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(6))
        self.norms = nn.ModuleList(nn.BatchNorm1d(WIDTH) for _ in range(6))

    def forward(self, x):
        for up, norm in zip(self.ups, self.norms, strict=True):
            x = x + F.dropout(norm(up(x)).relu(), 0.2, self.training)
        return x.square().mean()


def compiled_ddp_at_other_sizes():
    """Statistics, accumulated gradients, evaluations in between, batches of other sizes."""
    seen = []
    for how in (lambda ddp: ddp, compiled_at_min):
        ddp = small_buckets(made(Normed))
        run, losses = how(ddp), []
        for rows in (32, 48, 32):
            with ddp.no_sync():
                losses.append(step(run, batch(rows=rows)).item())
            losses.append(step(run, batch(rows=rows)).item())
            run.eval()
            with torch.no_grad():
                losses.append(run(batch(rows=rows)).item())
            run.train()
        states = [*(p.grad for p in ddp.parameters()), *ddp.buffers()]
        seen.append((losses, states))
    (want, states), (got, theirs) = seen
    pairs = zip(states, theirs, strict=True)
    return {
        "losses": [want, got],
        "wrong": sum(not torch.equal(a, b) for a, b in pairs),
        "graphs": len(fxmem.plans(ddp)),
    }


def compiled_at_min(ddp):
    return torch.compile(ddp, backend="fxmem", options={"budget": "min"})


def bytes_of(model):
    """The buckets hold a copy of each gradient."""
    return sum(p.nbytes for p in model.parameters())


SHARE = 0.95


def sharded():
    """FSDP2 with the backend on the whole model."""
    model, x = made(Net, 2), batch()
    want = by_hand(model, x)
    for block in model.blocks:
        fully_shard(block)
    fully_shard(model)
    step(model, x)  # the first step gathers for the first time
    unchanged = held(model, model, x)
    budget = int(SHARE * unchanged)
    run = torch.compile(model, backend="fxmem", options={"budget": budget})
    wrong = trained(run, model, x, want)
    return {
        "wrong": wrong,
        "held": held(run, model, x),
        "budget": budget,
        "unchanged": unchanged,
        "plans": plans_of(run),
    }


# Seconds that hang on arithmetic alone, and on memory alone.
SKEWED = (
    {"flops": 1e9, "bandwidth": 1e15, "launch": 0.0},
    {"flops": 1e15, "bandwidth": 1e9, "launch": 1e-6},
)


def ranks_that_plan_otherwise():
    """Each rank has times of its own, and would plan by them."""
    model, x = made(Net, 2), batch()
    mine = fxmem.CostModel("skewed", **SKEWED[dist.get_rank()])
    with mock.patch.object(_torch_distributed, "shared_store", return_value=None):
        alone = fxmem.plan(model, "0.7x", (x,), cost=mine)
    step_ = fxmem.optimize(model, "0.7x", (x,), cost=mine)
    want = by_hand(model, x)
    return {
        "alone": ranks.hashed(alone),
        "together": ranks.hashed(step_.plan),
        "wrong": trained(DistributedDataParallel(step_), model, x, want, steps=2),
    }


class Talking(nn.Module):
    """Sums over the ranks in the middle of the forward."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(16, 64), nn.Linear(64, 16)

    def forward(self, x):
        h = collectives.all_reduce(self.a(x).tanh(), "sum", dist.group.WORLD)
        return self.b(h.sin()).cos().square().mean()


class Collectives(TorchDispatchMode):
    """Counts collectives by operator."""

    def __init__(self):
        super().__init__()
        self.seen = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if "c10d" in func.namespace and "wait" not in str(func):
            self.seen[str(func)] += 1
        return func(*args, **(kwargs or {}))


def collectives_in_the_graph():
    model, x = made(Talking), batch(16, 8)
    run = fxmem.optimize(copy.deepcopy(model), "min", (x,))
    seen = []
    for one in (model, run):
        with Collectives() as counted:
            step(one, x)
        seen.append(dict(counted.seen))
    pairs = zip(model.parameters(), run.parameters(), strict=True)
    kept = [d.reason for d in run.plan.decisions if "processes" in d.reason]
    return {
        "eager": seen[0],
        "planned": seen[1],
        "equal": all(torch.equal(a.grad, b.grad) for a, b in pairs),
        "kept": kept,
    }


def tensor_parallel():
    model, x = made(lambda: nn.Sequential(nn.Linear(16, 32), nn.Linear(32, 16))), batch(16, 8)
    mesh = init_device_mesh("cpu", (2,))
    model = parallelize_module(model, mesh, {"0": ColwiseParallel(), "1": RowwiseParallel()})
    errors = []
    compiled = torch.compile(model, backend="fxmem", options={"budget": "min"})
    for attempt in (lambda: fxmem.optimize(model, "min", (x,)), lambda: compiled(x)):
        try:
            attempt()
        except fxmem.CaptureError as error:
            errors.append(str(error))
    return {"errors": errors, "beside": parallel_beside_planned()}


class Partly(nn.Module):
    """One half is to be parallelized, the other to be planned."""

    def __init__(self):
        super().__init__()
        self.wide = nn.Sequential(nn.Linear(WIDTH, 128), nn.GELU(), nn.Linear(128, WIDTH))
        self.block = Block()

    def forward(self, x):
        # Compiled blocks cannot send gradients to a result that is still on its way: torch 2.13.
        return self.block(x + self.wide(x)).square().mean()


def parallel_beside_planned():
    """What the error says to try: the gradients, and whether there is a plan."""
    x, seen = batch(), []
    for planned in (False, True):
        model = made(Partly)
        mesh = init_device_mesh("cpu", (2,))
        parallelize_module(model.wide, mesh, {"0": ColwiseParallel(), "2": RowwiseParallel()})
        if planned:
            model.block.compile(backend="fxmem", options={"budget": "min"})
        step(model, x)
        seen.append([whole(p.grad) for p in model.parameters()])
    pairs = zip(*seen, strict=True)
    return [all(torch.equal(a, b) for a, b in pairs), len(fxmem.plans(model.block))]


def collective_that_ends_after_a_measurement():
    """How often it then wrote to what gloo's thread had allocated since."""
    x, ended, kept, written = torch.ones(8), threading.Event(), [], 0

    def slow(_):  # on gloo's thread, between the future that is waited for and the collective's end
        ended.wait(60)
        kept.extend(bytearray(1500) for _ in range(400))

    def work():
        future = dist.all_reduce(x, async_op=True).get_future()
        future.add_done_callback(slow)
        future.wait()

    for _ in range(10):
        ended.clear()
        if dist.get_rank():
            time.sleep(0.02)  # the other rank has its callback set by then
            dist.all_reduce(x)
        else:
            cpu_allocations(work)
        ended.set()
        dist.barrier()
        written += any(map(any, kept))
        kept.clear()
    return written


def main(rank, names, file, rendezvous):
    torch.set_num_threads(1)
    if "fxmem" not in torch._dynamo.list_backends(()):
        torch._dynamo.register_backend(backend.fxmem, name="fxmem")
    # A hang ends in an error of the process group, and that in a failed test.
    dist.init_process_group(
        "gloo", f"file://{rendezvous}", timedelta(seconds=60), rank=rank, world_size=2
    )
    seen = {}
    for name in names:
        torch._dynamo.reset()
        seen[name] = globals()[name]()
        dist.barrier()
    Path(f"{file}.{rank}").write_text(json.dumps(seen))
    dist.destroy_process_group()


if __name__ == "__main__":
    *programs, path = sys.argv[1:]
    torch.multiprocessing.spawn(main, (programs, path, f"{path}.rendezvous"), nprocs=2)
