"""bf16, int8 and int4 against reference_quantised.py, product by product.

Rounding turns a difference in a sum's last bits into one of a whole step now and then, and later
layers multiply such steps. So every stage of a layer is compared by itself, from the engine's own
values before it (`LLM.tap`), row by row: nearly all rows must agree to float32's precision, and
none may be off by more than a few steps.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import bicache
import numpy as np
import pytest
import reference_quantised
import torch
from bicache import _core
from numpy.typing import NDArray
from parity import Maker, played_on
from parity import tokens as random_tokens
from reference import Llada
from reference_quantised import Rounded
from safetensors.numpy import load_file, save_file
from torch import Tensor

DTYPES = ("bf16", "int8", "int4")
TIGHT = 1e-5  # of one stage, in standard deviations of its result
LOOSE = 0.25  # of a few steps that were rounded the other way

MHA: dict[str, Any] = {
    "layers": 3, "dim": 32, "heads": 4, "kv_heads": 4, "ffn": 48, "vocab": 61, "scale": 5.0,
}  # fmt: skip
SHAPES: dict[str, dict[str, Any]] = {
    "mha": MHA,
    "gqa, shift": MHA | {"heads": 8, "kv_heads": 2, "shift": True},
    "qk_norm": MHA | {"kv_heads": 2, "qk_norm": True},
    "odd": MHA | {"dim": 30, "heads": 5, "kv_heads": 1, "ffn": 37, "vocab": 53},
    "dream": MHA | {"family": "dream", "heads": 8, "kv_heads": 2},
    "illada": MHA | {"family": "illada", "kv_heads": 2},
    "moe": MHA | {"family": "llada-moe"},
    "wide": MHA | {"layers": 2, "dim": 96, "heads": 3, "kv_heads": 3, "ffn": 131, "vocab": 257},
}
sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "bench"))
from outliers import with_outliers  # noqa: E402

Taps = dict[tuple[int, str], NDArray[np.float32]]


def taps_of(llm: bicache.LLM, ids: Tensor) -> Taps:
    """What a forward pass showed, by (layer, name)."""
    taps: Taps = {}
    with llm.tap(lambda layer, name, x: taps.__setitem__((layer, name), x.copy())):
        llm.forward(ids.numpy())
    return taps


def stages(model: Llada, taps: Taps) -> dict[tuple[int, str], Tensor]:
    """Each stage [R, ...] as it follows from the engine's values before it."""
    out: dict[tuple[int, str], Tensor] = {}

    def seen(layer: int, name: str) -> Tensor:
        return torch.tensor(taps[layer, name]).double()

    def heads(x: Tensor) -> Tensor:
        return x.reshape(len(x), -1, model.head_dim).transpose(0, 1)

    x = seen(0, "residual")
    rows = torch.arange(len(x))
    for layer in range(model.layers):
        assert torch.equal(x, seen(layer, "residual"))
        for which in "qkv":
            y = model.project(layer, which, x)
            y = model.rope(y, rows) if which != "v" else y
            out[layer, which] = y.transpose(0, 1).flatten(1)
        q, k, v = (heads(seen(layer, which)) for which in "qkv")
        out[layer, "attention"] = model.mix(layer, q, rows, (k, v))
        attention, ffn = seen(layer, "attention"), seen(layer, "ffn")
        out[layer, "ffn"] = model.ffn(layer, (x.float() + attention.float()).double())
        x = (x.float() + (attention.float() + ffn.float())).double()
    out[model.layers, "logits"] = model.shifted(model.head(x))
    return out


def errors(model: Llada, taps: Taps) -> NDArray[np.float64]:
    """Largest error of every stage and row, in standard deviations of the stage. [stages, R]"""
    rows = []
    for key, expected in stages(model, taps).items():
        found = torch.tensor(taps[key]).double().reshape(expected.shape)
        rows.append(((found - expected).abs().amax(-1) / expected.std()).numpy())
    return np.array(rows)


def right(model: Llada, taps: Taps) -> bool:
    wrong = errors(model, taps)
    tight = wrong < TIGHT
    return bool(wrong.max() < LOOSE and tight.mean(1).min() > 0.8 and tight.mean() > 0.97)


def ids_of(model: Llada, count: int, seed: int) -> Tensor:
    ids = random_tokens(count, model, seed)
    ids[count // 2 :: 3] = model.mask
    return ids


@pytest.mark.parametrize("kv", ["f32", "bf16"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_every_stage_equals_the_twin(
    tiny_checkpoint: Maker, shape: str, dtype: str, kv: str
) -> None:
    folder = tiny_checkpoint(**SHAPES[shape], dtype="bf16", seed=31)
    llm = bicache.LLM(folder, dtype=dtype, kv_dtype=kv, threads=1)
    model = Rounded(folder, dtype, kv)
    assert llm.dtype == dtype
    for count in (2, 49):
        ids = ids_of(model, count, 31)
        taps = taps_of(llm, ids)
        assert right(model, taps)
        # nobody computes otherwise because somebody looks on
        assert taps[model.layers, "logits"].tobytes() == llm.forward(ids.numpy()).tobytes()


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_checkpoint_stored_in_f32(tiny_checkpoint: Maker, dtype: str) -> None:
    folder = tiny_checkpoint(**SHAPES["qk_norm"], dtype="f32", seed=32)
    model = Rounded(folder, dtype)
    taps = taps_of(bicache.LLM(folder, dtype=dtype, threads=1), ids_of(model, 23, 32))
    assert right(model, taps)
    exact = Llada(folder)
    assert not torch.equal(exact.weight("wte"), model.weight("wte"))
    assert not right(exact, taps)


class Unrounded(Rounded):
    def product(self, x: Tensor, name: str, layer: int | None = None) -> Tensor:
        return Llada.product(self, x, name, layer)


class ExactAttention(Rounded):
    def attended(self, x: Tensor) -> Tensor:
        return x


class Unbalanced(Rounded):
    def balance(self) -> None:
        pass


class CoarseHead(Rounded):
    def held(self, name: str, w: Tensor) -> Tensor:
        return super().held(name.replace("ff_out", "other") if "blocks" not in name else name, w)


MUTANTS: dict[str, tuple[type[Rounded], str]] = {
    "activations as they are, bf16": (Unrounded, "bf16"),
    "activations as they are, int8": (Unrounded, "int8"),
    "attention in f32": (ExactAttention, "bf16"),
    "outliers stay": (Unbalanced, "int8"),
    "head in int4": (CoarseHead, "int4"),
}


@pytest.mark.parametrize("mutant", MUTANTS)
def test_other_arithmetic_is_not_within_the_bounds(
    tiny_checkpoint: Maker, tmp_path: Path, mutant: str
) -> None:
    kind, dtype = MUTANTS[mutant]
    folder = with_outliers(tiny_checkpoint(**MHA, dtype="bf16", seed=33), tmp_path / "outliers")
    model = Rounded(folder, dtype)
    taps = taps_of(bicache.LLM(folder, dtype=dtype, threads=1), ids_of(model, 23, 33))
    assert right(model, taps)
    assert not right(kind(folder, dtype), taps)


def test_a_cheaper_search_for_int4_is_not_within_the_bounds(
    tiny_checkpoint: Maker, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tiny_checkpoint(**MHA, dtype="bf16", seed=34)
    model = Rounded(folder, "int4")
    taps = taps_of(bicache.LLM(folder, dtype="int4", threads=1), ids_of(model, 23, 34))
    assert right(model, taps)
    monkeypatch.setattr(reference_quantised, "OFFSETS", (7.5,))
    assert not right(Rounded(folder, "int4"), taps)


@pytest.mark.parametrize("dtype", ["int8", "int4"])
def test_outliers_do_harm_unless_balanced(
    tiny_checkpoint: Maker, tmp_path: Path, dtype: str
) -> None:
    plain = tiny_checkpoint(**SHAPES["wide"], dtype="bf16", seed=36)
    folder = with_outliers(plain, tmp_path / "outliers")
    exact = Llada(plain)
    ids = ids_of(exact, 40, 36)
    expected = exact.forward(ids)

    def error(logits: Tensor) -> float:
        return float((logits - expected).square().mean().sqrt() / expected.std())

    balanced = error(Rounded(folder, dtype).forward(ids))
    unbalanced = error(Unbalanced(folder, dtype).forward(ids))
    assert unbalanced > 3 * balanced
    found = bicache.LLM(folder, dtype=dtype, threads=1).forward(ids.numpy())
    assert error(torch.tensor(found)) < 1.2 * balanced


def test_outliers_of_a_mixture(
    tiny_checkpoint: Maker, copy_checkpoint: Callable[[Path], Path]
) -> None:
    # What is moved from a norm into the experts' weights moves into the router's as well.
    folder = copy_checkpoint(tiny_checkpoint(**SHAPES["moe"], dtype="bf16", seed=37))
    weights = load_file(folder / "model.safetensors")
    for layer in range(3):
        norm = weights[f"model.layers.{layer}.post_attention_layernorm.weight"]
        norm[7] *= 64
        weights[f"model.layers.{layer}.mlp.gate.weight"][:, 7] /= 64
        for expert in range(8):
            inner = f"model.layers.{layer}.mlp.experts.{expert}."
            for part in ("gate_proj", "up_proj"):
                weights[f"{inner}{part}.weight"][:, 7] /= 64
            weights[f"{inner}up_proj.weight"][expert] *= 64
            weights[f"{inner}down_proj.weight"][:, expert] /= 64
    save_file(weights, folder / "model.safetensors")
    exact = Llada(folder)
    ids = ids_of(exact, 40, 37)
    for dtype in ("int8", "int4"):
        model = Rounded(folder, dtype)
        moved = exact.weight("router", 0) != model.weight("router", 0)
        assert moved[:, 7].all() and not moved.all()
        taps = taps_of(bicache.LLM(folder, dtype=dtype, threads=1), ids)
        assert right(model, taps)
        assert not right(Unbalanced(folder, dtype), taps)


ISA_SCRIPT = """
import sys
import numpy as np
import bicache
folder, ids, out = sys.argv[1:]
ids = np.load(ids)
shown = {}
for dtype in ("bf16", "int8", "int4"):
    llm = bicache.LLM(folder, dtype=dtype, threads=1)
    with llm.tap(lambda l, name, x: shown.__setitem__(f"{dtype} {l} {name}", x.copy())):
        logits = llm.forward(ids)
    again = bicache.LLM(folder, dtype=dtype, threads=2).forward(ids)
    row = llm.forward(ids, rows=[5])
    assert again.tobytes() == logits.tobytes() and row.tobytes() == logits[5:6].tobytes()
np.savez(out, isa=bicache._core.isa(), **shown)
"""


@pytest.mark.parametrize("isa", _core.available_isas())
def test_every_isa(tiny_checkpoint: Maker, tmp_path: Path, isa: str) -> None:
    folder = tiny_checkpoint(**SHAPES["wide"], dtype="bf16", seed=35)
    ids = ids_of(Llada(folder), 61, 35)
    out = played_on(isa, ISA_SCRIPT, folder, ids, tmp_path)
    shown = {tuple(key.split()): x for key, x in out.items()}
    for dtype in DTYPES:
        taps = {(int(key[1]), key[2]): x for key, x in shown.items() if key[0] == dtype}
        assert right(Rounded(folder, dtype), taps), dtype
