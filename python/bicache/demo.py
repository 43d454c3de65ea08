"""The demo: questions about shared documents, answered under different cache policies.

Everything it reports is measured while it runs.
"""

from __future__ import annotations

import json
import re
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from . import _core
from .llm import LLM
from .results import Output

ROUNDS = 3
PAST_SAFE = 2  # layers past the safe depth, to show what happens there


@dataclass(frozen=True)
class Question:
    """One line of questions.jsonl."""

    prompt: str
    answer: str


@dataclass(frozen=True)
class Document:
    """A shared prefix and the questions about it."""

    prefix: str
    questions: tuple[Question, ...]


@dataclass(frozen=True)
class PolicyReport:
    """One row of the table.

    Attributes:
        policy: The cache string.
        exact_match: Share of answers that are right in every word.
        rows: Rows computed in all layers and requests, prefix entries included.
        rows_share: The same, as a share of the first policy's.
        tokens_per_second: Response tokens per second of this machine (median round).
        speed: Tokens per second relative to the first policy (median of the rounds' ratios).
        prefix_hits: Requests that found their prefix in the store.
        answers_first: Share of answers that answer the document's first question instead of their
            own, over questions whose right answer is another one; None: there are none.
        seconds: Wall time of each round.
    """

    policy: str
    exact_match: float
    rows: int
    rows_share: float
    tokens_per_second: float
    speed: float
    prefix_hits: int
    answers_first: float | None
    seconds: tuple[float, ...]


@dataclass(frozen=True)
class Example:
    """One question whose right answer is not that of its document's first question."""

    prompt: str
    answer: str
    first_prompt: str
    first_answer: str
    texts: dict[str, str]  # by policy


@dataclass(frozen=True)
class DemoReport:
    """All that the demo measured."""

    model: str
    layers: int
    parameters: int
    dtype: str
    threads: int
    isa: str
    documents: int
    questions: int
    rounds: int
    policies: tuple[PolicyReport, ...]
    example: Example | None

    def as_dict(self) -> dict[str, Any]:
        """Plain Python values, ready for JSON."""
        return asdict(self) | {"of_this_machine": ["seconds", "tokens_per_second", "speed"]}


def read_questions(path: Path) -> list[Document]:
    """The documents of a questions.jsonl; consecutive lines with one prefix are one document.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: A line is wrong; names it.
    """
    if not path.is_file():
        raise FileNotFoundError(
            f"[demo] {path}: expected the model's held-out questions (one JSON object per line: "
            "prefix, prompt, answer), got no such file"
        )
    documents: list[tuple[str, list[Question]]] = []
    try:
        lines = path.read_bytes().decode("utf-8").splitlines()
    except UnicodeDecodeError as error:
        raise ValueError(f"[demo] {path}: expected UTF-8, got {error}") from None
    for number, line in enumerate(lines, start=1):
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"[demo] {path} line {number}: expected JSON, got {error}") from None
        fields = ("prefix", "prompt", "answer")
        if not isinstance(row, dict) or not all(isinstance(row.get(k), str) for k in fields):
            raise ValueError(
                f"[demo] {path} line {number}: expected strings {', '.join(fields)}, got {line!r}"
            )
        if not documents or documents[-1][0] != row["prefix"]:
            documents.append((row["prefix"], []))
        documents[-1][1].append(Question(row["prompt"], row["answer"]))
    if not documents:
        raise ValueError(f"[demo] {path}: expected at least one question, got none")
    return [Document(prefix, tuple(questions)) for prefix, questions in documents]


def pick(documents: Sequence[Document], count: int | None, questions: int | None) -> list[Document]:
    """The first `count` documents, with `questions` questions in all, spread evenly."""
    chosen = list(documents[:count])
    total = sum(len(d.questions) for d in chosen)
    for what, asked, there in (
        ("documents", count, len(documents)),
        ("questions", questions, total),
    ):
        if asked is not None and not 1 <= asked <= there:
            raise ValueError(f"[demo] {what}: expected 1..{there}, got {asked}")
    if questions is None:
        return chosen
    # One more question for each document in turn, until there are enough.
    taken = [0] * len(chosen)
    while sum(taken) < questions:
        for i, document in enumerate(chosen):
            if taken[i] < len(document.questions) and sum(taken) < questions:
                taken[i] += 1
    return [Document(d.prefix, d.questions[:n]) for d, n in zip(chosen, taken, strict=True) if n]


def demo_policies(safe: str, layers: int) -> list[str]:
    """The policies compared, given the calibrated one (a bicache string) and the model's layers."""
    safe = _core.canonical_policy(safe)
    found = re.match(r"bicache:depth=(?:agreement:)?([0-9:/]+),", safe)
    if found is None:
        raise ValueError(
            "[demo] calibration cache: expected a bicache policy with a number or table as depth "
            f"(bicache.json beside the model), got {safe!r}"
        )
    deepest = max(int(pair.rpartition(":")[2]) for pair in found[1].split("/"))
    past = f"bicache:depth={min(layers, deepest + PAST_SAFE)},{safe[found.end() :]}"
    return ["none", "naive:source=alone", "naive:source=first_request", safe, past]


@dataclass
class _Tally:
    """What one policy did, over the rounds."""

    seconds: list[float] = field(default_factory=list)
    tokens: list[NDArray[np.int32]] = field(default_factory=list)  # of the first round
    texts: list[str] = field(default_factory=list)
    rows: int = 0
    hits: int = 0


def _play(
    llm: LLM,
    documents: Sequence[Document],
    policy: str,
    tally: _Tally,
    tick: Callable[[int], object],
) -> None:
    """One round of one policy: every document's questions as one batch, the store empty before."""
    llm.clear_prefixes()
    outputs: list[Output] = []
    seconds = 0.0
    for document in documents:
        begin = time.perf_counter()
        outputs += llm.generate(
            [q.prompt for q in document.questions], prefix=document.prefix, cache=policy
        )
        seconds += time.perf_counter() - begin
        tick(len(document.questions))
    if not tally.seconds:
        tally.tokens = [o.tokens for o in outputs]
        tally.texts = [o.text for o in outputs]
        tally.rows = sum(o.stats.rows for o in outputs)
        tally.hits = sum(bool(o.stats.prefix_hit) for o in outputs)
    elif not all(np.array_equal(a, o.tokens) for a, o in zip(tally.tokens, outputs, strict=True)):
        raise RuntimeError(
            f"[demo] {policy}: expected the tokens of the first round again, got others"
        )
    tally.seconds.append(seconds)


def _others(documents: Sequence[Document]) -> list[tuple[int, Question, Question]]:
    """(index, question, its document's first question) where the right answers differ."""
    flat = [(q, d.questions[0]) for d in documents for q in d.questions]
    return [(i, q, first) for i, (q, first) in enumerate(flat) if not _same(q.answer, first.answer)]


def _same(a: str, b: str) -> bool:
    return a.split() == b.split()


def _row(policy: str, tally: _Tally, base: _Tally, documents: Sequence[Document]) -> PolicyReport:
    answers = [q.answer for d in documents for q in d.questions]
    others = _others(documents)
    right = sum(map(_same, tally.texts, answers))
    first = sum(_same(tally.texts[i], other.answer) for i, _, other in others)
    total = sum(len(t) for t in tally.tokens)
    return PolicyReport(
        policy=policy,
        exact_match=right / len(answers),
        rows=tally.rows,
        rows_share=tally.rows / base.rows,
        tokens_per_second=total / statistics.median(tally.seconds),
        speed=statistics.median(b / s for b, s in zip(base.seconds, tally.seconds, strict=True)),
        prefix_hits=tally.hits,
        answers_first=first / len(others) if others else None,
        seconds=tuple(tally.seconds),
    )


def run_demo(
    llm: LLM,
    documents: Sequence[Document],
    *,
    policies: Sequence[str] | None = None,
    rounds: int = ROUNDS,
    tick: Callable[[int], object] = lambda requests: None,
) -> DemoReport:
    """Answers all questions under every policy, `rounds` times, the policies taking turns.

    Args:
        llm: A model with a calibration (bicache.json).
        documents: The questions, by shared prefix.
        policies: Canonical cache strings, the first one "none"; None: the demo's.
        rounds: Rounds for the timing; they must all give the same tokens.
        tick: Called with the number of requests done since the last call.

    Raises:
        ValueError: The model has no calibration.
        RuntimeError: A later round gave other tokens.
    """
    if policies is None:
        policies = demo_policies(llm.cache_string("auto"), llm.config.layers)
    # At the last layers two policies may be one.
    tallies = {policy: _Tally() for policy in policies}
    for _ in range(rounds):
        for policy, tally in tallies.items():
            _play(llm, documents, policy, tally, tick)
    base = tallies["none"]
    others = _others(documents)
    example = None
    if others:
        i, question, first = others[0]
        texts = {policy: tally.texts[i] for policy, tally in tallies.items()}
        example = Example(question.prompt, question.answer, first.prompt, first.answer, texts)
    return DemoReport(
        model=llm.path.name,
        layers=llm.config.layers,
        parameters=int(_core.checkpoint_info(str(llm.path))["parameters"]),
        dtype=llm.dtype,
        threads=llm.threads,
        isa=_core.isa(),
        documents=len(documents),
        questions=sum(len(d.questions) for d in documents),
        rounds=rounds,
        policies=tuple(_row(policy, tally, base, documents) for policy, tally in tallies.items()),
        example=example,
    )


_COLUMNS = (
    "policy", "exact match", "rows computed", "of none", "speed", "prefix hits", "answers 1st",
)  # fmt: skip
_LEGEND = """\
policy         which rows are computed at which step and layer; "none": all of them, always
exact match    answers that are right in every word
rows computed  token rows through a layer, summed over layers, steps and requests
of none        the same, as a share of what "none" computes
speed          tokens per second relative to "none", median of {rounds} rounds
prefix hits    requests that found their document in the prefix store, of {questions}
answers 1st    answers to the document's first question, given to a question with another answer"""
_WHAT_TO_SEE = """\
What to see: "naive" reuses the document in every layer, as prefix caching does for ordinary
language models: the fewest rows, but look at its answers, and at whose question they answer.
"bicache" reuses it in the shallow layers only: compare its answers and its rows with those of
"none"; its second line reuses {past} layers more than the model's calibration says is safe.
Speed is of this machine ({threads} threads, {isa} kernels, "none": {tokens:.0f} tokens/s); the
other columns are counts, and depend on neither its speed nor its load."""


def short_name(policy: str) -> str:
    """`policy` without settings at their default, except the first, which names the variant."""
    name, _, settings = policy.partition(":")
    fields: list[dict[str, Any]] = next(
        (row["fields"] for row in _core.policy_table() if row["name"] == name), []
    )
    defaults = {f"{field['name']}={field['default']}" for field in fields}
    first, *others = settings.split(",")
    shown = ",".join([first, *(setting for setting in others if setting not in defaults)])
    return f"{name}:{shown}" if shown else name


def as_table(report: DemoReport) -> str:
    """The report for a reader."""
    rows = [list(_COLUMNS)]
    for p in report.policies:
        first = "-" if p.answers_first is None else f"{100 * p.answers_first:.1f} %"
        rows.append(
            [
                short_name(p.policy),
                f"{100 * p.exact_match:.1f} %",
                f"{p.rows:,}",
                f"{100 * p.rows_share:.1f} %",
                f"{p.speed:.2f}x",
                str(p.prefix_hits),
                first,
            ]
        )
    widths = [max(len(row[i]) for row in rows) for i in range(len(_COLUMNS))]
    lines = []
    for row in rows:
        cells = [row[0].ljust(widths[0])]
        cells += [cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True)]
        lines.append("  ".join(cells))
    lines.insert(1, "-" * len(lines[0]))
    legend = _LEGEND.format(rounds=report.rounds, questions=report.questions)
    see = _WHAT_TO_SEE.format(
        past=PAST_SAFE,
        threads=report.threads,
        isa=report.isa,
        tokens=report.policies[0].tokens_per_second,
    )
    head = (
        f"{report.model}: {report.layers} layers, {report.parameters / 1e6:.2f} M parameters, "
        f"{report.dtype}; {report.questions} held-out questions about {report.documents} documents"
    )
    return "\n\n".join([head, "\n".join(lines), legend, see, *_example(report)])


def _example(report: DemoReport) -> list[str]:
    e = report.example
    if e is None:
        return []
    texts = {short_name(policy): text for policy, text in e.texts.items()}
    width = max(map(len, texts))
    lines = [
        f"An example. The first question about this document was: {e.first_prompt}",
        f"(right: {e.first_answer or 'nothing'}). A later one: {e.prompt}",
        f"{'right answer':<{width}}  {e.answer or '(nothing)'}",
        *(f"{policy:<{width}}  {text or '(nothing)'}" for policy, text in texts.items()),
    ]
    return ["\n".join(lines)]


def demo(
    model: str,
    *,
    documents: int | None = None,
    questions: int | None = None,
    threads: int | None = None,
    progress: bool = False,
) -> DemoReport:
    """Loads `model` and runs the demo on the questions beside it; a progress bar on stderr."""
    llm = LLM(model, threads=threads)
    chosen = pick(read_questions(llm.path / "questions.jsonl"), documents, questions)
    if not progress:
        return run_demo(llm, chosen)
    from tqdm import tqdm

    policies = len(set(demo_policies(llm.cache_string("auto"), llm.config.layers)))
    total = ROUNDS * policies * sum(len(d.questions) for d in chosen)
    with tqdm(
        total=total, desc="demo", unit="request", file=sys.stderr, dynamic_ncols=True, leave=False
    ) as bar:
        return run_demo(llm, chosen, tick=bar.update)
