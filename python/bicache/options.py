"""Generation options: keywords, checks and help text, all made from the engine's option table."""

from __future__ import annotations

import difflib
import inspect
import operator
import textwrap
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from . import _core
from .inputs import shown

_F = TypeVar("_F", bound=Callable[..., Any])
_TYPES: dict[str, type] = {"int": int, "float": float, "bool": bool, "str": str, "ints": list}

_EXPECTED: dict[type, str] = {
    int: "an integer",
    float: "a number",
    bool: "True or False",
    str: "a string",
    list: "a list of integers",
}

# Names that users of other projects know.
ALIASES = {"max_new_tokens": "gen_length", "alg": "remasking", "block_size": "block_length"}

# Stored defaults were chosen together: those that no longer fit when the user sets this one.
_TIED = {
    "gen_length": ("steps", "block_length"),
    "block_length": ("steps",),
    "threshold": ("steps", "factor", "alg_temp"),
    "factor": ("steps", "threshold", "alg_temp"),
    "alg_temp": ("threshold", "factor"),
    "remasking": ("threshold", "factor", "alg_temp", "confidence_eos_eot_inf"),
}


@dataclass(frozen=True)
class Option:
    """One generation option.

    Attributes:
        name: Keyword, e.g. "gen_length"; the command-line flag is the same with dashes.
        type: int, float, bool, str, or list for a list of integers.
        default: The default; None where it is off or follows from others (`help` says which).
        help: One line.
        choices: The values a string may have; empty: any.
    """

    name: str
    type: type
    default: Any
    help: str
    choices: tuple[str, ...]

    @property
    def aliases(self) -> tuple[str, ...]:
        """Other keywords for this option."""
        return tuple(alias for alias, name in ALIASES.items() if name == self.name)

    @property
    def annotation(self) -> str:
        """The type as in a signature."""
        return "list[int]" if self.type is list else self.type.__name__

    def describe(self) -> str:
        """The help line with choices, default and aliases."""
        parts = [self.help]
        if self.choices:
            parts.append(f"one of {', '.join(self.choices)}")
        if self.default is not None and self.default != []:
            parts.append(f"default: {self.default}")
        if self.aliases:
            parts.append(f"also: {', '.join(self.aliases)}")
        return "; ".join(parts)

    def check(self, value: object, where: str) -> Any:
        """`value` as the engine takes it; TypeError where it has another type."""
        if isinstance(value, np.generic):
            value = value.item()
        is_bool = isinstance(value, bool)
        if self.type is bool and is_bool:
            return value
        if self.type is str and isinstance(value, str):
            if self.choices and value not in self.choices:
                raise ValueError(
                    f"[{where}] {self.name}: expected one of {', '.join(self.choices)}, "
                    f"got {value!r}"
                )
            return value
        if self.type is int and not is_bool and isinstance(value, int):
            return self._integer(value, where)
        if self.type is list and isinstance(value, (list, tuple, np.ndarray)):
            return self._integers(value, where)
        if self.type is float and not is_bool and isinstance(value, (int, float)):
            try:
                return float(value)
            except OverflowError:
                raise ValueError(
                    f"[{where}] {self.name}: expected a finite number, got one beyond a float"
                ) from None
        raise self._wrong_type(value, where)

    def _integer(self, value: int, where: str) -> int:
        number = operator.index(value)
        if not -(2**63) <= number < 2**63:
            raise ValueError(f"[{where}] {self.name}: expected a 64-bit integer, got {number}")
        return number

    def _integers(
        self, values: list[Any] | tuple[Any, ...] | NDArray[Any], where: str
    ) -> list[int]:
        if isinstance(values, np.ndarray) and (values.ndim != 1 or values.dtype.kind not in "iu"):
            raise TypeError(
                f"[{where}] {self.name}: expected a 1-D array of integers, "
                f"got {values.dtype} {list(values.shape)}"
            )
        for value in values:
            if isinstance(value, (bool, np.bool_)) or not isinstance(value, (int, np.integer)):
                raise self._wrong_type(value, where)
        return [self._integer(int(value), where) for value in values]

    def _wrong_type(self, value: object, where: str) -> TypeError:
        return TypeError(
            f"[{where}] {self.name}: expected {_EXPECTED[self.type]}, "
            f"got {shown(value)} ({type(value).__name__})"
        )


def option_table() -> dict[str, Option]:
    """Every generation option by name, in the order of the help text."""
    return {
        row["name"]: Option(
            row["name"],
            _TYPES[row["type"]],
            row["default"],
            row["help"],
            tuple(row["choices"] or ()),
        )
        for row in _core.option_table()
    }


def resolve_options(
    given: Mapping[str, Any], stored: Mapping[str, Any], where: str = "generate"
) -> dict[str, Any]:
    """Options for the engine: the user's `given` ones (None: not given) over the `stored` ones.

    Raises:
        TypeError: An option does not exist, has the wrong type, or was given under two names.
    """
    table = option_table()
    chosen: dict[str, Any] = {}
    source: dict[str, str] = {}
    for key, value in given.items():
        name = ALIASES.get(key, key)
        if name not in table:
            raise TypeError(unknown_option(key, table, where))
        if value is None:
            continue
        if name in chosen:
            raise TypeError(
                f"[{where}] {name}: expected one of its names, got both {source[name]} and {key}"
            )
        chosen[name] = table[name].check(value, where)
        source[name] = key
    outdated = {tied for name in chosen for tied in _TIED.get(name, ())}
    return {k: v for k, v in stored.items() if k not in outdated} | chosen


def unknown_option(key: str, table: Mapping[str, Option], where: str) -> str:
    """The message for an option that does not exist: what exists, and the closest name."""
    others = ["prefix", "response", "cache", "stop"] if where == "generate" else []
    names = [*table, *ALIASES, *others]
    close = difflib.get_close_matches(key, names, n=1)
    hint = f"; did you mean {close[0]}?" if close else ""
    return f"[{where}] option: expected one of {', '.join(table)}, got {key!r}{hint}"


def documented(function: _F) -> _F:
    """Replaces **options of `function` by the option table, in its signature and docstring."""
    table = option_table()
    signature = inspect.signature(function)
    fixed = [p for p in signature.parameters.values() if p.kind is not p.VAR_KEYWORD]
    keywords = [
        inspect.Parameter(
            option.name,
            inspect.Parameter.KEYWORD_ONLY,
            default=option.default,
            annotation=option.annotation + (" | None" if option.default is None else ""),
        )
        for option in table.values()
    ]
    function.__signature__ = signature.replace(  # type: ignore[attr-defined]
        parameters=fixed + keywords
    )
    lines = []
    for option in table.values():
        text = f"{option.name}: {option.describe()}"
        lines.append(textwrap.fill(text, 95, initial_indent=" " * 4, subsequent_indent=" " * 8))
    doc = inspect.cleandoc(function.__doc__ or "")
    function.__doc__ = f"{doc}\n\nOptions:\n" + "\n".join(lines) + "\n"
    return function
