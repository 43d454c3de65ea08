"""How the families' config.json and tensors are named, and small random weights of theirs.

Inside the tests tensors have LLaDA's short names ("blocks.0.q_proj.weight"); biases are
"blocks.0.q_proj.bias", a router is "blocks.0.router.weight", an expert's down projection
"blocks.0.experts.3.ff_out.weight".
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

EOS, BOS, MASK, UNKNOWN = range(4)

LLADA_KEYS = {
    "layers": "n_layers",
    "dim": "d_model",
    "heads": "n_heads",
    "kv_heads": "n_kv_heads",
    "ffn": "mlp_hidden_size",
    "vocab": "vocab_size",
    "context": "max_sequence_length",
}
QWEN_KEYS = {
    "layers": "num_hidden_layers",
    "dim": "hidden_size",
    "heads": "num_attention_heads",
    "kv_heads": "num_key_value_heads",
    "ffn": "intermediate_size",
    "vocab": "vocab_size",
    "context": "max_position_embeddings",
}
MOE_KEYS = QWEN_KEYS | {
    "ffn": "expert_intermediate_size",
    "experts": "num_experts",
    "top_k": "num_experts_per_tok",
}

# Short name in a block -> name in a layer.
_QWEN_LAYER = {
    "attn_norm": "input_layernorm",
    "ff_norm": "post_attention_layernorm",
    "attn_out": "self_attn.o_proj",
    "ff_proj": "mlp.gate_proj",
    "up_proj": "mlp.up_proj",
    "ff_out": "mlp.down_proj",
    "router": "mlp.gate",
} | {x: f"self_attn.{x}" for x in ("q_proj", "k_proj", "v_proj", "q_norm", "k_norm")}
_QWEN = {"wte": "model.embed_tokens", "ln_f": "model.norm", "ff_out": "lm_head"}


@dataclass(frozen=True)
class Family:
    """`fixed`: what a config.json says beside the sizes; `flags`: what follows from the family."""

    keys: Mapping[str, str]
    fixed: Mapping[str, Any]
    flags: Mapping[str, Any]


COMMON: dict[str, Any] = {
    "attention_dropout": 0.0,
    "eos_token_id": EOS,
    "hidden_act": "silu",
    "initializer_range": 0.02,
    "mask_token_id": MASK,
    "pad_token_id": EOS,
    "rope_scaling": None,
    "torch_dtype": "bfloat16",
    "use_cache": False,
}

FAMILIES: dict[str, Family] = {
    "llada": Family(LLADA_KEYS, {}, {}),
    "dream": Family(
        QWEN_KEYS,
        COMMON
        | {
            "architectures": ["DreamModel"],
            "auto_map": {
                "AutoConfig": "configuration_dream.DreamConfig",
                "AutoModel": "modeling_dream.DreamModel",
            },
            "bos_token_id": EOS,
            "max_window_layers": 28,
            "model_type": "Dream",
            "rms_norm_eps": 1e-6,
            "rope_theta": 1000000.0,
            "sliding_window": None,
            "tie_word_embeddings": False,
            "use_mrope": False,
            "use_sliding_window": False,
        },
        {"bias": True, "shift": True},
    ),
    "illada": Family(
        QWEN_KEYS,
        COMMON
        | {
            "architectures": ["ILLaDAForCausalLM"],
            "attention_bias": False,
            "bos_token_id": BOS,
            "layer_norm_eps": None,
            "mlp_bias": False,
            "model_type": "illada",
            "resid_pdrop": 0.0,
            "rms_norm_eps": 1e-5,
            "rope_theta": 70000.0,
            "tie_word_embeddings": True,
        },
        {"tied": True},
    ),
    "llada-moe": Family(
        MOE_KEYS,
        COMMON
        | {
            "architectures": ["LLaDAMoEModelLM"],
            "attention_bias": False,
            "clip_qkv": None,
            "dense_intermediate_size": 96,
            "intermediate_size": None,
            "model_type": "llada",
            "moe_router_enable_expert_bias": False,
            "moe_router_score_function": "softmax",
            "norm_topk_prob": None,
            "output_router_logits": False,
            "partial_rotary_factor": 1,
            "qk_layernorm": True,
            "rms_norm_eps": 1e-5,
            "rope_theta": 50000,
            "routed_scaling_factor": 1,
            "router_aux_loss_coef": 0.01,
            "router_num_group": None,
            "router_topk_group": None,
            "shared_expert_intermediate_size": None,
            "tie_word_embeddings": False,
        },
        {"qk_norm": True},
    ),
}


def family_of(config: Mapping[str, Any]) -> str:
    """The family of a config.json that a test has written."""
    for name, family in FAMILIES.items():
        if config["architectures"] == family.fixed.get("architectures"):
            return name
    return "llada"


def family_config(name: str, sizes: Mapping[str, int]) -> dict[str, Any]:
    """config.json with these sizes."""
    family = FAMILIES[name]
    config = dict(family.fixed) | {key: sizes[size] for size, key in family.keys.items()}
    if "experts" in family.keys:
        config["moe_layer_freq"] = [1] * sizes["layers"]
    return config


def stored_name(name: str, short: str) -> str:
    """What a tensor is called in a checkpoint of family `name`."""
    if name == "llada":
        return f"model.transformer.{short}"
    stem, kind = short.rsplit(".", 1)
    block = re.fullmatch(r"blocks\.(\d+)\.(?:experts\.(\d+)\.)?(\w+)", stem)
    if block is None:
        return f"{_QWEN[stem]}.{kind}"
    layer, expert, part = block.groups()
    inner = _QWEN_LAYER[part]
    if expert is not None:
        inner = inner.replace("mlp.", f"mlp.experts.{expert}.")
    return f"model.layers.{layer}.{inner}.{kind}"


def short_names(name: str, layers: int, experts: int) -> dict[str, str]:
    """Names in a checkpoint -> short names, of every tensor it may have."""
    blocks = [f"{part}.weight" for part in _QWEN_LAYER]
    blocks += [f"{which}_proj.bias" for which in "qkv"]
    blocks += [
        f"experts.{e}.{part}.weight"
        for e in range(experts)
        for part in ("ff_proj", "up_proj", "ff_out")
    ]
    short = [f"{part}.weight" for part in _QWEN]
    short += [f"blocks.{layer}.{part}" for layer in range(layers) for part in blocks]
    return {stored_name(name, part): part for part in short}


def add_family(
    name: str, weights: dict[str, np.ndarray], sizes: Mapping[str, int], seed: int
) -> dict[str, np.ndarray]:
    """The family's own tensors in, and in place of, those of a LLaDA with the same sizes."""
    rng = np.random.default_rng([seed, 1])
    flags = FAMILIES[name].flags
    e, ffn, experts = sizes["dim"], sizes["ffn"], sizes.get("experts", 0)
    if flags.get("tied"):
        del weights["ff_out.weight"]
        weights["wte.weight"] = weights["wte.weight"] * 2 * e**-0.5
    for layer in range(sizes["layers"]):
        block = f"blocks.{layer}."
        if flags.get("bias"):
            for which in "qkv":
                rows = len(weights[f"{block}{which}_proj.weight"])
                weights[f"{block}{which}_proj.bias"] = rng.normal(0, 0.7, rows)
        if experts == 0:
            continue
        for part in ("ff_proj", "up_proj", "ff_out"):
            del weights[f"{block}{part}.weight"]
        weights[f"{block}router.weight"] = rng.normal(0, 1.5 * e**-0.5, (experts, e))
        for x in range(experts):
            into = f"{block}experts.{x}."
            weights[f"{into}ff_proj.weight"] = rng.normal(0, e**-0.5, (ffn, e))
            weights[f"{into}up_proj.weight"] = rng.normal(0, e**-0.5, (ffn, e))
            weights[f"{into}ff_out.weight"] = rng.normal(0, 3 * ffn**-0.5, (e, ffn))
    return weights
