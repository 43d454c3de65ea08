"""The Python face of the engine: generate, stream, forward, tap."""

from __future__ import annotations

import inspect
import json
import logging
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import bicache
import numpy as np
import pytest
from bicache import LLM, _core
from bicache.inputs import as_ids
from conftest import BOS, EOS, MASK, TinyCheckpoint, edit_json, refuses

Copy = Callable[[Path], Path]


# ---- generate


def test_what_generate_returns(text_llm: LLM) -> None:
    outs = text_llm.generate(["w5 w6", "w7"], gen_length=6, seed=1)
    assert len(outs) == 2
    for out in outs:
        assert out.tokens.dtype == np.int32 and out.tokens.shape == (6,)
        assert out.confidences.dtype == np.float32 and out.confidences.shape == (6,)
        assert np.all((out.confidences > 0) & (out.confidences <= 1))
        assert MASK not in out.tokens
        expected = out.tokens.tolist()
        expected = expected[: expected.index(EOS)] if EOS in expected else expected
        assert out.text.split() == [f"w{i}" for i in expected if i > 3]
        assert out.finish_reason == ("eos" if EOS in out.tokens else "length")
        assert out.stats.steps == 6 and out.stats.flops > 0 and out.stats.seconds > 0
        assert json.loads(json.dumps(out.as_dict()))["tokens"] == out.tokens.tolist()
    alone = text_llm.generate("w7", gen_length=6)[0].stats
    assert alone.flops == outs[1].stats.flops
    # A batch reads the weights once for all: each request pays for its share of the rows.
    assert 0 < outs[1].stats.bytes_read < alone.bytes_read
    assert outs[0].stats.rows_per_layer == (6 * (3 + 6),) * 3
    assert outs[1].stats.rows == 6 * (2 + 6) * 3


@pytest.mark.parametrize(
    "prompt",
    [
        [5, 6],
        (5, 6),
        np.array([5, 6]),
        np.array([5, 6], np.uint8),
        np.array([5, 6], ">i4"),
        np.array([6, 5], np.int32)[::-1],
        [np.int64(5), np.int16(6)],
    ],
)
def test_all_forms_of_one_prompt_are_one_prompt(ids_llm: LLM, prompt: Any) -> None:
    expected = ids_llm.generate([[5, 6]], gen_length=4)[0].tokens
    for prompts in (prompt, [prompt], (prompt,)):
        outs = ids_llm.generate(prompts, gen_length=4)
        assert len(outs) == 1
        np.testing.assert_array_equal(outs[0].tokens, expected)


def test_read_only_arrays_are_fine_and_never_written(ids_llm: LLM) -> None:
    prompt = np.array([5, 6], np.int32)
    prompt.flags.writeable = False
    ids_llm.generate(prompt, gen_length=4)
    ids_llm.forward(prompt)
    assert prompt.tolist() == [5, 6]


def test_int32_arrays_are_taken_as_they_are() -> None:
    ids = np.arange(8, dtype=np.int32)
    assert as_ids(ids, "generate] prompt", 64) is ids
    assert as_ids(ids[::2], "generate] prompt", 64).flags.c_contiguous


def test_requests_do_not_depend_on_their_batch(ids_llm: LLM) -> None:
    prompts = [[5], list(range(4, 40)), [9, 8, 7]]
    together = ids_llm.generate(prompts, gen_length=6)
    for prompt, out in zip(prompts, together, strict=True):
        alone = ids_llm.generate(prompt, gen_length=6)[0]
        np.testing.assert_array_equal(alone.tokens, out.tokens)
        np.testing.assert_array_equal(alone.confidences, out.confidences)


def test_text_and_ids_are_the_same_request(text_llm: LLM) -> None:
    text = text_llm.generate("w9 w10", prefix="w5 w6", gen_length=4, cache="bicache:depth=1")[0]
    ids = text_llm.generate([9, 10], prefix=[BOS, 5, 6], gen_length=4, cache="bicache:depth=1")[0]
    np.testing.assert_array_equal(text.tokens, ids.tokens)
    assert ids.stats.prefix_hit is True


def test_prefix_hits_and_the_store(text_llm: LLM) -> None:
    text_llm.clear_prefixes()
    assert text_llm.prefix_stats()["entries"] == 0
    cache = bicache.BiCache(depth=2)
    prefixes = ["w5 w6", "w7 w8 w9", "w5 w6", None]
    outs = text_llm.generate(["w4"] * 4, prefix=prefixes, gen_length=2, cache=cache)
    assert [o.stats.prefix_hit for o in outs] == [False, False, True, None]
    assert outs[0].stats.entry_rows_per_layer == (3, 3, 0)
    assert outs[2].stats.entry_rows_per_layer == (0, 0, 0)
    assert text_llm.prefix_stats()["entries"] == 2
    assert text_llm.generate("w4", prefix="w5 w6", gen_length=2)[0].stats.prefix_hit is None
    text_llm.clear_prefixes()
    out = text_llm.generate("w4", prefix="w5 w6", gen_length=2, cache=cache)[0]
    assert out.stats.prefix_hit is False


def test_a_cache_per_prompt(ids_llm: LLM) -> None:
    caches = ["none", None, bicache.BiCache(depth=3), "naive"]
    outs = ids_llm.generate([[9]] * 4, prefix=[5, 6], gen_length=2, cache=caches)
    assert [o.stats.depth for o in outs] == [-1, -1, 3, 3]
    with refuses(ValueError, "cache", "list of 4", "list of 1"):
        ids_llm.generate([[9]] * 4, cache=["none"])


def test_empty_prompts(text_llm: LLM) -> None:
    behind = text_llm.generate("", prefix="w5 w6", gen_length=2)[0]
    np.testing.assert_array_equal(behind.tokens, text_llm.generate("w5 w6", gen_length=2)[0].tokens)
    assert len(text_llm.generate([[]], prefix=[5], gen_length=2)) == 1
    without = text_llm.generate("w5", prefix="", gen_length=2)[0]
    np.testing.assert_array_equal(without.tokens, text_llm.generate("w5", gen_length=2)[0].tokens)
    for prompt, prefix in (("", None), ("", ""), ([[]], None), ([[]], []), (["w5", ""], None)):
        with refuses(ValueError, "at least one token"):
            text_llm.generate(prompt, prefix=prefix)
    with refuses(ValueError, "at least one prompt"):
        text_llm.generate([])


def test_mask_tokens_in_the_prompt_stay_where_they_are(ids_llm: LLM) -> None:
    prompt = [5, MASK, 7, MASK]
    events = list(ids_llm.stream(prompt, prefix=[MASK, 4], gen_length=4, cache="bicache:depth=1"))
    assert len(events) == 4
    for event in events:
        assert event.canvas[:6].tolist() == [MASK, 4, *prompt]
        assert min(event.positions) >= 6
    assert MASK not in events[-1].canvas[6:]


def test_stop_strings_cut_the_text_only(text_llm: LLM) -> None:
    # Noise, so that the words differ.
    noisy: dict[str, Any] = {"gen_length": 6, "temperature": 3.0, "logits_eos_inf": True}
    whole = text_llm.generate("w5", **noisy)[0]
    places = sorted({whole.text.find(word) for word in whole.text.split()} - {0})
    assert len(places) >= 2 and whole.finish_reason == "length"
    stops = ["never", *(whole.text[place:].split()[0] for place in reversed(places))]
    cut = text_llm.generate("w5", **noisy, stop=stops)[0]
    assert cut.text == whole.text[: places[0]] and cut.finish_reason == "stop"
    np.testing.assert_array_equal(cut.tokens, whole.tokens)
    uncut = text_llm.generate("w5", **noisy, stop="never")[0]
    assert uncut.text == whole.text and uncut.finish_reason == "length"


def test_the_text_ends_at_the_end_of_text_token(
    tiny_checkpoint: TinyCheckpoint, copy_checkpoint: Copy
) -> None:
    source = tiny_checkpoint(layers=3, tokenizer=True)
    before = LLM(source).generate("w5", gen_length=6)[0].tokens.tolist()
    assert EOS not in before
    end = next(i for i in range(2, 6) if before[i] not in before[:i])
    folder = copy_checkpoint(source)
    edit_json(folder / "config.json", eos_token_id=before[end])
    out = LLM(folder).generate("w5", gen_length=6)[0]
    assert out.tokens.tolist() == before and out.finish_reason == "eos"
    assert out.text.split() == [f"w{i}" for i in before[:end] if i > 3]
    stopped = LLM(folder).generate("w5", gen_length=6, stop=f"w{before[end]}")[0]
    assert stopped.finish_reason == "eos"  # what comes after the end is not text


def test_ids_beyond_the_vocabulary_are_context_only(tiny_checkpoint: TinyCheckpoint) -> None:
    llm = LLM(tiny_checkpoint(vocab=60, embeddings=64))
    out = llm.generate([61, 62, 63], gen_length=4)[0]
    assert max(out.tokens) < 60
    assert llm.forward([61, 5]).shape == (2, 60)
    with refuses(ValueError, "0..63", "got 64"):
        llm.generate([64])


def test_interrupting_and_errors_leave_the_model_usable(ids_llm: LLM) -> None:
    expected = ids_llm.generate([5, 6], gen_length=4)[0].tokens

    def interrupt(layer: int, name: str, values: Any) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt), ids_llm.tap(interrupt):
        ids_llm.generate([5, 6], gen_length=4)
    np.testing.assert_array_equal(ids_llm.generate([5, 6], gen_length=4)[0].tokens, expected)


# ---- stream


def test_a_stream_is_the_generation_step_by_step(text_llm: LLM) -> None:
    settings: dict[str, Any] = {"prefix": "w6 w7", "gen_length": 6, "steps": 3}
    out = text_llm.generate("w5", **settings)[0]
    events, stream = [], text_llm.stream("w5", **settings)
    while True:
        try:
            events.append(next(stream))
        except StopIteration as end:
            last = end.value
            break
    np.testing.assert_array_equal(last.tokens, out.tokens)
    assert last.text == out.text == events[-1].text and last.finish_reason == out.finish_reason
    assert [e.step for e in events] == [0, 1, 2]
    canvas = np.array([BOS, 6, 7, 5] + [MASK] * 6, np.int32)
    confidences = np.zeros(10, np.float32)
    for e in events:
        assert e.canvas.dtype == np.int32 and e.positions.dtype == np.int64
        assert e.tokens.dtype == np.int32 and e.confidences.dtype == np.float32
        assert np.all(canvas[e.positions] == MASK) and len(e.positions) == 2
        canvas[e.positions], confidences[e.positions] = e.tokens, e.confidences
        np.testing.assert_array_equal(e.canvas, canvas)
        if EOS not in canvas:
            assert e.text.split().count(bicache.MASK_TEXT) == np.count_nonzero(canvas == MASK)
    np.testing.assert_array_equal(canvas[4:], out.tokens)
    np.testing.assert_array_equal(confidences[4:], out.confidences)


def test_a_stream_checks_at_once(text_llm: LLM) -> None:
    with refuses(ValueError, "gen_length"):
        text_llm.stream("w5", gen_length=0)
    with refuses(ValueError, "expected one, got 2"):
        text_llm.stream(["w5", "w6"])  # type: ignore[arg-type]


def test_leaving_a_stream_early(text_llm: LLM) -> None:
    stream = text_llm.stream("w5", gen_length=6)
    next(stream)
    stream.close()
    assert len(text_llm.generate("w5", gen_length=6)) == 1


# ---- forward and tap


def test_forward(ids_llm: LLM) -> None:
    logits = ids_llm.forward([5, MASK, 7])
    assert logits.dtype == np.float32 and logits.shape == (3, 64)
    assert np.all(np.isfinite(logits)) and logits.std() > 0.5
    some = ids_llm.forward(np.array([5, MASK, 7]), rows=[2, 0])
    np.testing.assert_array_equal(some, logits[[2, 0]])
    assert ids_llm.forward([5, 6], rows=[]).shape == (0, 64)


@pytest.mark.parametrize(
    ("tokens", "rows", "error"),
    [
        ([], None, ValueError),
        ([5] * 257, None, ValueError),
        ([64], None, ValueError),
        ([-1], None, ValueError),
        ([5.0], None, TypeError),
        ("w5", None, TypeError),
        (5, None, TypeError),
        (np.array([[5]]), None, ValueError),
        ([5, 6], [2], ValueError),
        ([5, 6], [-1], ValueError),
        ([5, 6], [0.5], TypeError),
        ([5, 6], [True, False], TypeError),
        ([5, 6], 1, TypeError),
        ([5, 6], [[0]], ValueError),
        ([5, 6], [[0], [0, 1]], ValueError),
        ([5, 6], [10**30], TypeError),
        ([5, 6], "0", TypeError),
    ],
)
def test_wrong_forwards(ids_llm: LLM, tokens: Any, rows: Any, error: type[Exception]) -> None:
    with refuses(error, "[forward]"):
        ids_llm.forward(tokens, rows)


def test_a_tap_sees_every_layer_and_ends_with_its_block(ids_llm: LLM) -> None:
    inner: list[tuple[int, str]] = []
    outer: list[tuple[int, str]] = []
    with ids_llm.tap(lambda layer, name, values: outer.append((layer, name))):
        with ids_llm.tap(lambda layer, name, values: inner.append((layer, name))):
            ids_llm.forward([5, 6])
        assert not outer
        ids_llm.forward([5, 6])
    assert {0, 1, 2} <= {layer for layer, _ in inner}
    assert inner == outer
    ids_llm.forward([5, 6])
    assert inner == outer


def test_an_exception_in_a_tap_reaches_the_caller(ids_llm: LLM) -> None:
    def fail(layer: int, name: str, values: Any) -> None:
        raise ArithmeticError("from the tap")

    with pytest.raises(ArithmeticError, match="from the tap"), ids_llm.tap(fail):
        ids_llm.forward([5, 6])
    assert ids_llm.forward([5, 6]).shape == (2, 64)


def test_a_tap_must_be_callable(ids_llm: LLM) -> None:
    with refuses(TypeError, "callable"), ids_llm.tap(3):  # type: ignore[arg-type]
        pass


# ---- what it prints, logs and imports


def test_silent_by_default(tiny_checkpoint: TinyCheckpoint, capfd: Any) -> None:
    llm = LLM(tiny_checkpoint(tokenizer=True))
    llm.generate("w5", gen_length=4)
    list(llm.stream("w5", gen_length=4))
    with pytest.raises(ValueError):
        llm.generate("w5", gen_length=0)
    assert capfd.readouterr() == ("", "")


def test_a_progress_bar_goes_to_stderr(text_llm: LLM, capfd: Any) -> None:
    text_llm.generate(["w5", "w6"], gen_length=4, progress=True)
    out, err = capfd.readouterr()
    assert out == "" and "8/8" in err


def test_logging(tiny_checkpoint: TinyCheckpoint, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG, "bicache")
    LLM(tiny_checkpoint()).generate([5], gen_length=4)
    levels = [(r.name, r.levelno) for r in caplog.records]
    assert levels == [("bicache", logging.INFO), ("bicache", logging.DEBUG)]
    assert "2 layers" in caplog.messages[0] and "4 tokens" in caplog.messages[1]


def test_importing_needs_only_numpy() -> None:
    code = (
        "import sys, bicache; "
        "print(*{'torch', 'tokenizers', 'tqdm', 'ml_dtypes'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "" and done.stderr == ""


def test_public_names_exist_and_have_docs() -> None:
    for name in bicache.__all__:
        value = getattr(bicache, name)
        assert not callable(value) or inspect.getdoc(value), name
    assert bicache.__version__ == _core.__version__


def test_shipped_models_load() -> None:
    assert "records" in bicache.shipped_models()
    for name in bicache.shipped_models():
        llm = LLM(name, cache="auto", threads=1)
        assert llm.tokenizer is not None and llm.calibration
