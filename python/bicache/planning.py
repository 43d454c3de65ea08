"""What a request will cost under a cache policy, from the plans alone: no weights, no run."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from . import _core
from .checkpoint import resolve_path, shipped_models
from .gguf import is_gguf
from .info import bytes_text
from .inputs import check_text, integer, number
from .jsonfile import as_path
from .loaded import Cache
from .options import resolve_options
from .policies import Policy, engine_policy

_CONFIGS = Path(__file__).parent / "configs"
_MAX_LEN = 2**31 - 1
_PER_LAYER = ("rows_per_layer", "value_rows_per_layer", "entry_rows_per_layer")
# Any threshold will do: what it commits per step is the caller's assumption.
_SOME_THRESHOLD = 0.9


def known_configs() -> tuple[str, ...]:
    """Published models whose sizes come with the package, without weights."""
    return tuple(sorted(path.stem for path in _CONFIGS.glob("*.json")))


@dataclass(frozen=True)
class PolicyCost:
    """What one request costs under one policy, apart from making its prefix's entry.

    Attributes:
        cache: The cache string.
        steps: Passes that commit tokens.
        passes: All passes.
        refreshes: Passes that recompute prefix rows from the prefix entry.
        rows_per_layer: Rows recomputed in full, summed over all passes. [L]
        value_rows_per_layer: Rows of which only V is recomputed. [L]
        head_rows: Rows of the output head.
        flops: Multiplications and additions of matrix products and attention.
        flops_per_token: The same, per response token.
        none_ratio: How many times the FLOPs under "none" are.
        vanilla_ratio: How many times the FLOPs of the published uncached loop are, which runs
            the output head on every row.
        bytes_read: Weights and K/V that these products read.
        cache_bytes: Memory of the request's own cache.
        entry_rows_per_layer: Rows that making the prefix's entry computes, once per prefix. [L]
        entry_flops: FLOPs of the same, once per prefix.
        entry_bytes: Memory of the entry (K and V as kv_dtype, the rest as f32); shared by all
            requests with this prefix.
    """

    cache: str
    steps: int
    passes: int
    refreshes: int
    rows_per_layer: tuple[int, ...]
    value_rows_per_layer: tuple[int, ...]
    head_rows: int
    flops: int
    flops_per_token: float
    none_ratio: float
    vanilla_ratio: float
    bytes_read: int
    cache_bytes: int
    entry_rows_per_layer: tuple[int, ...]
    entry_flops: int
    entry_bytes: int


@dataclass(frozen=True)
class CostPlan:
    """What `plan` predicts of one request, policy by policy.

    Attributes:
        model: Its name, or the path of its config.json; "" where a Config was given.
        layers: L.
        dtype: How weights are held: "f32", "bf16", "int8" or "int4".
        kv_dtype: How K and V are held: "f32" or "bf16".
        prompt_len: Tokens of the whole prompt (p + u).
        prefix_len: Those of them that are shared with other requests (p).
        gen_len: Response tokens (g).
        options: Generation options that were given.
        tokens_per_step: Tokens a step was assumed to commit; None: as the options say.
        weight_bytes: Memory of the weights.
        none_flops: FLOPs of the same request under "none".
        vanilla_flops: FLOPs of the published uncached loop: every row in every layer and in the
            output head, at every step.
        costs: One per policy, in order.
    """

    model: str
    layers: int
    dtype: str
    kv_dtype: str
    prompt_len: int
    prefix_len: int
    gen_len: int
    options: dict[str, Any]
    tokens_per_step: float | None
    weight_bytes: int
    none_flops: int
    vanilla_flops: int
    costs: tuple[PolicyCost, ...]

    def as_dict(self) -> dict[str, Any]:
        """Plain Python values, ready for JSON."""
        return asdict(self)


def plan(
    config: _core.Config | str | os.PathLike[str],
    caches: Cache | Sequence[Cache],
    *,
    prompt_len: int,
    gen_len: int,
    prefix_len: int = 0,
    tokens_per_step: float | None = None,
    dtype: str = "bf16",
    kv_dtype: str = "auto",
    **options: Any,
) -> CostPlan:
    """Predicts what one request costs under each policy, without a model.

    The engine plans every pass as it would for the request, and counts what the plan executes:
    rows, FLOPs and bytes equal those that RequestStats counts, as long as the request rides alone,
    does not end early (early_stop), and the model never predicts its mask token. FLOPs are not
    time.

    Args:
        config: `llm.config`, a config.json, a checkpoint folder (its weights are not needed), a
            GGUF file, the name of a shipped model or of a published one ("llada-8b").
        caches: One policy or several: cache strings or policy objects. One that looks at
            activations (depth=probe:..., refresh=drift:..., a rule that observes) is an error.
        prompt_len: Tokens of the whole prompt, the shared prefix included.
        gen_len: Response tokens.
        prefix_len: Tokens of the prompt that are shared with other requests, 0..prompt_len.
        tokens_per_step: With threshold or factor: how many tokens a step is assumed to commit.
            Given alone, it stands for a threshold that commits as many.
        dtype: How weights are held: "f32", "bf16", "int8" or "int4".
        kv_dtype: How K and V are held: "f32", "bf16", or "auto" (f32 with f32 weights, otherwise
            bf16).
        **options: Generation options as for LLM.generate() that change the work: steps,
            block_length, remasking, threshold, factor, cfg_scale. Defaults are the engine's.

    Raises:
        FileNotFoundError: There is no such model.
        TypeError: A wrong type, or an unknown option.
        ValueError: A wrong value, or a policy that cannot be planned.
    """
    name, config = _as_config(config)
    prompt = integer(prompt_len, "plan] prompt_len", 1, _MAX_LEN)
    prefix = integer(prefix_len, "plan] prefix_len", 0, prompt)
    response = integer(gen_len, "plan] gen_len", 1, _MAX_LEN)
    if dtype not in ("f32", "bf16", "int8", "int4"):
        raise ValueError(f"[plan] dtype: expected f32, bf16, int8 or int4, got {dtype!r}")
    if kv_dtype not in ("auto", "f32", "bf16"):
        raise ValueError(f"[plan] kv_dtype: expected auto, f32 or bf16, got {kv_dtype!r}")
    if kv_dtype == "auto":
        kv_dtype = "f32" if dtype == "f32" else "bf16"
    chosen = resolve_options(options, {}, "plan")
    if "gen_length" in chosen:
        raise TypeError("[plan] gen_length: expected it as gen_len, got an option")
    asked = {"gen_length": response} | chosen
    if tokens_per_step is not None:
        tokens_per_step = number(tokens_per_step, "plan] tokens_per_step", 1)
        if "threshold" not in chosen and "factor" not in chosen:
            asked["threshold"] = _SOME_THRESHOLD

    def forecast(policy: _core.Policy) -> dict[str, Any]:
        return _core.forecast(
            config, policy, prefix_len=prefix, prompt_len=prompt - prefix, options=asked,
            dtype=dtype, kv_dtype=kv_dtype, tokens_per_step=tokens_per_step,
        )  # fmt: skip

    policies = _as_policies(caches, config.layers)
    base = forecast(_core.make_policy("none"))
    return CostPlan(
        model=name,
        layers=config.layers,
        dtype=dtype,
        kv_dtype=kv_dtype,
        prompt_len=prompt,
        prefix_len=prefix,
        gen_len=response,
        options=chosen,
        tokens_per_step=tokens_per_step,
        weight_bytes=base["weight_bytes"],
        none_flops=base["flops"],
        vanilla_flops=base["vanilla_flops"],
        costs=tuple(_cost(policy.spec, forecast(policy), base, response) for policy in policies),
    )


def _cost(cache: str, found: dict[str, Any], base: dict[str, Any], gen_len: int) -> PolicyCost:
    flops = found["flops"]
    made = {
        "cache": cache,
        "flops_per_token": flops / gen_len,
        "none_ratio": base["flops"] / flops,
        "vanilla_ratio": base["vanilla_flops"] / flops,
    }
    values = {f.name: made[f.name] if f.name in made else found[f.name] for f in fields(PolicyCost)}
    for key in _PER_LAYER:
        values[key] = tuple(int(rows) for rows in values[key])
    return PolicyCost(**values)


def _as_config(config: object) -> tuple[str, _core.Config]:
    """Its name and itself."""
    if isinstance(config, _core.Config):
        return "", config
    path = as_path(config, "plan] config")
    name = check_text(str(path), "plan] config")
    if name in known_configs():
        return name, _core.parse_config(str(_CONFIGS / f"{name}.json"))
    if name in shipped_models():
        path = resolve_path(name)
    if is_gguf(path):
        return name, _core.read_config(str(path))
    for file in (path, path / "config.json"):
        if file.is_file():
            return name, _core.parse_config(str(file))
    raise FileNotFoundError(
        f"[plan] {name}: expected a config.json, a folder with one, a shipped model "
        f"({', '.join(shipped_models()) or 'none'}) or published sizes "
        f"({', '.join(known_configs())}), got none of these"
    )


def _as_policies(caches: object, layers: int) -> list[_core.Policy]:
    if isinstance(caches, (str, Policy)):
        caches = [caches]
    if not isinstance(caches, Sequence) or not caches:
        raise TypeError(
            "[plan] caches: expected a cache string, a policy object or a list of these, "
            f"got {caches!r}"
        )
    if any(isinstance(cache, str) and "auto" in cache.split("+") for cache in caches):
        raise ValueError(
            '[plan] cache: expected a cache string in full, got "auto"; `bicache info MODEL` shows '
            "what it stands for"
        )
    return [engine_policy(cache, layers) for cache in caches]


# ---- for a reader

_DECIMAL = ("", "k", "M", "G", "T", "P")
_BINARY = ("B", "KiB", "MiB", "GiB", "TiB")
_LEGEND = """\
FLOP            multiplications and additions of matrix products and attention, one request
per token       the same, per response token
less than none  how many times fewer than with "none"
less than loop  how many times fewer than in the published uncached loop, {vanilla}: every row in
                every layer and in the output head, at every step
rows            token rows recomputed in full, summed over layers and passes
read            weights and K/V that the products read
cache           memory of the request's own cache
entry           FLOP and memory of the shared prefix's entry: made once for all requests that begin
                with it, and in no other column
FLOP are not time, and a cache may change the answers: measure both on the model itself."""


def as_text(costs: CostPlan) -> str:
    """The prediction for a reader: a table and what its columns mean."""
    found = costs.costs
    entry_flops = [c.entry_flops if c.entry_bytes else None for c in found]
    entry_bytes = [c.entry_bytes or None for c in found]
    columns = [
        _column("FLOP", [c.flops for c in found], _DECIMAL, 1000),
        _column("per token", [c.flops_per_token for c in found], _DECIMAL, 1000),
        ["less than none", *(f"{c.none_ratio:.2f}x" for c in found)],
        ["less than loop", *(f"{c.vanilla_ratio:.2f}x" for c in found)],
        ["rows", *(f"{sum(c.rows_per_layer):,}" for c in found)],
        _column("read", [c.bytes_read for c in found], _BINARY, 1024),
        _column("cache", [c.cache_bytes for c in found], _BINARY, 1024),
        _column("entry FLOP", entry_flops, _DECIMAL, 1000),
        _column("entry", entry_bytes, _BINARY, 1024),
    ]
    widths = [max(map(len, column)) for column in columns]
    padded = [
        [cell.rjust(width) for cell in column]
        for column, width in zip(columns, widths, strict=True)
    ]
    policies = ["policy", *(c.cache for c in found)]
    lines = ["  ".join(row) for row in zip(*padded, policies, strict=True)]
    lines.insert(1, "-" * len(lines[0]))
    legend = _LEGEND.format(vanilla=_flop(costs.vanilla_flops))
    return "\n\n".join([_head(costs), "\n".join(lines), legend])


def _head(costs: CostPlan) -> str:
    given = "".join(f", {name} {value}" for name, value in costs.options.items())
    if costs.tokens_per_step is not None:
        given += f", {costs.tokens_per_step:g} tokens per step assumed"
    return (
        f"{costs.model or 'model'}: {costs.layers} layers, {bytes_text(costs.weight_bytes)} of "
        f"{costs.dtype} weights, K and V in {costs.kv_dtype}. One request: {costs.prompt_len} "
        f"prompt tokens ({costs.prefix_len} shared), {costs.gen_len} response tokens in "
        f"{costs.costs[0].steps} steps{given}."
    )


def _column(
    name: str, values: Sequence[float | None], units: Sequence[str], base: int
) -> list[str]:
    """Name and cells, all in the unit in which the smallest number is at least 1."""
    power = _power(min(filter(None, values), default=0), base, len(units))
    unit = f" ({units[power]})" if units[power] and any(values) else ""
    cells = ["-" if value is None else f"{value / base**power:,.2f}" for value in values]
    return [name + unit, *cells]


def _flop(count: float) -> str:
    power = _power(count, 1000, len(_DECIMAL))
    return f"{count / 1000**power:.4g} {_DECIMAL[power]}".rstrip()


def _power(value: float, base: int, count: int) -> int:
    """The largest one below `count` with value >= base ** power; 0 where there is none."""
    return max((p for p in range(count) if value >= base**p), default=0)
