"""Measure how deep the shipped model's prefix may be reused, and store it beside the checkpoint.

    python training/calibrate.py python/bicache/models/records

Asks calibration questions (documents of a seed of their own, neither trained on nor among
questions.jsonl) without a cache and with bicache at every depth, for several shares of prefix rows.
The safe depth is the deepest one such that at it, at every smaller depth and at every share, at
least 99 % of the answers are those given without a cache. Agreement of outputs is measured, not
similarity of K/V, which predicts accuracy poorly on this model. Writes bicache.json.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import bicache
from export import questions

SEED = 30_000
LENGTHS = (6, 12, 24, 40)  # records of the documents: the share of prefix rows grows with them
MIN_AGREEMENT = 0.99
REFRESH_STEPS = 16
GENERATION = {"gen_length": 8, "steps": 8, "block_length": 8}


def answers(llm: bicache.LLM, lines: list[dict[str, str]], cache: str) -> list[str]:
    llm.clear_prefixes()
    outputs = llm.generate(
        [line["prompt"] for line in lines],
        prefix=[line["prefix"] for line in lines],
        cache=cache,
        **GENERATION,
    )
    return [output.text for output in outputs]


def share(a: list[str], b: list[str]) -> float:
    return sum(x == y for x, y in zip(a, b, strict=True)) / len(a)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("--documents", type=int, default=4, help="per document length")
    parser.add_argument("--questions", type=int, default=50, help="per document")
    args = parser.parse_args()
    llm = bicache.LLM(args.model)
    layers = llm.config.layers
    measured, safe = [], layers
    for length in LENGTHS:
        lines = questions(args.documents, args.questions, length, SEED + length)
        truth = [line["answer"] for line in lines]
        none = answers(llm, lines, "none")
        prefix_rows = 1 + 2 * length
        row = {
            "records": length,
            "prefix_share": round(prefix_rows / (prefix_rows + 6 + GENERATION["gen_length"]), 2),
            "questions": len(lines),
            "exact_match_none": round(share(none, truth), 4),
            "agreement_by_depth": [],
        }
        for depth in range(layers + 1):
            cache = f"bicache:depth={depth},refresh_steps={REFRESH_STEPS}"
            row["agreement_by_depth"].append(round(share(answers(llm, lines, cache), none), 4))
        unsafe = [b for b, x in enumerate(row["agreement_by_depth"]) if x < MIN_AGREEMENT]
        safe = min([safe, *(b - 1 for b in unsafe)])
        measured.append(row)
        print(json.dumps(row), flush=True)
    if safe < 1:
        raise SystemExit("no safe depth: even depth 1 changes more than 1 % of the answers")
    calibration = {
        "cache": f"bicache:depth={safe},refresh_steps={REFRESH_STEPS},splice=official",
        "safe_depth": safe,
        "rule": f"agreement with none >= {MIN_AGREEMENT} at every depth up to it, at every share",
        "measured": measured,
    }
    text = json.dumps({"format": 1, "generation": GENERATION, "calibration": calibration}, indent=1)
    (args.model / "bicache.json").write_text(text + "\n")


if __name__ == "__main__":
    main()
