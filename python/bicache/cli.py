"""The command line: bicache demo | generate | info | plan | profile.

Exit codes: 0 done, 1 failed, 2 wrong arguments or inputs, 130 interrupted.
"""

from __future__ import annotations

import argparse
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
from .checkpoint import shipped_models
from .flags import add_options, given_options
from .info import as_text, inspect_checkpoint
from .jsonfile import read_file
from .llm import LLM
from .planning import as_text as plan_text
from .planning import known_configs, plan
from .profiling import command as profile_command


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
    _add_plan(commands)
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


def _cache_help() -> str:
    names = ", ".join(row["name"] for row in _core.policy_table())
    return (
        f'one of {names}, with settings as in "bicache:depth=5,refresh_steps=16", or two joined by '
        "+: one for the shared prefix (naive, bicache) and one for the other rows"
    )


def _add_kv_dtype(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--kv-dtype", default="auto",
        help="how K and V are held: f32, bf16, or auto (f32 with f32 weights, otherwise bf16); "
        "default: auto",
    )  # fmt: skip


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
        help=f"{_cache_help()}, or auto (calibrated for the model); default: none",
    )
    parser.add_argument(
        "--response", metavar="TEXT",
        help="what stands in the response already, with U+2591 or the tokenizer's mask token for "
        "every token to fill in; its length is the default of --gen-length",
    )  # fmt: skip
    parser.add_argument("--stop", action="append", metavar="TEXT", help="end the text before TEXT")
    parser.add_argument("--threads", type=int, metavar="N", help="CPU threads; default: all")
    parser.add_argument(
        "--dtype", default="auto", help="auto, f32, bf16, int8 or int4; default: auto"
    )
    _add_kv_dtype(parser)
    parser.add_argument("--backend", default="packed", help="packed or blas; default: packed")
    parser.add_argument(
        "--stream", action="store_true", help="on a terminal, show the response as it unmasks"
    )
    add_options(parser)


def _generate(args: argparse.Namespace) -> None:
    if args.stream and args.json:
        raise ValueError("[generate] --stream: expected without --json, got both")
    if args.system is not None and not args.chat:
        raise ValueError("[generate] --system: expected with --chat, got it alone")
    settings: dict[str, Any] = {
        "response": args.response,
        "stop": args.stop,
        **given_options(args),
    }
    prompts: list[Any] = list(_prompts(args))
    prefixes: list[Any] = [
        args.prefix if args.prefix_file is None else _read(args.prefix_file)
    ] * len(prompts)
    llm = LLM(
        args.model, dtype=args.dtype, kv_dtype=args.kv_dtype, threads=args.threads,
        cache=args.cache, backend=args.backend,
    )  # fmt: skip
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


# ---- plan

_PLAN_OPTIONS = ("steps", "block_length", "remasking", "cfg_scale")


def _add_plan(commands: Any) -> None:
    parser = _command(
        commands,
        "plan",
        "Predict what one request costs under each cache policy (FLOPs, rows, bytes, memory), from "
        "the model's sizes alone: no weights are needed and nothing is run.",
        _plan,
    )
    parser.add_argument(
        "--model-config", required=True, metavar="MODEL",
        help=f"config.json, {_model_help()}, or a published model's sizes "
        f"({', '.join(known_configs())})",
    )  # fmt: skip
    parser.add_argument(
        "--cache", required=True, action="append", metavar="POLICY",
        help=f"{_cache_help()}; may be given several times",
    )  # fmt: skip
    parser.add_argument(
        "--prompt-len", required=True, type=int, metavar="N",
        help="tokens of the whole prompt, the shared prefix included",
    )  # fmt: skip
    parser.add_argument(
        "--prefix-len", type=int, default=0, metavar="N",
        help="tokens of the prompt that are shared with other requests; default: 0",
    )  # fmt: skip
    parser.add_argument(
        "--gen-len", required=True, type=int, metavar="N", help="tokens of the response"
    )
    parser.add_argument(
        "--tokens-per-step", type=float, metavar="N",
        help="decoding by confidence (threshold or factor), which is assumed to commit so many "
        "tokens per step; default: as steps say",
    )  # fmt: skip
    parser.add_argument(
        "--dtype",
        default="bf16",
        help="how weights are held: f32, bf16, int8 or int4; default: bf16",
    )
    _add_kv_dtype(parser)
    add_options(parser, _PLAN_OPTIONS)


def _plan(args: argparse.Namespace) -> None:
    costs = plan(
        args.model_config,
        args.cache,
        prompt_len=args.prompt_len,
        prefix_len=args.prefix_len,
        gen_len=args.gen_len,
        tokens_per_step=args.tokens_per_step,
        dtype=args.dtype,
        kv_dtype=args.kv_dtype,
        **given_options(args, _PLAN_OPTIONS),
    )
    print(json.dumps(costs.as_dict()) if args.json else plan_text(costs))


# ---- profile


def _add_profile(commands: Any) -> None:
    parser = _command(
        commands,
        "profile",
        "Measure on pairs of prefix and prompt how deep a prefix may be reused: by similarity of "
        "K and V, and by agreement of the answers.",
        profile_command.run,
    )
    parser.add_argument("model", metavar="MODEL", help=_model_help())
    profile_command.add_arguments(parser)
