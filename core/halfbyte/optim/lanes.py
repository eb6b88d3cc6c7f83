"""Lanes: what runs side by side on a device while states pass through it."""

from __future__ import annotations

import enum
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch


class Lane(enum.IntEnum):
    """What is done in it.  Work of one lane is done in order, work of several at the same time."""

    IN = 0
    UPDATE = 1
    OUT = 2


class Lanes(Protocol):
    """The lanes of one device."""

    def __init__(self, device: torch.device) -> None: ...

    def run(self, lane: Lane, work: Callable[[], None], after: Sequence[Any]) -> Any:
        """Do work in a lane, once what some earlier runs returned is done.  Waits for nothing."""

    def finish(self) -> None:
        """Wait until everything is done."""

    @staticmethod
    def pin(address: int, size: int) -> Callable[[], None]:
        """Let the device reach memory of the host, which starts and ends with a page; what undoes it."""


class Streams:
    """Of a GPU that torch calls cuda: two streams, and the current one for updates."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._in, self._out = torch.cuda.Stream(device), torch.cuda.Stream(device)

    def run(self, lane: Lane, work: Callable[[], None], after: Sequence[torch.cuda.Event]) -> torch.cuda.Event:
        stream = (self._in, torch.cuda.current_stream(self._device), self._out)[lane]
        with torch.cuda.stream(stream):
            for event in after:
                stream.wait_event(event)
            work()
            done: torch.cuda.Event = stream.record_event()
            return done

    def finish(self) -> None:
        for stream in (self._in, torch.cuda.current_stream(self._device), self._out):
            stream.synchronize()

    @staticmethod
    def pin(address: int, size: int) -> Callable[[], None]:
        runtime = torch.cuda.cudart()
        if error := int(runtime.cudaHostRegister(address, size, 1)):  # 1: for every device
            text = runtime.cudaGetErrorString(runtime.cudaError(error))
            raise RuntimeError(f"the driver cannot pin {size:,} bytes of the host for paged states: {text}")
        return lambda: runtime.cudaHostUnregister(address)


LANES: dict[str, type[Lanes]] = {"cuda": Streams}  # by the type of device
