"""An engine in a process of its own, driven by lines of JSON: the workers of bench/peers.py.

Each engine brings its own OpenMP or MKL, and reads its environment once; in one process they would
disturb one another. Only what the engine does is timed, inside its process.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

# What a caller's environment may hold that would slow one side down.
HANDICAPS = ("OPENBLAS_CORETYPE", "OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")
SETTLE_SECONDS = 0.05  # until the threads of the engine before have stopped spinning


class EngineError(RuntimeError):
    """An engine that is missing, refuses the model or died; says why."""


class Bicache:
    """bicache, as the other engines are driven."""

    def __init__(self, folder: Path, kind: str, threads: int, backend: str = "packed") -> None:
        import bicache

        self.core = bicache._core
        self.llm = bicache.LLM(folder, dtype=kind, threads=threads, backend=backend)

    def about(self) -> dict[str, Any]:
        return {"isa": self.core.isa(), "dtype": self.llm.dtype, "backend": self.llm.backend}

    def prepare(self, tokens: Sequence[int]) -> NDArray[np.int32]:
        return np.asarray(tokens, np.int32)

    def forward(self, tokens: NDArray[np.int32]) -> NDArray[np.float32]:
        return self.llm.forward(tokens)

    def array(self, logits: NDArray[np.float32]) -> NDArray[np.float32]:
        return logits

    def generate(self, prompt: list[int], cache: str, options: dict[str, Any]) -> dict[str, Any]:
        """A whole request."""
        begin = time.perf_counter()
        [out] = self.llm.generate([prompt], cache=cache, **options)
        return {
            "seconds": time.perf_counter() - begin,
            "tokens": out.tokens.tolist(),
            "confidences": out.confidences.tolist(),
            "rows": out.stats.rows,
            "head_rows": out.stats.head_rows,
            "flops": out.stats.flops,
            "steps": out.stats.steps,
            "passes": out.stats.passes,
        }

    def steps(self, prompt: list[int], cache: str, options: dict[str, Any], count: int) -> float:
        """Seconds of one of the first `count` steps after the first."""
        times = []
        for _ in self.llm.stream(prompt, cache=cache, **options):
            times.append(time.perf_counter())
            if len(times) == count + 1:
                break
        return (times[-1] - times[0]) / (len(times) - 1)


def engine(name: str, path: Path, kind: str, threads: int, context: int) -> Any:
    """Loads one: "bicache", "bicache blas", "llama" or "torch"."""
    if name.startswith("bicache"):
        return Bicache(path, kind, threads, "blas" if name.endswith("blas") else "packed")
    if name == "llama":
        from peer_llama import Llama

        return Llama(path, threads, context)
    from peer_torch import Torch

    return Torch(path, kind, threads)


def answer(running: Any, request: dict[str, Any]) -> dict[str, Any]:
    what = request.pop("do")
    if what == "generate":
        return dict(running.generate(**request))
    if what == "steps":
        return {"seconds": running.steps(**request)}
    prepared, seconds = running.prepare(request["tokens"]), []
    for _ in range(request.get("times", 1)):
        begin = time.perf_counter()
        logits = running.forward(prepared)
        seconds.append(time.perf_counter() - begin)
    if "save" in request:
        np.save(request["save"], running.array(logits))
    return {"seconds": sorted(seconds)[len(seconds) // 2]}


def serve() -> None:
    """Answers every line of stdin; what libraries print goes to stderr."""
    replies = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)

    def reply(values: dict[str, Any]) -> None:
        replies.write(json.dumps(values) + "\n")
        replies.flush()

    try:
        name, path, kind, threads, context = sys.argv[1:]
        running = engine(name, Path(path), kind, int(threads), int(context))
        reply({"about": running.about()})
        for line in sys.stdin:
            reply(answer(running, json.loads(line)))
    except Exception as error:  # whatever it is, the parent says it
        reply({"error": f"{type(error).__name__}: {error}".strip().split("\n")[0]})


@dataclass(frozen=True)
class Spec:
    """An engine, its number type, and what it loads."""

    engine: str
    kind: str
    path: Path
    env: Mapping[str, str] = field(default_factory=dict)

    @property
    def label(self) -> str:
        return f"{self.engine} {self.kind}"


class Worker:
    """A running engine.

    Raises:
        EngineError: It does not start.
    """

    def __init__(self, spec: Spec, threads: int, context: int) -> None:
        self.spec = spec
        self.errors = tempfile.TemporaryFile()
        env = {name: value for name, value in os.environ.items() if name not in HANDICAPS}
        command = [sys.executable, __file__, spec.engine, str(spec.path), spec.kind]
        self.process = subprocess.Popen(
            [*command, str(threads), str(context)], env=env | dict(spec.env), text=True,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self.errors,
        )  # fmt: skip
        try:
            self.about: dict[str, Any] = self._reply()["about"]
        except EngineError:
            self.close()
            raise

    def call(self, do: str, **request: Any) -> dict[str, Any]:
        """Raises: EngineError: It died, or says why not."""
        assert self.process.stdin is not None
        time.sleep(SETTLE_SECONDS)
        self.process.stdin.write(json.dumps({"do": do, **request}) + "\n")
        self.process.stdin.flush()
        return self._reply()

    def _reply(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            code = self.process.wait()
            self.errors.seek(0)
            said = self.errors.read().decode(errors="replace").strip().split("\n")[-1]
            raise EngineError(f"it ended with {code}: {said}")
        reply: dict[str, Any] = json.loads(line)
        if "error" in reply:
            raise EngineError(reply["error"])
        return reply

    def close(self) -> None:
        assert self.process.stdin is not None and self.process.stdout is not None
        self.process.stdin.close()
        self.process.stdout.close()
        self.process.wait()
        self.errors.close()


if __name__ == "__main__":
    serve()
