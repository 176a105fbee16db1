"""What users get wrong, and what they are told; what a call serves, and what it plans anew."""

import logging
import threading
import warnings

import numpy as np
import pytest
import torch
from torch import nn
from torch._decomp import decomposition_table

import fxmem
from fxmem.graphs.workspace import Call, measure_call

aten = torch.ops.aten
LOG = logging.getLogger(__name__)


def small():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(16, 32), nn.Tanh(), nn.Linear(32, 1)), torch.randn(30, 16)


WRONG = {
    "model is a function": ({"model": torch.sin}, "nn.Module"),
    "budget without a unit": ({"budget": "20"}, "20GiB"),
    "budget is True": ({"budget": True}, "True"),
    "budget is None": ({"budget": None}, "None"),
    "inputs are a tensor": ({"example_inputs": torch.zeros(2, 16)}, "(x,)"),
    "inputs are a string": ({"example_inputs": "x"}, "str"),
    "kwargs are a list": ({"example_kwargs": [1]}, "list"),
    "too many inputs": ({"example_inputs": (torch.zeros(2, 16), 1)}, "forward"),
    "wrong shape": ({"example_inputs": (torch.zeros(2, 5),)}, "try"),
    "allow is None": ({"allow": None}, "recompute"),
    "allow names nothing known": ({"allow": ("magic",)}, "magic"),
    "allow names what is to come": ({"allow": "offload"}, "not available"),
    "verify is a string": ({"verify": "no"}, "True or False"),
    "plan is empty": ({"plan": ""}, "empty string"),
    "reserve is a share": ({"reserve": "10%"}, "torch.optim.Optimizer"),
    "model is optimized": (
        {"model": fxmem.optimize(nn.Linear(16, 1), "1GiB")},
        "optimized already",
    ),
    "model is a script": (
        {"model": torch.jit.script(nn.Linear(16, 1))},
        "TorchScript",
    ),
    "model is lazy": ({"model": nn.LazyLinear(3)}, "lazy"),
    "loss_inputs without loss_fn": ({"loss_inputs": (1,)}, "loss_fn"),
    "too few inputs": ({"example_inputs": ()}, "missing a required argument"),
    "unknown keyword": ({"example_kwargs": {"mask": 1}}, "mask"),
    "noise is large": ({"noise": 2}, "noise"),
    "reserve is negative": ({"reserve": -1}, "-1"),
    "on_infeasible is misspelt": ({"on_infeasible": "rise"}, "'best'"),
    "compiler is unknown": ({"compiler": "tvm"}, "tvm"),
    "cost is unknown": ({"cost": "guess"}, "guess"),
    "plan is a number": ({"plan": 3}, "int"),
    "plan is no file": ({"plan": "/nowhere/plan.json"}, "/nowhere"),
    "loss_fn is a string": ({"loss_fn": "mse"}, "callable"),
    "loss_inputs are a number": ({"loss_inputs": 1}, "tuple"),
    "loss has no gradient": ({"loss_fn": lambda y: None}, "gradient"),
    "dynamic_shapes is a number": ({"dynamic_shapes": 1}, '{"x"'),
    "dynamic_shapes maps to a name": ({"dynamic_shapes": {0: "B"}}, '{"x"'),
    "dynamic_shapes names no input": ({"dynamic_shapes": {"z": {0: "B"}}}, "z"),
    "dynamic_shapes names no dimension": ({"dynamic_shapes": {0: {9: "B"}}}, "9"),
}


@pytest.mark.parametrize("case", WRONG)
def test_a_wrong_argument_is_named_and_nothing_changes(case):
    changes, expected = WRONG[case]
    model, x = small()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    state = torch.get_rng_state()
    given = {"model": model, "budget": "0.9x", "example_inputs": (x,), **changes}
    with pytest.raises(fxmem.FxmemError) as error:
        fxmem.optimize(**given)
    assert expected in str(error.value)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert torch.equal(state, torch.get_rng_state())
    assert model.training
    assert all(p.grad is None for p in model.parameters())


def test_what_is_set_on_the_optimized_module_reaches_the_forward():
    class Scaled(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(16, 4)
            self.scale = 1.0

        def forward(self, x):
            return (self.layer(x) * self.scale).square().mean()

    model, x = Scaled(), torch.randn(8, 16)
    opt = fxmem.optimize(model, "1GiB", (x,))
    opt.scale = 0.25
    assert model.scale == opt.scale == 0.25
    assert torch.equal(opt(x), model(x))


def test_a_model_that_counts_its_calls_is_pointed_out():
    class Counting(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer, self.calls = nn.Linear(16, 4), 0

        def forward(self, x):
            self.calls += 1
            return (self.layer(x) * self.calls).mean()

    x = torch.randn(8, 16)
    opt = fxmem.optimize(Counting(), "1GiB", (x,))
    for _ in range(7):
        opt(x)
    with pytest.warns(UserWarning, match=r"planned 8 times.*tensor buffer"):
        opt(x)


def test_sizes_that_depend_on_data_are_refused():
    class Selecting(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(16, 4)

        def forward(self, x):
            y = self.layer(x)
            return y[y > 0].sin().mean()

    with pytest.raises(fxmem.CaptureError, match=r"depend on data(.|\n)*test_api.py.*in forward"):
        fxmem.plan(Selecting(), "1GiB", (torch.randn(8, 16),))


def test_a_model_that_logs_and_warns_is_captured(caplog):
    class Chatty(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(16, 4)

        def forward(self, x):
            LOG.warning("shape %s", x.shape)
            warnings.warn("chatty", stacklevel=2)
            return self.layer(x).mean()

    with pytest.warns(UserWarning, match="chatty"):
        opt = fxmem.optimize(Chatty(), "1GiB", (torch.randn(8, 16),))
    assert "shape torch.Size([8, 16])" in caplog.text
    opt(torch.randn(8, 16)).backward()


def test_torch_is_as_it_was_after_planning():
    def tables():
        operators = [aten.native_batch_norm_backward.default, aten.native_batch_norm.default]
        kernels = [dict(op.py_kernels) for op in (aten.dropout.default, *operators)]
        return [decomposition_table[op] for op in operators], kernels

    before = tables()
    model, x = small()
    workers = [threading.Thread(target=fxmem.plan, args=(model, "min", (x,))) for _ in range(3)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    with pytest.raises(fxmem.CaptureError):
        fxmem.plan(nn.LSTM(4, 4), "1GiB", (torch.randn(2, 3, 4),))
    assert tables() == before


def test_verification_sends_gradients_as_a_loss_does():
    model = nn.Sequential(nn.Linear(32, 64), nn.Tanh(), nn.Linear(64, 32))
    opt = fxmem.optimize(model, "min", (torch.randn(16, 64, 32),), verify=True)
    assert "+0.00 %" in str(opt.report())


def test_gradients_are_not_needed_to_be_on_while_planning():
    model, x = small()
    with torch.no_grad():
        opt = fxmem.optimize(model, "1GiB", (x,))
    assert opt.plan.predicted_peak == fxmem.plan(model, "1GiB", (x,)).predicted_peak
    with torch.inference_mode(), pytest.raises(fxmem.FxmemError, match="inference_mode"):
        fxmem.optimize(model, "1GiB", (x,))


def test_a_plan_that_cannot_be_written_says_so(tmp_path):
    model, x = small()
    with pytest.raises(fxmem.FxmemError, match="cannot write the plan"):
        fxmem.plan(model, "1GiB", (x,)).save(tmp_path / "missing" / "plan.json")


def test_infeasible_names_a_budget_that_works():
    model, x = small()
    with pytest.raises(fxmem.BudgetInfeasibleError) as error:
        fxmem.optimize(model, 100, (x,))
    smallest = error.value.smallest_peak
    assert str(smallest) in str(error.value)
    assert error.value.best_plan.predicted_peak == smallest
    assert "parameters" in error.value.why
    assert fxmem.optimize(model, smallest, (x,)).plan.predicted_peak <= smallest


def test_a_recurrent_layer_is_refused_and_the_process_lives():
    class Recurrent(nn.Module):
        def __init__(self):
            super().__init__()
            self.cell = nn.LSTM(4, 4, batch_first=True)

        def forward(self, x):
            return self.cell(x)[0].sum()

    with pytest.raises(fxmem.CaptureError):
        fxmem.optimize(Recurrent(), "min", (torch.randn(2, 3, 4),))


def test_an_operator_that_trusts_its_workspace_is_never_run_on_throwaway_bytes():
    operator = torch.ops.aten.mkldnn_rnn_layer_backward.default
    assert measure_call(Call(operator, (), {}), torch.device("cpu")) is None


def test_a_size_is_planned_anew_where_no_plan_keeps_the_budget():
    model, x = small()
    opt = fxmem.optimize(model, "2x", (x,), dynamic_shapes={0: {0: "B"}})
    assert opt.plan.symbols == {"B": 30}
    low, high = opt.plan.valid_for["B"]
    assert low == 2
    assert high > 30
    for rows, programs in ((30, 1), (7, 1), (high, 1), (high + 1, 2), (high - 1, 2)):
        opt(torch.randn(rows, 16)).sum().backward()
        assert len(opt._session.programs) == programs


class WithLoss(nn.Module):
    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten())

    def forward(self, x, y):
        return nn.functional.cross_entropy(self.net(x), y)


def test_a_model_on_the_meta_device_is_planned_like_a_real_one(tmp_path, monkeypatch):
    monkeypatch.setenv("FXMEM_CACHE_DIR", str(tmp_path))  # nobody else writes that table meanwhile
    x, y = torch.zeros(4, 3, 8, 8), torch.zeros(4, dtype=torch.long)
    want = fxmem.plan(WithLoss(), "min", (x, y))
    with torch.device("meta"):
        model = WithLoss()
    got = fxmem.plan(model, "min", (x.to("meta"), y.to("meta")))
    assert (got.predicted_peak, got.baseline_peak) == (want.predicted_peak, want.baseline_peak)
    assert got.decisions == want.decisions
    with pytest.raises(fxmem.FxmemError, match=r"meta device, where nothing can run\n.*to_empty"):
        fxmem.optimize(model, "min", (x.to("meta"), y.to("meta")))


def test_an_operator_never_measured_is_taken_for_its_likes(monkeypatch, tmp_path):
    monkeypatch.setenv("FXMEM_CACHE_DIR", str(tmp_path))
    x, y = torch.zeros(4, 3, 8, 8), torch.zeros(4, dtype=torch.long)
    known = fxmem.plan(WithLoss(), "1TiB", (x, y))
    x, y = torch.zeros(6, 3, 11, 11), torch.zeros(6, dtype=torch.long)
    with torch.device("meta"):
        model = WithLoss()
    estimated = fxmem.plan(model, "1TiB", (x.to("meta"), y.to("meta")))
    exact = fxmem.plan(WithLoss(), "1TiB", (x, y))
    assert known.predicted_peak < estimated.predicted_peak
    assert exact.predicted_peak <= estimated.predicted_peak < 1.5 * exact.predicted_peak


def test_a_plan_that_forgets_a_value_is_refused(tmp_path):
    import dataclasses

    model, x = small()
    plan = fxmem.plan(model, "min", (x,))
    assert plan.budget == plan.predicted_peak
    less = dataclasses.replace(plan, decisions=plan.decisions[1:])
    less.save(tmp_path / "plan.json")
    with pytest.raises(fxmem.PlanMismatchError):
        fxmem.optimize(model, "min", (x,), plan=tmp_path / "plan.json")


def test_numpy_numbers_are_budgets():
    model, x = small()
    assert fxmem.plan(model, np.int64(1 << 30), (x,)).budget == 1 << 30


def test_a_loss_without_its_inputs_says_what_is_missing():
    net, x = nn.Linear(4, 2), torch.randn(3, 4)
    with pytest.raises(fxmem.FxmemError, match=r"0 loss_inputs.*'target'.*\n.*loss_inputs=\("):
        fxmem.optimize(net, "1TiB", (x,), loss_fn=nn.functional.mse_loss)


@pytest.mark.parametrize("path", ["", ".", 5])
def test_a_plan_is_saved_only_to_a_file(path):
    plan = fxmem.plan(nn.Linear(4, 2), "1TiB", (torch.randn(3, 4),))
    with pytest.raises(fxmem.FxmemError, match="cannot write the plan"):
        plan.save(path)


def test_a_plan_is_compared_with_a_plan():
    plan = fxmem.plan(nn.Linear(4, 2), "1TiB", (torch.randn(3, 4),))
    with pytest.raises(fxmem.PlanMismatchError, match=r"got str\n.*Plan.load"):
        plan.diff("plan.json")
