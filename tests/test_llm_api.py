"""The Python face of the engine: LLM, generate, stream, forward, tap, and what they refuse."""

from __future__ import annotations

import contextlib
import inspect
import json
import logging
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import bicache
import numpy as np
import pytest
from bicache import LLM, _core
from bicache.inputs import as_ids
from bicache.options import ALIASES, option_table
from conftest import BOS, EOS, MASK, TinyCheckpoint

Copy = Callable[[Path], Path]


@contextlib.contextmanager
def refuses(error: type[Exception], *parts: str) -> Iterator[None]:
    """An error of exactly this kind whose message reads "[where] ...: expected ..., got ..."."""
    with pytest.raises(error) as caught:
        yield
    message = str(caught.value)
    assert message.startswith("["), message
    for part in ("expected", *parts):
        assert part in message, message


def edit_json(path: Path, **changes: Any) -> None:
    """Sets members of a JSON object; None removes one."""
    data = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({k: v for k, v in data.items() if v is not None}))


# ---- loading


def test_a_hub_id_says_what_to_download_and_how() -> None:
    with refuses(
        FileNotFoundError,
        "GSAI-ML/LLaDA-8B-Instruct",
        "config.json",
        "model.safetensors.index.json",
        "tokenizer.json",
        "huggingface-cli download GSAI-ML/LLaDA-8B-Instruct --local-dir LLaDA-8B-Instruct",
        "shipped",
        *bicache.shipped_models(),
    ):
        LLM("GSAI-ML/LLaDA-8B-Instruct")


def test_a_missing_folder_lists_the_shipped_models(tmp_path: Path) -> None:
    with refuses(FileNotFoundError, "no such folder", "shipped model", "config.json"):
        LLM(tmp_path / "nothing")
    with refuses(FileNotFoundError, "there is no config.json"):
        LLM(tmp_path)


def test_a_file_is_not_a_folder(tiny_checkpoint: TinyCheckpoint) -> None:
    with refuses(NotADirectoryError, "pass its folder"):
        LLM(tiny_checkpoint() / "model.safetensors")


@pytest.mark.parametrize("path", [3, None, ["a"]])
def test_paths_of_a_wrong_type(path: Any) -> None:
    with refuses(TypeError, "path"):
        LLM(path)


@pytest.mark.parametrize("path", ["", "a\0b"])
def test_paths_that_cannot_be(path: str) -> None:
    with refuses(ValueError, "path"):
        LLM(path)


def test_missing_weights(tiny_checkpoint: TinyCheckpoint, copy_checkpoint: Copy) -> None:
    folder = copy_checkpoint(tiny_checkpoint())
    (folder / "model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match="model.safetensors"):
        LLM(folder)


@pytest.mark.parametrize("keep", [0, 4, 100, -1])
def test_truncated_weights(
    tiny_checkpoint: TinyCheckpoint, copy_checkpoint: Copy, keep: int
) -> None:
    folder = copy_checkpoint(tiny_checkpoint())
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:keep])
    with pytest.raises(ValueError, match="model.safetensors"):
        LLM(folder)


@pytest.mark.parametrize(
    ("changes", "parts"),
    [
        ({"n_layers": 3}, ["blocks.2"]),
        ({"n_layers": 1}, ["blocks.1"]),
        ({"mlp_hidden_size": 40}, ["ff_proj", "40", "48"]),
        ({"n_kv_heads": 2}, ["k_proj"]),
        ({"qk_layernorm": True}, ["q_norm"]),
        ({"n_heads": 5}, ["n_heads"]),
        ({"d_model": 0}, ["d_model"]),
        ({"mask_token_id": 64}, ["mask_token_id"]),
        ({"model_type": "gpt2"}, ["model_type", "llada"]),
        ({"alibi": True}, ["alibi"]),
    ],
)
def test_a_config_that_disagrees(
    tiny_checkpoint: TinyCheckpoint,
    copy_checkpoint: Copy,
    changes: dict[str, Any],
    parts: list[str],
) -> None:
    folder = copy_checkpoint(tiny_checkpoint())
    edit_json(folder / "config.json", **changes)
    with refuses(ValueError, *parts):
        LLM(folder)


def test_a_corrupt_config(tiny_checkpoint: TinyCheckpoint, copy_checkpoint: Copy) -> None:
    folder = copy_checkpoint(tiny_checkpoint())
    (folder / "config.json").write_text('{"model_type": "llada"')
    with pytest.raises(ValueError, match="config.json"):
        LLM(folder)


@pytest.mark.parametrize(
    ("settings", "error", "part"),
    [
        ({"threads": 0}, ValueError, "threads"),
        ({"threads": -1}, ValueError, "threads"),
        ({"threads": 10**9}, ValueError, "threads"),
        ({"threads": True}, TypeError, "threads"),
        ({"threads": 1.5}, TypeError, "threads"),
        ({"dtype": "int4"}, ValueError, "bf16"),
        ({"dtype": 32}, TypeError, "dtype"),
        ({"backend": "cuda"}, ValueError, "packed"),
        ({"backend": None}, TypeError, "backend"),
        ({"prefix_budget_bytes": -1}, ValueError, "prefix_budget_bytes"),
        ({"prefix_budget_bytes": 1e9}, TypeError, "prefix_budget_bytes"),
        ({"prefix_budget_bytes": 2**63}, ValueError, "prefix_budget_bytes"),
        ({"cache": "lru"}, ValueError, "bicache"),
        ({"cache": None}, TypeError, "policy"),
        ({"cache": "auto"}, ValueError, "calibration"),
    ],
)
def test_wrong_settings_of_an_llm(
    tiny_checkpoint: TinyCheckpoint, settings: dict[str, Any], error: type[Exception], part: str
) -> None:
    with refuses(error, part):
        LLM(tiny_checkpoint(), **settings)


def test_what_an_llm_tells(tiny_checkpoint: TinyCheckpoint) -> None:
    llm = LLM(tiny_checkpoint(dtype="bf16"), threads=2, cache=bicache.BiCache(depth=1))
    assert (llm.dtype, llm.backend, llm.threads) == ("bf16", "packed", 2)
    assert llm.cache == "bicache:depth=1,refresh_steps=16,splice=official"
    assert llm.config.layers == 2 and llm.config.mask_token_id == MASK
    assert llm.tokenizer is None and llm.weight_bytes > 0
    assert "threads=2" in repr(llm)
    assert LLM(tiny_checkpoint(), threads=1).dtype == "f32"
    default = LLM(tiny_checkpoint()).threads
    assert default == _core.available_threads()


def test_the_end_of_turn_id_comes_from_the_tokenizer(
    tiny_checkpoint: TinyCheckpoint, copy_checkpoint: Copy
) -> None:
    folder = copy_checkpoint(tiny_checkpoint(tokenizer=True))
    text = (folder / "tokenizer.json").read_text().replace('"w17"', '"<|eot_id|>"')
    (folder / "tokenizer.json").write_text(text)
    assert LLM(folder).config.eot_token_id == 17
    edit_json(folder / "config.json", eot_token_id=18)
    assert LLM(folder).config.eot_token_id == 18


# ---- bicache.json


def write_sidecar(folder: Path, **content: Any) -> None:
    (folder / "bicache.json").write_text(json.dumps({"format": 1} | content))


def test_stored_defaults_and_calibration(
    tiny_checkpoint: TinyCheckpoint, copy_checkpoint: Copy
) -> None:
    folder = copy_checkpoint(tiny_checkpoint())
    write_sidecar(
        folder,
        generation={"gen_length": 8, "steps": 2, "block_length": 4},
        calibration={"cache": "bicache:depth=1", "safe_depth": 1, "measured": {"questions": 3}},
    )
    llm = LLM(folder, cache="auto")
    assert llm.cache == "bicache:depth=1,refresh_steps=16,splice=official"
    assert llm.calibration["measured"] == {"questions": 3}
    stored = llm.generate([5, 6])[0]
    assert len(stored.tokens) == 8 and stored.stats.steps == 2
    # The user's options win; what was stored for another length goes with it.
    mine = llm.generate([5, 6], gen_length=3, cache="none")[0]
    assert len(mine.tokens) == 3 and mine.stats.steps == 3
    assert llm.generate([5, 6], steps=4)[0].stats.steps == 4
    assert llm.generate([5, 6], block_length=8)[0].stats.steps == 8


@pytest.mark.parametrize(
    ("content", "part"),
    [
        ("{", "JSON"),
        ("[" * 100_000, "JSON"),
        ("[]", "object"),
        ("{}", "format"),
        ('{"format": 2}', "got 2"),
        ('{"format": true}', "format"),
        ('{"format": 1, "format": 1}', "twice"),
        ('{"format": 1, "extra": 1}', "extra"),
        ('{"format": 1, "generation": []}', "generation"),
        ('{"format": 1, "generation": {"gen_lenght": 8}}', "gen_length"),
        ('{"format": 1, "generation": {"gen_length": "8"}}', "gen_length"),
        ('{"format": 1, "generation": {"temperature": NaN}}', "NaN"),
        ('{"format": 1, "calibration": 5}', "calibration"),
        ('{"format": 1, "calibration": {"cache": 5}}', "cache"),
        ('{"format": 1, "calibration": {"cache": "lru"}}', "bicache"),
        ('{"format": 1, "calibration": {"safe_depth": -1}}', "safe_depth"),
        ("\udcff", "JSON"),
    ],
)
def test_a_wrong_bicache_json(
    tiny_checkpoint: TinyCheckpoint, copy_checkpoint: Copy, content: str, part: str
) -> None:
    folder = copy_checkpoint(tiny_checkpoint())
    (folder / "bicache.json").write_bytes(content.encode("utf-8", "surrogateescape"))
    with refuses(ValueError, "bicache.json", part):
        LLM(folder)


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


# ---- options


def test_every_option_is_in_signature_and_help() -> None:
    table = option_table()
    assert {"gen_length", "steps", "block_length", "temperature", "remasking", "seed"} <= set(table)
    for function in (LLM.generate, LLM.stream):
        parameters = inspect.signature(function).parameters
        assert "options" not in parameters and "prefix" in parameters
        for option in table.values():
            parameter = parameters[option.name]
            assert parameter.kind is inspect.Parameter.KEYWORD_ONLY
            assert parameter.default == option.default
            assert f"{option.name}: {option.help}" in " ".join((function.__doc__ or "").split())
    assert inspect.signature(LLM.generate).parameters["gen_length"].default == 128
    assert inspect.signature(LLM.generate).parameters["steps"].default is None


def test_aliases(ids_llm: LLM) -> None:
    mine = ids_llm.generate([5], gen_length=4, block_length=2, remasking="random", seed=3)[0]
    theirs = ids_llm.generate([5], max_new_tokens=4, block_size=2, alg="random", seed=3)[0]
    np.testing.assert_array_equal(mine.tokens, theirs.tokens)
    for alias, name in ALIASES.items():
        value = option_table()[name].choices[0] if option_table()[name].choices else 4
        with refuses(TypeError, alias, name, "both"):
            ids_llm.generate([5], **{alias: value, name: value})


def test_unknown_options_list_what_exists(ids_llm: LLM) -> None:
    with refuses(TypeError, *option_table(), "'gen_lenght'", "did you mean gen_length?"):
        ids_llm.generate([5], gen_lenght=4)
    with refuses(TypeError, "'zzz'"):
        ids_llm.stream([5], zzz=1)


def test_none_means_the_default(ids_llm: LLM) -> None:
    out = ids_llm.generate([5], gen_length=4, steps=None, temperature=None)[0]
    assert out.stats.steps == 4


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"gen_length": 0}, ValueError),
        ({"gen_length": -4}, ValueError),
        ({"gen_length": 2**31}, ValueError),
        ({"gen_length": 2**70}, ValueError),
        ({"gen_length": 255}, ValueError),  # beyond the context
        ({"gen_length": 8, "block_length": 3}, ValueError),
        ({"gen_length": 8, "block_length": 0}, ValueError),
        ({"gen_length": 8, "block_length": -8}, ValueError),
        ({"gen_length": 8, "block_length": 16}, ValueError),
        ({"gen_length": 8, "steps": 0}, ValueError),
        ({"gen_length": 8, "steps": -1}, ValueError),
        ({"gen_length": 8, "block_length": 4, "steps": 3}, ValueError),
        ({"temperature": float("nan")}, ValueError),
        ({"temperature": float("inf")}, ValueError),
        ({"temperature": -0.5}, ValueError),
        ({"temperature": 10**400}, ValueError),
        ({"remasking": "best"}, ValueError),
        ({"seed": -1}, ValueError),
        ({"seed": 2**64}, ValueError),
        ({"gen_length": True}, TypeError),
        ({"gen_length": 8.0}, TypeError),
        ({"gen_length": "8"}, TypeError),
        ({"steps": np.float32(4)}, TypeError),
        ({"temperature": "hot"}, TypeError),
        ({"temperature": False}, TypeError),
        ({"remasking": 1}, TypeError),
        ({"logits_eos_inf": 1}, TypeError),
        ({"seed": 1.5}, TypeError),
    ],
)
def test_wrong_options(ids_llm: LLM, options: dict[str, Any], error: type[Exception]) -> None:
    wrong = "gen_length" if options.get("gen_length") == 255 else list(options)[-1]
    with refuses(error, wrong):
        ids_llm.generate([5, 6], **options)


def test_numpy_values_are_options(ids_llm: LLM) -> None:
    out = ids_llm.generate(
        [5], gen_length=np.int64(4), temperature=np.float32(0), logits_eos_inf=np.bool_(True)
    )[0]
    assert len(out.tokens) == 4


def test_wrong_requests_are_named(ids_llm: LLM) -> None:
    with refuses(ValueError, "context", "request 1"):
        ids_llm.generate([[5], [5] * 250], gen_length=8)


# ---- prompts that are refused


@pytest.mark.parametrize(
    ("prompts", "error", "part"),
    [
        (None, TypeError, "NoneType"),
        (5, TypeError, "int"),
        (b"w5", TypeError, "bytes"),
        ({"prompt": "w5"}, TypeError, "dict"),
        ([None], TypeError, "NoneType"),
        ([True, False], TypeError, "True"),
        ([5, True], TypeError, "position 1"),
        ([5.0], TypeError, "5.0"),
        ([5, "w5"], TypeError, "position 1"),
        ([[5], [6.5]], TypeError, "prompt 1"),
        ([-1], ValueError, "got -1"),
        ([64], ValueError, "0..63"),
        ([5, 10**30], ValueError, "position 1"),
        (np.array(5), ValueError, "shape []"),
        (np.array([[5, 6]]), ValueError, "shape [1, 2]"),
        (np.zeros((1, 1, 1), int), ValueError, "1-D"),
        (np.array([5.0]), TypeError, "float64"),
        (np.array([True]), TypeError, "bool"),
        (np.array(["w5"]), TypeError, "dtype"),
        (np.array([5], object), TypeError, "object"),
        (np.array([2**63], np.uint64), ValueError, "got 9223372036854775808"),
        (np.array([-1], np.int8), ValueError, "prompt 0: expected token ids 0..63, got -1"),
        (np.array([5 - 2**32]), ValueError, "got -4294967291"),  # 5 in 32 bits
        ("bad \ud800 text", ValueError, "character 4"),
        (["w5", "\udcff"], ValueError, "prompt 1"),
    ],
)
def test_wrong_prompts(text_llm: LLM, prompts: Any, error: type[Exception], part: str) -> None:
    with refuses(error, part):
        text_llm.generate(prompts, gen_length=4)


@pytest.mark.parametrize(
    ("prefix", "error", "part"),
    [
        (5, TypeError, "int"),
        (b"w5", TypeError, "bytes"),
        ([1.5], TypeError, "prefix 0"),
        ([64], ValueError, "prefix 0"),
        (np.array([[5]]), ValueError, "prefix 0"),
        (["w5"], ValueError, "list of 2"),
        (["w5", 3.5], TypeError, "prefix 1"),
        ("\ud800", ValueError, "surrogate"),
    ],
)
def test_wrong_prefixes(text_llm: LLM, prefix: Any, error: type[Exception], part: str) -> None:
    with refuses(error, part):
        text_llm.generate(["w5", "w6"], prefix=prefix, gen_length=4)


@pytest.mark.parametrize(
    ("stop", "error"),
    [
        ("", ValueError),
        (["w5", ""], ValueError),
        (5, TypeError),
        ([5], TypeError),
        (b"x", TypeError),
        ("\ud800", ValueError),
    ],
)
def test_wrong_stop_strings(text_llm: LLM, stop: Any, error: type[Exception]) -> None:
    with refuses(error, "stop"):
        text_llm.generate("w5", stop=stop)


@pytest.mark.parametrize(
    ("cache", "error", "parts"),
    [
        ("lru", ValueError, ["none", "naive", "bicache", "lru"]),
        ("", ValueError, ["bicache"]),
        ("bicache", ValueError, ["depth"]),
        ("bicache:depth=99", ValueError, ["depth", "99", "0..3"]),
        ("bicache:depth=1,steps=3", ValueError, ["refresh_steps", "steps"]),
        ("bicache:depth=1+naive", ValueError, ["naive"]),
        ("auto", ValueError, ["bicache.json", "calibration"]),
        ("\ud800", ValueError, ["surrogate"]),
        (5, TypeError, ["policy", "int"]),
        (bicache.BiCache, TypeError, ["policy"]),
    ],
)
def test_wrong_caches(text_llm: LLM, cache: Any, error: type[Exception], parts: list[str]) -> None:
    with refuses(error, *parts):
        text_llm.generate("w5", prefix="w6", cache=cache, gen_length=4)


def test_text_needs_a_tokenizer(ids_llm: LLM) -> None:
    with refuses(ValueError, "tokenizer.json"):
        ids_llm.generate("w5")
    with refuses(ValueError, "tokenizer.json"):
        ids_llm.generate([5], prefix="w5")
    with refuses(ValueError, "tokenizer.json"):
        ids_llm.generate([5], stop="w5")
    assert ids_llm.generate([5], gen_length=2)[0].text == ""


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
    for name in bicache.shipped_models():
        llm = LLM(name, cache="auto", threads=1)
        assert llm.tokenizer is not None and llm.calibration
