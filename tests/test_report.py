"""The report: its form, its sums, its folding, and what hostile names cannot do to it."""

import json
import unicodedata
from dataclasses import replace

import pytest
from expecttest import assert_expected_inline
from hypothesis import given
from hypothesis import strategies as st

from fxmem.basics.tables import WIDTH, clean, cut
from fxmem.planning.plan import Certificate, Decision, Key, LiveTensor, PeakPoint, Plan, Remedy
from fxmem.planning.whole_step import REST
from fxmem.reports.report import MAX_ROWS, Report, folded, least_text, live_rows
from fxmem.steps.decisions import infeasible

MIB = 2**20


def decision(module, operator, nbytes, action="recompute", *, seconds=0.002, **changes):
    kept = action == "keep"
    known = {
        "key": Key(module, operator, 0),
        "value": operator,
        "type": "f32[8, 128, 512]",
        "module": module,
        "source": "model.py:31 in forward",
        "action": action,
        "nbytes": nbytes,
        "nbytes_stored": nbytes if kept else 0,
        "seconds": 0.0 if kept else seconds,
        "reason": "",
        "times": 0 if kept else 1,
    }
    return Decision(**{**known, **changes})


def blocks(n=4):
    for i in range(n):
        yield decision(f"h.{i}.attn", "softmax", 3 * MIB, "keep", source="model.py:20 in forward")
        yield decision(f"h.{i}.mlp.act", "gelu", 2 * MIB)
        yield decision(
            f"h.{i}", "add", MIB, times=3, dropped=(3, 5), source="model.py:44 in forward"
        )


def peak(live, **changes):
    known = {
        "nbytes": sum(live.values()),
        "operator": "nll_loss_backward",
        "module": "head",
        "source": "train.py:88 in compute_loss",
        "phase": "backward",
        "step": 953,
        "steps": 2904,
        "live": live,
    }
    return PeakPoint(**{**known, **changes})


def make_certificate(**changes):
    """Of ``make_plan``'s peak."""
    known = {
        "tensors": (
            LiveTensor("logits", "f32[512, 2048]", 4 * MIB, "outputs", "head", "gpt.py:9 in f"),
            LiveTensor("h.0.w", "f32[512, 1024]", 2 * MIB, "parameters", "", ""),
            LiveTensor("mm_backward", "", MIB, "operator workspace", "head", "gpt.py:9 in f"),
        ),
        "others": 12,
        "others_nbytes": 9 * MIB // 2,
        "least": 6 * MIB,
        "least_own": 2 * MIB,
        "least_operator": "mm",
        "least_module": "head",
        "least_source": "gpt.py:9 in f",
        "remedies": (
            Remedy(
                "batch", "about", "a batch of 4 for 8; the largest that fits is about 7", 5 * MIB
            ),
            Remedy("loss", "up to", "the loss in parts", 3 * MIB),
            Remedy("optimizer", "", "8-bit moments", MIB),
        ),
    }
    return Certificate(**{**known, **changes})


def make_plan(**changes):
    before = peak({"parameters": 4 * MIB, "saved activations": 24 * MIB, "gradients": MIB})
    after = peak({"parameters": 4 * MIB, "saved activations": 7 * MIB, "gradients": MIB // 2})
    known = {
        "budget": 12 * MIB,
        "asked": "0.42x",
        "reserve": 0,
        "predicted_peak": after.nbytes,
        "baseline_peak": before.nbytes,
        "keep_all_peak": before.nbytes,
        "resident": 4 * MIB,
        "floor": 9 * MIB,
        "seconds": 1.15,
        "added_seconds": 0.016,
        "gap": None,
        "decisions": tuple(blocks()),
        "symbols": {"B": 8, "S": 2048},
        "valid_for": {},
        "peak": after,
        "before": before,
        "fingerprint": "7c1e04d2aaaaaaaa",
        "step": "7c1e04d2aaaaaaaa",
        "device": "cpu",
        "model": "GPT",
        "torch_version": "2.13.0",
        "cost_model": "cpu",
    }
    return Plan(**{**known, **changes})


def test_report_of_a_plan():
    assert_expected_inline(
        str(Report(make_plan())),
        """\
fxmem  GPT   cpu   B=8 S=2048   budget 0.42x   plan 7c1e04d2   torch 2.13.0
FITS   peak 11.5 MiB of 12.0 MiB (95.8 %)   was 29.0 MiB   slack 512.0 KiB
PRICE  step 1.15 -> 1.17 s (+1.4 %, cost model cpu)   gap not bounded
PEAK   nll_loss_backward   step 953 of 2904, backward   train.py:88 in compute_loss   module head
CHECK  not measured yet: optimize(..., verify=True) or fxmem.measure(step)

1. Live at the peak (MiB)
category           before  after  change  % of budget
-----------------  ------  -----  ------  -----------
parameters            4.0    4.0     0.0         33.3
saved activations    24.0    7.0   -17.0         58.3
gradients             1.0    0.5    -0.5          4.2
TOTAL                29.0   11.5   -17.5         95.8

2. Decisions (MiB; before and after over all n; added time in ms)
where             type            each   n  before  after  decision         ms  source
----------------  --------------  ----  --  ------  -----  ------------  -----  -----------
h.*.attn softmax  f32[8,128,512]   3.0   4    12.0   12.0  keep            0.0  model.py:20
h.*.mlp.act gelu  f32[8,128,512]   2.0   4     8.0    0.0  recompute      +8.0  model.py:31
h.* add           f32[8,128,512]   1.0   4     4.0    0.0  recompute x3   +8.0  model.py:44
TOTAL                                   12    24.0   12.0                +16.0

3. What else fits
This plan fits every budget from 12,058,624 bytes up.
Smallest peak shown to be in reach: 9,437,184 bytes (budget "min").
4.0 MiB of the peak (34.8 %) are parameters, buffers and inputs, which no plan changes.""",
    )


def test_report_with_a_measurement():
    exact = Report(make_plan(), make_plan().predicted_peak, "bitwise equal")
    assert_expected_inline(
        check_line(exact),
        """CHECK  measured 11.5 MiB, as predicted to the byte   gradients bitwise equal""",
    )
    off = Report(make_plan(), make_plan().predicted_peak + 12_345)
    assert_expected_inline(
        check_line(off), """CHECK  measured 11.5 MiB (+0.10 % against the prediction)"""
    )


def test_report_of_a_miss():
    report = Report(make_plan(reserve=MIB, gap=0.006), 13 * MIB)
    assert not report.fits
    assert_expected_inline(
        "\n".join(str(report).splitlines()[:6]),
        """\
fxmem  GPT   cpu   B=8 S=2048   budget 0.42x   plan 7c1e04d2   torch 2.13.0
OVER   peak 11.5 MiB of 12.0 MiB (95.8 %)   was 29.0 MiB   over by 1.0 MiB as measured
       reserve 1.0 MiB extra
PRICE  step 1.15 -> 1.17 s (+1.4 %, cost model cpu)   gap to optimum <= 0.6 %
PEAK   nll_loss_backward   step 953 of 2904, backward   train.py:88 in compute_loss   module head
CHECK  measured 13.0 MiB (+13.04 % against the prediction)""",
    )


def test_report_of_the_smallest_plan():
    report = Report(make_plan(budget=None, asked="min"))
    assert_expected_inline(
        "\n".join(str(report).splitlines()[:12]),
        """\
fxmem  GPT   cpu   B=8 S=2048   budget min   plan 7c1e04d2   torch 2.13.0
LEAST  peak 11.5 MiB, the smallest that was found   was 29.0 MiB
PRICE  step 1.15 -> 1.17 s (+1.4 %, cost model cpu)   gap not bounded
PEAK   nll_loss_backward   step 953 of 2904, backward   train.py:88 in compute_loss   module head
CHECK  not measured yet: optimize(..., verify=True) or fxmem.measure(step)

1. Live at the peak (MiB)
category           before  after  change  % of peak
-----------------  ------  -----  ------  ---------
parameters            4.0    4.0     0.0       34.8
saved activations    24.0    7.0   -17.0       60.9
gradients             1.0    0.5    -0.5        4.3""",
    )


def test_report_of_small_figures_in_exact_bytes():
    live = {"parameters": 640, "saved activations": 12_345}
    plan = make_plan(
        decisions=(),
        before=peak(live),
        peak=peak(live),
        baseline_peak=13_000,
        valid_for={"B": (1, 64)},
    )
    assert_expected_inline(
        "\n".join(str(Report(plan)).splitlines()[6:]),
        """\
1. Live at the peak (bytes)
category           before   after  change  % of budget
-----------------  ------  ------  ------  -----------
parameters            640     640       0          0.0
saved activations  12,345  12,345       0          0.1
TOTAL              12,985  12,985       0          0.1
before: the captured step with everything kept, 12,985 bytes at its peak; the step as it is today
  peaks at 13,000 bytes.

2. Decisions
none: the backward reads nothing that could be made again

3. What else fits
This plan fits every budget from 12,058,624 bytes up.
Smallest peak shown to be in reach: 9,437,184 bytes (budget "min").
4.0 MiB of the peak (34.8 %) are parameters, buffers and inputs, which no plan changes.
The plan holds for B from 1 to 64.""",
    )


def check_line(report):
    return next(line for line in str(report).splitlines() if line.startswith("CHECK"))


# Certificates


def tight_plan(**changes):
    return make_plan(budget=MIB, floor=23 * MIB // 2, certificate=make_certificate(**changes))


def test_report_of_a_plan_above_its_budget():
    text = str(Report(tight_plan()))
    assert_expected_inline(
        text[text.index("3. What else") :],
        """\
3. What else fits
This plan fits every budget from 12,058,624 bytes up.
Smallest peak shown to be in reach: 12,058,624 bytes (budget "min").
4.0 MiB of the peak (34.8 %) are parameters, buffers and inputs, which no plan changes.
No recomputation goes below 6,291,456 bytes: mm (gpt.py:9 in f, module head) itself reads, makes and
  works in 2.0 MiB.
largest at the peak  type            MiB  category            where
-------------------  -------------  ----  ------------------  -------------
logits               f32[512,2048]   4.0  outputs             gpt.py:9 head
h.0.w                f32[512,1024]   2.0  parameters
mm_backward                          1.0  operator workspace  gpt.py:9 head
12 more                              4.5
TOTAL                               11.5
What would lower it, each alone:
  about 5.0 MiB less: a batch of 4 for 8; the largest that fits is about 7
  up to 3.0 MiB less: the loss in parts
  1.0 MiB less: 8-bit moments""",
    )


def test_report_of_a_plan_that_fits_names_the_bound_alone():
    text = str(Report(make_plan(floor=None, certificate=make_certificate(remedies=()))))
    assert_expected_inline(
        text[text.index("3. What else") :],
        """\
3. What else fits
This plan fits every budget from 12,058,624 bytes up.
4.0 MiB of the peak (34.8 %) are parameters, buffers and inputs, which no plan changes.
No recomputation goes below 6,291,456 bytes: mm (gpt.py:9 in f, module head) itself reads, makes and
  works in 2.0 MiB.""",
    )


def test_what_no_plan_goes_below_is_not_said_of_code_that_does():
    """Inductor's kernels write less to memory than the operators that they fuse."""
    plan = tight_plan()
    assert least_text(plan).startswith("No recomputation goes below 6,291,456 bytes: mm")
    assert least_text(replace(plan, predicted_peak=6_000_000)) == ""
    assert "least" not in str(infeasible(replace(plan, predicted_peak=6_000_000)))


def test_the_rest_of_a_step_is_no_operator_that_works():
    known = tight_plan().certificate
    plan = replace(tight_plan(), certificate=replace(known, least_operator=REST, least_source=""))
    said = "bytes: rest of the step (module head) takes 2.0 MiB."
    assert least_text(plan).endswith(said)


def test_the_error_names_tensors_bound_and_remedies():
    plan = tight_plan()
    error = infeasible(plan)
    assert_expected_inline(
        str(error),
        """\
smallest plan peaks at 11.5 MiB (12058624 bytes); the budget is 1.0 MiB (1048576 bytes).
  floor   7.0 MiB saved activations + 4.0 MiB parameters + 512.0 KiB gradients
            4.0 MiB  logits f32[512,2048], outputs, gpt.py:9
            2.0 MiB  h.0.w f32[512,1024], parameters
            1.0 MiB  mm_backward, operator workspace, gpt.py:9
            4.5 MiB  12 more
  at      nll_loss_backward, train.py:88 in compute_loss
  least   No recomputation goes below 6,291,456 bytes: mm (gpt.py:9 in f, module head) itself reads,
          makes and works in 2.0 MiB.
  try     a budget of 12058624 bytes ("12058624B")
          about 5.0 MiB less: a batch of 4 for 8; the largest that fits is about 7
          up to 3.0 MiB less: the loss in parts
          1.0 MiB less: 8-bit moments
  note    error.best_plan holds that plan; on_infeasible="best" applies it""",
    )
    assert error.smallest_peak == plan.predicted_peak
    assert all(line.strip() in str(error) for line in error.why.splitlines())
    assert len(error.why.splitlines()) == 5


def test_the_error_has_no_line_without_a_figure():
    assert "less:" not in str(infeasible(tight_plan(remedies=())))
    assert "less:" not in str(Report(tight_plan(remedies=())))
    assert_expected_inline(
        str(infeasible(make_plan(budget=MIB))),
        """\
smallest plan peaks at 11.5 MiB (12058624 bytes); the budget is 1.0 MiB (1048576 bytes).
  floor   7.0 MiB saved activations + 4.0 MiB parameters + 512.0 KiB gradients
  at      nll_loss_backward, train.py:88 in compute_loss
  try     a budget of 12058624 bytes ("12058624B")
  note    error.best_plan holds that plan; on_infeasible="best" applies it""",
    )


# Sums


def printed_figures(text, title):
    """The numeric cells of the table under ``title``: one list a row, TOTAL the last."""
    lines = text[text.index(title) :].splitlines()[3:]
    rows = lines[: next(i for i, line in enumerate(lines) if line.startswith("TOTAL")) + 1]
    return [
        [float(word.replace(",", "")) for word in row.split("  ") if is_figure(word)]
        for row in rows
    ]


def is_figure(word):
    return word.strip() and not word.strip("+-0123456789., ")


@given(
    st.dictionaries(
        st.sampled_from(["parameters", "gradients", "saved", "inputs", "workspace"]),
        st.tuples(st.integers(0, 2**40), st.integers(0, 2**40)),
        min_size=1,
    )
)
def test_live_columns_add_up_to_the_peaks(bytes_of):
    before = peak({name: pair[0] for name, pair in bytes_of.items()})
    after = peak({name: pair[1] for name, pair in bytes_of.items()})
    plan = make_plan(before=before, peak=after, baseline_peak=before.nbytes)
    rows = live_rows(plan)
    assert sum(row.before for row in rows) == before.nbytes
    assert sum(row.after for row in rows) == after.nbytes
    text = str(Report(plan)).split("2. Decisions")[0]
    *parts, total = printed_figures(text, "1. Live")
    # Where the text does not admit to rounding, the printed figures themselves add up.
    if "rounded" not in text:
        for column in range(3):
            assert sum(row[column] for row in parts) == pytest.approx(total[column], rel=1e-12)


def test_bytes_in_no_category_have_their_own_row():
    plan = make_plan(peak=peak({"parameters": 100}, nbytes=150))
    assert live_rows(plan)[-1].category == "in no category"
    assert live_rows(plan)[-1].after == 50


def test_decisions_add_up_whether_folded_or_not():
    plan = make_plan(decisions=tuple(many_different()))
    rows = folded(plan)
    assert len(rows) > MAX_ROWS
    assert sum(row.before for row in rows) == sum(d.nbytes for d in plan.decisions)
    assert sum(row.after for row in rows) == sum(d.nbytes_stored for d in plan.decisions)
    assert sum(row.n for row in rows) == len(plan.decisions)
    text = str(Report(plan))
    assert f"\n{len(rows) - MAX_ROWS} more  " in text
    *parts, total = printed_figures(text, "2. Decisions")
    assert len(parts) == MAX_ROWS + 1
    assert total[0] == len(plan.decisions)


def many_different():
    for i in range(MAX_ROWS + 9):
        yield decision(f"part{i}", "relu", (i + 1) * MIB, "keep" if i % 3 else "recompute")


# Folding


def test_equal_blocks_are_one_row():
    rows = folded(make_plan())
    assert [(r.where, r.n, r.decision) for r in rows] == [
        ("h.*.attn softmax", 4, "keep"),
        ("h.*.mlp.act gelu", 4, "recompute"),
        ("h.* add", 4, "recompute x3"),
    ]
    assert rows[1].before == 8 * MIB
    assert rows[1].after == 0


def test_blocks_that_are_treated_differently_stay_apart():
    plan = make_plan(decisions=(*blocks(2), decision("h.2.mlp.act", "gelu", 2 * MIB, "keep")))
    assert [(r.where, r.n, r.decision) for r in folded(plan) if "gelu" in r.where] == [
        ("h.*.mlp.act gelu", 2, "recompute"),
        ("h.2.mlp.act gelu", 1, "keep"),
    ]


def test_only_numbers_that_differ_become_a_star():
    parts = [decision(f"stage.1.block.{i}", "relu", MIB) for i in range(3)]
    assert [r.where for r in folded(make_plan(decisions=tuple(parts)))] == ["stage.1.block.* relu"]


def test_the_place_of_a_value_tells_ordinal_and_output():
    parts = (decision("", "native_layer_norm", MIB, key=Key("", "native_layer_norm", 1, 2)),)
    assert folded(make_plan(decisions=parts))[0].where == "native_layer_norm#1.2"


# Hostile names

HOSTILE = (
    "\x1b[31mred\x1b[0m",
    "\x1b]0;title\x07after",
    "line\nbreak\r\ttab\x00",
    "\u202eesrever\u2066\u200b",
    "\ud800",
    "文字" * 500,
    "e\u0301" * 400,
    "x" * 100_000,
    "<script>alert(1)</script>",
)


@pytest.mark.parametrize("name", HOSTILE, ids=range(len(HOSTILE)))
def test_hostile_names_stay_within_the_page(name):
    parts = (decision(name, name, MIB, type=name, source=name),)
    point = peak({name: 1 << 50}, operator=name, module=name, source=name, phase=name)
    plan = make_plan(
        decisions=parts, peak=point, before=point, model=name, device=name, asked=name,
        torch_version=name, cost_model=name, symbols={name: 1 << 60},
        valid_for={name: (1, 1 << 60)}, certificate=hostile_certificate(name),
    )  # fmt: skip
    report = Report(plan, measured_peak=1 << 50, gradients=name)
    error = infeasible(make_plan(budget=1, certificate=hostile_certificate(name)))
    for line in (*str(report).split("\n"), *str(error).split("\n")):
        assert len(line) <= WIDTH
        assert all(unicodedata.category(c)[0] not in "CM" for c in line)
        assert all(unicodedata.east_asian_width(c) not in "WF" for c in line)
    assert "<script>" not in report._repr_html_()


def hostile_certificate(name):
    return make_certificate(
        tensors=(LiveTensor(name, name, 1 << 50, name, name, name),),
        least_operator=name, least_module=name, least_source=name,
        remedies=(Remedy(name, name, name, 1 << 50),),
    )  # fmt: skip


@given(st.text())
def test_cleaned_text_is_one_printable_line(text):
    assert clean(text).isprintable()
    assert clean(clean(text)) == clean(text)


def test_words_of_other_alphabets_stay():
    assert clean("modèle.слой.größe") == "modèle.слой.größe"


@given(st.text(max_size=50), st.integers(3, 40))
def test_a_cut_keeps_both_ends(text, width):
    short = cut(text, width)
    assert len(short) <= width
    assert short == text or "..." in short
    assert short == text or width < 6 or (short[0], short[-1]) == (text[0], text[-1])


# Other forms


def test_to_dict_is_json_and_holds_the_plan():
    report = Report(make_plan(), 5, None)
    data = json.loads(json.dumps(report.to_dict()))
    assert data["plan"]["predicted_peak"] == report.plan.predicted_peak
    assert data["measured_peak"] == 5
    assert data["fits"] is True
    assert sum(row["before"] for row in data["decisions"]) == 24 * MIB


def test_a_plan_of_nothing_prints():
    empty = make_plan(
        decisions=(), seconds=0.0, added_seconds=0.0, budget=0, predicted_peak=0, baseline_peak=0,
        resident=0, floor=None, symbols={}, peak=peak({}), before=peak({}),
    )  # fmt: skip
    assert "FITS" in str(Report(empty))
    assert "the step fits as it is" in str(replace(Report(empty), measured_peak=0))
