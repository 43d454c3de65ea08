"""Markdown tables of bench/kernels.py's report."""

from __future__ import annotations

import statistics

from markdown_table import Report, spread, table

# Weight types, as bench/kernels.cc names them.
TYPES = ("f32", "bf16", "int8", "int4")


def kernel_roof(group: Report, rows: int) -> float:
    """The least of peak and what reading the weights once allows, in 1e9 operations a second."""
    work = 2 * rows * group["inputs"] * group["outputs"]
    return min(group["peak"], work / group["weight_bytes"] * group["read_gb_s"])


def kernel_shares(group: Report, few: int, many: int, of: str) -> list[float]:
    """Percent of `of` (peak, best_peak, read or roof) at from `few` to `many` rows; cold weights,
    where they could be made cold."""
    shares = []
    for rows, rate in zip(group["rows"], group["cold"] or group["warm"], strict=True):
        if not few <= rows <= many:
            continue
        if of == "read":
            read = rate / (2 * rows * group["inputs"] * group["outputs"]) * group["weight_bytes"]
            shares.append(100 * read / group["read_gb_s"])
        else:
            limit = kernel_roof(group, rows) if of == "roof" else group[of]
            shares.append(100 * rate / limit)
    return shares


def kernel_cell(groups: list[Report], few: int, many: int, of: str) -> str:
    """The range over layers and rows."""
    shares = [share for g in groups for share in kernel_shares(g, few, many, of)]
    return spread(shares, "{:.0f}") + " %" if shares else "-"


def kernels_note(report: Report) -> str:
    return (
        f"\n{report['machine']}, {report['threads']} threads; median of {report['rounds']} rounds, "
        "limits measured in the same rounds.\n"
    )


def kernels_gemm(report: Report) -> str:
    head = ["weights", "kernels", "instruction", "its peak, GOP/s", "256 rows and more: of peak"]
    head += [
        "of the best instruction",
        "32 and 64 rows: of the roof",
        "8 rows: of reading",
        "1 row",
    ]
    rows = []
    tables = dict.fromkeys((g["type"], g["isa"]) for g in report["gemm"])
    for type_, isa in tables:
        groups = [g for g in report["gemm"] if (g["type"], g["isa"]) == (type_, isa)]
        rows.append(
            [
                type_,
                isa,
                f"`{groups[0]['peak_of']}`",
                f"{max(g['peak'] for g in groups):.0f}",
                kernel_cell(groups, 256, 1 << 20, "peak"),
                kernel_cell(groups, 256, 1 << 20, "best_peak"),
                kernel_cell(groups, 32, 64, "roof"),
                kernel_cell(groups, 8, 8, "read"),
                kernel_cell(groups, 1, 1, "read"),
            ]
        )
    return (
        table(head, rows)
        + "\nRanges go over the layers; weights come from memory. Roof: the least of peak and what "
        "reading the weights once allows; reading: memory, in order.\n" + kernels_note(report)
    )


def kernels_attention(report: Report) -> str:
    isas = list(dict.fromkeys(a["isa"] for a in report["attention"]))
    head = ["K and V", "heads", "rows x keys", *(f"{isa}: GOP/s (of peak)" for isa in isas)]
    found: dict[tuple[str, str, str], dict[str, str]] = {}
    for a in report["attention"]:
        heads = f"{a['model']}: {a['heads']} / {a['kv_heads']} x {a['head_dim']}"
        cells = found.setdefault((a["type"], heads, f"{a['rows']} x {a['keys']}"), {})
        cells[a["isa"]] = f"{a['gops']:.0f} ({100 * a['gops'] / a['peak']:.0f} %)"
    rows = [[*case, *(cells.get(isa, "-") for isa in isas)] for case, cells in found.items()]
    return table(head, rows) + kernels_note(report)


def kernels_elementwise(report: Report) -> str:
    isas = list(dict.fromkeys(e["isa"] for e in report["elementwise"]))
    head = ["function"]
    for isa in isas:
        head += [f"{isa}, in L2", "from memory"]
    found: dict[str, list[str]] = {}
    for e in report["elementwise"]:
        cells = found.setdefault(e["name"], [f"`{e['name']}`"])
        cells += [f"{e['l2']:.0f}", f"{e['memory']:.1f}"]
    copy, read = (
        statistics.median(e[limit] for e in report["elementwise"])
        for limit in ("l2_copy_gb_s", "read_gb_s")
    )
    return table(head, list(found.values())) + (
        f"\nGB/s, bytes read and written; a copy in L2 moves {copy:.0f}, reading from memory "
        f"{read:.1f}.\n" + kernels_note(report)
    )


def kernels_blas(report: Report) -> str:
    """OpenBLAS beside our fastest f32 table on the same layers: percent of the f32 peak, the most
    that was seen (threads of OpenBLAS, waiting, take part of a core from the loop now and then)."""
    isa = [g["isa"] for g in report["gemm"] if g["type"] == "f32"][-1]
    settings = report["blas"]
    layers = [(g["inputs"], g["outputs"]) for s in settings.values() for g in s["gemm"]]
    ours = [
        g
        for g in report["gemm"]
        if (g["type"], g["isa"]) == ("f32", isa) and (g["inputs"], g["outputs"]) in layers
    ]
    columns = [ours, *(s["gemm"] for s in settings.values())]
    peak = max(g["best_peak"] for groups in columns for g in groups)
    names = {"default": "OpenBLAS", "Haswell": "with `OPENBLAS_CORETYPE=Haswell`"}
    head = ["rows", f"ours, {isa}", *(names[s] for s in settings)]
    rows = [
        [
            str(m),
            *(
                kernel_cell([{**g, "best_peak": peak} for g in groups], m, m, "best_peak")
                for groups in columns
            ),
        ]
        for m in ours[0]["rows"]
    ]
    return (
        table(head, rows)
        + "\nOf the f32 peak; ranges go over the layers; weights come from memory.\n"
        + kernels_note(report)
    )
