"""profile(): what it measures and what it refuses."""

from __future__ import annotations

import hashlib
import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import bicache
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from bicache import LLM
from bicache.profiling.agreement import needed_pairs
from bicache.profiling.pairs import Request
from bicache.profiling.profiler import mean_cosine
from conftest import MASK, Pairs, TinyCheckpoint, random_pairs, refuses
from reference import Llada
from safetensors.numpy import load_file, save_file

# ---- similarity


class Published:
    """The published profiler, in its own order: per pair, per layer, K and V before RoPE."""

    def __init__(self, model: Llada, pairs: Pairs, masks: int) -> None:
        self.sums: dict[int, list[tuple[list[float], list[float], list[float]]]] = {}
        for prefix, prompt in pairs:
            p, full = len(prefix), torch.tensor([*prefix, *prompt, *[model.mask] * masks])
            ratio = round(100 * p / len(full))
            before, after = model.full(full[:p]), model.full(full)
            k, v, hidden = [], [], []
            for layer in range(model.layers):
                k.append(self.cosine(before[1][layer][0], after[1][layer][0][:, :p]))
                v.append(self.cosine(before[1][layer][1], after[1][layer][1][:, :p]))
                enters = (
                    (run[2][layer - 1] if layer else model.embed(full))[None, :p]
                    for run in (before, after)
                )
                hidden.append(self.cosine(*enters))
            self.sums.setdefault(ratio, []).append((k, v, hidden))

    @staticmethod
    def cosine(a: torch.Tensor, b: torch.Tensor) -> float:
        """[heads, tokens, D]: all heads of a token are one vector."""
        a, b = (x.transpose(0, 1).flatten(1) for x in (a, b))
        return F.cosine_similarity(a, b, dim=-1).mean().item()

    def means(self) -> dict[int, np.ndarray]:
        """ratio -> [3, L]: K, V, hidden."""
        return {ratio: np.mean(values, axis=0) for ratio, values in self.sums.items()}

    def table(self, tau: float) -> dict[int, int]:
        table: dict[int, int] = {}
        best = 0
        for ratio, (k, v, _) in sorted(self.means().items()):
            depth = 0
            for similarity in (k + v) / 2:
                if similarity <= tau:
                    break
                depth += 1
            if depth > best:
                best = table[ratio] = depth
        return table


@pytest.mark.parametrize("ratio", ["prompt", "request"])
@pytest.mark.parametrize("kind", [{}, {"kv_heads": 2}, {"qk_norm": True, "shift": True}])
def test_similarities_are_the_published_ones(
    tiny_checkpoint: TinyCheckpoint, ratio: str, kind: dict[str, Any]
) -> None:
    folder = tiny_checkpoint(layers=4, **kind)
    pairs = random_pairs([(6, 6), (9, 3), (20, 1), (12, 4), (3, 1), (30, 30), (9, 3)])
    table = bicache.profile(LLM(folder), pairs, ratio=ratio, agreement=False, gen_length=4)
    published = Published(Llada(folder), pairs, 4 if ratio == "request" else 0)
    means = published.means()
    assert np.flatnonzero(table.counts).tolist() == sorted(means)
    assert table.pairs == table.counts.sum() == len(pairs) and 0.97 == table.tau
    for r in range(101):
        rows = [a[r] for a in (table.similarity_k, table.similarity_v, table.similarity_hidden)]
        if r not in means:
            assert table.counts[r] == 0 and np.isnan(rows).all()
            continue
        assert table.counts[r] == len(published.sums[r])
        np.testing.assert_allclose(rows, means[r], rtol=0, atol=1e-5)
    assert min(values[:2].min() for values in means.values()) < 0.97  # there is something to see
    assert all((a[table.counts > 0, 0] == 1).all() for a in (table.similarity_k, table.similarity))
    assert (table.similarity_hidden[table.counts > 0, 0] == 1).all()
    for tau in (0.5, 0.8, 0.9):
        again = bicache.profile(
            LLM(folder), pairs, tau=tau, ratio=ratio, agreement=False, gen_length=4
        )
        assert again.table == published.table(tau)


def test_mean_cosine() -> None:
    rows = np.random.default_rng(0).normal(size=(999, 7)).astype(np.float32)
    rows[5] = 0
    assert mean_cosine(rows, rows.copy()) == 1  # not 1 - 1e-16, and zeros are equal too
    a = np.array([[3, 4], [1, 0], [0, 0], [1, 1]], np.float32)
    b = np.array([[4, 3], [-2, 0], [1, 0], [5, 5]], np.float32)
    assert mean_cosine(a, b) == pytest.approx((0.96 - 1 + 0 + 1) / 4, abs=1e-15)
    for wrong in (np.nan, np.inf):
        assert np.isnan(mean_cosine(np.full((1, 2), wrong, np.float32), a[:1]))


def test_nothing_after_the_prefix_changes_nothing(ids_llm: LLM) -> None:
    table = bicache.profile(ids_llm, random_pairs([(9, 0), (5, 0)]), agreement=False)
    assert np.flatnonzero(table.counts).tolist() == [100]
    for values in (table.similarity_k, table.similarity_v, table.similarity_hidden):
        assert (values[100] == 1).all()
    assert table.table == {100: ids_llm.config.layers} and table.lookup(99) == 0


def test_text_and_ids_are_the_same_pairs(text_llm: LLM) -> None:
    text = bicache.profile(text_llm, [("w5 w6 w7", "w8")], agreement=False)
    ids = bicache.profile(text_llm, [(np.array([1, 5, 6, 7]), (8,))], agreement=False)
    assert text.as_dict() == ids.as_dict()
    digest = hashlib.sha256(struct.pack("<2q5i", 4, 1, 1, 5, 6, 7, 8)).hexdigest()
    assert text.data_hash == digest and text.fingerprint == text_llm.fingerprint


@pytest.mark.parametrize("shift", [0, 1])
def test_the_request_ratio_is_what_the_engine_looks_up(
    tiny_checkpoint: TinyCheckpoint, shift: int
) -> None:
    llm = LLM(tiny_checkpoint(shift=bool(shift)), threads=1)
    for p, u, g in ((1, 3, 4), (1, 0, 7), (5, 3, 8), (9, 0, 1), (3, 1, 4), (199, 0, 1), (7, 29, 4)):
        (prefix, prompt) = random_pairs([(p, u)])[0]
        own = np.array(prompt, np.int32)
        ratio = Request(np.array(prefix, np.int32), own, g, shift).request_ratio
        if p + u - shift <= 0:
            assert ratio == 0
            continue
        for key in {ratio, min(ratio + 1, 100)}:
            cache = f"bicache:depth={key}:1"
            out = llm.generate([own], prefix=prefix, cache=cache, gen_length=g, steps=g)[0]
            assert out.stats.depth == (1 if key == ratio else 0)


def test_ratios_are_rounded_half_to_even(ids_llm: LLM) -> None:
    table = bicache.profile(ids_llm, random_pairs([(1, 7), (3, 5)]), agreement=False)  # 12.5, 37.5
    assert np.flatnonzero(table.counts).tolist() == [12, 38]


def test_mask_tokens_are_the_models(ids_llm: LLM) -> None:
    """ratio="request" puts g masks behind the prompt: the same as a prompt that ends in them."""
    prefix, prompt = random_pairs([(12, 8)])[0]
    request = bicache.profile(
        ids_llm, [(prefix, prompt)], ratio="request", agreement=False, gen_length=5
    )
    spelled = bicache.profile(ids_llm, [(prefix, [*prompt, *[MASK] * 5])], agreement=False)
    assert np.array_equal(request.similarity_k, spelled.similarity_k, equal_nan=True)


# ---- agreement


@pytest.mark.parametrize("splice", ["official", "strict"])
def test_agreement_counts_whole_equal_answers(tiny_checkpoint: TinyCheckpoint, splice: str) -> None:
    llm = LLM(tiny_checkpoint(layers=6, scale=0.3), threads=1)
    pairs = random_pairs([(12, 8)] * 6 + [(30, 2)] * 6)
    options = {"gen_length": 4, "steps": 2, "block_length": 4}
    table = bicache.profile(
        llm, pairs, min_agreement=0.2, refresh_steps=2, splice=splice, **options
    )
    assert needed_pairs(0.2) <= 6 and [b.ratios for b in table.agreement] == [(50,), (83,)]
    for b, group in zip(table.agreement, (pairs[:6], pairs[6:]), strict=True):
        none = [llm.generate([u], prefix=p, cache="none", **options)[0].tokens for p, u in group]
        for depth, agreed in enumerate(b.agreed):
            cache = f"bicache:depth={depth},refresh_steps=2,splice={splice}"
            same = [
                np.array_equal(llm.generate([u], prefix=p, cache=cache, **options)[0].tokens, x)
                for (p, u), x in zip(group, none, strict=True)
            ]
            assert agreed == sum(same)
    # Somewhere a cache did change answers; otherwise this compares nothing.
    counts = {n for b in table.agreement for n in b.agreed}
    assert len(counts) > 2 and max(counts) == 6


def test_too_few_pairs_generate_nothing(
    ids_llm: LLM, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(LLM, "generate", None)
    table = bicache.profile(ids_llm, random_pairs([(9, 3), (6, 6)]), gen_length=4)
    (found,) = table.agreement
    assert found.depth is None and found.note == "2 pairs, at least 210 needed"
    assert capfd.readouterr() == ("", "")  # and a library prints nothing


def test_stored_options_are_used_and_kept(
    tiny_checkpoint: TinyCheckpoint, copy_checkpoint: Callable[[Path], Path]
) -> None:
    folder = copy_checkpoint(tiny_checkpoint())
    stored = {"gen_length": 8, "steps": 2, "block_length": 4, "seed": 5}
    (folder / "bicache.json").write_text(json.dumps({"format": 1, "generation": stored}))
    llm, pairs = LLM(folder), random_pairs([(9, 3)])
    assert stored.items() <= bicache.profile(llm, pairs).options.items()
    own = bicache.profile(llm, pairs, max_new_tokens=12).options
    assert own["gen_length"] == 12 and own["seed"] == 5 and "steps" not in own


# ---- refusals


@pytest.mark.parametrize(
    ("changes", "error", "part"),
    [
        ({"tau": 1.0}, ValueError, "tau"),
        ({"tau": float("nan")}, ValueError, "tau"),
        ({"tau": "high"}, TypeError, "tau"),
        ({"ratio": "share"}, ValueError, "prompt or request"),
        ({"splice": "soft"}, ValueError, "official or strict"),
        ({"refresh_steps": 0}, ValueError, "refresh_steps"),
        ({"refresh_steps": 2.0}, TypeError, "refresh_steps"),
        ({"min_agreement": 0}, ValueError, "min_agreement"),
        ({"min_agreement": 1}, ValueError, "min_agreement"),
        ({"agreement": 1}, TypeError, "agreement"),
        ({"progress": "yes"}, TypeError, "progress"),
        ({"state": 3}, TypeError, "state"),
        ({"state": "no/such/folder/state"}, FileNotFoundError, "state"),
        ({"fly": 1}, TypeError, "fly"),
        ({"cache": "none"}, TypeError, "cache"),
        ({"gen_length": 0}, ValueError, "gen_length"),
        ({"gen_length": 9, "block_length": 4}, ValueError, "block_length"),
        ({"llm": "records"}, TypeError, "llm"),
        ({"pairs": []}, ValueError, "at least one"),
        ({"pairs": "ab"}, TypeError, "pairs"),
        ({"pairs": 3}, TypeError, "pairs"),
        ({"pairs": ["ab"]}, TypeError, "pair 0"),
        ({"pairs": [([5], [6]), ([5],)]}, TypeError, "pair 1"),
        ({"pairs": [([], [6])]}, ValueError, "pair 0 prefix"),
        ({"pairs": [(None, [6])]}, ValueError, "pair 0 prefix"),
        ({"pairs": [([5], [6]), ([64], [6])]}, ValueError, "pair 1 prefix"),
        ({"pairs": [([5], [-1])]}, ValueError, "pair 0 prompt"),
        ({"pairs": [([5], [1.5])]}, TypeError, "pair 0 prompt"),
        ({"pairs": [("w5", [6])]}, ValueError, "tokenizer.json"),
        ({"pairs": [([5] * 200, [6] * 49)]}, ValueError, "response included, got 257"),
        ({"pairs": [([5] * 200, [6] * 57)], "agreement": False}, ValueError, "got 257"),
    ],
)
def test_refused_arguments(
    ids_llm: LLM, changes: dict[str, Any], error: type[Exception], part: str
) -> None:
    good: dict[str, Any] = {"llm": ids_llm, "pairs": [([5, 6], [7])], "gen_length": 8}
    with refuses(error, part):
        bicache.profile(**(good | changes))


def test_activations_that_are_not_finite(
    tiny_checkpoint: TinyCheckpoint, copy_checkpoint: Callable[[Path], Path]
) -> None:
    folder = copy_checkpoint(tiny_checkpoint())
    weights = load_file(folder / "model.safetensors")
    weights["model.transformer.blocks.1.v_proj.weight"][:] = 3e38
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with refuses(ValueError, "pair 0", "layer 1"):
        bicache.profile(LLM(folder), random_pairs([(5, 5)]), agreement=False)


def test_read_pairs(tmp_path: Path) -> None:
    path = tmp_path / "pairs.jsonl"
    path.write_text(
        '{"prefix": "a\u2028b", "prompt": [1, 2], "answer": 3}\n{"prompt": "", "prefix": []}',
        encoding="utf-8",
    )
    assert bicache.read_pairs(path) == [("a\u2028b", [1, 2]), ([], "")]
    assert bicache.read_pairs(str(path)) == bicache.read_pairs(path)


@pytest.mark.parametrize(
    ("line", "part"),
    [
        (b"", "JSON"),
        (b"{", "JSON"),
        (b"\xff", "JSON"),
        (b"[1]", "object"),
        (b'{"prefix": "a"}', "prompt"),
        (b'{"prompt": "a"}', "prefix"),
        (b'{"prefix": "a", "prompt": null}', "prompt"),
        (b'{"prefix": [1, 2.5], "prompt": "a"}', "prefix"),
        (b'{"prefix": [true], "prompt": "a"}', "prefix"),
        (b'{"prefix": "a", "prefix": "b", "prompt": "a"}', "twice"),
    ],
)
def test_pairs_that_are_none(tmp_path: Path, line: bytes, part: str) -> None:
    path = tmp_path / "pairs.jsonl"
    path.write_bytes(b'{"prefix": "a", "prompt": "b"}\n' + line + b"\n")
    with refuses(ValueError, f"{path} line 2", part):
        bicache.read_pairs(path)


def test_no_pairs_to_read(tmp_path: Path) -> None:
    (tmp_path / "empty").write_bytes(b"")
    with refuses(ValueError, "at least one pair"):
        bicache.read_pairs(tmp_path / "empty")
    with refuses(FileNotFoundError, "no such file"):
        bicache.read_pairs(tmp_path / "none")
