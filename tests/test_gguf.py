"""GGUF files: the same model as the folder they were made from."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import gguf
import ml_dtypes
import numpy as np
import pytest
from bicache import LLM, _core, cli
from conftest import EOS, MASK, TinyCheckpoint, refuses
from gguf import GGMLQuantizationType as Type
from gguf_files import random_blocks, with_weights, write_gguf

EMBEDDING = "model.transformer.wte.weight"
SMALL = (Type.Q4_0, Type.Q4_1, Type.Q5_0, Type.Q5_1, Type.Q8_0)
LARGE = (Type.Q4_K, Type.Q5_K, Type.Q6_K)


def canvas(count: int = 24, vocab: int = 64) -> list[int]:
    ids = np.random.default_rng(0).integers(4, vocab, count)
    ids[count // 2 :] = MASK
    return ids.tolist()


def bits(values: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(values, np.float32).view(np.uint32)


# ---- values


@pytest.mark.parametrize("kind", [*SMALL, *LARGE], ids=lambda kind: kind.name)
def test_blocks_mean_what_they_mean_to_llama_cpp(
    tiny_checkpoint: TinyCheckpoint, tmp_path: Path, kind: Type
) -> None:
    block = gguf.GGML_QUANT_SIZES[kind][0]
    blocks = random_blocks(np.random.default_rng(kind), kind, 7, 3)
    path = _one_tensor(tiny_checkpoint(), tmp_path / "m.gguf", blocks, kind)
    expected = gguf.quants.dequantize(blocks, kind)
    got = _core.gguf_tensor(str(path), EMBEDDING)
    assert got.shape == (7, 3 * block) and len(np.unique(got)) > 100
    np.testing.assert_array_equal(bits(got), bits(expected))


@pytest.mark.parametrize(
    ("kind", "dtype"),
    [(Type.F32, np.float32), (Type.F16, np.float16), (Type.BF16, ml_dtypes.bfloat16)],
)
def test_plain_numbers(
    tiny_checkpoint: TinyCheckpoint, tmp_path: Path, kind: Type, dtype: Any
) -> None:
    values = np.random.default_rng(0).standard_cauchy((5, 6)).astype(dtype)
    path = _one_tensor(tiny_checkpoint(), tmp_path / "m.gguf", values.view(np.uint8), kind)
    np.testing.assert_array_equal(
        bits(_core.gguf_tensor(str(path), EMBEDDING)), bits(values.astype(np.float32))
    )


def _one_tensor(folder: Path, path: Path, data: np.ndarray, kind: Type) -> Path:
    """A model with nothing but an embedding."""
    writer = gguf.GGUFWriter(path, "llada")
    writer.add_block_count(1)
    writer.add_context_length(8)
    writer.add_embedding_length(32)
    writer.add_feed_forward_length(32)
    writer.add_head_count(2)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_mask_token_id(1)
    writer.add_tensor("token_embd.weight", data, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


# ---- the model


@pytest.mark.parametrize("kv_heads", [4, 2])
@pytest.mark.parametrize(
    ("stored", "kind"), [("f32", Type.F32), ("bf16", Type.BF16)], ids=["f32", "bf16"]
)
def test_plain_weights_give_the_bits_of_the_folder(
    tiny_checkpoint: TinyCheckpoint, tmp_path: Path, stored: str, kind: Type, kv_heads: int
) -> None:
    folder = tiny_checkpoint(dtype=stored, kv_heads=kv_heads, shift=kv_heads == 2)
    path = tmp_path / "m.gguf"
    write_gguf(folder, path, kind)
    for dtype in ("auto", "f32", "bf16", "int8", "int4"):
        file, model = (LLM(p, dtype=dtype, threads=1) for p in (path, folder))
        assert file.dtype == model.dtype == (stored if dtype == "auto" else dtype)
        np.testing.assert_array_equal(file.forward(canvas()), model.forward(canvas()))
    assert file.config.kv_heads == kv_heads and file.config.shift == (kv_heads == 2)
    assert file.config.mask_token_id == MASK and file.config.eos_token_id == EOS
    tokens = [llm.generate([canvas(8)[:4]], gen_length=8)[0].tokens for llm in (file, model)]
    np.testing.assert_array_equal(*tokens)


@pytest.mark.parametrize("kind", [Type.F16, *SMALL, *LARGE], ids=lambda kind: kind.name)
def test_other_weights_give_the_bits_of_their_values(
    tiny_checkpoint: TinyCheckpoint, tmp_path: Path, kind: Type
) -> None:
    dim = 256 if kind in LARGE else 32
    folder = tiny_checkpoint(layers=1, dim=dim, ffn=2 * dim)
    path = tmp_path / "m.gguf"
    weights = write_gguf(folder, path, kind)
    values = with_weights(folder, weights, tmp_path / "values")
    for dtype in ("f32", "bf16", "int8", "int4"):
        file, model = (LLM(p, dtype=dtype, threads=1) for p in (path, values))
        logits = file.forward(canvas())
        assert np.isfinite(logits).all() and np.ptp(logits) > 0
        np.testing.assert_array_equal(logits, model.forward(canvas()))
    blas = [LLM(p, backend="blas", threads=1).forward(canvas()) for p in (path, values)]
    np.testing.assert_array_equal(*blas)


@pytest.mark.parametrize("family", ["dream", "llada-moe"])
def test_other_families(tiny_checkpoint: TinyCheckpoint, tmp_path: Path, family: str) -> None:
    folder = tiny_checkpoint(family=family, kv_heads=2, ffn=32, dtype="bf16")
    path = tmp_path / "plain.gguf"
    write_gguf(folder, path, Type.BF16)
    for dtype in ("auto", "int8"):
        file, model = (LLM(p, dtype=dtype, threads=1) for p in (path, folder))
        assert file.dtype == model.dtype and file.config.family == family
        np.testing.assert_array_equal(file.forward(canvas()), model.forward(canvas()))
    path = tmp_path / "blocks.gguf"
    values = with_weights(folder, write_gguf(folder, path, Type.Q8_0), tmp_path / "values")
    file, model = (LLM(p, dtype="f32", threads=1) for p in (path, values))
    np.testing.assert_array_equal(file.forward(canvas()), model.forward(canvas()))
    assert LLM(path, threads=1).dtype == "int8"


def test_a_file_of_several_types(tiny_checkpoint: TinyCheckpoint, tmp_path: Path) -> None:
    folder = tiny_checkpoint(layers=2, dim=256, ffn=256)
    kinds = {"ffn_down": Type.Q6_K, "output": Type.Q8_0, "attn_v": Type.F16, "attn_q": Type.F32}
    path = tmp_path / "m.gguf"
    weights = write_gguf(
        folder,
        path,
        lambda name: kinds.get(name.split(".")[-2], Type.Q4_K),
    )
    values = with_weights(folder, weights, tmp_path / "values")
    file, model = (LLM(p, dtype="f32", threads=1) for p in (path, values))
    np.testing.assert_array_equal(file.forward(canvas()), model.forward(canvas()))


@pytest.mark.parametrize(
    ("kind", "dtype"),
    [(Type.F32, "f32"), (Type.F16, "bf16"), (Type.BF16, "bf16"), (Type.Q8_0, "int8"),
     (Type.Q4_0, "int8")],
)  # fmt: skip
def test_what_a_file_is_held_in(
    tiny_checkpoint: TinyCheckpoint, tmp_path: Path, kind: Type, dtype: str
) -> None:
    write_gguf(tiny_checkpoint(layers=1, ffn=64), tmp_path / "m.gguf", kind)
    assert LLM(tmp_path / "m.gguf", threads=1).dtype == dtype


def test_another_file_is_another_model(tiny_checkpoint: TinyCheckpoint, tmp_path: Path) -> None:
    prints = set()
    for i, (seed, kind) in enumerate([(0, Type.F32), (1, Type.F32), (0, Type.Q8_0)]):
        path = tmp_path / f"{i}.gguf"
        write_gguf(tiny_checkpoint(layers=1, ffn=64, seed=seed), path, kind)
        prints.add(LLM(path, threads=1).fingerprint)
    assert len(prints) == 3


def test_a_model_in_several_files(tiny_checkpoint: TinyCheckpoint, tmp_path: Path) -> None:
    folder = tiny_checkpoint()
    write_gguf(folder, tmp_path / "m.gguf", split_max_tensors=8)
    files = sorted(tmp_path.glob("*.gguf"))
    assert len(files) == 3
    expected = LLM(folder, threads=1).forward(canvas())
    for path in (files[0], tmp_path):
        np.testing.assert_array_equal(LLM(path, threads=1).forward(canvas()), expected)
    with refuses(ValueError, "general.architecture"):
        LLM(files[1])
    files[2].unlink()
    with pytest.raises(FileNotFoundError, match="00003-of-00003"):
        LLM(files[0])


# ---- where it is


def test_a_folder_with_one_file(tiny_checkpoint: TinyCheckpoint, tmp_path: Path) -> None:
    write_gguf(tiny_checkpoint(layers=1), tmp_path / "a.gguf")
    llm = LLM(tmp_path, threads=1)
    assert llm.path == tmp_path / "a.gguf" and "a.gguf" in repr(llm)
    (tmp_path / "b.gguf").write_bytes(b"")
    with refuses(ValueError, "one GGUF model", "a.gguf, b.gguf"):
        LLM(tmp_path)


def test_files_that_are_no_models(tmp_path: Path) -> None:
    (tmp_path / "m.gguf").write_bytes(b"\x80\x02.")
    with refuses(ValueError, "[gguf]", "m.gguf", "magic"):
        LLM(tmp_path / "m.gguf")
    with refuses(FileNotFoundError, "none.gguf"):
        LLM(tmp_path / "none.gguf")


@pytest.mark.parametrize("keep", [10, 300, -64])
def test_a_truncated_file(tiny_checkpoint: TinyCheckpoint, tmp_path: Path, keep: int) -> None:
    path = tmp_path / "m.gguf"
    write_gguf(tiny_checkpoint(layers=1), path)
    path.write_bytes(path.read_bytes()[:keep])
    with refuses(ValueError, "[gguf]", str(path)):
        LLM(path)


def test_a_tensor_too_few_and_one_too_many(tiny_checkpoint: TinyCheckpoint, tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"

    def one_more(writer: gguf.GGUFWriter) -> None:
        writer.add_tensor("rope_freqs.weight", np.ones(4, np.float32))

    write_gguf(tiny_checkpoint(layers=1), path, change=one_more)
    with refuses(ValueError, "rope_freqs.weight", "one more"):
        LLM(path)
    write_gguf(tiny_checkpoint(layers=1), path, change=lambda w: w.add_block_count(2))
    with refuses(ValueError, "tensor blk.1.attn_norm.weight: expected in the checkpoint"):
        LLM(path)


def test_weights_that_are_not_finite(tiny_checkpoint: TinyCheckpoint, tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    write_gguf(tiny_checkpoint(layers=1, ffn=64), path, Type.Q8_0)
    reader = gguf.GGUFReader(path, "r+")
    blocks = next(t for t in reader.tensors if t.name == "blk.0.attn_k.weight").data
    blocks[1, :2] = np.array(np.inf, np.float16)[None].view(np.uint8)
    del reader, blocks
    with refuses(ValueError, "blk.0.attn_k.weight", "finite"):
        LLM(path)


def test_a_type_that_is_not_read(
    tiny_checkpoint: TinyCheckpoint, tmp_path: Path, capsys: Any
) -> None:
    data = np.zeros((4, gguf.GGML_QUANT_SIZES[Type.IQ4_XS][1]), np.uint8)
    path = _one_tensor(tiny_checkpoint(), tmp_path / "m.gguf", data, Type.IQ4_XS)
    with refuses(ValueError, "token_embd.weight", "Q4_K, Q5_K, Q6_K", "got IQ4_XS"):
        _core.gguf_tensor(str(path), EMBEDDING)
    assert cli.main(["info", str(path)]) == 0
    assert "1 IQ4_XS tensors of 544 B" in capsys.readouterr().out


# ---- what is told about it


def test_info(tiny_checkpoint: TinyCheckpoint, tmp_path: Path, capsys: Any) -> None:
    path = tmp_path / "m.gguf"
    write_gguf(tiny_checkpoint(layers=1, ffn=64), path, Type.Q8_0)
    assert cli.main(["info", str(path), "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    matrices = 2 * 64 * 32 + 4 * 32 * 32
    assert facts["stored_types"]["Q8_0"]["tensors"] == 9
    assert facts["stored_types"]["f32"]["tensors"] == 3
    assert facts["parameters"] == matrices + 3 * 64 * 32 + 3 * 32


def test_the_sidecar_lies_beside_the_file(tiny_checkpoint: TinyCheckpoint, tmp_path: Path) -> None:
    write_gguf(tiny_checkpoint(layers=1), tmp_path / "m.gguf")
    with refuses(ValueError, "m.bicache.json"):
        LLM(tmp_path / "m.gguf", cache="auto")
    content = {"format": 1, "generation": {"gen_length": 8}}
    (tmp_path / "m.bicache.json").write_text(json.dumps(content))
    assert LLM(tmp_path / "m.gguf", threads=1).generation_defaults == {"gen_length": 8}


def test_metadata(tiny_checkpoint: TinyCheckpoint, tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"

    def values(writer: gguf.GGUFWriter) -> None:
        writer.add_array("list", ["a", "é"])
        writer.add_float64("pi", 3.14)
        writer.add_int8("minus", -1)
        writer.add_bool("yes", True)

    write_gguf(tiny_checkpoint(layers=1), path, change=values)
    found = _core.gguf_metadata(str(path))
    assert found["list"] == ["a", "é"] and found["pi"] == 3.14
    assert found["minus"] == -1 and found["yes"] is True
    assert found["general.architecture"] == "llada" and found["llada.block_count"] == 1
    reader = gguf.GGUFReader(path)
    mine = {key for key in reader.fields if not key.startswith("GGUF.")}
    assert set(found) == mine


def test_a_path_that_is_not_utf8(tmp_path: Path) -> None:
    with pytest.raises((ValueError, OSError)):
        LLM(Path(os.fsdecode(bytes(tmp_path) + b"/\xff.gguf")))
