"""DepthTable: what `profile` measured of a model, and the depths that follow from it."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..inputs import integer, shown
from ..jsonfile import as_path, write_atomically
from .agreement import AgreementBin, run_time_table

RATIOS = 101  # 0..100 percent
RATIO_KINDS = {"prompt": "p / (p + u)", "request": "p / (p + u + g)"}
_MAX_STEPS = 10**9 - 1
_SIMILARITIES = ("similarity_k", "similarity_v", "similarity_hidden")


@dataclass(frozen=True, eq=False)
class DepthTable:
    """Similarity and agreement by ratio of prefix tokens, and the reusable depths they allow.

    Attributes:
        layers: L, of the model.
        tau: Similarity that a reusable layer must exceed.
        ratio: Which ratio the similarities are sorted by: "prompt", round(100 p / (p + u)), or
            "request", round(100 p / (p + u + g)).
        splice: "official" or "strict", of the agreement.
        refresh_steps: Refresh interval T of the agreement, in steps.
        options: Generation options of the agreement (and g of the ratio "request").
        min_agreement: What the lower 95 % bound of the agreement must reach.
        pairs: Pairs measured.
        fingerprint: Of the model's weights, hexadecimal.
        data_hash: SHA-256 of the token ids of all pairs, hexadecimal.
        counts: Pairs of each ratio. int64 [101]
        similarity_k: Mean cosine between the prefix's K computed alone and in the full input, all
            KV heads as one vector; NaN where `counts` is 0. float64 [101, L]
        similarity_v: The same of V. float64 [101, L]
        similarity_hidden: The same of the residual that enters the layer. float64 [101, L]
        agreement: One bin per range of request ratios, ascending; empty: not measured.
    """

    layers: int
    tau: float
    ratio: str
    splice: str
    refresh_steps: int
    options: Mapping[str, Any]
    min_agreement: float
    pairs: int
    fingerprint: str
    data_hash: str
    counts: NDArray[np.int64]
    similarity_k: NDArray[np.float64]
    similarity_v: NDArray[np.float64]
    similarity_hidden: NDArray[np.float64]
    agreement: tuple[AgreementBin, ...]

    @property
    def similarity(self) -> NDArray[np.float64]:
        """The paper's: mean of K and V. float64 [101, L], NaN where there is no data."""
        return (self.similarity_k + self.similarity_v) / 2

    @property
    def table(self) -> dict[int, int]:
        """{ratio: depth} from the similarities, as published (arXiv 2606.07571, profiler).

        The depth of a ratio is its leading run of layers with similarity > tau. Going up, a ratio
        is in the table where its depth exceeds all before. Ratios without data add nothing.
        """
        table: dict[int, int] = {}
        deepest = 0
        similarity = self.similarity
        for ratio in np.flatnonzero(self.counts).tolist():
            depth = _leading_run(similarity[ratio], self.tau)
            if depth > deepest:
                table[ratio] = deepest = depth
        return table

    def lookup(self, ratio: int) -> int:
        """Depth of `table` at the largest ratio <= `ratio` (percent); 0 below the first."""
        return read_table(self.table, integer(ratio, "profile] ratio", 0, 100))

    def cache_string(self, kind: str = "agreement") -> str:
        """A bicache policy with the measured depths, e.g. "bicache:depth=agreement:48:5/86:0,...".

        Args:
            kind: "agreement": the depths at which answers stayed the same, 0 at ratios that were
                not measured. "similarity": `table`, as published: a request reads it at
                p / (p + u + g), whichever `ratio` it was sorted by (add ",ratio=prompt" to have a
                table of ratio="prompt" read at p / (p + u)).

        Raises:
            ValueError: There is no safe depth (the message says why), or no such kind.
        """
        return (
            f"bicache:depth={self.depth_string(kind)},"
            f"refresh_steps={self.refresh_steps},splice={self.splice}"
        )

    def depth_string(self, kind: str = "agreement") -> str:
        """The depths alone, as in a cache string: "agreement:48:5/86:0" or "table:0:1/30:10".

        Args:
            kind: As for cache_string().

        Raises:
            ValueError: As for cache_string().
        """
        if kind not in ("agreement", "similarity"):
            raise ValueError(f"[profile] kind: expected agreement or similarity, got {shown(kind)}")
        if kind == "similarity":
            name, table = "table", self.table
            if not table:
                raise ValueError(
                    f"[profile] similarity: expected a layer above tau {self.tau:g}, got none"
                )
        else:
            if not self.agreement:
                raise ValueError(
                    "[profile] agreement: expected it to be measured, got a table made without"
                )
            name, table = "agreement", run_time_table(self.agreement)
        return f"{name}:{_joined(table)}"

    def calibration(self) -> dict[str, Any]:
        """What bicache.json keeps of the agreement, for cache="auto".

        Raises:
            ValueError: As for cache_string().
        """
        return {
            "cache": self.cache_string(),
            "kind": "agreement",
            "fingerprint": self.fingerprint,
            "data_hash": self.data_hash,
            "pairs": self.pairs,
            "min_agreement": self.min_agreement,
            "options": dict(self.options),
            "bins": [b.as_dict() for b in self.agreement],
        }

    def as_dict(self) -> dict[str, Any]:
        """Plain Python values, ready for JSON (NaN becomes None)."""
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        return {
            "format": 1,
            **values,
            "options": dict(self.options),
            "counts": self.counts.tolist(),
            **{name: _with_none(values[name]) for name in _SIMILARITIES},
            "agreement": [b.as_dict() for b in self.agreement],
            "table": {str(ratio): depth for ratio, depth in self.table.items()},
        }

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes JSON, one member a line; the file appears whole or not at all.

        Raises:
            TypeError: Not a path.
            ValueError: There is something else than a regular file.
            OSError: It cannot be written.
        """
        members = (
            f" {json.dumps(name)}: {json.dumps(value, allow_nan=False)}"
            for name, value in self.as_dict().items()
        )
        where = as_path(path, "profile] path")
        write_atomically(where, "{\n" + ",\n".join(members) + "\n}\n")

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> DepthTable:
        """Reads what save() wrote.

        Raises:
            OSError: There is no such file.
            ValueError: The file is damaged; names what is wrong.
        """
        from .depth_file import read_depth_table

        return read_depth_table(path)

    def plot(self, path: str | os.PathLike[str]) -> None:
        """Draws the similarities as a heat map (ratio x layer) with the depths over it.

        Args:
            path: Where to; its ending is the format, e.g. "profile.png".

        Raises:
            ImportError: matplotlib is missing; says how to install it.
            ValueError: The ending is no format.
        """
        from .depth_plot import write_plot

        write_plot(self, path)

    def summary(self) -> str:
        """The result for a reader, in a few lines."""
        missing = _spans(np.flatnonzero(self.counts == 0).tolist())
        lines = [
            f"{self.layers} layers, {self.pairs} pairs; "
            f"model {self.fingerprint[:12]}, data {self.data_hash[:12]}",
            f"similarity of K and V > {self.tau:g} at ratio {RATIO_KINDS[self.ratio]} (percent)",
            f"  depths   {_joined(self.table) or 'none'}",
            f"  no data: {missing or 'none'}",
        ]
        if not self.agreement:
            return "\n".join([*lines, "agreement: not measured"])
        lines.append(
            f"agreement with none >= {self.min_agreement:g} (lower 95 % bound) at ratio "
            f"{RATIO_KINDS['request']} (percent), refresh_steps={self.refresh_steps}, "
            f"splice={self.splice}"
        )
        measured: set[int] = set()
        for b in self.agreement:
            found = f"depth {b.depth}" if b.depth is not None else f"no safe depth ({b.note})"
            span = _spans(range(b.ratio_low, b.ratio_high + 1))
            lines.append(f"  {span}: {b.pairs} pairs, {found}")
            if b.agreed:
                lines.append(f"    agreed at depth 0, 1, ...: {' '.join(map(str, b.agreed))}")
            measured |= set(b.ratios)
        missing = _spans([ratio for ratio in range(RATIOS) if ratio not in measured])
        lines.append(f"  no data: {missing or 'none'}")
        lines.append("  depth between two bins: the smaller of theirs; below and above all bins: 0")
        if all(b.depth is not None for b in self.agreement):
            lines.append(f"  cache    {self.cache_string()}")
        return "\n".join(lines)


def read_table(table: Mapping[int, int], ratio: int) -> int:
    """The depth at the largest key <= ratio; 0 below the first."""
    return next((table[key] for key in sorted(table, reverse=True) if key <= ratio), 0)


def check_settings(
    where: str, *, tau: object, ratio: object, splice: object, refresh_steps: object,
    min_agreement: object,
) -> dict[str, Any]:  # fmt: skip
    """The settings of a profile by name, checked.

    Args:
        where: For messages, e.g. "profile".

    Raises:
        TypeError: A wrong type.
        ValueError: A wrong value.
    """
    for name, value, choices in (
        ("ratio", ratio, tuple(RATIO_KINDS)),
        ("splice", splice, ("official", "strict")),
    ):
        if value not in choices:
            raise ValueError(
                f"[{where}] {name}: expected {' or '.join(choices)}, got {shown(value)}"
            )
    return {
        "tau": _number(tau, f"[{where}] tau", 0.0),
        "ratio": ratio,
        "splice": splice,
        "refresh_steps": integer(refresh_steps, f"{where}] refresh_steps", 1, _MAX_STEPS),
        "min_agreement": _number(min_agreement, f"[{where}] min_agreement", math.ulp(0.0)),
    }


def _number(value: object, where: str, low: float) -> float:
    """`value` as a float in [low, 1)."""
    expected = f"{where}: expected a number {'>=' if low == 0 else '>'} 0 and < 1"
    if isinstance(value, (bool, np.bool_)) or not isinstance(
        value, (int, float, np.integer, np.floating)
    ):
        raise TypeError(f"{expected}, got {shown(value)}")
    if not low <= value < 1:
        raise ValueError(f"{expected}, got {shown(value)}")
    return float(value)


def _leading_run(values: NDArray[np.float64], tau: float) -> int:
    """How many of `values` [L] exceed tau before the first that does not."""
    failing = np.flatnonzero(~(values > tau))
    return int(failing[0]) if failing.size else len(values)


def _joined(table: Mapping[int, int]) -> str:
    return "/".join(f"{ratio}:{depth}" for ratio, depth in table.items())


def _spans(numbers: Iterable[int]) -> str:
    """Ascending numbers as "0-46, 63-79, 99"."""
    spans: list[list[int]] = []
    for number in numbers:
        if spans and spans[-1][1] == number - 1:
            spans[-1][1] = number
        else:
            spans.append([number, number])
    return ", ".join(str(a) if a == b else f"{a}-{b}" for a, b in spans)


def _with_none(values: NDArray[np.float64]) -> list[list[float | None]]:
    return [[None if x != x else x for x in row] for row in values.tolist()]
