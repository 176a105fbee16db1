"""The page: it opens in a browser without a complaint, counts as Python does, and runs nothing of ours.

Tests in a browser are skipped where there is no Chromium.
"""

import html
import json
import re
import shutil
import subprocess
from dataclasses import replace

import numpy as np
import pytest
import sympy
import torch
from quick import but_slow
from torch import nn
from torch.utils._sympy.functions import FloorDiv, Mod

import fxmem
from fxmem.basics.sizes import symbol
from fxmem.graphs.lifetimes import BeforeAfter, Lifetime, Memory, Point
from fxmem.planning.plan import Key
from fxmem.reports.page import page, page_data
from tests.test_report import MIB, decision, make_plan

CHROMIUM = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None
)
needs_browser = pytest.mark.skipif(CHROMIUM is None, reason="there is no Chromium")

FLAGS = [
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-sync",
    "--disable-background-networking",
    "--disable-component-update",
    "--enable-logging=stderr",
    "--v=0",
    "--virtual-time-budget=10000",
]


def opened(path, tmp_path, state=""):
    """The page's elements as text after its script ran, and what the console says."""
    done = subprocess.run(
        [
            CHROMIUM,
            *FLAGS,
            f"--user-data-dir={tmp_path / 'profile'}",
            "--dump-dom",
            f"file://{path}#{state}",
        ],
        capture_output=True,
        text=True,
        timeout=120,
    )
    console = [line for line in done.stderr.splitlines() if ":CONSOLE" in line]
    return done.stdout, console


def driven(text, tmp_path, script):
    """What a script that uses the page as a person would leaves in ``found``, as JSON."""
    # The page's own policy would not let the script run.
    free = re.sub(r'<meta http-equiv="Content-Security-Policy"[^>]*>', "", text)
    made = f"<script>const found = [];\n{script}\nconst out = document.createElement('pre');"
    made += "out.id = 'out'; out.textContent = JSON.stringify(found); document.body.append(out);"
    path = tmp_path / "driven.html"
    path.write_text(free.replace("</body>", f"{made}</script></body>"))
    dom, console = opened(path, tmp_path)
    assert not console
    out = re.search(r'<pre id="out">(.*?)</pre>', dom, re.DOTALL)
    return json.loads(html.unescape(out[1]))


def attribute(dom, name):
    return re.search(rf'{name}="([^"]*)"', dom)[1]


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList(
            nn.TransformerEncoderLayer(16, 2, 32, batch_first=True) for _ in range(3)
        )
        self.head = nn.Linear(16, 50)

    def forward(self, x):
        for block in self.blocks:
            x = block(x)
        return self.head(x).log_softmax(-1).square().mean()


@pytest.fixture(scope="module")
def report():
    x = torch.randn(6, 24, 16)
    return fxmem.report(Net(), (x,), "0.6x", dynamic_shapes={"x": {0: "B", 1: "S"}})


@pytest.fixture(scope="module")
def text(report, tmp_path_factory):
    path = tmp_path_factory.mktemp("page") / "page.html"
    report.html(path)
    return path.read_text()


# A memory that is made up


B, S = symbol("B"), symbol("S")


def made_up(name="value", n=4, **changes):
    """A forward and a backward of n operators each."""
    sizes = [4 * B * S, FloorDiv(B * S, 3) + 8, sympy.Max(16 * B, S**2), Mod(S, 7) * B + 5, 1024]
    points = [
        Point(f"{name}_op", name, f"{name}.py:{i} in f", "forward" if i < n else "backward", 16 * i)
        for i in range(2 * n)
    ]
    points.insert(n, Point("end of the forward", "", "", "boundary", 4 * B))
    lives = [
        Lifetime(
            f"{name}_{i}", "f32[B, S]", sizes[i % len(sizes)], i, 2 * n - i, "saved activations",
            f"{name}.{i // 10}", f"{name}.py:{i} in f", values=(f"{name}_{i}",),
        )
        for i in range(n)
    ]  # fmt: skip
    lives.append(Lifetime("weight", "f32[8]", 32, 0, 2 * n, "parameters", "", ""))
    lives.append(
        Lifetime("again", "f32[B]", 4 * B, n + 1, n + 2, "transients", "", "", f"{name}_0")
    )
    known = {"points": tuple(points), "lifetimes": tuple(lives), "symbols": {"B": 6, "S": 10}}
    return Memory(**{**known, **changes})


def made_up_page(name="value", plan=None, **changes):
    memory = made_up(name, **changes)
    lighter = replace(memory, lifetimes=memory.lifetimes[1:])
    return page("the report", plan or make_plan(), BeforeAfter(memory, lighter))


# What is in it


def test_the_memory_is_that_of_the_plan(report):
    assert report.memory.after.peak_at() == report.plan.predicted_peak
    assert report.memory.before.peak_at() == report.plan.keep_all_peak
    assert report.memory.after.peak == report.plan.peak.step
    live = {
        name: int(layer[report.memory.after.peak])
        for name, layer in report.memory.after.by_category().items()
    }
    assert sum(live.values()) == report.plan.predicted_peak
    assert live["saved activations"] == report.plan.peak.live["saved activations"]


SIZES = {"B": 6}, {"B": 5, "S": 24}, {"B": 3, "S": 12}


@pytest.mark.parametrize("sizes", but_slow(SIZES, SIZES[1:2]))
def test_the_unchanged_step_at_another_size_is_that_of_another_capture(report, sizes):
    shape = {**report.memory.before.symbols, **sizes}
    x = torch.randn(shape["B"], shape["S"], 16)
    again = fxmem.report(Net(), (x,), "2x")
    # Workspaces are measured at the example's size; everything else follows the closed forms.
    held = [name for name in again.memory.before.by_category() if name != "workspace"]
    mine = report.memory.before.by_category(**sizes)
    theirs = again.memory.before.by_category()
    for name in held:
        assert int(mine[name].max()) == int(theirs[name].max()), name


def test_a_symbol_that_is_none_is_refused(report):
    with pytest.raises(fxmem.FxmemError, match=r"no symbol T; known: \['B', 'S'\]"):
        report.memory.after.peak_at(T=3)


def test_nothing_is_fetched(text):
    assert not re.findall(
        r"https?:|//[a-z]+\.|\bsrc=|\bhref=|@import|url\(", text.split("<details")[0]
    )
    assert not re.findall(
        r"https?:|\bsrc=|\bhref=|@import|fetch\(|XMLHttp|WebSocket|import\(", text
    )
    assert "default-src 'none'" in text


def test_the_page_of_five_thousand_operators_is_small():
    """Names as long as transformers have them, and a size of its own for each tenth storage."""
    name = "model.layers.self_attn.scaled_dot_product"
    memory = made_up(name, n=2500)
    lives = tuple(
        replace(one, nbytes=one.nbytes + 128 * (i // 10)) for i, one in enumerate(memory.lifetimes)
    )
    memory = replace(memory, lifetimes=lives)
    plan = make_plan(decisions=tuple(decision(f"h.{i}", "gelu", MIB) for i in range(500)))
    made = page("report " * 1000, plan, BeforeAfter(memory, memory))
    assert len(memory.points) > 5000
    assert len(made.encode()) < 1_000_000


def test_a_plan_alone_has_no_page(tmp_path):
    with pytest.raises(fxmem.FxmemError, match="a plan alone does not hold it"):
        fxmem.Report(make_plan()).html(tmp_path / "page.html")
    assert not list(tmp_path.iterdir())


def test_a_page_that_cannot_be_written(report, tmp_path):
    with pytest.raises(fxmem.FxmemError, match="cannot write the page"):
        report.html(tmp_path / "missing" / "page.html")


def test_an_optimized_module_has_a_page(tmp_path):
    x = torch.randn(4, 6, 16)
    opt = fxmem.optimize(Net(), "0.7x", (x,))
    opt.report().html(tmp_path / "page.html")
    assert opt.report().memory.after.peak_at() == opt.plan.predicted_peak


# Hostile names

HOSTILE = [
    "</script><script>document.documentElement.dataset.owned='yes'</script>",
    "<img src=x onerror=\"document.documentElement.dataset.owned='yes'\">",
    '"]};document.documentElement.dataset.owned="yes";//',
    "<!--<script>",
    "{{script}}",
    "\u2028\u2029\x1b[31m\u202e",
    "__proto__",
]


def hostile_page(name):
    plan = make_plan(
        model=name,
        decisions=(
            decision(name, name, MIB, value=f"{name}_1", type=name, source=name, reason=name),
        ),
    )
    other = replace(plan, decisions=())
    memory = made_up(name, symbols={"B": 6, "S": 10})
    return page(name, plan, BeforeAfter(memory, memory), other)


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_name_stays_in_the_data(name):
    made = hostile_page(name)
    assert made.count("<script") == 2  # the data, and the page's own
    assert made.count("</script") == 2
    assert "<img" not in made
    assert made.count("<details") == 1


@needs_browser
def test_hostile_names_are_only_shown(tmp_path):
    path = tmp_path / "page.html"
    path.write_text(hostile_page(" ".join(HOSTILE)))
    dom, console = opened(path, tmp_path)
    assert not console
    assert "data-owned" not in dom
    assert attribute(dom, "data-ready") == "yes"
    assert "<img" not in dom


@needs_browser
def test_a_real_model_with_a_hostile_module(tmp_path):
    """Its name goes through capture, planning and the report; no size is named, so nothing slides."""
    name = "<img src=x onerror='document[`documentElement`][`id`]=`owned`'></script><script>"

    class Hostile(nn.Module):
        def __init__(self):
            super().__init__()
            self.parts = nn.ModuleDict({name: nn.Sequential(nn.Linear(8, 64), nn.GELU())})

        def forward(self, x):
            return self.parts[name](x).square().mean()

    path = tmp_path / "page.html"
    fxmem.optimize(Hostile(), "0.9x", (torch.randn(64, 8),)).report().html(path)
    dom, console = opened(path, tmp_path)
    assert not console
    assert attribute(dom, "data-ready") == "yes"
    assert 'id="owned"' not in dom
    assert "<img" not in dom
    assert re.search(r'<section id="controls"[^>]*></section>', dom)


@needs_browser
def test_a_script_that_gets_in_does_not_run(tmp_path):
    path = tmp_path / "page.html"
    planted = "<script>document.documentElement.dataset.owned = 'yes'</script>"
    path.write_text(made_up_page().replace("<h1>", f"{planted}<h1>"))
    dom, console = opened(path, tmp_path)
    assert "data-owned" not in dom
    assert attribute(dom, "data-ready") == "yes"
    assert any("Content Security Policy" in line for line in console)


# In a browser


@needs_browser
def test_it_opens_without_a_complaint(report, tmp_path):
    for made in (report, replace(report, plan=replace(report.plan, asked="min"))):
        path = tmp_path / "page.html"
        made.html(path)
        dom, console = opened(path, tmp_path)
        assert not console
        assert attribute(dom, "data-ready") == "yes"
        assert attribute(dom, "data-after") == str(report.plan.predicted_peak)
        assert attribute(dom, "data-before") == str(report.plan.keep_all_peak)


SIZES = [(1, 1), (2, 3), (6, 24), (7, 5), (32, 64), (48, 1), (3, 192)]

DRIVE = """
const [b, s] = document.querySelectorAll('#controls input[type="range"]');
const verdict = document.getElementById("verdict");
for (const [first, second] of %s) {
  b.value = first;
  b.dispatchEvent(new Event("input"));
  s.value = second;
  s.dispatchEvent(new Event("input"));
  const { before, after } = verdict.dataset;
  found.push([b.value, s.value, before, after].map(Number));
}
"""


@needs_browser
def test_sliders_agree_with_python(report, text, tmp_path):
    found = driven(text, tmp_path, DRIVE % json.dumps(SIZES))
    before, after = report.memory.before, report.memory.after
    assert found == [[b, s, before.peak_at(B=b, S=s), after.peak_at(B=b, S=s)] for b, s in SIZES]


@needs_browser
def test_sliders_agree_where_sizes_are_no_polynomials(tmp_path):
    found = driven(
        made_up_page(), tmp_path, DRIVE % json.dumps([(2, 1), (5, 10), (40, 13), (7, 70)])
    )
    memory = made_up()
    for b, s, before, _ in found:
        assert before == memory.peak_at(B=b, S=s)


@needs_browser
def test_the_largest_size_is_the_largest(report, text, tmp_path):
    dom, _ = opened_text(text, tmp_path, "B=3&S=24")
    largest = int(attribute(dom, "data-largest"))
    peak = report.memory.after.peak_at
    assert peak(B=largest, S=24) <= report.plan.budget < peak(B=largest + 1, S=24)


def opened_text(text, tmp_path, state):
    path = tmp_path / "page.html"
    path.write_text(text)
    return opened(path, tmp_path, state)


@needs_browser
def test_over_the_budget_is_said(report, text, tmp_path):
    dom, console = opened_text(text, tmp_path, "B=48&S=192")
    assert not console
    assert attribute(dom, "data-fits") == "false"
    assert "over the budget of" in dom


@needs_browser
def test_the_table_sorts_and_filters(report, text, tmp_path):
    script = """
    const rows = () => [...document.querySelectorAll("#storages tbody tr")];
    const cells = (column) => rows().map((row) => row.children[column].textContent);
    document.getElementById("more").click();
    found.push(cells(2));
    document.querySelectorAll("#storages th button")[2].click();
    found.push(cells(2));
    document.querySelectorAll("#storages th button")[0].click();
    found.push(cells(0));
    const filter = document.getElementById("filter");
    filter.value = "softmax";
    filter.dispatchEvent(new Event("input"));
    found.push(cells(0));
    """
    down, up, names, filtered = driven(text, tmp_path, script)
    numbers = [int(cell.replace(",", "")) for cell in down]
    assert numbers == sorted(numbers, reverse=True)
    assert len(numbers) == len(report.memory.after.lifetimes)
    assert [int(cell.replace(",", "")) for cell in up] == sorted(numbers)
    assert names == sorted(names)
    assert filtered
    assert all("softmax" in name for name in filtered)


@needs_browser
def test_what_is_under_the_pointer_is_told(report, text, tmp_path):
    script = """
    function told(id, x, y) {
      const place = document.getElementById(id);
      const box = place.getBoundingClientRect();
      const at = { clientX: box.left + x, clientY: box.top + y };
      place.dispatchEvent(new MouseEvent("mousemove", at));
      const names = [...document.querySelectorAll("#details dt")];
      found.push(names.map((name) => [name.textContent, name.nextSibling.textContent]));
    }
    told("chart", document.getElementById("chart").clientWidth / 2, 100);
    told("bars", 100, 12 * 8 + 3);
    """
    step, storage = map(dict, driven(text, tmp_path, script))
    number = int(step["step"].split()[0])
    live = int(report.memory.after.live[number])
    assert f"({live:,} bytes)" in step["live"]
    assert report.memory.after.points[number].operator in step["step"]
    lives = "from step {} to {}".format
    (meant,) = [
        one
        for one in report.memory.after.lifetimes
        if (one.name, lives(one.born, one.dies)) == (storage["storage"], storage["lives"])
    ]
    assert storage["formula"] == str(meant.nbytes)
    assert storage["module"] == meant.module


@needs_browser
def test_two_plans_are_compared(report, tmp_path):
    x = torch.randn(6, 24, 16)
    names = {"x": {0: "B", 1: "S"}}
    torch.manual_seed(0)
    tighter = fxmem.plan(Net(), "0.45x", (x,), dynamic_shapes=names)
    path = tmp_path / "page.html"
    report.html(path, tighter)
    dom, console = opened(path, tmp_path)
    assert not console
    rows = re.search(r'<table id="changes">.*?</table>', dom, re.DOTALL)[0].count("<tr>") - 1
    assert rows == len(report.plan.diff(tighter).splitlines()) - 1 > 0
    other = fxmem.plan(nn.Linear(3, 3), "2x", (torch.randn(2, 3),))
    with pytest.raises(fxmem.PlanMismatchError, match="different graphs"):
        report.html(path, other)


@needs_browser
def test_a_large_page_opens(tmp_path):
    made = made_up_page(n=2500)
    dom, console = opened_text(made, tmp_path, "")
    assert not console
    assert attribute(dom, "data-ready") == "yes"


# The data


def test_decisions_are_found_by_any_name_of_their_storage(report):
    known = {name for one in report.memory.after.lifetimes for name in one.values}
    assert {d.value for d in report.plan.decisions if d.action == "keep"} <= known
    lives = page_data(report.plan, report.memory)["after"]["lives"]
    again = [lives["decision"][i] for i, origin in enumerate(lives["origin"]) if origin >= 0]
    assert again
    assert all(report.plan.decisions[d].action == "recompute" for d in again if d >= 0)


def test_an_unknown_function_of_the_sizes_keeps_its_value():
    size = sympy.Piecewise((4 * B, B > 3), (8, True))
    memory = made_up(lifetimes=(Lifetime("a", "", size, 0, 1, "transients", "", ""),))
    data = page_data(make_plan(), BeforeAfter(memory, memory))
    assert data["sizes"][data["after"]["lives"]["size"][0]] == 24


def test_categories_add_up(report):
    for memory in (report.memory.before, report.memory.after):
        for sizes in ({}, {"B": 3}, {"S": 100}):
            total = sum(memory.by_category(**sizes).values())
            assert np.array_equal(total, memory.live_bytes(**sizes))


def test_keys_of_decisions_survive():
    # Two decisions may share a name only in a file; the page must not mind.
    twice = (
        decision("a", "gelu", MIB, key=Key("a", "gelu", 0)),
        decision("a", "gelu", MIB, key=Key("a", "gelu", 1)),
    )
    assert (
        len(page_data(make_plan(decisions=twice), BeforeAfter(made_up(), made_up()))["decisions"])
        == 2
    )
