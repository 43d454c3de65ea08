"""FLOPs that caching saves at LLaDA-8B's sizes, predicted; and counted on a narrower model.

    python bench/caching_flops.py > bench/results/caching_flops.json

The lengths and refresh intervals are those that dLLM-Cache publishes for LLaDA-8B. "loop" is the
published loop without a cache, which runs the output head over every row; `none` runs it over the
masked rows of the block. The small model keeps LLaDA-8B's layers and the proportions of its
matrices; a whole request runs on it under every policy, and what the engine counts must equal what
was predicted, or the script fails.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import bicache
import numpy as np
from random_model import FIRST_WORD, Shape, write_checkpoint

LLADA_8B = Shape(layers=32, dim=4096, heads=32, ffn=12288, vocab=126464)
SCALE = 32  # of the widths
DEPTH = 16  # of BiCache in LLaDA-8B at three quarters of prefix rows; see bicache_speed.py
MODEL = "llada-8b"


@dataclass(frozen=True)
class Workload:
    """Lengths of one request, and the intervals published for it."""

    name: str
    prompt: int
    response: int
    steps: int
    block: int
    kp: int
    kr: int
    ratio: float = 0.25

    @property
    def shared(self) -> int:
        """Prompt tokens taken as a shared prefix, where a policy reuses one: three quarters."""
        return 3 * self.prompt // 4

    def options(self) -> dict[str, int]:
        return {"steps": self.steps, "block_length": self.block}

    def policies(self) -> dict[str, str]:
        """What is reused -> cache string."""
        dllm = (
            f"dllm_cache:prompt_interval_steps={self.kp},gen_interval_steps={self.kr},"
            f"transfer_ratio={self.ratio}"
        )
        shared = f"bicache:depth={DEPTH},refresh_steps={self.kp}"
        return {
            "dllm_cache": dllm,
            "fast_dllm, prefix": "fast_dllm:mode=prefix",
            "fast_dllm, dual": "fast_dllm:mode=dual",
            "bicache": shared,
            "bicache + dllm_cache": f"{shared}+{dllm}",
            "bicache + fast_dllm, dual": f"{shared}+fast_dllm:mode=dual",
        }


WORKLOADS = (
    Workload("GSM8K", 893, 256, 256, 8, 50, 7),
    Workload("HumanEval", 150, 512, 512, 32, 50, 8),
    Workload("LongBench-HotpotQA", 4064, 32, 32, 32, 100, 8),
)


def predicted(config: Any, load: Workload) -> bicache.CostPlan:
    """Of every policy, for a request whose prefix entry is in the store already."""
    return bicache.plan(
        config, list(load.policies().values()), prompt_len=load.prompt, gen_len=load.response,
        prefix_len=load.shared, **load.options(),
    )  # fmt: skip


def counted(llm: bicache.LLM, load: Workload, cache: str) -> int:
    """FLOPs of one request, without its prefix entry."""
    ids = np.random.default_rng(1).integers(FIRST_WORD, llm.config.vocab, load.prompt).tolist()
    [out] = llm.generate(
        [ids[load.shared :]], prefix=ids[: load.shared], cache=cache, gen_length=load.response,
        **load.options(),
    )  # fmt: skip
    return out.stats.flops


def measure(small: bicache.LLM, load: Workload) -> dict[str, Any]:
    """One workload: ratios at full size, and the small model's counts against its prediction."""
    large, model = predicted(MODEL, load), predicted(small.config, load)
    rows = []
    for what, at_large, at_small in zip(load.policies(), large.costs, model.costs, strict=True):
        count = counted(small, load, at_small.cache)
        if count != at_small.flops:
            sys.exit(
                f"[caching_flops] {load.name}, {what}: expected {at_small.flops} FLOPs, got {count}"
            )
        rows.append(
            {
                "reuse": what,
                "policy": at_large.cache,
                "flops": at_large.flops,
                "over_none": at_large.none_ratio,
                "over_loop": at_large.vanilla_ratio,
                "small_flops_counted": count,
                "small_flops_predicted": at_small.flops,
                "small_over_none": at_small.none_ratio,
            }
        )
        print(f"{load.name}, {what}: {at_large.none_ratio:.2f}x", file=sys.stderr)
    return {
        "name": load.name,
        "prompt": load.prompt,
        "shared": load.shared,
        "response": load.response,
        "steps": load.steps,
        "block_length": load.block,
        "none_flops": large.none_flops,
        "loop_flops": large.vanilla_flops,
        "policies": rows,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--small", action="store_true", help="short requests, to test the script")
    args = parser.parse_args()
    full = LLADA_8B
    shape = Shape(
        full.layers, full.dim // SCALE, full.heads // SCALE, full.ffn // SCALE, full.vocab // SCALE
    )
    loads = WORKLOADS
    if args.small:
        loads = (Workload("short", 40, 16, 16, 8, 5, 3),)
    context = max(load.prompt + load.response for load in loads)
    try:
        with tempfile.TemporaryDirectory(prefix="caching_flops") as folder:
            write_checkpoint(Path(folder), shape, context)
            llm = bicache.LLM(folder)
    except OSError as error:
        sys.exit(str(error))
    report = {
        "model": MODEL,
        "scale": SCALE,
        "depth": DEPTH,
        "workloads": [measure(llm, load) for load in loads],
    }
    json.dump(report, sys.stdout, indent=1)
    print()


if __name__ == "__main__":
    main()
