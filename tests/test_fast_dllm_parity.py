"""fast_dllm against the published loops (spec B.1, B.2)."""

from __future__ import annotations

import itertools
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from parity import BOUND, Maker, check_output, clear_cases, same_bits
from parity_steps import KINDS, LAYERS, Shape, Step, Twins, sums
from reference_caches import Block, FastDllm
from reference_samplers import Decoding
from torch import Tensor

PROMPT = Shape(0, 13)
MODES = ("prefix", "dual")
STARTS = ("commit", "fill")
# One token a step; two; as many as are sure; a block that ends at its first step.
DECODINGS = {
    "one a step": Decoding(12, 12, 6),
    "two a step": Decoding(12, 6, 4),
    "threshold": Decoding(16, 16, 8, threshold=0.6),
    "factor": Decoding(16, 16, 8, factor=0.9),
    "a block a step": Decoding(12, 3, 4),
    "one block": Decoding(10, 10, 10),
    "Dream's": Decoding(12, 12, 6, remasking="topk_margin"),
}


def cache_string(mode: str, refresh_steps: int | None = None, start: str = "commit") -> str:
    return f"fast_dllm:mode={mode},refresh_steps={str(refresh_steps).lower()},block_start={start}"


def spec_rows(
    twins: Twins,
    s: Shape,
    steps: list[Step],
    mode: str,
    refresh_steps: int | None = None,
    start: str = "commit",
) -> int:
    """Rows of a layer (B.1): all of them at a block's first step and every refresh_steps after it,
    otherwise the block's, or all from its start on; on a shifted model with the row before. A
    pass that only fills is one more."""
    rows, block, at = 0, (0, 0), 0
    for step in steps:
        block, at = step.block, at + 1 if step.block == block else 0
        n, shift = len(step.canvas) - s.p, twins.model.shift
        moving = shift + (block[1] if mode == "dual" else len(step.canvas)) - block[0]
        full = at % refresh_steps == 0 if refresh_steps else at == 0
        rows += n if full else moving
        rows += moving if full and start == "fill" else 0
    return rows


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("decoding", DECODINGS)
@pytest.mark.parametrize("kind", KINDS)
def test_every_steps_logits(tiny_checkpoint: Maker, kind: str, decoding: str, mode: str) -> None:
    twins, options = Twins(tiny_checkpoint, kind), DECODINGS[decoding]
    for refresh_steps, start in itertools.product((None, 1, 2, 3), STARTS):
        s = replace(PROMPT, seed=refresh_steps or 0)
        steps, output = twins.steps(cache_string(mode, refresh_steps, start), s, options)
        loop = FastDllm(twins.model, mode, refresh_steps, start)
        twins.model.peaks.clear()
        error, count = twins.error(loop, steps)
        assert error < BOUND and count == len(steps) >= 2, (refresh_steps, start)
        assert np.mean(twins.model.peaks) > 0.3  # peaked attention, so that a wrong key would show
        rows = (spec_rows(twins, s, steps, mode, refresh_steps, start),) * LAYERS
        assert sums(loop.rows) == output.stats.rows_per_layer == rows
        assert set(output.stats.value_rows_per_layer) == {0}
        assert output.stats.passes == len(loop.rows)
        assert output.stats.steps == len(steps)
        assert output.stats.head_rows == sum(len(step.asked) for step in steps)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("kind", KINDS)
def test_tokens_equal_the_published_loops(tiny_checkpoint: Maker, kind: str, mode: str) -> None:
    """Whole requests, the reference by itself."""
    twins = Twins(tiny_checkpoint, kind)
    for options, start in itertools.product(
        [
            Decoding(12, 12, 6, threshold=0.5),
            Decoding(12, 6, 6, temperature=0.5),
            Decoding(12, 12, 4, remasking="random"),
        ],
        STARTS,
    ):

        def trace_of(seed: int, o: Decoding = options, start: str = start) -> Any:
            s = replace(PROMPT, seed=seed)
            return twins.trace(FastDllm(twins.model, mode, 2, start), s, o, seed)

        for seed, trace in clear_cases(trace_of, count=1):
            s = replace(PROMPT, seed=seed)
            check_output(twins.run(cache_string(mode, 2, start), s, options, seed), trace)


@pytest.mark.parametrize("kind", KINDS)
def test_identities(tiny_checkpoint: Maker, kind: str) -> None:
    twins = Twins(tiny_checkpoint, kind)
    for seed, options in enumerate(
        [*DECODINGS.values(), Decoding(12, 9, 4, temperature=0.6, remasking="random")]
    ):
        s = replace(PROMPT, seed=seed)
        plain = twins.run("none", s, options, seed)
        for mode in MODES:
            cached = twins.run(cache_string(mode, 1), s, options, seed)
            assert same_bits(plain, cached)
            assert plain.stats.rows_per_layer == cached.stats.rows_per_layer
            # What was filled is what the block's rows write once more: the same logits again.
            for refresh_steps in (None, 2):
                commit, fill = (
                    twins.run(cache_string(mode, refresh_steps, start), s, options, seed)
                    for start in STARTS
                )
                assert same_bits(commit, fill)
                assert fill.stats.passes > fill.stats.steps == commit.stats.passes
        # The last block has no rows after it.
        one_block = replace(options, block_length=options.gen_length)
        a, b = (twins.run(cache_string(mode), s, one_block, seed) for mode in MODES)
        assert same_bits(a, b) and a.stats.rows_per_layer == b.stats.rows_per_layer


EDGES = {
    "one prompt token": (Shape(0, 1), Decoding(8, 8, 4)),
    "no prompt but a prefix": (Shape(9, 0), Decoding(8, 8, 4)),
    "one response token": (Shape(0, 9), Decoding(1, 1, 1)),
    "blocks of one": (Shape(0, 9), Decoding(4, 4, 1)),
    "two tokens in all": (Shape(0, 1), Decoding(1, 1, 1)),
}


@pytest.mark.parametrize("edge", EDGES)
@pytest.mark.parametrize("kind", KINDS)
def test_edges(tiny_checkpoint: Maker, kind: str, edge: str) -> None:
    twins, (s, options) = Twins(tiny_checkpoint, kind), EDGES[edge]
    for mode, refresh_steps, start in itertools.product(MODES, (None, 2), STARTS):
        steps, output = twins.steps(cache_string(mode, refresh_steps, start), s, options)
        loop = FastDllm(twins.model, mode, refresh_steps, start)
        error, count = twins.error(loop, steps)
        assert error < BOUND and count == len(steps) == options.gen_length
        assert output.stats.rows_per_layer == sums(loop.rows)
        # It speaks for all rows, so a shared prefix is no more than the start of the prompt.
        assert output.stats.prefix_hit is None


@pytest.mark.parametrize("kind", KINDS)
def test_a_batch_equals_each_alone_and_the_loops(tiny_checkpoint: Maker, kind: str) -> None:
    """Prompts of different lengths, each with its own settings, in one call."""
    twins, options = Twins(tiny_checkpoint, kind), Decoding(12, 12, 4, threshold=0.6)
    settings: list[tuple[str, int | None, str]] = [
        ("dual", None, "commit"),
        ("prefix", 2, "fill"),
        ("dual", 3, "fill"),
        ("prefix", None, "commit"),
    ]
    shapes = [Shape(0, u, seed) for seed, u in enumerate((4, 31, 1, 70))]
    caches = [cache_string(*x) for x in settings]
    batch = twins.llm.generate(
        [twins.own(s).numpy() for s in shapes] + [twins.own(shapes[1]).numpy()],
        cache=[*caches, "none"], gen_length=12, block_length=4, threshold=0.6,
    )  # fmt: skip
    compared = 0
    for s, x, cache, output in zip(shapes, settings, caches, batch, strict=False):
        alone = twins.run(cache, s, options)
        assert same_bits(output, alone)
        assert output.stats.rows_per_layer == alone.stats.rows_per_layer
        trace = twins.trace(FastDllm(twins.model, *x), s, options)
        if trace.margin > 10 * BOUND:
            check_output(output, trace)
            compared += 1
    assert compared >= 2
    assert same_bits(batch[-1], twins.run("none", shapes[1], options))


# ---- the oracle could not be mistaken for another method ----------------------------------------


class OtherMode(FastDllm):
    def moving(self, count: int) -> Block:
        start, end = super().moving(count)
        return start, count if self.mode == "dual" else self.block[1]


class FillsAtTheFirstBlockOnly(FastDllm):
    def fills(self) -> bool:
        return super().fills() and (self.step == 0 or self.block_step > 0)


class CountsFromTheRequest(FastDllm):
    def fills(self) -> bool:
        return self.block_step == 0 or self.step % (self.refresh_steps or 1000) == 0


class NeverRefreshes(FastDllm):
    def fills(self) -> bool:
        return self.block_step == 0


class KeepsTheBlocksStart(FastDllm):
    """The row where the block begins lends what it had, as do those before it."""

    def moving(self, count: int) -> Block:
        start, end = super().moving(count)
        return start + 1, end


MUTANTS: dict[type[FastDllm], tuple[str, int | None]] = {
    OtherMode: ("MHA", None),
    FillsAtTheFirstBlockOnly: ("MHA", None),
    CountsFromTheRequest: ("MHA", 4),
    NeverRefreshes: ("MHA", 4),
    KeepsTheBlocksStart: ("QK-norm, bf16", None),
}


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda m: m.__name__)
@pytest.mark.parametrize("mode", MODES)
def test_another_loop_breaks_the_bound(
    tiny_checkpoint: Maker, mutant: type[FastDllm], mode: str
) -> None:
    kind, refresh_steps = MUTANTS[mutant]
    twins, options = Twins(tiny_checkpoint, kind), DECODINGS["one a step"]
    worst = 0.0
    for seed in range(2):
        s = replace(PROMPT, seed=seed)
        steps, _ = twins.steps(cache_string(mode, refresh_steps), s, options)
        assert twins.error(FastDllm(twins.model, mode, refresh_steps), steps)[0] < BOUND
        worst = max(worst, twins.error(mutant(twins.model, mode, refresh_steps), steps)[0])
    assert 10 * BOUND < worst


@pytest.mark.parametrize("mode", MODES)
def test_the_row_before_the_block(tiny_checkpoint: Maker, mode: str) -> None:
    """On a shifted model it runs: its residual predicts the block's first position. Were its K and
    V those of the block's start, the logits would be others."""
    twins, options = Twins(tiny_checkpoint, "GQA, shift"), Decoding(12, 12, 6)

    class LendsIt(FastDllm):
        def forward(self, canvas: Tensor, first: int, end: int) -> Tensor:
            if first in (self.prefix.p, self.block[0]):
                return super().forward(canvas, first, end)
            logits = super().forward(canvas, first + 1, end)
            # what predicts the first position is as it was at the block's start
            logits[first + 1] = self.old[first + 1]
            return logits

        def __call__(self, canvas: Tensor, block: Block) -> Tensor:
            logits = super().__call__(canvas, block)
            if self.block_step == 1:
                self.old = logits
            return logits

    steps, _ = twins.steps(cache_string(mode), PROMPT, options)
    assert twins.error(FastDllm(twins.model, mode), steps)[0] < BOUND
    assert twins.error(LendsIt(twins.model, mode), steps)[0] > 10 * BOUND


def test_defaults(tiny_checkpoint: Maker) -> None:
    twins, options = Twins(tiny_checkpoint, "MHA"), Decoding(12, 12, 4)
    bare = twins.run("fast_dllm", PROMPT, options)
    assert same_bits(bare, twins.run(cache_string("prefix"), PROMPT, options))
    for other in (cache_string("dual"), cache_string("prefix", 2)):
        assert not same_bits(bare, twins.run(other, PROMPT, options))
