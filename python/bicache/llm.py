"""LLM: a loaded diffusion language model, its tokenizer and its prefix store."""

from __future__ import annotations

import logging
import os
import sys
import time
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from . import _core
from .checkpoint import Sidecar, resolve_path
from .inputs import (
    Encoder,
    Ids,
    Prompt,
    as_ids,
    as_rows,
    as_stop,
    check_text,
    integer,
    split_prefixes,
    split_prompts,
)
from .options import documented, resolve_options
from .policies import Policy
from .results import Output, RequestStats, StepEvent
from .tokenizer import Tokenizer

_log = logging.getLogger("bicache")

Cache = str | Policy
Tap = Callable[[int, str, NDArray[np.float32]], None]
_Request = tuple[NDArray[np.int32], int, dict[str, Any], str]

MASK_TEXT = "\u2591"
"""How StepEvent.text shows a masked position."""


class LLM:
    """A diffusion language model on the CPU.

    Args:
        path: A checkpoint folder, or the name of a shipped model (`bicache.shipped_models()`).
        dtype: How weights are held: "f32", "bf16", or "auto" (as stored).
        threads: CPU threads; None: all this process may use (affinity and cgroup quota).
        cache: Cache policy of requests that name none: a cache string such as "none" or
            "bicache:depth=5", a policy object, or "auto" (what bicache.json beside the checkpoint
            says).
        prefix_budget_bytes: Memory for shared prefixes kept across requests.
        backend: "packed" (the engine's own kernels) or "blas" (OpenBLAS, f32 only; its results
            change with the batch in the last bits).

    Raises:
        FileNotFoundError: The folder or a file of it is missing; says what to download.
        ValueError: A file or a setting is wrong; "[where] what: expected X, got Y".
        TypeError: An argument has the wrong type.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        dtype: str = "auto",
        threads: int | None = None,
        cache: Cache = "none",
        prefix_budget_bytes: int = 1 << 30,
        backend: str = "packed",
    ) -> None:
        begin = time.perf_counter()
        for name, value in (("dtype", dtype), ("backend", backend)):
            if not isinstance(value, str):
                raise TypeError(f"[model] {name}: expected a string, got {type(value).__name__}")
            check_text(value, f"model] {name}")
        if threads is not None:
            threads = integer(threads, "model] threads", 1, 1024)
        budget = integer(prefix_budget_bytes, "model] prefix_budget_bytes", 0, 2**63 - 1)
        self.path: Path = resolve_path(path)
        self._sidecar = Sidecar.read(self.path)
        self._cache = self.cache_string(cache)
        self.config: _core.Config = _core.read_config(str(self.path))
        tokenizer = self.path / "tokenizer.json"
        self.tokenizer: Tokenizer | None = Tokenizer(tokenizer) if tokenizer.exists() else None
        self._engine = _core.Engine(
            str(self.path),
            dtype=dtype,
            backend=backend,
            threads=threads or 0,
            prefix_budget_bytes=budget,
            eot_token_id=self._find_eot(),
        )
        self.config = self._engine.config
        self._ends = [i for i in (self.config.eos_token_id, self.config.eot_token_id) if i >= 0]
        self._encoder = Encoder(self.tokenizer, self.config.embeddings, self.path)
        self._taps: list[tuple[object, Tap]] = []  # open ones, the last is in use
        _log.info(
            "loaded %s: %d layers, %.1f MB of %s weights, %d threads, %s kernels, %.2f s",
            self.path, self.config.layers, self.weight_bytes / 1e6, self.dtype, self.threads,
            _core.isa() if self.backend == "packed" else self.backend, time.perf_counter() - begin,
        )  # fmt: skip

    def __repr__(self) -> str:
        return (
            f"LLM({str(self.path)!r}, dtype={self.dtype!r}, threads={self.threads}, "
            f"cache={self._cache!r})"
        )

    @property
    def dtype(self) -> str:
        """How the weights are held: "f32" or "bf16"."""
        return self._engine.dtype

    @property
    def backend(self) -> str:
        """Who multiplies matrices: "packed" or "blas"."""
        return self._engine.backend

    @property
    def threads(self) -> int:
        """CPU threads in use."""
        return self._engine.threads

    @property
    def weight_bytes(self) -> int:
        """Memory of the weights."""
        return self._engine.weight_bytes

    @property
    def cache(self) -> str:
        """Cache string of requests that name none."""
        return self._cache

    @property
    def generation_defaults(self) -> Mapping[str, Any]:
        """Options that bicache.json beside the checkpoint sets for generate() and stream()."""
        return dict(self._sidecar.generation)

    @property
    def calibration(self) -> Mapping[str, Any]:
        """Facts measured on this checkpoint, from its bicache.json; empty if it has none."""
        return dict(self._sidecar.calibration)

    @documented
    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        *,
        prefix: Prompt | Sequence[Prompt | None] | None = None,
        cache: Cache | Sequence[Cache | None] | None = None,
        stop: str | Sequence[str] | None = None,
        progress: bool = False,
        **options: Any,
    ) -> list[Output]:
        """Generates a response to every prompt; requests of any lengths share the passes.

        The tokens of a request depend on nothing else in the batch (except with the policy
        "naive:source=first_request", which is about who came first, and with backend="blas").

        Args:
            prompts: One prompt or a list of them; a prompt is text, a list of token ids, or a 1-D
                integer array of them. May be empty where there is a prefix.
            prefix: What stands before the prompts and is shared with other requests: text or ids
                for all of them, or a list with one (or None) per prompt. It is encoded by itself.
            cache: As for LLM; None: the LLM's own; or a list with one per prompt.
            stop: The text ends before the first of these strings; the tokens are not cut.
            progress: Shows a bar on stderr.
            **options: See below; None means the default. Defaults stored beside the checkpoint
                (`generation_defaults`) replace those named here.

        Returns:
            One Output per prompt, in order.

        Raises:
            TypeError: A wrong type, or an unknown option (the message lists what exists).
            ValueError: A wrong value; "[where] what: expected X, got Y".
        """
        begin = time.perf_counter()
        stops = self._stops(stop)
        requests = self._requests(split_prompts(prompts), prefix, cache, options)
        generation = self._engine.start(requests)
        with _bar(generation.steps_total, progress) as bar:
            while not generation.done:
                generation.step()
                if bar is not None:
                    bar.update(generation.steps_done - bar.n)
        outputs = [self._output(result, stops) for result in generation.results()]
        _log.debug(
            "generated %d requests: %d tokens, %d rows, %d prefix hits, %.3f s",
            len(outputs), sum(len(o.tokens) for o in outputs), sum(o.stats.rows for o in outputs),
            sum(bool(o.stats.prefix_hit) for o in outputs), time.perf_counter() - begin,
        )  # fmt: skip
        return outputs

    @documented
    def stream(
        self,
        prompt: Prompt,
        *,
        prefix: Prompt | None = None,
        cache: Cache | None = None,
        stop: str | Sequence[str] | None = None,
        **options: Any,
    ) -> Generator[StepEvent, None, Output]:
        """Generates a response to one prompt, and yields every denoising step as it is made.

        Arguments are checked at once, not at the first step. Leaving the loop ends the request.

        Args:
            prompt: Text, a list of token ids, or a 1-D integer array of them.
            prefix: As for generate().
            cache: As for generate().
            stop: As for generate().
            **options: As for generate(), see below.

        Yields:
            One StepEvent per step.

        Returns:
            The Output, as the generator's return value.

        Raises:
            TypeError: As for generate().
            ValueError: As for generate().
        """
        stops = self._stops(stop)
        prompts = split_prompts(prompt)
        if len(prompts) != 1:
            raise ValueError(f"[stream] prompt: expected one, got {len(prompts)}")
        requests = self._requests(prompts, prefix, cache, options)
        return self._events(self._engine.start(requests), len(requests[0][0]), stops)

    def _events(
        self, generation: _core.Generation, prompt_rows: int, stops: tuple[str, ...]
    ) -> Generator[StepEvent, None, Output]:
        while not generation.done:
            for e in generation.step():
                canvas = e.canvas
                text = self._text(canvas[prompt_rows:], stops)[0]
                yield StepEvent(e.step, canvas, e.positions, e.tokens, e.confidences, text)
        return self._output(generation.results()[0], stops)

    def forward(self, tokens: Ids, rows: Ids | None = None) -> NDArray[np.float32]:
        """Logits of a canvas, without any cache.

        Args:
            tokens: Token ids [N], mask tokens included.
            rows: The positions to predict [k]; None: all of them, in order.

        Returns:
            float32 [k, V] (or [N, V]).

        Raises:
            TypeError: Not integers.
            ValueError: Ids, positions or lengths out of range.
        """
        ids = as_ids(tokens, "forward] tokens", self.config.embeddings)
        if not 1 <= len(ids) <= self.config.context:
            raise ValueError(
                f"[forward] tokens: expected 1..{self.config.context} ids (the model's context), "
                f"got {len(ids)}"
            )
        return self._engine.forward(ids, None if rows is None else as_rows(rows, len(ids)))

    @contextmanager
    def tap(self, function: Tap) -> Iterator[None]:
        """Within it, every pass of this LLM calls `function(layer, name, array)`.

        Args:
            function: Gets activations as float32 arrays [rows, ...], as they are computed. An
                exception in it ends the generation it came from.

        Raises:
            TypeError: Not callable.
        """
        if not callable(function):
            raise TypeError(f"[tap] function: expected a callable, got {type(function).__name__}")
        mine = (object(), function)
        self._taps.append(mine)
        self._engine.set_tap(function)
        try:
            yield
        finally:
            self._taps.remove(mine)
            self._engine.set_tap(self._taps[-1][1] if self._taps else None)

    def prefix_stats(self) -> dict[str, int]:
        """What the prefix store holds and how it was used: entries, bytes, hits, misses, ..."""
        return self._engine.prefix_stats()

    def clear_prefixes(self) -> None:
        """Empties the prefix store and its counts; requests under way keep what they hold."""
        self._engine.clear_prefixes()

    def cache_string(self, cache: Cache) -> str:
        """What `cache=` stands for, with every setting written out; "auto" is looked up.

        Raises:
            TypeError: Neither a string nor a policy object.
            ValueError: Unknown policies or settings (the message lists what exists), or "auto"
                without a calibration.
        """
        if isinstance(cache, Policy):
            return _core.canonical_policy(cache.spec())
        if not isinstance(cache, str):
            raise TypeError(
                f"[cache] policy: expected a string or a policy object, got {type(cache).__name__}"
            )
        if cache != "auto":
            return _core.canonical_policy(check_text(cache, "cache] policy"))
        stored = self._sidecar.calibration.get("cache")
        if stored is None:
            raise ValueError(
                f"[cache] auto: expected a calibration in {self.path / 'bicache.json'}, got none; "
                "to make one, measure at which depth answers stay right (compare a held-out set "
                'under "none" and "bicache:depth=1", 2, ...) and write {"format": 1, '
                '"calibration": {"cache": "bicache:depth=N"}} there'
            )
        return _core.canonical_policy(stored)

    def _find_eot(self) -> int:
        """The end-of-turn id that config.json may leave to the tokenizer; -1: none."""
        if self.config.eot_token_id >= 0 or self.tokenizer is None:
            return self.config.eot_token_id
        found = self.tokenizer.token_id("<|eot_id|>")
        return found if found is not None and found < self.config.embeddings else -1

    def _caches(self, cache: Any, count: int) -> list[str]:
        """One cache string per prompt."""
        if not isinstance(cache, (list, tuple)):
            return [self._cache if cache is None else self.cache_string(cache)] * count
        if len(cache) != count:
            raise ValueError(
                f"[generate] cache: expected one for all prompts or a list of {count}, "
                f"got a list of {len(cache)}"
            )
        return [self._cache if c is None else self.cache_string(c) for c in cache]

    def _stops(self, stop: object) -> tuple[str, ...]:
        stops = as_stop(stop)
        if stops and self.tokenizer is None:
            raise ValueError(f"[generate] stop: expected a tokenizer.json in {self.path}, got none")
        return stops

    def _requests(
        self, prompts: list[object], prefix: object, cache: object, options: dict[str, Any]
    ) -> list[_Request]:
        count = len(prompts)
        settings = resolve_options(options, self._sidecar.generation)
        caches = self._caches(cache, count)
        shared: dict[int, NDArray[np.int32]] = {}  # by identity: one list element for all prompts
        requests: list[_Request] = []
        for i, (prompt, before) in enumerate(
            zip(prompts, split_prefixes(prefix, count), strict=True)
        ):
            if id(before) not in shared:
                shared[id(before)] = self._encoder.prefix(before, f"generate] prefix {i}")
            head = shared[id(before)]
            ids = self._encoder.prompt(prompt, f"generate] prompt {i}", after_prefix=len(head) > 0)
            if len(head) + len(ids) == 0:
                raise ValueError(
                    f"[generate] prompt {i}: expected at least one token of prompt or prefix, "
                    "got none"
                )
            joined = np.concatenate([head, ids]) if len(head) else ids
            requests.append((joined, len(head), settings, caches[i]))
        return requests

    def _text(self, response: NDArray[np.int32], stops: tuple[str, ...]) -> tuple[str, str | None]:
        """Text of a response [g], and what ended it: "eos", "stop" or None."""
        ends = np.flatnonzero(np.isin(response, self._ends))
        ended = "eos" if ends.size else None
        if self.tokenizer is None:
            return "", ended
        text = self.tokenizer.decode_masked(
            response[: ends[0]] if ends.size else response, self.config.mask_token_id, MASK_TEXT
        )
        cuts = [at for at in map(text.find, stops) if at >= 0]
        return (text[: min(cuts)], "stop") if cuts else (text, ended)

    def _output(self, result: _core.Result, stops: tuple[str, ...]) -> Output:
        tokens, reason = result.tokens, result.finish_reason
        text, ended = self._text(tokens[tokens != self.config.mask_token_id], stops)
        if ended is not None and reason != "cancelled":
            reason = ended
        stats = RequestStats.of(result.stats)
        return Output(text, tokens, result.confidences, reason, stats)


def _bar(total: int, enabled: bool) -> AbstractContextManager[Any]:
    """A progress bar of `total` steps on stderr, or None."""
    if not enabled:
        return nullcontext(None)
    from tqdm import tqdm

    return tqdm(total=total, desc="generate", unit="step", file=sys.stderr, dynamic_ncols=True)
