"""`bicache profile`: what it prints, writes and refuses."""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import bicache
import pytest
from bicache import LLM, DepthTable, cli
from bicache.options import ALIASES, option_table
from conftest import TinyCheckpoint, random_pairs, refuses
from test_cli import on_a_terminal


@pytest.fixture
def records(tmp_path: Path, copy_checkpoint: Callable[[Path], Path]) -> Path:
    """A copy of the shipped model, and twelve of its questions in pairs.jsonl beside the copy."""
    shipped = LLM("records").path
    lines = (shipped / "questions.jsonl").read_text().splitlines()[::40]
    (tmp_path / "pairs.jsonl").write_text("\n".join(lines) + "\n")
    return copy_checkpoint(shipped)


def test_profile_of_the_shipped_model(records: Path, tmp_path: Path, capfd: Any) -> None:
    pairs, out, plot = (str(tmp_path / name) for name in ("pairs.jsonl", "p.json", "p.png"))
    argv = ["profile", str(records), "--pairs", pairs, "--min-agreement", "0.7", "--threads", "1"]
    assert cli.main([*argv, "--out", out, "--plot", plot, "--save", "--json"]) == 0
    printed, err = capfd.readouterr()
    table = DepthTable.load(out)
    assert json.loads(printed) == table.as_dict() == json.loads(Path(out).read_text())
    assert err == "" and not Path(out + ".partial").exists()
    assert Path(plot).read_bytes().startswith(b"\x89PNG")

    # What the model's card says: five layers are safe. Its K and V stay similar beyond them.
    (found,) = table.agreement
    assert (found.depth, found.agreed[:6]) == (5, (12,) * 6)
    assert table.lookup(100) > 5
    cache = f"agreement:{found.ratio_low}:5/{found.ratio_high + 1}:0"
    assert table.cache_string() == f"bicache:depth={cache},refresh_steps=16,splice=official"

    stored = json.loads((records / "bicache.json").read_text())
    shipped = json.loads((LLM("records").path / "bicache.json").read_text())
    assert stored["format"] == 1 and stored["generation"] == shipped["generation"]
    calibration = stored["calibration"]
    assert calibration == table.calibration() and calibration["cache"] == table.cache_string()
    assert calibration["kind"] == "agreement" and calibration["pairs"] == 12
    assert calibration["fingerprint"] == LLM("records").fingerprint


def test_what_was_saved_is_auto(records: Path, tmp_path: Path, capsys: Any) -> None:
    argv = ["profile", str(records), "--pairs", str(tmp_path / "pairs.jsonl"), "--threads", "1"]
    assert cli.main([*argv, "--min-agreement", "0.7", "--save"]) == 0
    llm = LLM(records, cache="auto")
    prefix, prompt = bicache.read_pairs(tmp_path / "pairs.jsonl")[0]
    assert llm.generate([prompt], prefix=prefix)[0].stats.depth == 5


def test_profile_for_a_reader(records: Path, tmp_path: Path, capsys: Any) -> None:
    argv = ["profile", str(records), "--pairs", str(tmp_path / "pairs.jsonl")]
    assert cli.main([*argv, "--no-agreement", "--tau", "0.99", "--gen-length", "4"]) == 0
    text = capsys.readouterr().out
    table = bicache.profile(
        LLM(records), bicache.read_pairs(tmp_path / "pairs.jsonl"), tau=0.99, agreement=False,
        gen_length=4,
    )  # fmt: skip
    assert text == table.summary() + "\n" and "no data: 0-" in text
    assert {p.name for p in tmp_path.iterdir()} == {"pairs.jsonl", records.name}


def test_a_killed_command_goes_on(
    records: Path, tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "p.json"
    argv = ["profile", str(records), "--pairs", str(tmp_path / "pairs.jsonl"), "--out", str(out)]
    generate = LLM.generate

    def interrupted(llm: LLM, *args: Any, **values: Any) -> Any:
        raise KeyboardInterrupt

    monkeypatch.setattr(LLM, "generate", interrupted)
    assert cli.main([*argv, "--min-agreement", "0.7"]) == 130
    assert not out.exists() and Path(f"{out}.partial").exists()
    monkeypatch.setattr(LLM, "generate", generate)
    monkeypatch.setattr(LLM, "forward", None)  # all of its work is done
    assert cli.main([*argv, "--min-agreement", "0.7"]) == 0
    assert DepthTable.load(out).agreement[0].depth == 5
    assert not Path(f"{out}.partial").exists()


def test_nothing_to_save_is_said_before_the_work(
    records: Path, tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cli, "LLM", None)
    before = (records / "bicache.json").read_bytes()
    argv = ["profile", str(records), "--pairs", str(tmp_path / "pairs.jsonl")]
    assert cli.main([*argv, "--save"]) == 2
    assert "at least 210 pairs" in capsys.readouterr().err
    assert cli.main([*argv, "--save", "--no-agreement"]) == 2
    assert "--no-agreement" in capsys.readouterr().err
    assert (records / "bicache.json").read_bytes() == before


def test_refresh_steps_that_change_answers(
    tiny_checkpoint: TinyCheckpoint, copy_checkpoint: Callable[[Path], Path], tmp_path: Path,
    capsys: Any,
) -> None:  # fmt: skip
    """Then there is no safe depth: results are written, bicache.json is not."""
    model = copy_checkpoint(tiny_checkpoint(layers=3))
    rows = [{"prefix": p, "prompt": u} for p, u in random_pairs([(12, 8)] * 20)]
    (tmp_path / "pairs").write_text("\n".join(map(json.dumps, rows)))
    argv = ["profile", str(model), "--pairs", str(tmp_path / "pairs"), "--min-agreement", "0.8"]
    argv += ["--gen-length", "8", "--out", str(tmp_path / "p.json"), "--save"]
    assert cli.main(argv) == 2
    out, err = capsys.readouterr()
    assert "lower refresh_steps" in out and "lower refresh_steps" in err
    assert DepthTable.load(tmp_path / "p.json").agreement[0].depth is None
    assert not (model / "bicache.json").exists()


def test_results_that_cannot_be_written_are_refused_before_the_work(
    records: Path, tmp_path: Path, capsys: Any
) -> None:
    pairs = tmp_path / "pairs.jsonl"
    os.mkfifo(tmp_path / "fifo")
    argv = ["profile", str(records), "--pairs", str(pairs)]
    before = pairs.read_bytes()
    for more, part in (
        (["--out", str(pairs)], "another file than --pairs"),
        (["--plot", str(tmp_path / "fifo")], "--plot"),
        (["--out", str(tmp_path / "fifo")], "--out"),
        (["--out", str(tmp_path)], "--out"),
    ):
        assert cli.main([*argv, *more]) == 2
        out, err = capsys.readouterr()
        assert out == "" and part in err
    assert pairs.read_bytes() == before
    table = bicache.profile(LLM(records), bicache.read_pairs(pairs)[:1], agreement=False)
    with refuses(ValueError, "regular file"):
        table.save(tmp_path / "fifo")
    for wrong in (None, 5, b"x"):
        with refuses(TypeError, "path"):
            table.save(wrong)  # type: ignore[arg-type]
    with refuses(ValueError, "regular file"):
        bicache.read_pairs(tmp_path)
    with refuses(ValueError, "path"):
        bicache.read_pairs("")


def test_two_runs_do_not_share_a_state(records: Path, tmp_path: Path) -> None:
    pairs = bicache.read_pairs(tmp_path / "pairs.jsonl")[:2]
    state = tmp_path / "state"
    llm = LLM(records)
    bicache.profile(llm, pairs, agreement=False, state=state)
    with open(state, "r+b") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        with refuses(ValueError, "state", "another run"):
            bicache.profile(llm, pairs, agreement=False, state=state)
    bicache.profile(llm, pairs, agreement=False, state=state)


def test_help_and_bars(records: Path, tmp_path: Path, capsys: Any) -> None:
    assert cli.main(["profile", "--help"]) == 0
    text = capsys.readouterr().out
    assert all("--" + name.replace("_", "-") in text for name in [*option_table(), *ALIASES])
    argv = ["profile", str(records), "--pairs", str(tmp_path / "pairs.jsonl")]
    code, screen = on_a_terminal([*argv, "--min-agreement", "0.7"])
    assert code == 0
    for bar in ("similarity", "agreement"):
        assert f"{bar}: 100%" in screen


@pytest.mark.parametrize(
    ("argv", "part"),
    [
        ([], "--pairs"),
        (["--pairs", "no/such/file"], "no/such/file"),
        (["--pairs", "PAIRS", "--tau", "2"], "tau"),
        (["--pairs", "PAIRS", "--ratio", "share"], "prompt or request"),
        (["--pairs", "PAIRS", "--gen-length", "0"], "gen_length"),
        (["--pairs", "PAIRS", "--out", "no/such/p.json"], "--out"),
        (["--pairs", "PAIRS", "--plot", "/"], "--plot"),
        (["--pairs", "PAIRS", "--plot", "p.txt"], "png"),
        (["--pairs", "PAIRS", "--threads", "0"], "threads"),
    ],
)
def test_wrong_arguments(
    records: Path, tmp_path: Path, argv: list[str], part: str, capfd: Any
) -> None:
    pairs = str(tmp_path / "pairs.jsonl")
    argv = [pairs if argument == "PAIRS" else argument for argument in argv]
    assert cli.main(["profile", str(records), *argv]) == 2
    out, err = capfd.readouterr()
    assert out == "" and part in err and "Traceback" not in err
