"""Exact match of the chain model by number of denoising steps and by what is reused:

    python training/chain_steps.py chain > training/logs/chain-steps.jsonl

Answers the model's held-out questions through the package, once per document length and cell: 1,
2, 4 and 8 steps without a cache; 8 steps with the prefix refreshed less often, or reused more
deeply. One JSON object per line.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable
from typing import Any

import bicache

STEPS = (1, 2, 4, 8)
REFRESH_STEPS = (1, 2, 4, 8)
DEPTHS = (1, 2, 3, 4, 5, 6, 12)
CELLS = [
    *((steps, "none") for steps in STEPS),
    *((8, f"bicache:depth=0,refresh_steps={steps}") for steps in REFRESH_STEPS),
    *((8, f"bicache:depth={depth},refresh_steps=1") for depth in DEPTHS),
]


def exact_match(llm: bicache.LLM, lines: list[dict[str, Any]], steps: int, cache: str) -> float:
    """Share of `lines` (of questions.jsonl) that are answered right in every word."""
    outputs = llm.generate(
        [line["prompt"] for line in lines],
        prefix=[line["prefix"] for line in lines],
        steps=steps,
        cache=cache,
    )
    return sum(o.text == x["answer"] for o, x in zip(outputs, lines, strict=True)) / len(lines)


def measure(llm: bicache.LLM, lines: list[dict[str, Any]]) -> Iterable[dict[str, Any]]:
    for length in sorted({line["records"] for line in lines}):
        some = [line for line in lines if line["records"] == length]
        for steps, cache in CELLS:
            row = {"records": length, "steps": steps, "cache": cache, "questions": len(some)}
            yield row | {"exact_match": round(exact_match(llm, some, steps, cache), 4)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("model", help="checkpoint folder, or the name of a shipped model")
    args = parser.parse_args()
    llm = bicache.LLM(args.model)
    text = (llm.path / "questions.jsonl").read_text()
    for row in measure(llm, [json.loads(line) for line in text.splitlines()]):
        print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main()
