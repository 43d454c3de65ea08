"""Options, prompts, prefixes and caches that generate() refuses, and how it says so."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any

import bicache
import numpy as np
import pytest
from bicache import LLM
from bicache.options import ALIASES, option_table
from conftest import refuses

Copy = Callable[[Path], Path]


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
