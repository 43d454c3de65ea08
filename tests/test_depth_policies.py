"""Depth policies and refresh rules at work: hooks, probes, drift, and what they may not change."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import bicache
import numpy as np
import pytest
from bicache import BiCache, DepthPolicy, RequestInfo
from conftest import refuses

LAYERS = 5
PREFIX = list(range(4, 24))
PROMPT = [30, 31, 32]
OPTIONS = {"gen_length": 12, "steps": 12, "block_length": 4}
N = len(PREFIX) + len(PROMPT) + 12


@pytest.fixture(scope="module")
def llm(tiny_checkpoint: Callable[..., Path]) -> bicache.LLM:
    return bicache.LLM(tiny_checkpoint(layers=LAYERS, scale=4.0), threads=1)


def run(llm: bicache.LLM, cache: Any, **options: Any) -> bicache.Output:
    llm.clear_prefixes()
    (output,) = llm.generate([PROMPT], prefix=PREFIX, cache=cache, **(OPTIONS | options))
    return output


def rows_at(depths: list[int]) -> list[int]:
    """Rows per layer: the suffix at every step, the prefix in layers >= its depth at refreshes."""
    rows = [12 * (N - len(PREFIX))] * LAYERS
    for depth in depths:  # one per refresh
        for layer in range(depth, LAYERS):
            rows[layer] += len(PREFIX)
    return rows


# ---- hooks


def test_a_function_sees_the_request_and_chooses(llm: bicache.LLM) -> None:
    seen: list[tuple[Any, ...]] = []

    def depth(info: RequestInfo) -> int:
        seen.append((info.p, info.u, info.g, info.n, info.layers, info.ratio, info.step))
        seen.append((info.depth, info.drift))
        return [1, 4, 0][info.step // 5]

    output = run(llm, BiCache(depth=depth, refresh_steps=5))
    request = (len(PREFIX), 3, 12, N, LAYERS, round(100 * len(PREFIX) / N))
    assert seen == [
        (*request, 0), (-1, None), (*request, 5), (1, None), (*request, 10), (4, None),
    ]  # fmt: skip
    assert output.stats.depths == (1, 4, 0)
    assert output.stats.depth == 0
    assert output.stats.depth_reason == "hook"
    assert list(output.stats.rows_per_layer) == rows_at([1, 4, 0])


def test_a_constant_function_equals_a_number(llm: bicache.LLM) -> None:
    for depth in range(LAYERS + 1):
        for splice in ("official", "strict"):
            number = run(llm, BiCache(depth=depth, refresh_steps=4, splice=splice))
            hook = run(llm, BiCache(depth=lambda _, b=depth: b, refresh_steps=4, splice=splice))
            assert hook.tokens.tobytes() == number.tokens.tobytes()
            assert hook.confidences.tobytes() == number.confidences.tobytes()
            assert hook.stats.rows_per_layer == number.stats.rows_per_layer


def test_a_class_declares_what_it_may_choose(llm: bicache.LLM) -> None:
    class TwoOrFour(DepthPolicy):
        def depth(self, info: RequestInfo) -> int:
            return 2 if info.step == 0 else 4

        def reachable(self, layers: int) -> list[int]:
            assert layers == LAYERS
            return [2, 4]

    run(llm, BiCache(depth=TwoOrFour(), refresh_steps=6))
    width = llm.config.kv_heads * llm.config.head_dim
    dim = llm.config.dim
    per_row = 4 * (4 * 2 * width + 2 * dim) + 4  # K/V of layers 0..3, states entering 2 and 4, id
    assert llm.prefix_stats()["size_bytes"] == len(PREFIX) * per_row
    run(llm, BiCache(depth=lambda info: 2))  # may choose any: everything is kept
    per_row = 4 * (LAYERS * 2 * width + (LAYERS - 1) * dim) + 4
    assert llm.prefix_stats()["size_bytes"] == len(PREFIX) * per_row


def test_a_class_that_observes_gets_the_drift(llm: bicache.LLM) -> None:
    class Watch(DepthPolicy):
        observes = True

        def __init__(self) -> None:
            self.drifts: list[tuple[float, ...] | None] = []

        def depth(self, info: RequestInfo) -> int:
            self.drifts.append(info.drift)
            return 2

    watch = Watch()
    output = run(llm, BiCache(depth=watch, refresh_steps=4))
    plain = run(llm, BiCache(depth=2, refresh_steps=4))
    assert output.tokens.tobytes() == plain.tokens.tobytes()
    assert output.confidences.tobytes() == plain.confidences.tobytes()
    assert watch.drifts[0] is None
    for drift in watch.drifts[1:]:
        assert drift is not None and len(drift) == LAYERS
        assert drift[0] == pytest.approx(0, abs=1e-6)  # layer 0 sees the embeddings alone
        assert max(drift) > 1e-3
    # 3 refreshes observed 8 rows in every layer: counted
    extra = np.subtract(output.stats.rows_per_layer, plain.stats.rows_per_layer)
    assert extra.tolist() == [3 * 8] * LAYERS


@pytest.mark.parametrize(
    ("depth", "error", "message"),
    [
        (lambda info: "2", TypeError, "expected an int, got '2'"),
        (lambda info: True, TypeError, "expected an int, got True"),
        (lambda info: 2.0, TypeError, "expected an int, got 2.0"),
        (lambda info: None, TypeError, "expected an int, got None"),
        (lambda info: LAYERS + 1, ValueError, f"expected 0..{LAYERS}"),
        (lambda info: -1, ValueError, "expected one of 0, 1, 2, 3, 4, 5, got -1"),
        (lambda info: 10**30, ValueError, f"expected 0..{LAYERS}"),
        (lambda info: 1 // 0, ZeroDivisionError, "division"),
        (lambda: 1, TypeError, "positional argument"),
    ],
)
def test_what_a_hook_does_wrong_ends_the_generation_cleanly(
    llm: bicache.LLM, depth: Any, error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message.replace("..", r"\.\.")):
        run(llm, BiCache(depth=depth))
    assert run(llm, "none").finish_reason in ("eos", "length")  # the model goes on


def test_a_hook_may_return_a_numpy_integer(llm: bicache.LLM) -> None:
    assert run(llm, BiCache(depth=lambda info: np.int64(3))).stats.depth == 3


def test_what_a_class_did_not_declare_is_refused(llm: bicache.LLM) -> None:
    class Wrong(DepthPolicy):
        def depth(self, info: RequestInfo) -> int:
            return 3

        def reachable(self, layers: int) -> list[int]:
            return [1, 2]

    with refuses(ValueError, "depth hook", "one of 1, 2", "got 3"):
        run(llm, BiCache(depth=Wrong()))
    Wrong.reachable = lambda self, layers: [layers + 1]  # type: ignore[method-assign]
    with refuses(ValueError, "reachable", f"0..{LAYERS}"):
        run(llm, BiCache(depth=Wrong()))
    Wrong.reachable = lambda self, layers: 5  # type: ignore[assignment,method-assign]
    with refuses(TypeError, "reachable", "got int"):
        run(llm, BiCache(depth=Wrong()))
    Wrong.reachable = lambda self, layers: []  # type: ignore[method-assign]
    with refuses(ValueError, "reachable", "got none"):
        run(llm, BiCache(depth=Wrong()))


def test_a_hook_cannot_call_the_model_it_serves(llm: bicache.LLM) -> None:
    with pytest.raises(RuntimeError, match="expected none into the same model"):
        run(llm, BiCache(depth=lambda info: len(llm.generate([[5]]))))


def test_each_request_of_a_batch_has_its_own_depth(llm: bicache.LLM) -> None:
    cache = BiCache(depth=lambda info: info.u % 5, refresh_steps=3)
    prompts = [[30] * u for u in range(1, 6)]
    together = llm.generate(prompts, prefix=PREFIX, cache=cache, **OPTIONS)
    for prompt, output in zip(prompts, together, strict=True):
        (alone,) = llm.generate(
            [prompt], prefix=PREFIX, cache=BiCache(depth=len(prompt) % 5, refresh_steps=3),
            **OPTIONS,
        )  # fmt: skip
        assert output.stats.depth == len(prompt) % 5
        assert output.tokens.tobytes() == alone.tokens.tobytes()


def test_hooks_in_several_threads(llm: bicache.LLM) -> None:
    want = run(llm, BiCache(depth=2)).tokens.tolist()
    got: list[list[int]] = []

    def work() -> None:
        for _ in range(5):
            (output,) = llm.generate(
                [PROMPT], prefix=PREFIX, cache=BiCache(depth=lambda info: 2), **OPTIONS
            )
            got.append(output.tokens.tolist())

    threads = [threading.Thread(target=work) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert got == [want] * 15


# ---- probe


def test_the_probe_starts_safe_then_follows_what_it_measures(llm: bicache.LLM) -> None:
    """Similarities as a hook sees them predict what the probe chooses at every refresh."""
    chosen = set()
    for tau in (0.5, 0.7, 0.8, 0.9, 0.98):

        class Mirror(DepthPolicy):
            observes = True

            def depth(self, info: RequestInfo, tau: float = tau) -> int:
                if info.drift is None:
                    return 0
                state = info.state_drift
                assert state is not None and np.isnan(state[0]) and not np.isnan(state[1:]).any()
                alike = [1 - d > tau for d in info.drift]
                behind = [1 - d > tau for d in state[1:]] + [True]
                both = [a and b for a, b in zip(alike, behind, strict=True)]
                return both.index(False) if False in both else LAYERS

        mirror = run(llm, BiCache(depth=Mirror(), refresh_steps=3))
        probe = run(llm, BiCache(depth=f"probe:{tau}", refresh_steps=3))
        assert probe.stats.depths == mirror.stats.depths
        assert probe.stats.depths[0] == 0
        assert probe.tokens.tobytes() == mirror.tokens.tobytes()
        assert "probe: similarity" in probe.stats.depth_reason
        chosen |= set(probe.stats.depths)
    assert len(chosen) > 2


@pytest.mark.parametrize(("tau", "depth"), [(-1, LAYERS), (1, 0)])
def test_the_probe_at_its_ends(llm: bicache.LLM, tau: float, depth: int) -> None:
    assert run(llm, f"bicache:depth=probe:{tau},refresh_steps=4").stats.depths[1:] == (depth, depth)


def test_the_probe_does_not_depend_on_batch_or_threads(
    tiny_checkpoint: Callable[..., Path], llm: bicache.LLM
) -> None:
    cache = "bicache:depth=probe:0.95,refresh_steps=2"
    prompts = [[30 + i, 31, 32] for i in range(6)]
    together = llm.generate(prompts, prefix=PREFIX, cache=cache, **OPTIONS)
    threaded = bicache.LLM(llm.path, threads=3)
    for i, prompt in enumerate(prompts):
        (alone,) = threaded.generate([prompt], prefix=PREFIX, cache=cache, **OPTIONS)
        assert alone.tokens.tobytes() == together[i].tokens.tobytes()
        assert alone.stats.depths == together[i].stats.depths


# ---- refresh


def test_refresh_by_block_is_refresh_by_steps_of_a_block(llm: bicache.LLM) -> None:
    block = run(llm, BiCache(depth=2, refresh="block"))  # 3 blocks of 4 steps
    steps = run(llm, BiCache(depth=2, refresh_steps=4))
    assert block.tokens.tobytes() == steps.tokens.tobytes()
    assert block.stats.refreshes == steps.stats.refreshes == 3
    assert block.stats.rows_per_layer == steps.stats.rows_per_layer


def test_refresh_by_drift_at_its_ends(llm: bicache.LLM) -> None:
    always = run(llm, BiCache(depth=2, refresh="drift:0"))
    # a refresh needs a measurement, so at the earliest every second step
    assert always.stats.refreshes == 6
    never = run(llm, BiCache(depth=2, refresh="drift:2", refresh_steps=100))
    once = run(llm, BiCache(depth=2, refresh_steps=100))
    assert never.stats.refreshes == 1
    assert never.tokens.tobytes() == once.tokens.tobytes()
    extra = np.subtract(never.stats.rows_per_layer, once.stats.rows_per_layer)
    # observed at every other step, in the layers that a refresh would recompute
    assert extra.tolist() == [0, 0] + [11 * 8] * (LAYERS - 2)
    at_most = run(llm, BiCache(depth=2, refresh="drift:2", refresh_steps=4))
    assert at_most.stats.refreshes == 3


def test_refresh_by_drift_lies_between(llm: bicache.LLM) -> None:
    counts = [
        run(llm, BiCache(depth=1, refresh=f"drift:{limit}", refresh_steps=100)).stats.refreshes
        for limit in (0, 0.02, 0.1, 0.3, 2)
    ]
    assert counts == sorted(counts, reverse=True)
    assert len(set(counts)) > 2


# ---- what stands outside: the source of the entry


def test_the_first_requests_context_is_another_source(llm: bicache.LLM) -> None:
    options: dict[str, Any] = {"prefix": PREFIX, **OPTIONS}
    llm.clear_prefixes()
    first, second = llm.generate(
        [[30, 31], [40, 41]], cache="bicache:depth=4,source=first_request", **options
    )
    assert first.stats.prefix_hit is False and second.stats.prefix_hit is True
    llm.clear_prefixes()
    (alone,) = llm.generate([[40, 41]], cache="bicache:depth=4", **options)
    assert not np.array_equal(second.confidences, alone.confidences)
