"""README's report and table: run its first program, read the engine's results, put both in place.

python benchmarks/readme.py
"""

import contextlib
import io
import json
import re
from pathlib import Path
from typing import Any

from tabulate import tabulate

HERE = Path(__file__).resolve().parent
README = HERE.parent / "README.md"
RESULTS = HERE / "results" / "engine-cpu.json"
BLOCK = re.compile(r"^```python\n(.*?)^```", re.MULTILINE | re.DOTALL)
BUDGETS = ("1TiB", "0.6x", "0.4x")


def printed(program: str) -> str:
    """What the program prints."""
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        exec(compile(program, "README.md", "exec"), {"__name__": "readme"})
    return out.getvalue().rstrip()


def placed(text: str, mark: str, content: str) -> str:
    """The text with the content between the comments that begin and end ``mark``."""
    place = re.compile(rf"(<!-- {mark}: begin -->\n).*?(\n<!-- {mark}: end -->)", re.DOTALL)
    return place.sub(lambda found: found[1] + content + found[2], text)


def table(results: dict[str, Any]) -> str:
    """One line a family: the measured step's time at some budgets, and how low the peak goes."""
    headers = ["family", "nothing asked", "0.6x", "0.4x", "smallest peak", "torch's ratio"]
    lines = [line(results, knob) for knob in results["knob"]]
    return tabulate(lines, headers, "github", disable_numparse=True)


def line(results: dict[str, Any], knob: dict[str, Any]) -> list[str]:
    rows = {row["budget"]: row for row in results["rows"] if row["family"] == knob["family"]}
    times = [time(rows.get(budget)) for budget in BUDGETS]
    peaks = [knob["smallest_peak"], knob["lowest"]]
    return [knob["family"], *times, *(f"{peak / knob['eager_peak']:.2f}x" for peak in peaks)]


def time(row: dict[str, Any] | None) -> str:
    if row is None or row["refused_above"] or row["time_ratio"] is None:
        return "refused"
    return f"{row['time_ratio'] - 1:+.0%}"


def main() -> None:
    text = README.read_text()
    report = printed(BLOCK.search(text)[1])
    text = placed(text, "report", f"```text\n{report}\n```")
    README.write_text(placed(text, "engine", table(json.loads(RESULTS.read_text()))))


if __name__ == "__main__":
    main()
