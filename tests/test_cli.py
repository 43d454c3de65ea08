"""The command line: what it prints, where, and its exit codes."""

from __future__ import annotations

import fcntl
import io
import json
import os
import pty
import signal
import struct
import subprocess
import sys
import termios
from pathlib import Path
from typing import Any

import bicache
import pytest
from bicache import LLM, cli
from bicache.options import ALIASES, option_table
from conftest import MASK, TinyCheckpoint

PROGRAM = [sys.executable, "-m", "bicache"]


@pytest.fixture
def model(tiny_checkpoint: TinyCheckpoint) -> str:
    return str(tiny_checkpoint(layers=3, tokenizer=True))


def run(*argv: str, stdin: str | bytes = "") -> subprocess.CompletedProcess[bytes]:
    data = stdin.encode() if isinstance(stdin, str) else stdin
    return subprocess.run([*PROGRAM, *argv], input=data, capture_output=True, timeout=120)


# ---- generate


def test_generate_prints_one_text_per_prompt(model: str, capsys: Any) -> None:
    argv = ["generate", model, "--prompt", "w5", "--prompt", "w6 w7", "--prefix", "w8"]
    assert cli.main([*argv, "--gen-length", "4", "--threads", "1"]) == 0
    out, err = capsys.readouterr()
    expected = LLM(model).generate(["w5", "w6 w7"], prefix="w8", gen_length=4)
    assert out.splitlines() == [o.text for o in expected] and err == ""


def test_generate_json_is_one_object_per_line(model: str, capsys: Any) -> None:
    argv = ["generate", model, "--prompt", "w5", "--prompt", "w6", "--json", "--prefix", "w8 w9"]
    assert cli.main([*argv, "--gen-length", "4", "--cache", "bicache:depth=2"]) == 0
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [line["stats"]["prefix_hit"] for line in lines] == [False, True]
    assert all(len(line["tokens"]) == len(line["confidences"]) == 4 for line in lines)
    assert {"text", "finish_reason"} <= set(lines[0])


# Options that go together, each with another value than its default.
TOGETHER: list[dict[str, Any]] = [
    {
        "gen_length": 8, "steps": 4, "block_length": 4, "temperature": 0.5, "remasking": "random",
        "suppress_tokens": [5, 9, 11], "logits_eos_inf": True, "confidence_eos_eot_inf": True,
        "seed": 7,
    },
    {
        "gen_length": 8, "threshold": 0.3, "cfg_scale": 0.5, "early_stop": True,
        "end_tokens": [11, 40],
    },
    {"gen_length": 8, "factor": 0.7, "remasking": "topk_margin"},
    {
        "gen_length": 8, "remasking": "entropy", "temperature": 0.8, "alg_temp": 0.5, "top_p": 0.9,
        "top_k": 20, "seed": 3,
    },
]  # fmt: skip


def flags_of(values: dict[str, Any]) -> list[str]:
    flags: list[str] = []
    for name, value in values.items():
        flag = "--" + name.replace("_", "-")
        text = ",".join(map(str, value)) if isinstance(value, list) else str(value)
        flags += [flag] if value is True else [flag, text]
    return flags


def test_every_option_has_a_flag(capsys: Any) -> None:
    assert cli.main(["generate", "--help"]) == 0
    text = capsys.readouterr().out
    for name in [*option_table(), *ALIASES]:
        assert "--" + name.replace("_", "-") in text
    assert {name for values in TOGETHER for name in values} == set(option_table())


@pytest.mark.parametrize("values", TOGETHER, ids=lambda values: ",".join(list(values)[1:]))
def test_flags_mean_what_the_keywords_mean(model: str, values: dict[str, Any], capsys: Any) -> None:
    argv = ["generate", model, "--prompt", "w5", "--json"]
    assert cli.main([*argv, *flags_of(values)]) == 0
    tokens = json.loads(capsys.readouterr().out)["tokens"]
    assert tokens == LLM(model).generate("w5", **values)[0].tokens.tolist()


def test_kv_dtype(model: str, capsys: Any) -> None:
    confidences = {}
    for kv in ("auto", "f32", "bf16"):
        argv = ["generate", model, "--prompt", "w5 w6", "--gen-length", "8", "--json"]
        assert cli.main([*argv, "--kv-dtype", kv]) == 0
        confidences[kv] = json.loads(capsys.readouterr().out)["confidences"]
        (output,) = LLM(model, kv_dtype=kv).generate("w5 w6", gen_length=8)
        assert confidences[kv] == output.as_dict()["confidences"]
    assert confidences["auto"] == confidences["f32"] != confidences["bf16"]


@pytest.mark.parametrize(
    ("name", "base", "other"),
    [
        ("seed", {"temperature": 3.0}, 8),
        ("temperature", {}, 3.0),
        ("suppress_tokens", {}, None),
        ("cfg_scale", {}, 20.0),
        ("top_k", {"temperature": 3.0}, 1),
        ("top_p", {"temperature": 3.0}, 0.01),
        ("alg_temp", {"remasking": "entropy"}, 50.0),
        ("remasking", {}, "origin"),
    ],
)
def test_a_flag_changes_the_result(
    model: str, name: str, base: dict[str, Any], other: Any, capsys: Any
) -> None:
    """So that test_flags_mean_what_the_keywords_mean compares something."""

    def order(values: dict[str, Any]) -> tuple[list[int], list[float]]:
        argv = ["generate", model, "--prompt", "w5 w6", "--json", "--gen-length", "16"]
        assert cli.main([*argv, *flags_of(values)]) == 0
        out = json.loads(capsys.readouterr().out)
        return out["tokens"], out["confidences"]

    plain = order(base)
    chosen = plain[0] if other is None else other  # suppress what was predicted
    assert order(base | {name: chosen}) != plain


@pytest.mark.parametrize(("name", "values"), [("threshold", ("0", "1")), ("factor", ("1000", "0"))])
def test_flags_of_parallel_decoding(
    model: str, name: str, values: tuple[str, str], capsys: Any
) -> None:
    """The lowest demand takes one step; the highest takes tokens one by one, except that factor
    takes the last two together, as published."""
    argv = ["generate", model, "--prompt", "w5", "--json", "--gen-length", "16"]
    steps = []
    for value in values:
        assert cli.main([*argv, "--" + name, value]) == 0
        steps.append(json.loads(capsys.readouterr().out)["stats"]["steps"])
    assert steps == [1, 16 - (name == "factor")]


def test_flags_of_a_bool_can_be_turned_off(model: str, capsys: Any) -> None:
    argv = ["generate", model, "--prompt", "w5", "--gen-length", "4"]
    assert cli.main([*argv, "--no-early-stop", "--no-logits-eos-inf"]) == 0
    plain = capsys.readouterr().out
    assert cli.main(argv) == 0 and capsys.readouterr().out == plain


@pytest.mark.parametrize(
    ("flags", "part"),
    [
        (["--threshold", "high"], "--threshold: invalid float value: 'high'"),
        (["--threshold", "1.5"], "threshold: expected 0..1, got 1.5"),
        (["--threshold", "0.9", "--factor", "1"], "expected without threshold, got both"),
        (["--threshold", "0.9", "--remasking", "random"], "threshold: expected with remasking"),
        (["--factor", "nan"], "factor: expected a finite number >= 0, got nan"),
        (["--top-p", "0"], "top_p: expected"),
        (["--top-k", "0"], "top_k: expected >= 1, got 0"),
        (["--top-k", "1.5"], "--top-k: invalid int value: '1.5'"),
        (["--alg-temp", "1"], "alg_temp: expected with remasking"),
        (["--cfg-scale", "inf"], "cfg_scale: expected a finite number >= 0, got inf"),
        (["--suppress-tokens", "5,x"], "expected integers separated by commas, got '5,x'"),
        (["--suppress-tokens", ""], "expected integers separated by commas, got ''"),
        (["--suppress-tokens=-1"], "suppress_tokens"),
        (["--suppress-tokens", "99"], "suppress_tokens"),
        (["--suppress-tokens", str(10**30)], "suppress_tokens: expected a 64-bit integer"),
        (["--early-stop", "yes"], "unrecognized arguments: yes"),
        (["--alg", "best"], "remasking: expected one of low_confidence, random, origin"),
        (["--alg", "random", "--remasking", "random"], "got both remasking and alg"),
    ],
)
def test_wrong_flags(model: str, flags: list[str], part: str, capfd: Any) -> None:
    assert cli.main(["generate", model, "--prompt", "w5", "--gen-length", "4", *flags]) == 2
    out, err = capfd.readouterr()
    assert out == "" and part in err and "Traceback" not in err


def test_prompts_from_files_and_stdin(
    model: str, tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "prompt").write_text("w5\nw6\n")
    (tmp_path / "prefix").write_text("w8\n")
    tail = ["--gen-length", "4", "--prefix-file", str(tmp_path / "prefix")]
    assert cli.main(["generate", model, "--prompt-file", str(tmp_path / "prompt"), *tail]) == 0
    from_file = capsys.readouterr().out
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"w5\nw6\n")))
    assert cli.main(["generate", model, *tail]) == 0
    assert capsys.readouterr().out == from_file
    assert from_file.strip() == LLM(model).generate("w5 w6", prefix="w8", gen_length=4)[0].text


def test_stop(model: str, capsys: Any) -> None:
    noisy: dict[str, Any] = {"gen_length": 4, "temperature": 3.0, "logits_eos_inf": True}
    word = LLM(model).generate("w5", **noisy)[0].text.split()[1]
    argv = ["generate", model, "--prompt", "w5", "--gen-length", "4", "--temperature", "3"]
    assert cli.main([*argv, "--logits-eos-inf", "--stop", word, "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["finish_reason"] == "stop" and word not in result["text"].split()


def test_stop_with_early_stop(model: str, capsys: Any) -> None:
    noisy: dict[str, Any] = {
        "gen_length": 8, "block_length": 2, "temperature": 3.0, "end_tokens": []
    }  # fmt: skip
    word = LLM(model).generate("w5", **noisy)[0].text.split()[1]
    argv = ["generate", model, "--prompt", "w5", *flags_of(noisy | {"end_tokens": ["none"]})]
    found = []
    for flag in ("--no-early-stop", "--early-stop"):
        assert cli.main([*argv, "--stop", word, flag, "--json"]) == 0
        found.append(json.loads(capsys.readouterr().out))
    assert found[0]["text"] == found[1]["text"] and found[1]["finish_reason"] == "stop"
    assert found[0]["stats"]["steps"] == 8 > found[1]["stats"]["steps"]


def test_response(model: str, capsys: Any) -> None:
    argv = ["generate", model, "--prompt", "w5", "--prompt", "w6", "--json"]
    for mask in (bicache.MASK_TEXT, "<|mdm_mask|>"):
        assert cli.main([*argv, "--response", f"w9 {mask} {mask} w10 {mask}"]) == 0
        for line, prompt in zip(capsys.readouterr().out.splitlines(), ("w5", "w6"), strict=True):
            got = json.loads(line)
            want = LLM(model).generate(prompt, response=[9, None, None, 10, None])[0]
            assert got["tokens"] == want.tokens.tolist()
            assert got["confidences"][0] is got["confidences"][3] is None
    assert cli.main([*argv, "--response", "w9", "--gen-length", "4"]) == 2
    assert "response: expected 4 tokens (gen_length), got 1" in capsys.readouterr().err


def on_a_terminal(argv: list[str]) -> tuple[int, str]:
    """Exit code and output of the program with stdout and stderr on a terminal."""
    main, terminal = pty.openpty()
    fcntl.ioctl(terminal, termios.TIOCSWINSZ, struct.pack("4H", 24, 80, 0, 0))
    process = subprocess.Popen(
        [*PROGRAM, *argv], stdin=subprocess.DEVNULL, stdout=terminal, stderr=terminal,
        env=os.environ | {"PYTHONIOENCODING": "utf-8"},
    )  # fmt: skip
    os.close(terminal)
    data = b""
    try:
        while chunk := os.read(main, 65536):
            data += chunk
    except OSError:  # how Linux says that the other end is closed
        pass
    finally:
        os.close(main)
    return process.wait(timeout=60), data.decode()


def test_streaming_on_a_terminal(model: str) -> None:
    code, screen = on_a_terminal(
        ["generate", model, "--prompt", "w5", "--gen-length", "4", "--stream"]
    )
    final = LLM(model).generate("w5", gen_length=4)[0].text
    assert code == 0
    frames = screen.split("\x1b[J")[1:]
    assert len(frames) == 5  # 4 steps and the result
    assert frames[0].count(bicache.MASK_TEXT) == 3
    assert frames[-1].strip() == final


def test_a_bar_on_a_terminal_only(model: str) -> None:
    argv = ["generate", model, "--prompt", "w5", "--gen-length", "4"]
    code, screen = on_a_terminal(argv)
    assert code == 0 and "4/4" in screen
    done = run(*argv, "--stream")
    final = LLM(model).generate("w5", gen_length=4)[0].text
    assert (done.returncode, done.stdout.decode(), done.stderr) == (0, final + "\n", b"")


# ---- info


def test_info(model: str, capsys: Any) -> None:
    assert cli.main(["info", model, "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["config"]["layers"] == 3 and facts["config"]["mask_token_id"] == MASK
    # 2 embeddings, 3 blocks of attention, FFN and norms, final norm.
    parameters = 2 * 64 * 32 + 3 * (4 * 32 * 32 + 3 * 48 * 32 + 2 * 32) + 32
    assert facts["parameters"] == parameters and facts["dtypes"] == ["f32"]
    assert facts["stored_bytes"] == 4 * parameters
    for dtype, size in facts["weight_bytes"].items():
        assert size == bicache.LLM(model, dtype=dtype, threads=1).weight_bytes
    assert facts["kv_bytes_per_token"] == {"f32": 3 * 2 * 32 * 4, "bf16": 3 * 2 * 32 * 2}
    assert facts["tokenizer_tokens"] == 64 and facts["calibration"] == {}
    assert facts["machine"]["isa"] in facts["machine"]["available_isas"]
    assert cli.main(["info", model]) == 0
    text = capsys.readouterr().out
    for part in (f"{parameters:,}", "3 layers", "per prefix token", facts["machine"]["isa"]):
        assert part in text


def test_info_without_tokenizer(tiny_checkpoint: TinyCheckpoint, capsys: Any) -> None:
    assert cli.main(["info", str(tiny_checkpoint(dtype="bf16"))]) == 0
    out = capsys.readouterr().out
    assert "token ids" in out and "of bf16" in out


# ---- the program


def test_version_and_help() -> None:
    done = run("--version")
    assert done.returncode == 0 and done.stdout.decode() == f"bicache {bicache.__version__}\n"
    for argv in (["--help"], ["demo", "--help"], ["generate", "--help"], ["info", "--help"]):
        assert run(*argv).returncode == 0


BAD: list[tuple[list[str], str]] = [
    ([], "COMMAND"),
    (["fly"], "fly"),
    (["generate"], "MODEL"),
    (["generate", "MODEL", "--prompt", "w5", "--fly"], "--fly"),
    (["generate", "MODEL", "--prompt", "w5", "--gen-len", "4"], "--gen-len"),
    (["generate", "MODEL", "--prompt", "w5", "--gen-length", "four"], "four"),
    (["generate", "MODEL", "--prompt", "w5", "--gen-length", "0"], "gen_length"),
    (["generate", "MODEL", "--prompt", "w5", "--temperature", "nan"], "temperature"),
    (["generate", "MODEL", "--prompt", "w5", "--remasking", "best"], "low_confidence"),
    (["generate", "MODEL", "--prompt", "w5", "--gen-length", "4", "--max-new-tokens", "4"], "both"),
    (["generate", "MODEL", "--prompt", "w5", "--cache", "lru"], "bicache"),
    (["generate", "MODEL", "--prompt", "w5", "--cache", "auto"], "calibration"),
    (["generate", "MODEL", "--prompt", "w5", "--threads", "0"], "threads"),
    (["generate", "MODEL", "--prompt", "w5", "--dtype", "int2"], "bf16"),
    (["generate", "MODEL", "--prompt", "w5", "--kv-dtype", "int8"], "kv_dtype: expected auto"),
    (["generate", "MODEL", "--prompt", "w5", "--stream", "--json"], "--stream"),
    (["generate", "MODEL", "--prompt", "w5", "--prompt-file", "x"], "not allowed"),
    (["generate", "MODEL", "--prompt-file", "no/such/file"], "no/such/file"),
    (["generate", "MODEL", "--prompt-file", "/"], "regular file"),
    (["generate", "MODEL", "--prompt", ""], "at least one token"),
    (["generate", "no-such-model", "--prompt", "w5"], "no-such-model"),
    (["generate", "GSAI-ML/LLaDA-8B-Instruct", "--prompt", "w5"], "download"),
    (["info", "no-such-model"], "no-such-model"),
    (["demo", "--model", "no-such-model"], "no-such-model"),
    (["demo", "--model", "MODEL"], "questions.jsonl"),
]


@pytest.mark.parametrize(("argv", "part"), BAD, ids=lambda value: " ".join(value)[:60])
def test_wrong_arguments(model: str, argv: list[str], part: str, capfd: Any) -> None:
    assert cli.main([model if a == "MODEL" else a for a in argv]) == 2
    out, err = capfd.readouterr()
    assert out == "" and part in err and "Traceback" not in err


def test_input_that_is_not_utf8(model: str, tmp_path: Path) -> None:
    done = run("generate", model, stdin=b"w5 \xff")
    assert done.returncode == 2 and b"UTF-8" in done.stderr
    raw = subprocess.run([*PROGRAM, "generate", model, "--prompt", b"w\xff"], capture_output=True)
    assert raw.returncode == 2 and b"surrogate" in raw.stderr and b"Traceback" not in raw.stderr


def test_no_prompt_on_a_terminal(model: str, capsys: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = io.TextIOWrapper(io.BytesIO())
    monkeypatch.setattr(terminal, "isatty", lambda: True, raising=False)
    monkeypatch.setattr(sys, "stdin", terminal)
    assert cli.main(["generate", model]) == 2
    assert "--prompt" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("error", "code", "text"),
    [
        (RuntimeError("[demo] x: it broke"), 1, "[demo] x: it broke"),
        (MemoryError(), 1, "MemoryError"),
        (OSError(28, "No space left on device"), 1, "No space left"),
        (KeyboardInterrupt(), 130, "interrupted"),
    ],
)
def test_failures(
    model: str,
    error: BaseException,
    code: int,
    text: str,
    capsys: Any,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def fail(*args: Any, **settings: Any) -> Any:
        raise error

    monkeypatch.setattr(cli, "inspect_checkpoint", fail)
    assert cli.main(["info", model]) == code
    out, err = capsys.readouterr()
    assert out == "" and text in err and "Traceback" not in err


def test_verbose_shows_the_log_and_where_an_error_comes_from(model: str) -> None:
    done = run("generate", model, "--verbose", "--prompt", "w5", "--gen-length", "4")
    assert done.returncode == 0 and b"bicache: loaded" in done.stderr
    done = run("generate", model, "--verbose", "--prompt", "w5", "--gen-length", "0")
    assert done.returncode == 2 and b"Traceback" in done.stderr


def start(argv: list[str], **pipes: Any) -> subprocess.Popen[bytes]:
    # SIGINT and SIGPIPE as a shell's foreground job has them, whatever runs these tests.
    def defaults() -> None:
        signal.signal(signal.SIGINT, signal.default_int_handler)

    return subprocess.Popen([*PROGRAM, *argv], preexec_fn=defaults, **pipes)


def test_a_reader_that_has_gone(model: str) -> None:
    read, write = os.pipe()
    os.close(read)
    process = start(
        ["generate", model, "--prompt", "w5", "--gen-length", "4", "--json"],
        stdout=write, stderr=subprocess.PIPE,
    )  # fmt: skip
    os.close(write)
    err = process.communicate(timeout=60)[1]
    assert process.returncode == 1 and err == b""


def test_ctrl_c(tiny_checkpoint: TinyCheckpoint) -> None:
    # Long enough never to end by itself.
    model = str(tiny_checkpoint(layers=3, tokenizer=True, context=1 << 16))
    process = start(
        ["generate", model, "--verbose", "--prompt", "w5", "--gen-length", "32768"],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip
    assert process.stderr is not None
    while b"loaded" not in (line := process.stderr.readline()):
        assert line, "the program ended before it had loaded the model"
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=120)
    assert process.returncode == 130 and out == b"" and b"Traceback" not in err


def test_closed_output_is_no_error() -> None:
    command = [sys.executable, "-m", "bicache"]
    prompt = ["generate", "records", "--prompt", "which of them are red ?", "--json"]
    done = subprocess.run(
        ["sh", "-c", '"$@" 2>&-', "sh", *command, *prompt], capture_output=True, text=True
    )
    assert done.returncode == 0 and json.loads(done.stdout)
    done = subprocess.run(
        ["sh", "-c", '"$@" >&-', "sh", *command, "info", "records"], capture_output=True, text=True
    )
    assert done.returncode == 0 and done.stderr == ""
