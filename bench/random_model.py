"""Checkpoints of random weights in LLaDA's layout, for benches about time and work."""

from __future__ import annotations

import json
import math
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

EOS, MASK, FIRST_WORD = 0, 2, 4


@dataclass(frozen=True)
class Shape:
    layers: int
    dim: int
    heads: int
    ffn: int
    vocab: int

    def tensors(self) -> dict[str, tuple[tuple[int, ...], float]]:
        """Shape and standard deviation of every tensor, under LLaDA's names; 0: all ones."""
        e, f, v = self.dim, self.ffn, self.vocab
        all_ = {"wte": ((v, e), 1.0), "ln_f": ((e,), 0.0), "ff_out": ((v, e), 2 * e**-0.5)}
        for layer in range(self.layers):
            block = {"attn_norm": ((e,), 0.0), "ff_norm": ((e,), 0.0)}
            block |= {name: ((e, e), e**-0.5) for name in ("q_proj", "k_proj", "v_proj")}
            block |= {"attn_out": ((e, e), e**-0.5), "ff_out": ((e, f), f**-0.5)}
            block |= {name: ((f, e), e**-0.5) for name in ("ff_proj", "up_proj")}
            all_ |= {f"blocks.{layer}.{name}": what for name, what in block.items()}
        return {f"model.transformer.{name}.weight": what for name, what in all_.items()}

    def config(self, context: int) -> dict[str, Any]:
        """config.json with LLaDA's keys."""
        return {
            "model_type": "llada", "block_type": "llama", "layer_norm_type": "rms",
            "activation_type": "silu", "rope": True, "rope_theta": 10000.0, "rms_norm_eps": 1e-5,
            "n_layers": self.layers, "d_model": self.dim, "n_heads": self.heads,
            "n_kv_heads": self.heads, "mlp_hidden_size": self.ffn, "vocab_size": self.vocab,
            "embedding_size": self.vocab, "max_sequence_length": context, "mask_token_id": MASK,
            "eos_token_id": EOS,
        }  # fmt: skip


MID = Shape(layers=18, dim=1536, heads=12, ffn=4096, vocab=32000)
SMALL = Shape(layers=4, dim=64, heads=4, ffn=96, vocab=128)  # for tests


def pass_flops(shape: Shape, rows: list[int], keys: int, head_rows: int) -> int:
    """One pass: `rows` recomputed per layer, each attending to `keys` rows; 2 per multiply-add."""
    weights = 4 * shape.dim**2 + 3 * shape.dim * shape.ffn  # one layer's
    attention = 2 * keys * shape.dim  # scores, and the values they weigh
    return 2 * sum(rows) * (weights + attention) + 2 * head_rows * shape.dim * shape.vocab


def write_checkpoint(folder: Path, shape: Shape, context: int) -> None:
    """A safetensors file of seeded random bfloat16, tensor by tensor.

    Raises:
        OSError: The disk has too little room.
    """
    tensors = shape.tensors()
    header: dict[str, Any] = {}
    end = 0
    for name, (dims, _) in tensors.items():
        begin, end = end, end + 2 * math.prod(dims)
        header[name] = {"dtype": "BF16", "shape": dims, "data_offsets": [begin, end]}
    free = shutil.disk_usage(folder).free
    if free < end + 2**20:
        raise OSError(
            f"[bench] room in {folder} (TMPDIR chooses): expected {end + 2**20} bytes, got {free}"
        )
    rng = np.random.default_rng(0)
    head = json.dumps(header).encode()
    with open(folder / "model.safetensors", "wb") as file:
        file.write(len(head).to_bytes(8, "little") + head)
        for name, (dims, deviation) in tensors.items():
            values = np.ones(dims, np.float32)
            if deviation > 0:
                values = rng.standard_normal(dims, np.float32) * np.float32(deviation)
            if name == "model.transformer.ff_out.weight":
                values[[EOS, MASK]] = 0  # never the most likely: every step commits its share
            # A float32's upper half is a bfloat16.
            file.write((values.view(np.uint32) >> 16).astype("<u2").tobytes())
    (folder / "config.json").write_text(json.dumps(shape.config(context)))
