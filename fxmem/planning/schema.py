"""The form of a plan file as JSON Schema, and what in a value is not of that form.

The schema is ``plan.schema.json`` beside this file, for other programs too.  Of its language, what that
file uses is understood here; a keyword that is not is an error, never passed over.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from importlib.resources import files
from typing import Any

from fxmem.basics.errors import FxmemError

MOST_PROBLEMS = 20
"""That are told of one value: the first ones say enough."""

_TYPES: dict[str, tuple[type, ...]] = {
    "object": (dict,),
    "array": (list,),
    "string": (str,),
    "integer": (int,),
    "number": (int, float),
    "boolean": (bool,),
    "null": (type(None),),
}
_KNOWN = {
    "$schema", "$id", "$defs", "$ref", "title", "description", "type", "properties", "required",
    "additionalProperties", "items", "prefixItems", "enum", "const", "minimum", "exclusiveMaximum",
    "minItems", "maxItems",
}  # fmt: skip


def plan_schema() -> dict[str, Any]:
    """The schema of plan files, as a dict."""
    found: dict[str, Any] = json.loads(
        files("fxmem.planning").joinpath("plan.schema.json").read_text()
    )
    return found


def problems(value: Any, schema: dict[str, Any]) -> list[str]:
    """What is wrong with a value, one line each, at most ``MOST_PROBLEMS``; empty if nothing is.

    Places are written as ``decisions[3].nbytes``.
    """
    found: list[str] = []
    for problem in _problems(value, schema, schema, ""):
        if len(found) == MOST_PROBLEMS:
            return [*found, "and more"]
        found.append(problem)
    return found


def _problems(value: Any, schema: Any, root: dict[str, Any], place: str) -> Iterator[str]:
    unknown = set(schema) - _KNOWN
    if unknown:
        raise FxmemError(
            f"the schema uses keywords that are not understood here: {sorted(unknown)}"
        )
    if "$ref" in schema:
        schema = root["$defs"][schema["$ref"].removeprefix("#/$defs/")]
    here = place or "the file"
    wrong = next(_wrong(value, schema), None)
    if wrong:
        yield f"{here} {wrong}"
    elif isinstance(value, dict):
        yield from _in_object(value, schema, root, place)
    elif isinstance(value, list):
        yield from _in_array(value, schema, root, here)


def _wrong(value: Any, schema: dict[str, Any]) -> Iterator[str]:
    """What is wrong with the value itself, not with what is in it."""
    if "type" in schema:
        names = schema["type"] if isinstance(schema["type"], list) else [schema["type"]]
        if not any(_is(value, name) for name in names):
            yield f"should be {' or '.join(names)}, not {_kind(value)}"
    if "const" in schema and (value != schema["const"] or isinstance(value, bool)):
        yield f"should be {schema['const']!r}, not {_shown(value)}"
    if "enum" in schema and value not in schema["enum"]:
        yield f"should be one of {schema['enum']}, not {_shown(value)}"
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        # Written so that NaN, which compares as False, is outside.
        if "minimum" in schema and not value >= schema["minimum"]:
            yield f"should be at least {schema['minimum']}, not {_shown(value)}"
        if "exclusiveMaximum" in schema and not value < schema["exclusiveMaximum"]:
            yield f"should be below {schema['exclusiveMaximum']}, not {_shown(value)}"
    if isinstance(value, list):
        least, most = schema.get("minItems", 0), schema.get("maxItems", len(value))
        if not least <= len(value) <= most:
            yield f"should have {least} entries, not {len(value)}"


def _in_object(
    value: dict[str, Any], schema: dict[str, Any], root: dict[str, Any], place: str
) -> Iterator[str]:
    known = schema.get("properties", {})
    more = schema.get("additionalProperties", {})
    for name in schema.get("required", ()):
        if name not in value:
            yield f"{place or 'the file'} lacks {name!r}"
    for name, part in value.items():
        inside = f"{place}.{name:.40}" if place else f"{name:.40}"
        if name in known:
            yield from _problems(part, known[name], root, inside)
        elif more is False:
            yield f"{place or 'the file'} has {name!r:.60}, which no plan has"
        else:
            yield from _problems(part, more, root, inside)


def _in_array(
    value: list[Any], schema: dict[str, Any], root: dict[str, Any], place: str
) -> Iterator[str]:
    first = schema.get("prefixItems", [])
    for number, part in enumerate(value):
        each = first[number] if number < len(first) else schema.get("items", {})
        yield from _problems(part, each, root, f"{place}[{number}]")


def _is(value: Any, name: str) -> bool:
    """JSON tells true from 1; Python's ``isinstance`` does not."""
    if isinstance(value, bool):
        return name == "boolean"
    return isinstance(value, _TYPES[name])


def _kind(value: Any) -> str:
    return next(name for name in ("integer", *_TYPES) if _is(value, name))


def _shown(value: Any) -> str:
    return repr(value)[:60]
