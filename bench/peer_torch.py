"""LLaDA in PyTorch, as Hugging Face's reference runs it: a peer of bench/peers.py."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from llada_gguf import Bfloat16File, widened
from numpy.typing import NDArray
from torch import Tensor

TYPES = {"f32": torch.float32, "bf16": torch.bfloat16}


class Torch:
    """A checkpoint of random_model.py; everything is in one type, but norms are taken in float32.

    Args:
        folder: The checkpoint.
        kind: "f32" or "bf16".
        threads: CPU threads.
    """

    def __init__(self, folder: Path, kind: str, threads: int) -> None:
        torch.set_num_threads(threads)
        self.config = json.loads((folder / "config.json").read_text())
        self.kind = TYPES[kind]
        source = Bfloat16File(folder / "model.safetensors")
        self.weights = {
            name.removeprefix("model.transformer.").removesuffix(".weight"): torch.from_numpy(
                widened(source.bits(name))
            ).to(self.kind)
            for name in source.header
        }
        self.turns: dict[int, tuple[Tensor, Tensor]] = {}

    def about(self) -> dict[str, Any]:
        return {
            "version": torch.__version__,
            "capability": torch.backends.cpu.get_cpu_capability(),
            "onednn": torch.backends.mkldnn.is_available(),
        }

    def prepare(self, tokens: Sequence[int]) -> Tensor:
        n = len(tokens)
        if n not in self.turns:
            size = self.config["d_model"] // self.config["n_heads"]
            speeds = self.config["rope_theta"] ** (-torch.arange(0, size, 2).double() / size)
            angles = torch.arange(n)[:, None] * torch.cat([speeds, speeds])
            self.turns[n] = (angles.cos().to(self.kind), angles.sin().to(self.kind))
        return torch.tensor(tokens)

    @torch.inference_mode()
    def forward(self, tokens: Tensor) -> Tensor:
        """Logits [N, V] of all rows."""
        x = self.weights["wte"][tokens]
        for layer in range(self.config["n_layers"]):
            w = {
                name: self.weights[f"blocks.{layer}.{name}"]
                for name in ("attn_norm", "q_proj", "k_proj", "v_proj", "attn_out", "ff_norm",
                             "ff_proj", "up_proj", "ff_out")
            }  # fmt: skip
            x = x + self.attention(w, self.norm(x, w["attn_norm"]))
            h = self.norm(x, w["ff_norm"])
            gated = F.silu(F.linear(h, w["ff_proj"])) * F.linear(h, w["up_proj"])
            x = x + F.linear(gated, w["ff_out"])
        return F.linear(self.norm(x, self.weights["ln_f"]), self.weights["ff_out"])

    def norm(self, x: Tensor, weight: Tensor) -> Tensor:
        wide = x.float()
        scale = torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + self.config["rms_norm_eps"])
        return (wide * scale).to(x.dtype) * weight

    def attention(self, w: dict[str, Tensor], x: Tensor) -> Tensor:
        n, heads = len(x), self.config["n_heads"]
        q, k, v = (
            F.linear(x, w[f"{which}_proj"]).view(n, heads, -1).transpose(0, 1) for which in "qkv"
        )
        q, k = self.turned(q), self.turned(k)
        mixed = F.scaled_dot_product_attention(q[None], k[None], v[None])[0]
        return F.linear(mixed.transpose(0, 1).reshape(n, -1), w["attn_out"])

    def turned(self, x: Tensor) -> Tensor:
        """RoPE of [H, N, D]: coordinate i with i + D/2."""
        cos, sin = self.turns[x.shape[1]]
        low, high = x.chunk(2, -1)
        return x * cos + torch.cat([-high, low], -1) * sin

    def array(self, logits: Tensor) -> NDArray[np.float32]:
        return logits.float().numpy()
