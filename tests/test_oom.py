"""Out of memory: torch's messages read, the categories added up, everything else refused."""

import json

import pytest
import torch
from expecttest import assert_expected_inline
from hypothesis import given
from hypothesis import strategies as st

import fxmem
from fxmem.reports.oom import OutOfMemory, read_message
from fxmem.steps.decisions import infeasible
from tests.test_report import MIB, make_certificate, make_plan

GIB = 2**30

# Written by torch 2.11 on a real device; 2.13 renamed the variable in its advice.
CUDA = (
    "CUDA out of memory. Tried to allocate 7.00 GiB. GPU 0 has a total capacity of 139.80 GiB of "
    "which 5.88 GiB is free. Including non-PyTorch memory, this process has 133.91 GiB memory in "
    "use. Of the allocated memory 133.19 GiB is allocated by PyTorch, and 0 bytes is reserved by "
    "PyTorch but unallocated. If reserved but unallocated memory is large try setting "
    "PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True to avoid fragmentation."
)
CAPPED = (
    "CUDA out of memory. Tried to allocate 20.00 GiB. GPU 0 has a total capacity of 139.80 GiB of "
    "which 138.88 GiB is free. Including non-PyTorch memory, this process has 934.00 MiB memory in "
    "use. 13.98 GiB allowed; Of the allocated memory 192.00 MiB is allocated by PyTorch, and 0 "
    "bytes is reserved by PyTorch but unallocated."
)
SHARED = (
    "CUDA out of memory. Tried to allocate 1.95 GiB. GPU 3 has a total capacity of 14.57 GiB of "
    "which 1.58 GiB is free. Process 2493055 has 12.02 GiB memory in use. Including non-PyTorch "
    "memory, this process has 966.00 MiB memory in use. Of the allocated memory 734.07 MiB is "
    "allocated by PyTorch, and 33.93 MiB is reserved by PyTorch but unallocated. If reserved but "
    "unallocated memory is large try setting PYTORCH_ALLOC_CONF=expandable_segments:True"
)
OLD = (
    "CUDA out of memory. Tried to allocate 36.00 MiB (GPU 0; 7.93 GiB total capacity; 130.35 MiB "
    "already allocated; 47.06 MiB free; 188.00 MiB reserved in total by PyTorch)"
)
CPU = (
    "[enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: can't allocate memory: you "
    "tried to allocate 1000000000000000 bytes. Error code 12 (Cannot allocate memory)"
)


def test_who_held_what():
    assert_expected_inline(
        str(fxmem.explain_oom(torch.OutOfMemoryError(CUDA))),
        """\
Out of memory on CUDA device 0: 7.00 GiB were asked for; 5.88 GiB were free.

when it failed                          GiB      %
------------------------------------  -----  -----
tensors                               133.2   95.3
kept by torch's allocator               0.0    0.0
driver and libraries of this process    0.7    0.5
all else                                0.0    0.0
free                                    5.9    4.2
TOTAL                                 139.8  100.0
Tensors can hold 139.07 GiB here at most: budget 149325275464 bytes ("149325275464B") for
  everything, less where blocks of the allocator do not fit together.
The program needed 140.19 GiB at that moment, or more later.
What of it is the step's, and what a plan would save: fxmem.explain_oom(error, fxmem.plan(model,
  "min", (x,)))""",
    )


def test_other_processes_are_told_apart():
    found = read_message(SHARED)
    assert found.index == 3
    assert dict(found.rows)["all else"] == pytest.approx(12.05 * GIB, rel=1e-3)
    assert sum(nbytes for _, nbytes in found.rows) == found.total


def test_an_allowed_share_bounds_the_room():
    found = fxmem.explain_oom(CAPPED)
    assert found.budget == round(13.98 * GIB)
    assert found.error.process == 934 * MIB


def test_the_message_of_older_versions():
    found = read_message(OLD)
    assert found == OutOfMemory(
        "CUDA",
        36 * MIB,
        0,
        round(7.93 * GIB),
        round(47.06 * MIB),
        None,
        round(130.35 * MIB),
        188 * MIB - round(130.35 * MIB),
    )
    assert "driver, libraries, other processes" in dict(found.rows)
    assert "in pieces that were too small" in str(fxmem.explain_oom(OLD))


@pytest.mark.parametrize("backend", ["HIP", "XPU"])
def test_other_backends(backend):
    assert read_message(CUDA.replace("CUDA", backend, 1)).device == backend


def test_the_cpus_allocator():
    assert read_message(CPU) == OutOfMemory("CPU", 10**15)
    with pytest.raises(RuntimeError) as real:
        torch.empty(10**15, dtype=torch.uint8)
    found = fxmem.explain_oom(real.value)
    assert found.error == OutOfMemory("CPU", 10**15)
    assert found.budget is None
    assert_expected_inline(
        str(found),
        """\
Out of memory on CPU: 909.49 TiB were asked for.
The message does not say who held the rest.
What of it is the step's, and what a plan would save: fxmem.explain_oom(error, fxmem.plan(model,
  "min", (x,)))""",
    )


def test_the_error_below_another_is_found():
    outer = ValueError("the trainer stopped")
    outer.__cause__ = torch.OutOfMemoryError(CUDA)
    assert fxmem.explain_oom(outer).error == read_message(CUDA)


def test_a_plan():
    plan = make_plan(certificate=make_certificate())
    found = fxmem.explain_oom(plan)
    assert found.budget == plan.predicted_peak
    assert_expected_inline(
        str(found),
        """\
GPT: the step peaks at 29.0 MiB as it is, at 11.5 MiB with this plan (+1.4 % time).

Live at the peak (MiB)
category           before  after  change  % of budget
-----------------  ------  -----  ------  -----------
parameters            4.0    4.0     0.0         33.3
saved activations    24.0    7.0   -17.0         58.3
gradients             1.0    0.5    -0.5          4.2
TOTAL                29.0   11.5   -17.5         95.8

A budget of 12058624 bytes ("12058624B") fits with this plan.
The smallest that was shown to be in reach is 9437184 bytes ("min").
What would lower it, each alone:
  about 5.0 MiB less: a batch of 4 for 8; the largest that fits is about 7
  up to 3.0 MiB less: the loss in parts
  1.0 MiB less: 8-bit moments""",
    )


def test_an_error_beside_the_steps_plan():
    message = OLD.replace("7.93 GiB", "200.00 MiB").replace("47.06 MiB free", "4.00 MiB free")
    error = torch.OutOfMemoryError(message)
    small = fxmem.explain_oom(error, make_plan())
    assert small.fits
    assert "would have fitted" in str(small)
    reserve = small.error.room - make_plan().predicted_peak + 1
    tight = fxmem.explain_oom(error, make_plan(reserve=reserve, certificate=make_certificate()))
    assert tight.fits is False
    assert "would not fit either" in str(tight)
    assert "What would lower it" in str(tight)


def test_a_budget_that_nothing_fits():
    plan = make_plan(certificate=make_certificate(), budget=MIB)
    assert fxmem.explain_oom(infeasible(plan)).plan == plan


def test_the_budget_it_names_is_one_that_optimize_takes():
    model = torch.nn.Sequential(torch.nn.Linear(8, 64), torch.nn.ReLU(), torch.nn.Linear(64, 8))
    plan = fxmem.plan(model, "min", (torch.randn(64, 8),))
    found = fxmem.explain_oom(plan)
    again = fxmem.plan(model, f"{found.budget}B", (torch.randn(64, 8),))
    assert again.predicted_peak <= found.budget
    with pytest.raises(fxmem.BudgetInfeasibleError):
        fxmem.plan(model, found.budget - 1, (torch.randn(64, 8),))


@pytest.mark.parametrize(
    "what",
    [
        None,
        7,
        "no memory was harmed",
        "CUDA out of memory.",
        RuntimeError("mat1 and mat2 shapes cannot be multiplied"),
        ValueError(""),
        torch.nn.ReLU(),
        {"plan": 1},
    ],
)
def test_anything_else_is_refused(what):
    with pytest.raises(fxmem.FxmemError, match="is no out-of-memory error"):
        fxmem.explain_oom(what)


def test_a_plan_that_is_none_is_refused():
    with pytest.raises(fxmem.FxmemError, match="plan should be a Plan, not dict"):
        fxmem.explain_oom(CUDA, {})
    with pytest.raises(fxmem.FxmemError, match="two plans"):
        fxmem.explain_oom(make_plan(), make_plan())


@given(st.text(max_size=200), st.integers(0, len(CUDA)))
def test_a_broken_message_is_read_or_refused(text, place):
    for message in (CUDA[:place] + text, CUDA[:place] + text + CUDA[place:], text + CPU[:place]):
        try:
            found = fxmem.explain_oom(message)
        except fxmem.FxmemError:
            continue
        assert all(ord(char) >= 32 or char == "\n" for char in str(found))
        json.dumps(found.to_dict())


def test_no_line_is_too_long():
    plan = make_plan(model="A" * 300, certificate=make_certificate(), reserve=MIB)
    for found in (fxmem.explain_oom(CUDA, plan), fxmem.explain_oom(plan), fxmem.explain_oom(CPU)):
        assert max(map(len, str(found).splitlines())) <= 100
