"""Chat templates: messages to text, split so that the prefix never depends on the user's text."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from .gguf import chat_source, is_gguf
from .inputs import check_text
from .jsonfile import read_object, read_text
from .tokenizer import Tokenizer

if TYPE_CHECKING:
    import jinja2

Messages: TypeAlias = "Sequence[Mapping[str, str]]"

_TEMPLATE_BYTES = 1 << 20
_TOKEN_NAMES = ("bos", "eos", "unk", "sep", "pad", "cls", "mask")

# Two texts that differ from the first character on, and in length. Digits, because templates trim
# texts or change their case.
_PROBES = ("1" * 16, "2" * 17)


class ChatTemplate:
    """The Jinja template that turns a conversation into the text a checkpoint was trained on.

    It renders as Hugging Face transformers does (the page "Writing a chat template" of its
    documentation): sandboxed, `trim_blocks`, `lstrip_blocks`, `break` and `continue`,
    `raise_exception`, `strftime_now`, and a `tojson` that does not escape HTML.

    Args:
        source: The template, at most 1 MiB.
        tokens: What it may write by name, e.g. {"bos_token": "<|startoftext|>"}.
        special_tokens: Texts of the tokenizer's special tokens: a prefix ends after one of them.

    Raises:
        ImportError: jinja2 is not installed.
        TypeError: An argument has the wrong type.
        ValueError: Not a template, or an empty special token.
    """

    def __init__(
        self,
        source: str,
        *,
        tokens: Mapping[str, str] | None = None,
        special_tokens: Sequence[str] = (),
    ) -> None:
        if not isinstance(source, str):
            raise TypeError(f"[chat] template: expected text, got {type(source).__name__}")
        if not isinstance(tokens, (Mapping, type(None))):
            raise TypeError(f"[chat] tokens: expected a mapping, got {type(tokens).__name__}")
        if isinstance(special_tokens, str) or not isinstance(special_tokens, Sequence):
            raise TypeError(
                "[chat] special_tokens: expected a list of texts, got "
                f"{type(special_tokens).__name__}"
            )
        for token in special_tokens:
            if not isinstance(token, str):
                raise TypeError(f"[chat] special_tokens: expected texts, got {token!r}")
            if not token:
                raise ValueError("[chat] special_tokens: expected texts, got an empty one")
        self.source = source
        self.tokens = dict(tokens or {})
        self.special_tokens = tuple(special_tokens)
        self._template = _compile(source)

    @classmethod
    def read(
        cls, folder: str | os.PathLike[str], tokenizer: Tokenizer | None = None
    ) -> ChatTemplate:
        """The template of a checkpoint.

        It is chat_template.jinja; without that file "chat_template" in tokenizer_config.json: a
        text, or a list of {"name", "template"} whose "default" is taken.

        In a GGUF file it is tokenizer.chat_template.

        Args:
            folder: The checkpoint's, or a GGUF file.
            tokenizer: Its tokenizer; None: it is loaded for its special tokens.

        Raises:
            FileNotFoundError: No tokenizer was given, and there is none.
            ImportError: jinja2 is not installed.
            ValueError: There is no template, or a file is wrong; says where it was looked for.
        """
        folder = Path(folder)
        if is_gguf(folder):
            return cls._of_gguf(folder, tokenizer)
        config = read_object(folder / "tokenizer_config.json")
        file = folder / "chat_template.jinja"
        source = read_text(file, _TEMPLATE_BYTES) if file.exists() else _source_in(config, folder)
        if source is None:
            raise ValueError(
                '[chat] template: expected chat_template.jinja or "chat_template" in '
                f"tokenizer_config.json in {folder}, got neither"
            )
        if tokenizer is None:
            tokenizer = Tokenizer.of(folder) or Tokenizer(folder / "tokenizer.json")
        tokens = _named_tokens(config, folder)
        return cls(source, tokens=tokens, special_tokens=tokenizer.special_tokens)

    @classmethod
    def _of_gguf(cls, path: Path, tokenizer: Tokenizer | None) -> ChatTemplate:
        source, tokens = chat_source(path)
        if source is None:
            raise ValueError(
                f"[chat] template: expected tokenizer.chat_template in {path}, got none"
            )
        special = (tokenizer or Tokenizer(path)).special_tokens
        return cls(source, tokens=tokens, special_tokens=special)

    def render(self, messages: Messages) -> str:
        """The whole text: the messages, and the header of the answer to come.

        Raises:
            TypeError: As for split().
            ValueError: As for split().
        """
        return self._render(_check_messages(messages, "conversation"), datetime.now())

    def split(self, messages: Messages, *, where: str = "conversation") -> tuple[str, str]:
        """The text of a conversation, as (prefix, prompt).

        The prefix ends after the last special token that stands before the last user's text; it is
        empty if there is none. It is found without that text: the template is rendered with two
        stand-ins for it, and what both renders begin with cannot have come from either. So no user
        text can move the end of the prefix, not even one that spells special tokens. (In the
        prompt, such text becomes these tokens, as it does in transformers.)

        Args:
            messages: {"role": ..., "content": ...}, both text and nothing else; the last one is
                the user's.
            where: What to call them in messages of errors.

        Raises:
            TypeError: Not messages.
            ValueError: Messages that cannot be rendered, or a template that writes something else
                before the last text because of what that text says.
        """
        checked = _check_messages(messages, where)
        now = datetime.now()  # one for all renders
        probes = []
        for probe in _PROBES:
            text = self._render([*checked[:-1], checked[-1] | {"content": probe}], now)
            if probe not in text:
                raise ValueError(
                    "[chat] template: expected it to write the text of the last message, got "
                    "a render without it"
                )
            probes.append(text)
        shared = os.path.commonprefix(probes)
        ends = [
            shared.rfind(token) + len(token) for token in self.special_tokens if token in shared
        ]
        cut = max(ends, default=0)
        text = self._render(checked, now)
        if not text.startswith(shared[:cut]):
            raise ValueError(
                "[chat] template: expected the same text before the last message whatever that "
                "says, got another one: the template looks at the text"
            )
        return text[:cut], text[cut:]

    def _render(self, messages: list[dict[str, str]], now: datetime) -> str:
        try:
            text = self._template.render(
                messages=messages,
                tools=None,
                documents=None,
                add_generation_prompt=True,
                strftime_now=now.strftime,
                **self.tokens,
            )
        except Exception as error:  # a template may do anything
            raise ValueError(
                "[chat] template: expected it to accept the messages, got "
                f"{type(error).__name__}: {error}"
            ) from None
        return check_text(text, "chat] template")


def encode_split(
    prefix: str, prompt: str, tokenizer: Tokenizer
) -> tuple[NDArray[np.int32], NDArray[np.int32]]:
    """Ids [p] of a prefix and [u] of a prompt, from ChatTemplate.split; nothing is added to them.

    The prefix is encoded by itself. The prompt's ids are what follows them in the encoding of the
    whole text, since tokenizers may treat the start of a text in a special way.

    Raises:
        ValueError: The tokenizer joins the two (one special token begins like another).
    """
    head = tokenizer.encode_prompt(prefix, after_prefix=True)
    whole = tokenizer.encode_prompt(prefix + prompt, after_prefix=True)
    if not np.array_equal(whole[: len(head)], head):
        raise ValueError(
            "[chat] prompt: expected text that leaves the ids of the prefix as they are, got "
            f"text that the tokenizer joins to {prefix[-32:]!r}"
        )
    return head, whole[len(head) :]


def split_conversations(conversations: object) -> list[Any]:
    """One entry per conversation; they are not checked yet."""
    if not isinstance(conversations, (list, tuple)):
        raise TypeError(
            "[chat] conversations: expected a list of messages or a list of such lists, "
            f"got {type(conversations).__name__}"
        )
    if not conversations:
        raise ValueError("[chat] conversations: expected at least one message, got an empty list")
    if isinstance(conversations[0], Mapping):
        return [conversations]
    return list(conversations)


def _check_messages(messages: object, where: str) -> list[dict[str, str]]:
    """The messages as new plain dicts, the last of them the user's."""
    if not isinstance(messages, (list, tuple)):
        raise TypeError(
            f"[chat] {where}: expected a list of messages, got {type(messages).__name__}"
        )
    if not messages:
        raise ValueError(f"[chat] {where}: expected at least one message, got none")
    for i, message in enumerate(messages):
        if not isinstance(message, Mapping):
            raise TypeError(
                f"[chat] {where}, message {i}: expected an object with role and content, "
                f"got {type(message).__name__}"
            )
        if set(message) != {"role", "content"}:
            names = ", ".join(map(str, message)) or "nothing"
            raise ValueError(f"[chat] {where}, message {i}: expected role and content, got {names}")
        for name, text in message.items():
            if not isinstance(text, str):
                raise TypeError(
                    f"[chat] {where}, message {i} {name}: expected text, got {type(text).__name__}"
                )
            check_text(text, f"chat] {where}, message {i} {name}")
    if messages[-1]["role"] != "user":
        raise ValueError(
            f"[chat] {where}: expected the last one to be the user's, "
            f"got the role {messages[-1]['role']!r}"
        )
    return [dict(message) for message in messages]


def _compile(source: str) -> jinja2.Template:
    try:
        import jinja2
        import jinja2.ext
        from jinja2.sandbox import ImmutableSandboxedEnvironment
    except ImportError as error:
        raise ImportError(
            "[chat] jinja2: expected the package, which chat templates need, got none; "
            "`pip install 'bicache[chat]'` brings it"
        ) from error

    def raise_exception(message: str) -> None:
        raise jinja2.TemplateError(message)

    if len(source.encode("utf-8", "surrogatepass")) > _TEMPLATE_BYTES:
        raise ValueError(
            f"[chat] template: expected at most {_TEMPLATE_BYTES} bytes, got {len(source)} "
            "characters"
        )
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[jinja2.ext.loopcontrols]
    )
    environment.filters["tojson"] = _tojson
    environment.globals["raise_exception"] = raise_exception
    checked = check_text(source, "chat] template")
    try:
        return environment.from_string(checked)
    except (jinja2.TemplateError, RecursionError, SyntaxError, ValueError, MemoryError) as error:
        raise ValueError(
            f"[chat] template: expected a Jinja template, got {type(error).__name__}: {error}"
        ) from None


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """Jinja's own filter escapes <, > and & for HTML, which would change what the model reads."""
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )


def _source_in(config: dict[str, Any], folder: Path) -> str | None:
    where = f"[{folder / 'tokenizer_config.json'}] chat_template"
    value = config.get("chat_template")
    if value is None or isinstance(value, str):
        return value
    if not isinstance(value, list):
        raise ValueError(f"{where}: expected text or a list, got {type(value).__name__}")
    named: dict[str, str] = {}
    for i, item in enumerate(value):
        entry = item if isinstance(item, dict) else {}
        name, source = entry.get("name"), entry.get("template")
        if not isinstance(name, str) or not isinstance(source, str):
            raise ValueError(f"{where} {i}: expected a name and a template, got {str(item)[:80]}")
        named[name] = source
    if "default" not in named:
        names = ", ".join(named) or "none"
        raise ValueError(f'{where}: expected one named "default", got {names}')
    return named["default"]


def _named_tokens(config: dict[str, Any], folder: Path) -> dict[str, str]:
    """bos_token and its like: texts, or objects with the text in "content"; null: not there."""
    tokens: dict[str, str] = {}
    for name in (f"{short}_token" for short in _TOKEN_NAMES):
        value = config.get(name)
        text = value.get("content") if isinstance(value, dict) else value
        if value is None:
            continue
        if not isinstance(text, str):
            raise ValueError(
                f"[{folder / 'tokenizer_config.json'}] {name}: expected text or an object with "
                f'"content", got {str(value)[:80]}'
            )
        tokens[name] = text
    return tokens
