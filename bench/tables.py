"""Put measured tables into the documents, from committed results: `python bench/tables.py`.

A table stands between `<!-- NAME: bench/tables.py -->` and `<!-- end -->`; its figures come from
bench/results, from a file that the command named in docs/measurements.md makes (see TABLES).
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


def depths_by_length(model: Report, cells: Callable[[Report], list[Report]]) -> str:
    """Exact match by depth and document length."""
    lengths = model["lengths"]
    shown = min(model["layers"], 3 + max(row["oracle"] for row in lengths))
    head = ["share of prefix rows", "`none`", *(f"depth {b}" for b in range(shown))]
    head.append(f"depth {model['layers']}")
    rows = [
        [
            f"{row['prefix_share']:.2f}",
            percent(row["exact_match_none"]),
            *(percent(cells(row)[b]["exact_match"]) for b in [*range(shown), -1]),
        ]
        for row in lengths
    ]
    return table(head, rows)


def bicache_depth(report: Report) -> str:
    text = ""
    for model in report["models"]:
        text += (
            f"\n**`{model['model']}`** ({model['layers']} layers, "
            f"`refresh_steps={model['refresh_steps']}`). Exact match by depth:\n\n"
            + depths_by_length(model, lambda row: row["alone"])
            + "\nThe same with the prefix as the first request left it (`source=first_request`):"
            "\n\n" + depths_by_length(model, lambda row: row["first_request"])
        )
    return text + (
        f"\n{report['questions']} paired questions a cell, {report['isa']} kernels; at depth L the "
        "prefix is never recomputed.\n"
    )


def bicache_policies(report: Report) -> str:
    head = ["model", "policy", "mean depth", "exact match", "loss", "agreement", "FLOPs of none"]
    rows = []
    for model in report["models"]:
        lengths = model["lengths"]
        for what in model["policies"]:
            cells = [row["policies"][what] for row in lengths]
            losses = [
                row["exact_match_none"] - cell["exact_match"]
                for row, cell in zip(lengths, cells, strict=True)
            ]
            rows.append(
                [
                    f"`{model['model']}`",
                    what,
                    spread([cell["mean_depth"] for cell in cells], "{:.1f}"),
                    spread([100 * cell["exact_match"] for cell in cells], "{:.1f}") + " %",
                    f"{100 * max(losses):.1f}",
                    spread([100 * cell["agreement"] for cell in cells], "{:.1f}") + " %",
                    spread([100 * cell["flops_share"] for cell in cells], "{:.0f}") + " %",
                ]
            )
    return (
        table(head, rows)
        + "\nRanges go over the four document lengths; loss: the worst of them, in "
        f"points. {report['questions']} paired questions a length; the prefix entries' FLOPs are "
        "included.\n"
    )


def spread(values: list[float], form: str) -> str:
    low, high = form.format(min(values)), form.format(max(values))
    return low if low == high else f"{low} to {high}"


def bicache_depth_summary(report: Report) -> str:
    head = ["model", "layers", "depth by", "depths", "worst exact match", "`none`"]
    kinds = [what for what in report["models"][0]["policies"] if what.startswith("table")]
    rows = []
    for model in report["models"]:
        for what in ("agreement", *kinds):
            cells = [row["policies"][what] for row in model["lengths"]]
            worst = min(range(len(cells)), key=lambda i: cells[i]["exact_match"])
            rows.append(
                [
                    f"`{model['model']}`",
                    str(model["layers"]),
                    what,
                    spread([cell["mean_depth"] for cell in cells], "{:.0f}"),
                    percent(cells[worst]["exact_match"]),
                    percent(model["lengths"][worst]["exact_match_none"]),
                ]
            )
    return (
        table(head, rows)
        + f"\n{report['questions']} questions for each of four document lengths.\n"
    )


def depth_hook(report: Report) -> str:
    head = ["requests in a batch", "one call", "share of a step of this small model"]
    rows = [
        [
            str(row["requests_in_a_batch"]),
            f"{row['microseconds_per_call']:.1f} µs",
            percent(row["share_of_a_step"]),
        ]
        for row in report["batches"]
    ]
    return table(head, rows) + "\nMedian difference of alternating pairs, one thread.\n"


def bicache_speed(report: Report) -> str:
    head = ["r", "reuse", "depth", "tokens/s", "speed", "allowed", "of allowed"]
    head += ["over within a request", "allowed", "of allowed"]

    def cells(over: dict[str, float]) -> list[str]:
        times = [f"{over[what]:.2f}x" for what in ("speed", "allowed")]
        return [*times, percent(over["efficiency"])]

    rows = [
        [
            str(result["r"]),
            p["reuse"],
            "-" if p["depth"] is None else str(p["depth"]),
            f"{p['tokens_per_second']:.2f}",
            *cells(p["over_none"]),
            *(cells(p["over_within"]) if p["reuse"] == "both" else ["-"] * 3),
        ]
        for result in report["results"]
        for p in result["policies"]
    ]
    model = report["model"]
    return table(head, rows) + (
        f"\n{model['layers']} layers, d {model['dim']}, FFN {model['ffn']}, vocabulary "
        f"{model['vocab']}, random weights in {report['dtype']}; N = {report['rows']}, "
        f"{report['results'][0]['g']} tokens in {report['steps']} steps; {report['threads']} "
        f"threads, {report['isa']} kernels; median of {report['rounds']} interleaved rounds.\n"
    )


# Name of a table -> file in bench/results, and what it shows of it.
TABLES: dict[str, tuple[str, Callable[[Report], str]]] = {
    "demo": ("demo", demo),
    "prefix_reuse": ("prefix_reuse", prefix_reuse),
    "waiting": ("waiting", waiting),
    "bicache_depth": ("bicache_depth", bicache_depth),
    "bicache_policies": ("bicache_depth", bicache_policies),
    "bicache_depth_summary": ("bicache_depth", bicache_depth_summary),
    "depth_hook": ("depth_hook", depth_hook),
    "bicache_speed": ("bicache_speed", bicache_speed),
}
DOCUMENTS = ("README.md", "docs/measurements.md")


def updated(text: str) -> str:
    def render(match: re.Match[str]) -> str:
        file, render_table = TABLES[match[2]]
        report = json.loads((ROOT / "bench" / "results" / f"{file}.json").read_text())
        return f"{match[1]}\n{render_table(report)}<!-- end -->"

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
