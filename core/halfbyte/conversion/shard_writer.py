"""Writing one safetensors file in bounded memory, with the bytes that safetensors.torch.save_file would write.

Names, dtypes and shapes decide the order of the tensors in the file, and nested statistics have a length that is only
known once they are computed.  So results go to a spool file as they come, in any order and from any thread; then the
header is written, and behind it the tensors in their order.
"""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO

import safetensors.torch
import torch
from torch import Tensor

from .checkpoint import Stored

_CHUNK = 1 << 20  # bytes copied at a time
_METADATA = {"format": "pt"}


@dataclass(frozen=True, slots=True)
class _Entry:
    """A tensor of the file to be.  start: in the spool; read: gives one that was never there."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    nbytes: int
    start: int
    read: Callable[[], Tensor] | None


class ShardWriter:
    """Collects tensors, then writes the file.

    >>> with ShardWriter(folder / "spool") as writer:
    ...     writer.add("a", tensor)
    ...     writer.write(folder / "model.safetensors")
    """

    def __init__(self, spool: Path) -> None:
        self._path = spool
        self._file: BinaryIO = spool.open("w+b")
        self._lock = threading.Lock()
        self._entries: dict[str, _Entry] = {}
        self._end = 0

    def __enter__(self) -> ShardWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            self._file.close()
        except OSError:  # the last bytes did not fit: told already, where they were flushed
            if error is None:
                raise
        finally:
            self._path.unlink(missing_ok=True)

    @property
    def nbytes(self) -> int:
        """Of all tensors."""
        return sum(entry.nbytes for entry in self._entries.values())

    def add(self, name: str, tensor: Tensor) -> None:
        """Take a tensor, whose memory may then be freed."""
        data = _bytes(tensor)
        with self._lock:
            self._entries[name] = _Entry(tensor.dtype, tuple(tensor.shape), tensor.nbytes, self._end, None)
            self._file.write(data)
            self._end += tensor.nbytes

    def add_later(self, name: str, stored: Stored, read: Callable[[], Tensor]) -> None:
        """Take a tensor that can be read when its turn comes."""
        self._entries[name] = _Entry(stored.torch_dtype, stored.shape, stored.nbytes, 0, read)

    def write(self, path: Path) -> None:
        """Write the file and bring it to the disk."""
        self._file.flush()
        order, header = self._layout()
        with path.open("wb") as out:
            out.write(header)
            for name in order:
                entry = self._entries[name]
                if entry.read is None:
                    self._copy(entry, out)
                else:
                    out.write(_bytes(entry.read()))
            out.flush()
            os.fsync(out.fileno())

    def _layout(self) -> tuple[list[str], bytes]:
        """Names in the order of the file, and its header.

        The library itself says the order and what it calls each dtype: it is asked to save tensors of no elements.
        """
        empty = {name: torch.empty(0, dtype=entry.dtype) for name, entry in self._entries.items()}
        raw = safetensors.torch.save(empty, metadata=_METADATA)
        header: dict[str, Any] = json.loads(raw[8 : 8 + int.from_bytes(raw[:8], "little")])
        order = [name for name in header if name != "__metadata__"]
        end = 0
        for name in order:
            entry = self._entries[name]
            header[name] |= {"shape": list(entry.shape), "data_offsets": [end, end + entry.nbytes]}
            end += entry.nbytes
        text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)  # tensors begin at a multiple of 8
        return order, len(text).to_bytes(8, "little") + text

    def _copy(self, entry: _Entry, out: BinaryIO) -> None:
        self._file.seek(entry.start)
        left = entry.nbytes
        while left:
            chunk = self._file.read(min(left, _CHUNK))
            if not chunk:
                raise OSError(f"{self._path} ended early: something else wrote to it")
            out.write(chunk)
            left -= len(chunk)


def _bytes(tensor: Tensor) -> memoryview:
    """The elements as stored.  safetensors is little-endian, as are the machines that torch has wheels for but one."""
    flat = tensor.detach().contiguous().reshape(-1)
    data: memoryview = flat.view(torch.uint8).numpy().data
    return data
