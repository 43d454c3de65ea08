"""Generation options: lists of ids, and stored defaults that no longer fit."""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from bicache import LLM, _core
from bicache.options import option_table, resolve_options
from conftest import TinyCheckpoint, refuses

LIST = option_table()["suppress_tokens"]


@pytest.mark.parametrize(
    "value",
    [[5, 9], (5, 9), [np.int64(5), 9], np.array([5, 9]), np.array([5, 9], np.uint8), []],
)
def test_lists_of_integers(ids_llm: LLM, value: Any) -> None:
    checked = LIST.check(value, "generate")
    assert checked == ([5, 9] if len(value) else [])
    assert all(type(item) is int for item in checked)
    (mine,) = ids_llm.generate([5, 6], gen_length=4, suppress_tokens=value)
    (plain,) = ids_llm.generate([5, 6], gen_length=4, suppress_tokens=checked)
    np.testing.assert_array_equal(mine.tokens, plain.tokens)


def test_suppressed_tokens_are_never_predicted(ids_llm: LLM) -> None:
    (plain,) = ids_llm.generate([5, 6], gen_length=8)
    banned = sorted(set(plain.tokens.tolist()))
    (out,) = ids_llm.generate([5, 6], gen_length=8, suppress_tokens=banned)
    assert not set(out.tokens.tolist()) & set(banned)


@pytest.mark.parametrize(
    ("value", "error", "parts"),
    [
        (5, TypeError, ["a list of integers", "got 5 (int)"]),
        ("5,9", TypeError, ["a list of integers", "got '5,9' (str)"]),
        ([5, 9.0], TypeError, ["a list of integers", "got 9.0 (float)"]),
        ([True], TypeError, ["a list of integers", "got True (bool)"]),
        ([[5]], TypeError, ["a list of integers", "got [5] (list)"]),
        ({5}, TypeError, ["a list of integers", "got {5} (set)"]),
        (np.array([5.0]), TypeError, ["1-D array of integers", "float64 [1]"]),
        (np.array([[5]]), TypeError, ["1-D array of integers", "[1, 1]"]),
        (np.array(5), TypeError, ["1-D array of integers", "[]"]),
        ([2**63], ValueError, ["64-bit integer"]),
        ([-1], ValueError, ["got -1"]),
        ([64], ValueError, ["got 64"]),
    ],
)
def test_wrong_lists(ids_llm: LLM, value: Any, error: type[Exception], parts: list[str]) -> None:
    with refuses(error, "suppress_tokens", *parts):
        ids_llm.generate([5, 6], gen_length=4, suppress_tokens=value)


def test_items_that_a_sequence_makes_live_until_they_are_read(ids_llm: LLM) -> None:
    log: list[str] = []

    class Item:
        def __index__(self) -> int:
            log.append("read")
            return 5

        def __del__(self) -> None:
            log.append("gone")

    class Items:
        def __len__(self) -> int:
            return 2

        def __getitem__(self, i: int) -> Item:
            if i >= 2:
                raise IndexError
            return Item()

    options = {"gen_length": 4, "suppress_tokens": Items()}
    _core.forecast(ids_llm.config, _core.make_policy("none"), prompt_len=4, options=options)
    assert log == ["read", "gone"] * 2


def test_how_a_list_is_documented() -> None:
    parameter = inspect.signature(LLM.generate).parameters["suppress_tokens"]
    assert "list[int]" in parameter.annotation
    assert "default: []" not in LIST.describe()


STORED = {
    "gen_length": 64, "steps": 16, "block_length": 8, "threshold": 0.9, "temperature": 0.5,
    "suppress_tokens": [7],
}  # fmt: skip
ORDER = {"remasking": "entropy", "alg_temp": 0.5, "steps": 4}
LAST = {"remasking": "low_confidence", "confidence_eos_eot_inf": True}


@pytest.mark.parametrize(
    ("stored", "given", "gone"),
    [
        (STORED, {}, set()),
        (STORED, {"temperature": 0.0}, set()),
        (STORED, {"gen_length": 32}, {"steps", "block_length"}),
        (STORED, {"max_new_tokens": 32}, {"steps", "block_length"}),
        (STORED, {"gen_length": 32, "steps": 8}, {"block_length"}),
        (STORED, {"block_length": 16}, {"steps"}),
        (STORED, {"threshold": 0.8}, {"steps"}),
        (STORED, {"factor": 1.0}, {"steps", "threshold"}),
        (STORED, {"threshold": None, "factor": None}, set()),
        (STORED, {"factor": 1.0, "steps": 8}, {"threshold"}),
        (STORED, {"alg": "random"}, {"threshold"}),
        (STORED, {"remasking": "entropy", "alg_temp": 1.0}, {"threshold"}),
        (ORDER, {"remasking": "maskgit_plus"}, {"alg_temp"}),
        (LAST, {"remasking": "entropy"}, {"confidence_eos_eot_inf"}),
        (LAST, {"temperature": 0.5}, set()),
        (ORDER, {"remasking": "maskgit_plus", "threshold": 0.9}, {"alg_temp", "steps"}),
    ],
)
def test_stored_defaults_that_no_longer_fit(
    stored: dict[str, Any], given: dict[str, Any], gone: set[str]
) -> None:
    chosen = resolve_options(given, stored)
    names = {"max_new_tokens": "gen_length", "alg": "remasking"}
    mine = {names.get(k, k): v for k, v in given.items() if v is not None}
    assert chosen == {k: v for k, v in stored.items() if k not in gone} | mine


def test_a_stored_rule_makes_room_for_the_users(
    tiny_checkpoint: TinyCheckpoint, copy_checkpoint: Callable[[Path], Path]
) -> None:
    folder = copy_checkpoint(tiny_checkpoint())
    stored = {"gen_length": 8, "block_length": 8, "steps": 2, "suppress_tokens": [5, 7]}
    (folder / "bicache.json").write_text(json.dumps({"format": 1, "generation": stored}))
    llm = LLM(folder, threads=1)
    assert llm.generate([5, 6])[0].stats.steps == 2
    # Nothing reaches 1: one token at a step, as the threshold's own default says, not four.
    assert llm.generate([5, 6], threshold=1.0)[0].stats.steps == 8
    assert not {5, 7} & set(llm.generate([5, 6])[0].tokens.tolist())


@pytest.mark.parametrize("value", [5, [5, "x"], [-1.5], None])
def test_a_wrong_list_in_the_stored_defaults(
    tiny_checkpoint: TinyCheckpoint, copy_checkpoint: Callable[[Path], Path], value: Any
) -> None:
    folder = copy_checkpoint(tiny_checkpoint())
    content = {"format": 1, "generation": {"suppress_tokens": value}}
    (folder / "bicache.json").write_text(json.dumps(content))
    with refuses(ValueError, "bicache.json", "suppress_tokens", "a list of integers"):
        LLM(folder)
