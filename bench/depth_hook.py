"""What a Python depth function costs, on the shipped model.

    python bench/depth_hook.py > bench/results/depth_hook.json

The same request with depth=5 and with a function that says 5, asked at every one of its 8 steps,
one after the other; the median difference of the pairs, in a request of its own and in a batch.
"""

from __future__ import annotations

import json
import sys
import time
from typing import Any

import bicache
import numpy as np
from bicache import _core

OPTIONS: dict[str, Any] = {"gen_length": 8, "steps": 8, "block_length": 8}
PAIRS = 400


def depth(info: bicache.RequestInfo) -> int:
    return 5 if info.ratio > 0 else 0


def measure(llm: bicache.LLM, batch: int) -> dict[str, Any]:
    prompts = ["which of them are red ?"] * batch
    document = "red fox, blue owl, green bear, red hare, black crow, white swan, gold deer"

    def seconds(rule: Any) -> float:
        cache = bicache.BiCache(rule, refresh_steps=1)
        begin = time.perf_counter()
        llm.generate(prompts, prefix=document, cache=cache, **OPTIONS)
        return time.perf_counter() - begin

    for rule in (5, depth):
        seconds(rule)
    pairs = np.array([(seconds(5), seconds(depth)) for _ in range(PAIRS // batch)])
    calls = batch * OPTIONS["steps"]
    extra, step = np.median(pairs[:, 1] - pairs[:, 0]), np.median(pairs[:, 0])
    return {
        "requests_in_a_batch": batch,
        "pairs": len(pairs),
        "microseconds_per_call": 1e6 * float(extra) / calls,
        "microseconds_per_step_of_a_request": 1e6 * float(step) / calls,
        "share_of_a_step": float(extra / step),
    }


def main() -> None:
    llm = bicache.LLM("records", threads=1)
    report = {"isa": _core.isa(), "batches": [measure(llm, batch) for batch in (1, 16)]}
    json.dump(report, sys.stdout, indent=1)
    print()


if __name__ == "__main__":
    main()
