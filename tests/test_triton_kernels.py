"""Triton's kernels against the operators' torch code, bit for bit, under Triton's interpreter.

The interpreter is chosen when kernels are defined, so the comparison has a process of its own.
"""

import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

HERE = Path(__file__).resolve().parent

pytestmark = pytest.mark.skipif(find_spec("triton") is None, reason="Triton is not installed")


def test_kernels_give_the_same_bits():
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    run = subprocess.run(
        [sys.executable, HERE / "triton_bits.py"], env=environment, capture_output=True, text=True
    )
    assert run.returncode == 0, run.stdout + run.stderr
    assert run.stdout.splitlines()[-1].startswith("the same: ")


def test_kernels_compile_for_a_gpu_without_fused_roundings():
    """To PTX, for which no GPU is needed."""
    run = subprocess.run(
        [sys.executable, HERE / "triton_bits.py", "--compile"], capture_output=True, text=True
    )
    assert run.returncode == 0, run.stdout + run.stderr
    lines = run.stdout.splitlines()
    assert len(lines) == 8
    assert all(line.endswith(" 0 fused") for line in lines), run.stdout
