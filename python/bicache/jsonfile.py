"""Files that users name: checked paths, strict JSON, atomic writes."""

from __future__ import annotations

import contextlib
import json
import os
from pathlib import Path
from typing import Any


def as_path(value: object, where: str) -> Path:
    """`value` as a path; TypeError or ValueError "[where: expected ...".

    Args:
        value: Text or an os.PathLike.
        where: For messages, e.g. "profile] pairs".
    """
    if not isinstance(value, (str, os.PathLike)) or not isinstance(os.fspath(value), str):
        raise TypeError(f"[{where}: expected a path, got {type(value).__name__}")
    text = os.fspath(value)
    if not text or "\0" in text:
        raise ValueError(f"[{where}: expected a path, got {text!r}")
    return Path(text)


def read_file(value: object, where: str) -> bytes:
    """The content of the regular file that `value` names.

    Raises:
        TypeError: Not a path.
        ValueError: There is something else than a regular file.
        FileNotFoundError: There is no such file.
    """
    path = as_path(value, where)
    if not path.exists():
        raise FileNotFoundError(f"[{where}: expected a file, got no such file: {path}")
    if not path.is_file():
        raise ValueError(f"[{where}: expected a regular file, got something else: {path}")
    return path.read_bytes()


def parse_json(data: bytes) -> Any:
    """The value in `data`; ValueError where it is not UTF-8 or not strict JSON.

    Strict: NaN and Infinity are no numbers, numbers are finite as floats, and no object has a key
    twice.
    """
    try:
        return json.loads(
            data.decode("utf-8"),
            object_pairs_hook=_without_duplicates,
            parse_constant=_no_constant,
            parse_float=_finite,
        )
    except RecursionError as error:
        raise ValueError(str(error)) from None


def read_text(path: Path, limit_bytes: int) -> str:
    """The UTF-8 text in a file; ValueError if that is no regular file, or has more bytes."""
    if not path.is_file():
        raise ValueError(f"[{path}] file: expected a regular file, got something else")
    with path.open("rb") as file:
        data = file.read(limit_bytes + 1)
    if len(data) > limit_bytes:
        raise ValueError(f"[{path}] file: expected at most {limit_bytes} bytes, got more")
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"[{path}] file: expected UTF-8 text, got {error}") from None


def read_object(path: Path, limit_bytes: int = 16 << 20) -> dict[str, Any]:
    """The JSON object in a file; empty if there is none.

    Raises:
        ValueError: It is no regular file, has more bytes, or holds something else.
    """
    if not path.exists():
        return {}
    text = read_text(path, limit_bytes)
    try:
        data = parse_json(text.encode())
    except ValueError as error:
        raise ValueError(f"[{path}] JSON: expected a valid file, got: {error}") from None
    if not isinstance(data, dict):
        raise ValueError(f"[{path}] content: expected an object, got {type(data).__name__}")
    return data


def write_atomically(path: Path, text: str) -> None:
    """Replaces `path` by a file with `text`; whoever reads it sees the old file or the new one.

    Raises:
        ValueError: There is something else than a regular file, such as a device.
        OSError: It cannot be written.
    """
    path = Path(os.path.realpath(path))  # a link stays a link
    if path.exists() and not path.is_file():
        raise ValueError(f"[{path}] file: expected a regular file, got something else")
    beside = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        with open(beside, "w", encoding="utf-8", newline="\n") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(beside, path)
    except BaseException:
        with contextlib.suppress(OSError):
            beside.unlink()
        raise


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) != len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"key {twice!r} is there twice")
    return values


def _finite(text: str) -> float:
    value = float(text)
    if value in (float("inf"), float("-inf")):
        raise ValueError(f"{text} is beyond a float")
    return value


def _no_constant(name: str) -> Any:
    raise ValueError(f"{name} is not a JSON number")
