"""Twins of the engine's arithmetic in bf16, int8 and int4, and of how weights become that.

What is rounded, is rounded here as well (float32, the engine's formulas); all else is float64. A
sum of products of quantised numbers times their scales is the integer sum times the scales.
"""

from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from reference import KV, Llada
from torch import Tensor

Floats = NDArray[np.float32]
F = np.float32
GROUP = 32  # inputs that share m and z
LAYER = (
    "attn_norm", "q_proj", "k_proj", "v_proj", "attn_out",
    "ff_norm", "ff_proj", "up_proj", "ff_out",
)  # fmt: skip
KEY_BLOCK = 64  # keys between which attention's largest score may grow
# Of m, from a group's middle to w8 at q = 0: where the grid of 16 points is tried.
OFFSETS = (7.5, 7.3, 7.7, 7.1, 7.9)


def scale_of(x: Floats) -> tuple[Floats, Floats]:
    """Scales [rows] of x [rows, n], and what x is multiplied by: 127 / largest."""
    most = np.abs(x).max(-1, initial=0)
    with np.errstate(divide="ignore", over="ignore"):
        inverse = np.where(most > 0, F(127) / most, F(0)).astype(F)
    return np.where(np.isinf(inverse), F(0), most / F(127)).astype(F), inverse


def int8(x: Floats) -> tuple[NDArray[np.int64], Floats]:
    """q [rows, n] in [-127, 127] and scales [rows], of activations or weights."""
    scale, inverse = scale_of(x)
    return np.rint(x * inverse[:, None]).astype(np.int64), scale


def int4(w: Floats) -> tuple[NDArray[np.int64], Floats]:
    """m * q - z [rows, n] in [-127, 127] and scales [rows] of weights.

    Per group of GROUP inputs (a short one repeats its last): 1 <= m <= 16, z an int8, q in 0..15,
    the best of ten (m, z).
    """
    rows, inputs = w.shape
    scale, inverse = scale_of(w)
    padding = -inputs % GROUP
    y = np.rint(w * inverse[:, None] * F(16)) * F(1 / 16)  # sums of squares below are exact
    y = np.pad(y, ((0, 0), (0, padding)), mode="edge").reshape(rows, -1, GROUP)
    low, high = y.min(-1), y.max(-1)
    top = np.minimum(np.ceil((high - low) * F(1 / 15)), F(16))
    least, best = np.full(low.shape, np.inf, F), np.zeros_like(y)
    for finer in (0, 1):
        m = np.maximum(top - F(finer), F(1))
        for offset in OFFSETS:
            z = np.rint(F(offset) * m - (low + high) * F(0.5))
            z = np.clip(z, 15 * m - F(127), F(127))[..., None]
            q = np.clip(np.rint((y + z) * (F(1) / m)[..., None]), F(0), F(15))
            value = m[..., None] * q - z
            error = np.square(value - y).sum(-1)
            better = error < least
            least = np.where(better, error, least)
            best = np.where(better[..., None], value, best)
    assert best.dtype == F and np.abs(best).max() <= 127
    return best.reshape(rows, -1)[:, :inputs].astype(np.int64), scale


def channel_factors(activations: Tensor, weights: Tensor) -> Tensor:
    """Powers of two [n]: how much smaller channels become whose activations stand out."""
    seen = (activations > 0) & (weights > 0)
    size = torch.where(seen, activations / weights.where(seen, torch.ones_like(weights)), 0).sqrt()
    median = size[seen].sort().values[int(seen.sum()) // 2]
    return torch.exp2(torch.round(torch.log2((size / median).clamp_min(1))))


def balance(model: Llada) -> None:
    """Moves large channels from activations into weights; the function stays the same."""
    w = model.weights
    residual = model.weight("wte").square().mean(0)  # mean squares, as weights foretell them

    def site(norm: str, readers: list[str], exact: tuple[str, ...] = ()) -> None:
        most = torch.stack([w[name].abs().amax(0) for name in readers]).amax(0)
        factors = channel_factors(w[norm].abs() * residual.sqrt(), most)
        w[norm] = w[norm] / factors
        for name in (*readers, *exact):
            w[name] = w[name] * factors

    for layer in range(model.layers):
        names = {x: f"blocks.{layer}.{x}.weight" for x in LAYER}
        where = [f"experts.{x}." for x in range(model.experts)] or [""]
        router = (f"blocks.{layer}.router.weight",) if model.experts else ()
        site(names["attn_norm"], [names[x] for x in ("q_proj", "k_proj", "v_proj")])
        residual = residual + w[names["attn_out"]].square().sum(1)
        written, readers = torch.zeros_like(residual), []
        for x in where:
            gate, up, down = (
                f"blocks.{layer}.{x}{part}.weight" for part in ("ff_proj", "up_proj", "ff_out")
            )
            written += w[down].square().sum(1) / len(where)
            size = [(w[x] * w[names["ff_norm"]]).square().sum(1).sqrt() for x in (gate, up)]
            inner = channel_factors(size[0] * size[1], w[down].abs().amax(0))
            w[up] = w[up] / inner[:, None]
            w[down] = w[down] * inner
            readers += [gate, up]
        site(names["ff_norm"], readers, router)
        residual = residual + written
    site("ln_f.weight", ["ff_out.weight"])


def restored(q: NDArray[np.int64], scale: Floats) -> Tensor:
    return torch.tensor(q * scale.astype(np.float64)[:, None])


def half(x: Tensor) -> Tensor:
    """Rounded to bfloat16 by way of float32."""
    return x.float().bfloat16().double()


class Rounded(Llada):
    """A checkpoint as the engine computes it in `dtype`; attention over K and V held in `kv`."""

    def __init__(self, folder: Path, dtype: str, kv: str = "bf16") -> None:
        super().__init__(folder)
        self.kv, self.arithmetic = kv, dtype
        if dtype != "bf16":
            self.balance()
        for name, w in self.weights.items():
            if w.dim() == 2:
                self.weights[name] = self.held(name, w)

    def balance(self) -> None:
        balance(self)

    def held(self, name: str, w: Tensor) -> Tensor:
        if name.endswith("router.weight"):
            return w
        if self.arithmetic == "bf16" or name == "wte.weight":
            return half(w)
        # The output head is small beside the layers, and its errors are nobody's to average out.
        quantise = int4 if self.arithmetic == "int4" and name != "ff_out.weight" else int8
        return restored(*quantise(w.numpy().astype(F)))

    def product(self, x: Tensor, name: str, layer: int | None = None) -> Tensor:
        if self.arithmetic == "bf16":
            return super().product(half(x), name, layer)
        return super().product(restored(*int8(x.numpy().astype(F))), name, layer)

    def attended(self, x: Tensor) -> Tensor:
        return half(x) if self.kv == "bf16" else x

    def mix(self, layer: int, q: Tensor, rows: Tensor, kv: KV) -> Tensor:
        # Softmax weights are rounded relative to the largest score so far, not to that of all keys.
        assert kv[0].shape[1] <= KEY_BLOCK
        return super().mix(layer, q, rows, kv)
