"""Our safetensors reader against the safetensors package: we accept a file only if it does, and
then we see the same tensors."""

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from bicache import _core
from safetensors import SafetensorError, safe_open

Tensors = dict[str, tuple[str, tuple[int, ...]]]  # name: dtype, shape
Read = Callable[[bytes], tuple[Tensors | None, Tensors | None]]


def file_of(
    header: str | bytes | dict[str, Any], data: int = 0, length: int | None = None
) -> bytes:
    """A file with this header, `data` bytes of tensors and, if given, a wrong header length."""
    if isinstance(header, dict):
        header = json.dumps(header)
    if isinstance(header, str):
        header = header.encode()
    length = len(header) if length is None else length
    return length.to_bytes(8, "little") + header + bytes(i % 251 for i in range(data))


def tensor(shape: object, begin: object, end: object, dtype: object = "F32") -> dict[str, object]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


A = '"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}'
ONE, DEEP = tensor([2], 0, 8), 100_000

VALID: dict[str, bytes] = {
    "one tensor": file_of({"a": ONE}, 8),
    "two, bf16, metadata": file_of(
        {
            "__metadata__": {"format": "pt"},
            "b": tensor([3, 1], 8, 14, "BF16"),
            "a": ONE,
        },
        14,
    ),
    "scalar": file_of({"a": tensor([], 0, 4)}, 4),
    "spaces behind the header": file_of("{" + A + "}   ", 8),
    "spaces within": file_of(json.dumps({"a": ONE}, indent=3), 8),
    "escapes in a name": file_of('{"\\u0061\\ud83d\\ude00\\n\\"/":' + json.dumps(ONE) + "}", 8),
    "name in UTF-8": file_of("{" + A.replace('"a"', '"\u00e9\u6f22"') + "}", 8),
    "no tensors": file_of("{}"),
    "zero-size tensor alone": file_of({"a": tensor([0], 0, 0)}),
    "zero-size tensor shares an offset": file_of(
        {"a": ONE, "z": tensor([4, 0], 8, 8), "b": tensor([1], 8, 12)}, 12
    ),
    "zero-size tensor first": file_of({"a": ONE, "z": tensor([0], 0, 0)}, 8),
}

# What safetensors accepts and we refuse, on purpose.
STRICTER: dict[str, bytes] = {
    "duplicate key": file_of("{" + A + "," + A + "}", 8),
    "duplicate key, another tensor": file_of(
        "{" + A + ',"a":' + json.dumps(tensor([1, 2], 0, 8)) + "}", 8
    ),
    "duplicate key, escaped": file_of("{" + A + "," + A.replace('"a"', '"\\u0061"') + "}", 8),
    "duplicate key in metadata": file_of('{"__metadata__":{"k":"1","k":"2"},' + A + "}", 8),
    "leading space": file_of(" {" + A + "}", 8),
    "extra field": file_of({"a": ONE | {"extra": 1}}, 8),
    "fields as a list": file_of({"a": ["F32", [2], [0, 8]]}, 8),
    "huge size beside a zero": file_of({"a": tensor([2**63 - 1, 0], 0, 0)}),
}

BAD: dict[str, bytes] = {
    "empty": b"",
    "7 bytes": bytes(7),
    "length 0": file_of("", length=0),
    "length beyond the file": file_of({"a": ONE}, 8, length=10_000),
    "length one too much": file_of({"a": ONE}, 0, length=len(json.dumps({"a": ONE})) + 1),
    "length one too little": file_of({"a": ONE}, 8, length=len(json.dumps({"a": ONE})) - 1),
    "length 2^63": file_of({"a": ONE}, 8, length=2**63),
    "length 2^64 - 1": file_of({"a": ONE}, 8, length=2**64 - 1),
    "length 2^64 - 8": file_of({"a": ONE}, 8, length=2**64 - 8),
    "not JSON": file_of("hello, world!"),
    "an array": file_of("[" + json.dumps(ONE) + "]", 8),
    "a string": file_of('"a"'),
    "bad UTF-8": file_of(b'{"\xff":' + json.dumps(ONE).encode() + b"}", 8),
    "overlong UTF-8": file_of(b'{"\xc0\xaf":' + json.dumps(ONE).encode() + b"}", 8),
    "surrogate in UTF-8": file_of(b'{"\xed\xa0\x80":' + json.dumps(ONE).encode() + b"}", 8),
    "lone surrogate": file_of('{"\\ud800":' + json.dumps(ONE) + "}", 8),
    "byte order mark": file_of("\ufeff{" + A + "}", 8),
    "control character in a name": file_of("{" + A.replace('"a"', '"\x01"') + "}", 8),
    "unknown escape": file_of("{" + A.replace('"a"', '"\\x61"') + "}", 8),
    "trailing comma": file_of("{" + A + ",}", 8),
    "comment": file_of("{/**/" + A + "}", 8),
    "unquoted key": file_of("{" + A.replace('"a"', "a") + "}", 8),
    "NUL behind the header": file_of("{" + A + "}\0", 8),
    "two headers": file_of("{" + A + "}{}", 8),
    "gap": file_of({"a": ONE, "b": tensor([1], 12, 16)}, 16),
    "gap at the start": file_of({"a": tensor([2], 4, 12)}, 12),
    "overlap": file_of({"a": ONE, "b": tensor([2], 4, 12)}, 12),
    "the same bytes twice": file_of({"a": ONE, "b": ONE}, 8),
    "zero-size tensor inside another": file_of({"a": ONE, "z": tensor([0], 4, 4)}, 8),
    "begin > end": file_of({"a": tensor([2], 8, 0)}, 8),
    "negative offset": file_of({"a": tensor([2], -8, 0)}, 8),
    "negative shape": file_of({"a": tensor([-2], 0, 8)}, 8),
    "two negative sizes": file_of({"a": tensor([-1, -2], 0, 8)}, 8),
    "fraction in a shape": file_of({"a": tensor([2.0], 0, 8)}, 8),
    "exponent in an offset": file_of("{" + A.replace("[0,8]", "[0,8e0]") + "}", 8),
    "minus zero": file_of("{" + A.replace("[0,8]", "[-0,8]") + "}", 8),
    "leading zero": file_of("{" + A.replace("[0,8]", "[0,08]") + "}", 8),
    "plus sign": file_of("{" + A.replace("[0,8]", "[0,+8]") + "}", 8),
    "hexadecimal": file_of("{" + A.replace("[0,8]", "[0,0x8]") + "}", 8),
    "boolean in a shape": file_of({"a": tensor([True, 2], 0, 8)}, 8),
    "string in a shape": file_of({"a": tensor(["2"], 0, 8)}, 8),
    "shape mismatch": file_of({"a": tensor([3], 0, 8)}, 8),
    "shape product overflow": file_of({"a": tensor([2**33, 2**33], 0, 8)}, 8),
    "overflow to the right size": file_of({"a": tensor([2**32 + 1, 2**32], 0, 8)}, 8),
    "overflow by the type's size": file_of({"a": tensor([2**62 + 2], 0, 8)}, 8),
    "overflow before a zero": file_of({"a": tensor([2**62, 2**62, 0], 0, 0)}),
    "size 2^64": file_of({"a": tensor([2**64 + 2], 0, 8)}, 8),
    "offset 2^64": file_of({"a": tensor([2], 0, 2**64 + 8)}, 8),
    "offset 2^63": file_of({"a": tensor([2], 2**63, 2**63 + 8)}, 8),
    "unknown dtype": file_of({"a": tensor([2], 0, 8, "F33")}, 8),
    "dtype in small letters": file_of({"a": tensor([2], 0, 8, "f32")}, 8),
    "dtype a number": file_of({"a": tensor([2], 0, 8, 32)}, 8),
    "half a byte": file_of({"a": tensor([1], 0, 1, "F4")}, 1),
    "trailing data": file_of({"a": ONE}, 9),
    "data without tensors": file_of("{}", 1),
    "truncated data": file_of({"a": ONE}, 7),
    "no data": file_of({"a": ONE}, 0),
    "metadata not strings": file_of({"__metadata__": {"k": 1}, "a": ONE}, 8),
    "metadata a list": file_of({"__metadata__": ["k"], "a": ONE}, 8),
    "tensor null": file_of({"a": None}),
    "tensor a list of other things": file_of({"a": [[2], "F32", [0, 8]]}, 8),
    "no dtype": file_of({"a": {"shape": [2], "data_offsets": [0, 8]}}, 8),
    "no shape": file_of({"a": {"dtype": "F32", "data_offsets": [0, 8]}}, 8),
    "no offsets": file_of({"a": {"dtype": "F32", "shape": [2]}}, 8),
    "three offsets": file_of({"a": ONE | {"data_offsets": [0, 4, 8]}}, 8),
    "one offset": file_of({"a": ONE | {"data_offsets": [8]}}, 8),
    "dtype twice": file_of(
        "{" + A.replace('"dtype":"F32"', '"dtype":"F32","dtype":"F32"') + "}", 8
    ),
    "deep nesting": file_of('{"a":' * DEEP + "1" + "}" * DEEP),
    "deep nesting of lists": file_of('{"a":' + "[" * DEEP + "]" * DEEP + "}"),
}


@pytest.fixture
def read(tmp_path: Path) -> Read:
    """What we and what safetensors see in a file; None: refused."""
    (tmp_path / "config.json").write_text("{}")
    path = tmp_path / "model.safetensors"

    def ours() -> Tensors | None:
        try:
            return _core.checkpoint_info(str(tmp_path))["tensors"]
        except (ValueError, OSError) as error:  # anything else is a bug
            assert str(tmp_path) in str(error)
            return None

    def theirs() -> Tensors | None:
        try:
            with safe_open(path, framework="numpy") as file:
                parts = {name: file.get_slice(name) for name in file.keys()}
                return {
                    name: (part.get_dtype().lower(), tuple(part.get_shape()))
                    for name, part in parts.items()
                }
        except (SafetensorError, OSError):
            return None

    def both(content: bytes) -> tuple[Tensors | None, Tensors | None]:
        path.write_bytes(content)
        return ours(), theirs()

    return both


@pytest.mark.parametrize("name", VALID)
def test_valid_files(read: Read, name: str) -> None:
    ours, theirs = read(VALID[name])
    assert theirs is not None
    assert ours == theirs


@pytest.mark.parametrize("name", STRICTER)
def test_files_that_only_we_refuse(read: Read, name: str) -> None:
    ours, theirs = read(STRICTER[name])
    assert theirs is not None
    assert ours is None


@pytest.mark.parametrize("name", BAD)
def test_bad_files(read: Read, name: str) -> None:
    ours, theirs = read(BAD[name])
    assert theirs is None
    assert ours is None


def test_every_cut_of_a_valid_file(read: Read) -> None:
    content = VALID["two, bf16, metadata"]
    for size in range(len(content)):
        assert read(content[:size]) == (None, None), size


MEANINGFUL = b'0123456789{}[]",:-.eE \n\tnuF'


def mutate(content: bytes, rng: random.Random) -> bytes:
    """One or a few bytes changed, inserted or removed, mostly by bytes that mean something; the
    length field is made right again most of the time."""
    length = int.from_bytes(content[:8], "little")
    header, data = bytearray(content[8 : 8 + length]), content[8 + length :]
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        at = rng.randrange(len(header))
        byte = (
            rng.choice(b'0123456789{}[]",:-.eE \n\\tnuF')
            if rng.random() < 0.9
            else rng.randrange(256)
        )
        kind = rng.randrange(4)
        if kind == 0:
            header[at] = byte
        elif kind == 1:
            header.insert(at, byte)
        elif kind == 2 and len(header) > 1:
            del header[at]
        else:
            part = header[at : at + rng.randrange(1, 30)]
            to = rng.randrange(len(header))
            header[to:to] = part
    if rng.random() < 0.1:
        length += rng.choice((-1, 1))
    else:
        length = len(header)
    if rng.random() < 0.1:
        data = data[:-1] if rng.random() < 0.5 else data + b"\0"
    return length.to_bytes(8, "little") + bytes(header) + data


def test_mutated_files(read: Read) -> None:
    rng = random.Random(0)
    sources = list(VALID.values())
    accepted = refused = stricter = 0
    for _ in range(2000):
        content = mutate(rng.choice(sources), rng)
        ours, theirs = read(content)
        if ours is not None:
            assert ours == theirs, content
        accepted += ours is not None
        refused += theirs is None
        stricter += theirs is not None and ours is None
    assert accepted > 50 and refused > 50, "the mutations are one-sided: nothing was compared"
    # Strictness is for the cases above, not for files people have.
    assert stricter < accepted


def swap_numbers(header: dict[str, Any], rng: random.Random) -> dict[str, Any]:
    """Well-formed JSON with some sizes and offsets replaced by others that are near or extreme."""
    header = json.loads(json.dumps(header))
    for name in [name for name in header if name != "__metadata__"]:
        for field in ("shape", "data_offsets"):
            for i, number in enumerate(header[name][field]):
                if rng.random() < 0.15:
                    near = [number - 1, number + 1, number * 2, 0, 1, 2, 4, 8]
                    far = [2**31, 2**32, 2**61, 2**62, 2**63 - 1, 2**63, 2**64 - 1, 2**64, -1]
                    header[name][field][i] = rng.choice(near * 3 + far)
    return header


def test_shuffled_numbers(read: Read) -> None:
    rng = random.Random(1)
    accepted = refused = stricter = 0
    for _ in range(1000):
        cuts = sorted(rng.choices(range(0, 33, 4), k=rng.randrange(1, 5)))
        header = {
            f"t{i}": tensor([(b - a) // 4] if rng.random() < 0.5 else [1, (b - a) // 4], a, b)
            for i, (a, b) in enumerate(zip([0, *cuts], cuts, strict=False))
        }
        data = cuts[-1]
        ours, theirs = read(file_of(swap_numbers(header, rng), data))
        if ours is not None:
            assert ours == theirs, header
        accepted += ours is not None
        refused += theirs is None
        stricter += theirs is not None and ours is None
    assert accepted > 100 and refused > 100
    assert stricter < 0.02 * accepted  # huge sizes beside a zero
