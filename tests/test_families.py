"""Families of checkpoints: what loads, what is refused and how; tokens that no tokenizer knows."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import bicache
import ml_dtypes
import numpy as np
import pytest
import torch
from bicache import LLM, Tokenizer, _core
from conftest import EOS, MASK, TinyCheckpoint, edit_json, refuses, write_tokenizer
from families import FAMILIES
from parity import BOUND
from parity import tokens as random_tokens
from reference import Llada
from safetensors.numpy import load_file, save_file

Copy = Callable[[Path], Path]
NEW = [name for name in FAMILIES if name != "llada"]
# A name of the family's own, what it is called in messages about it.
OWN = {
    "dream": "model.layers.1.self_attn.k_proj.bias",
    "illada": "model.layers.0.mlp.down_proj.weight",
    "llada-moe": "model.layers.1.mlp.experts.5.up_proj.weight",
}


@pytest.mark.parametrize("family", NEW)
def test_what_a_config_says(tiny_checkpoint: TinyCheckpoint, family: str) -> None:
    config = LLM(tiny_checkpoint(family=family, kv_heads=2), threads=1).config
    flags = FAMILIES[family].flags
    assert config.family == family
    assert (config.layers, config.dim, config.heads, config.kv_heads) == (2, 32, 4, 2)
    assert (config.head_dim, config.ffn, config.vocab, config.context) == (8, 48, 64, 256)
    assert config.norm_eps == np.float32(FAMILIES[family].fixed["rms_norm_eps"])
    assert config.rope_theta == FAMILIES[family].fixed["rope_theta"]
    assert (config.mask_token_id, config.eos_token_id) == (MASK, EOS)
    assert config.shift == flags.get("shift", False)
    assert config.tied == flags.get("tied", False)
    assert config.qkv_bias == flags.get("bias", False)
    assert config.qk_norm == flags.get("qk_norm", False)
    assert (config.experts, config.experts_per_row) == ((8, 3) if family == "llada-moe" else (0, 0))


@pytest.mark.parametrize("family", NEW)
def test_numbers_come_from_the_file(
    tiny_checkpoint: TinyCheckpoint, copy_checkpoint: Copy, family: str
) -> None:
    plain = tiny_checkpoint(family=family, seed=3)
    ids = random_tokens(23, Llada(plain), 3)
    for changes in ({"rope_theta": 300.0}, {"rms_norm_eps": 0.02}):
        folder = copy_checkpoint(plain)
        edit_json(folder / "config.json", **changes)
        model = Llada(folder)
        expected = model.forward(ids)
        found = torch.tensor(LLM(folder, threads=1).forward(ids.numpy()))
        assert (found - expected).abs().max() <= BOUND * expected.std()
        assert (found - Llada(plain).forward(ids)).abs().max() > 10 * BOUND * expected.std()


@pytest.mark.parametrize(("family", "mask"), [("illada", 5), ("llada-moe", 156895)])
def test_a_mask_that_config_json_leaves_out(
    tiny_checkpoint: TinyCheckpoint, copy_checkpoint: Copy, family: str, mask: int
) -> None:
    folder = copy_checkpoint(tiny_checkpoint(family=family))
    edit_json(folder / "config.json", mask_token_id=None)
    if mask < 64:
        assert _core.read_config(str(folder)).mask_token_id == mask
        edit_json(folder / "config.json", vocab_size=mask)
    with refuses(ValueError, "vocab_size", f"more than {mask}", "mask_token_id"):
        _core.read_config(str(folder))


def test_a_mask_that_dream_must_name(
    tiny_checkpoint: TinyCheckpoint, copy_checkpoint: Copy
) -> None:
    folder = copy_checkpoint(tiny_checkpoint(family="dream"))
    edit_json(folder / "config.json", mask_token_id=None)
    with refuses(ValueError, "mask_token_id"):
        LLM(folder)


# ---- configurations


@pytest.mark.parametrize(
    "changes",
    [
        {"model_type": "gpt2"},
        {"architectures": ["GPT2LMHeadModel"]},
        {"architectures": ["DreamForCausalLM"]},  # Dream's block-diffusion successor
        {"model_type": "llada", "architectures": ["DreamModel"]},
        {"model_type": "LLaDA2MoeModelLM", "architectures": ["LLaDA2MoeModelLM"]},
        {"model_type": "Fast_dLLM_Qwen", "architectures": ["Fast_dLLM_QwenForCausalLM"]},
        {"model_type": None, "architectures": None},
        {"model_type": None, "architectures": []},
    ],
)
def test_an_unknown_family_is_told_the_known_ones(
    tiny_checkpoint: TinyCheckpoint, copy_checkpoint: Copy, changes: dict[str, Any]
) -> None:
    folder = copy_checkpoint(tiny_checkpoint(family="dream"))
    edit_json(folder / "config.json", **changes)
    known = [str(f.fixed["architectures"][0]) for name, f in FAMILIES.items() if name in NEW]
    with refuses(ValueError, "config.json", "LLaDAModelLM", *known):
        LLM(folder)


@pytest.mark.parametrize("family", NEW)
def test_either_name_is_enough(
    tiny_checkpoint: TinyCheckpoint, copy_checkpoint: Copy, family: str
) -> None:
    folder = copy_checkpoint(tiny_checkpoint(family=family))
    edit_json(folder / "config.json", model_type=None)
    assert LLM(folder, threads=1).config.family == family
    if family != "llada-moe":  # which calls itself llada
        edit_json(folder / "config.json", architectures=None, model_type=family.capitalize())
        if family == "illada":
            edit_json(folder / "config.json", model_type="illada")
        assert LLM(folder, threads=1).config.family == family


@pytest.mark.parametrize("wrong", [3, ["DreamModel"], {}])
def test_names_of_a_wrong_type(
    tiny_checkpoint: TinyCheckpoint, copy_checkpoint: Copy, wrong: object
) -> None:
    folder = copy_checkpoint(tiny_checkpoint(family="dream"))
    edit_json(folder / "config.json", model_type=wrong)
    with refuses(ValueError, "model_type"):
        LLM(folder)
    edit_json(folder / "config.json", model_type="Dream", architectures=[wrong])
    with refuses(ValueError, "architectures"):
        LLM(folder)


@pytest.mark.parametrize("family", NEW)
def test_the_config_of_another_family(
    tiny_checkpoint: TinyCheckpoint, copy_checkpoint: Copy, family: str
) -> None:
    folder = copy_checkpoint(tiny_checkpoint(family=family))
    for other in ("llada", *NEW):
        if other == family:
            continue
        config = (tiny_checkpoint(family=other) / "config.json").read_bytes()
        (folder / "config.json").write_bytes(config)
        with refuses(ValueError, "] tensor "):
            LLM(folder)


@pytest.mark.parametrize(
    ("family", "changes", "parts"),
    [
        ("dream", {"hidden_act": "gelu"}, ["hidden_act", '"silu"', '"gelu"']),
        ("dream", {"hidden_act": None}, ["hidden_act", "got nothing"]),
        ("dream", {"use_mrope": True}, ["use_mrope", "false", "true"]),
        ("dream", {"use_sliding_window": True}, ["use_sliding_window"]),
        ("dream", {"rope_scaling": {"type": "yarn"}}, ["rope_scaling", "null", "an object"]),
        ("dream", {"rope_theta": None}, ["rope_theta"]),
        ("dream", {"rms_norm_eps": None}, ["rms_norm_eps"]),
        ("dream", {"num_attention_heads": 5}, ["num_attention_heads", "hidden_size"]),
        ("dream", {"num_key_value_heads": 3}, ["num_key_value_heads"]),
        ("dream", {"head_dim": 16}, ["head_dim", "8..8", "16"]),
        ("dream", {"intermediate_size": None}, ["intermediate_size"]),
        ("dream", {"vocab_size": 63}, ["model.embed_tokens.weight", "[63, 32]", "[64, 32]"]),
        ("dream", {"attention_bias": False}, ["k_proj.bias"]),
        ("dream", {"tie_word_embeddings": True}, ["lm_head.weight"]),
        ("dream", {"num_hidden_layers": 3}, ["model.layers.2."]),
        ("dream", {"num_hidden_layers": 1}, ["model.layers.1."]),
        ("illada", {"layer_norm_eps": 1e-5}, ["layer_norm_eps", "null"]),
        ("illada", {"attention_bias": True}, ["attention_bias"]),
        ("illada", {"mlp_bias": True}, ["mlp_bias"]),
        ("illada", {"tie_word_embeddings": False}, ["lm_head.weight"]),
        ("llada-moe", {"moe_layer_freq": [0, 1]}, ["moe_layer_freq", "only ones"]),
        ("llada-moe", {"moe_layer_freq": [1, "1"]}, ["moe_layer_freq"]),
        ("llada-moe", {"norm_topk_prob": True}, ["norm_topk_prob"]),
        ("llada-moe", {"moe_router_enable_expert_bias": True}, ["expert_bias"]),
        ("llada-moe", {"moe_router_score_function": "sigmoid"}, ["score_function", "softmax"]),
        ("llada-moe", {"routed_scaling_factor": 2.5}, ["routed_scaling_factor", "1", "2.5"]),
        ("llada-moe", {"partial_rotary_factor": 0.5}, ["partial_rotary_factor"]),
        ("llada-moe", {"router_num_group": 4}, ["router_num_group"]),
        ("llada-moe", {"num_experts": 7}, ["experts.7"]),
        ("llada-moe", {"num_experts": 9}, ["mlp.gate.weight"]),
        ("llada-moe", {"num_experts": None}, ["num_experts"]),
        ("llada-moe", {"num_experts_per_tok": 0}, ["num_experts_per_tok", "1..8"]),
        ("llada-moe", {"num_experts_per_tok": 9}, ["num_experts_per_tok", "1..8"]),
        ("llada-moe", {"qk_layernorm": False}, ["k_norm"]),
        ("llada-moe", {"expert_intermediate_size": 40}, ["experts.0", "40", "48"]),
    ],
)
def test_a_config_that_disagrees(
    tiny_checkpoint: TinyCheckpoint,
    copy_checkpoint: Copy,
    family: str,
    changes: dict[str, Any],
    parts: list[str],
) -> None:
    folder = copy_checkpoint(tiny_checkpoint(family=family))
    edit_json(folder / "config.json", **changes)
    with refuses(ValueError, *parts):
        LLM(folder)


# ---- tensors


@pytest.mark.parametrize("family", NEW)
def test_tensors_that_are_wrong(
    tiny_checkpoint: TinyCheckpoint, copy_checkpoint: Copy, family: str
) -> None:
    folder = copy_checkpoint(tiny_checkpoint(family=family))
    file, name = folder / "model.safetensors", OWN[family]
    good = load_file(file)
    without = {other: w for other, w in good.items() if other != name}

    def refused(tensors: dict[str, np.ndarray], *parts: str) -> None:
        save_file(tensors, file)
        with refuses(ValueError, "tensor", *parts):
            LLM(folder)

    refused(without, name, "nothing of that name")
    refused(without | {name + "x": good[name]}, name + "x")
    refused(good | {"model.layers.0.mlp.shared_expert.up_proj.weight": good[name]}, "shared_expert")
    refused(good | {name: good[name].astype(np.float16)}, name, "F32 or BF16", "F16")
    refused(good | {name: np.concatenate([good[name], good[name]])}, name, "shape")
    infinite = good[name].copy()
    infinite.flat[3] = np.inf
    refused(good | {name: infinite}, name, "element 3")
    save_file(good, file)
    assert LLM(folder, threads=1).config.family == family


def test_a_tied_head_is_the_embedding(
    tiny_checkpoint: TinyCheckpoint, copy_checkpoint: Copy
) -> None:
    folder = copy_checkpoint(tiny_checkpoint(family="illada", vocab=48, dtype="bf16"))
    ids = random_tokens(17, Llada(folder), 4).numpy()
    tied = LLM(folder, threads=1)
    tensors = load_file(folder / "model.safetensors")
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].copy()
    save_file(tensors, folder / "model.safetensors")
    edit_json(folder / "config.json", tie_word_embeddings=False)
    for dtype in ("f32", "bf16", "int8", "int4"):
        apart = LLM(folder, threads=1, dtype=dtype)
        assert not apart.config.tied
        if dtype == tied.dtype:
            assert apart.weight_bytes == tied.weight_bytes
            assert apart.forward(ids).tobytes() == tied.forward(ids).tobytes()
    # Hugging Face leaves out what is its default
    untold = copy_checkpoint(tiny_checkpoint(family="illada", vocab=48, dtype="bf16"))
    edit_json(untold / "config.json", tie_word_embeddings=None)
    assert LLM(untold, threads=1).fingerprint == tied.fingerprint
    # LLaDA's own layout has a name for it, too
    llada = copy_checkpoint(tiny_checkpoint())
    tensors = load_file(llada / "model.safetensors")
    del tensors["model.transformer.ff_out.weight"]
    save_file(tensors, llada / "model.safetensors")
    edit_json(llada / "config.json", weight_tying=True)
    assert LLM(llada, threads=1).config.tied


def test_biases_stay_what_they_are(tiny_checkpoint: TinyCheckpoint) -> None:
    # in bf16 products have 8 bits; a bias is added to their sums
    folder = tiny_checkpoint(family="dream", dtype="bf16", seed=5)
    name = "model.layers.0.self_attn.v_proj.bias"
    assert load_file(folder / "model.safetensors")[name].dtype == ml_dtypes.bfloat16
    model = Llada(folder)
    ids = random_tokens(9, model, 5)
    shown: dict[tuple[int, str], np.ndarray] = {}
    llm = LLM(folder, threads=1, dtype="f32")
    with llm.tap(lambda layer, what, x: shown.__setitem__((layer, what), x.copy())):
        llm.forward(ids.numpy())
    v = model.project(0, "v", model.embed(ids)).transpose(0, 1).flatten(1)
    np.testing.assert_allclose(shown[0, "v"], v.numpy(), rtol=0, atol=1e-5)


# ---- mixtures of experts


def test_all_experts_of_a_large_mixture(tiny_checkpoint: TinyCheckpoint) -> None:
    folder = tiny_checkpoint(family="llada-moe", experts=64, top_k=8, ffn=16, seed=6)
    model = Llada(folder)
    ids = random_tokens(60, model, 6)
    expected = model.forward(ids)
    assert model.routing_gap > 1e-5, "a near tie of experts: another seed"
    found = torch.tensor(LLM(folder, threads=1).forward(ids.numpy()))
    assert (found - expected).abs().max() <= BOUND * expected.std()


@pytest.mark.parametrize("dtype", ["f32", "bf16", "int8", "int4"])
def test_policies_of_a_mixture(tiny_checkpoint: TinyCheckpoint, dtype: str) -> None:
    folder = tiny_checkpoint(family="llada-moe", layers=3, dtype="bf16", seed=7)
    llm = LLM(folder, threads=1, dtype=dtype)
    prefix, own = [5, 9, 11, 13, 15, 6], [7, 8]
    want = llm.generate([own], prefix=prefix, gen_length=8, block_length=4)[0]
    for cache in ("bicache:depth=0,refresh_steps=1", "dllm_cache:gen_interval_steps=1,"
                  "prompt_interval_steps=1", "fast_dllm:mode=dual,refresh_steps=1"):  # fmt: skip
        got = llm.generate([own], prefix=prefix, cache=cache, gen_length=8, block_length=4)[0]
        assert got.tokens.tobytes() == want.tokens.tobytes(), cache
        assert got.confidences.tobytes() == want.confidences.tobytes(), cache
    two = LLM(folder, threads=2, dtype=dtype)
    many = two.generate([own, [9], own], prefix=prefix, gen_length=8, block_length=4)
    assert many[2].confidences.tobytes() == want.confidences.tobytes()


def test_the_cost_of_a_mixture(tiny_checkpoint: TinyCheckpoint) -> None:
    for top_k in (3, 8):
        llm = LLM(tiny_checkpoint(family="llada-moe", top_k=top_k, seed=8), threads=1)
        (out,) = llm.generate([[5, 6, 7]], gen_length=4)
        plan = bicache.plan(llm.config, "none", prompt_len=3, gen_len=4, dtype="f32")
        assert plan.weight_bytes == llm.weight_bytes
        (cost,) = plan.costs
        assert cost.flops == out.stats.flops
        if top_k == 8:
            assert cost.bytes_read == out.stats.bytes_read
        else:
            assert cost.bytes_read >= out.stats.bytes_read


# ---- tokenizers


def write_bpe(folder: Path, *, added: list[str], first: int | None = None) -> int:
    """vocab.json, merges.txt and tokenizer_config.json as Dream's are; the ids there are."""
    from tokenizers import pre_tokenizers

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    merges = [("Ġ", "w"), ("e", "r"), ("Ċ", "Ċ"), ("1", "2")]
    words = [*letters, *("".join(pair) for pair in merges)]
    (folder / "vocab.json").write_text(json.dumps({w: i for i, w in enumerate(words)}))
    (folder / "merges.txt").write_text(
        "#version: 0.2\n" + "".join(f"{a} {b}\n" for a, b in merges), encoding="utf-8"
    )
    start = len(words) if first is None else first
    entries = {
        str(start + i): {
            "content": text, "lstrip": False, "normalized": False, "rstrip": False,
            "single_word": False, "special": True,
        }
        for i, text in enumerate(added)
    }  # fmt: skip
    (folder / "tokenizer_config.json").write_text(json.dumps({"added_tokens_decoder": entries}))
    return start + len(added)


SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|mask|>"]


def test_vocab_and_merges(tmp_path: Path) -> None:
    end = write_bpe(tmp_path, added=SPECIAL)
    tokenizer = Tokenizer.of(tmp_path)
    assert tokenizer is not None and tokenizer.path.name == "vocab.json"
    assert len(tokenizer) == tokenizer.end == end
    assert tokenizer.special_tokens == tuple(SPECIAL)
    text = "Hello wer  wer\n\n\n12 it's e\u0301<|im_end|>\u00e9 x"
    ids = tokenizer.encode_prompt(text, after_prefix=False)
    assert tokenizer.decode(ids, skip_special_tokens=False) == text.replace("e\u0301", "\u00e9")
    assert tokenizer.token_id("<|im_end|>") in ids
    # nothing is added, and words are cut before pairs are joined: a digit stands alone
    pieces = [tokenizer.decode([i], skip_special_tokens=False) for i in ids]
    assert "er" in pieces and " w" in pieces and "12" not in pieces
    assert ids.tolist() == tokenizer.encode_prefix(text).tolist()
    # tokenizer.json, where there is one, says more
    write_tokenizer(tmp_path, 16)
    other = Tokenizer.of(tmp_path)
    assert other is not None and len(other) == 16


def test_added_tokens_of_their_own_file(tmp_path: Path) -> None:
    end = write_bpe(tmp_path, added=[])
    (tmp_path / "tokenizer_config.json").unlink()
    tokens = {"<|b|>": end + 1, "<|a|>": end}
    (tmp_path / "added_tokens.json").write_text(json.dumps(tokens))
    tokenizer = Tokenizer.of(tmp_path)
    assert tokenizer is not None and tokenizer.end == end + 2
    assert [tokenizer.token_id(t) for t in ("<|a|>", "<|b|>")] == [end, end + 1]


@pytest.mark.parametrize(
    ("file", "content", "part"),
    [
        ("vocab.json", "{", "vocabulary"),
        ("vocab.json", "[]", "vocabulary"),
        ("vocab.json", '{"a": "b"}', "vocabulary"),
        ("merges.txt", "#version: 0.2\nno pair here\n", "merges.txt"),
        ("merges.txt", "#version: 0.2\nzz qq\n", "merges.txt"),
        ("tokenizer_config.json", "{", "tokenizer_config.json"),
        ("tokenizer_config.json", "[]", "an object"),
        ("tokenizer_config.json", '{"added_tokens_decoder": []}', "added tokens"),
        ("tokenizer_config.json", '{"added_tokens_decoder": {"x": {}}}', "added tokens"),
        ("tokenizer_config.json", '{"added_tokens_decoder": {"260": {}}}', "260"),
        (
            "tokenizer_config.json",
            '{"added_tokens_decoder": {"999": {"content": "<|x|>"}}}',
            "without a gap",
        ),
    ],
)
def test_a_broken_vocabulary(tmp_path: Path, file: str, content: str, part: str) -> None:
    write_bpe(tmp_path, added=SPECIAL)
    (tmp_path / file).write_text(content)
    with refuses(ValueError, "tokenizer", part):
        Tokenizer.of(tmp_path)


def test_a_vocabulary_without_merges(tmp_path: Path) -> None:
    write_bpe(tmp_path, added=SPECIAL)
    (tmp_path / "merges.txt").unlink()
    with refuses(FileNotFoundError, "merges.txt"):
        Tokenizer.of(tmp_path)
    (tmp_path / "vocab.json").unlink()
    assert Tokenizer.of(tmp_path) is None


def test_dream_with_its_tokenizer(tiny_checkpoint: TinyCheckpoint, copy_checkpoint: Copy) -> None:
    folder = copy_checkpoint(tiny_checkpoint(family="dream", vocab=288, seed=9))
    end = write_bpe(folder, added=SPECIAL)
    edit_json(folder / "config.json", mask_token_id=end - 1, eos_token_id=end - 4)
    llm = LLM(folder, threads=1)
    assert llm.config.known_ids == end < llm.config.vocab == 288
    assert llm.config.eot_token_id == end - 2
    assert llm.forward([5, 6, 7]).shape == (3, 288)
    (out,) = llm.generate("12 wer", gen_length=6, alg="entropy", steps=6)
    assert isinstance(out.text, str)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"temperature": 5.0},
        {"alg": "entropy", "temperature": 5.0, "top_p": 0.99},
        {"alg": "origin", "temperature": 5.0},
        {"threshold": 0.1},
        {"remasking": "random"},
    ],
)
def test_ids_without_a_token_are_never_sampled(
    tiny_checkpoint: TinyCheckpoint, copy_checkpoint: Copy, options: dict[str, Any]
) -> None:
    plain = tiny_checkpoint(family="dream", vocab=64, seed=10)
    folder = copy_checkpoint(plain)
    write_tokenizer(folder, 20)
    free, bound = LLM(plain, threads=1), LLM(folder, threads=1)
    assert (free.config.known_ids, bound.config.known_ids) == (0, 20)
    prompts = [[4 + i] for i in range(8)]
    beyond = [t for out in free.generate(prompts, gen_length=8, **options) for t in out.tokens]
    assert max(beyond) >= 20
    for out in bound.generate(prompts, gen_length=8, **options):
        assert max(out.tokens) < 20
    # Probabilities are of the tokens there are: the same as if the others were suppressed.
    same = free.generate(prompts, gen_length=8, suppress_tokens=list(range(20, 64)), **options)
    for a, b in zip(same, bound.generate(prompts, gen_length=8, **options), strict=True):
        assert a.tokens.tolist() == b.tokens.tolist()
        np.testing.assert_allclose(a.confidences, b.confidences, rtol=0, atol=1e-6)
