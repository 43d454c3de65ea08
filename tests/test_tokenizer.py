"""The tokenizer wrapper: special tokens, prefixes, ids outside the vocabulary, broken files."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from bicache import Tokenizer
from conftest import BOS, EOS, MASK, UNKNOWN, TinyCheckpoint, write_tokenizer


@pytest.fixture(scope="module")
def tokenizer(tiny_checkpoint: TinyCheckpoint) -> Tokenizer:
    return Tokenizer(tiny_checkpoint(tokenizer=True) / "tokenizer.json")


def test_a_prefix_gets_the_special_tokens_and_what_follows_it_none(tokenizer: Tokenizer) -> None:
    prefix = tokenizer.encode_prefix("w5 w6")
    prompt = tokenizer.encode_prompt("w7", after_prefix=True)
    assert prefix.tolist() == [BOS, 5, 6] and prompt.tolist() == [7]
    assert prefix.dtype == np.int32
    alone = tokenizer.encode_prompt("w5 w6 w7", after_prefix=False)
    assert alone.tolist() == [*prefix, *prompt]


def test_unknown_words_and_special_tokens_in_text(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode_prompt("w5 never <|mdm_mask|>", after_prefix=True)
    assert ids.tolist() == [5, UNKNOWN, MASK]


def test_decode_skips_special_tokens_if_asked(tokenizer: Tokenizer) -> None:
    ids = np.array([BOS, 5, 6, EOS], np.int32)
    assert tokenizer.decode(ids) == "w5 w6"
    assert "endoftext" in tokenizer.decode(ids, skip_special_tokens=False)


def test_decode_tolerates_ids_outside_the_vocabulary(tokenizer: Tokenizer) -> None:
    assert tokenizer.decode([5, 10**6, -1, 6]) == "w5 w6"
    assert tokenizer.decode([2**31 - 1]) == ""
    assert tokenizer.decode([]) == ""


def test_masks_are_shown(tokenizer: Tokenizer) -> None:
    ids = np.array([MASK, 5, 6, MASK, MASK, 7], np.int32)
    assert tokenizer.decode_masked(ids, MASK, "?") == "? w5 w6 ? ? w7"
    assert tokenizer.decode_masked(ids[:0], MASK, "?") == ""
    assert tokenizer.decode_masked(ids[:1], MASK, "?") == "?"


def test_masks_between_pieces_of_words(tmp_path: Path) -> None:
    from tokenizers import Tokenizer as Raw
    from tokenizers import decoders, models, pre_tokenizers

    pieces = {"<m>": 0, "\u0120red": 1, "dish": 2, "\u0120fox": 3}
    raw = Raw(models.BPE(pieces, []))
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    raw.save(str(tmp_path / "tokenizer.json"))
    tokenizer = Tokenizer(tmp_path / "tokenizer.json")
    ids = np.array([1, 2, 0, 3], np.int32)
    assert tokenizer.decode_masked(ids, 0, "?") == " reddish? fox"


def test_token_id_and_size(tokenizer: Tokenizer) -> None:
    assert tokenizer.token_id("<|mdm_mask|>") == MASK
    assert tokenizer.token_id("<|eot_id|>") is None
    assert len(tokenizer) == 64


def test_stored_padding_and_truncation_do_not_change_prompts(tmp_path: Path) -> None:
    from tokenizers import Tokenizer as Raw

    write_tokenizer(tmp_path, 16)
    raw = Raw.from_file(str(tmp_path / "tokenizer.json"))
    raw.enable_truncation(2)
    raw.enable_padding(length=8)
    raw.save(str(tmp_path / "tokenizer.json"))
    ids = Tokenizer(tmp_path / "tokenizer.json").encode_prefix("w5 w6 w7")
    assert ids.tolist() == [BOS, 5, 6, 7]


def test_no_file(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="expected a tokenizer.json"):
        Tokenizer(tmp_path / "tokenizer.json")


@pytest.mark.parametrize("content", [b"", b"{", b"{}", b"[1]", b"\xff\xfe", b'{"model": 3}'])
def test_a_broken_file_is_named(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "tokenizer.json"
    path.write_bytes(content)
    with pytest.raises(ValueError, match="tokenizer.json: expected a tokenizer.json"):
        Tokenizer(path)
