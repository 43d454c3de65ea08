"""What is claimed of the shipped models, on their held-out questions and in committed results."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import bicache
import numpy as np
import pytest
from bicache.demo import read_questions

DEPTHS = {"records": 5, "records-scratch": 1, "records-control": 0}
RESULTS = Path(__file__).parent.parent / "bench" / "results" / "bicache_depth.json"
MAX_LOSS = 0.018


def test_the_models_that_ship() -> None:
    assert set(bicache.shipped_models()) == set(DEPTHS)
    for name in DEPTHS:
        folder = bicache.LLM(name, threads=1).path
        assert sum(file.stat().st_size for file in folder.iterdir()) < 3_000_000
        assert (folder / "README.md").is_file()


@pytest.mark.parametrize("name", DEPTHS)
def test_auto_is_safe_and_one_layer_more_is_not(name: str) -> None:
    llm = bicache.LLM(name)
    (document, *_) = read_questions(llm.path / "questions.jsonl")
    prompts = [q.prompt for q in document.questions]
    answers = [q.answer for q in document.questions]

    def run(cache: str) -> list[bicache.Output]:
        return llm.generate(prompts, prefix=document.prefix, cache=cache)

    def right(outputs: list[bicache.Output]) -> float:
        return float(np.mean([o.text == a for o, a in zip(outputs, answers, strict=True)]))

    none, auto = run("none"), run("auto")
    assert right(none) > 0.97
    assert right(auto) >= right(none) - 0.021  # two of 96
    assert {o.stats.depth for o in auto} == {DEPTHS[name]}
    steps = llm.cache_string("auto").split("refresh_steps=")[1].split(",")[0]
    deeper = run(f"bicache:depth={DEPTHS[name] + 1},refresh_steps={steps}")
    assert right(deeper) < right(none) - 0.1
    if name == "records-control":  # at depth 0, every step afresh: exactly none's work
        assert auto[-1].stats.rows_per_layer == none[-1].stats.rows_per_layer
        assert auto[-1].tokens.tobytes() == none[-1].tokens.tobytes()
    else:
        assert auto[-1].stats.flops < 0.3 * none[-1].stats.flops


@pytest.fixture(scope="module")
def report() -> dict[str, Any]:
    content: dict[str, Any] = json.loads(RESULTS.read_text())
    return content


def test_committed_results_confirm_the_shipped_calibrations(report: dict[str, Any]) -> None:
    assert report["questions"] >= 500
    for model in report["models"]:
        llm = bicache.LLM(model["model"], threads=1)
        assert model["policies"]["agreement"] == llm.calibration["cache"]


def test_agreement_chooses_what_an_oracle_would_or_one_less(report: dict[str, Any]) -> None:
    assert [m["model"] for m in report["models"]] == list(DEPTHS)
    for model in report["models"]:
        for row in model["lengths"]:
            losses = [row["exact_match_none"] - cell["exact_match"] for cell in row["alone"]]
            oracle = next((b for b, x in enumerate(losses) if x > MAX_LOSS), len(losses)) - 1
            assert row["oracle"] == oracle
            chosen = row["policies"]["agreement"]
            assert chosen["mean_depth"] == DEPTHS[model["model"]]
            assert oracle - 1 <= chosen["mean_depth"] <= oracle
            assert row["exact_match_none"] - chosen["exact_match"] <= MAX_LOSS
