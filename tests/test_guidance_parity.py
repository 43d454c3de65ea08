"""Guidance, suppressed tokens and the early end, over caches, against their transcriptions."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import asdict, replace
from typing import Any

import bicache
import numpy as np
import pytest
import torch
from parity import CONFIDENCE, Maker, check_output, clear_cases, same_bits
from parity_steps import DREAM, KINDS, Shape, Twins
from reference import Trace
from reference_caches import DllmCache, FastDllm, SharedPrefix
from reference_samplers import Cached, Decoding, uncached

PROMPT = Shape(0, 9)


@pytest.mark.parametrize("kind", KINDS)
def test_guidance(tiny_checkpoint: Maker, kind: str) -> None:
    """Each canvas has a cache of its own; of the prompt-less one, the shared prefix is masks."""
    twins, shape = Twins(tiny_checkpoint, kind), Shape(9, 4)
    model = twins.model
    dllm = "dllm_cache:prompt_interval_steps=3,gen_interval_steps=2,transfer_ratio=0.3"
    both = f"bicache:depth=2,refresh_steps=3+{dllm}"

    def shared(s: Shape, masked: bool) -> SharedPrefix:
        prefix = twins.prefix(s)
        return SharedPrefix(model, torch.full_like(prefix, model.mask) if masked else prefix, 2, 3)

    loops: dict[str, Callable[[Shape, bool], Cached]] = {
        "none": lambda *_: uncached(model),
        dllm: lambda s, _: DllmCache(model, s.p + s.u, 3, 2, 0.3),
        "fast_dllm:mode=dual": lambda *_: FastDllm(model, "dual"),
        "bicache:depth=2,refresh_steps=3+fast_dllm:block_start=fill": lambda s, un: FastDllm(
            model, "prefix", None, "fill", shared(s, un)
        ),
        both: lambda s, un: DllmCache(model, s.p + s.u, 3, 2, 0.3, prefix=shared(s, un)),
    }
    for (cache, loop), options in itertools.product(
        loops.items(),
        [
            Decoding(12, 12, 6, cfg_scale=1.5),
            Decoding(12, 6, 6, cfg_scale=0.4, temperature=0.5, suppress_tokens=(7, 30)),
        ],
    ):

        def trace_of(seed: int, loop: Any = loop, o: Decoding = options) -> Trace:
            s = replace(shape, seed=seed)
            return twins.trace(loop(s, False), s, o, seed, unconditional=loop(s, True))

        for seed, trace in clear_cases(trace_of, count=1):
            s = replace(shape, seed=seed)
            output = twins.run(cache, s, options, seed)
            check_output(output, trace)
            plain = twins.run(cache, s, replace(options, cfg_scale=0.0), seed)
            assert not same_bits(output, plain)
            per_step = [x.stats.rows_per_layer[0] / x.stats.steps for x in (output, plain)]
            assert per_step[0] == 2 * per_step[1]
            if cache == both:
                twins.llm.clear_prefixes()
                twins.run(cache, s, options, seed)
                assert twins.llm.prefix_stats()["entries"] == 2


@pytest.mark.parametrize("kind", KINDS)
def test_guidance_keeps_the_identities(tiny_checkpoint: Maker, kind: str) -> None:
    twins, shape = Twins(tiny_checkpoint, kind), Shape(9, 4)
    options = Decoding(12, 6, 6, cfg_scale=1.5, temperature=0.5)
    plain = twins.run("none", shape, options)
    for cache in (
        "bicache:depth=1,refresh_steps=1,splice=strict",
        "dllm_cache:prompt_interval_steps=1,gen_interval_steps=1",
        "fast_dllm:refresh_steps=1",
    ):
        assert same_bits(plain, twins.run(cache, shape, options))


def test_guidance_of_a_prompt_that_says_nothing(tiny_checkpoint: Maker) -> None:
    """cond = un, so that every scale gives the same; float rounding aside."""
    twins = Twins(tiny_checkpoint, "MHA")
    masks = [twins.mask] * 9
    a, b = (
        twins.llm.generate([masks], gen_length=4, cfg_scale=scale, cache="none")[0]
        for scale in (0.0, 2.0)
    )
    assert a.tokens.tolist() == b.tokens.tolist()
    np.testing.assert_allclose(a.confidences, b.confidences, rtol=0, atol=CONFIDENCE)


def test_suppressed_tokens_never_come(tiny_checkpoint: Maker) -> None:
    twins = Twins(tiny_checkpoint, "MHA")
    for rule, temperature in itertools.product(("low_confidence", *DREAM), (0.0, 1.0)):
        options = Decoding(24, 12, 24, remasking=rule, temperature=temperature)
        plain = twins.run("none", PROMPT, options)
        banned = tuple(sorted(set(plain.tokens.tolist())))
        o = replace(options, suppress_tokens=banned)
        assert not set(twins.run("none", PROMPT, o).tokens.tolist()) & set(banned)
        eos = replace(options, suppress_tokens=(twins.model.eos,))
        assert same_bits(
            twins.run("none", PROMPT, eos),
            twins.run("none", PROMPT, replace(options, logits_eos_inf=True)),
        )


def ends(tiny_checkpoint: Maker, kind: str, options: Decoding) -> Twins:
    """The checkpoint whose end-of-text and end-of-turn tokens are the ones it likes best."""
    twins = Twins(tiny_checkpoint, kind)
    counts = np.zeros(twins.model.vocab)
    for seed in range(6):
        tokens = twins.run("none", replace(PROMPT, seed=seed), options, seed).tokens
        counts += np.bincount(tokens, minlength=len(counts))
    counts[twins.mask] = 0
    eos, eot = (int(i) for i in np.argsort(-counts, kind="stable")[:2])
    return Twins(tiny_checkpoint, kind, eos_token_id=eos, eot_token_id=eot)


STOPS = {
    "blocks": Decoding(16, 16, 4),
    "one block": Decoding(12, 12, 12),
    "threshold": Decoding(16, 16, 8, threshold=0.5),
    "entropy, warm": Decoding(16, 16, 16, remasking="entropy", temperature=0.4),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("case", STOPS)
def test_early_stop(tiny_checkpoint: Maker, kind: str, case: str) -> None:
    plain = STOPS[case]
    options, twins = replace(plain, early_stop=True), ends(tiny_checkpoint, kind, plain)
    final = (twins.model.eos, twins.model.eot)
    saved = 0

    def trace_of(seed: int) -> Trace:
        s = replace(PROMPT, seed=seed)
        return twins.trace(uncached(twins.model), s, options, seed)

    for seed, trace in clear_cases(trace_of, count=4):
        s = replace(PROMPT, seed=seed)
        output, whole = (twins.run("none", s, o, seed) for o in (options, plain))
        check_output(output, trace)
        saved += whole.stats.steps - output.stats.steps
        # The same text: all up to the first final token; what was not decided is end-of-text.
        end = next((i for i, t in enumerate(whole.tokens) if t in final), len(whole.tokens))
        assert output.tokens[: end + 1].tolist() == whole.tokens[: end + 1].tolist()
        undecided = np.isnan(output.confidences)
        assert not undecided[: end + 1].any()
        assert set(output.tokens[undecided].tolist()) <= {twins.model.eos}
        assert undecided.any() == (output.stats.steps < whole.stats.steps)
    assert saved > 0, "no request ended early: nothing was tested"


@pytest.mark.parametrize("rule", ["low_confidence", *DREAM])
def test_a_batch_equals_each_alone(tiny_checkpoint: Maker, rule: str) -> None:
    twins = Twins(tiny_checkpoint, "QK-norm, bf16")
    shapes = [Shape(0, u, seed) for seed, u in enumerate((3, 40, 1, 11))]
    more: dict[str, Any] = {"cfg_scale": 0.5, "early_stop": True, "top_p": 0.9, "temperature": 0.6}
    options = Decoding(12, 6, 6, remasking=rule, suppress_tokens=(5,), **more)
    outputs: list[bicache.Output] = twins.llm.generate(
        [twins.own(s).numpy() for s in shapes], cache="fast_dllm:mode=dual", **asdict(options)
    )
    for s, output in zip(shapes, outputs, strict=True):
        alone = twins.run("fast_dllm:mode=dual", s, options)
        assert same_bits(output, alone)
        assert output.stats.rows_per_layer == alone.stats.rows_per_layer
