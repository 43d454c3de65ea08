"""Shared prefixes across requests: salts, warming, discovery, half precision."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import bicache
import numpy as np
import pytest
from bicache import Discover, _core
from conftest import refuses

PREFIX = list(range(4, 36))
CACHE = "bicache:depth=2,refresh_steps=4"
OPTIONS = {"gen_length": 8, "steps": 8, "block_length": 4}


@pytest.fixture
def llm(tiny_checkpoint: Callable[..., Path]) -> bicache.LLM:
    return bicache.LLM(tiny_checkpoint(layers=4, scale=4.0), threads=1)


def run(llm: bicache.LLM, prompt: list[int], **settings: Any) -> bicache.Output:
    (output,) = llm.generate([prompt], **({"cache": CACHE} | OPTIONS | settings))
    return output


# ---- salts


def test_tenants_never_share(llm: bicache.LLM) -> None:
    hits = []
    for salt in ("a", "b", None, "a", "b", "", "A"):
        hits.append(run(llm, [40], prefix=PREFIX, cache_salt=salt).stats.prefix_hit)
    assert hits == [False, False, False, True, True, True, False]
    assert llm.prefix_stats()["entries"] == 4


def test_salts_do_not_change_answers(llm: bicache.LLM) -> None:
    a, b = (run(llm, [40, 41], prefix=PREFIX, cache_salt=salt) for salt in ("a", None))
    assert a.tokens.tobytes() == b.tokens.tobytes()


def test_the_first_request_of_another_tenant_does_not_leak(llm: bicache.LLM) -> None:
    """With source=first_request the entry holds the first request's context."""
    cache = "naive:source=first_request"
    alone = run(llm, [41], prefix=PREFIX, cache=cache)
    llm.clear_prefixes()
    run(llm, [40], prefix=PREFIX, cache=cache, cache_salt="a")
    other = run(llm, [41], prefix=PREFIX, cache=cache, cache_salt="b")
    assert other.confidences.tobytes() == alone.confidences.tobytes()


@pytest.mark.parametrize("salt", [1, b"a", ["a"]])
def test_wrong_salts(llm: bicache.LLM, salt: Any) -> None:
    with refuses(TypeError, "cache_salt", "string"):
        run(llm, [40], prefix=PREFIX, cache_salt=salt)
    with refuses(ValueError, "cache_salt", "surrogate"):
        run(llm, [40], prefix=PREFIX, cache_salt="\ud800")


# ---- warm


def test_a_warm_prefix_is_found_by_the_first_request(llm: bicache.LLM) -> None:
    assert llm.warm(PREFIX, cache=CACHE) is True
    assert llm.warm(PREFIX, cache=CACHE) is True  # already there
    assert llm.prefix_stats()["entries"] == 1
    first = run(llm, [40], prefix=PREFIX)
    assert first.stats.prefix_hit is True
    assert set(first.stats.entry_rows_per_layer) == {0}
    assert run(llm, [40], prefix=PREFIX, cache_salt="b").stats.prefix_hit is False
    # a deeper policy needs more than that
    assert run(llm, [40], prefix=PREFIX, cache="bicache:depth=3").stats.prefix_hit is False


def test_what_a_table_may_read_is_warmed(llm: bicache.LLM) -> None:
    llm.warm(PREFIX, cache="bicache:depth=0:0/30:1/60:3/90:0")
    for prompt in ([40], [40] * 60):
        cache = "bicache:depth=0:0/30:1/60:3/90:0"
        assert run(llm, prompt, prefix=PREFIX, cache=cache).stats.prefix_hit is True


def test_warm_says_whether_it_is_kept(tiny_checkpoint: Callable[..., Path]) -> None:
    folder = tiny_checkpoint(layers=4, scale=4.0)
    llm = bicache.LLM(folder, threads=1)
    llm.warm(PREFIX, cache="bicache:depth=1")
    budget = llm.prefix_stats()["size_bytes"]
    llm = bicache.LLM(folder, threads=1, prefix_budget_bytes=budget)
    assert llm.warm(PREFIX, cache="bicache:depth=1") is True
    assert llm.warm(PREFIX, cache="bicache:depth=4") is False  # the shallower one stays
    assert run(llm, [40], prefix=PREFIX, cache="bicache:depth=1").stats.prefix_hit is True
    assert run(llm, [40], prefix=PREFIX, cache="bicache:depth=4").stats.prefix_hit is False
    assert bicache.LLM(folder).warm(PREFIX, cache="bicache:depth=0:3/1:0") is True


def test_policies_of_different_depths_share_one_entry(
    tiny_checkpoint: Callable[..., Path],
) -> None:
    folder = tiny_checkpoint(layers=4, scale=4.0)

    def hits(llm: bicache.LLM, depths: list[int]) -> list[bool | None]:
        caches = [f"bicache:depth={b}" for b in depths]
        return [run(llm, [40], prefix=PREFIX, cache=c).stats.prefix_hit for c in caches]

    llm = bicache.LLM(folder, threads=1)
    assert hits(llm, [1, 3, 1, 3, 1]) == [False, False, True, True, True]
    assert llm.prefix_stats()["entries"] == 1
    # where both do not fit, the deeper one alone is kept
    alone = bicache.LLM(folder, threads=1)
    hits(alone, [3])
    tight = bicache.LLM(folder, threads=1, prefix_budget_bytes=alone.prefix_stats()["size_bytes"])
    assert hits(tight, [1, 3, 3]) == [False, False, True]


def test_warming_what_cannot_be_warmed(tiny_checkpoint: Callable[..., Path]) -> None:
    small = bicache.LLM(tiny_checkpoint(layers=4, scale=4.0), threads=1, prefix_budget_bytes=100)
    assert small.warm(PREFIX, cache=CACHE) is False
    assert small.prefix_stats()["refused"] == 1
    for cache in ("none", "bicache:depth=0", "bicache:depth=1,splice=strict"):
        with refuses(ValueError, "[warm] cache", "got"):
            small.warm(PREFIX, cache=cache)
    with refuses(ValueError, "[warm] cache", "of the prefix alone"):
        small.warm(PREFIX, cache="naive:source=first_request")
    with refuses(ValueError, "[warm] prefix", "got 0"):
        small.warm([], cache=CACHE)
    with refuses(ValueError, "[warm] prefix", "1..256"):
        small.warm([5] * 257, cache=CACHE)
    with refuses(ValueError, "[warm] prefix", "got 64 at position 0"):
        small.warm([64], cache=CACHE)
    with refuses(ValueError, "depth", "0..4"):
        small.warm(PREFIX, cache="bicache:depth=9")


# ---- discovery


def test_a_common_head_is_stored_when_it_was_seen_often_enough(llm: bicache.LLM) -> None:
    discover = Discover(min_tokens=16, min_requests=3)
    found = [run(llm, [*PREFIX, 40 + i], discover=discover).stats.prefix_tokens for i in range(5)]
    assert found == [0, 0, len(PREFIX), len(PREFIX), len(PREFIX)]
    stats = [run(llm, [*PREFIX, 50], discover=discover).stats]
    assert stats[0].prefix_hit is True
    # what is found gives what the same prefix gives when it is named
    named = run(llm, [51], prefix=PREFIX)
    met = run(llm, [*PREFIX, 51], discover=discover)
    assert met.tokens.tobytes() == named.tokens.tobytes()
    assert met.stats.rows_per_layer == named.stats.rows_per_layer


def test_whole_entries_only(llm: bicache.LLM) -> None:
    """The head of a longer stored prefix is never taken: its rows saw the rest of it."""
    llm.warm(PREFIX, cache=CACHE)
    assert run(llm, [*PREFIX[:20], 50], discover=True).stats.prefix_tokens == 0
    llm.warm(PREFIX[:20], cache=CACHE)
    assert run(llm, [*PREFIX[:20], 50], discover=True).stats.prefix_tokens == 20
    assert run(llm, [*PREFIX, 50], discover=True).stats.prefix_tokens == len(PREFIX)
    assert run(llm, [*PREFIX, 50], discover=True, cache_salt="b").stats.prefix_tokens == 0


def test_without_discover_nothing_is_looked_for(llm: bicache.LLM) -> None:
    llm.warm(PREFIX, cache=CACHE)
    assert run(llm, [*PREFIX, 50]).stats.prefix_tokens == 0
    assert run(llm, [*PREFIX, 50], discover=False).stats.prefix_tokens == 0


def test_a_named_prefix_is_what_it_is(llm: bicache.LLM) -> None:
    llm.warm(PREFIX, cache=CACHE)
    output = run(llm, [*PREFIX[10:], 50], prefix=PREFIX[:10], discover=True)
    assert output.stats.prefix_tokens == 10


def test_a_shifted_model_keeps_its_last_prompt_row(tiny_checkpoint: Callable[..., Path]) -> None:
    llm = bicache.LLM(tiny_checkpoint(layers=4, shift=True), threads=1)
    llm.warm(PREFIX, cache=CACHE)
    assert run(llm, PREFIX, discover=True).stats.prefix_tokens == 0
    assert run(llm, [*PREFIX, 9], discover=True).stats.prefix_tokens == len(PREFIX)


def test_what_cannot_be_kept_or_read_is_not_discovered(
    tiny_checkpoint: Callable[..., Path], llm: bicache.LLM
) -> None:
    discover = Discover(min_tokens=16, min_requests=2)
    none = bicache.LLM(llm.path, threads=1, prefix_budget_bytes=0)
    for i in range(3):
        output = run(none, [*PREFIX, 40 + i], discover=discover)
        assert output.stats.prefix_tokens == 0 and output.stats.prefix_hit is None
        output = run(llm, [*PREFIX, 40 + i], discover=discover, cache="none")
        assert output.stats.prefix_tokens == 0


def test_clearing_forgets_what_was_seen(llm: bicache.LLM) -> None:
    discover = Discover(min_tokens=16, min_requests=2)
    run(llm, [*PREFIX, 40], discover=discover)
    llm.clear_prefixes()
    assert run(llm, [*PREFIX, 41], discover=discover).stats.prefix_tokens == 0
    assert run(llm, [*PREFIX, 42], discover=discover).stats.prefix_tokens == len(PREFIX)


def test_wrong_discovery(llm: bicache.LLM) -> None:
    with refuses(TypeError, "discover", "got int"):
        run(llm, [40], discover=3)
    with refuses(ValueError, "discover min_tokens", "got 0"):
        Discover(min_tokens=0)
    with refuses(ValueError, "discover min_requests", "got 1"):
        Discover(min_requests=1)
    with refuses(TypeError, "discover min_tokens"):
        Discover(min_tokens=1.5)  # type: ignore[arg-type]


def test_streams_discover_too(llm: bicache.LLM) -> None:
    llm.warm(PREFIX, cache=CACHE)
    events = llm.stream([*PREFIX, 50], cache=CACHE, discover=True, **OPTIONS)
    while True:
        try:
            next(events)
        except StopIteration as end:
            assert end.value.stats.prefix_tokens == len(PREFIX)
            break


# ---- half precision


def test_bf16_entries_take_half_the_memory(tiny_checkpoint: Callable[..., Path]) -> None:
    folder = tiny_checkpoint(layers=4, scale=4.0)
    sizes, outputs = [], []
    for dtype in ("f32", "bf16"):
        llm = bicache.LLM(folder, threads=1, prefix_dtype=dtype)
        first, second = (run(llm, [40, 41], prefix=PREFIX) for _ in range(2))
        assert first.tokens.tobytes() == second.tokens.tobytes()  # made or found: the same
        assert first.confidences.tobytes() == second.confidences.tobytes()
        sizes.append(llm.prefix_stats()["size_bytes"] - 4 * len(PREFIX))
        outputs.append(second)
    assert sizes[0] == 2 * sizes[1]
    # rounded, so not the same bits, but close: bf16 has 8 bits
    assert outputs[0].confidences.tobytes() != outputs[1].confidences.tobytes()
    near = np.isclose(outputs[0].confidences, outputs[1].confidences, atol=0.1)
    assert near.mean() > 0.7
    with refuses(ValueError, "prefix_dtype", "f32 or bf16"):
        bicache.LLM(folder, prefix_dtype="f16")
    with refuses(TypeError, "prefix_dtype", "string"):
        bicache.LLM(folder, prefix_dtype=None)  # type: ignore[arg-type]


def test_entries_hold_k_and_v_as_the_model_does(tiny_checkpoint: Callable[..., Path]) -> None:
    folder = tiny_checkpoint(layers=4, kv_heads=2)
    rows, kv_width, dim = len(PREFIX), 2 * 8, 32
    for kv, rest in itertools.product(("f32", "bf16"), repeat=2):
        llm = bicache.LLM(folder, threads=1, kv_dtype=kv, prefix_dtype=rest)
        assert (llm.kv_dtype, llm.prefix_dtype) == (kv, rest)
        made, found = (run(llm, [40, 41], prefix=PREFIX) for _ in range(2))
        assert made.stats.prefix_hit is False and found.stats.prefix_hit is True
        assert made.tokens.tobytes() == found.tokens.tobytes()
        assert made.confidences.tobytes() == found.confidences.tobytes()
        # K and V of two layers, and what enters the third
        kv_bytes = 2 if "bf16" in (kv, rest) else 4
        row_bytes = 2 * 2 * kv_width * kv_bytes + dim * (2 if rest == "bf16" else 4)
        assert llm.prefix_stats()["size_bytes"] == rows * (row_bytes + 4)


@pytest.mark.parametrize("settings", [{"prefix_dtype": "bf16"}, {"kv_dtype": "bf16"}])
def test_bf16_entries_do_not_depend_on_the_batch(
    tiny_checkpoint: Callable[..., Path], settings: dict[str, str]
) -> None:
    llm = bicache.LLM(tiny_checkpoint(layers=4), threads=2, **settings)  # type: ignore[arg-type]
    prompts = [[40 + i] * (1 + i) for i in range(5)]
    prefixes = [PREFIX, PREFIX[:9], PREFIX, None, PREFIX[:9]]
    together = llm.generate(prompts, prefix=prefixes, cache=CACHE, **OPTIONS)
    for prompt, prefix, output in zip(prompts, prefixes, together, strict=True):
        alone = run(llm, prompt, prefix=prefix)
        assert alone.tokens.tobytes() == output.tokens.tobytes()
        assert alone.confidences.tobytes() == output.confidences.tobytes()


# ---- on disk


def test_saved_prefixes_are_found_by_another_process_of_the_model(
    llm: bicache.LLM, tmp_path: Path
) -> None:
    run(llm, [40], prefix=PREFIX)
    want = run(llm, [41, 42], prefix=PREFIX)
    run(llm, [40], prefix=PREFIX[:9], cache_salt="a")
    file = tmp_path / "prefixes"
    assert llm.save_prefixes(file) == 2
    assert file.stat().st_mode & 0o777 == 0o600
    assert f"{_core.isa()} kernels".encode() in file.read_bytes()  # others compute other bits
    other = bicache.LLM(llm.path, threads=2)
    assert other.load_prefixes(str(file)) == 2
    assert other.prefix_stats()["size_bytes"] == llm.prefix_stats()["size_bytes"]
    got = run(other, [41, 42], prefix=PREFIX)
    assert got.stats.prefix_hit is True
    assert got.tokens.tobytes() == want.tokens.tobytes()
    assert got.confidences.tobytes() == want.confidences.tobytes()
    assert run(other, [40], prefix=PREFIX[:9], cache_salt="a").stats.prefix_hit is True
    assert run(other, [40], prefix=PREFIX[:9]).stats.prefix_hit is False
    small = bicache.LLM(llm.path, threads=1, prefix_budget_bytes=0)
    assert small.load_prefixes(file) == 0


def test_a_refused_file_costs_a_recomputation(
    llm: bicache.LLM, tiny_checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    run(llm, [40], prefix=PREFIX)
    file = tmp_path / "prefixes"
    llm.save_prefixes(file)
    folder = tiny_checkpoint(layers=4, scale=4.0)
    foreign: list[tuple[dict[str, Any], str]] = [
        ({}, "fingerprint"),
        ({"prefix_dtype": "bf16"}, "bf16"),
        ({"dtype": "bf16"}, "bf16 weights"),
        ({"kv_dtype": "bf16"}, "bf16 K/V"),
        ({"backend": "blas"}, "blas and"),
    ]
    for settings, part in foreign:
        path = folder if settings else tiny_checkpoint(layers=4, scale=4.0, seed=5)
        other = bicache.LLM(path, threads=1, **settings)
        with refuses(ValueError, str(file), *([part] if settings else [other.fingerprint])):
            other.load_prefixes(file)
        assert other.prefix_stats()["entries"] == 0
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)
    fresh = bicache.LLM(folder, threads=1)
    with refuses(ValueError, str(file), "damaged"):
        fresh.load_prefixes(file)
    assert run(fresh, [40], prefix=PREFIX).stats.prefix_hit is False
    with pytest.raises(FileNotFoundError):
        fresh.load_prefixes(tmp_path / "nothing")
    with pytest.raises(FileNotFoundError):
        fresh.save_prefixes(tmp_path / "no" / "folder")
    with refuses(ValueError, "regular file"):
        fresh.load_prefixes(tmp_path)
    for wrong in (None, 5, b"x"):
        with refuses(TypeError, "[prefix file] path", "a path"):
            fresh.load_prefixes(wrong)  # type: ignore[arg-type]
    for empty in ("", "a\0b"):
        with refuses(ValueError, "[prefix file] path", "a path"):
            fresh.save_prefixes(empty)
    odd = str(tmp_path) + "/\udcff"  # a name that is not UTF-8
    assert fresh.save_prefixes(odd) == 1 and fresh.load_prefixes(odd) == 1


# ---- fingerprint


def test_fingerprints_tell_checkpoints_apart(tiny_checkpoint: Callable[..., Path]) -> None:
    def fingerprint(**settings: Any) -> str:
        return bicache.LLM(tiny_checkpoint(**settings), threads=1).fingerprint

    base = fingerprint()
    assert base == fingerprint() and len(base) == 16 and int(base, 16) >= 0
    others = [fingerprint(seed=1), fingerprint(shift=True), fingerprint(dtype="bf16")]
    assert len({base, *others}) == 4
    # how the weights are held does not matter
    folder = tiny_checkpoint()
    for settings in ({"dtype": "bf16"}, {"kv_dtype": "bf16"}, {"backend": "blas"}, {"threads": 2}):
        assert bicache.LLM(folder, **settings).fingerprint == base  # type: ignore[arg-type]
