"""Checkpoints with outlier channels: in f32 the same function, bit for bit; hard to quantise."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file

POWERS = range(4, 8)  # a channel becomes 2 ** power times as large: 16 to 128


def with_outliers(
    source: Path, folder: Path, *, seed: int = 0, channels: int = 2, inner: int = 3
) -> Path:
    """A copy of a LLaDA checkpoint in `folder`, in which some channels are large.

    Per layer: `channels` of the input of q, k and v, as many of the input of gate and up (by their
    norm weights), and `inner` of the input of down (by rows of up). What reads a channel is smaller
    by the same power of two, so that float arithmetic gives the same bits.
    """
    shutil.copytree(source, folder, ignore=shutil.ignore_patterns("*.safetensors", "bicache.json"))
    tensors = {
        name: tensor
        for file in sorted(source.glob("*.safetensors"))
        for name, tensor in load_file(file).items()
    }
    rng = np.random.default_rng(seed)
    layers = json.loads((source / "config.json").read_text())["n_layers"]
    for layer in range(layers):
        block = f"model.transformer.blocks.{layer}."
        sites = (
            (f"{block}attn_norm.weight", ("q_proj", "k_proj", "v_proj"), channels),
            (f"{block}ff_norm.weight", ("ff_proj", "up_proj"), channels),
            (f"{block}up_proj.weight", ("ff_out",), inner),
        )
        for enlarged, readers, count in sites:
            size = tensors[enlarged].shape[0]
            chosen = rng.choice(size, min(count, size // 2), replace=False)
            factor = torch.tensor(2.0 ** rng.choice(POWERS, len(chosen)))
            large = tensors[enlarged]
            large[chosen] *= factor.to(large.dtype).reshape(-1, *[1] * (large.dim() - 1))
            for reader in readers:
                tensors[f"{block}{reader}.weight"][:, chosen] /= factor.to(large.dtype)
    save_file(tensors, folder / "model.safetensors")
    return folder
