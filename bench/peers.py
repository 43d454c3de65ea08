"""bicache against llama.cpp and PyTorch: the same random-weight model, one run, same threads.

    python bench/peers.py > bench/results/peers.json

Needs torch and llama-cpp-python, the latter compiled for this machine:

    CMAKE_ARGS=-DGGML_NATIVE=ON CXXFLAGS="-include $PWD/bench/amx_memory.h" \\
        pip install --no-binary llama-cpp-python llama-cpp-python

(that header because GCC 12 compiles llama.cpp's AMX kernels so that they crash). An engine that is
missing is listed with the reason under "skipped". So is one whose logits are not those of our f32:
its speed is not reported, and the exit status is 1.

1. One forward pass with logits of all rows, at several lengths.
2. One request of 512 + 128 tokens in 128 steps. llama.cpp and PyTorch have no cache: a step is a
   forward pass over all 640 rows; a pass is timed and multiplied, choosing tokens is free. Ours are
   whole requests, but `none`, whose steps are alike: a few of them are timed and multiplied.
   Random weights say nothing about answers: agreement with `none` is shown, but thresholds stand
   for speed only.

Every engine runs in a process of its own; rounds go through all of them in turn. Writes 6 GB into
a temporary folder (TMPDIR says where) and removes them, or into --folder for the next run; takes 17
GB of memory.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import Any

from kernels import cpu
from peer_worker import EngineError
from peers_bench import CHECKED_ROWS, OURS, Bench
from peers_request import Request
from random_model import MID, SMALL

LENGTHS = (512, 256, 64, 32, 8)
GENERATED = ("bf16", "int8", "int4")  # f32 adds half an hour


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rounds", type=int, default=5, help="default 5")
    parser.add_argument("--lengths", help="of the passes, default 512,256,64,32,8")
    parser.add_argument(
        "--generate", default=",".join(GENERATED), metavar="TYPES",
        help='our types that generate, default %(default)s; "": no generation',
    )  # fmt: skip
    parser.add_argument(
        "--folder", type=Path, help="where the files go and stay; default: a temporary one"
    )
    parser.add_argument("--picture", type=Path, help="also draw it: a .png or .svg file")
    parser.add_argument("--small", action="store_true", help="a tiny model, to test the script")
    args = parser.parse_args()
    default = (24, 8) if args.small else LENGTHS
    try:
        args.lengths = tuple(map(int, args.lengths.split(","))) if args.lengths else default
        if args.rounds < 1 or min(args.lengths) < 1:
            raise ValueError
    except ValueError:
        sys.exit(
            f"[peers] rounds, lengths: expected at least 1, got {args.rounds} and {args.lengths}"
        )
    args.generate = tuple(filter(None, args.generate.split(",")))
    return args


def place(folder: Path | None) -> AbstractContextManager[str]:
    if folder is None:
        return tempfile.TemporaryDirectory(prefix="peers")
    folder.mkdir(parents=True, exist_ok=True)
    return nullcontext(str(folder))


def measure(bench: Bench, args: argparse.Namespace) -> dict[str, Any]:
    longest = max(args.lengths)
    p, g, block = (24, 16, 8) if args.small else (512, 128, 32)
    specs = [*bench.ours(*OURS), *bench.peers()]
    with bench.running(specs, (CHECKED_ROWS, longest)) as workers:
        forward = [bench.forward(workers, rows, args.rounds) for rows in args.lengths]
    return {
        "forward": forward,
        "blas": bench.blas(longest, args.rounds),
        "generation": Request(bench, p, g, block).measure(args.generate, args.rounds)
        if args.generate
        else None,
    }


def main() -> None:
    args = arguments()
    shape, context = (SMALL, 40) if args.small else (MID, 640)
    threads = len(os.sched_getaffinity(0))
    try:
        with place(args.folder) as folder:
            bench = Bench(Path(folder), shape, max(context, *args.lengths), threads)
            results = measure(bench, args)
    except (OSError, ValueError, EngineError) as error:
        sys.exit(str(error))
    report = {
        "model": asdict(shape),
        "threads": threads,
        "cpu": cpu(),
        "rounds": args.rounds,
        "engines": bench.engines,
        "skipped": bench.skipped,
        "checks": bench.checks,
        **results,
    }
    json.dump(report, sys.stdout, indent=1)
    print()
    if args.picture:
        from peers_table import draw

        draw(report, args.picture)
    sys.exit(1 if bench.disagreed else None)


if __name__ == "__main__":
    main()
