"""The logits of every step against the published loop (spec: BiCache sections 3.5 and 3.6)."""

from __future__ import annotations

from typing import Any

import bicache
import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from parity import BOUND, Maker
from parity import tokens as random_tokens
from reference import BiCache, Llada

LAYERS, PREFIX, OWN, STEPS = 5, 21, 6, 36
MODEL: dict[str, Any] = {
    "layers": LAYERS, "dim": 32, "heads": 4, "ffn": 48, "vocab": 59, "scale": 4.0,
}  # fmt: skip
KINDS: dict[str, dict[str, Any]] = {
    "MHA": {},
    "GQA, shift": {"kv_heads": 2, "shift": True},
    "QK-norm, bf16": {"qk_norm": True, "dtype": "bf16"},
}


def steps_of(
    llm: bicache.LLM, prefix: torch.Tensor, own: torch.Tensor, cache: Any, block_length: int
) -> list[tuple[NDArray[np.int32], NDArray[np.float32]]]:
    """The canvas before each of STEPS steps, and the logits [masked positions, V] it gave."""
    logits: list[NDArray[np.float32]] = []
    events = llm.stream(
        own.numpy(), prefix=prefix.numpy(), cache=cache,
        gen_length=STEPS, steps=STEPS, block_length=block_length,
    )  # fmt: skip
    mask = np.full(STEPS, llm.config.mask_token_id)
    canvas = np.concatenate([prefix.numpy(), own.numpy(), mask]).astype(np.int32)
    steps = []
    with llm.tap(lambda layer, name, x: logits.append(x) if name == "logits" else None):
        for event in events:
            # the pass that makes a prefix entry predicts nothing
            steps.append((canvas, next(x for x in reversed(logits) if len(x))))
            canvas = event.canvas
    return steps


@pytest.mark.parametrize("block_length", [STEPS, 9])
@pytest.mark.parametrize("splice", ["official", "strict"])
@pytest.mark.parametrize("refresh_steps", [1, 4, 16])
@pytest.mark.parametrize("kind", KINDS)
def test_every_steps_logits(
    tiny_checkpoint: Maker, kind: str, refresh_steps: int, splice: str, block_length: int
) -> None:
    folder = tiny_checkpoint(**MODEL, **KINDS[kind], seed=9)
    llm, model = bicache.LLM(folder, dtype="f32", threads=1), Llada(folder)
    for depth in (1, 3):
        prefix, own = (random_tokens(n, model, 10 * depth + n) for n in (PREFIX, OWN))
        cache = f"bicache:depth={depth},refresh_steps={refresh_steps},splice={splice}"
        loop = BiCache(model, prefix, depth, refresh_steps, splice)
        steps = steps_of(llm, prefix, own, cache, block_length)
        assert len(steps) == STEPS > 32
        model.peaks.clear()
        for step, (canvas, got) in enumerate(steps):
            x = torch.tensor(canvas, dtype=torch.int64)
            first = PREFIX + OWN + step // block_length * block_length
            asked = [i for i in range(first, first + block_length) if canvas[i] == model.mask]
            want = loop(x)[asked].numpy()
            assert got.shape == want.shape
            error = np.abs(got - want).max() / want.std()
            assert error < BOUND, f"depth {depth}, step {step}: {error}"
        # peaked attention, so that a wrong key would show
        assert np.mean(model.peaks) > 0.3


@pytest.mark.parametrize("splice", ["official", "strict"])
def test_depths_that_change_from_refresh_to_refresh(tiny_checkpoint: Maker, splice: str) -> None:
    """Deeper, shallower, all layers, none: what is lent is the entry's again at every refresh."""
    folder = tiny_checkpoint(**MODEL, seed=9)
    llm, model = bicache.LLM(folder, threads=1), Llada(folder)
    prefix, own = (random_tokens(n, model, n) for n in (PREFIX, OWN))
    depths = [1, 3, 2, LAYERS, 0, 4, LAYERS, 1, 5]
    cache = bicache.BiCache(lambda info: depths[info.step // 4], refresh_steps=4, splice=splice)
    loop = BiCache(model, prefix, depths, 4, splice)
    for step, (canvas, got) in enumerate(steps_of(llm, prefix, own, cache, STEPS)):
        x = torch.tensor(canvas, dtype=torch.int64)
        asked = [i for i in range(PREFIX + OWN, len(canvas)) if canvas[i] == model.mask]
        want = loop(x)[asked].numpy()
        error = np.abs(got - want).max() / want.std()
        assert error < BOUND, f"step {step}: {error}"
