"""Turn the last trained stage of a recipe into a shipped checkpoint.

    python training/export.py RUN/two-word.pt --recipe training/recipes/records.toml \\
        --out python/bicache/models/records

Writes config.json, model.safetensors (bfloat16, LLaDA's tensor names), tokenizer.json and
questions.jsonl (held-out; for the chain task, about documents of each length of `test_records`).
calibrate.py then adds bicache.json; README.md, the model card, is written by hand.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

import chain
import numpy as np
import records
import tomllib
import torch
from safetensors.torch import save_file
from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, processors
from train import task_of

CONTEXT = 256  # rows; trained on at most 1 + 2 * 40 + 6 + 8
HELD_OUT_SEED = 20_000
CHAIN_QUESTIONS = 512  # per document length


def config(model: dict, layers: int, vocabulary: int) -> dict:
    """config.json with the keys of LLaDA's configuration file."""
    return {
        "architectures": ["LLaDAModelLM"],
        "model_type": "llada",
        "d_model": model["dim"],
        "n_heads": model["heads"],
        "n_kv_heads": model["heads"],
        "n_layers": layers,
        "mlp_hidden_size": model["ffn"],
        "vocab_size": vocabulary,
        "embedding_size": vocabulary,
        "max_sequence_length": CONTEXT,
        "rms_norm_eps": 1e-5,
        "rope_theta": model["theta"],
        "rope": True,
        "qk_layernorm": True,
        "block_type": "llama",
        "layer_norm_type": "rms",
        "activation_type": "silu",
        "include_bias": False,
        "include_qkv_bias": False,
        "weight_tying": False,
        "mask_token_id": records.MASK,
        "eos_token_id": records.EOS,
        "pad_token_id": records.EOS,
        "bos_token_id": records.BOS,
        "torch_dtype": "bfloat16",
    }


def tensors(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Our parameter names -> LLaDA's, in bfloat16."""
    top = {"wte": "wte.weight", "ln_f.weight": "ln_f.weight", "head.weight": "ff_out.weight"}
    return {
        f"model.transformer.{top.get(name, name)}": value.to(torch.bfloat16).contiguous()
        for name, value in state.items()
    }


def tokenizer(vocabulary: Sequence[str]) -> Tokenizer:
    """Words between white space; case and commas do not matter, "?" is a word of its own."""
    ids = {word: i for i, word in enumerate(vocabulary)}
    t = Tokenizer(models.WordLevel(ids, unk_token=records.SPECIAL[records.UNK]))
    t.normalizer = normalizers.Sequence(
        [
            normalizers.Lowercase(),
            normalizers.Replace(Regex("[,.;]"), " "),
            normalizers.Replace("?", " ? "),
        ]
    )
    t.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    bos = records.SPECIAL[records.BOS]
    t.post_processor = processors.TemplateProcessing(
        single=f"{bos} $A", special_tokens=[(bos, records.BOS)]
    )
    t.add_special_tokens(list(records.SPECIAL))
    return t


def questions(
    documents: int, per_document: int, length: int, seed: int, words: int = 2
) -> list[dict[str, str]]:
    """Distinct questions about documents nobody trained on (drawn from a seed of their own)."""
    rng = np.random.default_rng(seed)
    lines = []
    for document in records.draw_documents(rng, documents, length):
        present = np.unique(document // len(records.ANIMALS))
        pairs = [(x, -1) for x in present]
        pairs += [(x, y) for x in present for y in range(len(records.COLOURS)) if y != x]
        chosen = np.array(pairs)[rng.permutation(len(pairs))[:per_document]]
        rows = np.repeat(document[None], len(chosen), axis=0)
        question, answer = records.questions_about(rows, chosen[:, 0], chosen[:, 1])
        for q, a in zip(question, answer, strict=True):
            prefix = records.document_text(document, words)
            lines.append({"prefix": prefix, "prompt": records.text(q), "answer": records.text(a)})
    return lines


def chain_questions(count: int, length: int, seed: int, per_document: int = 8) -> list[dict]:
    """`count` distinct chain questions about documents of `length` one-word records."""
    rng = np.random.default_rng(seed)
    lines: list[dict] = []
    while len(lines) < count:
        (document,) = records.draw_documents(rng, 1, length)
        prefix = records.document_text(document, words=1)
        present = rng.permutation(np.unique(document // len(records.ANIMALS)))[:per_document]
        rows = np.repeat(document[None], len(present), axis=0)
        for q, a in zip(*chain.questions_about(rows, present), strict=True):
            line = {"prefix": prefix, "prompt": chain.text(q), "answer": chain.text(a)}
            lines.append(line | {"operation": "chain", "records": length})
    return lines[:count]


def held_out(recipe: dict, documents: int, per_document: int) -> list[dict]:
    """The lines of questions.jsonl."""
    t, words = recipe["train"], recipe["stage"][-1]["words"]
    if t.get("task") != "chain":
        return questions(documents, per_document, t["test_records"], HELD_OUT_SEED, words)
    lengths: list[int] = t["test_records"]
    return [
        line
        for length in lengths
        for line in chain_questions(CHAIN_QUESTIONS, length, HELD_OUT_SEED + length)
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--recipe", type=Path, required=True)
    parser.add_argument("--documents", type=int, default=5)
    parser.add_argument("--questions", type=int, default=96, help="per document")
    args = parser.parse_args()
    recipe = tomllib.loads(args.recipe.read_text())
    args.out.mkdir(parents=True, exist_ok=True)
    state = torch.load(args.checkpoint)["model"]
    vocabulary = task_of(recipe).VOCABULARY
    layers = recipe["stage"][-1]["layers"]
    text = json.dumps(config(recipe["model"], layers, len(vocabulary)), indent=2)
    (args.out / "config.json").write_text(text + "\n")
    save_file(tensors(state), args.out / "model.safetensors", metadata={"format": "pt"})
    tokenizer(vocabulary).save(str(args.out / "tokenizer.json"))
    lines = held_out(recipe, args.documents, args.questions)
    (args.out / "questions.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


if __name__ == "__main__":
    main()
