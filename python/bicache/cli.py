"""The command line: bicache demo | generate | info | profile.

Exit codes: 0 done, 1 failed, 2 wrong arguments or inputs, 130 interrupted.
"""

from __future__ import annotations

import argparse
import dataclasses
import io
import json
import logging
import os
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from . import _core
from .checkpoint import Sidecar, shipped_models
from .info import as_text, inspect_checkpoint
from .jsonfile import read_file
from .llm import LLM
from .options import Option, option_table
from .profiling import profile, read_pairs
from .profiling.agreement import needed_pairs
from .profiling.depth_plot import check_plot
from .profiling.depth_table import RATIO_KINDS, check_settings


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command; `argv` without the program's name. Returns the exit code."""
    for name in ("stdout", "stderr"):  # closed by the caller: nobody reads it
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, "w"))
    parser = _parser()
    try:
        args = parser.parse_args(argv)
    except SystemExit as end:  # --help, --version, wrong usage
        return end.code if isinstance(end.code, int) else 2
    # A model may predict what the terminal cannot show.
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")
    if args.verbose:
        logging.basicConfig(stream=sys.stderr, level=logging.DEBUG, format="%(name)s: %(message)s")
    try:
        args.run(args)
        sys.stdout.flush()
        return 0
    except BrokenPipeError:  # the reader has gone, e.g. `| head`; nothing more can be written
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except KeyboardInterrupt:
        print("bicache: interrupted", file=sys.stderr)
        return 130
    except Exception as error:
        if args.verbose:
            traceback.print_exc()
        kind = (
            ""
            if isinstance(error, (ValueError, OSError, TypeError, RuntimeError))
            else (f"{type(error).__name__}: ")
        )
        print(f"bicache: error: {kind}{error}", file=sys.stderr)
        return 2 if isinstance(error, _INPUT_ERRORS) else 1


_INPUT_ERRORS = (
    ValueError,
    TypeError,
    FileNotFoundError,
    NotADirectoryError,
    IsADirectoryError,
    PermissionError,
)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="bicache",
        description="Runs diffusion language models on CPUs and does not recompute what has not "
        "changed.",
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"bicache {_core.__version__}")
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    _add_demo(commands)
    _add_generate(commands)
    _add_info(commands)
    _add_profile(commands)
    return parser


def _command(commands: Any, name: str, text: str, run: Any) -> argparse.ArgumentParser:
    parser: argparse.ArgumentParser = commands.add_parser(
        name, help=text, description=text, allow_abbrev=False
    )
    parser.set_defaults(run=run)
    parser.add_argument("--json", action="store_true", help="print JSON instead of text")
    parser.add_argument(
        "--verbose", action="store_true", help="log to stderr, and show where an error comes from"
    )
    return parser


def _model_help() -> str:
    names = ", ".join(shipped_models()) or "none"
    return f"checkpoint folder, or a shipped model ({names})"


# ---- demo


def _add_demo(commands: Any) -> None:
    parser = _command(
        commands,
        "demo",
        "Answer questions about shared documents under different cache policies, and compare "
        "accuracy and work.",
        _demo,
    )
    parser.add_argument("--model", default="records", help=_model_help() + "; default: records")
    parser.add_argument("--documents", type=int, metavar="N", help="only the first N documents")
    parser.add_argument("--questions", type=int, metavar="N", help="only N questions in all")
    parser.add_argument("--threads", type=int, metavar="N", help="CPU threads; default: all")


def _demo(args: argparse.Namespace) -> None:
    from .demo import as_table, demo

    report = demo(
        args.model,
        documents=args.documents,
        questions=args.questions,
        threads=args.threads,
        progress=sys.stderr.isatty(),
    )
    print(json.dumps(report.as_dict()) if args.json else as_table(report))


# ---- generate


def _add_generate(commands: Any) -> None:
    parser = _command(
        commands, "generate", "Generate the response to one prompt or several.", _generate
    )
    parser.add_argument("model", metavar="MODEL", help=_model_help())
    prompt = parser.add_mutually_exclusive_group()
    prompt.add_argument(
        "--prompt", action="append", metavar="TEXT", help="may be given several times"
    )
    prompt.add_argument(
        "--prompt-file", type=Path, metavar="FILE", help="one prompt; default: standard input"
    )
    prefix = parser.add_mutually_exclusive_group()
    prefix.add_argument("--prefix", metavar="TEXT", help="shared by all prompts, before each")
    prefix.add_argument("--prefix-file", type=Path, metavar="FILE")
    prefix.add_argument(
        "--chat", action="store_true",
        help="each prompt is a user's message, written in the checkpoint's chat template",
    )  # fmt: skip
    parser.add_argument("--system", metavar="TEXT", help="with --chat: the system's message")
    parser.add_argument(
        "--cache",
        default="none",
        metavar="POLICY",
        help=f"one of {', '.join(row['name'] for row in _core.policy_table())}, with settings as "
        'in "bicache:depth=5,refresh_steps=16", or auto (calibrated for the model); default: none',
    )
    parser.add_argument("--stop", action="append", metavar="TEXT", help="end the text before TEXT")
    parser.add_argument("--threads", type=int, metavar="N", help="CPU threads; default: all")
    parser.add_argument("--dtype", default="auto", help="auto, f32 or bf16; default: auto")
    parser.add_argument("--backend", default="packed", help="packed or blas; default: packed")
    parser.add_argument(
        "--stream", action="store_true", help="on a terminal, show the response as it unmasks"
    )
    _add_options(parser)


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def _add_options(parser: argparse.ArgumentParser) -> None:
    options = parser.add_argument_group("options of the generation")
    for option in option_table().values():
        _add_option(options, option)


def _options(args: argparse.Namespace) -> dict[str, Any]:
    names = [name for o in option_table().values() for name in (o.name, *o.aliases)]
    return {name: getattr(args, name) for name in names}


def _add_option(group: Any, option: Option) -> None:
    """One flag per name, so that giving an option under two names is an error, as in Python."""
    for name in (option.name, *option.aliases):
        text = option.describe() if name == option.name else f"the same as {_flag(option.name)}"
        settings: dict[str, Any] = {"dest": name, "default": None, "help": text.replace("%", "%%")}
        if option.type is bool:
            settings["action"] = argparse.BooleanOptionalAction
        else:
            settings |= {"type": option.type, "metavar": "TEXT" if option.type is str else "N"}
        group.add_argument(_flag(name), **settings)


def _generate(args: argparse.Namespace) -> None:
    if args.stream and args.json:
        raise ValueError("[generate] --stream: expected without --json, got both")
    if args.system is not None and not args.chat:
        raise ValueError("[generate] --system: expected with --chat, got it alone")
    settings: dict[str, Any] = {
        "stop": args.stop,
        **_options(args),
    }
    prompts: list[Any] = list(_prompts(args))
    prefixes: list[Any] = [
        args.prefix if args.prefix_file is None else _read(args.prefix_file)
    ] * len(prompts)
    llm = LLM(
        args.model, dtype=args.dtype, threads=args.threads, cache=args.cache, backend=args.backend
    )
    if args.chat:
        system = [] if args.system is None else [{"role": "system", "content": args.system}]
        for i, prompt in enumerate(prompts):
            message = {"role": "user", "content": prompt}
            prefixes[i], prompts[i] = llm.split_chat([*system, message])
    if args.stream and sys.stdout.isatty():
        for prompt, prefix in zip(prompts, prefixes, strict=True):
            _stream(llm, prompt, {**settings, "prefix": prefix})
        return
    progress = sys.stderr.isatty()
    for output in llm.generate(prompts, prefix=prefixes, progress=progress, **settings):
        print(json.dumps(output.as_dict()) if args.json else output.text)


def _prompts(args: argparse.Namespace) -> list[str]:
    if args.prompt is not None:
        return list(args.prompt)
    if args.prompt_file is not None:
        return [_read(args.prompt_file)]
    if sys.stdin is None or sys.stdin.isatty():
        raise ValueError("[generate] prompt: expected --prompt, --prompt-file or text on stdin")
    return [_text(sys.stdin.buffer.read(), "standard input")]


def _read(path: Path) -> str:
    return _text(read_file(path, "generate] file"), str(path))


def _text(data: bytes, where: str) -> str:
    """UTF-8 text without the newline that ends a text file."""
    try:
        return data.decode("utf-8").removesuffix("\n")
    except UnicodeDecodeError as error:
        raise ValueError(f"[generate] {where}: expected UTF-8 text, got {error}") from None


def _stream(llm: LLM, prompt: Any, settings: dict[str, Any]) -> None:
    """Draws the response over itself at every step."""
    rows = 0
    events = llm.stream(prompt, **settings)
    while True:
        try:
            text = next(events).text
        except StopIteration as end:
            _draw(end.value.text, rows)
            return
        rows = _draw(text, rows)


def _draw(text: str, above: int) -> int:
    """Replaces the last `above` lines of the terminal by `text`; returns its number of lines."""
    width = os.get_terminal_size(sys.stdout.fileno()).columns or 80
    up = f"\x1b[{above}A" if above else ""
    sys.stdout.write(f"\r{up}\x1b[J{text}\n")
    sys.stdout.flush()
    return sum(max(1, -(-len(line) // width)) for line in text.split("\n"))


# ---- info


def _add_info(commands: Any) -> None:
    parser = _command(
        commands, "info", "Describe a checkpoint and this machine, without loading weights.", _info
    )
    parser.add_argument("model", metavar="MODEL", help=_model_help())


def _info(args: argparse.Namespace) -> None:
    facts = inspect_checkpoint(args.model)
    print(json.dumps(facts) if args.json else as_text(facts))


# ---- profile


def _add_profile(commands: Any) -> None:
    parser = _command(
        commands,
        "profile",
        "Measure on pairs of prefix and prompt how deep a prefix may be reused: by similarity of "
        "K and V, and by agreement of the answers.",
        _profile,
    )
    parser.add_argument("model", metavar="MODEL", help=_model_help())
    parser.add_argument(
        "--pairs", required=True, type=Path, metavar="FILE",
        help='JSON lines, each an object with "prefix" and "prompt", text or token ids',
    )  # fmt: skip
    parser.add_argument(
        "--tau", type=float, default=0.97, metavar="N",
        help="similarity that a reusable layer exceeds; default: 0.97",
    )  # fmt: skip
    parser.add_argument(
        "--ratio", default="prompt",
        help="sort similarities by "
        + ", or by ".join(f"{name}: {text}" for name, text in RATIO_KINDS.items())
        + "; default: prompt",
    )  # fmt: skip
    parser.add_argument(
        "--no-agreement", action="store_true", help="similarity only; generates nothing"
    )
    parser.add_argument(
        "--min-agreement", type=float, default=0.982, metavar="N",
        help="what the lower 95 %% bound of the agreement must reach; default: 0.982",
    )  # fmt: skip
    parser.add_argument(
        "--refresh-steps", type=int, default=16, metavar="N", help="of the agreement; default: 16"
    )
    parser.add_argument("--splice", default="official", help="of the agreement; default: official")
    parser.add_argument(
        "--out", type=Path, metavar="FILE",
        help="write the table as JSON; a run that was killed goes on from FILE.partial",
    )  # fmt: skip
    parser.add_argument("--plot", type=Path, metavar="FILE", help="draw it, e.g. into profile.png")
    parser.add_argument(
        "--save", action="store_true",
        help="write the agreement's depths into the model's bicache.json, for --cache auto",
    )  # fmt: skip
    parser.add_argument("--threads", type=int, metavar="N", help="CPU threads; default: all")
    _add_options(parser)


def _profile(args: argparse.Namespace) -> None:
    settings = {
        name: getattr(args, name)
        for name in ("tau", "ratio", "refresh_steps", "splice", "min_agreement")
    }
    check_settings("profile", **settings)
    pairs = read_pairs(args.pairs)
    _check_results(args, len(pairs))
    llm = LLM(args.model, threads=args.threads)
    if args.save and not os.access(llm.path, os.W_OK):
        raise PermissionError(f"[profile] --save: expected a writable folder, got {llm.path}")
    state = None if args.out is None else args.out.with_name(args.out.name + ".partial")
    table = profile(
        llm,
        pairs,
        **settings,
        agreement=not args.no_agreement,
        state=state,
        progress=sys.stderr.isatty(),
        **_options(args),
    )
    if args.out is not None:
        table.save(args.out)
    unsafe: ValueError | None = None
    if args.save:
        try:
            calibration = table.calibration()
            dataclasses.replace(Sidecar.read(llm.path), calibration=calibration).write(llm.path)
        except ValueError as error:  # no safe depth: the other results are there all the same
            unsafe = error
    if args.plot is not None:
        table.plot(args.plot)
    if state is not None:
        state.unlink(missing_ok=True)
    print(json.dumps(table.as_dict()) if args.json else table.summary())
    if unsafe is not None:
        raise unsafe


def _check_results(args: argparse.Namespace, pairs: int) -> None:
    """Refuses before the work what could not be written after it."""
    for flag, path in (("--out", args.out), ("--plot", args.plot)):
        if path is None:
            continue
        if (path.exists() and not path.is_file()) or not path.parent.is_dir():
            raise ValueError(
                f"[profile] {flag}: expected a file in an existing folder, got {str(path)!r}"
            )
        if path.exists() and path.samefile(args.pairs):
            raise ValueError(f"[profile] {flag}: expected another file than --pairs, got the same")
        if not os.access(path.parent, os.W_OK):
            raise PermissionError(
                f"[profile] {flag}: expected a writable folder, got {str(path.parent)!r}"
            )
    if args.plot is not None:
        check_plot(args.plot)
    if not args.save:
        return
    if args.no_agreement:
        raise ValueError("[profile] --save: expected with the agreement, got --no-agreement")
    needed = needed_pairs(args.min_agreement)
    if pairs < needed:
        raise ValueError(
            f"[profile] --save: expected at least {needed} pairs (for min_agreement "
            f"{args.min_agreement:g}), got {pairs}"
        )
