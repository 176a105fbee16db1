"""What Inductor raises while it makes code of a step, as an error that says where and what to try."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator

import torch
from torch import fx

from fxmem.basics.errors import CompileError, FxmemError
from fxmem.graphs.graph import source_line

_TARGET = re.compile(r"^\s*target: (\S+)", re.MULTILINE)
_OF_A_COMPILER = re.compile(r"^.*\berror: .*$", re.MULTILINE)
_MOST = 300


@contextlib.contextmanager
def explained(doing: str, module: fx.GraphModule) -> Iterator[None]:
    """Inside, what is raised by Inductor, or by code that it made, becomes a ``CompileError``.

    doing: what it was busy with, for a sentence.  module: the graph that it was about.
    """
    try:
        yield
    except (FxmemError, torch.OutOfMemoryError):  # the latter says itself what is the matter
        raise
    except Exception as error:
        raise _compile_error(doing, module, error) from error


def _compile_error(doing: str, module: fx.GraphModule, error: Exception) -> CompileError:
    inner = getattr(error, "inner_exception", error)
    reason, place = _reason(inner), _place(module, str(inner))
    return CompileError(
        f"{doing} failed.\n"
        f"  reason  {reason}\n"
        f"  at      {place or 'unknown operator'}\n"
        f"  try     {_way_out(inner)}",
        reason=reason,
        place=place,
    )


def _reason(error: Exception) -> str:
    """What went wrong in a line; Inductor adds pages of operands, and compilers their command."""
    text = str(error)
    if found := _OF_A_COMPILER.search(getattr(error, "output", "")):
        return f"{type(error).__name__}: {found[0].strip()}"[:_MOST]
    said = text[: at.start()] if (at := _TARGET.search(text)) else text
    said = " ".join(said.split())[:_MOST]
    if re.match(r"\w+(Error|Exception): ", said):  # it begins with the error within
        return said
    return f"{type(error).__name__}: {said}" if said else type(error).__name__


def _place(module: fx.GraphModule, text: str) -> str:
    """The operator that the text is about, and the user's line that it is from."""
    found = _TARGET.search(text)
    if found is None:
        return ""
    of_it = (n for n in module.graph.nodes if str(n.target) == found[1])
    line = next((line for line in map(source_line, of_it) if line), "")
    return f"{found[1]} ({line})" if line else found[1]


def _way_out(error: Exception) -> str:
    eager = 'compiler="eager", with which the planned step runs operator by operator'
    if type(error).__name__ == "InvalidCxxCompiler":
        return f"a C++ compiler that Inductor finds, such as g++, or its path in CXX; or {eager}"
    return f"{eager}; if torch.compile(model) works on the same inputs, report this message"
