"""Markdown of measured figures."""

from __future__ import annotations

from typing import Any

Report = dict[str, Any]


def table(head: list[str], rows: list[list[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "".join(f"| {' | '.join(cells)} |\n" for cells in lines)


def percent(share: float | None) -> str:
    return "-" if share is None else f"{100 * share:.1f} %"


def sizes(model: Report) -> str:
    return (
        f"{model['layers']} layers, d {model['dim']}, FFN {model['ffn']}, vocabulary "
        f"{model['vocab']}, random weights"
    )


def points(loss: float) -> str:
    return f"{100 * loss:+.1f}"


def spread(values: list[float], form: str) -> str:
    low, high = form.format(min(values)), form.format(max(values))
    return low if low == high else f"{low} to {high}"
