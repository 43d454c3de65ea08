"""Pairs of prefix and prompt: read from a file, and as the requests that a profile is made of."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..inputs import Encoder, Prompt, shown
from ..jsonfile import parse_json, read_file
from ..llm import LLM
from ..options import option_table, resolve_options


def read_pairs(path: str | os.PathLike[str]) -> list[tuple[Prompt, Prompt]]:
    """Pairs (prefix, prompt) of a JSONL file: one object a line with "prefix" and "prompt".

    Each is text or a list of token ids; other members are ignored.

    Raises:
        TypeError: Not a path.
        FileNotFoundError: There is no such file.
        ValueError: It is no regular file, or a line is wrong; names it.
    """
    data = read_file(path, "profile] pairs")
    where = f"[profile] {os.fspath(path)}"
    if not data:
        raise ValueError(f"{where}: expected at least one pair, got an empty file")
    return [
        _pair_of(line, f"{where} line {number}")
        for number, line in enumerate(data.removesuffix(b"\n").split(b"\n"), start=1)
    ]


def _pair_of(line: bytes, where: str) -> tuple[Prompt, Prompt]:
    if not line.strip():
        raise ValueError(f"{where}: expected JSON, got a blank line")
    try:
        row = parse_json(line)
    except ValueError as error:
        raise ValueError(f"{where}: expected JSON, got: {error}") from None
    if not isinstance(row, dict):
        raise ValueError(f"{where}: expected an object, got {shown(row)}")
    for name in ("prefix", "prompt"):
        if name not in row:
            raise ValueError(f"{where} {name}: expected text or token ids, got none")
        value = row[name]
        ids = isinstance(value, list) and all(type(i) is int for i in value)
        if not ids and not isinstance(value, str):
            raise ValueError(f"{where} {name}: expected text or token ids, got {shown(value)}")
    return row["prefix"], row["prompt"]


@dataclass(frozen=True)
class Request:
    """One request: ids of its prefix [p] and of its own prompt [u], and what follows."""

    prefix: NDArray[np.int32]
    prompt: NDArray[np.int32]
    gen_length: int
    shift: int

    @property
    def rows(self) -> int:
        """p + u + g."""
        return len(self.prefix) + len(self.prompt) + self.gen_length

    @property
    def prompt_ratio(self) -> int:
        """Percent, rounded half to even."""
        return round(100 * len(self.prefix) / (len(self.prefix) + len(self.prompt)))

    @property
    def request_ratio(self) -> int:
        """Percent, as the engine computes it: a shifted model never shares the last prompt row."""
        shared = min(len(self.prefix), len(self.prefix) + len(self.prompt) - self.shift)
        return round(100 * shared / self.rows)


def resolve_all(llm: LLM, given: dict[str, Any]) -> dict[str, Any]:
    """All options of the generation, defaults that stand for themselves included."""
    chosen = resolve_options(given, llm.generation_defaults, "profile")
    return {
        option.name: chosen.get(option.name, option.default)
        for option in option_table().values()
        if chosen.get(option.name, option.default) is not None
    }


def encode_pairs(
    llm: LLM, pairs: Iterable[Any], options: dict[str, Any], generate: bool
) -> list[Request]:
    """The pairs as token ids, all checked; `generate`: there will be g more tokens."""
    if isinstance(pairs, (str, bytes)) or not isinstance(pairs, Iterable):
        raise TypeError(
            f"[profile] pairs: expected an iterable of (prefix, prompt), got {type(pairs).__name__}"
        )
    encoder = Encoder(llm.tokenizer, llm.config.embeddings, llm.path)
    prefixes: dict[bytes, NDArray[np.int32]] = {}  # equal ones are one array
    work: list[Request] = []
    for i, pair in enumerate(pairs):
        where = f"profile] pair {i}"
        if not isinstance(pair, (tuple, list)) or len(pair) != 2:
            raise TypeError(f"[{where}: expected (prefix, prompt), got {shown(pair)}")
        prefix = encoder.prefix(pair[0], f"{where} prefix")
        if len(prefix) == 0:
            raise ValueError(f"[{where} prefix: expected at least one token, got none")
        prefix = prefixes.setdefault(prefix.tobytes(), prefix)
        prompt = encoder.prompt(pair[1], f"{where} prompt", after_prefix=True)
        work.append(Request(prefix, prompt, options["gen_length"], llm.config.shift))
        rows = work[-1].rows if generate else len(prefix) + len(prompt)
        if rows > llm.config.context:
            raise ValueError(
                f"[{where}: expected at most {llm.config.context} tokens (the model's context)"
                f"{', response included' if generate else ''}, got {rows}"
            )
    if not work:
        raise ValueError("[profile] pairs: expected at least one, got none")
    if generate:  # checks the options; runs nothing
        llm.stream(work[0].prompt, prefix=work[0].prefix, cache="none", **options).close()
    return work


def data_hash(work: Sequence[Request]) -> str:
    """SHA-256 over every pair's lengths (int64) and ids (int32), little-endian."""
    digest = hashlib.sha256()
    for pair in work:
        digest.update(np.array([len(pair.prefix), len(pair.prompt)], "<i8").tobytes())
        digest.update(np.concatenate([pair.prefix, pair.prompt]).astype("<i4").tobytes())
    return digest.hexdigest()
