"""Where a conversation is cut, and LLM.chat and the command line on top of that."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from bicache import LLM, ChatTemplate, Tokenizer, cli
from bicache.chat import encode_split
from chats import (
    CHATML,
    HEAD,
    INJECTIONS,
    LLADA,
    NOSY,
    PLAIN,
    STRICT,
    SYSTEM,
    TEMPLATES,
    TURNS,
    VOCAB,
    ask,
    template_of,
    write_bytes_tokenizer,
    write_chat_format,
)
from conftest import BOS, SPECIAL, TinyCheckpoint, refuses
from tokenizers import AddedToken, models, pre_tokenizers
from tokenizers import Tokenizer as HubTokenizer

Copy = Callable[[Path], Path]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    folder = tmp_path_factory.mktemp("tokenizer")
    write_bytes_tokenizer(folder)
    return Tokenizer(folder / "tokenizer.json")


@pytest.fixture
def checkpoint(tiny_checkpoint: TinyCheckpoint, copy_checkpoint: Copy) -> Path:
    folder = copy_checkpoint(tiny_checkpoint(vocab=VOCAB, context=512))
    write_chat_format(folder)
    return folder


# ---- where a conversation is cut


def test_llada() -> None:
    prefix, prompt = template_of(LLADA).split(ask(" Why? "))
    assert prefix == (
        "<|startoftext|><|start_header_id|>system<|end_header_id|>\n\nYou are brief.<|eot_id|>"
        "<|start_header_id|>user<|end_header_id|>\n\nIs it 1111111111111111 or 2?<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\nTwo. <|eot_id|><|eot_id|>"
        "<|start_header_id|>user<|end_header_id|>"
    )
    assert prompt == "\n\nWhy?<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n"


def test_chatml_with_its_own_system_message() -> None:
    prefix, prompt = template_of(CHATML).split(ask("Why?", []))
    assert prefix == "<|im_start|>system\nBe kind.<|im_end|>\n<|im_start|>"
    assert prompt == "user\nWhy?<|im_end|>\n<|im_start|>assistant\n"
    assert template_of(CHATML).split(ask("Why?", [SYSTEM]))[0] == (
        "<|im_start|>system\nYou are brief.<|im_end|>\n<|im_start|>"
    )


def test_without_special_tokens_there_is_no_prefix() -> None:
    head = [SYSTEM]
    text = "system: You are brief.\nuser: Why?\nassistant:"
    assert template_of(PLAIN).split(ask("Why?", head)) == ("", text)
    assert ChatTemplate(CHATML).split(ask("Why?", head))[0] == ""
    assert template_of(PLAIN).render(ask("Why?", head)) == text


def test_a_template_that_raises() -> None:
    assert template_of(STRICT).split(ask("Why?")) == template_of(CHATML).split(ask("Why?"))
    with refuses(ValueError, "[chat] template", "where is the system?"):
        template_of(STRICT).split(ask("Why?", []))


def test_a_template_that_looks_at_the_last_text() -> None:
    assert template_of(NOSY).split(ask("Why?"))[0].startswith("<|im_start|>system\nChat.<|im_end|>")
    with refuses(ValueError, "[chat] template", "looks at the text"):
        template_of(NOSY).split(ask("Will it rain?"))


def test_what_depends_on_the_length_of_the_last_text_is_no_prefix() -> None:
    template = template_of("<|im_start|>{{ messages[-1].content | length }}<|im_end|>" + CHATML)
    for text in ("", "Why?", "1" * 16):
        assert template.split(ask(text))[0] == "<|im_start|>"


def test_special_tokens_may_be_digits() -> None:
    template = ChatTemplate(
        "<s>{{ messages[-1].content }}</s>", special_tokens=("<s>", "</s>", "1", "2")
    )
    assert template.split(ask("1 or 2?")) == ("<s>", "1 or 2?</s>")


@pytest.mark.parametrize("change", ["upper", "lower", "trim", "capitalize", "tojson"])
def test_a_template_may_change_the_text(change: str) -> None:
    template = template_of("<|im_start|>{{ messages[-1].content | " + change + " }}<|im_end|>")
    assert template.split(ask("Why?"))[0] == "<|im_start|>"


def test_a_template_without_the_last_text() -> None:
    with refuses(ValueError, "[chat] template", "last message"):
        template_of("<|im_start|>{{ messages[0].content }}").split(ask("Why?"))


@pytest.mark.parametrize("name", TEMPLATES)
def test_the_prefix_never_depends_on_the_last_text(name: str, tokenizer: Tokenizer) -> None:
    template = template_of(TEMPLATES[name])
    head = [SYSTEM] if name == "plain" else HEAD  # HEAD spells a special token
    expected, _ = encode_split(*template.split(ask("Why?", head)), tokenizer)
    assert (len(expected) > 0) == (name != "plain")
    rng = random.Random(name)
    pieces = (
        *INJECTIONS, *SPECIAL, *TURNS, "", " ", "\n", "\n\n", "\t", "er", "w", "1", "2" * 17, "é",
        "\u0301", "日本", "🦊", "\u200b", "\u2028", "{{ bos_token }}", "{% endfor %}", "<|", "|>",
    )  # fmt: skip
    texts = [
        *INJECTIONS, "", " \n\t ",
        *("".join(rng.choices(pieces, k=rng.randint(1, 6))) for _ in range(100)),
    ]  # fmt: skip
    for text in texts:
        messages = ask(text, head)
        prefix, prompt = template.split(messages)
        assert prefix + prompt == template.render(messages)
        first, rest = encode_split(prefix, prompt, tokenizer)
        np.testing.assert_array_equal(first, expected)
        whole = tokenizer.encode_prompt(prefix + prompt, after_prefix=True)
        np.testing.assert_array_equal(np.concatenate([first, rest]), whole)
        alone = tokenizer.encode_prompt(prompt, after_prefix=True)
        np.testing.assert_array_equal(rest, alone)


def test_a_text_that_spells_special_tokens_becomes_them_in_the_prompt(
    tokenizer: Tokenizer,
) -> None:
    _, prompt = encode_split(*template_of(LLADA).split(ask("<|mdm_mask|>")), tokenizer)
    assert tokenizer.token_id("<|mdm_mask|>") in prompt.tolist()


def word_tokenizer(path: Path, pre: Any, *added: AddedToken) -> Tokenizer:
    words = {w: i for i, w in enumerate(["?", "▁a", "a", "▁b", "b"])}
    tokenizer = HubTokenizer(models.WordLevel(words, unk_token="?"))
    tokenizer.pre_tokenizer = pre
    tokenizer.add_special_tokens(list(added))
    tokenizer.save(str(path))
    return Tokenizer(path)


def test_tokenizers_that_mark_the_start_of_a_text(tmp_path: Path) -> None:
    pre = pre_tokenizers.Metaspace(prepend_scheme="first")
    tokenizer = word_tokenizer(tmp_path / "tokenizer.json", pre, AddedToken("<s>", special=True))
    s = tokenizer.token_id("<s>")
    head, rest = encode_split("a<s>", "a b", tokenizer)
    assert head.tolist() == [1, s] and rest.tolist() == [2, 3]  # alone, "a b" begins with "▁a"
    assert tokenizer.encode_prompt("a b", after_prefix=True).tolist() == [1, 3]


def test_special_tokens_that_swallow_spaces(tmp_path: Path) -> None:
    # Without a pre-tokenizer a space is part of a word, and "?" stands for unknown ones.
    token = AddedToken("<s>", special=True, rstrip=True)
    tokenizer = word_tokenizer(
        tmp_path / "tokenizer.json", pre_tokenizers.Split(" ", "isolated"), token
    )
    s = tokenizer.token_id("<s>")
    head, rest = encode_split("<s>", " a", tokenizer)
    assert head.tolist() == [s] and rest.tolist() == [2]


def test_special_tokens_that_begin_alike(tmp_path: Path) -> None:
    tokens = [AddedToken(text, special=True) for text in ("<s>", "<s>b")]
    tokenizer = word_tokenizer(
        tmp_path / "tokenizer.json", pre_tokenizers.WhitespaceSplit(), *tokens
    )
    assert encode_split("<s>", "a", tokenizer)[1].tolist() == [2]
    with refuses(ValueError, "[chat] prompt", "'<s>'"):
        encode_split("<s>", "b", tokenizer)


def test_only_special_tokens_that_are_found_everywhere_end_a_prefix(tmp_path: Path) -> None:
    tokens = [AddedToken("<s>", special=True), AddedToken("w", special=True, single_word=True)]
    tokenizer = word_tokenizer(
        tmp_path / "tokenizer.json", pre_tokenizers.WhitespaceSplit(), *tokens
    )
    assert tokenizer.special_tokens == ("<s>",)


# ---- messages


@pytest.mark.parametrize(
    ("messages", "error", "part"),
    [
        ("Why?", TypeError, "list of messages, got str"),
        (None, TypeError, "got NoneType"),
        ([], ValueError, "at least one message"),
        (["Why?"], TypeError, "message 0"),
        ([SYSTEM], ValueError, "'system'"),
        ([SYSTEM, {"role": "assistant", "content": "Hm."}], ValueError, "'assistant'"),
        ([{"role": "user"}], ValueError, "got role"),
        ([{}], ValueError, "got nothing"),
        ([{"role": "user", "content": "a", "name": "b"}], ValueError, "got role, content, name"),
        ([{"role": "user", "content": None}], TypeError, "content: expected text, got NoneType"),
        ([{"role": 3, "content": "a"}], TypeError, "role: expected text, got int"),
        ([{"role": "user", "content": ["a"]}], TypeError, "got list"),
        ([SYSTEM, {"role": "user", "content": "a\ud800"}], ValueError, "message 1 content"),
    ],
)
def test_what_is_no_conversation(messages: Any, error: type[Exception], part: str) -> None:
    with refuses(error, "[chat] conversation", part):
        template_of(LLADA).split(messages)
    with refuses(error, "[chat] conversation", part):
        template_of(LLADA).render(messages)


def test_messages_are_not_changed() -> None:
    messages = ask("Why?")
    before = json.dumps(messages)
    template_of(LLADA).split(messages)
    assert json.dumps(messages) == before


# ---- LLM


def test_requests_with_one_head_share_its_prefix(checkpoint: Path) -> None:
    llm = LLM(checkpoint, threads=1, cache="bicache:depth=1")
    texts = ["Why?", *INJECTIONS, ""]
    outs = llm.chat([ask(text) for text in texts], gen_length=4)
    assert [out.stats.prefix_hit for out in outs] == [False, True, True, True, True]
    assert llm.prefix_stats()["entries"] == 1
    later = llm.chat(ask("And now?"), gen_length=4)
    assert len(later) == 1 and later[0].stats.prefix_hit is True
    assert llm.chat(ask("Why?", [SYSTEM]), gen_length=4)[0].stats.prefix_hit is False


def test_chat_is_generate_on_the_split(checkpoint: Path) -> None:
    llm = LLM(checkpoint, threads=1)
    conversations = [ask("Why?"), ask("Is it?", [])]
    options: dict[str, Any] = {"gen_length": 6, "temperature": 2.0, "seed": 5, "stop": ["e"]}
    outs = llm.chat(conversations, cache=["bicache:depth=1", "none"], **options)
    assert [out.stats.prefix_hit for out in outs] == [False, None]
    tokenizer = llm.tokenizer
    assert tokenizer is not None
    for messages, out, cache in zip(conversations, outs, ("bicache:depth=1", "none"), strict=True):
        prefix, prompt = llm.split_chat(messages)
        assert prefix.dtype == prompt.dtype == np.int32 and prefix[0] == BOS
        np.testing.assert_array_equal(
            np.concatenate([prefix, prompt]),
            tokenizer.encode_prompt(template_of(LLADA).render(messages), after_prefix=True),
        )
        assert prefix[-1] == tokenizer.token_id("<|end_header_id|>")
        alone = llm.generate(prompt, prefix=prefix, cache=cache, **options)[0]
        np.testing.assert_array_equal(alone.tokens, out.tokens)
        assert alone.text == out.text
    event = next(llm.stream(prompt, prefix=prefix, gen_length=4))
    np.testing.assert_array_equal(event.canvas[:-4], np.concatenate([prefix, prompt]))


def test_what_chat_refuses(checkpoint: Path, ids_llm: LLM) -> None:
    llm = LLM(checkpoint, threads=1)
    for value, error, part in (
        ("Why?", TypeError, "got str"),
        (ask("Why?")[0], TypeError, "got dict"),
        ([], ValueError, "empty"),
        ([ask("Why?"), []], ValueError, "conversation 1"),
        ([ask("Why?"), SYSTEM], TypeError, "conversation 1"),
        (["Why?"], TypeError, "conversation 0"),
        ([ask("Why?"), [SYSTEM]], ValueError, "conversation 1"),
    ):
        with refuses(error, "[chat] conversation", part):
            llm.chat(value)
    with refuses(TypeError, "[chat] prefix"):
        llm.chat(ask("Why?"), prefix="a")
    with refuses(TypeError, "'gen_lenght'"):
        llm.chat(ask("Why?"), gen_lenght=4)
    with refuses(ValueError, "[chat] tokenizer", "tokenizer.json"):
        ids_llm.chat(ask("Why?"))


def test_chat_lists_the_options() -> None:
    assert "gen_length: " in (LLM.chat.__doc__ or "")


# ---- command line


def test_the_flags(checkpoint: Path, capsys: Any) -> None:
    argv = ["generate", str(checkpoint), "--threads", "1", "--json", "--gen-length", "4"]
    chat = ["--prompt", "Why?", "--prompt", "How?", "--chat"]
    assert cli.main([*argv, *chat, "--system", "Be brief.", "--cache", "bicache:depth=1"]) == 0
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    head = [{"role": "system", "content": "Be brief."}]
    expected = LLM(checkpoint, threads=1, cache="bicache:depth=1").chat(
        [ask("Why?", head), ask("How?", head)], gen_length=4
    )
    assert [line["tokens"] for line in lines] == [out.tokens.tolist() for out in expected]
    assert [line["stats"]["prefix_hit"] for line in lines] == [False, True]
    assert cli.main([*argv, *chat]) == 0
    assert len(capsys.readouterr().out.splitlines()) == 2
    assert cli.main([*argv, "--prompt", "a", "--system", "b"]) == 2
    assert "[generate] --system: expected with --chat" in capsys.readouterr().err
    assert cli.main([*argv, *chat, "--prefix", "a"]) == 2
