"""Tokenizer: a thin wrapper over a checkpoint's tokenizer (Hugging Face `tokenizers`)."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from .gguf import QWEN2, NoTokenizer, build_tokenizer, cut_words, is_gguf
from .jsonfile import read_object

if TYPE_CHECKING:
    import tokenizers

_FILE, _VOCAB, _MERGES = "tokenizer.json", "vocab.json", "merges.txt"


class Tokenizer:
    """Text to token ids and back.

    A prefix is encoded by itself, so its ids never depend on the text that follows it: that is
    what makes it shareable.

    Args:
        path: A GGUF file, a tokenizer.json, or a vocab.json with its merges.txt beside it: a
            byte-level BPE that cuts text as Qwen2's does, with the added tokens of
            tokenizer_config.json (or added_tokens.json).

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: The file is not a tokenizer, or has none of a kind that is known here.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        if not self.path.is_file():
            raise FileNotFoundError(f"[tokenizer] {self.path}: expected a tokenizer.json, got none")
        if is_gguf(self.path):
            self._tokenizer = build_tokenizer(self.path)
        elif self.path.name == _VOCAB:
            self._tokenizer = _from_vocab(self.path)
        else:
            self._tokenizer = _load(self.path)
        # Canvases are never padded or cut behind the engine's back.
        self._tokenizer.no_padding()
        self._tokenizer.no_truncation()
        ids = self._tokenizer.get_vocab(with_added_tokens=True).values()
        self._end = max(ids, default=-1) + 1

    @classmethod
    def of(cls, path: str | os.PathLike[str]) -> Tokenizer | None:
        """That of a checkpoint: of a folder its tokenizer.json, otherwise its vocab.json; of a GGUF
        file its own; None: it has none, or a GGUF file has one of an unknown kind.

        Raises:
            FileNotFoundError: vocab.json without merges.txt.
            ValueError: Its file is damaged.
        """
        if is_gguf(path):
            try:
                return cls(path)
            except NoTokenizer:
                return None
        for name in (_FILE, _VOCAB):
            if (file := Path(path) / name).exists():
                return cls(file)
        return None

    @staticmethod
    def missing(path: Path) -> str:
        """Why of() finds none in the checkpoint at `path`."""
        if is_gguf(path):
            try:
                build_tokenizer(path)
            except NoTokenizer as error:
                return str(error)
        return f"there is no tokenizer.json in {path}"

    def __len__(self) -> int:
        return self._tokenizer.get_vocab_size(with_added_tokens=True)

    @property
    def end(self) -> int:
        """The least id such that no token has it or a larger one."""
        return self._end

    def encode_prefix(self, text: str) -> NDArray[np.int32]:
        """Ids [n] of a shared prefix, with the special tokens the post-processor adds."""
        return self._encode(text, special=True)

    def encode_prompt(self, text: str, *, after_prefix: bool) -> NDArray[np.int32]:
        """Ids [n] of a prompt; special tokens are added only where no prefix stands before it."""
        return self._encode(text, special=not after_prefix)

    def _encode(self, text: str, *, special: bool) -> NDArray[np.int32]:
        return np.array(self._tokenizer.encode(text, add_special_tokens=special).ids, np.int32)

    def decode(
        self, ids: Sequence[int] | NDArray[np.integer[Any]], *, skip_special_tokens: bool = True
    ) -> str:
        """Text of `ids` [n]. Ids outside the vocabulary (a model can predict them) are left out."""
        known = [int(i) for i in ids if i >= 0 and self._tokenizer.id_to_token(int(i)) is not None]
        return self._tokenizer.decode(known, skip_special_tokens=skip_special_tokens)

    def decode_masked(self, ids: NDArray[np.int32], mask_token_id: int, mask_text: str) -> str:
        """As decode, with every `mask_token_id` of `ids` [n] shown as `mask_text`."""
        masked = ids == mask_token_id
        starts = [0, *(np.flatnonzero(masked[1:] != masked[:-1]) + 1).tolist(), len(ids)]
        # Without a decoder, tokens are words and the library joins them by spaces.
        space = " " if self._tokenizer.decoder is None else ""
        parts = []
        for begin, end in zip(starts, starts[1:], strict=False):
            if begin < end and masked[begin]:
                parts.append(space.join([mask_text] * (end - begin)))
            else:
                parts.append(self.decode(ids[begin:end]))
        return space.join(part for part in parts if part)

    def token_id(self, name: str) -> int | None:
        """Id of the token spelled `name`; None: there is none."""
        return self._tokenizer.token_to_id(name)

    @property
    def special_tokens(self) -> tuple[str, ...]:
        """Texts of the special tokens that are found wherever they stand."""
        added = self._tokenizer.get_added_tokens_decoder().values()
        return tuple(t.content for t in added if t.content and t.special and not t.single_word)


def _load(path: Path) -> tokenizers.Tokenizer:
    import tokenizers

    try:
        return tokenizers.Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises bare Exception
        raise ValueError(
            f"[tokenizer] {path}: expected a tokenizer.json of Hugging Face tokenizers, "
            f"got: {error}"
        ) from None


def _from_vocab(path: Path) -> tokenizers.Tokenizer:
    from tokenizers import Tokenizer, decoders, models

    merges = path.with_name(_MERGES)
    if not merges.is_file():
        raise FileNotFoundError(f"[tokenizer] {merges}: expected it beside vocab.json, got none")
    try:
        tokenizer = Tokenizer(models.BPE.from_file(str(path), str(merges)))
    except Exception as error:  # the library raises bare Exception
        raise ValueError(
            f"[tokenizer] {path}: expected the vocabulary of a byte-level BPE with its {_MERGES}, "
            f"got: {error}"
        ) from None
    cut_words(tokenizer, QWEN2)  # which is Dream's
    tokenizer.decoder = decoders.ByteLevel()
    _add_tokens(tokenizer, path.parent)
    return tokenizer


def _add_tokens(tokenizer: tokenizers.Tokenizer, folder: Path) -> None:
    """Those of tokenizer_config.json or added_tokens.json, with the ids these say."""
    from tokenizers import AddedToken

    path = folder / "tokenizer_config.json"
    content = read_object(path)
    entries = content.get("added_tokens_decoder")
    if entries is None:
        path = folder / "added_tokens.json"
        entries = {
            str(i): {"content": text, "special": True} for text, i in read_object(path).items()
        }
    where = f"[tokenizer] {path} added tokens"
    if not isinstance(entries, dict) or not all(
        key.isdecimal() and len(key) < 12 for key in entries
    ):
        raise ValueError(f"{where}: expected an object from ids to tokens, got something else")
    for key, entry in sorted(entries.items(), key=lambda pair: int(pair[0])):
        i = int(key)
        text = entry.get("content") if isinstance(entry, dict) else None
        if not isinstance(text, str) or not text:
            raise ValueError(f"{where}: expected a text for id {i}, got {str(entry)[:60]}")
        flags = {
            name: entry.get(name) is True
            for name in ("lstrip", "normalized", "rstrip", "single_word")
        }
        token = AddedToken(text, special=entry.get("special") is True, **flags)
        add = tokenizer.add_special_tokens if token.special else tokenizer.add_tokens
        add([token])
        # The library hands out ids itself, from the end of the vocabulary on.
        if (got := tokenizer.token_to_id(text)) != i:
            raise ValueError(
                f"{where}: expected ids that follow the vocabulary without a gap, "
                f"got {i} for {text!r} where {got} is next"
            )
