"""Scripts of bench/ that take small shapes: what they report, and that they check themselves."""

from __future__ import annotations

import importlib.util
import json
import math
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

BENCH = Path(__file__).resolve().parent.parent / "bench"


def run(script: str, *args: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, BENCH / script, *args], capture_output=True, text=True, timeout=120
    )


def load(script: str, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    spec = importlib.util.spec_from_file_location(script, BENCH / f"{script}.py")
    assert spec is not None and spec.loader is not None
    monkeypatch.syspath_prepend(BENCH)
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, script, module)  # where dataclass looks it up
    spec.loader.exec_module(module)
    return module


def test_bicache_speed_reports_ratios_of_what_it_measured(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    done = run("bicache_speed.py", "--small", "--rounds", "1")
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert [(s["r"], s["p"], s["u"], s["g"]) for s in report["results"]] == [
        (0.5, 256, 224, 32),
        (0.77, 394, 86, 32),
        (0.9, 461, 19, 32),
    ]
    for split in report["results"]:
        assert split["entry"]["flops_counted"] == split["entry"]["flops_predicted"] > 0
        none, within, across, both = split["policies"]
        assert [p["steps"] for p in split["policies"]] == [report["none_steps"], 16, 16, 16]
        assert [p["depth"] for p in split["policies"]] == [None, 0, *[split["entry"]["layers"]] * 2]
        for p in split["policies"]:
            assert p["flops_counted"] == p["flops_predicted"] > 0
            assert len(p["seconds"]) == 1
            for name, base in (("over_none", none), ("over_within", within)):
                over = p[name]
                per_step = [q["seconds"][0] / q["steps"] for q in (base, p)]
                work = [q["flops_counted"] / q["steps"] for q in (base, p)]
                assert over["speed"] == pytest.approx(per_step[0] / per_step[1])
                assert over["allowed"] == pytest.approx(work[0] / work[1])
                assert over["efficiency"] == pytest.approx(over["speed"] / over["allowed"])
        assert none["over_none"]["allowed"] == 1 < across["over_none"]["allowed"]
        assert across["over_none"]["allowed"] < within["over_none"]["allowed"]
        assert 1 < both["over_within"]["allowed"] < both["over_none"]["allowed"]
    tables = load("tables", monkeypatch)
    assert tables.bicache_speed(report).count("| both |") == 3


def test_bicache_speed_scales_the_depths_of_llada(monkeypatch: pytest.MonkeyPatch) -> None:
    module = load("bicache_speed", monkeypatch)
    depths = {r: module.Split.of(r, 512).depth(18) for r in (0.02, 0.5, 0.77, 0.9)}
    assert depths == {0.02: 1, 0.5: 6, 0.77: 9, 0.9: 10}  # 1, 11, 16, 17 of 32
    assert module.Split.of(0.9, 512).depth(32) == 17
    weights = sum(
        math.prod(dims)
        for name, (dims, _) in module.MID.tensors().items()
        if len(dims) == 2 and "wte" not in name
    )
    assert round(weights / 1e6) == 559


def test_bicache_speed_predicts_by_hand_counted_work(monkeypatch: pytest.MonkeyPatch) -> None:
    module = load("bicache_speed", monkeypatch)
    shape = module.Shape(layers=3, dim=2, heads=1, ffn=5, vocab=7)
    split = module.Split(r=0.5, p=10, u=6, g=4)
    # Rows per layer: 10 of 20; at a refresh 20 from layer 1 on. Steps 0 and 1, of which the first
    # refreshes; 4, then 2 masked positions.
    rows = (10 + 20 + 20) + (10 + 10 + 10)
    weights = 4 * 2 * 2 + 3 * 2 * 5
    expected = rows * (2 * weights + 4 * 20 * 2) + (4 + 2) * 2 * 2 * 7
    assert module.request_flops(shape, split, steps=2, depth=1, refresh_steps=2) == expected


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (("--rows", "300"), "[bicache_speed] rows: expected"),
        (("--rounds", "0"), "[bicache_speed] rounds: expected at least 1, got 0"),
        (("--dtype", "f64"), "expected"),
    ],
)
def test_bicache_speed_refuses(args: tuple[str, str], message: str) -> None:
    done = run("bicache_speed.py", "--small", *args)
    assert done.returncode == 1
    assert message in done.stderr and "Traceback" not in done.stderr
