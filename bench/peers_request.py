"""One request by our policies, and as engines without a cache must run it: for bench/peers.py."""

from __future__ import annotations

import statistics
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from peer_worker import Worker
from peers_bench import CHECKED_ROWS, Bench, full_pass_flops, over, spread

DLLM_CACHE = "dllm_cache:prompt_interval_steps=50,gen_interval_steps=7,transfer_ratio=0.25"
# What is generated with, and whether a threshold may commit several tokens a step.
SETTINGS = (
    ("none", False), (DLLM_CACHE, False), ("fast_dllm", False),
    (f"{DLLM_CACHE},new_tokens=recompute", True), ("fast_dllm", True),
)  # fmt: skip
NONE_STEPS = 3  # timed, beside one to warm up


@dataclass
class Job:
    """What is timed once a round: an engine, and for ours how it generates."""

    worker: Worker
    cache: str | None = None
    threshold: float | None = None
    seconds: list[float] = field(default_factory=list)  # of the request, per round
    out: dict[str, Any] = field(default_factory=dict)  # what a whole request gave

    @property
    def names(self) -> dict[str, Any]:
        return {"engine": self.worker.spec.engine, "type": self.worker.spec.kind}


class Request:
    """A prompt of p tokens and g to generate, one a step unless a threshold allows more."""

    def __init__(self, bench: Bench, p: int, g: int, block: int) -> None:
        self.bench, self.p, self.g = bench, p, g
        self.prompt = bench.tokens(p)
        self.options = {"gen_length": g, "steps": g, "block_length": block}

    def measure(self, kinds: tuple[str, ...], rounds: int) -> dict[str, Any]:
        specs = [*self.bench.ours(*kinds), *self.bench.peers()]
        with self.bench.running(specs, (CHECKED_ROWS,)) as workers:
            ours = [w for w in workers if w.spec.engine == "bicache"]
            none = {w.spec.kind: self.generate(w, "none", None) for w in ours}
            threshold = self.threshold(list(none.values()))
            jobs = [Job(w) for w in workers if w not in ours]
            for worker in ours:
                jobs += [
                    Job(worker, cache, threshold if free else None) for cache, free in SETTINGS
                ]
            for _ in range(rounds + 1):
                for job in jobs:
                    job.seconds.append(self.run(job))
        for job in jobs:
            del job.seconds[0]  # it warmed up
            if job.cache == "none":
                job.out = none[job.worker.spec.kind]
        return self.report(jobs, none) | {"threshold": threshold}

    def threshold(self, none: list[dict[str, Any]]) -> float | None:
        """One that random weights reach for every second token or so; the first type's."""
        return statistics.median(none[0]["confidences"]) if none else None

    def generate(self, worker: Worker, cache: str, threshold: float | None) -> dict[str, Any]:
        options = self.options | ({} if threshold is None else {"threshold": threshold})
        return worker.call("generate", prompt=self.prompt, cache=cache, options=options)

    def run(self, job: Job) -> float:
        """Seconds of the request: those of a pass or a step, multiplied, or of all of it."""
        if job.cache is None:
            tokens = self.bench.tokens(self.p + self.g)
            return float(job.worker.call("forward", tokens=tokens)["seconds"]) * self.g
        if job.cache == "none":
            step = job.worker.call(
                "steps", prompt=self.prompt, cache="none", options=self.options,
                count=NONE_STEPS,
            )  # fmt: skip
            return float(step["seconds"]) * self.g
        job.out = self.generate(job.worker, job.cache, job.threshold)
        return float(job.out["seconds"])

    def report(self, jobs: list[Job], none: dict[str, Any]) -> dict[str, Any]:
        peers = [job for job in jobs if job.cache is None]
        fastest = {
            name: min(some, key=lambda job: statistics.median(job.seconds))
            for name, some in (
                ("llama", [job for job in peers if job.worker.spec.engine == "llama"]),
                ("peer", peers),
            )
            if some
        }
        return {
            "prompt": self.p,
            **self.options,
            "none_steps_timed": NONE_STEPS,
            "fastest_llama": fastest["llama"].worker.spec.label if "llama" in fastest else None,
            "fastest_peer": fastest["peer"].worker.spec.label if "peer" in fastest else None,
            "rows": [self.row(job, fastest, none) for job in jobs],
        }

    def row(self, job: Job, fastest: dict[str, Job], none: dict[str, Any]) -> dict[str, Any]:
        rows = self.bench.shape.layers * (self.p + self.g) * self.g  # nothing cached
        row = job.names | {
            "cache": job.cache,
            "threshold": job.threshold,
            "time": spread(job.seconds),
            "tokens_per_second": self.g / statistics.median(job.seconds),
            **{f"over_{name}": over(best.seconds, job.seconds) for name, best in fastest.items()},
        }
        if job.cache is None:
            flops = self.g * full_pass_flops(self.bench.shape, self.p + self.g)
            return row | {"steps": self.g, "rows_share": 1.0, "flops": flops, "agreement": None}
        same = np.equal(job.out["tokens"], none[job.worker.spec.kind]["tokens"])
        return row | {
            "steps": job.out["steps"],
            "rows_share": job.out["rows"] / rows,
            "flops": job.out["flops"],
            "agreement": float(same.mean()),
        }
