"""Train a shipped model (resumes where it stopped):

    python training/train.py --recipe training/recipes/records.toml --out DIR

Follows the recipe stage by stage; 20 to 50 minutes of one CPU thread. Everything random comes from
the recipe's seed and the step number, so a resumed run continues the same sequence of batches.
Writes DIR/<stage>.pt every 250 steps, and DIR/log.jsonl as often or every `log_steps`.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from types import ModuleType

import chain
import numpy as np
import records
import tomllib
import torch
import torch.nn.functional as F
from model import DLM, ModelConfig, Optimizer, prepend_layers
from records import MASK, QUESTION, SLOTS

TASKS = {"records": records, "chain": chain}
SAVE_STEPS = 250


def task_of(recipe: dict) -> ModuleType:
    """The module of the recipe's task."""
    return TASKS[recipe["train"].get("task", "records")]


@torch.no_grad()
def exact_match(
    model: DLM, task: ModuleType, words: int, length: int, operation: str, count: int = 256
) -> float:
    """Share of questions with all SLOTS tokens right: most confident token first, greedy."""
    rng = np.random.default_rng(10_000 + length)
    shares = task.OPERATIONS[operation]
    ids = torch.from_numpy(task.draw_batch(rng, count, length, words, **shares))
    want = ids[:, -SLOTS:].clone()
    ids[:, -SLOTS:] = MASK
    for _ in range(SLOTS):
        response = ids[:, -SLOTS:]
        confidence, token = model(ids, SLOTS).softmax(-1).max(-1)
        best = confidence.masked_fill(response != MASK, -1).topk(1, dim=1).indices
        ids[:, -SLOTS:] = response.scatter(1, best, token.gather(1, best))
    return (ids[:, -SLOTS:] == want).all(1).float().mean().item()


def loss_and_accuracy(model: DLM, ids: torch.Tensor, ratio: torch.Tensor, noise: torch.Tensor):
    """LLaDA-SFT loss: ids [B, N], ratio t [B, 1], noise [B, SLOTS] in [0, 1)."""
    target, masked = ids[:, -SLOTS:], noise < ratio
    canvas = ids.clone()
    canvas[:, -SLOTS:] = target.masked_fill(masked, MASK)
    logits = model(canvas, SLOTS)
    loss = F.cross_entropy(logits[masked], target[masked], reduction="none")
    weight = (1 / ratio).expand_as(target)[masked]
    accuracy = (logits[masked].argmax(-1) == target[masked]).float().mean()
    return (loss * weight).sum() / target.numel(), accuracy.item()


def train_stage(stage: dict, recipe: dict, model: DLM, out: Path, log) -> None:
    t, path, task = recipe["train"], out / f"{stage['name']}.pt", task_of(recipe)
    shares = {name: t[name] for name in next(iter(task.OPERATIONS.values()))}
    optimizer = Optimizer(model, t["muon_lr"], t["adam_lr"])
    low, high = stage["records"]
    first, cap, level, tokens = 0, low, 0.0, 0
    if path.exists():
        state = torch.load(path)
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        first, cap, level, tokens = state["next"], state["cap"], state["level"], state["tokens"]
    start = time.time()
    for step in range(first, stage["steps"]):
        done = step / stage["steps"]
        rng = np.random.default_rng([t["seed"], stage["layers"], step])
        length = cap if rng.random() < 0.5 else int(rng.integers(low, cap + 1))
        rows = 1 + stage["words"] * length + QUESTION + SLOTS
        batch = max(8, stage["tokens_per_step"] // rows)
        ids = torch.from_numpy(task.draw_batch(rng, batch, length, stage["words"], **shares))
        ratio = torch.from_numpy(rng.uniform(*t["mask_ratio"], (batch, 1)).astype(np.float32))
        noise = torch.from_numpy(rng.random((batch, SLOTS), dtype=np.float32))
        loss, accuracy = loss_and_accuracy(model, ids, ratio, noise)
        loss.backward()
        decay = max(t["min_scale"], (1 - done) / t["decay_share"])
        optimizer.step(min(1.0, (step + 1) / t["warmup_steps"]) * min(1.0, decay))
        tokens += ids.numel()
        level = accuracy if level == 0 else 0.95 * level + 0.05 * accuracy
        if level > stage["raise_at"] and cap < high:
            cap, level = min(high, cap + max(1, cap // 6)), stage["raise_at"] - 0.1
        if done > stage["full_by"]:
            cap = high
        last = step + 1 == stage["steps"]
        if (step + 1) % t.get("log_steps", SAVE_STEPS) == 0 or last:
            line = {
                "stage": stage["name"],
                "step": step + 1,
                "tokens": tokens,
                "records": cap,
                "loss": round(loss.item(), 4),
                "token_accuracy": round(level, 4),
            }
            for name in task.OPERATIONS:
                line[f"exact_match_{name}"] = exact_match(model, task, stage["words"], cap, name)
            log(line | {"seconds": round(time.time() - start)})
        if (step + 1) % SAVE_STEPS == 0 or last:
            state = {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
            state |= {"next": step + 1, "cap": cap, "level": level, "tokens": tokens}
            torch.save(state, path.with_suffix(".tmp"))
            path.with_suffix(".tmp").replace(path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, required=True, help="folder for checkpoints and log")
    parser.add_argument("--recipe", type=Path, required=True)
    parser.add_argument("--threads", type=int, default=1, help="the shipped run had one")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(args.threads)
    recipe = tomllib.loads(args.recipe.read_text())

    def log(line: dict) -> None:
        print(json.dumps(line), flush=True)
        with (args.out / "log.jsonl").open("a") as f:
            f.write(json.dumps(line) + "\n")

    trained = None
    for stage in recipe["stage"]:
        torch.manual_seed(recipe["train"]["seed"])
        vocab = len(task_of(recipe).VOCABULARY)
        config = ModelConfig(vocab=vocab, layers=stage["layers"], **recipe["model"])
        if trained is None:
            model = DLM(config)
        else:
            model = prepend_layers(config, trained, stage["prepend"], stage["prepend_scale"])
        train_stage(stage, recipe, model, args.out, log)
        trained = model.state_dict()


if __name__ == "__main__":
    main()
