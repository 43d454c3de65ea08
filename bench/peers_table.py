"""Markdown tables and the picture of bench/peers.py's report.

python bench/peers_table.py bench/results/peers.json [PICTURE.png|.svg]
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from markdown_table import Report, sizes, table


def name(row: Report) -> str:
    engine = {"llama": "llama.cpp", "torch": "PyTorch"}.get(row["engine"], row["engine"])
    return f"{engine} {row['type']}"


def label_name(label: str) -> str:
    engine, kind = label.split(" ", 1)
    return name({"engine": engine, "type": kind})


def peers_machine(report: Report) -> str:
    isa = next((e["isa"] for e in report["engines"].values() if "isa" in e), "no")
    return (
        f"\n{sizes(report['model'])}; {report['threads']} threads, {isa} kernels, "
        f"{report['cpu']}; median of {report['rounds']} interleaved rounds.\n"
    )


def peers_forward(report: Report) -> str:
    """Milliseconds of a pass with logits of all rows, one column per length."""
    lengths = report["forward"]
    head = ["engine", *(f"{length['rows']} rows" for length in lengths)]
    rows = [
        [
            name(row),
            *(f"{1e3 * length['engines'][i]['time']['median']:.1f}" for length in lengths),
        ]
        for i, row in enumerate(lengths[0]["engines"])
    ]
    return table(head, rows) + "\nMilliseconds.\n" + peers_machine(report)


def peers_ratios(report: Report) -> str:
    """How many times faster ours are than each peer, one column per length."""
    lengths = report["forward"]
    head = ["ours", "over", *(f"{length['rows']} rows" for length in lengths)]
    rows = []
    for i, row in enumerate(lengths[0]["engines"]):
        if row["engine"] != "bicache":
            continue
        over = [length["engines"][i]["speed_over"] for length in lengths]
        rows += [
            [row["type"], label_name(peer), *(f"{o[peer]:.2f}x" for o in over)] for peer in over[0]
        ]
        if over[0]:
            best = [
                f"{o[length['best_peer']]:.2f}x" for o, length in zip(over, lengths, strict=True)
            ]
            rows.append([row["type"], "**the best of all**", *best])
    return table(head, rows) + peers_machine(report)


def peers_summary(report: Report) -> str:
    """A pass and a whole request of ours, over the fastest of all peers and types."""
    head = ["", "bf16", "int8", "int4"]
    types = head[1:]
    rows = []
    for length in report["forward"]:
        ours = {row["type"]: row for row in length["engines"] if row["engine"] == "bicache"}
        best = [ours[t]["speed_over"][length["best_peer"]] for t in types]
        rows.append(
            [
                f"a pass of {length['rows']} rows, over {label_name(length['best_peer'])}",
                *(f"{x:.2f}x" for x in best),
            ]
        )
    request = report["generation"]
    plain = [r for r in request["rows"] if r["engine"] == "bicache" and r["threshold"] is None]
    for cache in dict.fromkeys(r["cache"] for r in plain):
        found = {r["type"]: r for r in plain if r["cache"] == cache}
        peer = label_name(request["fastest_llama"])
        rows.append(
            [
                f"a request under `{cache.split(':')[0]}`, over {peer}",
                *(f"{found[t]['over_llama']:.1f}x" for t in types),
            ]
        )
    return table(head, rows) + (
        "\nOver the fastest peer and type at that number of rows; a request has "
        f"{request['prompt']} + {request['gen_length']} tokens, as many steps as response tokens, "
        "and is compared with llama.cpp's fastest type.\n" + peers_machine(report)
    )


def peers_generation(report: Report) -> str:
    request = report["generation"]
    head = ["engine", "cache", "steps", "tokens/s", "over llama.cpp's fastest", "over the fastest"]
    head += ["rows computed", "TFLOPs", "agreement"]
    rows = []
    for row in request["rows"]:
        cache = "-" if row["cache"] is None else f"`{row['cache'].split(':')[0]}`"
        if row["threshold"] is not None:
            cache += f", threshold {row['threshold']:.3f}"
        rows.append(
            [
                name(row),
                cache,
                str(row["steps"]),
                f"{row['tokens_per_second']:.2f}",
                *(f"{row[key]:.2f}x" if key in row else "-" for key in ("over_llama", "over_peer")),
                f"{100 * row['rows_share']:.1f} %",
                f"{row['flops'] / 1e12:.1f}",
                "-" if row["agreement"] is None else f"{100 * row['agreement']:.1f} %",
            ]
        )
    return table(head, rows) + (
        f"\nP = {request['prompt']}, G = {request['gen_length']}, blocks of "
        f"{request['block_length']}. Peers: one pass over all rows, times the steps, nothing for "
        "choosing tokens. Agreement: with `none` of the same type; the weights are random, so that "
        "thresholds stand for speed only.\n" + peers_machine(report)
    )


def draw(report: Report, path: Path) -> None:
    """Seconds of a pass by rows, and tokens per second of the request.

    Raises:
        ImportError: matplotlib is missing.
        ValueError: An ending that matplotlib cannot draw.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 5), layout="constrained", dpi=120)
    left, right = figure.subplots(1, 2)
    lengths = report["forward"]
    counts = [length["rows"] for length in lengths]
    for i, row in enumerate(lengths[0]["engines"]):
        left.plot(
            counts,
            [1e3 * length["engines"][i]["time"]["median"] for length in lengths],
            linestyle="-" if row["engine"] == "bicache" else "--",
            marker={"bicache": "o", "llama": "s", "torch": "^"}[row["engine"]],
            label=name(row),
        )
    left.set(xscale="log", yscale="log", xlabel="rows", ylabel="milliseconds of a pass")
    left.set_xticks(counts, [str(n) for n in counts])
    left.minorticks_off()
    left.legend(fontsize=8)
    if report["generation"]:
        draw_generation(report["generation"]["rows"], right)
    figure.savefig(path)


def draw_generation(rows: list[Report], axes: Any) -> None:
    labels = []
    for row in rows:
        cache = "" if row["cache"] is None else f", {row['cache'].split(':')[0]}"
        labels.append(name(row) + cache + (", threshold" if row["threshold"] else ""))
    colours = ["C0" if row["engine"] == "bicache" else "C7" for row in rows]
    places = range(len(rows))
    axes.barh(places, [row["tokens_per_second"] for row in rows], color=colours)
    axes.set(yticks=places, yticklabels=labels, xlabel="tokens per second")
    axes.invert_yaxis()


def main() -> None:
    report = json.loads(Path(sys.argv[1]).read_text())
    if len(sys.argv) > 2:
        draw(report, Path(sys.argv[2]))
    print(peers_forward(report), peers_ratios(report), sep="\n")
    if report["generation"]:
        print(peers_generation(report))


if __name__ == "__main__":
    main()
