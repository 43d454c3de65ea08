"""What may choose a depth in Python, and what BiCache(depth=...) accepts."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Protocol

from . import _core
from .inputs import check_text, integer

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


class HasDepths(Protocol):
    """What a DepthTable is to BiCache."""

    def depth_string(self) -> str: ...


def depth_hook(depth: object, layers: int | None) -> _core.DepthHook | None:
    """`depth` as the engine asks it, on a model of `layers` layers; None: it is no Python rule."""
    if not isinstance(depth, DepthPolicy):
        return _core.DepthHook(depth) if callable(depth) else None
    depths = None if layers is None else depth.reachable(layers)
    if depths is not None:
        if not isinstance(depths, Iterable):
            raise TypeError(
                "[cache] depth hook reachable: expected depths or None, "
                f"got {type(depths).__name__}"
            )
        depths = [integer(b, "cache] depth hook reachable", 0, layers) for b in depths]
    return _core.DepthHook(depth.depth, reachable=depths, observes=bool(depth.observes))


def checked_depth(depth: object) -> object:
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
