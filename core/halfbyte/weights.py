"""Weights that serve many calls: what one call found out about a weight, kept for the next.

A record is found by the Python object that owns the packed bytes, goes when it goes, and holds while all tensors of
the weight are the same objects at the same addresses, and the packed one has the same shape and order.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from operator import is_
from typing import Any, TypeAlias

import torch
from torch import Tensor

ALIGNMENT = 16  # bytes: what the widest access of a kernel wants

Way: TypeAlias = Callable[[Tensor, Tensor | None, tuple[Any, ...]], Tensor]  # what Kernel.bind gives


class Weight:
    """A weight that calls have used, without the bytes themselves.

    ways    what serves a situation, which is anything hashable
    dense   whether all tensors are contiguous, and packed and absmax aligned
    """

    __slots__ = ("dense", "owner", "place", "statistics", "ways")

    def __init__(self, owner: Tensor, packed: Tensor, statistics: tuple[Tensor | None, ...], place: tuple[Any, ...]):
        number = id(owner)
        self.owner = weakref.ref(owner, lambda gone: _forget(number, gone))
        self.statistics, self.place = statistics, place
        given = [packed, *(one for one in statistics if one is not None)]
        aligned = all(one.data_ptr() % ALIGNMENT == 0 for one in given[:2])
        self.dense = aligned and all(map(Tensor.is_contiguous, given))
        self.ways: dict[Any, Way] = {}


_known: dict[int, Weight] = {}  # by the address of the owner, as tensors compare by value


def known(
    owner: Tensor,
    packed: Tensor,
    absmax: Tensor,
    nested_absmax: Tensor | None = None,
    nested_codebook: Tensor | None = None,
    offset: Tensor | None = None,
) -> Weight | None:
    """The record of a weight; None where its owner stands for other tensors, as a DTensor does.

    owner   whose bytes `packed` are, perhaps viewed as another dtype
    """
    found = _known.get(id(owner))
    if found is None and type(owner).__torch_dispatch__ is not Tensor.__torch_dispatch__:
        return None
    place: tuple[Any, ...] = packed.data_ptr(), packed.shape, packed.is_contiguous(), absmax.data_ptr(), absmax.numel()
    if nested_absmax is not None and nested_codebook is not None and offset is not None:
        place += nested_absmax.data_ptr(), nested_codebook.data_ptr(), offset.data_ptr()
    statistics = (absmax, nested_absmax, nested_codebook, offset)
    if (
        found is None
        or found.owner() is not owner
        or found.place != place
        or not all(map(is_, found.statistics, statistics))
    ):
        found = _known[id(owner)] = Weight(owner, packed, statistics, place)
    return found


def as_bytes(packed: Tensor) -> Tensor:
    """Packed codes as uint8, whatever dtype a checkpoint viewed them as."""
    return packed if packed.dtype is torch.uint8 else packed.view(torch.uint8)


def forget() -> None:
    """Drop all records: what was chosen for them may not hold any more."""
    _known.clear()


def _forget(number: int, gone: weakref.ref[Tensor]) -> None:
    found = _known.get(number)
    if found is not None and found.owner is gone:
        del _known[number]
