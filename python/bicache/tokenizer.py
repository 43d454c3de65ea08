"""Tokenizer: a thin wrapper over a checkpoint's tokenizer.json (Hugging Face `tokenizers`)."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    import tokenizers


class Tokenizer:
    """Text to token ids and back.

    A prefix is encoded by itself, so its ids never depend on the text that follows it: that is
    what makes it shareable.

    Args:
        path: A tokenizer.json.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: The file is not a tokenizer.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        import tokenizers

        self.path = Path(path)
        if not self.path.is_file():
            raise FileNotFoundError(f"[tokenizer] {self.path}: expected a tokenizer.json, got none")
        try:
            self._tokenizer: tokenizers.Tokenizer = tokenizers.Tokenizer.from_file(str(self.path))
        except Exception as error:  # the library raises bare Exception
            raise ValueError(
                f"[tokenizer] {self.path}: expected a tokenizer.json of Hugging Face tokenizers, "
                f"got: {error}"
            ) from None
        # Canvases are never padded or cut behind the engine's back.
        self._tokenizer.no_padding()
        self._tokenizer.no_truncation()

    def __len__(self) -> int:
        return self._tokenizer.get_vocab_size(with_added_tokens=True)

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
