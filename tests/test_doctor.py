"""The examination: what it finds, and that it finds what is wrong."""

import json

import highspy
import pytest

from fxmem import doctor
from fxmem.cli import main
from fxmem.doctor import Examination, Finding, examine


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("FXMEM_CACHE_DIR", str(tmp_path / "cache"))


def found(name):
    return next(one for one in examine().findings if one.name == name)


def test_all_parts_work_here():
    examination = examine()
    assert examination.healthy
    assert str(examination).endswith("all parts work")
    data = json.loads(json.dumps(examination.to_dict()))
    assert data["healthy"] is True
    assert data["solver"] == "HiGHS works"
    assert "planned to" in data["planning"]
    assert data["memory"] > data["free memory"] > 0
    assert {"sympy", "numpy", "highspy", "triton", "matplotlib"} <= set(data)


def test_a_solver_that_is_wrong(monkeypatch, capsys):
    class Wrong(highspy.Highs):
        def getInfo(self):
            return type("Info", (), {"objective_function_value": -1.5})

    monkeypatch.setattr(doctor.highspy, "Highs", Wrong)
    one = found("solver")
    assert one.fatal
    assert "HiGHS finds 1.5" in one.problem
    assert main(["doctor"]) == 1
    out = capsys.readouterr().out
    assert "problem: FxmemError: HiGHS finds 1.5" in out
    assert "fxmem does not work here" in out
    assert main(["doctor", "--json"]) == 1
    assert json.loads(capsys.readouterr().out)["healthy"] is False


def test_planning_that_fails(monkeypatch):
    def broken(*_):
        raise RuntimeError("no compiler")

    monkeypatch.setattr(doctor, "plan", broken)
    assert found("planning").problem == "RuntimeError: no compiler"


@pytest.mark.parametrize(
    ("version", "says"),
    [
        ("2.13.0+cpu", ""),
        ("2.14.1", "checked with torch 2.11.0, 2.13.0"),
        ("2.4.0", "made for 2.11 to 2.15"),
    ],
)
def test_versions_of_torch(monkeypatch, version, says):
    monkeypatch.setattr(doctor.torch, "__version__", version)
    one = doctor._torch_checked()
    assert says in one.problem
    assert bool(one.problem) == bool(says)


def test_caches_are_counted(tmp_path):
    examine()  # plans a step, which measures its operators
    (tmp_path / "cache" / "broken.json").write_text("{")
    (tmp_path / "cache" / "list.json").write_text("[1]")
    one = found("cache entries")
    counts = dict(one.value)
    assert counts.pop("broken.json") is None
    assert counts.pop("list.json") is None
    assert all(n > 0 for n in counts.values())
    assert len(counts) == 1
    assert "broken.json, list.json" in one.problem
    assert examine().healthy  # they are measured again


def test_what_it_prints_is_clean():
    examination = Examination((Finding("device", "\x1b[31mGPU", "very\nbad", fatal=True),))
    assert "\x1b" not in str(examination)
    assert len(str(examination).splitlines()) == 3
