"""The command line: exit status, JSON, and messages for what cannot be used."""

import json
import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from quick import but_slow

from fxmem import cli
from fxmem.cli import main

ROOT = Path(__file__).parent.parent

MODELS = """
import torch
from torch import nn


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(*(nn.Sequential(nn.Linear(16, 64), nn.GELU(),
                                                    nn.Linear(64, 16)) for _ in range(4)))

    def forward(self, x, scale=1.0):
        return (self.layers(x) * scale).square().mean()


def build():
    return Net(), (torch.ones(256, 16),)


def build_with_kwargs():
    return Net(), (torch.ones(256, 16),), {"scale": 2.0}


def build_one_tensor():
    return Net(), torch.ones(256, 16)


def wrong():
    return "not a model"


def wrong_parts():
    return Net(), 5


def broken():
    raise RuntimeError("no weights here")


def leaves():
    raise SystemExit(0)


constant = 5
"""


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("FXMEM_CACHE_DIR", str(tmp_path / "cache"))


@pytest.fixture
def models(tmp_path):
    path = tmp_path / "models.py"
    path.write_text(MODELS)
    return path


def outcome(capsys, *arguments):
    """Exit status, standard output, standard error of one command."""
    try:
        status = main([str(a) for a in arguments])
    except SystemExit as error:
        status = error.code
    return (status, *capsys.readouterr())


# Planning


@pytest.mark.parametrize("function", ["build", "build_with_kwargs", "build_one_tensor"])
def test_plan_prints_one_line(capsys, models, function):
    status, out, err = outcome(capsys, "plan", f"{models}:{function}", "--budget", "0.8x")
    assert status == 0, err
    assert out.startswith("Plan(peak ")


def test_plan_is_saved_and_compared(capsys, models, tmp_path):
    loose, tight = tmp_path / "loose.json", tmp_path / "tight.json"
    for path, budget in ((loose, "2x"), (tight, "min")):
        status, _, err = outcome(
            capsys, "plan", f"{models}:build", "--budget", budget, "--out", path
        )
        assert status == 0, err
    status, out, _ = outcome(capsys, "diff", loose, tight)
    assert status == 0
    assert "keep -> recompute" in out
    status, out, _ = outcome(capsys, "diff", loose, tight, "--json")
    data = json.loads(out)
    assert data["predicted_peak"][0] > data["predicted_peak"][1]
    assert data["changes"]


def test_plan_as_json(capsys, models):
    status, out, _ = outcome(capsys, "plan", f"{models}:build", "--budget", "0.8x", "--json")
    assert status == 0
    assert json.loads(out)["predicted_peak"] <= json.loads(out)["budget"]


def test_report(capsys, models):
    arguments = ("report", f"{models}:build", "--budget", "0.8x", "--allow", "recompute")
    status, out, err = outcome(capsys, *arguments, "--reserve", "1KiB")
    assert status == 0, err
    assert out.startswith("fxmem  Net")
    assert "1. Live at the peak" in out
    status, out, _ = outcome(capsys, *arguments, "--json")
    assert json.loads(out)["fits"] is True


def test_a_budget_that_nothing_fits_is_status_2(capsys, models):
    status, out, err = outcome(capsys, "plan", f"{models}:build", "--budget", "1KiB")
    assert status == 2
    assert not out
    assert "smallest plan peaks at" in err
    status, out, err = outcome(capsys, "report", f"{models}:build", "--budget", "1KiB", "--json")
    assert status == 2
    assert json.loads(out)["smallest_peak"] > 1024
    assert err


# Refusals


@pytest.mark.parametrize(
    ("spec", "says"),
    [
        ("models.py", "package.module:callable or file.py:callable"),
        ("", "package.module:callable or file.py:callable"),
        (":build", "package.module:callable or file.py:callable"),
        ("models.py:", "package.module:callable or file.py:callable"),
        ("nothing.py:build", "no such file: nothing.py"),
        ("no_such_package_of_ours:build", "No module named"),
        ("{models}:missing", "no callable 'missing'"),
        ("{models}:constant", "no callable 'constant'"),
        ("{models}:wrong", "returned str"),
        ("{models}:wrong_parts", "returned (Net, int)"),
        ("{models}:broken", "RuntimeError: no weights here"),
        ("{models}:leaves", "SystemExit"),
    ],
)
def test_a_bad_model_is_one_clear_message(capsys, models, spec, says):
    status, out, err = outcome(
        capsys, "plan", spec.replace("{models}", str(models)), "--budget", "0.5x"
    )
    assert status == 1
    assert not out
    assert says in err
    assert "Traceback" not in err


def test_a_missing_function_lists_those_that_exist(capsys, models):
    _, _, err = outcome(capsys, "plan", f"{models}:missing", "--budget", "0.5x")
    assert "build, build_with_kwargs" in err


def test_a_failing_function_names_its_line(capsys, models):
    _, _, err = outcome(capsys, "plan", f"{models}:broken", "--budget", "0.5x")
    line = MODELS.splitlines().index('    raise RuntimeError("no weights here")') + 1
    assert f"models.py:{line}" in err


@pytest.mark.parametrize("budget", ["20", "0", "-1GiB", "much"])
def test_a_budget_that_cannot_be_read_is_status_1(capsys, models, budget):
    status, _, err = outcome(capsys, "plan", f"{models}:build", f"--budget={budget}")
    assert status == 1
    assert "accepted" in err


@pytest.mark.parametrize(
    "arguments",
    [
        (),
        ("dance",),
        ("plan",),
        ("plan", "models.py:build"),
        ("demo", "--model", "llama"),
        ("demo", "--steps", "0"),
        ("diff", "a.json"),
        ("doctor", "--colour"),
    ],
)
def test_wrong_usage_is_status_1(capsys, arguments):
    status, out, err = outcome(capsys, *arguments)
    assert status == 1
    assert not out
    assert "usage: " in err


def test_diff_of_what_is_no_plan(capsys, tmp_path):
    path = tmp_path / "\x1b[31mred.json"
    path.write_text("{}")
    status, _, err = outcome(capsys, "diff", path, path)
    assert status == 1
    assert "\x1b" not in err
    status, out, _ = outcome(capsys, "diff", tmp_path / "none.json", path, "--json")
    assert status == 1
    assert "no plan file" in json.loads(out)["error"]


def test_an_unwritable_plan_file(capsys, models, tmp_path):
    path = tmp_path / "missing" / "plan.json"
    status, _, err = outcome(capsys, "plan", f"{models}:build", "--budget", "0.8x", "--out", path)
    assert status == 1
    assert "cannot write the plan" in err


# Looking


def test_the_table_of_gpus(capsys):
    status, out, _ = outcome(capsys, "gpus")
    assert status == 0
    assert "RTX 4090" in out
    status, out, _ = outcome(capsys, "gpus", "--json")
    rows = {row["name"]: row for row in json.loads(out)["gpus"]}
    assert rows["T4"]["nbytes"] == 16 * 2**30 > rows["T4"]["usable"]


def test_where_a_model_fits(capsys, models):
    status, out, err = outcome(capsys, "gpus", f"{models}:build")
    assert status == 0, err
    assert "as it is" in out
    status, out, _ = outcome(capsys, "gpus", f"{models}:build", "--json")
    assert {row["verdict"] for row in json.loads(out)["rows"]} == {"as it is"}
    status, out, _ = outcome(capsys, "gpus", f"{models}:build", "--reserve", "500GiB")
    assert status == 2
    assert "as it is" not in out.split("\n", 1)[1]


def test_what_a_model_saves(capsys, models):
    status, out, _ = outcome(capsys, "saved", f"{models}:build_with_kwargs")
    assert status == 0
    assert out.startswith("Net saves ")
    status, out, _ = outcome(capsys, "saved", f"{models}:build", "--json")
    assert json.loads(out)["total"] > 0


def test_report_writes_its_pages(capsys, models, tmp_path):
    pytest.importorskip("matplotlib")
    forms = [f"--{form}={tmp_path / f'step.{form}'}" for form in ("html", "png", "svg")]
    status, out, err = outcome(
        capsys, "report", f"{models}:build", "--budget", "0.8x", *forms, "--gpus"
    )
    assert status == 0, err
    assert out.count("written to") == 3
    assert "2. One step in program order" in out
    assert "RTX 2080" in out
    assert {p.name for p in tmp_path.glob("step.*")} == {"step.html", "step.png", "step.svg"}
    page = tmp_path / "none" / "step.html"
    status, out, err = outcome(
        capsys, "report", f"{models}:build", "--budget", "0.8x", "--html", page
    )
    assert status == 1
    assert "cannot write the page" in err


def test_validate(capsys, models, tmp_path):
    path = tmp_path / "plan.json"
    outcome(capsys, "plan", f"{models}:build", "--budget", "0.8x", "--out", path)
    status, out, _ = outcome(capsys, "validate", path)
    assert status == 0
    assert "is a plan of this version" in out
    data = json.loads(path.read_text())
    path.write_text(json.dumps({**data, "budget": -1, "\x1b[31m": 0}))
    status, out, _ = outcome(capsys, "validate", path)
    assert status == 1
    assert "budget should be at least 0, not -1" in out
    assert "\x1b" not in out
    status, out, _ = outcome(capsys, "validate", path, "--json")
    assert status == 1
    assert len(json.loads(out)["problems"]) == 2


# Help and doctor


@pytest.mark.parametrize("command", cli._COMMANDS, ids=lambda command: command.name)
def test_each_command_has_help_and_examples_that_parse(capsys, command):
    status, out, _ = outcome(capsys, command.name, "--help")
    assert status == 0
    assert command.help in out
    lines = out.split("examples:\n")[1].splitlines()
    assert lines
    for line in lines:
        fxmem, *arguments = shlex.split(line)
        assert fxmem == "fxmem"
        assert cli._parser().parse_args(arguments).run is command.run


def test_all_help_is_listed(capsys):
    status, out, _ = outcome(capsys, "--help")
    assert status == 0
    assert all(command.name in out for command in cli._COMMANDS)


def test_help_says_that_the_models_code_runs(capsys):
    status, out, _ = outcome(capsys, "plan", "--help")
    assert status == 0
    assert "imports and runs that code" in " ".join(out.split())
    assert "80%" in out


def test_calibrate_writes_what_planning_reads(capsys, models, tmp_path, monkeypatch):
    monkeypatch.setenv("FXMEM_CACHE_DIR", str(tmp_path / "cache"))
    status, out, _ = outcome(capsys, "calibrate", f"{models}:build", "--device", "cpu", "--json")
    facts = json.loads(out)
    assert status == 0
    table = json.loads(Path(facts["file"]).read_text())
    assert facts["measured"] == len(table) > 0
    assert str(tmp_path) in facts["file"]
    assert all(table[name][0] == nbytes for name, nbytes in facts["largest"].items())
    status, out, _ = outcome(capsys, "calibrate", f"{models}:build", "--device", "cpu")
    assert status == 0
    assert f"{len(table)} operators measured on cpu" in out


def test_doctor(capsys):
    status, out, _ = outcome(capsys, "doctor")
    assert status == 0
    assert "torch checked" in out
    status, out, _ = outcome(capsys, "doctor", "--json")
    facts = json.loads(out)
    assert facts["threads"] >= 1
    assert "workspaces-" in facts["calibration cache"]


def test_python_dash_m():
    paths = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH", "")]))
    done = subprocess.run(
        [sys.executable, "-m", "fxmem", "doctor", "--json"],
        env={**os.environ, "PYTHONPATH": paths},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["python"]


# The demo


@pytest.mark.parametrize("model", but_slow(["gpt", "resnet"], ["resnet"]))
def test_demo_trains_the_same_twice(capsys, model):
    if model == "resnet":
        pytest.importorskip("sklearn")
    status, out, err = outcome(
        capsys, "demo", "--model", model, "--steps", "2", "--budget", "0.7x", "--json"
    )
    assert status == 0, err
    data = json.loads(out)
    assert data["identical"]
    assert data["planned"]["peak"] < data["unchanged"]["peak"]
    assert len(data["losses"]) == 2


def test_the_resnet_demo_says_what_to_install(capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    status, _, err = outcome(capsys, "demo", "--model", "resnet")
    assert status == 1
    assert "pip install scikit-learn" in err
