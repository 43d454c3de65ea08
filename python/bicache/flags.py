"""Command-line flags of the generation options, made from the option table."""

from __future__ import annotations

import argparse
from collections.abc import Iterable
from typing import Any

from .options import Option, option_table


def flag(name: str) -> str:
    """The flag of an option, e.g. "--gen-length"."""
    return "--" + name.replace("_", "-")


def add_options(parser: argparse.ArgumentParser, names: Iterable[str] | None = None) -> None:
    """Flags for the options called `names` (None: all of them), aliases included."""
    group = parser.add_argument_group("options of the generation")
    for option in _chosen(names):
        _add_option(group, option)


def given_options(args: argparse.Namespace, names: Iterable[str] | None = None) -> dict[str, Any]:
    """What was given for the same options, by name and alias; None: not given."""
    keys = [name for option in _chosen(names) for name in (option.name, *option.aliases)]
    return {key: getattr(args, key) for key in keys}


def _chosen(names: Iterable[str] | None) -> list[Option]:
    table = option_table()
    return list(table.values()) if names is None else [table[name] for name in names]


def _add_option(group: Any, option: Option) -> None:
    """One flag per name, so that giving an option under two names is an error, as in Python."""
    for name in (option.name, *option.aliases):
        text = option.describe() if name == option.name else f"the same as {flag(option.name)}"
        settings: dict[str, Any] = {"dest": name, "default": None, "help": text.replace("%", "%%")}
        if option.type is bool:
            settings["action"] = argparse.BooleanOptionalAction
        elif option.type is list:
            settings |= {"type": _integers, "metavar": "N,N"}
        else:
            settings |= {"type": option.type, "metavar": "TEXT" if option.type is str else "N"}
        group.add_argument(flag(name), **settings)


def _integers(text: str) -> list[int]:
    try:
        return [] if text == "none" else [int(part) for part in text.split(",")]
    except ValueError:
        raise argparse.ArgumentTypeError(
            f"expected integers separated by commas, got {text!r}"
        ) from None
