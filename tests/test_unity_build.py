"""Inductor's C++ kernels are compiled together, and are what they were when each is compiled alone."""

import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from expecttest import assert_expected_inline
from torch._inductor import config
from torch._inductor.async_compile import AsyncCompile
from torch._inductor.codecache import CppPythonBindingsCodeCache
from torch._inductor.cpp_builder import CppBuilder
from torch._inductor.exc import CppCompileError
from torch._inductor.utils import fresh_inductor_cache

from fxmem._torch import unity_build as unity
from fxmem._torch.unity_build import Kernel, together, unity_build

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="each is compiled alone there")


def kernel(formula: str) -> str:
    return f"""
#include <torch/csrc/inductor/cpp_prefix.h>
extern "C"  void  kernel(const float* in_ptr0, float* out_ptr0, const int64_t ks0)
{{
    for (int64_t x0 = 0; x0 < ks0; x0 += 1) {{ auto tmp0 = in_ptr0[x0]; out_ptr0[x0] = {formula}; }}
}}
"""


def compiled(*formulas: str):
    """As the module that Inductor writes compiles its kernels."""
    compiler = AsyncCompile()
    kinds = ["const float*", "float*", "const int64_t"]
    scope = {formula: compiler.cpp_pybinding(kinds, kernel(formula)) for formula in formulas}
    compiler.wait(scope)
    return scope.values()


def results(kernels) -> list[list[float]]:
    x = torch.tensor([1.0, 2.0, 3.0])
    found = [torch.empty(3) for _ in kernels]
    for run, y in zip(kernels, found, strict=True):
        run(x, y, 3)
    return [y.tolist() for y in found]


@pytest.fixture
def built(monkeypatch):
    """What is compiled of kernels: one "main", or some as a "unity"."""
    kinds = []
    build = CppBuilder.build

    def noted(builder):
        kinds.extend({"main", "unity"}.intersection(builder.get_target_file_path().split(".")))
        build(builder)

    monkeypatch.setattr(CppBuilder, "build", noted)
    with fresh_inductor_cache(), config.patch(compile_threads=1):
        yield kinds


def libraries() -> list[Path]:
    """Of kernels, or left over."""
    found = Path(os.environ["TORCHINDUCTOR_CACHE_DIR"]).glob("**/*.*.so")
    return sorted(path for path in found if path.stat().st_size)


def test_each_kernel_has_a_namespace():
    texts = {"ca": '#include <a.h>\nextern "C" void kernel();', "cb": "#include <a.h>\n// b"}
    unit = [Kernel(key, source, None, None) for key, source in texts.items()]
    assert_expected_inline(
        together(unit).split("namespace {")[0],
        """\
#define PY_SSIZE_T_CLEAN
#include <cstring>
#include <a.h>
namespace unit_0 {
#define kernel kernel_0
#define PyInit_kernel init_0
extern "C" void kernel();
#undef kernel
#undef PyInit_kernel
}
namespace unit_1 {
#define kernel kernel_1
#define PyInit_kernel init_1
// b
#undef kernel
#undef PyInit_kernel
}

""",
    )


def test_kernels_of_one_graph_are_compiled_once(built):
    with unity_build():
        found = results(compiled("tmp0 + 1", "tmp0 * 2", "-tmp0"))
    assert found == [[2.0, 3.0, 4.0], [2.0, 4.0, 6.0], [-1.0, -2.0, -3.0]]
    assert built == ["unity"]
    # One file under the names that torch has for its kernels, and none beside them.
    assert len(libraries()) == 3
    assert len({path.stat().st_ino for path in libraries()}) == 1


def test_one_that_is_there_is_not_compiled_again(built):
    with unity_build():
        compiled("tmp0 + 1", "tmp0 * 2")
        found = results(compiled("tmp0 * 2", "tmp0 * 3"))
    assert found == [[2.0, 4.0, 6.0], [3.0, 6.0, 9.0]]
    assert built == ["unity", "main"]


def test_the_next_process_finds_them_where_torch_looks(built):
    with unity_build():
        compiled("tmp0 + 1", "tmp0 * 2")
    program = f"""
import sys
sys.path.insert(0, {str(Path(__file__).parent)!r})
from torch._inductor import config
from torch._inductor.cpp_builder import CppBuilder
import test_unity_build as here
build = CppBuilder.build
CppBuilder.build = lambda one: sys.exit("again") if ".main." in one.get_target_file_path() else build(one)
config.compile_threads = 1
print(here.results(here.compiled("tmp0 * 2", "tmp0 + 1")))
"""
    ran = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert ran.stdout.strip() == "[[2.0, 4.0, 6.0], [2.0, 3.0, 4.0]]", ran.stderr


def test_as_many_units_as_threads(built, monkeypatch):
    with ThreadPoolExecutor(2) as pool, config.patch(compile_threads=2), unity_build():
        monkeypatch.setattr(AsyncCompile, "pool", lambda: pool)
        found = results(compiled("tmp0 + 1", "tmp0 * 2", "-tmp0", "tmp0 / 2", "tmp0 - 1"))
    assert found[3:] == [[0.5, 1.0, 1.5], [0.0, 1.0, 2.0]]
    assert sorted(built) == ["unity", "unity"]


def test_no_threads_are_one(built):
    """As torch reads ``TORCHINDUCTOR_COMPILE_THREADS=0``."""
    with config.patch(compile_threads=0), unity_build():
        compiled("tmp0 + 1", "tmp0 * 2")
    assert built == ["unity"]


def test_a_unit_is_of_so_many_at_most(built, monkeypatch):
    monkeypatch.setattr(unity, "MOST", 2)
    with unity_build():
        found = results(compiled("tmp0 + 1", "tmp0 * 2", "-tmp0"))
    assert found[2] == [-1.0, -2.0, -3.0]
    assert sorted(built) == ["main", "unity"]


def test_without_links_they_are_copied(built, monkeypatch):
    def no_links(*_):
        raise OSError("Operation not permitted")

    monkeypatch.setattr(unity.os, "link", no_links)
    with unity_build():
        found = results(compiled("tmp0 + 1", "tmp0 * 2"))
    assert found == [[2.0, 3.0, 4.0], [2.0, 4.0, 6.0]]
    assert built == ["unity"]
    assert len(libraries()) == 2


def test_the_error_is_of_the_kernel_that_has_one(built):
    with unity_build(), pytest.raises(CppCompileError) as caught:
        compiled("tmp0 + 1", "tmp1")
    assert "tmp1" in str(caught.value)
    assert built == ["unity", "main", "main"]
    CppPythonBindingsCodeCache.cache_clear()
    with unity_build():
        assert results(compiled("tmp0 + 1")) == [[2.0, 3.0, 4.0]]
    assert len(built) == 3  # the one without an error was compiled


def test_what_is_not_as_torch_has_it_is_left_to_torch(built, monkeypatch):
    def unknown(work):
        raise ValueError("another torch")

    monkeypatch.setattr(Kernel, "of", unknown)
    with unity_build():
        assert results(compiled("tmp0 + 1", "tmp0 * 2")) == [[2.0, 3.0, 4.0], [2.0, 4.0, 6.0]]
    assert built == ["main", "main"]
