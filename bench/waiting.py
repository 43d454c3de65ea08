"""How threads wait at barriers: spinning long, short, or not at all; on an idle and a busy machine.

    python bench/waiting.py > bench/results/waiting.json

Each cell is a fresh process, because the OpenMP runtime reads its environment once. "busy": one
process per CPU that only counts. Median of interleaved rounds; seconds are of this machine, the
ratios are what the documents quote.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys

ROUNDS = 5
PLAY = """
import json, time, bicache
llm = bicache.LLM("records", threads={threads})
lines = (llm.path / "questions.jsonl").read_text().splitlines()
asked = [json.loads(line) for line in lines[:{count}]]
prompts, prefixes = [q["prompt"] for q in asked], [q["prefix"] for q in asked]
llm.generate(prompts[:1], prefix=prefixes[:1])
begin = time.perf_counter()
llm.generate(prompts, prefix=prefixes)
print(time.perf_counter() - begin)
"""
WAITING: dict[str, dict[str, str]] = {
    "long spins": {"GOMP_SPINCOUNT": "300000"},  # libgomp's default
    "short spins": {},  # bicache's default
    "no spins": {"OMP_WAIT_POLICY": "passive"},
}
COUNTS = {"one request": 1, "16 requests": 16}


def play(threads: int, count: int, waiting: str) -> float:
    code = PLAY.format(threads=threads, count=count)
    env = os.environ | WAITING[waiting]
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, check=True)
    return float(done.stdout)


def measure(threads: int) -> list[dict[str, object]]:
    rows = []
    for name, count in COUNTS.items():
        seconds: dict[str, list[float]] = {waiting: [] for waiting in WAITING}
        alone = []
        for _ in range(ROUNDS):
            alone.append(play(1, count, "no spins"))
            for waiting, times in seconds.items():
                times.append(play(threads, count, waiting))
        base = statistics.median(alone)
        rows.append({"work": name, "one_thread_seconds": base})
        for waiting, times in seconds.items():
            rows[-1][waiting] = {
                "seconds": statistics.median(times),
                "speed_of_one_thread": base / statistics.median(times),
            }
    return rows


def main() -> None:
    threads = len(os.sched_getaffinity(0))
    report: dict[str, object] = {"threads": threads, "rounds": ROUNDS, "idle": measure(threads)}
    load = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(threads)]
    try:
        report["busy"] = measure(threads)
    finally:
        for process in load:
            process.kill()
    json.dump(report, sys.stdout, indent=1)
    print()


if __name__ == "__main__":
    main()
