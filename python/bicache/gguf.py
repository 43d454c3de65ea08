"""GGUF files of llama.cpp: the tokenizer and the chat template that their metadata hold."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from . import _core

if TYPE_CHECKING:
    import tokenizers

_SPLIT = re.compile(r".*-(\d{5})-of-\d{5}\.gguf")
_GGUF_NAMES = {"unk": "unknown", "sep": "seperator", "pad": "padding"}  # of special tokens
_CONTROL, _USER_DEFINED, _UNUSED = 3, 4, 5  # llama.cpp's types of tokens


def is_gguf(path: str | os.PathLike[str]) -> bool:
    """Whether `path` is a file whose name ends with .gguf."""
    return str(path).endswith(".gguf") and Path(path).is_file()


def models_in(folder: Path) -> list[Path]:
    """The GGUF models of a folder, sorted; of a split one its first file."""
    files = sorted(path for path in folder.glob("*.gguf") if path.is_file())
    numbers = [_SPLIT.fullmatch(path.name) for path in files]
    return [p for p, n in zip(files, numbers, strict=True) if n is None or int(n[1]) == 1]


@dataclass(frozen=True)
class Words:
    """How a tokenizer cuts text before it joins pairs.

    Attributes:
        pattern: What a word is; None: GPT-2's words.
        nfc: Whether text is first normalised to NFC.
        whole: Whether a word that is a token is one, whatever its pairs would join to.
    """

    pattern: str | None
    nfc: bool = False
    whole: bool = False


def _words(digits: str) -> str:
    return (
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"  # English endings
        r"|[^\r\n\p{L}\p{N}]?\p{L}+"  # letters, and one character before them
        rf"|{digits}"
        r"| ?[^\s\p{L}\p{N}]+[\r\n]*"  # punctuation
        r"|\s*[\r\n]+|\s+(?!\S)|\s+"
    )


QWEN2 = Words(_words(r"\p{N}"), nfc=True)
_BAILING = Words(
    r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}+|\p{N}"
    r"| ?[^\s\p{L}\p{N}]++[\r\n]*|\s*[\r\n]|\s+(?!\S)|\s+"
)
_LLAMA3 = Words(_words(r"\p{N}{1,3}"), whole=True)
# By tokenizer.ggml.pre; the patterns are those of the models' own tokenizer.json.
_PRE = {
    "qwen2": QWEN2,
    "dream": QWEN2,
    "llada": _BAILING,
    "llada-moe": _BAILING,
    "bailingmoe": _BAILING,
    "bailingmoe2": _BAILING,
    "llama-bpe": _LLAMA3,
    "llama3": _LLAMA3,
    "gpt-2": Words(None),
}


class NoTokenizer(ValueError):
    """A GGUF file without a tokenizer, or with one of a kind that is not known here."""


def build_tokenizer(path: Path, metadata: Mapping[str, Any] | None = None) -> tokenizers.Tokenizer:
    """The tokenizer of a GGUF file.

    Args:
        path: The file.
        metadata: Its metadata, if they have been read.

    Raises:
        NoTokenizer: There is none, or one of an unknown kind; token ids work all the same.
        ValueError: Its parts contradict each other.
    """
    from tokenizers import Tokenizer, decoders, models

    values = _core.gguf_metadata(str(path)) if metadata is None else metadata
    words = _find_words(path, values)
    tokens, kinds = _tokens(path, values)
    where = f"[gguf] {path}: tokenizer.ggml"
    # Ids that no text has, as in the folder the file was made from.
    vocab = {text: i for i, text in enumerate(tokens) if kinds[i] != _UNUSED}
    if len(vocab) != sum(kind != _UNUSED for kind in kinds):
        raise ValueError(f"{where}.tokens: expected every token once, got one twice")
    merges = []
    for pair in _texts(path, values, "merges"):
        first, space, second = pair.partition(" ")
        if not space or " " in second:
            raise ValueError(f"{where}.merges: expected two tokens each, got {pair[:60]!r}")
        merges.append((first, second))
    try:
        tokenizer = Tokenizer(models.BPE(vocab, merges, ignore_merges=words.whole))
    except Exception as error:  # the library raises bare Exception
        raise ValueError(f"{where}.merges: expected pairs of its tokens, got: {error}") from None
    cut_words(tokenizer, words)
    tokenizer.decoder = decoders.ByteLevel()
    _add_special(tokenizer, tokens, kinds)
    _begin(tokenizer, path, values, tokens)
    return tokenizer


def chat_source(path: Path) -> tuple[str | None, dict[str, str]]:
    """The chat template of a GGUF file (None: it has none), and the tokens it may write by name."""
    values = _core.gguf_metadata(str(path))
    source = values.get("tokenizer.chat_template")
    if source is not None and not isinstance(source, str):
        raise ValueError(
            f"[gguf] {path}: tokenizer.chat_template: expected text, got {type(source).__name__}"
        )
    tokens = _texts(path, values, "tokens")
    named = {}
    for name in ("bos", "eos", "unk", "sep", "pad", "cls", "mask"):
        if (i := _token_id(path, values, name, len(tokens))) is not None:
            named[f"{name}_token"] = tokens[i]
    return source, named


def _find_words(path: Path, values: Mapping[str, Any]) -> Words:
    model, pre = values.get("tokenizer.ggml.model"), values.get("tokenizer.ggml.pre")
    if model is None or model == "no_vocab":
        raise NoTokenizer(f"[gguf] {path}: tokenizer.ggml.model: expected gpt2, got {model!r}")
    if model != "gpt2":
        raise NoTokenizer(
            f"[gguf] {path}: tokenizer.ggml.model: expected gpt2 (no other kind is supported), "
            f"got {str(model)[:60]!r}"
        )
    if not isinstance(pre, str) or pre not in _PRE:
        raise NoTokenizer(
            f"[gguf] {path}: tokenizer.ggml.pre: expected one of {', '.join(_PRE)}, "
            f"got {str(pre)[:60]!r}"
        )
    return _PRE[pre]


def _texts(path: Path, values: Mapping[str, Any], name: str) -> list[str]:
    found = values.get(f"tokenizer.ggml.{name}", [])
    if not isinstance(found, list) or not all(isinstance(text, str) for text in found):
        raise ValueError(f"[gguf] {path}: tokenizer.ggml.{name}: expected texts, got others")
    return found


def _tokens(path: Path, values: Mapping[str, Any]) -> tuple[list[str], list[int]]:
    """Texts and types by id."""
    tokens = _texts(path, values, "tokens")
    kinds = values.get("tokenizer.ggml.token_type", [1] * len(tokens))
    if not isinstance(kinds, list) or not all(type(kind) is int for kind in kinds):
        raise ValueError(f"[gguf] {path}: tokenizer.ggml.token_type: expected integers, got others")
    if not tokens or len(kinds) != len(tokens):
        raise ValueError(
            f"[gguf] {path}: tokenizer.ggml: expected tokens with a token_type each, "
            f"got {len(tokens)} and {len(kinds)}"
        )
    return tokens, kinds


def _token_id(path: Path, values: Mapping[str, Any], name: str, count: int) -> int | None:
    key = f"tokenizer.ggml.{_GGUF_NAMES.get(name, name)}_token_id"
    found = values.get(key)
    if found is None or count == 0:
        return None
    if type(found) is not int or not 0 <= found < count:
        raise ValueError(f"[gguf] {path}: {key}: expected an id of 0..{count - 1}, got {found!r}")
    return found


def cut_words(tokenizer: tokenizers.Tokenizer, words: Words) -> None:
    """Has `tokenizer` cut text so."""
    from tokenizers import Regex, normalizers, pre_tokenizers

    if words.nfc:
        tokenizer.normalizer = normalizers.NFC()
    if words.pattern is None:
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        return
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(words.pattern), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )


def _add_special(tokenizer: tokenizers.Tokenizer, tokens: list[str], kinds: list[int]) -> None:
    """Those that text is searched for; their ids are those of the vocabulary."""
    from tokenizers import AddedToken

    for kind, special in ((_CONTROL, True), (_USER_DEFINED, False)):
        texts = [text for text, k in zip(tokens, kinds, strict=True) if k == kind and text]
        added = [AddedToken(text, special=special, normalized=False) for text in texts]
        if special:
            tokenizer.add_special_tokens(added)
        else:
            tokenizer.add_tokens(added)


def _begin(
    tokenizer: tokenizers.Tokenizer, path: Path, values: Mapping[str, Any], tokens: list[str]
) -> None:
    """The token that stands before every text, if the file wants one."""
    from tokenizers import processors

    bos = _token_id(path, values, "bos", len(tokens))
    if values.get("tokenizer.ggml.add_bos_token") is True and bos is not None:
        tokenizer.post_processor = processors.TemplateProcessing(
            single=["bos", "$A"],
            special_tokens=[{"id": "bos", "ids": [bos], "tokens": [tokens[bos]]}],
        )
