"""Put measured tables into the documents, from committed results: `python bench/tables.py`.

A table stands between `<!-- NAME: bench/tables.py -->` and `<!-- end -->`; its figures come from
bench/results/NAME.json, which the command named in docs/measurements.md makes.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
Report = dict[str, Any]


def table(head: list[str], rows: list[list[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "".join(f"| {' | '.join(cells)} |\n" for cells in lines)


def percent(share: float | None) -> str:
    return "-" if share is None else f"{100 * share:.1f} %"


def machine(report: Report) -> str:
    return (
        f"\n{report['questions']} questions about {report['documents']} documents, "
        f"{report['threads']} threads, {report['isa']} kernels; speed: median of "
        f"{report['rounds']} interleaved rounds, relative to `none` in the same round.\n"
    )


def demo(report: Report) -> str:
    head = ["policy", "exact match", "rows computed", "speed", "prefix hits"]
    head.append("answers the first question")
    rows = [
        [
            f"`{p['policy']}`",
            percent(p["exact_match"]),
            f"{percent(p['rows_share'])} of none",
            f"{p['speed']:.2f}x",
            str(p["prefix_hits"]),
            percent(p["answers_first"]),
        ]
        for p in report["policies"]
    ]
    return table(head, rows) + machine(report)


def prefix_reuse(report: Report) -> str:
    head = ["reuse", "policy", "exact match", "rows computed", "speed"]
    rows = [
        [
            p["reuse"],
            f"`{p['policy']}`",
            percent(p["exact_match"]),
            f"{percent(p['rows_share'])} of none",
            f"{p['speed']:.2f}x",
        ]
        for p in report["policies"]
    ]
    return table(head, rows) + machine(report)


def waiting(report: Report) -> str:
    policies = ["long spins", "short spins", "no spins"]
    head = ["machine", "work", *policies]
    rows = [
        [state, row["work"], *(f"{row[p]['speed_of_one_thread']:.2f}x" for p in policies)]
        for state in ("idle", "busy")
        for row in report[state]
    ]
    return (
        table(head, rows)
        + f"\n{report['threads']} threads on {report['threads']} CPUs against one thread in the "
        + f"same state, median of {report['rounds']} interleaved rounds.\n"
    )


TABLES: dict[str, Callable[[Report], str]] = {
    "demo": demo,
    "prefix_reuse": prefix_reuse,
    "waiting": waiting,
}
DOCUMENTS = ("README.md", "docs/measurements.md")


def updated(text: str) -> str:
    def render(match: re.Match[str]) -> str:
        report = json.loads((ROOT / "bench" / "results" / f"{match[2]}.json").read_text())
        return f"{match[1]}\n{TABLES[match[2]](report)}<!-- end -->"

    marked = r"(<!-- (\w+): bench/tables\.py -->)\n.*?<!-- end -->"
    return re.sub(marked, render, text, flags=re.DOTALL)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--check", action="store_true", help="only say whether all are up to date")
    args = parser.parse_args()
    stale = []
    for name in DOCUMENTS:
        old = (ROOT / name).read_text()
        new = updated(old)
        if new != old:
            stale.append(name)
            if not args.check:
                (ROOT / name).write_text(new)
    if args.check and stale:
        sys.exit(f"{', '.join(stale)}: tables differ from bench/results; run bench/tables.py")


if __name__ == "__main__":
    main()
