"""The report of a step at hand: its chart, other budgets, pictures; and where a step fits."""

import json
import re
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
from expecttest import assert_expected_inline
from torch import nn

import fxmem
from fxmem.basics.gpus import GPUS, Gpu
from fxmem.graphs.lifetimes import BeforeAfter, Lifetime, Memory, Point
from fxmem.reports.charts import step_chart
from fxmem.reports.fits import (
    CONTEXT,
    Alternative,
    Fit,
    Fits,
    fit_lines,
    gpu_lines,
    gpu_rows,
    usable,
)
from tests.test_report import MIB, make_plan

GIB = 2**30


class Tower(nn.Module):
    def __init__(self, width=64, depth=4):
        super().__init__()
        self.blocks = nn.Sequential(
            *(
                nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))
                for _ in range(depth)
            )
        )

    def forward(self, x):
        return self.blocks(x).square().mean()


@pytest.fixture(scope="module")
def report():
    torch.manual_seed(0)
    return fxmem.report(Tower(), (torch.ones(512, 64),), "0.6x")


def memory(*live):
    """A step that holds so many bytes at each operator; the second half is the backward."""
    half = len(live) // 2
    points = [
        Point("op", "", "", "forward" if i < half else "backward", 0) for i in range(len(live))
    ]
    lives = [Lifetime("v", "", n, i, i, "transients", "", "") for i, n in enumerate(live)]
    return Memory(tuple(points), tuple(lives))


# The chart


def test_a_step_as_a_chart():
    before = memory(*(n * MIB for n in (1, 2, 3, 4, 5, 6, 5, 4, 3, 2)))
    after = memory(*(n * MIB for n in (1, 2, 2, 3, 3, 4, 3, 3, 2, 1)))
    chart = step_chart(BeforeAfter(before, after), int(4.5 * MIB))
    assert_expected_inline(
        "\n".join(chart),
        """\
One step in program order (MiB)   : before   # after   - budget
6.0 |                                              ::::::::::                                    |
5.5 |                                              ::::::::::                                    |
5.0 |                                     ::::::::::::::::::::::::::::                           |
4.5 |-------------------------------------::::::::::::::::::::::::::::---------------------------|
4.0 |                            ::::::::::::::::::##########::::::::::::::::::                  |
3.5 |                            ::::::::::::::::::##########::::::::::::::::::                  |
3.0 |                   :::::::::##############################################:::::::::         |
2.5 |                   :::::::::##############################################:::::::::         |
2.0 |          #########################################################################:::::::::|
1.5 |          #########################################################################:::::::::|
1.0 |############################################################################################|
0.5 |############################################################################################|
     forward                                       backward""",
    )


def test_the_chart_of_a_real_report(report):
    text = str(report)
    assert "2. One step in program order (" in text
    assert "4. What else fits" in text
    assert max(map(len, text.splitlines())) <= 100


def filled(row):
    return re.search(r"\|(.*)\|", row)[1]


@pytest.mark.parametrize("seed", range(20))
def test_cells_say_what_is_live(seed):
    draw = np.random.default_rng(seed)
    n = int(draw.integers(2, 400))
    before = memory(*(int(b) for b in draw.integers(1, 10 ** int(draw.integers(2, 12)), n)))
    after = memory(*(int(b) for b in draw.integers(1, int(before.live.max()) + 1, n)))
    title, *rows, axis = step_chart(BeforeAfter(before, after), None)
    assert all(len(row) <= 100 for row in (title, axis, *rows))
    assert len({len(row) for row in rows}) == 1
    assert len(rows) <= 12
    unit = {"bytes": 1, "KiB": 2**10, "MiB": MIB, "GiB": GIB, "TiB": 2**40}[
        re.search(r"\((\w+)\)", title)[1]
    ]
    for row in rows:
        tick = float(row.split("|")[0].replace(",", "")) * unit
        reached = before.live.max() >= tick * (1 + 1e-9)
        if abs(before.live.max() - tick) > 0.01 * tick:  # figures are rounded
            assert (":" in filled(row) or "#" in filled(row)) == reached
    top = float(rows[0].split("|")[0].replace(",", "")) * unit
    assert before.live.max() <= top * 1.01


def test_an_empty_step_has_no_chart():
    assert step_chart(BeforeAfter(memory(0, 0), memory(0, 0)), None) == []


def test_a_whole_report():
    """Everything that a report can have."""
    before = memory(*(n * MIB for n in (4, 12, 20, 28, 29, 24, 16, 8)))
    after = memory(*(n * MIB for n in (4, 6, 8, 10, 11, 9, 7, 5)))
    rows = (
        Fit("RTX 2080", 8 * GIB, 7 * GIB, "no", 9 * GIB, None),
        Fit("T4", 16 * GIB, 14 * GIB, "with a plan", 13 * GIB, 0.031),
        Fit("L4", 24 * GIB, 21 * GIB, "as it is", 20 * GIB, 0.0),
        Fit("H200", 141 * GIB, 129 * GIB, "as it is", 20 * GIB, 0.0),
    )
    report = fxmem.Report(
        make_plan(gap=0.006),
        make_plan().predicted_peak,
        "bitwise equal to the unchanged step",
        BeforeAfter(before, after),
        (Alternative(15 * MIB, 14 * MIB, 0.005, True), Alternative(6 * MIB, 9 * MIB, 0.2, False)),
        Fits("GPT", "cpu", 20 * GIB, 0, rows),
    )
    assert_expected_inline(
        str(report),
        """\
fxmem  GPT   cpu   B=8 S=2048   budget 0.42x   plan 7c1e04d2   torch 2.13.0
FITS   peak 11.5 MiB of 12.0 MiB (95.8 %)   was 29.0 MiB   slack 512.0 KiB
PRICE  step 1.15 -> 1.17 s (+1.4 %, cost model cpu)   gap to optimum <= 0.6 %
PEAK   nll_loss_backward   step 953 of 2904, backward   train.py:88 in compute_loss   module head
CHECK  measured 11.5 MiB, as predicted to the byte   gradients bitwise equal to the unchanged step

1. Live at the peak (MiB)
category           before  after  change  % of budget
-----------------  ------  -----  ------  -----------
parameters            4.0    4.0     0.0         33.3
saved activations    24.0    7.0   -17.0         58.3
gradients             1.0    0.5    -0.5          4.2
TOTAL                29.0   11.5   -17.5         95.8

2. One step in program order (MiB)   : before   # after   - budget
30.0 |                                                                                           |
27.5 |                                   :::::::::::::::::::::::                                 |
25.0 |                                   :::::::::::::::::::::::                                 |
22.5 |                                   ::::::::::::::::::::::::::::::::::                      |
20.0 |                       ::::::::::::::::::::::::::::::::::::::::::::::                      |
17.5 |                       ::::::::::::::::::::::::::::::::::::::::::::::                      |
15.0 |                       :::::::::::::::::::::::::::::::::::::::::::::::::::::::::           |
12.5 |-----------------------:::::::::::::::::::::::::::::::::::::::::::::::::::::::::-----------|
10.0 |            :::::::::::::::::::::::#######################::::::::::::::::::::::           |
 7.5 |            :::::::::::##############################################::::::::::::::::::::::|
 5.0 |            ###############################################################################|
 2.5 |###########################################################################################|
      forward                                       backward

3. Decisions (MiB; before and after over all n; added time in ms)
where             type            each   n  before  after  decision         ms  source
----------------  --------------  ----  --  ------  -----  ------------  -----  -----------
h.*.attn softmax  f32[8,128,512]   3.0   4    12.0   12.0  keep            0.0  model.py:20
h.*.mlp.act gelu  f32[8,128,512]   2.0   4     8.0    0.0  recompute      +8.0  model.py:31
h.* add           f32[8,128,512]   1.0   4     4.0    0.0  recompute x3   +8.0  model.py:44
TOTAL                                   12    24.0   12.0                +16.0

4. What else fits
  budget      peak     time
--------  --------  -------  -------------------------------
15.0 MiB  14.0 MiB   +0.5 %
12.0 MiB  11.5 MiB   +1.4 %  this plan
 6.0 MiB   9.0 MiB  +20.0 %  does not fit: the smallest plan
This plan fits every budget from 12,058,624 bytes up.
Smallest peak shown to be in reach: 9,437,184 bytes (budget "min").
4.0 MiB of the peak (34.8 %) are parameters, buffers and inputs, which no plan changes.

GPU             GiB         usable  fits              peak    time
--------  ---------  -------------  -----------  ---------  ------
RTX 2080          8            7.0  no            9.00 GiB
T4               16           14.0  with a plan  13.00 GiB  +3.1 %
L4, H200  24 to 141  21.0 to 129.0  as it is     20.00 GiB       0
usable: 8 % for the driver and 768.0 MiB for the process are taken off. time: added to the step by
  that GPU's roofline. Operators are those of cpu. Where nothing fits, peak is the smallest that any
  plan reached.""",
    )


# Other budgets


def test_other_budgets_are_plans_that_exist(report):
    budgets = [row.budget for row in report.alternatives]
    assert budgets
    for row in report.alternatives:
        if row.fits:
            plan = fxmem.plan(Tower(), row.budget, (torch.ones(512, 64),))
            assert (plan.predicted_peak, plan.predicted_overhead) == (row.peak, row.overhead)
        else:
            with pytest.raises(fxmem.BudgetInfeasibleError) as error:
                fxmem.plan(Tower(), row.budget, (torch.ones(512, 64),))
            assert error.value.smallest_peak == row.peak
    assert "this plan" in str(report)


def test_a_budget_that_nothing_fits_may_be_reported():
    x = torch.ones(512, 64)
    least = fxmem.plan(Tower(), "min", (x,)).predicted_peak
    with pytest.warns(UserWarning, match="no plan fits"):
        fxmem.plan(Tower(), least - 100, (x,), on_infeasible="best")
    found = fxmem.report(Tower(), (x,), least - 100, on_infeasible="best")
    assert not found.fits
    assert [row.fits for row in found.alternatives] == [True, False]
    assert found.alternatives[-1].peak == least
    text = str(found)
    assert text.splitlines()[1].startswith("OVER")
    assert text.count("does not fit") == 1


def test_a_report_without_a_budget_is_of_the_step_as_it_is():
    found = fxmem.report(Tower(), (torch.ones(8, 64),), reserve="1MiB")
    assert isinstance(found, fxmem.StepReport)
    assert found.reserve == 2**20
    assert "no budget" in str(found).splitlines()[0]
    with pytest.raises(fxmem.FxmemError, match="no plan, so on_infeasible, gpus has no meaning"):
        fxmem.report(Tower(), (torch.ones(8, 64),), gpus=True, on_infeasible="best")


def test_an_optimizers_state_is_a_category_beside_the_step():
    model, x = Tower(), torch.ones(8, 64)
    optimizer = torch.optim.AdamW(model.parameters())
    plain = fxmem.liveness(model, (x,))
    assert "optimizer state" not in plain.categories
    found = fxmem.report(model, (x,), reserve=optimizer)
    planned = fxmem.report(model, (x,), "2x", reserve=optimizer)
    model(x).backward()
    optimizer.step()
    real = sum(t.nbytes for s in optimizer.state.values() for t in s.values())
    assert found.liveness.categories == {**plain.categories, "optimizer state": real}
    assert found.liveness.peak == plain.peak
    assert dict(planned.outside) == {"optimizer state": real}
    for text in (str(found), str(planned)):
        (row,) = re.findall("^optimizer state, beside .*", text, re.MULTILINE)
        assert "1.0" in row  # MiB
    assert str(real) in str(found)
    assert "optimizer state" not in str(fxmem.report(model, (x,)))
    assert found.to_dict()["liveness"]["categories"]["optimizer state"]["nbytes"] == real


def test_a_budget_that_nothing_fits_has_no_report():
    with pytest.raises(fxmem.BudgetInfeasibleError):
        fxmem.report(Tower(), (torch.ones(8, 64),), 1000)


def test_the_smallest_plan_has_no_other_budgets():
    found = fxmem.report(Tower(), (torch.ones(64, 64),), "min")
    assert found.alternatives == ()
    assert str(found).splitlines()[1].startswith("LEAST")
    assert "- budget" not in str(found)


def test_a_report_is_json(report):
    data = json.loads(json.dumps(report.to_dict()))
    assert data["gpus"] is None
    assert len(data["alternatives"]) == len(report.alternatives)


# Pictures


def test_pictures(report, tmp_path):
    pytest.importorskip("matplotlib")
    report.png(tmp_path / "a.png")
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG\r\n\x1a\n")
    for name in ("a.svg", "b.svg"):
        report.svg(tmp_path / name)
    text = (tmp_path / "a.svg").read_text()
    assert text == (tmp_path / "b.svg").read_text()
    assert "Tower   FITS   peak" in text
    assert "saved activations" in text


def test_a_name_in_a_picture_is_no_formula(report, tmp_path):
    pytest.importorskip("matplotlib")
    name = r"$\frac{$</text><script>alert(1)</script>"
    replace(report, plan=replace(report.plan, model=name)).svg(tmp_path / "a.svg")
    text = (tmp_path / "a.svg").read_text()
    assert "<script" not in text
    assert "frac" in text


def test_pictures_without_matplotlib(report, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(fxmem.FxmemError, match=r"pip install 'fxmem\[plot\]'"):
        report.png(tmp_path / "a.png")


def test_a_picture_that_cannot_be_written(report, tmp_path):
    pytest.importorskip("matplotlib")
    with pytest.raises(fxmem.FxmemError, match="cannot write the picture"):
        report.png(tmp_path / "missing" / "a.png")
    with pytest.raises(fxmem.FxmemError, match="a plan alone does not hold it"):
        fxmem.Report(make_plan()).svg(tmp_path / "a.svg")


# Where it fits


def with_room(name, room, **changes):
    """A GPU with ``room`` bytes for the step; its memory is no whole number of GiB."""

    class Made(Gpu):
        @property
        def nbytes(self):
            return -(-(room + CONTEXT) * 100 // 92)

    known = {f: getattr(GPUS[0], f) for f in ("gib", "bandwidth", "fp32", "tf32", "half", "source")}
    return Made(name, **{**known, **changes})


def test_usable_is_less_than_there_is():
    for one in GPUS:
        assert 0 < usable(one) < 0.92 * one.nbytes
    assert usable(with_room("x", 12345)) in (12345, 12346)


def test_where_a_step_fits():
    model, x = Tower(), torch.ones(512, 64)
    peak = fxmem.plan(model, "2x", (x,)).baseline_peak
    least = fxmem.plan(model, "min", (x,)).predicted_peak
    gpus = (
        with_room("large", 2 * peak),
        with_room("just", peak),
        with_room("tight", peak - 2000),
        with_room("tighter", (peak + least) // 2),
        with_room("least", least + 10),
        with_room("too small", least - 10),
        with_room("tiny", 100),
    )
    found = fxmem.fits(model, (x,), gpus=gpus)
    verdicts = {row.gpu: row.verdict for row in found.rows}
    assert verdicts == {
        "large": "as it is",
        "just": "as it is",
        "tight": "with a plan",
        "tighter": "with a plan",
        "least": "with a plan",
        "too small": "no",
        "tiny": "no",
    }
    rows = {row.gpu: row for row in found.rows}
    assert all(row.peak <= row.usable for row in found.rows if row.verdict != "no")
    assert rows["too small"].peak == least
    assert rows["just"].overhead == 0
    assert rows["tighter"].overhead <= rows["least"].overhead
    assert rows["tiny"].overhead is None
    assert [row.nbytes for row in found.rows] == sorted(row.nbytes for row in found.rows)
    assert found.anywhere
    # What the smallest takes away, a reserve takes away, too.
    beside = fxmem.fits(model, (x,), gpus=gpus, reserve=20)
    assert {row.gpu: row.verdict for row in beside.rows} == {
        **verdicts,
        "just": "with a plan",
        "least": "no",
    }
    assert not fxmem.fits(model, (x,), gpus=gpus[-2:]).anywhere


def test_the_largest_batch_on_each_gpu_solves_the_closed_form():
    model, x = Tower(16, 1), torch.ones(512, 16)
    form = fxmem.liveness(model, (x,))
    own, whole = form.form_at({"B": 512}), form.unchanged_at()
    rooms = {"just": whole, "tight": whole - 2000, "double": 2 * whole, "nothing": 1000}
    gpus = tuple(with_room(name, room) for name, room in rooms.items())
    found = fxmem.fits(model, (x,), gpus=gpus)
    assert found.symbol == "B"
    rows = {row.gpu: row for row in found.rows}
    for row in found.rows:
        # The form is the captured step's; the step as it is takes so many times that.
        fits = [form.form_at({"B": row.largest + more}) * whole / own for more in (0, 1)]
        assert row.largest == 0 or fits[0] <= row.usable + 1
        assert row.usable < fits[1]
        assert (row.verdict == "as it is") == (row.largest >= 512)
    assert rows["nothing"].largest == 0
    lines = str(found).splitlines()
    assert lines[1].endswith("largest B")
    assert any(line.endswith(f"  {rows['double'].largest:,}") for line in lines)
    assert "largest B: that fits without a plan" in " ".join(" ".join(lines).split())
    named = fxmem.fits(model, (x,), gpus=gpus, dynamic_shapes={"x": {0: "N"}})
    assert [row.largest for row in named.rows] == [row.largest for row in found.rows]
    assert str(named).splitlines()[1].endswith("largest N")
    most = torch.export.Dim("N", max=700)
    capped = fxmem.fits(model, (x,), gpus=gpus, dynamic_shapes={"x": {0: most}})
    assert max(row.largest for row in capped.rows) == 700


class OfEight(nn.Module):
    """The batch is a number in the code."""

    def __init__(self):
        super().__init__()
        self.inner = nn.Linear(8, 8)

    def forward(self, x):
        return self.inner(x.reshape(8, 8)).square().mean()


ALONE = (
    "the step works with B=8 alone "
    f"(test_looking.py:{OfEight.forward.__code__.co_firstlineno + 1} in forward)"
)


@pytest.mark.parametrize(
    ("model", "shapes", "why"),
    [
        (OfEight(), None, ALONE),
        (Tower(8, 1), {"x": {1: "S"}}, "no input has a named first dimension"),
    ],
)
def test_no_batch_no_largest_batch(model, shapes, why):
    x = torch.ones(8, 8) if shapes is None else torch.ones(4, 16, 8)
    found = fxmem.fits(model, (x,), dynamic_shapes=shapes)
    assert (found.symbol, found.why_none) == ("", why)
    assert {row.largest for row in found.rows} == {None}
    text = str(found)
    assert f"No largest batch: {why}." in " ".join(text.split())
    assert "largest B" not in text


def test_a_step_of_fixed_sizes_is_looked_at_without_symbols():
    found = fxmem.liveness(OfEight(), (torch.ones(8, 8),))
    assert not found.symbols
    assert found.notes[0] == f"all sizes are constants here: {ALONE}"
    assert (
        found.peak_at()
        == found.peak
        == fxmem.plan(OfEight(), "1GiB", (torch.ones(8, 8),)).predicted_peak
    )
    report = " ".join(str(fxmem.report(OfEight(), (torch.ones(8, 8),))).split())
    assert "the step works with B=8 alone" in report
    with pytest.raises(fxmem.CaptureError, match="B cannot vary"):
        fxmem.liveness(OfEight(), (torch.ones(8, 8),), dynamic_shapes={0: {0: "B"}})


def test_no_largest_batch_where_the_code_fixes_it():
    with pytest.raises(fxmem.CaptureError) as caught:
        fxmem.max_batch(OfEight(), "1GiB", (torch.ones(8, 8),))
    text = re.sub(r"\S+/test_looking.py:\d+", "test_looking.py:1", str(caught.value))
    assert_expected_inline(
        text,
        """\
B cannot vary: the step works with B=8 alone.
  read    args[0].shape[0]
  found   with B=10: TorchRuntimeError: shape '[8, 8]' is invalid for input of size 8*s33
  at      test_looking.py:1 in forward: return self.inner(x.reshape(8, 8)).square().mean()
  wanted  code and buffers whose sizes follow from the inputs, as x.new_zeros(...) does
  try     -1 or x.shape[...] in place of 8 there, or dynamic_shapes={...} with other dimensions""",
    )


class OfFour(nn.Module):
    """The batch is a number in the code, the length is none."""

    def __init__(self):
        super().__init__()
        self.inner = nn.Linear(8, 8)
        self.register_buffer("start", torch.zeros(4, 1, 8))

    def forward(self, x):
        return (self.inner(x) + self.start).square().mean()


def test_the_longest_sequence_where_the_code_fixes_the_batch():
    model, x = OfFour(), torch.ones(4, 6, 8)
    found = fxmem.liveness(model, (x,))
    assert found.notes[0].startswith("the step works with B=4 alone (test_looking.py:")
    with pytest.raises(fxmem.CaptureError, match="B cannot vary"):
        fxmem.max_batch(model, "1MiB", (x,))
    most = fxmem.max_batch(model, found.unchanged_at(S=40), (x,), symbol="S")
    assert most == 40
    assert fxmem.fits(model, (x,)).why_none in found.notes[0]


def test_rough_forms_are_called_rough():
    found = fxmem.report(Tower(16, 1), (torch.ones(512, 16),))
    rough = replace(found, liveness=replace(found.liveness, rough=True))
    assert not found.liveness.rough
    assert "follows no polynomial" not in str(found)
    assert "follows no polynomial" in " ".join(str(rough).split())
    row = Fit("T4", 16 * GIB, 14 * GIB, "as it is", 20 * MIB, 0.0, 12)
    for rough, said in ((False, False), (True, True)):
        lines = fit_lines(Fits("GPT", "cpu", 20 * MIB, 0, (row,), "B", "", rough))
        assert ("follows no polynomial" in " ".join(" ".join(lines).split())) == said


def test_what_libraries_hold_is_taken_off_every_gpu(monkeypatch):
    from fxmem import looking

    model, x = Tower(16, 1), torch.ones(512, 16)
    gpus = (with_room("just", fxmem.plan(model, "2x", (x,)).baseline_peak),)
    assert fxmem.fits(model, (x,), gpus=gpus).rows[0].verdict == "as it is"
    monkeypatch.setattr(looking, "library_memory", lambda device: 100)
    assert fxmem.fits(model, (x,), gpus=gpus).rows[0].verdict == "with a plan"


def test_each_gpu_has_its_own_price():
    """Where memory is slow, elementwise operators that run again weigh more."""
    model, x = Tower(), torch.ones(512, 64)
    room = int(0.6 * fxmem.plan(model, "2x", (x,)).baseline_peak)
    slow = with_room("slow memory", room, bandwidth=1e9, fp32=1e15)
    fast = with_room("fast memory", room, bandwidth=1e15, fp32=1e10)
    found = {row.gpu: row for row in fxmem.fits(model, (x,), gpus=(slow, fast)).rows}
    assert found["slow memory"].peak == found["fast memory"].peak
    assert found["slow memory"].overhead != found["fast memory"].overhead


def test_the_price_by_the_plans_own_model_is_the_plans():
    from fxmem.analysis.cost import CPU
    from fxmem.api import analyzed, read_options
    from fxmem.looking import overhead
    from fxmem.steps.pipeline import decide

    options = read_options(
        Tower(), "0.6x", allow=("recompute",), noise=0.01, reserve=0, on_infeasible="raise",
        compiler="eager", cost="auto", plan=None,
    )  # fmt: skip
    with analyzed(Tower(), options, (torch.ones(512, 64),), None, None, None, ()) as (analysis, _):
        planned = decide(analysis, options)
        assert planned.plan.recomputed
        assert overhead(analysis, planned, CPU) == pytest.approx(planned.plan.predicted_overhead)


def test_a_model_on_meta_fits_somewhere():
    with torch.device("meta"):
        model, x = Tower(2048, 8), torch.ones(32768, 2048)
    found = fxmem.fits(model, (x,))
    assert len(found.rows) == len(GPUS)
    verdicts = [row.verdict for row in found.rows]
    order = {"no": 0, "with a plan": 1, "as it is": 2}
    assert [order[v] for v in verdicts] == sorted(order[v] for v in verdicts)
    text = str(found)
    assert max(map(len, text.splitlines())) <= 100
    assert all(name in " ".join(text.split()) for name in ("RTX 2080", "MI300X", "H100 SXM"))
    json.dumps(found.to_dict())


def test_the_report_says_where_it_fits():
    found = fxmem.report(Tower(), (torch.ones(512, 64),), "0.7x", gpus=True)
    assert "as it is" in str(found)
    assert "\n".join(fit_lines(found.gpus)) in str(found)
    assert found.to_dict()["gpus"]["rows"]


def test_the_table_of_gpus():
    lines = gpu_lines()
    assert max(map(len, lines)) <= 100
    assert [line.split("  ")[0] for line in lines[2 : 2 + len(GPUS)]] == [one.name for one in GPUS]
    assert {row["name"] for row in gpu_rows()} == {one.name for one in GPUS}
    assert all(row["source"] for row in gpu_rows())


# -- Questions at the example's own sizes --------------------------------------------------------------


def test_an_example_of_one_row_is_answered_for_one_row():
    """Forms are traced at a larger batch, which is nobody's question."""
    model, x = nn.Sequential(nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 8)), torch.randn(1, 64)
    named = fxmem.min_budget(model, (x,), sizes={"B": 1})
    assert fxmem.min_budget(model, (x,)) == named < fxmem.min_budget(model, (x,), sizes={"B": 3})
    assert fxmem.min_budget(model, (x,)) == fxmem.plan(model, "1TiB", (x,)).baseline_peak
    assert fxmem.max_batch(model, "1x", (x,)) == 1


def test_a_size_that_is_asked_for_cannot_be_given():
    model, x = nn.Linear(8, 8), torch.randn(4, 8)
    with pytest.raises(fxmem.FxmemError, match="B is what is asked for, and sizes fixes it at 4"):
        fxmem.max_batch(model, "1GiB", (x,), sizes={"B": 4})
