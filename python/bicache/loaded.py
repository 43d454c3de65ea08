"""LoadedModel: a checkpoint in memory, its tokenizer, its prefix store and its cache policies."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from . import _core
from .checkpoint import Sidecar, resolve_path, sidecar_path
from .inputs import Encoder, Ids, Prompt, as_ids, as_rows, check_text, integer
from .jsonfile import as_path
from .policies import Policy, engine_policy
from .prefixes import as_salt
from .tokenizer import Tokenizer

_log = logging.getLogger("bicache")

# How LLaDA's, Qwen's (Dream's) and LLaDA-MoE's tokenizers spell it; and its id where the folder has
# no tokenizer, by the ids of end of text and mask, which are theirs alone.
_END_OF_TURN = ("<|eot_id|>", "<|im_end|>", "<|role_end|>")
_PUBLISHED_EOT = {(126081, 126336): 126348, (151643, 151666): 151645}

Cache = str | Policy
Tap = Callable[[int, str, NDArray[np.float32]], None]


class LoadedModel:
    """What an LLM is apart from generating; LLM says what its arguments are."""

    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        dtype: str = "auto",
        kv_dtype: str = "auto",
        threads: int | None = None,
        cache: Cache = "none",
        prefix_budget_bytes: int = 1 << 30,
        prefix_dtype: str = "f32",
        backend: str = "packed",
    ) -> None:
        begin = time.perf_counter()
        settings = {
            "dtype": dtype, "kv_dtype": kv_dtype, "backend": backend, "prefix_dtype": prefix_dtype
        }  # fmt: skip
        for name, value in settings.items():
            if not isinstance(value, str):
                raise TypeError(f"[model] {name}: expected a string, got {type(value).__name__}")
            check_text(value, f"model] {name}")
        if threads is not None:
            threads = integer(threads, "model] threads", 1, 1024)
        budget = integer(prefix_budget_bytes, "model] prefix_budget_bytes", 0, 2**63 - 1)
        self.path: Path = resolve_path(path)
        self._sidecar = Sidecar.read(self.path)
        self.config: _core.Config = _core.read_config(str(self.path))
        self._fingerprint: str | None = None  # until the weights are there
        self._policy = self._as_policy(cache)
        self.tokenizer: Tokenizer | None = Tokenizer.of(self.path)
        self._engine = _core.Engine(
            str(self.path),
            dtype=dtype,
            kv_dtype=kv_dtype,
            backend=backend,
            threads=threads or 0,
            prefix_budget_bytes=budget,
            prefix_dtype=prefix_dtype,
            eot_token_id=self._find_eot(),
            known_ids=0 if self.tokenizer is None else self.tokenizer.end,
        )
        self.config = self._engine.config
        self._fingerprint = self._engine.fingerprint
        self._policy = self._as_policy(cache)  # a calibration must be of these weights
        ends = (self.config.eos_token_id, self.config.eot_token_id)
        self._ends = [i for i in ends if i >= 0 and i != self.config.mask_token_id]
        self._encoder = Encoder(self.tokenizer, self.config.embeddings, self.path)
        self._taps: list[tuple[object, Tap]] = []  # open ones, the last is in use
        _log.info(
            "loaded %s: %d layers, %.1f MB of %s weights, %s K/V, %d threads, %s kernels, %.2f s",
            self.path, self.config.layers, self.weight_bytes / 1e6, self.dtype, self.kv_dtype,
            self.threads, _core.isa() if self.backend == "packed" else self.backend,
            time.perf_counter() - begin,
        )  # fmt: skip

    def __repr__(self) -> str:
        return (
            f"LLM({str(self.path)!r}, dtype={self.dtype!r}, threads={self.threads}, "
            f"cache={self.cache!r})"
        )

    @property
    def dtype(self) -> str:
        """How the weights are held: "f32", "bf16", "int8" or "int4"."""
        return self._engine.dtype

    @property
    def kv_dtype(self) -> str:
        """How K and V are held, and what attention computes with: "f32" or "bf16"."""
        return self._engine.kv_dtype

    @property
    def backend(self) -> str:
        """Who multiplies matrices: "packed" or "blas"."""
        return self._engine.backend

    @property
    def threads(self) -> int:
        """CPU threads in use."""
        return self._engine.threads

    @property
    def prefix_dtype(self) -> str:
        """How prefix entries are held, apart from K and V in bf16: "f32" or "bf16"."""
        return self._engine.prefix_dtype

    @property
    def weight_bytes(self) -> int:
        """Memory of the weights."""
        return self._engine.weight_bytes

    @property
    def cache(self) -> str:
        """Cache string of requests that name none."""
        return self._policy.spec

    @property
    def fingerprint(self) -> str:
        """Of the weights and of all in the configuration that a pass depends on; 16 hex digits.

        Not cryptographic: it tells checkpoints apart, it does not vouch for them.
        """
        return self._engine.fingerprint

    @property
    def generation_defaults(self) -> Mapping[str, Any]:
        """Options that bicache.json beside the checkpoint sets for generate() and stream()."""
        return dict(self._sidecar.generation)

    @property
    def calibration(self) -> Mapping[str, Any]:
        """Facts measured on this checkpoint, from its bicache.json; empty if it has none."""
        return dict(self._sidecar.calibration)

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
            function: Gets activations as float32 arrays [rows, ...], as they are computed: K and
                V before they are rounded to kv_dtype. An exception in it ends the generation it
                came from.

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

    def warm(
        self, prefix: Prompt, *, cache: Cache | None = None, cache_salt: str | None = None
    ) -> bool:
        """Computes and stores a shared prefix, so that the first request finds it.

        Args:
            prefix: As for generate().
            cache: The policy of the requests to come; it says what is worth storing.
            cache_salt: As for generate().

        Returns:
            Whether it is in the store now; False: it does not fit the budget.

        Raises:
            TypeError: A wrong type.
            ValueError: An empty or too long prefix, or a policy that reads none.
        """
        ids = self._encoder.prefix(prefix, "warm] prefix")
        policy = self._policy if cache is None else self._as_policy(cache)
        return self._engine.warm(ids, policy, as_salt(cache_salt, "warm"))

    def save_prefixes(self, path: str | os.PathLike[str]) -> int:
        """Writes the prefix store to a file, which appears whole or not at all.

        The file holds the token ids of the prefixes and their salts: it is as private as the
        prompts, and only its owner may read it.

        Args:
            path: The file; one that is there is replaced.

        Returns:
            How many prefixes were written.

        Raises:
            TypeError: Not a path.
            ValueError: There is something else than a regular file.
            OSError: It cannot be written; the old file is still there.
        """
        return self._engine.save_prefixes(os.fsencode(as_path(path, "prefix file] path")))

    def load_prefixes(self, path: str | os.PathLike[str]) -> int:
        """Puts the prefixes of a file into the prefix store.

        A file that is refused costs only a recomputation: the store stays as it is.

        Args:
            path: What save_prefixes() wrote, with the same model, dtype, kv_dtype, prefix_dtype,
                backend and kernels (`bicache info`): otherwise answers would not be the same bits.

        Returns:
            How many of its prefixes the store has now; those that do not fit the budget are left
            out, the least recently used first.

        Raises:
            OSError: It cannot be read.
            ValueError: It is damaged, or of another model or another way to compute; says which.
        """
        return self._engine.load_prefixes(os.fsencode(as_path(path, "prefix file] path")))["kept"]

    def prefix_stats(self) -> dict[str, int]:
        """What the prefix store holds and how it was used.

        Returns:
            entries and size_bytes (kept), budget_bytes, pinned (entries that a request holds now:
            they are not evicted), hits, misses, evictions, refused (did not fit beside the pinned
            ones: used by the requests under way, not kept).
        """
        return self._engine.prefix_stats()

    def clear_prefixes(self) -> None:
        """Empties the prefix store and its counts; requests under way keep what they hold."""
        self._engine.clear_prefixes()

    def cache_string(self, cache: Cache) -> str:
        """What `cache=` stands for, in its usual form; "auto" is looked up.

        Raises:
            TypeError: Neither a string nor a policy object.
            ValueError: Unknown policies or settings (the message lists what exists), or "auto"
                without a calibration.
        """
        return self._as_policy(cache).spec

    def _as_policy(self, cache: object) -> _core.Policy:
        if isinstance(cache, str) and "auto" in (parts := cache.split("+")):
            calibrated = self._calibrated()
            cache = "+".join(calibrated if part == "auto" else part for part in parts)
        return engine_policy(cache, self.config.layers)

    def _calibrated(self) -> str:
        """The cache string stored beside the checkpoint."""
        calibration = self._sidecar.calibration
        stored, of = calibration.get("cache"), calibration.get("fingerprint")
        if stored is None:
            raise ValueError(
                f"[cache] auto: expected a calibration in {sidecar_path(self.path)}, got none; "
                f"`bicache profile {self.path} --pairs FILE.jsonl --save` makes one"
            )
        if self._fingerprint is not None and of not in (None, self._fingerprint):
            raise ValueError(
                f"[cache] auto: expected a calibration of this model ({self._fingerprint}) in "
                f"{sidecar_path(self.path)}, got one of another ({of}); make a new one: "
                f"bicache profile {self.path} --pairs FILE.jsonl --save"
            )
        return str(stored)

    def _find_eot(self) -> int:
        """The end-of-turn id that config.json may leave to the tokenizer; -1: none."""
        c = self.config
        if c.eot_token_id >= 0:
            return c.eot_token_id
        if self.tokenizer is None:
            found = [_PUBLISHED_EOT.get((c.eos_token_id, c.mask_token_id))]
        else:
            found = [self.tokenizer.token_id(name) for name in _END_OF_TURN]
        ends = [i for i in found if i is not None and i < c.embeddings and i != c.eos_token_id]
        return ends[0] if ends else -1
