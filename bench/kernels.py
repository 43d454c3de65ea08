"""How near this machine's limit each kernel is, on every instruction set the CPU has.

    python bench/kernels.py > bench/results/kernels.json

Builds bench/kernels.cc in a temporary folder and runs it, once more for OpenBLAS with and without
OPENBLAS_CORETYPE=Haswell, which some environments set. Rates are medians, in 1e9 operations (a
multiply-add is two) or bytes a second, of all threads together. Beside each group stands the most
that was seen in the same rounds of

- `peak`: a loop of the fastest multiply-add instruction that the table may use (`peak_of`),
  `best_peak`: of any table; both for the type of the arithmetic;
- `read_gb_s`: reading from memory in order, `l2_copy_gb_s`: copying within L2 (bytes read and
  written).

Weights are `cold` where they were dropped from all caches just before, `warm` where the same ones
are used over and over. Activations and keys are warm; products are those of activations that were
converted before.

For work on one kernel the program can be run by itself, with --isa, --type and --only; on a busy
machine --cpu-time, with one thread, goes by the time the thread had.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from kernels_table import TYPES, kernel_roof
from markdown_table import Report

ROOT = Path(__file__).resolve().parent.parent
CORETYPES = {"default": None, "Haswell": "Haswell"}
PICTURE_LAYER = (4096, 4096)


def build(folder: Path) -> Path:
    """The program, built in `folder`.

    Raises:
        OSError: CMake is missing, or the build failed.
    """
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
    cmake = shutil.which("cmake", path=path)
    if cmake is None:
        raise FileNotFoundError("[kernels] cmake: expected it in PATH or beside Python, got none")
    ninja = ["-G", "Ninja"] if shutil.which("ninja", path=path) else []
    options = {
        "CMAKE_BUILD_TYPE": "Release",
        "BICACHE_BUILD_PYTHON": "OFF",
        "BICACHE_BUILD_BENCH": "ON",
        "Python_EXECUTABLE": sys.executable,
    }
    for command in (
        ["-S", str(ROOT), "-B", str(folder), *ninja, *(f"-D{k}={v}" for k, v in options.items())],
        ["--build", str(folder), "--target", "bicache_bench"],
    ):
        environment = os.environ | {"PATH": path}
        done = subprocess.run([cmake, *command], capture_output=True, text=True, env=environment)
        if done.returncode != 0:
            raise OSError(
                f"[kernels] cmake {command[0]}: expected it to succeed, got {done.returncode}:\n"
                + done.stdout
                + done.stderr
            )
    return folder / "bicache_bench"


def play(program: Path, args: Sequence[str], coretype: str | None = None) -> list[Report]:
    """The lines the program writes, in order.

    Raises:
        OSError: It failed.
    """
    environment = os.environ | {"OPENBLAS_CORETYPE": coretype or ""}
    if coretype is None:
        del environment["OPENBLAS_CORETYPE"]
    if "OMP_WAIT_POLICY" not in environment:
        environment.setdefault("GOMP_SPINCOUNT", "1000")  # as the package has it
    done = subprocess.run([program, *args], capture_output=True, text=True, env=environment)
    if done.returncode != 0:
        raise OSError(
            f"[kernels] {program} {' '.join(args)}: expected status 0, got {done.returncode}: "
            + done.stderr
        )
    return [json.loads(line) for line in done.stdout.splitlines()]


def of_kind(lines: list[Report], kind: str) -> list[Report]:
    return [
        {k: v for k, v in line.items() if k != "kind"} for line in lines if line["kind"] == kind
    ]


def cpu() -> str:
    """As Linux names it."""
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.machine()


def measure(program: Path, args: Sequence[str]) -> Report:
    lines = play(program, args)
    [run] = of_kind(lines, "run")
    report: Report = {
        "machine": f"{len(os.sched_getaffinity(0))} x {cpu()}",
        **run,
        "peaks": of_kind(lines, "peak"),
    }
    for kind in ("gemm", "attention", "elementwise"):
        report[kind] = of_kind(lines, kind)
    report["blas"] = {}
    for name, coretype in CORETYPES.items():
        lines = play(program, [*args, "--only", "blas"], coretype)
        [run] = of_kind(lines, "run")
        report["blas"][name] = {"config": run["blas"], "gemm": of_kind(lines, "gemm")}
    return report


def written(value: Any, depth: int = 0) -> str:
    """JSON with one line for each measurement."""
    pad = "\n" + " " * (depth + 1)
    if isinstance(value, dict) and any(isinstance(v, (dict, list)) for v in value.values()):
        if "rows" not in value:
            inner = (f"{json.dumps(k)}: {written(v, depth + 1)}" for k, v in value.items())
            return "{" + pad + f",{pad}".join(inner) + pad[:-1] + "}"
    if isinstance(value, list) and value and isinstance(value[0], dict):
        return "[" + pad + f",{pad}".join(json.dumps(v) for v in value) + pad[:-1] + "]"
    return json.dumps(value)


def draw(report: Report, path: Path) -> None:
    """GOP/s over rows with cold weights: the fastest table of each type, its roof, OpenBLAS."""
    figure = importlib.import_module("matplotlib.figure").Figure(
        figsize=(8, 5), layout="constrained", dpi=120
    )
    axes = figure.add_subplot(xscale="log", yscale="log")
    axes.set_xscale("log", base=2)

    def line(group: Report, label: str, **style: Any) -> Any:
        [drawn] = axes.plot(group["rows"], group["cold"] or group["warm"], label=label, **style)
        return drawn.get_color()

    layers = {(g["inputs"], g["outputs"]) for g in report["gemm"]}
    shown = PICTURE_LAYER if PICTURE_LAYER in layers else min(layers)

    def fits(group: Report) -> bool:
        return (group["inputs"], group["outputs"]) == shown

    for type_ in TYPES:
        groups = [g for g in report["gemm"] if g["type"] == type_ and fits(g)]
        if not groups:
            continue
        best = max(groups, key=lambda g: max(g["cold"] or g["warm"]))
        colour = line(best, f"{type_}, {best['isa']}", marker="o")
        roof = [kernel_roof(best, rows) for rows in best["rows"]]
        axes.plot(best["rows"], roof, color=colour, linestyle="--", linewidth=1)
    for name, blas in report["blas"].items():
        for group in filter(fits, blas["gemm"]):
            line(group, f"OpenBLAS f32, core type: {name}", marker=".", linestyle=":")
    axes.set_title(f"{shown[0]} inputs, {shown[1]} outputs, weights from memory")
    axes.set_xlabel("rows; dashed: the least of peak and bandwidth, measured beside")
    axes.set_ylabel(f"1e9 operations a second, {report['threads']} threads")
    axes.legend()
    figure.savefig(path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--threads", type=int, help="default: all CPUs")
    parser.add_argument("--rounds", type=int, help="default 5")
    parser.add_argument("--program", type=Path, help="bicache_bench, already built")
    parser.add_argument("--picture", type=Path, help="draw it, too (needs matplotlib)")
    parser.add_argument("--small", action="store_true", help="tiny shapes, to test the script")
    args = parser.parse_args()
    words = ["--small"] if args.small else []
    for name in ("threads", "rounds"):
        if (value := getattr(args, name)) is not None:
            words += [f"--{name}", str(value)]
    try:
        with tempfile.TemporaryDirectory(prefix="kernels") as folder:
            report = measure(args.program or build(Path(folder)), words)
        if args.picture:
            draw(report, args.picture)
    except OSError as error:
        sys.exit(str(error))
    print(written(report))


if __name__ == "__main__":
    main()
