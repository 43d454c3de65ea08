"""The LLaDA block in torch, as trained here, with per-head QK-norm; and the optimizer."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@dataclass(frozen=True)
class ModelConfig:
    vocab: int
    dim: int = 64
    layers: int = 8
    heads: int = 2
    ffn: int = 192
    theta: float = 1000.0
    eps: float = 1e-5

    @property
    def head_dim(self) -> int:
        return self.dim // self.heads


class Linear(nn.Module):
    """Without bias; float32 master weight, computed in the input's type."""

    def __init__(self, inputs: int, outputs: int, std: float):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(outputs, inputs) * std)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight.to(x.dtype))


class RMSNorm(nn.Module):
    def __init__(self, dim: int, eps: float, value: float = 1.0):
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.full((dim,), value)), eps

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, (x.shape[-1],), self.weight.to(x.dtype), self.eps)


def rope_angles(rows: int, head_dim: int, theta: float) -> tuple[Tensor, Tensor]:
    frequency = theta ** (-torch.arange(0, head_dim, 2).float() / head_dim)
    angle = torch.outer(torch.arange(rows).float(), frequency)
    return angle.cos(), angle.sin()


def rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    a, b = x.chunk(2, -1)
    return torch.cat((a * cos - b * sin, a * sin + b * cos), -1)


class Block(nn.Module):
    """`depth` sets the scale of the output projections (GPT-2's 1 / sqrt(2 L))."""

    def __init__(self, c: ModelConfig, depth: int):
        super().__init__()
        self.c, std, out = c, 0.7 * c.dim**-0.5, (2 * depth) ** -0.5
        self.attn_norm, self.ff_norm = RMSNorm(c.dim, c.eps), RMSNorm(c.dim, c.eps)
        self.q_norm, self.k_norm = RMSNorm(c.head_dim, c.eps, 2.0), RMSNorm(c.head_dim, c.eps)
        self.q_proj, self.k_proj, self.v_proj = (Linear(c.dim, c.dim, std) for _ in range(3))
        self.attn_out = Linear(c.dim, c.dim, std * out)
        self.ff_proj, self.up_proj = Linear(c.dim, c.ffn, std), Linear(c.dim, c.ffn, std)
        self.ff_out = Linear(c.ffn, c.dim, c.ffn**-0.5 * out)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        n = self.attn_norm(x)
        split = (*x.shape[:2], self.c.heads, self.c.head_dim)
        q = rope(self.q_norm(self.q_proj(n).view(split)).transpose(1, 2), cos, sin)
        k = rope(self.k_norm(self.k_proj(n).view(split)).transpose(1, 2), cos, sin)
        v = self.v_proj(n).view(split).transpose(1, 2)
        # bmm + softmax: at these lengths the backward of scaled_dot_product_attention is several
        # times slower on CPU
        attention = torch.softmax(q * self.c.head_dim**-0.5 @ k.transpose(-1, -2), -1) @ v
        x = x + self.attn_out(attention.transpose(1, 2).reshape(x.shape))
        n = self.ff_norm(x)
        return x + self.ff_out(F.silu(self.ff_proj(n)) * self.up_proj(n))


class DLM(nn.Module):
    def __init__(self, c: ModelConfig, dtype: torch.dtype = torch.bfloat16, max_rows: int = 256):
        super().__init__()
        self.c, self.dtype = c, dtype
        self.wte = nn.Parameter(torch.randn(c.vocab, c.dim) * 0.5)
        self.blocks = nn.ModuleList(Block(c, c.layers) for _ in range(c.layers))
        self.ln_f = RMSNorm(c.dim, c.eps)
        self.head = Linear(c.dim, c.vocab, c.dim**-0.5)
        cos, sin = rope_angles(max_rows, c.head_dim, c.theta)
        self.register_buffer("cos", cos, persistent=False)
        self.register_buffer("sin", sin, persistent=False)

    def forward(self, ids: Tensor, last: int) -> Tensor:
        """Logits of the last `last` rows: ids [B, N] -> float32 [B, last, V]."""
        n = ids.shape[1]
        x = F.embedding(ids, self.wte).to(self.dtype)
        cos, sin = self.cos[:n].to(self.dtype), self.sin[:n].to(self.dtype)
        for block in self.blocks:
            x = block(x, cos, sin)
        return self.head(self.ln_f(x[:, -last:])).float()


def prepend_layers(c: ModelConfig, trained: dict[str, Tensor], count: int, scale: float) -> DLM:
    """`trained` behind `count` fresh layers, near-identities: output projections times `scale`."""
    model = DLM(c)
    shifted = {}
    for name, value in trained.items():
        if name.startswith("blocks."):
            _, layer, rest = name.split(".", 2)
            name = f"blocks.{int(layer) + count}.{rest}"
        shifted[name] = value
    missing, unexpected = model.load_state_dict(shifted, strict=False)
    fresh = tuple(f"blocks.{i}." for i in range(count))
    assert not unexpected and all(name.startswith(fresh) for name in missing), (missing, unexpected)
    with torch.no_grad():
        for block in model.blocks[:count]:
            block.attn_out.weight.mul_(scale)
            block.ff_out.weight.mul_(scale)
    return model


class Optimizer:
    """Muon (momentum .95) for the blocks' matrices, AdamW for everything else."""

    def __init__(self, model: DLM, muon_lr: float, adam_lr: float, weight_decay: float = 0.01):
        named = list(model.named_parameters())
        self.matrices = [p for n, p in named if n.startswith("blocks.") and p.ndim == 2]
        self.others = [p for n, p in named if not (n.startswith("blocks.") and p.ndim == 2)]
        self.muon_lr, self.adam_lr, self.weight_decay = muon_lr, adam_lr, weight_decay
        self.groups: dict[torch.Size, list[nn.Parameter]] = {}
        for p in self.matrices:
            self.groups.setdefault(p.shape, []).append(p)
        self.momentum = {s: torch.zeros(len(ps), *s) for s, ps in self.groups.items()}
        self.adam = torch.optim.AdamW(self.others, lr=adam_lr, betas=(0.9, 0.98), weight_decay=0.0)

    @torch.no_grad()
    def step(self, scale: float) -> None:
        """One update with both learning rates multiplied by `scale`; clears the gradients."""
        nn.utils.clip_grad_norm_(self.others, 1.0)
        for group in self.adam.param_groups:
            group["lr"] = self.adam_lr * scale
        self.adam.step()
        for shape, params in self.groups.items():
            gradient = torch.stack([p.grad for p in params])
            momentum = self.momentum[shape].mul_(0.95).add_(gradient, alpha=0.05)
            update = orthogonalize(gradient * 0.05 + momentum * 0.95)
            update *= math.sqrt(max(1, shape[0] / shape[1]))
            rate = self.muon_lr * scale
            for p, u in zip(params, update, strict=True):
                p.mul_(1 - rate * self.weight_decay).add_(u, alpha=-rate)
        for p in self.matrices + self.others:
            p.grad = None

    def state_dict(self) -> dict:
        return {"adam": self.adam.state_dict(), "momentum": self.momentum}

    def load_state_dict(self, state: dict) -> None:
        self.adam.load_state_dict(state["adam"])
        self.momentum = state["momentum"]


def orthogonalize(x: Tensor) -> Tensor:
    """Muon's Newton-Schulz iteration (Jordan et al. 2024) on each matrix of x [n, rows, cols]."""
    x = x.bfloat16()
    wide = x.size(1) > x.size(2)
    x = x.mT if wide else x
    x = x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)
    for _ in range(5):
        a = x @ x.mT
        x = 3.4445 * x + (-4.7750 * a + 2.0315 * a @ a) @ x
    return (x.mT if wide else x).float()
