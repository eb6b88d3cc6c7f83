"""Reading checkpoints that were damaged or made to do harm."""

from __future__ import annotations

import contextlib
import json
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from halfbyte.conversion.checkpoint import read_checkpoint, read_header
from halfbyte.errors import FormatError, HalfbyteError

TENSORS = {"a": torch.arange(6, dtype=torch.int16).reshape(2, 3), "b": torch.ones(3), "c": torch.ones(0, 2)}
WHOLE = save(TENSORS)

scalars = st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.text(max_size=5) | st.floats(allow_nan=False)
values = st.recursive(
    scalars,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)


def file_of(header: object, data: bytes) -> bytes:
    raw = json.dumps(header).encode()
    return len(raw).to_bytes(8, "little") + raw + data


@pytest.fixture(scope="module")
def folder() -> Iterator[Path]:
    with tempfile.TemporaryDirectory() as name:
        yield Path(name)


def entry(dtype: str = "F32", shape: object = (2,), span: object = (0, 8)) -> dict[str, object]:
    return {"dtype": dtype, "shape": shape, "data_offsets": span}


def test_header_gives_every_tensor(folder: Path) -> None:
    (folder / "x").write_bytes(WHOLE)
    found = read_header(folder / "x")
    assert {name: (one.shape, one.nbytes) for name, one in found.items()} == {
        name: (tuple(tensor.shape), tensor.nbytes) for name, tensor in TENSORS.items()
    }


@pytest.mark.parametrize(
    ("header", "data", "sentence"),
    [
        ({"a": entry()}, 7, "holds 7 bytes of tensors, its header describes 8"),
        ({"a": entry()}, 9, "holds 9 bytes"),
        ({"a": entry(span=(4, 12))}, 12, "begins at byte 4"),
        ({"a": entry(), "b": entry(span=(4, 12))}, 12, "b in .* begins at byte 4"),
        ({"a": entry(), "b": entry(span=(12, 20))}, 20, "begins at byte 12"),
        ({"a": entry(shape=(3,))}, 8, "needs 12 bytes"),
        ({"a": entry(shape=(-2,))}, 8, "list of sizes"),
        ({"a": entry(shape=(2.0,))}, 8, "list of sizes"),
        ({"a": entry(shape=(True, 2))}, 8, "list of sizes"),
        ({"a": entry(span=(0,))}, 8, "pair of data_offsets"),
        ({"a": entry(span=(8, 0))}, 8, "offsets span -8"),
        ({"a": entry(dtype="O")}, 8, "must have one of the dtypes"),
        ({"a": [1]}, 8, "must be described by an object"),
        ([], 0, "must be a JSON object"),
    ],
)
def test_header_that_contradicts_itself_is_refused(folder: Path, header: object, data: int, sentence: str) -> None:
    (folder / "x").write_bytes(file_of(header, bytes(data)))
    with pytest.raises(FormatError, match=sentence):
        read_header(folder / "x")


@pytest.mark.parametrize("raw", [b"", b"{", b'{"a": 1, "a": 2}', b"\xff\xff", b"[" * 100_000, b"NaN"])
def test_header_that_is_no_object_is_refused(folder: Path, raw: bytes) -> None:
    (folder / "x").write_bytes(len(raw).to_bytes(8, "little") + raw)
    with pytest.raises(FormatError):
        read_header(folder / "x")


@pytest.mark.parametrize("length", [2**64 - 1, 2**63, 200_000_000, len(WHOLE)])
def test_header_length_beyond_the_file_is_refused(folder: Path, length: int) -> None:
    (folder / "x").write_bytes(length.to_bytes(8, "little") + WHOLE[8:])
    with pytest.raises(FormatError, match="not a whole safetensors file"):
        read_header(folder / "x")


@settings(deadline=None, max_examples=150)
@given(position=st.integers(0, len(WHOLE) - 1), byte=st.integers(0, 255), cut=st.none() | st.integers(0, len(WHOLE)))
def test_header_with_a_wrong_byte_is_read_right_or_refused(
    folder: Path, position: int, byte: int, cut: int | None
) -> None:
    """Where this reader says yes, safetensors' own says so too, and reads the same shapes."""
    damaged = bytearray(WHOLE)
    damaged[position] = byte
    (folder / "x").write_bytes(damaged[:cut])
    try:
        found = read_header(folder / "x")
    except FormatError:
        return
    theirs = shapes_by_safetensors(folder / "x")
    assert theirs in (None, {name: list(one.shape) for name, one in found.items()})


def shapes_by_safetensors(path: Path) -> dict[str, list[int]] | None:
    """None where it refuses a header for its words (an unknown key, metadata that is no text), not for its sizes."""
    try:
        with safe_open(path, "pt") as file:
            return {name: file.get_slice(name).get_shape() for name in list(file.keys())}
    except SafetensorError as error:
        if "InvalidHeaderDeserialization" in str(error) or "invalid JSON" in str(error):
            return None
        raise


@settings(deadline=None, max_examples=150)
@given(header=st.dictionaries(st.text(max_size=5), values, max_size=3), size=st.integers(0, 40))
def test_header_of_anything_raises_only_format_error(folder: Path, header: object, size: int) -> None:
    (folder / "x").write_bytes(file_of(header, bytes(size)))
    with contextlib.suppress(FormatError):
        read_header(folder / "x")


names = st.text(max_size=8) | st.sampled_from(
    ["m.safetensors", "../m.safetensors", "/m.safetensors", "a/m.safetensors"]
)


@settings(deadline=None, max_examples=150)
@given(index=values | st.fixed_dictionaries({"weight_map": st.dictionaries(st.sampled_from("abcd"), names | values)}))
def test_index_of_anything_is_exact_or_refused(folder: Path, index: object) -> None:
    model = folder / "model"
    model.mkdir(exist_ok=True)
    (model / "config.json").write_text("{}")
    (model / "m.safetensors").write_bytes(WHOLE)
    (folder / "m.safetensors").write_bytes(WHOLE)
    (model / "model.safetensors.index.json").write_text(json.dumps(index))
    try:
        checkpoint = read_checkpoint(model)
    except HalfbyteError:
        return
    assert isinstance(index, dict)
    assert index["weight_map"] == dict.fromkeys("abc", "m.safetensors")
    assert checkpoint.tensors().keys() == {"a", "b", "c"}
