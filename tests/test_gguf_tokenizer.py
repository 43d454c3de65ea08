"""Tokenizers and chat templates out of GGUF files."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from bicache import LLM
from bicache.chat import ChatTemplate
from bicache.gguf import build_tokenizer
from bicache.tokenizer import Tokenizer
from conftest import TinyCheckpoint, refuses
from gguf_files import write_gguf
from tokenizers import AddedToken, decoders, models, pre_tokenizers, trainers
from tokenizers import Tokenizer as Library

SPECIAL = ("<|endoftext|>", "<|startoftext|>", "<|mdm_mask|>", "<|eot_id|>")
NORMAL, CONTROL, USER_DEFINED, UNUSED = 1, 3, 4, 5
TEXTS = (
    "the cat and the dog, 1234 dogs",
    "Don't! I'M here\n\n  two  spaces\t",
    "na\u00efve cafe\u0301 \u4f60\u597d \U0001f600",
    "a <|eot_id|>b<|mdm_mask|>",
    "",
)


def trained() -> tuple[Library, dict[str, Any]]:
    """A byte-level BPE, and its parts as a GGUF file has them; the last id is of no token."""
    library = Library(models.BPE())
    library.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    library.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=[AddedToken(text, special=True, normalized=False) for text in SPECIAL],
        show_progress=False,
    )
    library.train_from_iterator([*TEXTS, "the dogs and the cats"] * 3, trainer)
    vocab = library.get_vocab()
    tokens = sorted(vocab, key=lambda text: vocab[text])
    merges = [f"{a} {b}" for a, b in _merges(library)]
    kinds = [CONTROL] * len(SPECIAL) + [NORMAL] * (len(tokens) - len(SPECIAL))
    return library, {
        "ggml.model": "gpt2",
        "ggml.pre": "gpt-2",
        "ggml.tokens": [*tokens, "[PAD]"],
        "ggml.token_type": [*kinds, UNUSED],
        "ggml.merges": merges,
        "ggml.bos_token_id": 1,
    }


def _merges(library: Library) -> list[tuple[str, str]]:
    return [tuple(pair) for pair in json.loads(library.to_str())["model"]["merges"]]


def read(parts: dict[str, Any], **changes: Any) -> Library:
    values = {f"tokenizer.{k}": v for k, v in (parts | changes).items() if v is not None}
    return build_tokenizer(Path("m.gguf"), values)


@pytest.fixture(scope="module")
def made() -> tuple[Library, dict[str, Any]]:
    return trained()


@pytest.fixture
def write(
    tiny_checkpoint: TinyCheckpoint, tmp_path: Path, made: tuple[Library, dict[str, Any]]
) -> Callable[..., Path]:
    """Writes a model with this tokenizer, with some of its parts changed."""

    def write(**changes: Any) -> Path:
        parts = made[1] | {k.replace("ggml_", "ggml.", 1): v for k, v in changes.items()}
        path = tmp_path / "m.gguf"
        size = len(made[1]["ggml.tokens"])
        write_gguf(tiny_checkpoint(layers=1, vocab=size), path, tokenizer=parts)
        return path

    return write


def test_ids_are_those_of_the_tokenizer(made: tuple[Library, dict[str, Any]]) -> None:
    library, parts = made
    tokenizer = read(parts)
    for text in TEXTS:
        ids = tokenizer.encode(text).ids
        assert ids == library.encode(text).ids
        assert tokenizer.decode(ids, skip_special_tokens=False) == text
    assert tokenizer.decode(tokenizer.encode(TEXTS[3]).ids) == "a b"


@pytest.mark.parametrize("pre", ["qwen2", "dream", "llada", "llada-moe", "llama-bpe", "gpt-2"])
def test_words(made: tuple[Library, dict[str, Any]], pre: str) -> None:
    """Text is cut where the models' tokenizers cut it."""
    tokenizer = read(made[1], **{"ggml.pre": pre})
    text = "ab cd1234's ...\n\n\n   x"
    words = [text[a:b] for _, (a, b) in tokenizer.pre_tokenizer.pre_tokenize_str(text)]
    assert "".join(words) == text
    if pre == "gpt-2":
        assert words == ["ab", " cd", "1234", "'s", " ...", "\n\n\n  ", " x"]
    elif pre in ("llada", "llada-moe"):
        assert words == ["ab", " cd", *"1234", "'s", " ...\n\n\n", "  ", " x"]
    else:
        digits = ["123", "4"] if pre == "llama-bpe" else [*"1234"]
        assert words == ["ab", " cd", *digits, "'s", " ...\n\n\n", "  ", " x"]


def test_only_qwen_s_text_is_normalised(made: tuple[Library, dict[str, Any]]) -> None:
    text = "cafe\u0301"
    for pre, expected in (("qwen2", "caf\u00e9"), ("dream", "caf\u00e9"), ("llada", text)):
        tokenizer = read(made[1], **{"ggml.pre": pre})
        assert tokenizer.decode(tokenizer.encode(text).ids) == expected


def test_tokens_that_are_found_in_text(made: tuple[Library, dict[str, Any]]) -> None:
    library, parts = made
    kinds = list(parts["ggml.token_type"])
    kinds[3] = USER_DEFINED
    tokenizer = read(parts, **{"ggml.token_type": kinds})
    ids = tokenizer.encode("a<|eot_id|>").ids
    assert ids == library.encode("a<|eot_id|>").ids
    assert tokenizer.decode(ids) == "a<|eot_id|>"  # it is not special


def test_a_token_before_every_text(write: Callable[..., Path]) -> None:
    plain = Tokenizer(write())
    begun = Tokenizer(write(ggml_add_bos_token=True))
    ids = plain.encode_prefix("the cat")
    assert begun.encode_prefix("the cat").tolist() == [1, *ids]
    assert begun.encode_prompt("the cat", after_prefix=True).tolist() == ids.tolist()


def test_ids_without_a_token_have_no_text(write: Callable[..., Path]) -> None:
    path = write()
    tokenizer = Tokenizer(path)
    last = LLM(path, threads=1).config.vocab - 1
    assert tokenizer.token_id("[PAD]") is None and tokenizer.decode([last]) == ""
    assert len(tokenizer) == last


def test_generating_text(write: Callable[..., Path]) -> None:
    path = write(chat_template="{{ bos_token }}{{ messages[0].content }}<|eot_id|>")
    llm = LLM(path, threads=1)
    output = llm.generate("the cat", gen_length=4)[0]
    assert output.text == llm.tokenizer.decode(output.tokens)
    assert llm.config.eot_token_id == 3  # by its name
    ids = llm.chat([{"role": "user", "content": "the dog"}], gen_length=4)[0].tokens
    assert len(ids) <= 4


def test_the_chat_template(write: Callable[..., Path]) -> None:
    path = write(chat_template="{{ bos_token }}{% for m in messages %}{{ m.content }}{% endfor %}")
    template = ChatTemplate.read(path)
    messages = [{"role": "user", "content": "hi"}]
    assert template.render(messages) == "<|startoftext|>hi"
    assert template.split(messages) == ("<|startoftext|>", "hi")
    with refuses(ValueError, "tokenizer.chat_template", "m.gguf"):
        ChatTemplate.read(write())


@pytest.mark.parametrize(
    ("changes", "part"),
    [
        ({"ggml_pre": "tekken"}, "tokenizer.ggml.pre: expected one of qwen2"),
        ({"ggml_pre": ""}, "tokenizer.ggml.pre"),
        ({"ggml_model": "llama"}, "tokenizer.ggml.model: expected gpt2"),
        ({"ggml_model": "no_vocab"}, "tokenizer.ggml.model: expected gpt2"),
    ],
)
def test_tokenizers_that_are_not_known(
    write: Callable[..., Path], changes: dict[str, Any], part: str
) -> None:
    path = write(**changes)
    with refuses(ValueError, part):
        Tokenizer(path)
    llm = LLM(path, threads=1)
    assert llm.tokenizer is None
    assert len(llm.generate([[5, 6, 7]], gen_length=4)[0].tokens) == 4
    for call in (
        lambda: llm.generate("text", gen_length=4),
        lambda: llm.generate([[5]], gen_length=4, stop="x"),
        lambda: llm.chat([{"role": "user", "content": "text"}]),
    ):
        with refuses(ValueError, part):
            call()


@pytest.mark.parametrize(
    ("changes", "part"),
    [
        ({"ggml.tokens": None}, "got 0 and"),
        ({"ggml.tokens": [1, 2]}, "tokens: expected texts"),
        ({"ggml.tokens": "abc"}, "tokens: expected texts"),
        ({"ggml.tokens": ["a", "b"], "ggml.token_type": [1]}, "got 2 and 1"),
        (
            {"ggml.tokens": ["a", "a"], "ggml.token_type": [1, 1], "ggml.merges": []},
            "got one twice",
        ),
        ({"ggml.token_type": ["a"]}, "token_type: expected integers"),
        ({"ggml.merges": ["ab"]}, "merges: expected two tokens each, got 'ab'"),
        ({"ggml.merges": ["a b c"]}, "merges: expected two tokens each"),
        ({"ggml.merges": ["nobody knows"]}, "merges: expected pairs of its tokens"),
        ({"ggml.add_bos_token": True, "ggml.bos_token_id": 10**6}, "bos_token_id: expected an id"),
        ({"ggml.add_bos_token": True, "ggml.bos_token_id": "1"}, "bos_token_id: expected an id"),
    ],
)
def test_parts_that_contradict_each_other(
    made: tuple[Library, dict[str, Any]], changes: dict[str, Any], part: str
) -> None:
    with refuses(ValueError, "[gguf] m.gguf", part):
        read(made[1], **changes)


def test_a_damaged_tokenizer_is_an_error_of_the_model(write: Callable[..., Path]) -> None:
    path = write(ggml_merges=["nobody knows"])
    with refuses(ValueError, "merges", str(path)):
        LLM(path)
