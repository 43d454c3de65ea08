"""A checkpoint of random_model.py as a GGUF file, the format llama.cpp reads.

GGUF version 3 (github.com/ggml-org/ggml, docs/gguf.md): header, key-values, tensor table, then
tensors at multiples of 32 bytes. Written without a tokenizer, for token ids in and logits out.
"""

from __future__ import annotations

import json
import math
import struct
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

ALIGNMENT = 32
F32, BF16 = 0, 30  # ggml_type
FILE_TYPES = {"F32": 0, "BF16": 32}  # llama_ftype
GLOBAL = {"wte": "token_embd", "ln_f": "output_norm", "ff_out": "output"}
BLOCK = {
    "attn_norm": "attn_norm", "ff_norm": "ffn_norm", "q_proj": "attn_q", "k_proj": "attn_k",
    "v_proj": "attn_v", "attn_out": "attn_output", "ff_proj": "ffn_gate", "up_proj": "ffn_up",
    "ff_out": "ffn_down",
}  # fmt: skip


class Bfloat16File:
    """The safetensors file of a checkpoint, mapped: bfloat16 tensors as uint16 [rows, columns]."""

    def __init__(self, path: Path) -> None:
        with open(path, "rb") as file:
            size = int.from_bytes(file.read(8), "little")
            self.header: dict[str, Any] = json.loads(file.read(size))
        self.bytes = np.memmap(path, np.uint8, "r", offset=8 + size)

    def bits(self, name: str) -> NDArray[np.uint16]:
        what = self.header[name]
        if what["dtype"] != "BF16":
            raise ValueError(f"[gguf] {name}: expected BF16, got {what['dtype']}")
        begin, end = what["data_offsets"]
        return self.bytes[begin:end].view("<u2").reshape(what["shape"])


def widened(bits: NDArray[np.uint16]) -> NDArray[np.float32]:
    """bfloat16 as the float32 of the same value."""
    return (bits.astype("<u4") << 16).view("<f4")


def interleaved(rows: NDArray[Any], heads: int) -> NDArray[Any]:
    """Rows of a q or k projection so that the two coordinates that RoPE turns are neighbours.

    LLaDA turns coordinate i of a head with i + D/2, llama.cpp's LLaDA 2i with 2i + 1.
    """
    halves = rows.reshape(heads, 2, -1, *rows.shape[1:])
    return halves.swapaxes(1, 2).reshape(rows.shape)


def gguf_name(name: str) -> str:
    parts = name.removeprefix("model.transformer.").removesuffix(".weight").split(".")
    if parts[0] == "blocks":
        return f"blk.{parts[1]}.{BLOCK[parts[2]]}.weight"
    return f"{GLOBAL[parts[0]]}.weight"


def text(value: str) -> bytes:
    return struct.pack("<Q", len(value.encode())) + value.encode()


def key_value(key: str, value: bool | int | float | str) -> bytes:
    if isinstance(value, str):
        return text(key) + struct.pack("<I", 8) + text(value)
    if isinstance(value, bool):
        return text(key) + struct.pack("<I?", 7, value)
    if isinstance(value, int):
        return text(key) + struct.pack("<II", 4, value)
    return text(key) + struct.pack("<If", 6, value)


def facts(config: dict[str, Any], kind: str) -> dict[str, bool | int | float | str]:
    """llama.cpp's keys for config.json's."""
    sizes = {
        "block_count": config["n_layers"],
        "context_length": config["max_sequence_length"],
        "embedding_length": config["d_model"],
        "feed_forward_length": config["mlp_hidden_size"],
        "attention.head_count": config["n_heads"],
        "attention.head_count_kv": config["n_kv_heads"],
        "attention.layer_norm_rms_epsilon": float(config["rms_norm_eps"]),
        "attention.causal": False,
        "rope.freq_base": float(config["rope_theta"]),
        "rope.dimension_count": config["d_model"] // config["n_heads"],
        "vocab_size": config["vocab_size"],
    }
    return {
        "general.architecture": "llada",
        "general.name": "random weights",
        "general.file_type": FILE_TYPES[kind],
        **{f"llada.{key}": value for key, value in sizes.items()},
        "diffusion.shift_logits": False,
        "tokenizer.ggml.model": "no_vocab",
    }


def write_gguf(folder: Path, path: Path, kind: str) -> None:
    """Writes the checkpoint in `folder` as `path`.

    Args:
        kind: "F32" or "BF16", of the matrices; both hold exactly what the checkpoint holds. Norms
            are always F32.

    Raises:
        ValueError: A tensor is not bfloat16.
    """
    config = json.loads((folder / "config.json").read_text())
    source = Bfloat16File(folder / "model.safetensors")
    names = [name for name in source.header if name != "__metadata__"]
    values = facts(config, kind)
    table, end, places = b"", 0, []
    for name in names:
        dims = source.header[name]["shape"]
        type_ = BF16 if kind == "BF16" and len(dims) == 2 else F32
        begin = -(-end // ALIGNMENT) * ALIGNMENT
        end = begin + math.prod(dims) * (2 if type_ == BF16 else 4)
        places.append((name, type_, begin))
        table += text(gguf_name(name)) + struct.pack("<I", len(dims))
        table += b"".join(struct.pack("<Q", n) for n in reversed(dims))  # fastest first
        table += struct.pack("<IQ", type_, begin)
    with open(path, "wb") as file:
        file.write(b"GGUF" + struct.pack("<IQQ", 3, len(places), len(values)))
        file.write(b"".join(key_value(key, value) for key, value in values.items()) + table)
        pad(file)
        for name, type_, _ in places:
            pad(file)
            bits = source.bits(name)
            if "q_proj" in name or "k_proj" in name:
                heads = config["n_heads" if "q_proj" in name else "n_kv_heads"]
                bits = interleaved(bits, heads)
            file.write((bits if type_ == BF16 else widened(bits)).tobytes())


def pad(file: BinaryIO) -> None:
    """Up to the next aligned place; offsets in the table count from such a place."""
    file.write(b"\0" * (-file.tell() % ALIGNMENT))
