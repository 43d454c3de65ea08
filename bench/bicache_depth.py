"""How deep a prefix may be reused: accuracy, agreement and work on the shipped models.

    python bench/bicache_depth.py > bench/results/bicache_depth.json

Every cell is one model, document length (which sets the share of prefix rows), source of the
prefix's K/V and depth, over the same questions: paired. Then the depth policies, calibrated on
other documents: what each chooses and what that costs. Nothing here trains; documents are drawn
from seeds of their own by training/records.py.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from pathlib import Path
from typing import Any

import bicache
import numpy as np
from bicache import _core

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "training"))
from calibrate import LENGTHS, OPTIONS, TAU, WORDS, calibrate, draw  # noqa: E402

SEED = 40_000
MAX_LOSS = 0.018
PROBES = (0.9, 0.97, 0.99, 0.999)


class Cell:
    """The questions of one document length, and their answers without a cache."""

    def __init__(self, llm: bicache.LLM, lines: list[dict[str, str]]) -> None:
        self.llm, self.lines = llm, lines
        self.none, self.none_flops = self.answers("none")
        self.truth = [line["answer"] for line in lines]
        tokens = [len(llm.tokenizer.encode_prefix(line["prefix"])) for line in lines]
        self.prefix_share = tokens[0] / (tokens[0] + 6 + OPTIONS["gen_length"])

    def answers(self, cache: Any) -> tuple[list[bicache.Output], int]:
        self.llm.clear_prefixes()
        outputs = self.llm.generate(
            [line["prompt"] for line in self.lines],
            prefix=[line["prefix"] for line in self.lines],
            cache=cache,
            **OPTIONS,
        )
        return outputs, sum(o.stats.flops + o.stats.entry_flops for o in outputs)

    def measure(self, cache: Any) -> dict[str, Any]:
        """Exact match, agreement with none, and work as a share of none's."""
        outputs, flops = self.answers(cache)
        same = [np.array_equal(a.tokens, b.tokens) for a, b in zip(outputs, self.none, strict=True)]
        right = [o.text == t for o, t in zip(outputs, self.truth, strict=True)]
        depths = [b for o in outputs for b in o.stats.depths]
        return {
            "exact_match": float(np.mean(right)),
            "agreement": float(np.mean(same)),
            "flops_share": flops / self.none_flops,
            "mean_depth": float(np.mean(depths)) if depths else None,
        }

    def describe(self) -> dict[str, Any]:
        right = [o.text == t for o, t in zip(self.none, self.truth, strict=True)]
        return {
            "questions": len(self.lines),
            "prefix_share": self.prefix_share,
            "exact_match_none": float(np.mean(right)),
        }


def oracle(row: dict[str, Any]) -> int:
    """The largest depth such that it and every smaller one loses at most MAX_LOSS, or -1."""
    losses = [row["exact_match_none"] - cell["exact_match"] for cell in row["alone"]]
    return next((b for b, loss in enumerate(losses) if loss > MAX_LOSS), len(losses)) - 1


def policies(table: bicache.DepthTable) -> dict[str, str]:
    """The depth policies at the calibrated refresh interval."""
    steps = f"refresh_steps={table.refresh_steps}"
    named = {
        "within a request only": f"bicache:depth=0,{steps}",
        "agreement": table.cache_string(),
        f"table (tau {TAU})": table.cache_string("similarity"),
    }
    # A probe needs several refreshes: it starts at 0.
    short = f"refresh_steps={min(2, table.refresh_steps)}"
    named |= {f"probe {tau}": f"bicache:depth=probe:{tau},{short}" for tau in PROBES}
    named["depth 0, refreshed as the probe"] = f"bicache:depth=0,{short}"
    return named


def run_model(name: str, words: int, count: int) -> dict[str, Any]:
    llm = bicache.LLM(name)
    table, failed = calibrate(llm, words, count)
    steps = table.refresh_steps
    report: dict[str, Any] = {
        "model": name,
        "layers": llm.config.layers,
        "refresh_steps": steps,
        "refresh_steps_that_failed": failed,
        "agreement": [b.as_dict() for b in table.agreement],
        "table": table.table,
        "similarity": {
            int(r): table.similarity[r].round(4).tolist() for r in np.flatnonzero(table.counts)
        },
        "similarity_hidden": {
            int(r): table.similarity_hidden[r].round(4).tolist()
            for r in np.flatnonzero(table.counts)
        },
        "policies": policies(table),
        "lengths": [],
    }
    for length in LENGTHS:
        cell = Cell(llm, draw(count, length, SEED, words))
        row: dict[str, Any] = {"records": length, **cell.describe()}
        for source in ("alone", "first_request"):
            row[source] = [
                cell.measure(f"bicache:depth={b},refresh_steps={steps},source={source}")
                for b in range(llm.config.layers + 1)
            ]
        row["policies"] = {what: cell.measure(cache) for what, cache in report["policies"].items()}
        row["oracle"] = oracle(row)
        chosen = row["policies"]["agreement"]["mean_depth"]
        row["agreement_depth"] = chosen
        row["loss"] = row["exact_match_none"] - row["policies"]["agreement"]["exact_match"]
        report["lengths"].append(row)
        print(
            f"{name} {length}: none {row['exact_match_none']:.3f}, oracle {row['oracle']}, "
            f"agreement {chosen}, loss {row['loss']:.4f}",
            file=sys.stderr,
        )
    return report


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--questions", type=int, default=540, help="per cell")
    parser.add_argument("--models", nargs="+", default=list(WORDS), choices=list(WORDS))
    args = parser.parse_args()
    report = {
        "questions": args.questions,
        "threads": _core.available_threads(),
        "isa": _core.isa(),
        "openblas_coretype": os.environ.get("OPENBLAS_CORETYPE"),
        "max_loss": MAX_LOSS,
        "models": [run_model(name, WORDS[name], args.questions) for name in args.models],
    }
    json.dump(report, sys.stdout, indent=1)
    print()


if __name__ == "__main__":
    main()
