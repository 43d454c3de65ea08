"""Scripts of bench/ about caching within a request: what they report, and that they check it."""

from __future__ import annotations

import json
import math
from pathlib import Path

import bicache
import pytest
from test_bench import load, run

RESULTS = Path(__file__).resolve().parent.parent / "bench" / "results"


def test_dllm_cache_speed_reports_what_it_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    done = run("dllm_cache_speed.py", "--small", "--rounds", "2")
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    r = report["result"]
    assert r["flops_counted"] == r["flops_predicted"] > 0
    assert r["allowed"] == pytest.approx(r["none_flops_predicted"] / r["flops_counted"])
    assert r["efficiency"] == pytest.approx(r["speed"] / r["allowed"])
    assert len(r["seconds"]) == len(r["none_seconds_per_step"]) == 2
    assert [k["refreshes"] for k in r["kinds"]] == [
        "prompt", "response", "chosen rows only", "prompt and response",
    ]  # fmt: skip
    assert sum(k["steps"] for k in r["kinds"]) == 64
    # The kinds' work is that of the request, but for the output head: 4.5 of 8 rows a step.
    head = 2 * 64 * 128 * 64 * 4.5
    assert sum(k["steps"] * k["flops"] for k in r["kinds"]) + head == r["flops_counted"]
    assert load("tables", monkeypatch).dllm_cache_speed(report).count("\n| ") == 6


@pytest.mark.parametrize("flag", ["--rounds", "--none-steps"])
def test_dllm_cache_speed_refuses(flag: str) -> None:
    done = run("dllm_cache_speed.py", "--small", flag, "0")
    assert done.returncode == 1
    assert "expected at least" in done.stderr and "Traceback" not in done.stderr


def test_caching_flops_counts_what_it_predicts(monkeypatch: pytest.MonkeyPatch) -> None:
    done = run("caching_flops.py", "--small")
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    [load_] = report["workloads"]
    assert len(load_["policies"]) == 6
    for p in load_["policies"]:
        assert p["small_flops_counted"] == p["small_flops_predicted"] > 0
        assert p["over_none"] == pytest.approx(load_["none_flops"] / p["flops"])
        assert p["over_loop"] == pytest.approx(load_["loop_flops"] / p["flops"])
    assert load("tables", monkeypatch).caching_flops(report).count("| short |") == 6


def test_committed_flops_reach_what_the_reduced_form_allows() -> None:
    report = json.loads((RESULTS / "caching_flops.json").read_text())
    found = {
        (w["name"], p["reuse"]): min(p["over_none"], p["over_loop"])
        for w in report["workloads"]
        for p in w["policies"]
    }
    assert found["GSM8K", "dllm_cache"] >= 8.3
    assert found["LongBench-HotpotQA", "dllm_cache"] >= 28
    assert found["HumanEval", "dllm_cache"] >= 2.8


def test_caching_accuracy_is_paired(monkeypatch: pytest.MonkeyPatch) -> None:
    done = run("caching_accuracy.py", "--questions", "3", "--models", "records-control")
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    [model] = report["models"]
    names = [row["setting"] for row in report["summary"]]
    assert len(names) == len(set(names)) > 40
    for length in model["lengths"]:
        assert list(length["settings"]) == names
        none = length["settings"]["none"]
        assert none["loss"] == 0 and none["agreement"] == none["flops_share"] == 1
        for cell in length["settings"].values():
            assert cell["loss"] == pytest.approx(none["exact_match"] - cell["exact_match"])
    for row in report["summary"]:
        worst = max(length["settings"][row["setting"]]["loss"] for length in model["lengths"])
        assert row["worst_loss"] == {"records-control": worst}
        assert row["safe"] == (worst <= report["max_loss"])
    tables = load("tables", monkeypatch)
    assert tables.caching_accuracy_summary(report).count("\n| `") == len(names)
    assert tables.caching_accuracy(report).count("\n| `") == len(names)


@pytest.mark.parametrize("group", ["decoding", "dllm_cache", "fast_dllm", "composed"])
def test_committed_accuracy_on_the_chain_model(group: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The cheapest and the costliest setting of a group, on some of the questions: what the whole
    gave, within four standard deviations."""
    report = json.loads((RESULTS / "caching_accuracy.json").read_text())
    [chain] = [m for m in report["models"] if m["model"] == "chain"]
    [committed] = [m["settings"] for m in chain["lengths"] if m["records"] == 40]
    module = load("caching_accuracy", monkeypatch)
    count = 80
    cell = module.Cell(bicache.LLM("chain", threads=1), module.questions("chain", 40, count))
    settings = [s for s in module.settings() if s.group == group]
    settings.sort(key=lambda s: committed[s.name]["flops_share"])
    for setting in (settings[0], settings[-1]):
        want, got = committed[setting.name], cell.measure(setting)
        assert got["flops_share"] == pytest.approx(want["flops_share"], rel=0.05)
        p = want["exact_match"]
        tolerance = 4 * math.sqrt(max(p * (1 - p), 0.01) / count)
        assert got["exact_match"] == pytest.approx(p, abs=tolerance), setting.name
