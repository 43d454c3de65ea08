"""The decoding rules against their transcriptions (spec B.2, B.3, D.1, D.2), on the same noise."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import asdict, replace
from typing import Any

import numpy as np
import pytest
import reference_samplers
import torch
from parity import CONFIDENCE, Maker, check_output, clear_cases, same_bits
from parity_steps import DREAM, KINDS, Shape, Twins
from reference import Trace
from reference_caches import DllmCache, FastDllm, SharedPrefix
from reference_samplers import (
    Cached,
    Decoding,
    accepted_by_factor,
    transfer_share,
    uncached,
)

PROMPT = Shape(0, 9)
CONFIDENT = ("maskgit_plus", "topk_margin", "entropy")

CASES: dict[str, Decoding] = {
    "threshold": Decoding(12, 12, 6, threshold=0.6),
    "threshold, hot": Decoding(12, 12, 12, threshold=0.4, temperature=0.8),
    "threshold and quota": Decoding(12, 6, 12, threshold=0.4),
    "threshold of all": Decoding(12, 12, 4, threshold=0.0),
    "factor": Decoding(12, 12, 6, factor=0.8),
    "factor, hot": Decoding(12, 12, 12, factor=1.1, temperature=0.8),
    "factor and quota": Decoding(12, 4, 12, factor=4.0),
    "nucleus": Decoding(12, 12, 6, temperature=0.8, top_p=0.7),
    "top k": Decoding(12, 6, 12, temperature=1.5, top_k=3),
    "nucleus, top k": Decoding(12, 6, 6, temperature=2.0, top_p=0.9, top_k=4),
    "random order, nucleus": Decoding(12, 6, 6, remasking="random", temperature=1.0, top_p=0.5),
    "truncation without noise": Decoding(8, 8, 4, top_p=0.3, top_k=2),
    "suppressed": Decoding(12, 12, 6, suppress_tokens=(7, 30, 31)),
    "suppressed, warm": Decoding(12, 12, 6, temperature=0.7, suppress_tokens=(0, 9)),
} | {
    f"{rule}{name}": replace(options, remasking=rule)
    for rule in DREAM
    for name, options in {
        "": Decoding(12, 12, 12),
        ", few steps": Decoding(14, 5, 14),
        ", more steps than tokens": Decoding(6, 14, 6),
        ", blocks": Decoding(16, 8, 8),
        ", warm": Decoding(12, 6, 12, temperature=0.4),
        ", as recommended": Decoding(12, 12, 12, temperature=0.2, top_p=0.95),
        ", nucleus and top k": Decoding(12, 6, 12, temperature=1.2, top_p=0.8, top_k=5),
        ", truncated only": Decoding(12, 6, 12, top_p=0.8, top_k=5),
        ", suppressed": Decoding(12, 6, 6, suppress_tokens=(7, 30, 31)),
    }.items()
} | {
    f"{rule}{name}": replace(options, remasking=rule)
    for rule in CONFIDENT
    for name, options in {
        ", random order": Decoding(12, 12, 12, alg_temp=0.3),
        ", random order, warm": Decoding(12, 6, 6, alg_temp=1.5, temperature=0.4, top_k=9),
    }.items()
} | {
    f"{rule}{name}": replace(options, remasking=rule)
    for rule in CONFIDENT[:2]
    for name, options in {
        ", threshold": Decoding(12, 12, 12, threshold=0.5),
        ", threshold, warm": Decoding(12, 12, 6, threshold=0.5, temperature=0.5, top_p=0.9),
        ", factor": Decoding(12, 12, 12, factor=0.7),
    }.items()
}  # fmt: skip


def check(
    twins: Twins, o: Decoding, cache: str, loop: Callable[[Shape], Cached], **where: Any
) -> None:
    """Tokens, confidences and the positions of every step, where no decision is a near tie."""
    shape = where.get("shape", PROMPT)

    def trace_of(seed: int) -> Trace:
        s = replace(shape, seed=seed)
        return twins.trace(loop(s), s, o, seed)

    for seed, trace in clear_cases(trace_of, count=where.get("count", 2)):
        s = replace(shape, seed=seed)
        request = twins.request(s)
        stream = twins.llm.stream(**request, cache=cache, seed=seed, **asdict(o))
        assert [e.positions.tolist() for e in stream] == trace.commits
        check_output(twins.run(cache, s, o, seed), trace)


@pytest.mark.parametrize("case", CASES)
def test_equals_the_published_rule(tiny_checkpoint: Maker, case: str) -> None:
    kind = list(KINDS)[sorted(CASES).index(case) % len(KINDS)]
    twins = Twins(tiny_checkpoint, kind)
    check(twins, CASES[case], "none", lambda _: uncached(twins.model))


@pytest.mark.parametrize("rule", ["low_confidence", *DREAM])
def test_over_every_cache(tiny_checkpoint: Maker, rule: str) -> None:
    """Steps that are passed over do not count as steps of a cache."""
    twins, shape = Twins(tiny_checkpoint, "GQA, shift"), Shape(9, 4)
    dllm = "dllm_cache:prompt_interval_steps=3,gen_interval_steps=2,transfer_ratio=0.3"

    def shared(s: Shape) -> SharedPrefix:
        return SharedPrefix(twins.model, twins.prefix(s), 2, 3)

    loops: dict[str, Callable[[Shape], Cached]] = {
        dllm: lambda s: DllmCache(twins.model, s.p + s.u, 3, 2, 0.3),
        "fast_dllm:mode=dual,refresh_steps=3": lambda _: FastDllm(twins.model, "dual", 3),
        f"bicache:depth=2,refresh_steps=3+{dllm}": lambda s: DllmCache(
            twins.model, s.p + s.u, 3, 2, 0.3, prefix=shared(s)
        ),
        "bicache:depth=2,refresh_steps=3+fast_dllm": lambda s: FastDllm(
            twins.model, "prefix", prefix=shared(s)
        ),
    }
    for cache, loop in loops.items():
        for options in (Decoding(12, 12, 6), Decoding(10, 20, 10, temperature=0.3)):
            check(twins, replace(options, remasking=rule), cache, loop, shape=shape, count=1)


# ---- how many -----------------------------------------------------------------------------------


def test_dreams_schedule(tiny_checkpoint: Maker) -> None:
    """int(masks * (1 - s / t)) in float32, all that are left at the last step, nothing else run."""
    twins = Twins(tiny_checkpoint, "MHA")
    for g, steps in itertools.product((1, 2, 7, 12, 25, 40), (1, 2, 3, 7, 12, 25, 40, 64)):
        left, sizes = g, []
        for i in range(steps):
            count = int(torch.tensor(float(left)) * transfer_share(i, steps))
            sizes += [count] if count else []
            left -= count
        assert left == 0
        options = Decoding(g, steps, g, remasking="entropy")
        (stream,) = [twins.llm.stream(**twins.request(PROMPT), cache="none", **asdict(options))]
        assert [len(e.positions) for e in stream] == sizes, (g, steps)


def test_threshold_accepts_what_reaches_it_and_the_quota(tiny_checkpoint: Maker) -> None:
    twins = Twins(tiny_checkpoint, "MHA")

    def sizes(**options: Any) -> list[int]:
        o = Decoding(12, **({"steps": 12, "block_length": 12} | options))
        stream = twins.llm.stream(**twins.request(PROMPT), cache="none", **asdict(o))
        return [len(e.positions) for e in stream]

    for rule in ("low_confidence", *CONFIDENT[:2]):
        assert sizes(remasking=rule, threshold=0.0, block_length=4)[-3:] == [4, 4, 4]
        # Never reached: what is left is one a step.
        assert sizes(remasking=rule, threshold=1.0) == [1] * 12
        assert len(sizes(remasking=rule, threshold=0.1)) < len(sizes(remasking=rule))
    assert sizes(threshold=1.0, steps=4) == [3, 3, 3, 3]
    # The n-th of a step needs 1 - factor / (n + 1), but a scan that reaches the last one takes it.
    assert sizes(factor=0.0) == [1] * 10 + [2]
    assert sizes(factor=0.0, steps=4) == [3, 3, 3, 3]
    assert sizes(factor=100.0) == [12]


def test_dreams_rules_decode_the_response_as_one_block(tiny_checkpoint: Maker) -> None:
    twins = Twins(tiny_checkpoint, "MHA")
    prompt = twins.own(PROMPT).numpy()
    for rule in DREAM:
        default, whole, blocks = (
            twins.llm.generate(prompt, cache="none", gen_length=64, alg=rule, **more)[0]
            for more in ({}, {"block_length": 64}, {"block_length": 32})
        )
        assert same_bits(default, whole) and not same_bits(default, blocks)


# ---- noise --------------------------------------------------------------------------------------


def test_origin_transfers_as_often_as_it_says(tiny_checkpoint: Maker) -> None:
    """Of what is left, step 0 takes 1 - s / t, and so does step 1, whatever step 0 drew."""
    twins, seeds = Twins(tiny_checkpoint, "MHA"), 80
    options = Decoding(40, 5, 40, remasking="origin")
    taken = np.zeros((seeds, 2))
    for seed in range(seeds):
        stream = twins.llm.stream(
            **twins.request(PROMPT), cache="none", seed=seed, **asdict(options)
        )
        taken[seed] = [len(next(stream).positions) for _ in range(2)]
        stream.close()
    left = np.stack([np.full(seeds, 40), 40 - taken[:, 0]], -1)
    for i in range(2):
        share, n = float(transfer_share(i, 5)), left[:, i].sum()
        sigma = (share * (1 - share) / n) ** 0.5
        assert abs(taken[:, i].sum() / n - share) < 4 * sigma
        # binomial, not the same number every time
        spread = (taken[:, i] / left[:, i]).std()
        assert 0.7 < spread / (share * (1 - share) / left[:, i].mean()) ** 0.5 < 1.3


def test_steps_in_which_origin_draws_nothing_draw_anew(tiny_checkpoint: Maker) -> None:
    """Two positions over four steps meet in one of them a quarter of the time; were the noise of a
    step that took nothing used again, they would meet more rarely or more often."""
    twins, seeds = Twins(tiny_checkpoint, "MHA"), 600
    options = Decoding(2, 4, 2, remasking="origin")
    once = sum(twins.run("none", PROMPT, options, seed).stats.steps == 1 for seed in range(seeds))
    shares = [float(transfer_share(i, 4)) for i in range(4)]
    left = np.cumprod([1.0, *(1 - x for x in shares[:-1])])
    expected = float(sum((a * x) ** 2 for a, x in zip(left, shares, strict=True)))
    assert abs(expected - 0.25) < 0.01
    assert abs(once / seeds - expected) < 4 * (expected * (1 - expected) / seeds) ** 0.5


def frequencies(draws: list[int], size: int) -> np.ndarray:
    return np.bincount(draws, minlength=size) / len(draws)


@pytest.mark.parametrize("rule", ["low_confidence", "maskgit_plus"])
@pytest.mark.parametrize("limit", [{}, {"top_p": 0.6}, {"top_k": 3}], ids=str)
def test_tokens_are_drawn_from_the_tempered_distribution(
    tiny_checkpoint: Maker, rule: str, limit: dict[str, Any]
) -> None:
    twins, seeds = Twins(tiny_checkpoint, "MHA"), 500
    options = Decoding(1, 1, 1, temperature=1.7, remasking=rule, **limit)
    draws = [int(twins.run("none", PROMPT, options, seed).tokens[0]) for seed in range(seeds)]
    canvas = torch.cat([twins.prompt(PROMPT), torch.tensor([twins.mask])])
    logits = twins.model.forward(canvas)[-1] / 1.7
    order = logits.argsort(descending=True)
    probs = logits.softmax(-1)
    count = len(probs)
    if "top_p" in limit:
        count = int((probs[order].cumsum(-1) <= 0.6).sum()) + 1
    count = limit.get("top_k", count)
    probs[order[count:]] = 0
    expected = (probs / probs.sum()).numpy()
    assert 2 < count and (not limit or count < 15)
    assert set(draws) <= set(order[:count].tolist())
    seen = frequencies(draws, len(expected))
    assert (np.abs(seen - expected) < 4.5 * np.sqrt(expected * (1 - expected) / seeds) + 1e-9).all()
    greedy = np.eye(len(expected))[order[0]]
    for other in (greedy, logits.mul(1.7).softmax(-1).numpy()):
        assert np.abs(seen - other).sum() > 0.2, "another distribution would pass as well"


@pytest.mark.parametrize(
    "rule, alg_temp", [("maskgit_plus", 0.1), ("topk_margin", 0.1), ("entropy", 0.5)]
)
def test_alg_temp_draws_the_order(tiny_checkpoint: Maker, rule: str, alg_temp: float) -> None:
    """The first position is drawn from softmax(confidence / alg_temp)."""
    twins, seeds, g = Twins(tiny_checkpoint, "MHA"), 400, 6
    options = Decoding(g, g, g, remasking=rule, alg_temp=alg_temp)
    canvas = torch.cat([twins.prompt(PROMPT), torch.full((g,), twins.mask)])
    probs = twins.model.forward(canvas)[-g:].softmax(-1)
    confidence = torch.tensor(
        [reference_samplers.confidence_of(p, int(p.argmax()), rule) for p in probs]
    )
    expected = (confidence / alg_temp).softmax(-1).numpy()
    draws = []
    for seed in range(seeds):
        stream = twins.llm.stream(
            **twins.request(PROMPT), cache="none", seed=seed, **asdict(options)
        )
        (position,) = next(stream).positions
        draws.append(int(position) - PROMPT.u)
        stream.close()
    seen = frequencies(draws, g)
    assert (np.abs(seen - expected) < 4 * np.sqrt(expected * (1 - expected) / seeds) + 1e-9).all()
    for other in (np.full(g, 1 / g), np.eye(g)[int(confidence.argmax())]):
        assert np.abs(seen - other).sum() > 0.1, "another distribution would pass as well"


# ---- the oracle could not be mistaken for another rule ------------------------------------------


def without_quirk(best_first: list[float], factor: float) -> int:
    n = 1
    while n < len(best_first) and best_first[n] >= 1 - factor / (n + 2):
        n += 1
    return n


def one_less(best_first: list[float], factor: float) -> int:
    return max(1, accepted_by_factor(best_first, factor) - 1)


def drops_the_crossing_token(logits: torch.Tensor, o: Decoding) -> tuple[torch.Tensor, float]:
    best_first, ids = logits.sort(descending=True)
    beyond = best_first.softmax(-1).cumsum(-1) > o.top_p
    beyond[0] = False
    return logits.index_fill(0, ids[beyond], -torch.inf), 1.0


def keeps_all(logits: torch.Tensor, _: Decoding) -> tuple[torch.Tensor, float]:
    return logits, 1.0


def probability(probs: torch.Tensor, token: int, _: str) -> float:
    return float(probs[token])


def equal_shares(i: int, steps: int) -> torch.Tensor:
    return torch.tensor(1 / steps if i < steps - 1 else 1.0)


MUTANTS: dict[str, tuple[str, Any, Decoding]] = {
    "factor without its quirk": (
        "accepted_by_factor", without_quirk, Decoding(12, 12, 4, factor=0.3)),
    "factor, one less": ("accepted_by_factor", one_less, Decoding(12, 12, 12, factor=0.9)),
    "nucleus without its last token": (
        "kept_tokens", drops_the_crossing_token, Decoding(12, 12, 6, temperature=1.0, top_p=0.6)),
    "no nucleus": ("kept_tokens", keeps_all, Decoding(12, 12, 6, temperature=1.5, top_p=0.5)),
    "confidence of all tokens": (
        "kept_tokens", keeps_all, Decoding(12, 6, 12, remasking="maskgit_plus", top_k=2)),
    "margin is probability": (
        "confidence_of", probability, Decoding(12, 12, 12, remasking="topk_margin")),
    "entropy is probability": (
        "confidence_of", probability, Decoding(12, 12, 12, remasking="entropy")),
    "shares of the beginning": (
        "transfer_share", equal_shares, Decoding(16, 4, 16, remasking="maskgit_plus")),
}  # fmt: skip


@pytest.mark.parametrize("mutant", MUTANTS)
def test_another_rule_is_told_apart(
    tiny_checkpoint: Maker, monkeypatch: pytest.MonkeyPatch, mutant: str
) -> None:
    name, other, options = MUTANTS[mutant]
    twins = Twins(tiny_checkpoint, "MHA")

    def trace_of(seed: int) -> Trace:
        s = replace(PROMPT, seed=seed)
        return twins.trace(uncached(twins.model), s, options, seed)

    right = dict(clear_cases(trace_of, count=5))
    outputs = {seed: twins.run("none", replace(PROMPT, seed=seed), options, seed) for seed in right}
    for seed, trace in right.items():
        check_output(outputs[seed], trace)
    monkeypatch.setattr(reference_samplers, name, other)
    different = 0
    for seed, output in outputs.items():
        trace = trace_of(seed)
        different += (
            output.tokens.tolist() != trace.tokens.tolist()
            or output.stats.steps != len(trace.commits)
            or not np.allclose(output.confidences, trace.confidences, rtol=0, atol=CONFIDENCE)
        )
    assert different > 0


@pytest.mark.parametrize("case", sorted(CASES))
def test_the_option_matters(tiny_checkpoint: Maker, case: str) -> None:
    """Without it the same requests come out otherwise, so the parity above says something."""
    options, twins = CASES[case], Twins(tiny_checkpoint, "MHA")
    plain = Decoding(options.gen_length, options.steps, options.block_length)
    if options.temperature > 0:
        plain = replace(plain, temperature=options.temperature)
    outputs = [
        [twins.run("none", replace(PROMPT, seed=seed), o, seed) for seed in range(4)]
        for o in (options, plain)
    ]
    same = all(same_bits(a, b) for a, b in zip(*outputs, strict=True))
    # LLaDA's rules truncate only what is sampled.
    assert same == (case == "truncation without noise")
