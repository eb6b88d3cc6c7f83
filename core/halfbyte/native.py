"""Tensor -> pointer adapters that every pybind11 backend shares.

A native module takes addresses, 64-bit sizes and the codes below; Python keeps the tensors alive during the call.
"""

from __future__ import annotations

import os
from array import array
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

# The codes of csrc/include/halfbyte/types.h.
DTYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}
FORMATS = {"nf4": 0, "fp4": 1}
OPTIMIZERS = {"adam": 0, "ademamix": 1, "lion": 2, "momentum": 3, "rmsprop": 4, "adagrad": 5}


def address(tensor: Tensor | None) -> int:
    """Where a contiguous tensor's data begins; 0 for None."""
    return 0 if tensor is None else tensor.data_ptr()


class Known(NamedTuple):
    """What Placed found out, without the tensors."""

    dtype: torch.dtype
    device: torch.device
    sizes: array[int]
    addresses: array[int]


class Placed(list[Tensor]):
    """Contiguous tensors of one dtype and device, with their sizes and addresses, looked up once for all who ask.

    before  what was known of such a list: where sizes and addresses are those, so is the rest, and is not asked for
    """

    def __init__(self, tensors: Sequence[Tensor], before: Known | None = None) -> None:
        """Raises ValueError for no tensors, and for tensors that are not alike or not contiguous."""
        super().__init__(tensors)
        sizes, addresses = array("q", map(Tensor.numel, self)), array("q", map(Tensor.data_ptr, self))
        if before is not None and before.addresses == addresses and before.sizes == sizes:
            self.known = before
            return
        dtypes, devices = {one.dtype for one in self}, {one.device for one in self}
        if len(dtypes) != 1 or len(devices) != 1 or not all(map(Tensor.is_contiguous, self)):
            raise ValueError("the tensors are not contiguous, or not of one dtype and device")
        self.known = Known(dtypes.pop(), devices.pop(), sizes, addresses)


def sizes(tensors: Sequence[Tensor]) -> array[int]:
    """How many elements each tensor has."""
    return tensors.known.sizes if isinstance(tensors, Placed) else array("q", map(Tensor.numel, tensors))


def addresses(tensors: Sequence[Tensor]) -> array[int]:
    """Where the data of each contiguous tensor begins."""
    return tensors.known.addresses if isinstance(tensors, Placed) else array("q", map(Tensor.data_ptr, tensors))


def is_dense(tensors: Sequence[Tensor]) -> bool:
    """Whether all tensors are contiguous."""
    return isinstance(tensors, Placed) or all(map(Tensor.is_contiguous, tensors))


# -- threads after fork --------------------------------------------------------------------------------------

# libgomp's pool of threads does not exist in a forked child, and a parallel region there waits for it forever
# (GCC bug 58378, open since 2013; torch's own loops hang the same way).  With one thread no pool is asked for.
_crowded = False  # at the last fork this process had several threads: a pool may be among them
_orphaned = False  # this process comes from such a fork


def threads() -> int:
    """How many threads an OpenMP kernel may use: torch's number; one in a child of a process that had threads."""
    return 1 if _orphaned else torch.get_num_threads()


def _before_fork() -> None:
    global _crowded
    try:
        _crowded = len(list(Path("/proc/self/task").iterdir())) > 1
    except OSError:  # not Linux
        _crowded = True


def _after_fork() -> None:
    global _orphaned
    _orphaned = _orphaned or _crowded


if hasattr(os, "register_at_fork"):
    os.register_at_fork(before=_before_fork, after_in_child=_after_fork)
