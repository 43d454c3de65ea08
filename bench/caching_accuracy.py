"""What caching within a request and parallel decoding cost in answers, on the shipped models.

    python bench/caching_accuracy.py > bench/results/caching_accuracy.json

Every cell is one model, document length and setting, over the same questions: paired with `none`
at one token a step. Settings that lose are part of the report. Nothing here trains; documents are
drawn from seeds of their own by training/.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import os
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import bicache
import numpy as np
from bicache import _core

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "training"))
from calibrate import OPTIONS, WORDS, draw  # noqa: E402
from export import chain_questions  # noqa: E402

SEED = 50_000
NEW = ",new_tokens=recompute"
MAX_LOSS = 0.018  # of accuracy: BiCache's own bound
LENGTHS = {name: (12, 40) for name in WORDS} | {"chain": (16, 40)}  # records of the documents


@dataclass(frozen=True)
class Setting:
    """One way to generate.

    Attributes:
        group: What is compared with what.
        cache: The cache string; "auto": the model's calibrated BiCache.
        options: Beside OPTIONS: one block of 8, one token a step.
    """

    group: str
    cache: str
    options: dict[str, Any] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """The same for all models."""
        given = "".join(f", {name}={value}" for name, value in self.options.items())
        return self.cache + given


def settings() -> Iterator[Setting]:
    """All of them, the reference first."""
    yield Setting("reference", "none")
    rules: list[dict[str, Any]] = [{"steps": s} for s in (4, 2, 1)]
    rules += [{"threshold": t} for t in (0.99, 0.9, 0.7)] + [{"factor": f} for f in (0.1, 1.0)]
    rules += [{"block_length": n} for n in (4, 2)]
    for rule in rules:
        yield Setting("decoding", "none", rule)
    dllm = "dllm_cache:prompt_interval_steps={},gen_interval_steps={},transfer_ratio={}"
    for kp, kr in itertools.product((1, 2, 4, 8), (1, 2, 4, 8)):
        if kp > 1 or kr > 1:
            yield Setting("dllm_cache", dllm.format(kp, kr, 0.25))
    for kp, kr, ratio in ((2, 4, 0.25), (8, 4, 0.25), (8, 8, 0.25), (8, 4, 0)):
        yield Setting("dllm_cache", dllm.format(kp, kr, ratio) + NEW)
    for kp, ratio in itertools.product((1, 8), (0, 0.5, 1)):
        yield Setting("dllm_cache", dllm.format(kp, 4, ratio))
    for kp, kr in itertools.product((1, 8), (4, 8)):
        yield Setting("dllm_cache", dllm.format(kp, kr, 0.25) + ",drift=since_recompute")
    for mode in ("prefix", "dual"):
        for refresh in ("none", "4", "2"):
            yield Setting("fast_dllm", f"fast_dllm:mode={mode},refresh_steps={refresh}")
        for blocks in (4, 2):
            yield Setting("fast_dllm", f"fast_dllm:mode={mode}", {"block_length": blocks})
    yield Setting("bicache", "auto")
    for depth, refresh in ((0, 2), (0, 4), (0, 8), (1, 8), (3, 8)):
        yield Setting("bicache", f"bicache:depth={depth},refresh_steps={refresh}")
    for kp, kr in ((1, 4), (8, 1), (8, 2), (8, 4), (8, 8)):
        yield Setting("composed", "auto+" + dllm.format(kp, kr, 0.25))
    for body in ("mode=prefix", "mode=dual", "mode=dual,block_start=fill"):
        for blocks in (8, 4):
            yield Setting("composed", f"auto+fast_dllm:{body}", {"block_length": blocks})
    for threshold in (0.9, 0.99):
        for cache in (
            dllm.format(2, 4, 0.25), dllm.format(2, 4, 0.25) + NEW, "fast_dllm:mode=prefix", "auto",
            "auto+" + dllm.format(8, 4, 0.25), "auto+" + dllm.format(8, 4, 0.25) + NEW,
            "auto+fast_dllm:mode=prefix",
        ):  # fmt: skip
            yield Setting("threshold", cache, {"threshold": threshold})


def questions(model: str, length: int, count: int) -> list[dict[str, Any]]:
    """`count` questions about documents of `length` records."""
    if model == "chain":
        return chain_questions(count, length, SEED + length)[:count]
    return draw(count, length, SEED, WORDS[model])


class Cell:
    """One model and document length."""

    def __init__(self, llm: bicache.LLM, lines: list[dict[str, Any]]) -> None:
        self.llm, self.lines = llm, lines
        self.none = self.outputs(Setting("reference", "none"))
        self.right_none = self.right(self.none)

    def outputs(self, setting: Setting) -> list[bicache.Output]:
        """The answers, the prefix entries made anew."""
        self.llm.clear_prefixes()
        calibrated = self.llm.cache_string("auto")
        return self.llm.generate(
            [line["prompt"] for line in self.lines],
            prefix=[line["prefix"] for line in self.lines],
            cache=setting.cache.replace("auto", calibrated),
            **(OPTIONS | setting.options),
        )

    def right(self, outputs: list[bicache.Output]) -> np.ndarray:
        """Which answers are right in every word. bool [questions]"""
        answers = [line["answer"] for line in self.lines]
        return np.array([o.text == a for o, a in zip(outputs, answers, strict=True)])

    def measure(self, setting: Setting) -> dict[str, Any]:
        """Accuracy, its paired loss with a 95 % interval, and work as a share of none's."""
        outputs = self.none if setting.name == "none" else self.outputs(setting)
        right = self.right(outputs)
        lost = self.right_none.astype(float) - right
        same = [np.array_equal(a.tokens, b.tokens) for a, b in zip(outputs, self.none, strict=True)]
        flops, flops_none = (
            sum(o.stats.flops + o.stats.entry_flops for o in run) for run in (outputs, self.none)
        )
        return {
            "exact_match": float(right.mean()),
            "loss": float(lost.mean()),
            "loss_interval": 1.96 * float(lost.std()) / math.sqrt(len(lost)),
            "agreement": float(np.mean(same)),
            "flops_share": flops / flops_none,
            "steps": float(np.mean([o.stats.steps for o in outputs])),
        }


def run_model(name: str, count: int) -> dict[str, Any]:
    """All settings on all document lengths of one model."""
    llm = bicache.LLM(name)
    report: dict[str, Any] = {
        "model": name,
        "layers": llm.config.layers,
        "auto": llm.cache_string("auto"),
        "lengths": [],
    }
    for length in LENGTHS[name]:
        cell = Cell(llm, questions(name, length, count))
        rows = {s.name: cell.measure(s) for s in settings()}
        share = cell.none[0].stats.prefix_tokens / len_of(cell)
        report["lengths"].append({"records": length, "prefix_share": share, "settings": rows})
        print(f"{name} {length}: none {rows['none']['exact_match']:.3f}", file=sys.stderr)
    return report


def len_of(cell: Cell) -> int:
    """Rows of one request."""
    prompt = cell.llm.tokenizer.encode_prompt(cell.lines[0]["prompt"], after_prefix=True)
    return cell.none[0].stats.prefix_tokens + len(prompt) + OPTIONS["gen_length"]


def summary(models: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Per setting: its worst loss over all models and lengths, and its work."""
    rows = []
    for setting in settings():
        cells = [length["settings"][setting.name] for m in models for length in m["lengths"]]
        shares = [cell["flops_share"] for cell in cells]
        losses = {
            m["model"]: max(length["settings"][setting.name]["loss"] for length in m["lengths"])
            for m in models
        }
        rows.append(
            {
                "group": setting.group,
                "setting": setting.name,
                "worst_loss": losses,
                "safe": max(losses.values()) <= MAX_LOSS,
                "flops_share": [min(shares), max(shares)],
            }
        )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--questions", type=int, default=540, help="per cell")
    parser.add_argument("--models", nargs="+", default=list(LENGTHS), choices=list(LENGTHS))
    args = parser.parse_args()
    models = [run_model(name, args.questions) for name in args.models]
    report = {
        "questions": args.questions,
        "threads": _core.available_threads(),
        "isa": _core.isa(),
        "openblas_coretype": os.environ.get("OPENBLAS_CORETYPE"),
        "max_loss": MAX_LOSS,
        "summary": summary(models),
        "models": models,
    }
    json.dump(report, sys.stdout, indent=1)
    print()


if __name__ == "__main__":
    main()
