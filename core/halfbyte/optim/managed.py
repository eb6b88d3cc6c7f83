"""Managed memory: slabs that the driver moves between host and device, for what wants bitsandbytes' way of paging."""

from __future__ import annotations

import importlib
import weakref
from typing import Any

import torch
from torch import Tensor

from ..errors import InputError
from ..native_gpu import Module

_TYPES = {torch.uint8: "|u1", torch.float32: "<f4"}


def module() -> Module:
    """The native module for torch's GPUs.  Raises InputError where it is not built."""
    name = "halfbyte_rocm._C" if torch.version.hip else "halfbyte_cuda._C"
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise InputError(f'paged_memory="managed" needs {name}, which cannot be imported: {error}') from error


class Managed:
    """A slab in managed memory, on the device from the start; freed with the last tensor over it.

    Raises InputError where the device has less free memory: what does not fit would be moved at every step.
    """

    def __init__(self, size: int, device: torch.device) -> None:
        free, _ = torch.cuda.mem_get_info(device)
        if size > free:
            raise InputError(
                f"managed memory of paged states must fit {device}: {size:,} bytes are needed, {free:,} are free"
            )
        self._native, self._index = module(), device.index
        self.length = size
        self.address: int = self._native.managed_alloc(size, self._index)
        weakref.finalize(self, self._native.managed_free, self.address, self._index).atexit = False
        self.prefetch()
        torch.cuda.current_stream(device).synchronize()  # so that the next slab is counted beside this one

    def view(self, offset: int, count: int, dtype: torch.dtype) -> Tensor:
        return torch.as_tensor(_View(self, offset, count, dtype), device=torch.device("cuda", self._index))

    def prefetch(self) -> None:
        """Bring it to the device, in the current stream."""
        stream = torch.cuda.current_stream(self._index).cuda_stream
        self._native.managed_prefetch(self.address, self.length, self._index, stream)


class _View:
    """What torch makes a tensor of; the tensor keeps it, and it keeps the slab."""

    def __init__(self, slab: Managed, offset: int, count: int, dtype: torch.dtype) -> None:
        self._slab = slab
        self.__cuda_array_interface__: dict[str, Any] = {
            "shape": (count,),
            "typestr": _TYPES[dtype],
            "data": (slab.address + offset, False),
            "version": 2,
        }
