"""bench/kernels.py and its tables, on a program that writes given lines; the real one is run by
ctest (smoke_kernels_bench.py)."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import pytest
from test_bench import load, run

GROUP = {
    "kind": "gemm", "isa": "avx512", "type": "f32", "inputs": 4096, "outputs": 4096,
    "weight_bytes": 4 * 4096 * 4096, "peak_of": "an instruction", "peak": 400.0,
    "best_peak": 400.0, "read_gb_s": 20.0, "rows": [1, 8, 64, 512],
}  # fmt: skip
LINES: list[dict[str, Any]] = [
    {"kind": "run", "threads": 3, "rounds": 1, "isa": "avx512"},
    {"kind": "peak", "name": "an instruction", "type": "f32", "isa": "avx512", "gops": 401.0},
    {**GROUP, "isa": "generic", "peak": 50.0, "warm": [1, 2, 3, 4], "cold": [5, 20, 30, 40]},
    {**GROUP, "warm": [40, 100, 390, 399], "cold": [9, 60, 300, 380]},
    {**GROUP, "inputs": 1024, "weight_bytes": 4 * 1024 * 4096, "warm": [40, 100, 390, 399],
     "cold": [10, 80, 320, 360]},
    {"kind": "attention", "isa": "avx512", "type": "f32", "model": "mid", "heads": 12,
     "kv_heads": 3, "head_dim": 128, "rows": 8, "keys": 512, "gops": 100.0, "peak": 400.0,
     "best_peak": 400.0, "read_gb_s": 20.0},
    {"kind": "elementwise", "isa": "avx512", "name": "rope", "l2": 80.0, "memory": 12.0,
     "l2_copy_gb_s": 110.0, "read_gb_s": 20.0},
]  # fmt: skip


@pytest.fixture
def program(tmp_path: Path) -> Path:
    """Writes LINES; asked for OpenBLAS, one group whose rates are 100 under Haswell, else 200."""
    path = tmp_path / "program"
    path.write_text(
        f"#!{sys.executable}\n"
        "import json, os, sys\n"
        f"lines = {LINES!r}\n"
        "if '--only' in sys.argv:\n"
        "    rate = {'Haswell': 100, None: 200}[os.environ.get('OPENBLAS_CORETYPE')]\n"
        "    lines = [lines[0] | {'blas': 'OpenBLAS x'}, lines[2] | {'isa': 'blas'}]\n"
        "    lines[1] |= {'peak': 400.0, 'cold': [rate] * 4}\n"
        "lines[0]['words'] = sys.argv[1:]\n"
        "print('\\n'.join(map(json.dumps, lines)))\n"
    )
    path.chmod(0o755)
    return path


def test_report_and_tables(program: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(os.environ, "OPENBLAS_CORETYPE", "Haswell")
    picture = tmp_path / "kernels.svg"
    done = run("kernels.py", "--program", str(program), "--rounds", "1", "--picture", str(picture))
    assert done.returncode == 0, done.stderr
    assert "<svg" in picture.read_text()
    report = json.loads(done.stdout)
    assert report["words"] == ["--rounds", "1"]
    assert report["gemm"] == [{k: v for k, v in x.items() if k != "kind"} for x in LINES[2:5]]
    assert [report["blas"][name]["gemm"][0]["cold"][0] for name in ("default", "Haswell")] == [
        200,
        100,
    ]
    tables = load("tables", monkeypatch)
    # 380 and 360 of 400; the roofs at 64 rows are 400; at 8 rows 60 and 80 GOP/s are 15 and
    # 20 GB/s of weights, at 1 row 9 and 10 GOP/s are 18 and 20.
    assert (
        "| f32 | avx512 | `an instruction` | 400 | 90 to 95 % | 90 to 95 % | 75 to 80 % "
        "| 75 to 100 % | 90 to 100 % |\n"
    ) in tables.kernels_gemm(report)
    # Memory allows 640 GOP/s at 64 rows; the peak is 50.
    assert "| 50 | 80 % | 10 % | 60 % | 25 % | 50 % |\n" in tables.kernels_gemm(report)
    assert "| f32 | mid: 12 / 3 x 128 | 8 x 512 | 100 (25 %) |\n" in tables.kernels_attention(
        report
    )
    assert "| `rope` | 80 | 12.0 |\n" in tables.kernels_elementwise(report)
    # Only the layer that OpenBLAS ran.
    assert "| 512 | 95 % | 50 % | 25 % |\n" in tables.kernels_blas(report)


def test_roof(monkeypatch: pytest.MonkeyPatch) -> None:
    tables = load("kernels_table", monkeypatch)
    # 2 operations for each 4 bytes, 20e9 bytes a second.
    assert [tables.kernel_roof(GROUP, m) for m in (1, 8, 40, 64)] == [10, 80, 400, 400]


def test_failures_are_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    failing = tmp_path / "failing"
    failing.write_text("#!/bin/sh\necho '[bench] out of luck' >&2\nexit 3\n")
    failing.chmod(0o755)
    for path, message in ((failing, "got 3: [bench] out of luck"), (tmp_path / "none", "none")):
        done = run("kernels.py", "--program", str(path))
        assert done.returncode == 1
        assert message in done.stderr and "Traceback" not in done.stderr

    module = load("kernels", monkeypatch)
    monkeypatch.setitem(os.environ, "PATH", str(tmp_path))
    monkeypatch.setattr(sys, "executable", str(tmp_path / "python"))
    with pytest.raises(FileNotFoundError, match=r"\[kernels\] cmake: expected"):
        module.build(tmp_path)
    cmake = tmp_path / "cmake"
    cmake.write_text("#!/bin/sh\necho no compiler\nexit 1\n")
    cmake.chmod(0o755)
    with pytest.raises(OSError, match="no compiler"):
        module.build(tmp_path)
