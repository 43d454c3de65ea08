"""bicache and naive joined with dllm_cache and fast_dllm: the shared prefix follows BiCache's loop
(spec 3.5, 3.6, and 3.7 with Fast-dLLM), all other rows their own."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest
import torch
from parity import BOUND, Maker, check_output, clear_cases, same_bits
from parity_steps import KINDS, LAYERS, Shape, Step, Twins, sums
from reference import BiCache, Naive
from reference_caches import DllmCache, FastDllm, SharedPrefix
from reference_samplers import Decoding

REQUEST = Shape(19, 5)
DECODINGS = {
    "one a step": Decoding(12, 12, 6),
    "one block, two a step": Decoding(10, 5, 10),
    "threshold": Decoding(16, 16, 8, threshold=0.6),
}


@dataclass(frozen=True)
class Mix:
    """A composition; depth = LAYERS with refresh_steps = None: naive."""

    rest: str  # the cache string of the other rows
    depth: int
    refresh_steps: int | None = None
    splice: str = "official"

    @property
    def first(self) -> str:
        if self.refresh_steps is None:
            return "naive"
        return f"bicache:depth={self.depth},refresh_steps={self.refresh_steps},splice={self.splice}"

    @property
    def cache(self) -> str:
        return f"{self.first}+{self.rest}"

    @property
    def cut(self) -> int:
        """First layer in which the shared rows run at a refresh."""
        return max(0, self.depth - (self.splice == "strict"))

    def settings(self) -> dict[str, Any]:
        return dict(x.split("=") for x in self.rest.partition(":")[2].split(",") if x)

    def shared(self, twins: Twins, s: Shape) -> SharedPrefix:
        p = min(s.p, s.p + s.u - twins.model.shift)
        prefix = twins.prompt(s)[:p]
        return SharedPrefix(twins.model, prefix, self.depth, self.refresh_steps or 1, self.splice)

    def loop(self, twins: Twins, s: Shape, shared: SharedPrefix | None = None) -> Any:
        o, shared = self.settings(), shared or self.shared(twins, s)
        if self.rest.startswith("fast_dllm"):
            steps = o.get("refresh_steps")
            return FastDllm(
                twins.model, o["mode"], steps and int(steps), o.get("block_start", "commit"), shared
            )
        return DllmCache(
            twins.model, s.p + s.u,
            int(o["prompt_interval_steps"]), int(o["gen_interval_steps"]),
            float(o["transfer_ratio"]), o.get("drift", "last_step"), shared,
        )  # fmt: skip


def dllm(kp: int, kr: int, ratio: float, drift: str = "last_step") -> str:
    return (
        f"dllm_cache:prompt_interval_steps={kp},gen_interval_steps={kr},"
        f"transfer_ratio={ratio},drift={drift}"
    )


def fast(mode: str, refresh_steps: int | None = None, start: str = "commit") -> str:
    often = f",refresh_steps={refresh_steps}" if refresh_steps else ""
    return f"fast_dllm:mode={mode}{often},block_start={start}"


RESTS = {
    "dllm_cache, rare": dllm(50, 7, 0.25),
    "dllm_cache, often": dllm(3, 2, 0.3, "since_recompute"),
    "dllm_cache, nothing between": dllm(4, 5, 0.0),
    "fast_dllm, dual": fast("dual"),
    "fast_dllm, dual, fill": fast("dual", None, "fill"),
    "fast_dllm, prefix, every 4": fast("prefix", 4),
    "fast_dllm, prefix, fill": fast("prefix", None, "fill"),
}


def mixes(rest: str) -> Iterator[Mix]:
    """Refreshes at every step, within a block and not at its start, at every block, once."""
    for depth, refresh_steps in [(0, 4), (1, 1), (2, 4), (3, 6), (LAYERS, 3), (2, 100)]:
        yield Mix(rest, depth, refresh_steps)
    yield Mix(rest, 2, 5, "strict")
    yield Mix(rest, LAYERS)


def spec_rows(
    mix: Mix, twins: Twins, s: Shape, steps: list[Step]
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Rows recomputed, and rows of which V alone was, per layer: those of the method without the
    shared rows, and these in layers from the splice on at every refresh."""
    o, n, shift = mix.settings(), len(steps[0].canvas), twins.model.shift
    p = min(s.p, s.p + s.u - shift)
    layers, values = [[0] * LAYERS for _ in range(2)]
    block, at = (0, 0), 0
    for i, step in enumerate(steps):
        block, at = step.block, at + 1 if step.block == block else 0
        for layer in range(LAYERS):
            if mix.refresh_steps and i % mix.refresh_steps == 0 and layer >= mix.cut:
                layers[layer] += p
            if mix.rest.startswith("fast_dllm"):
                often = o.get("refresh_steps")
                full = at % int(often) == 0 if often else at == 0
                moving = shift + (block[1] if o["mode"] == "dual" else n) - block[0]
                again = full and o["block_start"] == "fill"
                layers[layer] += (n - p if full else moving) + (moving if again else 0)
                continue
            response = n - (s.p + s.u - shift)
            ratio = float(o["transfer_ratio"])
            if i % int(o["prompt_interval_steps"]) == 0:
                layers[layer] += n - p - response
            fresh = layer == 0 or i % int(o["gen_interval_steps"]) == 0
            layers[layer] += response if fresh else int(response * ratio)
            values[layer] += 0 if fresh or ratio == 0 else response - int(response * ratio)
    return tuple(layers), tuple(values)


@pytest.mark.parametrize("rest", RESTS)
@pytest.mark.parametrize("decoding", DECODINGS)
@pytest.mark.parametrize("kind", KINDS)
def test_every_steps_logits(tiny_checkpoint: Maker, kind: str, decoding: str, rest: str) -> None:
    twins, options = Twins(tiny_checkpoint, kind), DECODINGS[decoding]
    compared = ran = 0
    some = list(mixes(RESTS[rest]))[:: 1 if decoding == "one a step" else 2]
    for seed, mix in enumerate(some):
        s = replace(REQUEST, seed=seed)
        steps, output = twins.steps(mix.cache, s, options)
        loop = mix.loop(twins, s)
        twins.model.peaks.clear()
        error, count = twins.error(loop, steps)
        assert error < BOUND, mix
        assert np.mean(twins.model.peaks) > 0.3  # peaked attention, so that a wrong key would show
        compared, ran = compared + count, ran + len(steps)
        rows = spec_rows(mix, twins, s, steps)
        assert (output.stats.rows_per_layer, output.stats.value_rows_per_layer) == rows, mix
        if count == len(steps):
            assert sums(loop.rows) == rows[0]
            assert len(loop.rows) == output.stats.passes
        assert output.stats.prefix_hit is (None if mix.cut == 0 else False)
        assert output.stats.entry_rows_per_layer == (REQUEST.p,) * mix.cut + (0,) * (
            LAYERS - mix.cut
        )
        assert output.stats.depth == mix.depth
        assert output.stats.head_rows == sum(len(step.asked) for step in steps)
    assert compared > 0.7 * ran


@pytest.mark.parametrize("rest", RESTS)
def test_tokens_equal_the_published_loops(tiny_checkpoint: Maker, rest: str) -> None:
    """Whole requests, the reference by itself; the second one finds the entry."""
    twins = Twins(tiny_checkpoint, "GQA, shift")
    for mix, options in itertools.product(
        [Mix(RESTS[rest], 2, 4), Mix(RESTS[rest], LAYERS)],
        [Decoding(12, 12, 6), Decoding(12, 6, 6, temperature=0.5)],
    ):

        def trace_of(seed: int, o: Decoding = options, mix: Mix = mix) -> Any:
            s = replace(REQUEST, seed=seed)
            return twins.trace(mix.loop(twins, s), s, o, seed)

        for seed, trace in clear_cases(trace_of, count=1):
            s = replace(REQUEST, seed=seed)
            twins.llm.clear_prefixes()
            first, second = (twins.run(mix.cache, s, options, seed) for _ in range(2))
            check_output(first, trace)
            assert same_bits(first, second)
            assert [x.stats.prefix_hit for x in (first, second)] == [False, True]


@pytest.mark.parametrize("kind", KINDS)
def test_the_order_does_not_matter(tiny_checkpoint: Maker, kind: str) -> None:
    twins = Twins(tiny_checkpoint, kind)
    for rest in (*RESTS.values(), "none"):
        mix = Mix(rest, 2, 4)
        a, b = (
            twins.run(cache, REQUEST, DECODINGS["one a step"])
            for cache in (mix.cache, f"{mix.rest}+{mix.first}")
        )
        assert same_bits(a, b)
        assert a.stats.rows_per_layer == b.stats.rows_per_layer


@pytest.mark.parametrize("kind", KINDS)
def test_identities(tiny_checkpoint: Maker, kind: str) -> None:
    twins = Twins(tiny_checkpoint, kind)
    exact = "bicache:depth=1,refresh_steps=1,splice=strict"
    idle = [dllm(1, 1, 0.25), dllm(1, 1, 0.25, "since_recompute"), fast("prefix", 1)]
    idle += [fast("dual", 1), "none"]
    for seed, options in enumerate(
        [*DECODINGS.values(), Decoding(12, 9, 4, temperature=0.6, remasking="random")]
    ):
        s = replace(REQUEST, seed=seed)
        plain = twins.run("none", s, options, seed)
        for rest in idle:
            cached = twins.run(f"{exact}+{rest}", s, options, seed)
            assert same_bits(plain, cached)
            assert plain.stats.rows_per_layer == cached.stats.rows_per_layer
            # and what does nothing changes nothing of the other
            for first in (Mix(rest, 2, 3).first, "naive"):
                alone, joined = (
                    twins.run(cache, s, options, seed) for cache in (first, f"{first}+{rest}")
                )
                assert same_bits(alone, joined)
                assert alone.stats.rows_per_layer == joined.stats.rows_per_layer
        for rest in RESTS.values():
            # official(b) = strict(b + 1); official(L) = naive
            for a, b in [
                (Mix(rest, 1, 4), Mix(rest, 2, 4, "strict")),
                (Mix(rest, LAYERS, 3), Mix(rest, LAYERS)),
            ]:
                assert same_bits(*(twins.run(m.cache, s, options, seed) for m in (a, b)))


@pytest.mark.parametrize("mode", ["prefix", "dual"])
def test_fill_is_commit_with_one_pass_more(tiny_checkpoint: Maker, mode: str) -> None:
    twins, options = Twins(tiny_checkpoint, "MHA"), DECODINGS["one a step"]
    for refresh_steps in (1, 4, 6):
        commit, fill = (
            twins.run(Mix(fast(mode, None, start), 2, refresh_steps).cache, REQUEST, options)
            for start in ("commit", "fill")
        )
        assert same_bits(commit, fill)
        assert commit.stats.refreshes == fill.stats.refreshes
        assert fill.stats.passes == commit.stats.passes + options.blocks


EDGES = {
    "no prefix": (Shape(0, 9), Decoding(8, 8, 4)),
    "no prompt of its own": (Shape(9, 0), Decoding(8, 8, 4)),
    "one token of each": (Shape(1, 1), Decoding(1, 1, 1)),
    "one token in all": (Shape(1, 0), Decoding(2, 2, 1)),
    "a long prefix": (Shape(90, 3), Decoding(4, 4, 2)),
}


@pytest.mark.parametrize("edge", EDGES)
@pytest.mark.parametrize("kind", KINDS)
def test_edges(tiny_checkpoint: Maker, kind: str, edge: str) -> None:
    twins, (s, options) = Twins(tiny_checkpoint, kind), EDGES[edge]
    p = min(s.p, s.p + s.u - twins.model.shift)
    for rest in RESTS.values():
        for mix in (Mix(rest, 2, 3), Mix(rest, LAYERS)):
            if p == 0:  # nothing is shared: the other policy speaks for all rows
                a, b = (twins.run(cache, s, options) for cache in (mix.cache, rest))
                assert same_bits(a, b) and a.stats.rows_per_layer == b.stats.rows_per_layer
                assert a.stats.prefix_hit is None
                continue
            twins.llm.clear_prefixes()
            steps, output = twins.steps(mix.cache, s, options)
            error, count = twins.error(mix.loop(twins, s), steps)
            assert error < BOUND and count > 0
            assert output.stats.rows_per_layer == spec_rows(mix, twins, s, steps)[0]
            assert output.stats.entry_rows_per_layer[0] == p


@pytest.mark.parametrize("kind", KINDS)
def test_a_batch_equals_each_alone_and_the_loops(tiny_checkpoint: Maker, kind: str) -> None:
    """Prompts and prefixes of different lengths and other policies for each, in one call."""
    twins, options = Twins(tiny_checkpoint, kind), Decoding(12, 12, 4)
    rests, depths = list(RESTS.values()), [2, 3, LAYERS, 1, 0, 2, 1]
    cases = [(Mix(rest, d, 3), Shape(0, 0)) for rest, d in zip(rests, depths, strict=True)]
    lengths = [(19, 4), (19, 11), (7, 1), (40, 2), (3, 30), (19, 7), (1, 5)]
    cases = [(mix, Shape(p, u)) for (mix, _), (p, u) in zip(cases, lengths, strict=True)]
    cases.append((Mix("none", 2, 3), Shape(19, 3)))
    twins.llm.clear_prefixes()
    batch = twins.llm.generate(
        [twins.own(s).numpy() for _, s in cases] + [twins.own(Shape(0, 6)).numpy()] * 3,
        prefix=[*(twins.prefix(s).numpy() for _, s in cases), None, None, None],
        cache=[*(mix.cache for mix, _ in cases), "none", rests[0], rests[3]],
        gen_length=12,
        block_length=4,
    )
    compared = 0
    for (mix, s), output in zip(cases, batch, strict=False):
        alone = twins.run(mix.cache, s, options)
        assert same_bits(output, alone)
        assert output.stats.rows_per_layer == alone.stats.rows_per_layer
        if mix.rest == "none":
            continue
        trace = twins.trace(mix.loop(twins, s), s, options)
        if trace.margin > 10 * BOUND:
            check_output(output, trace)
            compared += 1
    assert compared >= 4
    for cache, output in zip(("none", rests[0], rests[3]), batch[-3:], strict=True):
        assert same_bits(output, twins.run(cache, Shape(0, 6), options))


@pytest.mark.parametrize("kind", KINDS)
def test_the_shared_rows_of_the_oracle_are_bicaches(tiny_checkpoint: Maker, kind: str) -> None:
    """With all other rows run at every step, the loops are those of plain BiCache and naive."""
    twins, options = Twins(tiny_checkpoint, kind), Decoding(9, 9, 9)
    s = REQUEST
    steps, _ = twins.steps("none", s, options)
    prefix = twins.prefix(s)
    for mix in mixes(fast("dual", 1)):
        model = twins.model
        plain = (
            BiCache(model, prefix, mix.depth, mix.refresh_steps, mix.splice)
            if mix.refresh_steps
            else Naive(model, prefix)
        )
        loop = mix.loop(twins, s)
        for step in steps:
            torch.testing.assert_close(
                loop(step.canvas, step.block)[step.asked],
                plain(step.canvas)[step.asked],
                rtol=0,
                atol=1e-10,
            )


# ---- the oracle could not be mistaken for another method ----------------------------------------


class FollowsTheRest(SharedPrefix):
    """Refreshes when the other method does: at its prompt interval or block length, both 6."""

    def begin(self, step: int) -> None:
        self.refresh_steps = 6
        super().begin(step)


class NeverAgain(SharedPrefix):
    def begin(self, step: int) -> None:
        super().begin(step)
        self.refresh = step == 0


class NothingIsLent(SharedPrefix):
    def __init__(self, model: Any, prefix: Any, depth: int, *settings: Any) -> None:
        super().__init__(model, prefix, 0, *settings)


class Deeper(SharedPrefix):
    def __init__(self, model: Any, prefix: Any, depth: int, *settings: Any) -> None:
        super().__init__(model, prefix, depth + 1, *settings)


class LateBoundary(SharedPrefix):
    """The shared rows rejoin with the next layer's state."""

    def __init__(self, *settings: Any) -> None:
        super().__init__(*settings)
        self.boundary = self.model.full(settings[1])[2][self.cut]


MUTANTS = [FollowsTheRest, NeverAgain, NothingIsLent, Deeper, LateBoundary]


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda m: m.__name__)
@pytest.mark.parametrize("rest", [dllm(6, 4, 0.3), fast("dual"), fast("prefix")])
def test_another_loop_breaks_the_bound(
    tiny_checkpoint: Maker, mutant: type[SharedPrefix], rest: str
) -> None:
    twins, options = Twins(tiny_checkpoint, "QK-norm, bf16"), DECODINGS["one a step"]
    mix, s = Mix(rest, 1, 4), REQUEST
    steps, _ = twins.steps(mix.cache, s, options)
    error, count = twins.error(mix.loop(twins, s), steps)
    assert error < BOUND and count > 6
    other = mutant(twins.model, twins.prefix(s), mix.depth, 4, mix.splice)
    assert twins.error(mix.loop(twins, s, other), steps[:count])[0] > 10 * BOUND
    # Nor is it either policy by itself.
    for alone in (Mix("none", 1, 4).cache, rest):
        assert not same_bits(twins.run(mix.cache, s, options), twins.run(alone, s, options))
