"""The engines of bench/peers.py: their files, their processes, what they compute and how fast."""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
from llada_gguf import write_gguf
from numpy.typing import NDArray
from peer_worker import EngineError, Spec, Worker
from random_model import FIRST_WORD, Shape, pass_flops, write_checkpoint

OURS = ("f32", "bf16", "int8", "int4")
TORCH = ("f32", "bf16")
WRITTEN, QUANTISED = ("F32", "BF16"), ("Q8_0", "Q4_0", "Q4_K_M")
# How far logits may be from our f32's, as a share of their size.
TOLERANCE = {
    "f32": 1e-4, "F32": 5e-3, "bf16": 0.05, "BF16": 0.05, "int8": 0.1, "Q8_0": 0.1,
    "int4": 0.5, "Q4_0": 0.5, "Q4_K_M": 0.5,
}  # fmt: skip
CHECKED_ROWS = 24
Times = dict[str, list[float]]


def spread(seconds: list[float]) -> dict[str, Any]:
    return {
        "median": statistics.median(seconds),
        "min": min(seconds),
        "max": max(seconds),
        "seconds": seconds,
    }


def over(peer: list[float], ours: list[float]) -> float:
    """How many times faster we are: median over rounds."""
    return statistics.median(a / b for a, b in zip(peer, ours, strict=True))


def full_pass_flops(shape: Shape, rows: int) -> int:
    """One pass with logits of all rows."""
    return pass_flops(shape, [rows] * shape.layers, rows, rows)


def distance(logits: NDArray[np.float32], reference: NDArray[np.float32]) -> float:
    """Root mean square of the difference over that of the reference; infinite if not finite."""
    if logits.shape != reference.shape or not np.isfinite(logits).all():
        return float("inf")
    difference = (logits - reference).astype(np.float64)
    return float(np.sqrt((difference**2).sum() / (reference.astype(np.float64) ** 2).sum()))


class Bench:
    """The files of one model and the engines that run it.

    Args:
        folder: Where the files are made; those that are there are taken.
        shape: Of the model.
        context: Most rows of a pass.
        threads: CPU threads of every engine.

    Raises:
        OSError: The disk has too little room.
        ValueError: The folder holds another model.
    """

    def __init__(self, folder: Path, shape: Shape, context: int, threads: int) -> None:
        self.folder, self.shape, self.context, self.threads = folder, shape, context, threads
        self.skipped: list[dict[str, str]] = []
        self.checks: list[dict[str, Any]] = []
        self.engines: dict[str, Any] = {}
        self.disagreed = False
        config = folder / "config.json"  # written last
        if not config.exists():
            write_checkpoint(folder, shape, context)
        elif json.loads(config.read_text()) != shape.config(context):
            raise ValueError(f"[peers] folder: expected this model's files, got others in {folder}")
        for old in folder.glob("logits*.npy"):
            old.unlink()

    def tokens(self, rows: int) -> list[int]:
        ids = np.random.default_rng(1).integers(FIRST_WORD, self.shape.vocab, rows)
        return [int(i) for i in ids]

    def skip(self, spec: Spec, reason: str) -> None:
        row = {"engine": spec.engine, "type": spec.kind, "reason": reason}
        if row not in self.skipped:
            self.skipped.append(row)
            print(f"[peers] {spec.label} is skipped: {reason}", file=sys.stderr)

    def ours(self, *kinds: str) -> list[Spec]:
        return [Spec("bicache", kind, self.folder) for kind in kinds]

    def peers(self) -> list[Spec]:
        """llama.cpp's and PyTorch's types; makes the files that are not there."""
        found = [Spec("torch", kind, self.folder) for kind in TORCH]
        for kind in (*WRITTEN, *QUANTISED):
            spec = Spec("llama", kind, self.folder / f"{kind}.gguf")
            if find_spec("llama_cpp") is None:
                self.skip(spec, "ModuleNotFoundError: No module named 'llama_cpp'")
            elif spec.path.exists() or self.make(spec):
                found.append(spec)
        return found

    def make(self, spec: Spec) -> bool:
        unfinished = spec.path.with_suffix(".part")
        if spec.kind in WRITTEN:
            write_gguf(self.folder, unfinished, spec.kind)
        else:
            script = Path(__file__).with_name("peer_llama.py")
            source = self.folder / "BF16.gguf"
            done = subprocess.run(
                [sys.executable, script, source, unfinished, spec.kind, str(self.threads)],
                capture_output=True, text=True,
            )  # fmt: skip
            if done.returncode != 0:
                self.skip(spec, done.stderr.strip().split("\n")[-1])
                return False
        unfinished.rename(spec.path)
        return True

    @contextmanager
    def running(self, specs: list[Spec], rows: tuple[int, ...]) -> Iterator[list[Worker]]:
        """Those engines that start and whose logits at so many rows agree with our f32's."""
        workers: list[Worker] = []
        try:
            for spec in specs:
                worker = self.start(spec, rows)
                if worker is not None:
                    workers.append(worker)
            yield workers
        finally:
            for worker in workers:
                worker.close()

    def start(self, spec: Spec, rows: tuple[int, ...]) -> Worker | None:
        try:
            worker = Worker(spec, self.threads, self.context)
        except EngineError as error:
            self.skip(spec, str(error))
            return None
        self.engines[spec.label] = worker.about
        try:
            if self.agrees(worker, rows):
                return worker
        except EngineError as error:
            self.skip(spec, str(error))
        worker.close()
        return None

    def agrees(self, worker: Worker, rows: tuple[int, ...]) -> bool:
        """Whether its logits are those of the first engine ever run, which is our f32."""
        spec = worker.spec
        for n in dict.fromkeys(rows):
            reference = self.folder / f"logits{n}.npy"
            saved = self.folder / "logits.npy" if reference.exists() else reference
            worker.call("forward", tokens=self.tokens(n), save=str(saved))
            error = distance(np.load(saved), np.load(reference))
            tolerance = TOLERANCE[spec.kind]
            check = {"engine": spec.engine, "type": spec.kind, "rows": n, "error": error}
            if check not in self.checks:
                self.checks.append(check)
            if not error <= tolerance:
                self.disagreed = True
                self.skip(
                    spec, f"logits of {n} rows: expected within {tolerance} of ours, got {error}"
                )
                return False
        return True

    def times(self, workers: list[Worker], rows: int, rounds: int) -> Times:
        """Seconds per engine and round; few rows: the median of several passes in a row."""
        tokens, seconds = self.tokens(rows), Times()
        for _ in range(rounds + 1):
            for worker in workers:
                took = worker.call("forward", tokens=tokens, times=max(1, min(5, 160 // rows)))
                seconds.setdefault(worker.spec.label, []).append(took["seconds"])
        return {label: all_[1:] for label, all_ in seconds.items()}  # the first warms up

    def forward(self, workers: list[Worker], rows: int, rounds: int) -> dict[str, Any]:
        times, flops = self.times(workers, rows, rounds), full_pass_flops(self.shape, rows)
        median = {label: statistics.median(seconds) for label, seconds in times.items()}
        peers = [label for label in times if not label.startswith("bicache")]
        best = min(peers, key=median.__getitem__, default=None)
        return {
            "rows": rows,
            "flops": flops,
            "best_peer": best,
            "engines": [
                {
                    "engine": worker.spec.engine,
                    "type": worker.spec.kind,
                    "time": spread(times[worker.spec.label]),
                    "gflops": flops / median[worker.spec.label] / 1e9,
                    "speed_over": {
                        label: over(times[label], times[worker.spec.label]) for label in peers
                    },
                }
                for worker in workers
            ],
        }

    def blas(self, rows: int, rounds: int) -> list[dict[str, Any]]:
        """The same pass in f32 by OpenBLAS, with and without a variable that slows it down."""
        settings = {"unset": {}, "Haswell": {"OPENBLAS_CORETYPE": "Haswell"}}
        specs = [Spec("bicache blas", "f32", self.folder, env) for env in settings.values()]
        found = {}
        with self.running([*self.ours("f32"), *specs], (CHECKED_ROWS,)) as workers:
            if len(workers) == 3:
                seconds: list[list[float]] = [[], [], []]
                for _ in range(rounds + 1):
                    for times, worker in zip(seconds, workers, strict=True):
                        took = worker.call("forward", tokens=self.tokens(rows))
                        times.append(took["seconds"])
                found = dict(zip(["packed", *settings], (s[1:] for s in seconds), strict=True))
        return [
            {"openblas_coretype": None if name == "packed" else name, "rows": rows,
             "backend": "packed" if name == "packed" else "blas", "time": spread(times),
             "packed_over": over(times, found["packed"])}
            for name, times in found.items()
        ]  # fmt: skip
