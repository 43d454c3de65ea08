"""Engine against the loops of reference_caches.py: the logits of every step, rows, whole requests.

The engine decodes; at every step the loop is given the canvas the engine stood before and the
block it was in, so that nothing depends on near ties between tokens. Near ties between rows that a
loop may choose (DllmCache.gap) remain: from the first one on, a request is not compared.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

import bicache
import numpy as np
import torch
from bicache import _core
from numpy.typing import NDArray
from parity import BOUND, Maker, edited
from parity import tokens as random_tokens
from reference import Llada, Trace
from reference_caches import Block
from reference_samplers import Cached, Decoding, decode
from torch import Tensor

LAYERS = 4
DREAM = ("origin", "maskgit_plus", "topk_margin", "entropy")
MODEL: dict[str, Any] = {
    "layers": LAYERS, "dim": 32, "heads": 4, "ffn": 48, "vocab": 43, "scale": 4.0,
}  # fmt: skip
KINDS: dict[str, dict[str, Any]] = {
    "MHA": {},
    "GQA, shift": {"kv_heads": 2, "shift": True},
    "QK-norm, bf16": {"kv_heads": 2, "qk_norm": True, "dtype": "bf16"},
}
# Two cosines nearer than this (DllmCache.gap) may change places: relative error of V, twice.
SELECTION = BOUND / 50


@dataclass(frozen=True)
class Step:
    canvas: Tensor  # [N], before the step
    block: Block
    asked: list[int]  # positions that were predicted
    logits: NDArray[np.float32]  # [asked, V]


@dataclass(frozen=True)
class Shape:
    """Rows of a request: shared prefix, own prompt."""

    p: int
    u: int
    seed: int = 0


class Twins:
    """One checkpoint in the engine and in the reference; requests are made from shapes."""

    def __init__(self, tiny_checkpoint: Maker, kind: str, **config: object) -> None:
        """config: other values in its config.json."""
        folder = tiny_checkpoint(**MODEL, **KINDS[kind], seed=17)
        if config:
            folder = edited(folder, **config)
        # In f32 whatever is stored: rounded activations would blur what the loops are about.
        self.model, self.llm = Llada(folder), bicache.LLM(folder, dtype="f32", threads=1)

    def prefix(self, s: Shape) -> Tensor:
        return random_tokens(s.p, self.model, s.seed)

    def own(self, s: Shape) -> Tensor:
        return random_tokens(s.u, self.model, 1000 + s.seed)

    def prompt(self, s: Shape) -> Tensor:
        return torch.cat([self.prefix(s), self.own(s)])

    def request(self, s: Shape) -> dict[str, Any]:
        prefix = self.prefix(s).numpy() if s.p else None
        return {"prompt": self.own(s).numpy(), "prefix": prefix}

    def run(
        self, cache: Any, s: Shape, o: Decoding, seed: int = 0, given: Tensor | None = None
    ) -> bicache.Output:
        prompt = self.request(s)
        (output,) = self.llm.generate(
            [prompt["prompt"]],
            prefix=prompt["prefix"],
            response=None if given is None else given.numpy(),
            cache=cache,
            seed=seed,
            **asdict(o),
        )
        return output

    def steps(
        self, cache: Any, s: Shape, o: Decoding, seed: int = 0
    ) -> tuple[list[Step], bicache.Output]:
        """Every step of a request without guidance, and what became of it."""
        shown: list[NDArray[np.float32]] = []
        events = self.llm.stream(**self.request(s), cache=cache, seed=seed, **asdict(o))
        canvas = torch.cat([self.prompt(s), torch.full((o.gen_length,), self.model.mask)])
        steps: list[Step] = []
        with self.llm.tap(lambda _, name, x: shown.append(x) if name == "logits" else None):
            while True:
                try:
                    event = next(events)
                except StopIteration as end:
                    return steps, end.value
                first = next(j for j in range(s.p + s.u, len(canvas)) if canvas[j] == self.mask)
                start = first - (first - s.p - s.u) % o.block_length
                block = (start, start + o.block_length)
                asked = [j for j in range(*block) if canvas[j] == self.mask]
                # a pass that fills caches predicts nothing
                logits = next(x for x in reversed(shown) if len(x))
                steps.append(Step(canvas, block, asked, logits))
                canvas = torch.tensor(event.canvas, dtype=torch.int64)

    @property
    def mask(self) -> int:
        return self.model.mask

    def error(self, loop: Cached, steps: list[Step]) -> tuple[float, int]:
        """Largest error of the logits in units of their scale, and how many steps were compared."""
        worst = 0.0
        for done, step in enumerate(steps):
            want = loop(step.canvas, step.block)[step.asked].numpy()
            if getattr(loop, "gap", math.inf) < SELECTION:
                return worst, done
            assert step.logits.shape == want.shape
            error = float(np.abs(step.logits - want).max() / want.std())
            worst = max(worst, math.inf if error != error else error)
        return worst, len(steps)

    def trace(
        self,
        loop: Cached,
        s: Shape,
        o: Decoding,
        seed: int = 0,
        unconditional: Cached | None = None,
        given: Tensor | None = None,
    ) -> Trace:
        """What the reference makes of a request, with the engine's noise of `seed`. A near tie
        between rows the loops choose counts as one between tokens."""

        def token_noise(step: int, position: int, vocab: int) -> Tensor:
            return torch.tensor(_core.uniform(seed, "token", step, position, vocab))

        def order_noise(step: int, position: int) -> float:
            return float(_core.uniform(seed, "confidence", step, position, 1)[0])

        trace = decode(
            loop, self.model, self.prompt(s), o, token_noise, order_noise, unconditional, given
        )
        if min(getattr(x, "gap", math.inf) for x in (loop, unconditional)) < SELECTION:
            trace.margin = 0.0
        return trace


def cut_of(twins: Twins, s: Shape) -> int:
    """First row that counts as response."""
    return s.p + s.u - twins.model.shift


def sums(rows: list[list[int]]) -> tuple[int, ...]:
    """Per layer, over the passes."""
    return tuple(sum(layer) for layer in zip(*rows, strict=True))
