"""Put measured tables into the README, from committed results: `python bench/tables.py`.

`bicache demo --json > bench/results/demo.json` makes the results.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
BEGIN, END = "<!-- demo table: bench/tables.py -->\n", "<!-- end -->"


def demo_table(report: dict[str, Any]) -> str:
    """The README's table, from the output of `bicache demo --json`."""
    lines = [
        "| policy | exact match | rows computed | speed | prefix hits "
        "| answers the first question |",
        "|---|---|---|---|---|---|",
    ]
    for p in report["policies"]:
        first = p["answers_first"]
        lines.append(
            f"| `{p['policy']}` | {100 * p['exact_match']:.1f} % "
            f"| {100 * p['rows_share']:.1f} % of none | {p['speed']:.2f}x | {p['prefix_hits']} "
            f"| {'-' if first is None else f'{100 * first:.1f} %'} |"
        )
    note = (
        f"\n{report['questions']} questions about {report['documents']} documents, "
        f"{report['threads']} threads, {report['isa']} kernels; speed is the median of "
        f"{report['rounds']} interleaved rounds, relative to `none` in the same round "
        "([bench/results/demo.json](bench/results/demo.json)).\n"
    )
    return "\n".join(lines) + "\n" + note


def with_table(readme: str, table: str) -> str:
    before, rest = readme.split(BEGIN)
    _, after = rest.split(END)
    return before + BEGIN + table + END + after


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--check", action="store_true", help="only say whether it is up to date")
    args = parser.parse_args()
    path = ROOT / "README.md"
    report = json.loads((ROOT / "bench" / "results" / "demo.json").read_text())
    old = path.read_text()
    new = with_table(old, demo_table(report))
    if args.check:
        sys.exit(0 if new == old else "README.md: its table is not that of bench/results/demo.json")
    path.write_text(new)


if __name__ == "__main__":
    main()
