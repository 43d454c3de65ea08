"""generate() without a cache against a plain transcription of LLaDA's generate(), with the same
noise."""

from dataclasses import asdict, replace
from typing import Any

import bicache
import numpy as np
import pytest
import torch
from bicache import _core
from parity import (
    CONFIDENCE,
    Maker,
    check_output,
    clear_cases,
    edited,
    reference_trace,
)
from parity import tokens as random_tokens
from reference import Llada, NoCache, Options, Trace, get_num_transfer_tokens

MODEL = {"layers": 2, "dim": 32, "heads": 4, "kv_heads": 2, "ffn": 48, "vocab": 41, "scale": 5.0}
PROMPT = 9

# gen_length, steps, block_length
LENGTHS = {
    "one block, remainder": Options(12, 5, 12),
    "a token a step": Options(8, 8, 4),
    "two a step": Options(12, 6, 4),
    "blocks with a remainder": Options(12, 9, 4),
    "a block a step": Options(12, 3, 4),
    "everything at once": Options(10, 1, 10),
    "more steps than tokens": Options(6, 20, 3),
    "one token": Options(1, 1, 1),
    "one token, idle steps": Options(1, 4, 1),
}
SAMPLING: dict[str, dict[str, Any]] = {
    "greedy": {},
    "warm": {"temperature": 0.6},
    "hot": {"temperature": 2.5},
    "greedy, random order": {"remasking": "random"},
    "warm, random order": {"remasking": "random", "temperature": 0.6},
}


def prompt_of(model: Llada, seed: int, count: int = PROMPT) -> torch.Tensor:
    return random_tokens(count, model, seed)


def trace_of(model: Llada, options: Options, seed: int) -> Trace:
    return reference_trace(NoCache(model), model, prompt_of(model, seed), options, seed)


def run(llm: bicache.LLM, prompt: torch.Tensor, options: Options, seed: int) -> bicache.Output:
    (output,) = llm.generate([prompt.numpy()], cache="none", seed=seed, **asdict(options))
    return output


@pytest.mark.parametrize("sampling", SAMPLING)
@pytest.mark.parametrize("lengths", LENGTHS)
def test_tokens_equal_the_reference(tiny_checkpoint: Maker, lengths: str, sampling: str) -> None:
    folder = tiny_checkpoint(**MODEL, seed=21)
    model, llm = Llada(folder), bicache.LLM(folder, threads=1)
    options = replace(LENGTHS[lengths], **SAMPLING[sampling])
    for seed, trace in clear_cases(lambda seed: trace_of(model, options, seed), count=3):
        check_output(run(llm, prompt_of(model, seed), options, seed), trace)


@pytest.mark.parametrize("stored", ["f32", "bf16"])
@pytest.mark.parametrize("flags", [{"shift": True}, {"qk_norm": True}])
def test_other_models(tiny_checkpoint: Maker, flags: dict[str, Any], stored: str) -> None:
    folder = tiny_checkpoint(**MODEL, **flags, dtype=stored, seed=22)
    model, llm = Llada(folder), bicache.LLM(folder, dtype="f32", threads=1)
    options = Options(12, 6, 4, temperature=0.3)
    for seed, trace in clear_cases(lambda seed: trace_of(model, options, seed), count=2):
        check_output(run(llm, prompt_of(model, seed), options, seed), trace)


def test_noise_matters_and_is_the_engines(tiny_checkpoint: Maker) -> None:
    """The cases above would not pass by luck: another seed or stream gives other tokens."""
    folder = tiny_checkpoint(**MODEL, seed=21)
    model, llm = Llada(folder), bicache.LLM(folder, threads=1)
    for sampling in ("warm", "hot", "greedy, random order"):
        options = replace(LENGTHS["a token a step"], **SAMPLING[sampling])
        prompt = prompt_of(model, 0)
        responses = {tuple(run(llm, prompt, options, seed).tokens.tolist()) for seed in range(6)}
        assert len(responses) > 1, sampling
        again = [run(llm, prompt, options, 3).tokens.tolist() for _ in range(2)]
        assert again[0] == again[1]
    greedy = [run(llm, prompt_of(model, 0), Options(8, 8, 4), seed).tokens for seed in (0, 1)]
    assert greedy[0].tolist() == greedy[1].tolist()


def test_noise_is_uniform_and_keyed() -> None:
    u = _core.uniform(7, "token", 3, 11, 20000)
    assert u.dtype == np.float64 and 0 <= u.min() and u.max() < 1
    assert abs(u.mean() - 0.5) < 0.01 and abs(u.var() - 1 / 12) < 0.002
    assert (_core.uniform(7, "token", 3, 11, 50) == u[:50]).all()
    keys = [(7, "confidence", 3, 11), (8, "token", 3, 11), (7, "token", 4, 11), (7, "token", 3, 12)]
    for key in keys:
        assert abs(np.corrcoef(_core.uniform(*key, 20000), u)[0, 1]) < 0.05, key


def test_steps_commit_the_same_positions(tiny_checkpoint: Maker) -> None:
    folder = tiny_checkpoint(**MODEL, seed=21)
    model, llm = Llada(folder), bicache.LLM(folder, threads=1)
    for options in (Options(12, 9, 4), Options(12, 5, 12, temperature=0.6)):
        for seed, trace in clear_cases(lambda s, o=options: trace_of(model, o, s), count=2):
            prompt = prompt_of(model, seed)
            stream = llm.stream(prompt.numpy(), cache="none", seed=seed, **asdict(options))
            events = list(stream)
            assert [e.step for e in events] == list(range(len(trace.commits)))
            assert [e.positions.tolist() for e in events] == trace.commits
            for e in events:
                at = e.positions - len(prompt)
                assert e.tokens.tolist() == trace.tokens[at].tolist()
                np.testing.assert_allclose(
                    e.confidences, trace.confidences[at], rtol=0, atol=CONFIDENCE
                )
                assert e.canvas[: len(prompt)].tolist() == prompt.tolist()
            assert events[-1].canvas[len(prompt) :].tolist() == trace.tokens.tolist()


def test_the_quota_is_the_published_one(tiny_checkpoint: Maker) -> None:
    llm = bicache.LLM(tiny_checkpoint(**MODEL, seed=21), threads=1)
    for masks, steps in [(12, 5), (12, 12), (7, 3), (3, 5), (8, 1)]:
        stream = llm.stream([5, 6, 7], gen_length=masks, steps=steps, block_length=masks)
        sizes = [len(e.positions) for e in stream]
        quota = [count for count in get_num_transfer_tokens(masks, steps) if count > 0]
        assert sizes == quota and sum(quota) == masks


def test_mask_ids_in_the_prompt_stay(tiny_checkpoint: Maker) -> None:
    """Prompt rows are fixed by position, never by what they hold."""
    folder = tiny_checkpoint(**MODEL, seed=21)
    model, llm = Llada(folder), bicache.LLM(folder, threads=1)
    options = Options(12, 9, 4, temperature=0.6)
    masked = [0, 3, PROMPT - 1]  # the last one lies next to the response

    def prompt(seed: int) -> torch.Tensor:
        ids = prompt_of(model, seed)
        ids[masked] = model.mask
        return ids

    def trace(seed: int) -> Trace:
        return reference_trace(NoCache(model), model, prompt(seed), options, seed)

    for seed, expected in clear_cases(trace, count=3):
        check_output(run(llm, prompt(seed), options, seed), expected)
        for event in llm.stream(prompt(seed).numpy(), cache="none", seed=seed, **asdict(options)):
            assert event.canvas[:PROMPT].tolist() == prompt(seed).tolist()


def test_a_prompt_of_masks_and_one_token(tiny_checkpoint: Maker) -> None:
    folder = tiny_checkpoint(**MODEL, seed=21)
    model, llm = Llada(folder), bicache.LLM(folder, threads=1)
    options = Options(6, 4, 6)

    def prompt(seed: int) -> torch.Tensor:
        # One other token, or all rows would be equal and every choice a tie.
        return torch.cat([prompt_of(model, seed, 1), torch.full((4,), model.mask)])

    def trace(seed: int) -> Trace:
        return reference_trace(NoCache(model), model, prompt(seed), options, seed)

    for seed, expected in clear_cases(trace, count=2):
        check_output(run(llm, prompt(seed), options, seed), expected)


def frequent_tokens(folder_model: Llada, options: Options) -> list[int]:
    """Ids by how often the reference answers with them, most often first."""
    counts = np.zeros(folder_model.vocab)
    for seed in range(6):
        counts += np.bincount(trace_of(folder_model, options, seed).tokens, minlength=len(counts))
    counts[folder_model.mask] = 0
    return np.argsort(-counts, kind="stable").tolist()


def test_a_predicted_mask_stays_masked(tiny_checkpoint: Maker) -> None:
    """The reference does not ban the mask id: such a position stays masked and uses up quota."""
    folder = tiny_checkpoint(**MODEL, seed=21)
    options = Options(12, 6, 4, temperature=2.5)  # hot: every id comes up now and then
    left = again = 0
    for mask in frequent_tokens(Llada(folder), options)[:2]:
        other = edited(folder, mask_token_id=mask)
        model, llm = Llada(other), bicache.LLM(other, threads=1)
        for seed, trace in clear_cases(lambda s, m=model: trace_of(m, options, s), count=5):
            trace.confidences[trace.tokens == mask] = torch.nan  # for us, still undecided
            check_output(run(llm, prompt_of(model, seed), options, seed), trace)
            left += int((trace.tokens == mask).sum())
            positions = sum(trace.commits, [])
            again += len(positions) - len(set(positions))
    assert left > 0, "no mask was left at the end: nothing was tested"
    assert again > 0, "no position was committed twice: nothing was tested"


@pytest.mark.parametrize("temperature", [0.0, 0.6])
@pytest.mark.parametrize(
    "flags",
    [
        {"logits_eos_inf": True},
        {"confidence_eos_eot_inf": True},
        {"logits_eos_inf": True, "confidence_eos_eot_inf": True},
        {"confidence_eos_eot_inf": True, "remasking": "random"},
    ],
)
def test_eos_options(tiny_checkpoint: Maker, flags: dict[str, Any], temperature: float) -> None:
    folder = tiny_checkpoint(**MODEL, seed=21)
    plain = Options(12, 6, 12, temperature=temperature)
    options = replace(plain, **flags)
    # End of text and end of turn become the ids this model likes best, so that they matter.
    eos, eot = frequent_tokens(Llada(folder), plain)[:2]
    other = edited(folder, eos_token_id=eos, eot_token_id=eot)
    model, llm = Llada(other), bicache.LLM(other, threads=1)
    names = [name for name, value in flags.items() if value is True]
    changed = eos_seen = 0
    for seed, trace in clear_cases(lambda s: trace_of(model, options, s), count=4):
        output = run(llm, prompt_of(model, seed), options, seed)
        check_output(output, trace)
        without = trace_of(model, replace(options, **dict.fromkeys(names, False)), seed)
        changed += not torch.allclose(without.confidences, trace.confidences, atol=CONFIDENCE)
        eos_seen += eos in without.tokens
        if options.logits_eos_inf:
            assert eos not in output.tokens
    assert changed > 0, "the option made no difference: nothing was tested"
    assert eos_seen > 0


def test_with_noise_eos_keeps_its_confidence(tiny_checkpoint: Maker) -> None:
    """confidence_eos_eot_inf as published: above temperature 0 it leaves end of text alone."""
    folder = tiny_checkpoint(**MODEL, seed=21)
    plain = Options(12, 6, 12)
    eos, eot = frequent_tokens(Llada(folder), plain)[:2]
    llm = bicache.LLM(edited(folder, eos_token_id=eos, eot_token_id=eot), threads=1)
    prompts = [prompt_of(Llada(folder), seed).numpy() for seed in range(8)]
    seen = {}
    for temperature in (0.0, 0.05):
        outputs = llm.generate(
            prompts,
            cache="none",
            **asdict(replace(plain, temperature=temperature, confidence_eos_eot_inf=True)),
        )
        ids = np.concatenate([o.tokens for o in outputs])
        confidences = np.concatenate([o.confidences for o in outputs])
        seen[temperature] = {
            "eos": confidences[ids == eos],
            "eot": confidences[ids == eot],
        }
    assert len(seen[0.0]["eos"]) and not seen[0.0]["eos"].any()
    assert len(seen[0.05]["eos"]) and seen[0.05]["eos"].all()
    for temperature in seen:
        assert len(seen[temperature]["eot"]) and not seen[temperature]["eot"].any()
