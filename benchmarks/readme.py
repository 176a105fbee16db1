"""README's report: run its first program and put what it prints where the report stands.

python benchmarks/readme.py
"""

import contextlib
import io
import re
from pathlib import Path

README = Path(__file__).resolve().parent.parent / "README.md"
BLOCK = re.compile(r"^```python\n(.*?)^```", re.MULTILINE | re.DOTALL)
REPORT = re.compile(
    r"(<!-- report: begin -->\n```text\n).*?(\n```\n<!-- report: end -->)", re.DOTALL
)


def printed(program: str) -> str:
    """What the program prints."""
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        exec(compile(program, "README.md", "exec"), {"__name__": "readme"})
    return out.getvalue().rstrip()


def main() -> None:
    text = README.read_text()
    report = printed(BLOCK.search(text)[1])
    README.write_text(REPORT.sub(lambda found: found[1] + report + found[2], text))
    print(report)


if __name__ == "__main__":
    main()
