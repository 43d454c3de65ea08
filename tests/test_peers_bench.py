"""bench/peers.py on a tiny model, with those peers that are installed, and its GGUF files."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from test_bench import load, run

TYPES = {
    "bicache": ("f32", "bf16", "int8", "int4"),
    "torch": ("f32", "bf16"),
    "llama": ("F32", "BF16", "Q8_0", "Q4_0", "Q4_K_M"),
}


@pytest.fixture(scope="module")
def report() -> dict[str, Any]:
    done = run("peers.py", "--small", "--rounds", "2")
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    return load("peers_bench", monkeypatch)


def test_every_engine_is_measured_or_skipped_with_a_reason(report: dict[str, Any]) -> None:
    wanted = {(engine, kind) for engine, kinds in TYPES.items() for kind in kinds}
    skipped = {(s["engine"], s["type"]): s["reason"] for s in report["skipped"]}
    assert all(skipped.values())
    for length in report["forward"]:
        measured = {(e["engine"], e["type"]) for e in length["engines"]}
        assert not measured & skipped.keys() and measured | skipped.keys() == wanted
        # torch is among the tests' requirements; what is said to be missing is.
        assert {("bicache", "f32"), ("bicache", "bf16"), ("torch", "f32")} <= measured
        for engine, kind in measured:
            checked = [c for c in report["checks"] if (c["engine"], c["type"]) == (engine, kind)]
            assert checked and all(c["error"] < 0.5 for c in checked)
    wide = [c["error"] for c in report["checks"] if c["type"] == "f32" and c["engine"] == "torch"]
    assert 0 < max(wide) < 1e-5


def test_ratios_are_those_of_the_times(report: dict[str, Any]) -> None:
    for length in report["forward"]:
        times = {f"{e['engine']} {e['type']}": e["time"]["seconds"] for e in length["engines"]}
        for row in length["engines"]:
            mine = row["time"]["seconds"]
            assert len(mine) == 2 and min(mine) > 0
            assert row["gflops"] * row["time"]["median"] * 1e9 == pytest.approx(length["flops"])
            for peer, over in row["speed_over"].items():
                ratios = [a / b for a, b in zip(times[peer], mine, strict=True)]
                assert over == pytest.approx(sum(ratios) / 2)
        best = next(e for e in length["engines"] if e["speed_over"][length["best_peer"]] == 1)
        peers = [e for e in length["engines"] if e["engine"] != "bicache"]
        assert best["time"]["median"] == min(e["time"]["median"] for e in peers)


def test_generation_shows_work_and_agreement_beside_speed(report: dict[str, Any]) -> None:
    request = report["generation"]
    ours = [row for row in request["rows"] if row["engine"] == "bicache"]
    peers = [row for row in request["rows"] if row["engine"] != "bicache"]
    none, dllm, fast, *free = (row for row in ours if row["type"] == "bf16")
    assert [row["threshold"] for row in (none, dllm, fast)] == [None] * 3
    assert none["agreement"] == none["rows_share"] == 1
    assert max(dllm["rows_share"], fast["rows_share"]) < 1
    for row in free:
        assert row["threshold"] == request["threshold"]
        assert row["steps"] < none["steps"] == request["steps"] == 16
    for row in peers:
        # Every row's logits at each step; ours: those of the block's masked rows.
        head = 2 * 64 * 128 * (16 * 40 - 2 * sum(range(1, 9)))
        assert row["flops"] - none["flops"] == head
        assert row["rows_share"] == 1 and row["agreement"] is None
    for row in ours + peers:
        assert row["tokens_per_second"] == pytest.approx(16 / row["time"]["median"])
    assert request["fastest_peer"] in {f"{row['engine']} {row['type']}" for row in peers}


def test_openblas_runs_with_and_without_the_variable(report: dict[str, Any]) -> None:
    found = [(row["backend"], row["openblas_coretype"]) for row in report["blas"]]
    assert found == [("packed", None), ("blas", "unset"), ("blas", "Haswell")]


def test_tables_and_picture(
    report: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tables = load("peers_table", monkeypatch)
    engines = len(report["forward"][0]["engines"])
    assert tables.peers_forward(report).count("\n| ") == engines + 1
    assert tables.peers_ratios(report).count("the best of all") == sum(
        e["engine"] == "bicache" for e in report["forward"][0]["engines"]
    )
    assert tables.peers_generation(report).count("threshold 0.") >= 2
    tables.draw(report, tmp_path / "peers.png")
    assert (tmp_path / "peers.png").read_bytes().startswith(b"\x89PNG")


def test_an_engine_with_other_logits_is_not_measured(bench: ModuleType, tmp_path: Path) -> None:
    made = bench.Bench(tmp_path, bench.Shape(2, 32, 2, 48, 64), 16, 1)
    spec = bench.Spec("torch", "f32", tmp_path)
    with made.running([*made.ours("f32"), spec], (16,)) as workers:
        assert [w.spec.engine for w in workers] == ["bicache", "torch"]
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"rope_theta": 5000.0}))
    with made.running([spec], (16,)) as workers:
        assert workers == []
    assert made.disagreed and "logits of 16 rows" in made.skipped[0]["reason"]


def test_distance(bench: ModuleType) -> None:
    ones = np.ones((2, 3), np.float32)
    assert bench.distance(ones, ones) == 0
    assert bench.distance(1.5 * ones, ones) == pytest.approx(0.5)
    assert bench.distance(ones[:1], ones) == bench.distance(ones * np.nan, ones) == np.inf


def test_an_engine_that_does_not_start_says_why(bench: ModuleType, tmp_path: Path) -> None:
    with pytest.raises(bench.EngineError, match="FileNotFoundError"):
        bench.Worker(bench.Spec("bicache", "f32", tmp_path / "nothing"), 1, 8)


@pytest.mark.parametrize("args", [("--rounds", "0"), ("--lengths", "8,0"), ("--lengths", "x")])
def test_refuses(args: tuple[str, str]) -> None:
    done = run("peers.py", "--small", *args)
    assert done.returncode == 1
    assert "[peers] rounds, lengths: expected" in done.stderr and "Traceback" not in done.stderr


# ---- GGUF ---------------------------------------------------------------------------------------


def test_interleaved_rows_turn_like_halves(monkeypatch: pytest.MonkeyPatch) -> None:
    interleaved = load("llada_gguf", monkeypatch).interleaved
    rng = np.random.default_rng(0)
    heads, size = 3, 8
    q, k = rng.standard_normal((2, heads * size))
    turns = np.exp(1j * rng.standard_normal((2, size // 2)))

    def halves(x: np.ndarray) -> np.ndarray:
        low, high = np.split(x.reshape(heads, size), 2, axis=1)
        return low + 1j * high

    def neighbours(x: np.ndarray) -> np.ndarray:
        return x.reshape(heads, size)[:, 0::2] + 1j * x.reshape(heads, size)[:, 1::2]

    def scores(a: np.ndarray, b: np.ndarray) -> np.ndarray:
        return (a * turns[0] * (b * turns[1]).conj()).real.sum(1)

    wanted = scores(halves(q), halves(k))
    found = scores(neighbours(interleaved(q, heads)), neighbours(interleaved(k, heads)))
    assert np.allclose(found, wanted)
    assert not np.allclose(scores(neighbours(q), neighbours(k)), wanted)


class Reader:
    """The little of GGUF that is needed here."""

    def __init__(self, data: bytes) -> None:
        self.data, self.at = data, 0
        assert data[:4] == b"GGUF"
        self.at = 4
        version, tensors, values = self.take("<IQQ")
        assert version == 3
        self.values = dict(self.value() for _ in range(values))
        self.tensors = {}
        for _ in range(tensors):
            name = self.text()
            [dims] = self.take("<I")
            self.tensors[name] = (self.take(f"<{dims}Q"), *self.take("<IQ"))
        self.begin = -(-self.at // 32) * 32

    def take(self, form: str) -> tuple[Any, ...]:
        found = struct.unpack_from(form, self.data, self.at)
        self.at += struct.calcsize(form)
        return found

    def text(self) -> str:
        [size] = self.take("<Q")
        self.at += size
        return self.data[self.at - size : self.at].decode()

    def value(self) -> tuple[str, Any]:
        key, [type_] = self.text(), self.take("<I")
        return key, self.text() if type_ == 8 else self.take({4: "<I", 6: "<f", 7: "<?"}[type_])[0]


@pytest.mark.parametrize("kind", ["F32", "BF16"])
def test_gguf_holds_the_checkpoint(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gguf, models = load("llada_gguf", monkeypatch), load("random_model", monkeypatch)
    shape = models.Shape(layers=2, dim=24, heads=2, ffn=20, vocab=37)
    models.write_checkpoint(tmp_path, shape, 16)
    gguf.write_gguf(tmp_path, tmp_path / "model.gguf", kind)
    data = (tmp_path / "model.gguf").read_bytes()
    reader, source = Reader(data), gguf.Bfloat16File(tmp_path / "model.safetensors")
    assert reader.values["general.architecture"] == "llada"
    assert reader.values["llada.attention.causal"] is False
    assert reader.values["llada.rope.freq_base"] == 10000
    assert reader.values["llada.vocab_size"] == 37
    assert len(reader.tensors) == len(source.header) == 3 + 2 * 9
    last = 0
    for name in source.header:
        dims, type_, offset = reader.tensors[gguf.gguf_name(name)]
        bits = source.bits(name)
        assert dims == bits.shape[::-1] and offset % 32 == 0
        wanted = gguf.widened(bits)
        if "q_proj" in name or "k_proj" in name:
            wanted = wanted.reshape(2, 2, 6, 24).transpose(0, 2, 1, 3).reshape(24, 24)
        assert type_ == (30 if kind == "BF16" and len(dims) == 2 else 0)
        stored = np.frombuffer(
            data, "<u2" if type_ == 30 else "<f4", wanted.size, reader.begin + offset
        )
        values = gguf.widened(stored) if type_ == 30 else stored
        assert np.array_equal(values, wanted.ravel())
        last = max(last, reader.begin + offset + stored.nbytes)
    assert last == len(data)


def test_gguf_is_read_by_its_own_reader(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    reader = pytest.importorskip("gguf")
    gguf, models = load("llada_gguf", monkeypatch), load("random_model", monkeypatch)
    models.write_checkpoint(tmp_path, models.SMALL, 16)
    gguf.write_gguf(tmp_path, tmp_path / "model.gguf", "F32")
    found = {t.name: t.data for t in reader.GGUFReader(tmp_path / "model.gguf").tensors}
    source = gguf.Bfloat16File(tmp_path / "model.safetensors")
    assert len(found) == len(source.header)
    wanted = gguf.widened(source.bits("model.transformer.blocks.1.ff_proj.weight"))
    assert np.array_equal(found["blk.1.ffn_gate.weight"], wanted)
