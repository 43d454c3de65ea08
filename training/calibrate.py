"""Measure how deep a shipped model's prefix may be reused, and store it beside the checkpoint.

    python training/calibrate.py records

Draws calibration questions (documents of a seed of their own, neither trained on nor among
questions.jsonl), profiles the model on them (`bicache.profile`), and writes the agreement's cache
string to bicache.json. The refresh interval is the largest of REFRESH_STEPS at which reuse within a
request alone keeps the answers; where even short ones do not, 1 is left: then nothing is reused
within a request.
"""

from __future__ import annotations

import argparse
import sys
from typing import Any

import bicache
from bicache.checkpoint import Sidecar
from export import chain_questions, questions

WORDS = {"records": 2, "records-scratch": 2, "records-control": 1}  # of one record
LENGTHS = (6, 12, 24, 40)  # records of the documents: the share of prefix rows grows with them
CHAIN_LENGTHS = (8, 16, 24, 40)
SEED = 30_000
REFRESH_STEPS = (16, 4, 2, 1)
TAU = 0.97
OPTIONS: dict[str, Any] = {"gen_length": 8, "steps": 8, "block_length": 8}


def draw(count: int, length: int, seed: int, words: int) -> list[dict[str, str]]:
    """`count` questions, at most 60 about one document of `length` records."""
    lines: list[dict[str, str]] = []
    while len(lines) < count:
        lines += questions(1, 60, length, seed + length + 1000 * len(lines), words)
    return lines[:count]


def calibrate(llm: bicache.LLM, words: int, count: int) -> tuple[bicache.DepthTable, list[int]]:
    """As calibrate_on, with `count` questions about documents of each of LENGTHS."""
    return calibrate_on(llm, [x for n in LENGTHS for x in draw(count, n, SEED, words)])


def calibrate_on(
    llm: bicache.LLM, lines: list[dict[str, Any]]
) -> tuple[bicache.DepthTable, list[int]]:
    """The profile at the largest refresh interval with a safe depth, and the intervals without."""
    pairs = [(line["prefix"], line["prompt"]) for line in lines]
    failed: list[int] = []
    for steps in REFRESH_STEPS:
        table = bicache.profile(
            llm, pairs, tau=TAU, refresh_steps=steps, progress=sys.stderr.isatty(), **OPTIONS
        )
        if all(b.depth is not None for b in table.agreement):
            return table, failed
        failed.append(steps)
    raise SystemExit("no refresh interval has a safe depth")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("model", choices=[*WORDS, "chain"])
    parser.add_argument("--questions", type=int, default=600, help="per document length")
    args = parser.parse_args()
    llm = bicache.LLM(args.model)
    if args.model == "chain":
        lines = [x for n in CHAIN_LENGTHS for x in chain_questions(args.questions, n, SEED + n)]
        table, failed = calibrate_on(llm, lines)
    else:
        table, failed = calibrate(llm, WORDS[args.model], args.questions)
    print(table.summary())
    if failed:
        print(f"no safe depth at refresh_steps {', '.join(map(str, failed))}")
    Sidecar(OPTIONS, table.calibration()).write(llm.path)


if __name__ == "__main__":
    main()
