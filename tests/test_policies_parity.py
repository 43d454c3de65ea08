"""Cache policies against transcriptions of the published loops, and what must hold bit for bit."""

import itertools
from collections.abc import Callable, Iterator
from dataclasses import asdict
from typing import Any

import bicache
import numpy as np
import pytest
import torch
from bicache import _core
from numpy.typing import NDArray
from parity import CONFIDENCE, Maker, check_output, clear_cases, reference_trace, same_bits
from parity import tokens as random_tokens
from reference import BiCache, Llada, Logits, Naive, NoCache, Options, Trace
from torch import Tensor

LAYERS = 4
MODEL = {
    "layers": LAYERS,
    "dim": 32,
    "heads": 4,
    "kv_heads": 2,
    "ffn": 48,
    "vocab": 41,
    "scale": 5.0,
}
KINDS = {"plain": {}, "shift": {"shift": True}, "qk_norm, bf16": {"qk_norm": True, "dtype": "bf16"}}
PREFIX, OWN = 13, 4
LONG = 90  # more rows than the engine takes in one tile or block of keys
# Refresh steps, and a generation in which they matter: every step; not a divisor of the steps; two
# refreshes, in different blocks.
REFRESHES = {1: Options(6, 6, 3), 3: Options(8, 8, 8), 16: Options(18, 18, 9)}
SPLICES = ("official", "strict")


def cache_string(depth: int, refresh_steps: int, splice: str) -> str:
    return f"bicache:depth={depth},refresh_steps={refresh_steps},splice={splice}"


def splice_layer(depth: int, splice: str) -> int:
    """First layer in which prefix rows run at a refresh."""
    return max(0, depth - (splice == "strict"))


def spec_rows(n: int, p: int, steps: int, depth: int, refresh_steps: int, splice: str) -> list[int]:
    """Rows per layer, summed over the steps: n - p of them always; the prefix in layers from the
    splice on at every refresh (cost model of the paper's linear part)."""
    refreshes = len(range(0, steps, refresh_steps))
    cut = splice_layer(depth, splice)
    return [steps * (n - p) + (refreshes * p if layer >= cut else 0) for layer in range(LAYERS)]


class Case:
    """One engine and the reference of the same checkpoint; requests are made from seeds."""

    def __init__(
        self, tiny_checkpoint: Maker, kind: str, p: int = PREFIX, **settings: object
    ) -> None:
        self.p = p
        folder = tiny_checkpoint(**MODEL, **KINDS[kind], seed=31)
        self.model = Llada(folder)
        # In f32 whatever is stored: rounded activations would blur what the loops are about.
        self.llm = bicache.LLM(folder, **({"threads": 1, "dtype": "f32"} | settings))

    def prefix(self, seed: int) -> Tensor:
        return random_tokens(self.p, self.model, seed)

    def own(self, seed: int, count: int = OWN) -> Tensor:
        return random_tokens(count, self.model, 1000 + seed)

    def trace(self, loop: Callable[[Tensor], Logits], options: Options, seed: int) -> Trace:
        prompt = torch.cat([self.prefix(seed), self.own(seed)])
        return reference_trace(loop(self.prefix(seed)), self.model, prompt, options, seed)

    def run(
        self, cache: str, options: Options, seed: int, own_seed: int | None = None
    ) -> bicache.Output:
        own = self.own(seed if own_seed is None else own_seed)
        (output,) = self.llm.generate(
            [own.numpy()],
            prefix=self.prefix(seed).numpy(),
            cache=cache,
            seed=seed,
            **asdict(options),
        )
        return output


@pytest.mark.parametrize("splice", SPLICES)
@pytest.mark.parametrize("refresh_steps", REFRESHES)
@pytest.mark.parametrize("depth", range(LAYERS + 1))
@pytest.mark.parametrize("kind", KINDS)
def test_bicache_equals_the_published_loop(
    tiny_checkpoint: Maker, kind: str, depth: int, refresh_steps: int, splice: str
) -> None:
    case, options = Case(tiny_checkpoint, kind), REFRESHES[refresh_steps]
    loops: list[BiCache] = []

    def loop(prefix: Tensor) -> BiCache:
        loops.append(BiCache(case.model, prefix, depth, refresh_steps, splice))
        return loops[-1]

    cut = splice_layer(depth, splice)
    for seed, trace in clear_cases(lambda seed: case.trace(loop, options, seed), count=1):
        first, second = (
            case.run(cache_string(depth, refresh_steps, splice), options, seed) for _ in range(2)
        )
        check_output(first, trace)
        n = PREFIX + OWN + options.gen_length
        rows = spec_rows(n, PREFIX, options.steps, depth, refresh_steps, splice)
        assert [sum(layer) for layer in zip(*loops[-1].rows, strict=True)] == rows
        for output in (first, second):
            assert list(output.stats.rows_per_layer) == rows
            assert output.stats.depth == depth
            # With the prefix reused in all layers, no pass recomputes any of its rows.
            refreshes = len(range(0, options.steps, refresh_steps)) if cut < LAYERS else 0
            assert output.stats.refreshes == refreshes
            assert set(output.stats.value_rows_per_layer) == {0}
        # The entry: the prefix alone, through the layers whose state it keeps; found later on.
        assert first.stats.entry_rows_per_layer == (PREFIX,) * cut + (0,) * (LAYERS - cut)
        assert second.stats.entry_rows_per_layer == (0,) * LAYERS
        assert (first.stats.prefix_hit, second.stats.prefix_hit) == (
            (None, None) if cut == 0 else (False, True)
        )
        assert same_bits(first, second)


@pytest.mark.parametrize("kind", KINDS)
def test_bicache_with_noise(tiny_checkpoint: Maker, kind: str) -> None:
    case = Case(tiny_checkpoint, kind)
    options = Options(12, 9, 4, temperature=0.6, remasking="random")

    def loop(prefix: Tensor) -> BiCache:
        return BiCache(case.model, prefix, 2, 4, "official")

    for seed, trace in clear_cases(lambda seed: case.trace(loop, options, seed), count=3):
        check_output(case.run(cache_string(2, 4, "official"), options, seed), trace)


@pytest.mark.parametrize("kind", KINDS)
def test_naive_alone_equals_the_transcription(tiny_checkpoint: Maker, kind: str) -> None:
    case, options = Case(tiny_checkpoint, kind), Options(8, 8, 8)

    def trace_of(seed: int) -> Trace:
        return case.trace(lambda prefix: Naive(case.model, prefix), options, seed)

    for seed, trace in clear_cases(trace_of, count=3):
        output = case.run("naive", options, seed)
        check_output(output, trace)
        check_naive_rows(output, entry_rows=PREFIX)
        assert output.stats.prefix_hit is False
        assert case.run("naive:source=alone", options, seed).stats.prefix_hit is True


def check_naive_rows(output: bicache.Output, entry_rows: int) -> None:
    steps, suffix = output.stats.steps, OWN + len(output.tokens)
    assert output.stats.rows_per_layer == (steps * suffix,) * LAYERS
    assert output.stats.entry_rows_per_layer == (entry_rows,) * LAYERS
    assert output.stats.depth == LAYERS


@pytest.mark.parametrize("kind", KINDS)
def test_naive_first_request_equals_the_transcription(tiny_checkpoint: Maker, kind: str) -> None:
    """Both the request that makes the entry and a later one, which reads the other's question."""
    case, options = Case(tiny_checkpoint, kind), Options(8, 8, 8)

    def canvas(seed: int, own: Tensor) -> Tensor:
        return torch.cat(
            [case.prefix(seed), own, torch.full((options.gen_length,), case.model.mask)]
        )

    def traces(seed: int) -> tuple[Trace, Trace]:
        owns = case.own(seed), case.own(seed + 500)
        first = canvas(seed, owns[0])
        return tuple(
            reference_trace(
                Naive(case.model, case.prefix(seed), first),
                case.model,
                torch.cat([case.prefix(seed), own]),
                options,
                seed,
            )
            for own in owns
        )

    def least_clear(seed: int) -> Trace:
        return min(traces(seed), key=lambda trace: trace.margin)

    for seed, _ in clear_cases(least_clear, count=3):
        first, second = traces(seed)
        outputs = [
            case.run("naive:source=first_request", options, seed, own_seed=own)
            for own in (seed, seed + 500)
        ]
        check_output(outputs[0], first)
        check_output(outputs[1], second)
        check_naive_rows(outputs[0], entry_rows=PREFIX + OWN + options.gen_length)
        check_naive_rows(outputs[1], entry_rows=0)
        assert [o.stats.prefix_hit for o in outputs] == [False, True]
        # Not the entry of source=alone, and not one that this request would have made itself.
        alone = case.run("naive:source=alone", options, seed)
        assert alone.stats.prefix_hit is False and not same_bits(alone, outputs[0])
        case.llm.clear_prefixes()
        own = case.run("naive:source=first_request", options, seed, own_seed=seed + 500)
        assert not same_bits(own, outputs[1])


def test_settings_differ(tiny_checkpoint: Maker) -> None:
    """The parity tests could not mistake one setting for another: by the reference alone, settings
    that are not equal by theory give different results."""
    case, options = Case(tiny_checkpoint, "plain"), Options(8, 8, 8)
    traces: dict[tuple[int, int], Trace] = {}
    for depth, refresh_steps, splice in itertools.product(range(LAYERS + 1), (1, 3, 16), SPLICES):
        cut = min(splice_layer(depth, splice), LAYERS - 1)
        # With the prefix stale up to the last layer nothing is left to refresh.
        key = cut, 1 if cut == LAYERS - 1 else refresh_steps
        trace = case.trace(
            lambda prefix, d=depth, t=refresh_steps, s=splice: BiCache(case.model, prefix, d, t, s),
            options,
            seed=0,
        )
        if key in traces:
            assert traces[key].tokens.tolist() == trace.tokens.tolist()
            torch.testing.assert_close(traces[key].confidences, trace.confidences)
        traces[key] = trace
    assert len(traces) == 3 * (LAYERS - 1) + 1
    for a, b in itertools.combinations(traces, 2):
        gap = (traces[a].confidences - traces[b].confidences).abs().max()
        assert gap > 10 * CONFIDENCE, (a, b)


@pytest.mark.parametrize("kind", KINDS)
def test_official_is_strict_one_deeper(tiny_checkpoint: Maker, kind: str) -> None:
    case = Case(tiny_checkpoint, kind)
    options = Options(8, 8, 4, temperature=0.4)
    for depth, refresh_steps in itertools.product(range(LAYERS), (1, 3)):
        official = case.run(cache_string(depth, refresh_steps, "official"), options, 0)
        strict = case.run(cache_string(depth + 1, refresh_steps, "strict"), options, 0)
        assert same_bits(official, strict), (depth, refresh_steps)


@pytest.mark.parametrize("kind", KINDS)
def test_equal_by_theory(tiny_checkpoint: Maker, kind: str) -> None:
    """official(L), official(L - 1) and naive: the same K/V, computed in different places."""
    case, options = Case(tiny_checkpoint, kind), Options(8, 8, 4)
    naive = case.run("naive", options, 0)
    for depth, refresh_steps in itertools.product((LAYERS - 1, LAYERS), (1, 3, 100)):
        assert same_bits(
            case.run(cache_string(depth, refresh_steps, "official"), options, 0), naive
        )


def identity_settings() -> list[str]:
    return [row["identity"] for row in _core.policy_table() if row["identity"]]


def test_policies_with_an_identity() -> None:
    assert {"none", cache_string(1, 1, "strict")} <= set(identity_settings())


@pytest.mark.parametrize("dtype", ["f32", "bf16", "int8", "int4"])
@pytest.mark.parametrize("kind", ["plain", "shift"])
@pytest.mark.parametrize("cache", identity_settings())
def test_identity_settings_equal_none(
    tiny_checkpoint: Maker, cache: str, kind: str, dtype: str
) -> None:
    case = Case(tiny_checkpoint, kind, dtype=dtype)
    assert case.llm.kv_dtype == ("f32" if dtype == "f32" else "bf16")
    for seed, options in enumerate(
        [Options(8, 8, 8), Options(12, 9, 4, temperature=0.6), Options(6, 3, 6, remasking="random")]
    ):
        plain, cached = (case.run(name, options, seed) for name in ("none", cache))
        assert same_bits(plain, cached)
        assert plain.stats.rows_per_layer == cached.stats.rows_per_layer
        assert plain.stats.prefix_hit is None and plain.stats.depth == -1


@pytest.mark.parametrize("kind", KINDS)
def test_a_long_prefix(tiny_checkpoint: Maker, kind: str) -> None:
    """Parity and equal bits where rows and keys do not fit one tile or block."""
    case, options = Case(tiny_checkpoint, kind, LONG), Options(6, 6, 6)

    def loop(prefix: Tensor) -> BiCache:
        return BiCache(case.model, prefix, 2, 3, "official")

    for seed, trace in clear_cases(lambda seed: case.trace(loop, options, seed), count=1):
        output = case.run(cache_string(2, 3, "official"), options, seed)
        check_output(output, trace)
        rows = spec_rows(LONG + OWN + 6, LONG, 6, 2, 3, "official")
        assert list(output.stats.rows_per_layer) == rows
    for a, b in [
        ("none", cache_string(1, 1, "strict")),
        (cache_string(1, 3, "official"), cache_string(2, 3, "strict")),
        (cache_string(LAYERS - 1, 3, "official"), "naive"),
    ]:
        assert same_bits(case.run(a, options, 0), case.run(b, options, 0)), (a, b)


def test_no_cache_recomputes_everything(tiny_checkpoint: Maker) -> None:
    case, options = Case(tiny_checkpoint, "plain"), Options(8, 8, 4)
    loop = NoCache(case.model)
    case.trace(lambda _: loop, options, 0)
    rows = [sum(layer) for layer in zip(*loop.rows, strict=True)]
    assert rows == [8 * (PREFIX + OWN + 8)] * LAYERS
    assert list(case.run("none", options, 0).stats.rows_per_layer) == rows


Request = tuple[NDArray[np.int32], int, dict[str, Any], _core.Policy, str, None, None]


def mixed_requests(model: Llada) -> list[Request]:
    """Requests of different lengths, prefixes, options and policies; some share a prefix."""
    shared, other = (random_tokens(count, model, 7) for count in (PREFIX, LONG))
    plan: list[tuple[Tensor | None, int, tuple[int, int, int], float, str]] = [
        (shared, 4, (8, 8, 8), 0.0, cache_string(2, 3, "official")),
        (shared, 9, (12, 6, 4), 0.7, cache_string(3, 1, "strict")),
        (None, 5, (6, 6, 3), 0.0, "none"),
        (other, 1, (16, 4, 16), 0.0, cache_string(1, 2, "official")),
        (other, 0, (4, 4, 2), 1.5, cache_string(4, 16, "official")),
        (shared, 2, (10, 10, 5), 0.0, "naive"),
        (other, 7, (3, 3, 3), 0.0, "naive:source=first_request"),
        (shared, 3, (1, 1, 1), 0.0, cache_string(0, 2, "official")),
        (None, 1, (20, 5, 20), 0.0, cache_string(2, 3, "official")),
    ]
    requests: list[Request] = []
    for i, (prefix, own, (gen_length, steps, block_length), temperature, cache) in enumerate(plan):
        options = {
            "gen_length": gen_length,
            "steps": steps,
            "block_length": block_length,
            "temperature": temperature,
            "seed": i,
        }
        head = torch.empty(0, dtype=torch.int64) if prefix is None else prefix
        ids = torch.cat([head, random_tokens(own, model, i)]).numpy().astype(np.int32)
        policy = _core.make_policy(cache)
        requests.append((ids, len(head), options, policy, "", None, None))
    return requests


def results_of(engine: _core.Engine, requests: list[Request], **settings: int) -> list[Any]:
    generation = engine.start(requests, **settings)
    while not generation.done:
        generation.step()
    return generation.results()


@pytest.mark.parametrize("kind", KINDS)
def test_a_batch_equals_each_alone(tiny_checkpoint: Maker, kind: str) -> None:
    model = Case(tiny_checkpoint, kind).model
    folder = tiny_checkpoint(**MODEL, **KINDS[kind], seed=31)
    requests = mixed_requests(model)
    alone = []
    for request in requests:
        alone += results_of(_core.Engine(str(folder), threads=1), [request])
    assert len({len(r.tokens) for r in alone}) > 5

    def orders() -> Iterator[tuple[int, list[int]]]:
        count = len(requests)
        yield 4096, list(range(count))
        yield 4096, list(reversed(range(count)))
        yield 60, list(range(count))  # rows in a pass: requests come and go
        yield 1, list(range(count))  # one by one

    for threads, (batch_rows, order) in itertools.product((1, 2), orders()):
        engine = _core.Engine(str(folder), threads=threads)
        batch = results_of(engine, [requests[i] for i in order], batch_rows=batch_rows)
        for i, result in zip(order, batch, strict=True):
            assert same_bits(result, alone[i]), (threads, batch_rows, i)
            rows = result.stats["rows_per_layer"].tolist()
            assert rows == alone[i].stats["rows_per_layer"].tolist()


def test_a_request_twice_in_a_batch(tiny_checkpoint: Maker) -> None:
    case = Case(tiny_checkpoint, "plain")
    requests = mixed_requests(case.model)[:2] * 2
    a, b, c, d = results_of(case.llm._engine, requests)
    assert same_bits(a, c) and same_bits(b, d)
    assert [r.stats["prefix_hit"] for r in (a, c)] == [False, True]


@pytest.mark.parametrize("kind", KINDS)
def test_entries_are_not_changed_by_requests(tiny_checkpoint: Maker, kind: str) -> None:
    case, options = Case(tiny_checkpoint, kind), Options(8, 8, 4)
    caches = [cache_string(2, 3, "official"), "naive", cache_string(2, 1, "strict")]
    before = [case.run(cache, options, 0) for cache in caches]
    assert case.llm.prefix_stats()["entries"] == 1
    for own_seed, cache in itertools.product(
        (5, 6), [*caches, cache_string(1, 2, "official"), cache_string(3, 16, "official"), "none"]
    ):
        case.run(cache, options, 0, own_seed=own_seed)
        case.run(cache, options, 1, own_seed=own_seed)  # of another prefix
    again = [case.run(cache, options, 0) for cache in caches]
    assert all(output.stats.prefix_hit for output in again)
    assert all(same_bits(a, b) for a, b in zip(before, again, strict=True))
    fresh = Case(tiny_checkpoint, kind)
    for cache, output in zip(caches, before, strict=True):
        fresh.llm.clear_prefixes()
        assert same_bits(fresh.run(cache, options, 0), output), "depends on who made the entry"


def test_another_prefix_is_a_miss(tiny_checkpoint: Maker) -> None:
    """Exact matches only: neither one token more, nor less, nor different finds the entry."""
    case = Case(tiny_checkpoint, "plain")
    ids = case.prefix(0).tolist()
    other = ids[:-1] + [ids[-1] % (case.model.vocab - 4) + 4]
    assert other != ids
    for prefix, hit in [(ids, False), (ids[:-1], False), (other, False), (ids + [5], False)] + [
        (ids, True),
        (other, True),
    ]:
        (output,) = case.llm.generate(
            [[7, 8]], prefix=prefix, cache="bicache:depth=2", gen_length=2
        )
        assert output.stats.prefix_hit is hit, prefix


@pytest.mark.parametrize("own", [0, 1, 3])
@pytest.mark.parametrize("kind", ["plain", "shift"])
def test_a_shifted_model_keeps_the_last_prompt_token_out_of_the_prefix(
    tiny_checkpoint: Maker, kind: str, own: int
) -> None:
    """Its first response token is predicted from that row, so this request must compute it."""
    case, options = Case(tiny_checkpoint, kind), Options(6, 6, 6)
    p = PREFIX - 1 if kind == "shift" and own == 0 else PREFIX

    def prompt(seed: int) -> Tensor:
        return torch.cat([case.prefix(seed), case.own(seed, own)])

    for cache, loop in [
        ("naive", lambda prefix: Naive(case.model, prefix)),
        (cache_string(2, 2, "official"), lambda x: BiCache(case.model, x, 2, 2, "official")),
    ]:

        def trace_of(seed: int, loop: Callable[[Tensor], Logits] = loop) -> Trace:
            ids = prompt(seed)
            return reference_trace(loop(ids[:p]), case.model, ids, options, seed)

        for seed, trace in clear_cases(trace_of, count=2):
            case.llm.clear_prefixes()
            (output,) = case.llm.generate(
                [case.own(seed, own).numpy()],
                prefix=case.prefix(seed).numpy(),
                cache=cache,
                **asdict(options),
            )
            check_output(output, trace)
            suffix = PREFIX + own + options.gen_length - p
            assert output.stats.rows_per_layer[0] == options.steps * suffix
            assert output.stats.entry_rows_per_layer[0] == p


def test_one_prompt_token_on_a_shifted_model(tiny_checkpoint: Maker) -> None:
    """It is the last prompt token, so no prefix is left."""
    case, options = Case(tiny_checkpoint, "shift"), Options(4, 4, 4)
    one, plain = (
        case.llm.generate([[]], prefix=[9], cache=cache, **asdict(options))[0]
        for cache in (cache_string(2, 2, "official"), "none")
    )
    assert same_bits(one, plain) and one.stats.prefix_hit is None


def test_depth_table_is_read_at_the_ratio_with_masks(tiny_checkpoint: Maker) -> None:
    """r = round(100 p / (p + u + g)), half to even; below the table nothing is reused."""
    case = Case(tiny_checkpoint, "plain")
    cache = "bicache:depth=20:1/62:2/63:3,refresh_steps=2"
    for p, u, g, depth in [
        (5, 1, 2, 2),  # 62.5 -> 62
        (7, 1, 3, 3),  # 63.6 -> 64
        (13, 4, 4, 2),  # 61.9 -> 62
        (13, 5, 4, 1),  # 59.1 -> 59
        (1, 1, 3, 1),  # 20
        (3, 9, 4, 0),  # 18.75 -> 19
    ]:
        prefix, own = random_tokens(p, case.model, 3), random_tokens(u, case.model, 4)
        by_table, fixed = (
            case.llm.generate([own.numpy()], prefix=prefix.numpy(), cache=name, gen_length=g)[0]
            for name in (cache, cache_string(depth, 2, "official"))
        )
        assert by_table.stats.depth == depth, (p, u, g)
        assert same_bits(by_table, fixed)
