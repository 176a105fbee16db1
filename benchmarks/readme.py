"""README's report and tables: run its first program, read the results, put all in place.

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
RESULTS = HERE / "results"
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
    place = re.compile(rf"(<!-- {mark}: begin -->\n).*?(<!-- {mark}: end -->)", re.DOTALL)
    return place.sub(lambda found: f"{found[1]}{content}\n{found[2]}", text)


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


def pareto(results: dict[str, Any]) -> str:
    """One line a family: its points beside fxmem's answers to them, and the lowest peaks."""
    headers = ["family", "peers' points", "time beside theirs", "FLOPs beside theirs"]
    headers += ["fxmem's lowest peak", "peers' lowest"]
    lines = []
    for family, mine, theirs in results["floors"]:
        points = [p for p in results["points"] if p["family"] == family]
        peers = {f"{p['way']} {p['setting']}": p for p in points}
        answers = [p for p in points if p["answers"] and p["beside"]]
        flops = [p["flops"] / peers[p["answers"]]["flops"] for p in answers]
        times = [p["beside"] for p in answers]
        lines.append(
            [family, len(answers), span(times), span(flops), f"{mine:.2f}", f"{theirs:.2f}"]
        )
    return tabulate(lines, headers, "github", disable_numparse=True)


def span(ratios: list[float]) -> str:
    return f"{min(ratios):.2f} to {max(ratios):.2f}" if ratios else ""


def planning(results: dict[str, Any]) -> str:
    """One line a shape and size: seconds and gaps at each budget."""
    headers = ["shape", "operators", "budget", "seconds", "added time", "gap"]
    lines = [
        [
            row["shape"],
            f"{row['nodes']:,}",
            f"{row['share']:g}",
            f"{row['seconds']:.1f}",
            f"{row['added']:+.1%}",
            f"{row['gap']:.1%}",
        ]
        for row in results["rows"]
    ]
    return tabulate(lines, headers, "github", disable_numparse=True)


def views(results: dict[str, Any]) -> str:
    """One line a tool: what its figure is, as a share of the measured peak, and what it tells apart."""
    headers = ["tool", *(f"{row['family']}" for row in results["rows"])]
    headers += ["runs the step", "smallest unit", "other sizes"]
    lines = []
    for tool, facts in results["tools"].items():
        figures = [said(row["says"][tool], row["measured"]) for row in results["rows"]]
        lines.append([tool, *figures, *facts])
    return tabulate(lines, headers, "github", disable_numparse=True)


def said(figure: int | str, measured: int) -> str:
    return f"{figure / measured:.2f}" if isinstance(figure, int) else "needs CUDA"


def float8(results: dict[str, Any]) -> str:
    """One line a family: torch's pass, a plan for its bytes, and codes alone, whose means may move."""
    headers = ["family", *(f"{way}: {what}" for way in ("torch", "fxmem") for what in _OF_EACH)]
    headers += [f"codes alone: {what}" for what in _OF_EACH]
    rows = {(row["family"], row["way"]): row for row in results["rows"]}
    lines = []
    for family in dict.fromkeys(row["family"] for row in results["rows"]):
        whole = rows[family, "eager"]["peak"]
        line = [family]
        for row in (rows[family, way] for way in ("e4m3", "fxmem", "bounded")):
            line += [f"{row['peak'] / whole:.2f}", f"{row['error']:.1%}", f"{row['time']:.2f}"]
        lines.append(line)
    return tabulate(lines, headers, "github", disable_numparse=True)


_OF_EACH = ("peak", "error", "time")

TABLES = {
    "engine": ("engine-cpu.json", table),
    "pareto": ("pareto-cpu.json", pareto),
    "planning": ("planning-cpu.json", planning),
    "views": ("views-cpu.json", views),
    "float8": ("fp8-cpu.json", float8),
}
"""Mark in README -> the results, and what is printed of them."""


def main() -> None:
    text = README.read_text()
    report = printed(BLOCK.search(text)[1])
    text = placed(text, "report", f"```text\n{report}\n```")
    for mark, (file, shown) in TABLES.items():
        text = placed(text, mark, shown(json.loads((RESULTS / file).read_text())))
    README.write_text(text)


if __name__ == "__main__":
    main()
