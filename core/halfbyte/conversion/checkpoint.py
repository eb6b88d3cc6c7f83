"""Reading a Hugging Face safetensors folder without trusting it.

Everything is checked before anything is used: the headers of all files, their offsets against the files' sizes, the
index against the files.  Pickles are never opened.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeGuard

import torch

from ..errors import FormatError, InputError

CONFIG = "config.json"
SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
PICKLES = frozenset({".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt", ".joblib"})

# safetensors' names for what torch can hold; a name that this torch lacks is left out.  Source: its README and `Dtype`.
_NAMES = """
BOOL:bool U8:uint8 I8:int8 U16:uint16 I16:int16 U32:uint32 I32:int32 U64:uint64 I64:int64 F16:float16 BF16:bfloat16
F32:float32 F64:float64 C64:complex64 F8_E4M3:float8_e4m3fn F8_E5M2:float8_e5m2 F8_E8M0:float8_e8m0fnu
"""
DTYPES: dict[str, torch.dtype] = {
    key: getattr(torch, name) for key, name in (pair.split(":") for pair in _NAMES.split()) if hasattr(torch, name)
}

_MAX_JSON = 100_000_000  # bytes; the limit of safetensors' own reader for its header
_MAX_SIZE = 2**63 - 1  # of a dimension, of an offset: what torch counts with
_MAX_DIMENSIONS = 64  # torch's own


@dataclass(frozen=True, slots=True)
class Stored:
    """One tensor of a safetensors file, as its header describes it.

    dtype    safetensors' name: "BF16"
    """

    dtype: str
    shape: tuple[int, ...]
    nbytes: int

    @property
    def torch_dtype(self) -> torch.dtype:
        return DTYPES[self.dtype]


@dataclass(frozen=True)
class Checkpoint:
    """A folder whose config, index and headers have been checked.

    config     what config.json holds
    shards     file name -> tensor name -> what is stored
    index      "metadata" of the index; None where the model is one file without an index
    """

    folder: Path
    config: dict[str, Any]
    shards: Mapping[str, Mapping[str, Stored]]
    index: dict[str, Any] | None

    def tensors(self) -> dict[str, Stored]:
        """All tensors of all shards."""
        return {name: stored for header in self.shards.values() for name, stored in header.items()}


def read_checkpoint(folder: Path) -> Checkpoint:
    """Check a model folder and say what is in it.  Reads headers, no tensors.

    Raises InputError for a folder that holds no safetensors model, FormatError for one that is damaged.
    """
    if not folder.is_dir():
        raise InputError(f"the model must be a folder with config.json and safetensors files; got {folder}")
    if not (folder / CONFIG).is_file():
        raise InputError(f"{folder} has no {CONFIG}, so it is not a Hugging Face model folder")
    config = read_object(folder / CONFIG)
    # model.safetensors before the index: the order in which transformers looks.
    if (folder / SINGLE).is_file():
        return Checkpoint(folder, config, {SINGLE: read_header(folder / SINGLE)}, None)
    if (folder / INDEX).is_file():
        index = read_object(folder / INDEX)
        metadata = index.get("metadata", {})
        if not isinstance(metadata, dict):
            raise FormatError(f"metadata of {INDEX} must be a JSON object; got {type(metadata).__name__}")
        return Checkpoint(folder, config, _read_shards(folder, index.get("weight_map")), metadata)
    raise InputError(_why_no_safetensors(folder))


def read_object(path: Path) -> dict[str, Any]:
    """The JSON object in a file.  Raises FormatError where there is none."""
    if (size := path.stat().st_size) > _MAX_JSON:
        raise FormatError(f"{path} must be at most {_MAX_JSON} bytes; got {size}")
    try:
        value = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise FormatError(f"{path} is not JSON: {error}") from error
    if not isinstance(value, dict):
        raise FormatError(f"{path} must hold a JSON object; got {type(value).__name__}")
    return value


def read_header(path: Path) -> dict[str, Stored]:
    """The tensors of a safetensors file, checked against the file's size.

    Raises FormatError for a file that is truncated, has holes or overlaps, or is not safetensors at all.
    Source: safetensors' README, "Format".
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or length > min(size - 8, _MAX_JSON):
            raise FormatError(f"{path} is not a whole safetensors file: {size} bytes, a header of {length}")
        raw = file.read(length)
    try:
        header = json.loads(raw.decode(), object_pairs_hook=_without_duplicates)
    except (ValueError, RecursionError) as error:
        raise FormatError(f"the header of {path} cannot be read: {error}") from error
    if not isinstance(header, dict):
        raise FormatError(f"the header of {path} must be a JSON object; got {type(header).__name__}")
    header.pop("__metadata__", None)
    found, spans = {}, []
    for name, entry in header.items():
        found[name], span = _stored(path, name, entry)
        spans.append((*span, name))
    end = 0
    for start, stop, name in sorted(spans):
        if start != end:
            raise FormatError(f"{brief(name)} in {path} begins at byte {start}; the tensor before it ends at {end}")
        end = stop
    if end != size - 8 - length:
        raise FormatError(f"{path} holds {size - 8 - length} bytes of tensors, its header describes {end}")
    return found


def _stored(path: Path, name: str, entry: object) -> tuple[Stored, tuple[int, int]]:
    if not isinstance(entry, dict):
        raise FormatError(f"{brief(name)} in {path} must be described by an object; got {type(entry).__name__}")
    dtype, shape, span = entry.get("dtype"), entry.get("shape"), entry.get("data_offsets")
    if not isinstance(dtype, str) or dtype not in DTYPES:
        raise FormatError(
            f"{brief(name)} in {path} must have one of the dtypes {', '.join(DTYPES)}; got {brief(dtype)}"
        )
    if not _sizes(shape) or len(shape) > _MAX_DIMENSIONS:
        raise FormatError(f"{brief(name)} in {path} must have a list of sizes as its shape; got {brief(shape)}")
    if not _sizes(span) or len(span) != 2:
        raise FormatError(f"{brief(name)} in {path} must have a pair of data_offsets; got {brief(span)}")
    nbytes = math.prod(shape) * DTYPES[dtype].itemsize
    if span[1] - span[0] != nbytes:
        spanned = span[1] - span[0]
        raise FormatError(
            f"{brief(name)} in {path} needs {brief(nbytes)} bytes for its shape, its offsets span {spanned}"
        )
    return Stored(dtype, tuple(shape), nbytes), (span[0], span[1])


def _sizes(value: object) -> TypeGuard[list[int]]:
    return isinstance(value, list) and all(type(size) is int and 0 <= size <= _MAX_SIZE for size in value)


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    unique = dict(pairs)
    if len(unique) != len(pairs):
        raise ValueError("a name stands twice in it")
    return unique


def _read_shards(folder: Path, weight_map: object) -> dict[str, dict[str, Stored]]:
    """The headers of all files of an index, which must hold exactly the tensors that it maps to them."""
    if not isinstance(weight_map, dict) or not weight_map:
        raise FormatError(f"weight_map of {INDEX} must map tensor names to files; got {brief(weight_map)}")
    mapped: dict[str, set[str]] = {}
    for tensor, file in weight_map.items():
        mapped.setdefault(_file_name(tensor, file), set()).add(tensor)
    shards = {}
    for file in sorted(mapped):
        if not (folder / file).is_file():
            raise FormatError(f"{INDEX} names {file}, which is not in {folder}")
        shards[file] = read_header(folder / file)
        if missing := sorted(mapped[file] - set(shards[file])):
            raise FormatError(f"{INDEX} says that {brief(missing[0])} is in {file}, but it is not")
        if extra := sorted(set(shards[file]) - mapped[file]):
            raise FormatError(f"{file} holds {brief(extra[0])}, which {INDEX} does not map to it")
    return shards


def _file_name(tensor: str, file: object) -> str:
    """A file of the weight_map: a plain name in the model's folder, nothing that leads out of it."""
    if not isinstance(file, str) or not file.endswith(".safetensors"):
        raise FormatError(f"{INDEX} must map {brief(tensor)} to a .safetensors file; got {brief(file)}")
    if file != os.path.basename(file) or any(mark in file for mark in ("/", "\\", ":", "\0", "..")):
        raise FormatError(f"{INDEX} must map {brief(tensor)} to a file in the model's own folder; got {brief(file)}")
    return file


def _why_no_safetensors(folder: Path) -> str:
    names = sorted(path.name for path in folder.iterdir())
    if stray := [name for name in names if name.endswith(".safetensors")]:
        return f"{folder} has neither {SINGLE} nor {INDEX}; found only {brief(', '.join(stray))}"
    if pickled := [name for name in names if os.path.splitext(name)[1] in PICKLES]:
        return (
            f"{folder} has only pickled weights ({brief(', '.join(pickled))}), which can run code when opened; "
            "convert to safetensors first (save_pretrained of transformers writes it)"
        )
    return f"{folder} has no safetensors weights ({SINGLE} or {INDEX})"


def brief(value: object) -> str:
    """What a file holds, short enough for a sentence."""
    text = value if isinstance(value, str) else repr(value)
    return text if len(text) <= 80 else text[:77] + "..."
