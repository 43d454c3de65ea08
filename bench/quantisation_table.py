"""Markdown table of bench/quantisation.py's report."""

from __future__ import annotations

from markdown_table import Report, percent, points, table


def quantisation(report: Report) -> str:
    head = ["model", "type", "weights", "KL to f32", "most likely token", "tokens"]
    policies = list(report["models"][0]["dtypes"][0]["policies"])
    head += [f"lost points, {policy}" for policy in policies]
    rows = []
    for model in report["models"]:
        for row in model["dtypes"][1:]:
            cells = row["policies"]
            name = f"`{model['model']}`" if "loss" in cells["none"] else model["model"]
            lost = [cells.get(policy, {}) for policy in policies]
            rows.append(
                [
                    f"{name}, outliers" if model["outliers"] else name,
                    row["dtype"],
                    f"{row['weight_bytes'] / 1e6:.2f} MB",
                    f"{row['kl']:.1e}",
                    percent(row["top1_agreement"]),
                    percent(cells["none"]["token_agreement"]),
                    *(
                        f"{points(x['loss'])} ± {100 * x['loss_interval']:.1f}"
                        if "loss" in x
                        else "-"
                        for x in lost
                    ),
                ]
            )
    return table(head, rows) + (
        f"\nAgainst f32 on the same inputs, and under the same cache; {report['questions']} "
        "questions about documents of each of two lengths. KL divergence and agreement of the most "
        "likely token: masked positions of canvases with part of the answer; tokens: of whole "
        "answers without a cache; lost: points of exact match at the worse length, ± 95 % "
        "interval, paired; dllm_cache: response every 4th step, transfer_ratio 0.25. Outliers: "
        "some channels 16 to 128 times as large, the same function. Random weights decide near "
        f"ties, and one other token changes the rest. {report['isa']} kernels.\n"
    )
