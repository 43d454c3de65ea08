"""profile(): how deep a model's prefix may be reused, measured on pairs of prefix and prompt.

Two measurements. *Similarity*, as published with BiCache (arXiv 2606.07571, its profiler): the
cosine between the prefix's K and V computed alone and computed in the full input. *Agreement*: how
many whole answers stay the same. The first is cheap and predicts the second poorly, because what
hurts is the residual at the splice more than K and V.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .. import _core
from ..inputs import Prompt, shown
from ..jsonfile import as_path
from ..llm import LLM
from ..options import documented
from .agreement import AgreementBin, measure_bins
from .depth_table import RATIOS, DepthTable, check_settings
from .journal import Journal
from .pairs import Request, data_hash, encode_pairs, resolve_all

_TAPPED = {"k": "k", "v": "v", "residual": "hidden"}  # tap's name -> ours
_BATCH_REQUESTS, _BATCH_ROWS = 32, 4096

Similarities = dict[str, list[float]]  # "k", "v", "hidden": one value per layer


@documented
def profile(
    llm: LLM,
    pairs: Iterable[tuple[Prompt, Prompt]],
    *,
    tau: float = 0.97,
    ratio: str = "prompt",
    agreement: bool = True,
    min_agreement: float = 0.982,
    refresh_steps: int = 16,
    splice: str = "official",
    state: str | os.PathLike[str] | None = None,
    progress: bool = False,
    **options: Any,
) -> DepthTable:
    """Measures similarity and agreement by ratio of prefix tokens; see DepthTable.

    Use many different prefixes: bounds take the pairs for independent. Nothing else may use `llm`
    meanwhile. While a pair is measured, K, V and the residual of its prefix are held in all layers.

    Args:
        llm: The model. Prefixes of the pairs pass through its prefix store.
        pairs: (prefix, prompt), each text or token ids as for generate(); prefixes not empty.
        tau: Cosine that a layer must exceed to be reusable by similarity.
        ratio: What the similarities are measured on, and sorted by. "prompt", as the published
            profiler: prefix and prompt, round(100 p / (p + u)). "request": with g mask tokens
            after them, round(100 p / (p + u + g)), which is what a request looks its depth up by.
            (The published system profiles by one and looks up by the other.)
        agreement: Also generate every request under "none" and under "bicache" at depth 0, 1, ...
            until too few answers stay the same.
        min_agreement: What the lower 95 % bound of the share of unchanged answers must reach.
        refresh_steps: Refresh interval of the agreement, in steps.
        splice: Splice of the agreement.
        state: File of finished measurements: made if it is not there, otherwise continued.
        progress: Shows bars on stderr.
        **options: As for generate(), see below: of the agreement, and g of the ratio "request".

    Returns:
        The DepthTable. Ratios without pairs are NaN in it, never interpolated.

    Raises:
        TypeError: A wrong type, or an unknown option.
        ValueError: A wrong value, a pair that does not fit the model, or a `state` of another run.
    """
    if not isinstance(llm, LLM):
        raise TypeError(f"[profile] llm: expected a bicache.LLM, got {type(llm).__name__}")
    settings = check_settings(
        "profile", tau=tau, ratio=ratio, splice=splice, refresh_steps=refresh_steps,
        min_agreement=min_agreement,
    )  # fmt: skip
    for name, flag in (("agreement", agreement), ("progress", progress)):
        if not isinstance(flag, bool):
            raise TypeError(f"[profile] {name}: expected True or False, got {shown(flag)}")
    kept = None if state is None else as_path(state, "profile] state")
    chosen = resolve_all(llm, options)
    work = encode_pairs(llm, pairs, chosen, ratio == "request" or agreement)
    identity: dict[str, Any] = {"fingerprint": llm.fingerprint, "data_hash": data_hash(work)}
    header = {
        "format": 1, **identity, **settings,
        "options": chosen, "dtype": llm.dtype, "kv_dtype": llm.kv_dtype,
        "prefix_dtype": llm.prefix_dtype, "backend": llm.backend, "isa": _core.isa(),
    }  # fmt: skip
    with Journal(kept, header) as journal:
        run = _Run(llm, work, chosen, settings, journal, progress)
        similarities = run.similarities()
        bins = run.agreement() if agreement else ()
    by_ratio = [pair.prompt_ratio if ratio == "prompt" else pair.request_ratio for pair in work]
    layers = llm.config.layers
    return DepthTable(
        **identity,
        **settings,
        layers=layers,
        options=chosen,
        pairs=len(work),
        counts=np.bincount(by_ratio, minlength=RATIOS).astype(np.int64),
        similarity_k=_means(by_ratio, [s["k"] for s in similarities], layers),
        similarity_v=_means(by_ratio, [s["v"] for s in similarities], layers),
        similarity_hidden=_means(by_ratio, [s["hidden"] for s in similarities], layers),
        agreement=bins,
    )


# ---- measurements


class _Run:
    """The measurements of one call; those that the journal holds already are not made again."""

    def __init__(
        self,
        llm: LLM,
        work: Sequence[Request],
        options: dict[str, Any],
        settings: dict[str, Any],
        journal: Journal,
        progress: bool,
    ) -> None:
        self.llm, self.work, self.options, self.settings = llm, work, options, settings
        self.journal, self.progress = journal, progress
        self.found: dict[int, Similarities] = {}  # by pair
        self.answers: dict[tuple[int, int | None], str] = {}  # by pair and depth; None: "none"
        for number, entry in journal.entries:
            self._restore(number, entry)

    def _restore(self, number: int, entry: dict[str, Any]) -> None:
        pair, layers = entry.get("pair"), self.llm.config.layers
        if type(pair) is int and 0 <= pair < len(self.work):
            values = {name: entry.get(name) for name in _TAPPED.values()}
            if set(entry) == {"pair", *values} and all(
                _cosines(v, layers) for v in values.values()
            ):
                self.found[pair] = {name: list(v or ()) for name, v in values.items()}
                return
            depth, tokens = entry.get("depth"), entry.get("tokens")
            if set(entry) == {"pair", "depth", "tokens"} and isinstance(tokens, str):
                if depth is None or (type(depth) is int and 0 <= depth <= layers):
                    self.answers[pair, depth] = tokens
                    return
        raise ValueError(
            f"[profile] state line {number}: expected a measurement of this run, got {shown(entry)}"
        )

    def similarities(self) -> list[Similarities]:
        """K, V and the residual of every pair's prefix, alone against in the full input."""
        masks = self.options["gen_length"] if self.settings["ratio"] == "request" else 0
        behind = np.full(masks, self.llm.config.mask_token_id, np.int32)
        alone: dict[tuple[int, str], NDArray[np.float32]] = {}
        owner: NDArray[np.int32] | None = None  # whose `alone` is
        with self._bar("similarity", len(self.work)) as bar:
            for i, pair in enumerate(self.work):
                if i not in self.found:
                    if owner is not pair.prefix:
                        alone = {}
                        alone, owner = _activations(self.llm, pair.prefix), pair.prefix
                    canvas = np.concatenate([pair.prefix, pair.prompt, behind])
                    self.found[i] = _compare(self.llm, alone, canvas, i)
                    self.journal.add({"pair": i, **self.found[i]})
                bar.update()
        return [self.found[i] for i in range(len(self.work))]

    def agreement(self) -> tuple[AgreementBin, ...]:
        """How many whole answers stay the same, by ratio and depth."""
        with self._bar("agreement", 0) as bar:

            def count_agreed(group: list[int], depth: int) -> int:
                # At depth 0 the answers under "none" are new to this group as well.
                for d in (None, 0) if depth == 0 else (depth,):
                    bar.total += len(group)
                    bar.refresh()
                    self._generate(group, d, bar)
                return sum(self.answers[i, depth] == self.answers[i, None] for i in group)

            return measure_bins(
                [pair.request_ratio for pair in self.work],
                count_agreed,
                self.llm.config.layers,
                self.settings["min_agreement"],
            )

    def _generate(self, group: Sequence[int], depth: int | None, bar: Any) -> None:
        """Answers of the pairs `group`, under "none" or at a depth, into `answers`."""
        cache = "none"
        if depth is not None:
            cache = (
                f"bicache:depth={depth},refresh_steps={self.settings['refresh_steps']},"
                f"splice={self.settings['splice']}"
            )
        missing = [i for i in group if (i, depth) not in self.answers]
        bar.update(len(group) - len(missing))
        for batch in self._batches(missing):
            outputs = self.llm.generate(
                [self.work[i].prompt for i in batch],
                prefix=[self.work[i].prefix for i in batch],
                cache=cache,
                **self.options,
            )
            for i, output in zip(batch, outputs, strict=True):
                tokens = hashlib.sha256(output.tokens.astype("<i4").tobytes()).hexdigest()
                self.answers[i, depth] = tokens
                self.journal.add({"pair": i, "depth": depth, "tokens": tokens})
            bar.update(len(batch))

    def _batches(self, indices: Sequence[int]) -> Iterator[list[int]]:
        """Modest ones, so that little is lost to a kill; pairs of one prefix stay together."""
        first: dict[int, int] = {}
        for i in indices:
            first.setdefault(id(self.work[i].prefix), i)
        batch: list[int] = []
        rows = 0
        for i in sorted(indices, key=lambda i: (first[id(self.work[i].prefix)], i)):
            more = self.work[i].rows
            if batch and (len(batch) == _BATCH_REQUESTS or rows + more > _BATCH_ROWS):
                yield batch
                batch, rows = [], 0
            batch.append(i)
            rows += more
        if batch:
            yield batch

    def _bar(self, name: str, total: int) -> Any:
        from tqdm import tqdm

        return tqdm(
            total=total, desc=name, unit="pair", dynamic_ncols=True, disable=not self.progress
        )


def _cosines(values: object, layers: int) -> bool:
    return (
        isinstance(values, list)
        and len(values) == layers
        and all(type(x) in (int, float) and -1 <= x <= 1 for x in values)
    )


def _activations(llm: LLM, ids: NDArray[np.int32]) -> dict[tuple[int, str], NDArray[np.float32]]:
    """What the tap sees of a canvas [N]: (layer, name) -> [N, width]."""
    seen: dict[tuple[int, str], NDArray[np.float32]] = {}

    def keep(layer: int, name: str, values: NDArray[np.float32]) -> None:
        if name in _TAPPED:
            seen[layer, name] = values

    with llm.tap(keep):
        llm.forward(ids, rows=[])
    return seen


def _compare(
    llm: LLM,
    alone: dict[tuple[int, str], NDArray[np.float32]],
    canvas: NDArray[np.int32],
    index: int,
) -> Similarities:
    """Mean cosine per layer between `alone` and the same rows of `canvas`, which begins with them.

    K is seen after RoPE; that turns both sides by the same angles and leaves the cosine alone.
    """
    found: Similarities = {name: [0.0] * llm.config.layers for name in _TAPPED.values()}

    def compare(layer: int, name: str, values: NDArray[np.float32]) -> None:
        if name not in _TAPPED:
            return
        mean = mean_cosine(alone[layer, name], values[: len(alone[layer, name])])
        if not np.isfinite(mean):
            raise ValueError(
                f"[profile] pair {index}: expected finite activations, got others in layer {layer}"
            )
        found[_TAPPED[name]][layer] = mean

    with llm.tap(compare):
        llm.forward(canvas, rows=[])
    return found


def mean_cosine(a: NDArray[np.float32], b: NDArray[np.float32]) -> float:
    """Mean over rows of the cosine of a[i] and b[i], [N, W] each; equal rows count as 1 exactly.

    NaN where a row is not finite.
    """
    x, y = a.astype(np.float64), b.astype(np.float64)
    with np.errstate(invalid="ignore"):
        product = np.einsum("ij,ij->i", x, y)
        norms = np.sqrt(np.einsum("ij,ij->i", x, x)) * np.sqrt(np.einsum("ij,ij->i", y, y))
        cosine = np.clip(product / np.where(norms == 0, 1, norms), -1, 1)
    cosine[(a == b).all(axis=1) & np.isfinite(product)] = 1
    return float(cosine.mean())


def _means(
    ratios: Sequence[int], values: Sequence[Sequence[float]], layers: int
) -> NDArray[np.float64]:
    """Mean over pairs of the same ratio [101, L]; NaN where there are none."""
    result = np.full((RATIOS, layers), np.nan)
    rows = np.array(values, np.float64)
    for ratio in set(ratios):
        result[ratio] = rows[np.array(ratios) == ratio].mean(axis=0)
    return result
