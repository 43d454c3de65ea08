"""What users pass as prompts, prefixes and token ids, checked and brought into one form."""

from __future__ import annotations

import math
import numbers
import operator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from .tokenizer import Tokenizer

Ids: TypeAlias = "list[int] | tuple[int, ...] | NDArray[np.integer[Any]]"
Prompt: TypeAlias = "str | Ids"
Response: TypeAlias = "str | list[int | None] | tuple[int | None, ...] | NDArray[np.integer[Any]]"

MASK_TEXT = "\u2591"
"""A masked position in text: in StepEvent.text, and in `response=`."""

_NO_IDS: NDArray[np.int32] = np.empty(0, np.int32)


def integer(value: object, where: str, low: int, high: int | None = None) -> int:
    """`value` as an int in low..high; TypeError or ValueError "[where: expected ...".

    Args:
        value: An int or a NumPy integer; bool is none.
        where: For messages, e.g. "model] threads".
        low: Smallest value.
        high: Largest value; None: none.
    """
    expected = f"expected an integer {f'>= {low}' if high is None else f'{low}..{high}'}"
    if isinstance(value, (bool, np.bool_)) or not isinstance(value, (int, np.integer)):
        raise TypeError(f"[{where}: {expected}, got {value!r}")
    number = operator.index(value)
    if number < low or (high is not None and number > high):
        raise ValueError(f"[{where}: {expected}, got {number}")
    return number


def number(value: object, where: str, low: float, high: float = math.inf) -> float:
    """`value` as a finite float in low..high; TypeError or ValueError "[where: expected ...".

    Args:
        value: A Python or NumPy number; bool is none.
        where: For messages, e.g. "cache] dllm_cache transfer_ratio".
        low: Smallest value.
        high: Largest value; inf: none.
    """
    expected = f"expected a number {f'>= {low:g}' if high == math.inf else f'{low:g}..{high:g}'}"
    real = (int, float, np.integer, np.floating)
    if isinstance(value, (bool, np.bool_)) or not isinstance(value, real):
        raise TypeError(f"[{where}: {expected}, got {value!r}")
    try:
        converted = float(value)
    except OverflowError:
        converted = math.inf
    if not low <= converted <= high or not math.isfinite(converted):
        raise ValueError(f"[{where}: {expected}, got {shown(value)}")
    return converted


def shown(value: object) -> str:
    """For messages: not longer than a line."""
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def is_ids(value: object) -> bool:
    """True for one sequence of numbers (right or wrong ones), False for a list of prompts."""
    if isinstance(value, np.ndarray):
        return True
    return isinstance(value, (list, tuple)) and (
        not value or isinstance(value[0], (numbers.Number, np.generic))
    )


def as_ids(value: object, where: str, embeddings: int) -> NDArray[np.int32]:
    """Token ids as a C-contiguous int32 array [n]; an array that is one already is not copied.

    Args:
        value: A list or tuple of integers, or a 1-D integer array of any width and byte order.
        where: For messages, e.g. "generate] prompt 0".
        embeddings: Ids must be in [0, embeddings).

    Raises:
        TypeError: Not integers (bool and float included), or not a sequence.
        ValueError: An array that is not 1-D, or an id out of range.
    """
    if isinstance(value, np.ndarray):
        if value.dtype.kind not in "iu":
            raise TypeError(f"[{where}: expected integer token ids, got dtype {value.dtype}")
        if value.ndim != 1:
            raise ValueError(
                f"[{where}: expected a 1-D array of token ids, got shape {list(value.shape)}"
            )
        array = value
    elif isinstance(value, (list, tuple)):
        for i, item in enumerate(value):
            if isinstance(item, (bool, np.bool_)) or not isinstance(item, (int, np.integer)):
                raise TypeError(
                    f"[{where}: expected integer token ids, got {item!r} "
                    f"({type(item).__name__}) at position {i}"
                )
            if not 0 <= item < embeddings:
                raise ValueError(_range(where, embeddings, int(item), i))
        array = np.array(value, dtype=np.int64)
    else:
        raise TypeError(
            f"[{where}: expected text or a list or array of token ids, got {type(value).__name__}"
        )
    if array.size:
        wrong = np.flatnonzero((array < 0) | (array >= embeddings))
        if wrong.size:
            at = int(wrong[0])
            raise ValueError(_range(where, embeddings, int(array[at]), at))
    return np.ascontiguousarray(array, dtype=np.int32)


def _range(where: str, embeddings: int, got: int, at: int) -> str:
    return f"[{where}: expected token ids 0..{embeddings - 1}, got {got} at position {at}"


def check_text(text: str, where: str) -> str:
    """`text`, or ValueError where it holds half of a surrogate pair (it has no UTF-8 form)."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise ValueError(
            f"[{where}: expected valid Unicode text, got a lone surrogate at "
            f"character {error.start}"
        ) from None
    return text


@dataclass(frozen=True)
class Encoder:
    """Prompts and prefixes, text or ids, to token ids.

    Attributes:
        tokenizer: The checkpoint's; None: it has none, and text is an error.
        embeddings: Ids must be in [0, embeddings).
        folder: The checkpoint, for messages.
    """

    tokenizer: Tokenizer | None
    embeddings: int
    folder: Path

    def prefix(self, prefix: object, where: str) -> NDArray[np.int32]:
        """Ids [p] of a shared prefix, which depend on nothing else; "" and None: no prefix."""
        if prefix is None or (isinstance(prefix, str) and not prefix):
            return _NO_IDS
        if isinstance(prefix, str):
            return self._tokenizer(where).encode_prefix(check_text(prefix, where))
        return as_ids(prefix, where, self.embeddings)

    def prompt(self, prompt: object, where: str, *, after_prefix: bool) -> NDArray[np.int32]:
        """Ids [u] of a request's own prompt; special tokens only where no prefix precedes it."""
        if not isinstance(prompt, str):
            return as_ids(prompt, where, self.embeddings)
        if not prompt:
            return _NO_IDS
        tokenizer = self._tokenizer(where)
        return tokenizer.encode_prompt(check_text(prompt, where), after_prefix=after_prefix)

    def response(self, response: object, where: str, mask: int) -> NDArray[np.int32] | None:
        """Ids [g] of what stands in a response already, `mask` where it is to be filled; or None.

        Args:
            response: Ids with None or `mask` to fill, or text with MASK_TEXT for every such token.
            where: For messages.
            mask: The mask's id.
        """
        if response is None:
            return None
        if isinstance(response, str):
            tokenizer = self._tokenizer(where)
            parts = [
                tokenizer.encode_prompt(part, after_prefix=True) if part else _NO_IDS
                for part in check_text(response, where).split(MASK_TEXT)
            ]
            one = np.array([mask], np.int32)
            ids = np.concatenate([x for part in parts for x in (part, one)][:-1])
        else:
            if isinstance(response, (list, tuple)):
                response = [mask if token is None else token for token in response]
            ids = as_ids(response, where, self.embeddings)
        if not len(ids):
            raise ValueError(f"[{where}: expected at least one token, got none")
        return ids

    def _tokenizer(self, where: str) -> Tokenizer:
        if self.tokenizer is None:
            raise ValueError(
                f"[{where}: expected token ids, got text; {Tokenizer.missing(self.folder)}"
            )
        return self.tokenizer


def split_prompts(prompts: object) -> list[object]:
    """One entry per prompt; they are not checked yet."""
    if isinstance(prompts, str):
        return [prompts]
    if isinstance(prompts, (list, tuple)) and not prompts:
        raise ValueError(
            "[generate] prompts: expected at least one prompt, got an empty list "
            '(an empty prompt after a prefix is "" or [[]])'
        )
    if is_ids(prompts):
        return [prompts]
    if isinstance(prompts, (list, tuple)):
        return list(prompts)
    raise TypeError(
        "[generate] prompts: expected text, token ids, or a list of these, "
        f"got {type(prompts).__name__}"
    )


def split_prefixes(prefix: object, count: int) -> list[object]:
    """One prefix (or None) per prompt: `prefix` itself for all, or a list with one for each."""
    if prefix is None or isinstance(prefix, str) or is_ids(prefix):
        return [prefix] * count
    if not isinstance(prefix, (list, tuple)):
        raise TypeError(
            "[generate] prefix: expected text, token ids, or a list of these, "
            f"got {type(prefix).__name__}"
        )
    if len(prefix) != count:
        raise ValueError(
            f"[generate] prefix: expected one for all prompts or a list of {count}, "
            f"got a list of {len(prefix)}"
        )
    return list(prefix)


def split_responses(response: object, count: int) -> list[object]:
    """One response (or None) per prompt: `response` itself for all, or a list with one for each.

    A list with a number in it is one response."""
    if response is None or isinstance(response, (str, np.ndarray)):
        return [response] * count
    if not isinstance(response, (list, tuple)):
        raise TypeError(
            "[generate] response: expected text, token ids (None or the mask's to be filled), or a "
            f"list of these, got {type(response).__name__}"
        )
    if not response or any(isinstance(x, (numbers.Number, np.generic)) for x in response):
        return [response] * count
    if len(response) != count:
        raise ValueError(
            f"[generate] response: expected one for all prompts or a list of {count}, "
            f"got a list of {len(response)}"
        )
    return list(response)


def as_rows(rows: object, count: int) -> NDArray[np.int64]:
    """Positions [k] of a canvas of `count` rows, as C-contiguous int64."""
    where = "[forward] rows"
    if not isinstance(rows, (list, tuple, np.ndarray)):
        raise TypeError(
            f"{where}: expected a list or array of positions, got {type(rows).__name__}"
        )
    try:
        array = np.asarray(rows)
    except ValueError:
        raise ValueError(f"{where}: expected one dimension, got a ragged list") from None
    if array.ndim != 1:
        raise ValueError(f"{where}: expected one dimension, got shape {list(array.shape)}")
    if array.size and array.dtype.kind not in "iu":
        raise TypeError(f"{where}: expected integers, got dtype {array.dtype}")
    wrong = np.flatnonzero((array < 0) | (array >= count)) if array.size else array
    if wrong.size:
        raise ValueError(f"{where}: expected positions 0..{count - 1}, got {array[wrong[0]]}")
    return np.ascontiguousarray(array, dtype=np.int64)


def as_stop(stop: object) -> tuple[str, ...]:
    """The stop strings as a tuple."""
    strings = (stop,) if isinstance(stop, str) else () if stop is None else stop
    if not isinstance(strings, (list, tuple)):
        raise TypeError(
            f"[generate] stop: expected a string or a list of strings, got {type(stop).__name__}"
        )
    for i, text in enumerate(strings):
        if not isinstance(text, str):
            raise TypeError(
                f"[generate] stop: expected strings, got {text!r} ({type(text).__name__}) at {i}"
            )
        if not text:
            raise ValueError(
                f"[generate] stop: expected non-empty strings, got an empty one at {i}"
            )
        check_text(text, "generate] stop")
    return tuple(strings)
