"""Settings of shared prefixes: whose they are, and when one is looked for."""

from __future__ import annotations

from dataclasses import dataclass

from .inputs import check_text, integer

_MAX = 2**31 - 1


@dataclass(frozen=True)
class Discover:
    """Looks for shared prefixes in prompts that come without one.

    The longest whole stored prefix that begins the prompt is taken (never the head of a longer
    one: its rows saw the rest of it); or, where the last prompts of the same salt show a common
    head that is longer by at least `min_tokens`, that head, which is then stored. What a request
    reuses, and so what it answers, then depends on what came before it: discovery stands outside
    the promise that the order of requests does not matter.

    Attributes:
        min_tokens: Shortest common head that is worth storing.
        min_requests: Requests that must begin with it, this one included.
    """

    min_tokens: int = 64
    min_requests: int = 3

    def __post_init__(self) -> None:
        where = "generate] discover"
        object.__setattr__(
            self, "min_tokens", integer(self.min_tokens, f"{where} min_tokens", 1, _MAX)
        )
        object.__setattr__(
            self, "min_requests", integer(self.min_requests, f"{where} min_requests", 2, _MAX)
        )


def as_discover(value: object) -> tuple[int, int] | None:
    """What the engine takes for `discover=`: (min_tokens, min_requests), or None."""
    if value is None or value is False:
        return None
    if value is True:
        value = Discover()
    if not isinstance(value, Discover):
        raise TypeError(
            "[generate] discover: expected True, False or a bicache.Discover, "
            f"got {type(value).__name__}"
        )
    return value.min_tokens, value.min_requests


def as_salt(value: object, where: str = "generate") -> str:
    """What the engine takes for `cache_salt=`; `where`: for messages."""
    if value is None:
        return ""
    if not isinstance(value, str):
        raise TypeError(f"[{where}] cache_salt: expected a string, got {type(value).__name__}")
    return check_text(value, f"{where}] cache_salt")
