"""Where BiCache's savings come from, on the shipped model's held-out questions.

    python bench/prefix_reuse.py > bench/results/prefix_reuse.json

BiCache joins two mechanisms: reuse *across requests* (shallow layers, from the prefix entry) and
reuse *within a request* (all layers, between two refreshes). Each alone, both, and none, in
interleaved rounds.
"""

from __future__ import annotations

import json
import sys

import bicache
from bicache.demo import read_questions, run_demo


def main() -> None:
    llm = bicache.LLM("records")
    documents = read_questions(llm.path / "questions.jsonl")
    question = documents[0].questions[0].prompt
    (output,) = llm.generate(question, prefix=documents[0].prefix, cache="auto")
    safe = output.stats.depth
    policies = {
        "none": "nothing is reused",
        f"bicache:depth={safe},refresh_steps=1": "across requests only",
        "bicache:depth=0,refresh_steps=16": "within a request only",
        f"bicache:depth={safe},refresh_steps=16": "both",
    }
    report = run_demo(llm, documents, policies=list(policies)).as_dict()
    for row, what in zip(report["policies"], policies.values(), strict=True):
        row["reuse"] = what
    json.dump(report, sys.stdout, indent=1)
    print()


if __name__ == "__main__":
    main()
