"""DepthTable and its rules, on hand-made numbers: no model runs here."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import re
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import bicache
import numpy as np
import pytest
from bicache import DepthTable
from bicache.profiling.agreement import (
    AgreementBin,
    measure_bins,
    merge_ratios,
    needed_pairs,
    run_time_table,
    wilson_lower,
)
from bicache.profiling.depth_plot import draw
from conftest import edit_json, refuses

NAN = math.nan


def depth_table(rows: dict[int, Sequence[float]], **changes: Any) -> DepthTable:
    """A table with these similarities of K and V, by ratio; one pair each."""
    layers = len(next(iter(rows.values())))
    counts = np.zeros(101, np.int64)
    similarity = np.full((101, layers), NAN)
    for ratio, values in rows.items():
        counts[ratio], similarity[ratio] = 1, values
    values: dict[str, Any] = {
        "layers": layers, "tau": 0.9, "ratio": "prompt", "splice": "official", "refresh_steps": 4,
        "options": {"gen_length": 8, "temperature": 0.0}, "min_agreement": 0.5, "pairs": len(rows),
        "fingerprint": "ab12", "data_hash": "cd34", "counts": counts,
        "similarity_k": similarity, "similarity_v": similarity.copy(),
        "similarity_hidden": similarity.copy(), "agreement": (),
    }  # fmt: skip
    return DepthTable(**(values | changes))


def depth_bin(low: int, high: int, depth: int | None) -> AgreementBin:
    return AgreementBin(
        low, high, (low, high), 9, (), (), depth, "" if depth is not None else "why"
    )


# ---- the published rules


def test_a_depth_is_the_leading_run_above_tau() -> None:
    """Strictly above, and a layer that is similar again behind one that is not does not count."""
    assert depth_table({10: [1, 0.95, 0.9, 0.99]}).table == {10: 2}
    assert depth_table({10: [1, 0.95, np.nextafter(0.9, 1), 0.8]}).table == {10: 3}
    assert depth_table({10: [1, 1, 1, 1]}).table == {10: 4}
    assert depth_table({10: [0.9, 1, 1, 1]}).table == {}


def test_similarity_is_the_mean_of_k_and_v() -> None:
    table = depth_table({10: [1, 0.8]})
    table.similarity_v[10] = [1, 0.99]
    # 0.895: below tau, though V alone is above
    np.testing.assert_allclose(table.similarity[10], [1, 0.895])
    assert table.table == {10: 1} and np.isnan(table.similarity[11]).all()


def test_noise_is_removed_upwards() -> None:
    """The running maximum over ratios, stored only where it grows."""
    by_depth = {d: [1.0] * d + [0.0] * (5 - d) for d in range(6)}
    depths = {3: 1, 10: 3, 20: 2, 30: 3, 41: 0, 50: 4, 60: 1, 99: 5}
    table = depth_table({ratio: by_depth[depth] for ratio, depth in depths.items()})
    assert table.table == {3: 1, 10: 3, 50: 4, 99: 5}
    wanted = {0: 0, 2: 0, 3: 1, 9: 1, 10: 3, 49: 3, 50: 4, 98: 4, 99: 5, 100: 5}
    assert {ratio: table.lookup(ratio) for ratio in wanted} == wanted
    assert table.cache_string("similarity") == (
        "bicache:depth=table:3:1/10:3/50:4/99:5,refresh_steps=4,splice=official"
    )


def test_refused_questions() -> None:
    table = depth_table({10: [0.5, 0.5]})
    for ratio in (-1, 101):
        with refuses(ValueError, "ratio"):
            table.lookup(ratio)
    with refuses(TypeError, "ratio"):
        table.lookup(1.5)  # type: ignore[arg-type]
    with refuses(ValueError, "similarity", "tau"):
        table.cache_string("similarity")
    with refuses(ValueError, "agreement", "measured"):
        table.cache_string()
    with refuses(ValueError, "agreement or similarity", "both"):
        table.cache_string("both")


# ---- the agreement


def test_wilson_bounds_are_the_published_ones() -> None:
    """Newcombe, Statistics in Medicine 17 (1998), table I, method 3."""
    for agreed, pairs, bound in ((81, 263, 0.2553), (15, 148, 0.0624), (1, 29, 0.0061)):
        assert round(wilson_lower(agreed, pairs), 4) == bound
    assert wilson_lower(0, 20) == 0
    # All agree: n / (n + z^2).
    assert wilson_lower(10, 10) == pytest.approx(10 / (10 + 1.959964**2), rel=1e-14)


def test_needed_pairs_are_the_fewest() -> None:
    assert needed_pairs(0.982) == 210
    for asked in (1e-9, 0.2, 0.5, 0.75, 0.9, 0.95, 0.999):
        count = needed_pairs(asked)
        assert wilson_lower(count, count) >= asked
        assert count == 1 or wilson_lower(count - 1, count - 1) < asked


@pytest.mark.parametrize(
    ("ratios", "needed", "groups"),
    [
        ([50], 1, [[0]]),
        ([70, 50, 60], 1, [[1], [2], [0]]),  # by ratio, not by order
        ([50, 50, 60, 60], 2, [[0, 1], [2, 3]]),
        ([60, 50, 60, 50, 50], 2, [[1, 3, 4], [0, 2]]),  # a ratio is never divided
        ([50, 60, 70, 80], 2, [[0, 1], [2, 3]]),
        ([50, 60, 70, 80, 90], 2, [[0, 1], [2, 3, 4]]),  # the rest joins the last
        ([50, 90], 3, [[0, 1]]),  # too few in all
    ],
)
def test_ratios_are_merged(ratios: list[int], needed: int, groups: list[list[int]]) -> None:
    assert merge_ratios(ratios, needed) == groups


def counting(counts: list[int]) -> tuple[list[tuple[int, int]], Callable[[list[int], int], int]]:
    asked: list[tuple[int, int]] = []

    def count_agreed(group: list[int], depth: int) -> int:
        asked.append((len(group), depth))
        return counts[depth]

    return asked, count_agreed


def test_a_bin_ends_at_its_first_failing_depth() -> None:
    """Even if a deeper one would pass: it is not measured."""
    assert wilson_lower(10, 10) > 0.7 > wilson_lower(9, 10)
    asked, count_agreed = counting([10, 10, 9, 10, 10])
    (found,) = measure_bins([50] * 4 + [60] * 6, count_agreed, 4, 0.7)
    assert asked == [(10, 0), (10, 1), (10, 2)]
    assert (found.agreed, found.depth, found.note) == ((10, 10, 9), 1, "")
    assert found.lower == tuple(wilson_lower(n, 10) for n in (10, 10, 9))
    assert (found.ratio_low, found.ratio_high, found.ratios) == (50, 60, (50, 60))


def test_all_layers_may_be_safe() -> None:
    asked, count_agreed = counting([10, 10, 10])
    (found,) = measure_bins([50] * 10, count_agreed, 2, 0.7)
    assert found.depth == 2 and [depth for _, depth in asked] == [0, 1, 2]


def test_every_bin_is_judged_for_itself() -> None:
    def count_agreed(group: list[int], depth: int) -> int:
        return len(group) if depth <= (3 if 0 in group else 1) else 0

    bins = measure_bins([50] * 9 + [60] * 9, count_agreed, 5, 0.7)
    assert [(b.ratio_low, b.depth) for b in bins] == [(50, 3), (60, 1)]


def test_no_depth_where_reuse_within_the_request_fails() -> None:
    asked, count_agreed = counting([6, 10, 10])
    (found,) = measure_bins([50] * 10, count_agreed, 2, 0.7)
    assert asked == [(10, 0)] and found.depth is None
    table = depth_table({50: [1, 1]}, agreement=(found,))
    with refuses(ValueError, "ratios 50-50", "6 of 10", "lower refresh_steps"):
        table.cache_string()
    with refuses(ValueError, "lower refresh_steps"):
        table.calibration()


def test_a_miss_that_too_few_pairs_cannot_bear_is_not_blamed_on_the_refresh() -> None:
    (found,) = measure_bins([50] * 10, counting([9, 10, 10])[1], 2, 0.7)
    assert found.depth is None and wilson_lower(9, 10) < 0.7 < 0.9
    assert "9 of 10" in found.note and "too few pairs" in found.note
    assert "refresh" not in found.note


def test_too_few_pairs_are_not_measured() -> None:
    asked, count_agreed = counting([3])
    (found,) = measure_bins([50, 60, 70], count_agreed, 2, 0.7)
    assert asked == [] and (found.ratio_low, found.ratio_high, found.pairs) == (50, 70, 3)
    assert found.depth is None and found.agreed == found.lower == ()
    assert found.note == f"3 pairs, at least {needed_pairs(0.7)} needed"


@pytest.mark.parametrize(
    ("bins", "table"),
    [
        ([(48, 85, 5)], {48: 5, 86: 0}),
        ([(0, 100, 5)], {0: 5}),
        ([(48, 99, 5)], {48: 5, 100: 0}),
        ([(48, 60, 5), (61, 85, 5)], {48: 5, 86: 0}),  # equal neighbours
        ([(48, 60, 5), (70, 85, 5)], {48: 5, 86: 0}),
        ([(48, 60, 5), (70, 85, 3)], {48: 5, 61: 3, 86: 0}),  # a gap: the smaller
        ([(48, 60, 3), (70, 85, 5)], {48: 3, 70: 5, 86: 0}),
        ([(48, 60, 3), (61, 100, 5)], {48: 3, 61: 5}),
        ([(48, 60, 3), (70, 80, 0), (90, 95, 2)], {48: 3, 61: 0, 90: 2, 96: 0}),
        ([(48, 60, 0), (70, 85, 2)], {70: 2, 86: 0}),
        ([(48, 60, 0)], {0: 0}),
    ],
)
def test_run_time_table(bins: list[tuple[int, int, int]], table: dict[int, int]) -> None:
    made = tuple(depth_bin(*b) for b in bins)
    assert run_time_table(made) == table
    joined = "/".join(f"{ratio}:{depth}" for ratio, depth in table.items())
    assert depth_table({50: [1, 1]}, agreement=made, splice="strict").cache_string() == (
        f"bicache:depth=agreement:{joined},refresh_steps=4,splice=strict"
    )


# ---- the file


@pytest.fixture
def full_table() -> DepthTable:
    _, count_agreed = counting([6, 6, 2])
    bins = measure_bins([40, 40, 41, 80, 80, 80], count_agreed, 2, 0.5)
    table = depth_table({41: [1, 0.95], 93: [1, 1 / 3]}, pairs=6, agreement=bins)
    table.counts[[41, 93]] = [2, 4]
    table.similarity_k[41, 1], table.similarity_v[41, 1] = 0.9375, 0.9625
    table.similarity_hidden[41, 1] = 0.1 + 0.2
    return table


def test_save_and_load(full_table: DepthTable, tmp_path: Path) -> None:
    path = tmp_path / "profile.json"
    full_table.save(path)
    loaded = DepthTable.load(path)
    for field in dataclasses.fields(DepthTable):
        mine, its = getattr(full_table, field.name), getattr(loaded, field.name)
        if isinstance(mine, np.ndarray):
            assert mine.dtype == its.dtype and mine.tobytes() == its.tobytes(), field.name
        else:
            assert mine == its, field.name
    data = json.loads(path.read_text())
    assert data["format"] == 1 and data["table"] == {"41": 2}
    assert data["similarity_k"][40] == [None, None] and data["similarity_k"][41] == [1.0, 0.9375]
    assert loaded.cache_string() == full_table.cache_string()
    settings = {"refresh_steps": loaded.refresh_steps, "splice": loaded.splice}
    as_object = bicache.BiCache(loaded, **settings)  # type: ignore[arg-type]
    assert as_object.spec() == loaded.cache_string()
    assert [p.name for p in tmp_path.iterdir()] == ["profile.json"]


def test_a_save_that_fails_keeps_the_old_file(
    full_table: DepthTable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "profile.json"
    path.write_text("old")

    def full(fd: int) -> None:
        raise OSError("no space")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="no space"):
        full_table.save(path)
    assert path.read_text() == "old" and len(list(tmp_path.iterdir())) == 1


def changed_row(name: str, ratio: int, row: object) -> Callable[[dict[str, Any]], None]:
    def change(data: dict[str, Any]) -> None:
        data[name][ratio] = row

    return change


def changed_bin(**values: Any) -> Callable[[dict[str, Any]], None]:
    return lambda data: data["agreement"][0].update(values)


DAMAGES: list[tuple[Callable[[dict[str, Any]], object], str]] = [
    (lambda d: d.update(format=2), "format"),
    (lambda d: d.update(extra=1), "extra"),
    (lambda d: d.pop("tau"), "tau"),
    (lambda d: d.update(tau=1), "tau"),
    (lambda d: d.update(tau="0.9"), "tau"),
    (lambda d: d.update(tau=0.96), "table"),  # another one follows
    (lambda d: d.update(table={"41": 1}), "table"),
    (lambda d: d.update(ratio="share"), "ratio"),
    (lambda d: d.update(splice="soft"), "splice"),
    (lambda d: d.update(refresh_steps=0), "refresh_steps"),
    (lambda d: d.update(min_agreement=0), "min_agreement"),
    (lambda d: d.update(layers=3), "similarity_k at ratio 0"),
    (lambda d: d.update(layers=True), "layers"),
    (lambda d: d.update(pairs=7), "counts"),
    (lambda d: d.update(options=[]), "options"),
    (lambda d: d.update(options={"fly": 1}), "fly"),
    (lambda d: d.update(options={"gen_length": "8"}), "gen_length"),
    (lambda d: d.update(fingerprint="AB"), "fingerprint"),
    (lambda d: d.update(data_hash=""), "data_hash"),
    (lambda d: d["counts"].pop(), "counts"),
    (changed_row("counts", 41, 2.0), "counts at ratio 41"),
    (changed_row("counts", 42, -1), "counts at ratio 42"),
    (lambda d: d["similarity_v"].pop(), "similarity_v"),
    (changed_row("similarity_v", 41, [1]), "similarity_v at ratio 41"),
    (changed_row("similarity_v", 41, [1, None]), "similarity_v at ratio 41"),
    (changed_row("similarity_v", 41, [1, 1.5]), "similarity_v at ratio 41"),
    (changed_row("similarity_hidden", 42, [1, 1]), "similarity_hidden at ratio 42"),
    (lambda d: d.update(agreement={}), "agreement"),
    (lambda d: d["agreement"].append(3), "agreement 1"),
    (lambda d: d["agreement"].append(d["agreement"][0]), "agreement 1 ratios"),
    (changed_bin(ratios=[40, 80, 41]), "agreement 0 ratios"),
    (changed_bin(ratios=[]), "agreement 0 ratios"),
    (changed_bin(ratio_low=39), "agreement 0 ratio_low"),
    (changed_bin(pairs=7), "agreement 0 pairs"),
    (changed_bin(pairs=5, agreed=[5, 5, 2]), "agreement 0 lower"),
    (changed_bin(agreed=[6, 7, 2]), "agreement 0 agreed at depth 1"),
    (changed_bin(agreed=[6, 6]), "agreement 0 agreed"),  # depth 2 is missing
    (changed_bin(agreed=[6, 1, 6]), "agreement 0 agreed"),  # nobody goes on after 1
    (changed_bin(agreed=[0, 0]), "agreement 0 agreed"),
    (changed_bin(agreed=[]), "agreement 0 agreed"),
    (changed_bin(lower=[0.9, 0.9, 0.1]), "agreement 0 lower"),
    (changed_bin(depth=2), "agreement 0 depth"),
    (changed_bin(depth=None), "agreement 0 depth"),
    (changed_bin(depth=True), "agreement 0 depth"),
    (changed_bin(note="safe"), "agreement 0 note"),
]


@pytest.mark.parametrize(("damage", "part"), DAMAGES, ids=lambda v: v if isinstance(v, str) else "")
def test_damaged_files(
    full_table: DepthTable, tmp_path: Path, damage: Callable[[dict[str, Any]], object], part: str
) -> None:
    path = tmp_path / "profile.json"
    full_table.save(path)
    data = json.loads(path.read_text())
    damage(data)
    path.write_text(json.dumps(data))
    with refuses(ValueError, str(path), part):
        DepthTable.load(path)


@pytest.mark.parametrize("content", ["", "{", "[]", "1e999", '{"a": 1, "a": 1}', "[" * 99_999])
def test_files_that_are_no_table(tmp_path: Path, content: str) -> None:
    path = tmp_path / "profile.json"
    path.write_text(content)
    with refuses(ValueError, str(path)):
        DepthTable.load(path)


def test_numbers_json_does_not_have(full_table: DepthTable, tmp_path: Path) -> None:
    path = tmp_path / "profile.json"
    full_table.save(path)
    whole = path.read_text()
    for wrong in ("NaN", "Infinity", "1e999"):
        path.write_text(whole.replace('"tau": 0.9', f'"tau": {wrong}'))
        with refuses(ValueError, str(path)):
            DepthTable.load(path)
    path.write_text(whole)
    edit_json(path, tau=None)
    with refuses(ValueError, "tau"):
        DepthTable.load(path)


# ---- for readers


def test_summary_names_what_has_no_data(full_table: DepthTable) -> None:
    lines = full_table.summary().splitlines()
    assert "  no data: 0-40, 42-92, 94-100" in lines  # similarity
    assert "  no data: 0-39, 42-79, 81-100" in lines  # agreement
    assert any("40-80: 6 pairs, depth 1" in line for line in lines)
    assert any(line.endswith(": 6 6 2") for line in lines)
    assert any(full_table.cache_string() in line for line in lines)
    few = measure_bins([40], counting([])[1], 2, 0.5)
    text = dataclasses.replace(full_table, agreement=few).summary()
    assert "no safe depth (1 pairs, at least" in text and "bicache:" not in text
    assert "not measured" in dataclasses.replace(full_table, agreement=()).summary()


def test_plot(full_table: DepthTable, tmp_path: Path) -> None:
    full_table.plot(tmp_path / "profile.png")
    assert (tmp_path / "profile.png").read_bytes().startswith(b"\x89PNG\r\n\x1a\n")
    with refuses(ValueError, "png", "profile.txt"):
        full_table.plot(tmp_path / "profile.txt")


def test_what_is_drawn(full_table: DepthTable) -> None:
    (axes, _) = draw(full_table).axes
    (mesh,) = axes.collections
    shown = mesh.get_array().reshape(2, 101)
    blank = np.ma.getmaskarray(shown)
    assert (blank == (full_table.counts == 0)).all()
    np.testing.assert_array_equal(shown[:, 41], [1, 0.95])
    stairs = [patch.get_data().values.tolist() for patch in axes.patches]
    assert stairs == [
        [0] * 41 + [2] * 60,
        [0] * 40 + [1] * 41 + [0] * 20,
    ]


def test_plotting_leaves_matplotlib_alone(full_table: DepthTable, tmp_path: Path) -> None:
    """No global state (pyplot), and nothing of it is imported before."""
    full_table.save(tmp_path / "t.json")
    script = (
        "import sys, bicache\n"
        f"table = bicache.DepthTable.load({str(tmp_path / 't.json')!r})\n"
        "assert 'matplotlib' not in sys.modules\n"
        f"table.plot({str(tmp_path / 't.png')!r})\n"
        "assert 'matplotlib.pyplot' not in sys.modules\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_without_matplotlib(
    full_table: DepthTable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in [n for n in sys.modules if n.partition(".")[0] == "matplotlib"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with refuses(ImportError, "pip install 'bicache[plot]'"):
        full_table.plot(tmp_path / "t.png")
    extras = (Path(__file__).parent.parent / "pyproject.toml").read_text()
    assert re.search(r'^plot = \["matplotlib"\]$', extras, re.MULTILINE)
