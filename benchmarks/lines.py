"""How long is each script, and how much of it differs from the one it is read after? The table of algos/README.md.

A changed line is one that a unified diff adds or removes; the header (paper, idea, departures) is left out.
Run: python benchmarks/lines.py
"""

import ast
import difflib
import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
READING_ORDER = {  # script: the one to read first
    "mopo": None, "mobile": "mopo", "morel": "mopo", "morel_npg": "morel", "combo": "mopo", "cql": "combo",
    "osr": "cql", "osr_v": "osr", "sdc": "osr", "sac_bc": "mopo", "onestep": "sac_bc", "fqe": "onestep", "iql": "cql",
    "td3_bc": "cql", "bc": "td3_bc", "sdm_gan": "combo",
}  # fmt: skip


def source(script: str) -> str:
    return (ROOT / "algos" / f"{script}.py").read_text()


def body(script: str) -> list[str]:
    """Its lines below the header."""
    text = source(script)
    return text.splitlines()[ast.parse(text).body[0].end_lineno :]


def changed_lines(one: str, other: str) -> int:
    lines = difflib.unified_diff(body(one), body(other), "one", "other", n=0, lineterm="")
    return sum(line[0] in "+-" for line in list(lines)[2:])


def table() -> str:
    rows = ["| script | lines | read after | changed lines |", "| --- | --- | --- | --- |"]
    for script, before in READING_ORDER.items():
        step = (f"[{before}.py]({before}.py)", changed_lines(before, script)) if before else ("", "")
        rows.append(f"| [{script}.py]({script}.py) | {len(source(script).splitlines())} | {step[0]} | {step[1]} |")
    return "\n".join(rows)


def with_table(readme: str) -> str:
    pattern = r"(<!-- lines -->\n).*?(\n<!-- /lines -->)"
    return re.sub(pattern, lambda found: f"{found[1]}\n{table()}\n{found[2]}", readme, flags=re.DOTALL)


if __name__ == "__main__":
    file = ROOT / "algos" / "README.md"
    file.write_text(with_table(file.read_text()))
