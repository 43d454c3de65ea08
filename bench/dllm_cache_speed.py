"""dLLM-Cache's wall-clock speed against the speed its saved work allows, on random weights.

    python bench/dllm_cache_speed.py > bench/results/dllm_cache_speed.json

One request with the lengths of the published GSM8K setting (P = 893, G = 256, blocks of 8, 256
steps; refresh intervals 50 and 7, transfer ratio .25). Every step of a request under `dllm_cache`
is timed, and a few under `none`, which are all alike but for a few rows of the output head; rounds
alternate. Steps fall into four kinds, by what they refresh; for each: how many FLOPs a second
it reaches, and where the rest of the allowed speed is lost.

Makes a checkpoint of 1.1 GB in a temporary folder (TMPDIR says where) and removes it.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import bicache
import numpy as np
from bicache import _core
from random_model import FIRST_WORD, MID, SMALL, Shape, write_checkpoint

KP, KR, RATIO = 50, 7, 0.25
CACHE = f"dllm_cache:prompt_interval_steps={KP},gen_interval_steps={KR},transfer_ratio={RATIO}"


def kind(step: int) -> str:
    """What a step refreshes."""
    parts = [name for name, every in (("prompt", KP), ("response", KR)) if step % every == 0]
    return " and ".join(parts) or "chosen rows only"


def kind_flops(shape: Shape, what: str, p: int, g: int) -> int:
    """One step without the output head; 2 per multiply-add."""
    keys, chosen = p + g, int(g * RATIO)
    row = 2 * (4 * shape.dim**2 + 3 * shape.dim * shape.ffn) + 4 * keys * shape.dim
    prompt = p if "prompt" in what else 0
    whole = prompt + g
    if "response" in what:
        return shape.layers * whole * row
    value_only = 2 * (g - chosen) * shape.dim**2
    return whole * row + (shape.layers - 1) * ((prompt + chosen) * row + value_only)


class Bench:
    """Rounds of one request under `none` and under dllm_cache."""

    def __init__(self, llm: bicache.LLM, shape: Shape, p: int, g: int) -> None:
        self.llm, self.shape, self.p, self.g = llm, shape, p, g
        self.ids = np.random.default_rng(1).integers(FIRST_WORD, shape.vocab, p).tolist()
        self.options = {"gen_length": g, "steps": g, "block_length": 8}

    def step_seconds(self, cache: str, steps: int) -> list[float]:
        """Wall time of each of the first `steps` steps."""
        seconds: list[float] = []
        begin = time.perf_counter()
        for _ in self.llm.stream(self.ids, cache=cache, **self.options):
            now = time.perf_counter()
            seconds.append(now - begin)
            begin = now
            if len(seconds) == steps:
                break
        return seconds

    def predicted(self, cache: str) -> int:
        """FLOPs of the whole request."""
        plan = _core.forecast(
            self.llm.config, _core.make_policy(cache), prompt_len=self.p, options=self.options,
            dtype=self.llm.dtype,
        )  # fmt: skip
        return int(plan["flops"])

    def check_counts(self) -> dict[str, int]:
        """A whole request's FLOPs as the engine counts them; they must be those predicted."""
        [out] = self.llm.generate([self.ids], cache=CACHE, **self.options)
        counted, predicted = out.stats.flops, self.predicted(CACHE)
        if counted != predicted:
            sys.exit(f"[dllm_cache_speed] FLOPs: expected {predicted}, got {counted}")
        return {"flops_counted": counted, "flops_predicted": predicted}

    def measure(self, rounds: int, none_steps: int) -> dict[str, Any]:
        counts = self.check_counts()  # warms up, too
        none: list[list[float]] = []
        ours: list[list[float]] = []
        for _ in range(rounds):
            none.append(self.step_seconds("none", none_steps))
            ours.append(self.step_seconds(CACHE, self.g))
        per_step = [statistics.median(seconds[1:]) for seconds in none]
        speeds = [a / statistics.mean(b) for a, b in zip(per_step, ours, strict=True)]
        allowed = self.predicted("none") / counts["flops_predicted"]
        rate = self.predicted("none") / self.g / statistics.median(per_step)
        return {
            **counts,
            "none_flops_predicted": self.predicted("none"),
            "none_seconds_per_step": per_step,
            "seconds": [sum(seconds) for seconds in ours],
            "speed": statistics.median(speeds),
            "allowed": allowed,
            "efficiency": statistics.median(speeds) / allowed,
            "kinds": [self.one_kind(what, ours, rate) for what in self.kinds()],
        }

    def kinds(self) -> list[str]:
        return sorted({kind(step) for step in range(self.g)}, key=len)

    def one_kind(self, what: str, rounds: list[list[float]], none_rate: float) -> dict[str, Any]:
        steps = [step for step in range(self.g) if kind(step) == what]
        seconds = [statistics.median(run[step] for step in steps) for run in rounds]
        flops = kind_flops(self.shape, what, self.p, self.g)
        total = statistics.median(sum(run[step] for step in steps) for run in rounds)
        return {
            "refreshes": what,
            "steps": len(steps),
            "flops": flops,
            "rate_over_none": flops / statistics.median(seconds) / none_rate,
            "share_of_time": total / statistics.median(sum(run) for run in rounds),
        }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rounds", type=int, default=3, help="default 3")
    parser.add_argument("--none-steps", type=int, default=4, help="timed, beside one to warm up")
    parser.add_argument("--small", action="store_true", help="a tiny model, to test the script")
    args = parser.parse_args()
    for name, least in (("rounds", 1), ("none_steps", 2)):
        if getattr(args, name) < least:
            sys.exit(
                f"[dllm_cache_speed] {name}: expected at least {least}, got {getattr(args, name)}"
            )
    shape, p, g = (SMALL, 90, 64) if args.small else (MID, 893, 256)
    try:
        with tempfile.TemporaryDirectory(prefix="dllm_cache_speed") as folder:
            write_checkpoint(Path(folder), shape, p + g)
            llm = bicache.LLM(folder)
        result = Bench(llm, shape, p, g).measure(args.rounds, args.none_steps)
    except OSError as error:
        sys.exit(str(error))
    report = {
        "model": asdict(shape),
        "dtype": llm.dtype,
        "threads": llm.threads,
        "isa": _core.isa(),
        "openblas_coretype_set": "OPENBLAS_CORETYPE" in os.environ,
        "prompt": p,
        "response": g,
        "cache": CACHE,
        "rounds": args.rounds,
        "none_steps": args.none_steps,
        "result": result,
    }
    json.dump(report, sys.stdout, indent=1)
    print()


if __name__ == "__main__":
    main()
