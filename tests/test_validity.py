"""A plan at other sizes: it keeps its budget in its range, and just beyond it does not."""

import re

import pytest
import torch
from hazards import differences, snapshot
from quick import but_slow
from torch import nn

import fxmem
from fxmem.graphs.measure import measure


class Blocks(nn.Module):
    def __init__(self, width=32, depth=2):
        super().__init__()
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))
            for _ in range(depth)
        )

    def forward(self, x):
        for block in self.blocks:
            x = x + block(x)
        return x.square().mean()


def seen(step, model, x):
    """Loss and gradients of a step, and the bytes that it adds at its peak."""

    def run():
        loss = step(x)
        loss.backward()
        return loss

    model.zero_grad(set_to_none=True)
    found = measure(run)
    values = snapshot([found.result, [p.grad for p in model.parameters()]])
    peak = found.peak - found.at_start
    model.zero_grad(set_to_none=True)
    return values, peak


def resident(model, x):
    return sum(t.numel() * t.element_size() for t in (*model.parameters(), x))


SHAPES = {0: {0: "B", 1: "S"}}


def build(batch=8, length=64):
    torch.manual_seed(0)
    return Blocks(), torch.randn(batch, length, 32)


def test_one_plan_serves_its_range_within_the_budget_and_to_the_bit():
    model, x = build()
    step = fxmem.optimize(model, "0.6x", (x,), dynamic_shapes=SHAPES)
    assert step.plan.recomputed
    for batch, length in ((8, 64), (2, 200), (64, 8), (3, 7)):
        x = torch.randn(batch, length, 32)
        seen(step, model, x)
        got, peak = seen(step, model, x)
        want, _ = seen(model, model, x)
        assert not differences(want, got)
        assert peak + resident(model, x) <= step.plan.budget
    assert len(step._session.programs) == 1


VIEWS = {
    "all but the last": lambda rows: torch.randn(rows, 65, 32)[:, :-1],
    "all but the first": lambda rows: torch.randn(rows, 65, 32)[:, 1:],
    "a part": lambda rows: torch.randn(rows, 64, 96).chunk(3, -1)[1],
    "one of a few": lambda rows: torch.randn(rows, 3, 64, 32)[:, -1],
    "real": lambda rows: torch.randn(rows, 64, 32, dtype=torch.cfloat).real,
}


@pytest.mark.parametrize("name", but_slow(VIEWS, ["all but the last", "a part"]))
def test_an_input_may_be_a_view_of_what_is_larger(name):
    """Steps and bytes of such a view are sizes of something that the step is not given."""
    model, _ = build()
    x = VIEWS[name](8)
    step = fxmem.optimize(model, "0.7x", (x,), dynamic_shapes={0: {0: "B"}})
    for rows in (8, 3, 2):
        x = VIEWS[name](rows)
        seen(step, model, x)
        got, peak = seen(step, model, x)
        want, _ = seen(model, model, x)
        assert not differences(want, got)
        assert (
            peak + resident(model, x.new_empty(0)) + x.untyped_storage().nbytes()
            <= step.plan.budget
        )


class Cropped(nn.Module):
    """To reshape what is left takes remainders by a size less 5 for granted."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 4, stride=2)

    def forward(self, x):
        inner = self.stem(x)[..., :-4, :-4].flatten(2)
        return inner.reshape(len(inner), 2, 4, 8, -1).sin().square().mean()


def test_remainders_by_what_may_be_no_size_are_taken_for_granted():
    torch.manual_seed(0)
    model = Cropped()
    given = {size: torch.randn(2, 3, size, size) for size in (26, 34)}
    shapes = {0: {2: "H", 3: "H"}}
    step = fxmem.optimize(model, "1TiB", (given[26],), dynamic_shapes=shapes)
    for x in given.values():
        assert not differences(seen(model, model, x)[0], seen(step, model, x)[0])
    assert len(step._session.programs) == 1


@pytest.mark.slow
def test_a_range_is_planned_at_once():
    """Batch 1 to 64, length 32 to 512: every size in budget, to the bit, and no further capture."""
    model, x = build(batch=8, length=64)
    batch, length = torch.export.Dim("B", min=1, max=64), torch.export.Dim("S", min=32, max=512)
    shapes = {0: {0: batch, 1: length}}
    budget = int(fxmem.min_budget(model, (x,), sizes={"B": 64, "S": 512}) * 0.7)
    step = fxmem.optimize(model, budget, (x,), dynamic_shapes=shapes)
    programs = len(step._session.programs)
    assert programs <= 4
    for batch, length in ((64, 512), (1, 32), (1, 512), (2, 33), (33, 100)):
        x = torch.randn(batch, length, 32)
        seen(step, model, x)
        got, peak = seen(step, model, x)
        want, _ = seen(model, model, x)
        assert not differences(want, got)
        assert peak + resident(model, x) <= budget
    assert len(step._session.programs) == programs
    with pytest.raises(fxmem.BudgetInfeasibleError, match="B <= "):
        step(torch.randn(640, 512, 32))


def test_a_range_that_does_not_fit_is_refused_at_once():
    model, x = build()
    budget = fxmem.plan(model, "min", (x,)).predicted_peak + 1000
    dim = torch.export.Dim("B", min=2, max=64)
    with pytest.raises(fxmem.BudgetInfeasibleError, match="B <= "):
        fxmem.optimize(model, budget, (x,), dynamic_shapes={0: {0: dim}})


def test_the_range_ends_where_the_budget_does():
    model, x = build()
    plan = fxmem.plan(model, "0.6x", (x,), dynamic_shapes=SHAPES)
    high = plan.valid_for["B"][1]
    again = fxmem.optimize(model, "1TiB", (x,), dynamic_shapes=SHAPES, plan=plan)
    for batch, fits in ((high, True), (high + 1, False)):
        x = torch.randn(batch, 64, 32)
        seen(again, model, x)
        _, peak = seen(again, model, x)
        assert (peak + resident(model, x) <= plan.budget) == fits


def test_beyond_every_plan_the_error_names_the_largest_sizes():
    model, x = build()
    budget = fxmem.plan(model, "min", (x,)).predicted_peak + 1000
    step = fxmem.optimize(model, budget, (x,), dynamic_shapes=SHAPES)
    with pytest.raises(fxmem.BudgetInfeasibleError) as caught:
        step(torch.randn(20, 64, 32))
    most = int(re.search(r"B <= (\d+) at S=64", str(caught.value))[1])
    assert 8 <= most < 20
    fxmem.plan(model, budget, (torch.randn(most, 64, 32),))
    with pytest.raises(fxmem.BudgetInfeasibleError):
        fxmem.plan(model, budget, (torch.randn(most + 1, 64, 32),))


def test_labels_without_a_name_go_with_the_batch():
    model = nn.Linear(8, 4)
    x, y = torch.randn(6, 8), torch.randint(4, (6,))
    loss = {"loss_fn": nn.functional.cross_entropy, "loss_inputs": (y,)}
    step = fxmem.optimize(model, "2x", (x,), dynamic_shapes={0: {0: "B"}}, **loss)
    for batch in (6, 3, 8):
        step(torch.randn(batch, 8), torch.randint(4, (batch,))).backward()
    assert len(step._session.programs) == 1


# -- Codes ---------------------------------------------------------------------------------------------


class Coded(nn.Module):
    """What the backward can read as codes: rectifiers, dropout, and pools of both kinds."""

    def __init__(self):
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
            nn.Conv2d(8, 16, 3, padding=1), nn.ReLU(), nn.Dropout(0.2), nn.AvgPool2d(2),
            nn.Conv2d(16, 16, 3, padding=1), nn.BatchNorm2d(16), nn.LeakyReLU(0.1),
        )  # fmt: skip

    def forward(self, x):
        return self.features(x).square().mean()


def coded(batch):
    torch.manual_seed(0)
    return Coded(), torch.randn(batch, 3, 32, 32)


def assert_serves(step, model, budget, batches):
    start = {name: value.clone() for name, value in model.state_dict().items()}
    for batch in batches:
        x = torch.randn(batch, 3, 32, 32)

        def both(run, x=x):
            torch.manual_seed(0)  # of dropout
            model.load_state_dict(start)
            return seen(run, model, x)

        both(step)
        got, peak = both(step)
        assert not differences(both(model)[0], got)
        assert peak + resident(model, x) + sum(b.nbytes for b in model.buffers()) <= budget


def test_a_plan_with_codes_serves_its_range_to_the_bit():
    model, x = coded(12)
    step = fxmem.optimize(model, "min", (x,), dynamic_shapes={0: {0: "B"}}, allow=("lossless",))
    encoded = {d.key.operator for d in step.plan.decisions if d.action == "encode"}
    assert encoded == {"pack", "pack_above", "pool_offsets", "pack_positive"}
    assert step.plan.valid_for["B"][0] == 2
    assert_serves(step, model, step.plan.budget, (12, 2, 7, 3))
    assert len(step._session.programs) == 1


def test_a_table_of_plans_with_codes():
    model, x = coded(8)
    dim = torch.export.Dim("B", min=1, max=12)
    budget = fxmem.min_budget(model, (x,), sizes={"B": 12}, allow=("recompute", "lossless"))
    step = fxmem.optimize(model, budget, (x,), dynamic_shapes={0: {0: dim}})
    plans = [program.plan for program in step._session.programs]
    assert any(d.action == "encode" for plan in plans for d in plan.decisions)
    assert len({tuple(plan.valid_for.items()) for plan in plans}) > 1
    assert_serves(step, model, budget, (12, 1, 11))
    assert len(step._session.programs) == len(plans)


def test_a_batch_that_changes_takes_no_more_bytes_than_one_that_does_not():
    """No rewrite depends on it: a pool's backward, a convolution's in two."""
    model, x = coded(8)
    for allow in (("lossless",), ("recompute", "lossless")):
        plans = [
            fxmem.plan(model, "min", (x,), dynamic_shapes=shapes, allow=allow)
            for shapes in (None, {0: {0: "B"}})
        ]
        assert plans[0].predicted_peak == plans[1].predicted_peak


def test_a_loss_outside_has_its_room_at_every_size():
    """What ``optimize`` takes off the budget for it at the example, and at any other size."""
    model = nn.Sequential(nn.Linear(32, 64), nn.GELU(), nn.Linear(64, 32))
    x = torch.randn(64, 32)
    peak = fxmem.plan(model, "2x", (x,), dynamic_shapes={0: {0: "B"}}).predicted_peak
    for more, fits in ((64, True), (63, False)):
        plan = fxmem.plan(model, peak + more, (x[:8],), dynamic_shapes={0: {0: "B"}})
        assert (plan.valid_for["B"][1] >= 64) == fits
