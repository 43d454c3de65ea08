"""`plan`: what it predicts is what is counted, and what the published figures say."""

from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path
from typing import Any

import bicache
import numpy as np
import pytest
from bicache import BiCache, CostPlan, DLLMCache, FastDLLM, PolicyCost, _core, cli, plan
from bicache.planning import as_text, known_configs
from conftest import TinyCheckpoint, refuses

LAYERS = 4
SIZES: dict[str, Any] = {"layers": LAYERS, "dim": 32, "heads": 4, "kv_heads": 2, "ffn": 48}
KINDS: dict[str, dict[str, Any]] = {
    "plain": {},
    "shift": {"shift": True},
    "qk_norm, bf16": {"qk_norm": True, "dtype": "bf16"},
    "dream": {"family": "dream"},
}
PREFIX, OWN = 21, 6

FAST = [
    "fast_dllm",
    "fast_dllm:refresh_steps=2",
    "fast_dllm:mode=dual,block_start=fill",
    "fast_dllm:mode=dual,refresh_steps=3,block_start=fill",
]
RESPONSE = [
    "dllm_cache:prompt_interval_steps=5,gen_interval_steps=3",
    "dllm_cache:prompt_interval_steps=4,gen_interval_steps=2,transfer_ratio=0",
    "dllm_cache:prompt_interval_steps=3,gen_interval_steps=5,transfer_ratio=0.4,"
    "drift=since_recompute",
]
OF_PREFIX = [
    "naive",
    "naive:source=first_request",
    *(f"bicache:depth={b},refresh_steps=3" for b in range(LAYERS + 1)),
    "bicache:depth=2,refresh_steps=4,splice=strict",
    "bicache:depth=0:1/40:3,refresh_steps=5",
    "bicache:depth=agreement:30:2,refresh=block",
    "bicache:depth=2,refresh_steps=3,source=first_request",
]
CACHES = ["none", *FAST, *RESPONSE, *OF_PREFIX]
CACHES += [f"{a}+{b}" for a in OF_PREFIX[:5:2] for b in (*FAST[1:3], *RESPONSE[:2])]

# prefix, own prompt, options
SHAPES: list[tuple[int, int, dict[str, Any]]] = [
    (PREFIX, OWN, {"gen_length": 12, "steps": 12, "block_length": 4}),
    (PREFIX, OWN, {"gen_length": 12, "steps": 5, "block_length": 12}),
    (PREFIX, 0, {"gen_length": 8, "steps": 8, "block_length": 4}),
    (0, OWN, {"gen_length": 8, "steps": 4, "block_length": 4}),
]


def ids(count: int, seed: int) -> list[int]:
    return [int(i) for i in np.random.default_rng(seed).integers(4, 64, count)]


def generate(
    llm: bicache.LLM, cache: str, prefix: int, own: int, options: dict[str, Any]
) -> bicache.RequestStats:
    (out,) = llm.generate([ids(own, 1)], prefix=ids(prefix, 0), cache=cache, **options)
    return out.stats


def predict(
    llm: bicache.LLM, cache: str, prefix: int, own: int, options: dict[str, Any], **more: Any
) -> PolicyCost:
    options = dict(options)
    costs = plan(
        llm.config, cache, prompt_len=prefix + own, prefix_len=prefix,
        gen_len=options.pop("gen_length"), dtype=llm.dtype, **options, **more,
    )  # fmt: skip
    return costs.costs[0]


COUNTED = [
    f.name
    for f in dataclasses.fields(PolicyCost)
    if f.name in {g.name for g in dataclasses.fields(bicache.RequestStats)}
]


def check(cost: PolicyCost, stats: bicache.RequestStats, *, found: bool = False) -> None:
    for name in COUNTED:
        if found and name.startswith("entry_"):
            assert not np.any(getattr(stats, name)), name
        else:
            assert getattr(cost, name) == getattr(stats, name), name


def test_what_is_compared() -> None:
    assert {"rows_per_layer", "value_rows_per_layer", "head_rows", "flops", "bytes_read"} <= set(
        COUNTED
    )
    assert {
        "steps",
        "passes",
        "refreshes",
        "cache_bytes",
        "entry_rows_per_layer",
        "entry_flops",
    } <= (set(COUNTED))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("cache", CACHES)
def test_prediction_equals_what_is_counted(
    tiny_checkpoint: TinyCheckpoint, cache: str, kind: str
) -> None:
    llm = bicache.LLM(tiny_checkpoint(**SIZES, **KINDS[kind]), threads=1)
    for prefix, own, options in SHAPES:
        llm.clear_prefixes()
        cost = predict(llm, cache, prefix, own, options)
        first = generate(llm, cache, prefix, own, options)
        check(cost, first)
        ids_bytes = 4 * first.prefix_tokens if cost.entry_bytes else 0  # the store's key
        assert cost.entry_bytes + ids_bytes == llm.prefix_stats()["size_bytes"]
        check(cost, generate(llm, cache, prefix, own, options), found=first.prefix_hit is False)
        assert cost.cache == llm.cache_string(cache)


RULES: list[dict[str, Any]] = [
    {"remasking": "random"},
    {"remasking": "entropy", "steps": 5},
    {"remasking": "maskgit_plus", "steps": 12, "block_length": 6},
    {"cfg_scale": 0.5},
    {"temperature": 0.7, "suppress_tokens": [9], "seed": 3},
]


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: ",".join(rule))
@pytest.mark.parametrize("cache", [CACHES[0], FAST[2], RESPONSE[0], OF_PREFIX[4], CACHES[-1]])
def test_prediction_for_other_rules(
    tiny_checkpoint: TinyCheckpoint, cache: str, rule: dict[str, Any]
) -> None:
    llm = bicache.LLM(tiny_checkpoint(**SIZES), threads=1)
    options = {"gen_length": 12} | rule
    cost = predict(llm, cache, PREFIX, OWN, options)
    check(cost, generate(llm, cache, PREFIX, OWN, options))


@pytest.mark.parametrize("cache", [CACHES[0], FAST[1], RESPONSE[0], OF_PREFIX[4], CACHES[-1]])
@pytest.mark.parametrize("given", [{"threshold": 0.0}, {}], ids=["threshold", "tokens alone"])
def test_prediction_for_parallel_decoding(
    tiny_checkpoint: TinyCheckpoint, cache: str, given: dict[str, float]
) -> None:
    """With the threshold 0 every step commits its whole block."""
    llm = bicache.LLM(tiny_checkpoint(**SIZES), threads=1)
    options = {"gen_length": 12, "block_length": 4}
    cost = predict(llm, cache, PREFIX, OWN, options | given, tokens_per_step=4)
    assert cost.steps == 3
    check(cost, generate(llm, cache, PREFIX, OWN, options | {"threshold": 0.0}))


def test_fewer_tokens_per_step_take_more_steps(tiny_checkpoint: TinyCheckpoint) -> None:
    llm = bicache.LLM(tiny_checkpoint(**SIZES), threads=1)
    options = {"gen_length": 32, "block_length": 8}
    steps = [predict(llm, "none", 0, OWN, options, tokens_per_step=x).steps for x in (1, 1.5, 2, 8)]
    assert steps[0] == 32 and steps[2] == 16 and steps[3] == 4
    assert steps[0] > steps[1] > steps[2]


def test_several_policies_and_ratios(tiny_checkpoint: TinyCheckpoint) -> None:
    folder = tiny_checkpoint(**SIZES)
    config = _core.read_config(str(folder))
    caches = ["none", BiCache(depth=2), FastDLLM() + BiCache(depth=2), DLLMCache()]
    sizes = {"prompt_len": 20, "prefix_len": 12, "gen_len": 8, "steps": 4}
    costs = plan(config, caches, **sizes)
    assert [c.cache for c in costs.costs] == [
        "none", *(c.spec() for c in caches if not isinstance(c, str))
    ]  # fmt: skip
    assert costs.costs[0].flops == costs.none_flops
    for c in costs.costs:
        assert c.none_ratio == costs.none_flops / c.flops
        assert c.vanilla_ratio == costs.vanilla_flops / c.flops
        assert c.flops_per_token == c.flops / 8
        assert plan(config, c.cache, **sizes).costs == (c,)
    assert costs.vanilla_flops > costs.none_flops > costs.costs[1].flops > 0
    assert (costs.prompt_len, costs.prefix_len, costs.gen_len, costs.options) == (
        20, 12, 8, {"steps": 4}
    )  # fmt: skip
    assert json.loads(json.dumps(costs.as_dict()))["costs"][3]["flops"] == costs.costs[3].flops
    with pytest.raises(dataclasses.FrozenInstanceError):
        costs.costs = ()  # type: ignore[misc]


def test_weight_memory_and_type(tiny_checkpoint: TinyCheckpoint) -> None:
    llm = bicache.LLM(tiny_checkpoint(**SIZES), threads=1)
    f32, bf16 = (
        plan(llm.config, "none", prompt_len=9, gen_len=4, dtype=dtype) for dtype in ("f32", "bf16")
    )
    assert f32.weight_bytes == llm.weight_bytes
    assert bf16.weight_bytes == bicache.LLM(llm.path, threads=1, dtype="bf16").weight_bytes
    assert bf16.costs[0].bytes_read < f32.costs[0].bytes_read
    assert bf16.costs[0].flops == f32.costs[0].flops


@pytest.mark.parametrize("kv_dtype", ["f32", "bf16"])
@pytest.mark.parametrize("dtype", ["f32", "bf16"])
def test_k_and_v_have_a_type_of_their_own(
    tiny_checkpoint: TinyCheckpoint, dtype: str, kv_dtype: str
) -> None:
    cache, options = "bicache:depth=2+dllm_cache:drift=since_recompute", {"gen_length": 8}
    llm = bicache.LLM(tiny_checkpoint(**SIZES), threads=1, dtype=dtype, kv_dtype=kv_dtype)
    cost = predict(llm, cache, PREFIX, OWN, options, kv_dtype=kv_dtype)
    check(cost, generate(llm, cache, PREFIX, OWN, options))
    assert cost.entry_bytes == llm.prefix_stats()["size_bytes"] - 4 * PREFIX


def test_k_and_v_follow_the_weights() -> None:
    def of(**types: str) -> bicache.CostPlan:
        return plan("llada-8b", "fast_dllm", prompt_len=9, gen_len=4, **types)  # type: ignore[arg-type]

    for dtype in ("f32", "bf16"):
        assert of(dtype=dtype).kv_dtype == dtype
        assert (
            of(dtype=dtype) == of(dtype=dtype, kv_dtype="auto") == of(dtype=dtype, kv_dtype=dtype)
        )
    assert of(kv_dtype="f32").dtype == "bf16"
    wide, half = (of(dtype="f32", kv_dtype=kv).costs[0] for kv in ("f32", "bf16"))
    rows = 32 * 13  # one byte each says whose K and V they are
    assert wide.cache_bytes - rows == 2 * (half.cache_bytes - rows)
    assert wide.flops == half.flops and wide.bytes_read > half.bytes_read


# ---- LLaDA-8B, as published


class Llada8B:
    """FLOPs by hand: 2 per multiply-add."""

    E, F, L, V = 4096, 12288, 32, 126464

    def layer(self, rows: int, keys: int, value_rows: int | None = None) -> int:
        v = rows if value_rows is None else value_rows
        projections = 2 * self.E * self.E * (3 * rows + v)
        return projections + 4 * rows * keys * self.E + 2 * rows * 3 * self.E * self.F

    def head(self, rows: int) -> int:
        return 2 * rows * self.E * self.V

    def uncached(self, n: int, steps: int) -> int:
        return steps * (self.L * self.layer(n, n) + self.head(n))

    def dllm_cache(self, p: int, g: int, kp: int, kr: int, rho: float) -> int:
        """Without the head: the reduced form of the published algorithm, g steps."""
        total, chosen = 0, int(g * rho)
        for step in range(g):
            prompt = p if step % kp == 0 else 0
            for layer in range(self.L):
                response = g if step % kr == 0 or layer == 0 else chosen
                total += self.layer(prompt + response, p + g, prompt + g)
        return total


# prompt, response, Kp, Kr, block; FLOPs per token of the uncached loop, and how many times fewer
# the reduced form of dLLM-Cache needs with the output head on all response rows.
PUBLISHED = [
    (893, 256, 50, 7, 8, 17.92e12, 8.33),
    (4064, 32, 100, 8, 32, 70.21e12, 30.7),
    (150, 512, 50, 8, 32, 10.16e12, 2.83),
]


@pytest.mark.parametrize(("p", "g", "kp", "kr", "block", "per_token", "factor"), PUBLISHED)
def test_llada_8b_under_dllm_cache(
    p: int, g: int, kp: int, kr: int, block: int, per_token: float, factor: float
) -> None:
    by_hand = Llada8B()
    costs = plan("llada-8b", DLLMCache(kp, kr, 0.25), prompt_len=p, gen_len=g, block_length=block)
    (cost,) = costs.costs
    assert costs.vanilla_flops == by_hand.uncached(p + g, g)
    assert f"{costs.vanilla_flops / g:.3e}" == f"{per_token:.3e}"
    layers = by_hand.dllm_cache(p, g, kp, kr, 0.25)
    assert f"{costs.vanilla_flops / (layers + by_hand.head(g * g)):.3g}" == f"{factor:.3g}"
    # Here the head runs on the block's masked rows alone.
    masked = g // block * (block * (block + 1) // 2)
    assert cost.head_rows == masked
    assert cost.flops == layers + by_hand.head(masked)
    assert cost.vanilla_ratio > factor


def test_llada_8b_sizes() -> None:
    assert known_configs() == ("llada-8b",)
    costs = plan("llada-8b", "none", prompt_len=100, gen_len=32)
    published = 16_031_162_368  # bytes of all tensors, bf16; the norms are held as f32
    assert costs.weight_bytes == published + 2 * (2 * 32 + 1) * 4096
    assert costs.layers == 32 and costs.model == "llada-8b"


# ---- where sizes come from


def test_every_way_to_name_a_model(tiny_checkpoint: TinyCheckpoint, tmp_path: Path) -> None:
    folder = tiny_checkpoint(**SIZES)
    alone = tmp_path / "config.json"
    alone.write_text((folder / "config.json").read_text())
    flops = {
        plan(config, "none", prompt_len=9, gen_len=4).costs[0].flops
        for config in (
            folder,
            str(folder),
            alone,
            str(alone),
            tmp_path,
            _core.parse_config(str(alone)),
        )
    }
    assert len(flops) == 1
    shipped = plan("records", "none", prompt_len=9, gen_len=4)
    assert shipped.layers == bicache.LLM("records", threads=1).config.layers


def test_wrong_models(tmp_path: Path) -> None:
    def of(config: Any) -> None:
        plan(config, "none", prompt_len=9, gen_len=4)

    with refuses(FileNotFoundError, "records", "llada-8b", "config.json"):
        of("llada-9b")
    with refuses(FileNotFoundError, "config.json"):
        of(tmp_path)
    with refuses(TypeError, "config", "int"):
        of(1)
    with refuses(TypeError, "config", "bytes"):
        of(b"records")
    with refuses(ValueError, "surrogate"):
        of("\ud800")
    (tmp_path / "config.json").write_text("{")
    with refuses(ValueError, "config.json"):
        of(tmp_path / "config.json")
    (tmp_path / "config.json").write_text('{"model_type": "bert"}')
    with refuses(ValueError, "llada", "bert"):
        of(tmp_path)


class Observing(bicache.DepthPolicy):
    observes = True

    def depth(self, info: bicache.RequestInfo) -> int:
        return 1


def test_a_rule_that_looks_at_sizes_can_be_planned(tiny_checkpoint: TinyCheckpoint) -> None:
    config = _core.read_config(str(tiny_checkpoint(**SIZES)))
    rule, fixed = BiCache(depth=lambda info: info.p // 4), BiCache(depth=3)
    costs = plan(config, [rule, fixed], prompt_len=20, prefix_len=12, gen_len=8).costs
    assert costs[0].rows_per_layer == costs[1].rows_per_layer
    assert (costs[0].flops, costs[0].refreshes) == (costs[1].flops, costs[1].refreshes)
    assert costs[0].entry_bytes > costs[1].entry_bytes  # it might have chosen any depth


@pytest.mark.parametrize(
    ("settings", "error", "parts"),
    [
        ({"prompt_len": 0}, ValueError, ["prompt_len", "got 0"]),
        ({"prompt_len": 2.0}, TypeError, ["prompt_len", "got 2.0"]),
        ({"prefix_len": 10}, ValueError, ["prefix_len: expected an integer 0..9, got 10"]),
        ({"prefix_len": -1}, ValueError, ["prefix_len", "got -1"]),
        ({"gen_len": 0}, ValueError, ["gen_len", "got 0"]),
        ({"gen_len": 250}, ValueError, ["context", "259"]),
        ({"steps": 3, "block_length": 2}, ValueError, ["steps", "number of blocks"]),
        ({"block_length": 3}, ValueError, ["divisor of gen_length"]),
        ({"gen_length": 4}, TypeError, ["gen_length", "gen_len"]),
        ({"max_new_tokens": 4}, TypeError, ["gen_length", "gen_len"]),
        ({"stepz": 4}, TypeError, ["'stepz'", "did you mean steps?"]),
        ({"dtype": "f16"}, ValueError, ["dtype: expected f32, bf16, int8 or int4, got 'f16'"]),
        ({"dtype": 16}, ValueError, ["dtype: expected f32, bf16, int8 or int4, got 16"]),
        ({"kv_dtype": "f16"}, ValueError, ["kv_dtype: expected auto, f32 or bf16, got 'f16'"]),
        ({"kv_dtype": None}, ValueError, ["kv_dtype: expected auto, f32 or bf16, got None"]),
        ({"tokens_per_step": 0.5}, ValueError, ["tokens_per_step", "got 0.5"]),
        ({"tokens_per_step": "2"}, TypeError, ["tokens_per_step", "got '2'"]),
        ({"threshold": 0.9}, ValueError, ["tokens_per_step"]),
        ({"factor": 1.0}, ValueError, ["tokens_per_step"]),
        ({"caches": []}, TypeError, ["caches"]),
        ({"caches": ["none", "auto+dllm_cache"]}, ValueError, ["[plan] cache", '"auto"']),
        ({"caches": 3}, TypeError, ["caches"]),
        ({"caches": ["none", None]}, TypeError, ["policy", "NoneType"]),
        ({"caches": "nine"}, ValueError, ["none, naive, bicache", "nine"]),
        ({"caches": "bicache:depth=5"}, ValueError, ["depth", "4"]),
        ({"caches": "bicache:depth=probe:0.9"}, ValueError, ["probe"]),
        ({"caches": "bicache:depth=1,refresh=drift:0.1"}, ValueError, ["drift"]),
        ({"caches": BiCache(depth=Observing())}, ValueError, ["hook", "activations"]),
    ],
)  # fmt: skip
def test_wrong_arguments(
    tiny_checkpoint: TinyCheckpoint,
    settings: dict[str, Any],
    error: type[Exception],
    parts: list[str],
) -> None:
    config = _core.read_config(str(tiny_checkpoint(**SIZES)))
    with refuses(error, *parts):
        plan(
            config, **{"caches": "none", "prompt_len": 9, "prefix_len": 3, "gen_len": 4} | settings
        )


# ---- the command line


def argv(model: object, *more: str) -> list[str]:
    sizes = ["--prompt-len", "30", "--prefix-len", "20", "--gen-len", "16"]
    return ["plan", "--model-config", str(model), *sizes, *more]


def test_plan_json(tiny_checkpoint: TinyCheckpoint, capsys: Any) -> None:
    folder = tiny_checkpoint(**SIZES)
    caches = ["none", "dllm_cache+bicache:depth=2"]
    more = ["--steps", "8", "--block-length", "8", "--dtype", "f32", "--kv-dtype", "bf16", "--json"]
    assert cli.main(argv(folder, "--cache", caches[0], "--cache", caches[1], *more)) == 0
    out, err = capsys.readouterr()
    expected = plan(
        folder, caches, prompt_len=30, prefix_len=20, gen_len=16, steps=8, block_length=8,
        dtype="f32", kv_dtype="bf16",
    )  # fmt: skip
    assert json.loads(out) == json.loads(json.dumps(expected.as_dict())) and err == ""


def test_plan_text(tiny_checkpoint: TinyCheckpoint, capsys: Any) -> None:
    folder = tiny_checkpoint(**SIZES)
    caches = ["none", "bicache:depth=2", "dllm_cache"]
    flags = [part for cache in caches for part in ("--cache", cache)]
    assert cli.main(argv(folder, *flags, "--tokens-per-step", "2")) == 0
    out, err = capsys.readouterr()
    expected = plan(folder, caches, prompt_len=30, prefix_len=20, gen_len=16, tokens_per_step=2)
    assert out == as_text(expected) + "\n" and err == ""
    head, table, legend = out.split("\n\n")
    assert "2 tokens per step" in head and "30 prompt tokens (20 shared)" in head
    title, _, *rows = table.splitlines()
    assert [row.split()[-1] for row in rows] == [c.cache for c in expected.costs]
    for row, cost in zip(rows, expected.costs, strict=True):
        assert f"{cost.none_ratio:.2f}x" in row and f"{cost.vanilla_ratio:.2f}x" in row
        assert f"{sum(cost.rows_per_layer):,}" in row.split()
        assert (" - " in row) == (cost.entry_bytes == 0)
    for name in re.sub(r" \(\w+\)", "", title).split("  "):
        assert name.strip() in ("", "policy", "entry FLOP") or f"\n{name.strip()} " in f"\n{legend}"


def test_columns_have_one_unit_each() -> None:
    """The published sizes: peta-FLOPs beside tera-FLOPs, in the smaller unit."""
    costs = plan("llada-8b", ["none", "dllm_cache"], prompt_len=893, gen_len=256)
    title, _, *rows = as_text(costs).split("\n\n")[1].splitlines()
    assert title.split()[:2] == ["FLOP", "(T)"]
    for row, cost in zip(rows, costs.costs, strict=True):
        assert row.split()[0] == f"{cost.flops / 1e12:,.2f}"
        assert row.split()[-1] == cost.cache


def test_plan_of_the_published_sizes(capsys: Any) -> None:
    flags = ["--cache", "dllm_cache", "--cfg-scale", "1", "--remasking", "random"]
    assert cli.main(argv("llada-8b", *flags)) == 0
    head = "llada-8b: 32 layers, 14.93 GiB of bf16 weights, K and V in bf16. One request: "
    assert capsys.readouterr().out.startswith(head)


@pytest.mark.parametrize(
    ("more", "part"),
    [
        (["--cache", "nine"], "expected one of none, naive"),
        (["--cache", "none", "--steps", "3", "--block-length", "8"], "number of blocks"),
        (["--cache", "none", "--tokens-per-step", "0"], "tokens_per_step: expected a number >= 1"),
        (["--cache", "none", "--dtype", "int2"], "dtype: expected f32, bf16, int8 or int4"),
        (["--cache", "none", "--kv-dtype", "int8"], "kv_dtype: expected auto, f32 or bf16"),
        ([], "--cache"),
    ],
)
def test_plan_refuses(more: list[str], part: str, capsys: Any) -> None:
    assert cli.main(argv("records", *more)) == 2
    out, err = capsys.readouterr()
    assert out == "" and part in err and "Traceback" not in err


def test_a_plan_is_a_value(tiny_checkpoint: TinyCheckpoint) -> None:
    config = tiny_checkpoint(**SIZES)
    one, other = (plan(config, "none", prompt_len=9, gen_len=4) for _ in range(2))
    assert one == other and isinstance(one, CostPlan)
    assert isinstance(one.costs[0].rows_per_layer, tuple)
