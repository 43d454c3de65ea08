"""Where the text of a response ends: at an end token, or before a stop string."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from .inputs import MASK_TEXT
from .tokenizer import Tokenizer

if TYPE_CHECKING:
    from . import _core


@dataclass(frozen=True)
class Ending:
    """What ends the text of one request.

    Attributes:
        tokenizer: The checkpoint's; None: there is no text.
        mask: The mask's id.
        ends: Ids that end it.
        stops: Strings that end it.
        early: Whether the request ends with its text (early_stop).
    """

    tokenizer: Tokenizer | None
    mask: int
    ends: tuple[int, ...]
    stops: tuple[str, ...]
    early: bool

    def text(self, response: NDArray[np.int32]) -> tuple[str, str | None]:
        """Text of a response [g] or of its beginning, and what ended it: "eos", "stop" or None."""
        text, ended = self._decoded(response)
        at = self._find(text)
        return (text, ended) if at is None else (text[:at], "stop")

    def settled(self, response: NDArray[np.int32]) -> bool:
        """Whether a stop string ends the text, and where, whatever masked positions become."""
        masked = np.flatnonzero(response == self.mask)
        text, ended = self._decoded(response[: masked[0]] if masked.size else response)
        open_ended = masked.size > 0 and ended is None
        if open_ended:
            text = text.rstrip("\ufffd")  # the first bytes of a character, perhaps
        at = self._find(text)
        if at is None or not open_ended:
            return at is not None
        # Another stop string may have begun before this one, and end behind the first mask.
        return not any(
            stop.startswith(text[begin:])
            for stop in self.stops
            for begin in range(max(0, len(text) - len(stop) + 1), at)
        )

    def _decoded(self, response: NDArray[np.int32]) -> tuple[str, str | None]:
        """Text up to the first end token, and "eos" where there is one."""
        ends = np.flatnonzero(np.isin(response, self.ends))
        ended = "eos" if ends.size else None
        if self.tokenizer is None:
            return "", ended
        before = response[: ends[0]] if ends.size else response
        return self.tokenizer.decode_masked(before, self.mask, MASK_TEXT), ended

    def _find(self, text: str) -> int | None:
        """Where the first stop string begins."""
        return min((at for at in map(text.find, self.stops) if at >= 0), default=None)


class EarlyStops:
    """Ends the requests of a generation whose text a stop string has ended.

    The engine knows end tokens; text is known here alone.

    Args:
        generation: Before its first step.
        endings: One per request.
        firsts: Where their responses begin on their canvases.
        given: What stands in these at the start [g]; None: masks alone.
    """

    def __init__(
        self,
        generation: _core.Generation,
        endings: Sequence[Ending],
        firsts: Sequence[int],
        given: Sequence[NDArray[np.int32] | None],
    ) -> None:
        self._generation = generation
        self._waiting = {
            i: (ending, first)
            for i, (ending, first) in enumerate(zip(endings, firsts, strict=True))
            if ending.early and ending.stops
        }
        for i, response in enumerate(given):
            if response is not None:
                self._look(i, response)

    def look(self, events: Iterable[_core.StepEvent]) -> None:
        """After a step, at what it committed."""
        for event in events:
            if event.request in self._waiting:
                self._look(event.request, event.canvas[self._waiting[event.request][1] :])

    def _look(self, request: int, response: NDArray[np.int32]) -> None:
        if request in self._waiting and self._waiting[request][0].settled(response):
            del self._waiting[request]
            self._generation.stop(request)
