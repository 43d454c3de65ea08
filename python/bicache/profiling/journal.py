"""A file of finished measurements, so that work which was killed goes on where it was."""

from __future__ import annotations

import fcntl
import json
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

from ..inputs import shown
from ..jsonfile import parse_json


class Journal:
    """JSON lines: first what the measurements depend on, then one line per measurement.

    Args:
        path: The file; made if it is not there. None: nothing is kept.
        header: What must be the same for finished measurements to count.

    Attributes:
        entries: (line number, content) of the measurements that were there.

    Raises:
        OSError: The file cannot be opened.
        ValueError: It was made under another header (says which member differs), or is damaged.
            A last line that was not written to its end is dropped.
    """

    def __init__(self, path: Path | None, header: Mapping[str, Any]) -> None:
        self.entries: list[tuple[int, dict[str, Any]]] = []
        self._file = None
        if path is None:
            return
        if not path.parent.is_dir():
            raise FileNotFoundError(
                f"[profile] state {path}: expected a file in an existing folder, got none"
            )
        if path.exists() and not path.is_file():
            raise ValueError(f"[profile] state {path}: expected a regular file, got something else")
        first = json.dumps(header).encode() + b"\n"
        content = path.read_bytes() if path.exists() else b""
        whole = content[: content.rfind(b"\n") + 1]
        if whole:
            self._read(path, whole, parse_json(first))
        elif not first.startswith(content):
            raise ValueError(f"[profile] state {path}: expected a state file, got another file")
        self._file = open(path, "r+b" if path.exists() else "wb", buffering=0)
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            self._file.close()
            raise ValueError(
                f"[profile] state {path}: expected a file of this run, got one that another run "
                "writes"
            ) from None
        self._file.truncate(len(whole))
        self._file.seek(len(whole))
        if not whole:
            self._file.write(first)

    def add(self, entry: Mapping[str, Any]) -> None:
        """Appends a measurement; it is there as soon as this returns."""
        if self._file is not None:
            self._file.write(json.dumps(entry, allow_nan=False).encode() + b"\n")

    def __enter__(self) -> Journal:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._file is not None:
            self._file.close()

    def _read(self, path: Path, whole: bytes, header: dict[str, Any]) -> None:
        for number, line in enumerate(whole.removesuffix(b"\n").split(b"\n"), start=1):
            try:
                content = parse_json(line)
            except ValueError as error:
                raise ValueError(
                    f"[profile] state {path} line {number}: expected JSON, got {error}"
                ) from None
            if not isinstance(content, dict):
                raise ValueError(
                    f"[profile] state {path} line {number}: expected an object, "
                    f"got {shown(content)}"
                )
            if number > 1:
                self.entries.append((number, content))
                continue
            for name in [*header, *sorted(set(content) - set(header))]:
                if name not in content or name not in header or content[name] != header[name]:
                    raise ValueError(
                        f"[profile] state {path} {name}: expected {shown(header.get(name))} as in "
                        f"this run, got {shown(content.get(name))}; delete the file to start again"
                    )
