"""Makes the GGUF files beside this script, and the logits that llama.cpp computes from them.

Run once by hand, with llama-cpp-python installed:

    PYTHONPATH=tests:bench python tests/golden/make_llama_logits.py

Tiny random LLaDA and Dream checkpoints, float32 and Q8_0. Logits are those of all rows of one
canvas, without causal mask, with attention in float32 (llama.cpp's flash attention rounds K and V
to half precision).
"""

from __future__ import annotations

import ctypes
import json
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from conftest import llada_config, llada_weights
from gguf import GGMLQuantizationType as Type
from gguf_files import write_gguf
from llama_cpp import llama_cpp as api
from peer_llama import Llama
from safetensors.numpy import save_file

HERE = Path(__file__).parent
VOCAB, DIM, FFN, LAYERS, HEADS, KV_HEADS, ROWS = 64, 32, 64, 2, 4, 2, 128
KINDS = {"f32": Type.F32, "q8_0": Type.Q8_0}


def llada() -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """config.json and weights.

    The head leans towards one token for each embedding, so that most rows have a clear winner, as
    in a trained model: rounding decides few of them. How strongly was chosen so that Q8_0, where
    llama.cpp rounds activations and we do not, agrees in 99 % of rows; without it fewer do.
    """
    config = llada_config(
        layers=LAYERS, dim=DIM, heads=HEADS, kv_heads=KV_HEADS, ffn=FFN, vocab=VOCAB,
        embeddings=VOCAB, context=256, qk_norm=False, shift=False,
    )  # fmt: skip
    weights = llada_weights(config, seed=0, scale=3.0, dtype="f32")
    lean = np.roll(weights["model.transformer.wte.weight"], 7, axis=0)
    weights["model.transformer.ff_out.weight"] += 4 * DIM**-0.5 * lean
    return config, weights


def dream() -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """The same sizes with Dream's names and biases."""
    source, weights = llada()
    names = {
        "attn_norm": "input_layernorm", "ff_norm": "post_attention_layernorm",
        "q_proj": "self_attn.q_proj", "k_proj": "self_attn.k_proj", "v_proj": "self_attn.v_proj",
        "attn_out": "self_attn.o_proj", "ff_proj": "mlp.gate_proj", "up_proj": "mlp.up_proj",
        "ff_out": "mlp.down_proj",
    }  # fmt: skip
    top = {"wte": "model.embed_tokens", "ln_f": "model.norm", "ff_out": "lm_head"}
    renamed = {}
    for name, weight in weights.items():
        parts = name.removeprefix("model.transformer.").split(".")
        if parts[0] == "blocks":
            renamed[f"model.layers.{parts[1]}.{names[parts[2]]}.weight"] = weight
        else:
            renamed[f"{top[parts[0]]}.weight"] = weight
    rng = np.random.default_rng(1)
    for layer in range(LAYERS):
        for part, heads in (("q", HEADS), ("k", KV_HEADS), ("v", KV_HEADS)):
            bias = rng.normal(0, 0.5, heads * DIM // HEADS).astype(np.float32)
            renamed[f"model.layers.{layer}.self_attn.{part}_proj.bias"] = bias
    config = {
        "model_type": "Dream",
        "architectures": ["DreamModel"],
        "hidden_size": DIM,
        "intermediate_size": FFN,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS,
        "num_key_value_heads": KV_HEADS,
        "vocab_size": VOCAB,
        "max_position_embeddings": 256,
        "rms_norm_eps": 1e-6,
        "rope_theta": 10000.0,
        **{key: source[key] for key in ("mask_token_id", "eos_token_id")},
    }
    return config, renamed


class ExactLlama(Llama):
    """llama.cpp without flash attention and without repacked weights.

    Its repacking for AMX gives other logits altogether for matrices as small as these.
    """

    def __init__(self, path: Path) -> None:
        super().__init__(path, threads=1, context=ROWS)
        api.llama_free(self.context)
        api.llama_model_free(self.model)
        loading = api.llama_model_default_params()
        loading.use_extra_bufts = False
        self.model = api.llama_model_load_from_file(bytes(path), loading)
        settings = api.llama_context_default_params()
        settings.n_ctx = settings.n_batch = settings.n_ubatch = ROWS
        settings.n_threads = settings.n_threads_batch = 1
        settings.flash_attn_type = api.LLAMA_FLASH_ATTN_TYPE_DISABLED
        self.context = ctypes.c_void_p(api.llama_init_from_model(self.model, settings))
        api.llama_set_causal_attn(self.context, False)


def main() -> None:
    canvas = np.random.default_rng(2).integers(4, VOCAB, ROWS).astype(np.int32)
    canvas[ROWS // 2 :: 2] = 2  # masks
    found: dict[str, np.ndarray] = {"canvas": canvas}
    for family, make in (("llada", llada), ("dream", dream)):
        config, weights = make()
        with tempfile.TemporaryDirectory() as folder:
            (Path(folder) / "config.json").write_text(json.dumps(config))
            save_file(weights, Path(folder) / "model.safetensors")
            for name, kind in KINDS.items():
                path = HERE / f"{family}-{name}.gguf"
                write_gguf(Path(folder), path, kind)
                llama = ExactLlama(path)
                llama.prepare(canvas.tolist())
                found[f"{family}-{name}"] = llama.array(llama.forward(ROWS)).copy()
    np.savez_compressed(HERE / "llama_logits.npz", **found)


if __name__ == "__main__":
    main()
