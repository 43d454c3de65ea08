"""BiCache's wall-clock speed against the speed its saved work allows, on a random-weight model.

    python bench/bicache_speed.py > bench/results/bicache_speed.json

BiCache joins two mechanisms: reuse *within a request* (all layers, between two refreshes) and
reuse *across requests* (shallow layers, from the prefix entry). Each alone and both, against
`none`, where the prefix is a share r of the request. A policy's allowed speed is none's FLOPs over
its own, as the engine counts them; the counts must equal a prediction made here, or the script
fails. Speeds are those of one request after another, with the prefix entry already made.

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
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import bicache
import numpy as np
from bicache import _core
from random_model import FIRST_WORD, MID, SMALL, Shape, pass_flops, write_checkpoint

RATIOS = (0.5, 0.77, 0.9)  # shared-prefix rows over all rows
GEN_LENGTH, STEPS, NONE_STEPS = 32, 16, 4  # one block; STEPS and NONE_STEPS divide GEN_LENGTH
WITHIN = f"bicache:depth=0,refresh_steps={STEPS}"

# Depths measured on LLaDA-8B by running the official profiler (threshold 0.97): from that
# percentage of prefix rows on, so many of its 32 layers.
LLADA_LAYERS = 32
LLADA_DEPTHS = {
    0: 1, 5: 2, 10: 3, 13: 5, 15: 7, 20: 8, 21: 9, 30: 10, 49: 11, 54: 13, 66: 14, 68: 15, 73: 16,
    87: 17, 93: 18, 95: 19, 97: 20, 98: 22, 99: 32,
}  # fmt: skip


@dataclass(frozen=True)
class Split:
    """One request: p rows of shared prefix, u of its own prompt, g to generate."""

    r: float
    p: int
    u: int
    g: int

    @classmethod
    def of(cls, r: float, rows: int) -> Split:
        p = round(r * rows)
        return cls(r, p, rows - p - GEN_LENGTH, GEN_LENGTH)

    @property
    def n(self) -> int:
        return self.p + self.u + self.g

    def depth(self, layers: int) -> int:
        """LLaDA's depth at this share of prefix rows, scaled to `layers`, at least 1."""
        percent = round(100 * self.p / self.n)
        found = LLADA_DEPTHS[max(at for at in LLADA_DEPTHS if at <= percent)]
        return max(1, round(found * layers / LLADA_LAYERS))


def request_flops(shape: Shape, split: Split, steps: int, depth: int, refresh_steps: int) -> int:
    """All passes: the prefix runs in the layers from `depth` on, every `refresh_steps`."""
    suffix, total = split.n - split.p, 0
    for step in range(steps):
        rows = [suffix] * shape.layers
        if step % refresh_steps == 0:
            rows = [suffix + (split.p if layer >= depth else 0) for layer in range(shape.layers)]
        masked = split.g - step * (split.g // steps)
        total += pass_flops(shape, rows, split.n, masked)
    return total


def expect(what: str, predicted: int, counted: int) -> None:
    if predicted != counted:
        sys.exit(f"[bicache_speed] FLOPs of {what}: expected {predicted}, got {counted}")


class Bench:
    """Rounds of requests of one split under every policy."""

    def __init__(self, llm: bicache.LLM, shape: Shape, split: Split) -> None:
        self.llm, self.shape, self.split = llm, shape, split
        ids = np.random.default_rng(1).integers(FIRST_WORD, shape.vocab, split.p + split.u)
        self.prefix, self.prompt = ids[: split.p].tolist(), ids[split.p :].tolist()
        b = split.depth(shape.layers)
        # reuse -> policy, steps, depth, refresh_steps
        self.policies = {
            "nothing is reused": ("none", NONE_STEPS, 0, 1),
            "within a request only": (WITHIN, STEPS, 0, STEPS),
            "across requests only": (f"bicache:depth={b},refresh_steps=1", STEPS, b, 1),
            "both": (f"bicache:depth={b},refresh_steps={STEPS}", STEPS, b, STEPS),
        }

    def request(self, policy: str, steps: int) -> tuple[float, bicache.RequestStats]:
        begin = time.perf_counter()
        [out] = self.llm.generate(
            [self.prompt], prefix=self.prefix, cache=policy, gen_length=self.split.g,
            block_length=self.split.g, steps=steps,
        )  # fmt: skip
        return time.perf_counter() - begin, out.stats

    def warm(self) -> dict[str, Any]:
        """Makes the prefix entry, by a request of one step that nobody times."""
        policy, _, depth, _ = self.policies["both"]
        seconds, stats = self.request(policy, 1)
        p = self.split.p
        predicted = pass_flops(self.shape, [p] * depth, p, 0)
        expect(f"the prefix entry at r = {self.split.r}", predicted, stats.entry_flops)
        return {
            "layers": depth,
            "flops_counted": stats.entry_flops,
            "flops_predicted": predicted,
        }

    def measure(self, rounds: int) -> dict[str, Any]:
        entry = self.warm()
        seconds: dict[str, list[float]] = {reuse: [] for reuse in self.policies}
        counted, predicted = {}, {}
        for _ in range(rounds):
            for reuse, (policy, steps, depth, refresh_steps) in self.policies.items():
                took, stats = self.request(policy, steps)
                seconds[reuse].append(took)
                counted[reuse] = stats.flops + stats.entry_flops
                predicted[reuse] = request_flops(
                    self.shape, self.split, steps, depth, refresh_steps
                )
                expect(f"{policy} at r = {self.split.r}", predicted[reuse], counted[reuse])
        rows = []
        for reuse, (policy, steps, depth, _) in self.policies.items():
            per_step = statistics.median(seconds[reuse]) / steps
            row = {
                "reuse": reuse,
                "policy": policy,
                "depth": None if policy == "none" else depth,
                "steps": steps,
                "flops_counted": counted[reuse],
                "flops_predicted": predicted[reuse],
                "seconds": seconds[reuse],
                "tokens_per_second": self.split.g / STEPS / per_step,
            }
            for name, base in (
                ("none", "nothing is reused"),
                ("within", "within a request only"),
            ):
                base_steps = self.policies[base][1]
                speed = statistics.median(
                    (a / base_steps) / (b / steps)
                    for a, b in zip(seconds[base], seconds[reuse], strict=True)
                )
                allowed = (counted[base] / base_steps) / (counted[reuse] / steps)
                row[f"over_{name}"] = {
                    "speed": speed,
                    "allowed": allowed,
                    "efficiency": speed / allowed,
                }
            rows.append(row)
        return {**asdict(self.split), "entry": entry, "policies": rows}


def splits(rows: int) -> list[Split]:
    """One per ratio.

    Raises:
        ValueError: The rows do not hold prefix, response and a prompt of one token.
    """
    found = [Split.of(r, rows) for r in RATIOS]
    for split in found:
        if split.p < 1 or split.u < 1:
            raise ValueError(
                f"[bicache_speed] rows: expected at least 1 of prefix, 1 of prompt and "
                f"{GEN_LENGTH} to generate at r = {split.r}, got {rows} in all"
            )
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rows", type=int, default=512, help="of one request, default 512")
    parser.add_argument("--rounds", type=int, default=3, help="default 3")
    parser.add_argument("--dtype", default="auto", help="how weights are held; default: bf16")
    parser.add_argument("--small", action="store_true", help="a tiny model, to test the script")
    args = parser.parse_args()
    shape = SMALL if args.small else MID
    try:
        if args.rounds < 1:
            raise ValueError(f"[bicache_speed] rounds: expected at least 1, got {args.rounds}")
        requests = splits(args.rows)
        with tempfile.TemporaryDirectory(prefix="bicache_speed") as folder:
            write_checkpoint(Path(folder), shape, args.rows)
            llm = bicache.LLM(folder, dtype=args.dtype)
        results = [Bench(llm, shape, split).measure(args.rounds) for split in requests]
    except (ValueError, OSError) as error:
        sys.exit(str(error))
    report = {
        "model": asdict(shape),
        "dtype": llm.dtype,
        "threads": llm.threads,
        "isa": _core.isa(),
        "openblas_coretype_set": "OPENBLAS_CORETYPE" in os.environ,
        "rows": args.rows,
        "steps": STEPS,
        "none_steps": NONE_STEPS,
        "rounds": args.rounds,
        "results": results,
    }
    json.dump(report, sys.stdout, indent=1)
    print()


if __name__ == "__main__":
    main()
