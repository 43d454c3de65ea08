"""What the parity tests share: engine against reference.py on the same checkpoint and noise."""

import itertools
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import bicache
import numpy as np
import reference
import torch
from bicache import _core
from reference import Llada, Options, Trace
from torch import Tensor

# Largest difference of two logits, in units of their standard deviation. The engine adds up in
# float32: about 1e-7 a product, some hundred roundings deep, amplified by peaked attention.
BOUND = 1e-4
# A decision nearer than this (log units) could fall either way within BOUND; logits here have a
# standard deviation below MAX_SCALE, and two of them take part.
MAX_SCALE = 5.0
MARGIN = 2 * BOUND * MAX_SCALE
# Of a probability, which moves by at most a quarter of what the difference of two logits does.
CONFIDENCE = MARGIN / 4

Maker = Callable[..., Path]  # the fixture tiny_checkpoint


def played_on(
    isa: str, script: str, folder: Path, ids: Tensor, tmp_path: Path
) -> dict[str, np.ndarray]:
    """The arrays that `script` saves: a process of its own, with the kernels of `isa`, is given the
    checkpoint, a file with the ids and the file to save to; it saves its `isa` as well."""
    np.save(tmp_path / "ids.npy", ids.numpy())
    arguments = [str(folder), str(tmp_path / "ids.npy"), str(tmp_path / "out.npz")]
    subprocess.run(
        [sys.executable, "-c", script, *arguments],
        env=os.environ | {"BICACHE_ISA": isa},
        check=True,
        timeout=300,
    )
    with np.load(tmp_path / "out.npz") as out:
        assert str(out["isa"]) == isa
        return {key: out[key] for key in out.files if key != "isa"}


def edited(folder: Path, **values: object) -> Path:
    """A copy of a checkpoint folder with other values in its config.json."""
    for i in itertools.count():
        copy = folder.with_name(f"{folder.name}-edited-{i}")
        if not copy.exists():
            break
    shutil.copytree(folder, copy)
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps(config | values))
    return copy


def tokens(count: int, model: Llada, seed: int) -> Tensor:
    """`count` random token ids, none of them the mask."""
    rng = np.random.default_rng([seed, count])
    ids = rng.integers(0, model.vocab - 1, count)
    return torch.tensor(ids + (ids >= model.mask), dtype=torch.int64)


def reference_trace(
    logits_of: reference.Logits, model: Llada, prompt: Tensor, options: Options, seed: int
) -> Trace:
    """generate() of the reference with the engine's noise of `seed`."""

    def token_noise(step: int, position: int, vocab: int) -> Tensor:
        return torch.tensor(_core.uniform(seed, "token", step, position, vocab))

    def order_noise(step: int, position: int) -> float:
        return float(_core.uniform(seed, "confidence", step, position, 1)[0])

    return reference.generate(logits_of, model, prompt, options, token_noise, order_noise)


def clear_cases(
    trace_of: Callable[[int], Trace], count: int, tries: int = 12
) -> Iterator[tuple[int, Trace]]:
    """The first `count` seeds at which no decision of the reference is a near tie.

    Float32 may decide a near tie otherwise, and rightly so. Few seeds may be passed over."""
    found = 0
    for seed in range(count * tries):
        trace = trace_of(seed)
        if trace.margin > MARGIN:
            yield seed, trace
            found += 1
            if found == count:
                return
    raise AssertionError(f"only {found} of {count * tries} seeds have a margin above {MARGIN}")


def check_output(output: bicache.Output, trace: Trace) -> None:
    """Same tokens, same confidences within CONFIDENCE, as many steps."""
    assert trace.margin > MARGIN
    assert output.tokens.tolist() == trace.tokens.tolist()
    np.testing.assert_allclose(output.confidences, trace.confidences, rtol=0, atol=CONFIDENCE)
    assert output.stats.steps == len(trace.commits)


def same_bits(a: bicache.Output, b: bicache.Output) -> bool:
    return (a.tokens.tobytes(), a.confidences.tobytes()) == (
        b.tokens.tobytes(),
        b.confidences.tobytes(),
    )
