"""Cache policies as objects: validated settings that turn into the engine's cache strings.

`LLM(cache=...)` and `generate(cache=...)` take these or the strings themselves; both mean the same.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from . import _core
from .inputs import check_text, integer

_MAX_STEPS = 10**9 - 1


class Policy(ABC):
    """Which rows are recomputed in which layer at which step."""

    @abstractmethod
    def spec(self) -> str:
        """The cache string of this policy, e.g. "bicache:depth=5,refresh_steps=16"."""

    def handle(self, layers: int | None = None) -> _core.Policy:
        """As the engine takes it, for a model of `layers` layers."""
        return _core.make_policy(self.spec())


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
        if self.source not in ("alone", "first_request"):
            raise ValueError(
                f"[cache] naive source: expected alone or first_request, got {self.source!r}"
            )

    def spec(self) -> str:
        """The cache string of this policy."""
        return f"naive:source={self.source}"


RequestInfo = _core.RequestInfo
DepthFunction = Callable[[RequestInfo], int]


class DepthPolicy(ABC):
    """A user's rule for how deep a request reuses its prefix; `BiCache(depth=MyRule())`.

    Attributes:
        observes: Whether `info.drift` is wanted: some prefix rows then run along at every refresh,
            which costs what the statistics count.
    """

    observes: bool = False

    @abstractmethod
    def depth(self, info: RequestInfo) -> int:
        """Depth b, 0..L, from this step on; asked at every refresh.

        Args:
            info: p, u, g and n (rows of prefix, own prompt, response and all), layers (L), ratio
                (100 p / n), step, depth (in force so far; -1: none), drift (1 - cosine of the
                observed rows' K and V to the prefix entry's, per layer that the entry holds;
                None: not measured yet) and state_drift (the same of the residual entering the
                layer; NaN where the entry does not hold it, as in layer 0). ratio is that of the
                request, whatever BiCache.ratio says.
        """

    def reachable(self, layers: int) -> Sequence[int] | None:
        """Every depth it may return on a model of `layers` layers; None: all of them.

        The store keeps what these can read and no more.
        """
        return None


class _HasDepths(Protocol):
    def depth_string(self) -> str: ...


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

    depth: int | str | Mapping[int, int] | DepthPolicy | DepthFunction | _HasDepths
    refresh_steps: int = 16
    splice: str = "official"
    refresh: str = "steps"
    source: str = "alone"
    ratio: str = "request"
    probe_rows: int = 8

    def __post_init__(self) -> None:
        object.__setattr__(self, "depth", _checked_depth(self.depth))
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
        hook = None
        if isinstance(self.depth, DepthPolicy):
            rule = self.depth
            depths = None if layers is None else rule.reachable(layers)
            if depths is not None:
                if not isinstance(depths, Iterable):
                    raise TypeError(
                        "[cache] depth hook reachable: expected depths or None, "
                        f"got {type(depths).__name__}"
                    )
                depths = [integer(b, "cache] depth hook reachable", 0, layers) for b in depths]
            hook = _core.DepthHook(rule.depth, reachable=depths, observes=bool(rule.observes))
        elif callable(self.depth):
            hook = _core.DepthHook(self.depth)
        return _core.make_policy(self._settings(), hook)


def _checked_depth(depth: object) -> object:
    """What BiCache.depth holds: a number, a sorted table, a string without separators, a rule."""
    if isinstance(depth, Mapping):
        if not depth:
            raise ValueError("[cache] bicache depth: expected at least one ratio, got {}")
        table = {
            integer(ratio, "cache] bicache depth, ratio", 0, 100): integer(
                layers, f"cache] bicache depth at ratio {ratio}", 0
            )
            for ratio, layers in depth.items()
        }
        return dict(sorted(table.items()))
    if isinstance(depth, type):
        raise TypeError(
            f"[cache] bicache depth: expected a depth or a rule, got the class {depth.__name__} "
            "itself"
        )
    if hasattr(depth, "depth_string"):  # a DepthTable
        depth = depth.depth_string()
    if isinstance(depth, str):
        if not depth or depth == "hook" or set(depth) & set(",+="):
            raise ValueError(
                "[cache] bicache depth: expected a number, a table such as 0:1/30:10, "
                f"agreement:TABLE or probe:TAU, got {depth!r}"
            )
        return check_text(depth, "cache] bicache depth")
    if isinstance(depth, DepthPolicy) or callable(depth):
        return depth
    return integer(depth, "cache] bicache depth", 0)
