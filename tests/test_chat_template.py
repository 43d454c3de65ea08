"""Chat templates: how they are read from a checkpoint, and how they render."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest
from bicache import LLM, ChatTemplate
from chats import (
    CHATML,
    LLADA,
    PLAIN,
    STRICT,
    TURNS,
    VOCAB,
    ask,
    template_of,
    write_chat_format,
)
from conftest import BOS, SPECIAL, TinyCheckpoint, edit_json, refuses

Copy = Callable[[Path], Path]


@pytest.fixture
def checkpoint(tiny_checkpoint: TinyCheckpoint, copy_checkpoint: Copy) -> Path:
    folder = copy_checkpoint(tiny_checkpoint(vocab=VOCAB, context=512))
    write_chat_format(folder)
    return folder


# ---- rendering


def render(source: str, text: str = "Why?") -> str:
    return ChatTemplate(source, tokens={"eos_token": "</s>"}).render(ask(text, []))


def test_blocks_leave_no_lines_and_no_indentation() -> None:
    assert render("a\n   {% if true %}\nb\n   {% endif %}\nc\n") == "a\nb\nc"


def test_loops_may_break_and_continue() -> None:
    source = "{% for i in range(9) %}{% if i == 1 %}{% continue %}{% endif %}{{ i }}"
    assert render(source + "{% if i == 3 %}{% break %}{% endif %}{% endfor %}") == "023"


def test_tojson_escapes_nothing_for_html() -> None:
    text = "<a href='x'>é & \"日\"</a>"
    assert render("{{ messages[0].content | tojson }}", text) == json.dumps(
        text, ensure_ascii=False
    )
    assert render("{{ {'b': 1, 'a': [2]} | tojson }}") == '{"b": 1, "a": [2]}'
    assert render("{{ {'a': 1} | tojson(indent=2) }}") == '{\n  "a": 1\n}'


def test_texts_are_not_escaped_and_not_templates() -> None:
    assert render("{{ messages[0].content }}", "<b>{{ 1 + 1 }}") == "<b>{{ 1 + 1 }}"


def test_names_that_templates_know() -> None:
    assert render("{{ eos_token }}|{{ bos_token }}|{{ add_generation_prompt }}") == "</s>||True"
    assert render("{{ tools is none and documents is none }}") == "True"
    assert render("{{ strftime_now('%Y') }}") in {
        str(datetime.now().year - 1 + i) for i in (0, 1, 2)
    }


def test_time_stands_still_while_a_conversation_is_split() -> None:
    prefix, _ = template_of("{{ strftime_now('%f') }}" + CHATML).split(ask("Why?"))
    assert prefix.endswith("<|im_start|>")


@pytest.mark.parametrize(
    "source",
    [
        "{{ ''.__class__.__mro__ }}",
        "{{ messages.append(1) }}",
        "{{ messages[0].update(role='system') }}",
        "{{ 1 / 0 }}",
        "{{ 'a' + 1 }}",
        "{{ missing.name }}",
        "{{ range(10 ** 9) | list }}",
        "{% include 'config.json' %}",
        "{{ '\\ud800' }}",
    ],
)
def test_what_a_template_may_not_do(source: str) -> None:
    with refuses(ValueError, "[chat] template"):
        render(source)


@pytest.mark.parametrize(
    "source",
    [
        "{% if %}",
        "{{ x",
        "{% for a in b %}",
        "{{ x | nofilter }}",
        "\ud800",
        "{{ " + "(" * 100_000,
        "{% for a in b %}" * 25 + "{% endfor %}" * 25,
    ],
)
def test_what_is_no_template(source: str) -> None:
    with refuses(ValueError, "[chat] template"):
        ChatTemplate(source)


# ---- files


def test_both_places_and_who_wins(checkpoint: Path) -> None:
    assert ChatTemplate.read(checkpoint).source == LLADA
    edit_json(checkpoint / "tokenizer_config.json", chat_template=[
        {"name": "tool_use", "template": PLAIN}, {"name": "default", "template": CHATML}
    ])  # fmt: skip
    assert ChatTemplate.read(checkpoint).source == CHATML
    (checkpoint / "chat_template.jinja").write_text(STRICT)
    template = ChatTemplate.read(checkpoint)
    assert template.source == STRICT
    assert template.special_tokens == (*SPECIAL, *TURNS)
    (checkpoint / "tokenizer_config.json").unlink()
    assert ChatTemplate.read(checkpoint).split(ask("Why?"))[0].endswith("<|im_start|>")


def test_named_tokens(checkpoint: Path) -> None:
    edit_json(
        checkpoint / "tokenizer_config.json",
        eos_token={"content": "</s>", "lstrip": False},
        unk_token="<unk>",
        model_max_length=10**30,
    )
    path = checkpoint / "tokenizer_config.json"
    path.write_text(path.read_text()[:-1] + ', "pad_token": null}')
    assert ChatTemplate.read(checkpoint).tokens == {
        "bos_token": SPECIAL[BOS], "eos_token": "</s>", "unk_token": "<unk>"
    }  # fmt: skip


def test_no_template(checkpoint: Path) -> None:
    for remove in ("chat_template", None):
        if remove:
            edit_json(checkpoint / "tokenizer_config.json", chat_template=None)
        else:
            (checkpoint / "tokenizer_config.json").unlink()
        with refuses(
            ValueError, "[chat]", "chat_template.jinja", "tokenizer_config.json", str(checkpoint)
        ):
            LLM(checkpoint, threads=1).chat(ask("Why?"))


@pytest.mark.parametrize(
    ("change", "part"),
    [
        ({"chat_template": 3}, "text or a list, got int"),
        ({"chat_template": []}, '"default", got none'),
        ({"chat_template": [{"name": "rag", "template": "a"}]}, '"default", got rag'),
        ({"chat_template": [{"name": "default"}]}, "chat_template 0"),
        ({"chat_template": ["a"]}, "chat_template 0"),
        ({"chat_template": [{"name": "default", "template": 1}]}, "chat_template 0"),
        ({"bos_token": 1}, "bos_token"),
        ({"eos_token": {"text": "a"}}, "eos_token"),
        ({"chat_template": "{% if %}"}, "Jinja template"),
        ({"chat_template": "a" * (1 << 20) + "a"}, "1048576 bytes"),
    ],
)
def test_a_wrong_tokenizer_config(checkpoint: Path, change: dict[str, Any], part: str) -> None:
    edit_json(checkpoint / "tokenizer_config.json", **change)
    llm = LLM(checkpoint, threads=1)  # a wrong template is no obstacle to generate()
    with refuses(ValueError, part):
        llm.split_chat(ask("Why?"))


@pytest.mark.parametrize(
    "content",
    [b"", b"[]", b"{", b'{"a": 1, "a": 2}', b'{"a": NaN}', b'{"a": "\xff"}', b"[" * 100_000,
     b'{"a": "' + b"a" * (16 << 20) + b'"}'],
)  # fmt: skip
def test_a_tokenizer_config_that_is_no_object(checkpoint: Path, content: bytes) -> None:
    (checkpoint / "tokenizer_config.json").write_bytes(content)
    with refuses(ValueError, "tokenizer_config.json"):
        ChatTemplate.read(checkpoint)


def test_a_wrong_template_file(checkpoint: Path) -> None:
    path = checkpoint / "chat_template.jinja"
    for content, part in ((b"\xff", "UTF-8"), (b"a" * ((1 << 20) + 1), "1048576 bytes")):
        path.write_bytes(content)
        with refuses(ValueError, "chat_template.jinja", part):
            ChatTemplate.read(checkpoint)
    path.unlink()
    path.mkdir()
    with refuses(ValueError, "chat_template.jinja", "regular file"):
        ChatTemplate.read(checkpoint)


def test_without_jinja2(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "jinja2", None)
    llm = LLM(checkpoint, threads=1)
    assert llm.generate("a", gen_length=2)
    with refuses(ImportError, "bicache[chat]"):
        llm.chat(ask("Why?"))
