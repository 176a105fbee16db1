"""The promises on a GPU: bytes by CUDA's allocator, bits against eager."""

import subprocess
import sys

import pytest
import torch
from families import FAMILIES, loss_of
from torch.utils import _pytree as pytree

import fxmem
from fxmem.basics.device import library_memory

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

BUDGETS = ("1TiB", "0.6x", "0.4x")


@pytest.fixture(autouse=True)
def deterministic(monkeypatch):
    """cuDNN may choose a kernel that adds in another order each time."""
    monkeypatch.setattr(torch.backends.cudnn, "deterministic", True)


def on_cuda(family):
    built = FAMILIES[family].build("small")
    model, args, kwargs = built
    args, kwargs = pytree.tree_map_only(torch.Tensor, lambda t: t.cuda(), (args, kwargs))
    return model.cuda(), args, kwargs


def step(module, model, args, kwargs):
    """Loss and gradients, and the bytes that the allocator handed out at most."""
    model.zero_grad(set_to_none=True)
    torch.manual_seed(0)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    output = module(*args, **kwargs)
    loss_of(output).backward()
    torch.cuda.synchronize()
    peak = torch.cuda.max_memory_allocated() - before
    found = [loss_of(output).detach(), *(p.grad for p in model.parameters())]
    return [None if f is None else f.clone() for f in found], peak


def equal(left, right):
    return all(a is b or torch.equal(a, b) for a, b in zip(left, right, strict=True))


@pytest.mark.parametrize("family", FAMILIES)
def test_family(family):
    model, args, kwargs = on_cuda(family)
    state = {name: value.clone() for name, value in model.state_dict().items()}
    step(model, model, args, kwargs)

    def again(module):
        model.load_state_dict(state)
        return step(module, model, args, kwargs)

    (eager, eager_peak), (repeated, _) = again(model), again(model)
    for budget in BUDGETS:
        opt = fxmem.optimize(model, budget, args, example_kwargs=kwargs, on_infeasible="best")
        again(opt)
        mine, peak = again(opt)
        predicted = opt.plan.predicted_peak - opt.plan.resident
        assert peak <= predicted * 1.001, budget
        assert predicted <= peak * 1.005, budget
        if equal(eager, repeated):
            assert equal(eager, mine), budget
    assert abs(opt.plan.baseline_peak - opt.plan.resident - eager_peak) <= 0.01 * eager_peak


def test_what_cublas_keeps():
    """In a process of its own, where no product has run yet."""
    code = (
        "import torch\n"
        "x = torch.ones(64, 64, device='cuda', requires_grad=True)\n"
        "before = torch.cuda.memory_allocated()\n"
        "(x @ x).sum().backward()\n"
        "x.grad = None\n"
        "print(torch.cuda.memory_allocated() - before)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert int(done.stdout) == library_memory(torch.device("cuda", 0))
