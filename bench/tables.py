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

from kernels_table import kernels_attention, kernels_blas, kernels_elementwise, kernels_gemm
from markdown_table import Report, percent, points, sizes, spread, table
from peers_table import peers_forward, peers_generation, peers_ratios, peers_summary
from quantisation_table import quantisation

ROOT = Path(__file__).resolve().parent.parent


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
    return table(head, rows) + (
        f"\n{sizes(report['model'])} in {report['dtype']}; N = {report['rows']}, "
        f"{report['results'][0]['g']} tokens in {report['steps']} steps; {report['threads']} "
        f"threads, {report['isa']} kernels; median of {report['rounds']} interleaved rounds.\n"
    )


def caching_flops(report: Report) -> str:
    head = ["workload", "P", "G", "policy", "FLOPs a token", "less than `none`", "than the loop"]
    rows = [
        [
            load["name"],
            str(load["prompt"]),
            str(load["response"]),
            p["reuse"],
            f"{p['flops'] / load['response'] / 1e12:.2f} T",
            f"{p['over_none']:.2f}x",
            f"{p['over_loop']:.2f}x",
        ]
        for load in report["workloads"]
        for p in load["policies"]
    ]
    return table(head, rows) + (
        f"\nLLaDA-8B's sizes; `bicache` at depth {report['depth']} of 32, refreshed as often as "
        "dllm_cache's prompt, with three quarters of the prompt shared and its entry in the "
        "store.\n"
    )


def caching_flops_summary(report: Report) -> str:
    head = ["workload", "P", "G", "less than the published loop", "less than `none`"]
    rows = [
        [
            load["name"],
            str(load["prompt"]),
            str(load["response"]),
            f"{p['over_loop']:.1f}x",
            f"{p['over_none']:.1f}x",
        ]
        for load in report["workloads"]
        for p in load["policies"]
        if p["reuse"] == "dllm_cache"
    ]
    return table(head, rows) + (
        "\nP prompt and G response tokens, one token a step. The published loop runs the output "
        "head over every row, `none` where logits are read.\n"
    )


def dllm_cache_speed(report: Report) -> str:
    r = report["result"]
    head = ["steps that refresh", "steps", "share of the time", "FLOPs a second, of `none`'s"]
    rows = [
        [k["refreshes"], str(k["steps"]), percent(k["share_of_time"]), percent(k["rate_over_none"])]
        for k in r["kinds"]
    ]
    return (
        f"Speed {r['speed']:.2f}x `none`'s, of {r['allowed']:.2f}x allowed: "
        f"{percent(r['efficiency'])}.\n\n"
        + table(head, rows)
        + f"\nP = {report['prompt']}, G = {report['response']}, `{report['cache']}`; "
        f"{sizes(report['model'])} in {report['dtype']}; {report['threads']} threads, "
        f"{report['isa']} kernels; median of {report['rounds']} interleaved rounds.\n"
    )


def caching_accuracy(report: Report) -> str:
    text = ""
    for model in report["models"]:
        lengths = model["lengths"]
        head = ["setting"]
        for length in lengths:
            head += [f"EM, {length['records']} records", "lost points", "FLOPs", "steps"]
        rows = []
        for setting in lengths[0]["settings"]:
            row = [f"`{setting}`"]
            for length in lengths:
                cell = length["settings"][setting]
                row += [
                    percent(cell["exact_match"]),
                    f"{points(cell['loss'])} ± {100 * cell['loss_interval']:.1f}",
                    percent(cell["flops_share"]),
                    f"{cell['steps']:.1f}",
                ]
            rows.append(row)
        text += f"\n**`{model['model']}`** (`auto` is `{model['auto']}`)\n\n" + table(head, rows)
    return text + (
        f"\n{report['questions']} paired questions a cell, {report['isa']} kernels; EM: exact "
        "match; lost: against `none` at one token a step, ± 95 % interval; FLOPs: of `none`'s, "
        "prefix entries included.\n"
    )


def caching_accuracy_summary(report: Report) -> str:
    models = [model["model"] for model in report["models"]]
    head = ["setting", "FLOPs of `none`", *(f"`{name}`" for name in models), "safe"]
    rows = [
        [
            f"`{row['setting']}`",
            spread([100 * share for share in row["flops_share"]], "{:.0f}") + " %",
            *(points(row["worst_loss"][name]) for name in models),
            "yes" if row["safe"] else "no",
        ]
        for row in report["summary"]
    ]
    return table(head, rows) + (
        f"\nWorst loss over the document lengths, in points of exact match ({report['questions']} "
        f"paired questions each); safe: at most {100 * report['max_loss']:.1f} on every model.\n"
    )


def caching_recommended(report: Report) -> str:
    """Of each group the cheapest safe settings, then settings that lose."""
    models = [model["model"] for model in report["models"]]
    rows = report["summary"]
    cheap = sorted(rows, key=lambda row: sum(row["flops_share"]))
    groups = list(dict.fromkeys(row["group"] for row in rows))

    def cheapest(group: str, safe: bool, count: int) -> list[Report]:
        return [r for r in cheap if r["group"] == group and r["safe"] == safe][:count]

    safe = [row for group in groups for row in cheapest(group, True, 2)]
    losing = [row for group in groups for row in cheapest(group, False, 1)]
    head = ["setting", "FLOPs of `none`", *(f"`{name}`" for name in models)]
    lines = [
        [
            f"`{row['setting']}`" if row["safe"] else f"not safe: `{row['setting']}`",
            spread([100 * share for share in row["flops_share"]], "{:.0f}") + " %",
            *(points(row["worst_loss"][name]) for name in models),
        ]
        for row in [*safe, *losing]
    ]
    return table(head, lines) + (
        "\nPoints of exact match lost against `none` at one token a step, the worst of two "
        f"document lengths ({report['questions']} paired questions each). Responses have "
        "8 tokens, so an interval of 8 steps is once a request; `auto` is the model's calibrated "
        "BiCache.\n"
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
    "caching_flops": ("caching_flops", caching_flops),
    "caching_flops_summary": ("caching_flops", caching_flops_summary),
    "caching_recommended": ("caching_accuracy", caching_recommended),
    "dllm_cache_speed": ("dllm_cache_speed", dllm_cache_speed),
    "quantisation": ("quantisation", quantisation),
    "caching_accuracy": ("caching_accuracy", caching_accuracy),
    "caching_accuracy_summary": ("caching_accuracy", caching_accuracy_summary),
    "kernels_gemm": ("kernels", kernels_gemm),
    "kernels_attention": ("kernels", kernels_attention),
    "kernels_elementwise": ("kernels", kernels_elementwise),
    "kernels_blas": ("kernels", kernels_blas),
    "peers_forward": ("peers", peers_forward),
    "peers_ratios": ("peers", peers_ratios),
    "peers_generation": ("peers", peers_generation),
    "peers_summary": ("peers", peers_summary),
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
