"""Paging: states that live on the host and pass through buffers on the device while they are updated.

A step cuts the parameters of a bucket into pieces whose states fit a buffer: whole parameters, and parts of those
that are larger.  What lies side by side on the host is one copy.  Three pieces are under way at a time: while one
is updated, the next comes in and the last goes out.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from ..ops import rules
from . import slabs
from .bucket import Bucket, Lists
from .lanes import LANES, Lane, Lanes
from .managed import Managed
from .state import BLOCKSIZE, PARTS, State

BUDGET = 512 * 2**20  # bytes on each device
PASSING = 128 * 2**20  # of which buffers take no more
LEAST = 64 * 2**10
BUFFERS = 3
MEMORIES = ("pinned", "managed")


class Pager:
    """The paged states of one optimizer: where they live, and the buffers that they pass through.

    memory  one of MEMORIES: on the host, passing through buffers; or managed memory, which the driver moves
    budget  bytes on each device, of the buffers and, where that leaves any, of states that stay there
    """

    def __init__(self, memory: str, budget: int) -> None:
        self.staged = memory == "pinned"
        self.size = min(budget, PASSING) // BUFFERS // slabs.ALIGNMENT * slabs.ALIGNMENT
        self._room = max(0, budget - PASSING) if self.staged else 0
        self._staying = WeakTensorKeyDictionary()  # parameters
        self._taken: dict[torch.device, int] = {}  # bytes of their states
        self._slabs: dict[torch.device, slabs.Slabs] = {}
        self._stages: dict[torch.device, _Stage] = {}

    def stays(self, param: Tensor, device: torch.device, size: int) -> bool:
        """Whether the states of a parameter, of so many bytes, are to stay on its device: the first that have room."""
        if param not in self._staying:
            taken = self._taken.get(device, 0) + size
            if taken > self._room:
                return False
            self._staying[param], self._taken[device] = True, taken
        return True

    def holds(self, state: State, device: torch.device) -> bool:
        """Whether a state lives here, for parameters on a device."""
        return device in self._slabs and self._slabs[device].holds(state)

    def adopt(self, state: State, device: torch.device) -> None:
        """Bring a state here: from the host, or from the device where the memory is managed."""
        if device not in self._slabs:
            pinned, moved = partial(slabs.Pages, pin=LANES[device.type].pin), partial(Managed, device=device)
            self._slabs[device] = slabs.Slabs(pinned if self.staged else moved)
        self._slabs[device].adopt(state)

    def prefetch(self) -> None:
        """Bring managed memory to its device."""
        if not self.staged:
            for pool in self._slabs.values():
                for slab in pool.alive():
                    slab.prefetch()

    def run(self, bucket: Bucket, update: Callable[[Lists], None]) -> None:
        """Update a bucket whose states live here, in pieces.  Waits until they are back on the host."""
        device = bucket.lists.params[0].device
        if device not in self._stages:
            self._stages[device] = _Stage(device, self.size, self._slabs[device])
        stage = self._stages[device]
        try:
            for number, piece in enumerate(pieces(bucket, self.size)):
                stage.run(number % BUFFERS, piece, update)
        finally:
            stage.lanes.finish()


class Stretch(NamedTuple):
    """Consecutive elements of one parameter.

    param, grad  flat
    seed         for stochastic rounding
    states       by name, of the host: (values per element or block, elements or blocks)
    """

    param: Tensor
    grad: Tensor
    seed: int | None
    states: dict[str, Tensor]

    @property
    def size(self) -> int:
        """Bytes of its states in a buffer."""
        return sum(slabs.aligned(one.nbytes) for one in self.states.values())


def pieces(bucket: Bucket, size: int) -> Iterator[list[Stretch]]:
    """What goes through a buffer of some bytes together, in order."""
    piece: list[Stretch] = []
    free = size
    for stretch in _stretches(bucket, size):
        if stretch.size > free:
            yield piece
            piece, free = [], size
        piece.append(stretch)
        free -= stretch.size
    yield piece


def _stretches(bucket: Bucket, size: int) -> Iterator[Stretch]:
    lists = bucket.lists
    for i, (param, grad) in enumerate(zip(lists.params, lists.grads, strict=True)):
        seed = lists.seeds[i] if lists.seeds else None
        states = {name: one[i].reshape(bucket.count(name), -1) for name in PARTS if (one := getattr(lists, name))}
        whole = Stretch(param.view(-1), grad.view(-1), seed, states)
        if whole.size <= size:
            yield whole
            continue
        length = BLOCKSIZE  # a power of two, so that the bits of stochastic rounding can be kept
        while _part(whole, 0, 2 * length, 1).size <= size:
            length *= 2
        for first in range(0, param.numel(), length):
            yield _part(whole, first, first + length, int(bucket.steps) + 1)


def _part(whole: Stretch, first: int, end: int, step: int) -> Stretch:
    """The elements from a multiple of BLOCKSIZE to another, or to the end."""
    scales = slice(first // BLOCKSIZE, end // BLOCKSIZE)
    return Stretch(
        whole.param[first:end],
        whole.grad[first:end],
        None if whole.seed is None else rules.seed_from(whole.seed, step, first),
        {name: one[:, scales if name[0] == "a" else slice(first, end)] for name, one in whole.states.items()},
    )


class _Copy(NamedTuple):
    """Bytes of a slab and where they are in a buffer."""

    slab: slabs.Slab
    start: int
    at: int
    size: int


class _Stage:
    """The buffers of a device."""

    def __init__(self, device: torch.device, size: int, states: slabs.Slabs) -> None:
        self.lanes: Lanes = LANES[device.type](device)
        self._states = states
        self._buffers = torch.empty(BUFFERS, size, dtype=torch.uint8, device=device)
        # What used the memory before may still be running in the current stream.
        self._free = [self.lanes.run(Lane.UPDATE, lambda: None, ())] * BUFFERS

    def run(self, number: int, piece: list[Stretch], update: Callable[[Lists], None]) -> None:
        """Send a piece through a buffer."""
        buffer = self._buffers[number]
        lists, copies = self._placed(piece, buffer)
        pairs = [(_host(one), buffer[one.at : one.at + one.size]) for one in copies]
        came = self.lanes.run(Lane.IN, partial(_copy, [(there, here) for here, there in pairs]), [self._free[number]])
        moved = self.lanes.run(Lane.UPDATE, partial(update, lists), [came])
        self._free[number] = self.lanes.run(Lane.OUT, partial(_copy, pairs), [moved])

    def _placed(self, piece: list[Stretch], buffer: Tensor) -> tuple[Lists, list[_Copy]]:
        """The lists of a piece, with states in a buffer, and the copies that bring them there."""
        lists, copies = Lists(), list[_Copy]()
        at = 0
        for stretch in piece:
            lists.params.append(stretch.param)
            lists.grads.append(stretch.grad)
            if stretch.seed is not None:
                lists.seeds.append(stretch.seed)
            for name, one in stretch.states.items():
                getattr(lists, name).append(buffer[at : at + one.nbytes].view(one.dtype).view(one.shape))
                slab = self._states.slab_of(one)
                assert slab is not None
                for i, row in enumerate([one] if one.is_contiguous() else one.unbind()):
                    _join(copies, _Copy(slab, row.data_ptr() - slab.address, at + i * row.nbytes, row.nbytes))
                at += slabs.aligned(one.nbytes)
        return lists, copies


def _host(copy: _Copy) -> Tensor:
    return copy.slab.view(copy.start, copy.size, torch.uint8)


def _copy(pairs: list[tuple[Tensor, Tensor]]) -> None:
    for target, source in pairs:
        target.copy_(source, non_blocking=True)


def _join(copies: list[_Copy], new: _Copy) -> None:
    """Add a copy, to the last one where no more than padding is between them, here as there."""
    if copies:
        last = copies[-1]
        gap = new.start - last.start - last.size
        if last.slab is new.slab and 0 <= gap < slabs.ALIGNMENT and gap == new.at - last.at - last.size:
            copies[-1] = last._replace(size=last.size + gap + new.size)
            return
    copies.append(new)
