"""bench/quantisation.py and bench/outliers.py: what they report, and what types cost in answers."""

from __future__ import annotations

import json
from pathlib import Path
from types import ModuleType
from typing import Any

import bicache
import numpy as np
import pytest
from test_bench import BENCH, load, run

RESULTS = BENCH / "results" / "quantisation.json"
DTYPES = ["f32", "bf16", "int8", "int4"]
# Most that a prediction may be from f32's: KL divergence, and share of other most likely tokens.
KL = {"bf16": 1e-3, "int8": 0.01, "int4": 0.1}
OTHER = {"bf16": 0.01, "int8": 0.02, "int4": 0.08}


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    return load("quantisation", monkeypatch)


def test_it_reports_every_type() -> None:
    done = run("quantisation.py", "--small", "--questions", "2", "--models", "records-control")
    assert done.returncode == 0, done.stderr
    models = json.loads(done.stdout)["models"]
    assert [(m["model"], m["outliers"]) for m in models] == [
        ("records-control", False), ("records-control", True),
        ("random weights", False), ("random weights", True),
    ]  # fmt: skip
    for m in models:
        rows = m["dtypes"]
        assert [row["dtype"] for row in rows] == DTYPES
        sizes = [row["weight_bytes"] for row in rows]
        assert sizes == sorted(sizes, reverse=True) and len(set(sizes)) == 4
        assert rows[0]["kl"] == 0 and rows[0]["policies"]["none"]["token_agreement"] == 1
        assert all(row["kl"] > 0 for row in rows[1:])
        shipped = m["model"] != "random weights"
        assert all(("loss" in row["policies"]["none"]) == shipped for row in rows)
        assert ("auto" in rows[0]["policies"]) == (shipped and not m["outliers"])


def test_outliers_leave_float_results_as_they_are(bench: ModuleType, tmp_path: Path) -> None:
    plain = bicache.LLM("chain", threads=1).path
    folder = bench.with_outliers(plain, tmp_path / "outliers")
    ids = np.arange(4, 60)
    for dtype in DTYPES:
        a, b = (bicache.LLM(x, dtype=dtype, threads=1).forward(ids) for x in (plain, folder))
        assert (a.tobytes() == b.tobytes()) == (dtype in ("f32", "bf16"))


@pytest.mark.parametrize("outliers", [False, True])
def test_the_chains_answers_stay(bench: ModuleType, tmp_path: Path, outliers: bool) -> None:
    # Of the shipped models the one whose answers the least thing changes.
    case = bench.shipped("chain", 24, tmp_path, outliers)
    for dtype in DTYPES:
        row = bench.measure(case, dtype)
        assert row["kl"] <= KL.get(dtype, 0)
        assert row["top1_agreement"] >= 1 - OTHER.get(dtype, 0)
        for cell in row["policies"].values():
            assert cell["token_agreement"] >= 1 - OTHER.get(dtype, 0)
            assert cell["loss"] <= (0.085 if dtype == "int4" else 0.042)  # two or one of 24


@pytest.mark.parametrize("outliers", [False, True])
def test_random_weights(bench: ModuleType, tmp_path: Path, outliers: bool) -> None:
    shape = bench.Shape(layers=4, dim=128, heads=4, ffn=352, vocab=512)
    case = bench.random_weights(shape, 8, tmp_path, outliers)
    rows: dict[str, dict[str, Any]] = {dtype: bench.measure(case, dtype) for dtype in DTYPES}
    assert rows["bf16"]["kl"] < rows["int8"]["kl"] < rows["int4"]["kl"]
    for dtype in DTYPES[1:]:
        assert rows[dtype]["kl"] <= KL[dtype]
    assert rows["int8"]["top1_agreement"] >= 0.95
    assert rows["int4"]["top1_agreement"] >= 0.65


@pytest.fixture(scope="module")
def report() -> dict[str, Any]:
    content: dict[str, Any] = json.loads(RESULTS.read_text())
    return content


def test_committed_results_keep_the_answers(report: dict[str, Any]) -> None:
    assert report["questions"] >= 300
    assert len(report["models"]) == 2 * (len(bicache.shipped_models()) + 1)
    for m in report["models"]:
        rows = {row["dtype"]: row for row in m["dtypes"]}
        assert list(rows) == DTYPES
        for dtype in DTYPES[1:]:
            assert rows[dtype]["kl"] <= KL[dtype]
            for policy, cell in rows[dtype]["policies"].items():
                # Where stale rows of the prompt leave no margin, quantising may use it up.
                if policy == "dllm_cache, prompt every second step":
                    assert cell["loss"] - cell["loss_interval"] <= 0.05
                else:
                    assert cell.get("loss", 0) <= 0.01, (m["model"], dtype, policy)


def test_the_table_shows_every_type_but_f32(
    report: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    table = load("quantisation_table", monkeypatch).quantisation(report)
    [head, _, *rows] = [line for line in table.splitlines() if line.startswith("|")]
    cells = [[cell.strip() for cell in row.strip("|").split("|")] for row in rows]
    assert [row[1] for row in cells] == DTYPES[1:] * len(report["models"])
    assert {len(row) for row in cells} == {head.count("|") - 1}
    [chain] = [m for m in report["models"] if (m["model"], m["outliers"]) == ("chain", False)]
    first = chain["dtypes"][1]
    assert [cells[[row[0] for row in cells].index("`chain`")][i] for i in (2, 5)] == [
        f"{first['weight_bytes'] / 1e6:.2f} MB",
        f"{100 * first['policies']['none']['token_agreement']:.1f} %",
    ]
