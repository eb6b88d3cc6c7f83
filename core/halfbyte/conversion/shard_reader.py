"""Reading tensors of a safetensors file without holding on to those read before."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import safetensors
from torch import Tensor

from ..errors import FormatError

# The library maps the whole file, and what was touched of it counts as this process's memory until it is unmapped.
_TOUCHED = 32 << 20  # bytes


class ShardReader:
    """Tensors by name; for one thread."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._file: Any = None
        self._touched = 0

    def read(self, name: str, nbytes: int) -> Tensor:
        """One tensor, which is a view of the mapped file.  Raises FormatError."""
        if self._file is None or self._touched + nbytes > _TOUCHED:
            self._open()
        self._touched += nbytes
        try:
            tensor: Tensor = self._file.get_tensor(name)
        except (safetensors.SafetensorError, OSError, RuntimeError, ValueError, TypeError) as error:
            raise self._unreadable(error) from error
        return tensor

    def _open(self) -> None:
        self._file = None  # unmapped before the next is mapped
        self._touched = 0
        try:
            self._file = safetensors.safe_open(self._path, framework="pt")
        except (safetensors.SafetensorError, OSError, RuntimeError, ValueError) as error:
            raise self._unreadable(error) from error

    def _unreadable(self, error: Exception) -> FormatError:
        return FormatError(f"{self._path} cannot be read: {error}")
