"""Fixtures: tiny random checkpoints, made here, never downloaded."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import bicache
import ml_dtypes
import numpy as np
import pytest
from families import BOS, EOS, LLADA_KEYS, MASK, UNKNOWN, add_family, family_config, stored_name
from safetensors.numpy import save_file

SPECIAL = ("<|endoftext|>", "<|startoftext|>", "<|mdm_mask|>", "<|unknown|>")

TinyCheckpoint = Callable[..., Path]
Pairs = list[tuple[list[int], list[int]]]  # ids of a prefix and of a prompt


def llada_config(
    *,
    layers: int,
    dim: int,
    heads: int,
    kv_heads: int,
    ffn: int,
    vocab: int,
    embeddings: int,
    context: int,
    qk_norm: bool,
    shift: bool,
) -> dict[str, Any]:
    """config.json with the keys of LLaDA-8B's; the two flags are there only where they are set."""
    config: dict[str, Any] = {
        "activation_type": "silu",
        "alibi": False,
        "alibi_bias_max": 8.0,
        "architectures": ["LLaDAModelLM"],
        "attention_dropout": 0.0,
        "attention_layer_norm": False,
        "attention_layer_norm_with_affine": True,
        "bias_for_layer_norm": False,
        "block_group_size": 1,
        "block_type": "llama",
        "d_model": dim,
        "embedding_dropout": 0.0,
        "embedding_size": embeddings,
        "eos_token_id": EOS,
        "flash_attention": False,
        "include_bias": False,
        "include_qkv_bias": False,
        "init_cutoff_factor": None,
        "init_device": "meta",
        "init_fn": "mitchell",
        "init_std": 0.02,
        "input_emb_norm": False,
        "layer_norm_type": "rms",
        "layer_norm_with_affine": True,
        "mask_token_id": MASK,
        "max_sequence_length": context,
        "mlp_hidden_size": ffn,
        "mlp_ratio": 4,
        "model_type": "llada",
        "multi_query_attention": None,
        "n_heads": heads,
        "n_kv_heads": kv_heads,
        "n_layers": layers,
        "pad_token_id": EOS,
        "precision": "amp_bf16",
        "residual_dropout": 0.0,
        "rms_norm_eps": 1e-05,
        "rope": True,
        "rope_full_precision": True,
        "rope_theta": 10000.0,
        "scale_logits": False,
        "transformers_version": "4.46.3",
        "use_cache": False,
        "vocab_size": vocab,
        "weight_tying": False,
    }
    if qk_norm:
        config["qk_layernorm"] = True
    if shift:
        config["shift_logits"] = True
    return config


def random_weights(config: dict[str, Any], *, seed: int, scale: float) -> dict[str, np.ndarray]:
    """Random weights under LLaDA's short names, such that a unit-norm row keeps its size.

    `scale` is the standard deviation of the attention scores: at 3, softmax is peaked, so that
    a wrong RoPE, scale or head mapping changes the logits by far more than rounding does.
    """
    rng = np.random.default_rng(seed)
    e, ffn, layers = config["d_model"], config["mlp_hidden_size"], config["n_layers"]
    head = e // config["n_heads"]
    kv = head * config["n_kv_heads"]
    ids = config["embedding_size"]
    qk_norm = config.get("qk_layernorm", False)
    qk = np.sqrt((1.0 if qk_norm else scale) / e)

    def matrix(rows: int, columns: int, std: float) -> np.ndarray:
        return rng.normal(0, std, (rows, columns))

    def norm(size: int, mean: float = 1.0) -> np.ndarray:
        return mean * rng.uniform(0.6, 1.4, size)

    weights = {"wte.weight": matrix(ids, e, 1.0), "ln_f.weight": norm(e)}
    for layer in range(layers):
        block = {
            "attn_norm": norm(e),
            "ff_norm": norm(e),
            "q_proj": matrix(e, e, qk),
            "k_proj": matrix(kv, e, qk),
            "v_proj": matrix(kv, e, e**-0.5),
            "attn_out": matrix(e, e, e**-0.5),
            "ff_proj": matrix(ffn, e, e**-0.5),
            "up_proj": matrix(ffn, e, e**-0.5),
            "ff_out": matrix(e, ffn, ffn**-0.5),
        }
        if qk_norm:
            block |= {"q_norm": norm(head, scale**0.5), "k_norm": norm(head, scale**0.5)}
        weights |= {f"blocks.{layer}.{name}.weight": w for name, w in block.items()}
    weights["ff_out.weight"] = matrix(ids, e, 2 * e**-0.5)
    weights["ff_out.weight"][[BOS, MASK, UNKNOWN]] = 0  # never the most likely ones
    return weights


def write_tokenizer(folder: Path, vocab: int) -> None:
    """A word-level tokenizer.json: the special tokens, then "w4", "w5", ... up to `vocab` words."""
    from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers, processors

    words = {word: i for i, word in enumerate(SPECIAL)}
    words |= {f"w{i}": i for i in range(len(SPECIAL), vocab)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token=SPECIAL[UNKNOWN]))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.add_special_tokens([AddedToken(word, special=True) for word in SPECIAL])
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{SPECIAL[BOS]} $A", special_tokens=[(SPECIAL[BOS], BOS)]
    )
    tokenizer.save(str(folder / "tokenizer.json"))


@pytest.fixture(scope="session")
def tiny_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> TinyCheckpoint:
    """Factory of checkpoint folders; the same parameters give the same folder (do not change it).

    Keyword parameters: family (of families.py), experts and top_k ("llada-moe" only), layers, dim,
    heads, kv_heads (default: heads), ffn, vocab, embeddings (default: vocab), context, qk_norm,
    shift ("llada" only, as embeddings and qk_norm), dtype ("f32" or "bf16"), seed, scale (of
    attention scores), tokenizer (also write tokenizer.json).
    """
    made: dict[str, Path] = {}

    def make(
        *,
        family: str = "llada",
        experts: int = 8,
        top_k: int = 3,
        layers: int = 2,
        dim: int = 32,
        heads: int = 4,
        kv_heads: int | None = None,
        ffn: int = 48,
        vocab: int = 64,
        embeddings: int | None = None,
        context: int = 256,
        qk_norm: bool = False,
        shift: bool = False,
        dtype: str = "f32",
        seed: int = 0,
        scale: float = 3.0,
        tokenizer: bool = False,
    ) -> Path:
        config = llada_config(
            layers=layers,
            dim=dim,
            heads=heads,
            kv_heads=kv_heads or heads,
            ffn=ffn,
            vocab=vocab,
            embeddings=embeddings or vocab,
            context=context,
            qk_norm=qk_norm or family == "llada-moe",
            shift=shift,
        )
        sizes = {size: config[key] for size, key in LLADA_KEYS.items()}
        if family == "llada-moe":
            sizes |= {"experts": experts, "top_k": top_k}
        weighed = config
        if family != "llada":
            config = family_config(family, sizes)
        key = json.dumps([config, dtype, seed, scale, tokenizer])
        if key not in made:
            folder = tmp_path_factory.mktemp("checkpoint")
            weights = random_weights(weighed, seed=seed, scale=scale)
            if family != "llada":
                weights = add_family(family, weights, sizes, seed)
            kind = {"f32": np.float32, "bf16": ml_dtypes.bfloat16}[dtype]
            weights = {stored_name(family, name): w.astype(kind) for name, w in weights.items()}
            save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
            (folder / "config.json").write_text(json.dumps(config, indent=2))
            if tokenizer:
                write_tokenizer(folder, vocab)
            made[key] = folder
        return made[key]

    return make


@pytest.fixture
def copy_checkpoint(tmp_path: Path) -> Callable[[Path], Path]:
    """Copies a checkpoint folder to one that the test may change."""

    def copy(source: Path) -> Path:
        folder = tmp_path / f"copy{len(list(tmp_path.iterdir()))}"
        folder.mkdir()
        for file in source.iterdir():
            (folder / file.name).write_bytes(file.read_bytes())
        return folder

    return copy


@pytest.fixture(scope="session")
def text_llm(tiny_checkpoint: TinyCheckpoint) -> bicache.LLM:
    """A tiny model with a tokenizer, shared by tests that change nothing in it but its store."""
    return bicache.LLM(tiny_checkpoint(layers=3, tokenizer=True), threads=1)


@pytest.fixture(scope="session")
def ids_llm(tiny_checkpoint: TinyCheckpoint) -> bicache.LLM:
    """The same model without a tokenizer."""
    return bicache.LLM(tiny_checkpoint(layers=3), threads=1)


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


def random_pairs(sizes: Sequence[tuple[int, int]], vocab: int = 64, seed: int = 0) -> Pairs:
    """Pairs of these lengths, none of their ids a special one."""
    rng = np.random.default_rng(seed)
    return [
        (rng.integers(4, vocab, p).tolist(), rng.integers(4, vocab, u).tolist()) for p, u in sizes
    ]
