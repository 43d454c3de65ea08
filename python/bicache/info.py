"""`bicache info`: what a checkpoint is and what it will take, without loading its weights."""

from __future__ import annotations

import os
from collections import Counter
from typing import Any

from . import _core
from .checkpoint import Sidecar, resolve_path
from .tokenizer import Tokenizer

_SIZES = (
    "family", "layers", "dim", "heads", "kv_heads", "head_dim", "ffn", "experts",
    "experts_per_row", "vocab", "embeddings", "context", "norm_eps", "rope_theta", "tied",
    "qkv_bias", "qk_norm", "shift",
    "mask_token_id", "eos_token_id", "eot_token_id",
)  # fmt: skip
_F32_BYTES, _BF16_BYTES = 4, 2


def inspect_checkpoint(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Facts about the checkpoint at `path` (as for LLM) and about this machine, ready for JSON.

    Raises:
        FileNotFoundError: As for LLM.
        ValueError: A file is wrong.
    """
    folder = resolve_path(path)
    config = _core.read_config(str(folder))
    stored = _core.checkpoint_info(str(folder))
    sidecar = Sidecar.read(folder)
    tokenizer = Tokenizer.of(folder)
    parameters = int(stored["parameters"])
    kv_values = 2 * config.layers * config.kv_heads * config.head_dim
    return {
        "path": str(folder),
        "config": {name: getattr(config, name) for name in _SIZES},
        "tensors": len(stored["tensors"]),
        "parameters": parameters,
        "dtypes": sorted({dtype for dtype, _ in stored["tensors"].values()}),
        "stored_bytes": int(stored["size_bytes"]),
        "stored_types": _by_type(stored),
        "weight_bytes": {
            dtype: _core.forecast(
                config,
                _core.make_policy("none"),
                prompt_len=1,
                options={"gen_length": 1},
                dtype=dtype,
            )["weight_bytes"]  # fmt: skip
            for dtype in ("f32", "bf16", "int8", "int4")
        },
        # K and V of one token in every layer.
        "kv_bytes_per_token": {"f32": kv_values * _F32_BYTES, "bf16": kv_values * _BF16_BYTES},
        "tokenizer_tokens": None if tokenizer is None else len(tokenizer),
        "generation": dict(sidecar.generation),
        "calibration": dict(sidecar.calibration),
        "machine": {
            "isa": _core.isa(),
            "available_isas": _core.available_isas(),
            "threads": _core.available_threads(),
            "parallel": _core.parallel_backend(),
            "blas": _core.blas_config(),
        },
        "version": _core.__version__,
    }


def _by_type(stored: dict[str, Any]) -> dict[str, dict[str, int]]:
    """Tensors and bytes of each type, the largest first."""
    counts = Counter(dtype for dtype, _ in stored["tensors"].values())
    sizes = sorted(stored["types"].items(), key=lambda item: -item[1])
    return {dtype: {"tensors": counts[dtype], "bytes": size} for dtype, size in sizes}


def as_text(facts: dict[str, Any]) -> str:
    """The facts for a reader, one per line."""
    config, machine = facts["config"], facts["machine"]
    weights, kv = facts["weight_bytes"], facts["kv_bytes_per_token"]
    tokens = facts["tokenizer_tokens"]
    lines = {
        "path": facts["path"],
        "family": config["family"],
        "sizes": f"{config['layers']} layers, dim {config['dim']}, {config['heads']} heads "
        f"({config['kv_heads']} for K/V) of {config['head_dim']}, ffn {config['ffn']}"
        + (
            f", {config['experts']} experts ({config['experts_per_row']} a row)"
            if config["experts"]
            else ""
        ),
        "vocabulary": f"{config['vocab']} ids, mask {config['mask_token_id']}, "
        f"end of text {config['eos_token_id']}, end of turn {config['eot_token_id']}",
        "context": f"{config['context']} tokens",
        "details": f"norm eps {config['norm_eps']:.3g}, RoPE theta {config['rope_theta']:g}, "
        f"QK norm {_yes(config['qk_norm'])}, QKV biases {_yes(config['qkv_bias'])}, "
        f"tied embeddings {_yes(config['tied'])}, logit shift {config['shift']}",
        "parameters": f"{facts['parameters']:,} in {facts['tensors']} tensors, "
        f"{bytes_text(facts['stored_bytes'])} of {', '.join(facts['dtypes'])}",
        "stored": ", ".join(
            f"{kind['tensors']} {dtype} tensors of {bytes_text(kind['bytes'])}"
            for dtype, kind in facts["stored_types"].items()
        ),
        "weight memory": ", ".join(
            f"{bytes_text(size)} as {dtype}" for dtype, size in weights.items()
        ),
        "prefix memory": f"{bytes_text(kv['f32'])} as f32, {bytes_text(kv['bf16'])} as bf16, per "
        "prefix token, if all layers are kept",
        "tokenizer": "none: prompts must be token ids" if tokens is None else f"{tokens} tokens",
        "defaults": _settings(facts["generation"]) or "the engine's",
        "calibration": _settings(facts["calibration"]) or 'none: cache="auto" is an error',
        "kernels": f"{machine['isa']} (of {', '.join(machine['available_isas'])})",
        "threads": f"{machine['threads']} ({machine['parallel']})",
        "BLAS": machine["blas"],
        "version": facts["version"],
    }
    width = max(map(len, lines))
    return "\n".join(f"{name:<{width}}  {text}" for name, text in lines.items())


def _yes(flag: bool) -> str:
    return "yes" if flag else "no"


def _settings(values: dict[str, Any]) -> str:
    """Those that fit a line; --json has all."""
    short = {k: v for k, v in values.items() if not isinstance(v, (dict, list))}
    return ", ".join(f"{name} {value}" for name, value in short.items())


def bytes_text(count: int) -> str:
    """For a reader, e.g. "14.93 GiB"."""
    size = float(count)
    for unit in ("B", "KiB", "MiB"):
        if size < 1024:
            return f"{size:.4g} {unit}"
        size /= 1024
    return f"{size:.4g} GiB"
