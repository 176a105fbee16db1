"""Which budgets are read, which are refused and how, and what they come to in bytes."""

import math
from decimal import Decimal
from fractions import Fraction

import numpy as np
import pytest
import torch

import fxmem.basics.budget
import fxmem.basics.device
from fxmem.basics.budget import Budget, read_reserve
from fxmem.basics.device import free_memory, total_memory
from fxmem.basics.errors import BudgetError, FxmemError

GIB = 2**30
CPU = torch.device("cpu")


@pytest.fixture
def device_of_ten_gib(monkeypatch):
    """A device with 10 GiB, 6 of them free."""
    monkeypatch.setattr(fxmem.basics.budget, "total_memory", lambda device: 10 * GIB)
    monkeypatch.setattr(fxmem.basics.budget, "free_memory", lambda device: 6 * GIB)


def resolve(value, reserve=0):
    return Budget.parse(value).resolve(device=CPU, baseline_peak=4 * GIB, reserve=reserve)


@pytest.mark.usefixtures("device_of_ten_gib")
@pytest.mark.parametrize(
    ("value", "kind", "nbytes"),
    [
        (123, "bytes", 123),
        (np.int64(123), "bytes", 123),
        ("20GiB", "bytes", 20 * GIB),
        (" 1.5 gib", "bytes", 3 * GIB // 2),
        ("80%", "device_share", 8 * GIB),
        ("12.5 %", "device_share", 5 * GIB // 4),
        ("100%", "device_share", 10 * GIB),
        (0.8, "device_share", 8 * GIB),
        (np.float64(0.5), "device_share", 5 * GIB),
        (np.float32(0.5), "device_share", 5 * GIB),
        ("0.5x", "baseline_share", 2 * GIB),
        ("1.25 X", "baseline_share", 5 * GIB),
        ("auto", "auto", 6 * GIB),
        ("Auto", "auto", 6 * GIB),
        ("min", "min", None),
    ],
)
def test_every_form_is_read_and_resolved(value, kind, nbytes):
    budget = Budget.parse(value)
    assert budget.kind == kind
    assert budget.asked == str(budget) == str(value)
    assert resolve(value) == nbytes


def test_a_budget_is_its_own_reading():
    budget = Budget.parse("20GiB")
    assert Budget.parse(budget) is budget


@pytest.mark.parametrize(
    ("value", "says"),
    [
        ("20", 'did you mean "20GiB"?'),
        ("0.8", 'did you mean "80%" or "0.8x"?'),
        ("20G", '"20GiB" (powers of 1024)'),
        ("20 gigs", 'there is no unit "gigs"; did you mean "20GiB"'),
        ("", "it is empty"),
        ("half", "not a number followed by a unit"),
        ("nan", "not a number followed by a unit"),
        ("inf", "not a number followed by a unit"),
        ("-1GiB", "it is negative"),
        ("-5%", "it is negative"),
        ("0GiB", '"min" asks for the smallest peak'),
        ("0.1B", '"min" asks for the smallest peak'),
        ("0%", '"min" asks for the smallest peak'),
        ("0x", '"min" asks for the smallest peak'),
        ("0x10", "cannot read '0x10'"),
        ("150%", 'did you mean "1.5x" the unchanged peak?'),
        ("infx", "cannot read 'infx'"),
        ("9" * 5000 + "%", "cannot read '999"),
        (0, '"min" asks for the smallest peak'),
        (-1, "it is negative"),
        (True, "it is a bool"),
        (False, "it is a bool"),
        (np.True_, "it is of type bool"),
        (1.0, 'did you mean "100%" of the device, or 1 byte?'),
        (20.0, 'did you mean "20GiB", or the int 20?'),
        (2e10, "did you mean the int 20000000000?"),
        (0.0, "must be above 0"),
        (-0.5, "must be above 0"),
        (math.nan, "not a finite number"),
        (math.inf, "not a finite number"),
        (-math.inf, "not a finite number"),
        (None, "it is of type NoneType"),
        (b"20GiB", "it is of type bytes"),
        ([20], "it is of type list"),
        (Decimal("0.5"), "it is of type Decimal"),
        (Fraction(1, 2), "it is of type Fraction"),
        (1j, "it is of type complex"),
        (torch.tensor(5), "it is of type Tensor"),
    ],
)
def test_anything_else_is_refused_with_the_likely_meaning(value, says):
    with pytest.raises(BudgetError) as caught:
        Budget.parse(value)
    message = str(caught.value)
    assert message.startswith("cannot read ")
    assert says in message
    assert 'accepted: bytes, as an int or as "20GiB"' in message
    assert max(map(len, message.splitlines())) <= 150
    assert isinstance(caught.value, ValueError)


@pytest.mark.usefixtures("device_of_ten_gib")
def test_the_reserve_comes_off_all_but_shares_of_the_unchanged_peak():
    assert resolve("5GiB", reserve=GIB) == 4 * GIB
    assert resolve("80%", reserve=GIB) == 7 * GIB
    assert resolve("auto", reserve=GIB) == 5 * GIB
    assert resolve("0.5x", reserve=GIB) == 2 * GIB
    assert resolve("min", reserve=GIB) is None


@pytest.mark.usefixtures("device_of_ten_gib")
@pytest.mark.parametrize("value", [2 * GIB, "2GiB", "20%"])
def test_a_reserve_that_leaves_nothing_is_refused_with_both_figures(value):
    with pytest.raises(BudgetError, match=r"2\.00 GiB \(2147483648 bytes\)\n  reserve: 3\.00 GiB"):
        resolve(value, reserve=3 * GIB)


def test_a_share_of_no_bytes_is_refused():
    with pytest.raises(BudgetError, match="nothing is left"):
        Budget.parse("0.5x").resolve(device=CPU, baseline_peak=0, reserve=0)


def test_the_machine_has_memory_and_some_of_it_is_free():
    assert 0 < free_memory(CPU) <= total_memory(CPU)


def test_free_memory_does_without_meminfo(monkeypatch, tmp_path):
    monkeypatch.setattr(fxmem.basics.device, "_MEMINFO", tmp_path / "none")
    assert 0 < free_memory(CPU) <= total_memory(CPU)


@pytest.mark.parametrize("find", [free_memory, total_memory])
def test_a_device_that_does_not_tell_asks_for_bytes(find, monkeypatch):
    monkeypatch.setattr(fxmem.basics.device, "_mem_available", lambda: 0)
    monkeypatch.setattr(fxmem.basics.device, "_sysconf_bytes", lambda name: 0)
    for device in (CPU, torch.device("meta")):
        with pytest.raises(BudgetError, match=r'cannot find the .* memory of .*\n.*"20GiB"'):
            find(device)


@pytest.mark.skipif(torch.cuda.is_available(), reason="asks for a CUDA device that is not there")
def test_a_missing_cuda_device_asks_for_bytes():
    with pytest.raises(BudgetError, match="cannot find the memory of cuda:0"):
        Budget.parse("80%").resolve(device=torch.device("cuda:0"), baseline_peak=1, reserve=0)


@pytest.mark.parametrize(("reserve", "nbytes"), [(0, 0), (7, 7), (np.int32(7), 7), ("1KiB", 1024)])
def test_a_reserve_in_bytes_is_read(reserve, nbytes):
    assert read_reserve(reserve).nbytes == nbytes


@pytest.mark.parametrize("reserve", [-1, True, 1.5, None, [1], torch.tensor(1)])
def test_any_other_reserve_is_refused(reserve):
    with pytest.raises(BudgetError, match=r"as a reserve\n.*torch\.optim\.Optimizer"):
        read_reserve(reserve)


def test_a_reserve_without_unit_is_refused():
    with pytest.raises(BudgetError, match="no unit"):
        read_reserve("20")


OPTIMIZERS = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.1),
    "momentum": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9),
    "adam": lambda p: torch.optim.Adam(p),
    "amsgrad": lambda p: torch.optim.Adam(p, amsgrad=True),
    "adamw": lambda p: torch.optim.AdamW(p),
    "fused": lambda p: torch.optim.AdamW(p, fused=True),
    "tensor lr": lambda p: torch.optim.AdamW(p, lr=torch.tensor(0.1), foreach=False),
    "adagrad": lambda p: torch.optim.Adagrad(p),
    "adamax": lambda p: torch.optim.Adamax(p),
    "nadam": lambda p: torch.optim.NAdam(p),
    "radam": lambda p: torch.optim.RAdam(p),
    "rmsprop": lambda p: torch.optim.RMSprop(p, momentum=0.9, centered=True),
    "adadelta": lambda p: torch.optim.Adadelta(p),
    "asgd": lambda p: torch.optim.ASGD(p),
    "rprop": lambda p: torch.optim.Rprop(p),
    "adafactor": lambda p: torch.optim.Adafactor(p),
}


def held_by(optimizer):
    """Bytes of all tensors that are values of the optimizer's state."""
    tensors = [t for state in optimizer.state.values() for t in state.values()]
    return sum(t.untyped_storage().nbytes() for t in tensors if isinstance(t, torch.Tensor))


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_an_optimizer_reserves_what_its_first_step_will_create(name):
    model = torch.nn.Linear(64, 32)
    optimizer = OPTIMIZERS[name](model.parameters())
    model(torch.ones(2, 64)).sum().backward()
    ahead = read_reserve(optimizer).nbytes
    optimizer.step()
    assert ahead == read_reserve(optimizer).nbytes == held_by(optimizer)


def test_state_that_shares_a_storage_is_counted_once():
    weight = torch.nn.Parameter(torch.ones(8))
    optimizer = torch.optim.SGD([weight], lr=0.1)
    shared = torch.ones(100)
    optimizer.state[weight] = {"a": shared[:50], "b": [shared[50:]], "c": 3}
    assert read_reserve(optimizer).nbytes == shared.nbytes


def test_every_group_of_parameters_is_told_ahead():
    first, second = torch.nn.Linear(8, 8), torch.nn.Linear(16, 16)
    groups = [{"params": first.parameters()}, {"params": second.parameters(), "amsgrad": True}]
    optimizer = torch.optim.Adam(groups)
    (first(torch.ones(8)).sum() + second(torch.ones(16)).sum()).backward()
    ahead = read_reserve(optimizer).nbytes
    optimizer.step()
    assert ahead == held_by(optimizer)


def test_telling_ahead_leaves_the_optimizer_alone():
    model = torch.nn.Linear(8, 8)
    model.bias.requires_grad_(False)
    optimizer = torch.optim.Adam(model.parameters())
    schedule = torch.optim.lr_scheduler.StepLR(optimizer, 1)  # wraps optimizer.step
    optimizer.register_step_pre_hook(lambda *_: pytest.fail("the real optimizer stepped"))
    attributes, group = dict(vars(optimizer)), dict(optimizer.param_groups[0])
    weight = model.weight.detach().clone()

    # The frozen bias gets no state; Adam counts steps in one float for each parameter.
    assert read_reserve(optimizer).nbytes == 2 * model.weight.nbytes + 4

    assert vars(optimizer) == attributes
    assert optimizer.param_groups[0] == group
    assert not optimizer.state
    assert model.weight.grad is None
    assert torch.equal(model.weight, weight)
    assert schedule.last_epoch == 0


class Stubborn(torch.optim.SGD):
    def step(self, closure=None):
        raise RuntimeError("only on Tuesdays")


class StubbornAdam(Stubborn):
    pass


def test_an_adam_that_cannot_be_tried_reserves_two_moments():
    model = torch.nn.Linear(8, 8)
    assert read_reserve(StubbornAdam(model.parameters(), lr=0.1)).nbytes == 2 * (8 * 8 + 8) * 4


def test_another_optimizer_that_cannot_be_tried_asks_for_bytes():
    optimizer = Stubborn(torch.nn.Linear(8, 8).parameters(), lr=0.1)
    with pytest.raises(FxmemError, match=r'Stubborn.*only on Tuesdays[\s\S]*reserve="2GiB"'):
        read_reserve(optimizer)


def test_an_optimizer_that_needs_a_closure_asks_for_bytes():
    optimizer = torch.optim.LBFGS(torch.nn.Linear(8, 8).parameters())
    with pytest.raises(BudgetError, match="LBFGS"):
        read_reserve(optimizer)


def test_moments_in_8_bits_free_three_bytes_of_four_but_for_their_scales():
    model = torch.nn.Linear(128, 64)  # a weight of 8192 elements; the bias is too small
    adam = torch.optim.Adam(model.parameters())
    ahead = read_reserve(adam)
    assert ahead.in_8_bits == 2 * (4 * 8192 - 8192 - 4 * 8192 // 256)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    adam.step()
    assert read_reserve(adam) == ahead
    assert read_reserve(torch.optim.SGD(model.parameters())).in_8_bits == 0
    assert read_reserve("2GiB").in_8_bits == read_reserve(5).in_8_bits == 0
