"""What bf16, int8 and int4 cost in answers.

    python bench/quantisation.py > bench/results/quantisation.json

Every model in every type: bytes of weights; how far its predictions are from f32's on canvases
whose answer is partly revealed (KL divergence, agreement of the most likely token); and how whole
answers differ, under several caches, from f32's under the same cache (accuracy: at the document
length that loses most). Each model again with outlier
channels (outliers.py), without a cache; and a model of random weights, which has no answers to be
right about, and whose predictions are near ties that anything decides.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import bicache
import numpy as np
from bicache import _core
from caching_accuracy import LENGTHS, OPTIONS, questions
from numpy.typing import NDArray
from outliers import with_outliers
from random_model import SMALL, Shape, write_checkpoint

DTYPES = ("f32", "bf16", "int8", "int4")
# At the second, records-control stands at the edge: f32 loses nothing, its neighbours 5 points.
DLLM_CACHE = {
    f"dllm_cache, prompt every {every}": f"dllm_cache:prompt_interval_steps={steps},"
    "gen_interval_steps=4,transfer_ratio=0.25"
    for steps, every in ((1, "step"), (2, "second step"))
}
RANDOM = Shape(layers=4, dim=384, heads=6, ffn=1024, vocab=512)
CANVASES = 100  # per model and length


@dataclass
class Case:
    """One checkpoint and what it is asked.

    Attributes:
        prompts: (prefix, prompt) of every request: text, or ids.
        lengths: Of every request, the records of its document.
        answers: What is right; None: nobody knows.
        canvases: (ids [N], masked positions) of single passes.
        policies: Name -> cache string.
        references: What f32 gave.
    """

    folder: Path
    prompts: list[tuple[Any, Any]]
    lengths: list[int]
    answers: list[str] | None
    canvases: list[tuple[NDArray[np.int32], list[int]]]
    options: dict[str, Any]
    policies: dict[str, str]
    references: dict[str, Any] = field(default_factory=dict)

    def logits(self, llm: bicache.LLM) -> NDArray[np.float64]:
        """Of all masked positions of all canvases [n, V]."""
        parts = [llm.forward(ids, rows=rows) for ids, rows in self.canvases]
        return np.concatenate(parts).astype(np.float64)

    def outputs(self, llm: bicache.LLM, cache: str) -> list[bicache.Output]:
        llm.clear_prefixes()
        return llm.generate(
            [own for _, own in self.prompts],
            prefix=[prefix for prefix, _ in self.prompts],
            cache=cache,
            **self.options,
        )

    def of_length(self, records: int) -> NDArray[np.bool_]:
        return np.array(self.lengths) == records

    def right(self, outputs: list[bicache.Output]) -> NDArray[np.bool_]:
        assert self.answers is not None
        return np.array([o.text == a for o, a in zip(outputs, self.answers, strict=True)])


def shipped(name: str, count: int, work: Path, outliers: bool) -> Case:
    """A shipped model; `count` questions per document length."""
    llm = bicache.LLM(name, threads=1)
    folder = with_outliers(llm.path, work / f"{name}-outliers") if outliers else llm.path
    lines = [line for length in LENGTHS[name] for line in questions(name, length, count)]
    lengths = [length for length in LENGTHS[name] for _ in range(count)]
    rng = np.random.default_rng(1)
    canvases = []
    for i in rng.permutation(len(lines))[: CANVASES * len(LENGTHS[name])]:
        line = lines[i]
        prefix = llm.tokenizer.encode_prefix(line["prefix"])
        own = llm.tokenizer.encode_prompt(line["prompt"], after_prefix=True)
        answer = np.full(OPTIONS["gen_length"], llm.config.eos_token_id)
        ids = llm.tokenizer.encode_prompt(line["answer"], after_prefix=True)
        answer[: len(ids)] = ids
        masked = np.flatnonzero(rng.random(len(answer)) < rng.uniform(0.2, 1))
        answer[masked] = llm.config.mask_token_id
        begin = len(prefix) + len(own)
        if len(masked):
            canvas = np.concatenate([prefix, own, answer]).astype(np.int32)
            canvases.append((canvas, (begin + masked).tolist()))
    prompts = [(line["prefix"], line["prompt"]) for line in lines]
    answers = [line["answer"] for line in lines]
    policies = {"none": "none"}
    if not outliers:
        policies |= {"auto": llm.cache_string("auto")} | DLLM_CACHE
    return Case(folder, prompts, lengths, answers, canvases, dict(OPTIONS), policies)


def random_weights(shape: Shape, count: int, work: Path, outliers: bool) -> Case:
    """A model of random weights and random ids, a third of which are masks."""
    folder = work / "random"
    if not folder.exists():
        folder.mkdir()
        write_checkpoint(folder, shape, context=128)
    if outliers:
        folder = with_outliers(folder, work / "random-outliers", channels=4, inner=6)
    llm = bicache.LLM(folder, threads=1)
    rng = np.random.default_rng(2)
    ids = rng.integers(4, shape.vocab, (count, 48)).astype(np.int32)
    rows = list(range(0, 48, 3))
    masked = ids.copy()
    masked[:, rows] = llm.config.mask_token_id
    options = {"gen_length": 16, "steps": 16, "block_length": 16}
    return Case(
        folder, [(row[:24], row[24:]) for row in ids], [0] * count, None,
        [(row, rows) for row in masked], options, {"none": "none"},
    )  # fmt: skip


def divergence(expected: NDArray[np.float64], found: NDArray[np.float64]) -> NDArray[np.float64]:
    """KL divergence of each row's prediction from the expected one [n]."""

    def log_softmax(x: NDArray[np.float64]) -> NDArray[np.float64]:
        x = x - x.max(-1, keepdims=True)
        out: NDArray[np.float64] = x - np.log(np.exp(x).sum(-1, keepdims=True))
        return out

    p, q = log_softmax(expected), log_softmax(found)
    out: NDArray[np.float64] = (np.exp(p) * (p - q)).sum(-1)
    return out


def measure(case: Case, dtype: str) -> dict[str, Any]:
    """One row; f32 must come first."""
    llm = bicache.LLM(case.folder, dtype=dtype)
    logits = case.logits(llm)
    expected = case.references.setdefault("logits", logits)
    same = np.mean(expected.argmax(-1) == logits.argmax(-1))
    row: dict[str, Any] = {
        "dtype": dtype,
        "weight_bytes": llm.weight_bytes,
        "kl": float(divergence(expected, logits).mean()),
        "top1_agreement": float(same),
        "policies": {},
    }
    for policy, cache in case.policies.items():
        outputs = case.outputs(llm, cache)
        reference = case.references.setdefault(policy, outputs)
        pairs = zip(outputs, reference, strict=True)
        same_tokens = np.array([a.tokens == b.tokens for a, b in pairs])
        cell = {
            "token_agreement": float(same_tokens.mean()),
            "answer_agreement": float(same_tokens.all(-1).mean()),
        }
        if case.answers is not None:
            right = case.right(outputs)
            lost = case.right(reference).astype(float) - right
            worst = max((lost[case.of_length(n)] for n in sorted(set(case.lengths))), key=np.mean)
            cell |= {
                "exact_match": float(right.mean()),
                "loss": float(worst.mean()),
                "loss_interval": 1.96 * float(worst.std()) / math.sqrt(len(worst)),
            }
        row["policies"][policy] = cell
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--questions", type=int, default=400, help="per model and length")
    parser.add_argument("--models", nargs="*", default=list(LENGTHS), choices=list(LENGTHS))
    parser.add_argument("--small", action="store_true", help="a smaller random model, for tests")
    args = parser.parse_args()
    report: dict[str, Any] = {
        "questions": args.questions,
        "canvases": CANVASES,
        "isa": _core.isa(),
        "threads": _core.available_threads(),
        "openblas_coretype": os.environ.get("OPENBLAS_CORETYPE"),
        "dllm_cache": list(DLLM_CACHE.values()),
        "models": [],
    }
    with tempfile.TemporaryDirectory() as work:
        for name in [*args.models, "random weights"]:
            for outliers in (False, True):
                if name == "random weights":
                    shape = SMALL if args.small else RANDOM
                    case = random_weights(shape, 16, Path(work), outliers)
                else:
                    case = shipped(name, args.questions, Path(work), outliers)
                rows = [measure(case, dtype) for dtype in DTYPES]
                report["models"].append({"model": name, "outliers": outliers, "dtypes": rows})
                what = f"{name} with outliers" if outliers else name
                worst = max(row["kl"] for row in rows)
                print(f"{what}: KL at most {worst:.2g}", file=sys.stderr)
    json.dump(report, sys.stdout, indent=1)
    print()


if __name__ == "__main__":
    main()
