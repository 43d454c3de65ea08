"""Where checkpoints are, and what bicache keeps beside one (bicache.json)."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from . import _core
from .gguf import is_gguf, models_in
from .inputs import check_text
from .jsonfile import parse_json, write_atomically
from .options import option_table, unknown_option

_MODELS = Path(__file__).parent / "models"
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_FILES = (
    "config.json, model.safetensors (or model.safetensors.index.json and all *.safetensors it "
    "names), and tokenizer.json (or vocab.json and merges.txt) for text prompts; or with "
    "one .gguf file"
)


def shipped_models() -> tuple[str, ...]:
    """Names of the models that come with the package; `LLM(name)` loads one."""
    if not _MODELS.is_dir():
        return ()
    return tuple(sorted(p.name for p in _MODELS.iterdir() if (p / "config.json").is_file()))


def sidecar_path(checkpoint: Path) -> Path:
    """Where bicache.json is: in a checkpoint's folder; MODEL.bicache.json beside MODEL.gguf."""
    if is_gguf(checkpoint):
        return checkpoint.with_suffix(".bicache.json")
    return checkpoint / "bicache.json"


def resolve_path(path: str | os.PathLike[str]) -> Path:
    """A checkpoint: the folder of a shipped model's name, or `path` itself; of a folder that has
    a GGUF file in place of config.json, that file.

    Raises:
        FileNotFoundError: There is none; the message says what to download, and how.
        ValueError: A folder with several GGUF models.
    """
    if not isinstance(path, (str, os.PathLike)):
        raise TypeError(
            "[model] path: expected a folder or the name of a shipped model, "
            f"got {type(path).__name__}"
        )
    text = os.fspath(path)
    if not isinstance(text, str) or not text or "\0" in text:
        raise ValueError(
            f"[model] path: expected a folder or the name of a shipped model, got {text!r}"
        )
    shipped = shipped_models()
    if text in shipped:
        return _MODELS / text
    folder = Path(text)
    if (folder / "config.json").is_file() or is_gguf(folder):
        return folder
    if folder.is_file():
        raise NotADirectoryError(
            f"[model] {text}: expected a folder with {_FILES}, or that file, got another file; "
            "pass its folder"
        )
    if found := models_in(folder):
        if len(found) > 1:
            some = ", ".join(file.name for file in found[:4])
            raise ValueError(
                f"[model] {text}: expected one GGUF model, got {len(found)} ({some}); pass its file"
            )
        return found[0]
    names = ", ".join(shipped) or "none"
    if folder.is_dir():
        raise FileNotFoundError(
            f"[model] {text}: expected a folder with {_FILES}; there is no config.json. "
            f"Shipped models: {names}"
        )
    hub = _HUB_ID.fullmatch(text) is not None
    name = text if hub else "ORGANISATION/MODEL"
    local = text.split("/")[1] if hub else "FOLDER"
    what = (
        f"this looks like a model hub id: nothing is downloaded here. {name}"
        if hub
        else ("there is no such folder. A model hub's model")
    )
    raise FileNotFoundError(
        f"[model] {text}: expected a folder or the name of a shipped model ({names}); {what} needs "
        f"{_FILES}. Get them with `hf download {name} --local-dir {local}` (older versions: "
        f"`huggingface-cli download {name} --local-dir {local}`) and pass the folder {local}"
    )


@dataclass(frozen=True)
class Sidecar:
    """bicache.json: what is known about a checkpoint beyond its files (`sidecar_path`).

    Attributes:
        generation: Default options of generate().
        calibration: Measured facts; "cache" is what cache="auto" means.
    """

    generation: Mapping[str, Any] = field(default_factory=dict)
    calibration: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def read(cls, checkpoint: Path) -> Sidecar:
        """A checkpoint's; an empty one if there is none. ValueError naming what is wrong."""
        path = sidecar_path(checkpoint)
        where = f"[{path}]"
        if not path.exists():
            return cls()
        if not path.is_file():
            raise ValueError(f"{where} file: expected a regular file, got something else")
        try:
            data = parse_json(path.read_bytes())
        except ValueError as error:
            raise ValueError(f"{where} JSON: expected a valid file, got: {error}") from None
        _object(data, where, "content")
        if type(data.get("format")) is not int or data["format"] != 1:
            raise ValueError(f"{where} format: expected 1, got {data.get('format')!r}")
        for key in data:
            if key not in ("format", "generation", "calibration"):
                raise ValueError(
                    f"{where} content: expected format, generation and calibration, got {key!r}"
                )
        generation = _generation(_object(data.get("generation", {}), where, "generation"), where)
        calibration = _object(data.get("calibration", {}), where, "calibration")
        return cls(generation, _calibration(calibration, where))

    def write(self, checkpoint: Path) -> None:
        """Writes a checkpoint's, in place of one that is there."""
        members = {"generation": dict(self.generation), "calibration": dict(self.calibration)}
        content = {"format": 1} | {name: value for name, value in members.items() if value}
        write_atomically(sidecar_path(checkpoint), json.dumps(content, indent=1) + "\n")


def _object(value: object, where: str, what: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise ValueError(f"{where} {what}: expected an object, got {type(value).__name__}")
    return value


def _generation(values: dict[str, Any], where: str) -> dict[str, Any]:
    table = option_table()
    for name, value in values.items():
        if name not in table:
            raise ValueError(unknown_option(name, table, where.strip("[]") + " generation"))
        try:
            values[name] = table[name].check(value, where.strip("[]"))
        except TypeError as error:
            raise ValueError(str(error)) from None
    return values


def _calibration(values: dict[str, Any], where: str) -> dict[str, Any]:
    cache, fingerprint = values.get("cache"), values.get("fingerprint")
    if cache is not None:
        if not isinstance(cache, str):
            raise ValueError(f"{where} calibration cache: expected a string, got {cache!r}")
        try:
            _core.canonical_policy(check_text(cache, "cache] policy"))
        except ValueError as error:
            raise ValueError(f"{where} calibration cache: {error}") from None
    if fingerprint is not None and not isinstance(fingerprint, str):
        raise ValueError(f"{where} calibration fingerprint: expected text, got {fingerprint!r}")
    return values
