"""The README's Python is one program; it runs as it stands, from top to bottom."""

import os
import re
import subprocess
import sys
from pathlib import Path

README = Path(__file__).parent.parent / "README.md"


def python_blocks():
    return re.findall(r"^```python\n(.*?)^```", README.read_text(), re.MULTILINE | re.DOTALL)


# A checkout that is not installed has no entry point.
REGISTERED = """\
import torch
import fxmem.backend
if "fxmem" not in torch._dynamo.list_backends(()):
    torch._dynamo.register_backend(fxmem.backend.fxmem, name="fxmem")
"""


def run(program, folder):
    file = folder / "readme.py"
    file.write_text(REGISTERED + program)
    return subprocess.run(
        [sys.executable, file.name],
        cwd=folder,
        env={**_environment(), "FXMEM_CACHE_DIR": str(folder / "cache")},
        capture_output=True,
        text=True,
        timeout=240,
    )


def _environment():
    paths = [str(README.parent), os.environ.get("PYTHONPATH", "")]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths))}


def test_every_python_block_runs(tmp_path):
    blocks = python_blocks()
    assert len(blocks) >= 3
    done = run("\n".join(blocks), tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("fxmem  ")
    assert (tmp_path / "encoder.json").is_file()


def test_the_first_program_is_short():
    lines = [line for line in python_blocks()[0].splitlines() if line.strip()]
    assert len(lines) <= 8
