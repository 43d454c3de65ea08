"""dllm_cache against the published loop with all of its caches (spec A.2, A.3)."""

from __future__ import annotations

import itertools
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from parity import BOUND, Maker, check_output, clear_cases, same_bits
from parity_steps import KINDS, LAYERS, Shape, Twins, cut_of, sums
from reference_caches import DllmCache
from reference_samplers import Decoding
from torch import Tensor

ONE_BLOCK, BLOCKS = Decoding(10, 10, 10), Decoding(10, 10, 5)
PROMPT = Shape(0, 17)
RATIOS = (0.0, 0.25, 0.3, 1.0)  # of 10 and 11 rows: 0; 2; 3; all
DRIFTS = ("last_step", "since_recompute")


def cache_string(kp: int, kr: int, ratio: float, drift: str = "last_step") -> str:
    return (
        f"dllm_cache:prompt_interval_steps={kp},gen_interval_steps={kr},"
        f"transfer_ratio={ratio},drift={drift}"
    )


def loop_of(
    twins: Twins, s: Shape, kp: int, kr: int, ratio: float, drift: str = "last_step"
) -> DllmCache:
    return DllmCache(twins.model, s.p + s.u, kp, kr, ratio, drift)


def spec_rows(
    twins: Twins, s: Shape, steps: int, kp: int, kr: int, ratio: float, g: int
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Rows recomputed, and rows of which V alone was, per layer (A.4: no prompt rows between
    refreshes; A.3: floor(ratio * response) rows where the response is not refreshed)."""
    prompt = cut_of(twins, s)
    response = s.p + s.u + g - prompt
    prompt_rows = len(range(0, steps, kp)) * prompt
    fresh = len(range(0, steps, kr))
    chosen = int(response * ratio)
    deep = prompt_rows + fresh * response + (steps - fresh) * chosen
    values = (steps - fresh) * (response - chosen) if ratio > 0 else 0
    return (
        (prompt_rows + steps * response,) + (deep,) * (LAYERS - 1),
        (0,) + (values,) * (LAYERS - 1),
    )


@pytest.mark.parametrize("ratio", RATIOS)
@pytest.mark.parametrize("kind", KINDS)
def test_every_steps_logits(tiny_checkpoint: Maker, kind: str, ratio: float) -> None:
    twins = Twins(tiny_checkpoint, kind)
    drifts = DRIFTS if 0 < ratio < 1 else DRIFTS[:1]
    compared = ran = 0
    for options, kp, kr, drift in itertools.product(
        (ONE_BLOCK, BLOCKS), (1, 3, 50), (1, 2, 5), drifts
    ):
        s = replace(PROMPT, seed=kp + kr)
        steps, output = twins.steps(cache_string(kp, kr, ratio, drift), s, options)
        loop = loop_of(twins, s, kp, kr, ratio, drift)
        twins.model.peaks.clear()
        error, count = twins.error(loop, steps)
        assert error < BOUND, (options.block_length, kp, kr, drift)
        assert np.mean(twins.model.peaks) > 0.3  # peaked attention, so that a wrong key would show
        compared, ran = compared + count, ran + len(steps)
        rows, values = spec_rows(twins, s, len(steps), kp, kr, ratio, options.gen_length)
        assert output.stats.rows_per_layer == rows
        assert output.stats.value_rows_per_layer == values
        assert output.stats.head_rows == sum(len(step.asked) for step in steps)
        if count == len(steps):
            assert (sums(loop.rows), sums(loop.value_rows)) == (rows, values)
    assert compared > 0.7 * ran, "too many near ties between rows: little was tested"


@pytest.mark.parametrize("ratio", RATIOS)
@pytest.mark.parametrize("kind", KINDS)
def test_new_tokens_recomputed(tiny_checkpoint: Maker, kind: str, ratio: float) -> None:
    """new_tokens=recompute: those rows and the share of the others, whatever a step commits."""
    twins = Twins(tiny_checkpoint, kind)
    compared = ran = 0
    for seed, options in enumerate(
        [
            Decoding(20, 20, 20),
            Decoding(20, 8, 10),
            Decoding(20, 20, 10, threshold=0.7),
            Decoding(15, 15, 15, remasking="entropy"),
        ]
    ):
        s = replace(PROMPT, seed=seed)
        cache = cache_string(4, 3, ratio) + ",new_tokens=recompute"
        steps, output = twins.steps(cache, s, options)
        loop = DllmCache(twins.model, s.p + s.u, 4, 3, ratio, new_tokens="recompute")
        error, count = twins.error(loop, steps)
        assert error < BOUND, options
        compared, ran = compared + count, ran + len(steps)
        if count == len(steps):
            assert sums(loop.rows) == output.stats.rows_per_layer
            assert sums(loop.value_rows) == output.stats.value_rows_per_layer
    assert compared > 0.7 * ran


@pytest.mark.parametrize("kind", KINDS)
def test_steps_that_commit_several(tiny_checkpoint: Maker, kind: str) -> None:
    """Refreshes go by steps, across blocks, whatever a step commits."""
    twins = Twins(tiny_checkpoint, kind)
    compared = ran = 0
    for seed, options in enumerate(
        [
            Decoding(20, 8, 10),
            Decoding(20, 20, 10, threshold=0.7),
            Decoding(20, 20, 5, temperature=0.7, remasking="random"),
            Decoding(15, 15, 15, remasking="entropy"),
        ]
    ):
        s = replace(PROMPT, seed=seed)
        steps, output = twins.steps(cache_string(4, 3, 0.25), s, options)
        error, count = twins.error(loop_of(twins, s, 4, 3, 0.25), steps)
        assert error < BOUND, options
        assert len(steps) > 4
        compared, ran = compared + count, ran + len(steps)
        rows, values = spec_rows(twins, s, len(steps), 4, 3, 0.25, options.gen_length)
        assert output.stats.rows_per_layer == rows
        assert output.stats.value_rows_per_layer == values
    assert compared > 0.7 * ran


@pytest.mark.parametrize("kind", KINDS)
def test_tokens_equal_the_published_loops(tiny_checkpoint: Maker, kind: str) -> None:
    """Whole requests, the reference by itself; a near tie of any kind passes a seed over."""
    twins = Twins(tiny_checkpoint, kind)
    for options, drift in itertools.product(
        (BLOCKS, Decoding(12, 6, 6, temperature=0.5), Decoding(12, 12, 6, threshold=0.3)), DRIFTS
    ):

        def trace_of(seed: int, o: Decoding = options, d: str = drift) -> Any:
            s = replace(PROMPT, seed=seed)
            return twins.trace(loop_of(twins, s, 3, 4, 0.3, d), s, o, seed)

        for seed, trace in clear_cases(trace_of, count=1):
            s = replace(PROMPT, seed=seed)
            check_output(twins.run(cache_string(3, 4, 0.3, drift), s, options, seed), trace)


@pytest.mark.parametrize("kind", KINDS)
def test_identities(tiny_checkpoint: Maker, kind: str) -> None:
    twins = Twins(tiny_checkpoint, kind)
    for seed, options in enumerate(
        [BLOCKS, Decoding(12, 9, 4, temperature=0.6), Decoding(6, 3, 6, remasking="random")]
    ):
        s = replace(PROMPT, seed=seed)
        plain = twins.run("none", s, options, seed)
        for ratio, drift in itertools.product(RATIOS, DRIFTS):
            cached = twins.run(cache_string(1, 1, ratio, drift), s, options, seed)
            assert same_bits(plain, cached)
            assert plain.stats.rows_per_layer == cached.stats.rows_per_layer
        # All response rows chosen, or all refreshed: the same rows.
        for kp in (1, 3):
            fresh = twins.run(cache_string(kp, 1, 0.25), s, options, seed)
            for kr, drift in itertools.product((2, 5, 100), DRIFTS):
                chosen = twins.run(cache_string(kp, kr, 1.0, drift), s, options, seed)
                assert same_bits(fresh, chosen)
                assert fresh.stats.rows_per_layer == chosen.stats.rows_per_layer
                assert set(chosen.stats.value_rows_per_layer) == {0}


EDGES = {
    "one prompt token": (Shape(0, 1), Decoding(8, 8, 4)),
    "no prompt but a prefix": (Shape(9, 0), Decoding(8, 8, 4)),
    "one response token": (Shape(0, 9), Decoding(1, 1, 1)),
    "too short to choose any": (Shape(0, 9), Decoding(3, 3, 3)),
    "two tokens in all": (Shape(0, 1), Decoding(1, 1, 1)),
}


@pytest.mark.parametrize("edge", EDGES)
@pytest.mark.parametrize("kind", KINDS)
def test_edges(tiny_checkpoint: Maker, kind: str, edge: str) -> None:
    twins, (s, options) = Twins(tiny_checkpoint, kind), EDGES[edge]
    for kp, kr, ratio in itertools.product((1, 3), (2, 100), (0.0, 0.25, 1.0)):
        steps, output = twins.steps(cache_string(kp, kr, ratio), s, options)
        error, count = twins.error(loop_of(twins, s, kp, kr, ratio), steps)
        assert error < BOUND and count > 0
        rows = spec_rows(twins, s, len(steps), kp, kr, ratio, options.gen_length)
        assert (output.stats.rows_per_layer, output.stats.value_rows_per_layer) == rows
        # It speaks for all rows, so a shared prefix is no more than the start of the prompt.
        assert output.stats.prefix_hit is None


@pytest.mark.parametrize("kind", KINDS)
def test_a_batch_equals_each_alone_and_the_loops(tiny_checkpoint: Maker, kind: str) -> None:
    """Prompts of different lengths, each with its own settings, in one call."""
    twins, options = Twins(tiny_checkpoint, kind), Decoding(12, 12, 4)
    settings = [(1, 1, 0.25), (3, 2, 0.3), (50, 7, 0.25), (4, 100, 0.0), (2, 5, 1.0)]
    shapes = [Shape(0, u, seed) for seed, u in enumerate((4, 31, 1, 12, 70))]
    caches: list[Any] = [cache_string(*x) for x in settings]
    batch = twins.llm.generate(
        [twins.own(s).numpy() for s in shapes] + [twins.own(shapes[1]).numpy()],
        cache=[*caches, "none"],
        gen_length=12,
        block_length=4,
    )
    compared = 0
    for s, x, cache, output in zip(shapes, settings, caches, batch, strict=False):
        alone = twins.run(cache, s, options)
        assert same_bits(output, alone)
        assert output.stats.rows_per_layer == alone.stats.rows_per_layer
        trace = twins.trace(loop_of(twins, s, *x), s, options)
        if trace.margin > BOUND * 10:
            check_output(output, trace)
            compared += 1
    assert compared >= 2
    assert same_bits(batch[-1], twins.run("none", shapes[1], options))


# ---- the oracle could not be mistaken for another method ----------------------------------------


class Layer0IsLikeAnyOther(DllmCache):
    """As the paper's first version: no rule for layer 0."""

    def refreshes(self, layer: int) -> tuple[bool, bool]:
        return super().refreshes(1)


class MostAlike(DllmCache):
    def choose(self, old: Tensor, new: Tensor) -> Tensor:
        count = len(super().choose(old, new))
        cosine = torch.cosine_similarity(
            old.transpose(0, 1).flatten(1), new.transpose(0, 1).flatten(1)
        )
        return cosine.sort(stable=True, descending=True).indices[:count]


class ByTheFirstHead(DllmCache):
    def choose(self, old: Tensor, new: Tensor) -> Tensor:
        return super().choose(old[:1], new[:1])


class UnchosenKeepV(DllmCache):
    def adapt(self, layer: int, x_gen: Tensor) -> Tensor:
        before = self.gen[layer].kv[1]
        todo = super().adapt(layer, x_gen)
        k, v = self.gen[layer].kv
        self.gen[layer].kv = k, before.index_copy(1, todo, v[:, todo])
        return todo


class AllWriteK(DllmCache):
    def adapt(self, layer: int, x_gen: Tensor) -> Tensor:
        todo = super().adapt(layer, x_gen)
        kept = self.gen[layer]
        kept.kv = self.model.project(layer, "k", x_gen), kept.kv[1]
        return todo


class RestartsWithTheBlock(DllmCache):
    def __call__(self, canvas: Tensor, block: Any = None) -> Tensor:
        if block != getattr(self, "block", None):
            self.block, self.step = block, 0
        return super().__call__(canvas, block)


class LastPromptRowIsPrompt(DllmCache):
    """As the published Dream hook."""

    def __init__(self, *settings: Any) -> None:
        super().__init__(*settings)
        self.cut += 1


class OtherDrift(DllmCache):
    def __init__(self, *settings: Any) -> None:
        super().__init__(*settings)
        self.drift = DRIFTS[1 - DRIFTS.index(self.drift)]


# (kind of model, transfer_ratio)
MUTANTS: dict[type[DllmCache], tuple[str, float]] = {
    Layer0IsLikeAnyOther: ("MHA", 0.0),  # a row that changed in layer 0 is chosen there anyway
    MostAlike: ("MHA", 0.3),
    ByTheFirstHead: ("MHA", 0.3),
    UnchosenKeepV: ("MHA", 0.3),
    AllWriteK: ("MHA", 0.3),
    RestartsWithTheBlock: ("MHA", 0.3),
    LastPromptRowIsPrompt: ("GQA, shift", 0.3),
    OtherDrift: ("MHA", 0.3),
}


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda m: m.__name__)
@pytest.mark.parametrize("drift", DRIFTS)
def test_another_loop_breaks_the_bound(
    tiny_checkpoint: Maker, mutant: type[DllmCache], drift: str
) -> None:
    kind, ratio = MUTANTS[mutant]
    twins, settings = Twins(tiny_checkpoint, kind), (3, 4, ratio, drift)
    worst = 0.0
    for seed in range(3):
        s = replace(PROMPT, seed=seed)
        steps, _ = twins.steps(cache_string(*settings), s, BLOCKS)
        error, count = twins.error(loop_of(twins, s, *settings), steps)
        assert error < BOUND
        other = mutant(twins.model, s.p + s.u, *settings)
        worst = max(worst, twins.error(other, steps[:count])[0])
    assert worst > 10 * BOUND


def test_published_defaults(tiny_checkpoint: Maker) -> None:
    twins = Twins(tiny_checkpoint, "MHA")
    options, s = Decoding(60, 60, 30), Shape(0, 9)
    bare = twins.run("dllm_cache", s, options)
    assert same_bits(bare, twins.run(cache_string(50, 7, 0.25), s, options))
    assert not same_bits(bare, twins.run(cache_string(49, 7, 0.25), s, options))
    assert bare.stats.rows_per_layer == spec_rows(twins, s, 60, 50, 7, 0.25, 60)[0]
