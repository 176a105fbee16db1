"""Private functions of torch with which Inductor's C++ kernels are compiled together: a unity build.

torch compiles each kernel as a unit of its own.  Two thirds of what that takes are the same for every
kernel: headers, bindings to Python, the linker.  Here those of one graph become as many units as there are
threads to compile with, or more where there are very many.

Each kernel's library lies where torch would have put it, a hard link to the one that has them all; so
torch finds it there again, in this process and in the next.  Which of its kernels is meant, the library
reads from the name that it is imported by.

Compiled and run on torch 2.13.0, 2.11.0 and 2.15.0.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import math
import os
import shutil
import sys
import uuid
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

from torch._inductor import async_compile, codecache
from torch._inductor.async_compile import AsyncCompile
from torch._inductor.cpp_builder import CppBuilder, get_name_and_dir_from_output_file_path

log = logging.getLogger(__name__)

MOST = 32
"""Kernels of a unit: more would save nothing, and take the compiler more memory."""


@contextlib.contextmanager
def unity_build() -> Iterator[None]:
    """Inside, the C++ kernels of one graph are compiled together."""
    if sys.platform == "win32":
        yield
        return
    wait = AsyncCompile.wait

    def wait_for_all(compiler: Any, scope: dict[str, Any]) -> None:
        _build(compiler.submit, vars(compiler).pop(_WAITING, []))
        compiler._wait_futures(scope)
        wait(compiler, scope)

    with (
        mock.patch.object(AsyncCompile, "cpp_pybinding", _collected),
        mock.patch.object(AsyncCompile, "wait", wait_for_all),
    ):
        yield


_WAITING = "_fxmem_waiting"


def _collected(compiler: Any, argtypes: list[str], source_code: str) -> Any:
    """In the place of ``AsyncCompile.cpp_pybinding``: a kernel that is there, or waits to be built."""
    async_compile.kernel_code_log.info("CPP+Bindings Kernel:\n%s", source_code)
    waiting: list[Any] = vars(compiler).setdefault(_WAITING, [])

    def submit(work: Callable[[], None]) -> _Later:
        waiting.append(work)
        return _Later()

    load = codecache.CppPythonBindingsCodeCache.load_pybinding_async
    return codecache.LambdaFuture(load(argtypes, source_code, submit_fn=submit))


class _Later:
    """What torch waits for before it loads a kernel; when it does, all are built."""

    def result(self) -> None:
        return None


# -- Building ----------------------------------------------------------------------------------------


class Kernel(NamedTuple):
    """A kernel that is to be built.

    key: the name that torch knows it by.  source: the file's text.  alone: builds it as torch does.
    """

    key: str
    source: str
    builder: Any
    alone: Callable[[], None]

    @classmethod
    def of(cls, work: Callable[[], None]) -> Kernel:
        assert isinstance(work, functools.partial)
        _, builders = work.args
        (builder,) = builders
        library = Path(builder.get_target_file_path())
        source = library.with_suffix(".cpp").read_text()
        return cls(library.name.split(".")[0], source, builder, work)


def _build(submit: Callable[[Any], Any], works: Sequence[Callable[[], None]]) -> None:
    """Builds what it can; torch builds what is left by itself, and says what is wrong with it."""
    try:
        kernels = [Kernel.of(work) for work in works]
    except (AssertionError, OSError, ValueError):
        log.info("kernels are compiled one by one", exc_info=True)
        return
    units = _units(kernels, async_compile.get_compile_threads())
    started = [submit(functools.partial(_built, unit)) for unit in units]
    for unit in started:
        if unit is not None:
            unit.result()


def _units(kernels: Sequence[Kernel], count: int) -> list[list[Kernel]]:
    """Kernels that are compiled alike, in so many units of about the same size."""
    units: dict[str, list[list[Kernel]]] = {}
    count = max(count, math.ceil(len(kernels) / MOST))
    for kernel in sorted(kernels, key=lambda one: -len(one.source)):
        some = units.setdefault(_options(kernel.builder), [[] for _ in range(count)])
        min(some, key=lambda unit: sum(len(one.source) for one in unit)).append(kernel)
    return [unit for some in units.values() for unit in some if unit]


def _options(builder: Any) -> str:
    """How a builder compiles, without what."""
    library = builder.get_target_file_path()
    command: str = builder.get_command_line()
    return command.replace(library.removesuffix(".so"), "")


def _built(unit: list[Kernel]) -> None:
    if len(unit) == 1:
        unit[0].alone()
        return
    try:
        options = unit[0].builder._build_option
        _, path = codecache.write(together(unit), "unity.cpp", extra=_options(unit[0].builder))
        name, folder = get_name_and_dir_from_output_file_path(path)
        # Two processes may build the same at once, and neither may read what the other one has half of.
        builder = CppBuilder(f"{name}.{uuid.uuid4().hex}", path, options, folder)
        builder.build()
        library = builder.get_target_file_path()
        for kernel in unit:
            _put(library, kernel.builder.get_target_file_path())
        os.unlink(library)
    except Exception:  # torch then says what is wrong, of the kernel that it is wrong with
        log.info("%d kernels are compiled one by one", len(unit), exc_info=True)


def _put(library: str, where: str) -> None:
    """As a link where the file system has such; what is there already stays."""
    try:
        os.link(library, where)
    except FileExistsError:
        pass
    except OSError:
        copy = f"{library}.copy"
        shutil.copyfile(library, copy)
        os.replace(copy, where)


# -- The unit's text ---------------------------------------------------------------------------------


def together(unit: Sequence[Kernel]) -> str:
    """C++ in which each kernel has a namespace, and Python's bindings give the one that is asked for."""
    lines = [line for kernel in unit for line in kernel.source.splitlines()]
    included = dict.fromkeys(line for line in lines if line.startswith("#include"))
    parts = [_part(place, kernel.source) for place, kernel in enumerate(unit)]
    cases = [
        f'    if (!std::strncmp(name, "{kernel.key}.", {len(kernel.key) + 1}))'
        f" return unit_{place}::init_{place}();"
        for place, kernel in enumerate(unit)
    ]
    head = ["#define PY_SSIZE_T_CLEAN", "#include <cstring>", *included]
    return "\n".join([*head, *parts, _CHOOSE.replace("CASES", "\n".join(cases))])


def _part(place: int, source: str) -> str:
    """One kernel's text.  Its functions for C need other names than those of the other kernels."""
    text = (line for line in source.splitlines() if not line.startswith("#include"))
    names = {"kernel": f"kernel_{place}", "PyInit_kernel": f"init_{place}"}
    return "\n".join(
        [
            f"namespace unit_{place} {{",
            *(f"#define {name} {other}" for name, other in names.items()),
            *text,
            *(f"#undef {name}" for name in names),
            "}",
        ]
    )


_CHOOSE = """
namespace {

PyObject* choose(const char* name) {
CASES
    PyErr_Format(PyExc_ImportError, "%s is no kernel of this library", name);
    return nullptr;
}

PyObject* create(PyObject* spec, PyModuleDef*) {
    PyObject* name = PyObject_GetAttrString(spec, "name");
    if (!name) return nullptr;
    const char* text = PyUnicode_AsUTF8(name);
    PyObject* found = text ? choose(text) : nullptr;
    Py_DECREF(name);
    return found;
}

PyModuleDef_Slot slots[] = {
    {Py_mod_create, reinterpret_cast<void*>(create)},
#ifdef Py_GIL_DISABLED
    {Py_mod_gil, Py_MOD_GIL_NOT_USED},
#endif
    {0, nullptr}};

PyModuleDef definition = {
    PyModuleDef_HEAD_INIT, "kernel", nullptr, 0, nullptr, slots, nullptr, nullptr, nullptr};

}  // namespace

PyMODINIT_FUNC PyInit_kernel(void) { return PyModuleDef_Init(&definition); }
"""
