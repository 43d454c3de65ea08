"""GGUF files of tiny checkpoints, written with the `gguf` package as llama.cpp converts them."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import gguf
import ml_dtypes
import numpy as np
from families import family_of
from gguf import GGMLQuantizationType as Type
from safetensors.numpy import load_file, save_file

_LLADA = {
    "wte": "token_embd", "ln_f": "output_norm", "ff_out": "output", "attn_norm": "attn_norm",
    "ff_norm": "ffn_norm", "q_proj": "attn_q", "k_proj": "attn_k", "v_proj": "attn_v",
    "attn_out": "attn_output", "ff_proj": "ffn_gate", "up_proj": "ffn_up",
}  # fmt: skip
_QWEN = {
    "embed_tokens": "token_embd", "norm": "output_norm", "lm_head": "output",
    "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm", "q_proj": "attn_q",
    "k_proj": "attn_k", "v_proj": "attn_v", "o_proj": "attn_output", "gate_proj": "ffn_gate",
    "up_proj": "ffn_up", "down_proj": "ffn_down", "gate": "ffn_gate_inp", "q_norm": "attn_q_norm",
    "k_norm": "attn_k_norm",
}  # fmt: skip


def interleaved(rows: np.ndarray, heads: int) -> np.ndarray:
    """Rows of q or k with those of the two halves of every head in turn, as llama.cpp's LLaDA."""
    halves = rows.reshape(heads, 2, -1, *rows.shape[1:])
    return halves.swapaxes(1, 2).reshape(rows.shape)


def quantised(values: np.ndarray, kind: Type) -> np.ndarray:
    """Blocks uint8 [..., bytes] of matrices; of types that cannot be made here: random ones."""
    block = gguf.GGML_QUANT_SIZES[kind][0]
    try:
        return gguf.quants.quantize(values.astype(np.float32), kind)
    except NotImplementedError:
        rng = np.random.default_rng(values.size)
        rows = values.size // values.shape[-1]
        blocks = random_blocks(rng, kind, rows, values.shape[-1] // block)
        return blocks.reshape(*values.shape[:-1], -1)


# Where blocks have their scales in half precision, in bytes.
_SCALES = {
    Type.Q4_0: (0,), Type.Q4_1: (0, 2), Type.Q5_0: (0,), Type.Q5_1: (0, 2), Type.Q8_0: (0,),
    Type.Q4_K: (0, 2), Type.Q5_K: (0, 2), Type.Q6_K: (208,),
}  # fmt: skip


def random_blocks(rng: np.random.Generator, kind: Type, rows: int, blocks: int) -> np.ndarray:
    """Random bytes [rows, bytes] with scales such that weights are about 0.05."""
    size = gguf.GGML_QUANT_SIZES[kind][1]
    data = rng.integers(0, 256, (rows, blocks, size), np.uint8)
    # K types multiply by another scale of some 30.
    scale = 5e-3 if kind in (Type.Q4_0, Type.Q4_1, Type.Q5_0, Type.Q5_1) else 1e-4
    for at in _SCALES[kind]:
        halves = (scale * rng.uniform(-1, 1, (rows, blocks))).astype(np.float16)
        data[:, :, at : at + 2] = halves[..., None].view(np.uint8)
    return data.reshape(rows, blocks * size)


def gguf_name(name: str) -> str:
    parts = name.split(".")
    dream = "transformer" not in parts
    if parts[-2] == "ff_out" and "blocks" in parts:
        short = "ffn_down"
    else:
        short = (_QWEN if dream else _LLADA)[parts[-2]]
    layer = next((part for part in parts if part.isdecimal()), None)
    if "experts" in parts:  # all of them are one tensor
        short += "_exps"
    return f"{short}.{parts[-1]}" if layer is None else f"blk.{layer}.{short}.{parts[-1]}"


def write_gguf(
    folder: Path,
    path: Path,
    kind: Type | Callable[[str], Type] = Type.F32,
    *,
    tokenizer: Mapping[str, Any] | None = None,
    change: Callable[[gguf.GGUFWriter], None] | None = None,
    **settings: Any,
) -> dict[str, np.ndarray]:
    """Writes the LLaDA, Dream or LLaDA-MoE checkpoint in `folder` as `path`.

    Args:
        kind: Of the matrices (a router's is F32); or what gives it for a name (llama.cpp's).
        tokenizer: Metadata of the tokenizer, without "tokenizer."; None: no_vocab.
        change: Adds to the file what it likes.
        settings: Of the writer.

    Returns:
        The weights that the file holds, under the folder's names, float32.
    """
    config = json.loads((folder / "config.json").read_text())
    arch = family_of(config)
    writer = gguf.GGUFWriter(path, arch, **settings)
    heads, kv_heads = _add_sizes(writer, config, arch)
    for key, value in (tokenizer or {"ggml.model": "no_vocab"}).items():
        _add_value(writer, f"tokenizer.{key}", value)
    if change is not None:
        change(writer)
    held = {}
    for short, named in _by_name(load_file(folder / "model.safetensors")).items():
        type_ = kind if isinstance(kind, Type) else kind(short)
        if "_exps" in short:
            stack = np.stack(list(named.values()))
            held |= dict(zip(named, _add_tensor(writer, short, stack, type_), strict=True))
            continue
        ((name, values),) = named.items()
        rotary = arch == "llada" and short.endswith(("attn_q.weight", "attn_k.weight"))
        of = heads if "attn_q" in short else kv_heads
        stored = interleaved(values, of) if rotary else values
        if "ffn_gate_inp" in short:
            type_ = Type.F32
        held[name] = _add_tensor(writer, short, stored, type_ if values.ndim == 2 else Type.F32)
        if rotary:  # back
            pairs = held[name].reshape(of, -1, 2, values.shape[1])
            held[name] = pairs.swapaxes(1, 2).reshape(values.shape)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return held


def _by_name(weights: dict[str, np.ndarray]) -> dict[str, dict[str, np.ndarray]]:
    """float32, by llama.cpp's name, then by the folder's; experts in their order."""
    found: dict[str, dict[str, np.ndarray]] = {}
    for name in sorted(weights, key=lambda n: [int(x) for x in n.split(".") if x.isdecimal()]):
        found.setdefault(gguf_name(name), {})[name] = weights[name].astype(np.float32)
    return found


def _add_sizes(writer: gguf.GGUFWriter, config: dict[str, Any], arch: str) -> tuple[int, int]:
    def get(*names: str) -> Any:
        return next(config[name] for name in names if config.get(name) is not None)

    heads = get("n_heads", "num_attention_heads")
    kv_heads = get("n_kv_heads", "num_key_value_heads")
    writer.add_block_count(get("n_layers", "num_hidden_layers"))
    writer.add_context_length(get("max_sequence_length", "max_position_embeddings"))
    writer.add_embedding_length(get("d_model", "hidden_size"))
    sizes = ("mlp_hidden_size", "intermediate_size", "dense_intermediate_size")
    writer.add_feed_forward_length(get(*sizes))
    writer.add_head_count(heads)
    writer.add_head_count_kv(kv_heads)
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_rope_freq_base(config["rope_theta"])
    writer.add_rope_dimension_count(get("d_model", "hidden_size") // heads)
    writer.add_vocab_size(config["vocab_size"])
    writer.add_causal_attention(False)
    if arch == "llada-moe":
        writer.add_expert_count(config["num_experts"])
        writer.add_expert_used_count(config["num_experts_per_tok"])
        writer.add_expert_feed_forward_length(config["expert_intermediate_size"])
    if arch != "dream":
        writer.add_diffusion_shift_logits(config.get("shift_logits", False))
    writer.add_mask_token_id(config["mask_token_id"])
    writer.add_eos_token_id(config["eos_token_id"])
    return heads, kv_heads


def _add_value(writer: gguf.GGUFWriter, key: str, value: Any) -> None:
    if isinstance(value, bool):
        writer.add_bool(key, value)
    elif isinstance(value, int):
        writer.add_uint32(key, value)
    elif isinstance(value, str):
        writer.add_string(key, value)
    else:
        writer.add_array(key, value)


def _add_tensor(writer: gguf.GGUFWriter, name: str, values: np.ndarray, kind: Type) -> np.ndarray:
    """The values that the file has then."""
    if kind == Type.BF16:
        halves = values.astype(ml_dtypes.bfloat16)
        writer.add_tensor(name, halves.view(np.uint8), raw_dtype=kind)
        return halves.astype(np.float32)
    if kind in (Type.F32, Type.F16):
        data = values.astype(np.float16 if kind == Type.F16 else np.float32)
        writer.add_tensor(name, data)
        return data.astype(np.float32)
    blocks = quantised(values, kind)
    writer.add_tensor(name, blocks, raw_dtype=kind)
    return gguf.quants.dequantize(blocks, kind)


def with_weights(folder: Path, weights: dict[str, np.ndarray], target: Path) -> Path:
    """A checkpoint folder like `folder` with other weights."""
    target.mkdir()
    for file in folder.iterdir():
        if file.suffix == ".json":
            (target / file.name).write_bytes(file.read_bytes())
    whole = {name: np.ascontiguousarray(weight) for name, weight in weights.items()}
    save_file(whole, target / "model.safetensors")
    return target
