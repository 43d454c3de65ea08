"""What bench/kernels.py makes of the program it is given: run by ctest, standard library only."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

BENCH = Path(__file__).resolve().parent.parent / "bench"
sys.path.insert(0, str(BENCH))

import kernels_table  # noqa: E402


def main(program: str) -> None:
    refused = [("--rounds", "0"), ("--threads", "many"), ("--only", "all"), ("--isa", "mmx")]
    for flag, value in [*refused, ("--type", "f64")]:
        done = subprocess.run([program, flag, value], capture_output=True, text=True)
        assert done.returncode == 1, done
        assert "expected" in done.stderr and f"got {value}" in done.stderr, done.stderr

    command = [sys.executable, str(BENCH / "kernels.py"), "--small", "--threads", "2"]
    done = subprocess.run([*command, "--program", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert (report["threads"], report["rounds"]) == (2, 1)
    by_blas = [group for setting in report["blas"].values() for group in setting["gemm"]]
    assert len(by_blas) == 2 and all(group["isa"] == "blas" for group in by_blas)
    assert {group["type"] for group in report["gemm"]} == set(kernels_table.TYPES)
    isas = [group["isa"] for group in report["gemm"] if group["type"] == "f32"]
    assert isas[0] == "generic" and len(isas) == len(set(isas))
    assert {a["isa"] for a in report["attention"]} >= set(isas)
    assert {e["isa"] for e in report["elementwise"]} == set(isas)
    for group in report["gemm"] + by_blas:
        assert group["weight_bytes"] >= group["inputs"] * group["outputs"] / 2
        assert len(group["warm"]) == len(group["rows"])
        assert len(group["cold"]) in (0, len(group["rows"]))
        assert min([*group["warm"], *group["cold"], group["peak"], group["best_peak"]]) > 0
        assert group["read_gb_s"] > 0
    assert all(peak["gops"] > 0 for peak in report["peaks"])
    assert all(a["gops"] > 0 and a["peak"] > 0 for a in report["attention"])
    assert all(min(e["l2"], e["memory"], e["l2_copy_gb_s"]) > 0 for e in report["elementwise"])
    for name in ("gemm", "attention", "elementwise", "blas"):
        assert getattr(kernels_table, f"kernels_{name}")(report).startswith("| ")
    print(f"{len(report['gemm'])} groups on {', '.join(isas)}")


if __name__ == "__main__":
    main(sys.argv[1])
