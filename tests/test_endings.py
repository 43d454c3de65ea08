"""What ends a text: end tokens, stop strings, and ending a request with its text."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from bicache import LLM, Output, StepEvent, Tokenizer
from bicache.endings import Ending
from conftest import EOS, MASK, TinyCheckpoint, edit_json, refuses
from parity import same_bits

Copy = Callable[[Path], Path]
NOISY: dict[str, Any] = {"gen_length": 12, "block_length": 4, "temperature": 3.0}


# ---- end tokens


def test_end_tokens_replace_the_models(text_llm: LLM) -> None:
    seen = 0
    for seed in range(8):
        (plain,) = text_llm.generate("w5", **NOISY, seed=seed)
        tokens = plain.tokens.tolist()
        for ends in ([], [tokens[7]], [tokens[9], tokens[3]], (EOS,), np.array([EOS, 5])):
            (out,) = text_llm.generate("w5", **NOISY, seed=seed, end_tokens=ends)
            assert same_bits(out, plain)
            at = min([tokens.index(end) for end in ends if end in tokens], default=len(tokens))
            assert out.text.split() == [f"w{i}" for i in tokens[:at] if i > 3]
            assert out.finish_reason == ("eos" if at < len(tokens) else "length")
            seen += at < len(tokens)
    assert seen > 16


def test_stored_end_tokens(tiny_checkpoint: TinyCheckpoint, copy_checkpoint: Copy) -> None:
    folder = copy_checkpoint(tiny_checkpoint(layers=3, tokenizer=True))
    tokens = LLM(folder).generate("w5", **NOISY)[0].tokens.tolist()
    stored = f'{{"format": 1, "generation": {{"end_tokens": [{tokens[2]}]}}}}'
    (folder / "bicache.json").write_text(stored)
    llm = LLM(folder)
    (out,) = llm.generate("w5", **NOISY)
    assert out.finish_reason == "eos" and len(out.text.split()) <= 2
    assert llm.generate("w5", **NOISY, end_tokens=[])[0].finish_reason == "length"


def test_early_stop_follows_the_end_tokens(text_llm: LLM) -> None:
    fewer = 0
    for seed in range(6):
        (plain,) = text_llm.generate("w5", **NOISY, seed=seed, end_tokens=[])
        ends = [int(plain.tokens[5]), EOS]
        (whole,) = text_llm.generate("w5", **NOISY, seed=seed, end_tokens=ends)
        (early,) = text_llm.generate("w5", **NOISY, seed=seed, end_tokens=ends, early_stop=True)
        assert early.text == whole.text and early.finish_reason == "eos"
        assert set(early.tokens[np.isnan(early.confidences)].tolist()) <= {ends[0]}
        fewer += early.stats.steps < whole.stats.steps
    assert fewer > 3


@pytest.mark.parametrize(
    ("options", "error", "part"),
    [
        ({"end_tokens": [64]}, ValueError, "0..63, got 64"),
        ({"end_tokens": [-1]}, ValueError, "got -1"),
        ({"end_tokens": [5, MASK]}, ValueError, "other than the mask's"),
        ({"end_tokens": 5}, TypeError, "a list of integers"),
        ({"end_tokens": [5.0]}, TypeError, "a list of integers"),
        ({"end_tokens": [], "early_stop": True}, ValueError, "early_stop"),
    ],
)
def test_wrong_end_tokens(
    text_llm: LLM, options: dict[str, Any], error: type[Exception], part: str
) -> None:
    with refuses(error, part):
        text_llm.generate("w5", gen_length=4, **options)


@pytest.mark.parametrize("name", ["<|eot_id|>", "<|im_end|>"])
def test_the_tokenizer_knows_the_end_of_turn(
    tiny_checkpoint: TinyCheckpoint, copy_checkpoint: Copy, name: str
) -> None:
    folder = copy_checkpoint(tiny_checkpoint(tokenizer=True))
    text = (folder / "tokenizer.json").read_text().replace('"w17"', f'"{name}"')
    (folder / "tokenizer.json").write_text(text)
    assert LLM(folder).config.eot_token_id == 17
    edit_json(folder / "config.json", eos_token_id=17)  # it is the end of text already
    assert LLM(folder).config.eot_token_id == -1


@pytest.mark.parametrize(
    ("eos", "mask", "eot"), [(126081, 126336, 126348), (151643, 151666, 151645)]
)
def test_published_ends_without_a_tokenizer(
    tiny_checkpoint: TinyCheckpoint, copy_checkpoint: Copy, eos: int, mask: int, eot: int
) -> None:
    """LLaDA's (spec E.1) and Dream's (E.3), whose config.json names one of two."""
    small = {"layers": 1, "dim": 4, "heads": 1, "ffn": 4, "vocab": 152064}
    folder = copy_checkpoint(tiny_checkpoint(**small))
    edit_json(folder / "config.json", eos_token_id=eos, mask_token_id=mask)
    llm = LLM(folder, threads=1)
    assert llm.config.eot_token_id == eot
    for end in (eos, eot):
        out = llm.generate([5], response=[7, end, 9])[0]
        assert out.finish_reason == "eos"
    assert llm.generate([5], response=[7, 8, 9])[0].finish_reason == "length"


# ---- stop strings


@pytest.fixture(scope="module")
def spelled(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    """Bytes and some pairs: mask 0, then the two bytes of an accented e, a, b, c, ab, an end."""
    from tokenizers import Tokenizer as Raw
    from tokenizers import decoders, models

    pieces = ["<m>", "\u00c3", "\u00a9", "a", "b", "c", "ab", "<end>"]
    raw = Raw(models.BPE({piece: i for i, piece in enumerate(pieces)}, []))
    raw.decoder = decoders.ByteLevel()
    path = tmp_path_factory.mktemp("spelled") / "tokenizer.json"
    raw.save(str(path))
    return Tokenizer(path)


@pytest.mark.parametrize(
    ("response", "stops", "settled"),
    [
        ([3, 4, 0], ["b"], True),
        ([3, 0, 4], ["b"], False),  # what comes before it is not known
        ([3, 4, 0], ["abc", "b"], False),  # with a c next, the text would end before the a
        ([3, 4, 3, 0], ["abc", "b"], True),
        ([3, 4, 0], ["bc", "b"], True),  # both would end it at the same place
        ([3, 4, 5], ["abcd", "c"], True),  # nothing is to come
        ([1, 0], ["\ufffd"], False),  # half of a character
        ([1, 2, 4, 0], ["\u00e9b"], True),
        ([1, 2, 0, 4], ["\u00e9b"], False),
        ([3, 4, 7, 0], ["b"], True),
        ([3, 4, 7, 0], ["abc", "b"], True),  # the text has ended before a c could come
        ([3, 7, 4, 0], ["b"], False),  # behind the end
        ([0, 0], ["a"], False),
    ],
)
def test_when_a_stop_string_settles_the_text(
    spelled: Tokenizer, response: list[int], stops: list[str], settled: bool
) -> None:
    ending = Ending(spelled, 0, (7,), tuple(stops), True)
    assert ending.settled(np.array(response, np.int32)) is settled


def test_a_settled_text_is_the_final_one(spelled: Tokenizer) -> None:
    """Whatever the masks become; and with nothing masked, a stopped text is settled."""
    rng = np.random.default_rng(5)
    found = later = 0
    for _ in range(1500):
        full = rng.choice(np.arange(1, 8), 8, p=[0.1, 0.1, 0.25, 0.2, 0.2, 0.1, 0.05])
        full = full.astype(np.int32)
        pieces = ["a", "b", "c", "ab", "\u00e9"]
        stops = {"".join(rng.choice(pieces, rng.integers(1, 4))) for _ in range(rng.integers(1, 4))}
        ending = Ending(spelled, 0, (7,), tuple(sorted(stops)), True)
        text, reason = ending.text(full)
        assert ending.settled(full) == (reason == "stop")
        for known in range(8):
            part = full.copy()
            part[known:] = 0
            part[known + 1 :] = np.where(rng.random(7 - known) < 0.5, full[known + 1 :], 0)
            if ending.settled(part):
                found += 1
                assert ending.text(part[:known]) == (text, reason) and reason == "stop"
            else:
                later += reason == "stop"
    assert found > 500 and later > 500


def words_of(llm: LLM, seed: int) -> list[str]:
    return llm.generate("w5", **NOISY, seed=seed, end_tokens=[])[0].text.split()


def streamed(llm: LLM, **settings: Any) -> tuple[list[StepEvent], Output]:
    events, stream = [], llm.stream("w5", **settings)
    while True:
        try:
            events.append(next(stream))
        except StopIteration as end:
            return events, end.value


def test_early_stop_with_stop_strings(text_llm: LLM) -> None:
    """The same text in fewer steps; masked positions become the end token."""
    fewer = 0
    for seed, place in itertools.product(range(4), (1, 4, 7)):
        word = words_of(text_llm, seed)[place]
        stop = [f" {word} ", "never"]
        (whole,) = text_llm.generate("w5", **NOISY, seed=seed, stop=stop)
        (early,) = text_llm.generate("w5", **NOISY, seed=seed, stop=stop, early_stop=True)
        assert (early.text, early.finish_reason) == (whole.text, whole.finish_reason)
        assert set(early.tokens[np.isnan(early.confidences)].tolist()) <= {EOS}
        fewer += early.stats.steps < whole.stats.steps
        events, last = streamed(text_llm, **NOISY, seed=seed, stop=stop, early_stop=True)
        assert same_bits(last, early) and last.text == early.text == events[-1].text
        assert len(events) == early.stats.steps
    assert fewer > 6


def test_early_stop_in_a_batch(text_llm: LLM) -> None:
    stop = f" {words_of(text_llm, 0)[2]} "
    settings: dict[str, Any] = NOISY | {"stop": stop, "early_stop": True, "seed": 0}
    prompts = ["w5", "w6 w7", "w5"]
    together = text_llm.generate(prompts, **settings)
    for prompt, out in zip(prompts, together, strict=True):
        (alone,) = text_llm.generate(prompt, **settings)
        assert same_bits(alone, out) and alone.text == out.text
        assert alone.stats.steps == out.stats.steps
    assert together[0].stats.steps < 12 and together[0].finish_reason == "stop"


def test_a_given_response_may_have_ended(text_llm: LLM) -> None:
    settings: dict[str, Any] = {"stop": "w9", "early_stop": True}
    responses = [[7, 9, None, 11], [None, 9, None, 11], [7, 9, 8, 11], [7, EOS, 9, None]]
    outs = text_llm.generate(["w5"] * 4, response=responses, **settings)
    assert [o.stats.passes == 0 for o in outs] == [True, False, True, True]
    assert [o.finish_reason for o in outs] == ["stop", outs[1].finish_reason, "stop", "eos"]
    assert [o.text.strip() for o in outs[::2]] == ["w7", "w7"] and outs[3].text == "w7"
    assert outs[0].tokens.tolist() == [7, 9, EOS, 11]
    for response, out in zip(responses, outs, strict=True):
        events, last = streamed(text_llm, response=response, **settings)
        assert same_bits(last, out) and len(events) == out.stats.steps


def test_stop_strings_alone_can_end_early(text_llm: LLM) -> None:
    stop = f" {words_of(text_llm, 0)[2]} "
    settings: dict[str, Any] = NOISY | {"stop": stop, "end_tokens": [], "seed": 0}
    (whole,) = text_llm.generate("w5", **settings)
    (early,) = text_llm.generate("w5", **settings, early_stop=True)
    assert early.text == whole.text and early.finish_reason == "stop"
    left = np.isnan(early.confidences)
    assert left.any() and (early.tokens[left] == MASK).all()
    assert early.stats.steps < whole.stats.steps
