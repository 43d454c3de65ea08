"""Loading a model: what is refused, and what bicache.json beside a checkpoint says."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import bicache
import pytest
from bicache import LLM, _core
from conftest import MASK, TinyCheckpoint, edit_json, refuses

Copy = Callable[[Path], Path]


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
        ({"dtype": "int2"}, ValueError, "f32, bf16, int8 or int4"),
        ({"dtype": 32}, TypeError, "dtype"),
        ({"kv_dtype": "int8"}, ValueError, "kv_dtype: expected auto, f32 or bf16"),
        ({"kv_dtype": None}, TypeError, "kv_dtype"),
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
    assert llm.kv_dtype == "bf16"  # as the weights
    for dtype in ("f32", "bf16"):
        other = LLM(tiny_checkpoint(), threads=1, dtype=dtype)
        assert (other.dtype, other.kv_dtype) == (dtype, dtype)
        other = LLM(tiny_checkpoint(), threads=1, kv_dtype=dtype)
        assert (other.dtype, other.kv_dtype) == ("f32", dtype)
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
        calibration={"cache": "bicache:depth=1", "measured": {"questions": 3}},
    )
    llm = LLM(folder, cache="auto")
    assert llm.cache == "bicache:depth=1,refresh_steps=16,splice=official"
    for both in ("auto+fast_dllm:mode=dual", "fast_dllm:mode=dual+auto"):
        assert llm.cache_string(both) == f"{llm.cache}+fast_dllm:mode=dual"
    with refuses(ValueError, "both speak for the prefix"):
        llm.cache_string("auto+naive")
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
        ('{"format": 1, "calibration": {"fingerprint": 1}}', "fingerprint"),
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


def test_a_calibration_of_other_weights_is_not_auto(
    tiny_checkpoint: TinyCheckpoint, copy_checkpoint: Copy
) -> None:
    folder = copy_checkpoint(tiny_checkpoint())
    fingerprint = LLM(folder).fingerprint
    write_sidecar(folder, calibration={"cache": "bicache:depth=1", "fingerprint": fingerprint})
    assert LLM(folder, cache="auto").cache.startswith("bicache:depth=1,")
    write_sidecar(folder, calibration={"cache": "bicache:depth=1", "fingerprint": "0" * 16})
    llm = LLM(folder)  # anything else goes on
    with refuses(ValueError, "auto", fingerprint, "0" * 16, "bicache profile"):
        llm.generate([5], cache="auto")
    with refuses(ValueError, "auto", fingerprint):
        LLM(folder, cache="auto")


def test_a_bicache_json_that_is_no_file(
    tiny_checkpoint: TinyCheckpoint, copy_checkpoint: Copy
) -> None:
    folder = copy_checkpoint(tiny_checkpoint())
    os.mkfifo(folder / "bicache.json")
    with refuses(ValueError, "bicache.json", "regular file"):
        LLM(folder)
