"""How often answers with a cache equal those without, and the depth at which that is certain.

Similarity of K and V says little about whether answers stay the same; counting answers does. The
shares are judged by the lower end of their 95 % confidence interval, so that few pairs never look
safer than many.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

_Z = 1.959964  # standard normal quantile: 95 %, two-sided


@dataclass(frozen=True)
class AgreementBin:
    """Pairs whose requests have similar ratios, and how deep their prefix may be reused.

    Attributes:
        ratio_low: Smallest request ratio of its pairs, percent: round(100 p / (p + u + g)).
        ratio_high: The largest one.
        ratios: All that its pairs have, ascending; at the others in between nothing was measured.
        pairs: How many there are.
        agreed: At depth 0, 1, ...: requests of which all response tokens equal those under
            "none". Ends with the first depth that fails; empty where there were too few pairs.
        lower: Lower 95 % bounds of the shares agreed / pairs.
        depth: The largest depth such that the bound reaches the asked agreement there and at every
            smaller one; None: there is none, `note` says why.
        note: Why there is no depth; otherwise "".
    """

    ratio_low: int
    ratio_high: int
    ratios: tuple[int, ...]
    pairs: int
    agreed: tuple[int, ...]
    lower: tuple[float, ...]
    depth: int | None
    note: str

    @classmethod
    def of(
        cls, ratios: Sequence[int], pairs: int, agreed: Sequence[int], min_agreement: float
    ) -> AgreementBin:
        """The bin with these (ascending) ratios and counts; the rest follows from them."""
        lower = tuple(wilson_lower(count, pairs) for count in agreed)
        safe = next((b for b, x in enumerate(lower) if x < min_agreement), len(lower))
        note = ""
        if not lower:
            note = f"{pairs} pairs, at least {needed_pairs(min_agreement)} needed"
        elif safe == 0 and agreed[0] >= min_agreement * pairs:
            note = (
                f"{agreed[0]} of {pairs} answers agree at depth 0: too few pairs to show "
                f"{min_agreement:g} with that many misses; measure more"
            )
        elif safe == 0:
            note = (
                f"{agreed[0]} of {pairs} answers agree at depth 0: reuse within the request "
                "already changes too many; lower refresh_steps"
            )
        depth = safe - 1 if safe else None
        return cls(ratios[0], ratios[-1], tuple(ratios), pairs, tuple(agreed), lower, depth, note)

    def as_dict(self) -> dict[str, Any]:
        """Plain Python values, ready for JSON."""
        lists = {name: list(getattr(self, name)) for name in ("ratios", "agreed", "lower")}
        return asdict(self) | lists


def wilson_lower(agreed: int, pairs: int) -> float:
    """Lower end of the 95 % Wilson score interval of the share agreed / pairs (Wilson 1927)."""
    share, z2 = agreed / pairs, _Z * _Z
    spread = _Z * math.sqrt(share * (1 - share) / pairs + z2 / (4 * pairs * pairs))
    return max(0.0, (share + z2 / (2 * pairs) - spread) / (1 + z2 / pairs))


def needed_pairs(min_agreement: float) -> int:
    """The fewest pairs that can show `min_agreement` (in (0, 1)): with all of them agreeing."""
    # All agreeing, the bound is n / (n + z^2); solved for n, from just below.
    count = max(1, int(_Z * _Z * min_agreement / (1 - min_agreement)) - 1)
    while wilson_lower(count, count) < min_agreement:
        count += 1
    return count


def merge_ratios(ratios: Sequence[int], needed: int) -> list[list[int]]:
    """Groups pairs by ratio: neighbouring ratios are merged until a group has `needed` pairs.

    Args:
        ratios: The request ratio of each pair, percent.
        needed: Pairs that a group must have.

    Returns:
        Indices of pairs, by ascending ratio. A too small rest is in the last group; there is one
        group of less than `needed` pairs only where all pairs together are too few.
    """
    by_ratio: dict[int, list[int]] = {}
    for index, ratio in enumerate(ratios):
        by_ratio.setdefault(ratio, []).append(index)
    groups: list[list[int]] = [[]]
    for ratio in sorted(by_ratio):
        if len(groups[-1]) >= needed:
            groups.append([])
        groups[-1] += by_ratio[ratio]
    if len(groups) > 1 and len(groups[-1]) < needed:
        rest = groups.pop()
        groups[-1] += rest
    return groups


def measure_bins(
    ratios: Sequence[int],
    count_agreed: Callable[[list[int], int], int],
    layers: int,
    min_agreement: float,
) -> tuple[AgreementBin, ...]:
    """Goes deeper in every bin until the agreement is no longer certain.

    Args:
        ratios: The request ratio of each pair, percent.
        count_agreed: (indices of pairs, depth) -> how many of them answer as under "none".
        layers: The largest depth.
        min_agreement: What the lower bound must reach.
    """
    needed = needed_pairs(min_agreement)
    bins = []
    for group in merge_ratios(ratios, needed):
        agreed: list[int] = []
        depths = range(layers + 1) if len(group) >= needed else ()
        for depth in depths:
            agreed.append(count_agreed(group, depth))
            if wilson_lower(agreed[-1], len(group)) < min_agreement:
                break
        own = sorted({ratios[i] for i in group})
        bins.append(AgreementBin.of(own, len(group), agreed, min_agreement))
    return tuple(bins)


def run_time_table(bins: Sequence[AgreementBin]) -> dict[int, int]:
    """{ratio: depth} for a cache string, read at the largest ratio <= the request's.

    Nothing is claimed where nothing was measured: below and above the bins the depth is 0, between
    two of them the smaller of theirs.

    Raises:
        ValueError: A bin has no depth.
    """
    table: dict[int, int] = {}
    depth = 0

    def put(ratio: int, value: int) -> None:
        nonlocal depth
        if value != depth:
            table[ratio] = depth = value

    before: AgreementBin | None = None
    for b in bins:
        if b.depth is None:
            raise ValueError(
                f"[profile] agreement at ratios {b.ratio_low}-{b.ratio_high}: expected a safe "
                f"depth, got none: {b.note}"
            )
        if before is not None and before.depth is not None and b.ratio_low > before.ratio_high + 1:
            put(before.ratio_high + 1, min(before.depth, b.depth))
        put(b.ratio_low, b.depth)
        before = b
    if before is not None and before.ratio_high < 100:
        put(before.ratio_high + 1, 0)
    return table or {0: 0}
