"""Slabs: large allocations from which the states of paged parameters are cut, those of one parameter side by side."""

from __future__ import annotations

import mmap
import sys
import weakref
from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor

from .state import PARTS, State

ALIGNMENT = 256  # bytes, of each tensor
SMALLEST, LARGEST = 2**20, 2**28  # bytes, of slabs that states share


def aligned(size: int) -> int:
    """Bytes that a tensor of some bytes takes in a slab."""
    return -(-size // ALIGNMENT) * ALIGNMENT


class Slab(Protocol):
    """Memory, which ends with the last tensor over it."""

    length: int
    address: int

    def view(self, offset: int, count: int, dtype: torch.dtype) -> Tensor:
        """A flat tensor over some of it, with a storage of its own, as checkpoints want it."""

    def prefetch(self) -> None:
        """Bring it to its device, in the current stream, where it can be."""


class Slabs:
    """Cuts tensors from slabs.

    allocate  makes a slab of so many bytes
    """

    def __init__(self, allocate: Callable[[int], Slab]) -> None:
        self._allocate = allocate
        self._slabs: dict[int, weakref.ref[Slab]] = {}  # by the address of each tensor that was cut
        self._open: Slab | None = None  # the one that is being filled
        self._used = 0  # of it
        self._shared = 0  # bytes in all that were filled

    def adopt(self, state: State) -> None:
        """Move the tensors of a state here, with their values and strides."""
        names = [name for name in PARTS if name in state]
        slab, offset = self._room(sum(aligned(state[name].nbytes) for name in names))
        for name in names:
            tensor: Tensor = state[name]
            place = slab.view(offset, tensor.numel(), tensor.dtype)
            state[name] = place.as_strided(tensor.shape, tensor.stride()).copy_(tensor)
            self._slabs[slab.address + offset] = weakref.ref(slab)
            offset += aligned(tensor.nbytes)

    def holds(self, state: State) -> bool:
        """Whether the tensors of a state lie here."""
        return all(self.slab_of(state[name]) is not None for name in PARTS if name in state)

    def slab_of(self, tensor: Tensor) -> Slab | None:
        """The slab that a tensor, or what it is a view of, was cut from."""
        reference = self._slabs.get(tensor.untyped_storage().data_ptr())
        return None if reference is None else reference()

    def alive(self) -> list[Slab]:
        """The slabs that still have a tensor."""
        found = [slab for one in self._slabs.values() if (slab := one()) is not None]
        return list({slab.address: slab for slab in found}.values())

    def _room(self, size: int) -> tuple[Slab, int]:
        """A slab with so many bytes free, and where they begin."""
        if 8 * size > LARGEST:  # what would leave much of a shared slab empty has its own
            return self._allocate(size), 0
        if self._open is None or self._open.length < self._used + size:
            self._slabs = {address: one for address, one in self._slabs.items() if one() is not None}
            self._open = self._allocate(max(size, SMALLEST, min(LARGEST, self._shared)))  # few slabs for many states
            self._shared += self._open.length
            self._used = 0
        self._used += size
        return self._open, self._used - size


class Pages(mmap.mmap):
    """A slab on the host.  torch's own pinned memory comes in powers of two and is never given back.

    pin  (address, bytes) -> what unpins them
    """

    def __new__(cls, size: int, pin: Callable[[int, int], Callable[[], None]]) -> Pages:
        return super().__new__(cls, -1, size)  # shared: a fork must not move pages that a device writes to

    def __init__(self, size: int, pin: Callable[[int, int], Callable[[], None]]) -> None:
        self.length = size
        self.address = torch.frombuffer(self, dtype=torch.uint8).data_ptr()
        self._unpin = pin(self.address, size)

    def view(self, offset: int, count: int, dtype: torch.dtype) -> Tensor:
        return torch.frombuffer(self, dtype=dtype, count=count, offset=offset)

    def prefetch(self) -> None:
        return None

    def __del__(self) -> None:  # mmap calls back weak references only after the memory is gone
        if hasattr(self, "_unpin") and not sys.is_finalizing():
            self._unpin()
