"""QuantState: all that undoes a quantization, and how checkpoints spell it.

The attribute names and the checkpoint keys are bitsandbytes' (0.50); see docs/pages/formats.md.
"""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from . import formats
from .errors import FormatError, InputError
from .kernel import show
from .ops.fourbit import unnest

_BLOB = "quant_state.bitsandbytes__"
_TENSORS = ("absmax", "quant_map", "nested_absmax", "nested_quant_map")
_PLAIN = ("quant_type", "blocksize", "dtype", "shape", "nested_blocksize", "nested_dtype", "nested_offset")
_NESTED = ("nested_absmax", "nested_quant_map", "nested_blocksize", "nested_dtype", "nested_offset")

# Everything JSON keys of a blob may say about dtypes; a name outside is refused, never looked up in torch.
_DTYPES = {show(dtype): dtype for dtype in (torch.float32, torch.float16, torch.bfloat16)}

_MAX_DIMENSIONS, _MAX_SIZE = 64, 2**63 - 1  # torch's own limits


class QuantState:
    """Statistics of one quantized tensor.  Mutable, as bitsandbytes' users expect; holds tensors and plain values.

    absmax      float32 (blocks,); uint8 codes where nested
    shape       of the tensor before
    code        the codebook: float32 (16,) or (256,)
    blocksize   elements that share one absmax
    quant_type  "nf4", "fp4"; None for 8-bit
    dtype       of the tensor before
    offset      float32 scalar added to the nested absmax; None where not nested
    state2      QuantState of the absmax; None where not nested
    """

    def __init__(
        self,
        absmax: Tensor,
        shape: torch.Size | tuple[int, ...] | None = None,
        code: Tensor | None = None,
        blocksize: int | None = None,
        quant_type: str | None = None,
        dtype: torch.dtype | None = None,
        offset: Tensor | None = None,
        state2: QuantState | None = None,
    ) -> None:
        self.absmax = absmax
        self.shape = None if shape is None else torch.Size(shape)
        self.code = code
        self.blocksize = blocksize
        self.quant_type = quant_type
        self.dtype = dtype
        self.offset = offset
        self.state2 = state2

    @property
    def nested(self) -> bool:
        return self.state2 is not None

    @nested.setter
    def nested(self, nested: bool) -> None:
        # vLLM unnests a state by writing absmax, nested, offset and state2, in this order.
        if nested and self.state2 is None:
            raise InputError("a state is nested by its state2; got none")
        if not nested:
            self.offset = self.state2 = None

    def __getitem__(self, index: int) -> Any:
        """As the list that a state was before bitsandbytes 0.39."""
        nested = None if self.state2 is None else [self.offset, self.state2]
        return [self.absmax, self.shape, self.dtype, self.blocksize, nested, self.quant_type][index]

    def nested_tensors(self) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """(nested_absmax, nested_codebook, offset), as the ops take them."""
        if self.state2 is None:
            return None, None, None
        return self.state2.absmax, self.state2.code, self.offset

    def __getattr__(self, name: str) -> Tensor:
        # FSDP resolves the checkpoint key `quant_state.bitsandbytes__nf4` by getattr.
        if name == f"bitsandbytes__{self.__dict__.get('quant_type')}":
            return self.as_dict(packed=True)[f"quant_state.{name}"]  # type: ignore[no-any-return]
        raise AttributeError(f"QuantState has no attribute {name!r}")

    def __eq__(self, other: object) -> bool:
        """Whether both undo the same quantization, on one device.  8-bit codes have their tensor's shape themselves."""
        if not isinstance(other, QuantState):
            return NotImplemented
        mine, theirs = (
            (one.quant_type and one.shape, one.blocksize, one.quant_type, one.dtype, one.state2, one.absmax.device)
            for one in (self, other)
        )
        if mine != theirs:
            return False
        pairs = ((getattr(self, name), getattr(other, name)) for name in ("absmax", "code", "offset"))
        return all(a is b or (a is not None and b is not None and torch.equal(a, b)) for a, b in pairs)

    __hash__ = object.__hash__  # states are mutable: equal ones are still different keys

    def __repr__(self) -> str:
        shape = None if self.shape is None else tuple(self.shape)
        return (
            f"QuantState({self.quant_type or '8-bit'}, shape={shape}, blocksize={self.blocksize}, "
            f"nested={self.nested}, dtype={show(self.dtype)}, device={self.absmax.device})"
        )

    # -- moving ----------------------------------------------------------------------------------------------

    def to(self, device: torch.device | str | int) -> None:
        """Move in place."""
        self.__dict__.update(self.moved(device).__dict__)

    def moved(self, device: torch.device | str | int, non_blocking: bool = False) -> QuantState:
        """The same state on another device; the original is not touched."""

        def move(tensor: Tensor | None) -> Tensor | None:
            return None if tensor is None else tensor.to(device, non_blocking=non_blocking)

        moved = copy.copy(self)
        moved.absmax = self.absmax.to(device, non_blocking=non_blocking)
        moved.code, moved.offset = move(self.code), move(self.offset)
        moved.state2 = None if self.state2 is None else self.state2.moved(device, non_blocking)
        return moved

    def sliced(self, begin: int, end: int) -> QuantState | None:
        """The state of elements begin to end, read flat; None where begin is not the first of a block."""
        if self.shape is None or self.blocksize is None or begin % self.blocksize:
            return None
        end = max(begin, min(end, self.shape.numel()))
        first, last = begin // self.blocksize, -(-end // self.blocksize)
        part = copy.copy(self)
        part.shape = torch.Size((end - begin,))
        part.absmax = self.absmax[first:last]
        if self.state2 is not None:
            if first % formats.NESTED_BLOCKSIZE:  # does not fit the nested blocks: store this part's absmax plainly
                part.absmax = unnest(self.absmax, *self.nested_tensors())[first:last]
                part.offset = part.state2 = None
            else:
                part.state2 = copy.copy(self.state2)
                groups = slice(first // formats.NESTED_BLOCKSIZE, -(-last // formats.NESTED_BLOCKSIZE))
                part.state2.absmax = self.state2.absmax[groups]
        return part

    def nbytes(self) -> int:
        """Bytes of the statistics, without the code tables that all tensors share."""
        own = self.absmax.nbytes + (0 if self.offset is None else self.offset.nbytes)
        return own + (0 if self.state2 is None else self.state2.nbytes())

    # -- checkpoints -----------------------------------------------------------------------------------------

    def as_dict(self, packed: bool = False) -> dict[str, Any]:
        """What a checkpoint stores.  packed: only tensors, the plain values as one JSON blob.

        Code tables are cloned: safetensors refuses tensors that share memory.  The state of 8-bit codes has no
        packed form, and a quant_type of None.
        """
        if self.code is None or self.dtype is None or (self.quant_type is not None and self.shape is None):
            raise FormatError("a state without shape, code and dtype cannot be stored")
        if packed and self.quant_type is None:
            raise FormatError("checkpoints hold 4-bit states only; the state of 8-bit codes has no packed form")
        state: dict[str, Any] = {
            "quant_type": self.quant_type,
            "absmax": self.absmax,
            "blocksize": self.blocksize,
            "quant_map": self.code.clone(),
            "dtype": show(self.dtype),
            "shape": None if self.shape is None else tuple(self.shape),
        }
        if self.state2 is not None and self.state2.code is not None and self.offset is not None:
            state |= {
                "nested_absmax": self.state2.absmax,
                "nested_blocksize": self.state2.blocksize,
                "nested_quant_map": self.state2.code.clone(),
                "nested_dtype": show(self.state2.dtype),
                "nested_offset": self.offset.item(),
            }
        if not packed:
            return state
        tensors = {key: state[key] for key in _TENSORS if key in state}
        blob = json.dumps({key: state[key] for key in _PLAIN if key in state})
        tensors[f"{_BLOB}{self.quant_type}"] = torch.frombuffer(bytearray(blob.encode()), dtype=torch.uint8)
        return tensors

    @classmethod
    def from_dict(cls, qs_dict: Mapping[str, Any], device: torch.device | str | None = None) -> QuantState:
        """Read what `as_dict` wrote, packed or not; keys may carry a prefix such as "layer.weight.".

        Raises FormatError for missing, unknown or contradicting entries.
        """
        stored: dict[str, Any] = {}
        origin: dict[str, str] = {}
        for key, value in qs_dict.items():
            entry = _last_component(key)
            if entry in stored:
                raise FormatError(f"two entries for {entry}: {origin[entry]} and {key}")
            stored[entry], origin[entry] = value, key
        blobs = [key for key in stored if key.startswith("quant_state.")]
        if "quant_type" not in stored:
            if len(blobs) != 1:
                raise FormatError(f"a quantized tensor needs exactly one quant_state entry; got {len(blobs)}")
            stored |= _read_blob(blobs[0], stored.pop(blobs[0]))
        if unknown := set(stored) - {*_TENSORS, *_PLAIN}:
            raise FormatError(f"unknown entries in a quantization state: {', '.join(sorted(unknown))}")
        nested = "nested_absmax" in stored
        needed = ("absmax", "quant_map", "quant_type", "blocksize", "dtype", "shape", *(_NESTED if nested else ()))
        if missing := [key for key in needed if key not in stored]:
            raise FormatError(f"a quantization state lacks {', '.join(missing)}")
        if stray := [] if nested else [key for key in _NESTED if key in stored]:
            raise FormatError(f"a quantization state has {', '.join(stray)} but no nested_absmax")
        return cls._from_entries(stored, nested, device)

    @classmethod
    def _from_entries(cls, stored: dict[str, Any], nested: bool, device: torch.device | str | None) -> QuantState:
        quant_type, blocksize = stored["quant_type"], stored["blocksize"]
        if quant_type is None:
            return cls._from_8bit_entries(stored, nested, device)
        if not isinstance(quant_type, str) or quant_type not in formats.FORMATS:
            raise FormatError(f"quant_type must be one of {', '.join(formats.FORMATS)}; got {quant_type!r}")
        if type(blocksize) is not int or blocksize not in formats.BLOCKSIZES:
            allowed = ", ".join(map(str, formats.BLOCKSIZES))
            raise FormatError(f"blocksize must be one of {allowed}; got {blocksize!r}")
        shape = _shape(stored["shape"])
        blocks = -(-math.prod(shape) // blocksize)
        absmax = _tensor(stored, "absmax", torch.uint8 if nested else torch.float32, blocks, device)
        if absmax.numel() > blocks + 1:  # bitsandbytes' Triton kernels may leave one more; others are of other blocks
            raise FormatError(f"absmax must have {blocks} elements; got {absmax.numel()}")
        code = _tensor(stored, "quant_map", torch.float32, 16, device)
        _same_table(code, quant_type)
        offset = state2 = None
        if nested:
            if stored["nested_blocksize"] != formats.NESTED_BLOCKSIZE:
                raise FormatError(
                    f"nested_blocksize must be {formats.NESTED_BLOCKSIZE}; got {stored['nested_blocksize']!r}"
                )
            number = _number("nested_offset", stored["nested_offset"])
            offset = torch.tensor(number, dtype=torch.float32, device=absmax.device)
            groups = -(-blocks // formats.NESTED_BLOCKSIZE)
            state2 = cls(
                absmax=_tensor(stored, "nested_absmax", torch.float32, groups, device),
                code=_tensor(stored, "nested_quant_map", torch.float32, 256, device),
                blocksize=formats.NESTED_BLOCKSIZE,
                dtype=_dtype(stored["nested_dtype"]),
            )
        return cls(absmax, torch.Size(shape), code, blocksize, quant_type, _dtype(stored["dtype"]), offset, state2)

    @classmethod
    def _from_8bit_entries(cls, stored: dict[str, Any], nested: bool, device: torch.device | str | None) -> QuantState:
        shape = None if stored["shape"] is None else torch.Size(_shape(stored["shape"]))
        absmax = _tensor(stored, "absmax", torch.uint8 if nested else torch.float32, 0, device)
        code = _tensor(stored, "quant_map", torch.float32, 256, device)
        state = cls(absmax, shape, code, _positive("blocksize", stored), None, _dtype(stored["dtype"]))
        if nested:
            number = _number("nested_offset", stored["nested_offset"])
            state.offset = torch.tensor(number, dtype=torch.float32, device=absmax.device)
            state.state2 = cls(
                absmax=_tensor(stored, "nested_absmax", torch.float32, 0, device),
                code=_tensor(stored, "nested_quant_map", torch.float32, 256, device),
                blocksize=_positive("nested_blocksize", stored),
                dtype=_dtype(stored["nested_dtype"]),
            )
        return state


def is_blob(key: str) -> bool:
    """Whether a checkpoint key is the JSON blob of a quantized tensor."""
    return _last_component(key).startswith(_BLOB)


def _last_component(key: str) -> str:
    """`layer.weight.absmax` -> `absmax`, `layer.weight.quant_state.x` -> `quant_state.x`."""
    head, _, last = key.rpartition(".")
    return f"quant_state.{last}" if head.endswith("quant_state") else last


def _read_blob(key: str, blob: object) -> dict[str, Any]:
    if not isinstance(blob, Tensor) or blob.dtype != torch.uint8 or blob.ndim != 1:
        raise FormatError(f"{key} must be a one-dimensional uint8 tensor")
    try:
        entries = json.loads(blob.cpu().numpy().tobytes().decode())
    except (ValueError, RecursionError) as error:
        raise FormatError(f"{key} is not JSON: {error}") from error
    if not isinstance(entries, dict):
        raise FormatError(f"{key} must hold a JSON object; got {type(entries).__name__}")
    if unknown := set(entries) - set(_PLAIN):
        raise FormatError(f"unknown entries in {key}: {', '.join(sorted(map(str, unknown)))}"[:200])
    if entries.get("quant_type") != key.removeprefix(_BLOB):
        raise FormatError(f"{key} says quant_type {entries.get('quant_type')!r}"[:200])
    return entries


def _shape(value: object) -> tuple[int, ...]:
    fits = isinstance(value, (list, tuple)) and len(value) <= _MAX_DIMENSIONS
    if not fits or not all(type(size) is int and 0 <= size <= _MAX_SIZE for size in value):  # type: ignore[attr-defined]
        raise FormatError(f"shape must be a list of sizes; got {value!r}"[:200])
    return tuple(value)  # type: ignore[arg-type]


def _positive(key: str, stored: Mapping[str, Any]) -> int:
    value: object = stored[key]
    if type(value) is not int or value < 1:
        raise FormatError(f"{key} must be a whole number of at least 1; got {value!r}"[:200])
    return value


def _number(key: str, value: object) -> float:
    if type(value) in (int, float):
        try:
            return float(value)  # type: ignore[arg-type]
        except OverflowError:
            pass
    raise FormatError(f"{key} must be a number; got {value!r}"[:200])


def _dtype(name: object) -> torch.dtype:
    if not isinstance(name, str) or name not in _DTYPES:
        raise FormatError(f"dtype must be one of {', '.join(_DTYPES)}; got {name!r}")
    return _DTYPES[name]


def _tensor(
    stored: Mapping[str, Any], key: str, dtype: torch.dtype, length: int, device: torch.device | str | None
) -> Tensor:
    tensor = stored[key]
    if not isinstance(tensor, Tensor) or tensor.dtype != dtype:
        found = show(tensor.dtype) if isinstance(tensor, Tensor) else type(tensor).__name__
        raise FormatError(f"{key} must be a {show(dtype)} tensor; got {found}")
    if tensor.numel() < length:
        raise FormatError(f"{key} must have {length} entries; got {tensor.numel()}")
    return tensor if device is None else tensor.to(device)


def _same_table(code: Tensor, quant_type: str) -> None:
    """The 4-bit ops decode by format name: a file with other levels must not be decoded silently.

    Tolerant to 1e-3, because old writers rounded the table to four digits.
    """
    if code.is_meta:
        return
    expected = torch.tensor(formats.FORMATS[quant_type].levels)
    found = code.detach().cpu()
    if found.shape != expected.shape or not torch.allclose(found, expected, rtol=0, atol=1e-3):
        raise FormatError(f"quant_map is not the table of {quant_type}")
