"""A profile that was killed goes on where it was, and only its own."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import bicache
import pytest
from bicache import LLM
from conftest import Pairs, TinyCheckpoint, random_pairs, refuses

FEW: dict[str, Any] = {"gen_length": 8, "steps": 4, "block_length": 4, "refresh_steps": 2}


class Counter:
    """Counts what is computed by the LLM: forward passes, and requests generated."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.forwards, self.requests = 0, 0
        forward, generate = LLM.forward, LLM.generate

        def counted_forward(llm: LLM, *args: Any, **values: Any) -> Any:
            self.forwards += 1
            return forward(llm, *args, **values)

        def counted_generate(llm: LLM, prompts: list[Any], **values: Any) -> Any:
            self.requests += len(prompts)
            return generate(llm, prompts, **values)

        monkeypatch.setattr(LLM, "forward", counted_forward)
        monkeypatch.setattr(LLM, "generate", counted_generate)

    def take(self) -> tuple[int, int]:
        counts = self.forwards, self.requests
        self.forwards = self.requests = 0
        return counts


def few_pairs() -> Pairs:
    """Five prefixes of two prompts each, two ratios."""
    pairs = random_pairs([(12, 8)] * 3 + [(30, 2)] * 2)
    return [(prefix, [*prompt[:-1], last]) for prefix, prompt in pairs for last in (8, 9)]


def test_a_killed_run_goes_on(
    ids_llm: LLM, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = {**FEW, "min_agreement": 0.2, "state": tmp_path / "state"}
    counter = Counter(monkeypatch)
    whole = bicache.profile(ids_llm, few_pairs(), **settings)
    # Every prefix once by itself and two full inputs; "none" and every measured depth.
    generated = sum(b.pairs * (1 + len(b.agreed)) for b in whole.agreement)
    assert counter.take() == (15, generated) and generated > 20
    content = (tmp_path / "state").read_bytes()
    lines = content.splitlines(keepends=True)
    assert len(lines) == 1 + 10 + generated
    bicache.profile(ids_llm, few_pairs(), **settings)
    assert counter.take() == (0, 0)

    tears = ((0, 0), (0, 9), (1, 0), (1, 1), (4, 30), (11, 0), (12, 5), (25, 0), (len(lines), 7))
    for kept, tear in tears:
        torn = lines[kept % len(lines)][:tear]
        (tmp_path / "state").write_bytes(b"".join(lines[:kept]) + torn)
        again = bicache.profile(ids_llm, few_pairs(), **settings)
        assert json.dumps(again.as_dict()) == json.dumps(whole.as_dict()), kept
        done = max(0, min(kept - 1, 10))
        forwards = 10 - done + sum(1 for prefix in range(5) if done < 2 * prefix + 2)
        assert counter.take() == (forwards, generated - max(0, kept - 11))
        assert (tmp_path / "state").read_bytes() == content


def test_a_measurement_is_kept_as_soon_as_it_is_made(
    ids_llm: LLM, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    forward = LLM.forward
    seen: list[list[int | None]] = []

    def watched(llm: LLM, *args: Any, **values: Any) -> Any:
        lines = (tmp_path / "state").read_text().splitlines()
        seen.append([json.loads(line).get("pair") for line in lines])
        return forward(llm, *args, **values)

    monkeypatch.setattr(LLM, "forward", watched)
    pairs = few_pairs()[:3]  # alone, in full, in full; alone, in full
    bicache.profile(ids_llm, pairs, **FEW, state=tmp_path / "state")
    assert seen == [[None], [None], [None, 0], [None, 0, 1], [None, 0, 1]]


@pytest.mark.parametrize(
    ("member", "changes"),
    [
        ("tau", {"tau": 0.5}),
        ("ratio", {"ratio": "request"}),
        ("refresh_steps", {"refresh_steps": 3}),
        ("splice", {"splice": "strict"}),
        ("min_agreement", {"min_agreement": 0.5}),
        ("options", {"seed": 3}),
        ("data_hash", {"pairs": random_pairs([(12, 9)])}),
    ],
)
def test_the_state_of_another_run(
    ids_llm: LLM, tmp_path: Path, member: str, changes: dict[str, Any]
) -> None:
    settings: dict[str, Any] = {**FEW, "pairs": random_pairs([(12, 8)]), "state": tmp_path / "s"}
    bicache.profile(ids_llm, **settings)
    content = (tmp_path / "s").read_bytes()
    with refuses(ValueError, f"{tmp_path / 's'} {member}:"):
        bicache.profile(ids_llm, **(settings | changes))
    assert (tmp_path / "s").read_bytes() == content


def test_the_state_of_another_model(
    tiny_checkpoint: TinyCheckpoint, ids_llm: LLM, tmp_path: Path
) -> None:
    pairs = random_pairs([(12, 8)])
    bicache.profile(ids_llm, pairs, state=tmp_path / "s", agreement=False)
    with refuses(ValueError, "fingerprint"):
        bicache.profile(LLM(tiny_checkpoint(layers=3, seed=1)), pairs, state=tmp_path / "s")
    with refuses(ValueError, f"{tmp_path / 's'} kv_dtype:"):
        bicache.profile(LLM(ids_llm.path, kv_dtype="bf16"), pairs, state=tmp_path / "s")


@pytest.mark.parametrize(
    "line",
    [
        "{",
        "3",
        "{}",
        '{"pair": 1, "k": [1, 1, 1], "v": [1, 1, 1], "hidden": [1, 1, 1]}',
        '{"pair": 0, "k": [1, 1], "v": [1, 1, 1], "hidden": [1, 1, 1]}',
        '{"pair": 0, "k": [1, 1, 2], "v": [1, 1, 1], "hidden": [1, 1, 1]}',
        '{"pair": 0, "k": [1, 1, NaN], "v": [1, 1, 1], "hidden": [1, 1, 1]}',
        '{"pair": 0, "depth": 4, "tokens": "ab"}',
        '{"pair": 0, "depth": 1, "tokens": 5}',
    ],
)
def test_a_damaged_state(ids_llm: LLM, tmp_path: Path, line: str) -> None:
    pairs = random_pairs([(12, 8)])
    bicache.profile(ids_llm, pairs, state=tmp_path / "s", agreement=False)
    with open(tmp_path / "s", "a") as file:
        file.write(line + "\n")
    with refuses(ValueError, "line 3"):
        bicache.profile(ids_llm, pairs, state=tmp_path / "s", agreement=False)


@pytest.mark.parametrize("content", ["my notes", "my notes\n", '{"format": 1}\n', "[]\n"])
def test_another_file_is_not_overwritten(ids_llm: LLM, tmp_path: Path, content: str) -> None:
    (tmp_path / "s").write_text(content)
    with refuses(ValueError, str(tmp_path / "s")):
        bicache.profile(ids_llm, random_pairs([(12, 8)]), state=tmp_path / "s")
    assert (tmp_path / "s").read_text() == content
