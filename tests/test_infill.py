"""Tokens that stand in a response already: against the reference, over every cache, and errors."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from bicache import LLM, MASK_TEXT
from conftest import EOS, MASK, TinyCheckpoint, refuses
from parity import Maker, check_output, clear_cases, same_bits
from parity import tokens as random_tokens
from parity_steps import DREAM, KINDS, Shape, Twins
from reference import Trace
from reference_caches import DllmCache, FastDllm, SharedPrefix
from reference_samplers import Cached, Decoding, uncached

# Which positions of 12 are to be filled; blocks are 4 long.
TO_FILL: dict[str, list[int]] = {
    "scattered": [1, 2, 5, 6, 8, 11],
    "a block is given": [0, 2, 3, 9, 10],
    "the middle": [4, 5, 6, 7],
    "the ends": [0, 11],
    "one": [7],
}
RULES: dict[str, Decoding] = {
    "a token a step": Decoding(12, 12, 4),
    "one block, several a step": Decoding(12, 5, 12, temperature=0.5),
    "random order": Decoding(12, 6, 4, remasking="random", temperature=0.5),
    "threshold": Decoding(12, 12, 4, threshold=0.5),
    "guidance": Decoding(12, 12, 4, cfg_scale=1.5),
} | {rule: Decoding(12, 12, 12, remasking=rule, temperature=0.3) for rule in DREAM}


def given_of(twins: Twins, where: str, seed: int) -> torch.Tensor:
    given = random_tokens(12, twins.model, 500 + seed)
    given[TO_FILL[where]] = twins.mask
    return given


def check(
    twins: Twins, where: str, o: Decoding, cache: str, s: Shape, loop: Callable[[Shape], Cached]
) -> None:
    def trace_of(seed: int) -> Trace:
        at = replace(s, seed=seed)
        un = loop(at) if o.cfg_scale else None
        return twins.trace(loop(at), at, o, seed, un, given_of(twins, where, seed))

    for seed, trace in clear_cases(trace_of, count=1):
        given = given_of(twins, where, seed)
        output = twins.run(cache, replace(s, seed=seed), o, seed, given)
        check_output(output, trace)
        fixed = (given != twins.mask).numpy()
        assert (output.tokens[fixed] == given.numpy()[fixed]).all()
        assert np.isnan(output.confidences[fixed]).all()
        committed = sorted(j - s.p - s.u for step in trace.commits for j in step)
        assert committed == TO_FILL[where]


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("where", TO_FILL)
def test_equals_the_reference(tiny_checkpoint: Maker, where: str, rule: str) -> None:
    for kind in ("MHA", "GQA, shift"):
        twins = Twins(tiny_checkpoint, kind)
        check(twins, where, RULES[rule], "none", Shape(0, 7), lambda _, t=twins: uncached(t.model))


@pytest.mark.parametrize("where", ["scattered", "a block is given", "the ends"])
@pytest.mark.parametrize("kind", KINDS)
def test_over_every_cache(tiny_checkpoint: Maker, kind: str, where: str) -> None:
    """What is given counts as committed from the start: no pass is about it, no quota."""
    twins, shape = Twins(tiny_checkpoint, kind), Shape(9, 4)
    m = twins.model
    dllm = "dllm_cache:prompt_interval_steps=3,gen_interval_steps=2,transfer_ratio=0.3"

    def shared(s: Shape) -> SharedPrefix:
        return SharedPrefix(m, twins.prefix(s), 2, 3)

    loops: dict[str, Callable[[Shape], Cached]] = {
        dllm: lambda s: DllmCache(m, s.p + s.u, 3, 2, 0.3),
        f"{dllm},new_tokens=recompute": lambda s: DllmCache(
            m, s.p + s.u, 3, 2, 0.3, new_tokens="recompute"
        ),
        "fast_dllm:mode=dual": lambda _: FastDllm(m, "dual"),
        f"bicache:depth=2,refresh_steps=3+{dllm}": lambda s: DllmCache(
            m, s.p + s.u, 3, 2, 0.3, prefix=shared(s)
        ),
        "bicache:depth=2,refresh_steps=3+fast_dllm": lambda s: FastDllm(
            m, "prefix", prefix=shared(s)
        ),
    }
    for cache, loop in loops.items():
        check(twins, where, RULES["a token a step"], cache, shape, loop)


def test_identities_hold(tiny_checkpoint: Maker) -> None:
    for kind, where in itertools.product(KINDS, TO_FILL):
        twins, shape = Twins(tiny_checkpoint, kind), Shape(9, 4)
        given = given_of(twins, where, 0)
        plain = twins.run("none", shape, RULES["one block, several a step"], given=given)
        for cache in (
            "bicache:depth=1,refresh_steps=1,splice=strict",
            "dllm_cache:prompt_interval_steps=1,gen_interval_steps=1",
            "fast_dllm:refresh_steps=1",
        ):
            other = twins.run(cache, shape, RULES["one block, several a step"], given=given)
            assert same_bits(plain, other)


def test_what_is_given_matters(tiny_checkpoint: Maker) -> None:
    """So that the tests above compare something: what is filled in depends on what is given."""
    twins, shape = Twins(tiny_checkpoint, "MHA"), Shape(0, 7)
    fill = TO_FILL["scattered"]
    found = set()
    for seed in range(6):
        given = given_of(twins, "scattered", seed)
        found.add(tuple(twins.run("none", shape, RULES["guidance"], given=given).tokens[fill]))
    assert len(found) > 1


# ---- in Python


def test_its_forms(text_llm: LLM) -> None:
    ids = [9, None, None, 10, None]
    forms: list[Any] = [
        ids,
        tuple(ids),
        [9, MASK, None, 10, MASK],
        np.array([9, MASK, MASK, 10, MASK]),
        np.array([9, MASK, MASK, 10, MASK], np.int32),
        f"w9 {MASK_TEXT}{MASK_TEXT} w10{MASK_TEXT}",
        f"w9 <|mdm_mask|>{MASK_TEXT} w10 <|mdm_mask|>",
    ]
    want = text_llm.generate("w5", response=ids)[0]
    assert want.tokens[[0, 3]].tolist() == [9, 10] and MASK not in want.tokens
    assert want.stats.steps == 3
    for form in forms:
        for response in (form, [form]):
            assert same_bits(text_llm.generate("w5", response=response)[0], want)


def test_what_a_stream_shows_can_be_given(text_llm: LLM) -> None:
    events = list(text_llm.stream("w5", gen_length=8, logits_eos_inf=True))
    for event in events[:-1]:
        shown = text_llm.generate("w5", response=event.text, logits_eos_inf=True)[0]
        assert shown.tokens.tolist() == events[-1].canvas[-8:].tolist()


def test_one_for_each_prompt(text_llm: LLM) -> None:
    responses = [[9, None, None], None, f"{MASK_TEXT} w7", np.array([MASK] * 5)]
    outs = text_llm.generate(["w5"] * 4, response=responses, logits_eos_inf=True)
    assert [len(out.tokens) for out in outs] == [3, 128, 2, 5]
    for out, response in zip(outs, responses, strict=True):
        (alone,) = text_llm.generate("w5", response=response, logits_eos_inf=True)  # type: ignore[arg-type]
        assert same_bits(out, alone)
    same = text_llm.generate(["w5", "w6"], response=[None, 9], gen_length=2)
    assert [out.tokens[1] for out in same] == [9, 9]
    absent = text_llm.generate(["w5", "w6"], response=[None, None], gen_length=4)
    assert [len(out.tokens) for out in absent] == [4, 4]


def test_a_stream_fills_in(text_llm: LLM) -> None:
    events = list(text_llm.stream("w5", response=[None, 9, None, 10]))
    assert len(events) == 2
    for event in events:
        assert event.canvas[[-3, -1]].tolist() == [9, 10]
        assert not {3, 5} & {int(p) for p in event.positions}
    assert MASK_TEXT in events[0].text and "w9" in events[0].text


def test_with_nothing_to_fill_nothing_runs(text_llm: LLM) -> None:
    text_llm.clear_prefixes()
    seen: list[str] = []
    with text_llm.tap(lambda layer, name, values: seen.append(name)):
        (out,) = text_llm.generate("w5", prefix="w6", response=[7, 8], cache="bicache:depth=1")
        assert list(text_llm.stream("w5", response="w7 w8")) == []
    assert seen == [] and out.tokens.tolist() == [7, 8] and out.text == "w7 w8"
    assert (out.finish_reason, out.stats.passes, out.stats.flops) == ("length", 0, 0)
    assert np.isnan(out.confidences).all()
    assert text_llm.prefix_stats()["entries"] == 0
    (ended,) = text_llm.generate("w5", response=[7, EOS, None], early_stop=True)
    assert (ended.text, ended.finish_reason, ended.stats.passes) == ("w7", "eos", 0)
    assert ended.tokens.tolist() == [7, EOS, EOS]


def test_its_length_is_the_default(tiny_checkpoint: TinyCheckpoint, copy_checkpoint: Any) -> None:
    folder = copy_checkpoint(tiny_checkpoint())
    stored = '{"format": 1, "generation": {"gen_length": 8, "block_length": 8, "steps": 2}}'
    (folder / "bicache.json").write_text(stored)
    llm = LLM(folder, threads=1)
    (out,) = llm.generate([5], response=[None] * 5 + [9])
    assert len(out.tokens) == 6 and out.stats.steps == 5
    (out,) = llm.generate([5], response=[None] * 5 + [9], steps=1)
    assert out.stats.steps == 1
    (out,) = llm.generate([5], response=[None] * 7 + [9], max_new_tokens=8)
    assert len(out.tokens) == 8


@pytest.mark.parametrize(
    ("response", "error", "parts"),
    [
        ([9, None], ValueError, ["response: expected 4 tokens (gen_length), got 2"]),
        ([9] * 5, ValueError, ["response: expected 4 tokens"]),
        ("w9", ValueError, ["expected 4 tokens", "got 1"]),
        ([9, None, None, 64], ValueError, ["response 0", "0..63", "got 64 at position 3"]),
        ([-1, None, None, 9], ValueError, ["response 0", "got -1"]),
        ([9, None, None, 9.5], TypeError, ["response 0", "9.5"]),
        ([9, None, None, True], TypeError, ["response 0", "True"]),
        ([9, None, None, "w9"], TypeError, ["response 0", "'w9'"]),
        (np.zeros((2, 2), int), ValueError, ["response 0", "1-D"]),
        (np.zeros(4), TypeError, ["response 0", "float64"]),
        ([], ValueError, ["response 0", "at least one token"]),
        ("", ValueError, ["response 0", "at least one token"]),
        ("\ud800", ValueError, ["response 0", "surrogate"]),
        ([None] * 4, ValueError, ["list of 1", "list of 4"]),
        ([[9], [9]], ValueError, ["list of 1", "list of 2"]),
        (5, TypeError, ["response", "int"]),
        (b"w9", TypeError, ["response", "bytes"]),
        ({9}, TypeError, ["response", "set"]),
    ],
)
def test_wrong_ones(text_llm: LLM, response: Any, error: type[Exception], parts: list[str]) -> None:
    with refuses(error, *parts):
        text_llm.generate("w5", response=response, gen_length=4)
    with refuses(error, *parts):
        text_llm.stream("w5", response=response, gen_length=4)


def test_text_needs_a_tokenizer(ids_llm: LLM) -> None:
    with refuses(ValueError, "response 0", "tokenizer.json"):
        ids_llm.generate([5], response="w9")
    assert len(ids_llm.generate([5], response=[None, 9])) == 1


def test_lengths_differ_in_a_batch_without_padding(ids_llm: LLM) -> None:
    """Every pass runs the sum of its requests' rows, and nobody's tokens change."""
    lengths = [(1, 3), (17, 8), (4, 1), (30, 12)]
    prompts = [np.arange(4, 4 + n) for n, _ in lengths]
    responses = [np.full(g, MASK) for _, g in lengths]
    rows: list[int] = []
    with ids_llm.tap(lambda layer, name, x: rows.append(len(x)) if name == "residual" else None):
        together = ids_llm.generate(prompts, response=responses)
    want = [sum(n + g for n, g in lengths if step < g) for step in range(12)]
    assert rows == [count for count in want for _ in range(ids_llm.config.layers)]
    for out, prompt, response in zip(together, prompts, responses, strict=True):
        (alone,) = ids_llm.generate(prompt, response=response)
        assert same_bits(out, alone)
        assert out.stats.rows_per_layer == alone.stats.rows_per_layer
        assert out.stats.flops == alone.stats.flops


def test_a_finished_response_beside_others(ids_llm: LLM) -> None:
    done, other = ids_llm.generate([[5]] * 2, response=[[7, 8], [None, 9, None]])
    assert done.tokens.tolist() == [7, 8] and done.stats.steps == 0
    assert same_bits(other, ids_llm.generate([5], response=[None, 9, None])[0])
