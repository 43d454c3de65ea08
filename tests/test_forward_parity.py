"""LLM.forward against an independent plain-torch LLaDA, on small random checkpoints."""

from pathlib import Path
from typing import Any

import bicache
import numpy as np
import pytest
import torch
from bicache import _core
from numpy.typing import NDArray
from parity import BOUND, MAX_SCALE, Maker, edited, played_on
from parity import tokens as random_tokens
from reference import Knobs, Llada

# scale: of the attention scores, so that attention is peaked.
MHA = {"layers": 3, "dim": 32, "heads": 4, "kv_heads": 4, "ffn": 48, "vocab": 61, "scale": 5.0}
SHAPES: dict[str, dict[str, Any]] = {
    "mha": MHA,
    "gqa": MHA | {"heads": 8, "kv_heads": 2},
    "mqa": MHA | {"kv_heads": 1},
    "qk_norm": MHA | {"kv_heads": 2, "qk_norm": True},
    "shift": MHA | {"shift": True},
    "odd": MHA | {"dim": 30, "heads": 5, "kv_heads": 1, "ffn": 37, "vocab": 53},
    "wide": MHA | {"layers": 2, "dim": 96, "heads": 3, "kv_heads": 3, "ffn": 131, "vocab": 257},
    "dream": MHA | {"family": "dream", "heads": 8, "kv_heads": 2},
    "illada": MHA | {"family": "illada", "kv_heads": 2},
    "moe": MHA | {"family": "llada-moe"},
    "moe, gqa": MHA | {"family": "llada-moe", "kv_heads": 2, "ffn": 17, "experts": 5, "top_k": 2},
    "moe, all": MHA | {"family": "llada-moe", "experts": 3, "top_k": 3},
    "least": MHA | {"layers": 1, "dim": 2, "heads": 1, "kv_heads": 1, "ffn": 1, "vocab": 5},
}


def error(logits: NDArray[np.float32], expected: torch.Tensor) -> float:
    """Largest difference, in standard deviations of the expected logits."""
    assert logits.dtype == np.float32
    assert logits.shape == tuple(expected.shape)
    assert 0 < expected.std() < MAX_SCALE
    return float((torch.tensor(logits) - expected).abs().max() / expected.std())


def check(folder: Path, count: int, seed: int = 0, **settings: object) -> None:
    model = Llada(folder)
    ids = random_tokens(count, model, seed)
    ids[count // 2 :: 3] = model.mask
    expected = model.forward(ids)
    assert model.routing_gap > 1e-5, "a near tie of experts: another seed"
    if count > 8 and model.dim > 2:
        assert np.mean(model.peaks) > 0.5, "attention is not peaked: an error in it would not show"
    llm = bicache.LLM(folder, **({"threads": 1} | settings))
    assert error(llm.forward(ids.numpy()), expected) <= BOUND


@pytest.mark.parametrize("stored", ["f32", "bf16"])
@pytest.mark.parametrize("shape", SHAPES)
def test_logits_equal_the_reference(tiny_checkpoint: Maker, shape: str, stored: str) -> None:
    # BOUND holds for bf16 checkpoints as well: their weights are bf16 numbers on both sides.
    # Arithmetic in bf16, int8 and int4 is compared in test_quantised.py.
    folder = tiny_checkpoint(**SHAPES[shape], dtype=stored, seed=1)
    assert bicache.LLM(folder).dtype == stored
    for count in (1, 2, 23):
        check(folder, count, dtype="f32")


def test_more_rows_than_any_tile_or_key_block(tiny_checkpoint: Maker) -> None:
    check(tiny_checkpoint(**SHAPES["gqa"], dtype="f32", seed=2), 131)


@pytest.mark.parametrize("stored", ["f32", "bf16"])
@pytest.mark.parametrize("backend", ["packed", "blas"])
def test_f32_whatever_is_stored(tiny_checkpoint: Maker, stored: str, backend: str) -> None:
    folder = tiny_checkpoint(**SHAPES["qk_norm"], dtype=stored, seed=3)
    check(folder, 23, dtype="f32", backend=backend)


@pytest.mark.parametrize("shape", SHAPES)
def test_blas(tiny_checkpoint: Maker, shape: str) -> None:
    folder = tiny_checkpoint(**SHAPES[shape], dtype="f32", seed=4)
    assert bicache.LLM(folder, backend="blas").backend == "blas"
    for count in (1, 23):
        check(folder, count, backend="blas")


def test_the_reference_is_precise_enough(tiny_checkpoint: Maker) -> None:
    folder = tiny_checkpoint(**SHAPES["gqa"], dtype="f32", seed=6)
    ids = random_tokens(23, Llada(folder), 6)
    single = Llada(folder, torch.float32).forward(ids)
    assert single.dtype == torch.float32
    assert error(single.numpy(), Llada(folder).forward(ids)) <= BOUND


def test_ids_beyond_the_vocabulary_are_input_only(tiny_checkpoint: Maker) -> None:
    # LLaDA pads its embedding: embedding_size > vocab_size. Logits are of the first vocab_size ids.
    folder = tiny_checkpoint(**MHA, dtype="f32", seed=7)
    padded = edited(folder, embedding_size=61, vocab_size=50, mask_token_id=55)
    model = Llada(padded)
    ids = random_tokens(23, model, 7)
    ids[3:9] = torch.arange(52, 58)
    logits = bicache.LLM(padded, threads=1).forward(ids.numpy())
    assert logits.shape == (23, 50)
    assert error(logits, model.forward(ids)) <= BOUND


def test_rows_are_those_of_all_rows(tiny_checkpoint: Maker) -> None:
    for shape in ("gqa", "shift"):
        llm = bicache.LLM(tiny_checkpoint(**SHAPES[shape], dtype="f32", seed=8), threads=1)
        ids = random_tokens(23, Llada(llm.path), 8).numpy()
        rows = [22, 0, 7, 7, 1]
        logits = llm.forward(ids)
        assert llm.forward(ids, rows=rows).tobytes() == logits[rows].tobytes()


# (what is changed in the reference, shape, values that make it matter in config.json of both)
MUTANTS: dict[str, tuple[Knobs, str, dict[str, Any]]] = {
    "rope style": (Knobs(rope="interleaved"), "gqa", {}),
    "eps ignored": (Knobs(eps=1e-5), "gqa", {"rms_norm_eps": 0.02}),
    "eps ignored, qk": (Knobs(eps=1e-5), "qk_norm", {"rms_norm_eps": 0.02}),
    "gqa mapping": (Knobs(gqa="tile"), "gqa", {}),
    "scale of the model dim": (Knobs(scale=32**-0.5), "gqa", {}),
    "scale 1 % off": (Knobs(scale=1.01 * 4**-0.5), "gqa", {}),
    "theta ignored": (Knobs(theta=10000.0), "gqa", {"rope_theta": 300.0}),
    "no qk norm": (Knobs(qk_norm=False), "qk_norm", {}),
    "no shift": (Knobs(shift=False), "shift", {}),
    "causal": (Knobs(causal=True), "gqa", {}),
    "gate and up": (Knobs(swap_gate=True), "gqa", {}),
    "no biases": (Knobs(bias=False), "dream", {}),
    "Dream without shift": (Knobs(shift=False), "dream", {}),
    "heads without norm": (Knobs(qk_norm=False), "moe", {}),
    "an expert less": (Knobs(top_k=2), "moe", {}),
    "experts that add up to 1": (Knobs(renormalise=True), "moe", {}),
    "sigmoid over experts": (Knobs(sigmoid=True), "moe", {}),
    "gate and up of experts": (Knobs(swap_gate=True), "moe", {}),
}


@pytest.mark.parametrize("mutant", MUTANTS)
def test_another_model_breaks_the_bound(tiny_checkpoint: Maker, mutant: str) -> None:
    knobs, shape, values = MUTANTS[mutant]
    folder = edited(tiny_checkpoint(**SHAPES[shape], dtype="f32", seed=9), **values)
    right = Llada(folder)
    assert knobs != Knobs()
    ids = random_tokens(23, right, 9)
    logits = bicache.LLM(folder, threads=1).forward(ids.numpy())
    assert error(logits, right.forward(ids)) <= BOUND
    assert np.mean(right.peaks) > 0.5
    assert error(logits, Llada(folder, knobs=knobs).forward(ids)) > 10 * BOUND


def test_swapped_weights_break_the_bound(tiny_checkpoint: Maker) -> None:
    # Square matrices of equal shape can be mixed up without an error.
    folder = tiny_checkpoint(**MHA, dtype="f32", seed=10)
    ids = random_tokens(23, Llada(folder), 10)
    logits = bicache.LLM(folder, threads=1).forward(ids.numpy())
    for a, b in (("q_proj", "k_proj"), ("k_proj", "v_proj"), ("v_proj", "attn_out")):
        model = Llada(folder)
        first, second = f"blocks.1.{a}.weight", f"blocks.1.{b}.weight"
        model.weights[first], model.weights[second] = model.weights[second], model.weights[first]
        assert error(logits, model.forward(ids)) > 10 * BOUND, (a, b)
    for a, b in (("attn_norm", "ff_norm"),):
        model = Llada(folder)
        first, second = f"blocks.1.{a}.weight", f"blocks.1.{b}.weight"
        model.weights[first], model.weights[second] = model.weights[second], model.weights[first]
        assert error(logits, model.forward(ids)) > 10 * BOUND, (a, b)


ISA_SCRIPT = """
import sys
import numpy as np
import bicache
folder, ids, out = sys.argv[1:]
ids = np.load(ids)
logits = {f"threads{t}": bicache.LLM(folder, threads=t).forward(ids) for t in (1, 2)}
rows = bicache.LLM(folder, threads=2).forward(ids, rows=[5])
np.savez(out, isa=bicache._core.isa(), row=rows, **logits)
"""


@pytest.mark.parametrize("isa", _core.available_isas())
def test_every_isa_and_number_of_threads(tiny_checkpoint: Maker, tmp_path: Path, isa: str) -> None:
    folder = tiny_checkpoint(**SHAPES["wide"], dtype="f32", seed=11)
    model = Llada(folder)
    ids = random_tokens(150, model, 11)
    out = played_on(isa, ISA_SCRIPT, folder, ids, tmp_path)
    assert out["threads1"].tobytes() == out["threads2"].tobytes()
    assert out["row"].tobytes() == out["threads1"][5:6].tobytes()
    assert error(out["threads1"], model.forward(ids)) <= BOUND


def test_every_isa_is_listed_once() -> None:
    isas = _core.available_isas()
    assert "generic" in isas and _core.isa() in isas and len(set(isas)) == len(isas)
