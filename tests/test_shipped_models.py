"""What is claimed of the shipped models, on their held-out questions and in committed results."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import bicache
import numpy as np
import pytest
from bicache.demo import read_questions

DEPTHS = {"records": 5, "records-scratch": 1, "records-control": 0}
ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "bench" / "results" / "bicache_depth.json"
CHAIN_STEPS = ROOT / "training" / "logs" / "chain-steps.jsonl"
CHAIN_DEPTHS = {16: 3, 24: 4, 40: 4}  # by number of records
MAX_LOSS = 0.018


def test_the_models_that_ship() -> None:
    assert set(bicache.shipped_models()) == {*DEPTHS, "chain"}
    for name in bicache.shipped_models():
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


@pytest.fixture(scope="module")
def chain() -> bicache.LLM:
    return bicache.LLM("chain")


@pytest.fixture(scope="module")
def chain_questions(chain: bicache.LLM) -> dict[int, list[dict[str, Any]]]:
    """By number of records, the held-out questions."""
    lengths: dict[int, list[dict[str, Any]]] = {}
    for line in (chain.path / "questions.jsonl").read_text().splitlines():
        row = json.loads(line)
        assert row["operation"] == "chain"
        lengths.setdefault(row["records"], []).append(row)
    return lengths


def exact_match(
    llm: bicache.LLM, questions: list[dict[str, Any]], **options: Any
) -> tuple[list[bicache.Output], float]:
    """Outputs, and the share that is right in every word."""
    outputs = llm.generate(
        [q["prompt"] for q in questions], prefix=[q["prefix"] for q in questions], **options
    )
    right = [o.text == q["answer"] for o, q in zip(outputs, questions, strict=True)]
    return outputs, float(np.mean(right))


def chain_results() -> dict[int, dict[tuple[int, str], float]]:
    """Committed exact match: by number of records, then by (steps, cache)."""
    results: dict[int, dict[tuple[int, str], float]] = {}
    for line in CHAIN_STEPS.read_text().splitlines():
        row = json.loads(line)
        assert row["questions"] >= 500
        results.setdefault(row["records"], {})[row["steps"], row["cache"]] = row["exact_match"]
    return results


def test_the_chain_card_says_what_was_measured(chain: bicache.LLM) -> None:
    card = (chain.path / "README.md").read_text()
    bicache_cells = "bicache:depth={},refresh_steps={}".format
    tables = (
        [(steps, "none") for steps in (1, 2, 4, 8)],
        [(8, bicache_cells(0, steps)) for steps in (1, 2, 4, 8)],
        [(8, "none"), *((8, bicache_cells(depth, 1)) for depth in (1, 2, 3, 4, 5, 6, 12))],
    )
    for length, measured in chain_results().items():
        assert set(measured) == {cell for table in tables for cell in table}
        for table in tables:
            cells = " | ".join(f"{100 * measured[cell]:.1f} %" for cell in table)
            assert f"\n| {length} | {cells} |\n" in card
    log = (ROOT / "training" / "logs" / "chain.jsonl").read_text().splitlines()
    last = json.loads(log[-1])
    one, two = (f"{100 * last[f'exact_match_{x}']:.3g} %" for x in ("one_colour", "two_colours"))
    assert f"it answered {one} and {two} of 256" in card


def test_the_chain_cards_example(chain: bicache.LLM) -> None:
    card = (chain.path / "README.md").read_text()
    (code,) = re.findall(r"```python\n(.*?)```", card, re.DOTALL)
    *setting, call = code.strip().splitlines()
    names: dict[str, Any] = {"bicache": bicache}
    exec("\n".join(setting), names)
    expression, _, said = call.partition("   # ")
    assert repr(eval(expression, names)) == said


@pytest.mark.parametrize("length", CHAIN_DEPTHS)
def test_the_chain_needs_its_steps(
    chain: bicache.LLM, chain_questions: dict[int, list[dict[str, Any]]], length: int
) -> None:
    claimed = {s: x for (s, cache), x in chain_results()[length].items() if cache == "none"}
    some = chain_questions[length][::4]  # a part of those that were measured
    found = {steps: exact_match(chain, some, steps=steps)[1] for steps in claimed}
    for steps, share in claimed.items():
        deviation = (share * (1 - share) / len(some)) ** 0.5
        assert abs(found[steps] - share) <= 3 * deviation + 1 / len(some)
    assert list(claimed) == [1, 2, 4, 8]
    assert found[1] < found[2] < found[4] - 0.05
    assert found[8] > 0.93


@pytest.mark.parametrize("length", CHAIN_DEPTHS)
def test_auto_is_safe_on_the_chain_and_a_deeper_prefix_is_not(
    chain: bicache.LLM, chain_questions: dict[int, list[dict[str, Any]]], length: int
) -> None:
    some = chain_questions[length][:256]
    none, right = exact_match(chain, some)
    auto, right_auto = exact_match(chain, some, cache="auto")
    assert {o.stats.depth for o in auto} == {CHAIN_DEPTHS[length]}
    assert right_auto >= right - 0.024  # six of 256
    assert sum(o.stats.flops for o in auto) < 0.9 * sum(o.stats.flops for o in none)
    _, deeper = exact_match(chain, some, cache="bicache:depth=5,refresh_steps=1")
    assert deeper < right - 0.05


def test_the_chain_shows_what_a_stale_prefix_costs(
    chain: bicache.LLM, chain_questions: dict[int, list[dict[str, Any]]]
) -> None:
    for length, measured in chain_results().items():
        none = measured[8, "none"]
        for steps in (2, 4, 8):
            stale = f"bicache:depth=0,refresh_steps={steps}"
            assert none - 0.06 < measured[8, stale] < none - 0.02
        some = chain_questions[length][:256]
        once = exact_match(chain, some, cache="bicache:depth=0,refresh_steps=8")[1]
        assert once < exact_match(chain, some)[1]
