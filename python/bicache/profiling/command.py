"""The command `bicache profile`."""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import sys
from pathlib import Path

from ..checkpoint import Sidecar
from ..flags import add_options, given_options
from ..llm import LLM
from .agreement import needed_pairs
from .depth_plot import check_plot
from .depth_table import RATIO_KINDS, check_settings
from .pairs import read_pairs
from .profiler import profile


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """All but the model."""
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
    add_options(parser)


def run(args: argparse.Namespace) -> None:
    """Profiles, and writes what was asked for."""
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
        **given_options(args),
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
