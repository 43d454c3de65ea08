"""What a request gives back."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class RequestStats:
    """Work of one request, counted where it was done.

    Attributes:
        rows_per_layer: Rows recomputed in full, summed over all passes. [L]
        value_rows_per_layer: Rows of which only V was recomputed. [L]
        head_rows: Rows of the output head.
        flops: Multiplications and additions of matrix products and attention.
        bytes_read: Weights (shared by the requests of a pass, by rows) and K/V that these read.
        prefix_hit: True if the prefix was found in the prefix store, False if this request made
            its entry, None if its policy reads none.
        prefix_tokens: Shared-prefix rows (p); with discover, those that were found.
        depth: Layers whose prefix K/V were reused (b), as last chosen; -1: the policy has none.
        depth_reason: Why this depth.
        depths: Depths as chosen, one per refresh.
        refreshes: Passes that recomputed prefix rows from the store's entry.
        steps: Passes that committed tokens.
        passes: All passes.
        seconds: From the request's admission to its end; its batch shares the machine meanwhile.
        entry_rows_per_layer: As rows_per_layer, for making the prefix's entry. [L], zeros if found
        entry_flops: As flops, for making the prefix's entry.
        cache_bytes: Memory of this request's own cache.
    """

    rows_per_layer: tuple[int, ...]
    value_rows_per_layer: tuple[int, ...]
    head_rows: int
    flops: int
    bytes_read: int
    prefix_hit: bool | None
    prefix_tokens: int
    depth: int
    depth_reason: str
    depths: tuple[int, ...]
    refreshes: int
    steps: int
    passes: int
    seconds: float
    entry_rows_per_layer: tuple[int, ...]
    entry_flops: int
    cache_bytes: int

    @classmethod
    def of(cls, stats: Mapping[str, Any]) -> RequestStats:
        """From the engine's dict, by name."""
        values = {f.name: stats[f.name] for f in fields(cls)}
        for name in ("rows_per_layer", "value_rows_per_layer", "entry_rows_per_layer", "depths"):
            values[name] = tuple(int(value) for value in values[name])
        return cls(**values)

    @property
    def rows(self) -> int:
        """Rows computed in all layers, the prefix entry's included."""
        return sum(self.rows_per_layer) + sum(self.entry_rows_per_layer)


@dataclass(frozen=True, eq=False)
class Output:
    """What one prompt produced.

    Attributes:
        text: The response up to the first end token (`end_tokens`) or stop string, whichever
            comes first, without special tokens; "" if the checkpoint has no tokenizer.
        tokens: The whole response, what was given of it included. int32 [g]
        confidences: Probability of each token when it was committed, without noise or
            temperature, by every rule; NaN where none was. float32 [g]
        finish_reason: What ended the text: "eos" (an end token), "stop" (a stop string), "length"
            (nothing did) or "cancelled".
        stats: The work it took.
    """

    text: str
    tokens: NDArray[np.int32]
    confidences: NDArray[np.float32]
    finish_reason: str
    stats: RequestStats

    def as_dict(self) -> dict[str, Any]:
        """Plain Python values, ready for JSON (NaN becomes None)."""
        confidences = [None if c != c else c for c in self.confidences.tolist()]
        return {
            "text": self.text,
            "tokens": self.tokens.tolist(),
            "confidences": confidences,
            "finish_reason": self.finish_reason,
            "stats": asdict(self.stats),
        }


@dataclass(frozen=True, eq=False)
class StepEvent:
    """One denoising step of a streamed request.

    Attributes:
        step: 0, 1, ...
        canvas: Prompt and response after the step. int32 [N]
        positions: Canvas positions committed now, ascending. int64 [k]
        tokens: What was written there. int32 [k]
        confidences: Its probability. float32 [k]
        text: The response so far, ended as in Output; every masked position shows as
            `bicache.MASK_TEXT`.
    """

    step: int
    canvas: NDArray[np.int32]
    positions: NDArray[np.int64]
    tokens: NDArray[np.int32]
    confidences: NDArray[np.float32]
    text: str
