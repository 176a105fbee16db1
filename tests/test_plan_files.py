"""Plan files: their schema, and files that are hostile, broken or of something else."""

import json
import os
import random
import sys
import typing
from dataclasses import fields, replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import fxmem
from fxmem.planning import plan as plans
from fxmem.planning.plan import Plan
from fxmem.planning.schema import MOST_PROBLEMS, plan_schema, problems
from tests.test_report import decision, make_certificate, make_plan

SCHEMA = Path(plans.__file__).parent / "plan.schema.json"


def a_plan():
    return make_plan(certificate=make_certificate(), valid_for={"B": (1, 8)}, gap=0.25)


@pytest.fixture
def path(tmp_path):
    path = tmp_path / "plan.json"
    a_plan().save(path)
    return path


# The schema


_NUMBER = {"minimum": 0, "exclusiveMaximum": plans._LARGEST}
_PLAIN = {
    str: {"type": "string"},
    bool: {"type": "boolean"},
    int: {"type": "integer", **_NUMBER},
    float: {"type": "number", **_NUMBER},
}


def schema_of(hint):
    """The schema of a type that a plan's dataclasses use."""
    if hint in _PLAIN:
        return _PLAIN[hint]
    if hasattr(hint, "__dataclass_fields__"):
        return {"$ref": f"#/$defs/{hint.__name__}"}
    origin, parts = typing.get_origin(hint), typing.get_args(hint)
    if origin is dict:
        return {"type": "object", "additionalProperties": schema_of(parts[1])}
    if origin is tuple and parts[1:] == (...,):
        return {"type": "array", "items": schema_of(parts[0])}
    if origin is tuple:
        whole = [schema_of(part) for part in parts]
        n = len(whole)
        return {"type": "array", "prefixItems": whole, "minItems": n, "maxItems": n}
    some, none = parts
    assert none is type(None)
    if hasattr(some, "__dataclass_fields__"):
        return {"$ref": f"#/$defs/{some.__name__}OrNull"}
    return {**schema_of(some), "type": [schema_of(some)["type"], "null"]}


def object_of(kind, **more):
    hints = typing.get_type_hints(kind)
    properties = {**more, **{f.name: schema_of(hints[f.name]) for f in fields(kind)}}
    if kind is plans.Decision:
        properties["action"] = {"enum": list(plans.ACTIONS)}
    if kind is plans.GradientNoise:
        properties["tier"] = {"enum": list(plans.TIERS)}
    return {
        "type": "object",
        "properties": properties,
        "required": list(properties),
        "additionalProperties": False,
    }


def written_schema():
    parts = ("Key", "Decision", "PeakPoint", "LiveTensor", "Remedy", "Certificate")
    parts += ("CodeOf", "NoiseOf", "GradientNoise")
    definitions = {name: object_of(getattr(plans, name)) for name in parts}
    for name in ("Certificate", "GradientNoise"):
        definitions[f"{name}OrNull"] = {**definitions[name], "type": ["object", "null"]}
    whole = object_of(Plan, schema={"const": plans.SCHEMA_VERSION})
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "A plan of fxmem",
        "description": "Written by Plan.save. Bytes and seconds are plain numbers.",
        **whole,
        "$defs": definitions,
    }


def test_the_schema_is_that_of_the_classes():
    text = json.dumps(written_schema(), indent=1) + "\n"
    if os.environ.get("EXPECTTEST_ACCEPT"):
        SCHEMA.write_text(text)
    assert SCHEMA.read_text() == text, "run the test again with EXPECTTEST_ACCEPT=1"


def test_a_saved_plan_is_valid(path):
    assert Plan.validate(path) == []
    assert Plan.load(path) == a_plan()
    make_plan().save(path)  # without a certificate, without a gap
    assert Plan.validate(path) == []


def test_a_real_plan_is_valid(path):
    import torch

    model = torch.nn.Sequential(torch.nn.Linear(8, 64), torch.nn.GELU(), torch.nn.Linear(64, 8))
    fxmem.plan(model, "min", (torch.randn(64, 8),)).save(path)
    assert Plan.validate(path) == []


def test_other_validators_agree(path):
    jsonschema = pytest.importorskip("jsonschema")
    jsonschema.validate(json.loads(path.read_text()), plan_schema())


def changed(path, **changes):
    data = {**json.loads(path.read_text()), **changes}
    path.write_text(json.dumps(data))
    return path


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"schema": 1}, "schema should be 5, not 1"),
        ({"budget": -1}, "budget should be at least 0, not -1"),
        ({"budget": True}, "budget should be integer, not boolean"),
        ({"budget": "1GiB"}, "budget should be integer, not string"),
        ({"budget": 2**63}, "budget should be below"),
        ({"gap": []}, "gap should be number or null, not array"),
        ({"command": "rm"}, "the file has 'command', which no plan has"),
        ({"symbols": {"B": 1.5}}, "symbols.B should be integer, not number"),
        ({"valid_for": {"B": [1]}}, "valid_for.B should have 2 entries, not 1"),
        ({"decisions": [{}]}, "decisions[0] lacks 'key'"),
        ({"peak": None}, "peak should be object, not null"),
    ],
)
def test_problems_are_told_with_their_place(path, changes, says):
    found = Plan.validate(changed(path, **changes))
    assert any(says in problem for problem in found), found
    with pytest.raises(fxmem.PlanMismatchError):
        Plan.load(path)


def test_an_unknown_action_is_found_by_both(path):
    data = json.loads(path.read_text())
    data["decisions"][0]["action"] = "quantise"
    found = Plan.validate(changed(path, **data))
    assert "decisions[0].action should be one of" in found[0]
    with pytest.raises(fxmem.PlanMismatchError, match="unknown action"):
        Plan.load(path)


def test_two_decisions_about_one_value(path):
    twice = (decision("h.0", "gelu", 8, "keep"), decision("h.0", "gelu", 8))
    a_plan = make_plan(decisions=twice)
    a_plan.save(path)
    assert "two decisions about one value" in Plan.validate(path)[0]
    with pytest.raises(fxmem.PlanMismatchError, match="two decisions"):
        Plan.load(path)


def test_many_problems_are_cut_short():
    found = problems({"a": [-1] * 100}, {"properties": {"a": {"items": {"minimum": 0}}}})
    assert len(found) == MOST_PROBLEMS + 1
    assert found[-1] == "and more"


def test_a_keyword_that_is_not_understood_is_an_error():
    with pytest.raises(fxmem.FxmemError, match="patternProperties"):
        problems({}, {"patternProperties": {}})


# What no plan is


def loaded_or_none(path):
    """The plan, or None where it is refused as it should be."""
    try:
        return Plan.load(path)
    except fxmem.PlanMismatchError as error:
        if len(str(error)) > 2000:
            raise
        return None


def refused(path):
    """The message; and validate finds something too."""
    assert Plan.validate(path)
    with pytest.raises(fxmem.PlanMismatchError) as error:
        Plan.load(path)
    return str(error.value)


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"null",
        b"[]",
        b"{}",
        b'"plan"',
        b"\xff\xfe\x00",
        b"\x80\x04\x95\x1f\x00\x00\x00\x00\x00\x00\x00\x8c\x05posix\x94\x8c\x06system\x94",
        b"__import__('os').system('touch owned')",
        b"[" * 100_000,
        b'{"a":' * 100_000,
        b'{"schema": 5, "schema": 5}',
        b"NaN",
        b'{"schema": NaN}',
        b"9" * 5000,
        b'{"schema": 5, "decisions": "keep"}',
    ],
)
def test_other_content_is_refused(path, content, monkeypatch):
    monkeypatch.chdir(path.parent)
    path.write_bytes(content)
    assert "is not a plan that this version can read" in refused(path)
    assert [p.name for p in path.parent.iterdir()] == ["plan.json"]


def test_what_is_no_file_is_refused(tmp_path):
    assert "no plan file at" in refused(tmp_path / "none.json")
    assert "plan" in refused(tmp_path)


@pytest.mark.skipif(sys.platform == "win32", reason="has no pipes in the file system")
def test_a_pipe_and_a_device_are_refused_at_once(tmp_path):
    pipe = tmp_path / "pipe.json"
    os.mkfifo(pipe)
    assert "no regular file" in refused(pipe)
    assert "no regular file" in refused("/dev/zero")


def test_a_file_that_is_too_large(path, monkeypatch):
    monkeypatch.setattr(plans, "_MAX_FILE_BYTES", 1000)
    assert "larger than 1000 bytes" in refused(path)


def test_every_truncation_is_refused(path):
    content = path.read_bytes()
    for length in range(0, len(content.rstrip()), 97):
        path.write_bytes(content[:length])
        refused(path)


HOSTILE = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**70), 2**70)
    | st.floats()
    | st.sampled_from(["", "keep", "__class__", "\x1b[31m", "\ud800", "a" * 5000]),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3)
    ),
    max_leaves=5,
)


def places(value, place=()):
    """Every place in a JSON value."""
    yield place
    parts = (
        value.items()
        if isinstance(value, dict)
        else enumerate(value)
        if isinstance(value, list)
        else ()
    )
    for key, part in parts:
        yield from places(part, (*place, key))


def with_change(value, place, new):
    if not place:
        return new
    key, *rest = place
    copy = dict(value) if isinstance(value, dict) else list(value)
    copy[key] = with_change(value[key], rest, new)
    return copy


DATA = json.loads(json.dumps(a_plan().to_dict()))
PLACES = list(places(DATA))


@settings(max_examples=300, deadline=None)
@given(st.sampled_from(PLACES), HOSTILE)
def test_a_change_anywhere_is_refused_or_gives_a_plan(tmp_path_factory, place, new):
    path = tmp_path_factory.getbasetemp() / "changed.json"
    path.write_bytes(json.dumps(with_change(DATA, place, new)).encode("utf-8", "replace"))
    loaded = loaded_or_none(path)
    assert (loaded is None) == bool(Plan.validate(path))
    if loaded is None:
        return
    # What is read is a plan all through: it prints, compares and goes to disk again.
    str(fxmem.Report(loaded))
    loaded.diff(replace(loaded, decisions=()))
    loaded.save(path)
    assert Plan.load(path) == loaded


def test_flipped_bytes_are_refused_or_give_a_plan(path):
    draw = random.Random(0)
    content = path.read_bytes()
    for _ in range(300):
        broken = bytearray(content)
        for _ in range(draw.randint(1, 4)):
            broken[draw.randrange(len(broken))] = draw.randrange(256)
        path.write_bytes(bytes(broken))
        assert (loaded_or_none(path) is None) == bool(Plan.validate(path))
