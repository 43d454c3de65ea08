"""Reads the JSON file of a DepthTable, and believes nothing in it."""

from __future__ import annotations

import os
import re
from dataclasses import fields
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
from numpy.typing import NDArray

from ..inputs import integer, shown
from ..jsonfile import parse_json
from ..options import resolve_options
from .agreement import AgreementBin, needed_pairs
from .depth_table import RATIOS, DepthTable, check_settings


def read_depth_table(path: str | os.PathLike[str]) -> DepthTable:
    """The table in the file `path`; see DepthTable.load.

    What follows from other members (the table, bounds, depths) is derived again and must be the
    same.
    """
    where = os.fspath(path)
    try:
        data = parse_json(Path(path).read_bytes())
    except ValueError as error:
        raise ValueError(f"[{where}] JSON: expected a depth table, got: {error}") from None
    try:
        return _Reader(where, data).table()
    except TypeError as error:  # of a checked setting
        raise ValueError(str(error)) from None


class _Reader:
    """Builds a table from parsed JSON; ValueError or TypeError naming the member that is wrong."""

    def __init__(self, where: str, data: Any) -> None:
        self.where = where
        if not isinstance(data, dict):
            self.wrong("content", "an object", data)
        if type(data.get("format")) is not int or data["format"] != 1:
            self.wrong("format", 1, data.get("format"))
        names = {"format", "table", *(f.name for f in fields(DepthTable))}
        for name in sorted(names - set(data)):
            self.wrong(name, "this member", None)
        for name in sorted(set(data) - names):
            self.wrong("content", f"{', '.join(sorted(names))} only", name)
        self.data: dict[str, Any] = data

    def wrong(self, what: str, expected: object, got: object) -> NoReturn:
        raise ValueError(f"[{self.where}] {what}: expected {expected}, got {shown(got)}")

    def table(self) -> DepthTable:
        data = self.data
        names = ("tau", "ratio", "splice", "refresh_steps", "min_agreement")
        settings = check_settings(self.where, **{name: data[name] for name in names})
        layers = integer(data["layers"], f"{self.where}] layers", 1)
        pairs = integer(data["pairs"], f"{self.where}] pairs", 1)
        options = data["options"]
        if not isinstance(options, dict) or resolve_options(options, {}, self.where) != options:
            self.wrong("options", "generation options by name", options)
        counts = self.counts(pairs)
        table = DepthTable(
            **settings,
            layers=layers,
            pairs=pairs,
            options=options,
            fingerprint=self.digits("fingerprint"),
            data_hash=self.digits("data_hash"),
            counts=counts,
            similarity_k=self.similarity("similarity_k", counts, layers),
            similarity_v=self.similarity("similarity_v", counts, layers),
            similarity_hidden=self.similarity("similarity_hidden", counts, layers),
            agreement=self.agreement(pairs, layers, settings["min_agreement"]),
        )
        derived = table.as_dict()["table"]
        if data["table"] != derived:
            self.wrong("table", f"{derived} (from the similarities)", data["table"])
        return table

    def digits(self, name: str) -> str:
        value = self.data[name]
        if not isinstance(value, str) or not re.fullmatch("[0-9a-f]+", value):
            self.wrong(name, "hexadecimal digits", value)
        return value

    def counts(self, pairs: int) -> NDArray[np.int64]:
        values = self.data["counts"]
        if not isinstance(values, list) or len(values) != RATIOS:
            self.wrong("counts", f"a list of {RATIOS} numbers", values)
        for ratio, value in enumerate(values):
            integer(value, f"{self.where}] counts at ratio {ratio}", 0, pairs)
        if sum(values) != pairs:
            self.wrong("counts", f"the sum {pairs} (pairs)", sum(values))
        return np.array(values, np.int64)

    def similarity(self, name: str, counts: NDArray[np.int64], layers: int) -> NDArray[np.float64]:
        rows = self.data[name]
        if not isinstance(rows, list) or len(rows) != RATIOS:
            self.wrong(name, f"a list of {RATIOS} rows", rows)
        for ratio, row in enumerate(rows):
            what = f"{name} at ratio {ratio}"
            if not isinstance(row, list) or len(row) != layers:
                self.wrong(what, f"a list of {layers} (layers)", row)
            for value in row:
                if counts[ratio] == 0 and value is not None:
                    self.wrong(what, "null (no pairs)", value)
                if counts[ratio] and (type(value) not in (int, float) or not -1 <= value <= 1):
                    self.wrong(what, "numbers -1..1", value)
        return np.array(rows, np.float64)

    def agreement(self, pairs: int, layers: int, min_agreement: float) -> tuple[AgreementBin, ...]:
        stored = self.data["agreement"]
        if not isinstance(stored, list):
            self.wrong("agreement", "a list", stored)
        bins: list[AgreementBin] = []
        names = {f.name for f in fields(AgreementBin)}
        first = 0
        for i, values in enumerate(stored):
            if not isinstance(values, dict) or set(values) != names:
                self.wrong(f"agreement {i}", f"an object of {', '.join(sorted(names))}", values)
            ratios = self.ratios(values["ratios"], f"agreement {i} ratios", first)
            count = integer(values["pairs"], f"{self.where}] agreement {i} pairs", 1, pairs)
            agreed = self.agreed(values["agreed"], f"agreement {i} agreed", count, layers)
            made = AgreementBin.of(ratios, count, agreed, min_agreement)
            measured = min(2 + (-1 if made.depth is None else made.depth), layers + 1)
            if len(agreed) != (measured if count >= needed_pairs(min_agreement) else 0):
                self.wrong(
                    f"agreement {i} agreed", "counts up to the first depth that fails", agreed
                )
            for name, value in made.as_dict().items():
                if values[name] != value or type(values[name]) is not type(value):
                    self.wrong(f"agreement {i} {name}", value, values[name])
            bins.append(made)
            first = ratios[-1] + 1
        if bins and sum(b.pairs for b in bins) != pairs:
            self.wrong("agreement", f"{pairs} pairs in all", sum(b.pairs for b in bins))
        return tuple(bins)

    def ratios(self, values: Any, what: str, first: int) -> list[int]:
        if not isinstance(values, list) or not values:
            self.wrong(what, "a list of ratios", values)
        for value in values:
            first = integer(value, f"{self.where}] {what}", first, RATIOS - 1) + 1
        return values

    def agreed(self, values: Any, what: str, pairs: int, layers: int) -> list[int]:
        if not isinstance(values, list) or len(values) > layers + 1:
            self.wrong(what, "a list of counts", values)
        return [
            integer(v, f"{self.where}] {what} at depth {b}", 0, pairs) for b, v in enumerate(values)
        ]
