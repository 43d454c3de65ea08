"""Smoke test of the build on Debian's own packages: a plain script that needs NumPy only.

Writes a tiny random LLaDA checkpoint by hand, compares `forward` with NumPy and generates from it.
"""

from __future__ import annotations

import json
import struct
import subprocess
import sys
import tempfile
from pathlib import Path

import bicache
import numpy as np
from bicache import _core

E, H, G, F, V, L = 32, 4, 2, 48, 40, 2  # model dim, heads, KV heads, FFN dim, vocabulary, layers
D = E // H
MASK, EOS = 39, 38
EPS, THETA = 1e-5, 10000.0

CONFIG = {
    "model_type": "llada",
    "block_type": "llama",
    "layer_norm_type": "rms",
    "activation_type": "silu",
    "rope": True,
    "weight_tying": False,
    "d_model": E,
    "n_heads": H,
    "n_kv_heads": G,
    "n_layers": L,
    "mlp_hidden_size": F,
    "vocab_size": V,
    "embedding_size": V,
    "max_sequence_length": 64,
    "rms_norm_eps": EPS,
    "rope_theta": THETA,
    "mask_token_id": MASK,
    "eos_token_id": EOS,
}


def make_weights(rng: np.random.Generator) -> dict[str, np.ndarray]:
    shapes = {"wte.weight": (V, E), "ln_f.weight": (E,), "ff_out.weight": (V, E)}
    for layer in range(L):
        block = {
            "attn_norm": (E,),
            "ff_norm": (E,),
            "q_proj": (E, E),
            "k_proj": (G * D, E),
            "v_proj": (G * D, E),
            "attn_out": (E, E),
            "ff_proj": (F, E),
            "up_proj": (F, E),
            "ff_out": (E, F),
        }
        shapes |= {f"blocks.{layer}.{name}.weight": shape for name, shape in block.items()}
    return {
        f"model.transformer.{name}": rng.normal(size=shape).astype(np.float32)
        / np.float32(np.sqrt(shape[-1]) if len(shape) == 2 else 1)
        for name, shape in shapes.items()
    }


def save_checkpoint(folder: Path, weights: dict[str, np.ndarray]) -> None:
    header, offset = {}, 0
    for name, array in weights.items():
        end = offset + array.nbytes
        header[name] = {"dtype": "F32", "shape": array.shape, "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    data = b"".join(array.tobytes() for array in weights.values())
    (folder / "model.safetensors").write_bytes(struct.pack("<Q", len(text)) + text + data)
    (folder / "config.json").write_text(json.dumps(CONFIG))


def rms_norm(x: np.ndarray, weight: np.ndarray) -> np.ndarray:
    return x / np.sqrt((x * x).mean(-1, keepdims=True) + EPS) * weight


def rope(x: np.ndarray) -> np.ndarray:  # [N, heads, D]
    angle = np.arange(len(x))[:, None] * THETA ** (-np.arange(0, D, 2) / D)
    cos, sin = np.cos(angle)[:, None], np.sin(angle)[:, None]
    a, b = x[..., : D // 2], x[..., D // 2 :]
    return np.concatenate([a * cos - b * sin, b * cos + a * sin], -1)


def numpy_forward(weights: dict[str, np.ndarray], tokens: np.ndarray) -> np.ndarray:
    """Logits [N, V] in double."""

    def get(name: str) -> np.ndarray:
        return weights[f"model.transformer.{name}.weight"].astype(np.float64)

    x = get("wte")[tokens]
    for layer in range(L):
        at = f"blocks.{layer}."
        n = rms_norm(x, get(at + "attn_norm"))
        q, k, v = (
            (n @ get(at + name).T).reshape(len(tokens), -1, D)
            for name in ("q_proj", "k_proj", "v_proj")
        )
        k, v = np.repeat(rope(k), H // G, 1), np.repeat(v, H // G, 1)
        scores = np.einsum("ihd,jhd->hij", rope(q), k) / np.sqrt(D)
        shares = np.exp(scores - scores.max(-1, keepdims=True))
        shares /= shares.sum(-1, keepdims=True)
        mixed = np.einsum("hij,jhd->ihd", shares, v).reshape(len(tokens), E)
        x = x + mixed @ get(at + "attn_out").T
        n = rms_norm(x, get(at + "ff_norm"))
        gate = n @ get(at + "ff_proj").T
        x = x + (gate / (1 + np.exp(-gate)) * (n @ get(at + "up_proj").T)) @ get(at + "ff_out").T
    return rms_norm(x, get("ln_f")) @ get("ff_out").T


def check_numpy_2_is_refused() -> None:
    """Old pybind11 reads NumPy 2 arrays wrongly, in silence: the module must not load there."""
    code = "import numpy; numpy.__version__ = '2.0.0'; import bicache._core"
    child = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    last = (child.stderr.strip().splitlines() or [""])[-1]
    assert child.returncode == 1 and "ImportError" in last and "NumPy" in last, child
    print("NumPy 2:", last)


def main() -> None:
    print(f"Python {sys.version.split()[0]}, NumPy {np.__version__}, bicache {bicache.__version__}")
    print(f"_core {_core.__version__}: {_core.available_isas()}, {_core.parallel_backend()}")
    print(_core.blas_config())
    assert _core.__version__ == bicache.__version__
    assert "generic" in _core.available_isas()
    assert not {"torch", "tokenizers", "tqdm"} & set(sys.modules)

    rng = np.random.default_rng(7)
    weights = make_weights(rng)
    tokens = rng.integers(0, EOS, 21)
    want = numpy_forward(weights, tokens)
    with tempfile.TemporaryDirectory() as folder:
        save_checkpoint(Path(folder), weights)
        llm = bicache.LLM(folder)
        logits = llm.forward(tokens)
        assert logits.shape == (21, V) and logits.dtype == np.float32, (logits.shape, logits.dtype)
        error = np.abs(logits - want).max() / np.abs(want).max()
        print(f"forward: largest difference from NumPy is {error:.1e} of the logit scale")
        assert error < 1e-5, error

        prompt = tokens[:9].tolist()
        request = {"gen_length": 8, "steps": 8, "block_length": 8}
        first, again = (llm.generate([prompt], **request)[0].tokens for _ in range(2))
        print("generate:", list(map(int, first)))
        assert first.shape == (8,) and MASK not in first and (first == again).all()

    if int(np.__version__.split(".")[0]) < 2:
        check_numpy_2_is_refused()
    print("smoke_debian: passed")


if __name__ == "__main__":
    main()
