"""The same GGUF files give llama.cpp's logits (tests/golden/make_llama_logits.py made both)."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from bicache import LLM

GOLDEN = Path(__file__).parent / "golden"
FAMILIES = ("llada", "dream")


def logits(name: str) -> tuple[np.ndarray, np.ndarray]:
    """Ours and llama.cpp's [N, V] of the whole canvas, in its own order of rows."""
    with np.load(GOLDEN / "llama_logits.npz") as made:
        canvas, theirs = made["canvas"], made[name]
    llm = LLM(GOLDEN / f"{name}.gguf", dtype="f32", threads=1)
    rows = np.arange(len(canvas), dtype=np.int64)
    if llm.config.shift:  # position i is predicted from row i - 1: llama.cpp has rows
        rows, theirs = rows[1:], theirs[:-1]
    return llm.forward(canvas.tolist(), rows.tolist()), theirs


@pytest.mark.parametrize("family", FAMILIES)
def test_float32(family: str) -> None:
    ours, theirs = logits(f"{family}-f32")
    assert np.abs(ours - theirs).max() <= 1e-3 * theirs.std()
    np.testing.assert_array_equal(ours.argmax(1), theirs.argmax(1))


@pytest.mark.parametrize("family", FAMILIES)
def test_q8_0(family: str) -> None:
    """llama.cpp rounds activations to 8 bits as well; here the weights alone are rounded."""
    ours, theirs = logits(f"{family}-q8_0")
    assert (ours.argmax(1) == theirs.argmax(1)).mean() >= 0.99
    assert np.sqrt(np.mean((ours - theirs) ** 2)) <= 0.05 * theirs.std()
