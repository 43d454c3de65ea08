"""Cache policies as objects: validated settings that turn into the engine's cache strings.

`LLM(cache=...)` and `generate(cache=...)` take these or the strings themselves; both mean the same.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass

from . import _core
from .depth_rules import DepthFunction, DepthPolicy, HasDepths, checked_depth, depth_hook
from .inputs import check_text, integer, number, shown

_MAX_STEPS = 10**9 - 1


class Policy(ABC):
    """Which rows are recomputed in which layer at which step.

    `a + b` joins a policy for the shared prefix's rows (Naive, BiCache) with one for all others
    (NoCache, FastDLLM, DLLMCache), in either order. ValueError: both speak for the same rows.
    """

    @abstractmethod
    def spec(self) -> str:
        """The cache string of this policy, e.g. "bicache:depth=5,refresh_steps=16"."""

    def handle(self, layers: int | None = None) -> _core.Policy:
        """As the engine takes it, for a model of `layers` layers."""
        return _core.make_policy(self.spec())

    def __add__(self, other: Policy) -> Policy:
        _check_no_string(other)
        return Composed(self, other) if isinstance(other, Policy) else NotImplemented

    def __radd__(self, other: object) -> Policy:
        _check_no_string(other)
        return NotImplemented


@dataclass(frozen=True)
class Composed(Policy):
    """What `a + b` makes: one policy for the shared prefix's rows, one for all others.

    A refresh of either side touches its own rows only.

    Attributes:
        prefix: Speaks for the rows of the shared prefix. May be given second.
        rest: Speaks for all other rows.
    """

    prefix: Policy
    rest: Policy

    def __post_init__(self) -> None:
        # The engine knows which of them speaks for the prefix, and names that one first.
        if not self.spec().startswith(self.prefix.spec()):
            first, second = self.rest, self.prefix
            object.__setattr__(self, "prefix", first)
            object.__setattr__(self, "rest", second)

    def spec(self) -> str:
        """The cache string of both, the prefix's policy first."""
        return self.handle().spec

    def handle(self, layers: int | None = None) -> _core.Policy:
        """As the engine takes it, for a model of `layers` layers."""
        return _core.compose(self.prefix.handle(layers), self.rest.handle(layers))


@dataclass(frozen=True)
class NoCache(Policy):
    """Every row is recomputed in every layer at every step: the reference."""

    def spec(self) -> str:
        """The cache string of this policy."""
        return "none"


@dataclass(frozen=True)
class Naive(Policy):
    """Prefix caching as for causal language models; wrong for diffusion ones, here to show it.

    Attributes:
        source: Where the prefix's K/V come from: "alone" (the prefix by itself) or
            "first_request" (the canvas of the first request that has this prefix).
    """

    source: str = "alone"

    def __post_init__(self) -> None:
        _check_choice(self.source, "naive source", ("alone", "first_request"))

    def spec(self) -> str:
        """The cache string of this policy."""
        return f"naive:source={self.source}"


@dataclass(frozen=True)
class BiCache(Policy):
    """The shared prefix's K/V are reused in shallow layers, recomputed deeper (arXiv 2606.07571).

    Attributes:
        depth: Layers whose prefix K/V are reused (b):
            a number for all requests, 0 included (no reuse across requests);
            a table {ratio: depth}, read at the largest ratio <= the percentage of prefix tokens;
            a string as in a cache string: "5", "0:1/30:10", "agreement:48:5/86:0" or "probe:0.97"
            (experimental: at every refresh, the leading run of layers in which K, V and the state
            behind them of some observed prefix rows are more alike than 0.97 to the stored ones;
            0 before the first measurement);
            a DepthTable, as `bicache.profile` makes it: its agreement calibration (give the
            refresh_steps and splice it was measured with, or use its cache_string());
            a DepthPolicy, or a function from RequestInfo to a number. They are asked at every
            refresh; an exception in one ends the generation it came from.
        refresh_steps: Steps between two recomputations of the deeper layers' prefix K/V.
        splice: "official" (prefix rows rejoin in layer depth, as published) or "strict" (one
            layer earlier, so that exactly depth layers use stale K/V).
        refresh: "steps" (every refresh_steps), "block" (at each block's first step) or
            "drift:LIMIT" (when observed prefix rows have moved by more than LIMIT = 1 - cosine in
            some layer, and at least every refresh_steps).
        source: "alone" (the K/V of the prefix by itself, as published) or "first_request" (as they
            stood in the first request's canvas; for comparison).
        ratio: How tables are read: "request", p / (p + u + g), as the published run time does, or
            "prompt", p / (p + u), as the published profiler does (sections 3.1 and 3.2).
        probe_rows: Prefix rows that are observed, where something asks for it.
    """

    depth: int | str | Mapping[int, int] | DepthPolicy | DepthFunction | HasDepths
    refresh_steps: int = 16
    splice: str = "official"
    refresh: str = "steps"
    source: str = "alone"
    ratio: str = "request"
    probe_rows: int = 8

    def __post_init__(self) -> None:
        object.__setattr__(self, "depth", checked_depth(self.depth))
        for name in ("refresh_steps", "probe_rows"):
            value = integer(getattr(self, name), f"cache] bicache {name}", 1, _MAX_STEPS)
            object.__setattr__(self, name, value)
        for name in ("splice", "refresh", "source", "ratio"):
            value = getattr(self, name)
            if not isinstance(value, str):
                raise TypeError(f"[cache] bicache {name}: expected a string, got {value!r}")
            if not value or set(value) & set(",+="):
                raise ValueError(f"[cache] bicache {name}: expected a setting, got {value!r}")
            check_text(value, f"cache] bicache {name}")
        self.handle()  # the engine checks the values

    def __hash__(self) -> int:
        return hash(self.spec())

    def spec(self) -> str:
        """The cache string of this policy; a Python depth rule shows as depth=hook."""
        return self.handle().spec

    def _settings(self) -> str:
        depth = self.depth
        if isinstance(depth, Mapping):
            text = "/".join(f"{ratio}:{layers}" for ratio, layers in depth.items())
        else:
            text = str(depth) if isinstance(depth, (int, str)) else "hook"
        return (
            f"bicache:depth={text},refresh_steps={self.refresh_steps},splice={self.splice},"
            f"refresh={self.refresh},source={self.source},ratio={self.ratio},"
            f"probe_rows={self.probe_rows}"
        )

    def handle(self, layers: int | None = None) -> _core.Policy:
        """As the engine takes it, for a model of `layers` layers."""
        return _core.make_policy(self._settings(), depth_hook(self.depth, layers))


@dataclass(frozen=True)
class FastDLLM(Policy):
    """Rows outside the block that is being decoded lend K/V (Fast-dLLM, arXiv 2505.22618).

    At a block's first step all rows run; at its other steps the block alone, or the block and what
    follows it. Pays where blocks are short beside the canvas; with many tokens per step (threshold)
    a block may be done before the second step, and then nothing is saved. `+ BiCache(...)`
    leaves the shared prefix to BiCache.

    Attributes:
        mode: "prefix" (all rows from the block's start on run: the prefix cache) or "dual" (the
            block alone: prefix and suffix cache).
        refresh_steps: All rows run at every so many steps of a block as well; None: only at its
            first, as published. 1 recomputes everything: equal to "none".
        block_start: "commit" (the pass over all rows commits tokens, as in Fast-dLLM) or "fill"
            (it fills the caches only, and the block's rows run again for the same step, as in the
            official BiCache engine).
    """

    mode: str = "prefix"
    refresh_steps: int | None = None
    block_start: str = "commit"

    def __post_init__(self) -> None:
        _check_choice(self.mode, "fast_dllm mode", ("prefix", "dual"))
        _check_choice(self.block_start, "fast_dllm block_start", ("commit", "fill"))
        if self.refresh_steps is not None:
            value = integer(self.refresh_steps, "cache] fast_dllm refresh_steps", 1, _MAX_STEPS)
            object.__setattr__(self, "refresh_steps", value)

    def spec(self) -> str:
        """The cache string of this policy."""
        return self.handle().spec

    def handle(self, layers: int | None = None) -> _core.Policy:
        """As the engine takes it, for a model of `layers` layers."""
        refresh = "none" if self.refresh_steps is None else self.refresh_steps
        return _core.make_policy(
            f"fast_dllm:mode={self.mode},refresh_steps={refresh},block_start={self.block_start}"
        )


@dataclass(frozen=True)
class DLLMCache(Policy):
    """Prompt rows run rarely, response rows where their V moved (dLLM-Cache, arXiv 2506.06295).

    The response rows run all together every gen_interval_steps; at other steps, in each layer but
    the first (which they always run through), those of them whose V has moved most, and the others
    add the output they had. Pays most where the prompt is much longer than the response.
    `+ BiCache(...)` leaves the shared prefix to BiCache: the prompt is then the request's own.

    Attributes:
        prompt_interval_steps: Steps between two recomputations of the prompt's rows (Kp).
        gen_interval_steps: Steps between two recomputations of all response rows (Kr). Both 1:
            everything is recomputed, equal to "none".
        transfer_ratio: Share of the response rows that are recomputed at other steps, 0..1 (rho);
            0: none.
        drift: What V's movement is measured from: "last_step", as published (slow drift never
            shows), or "since_recompute" (V as it was when the row was last recomputed).
        new_tokens: What becomes of rows whose token the step before committed: "compete" for being
            chosen, as published, or "recompute" (they are, besides the share: where a step commits
            more tokens than the share holds, some would never get past the first layer).
    """

    prompt_interval_steps: int = 50
    gen_interval_steps: int = 7
    transfer_ratio: float = 0.25
    drift: str = "last_step"
    new_tokens: str = "compete"

    def __post_init__(self) -> None:
        for name in ("prompt_interval_steps", "gen_interval_steps"):
            value = integer(getattr(self, name), f"cache] dllm_cache {name}", 1, _MAX_STEPS)
            object.__setattr__(self, name, value)
        ratio = number(self.transfer_ratio, "cache] dllm_cache transfer_ratio", 0, 1)
        object.__setattr__(self, "transfer_ratio", ratio)
        _check_choice(self.drift, "dllm_cache drift", ("last_step", "since_recompute"))
        _check_choice(self.new_tokens, "dllm_cache new_tokens", ("compete", "recompute"))

    def spec(self) -> str:
        """The cache string of this policy."""
        return self.handle().spec

    def handle(self, layers: int | None = None) -> _core.Policy:
        """As the engine takes it, for a model of `layers` layers."""
        return _core.make_policy(
            f"dllm_cache:prompt_interval_steps={self.prompt_interval_steps},"
            f"gen_interval_steps={self.gen_interval_steps},"
            f"transfer_ratio={self.transfer_ratio},drift={self.drift},"
            f"new_tokens={self.new_tokens}"
        )


def _check_no_string(other: object) -> None:
    if isinstance(other, str):
        raise TypeError(
            "[cache] '+': expected two policy objects, or one string such as "
            f'"bicache:depth=5+dllm_cache", got an object and {shown(other)}'
        )


def engine_policy(cache: object, layers: int) -> _core.Policy:
    """A cache string or a policy object as the engine takes it, for a model of `layers` layers.

    Raises:
        TypeError: Neither of them.
        ValueError: Unknown policies or settings; the message lists what exists.
    """
    if isinstance(cache, Policy):
        return cache.handle(layers)
    if not isinstance(cache, str):
        raise TypeError(
            "[cache] policy: expected a string or a policy object, "
            f"got {shown(cache)} ({type(cache).__name__})"
        )
    return _core.make_policy(check_text(cache, "cache] policy"))


def _check_choice(value: object, what: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ValueError(f"[cache] {what}: expected {' or '.join(choices)}, got {value!r}")
