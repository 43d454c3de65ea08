"""Cache policies as objects: validated settings that turn into the engine's cache strings.

`LLM(cache=...)` and `generate(cache=...)` take these or the strings themselves; both mean the same.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass

from .inputs import integer

_MAX_STEPS = 10**9 - 1


class Policy(ABC):
    """Which rows are recomputed in which layer at which step."""

    @abstractmethod
    def spec(self) -> str:
        """The cache string of this policy, e.g. "bicache:depth=5,refresh_steps=16"."""


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


@dataclass(frozen=True)
class BiCache(Policy):
    """The shared prefix's K/V are reused in shallow layers, recomputed deeper (arXiv 2606.07571).

    Attributes:
        depth: Layers whose prefix K/V are reused: one number for all requests, or a table
            {ratio: depth}, read at the largest ratio <= the percentage of prefix tokens in the
            request (generated ones included).
        refresh_steps: Steps between two recomputations of the deeper layers' prefix K/V.
        splice: "official" (prefix rows rejoin in layer depth, as published) or "strict" (one
            layer earlier, so that exactly depth layers use stale K/V).
    """

    depth: int | Mapping[int, int]
    refresh_steps: int = 16
    splice: str = "official"

    def __post_init__(self) -> None:
        depth: int | dict[int, int]
        if isinstance(self.depth, Mapping):
            if not self.depth:
                raise ValueError("[cache] bicache depth: expected at least one ratio, got {}")
            depth = {
                integer(ratio, "cache] bicache depth, ratio", 0, 100): integer(
                    layers, f"cache] bicache depth at ratio {ratio}", 0
                )
                for ratio, layers in self.depth.items()
            }
            depth = dict(sorted(depth.items()))
        else:
            depth = integer(self.depth, "cache] bicache depth", 0)
        steps = integer(self.refresh_steps, "cache] bicache refresh_steps", 1, _MAX_STEPS)
        if self.splice not in ("official", "strict"):
            raise ValueError(
                f"[cache] bicache splice: expected official or strict, got {self.splice!r}"
            )
        object.__setattr__(self, "depth", depth)
        object.__setattr__(self, "refresh_steps", steps)

    def __hash__(self) -> int:
        return hash(self.spec())

    def spec(self) -> str:
        """The cache string of this policy."""
        depth = (
            "/".join(f"{ratio}:{layers}" for ratio, layers in self.depth.items())
            if isinstance(self.depth, Mapping)
            else str(self.depth)
        )
        return f"bicache:depth={depth},refresh_steps={self.refresh_steps},splice={self.splice}"
