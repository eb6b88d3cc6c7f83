"""Kernel: how one op is computed, and when that applies.  A leaf module for plugins."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

__all__ = ["DeviceFacts", "Kernel", "show"]


@dataclass(frozen=True, slots=True)
class DeviceFacts:
    """What a choice may know of one device.

    type     torch's device type
    index    of the device among its type; None for the CPU
    vendor   "nvidia", "amd", "intel", ... or ""
    arch     "sm_90", "gfx942", "x86_64", ... or "" while unknown
    cc       compute capability (9, 0); None where there is no such thing or it is unknown
    lanes    threads in lockstep (32 or 64)
    sms      multiprocessors
    name     as the vendor sells it
    """

    type: str
    index: int | None = None
    vendor: str = ""
    arch: str = ""
    cc: tuple[int, int] | None = None
    lanes: int | None = None
    sms: int | None = None
    name: str = ""

    def __str__(self) -> str:
        return self.type if self.index is None else f"{self.type}:{self.index}"


def show(value: object) -> str:
    """A fact as users write it: `bfloat16`, not `torch.bfloat16`."""
    if isinstance(value, torch.dtype):
        return str(value).removeprefix("torch.")
    return str(value)


@dataclass(frozen=True, eq=False)
class Kernel:
    """One function for one op, with declared limits.

    op         name of the op
    function   takes exactly the op's arguments
    limits     fact name -> the values it takes; facts that are not named are unlimited
    cc         (lowest, highest) compute capability, both included; None leaves an end open
    archs      the only archs it takes
    rule       a further test on the facts, answering with reasons against
    priority   among the kernels of one backend: the highest that applies is picked
    variant    tells kernels of one backend and op apart ("avx2")
    bind       for an op over a weight: takes the op's arguments but the first and the bias, and gives what does the
               same for (first, bias or None, tensors of the weight).  It may keep addresses of the tensors, which are
               contiguous, the first two aligned to 16 bytes; never the tensors
    """

    op: str
    function: Callable[..., Any]
    limits: Mapping[str, Collection[object]] = field(default_factory=dict)
    cc: tuple[tuple[int, int] | None, tuple[int, int] | None] = (None, None)
    archs: frozenset[str] | None = None
    rule: Callable[[Any], tuple[str, ...]] | None = None
    priority: int = 0
    variant: str = ""
    bind: Callable[..., Callable[..., Any]] | None = None

    def __post_init__(self) -> None:
        if not callable(self.function):
            raise TypeError(f"function of kernel {self.op!r} must be callable; got {self.function!r}")
        for name, values in self.limits.items():
            if isinstance(values, str) or not isinstance(values, Collection) or not values:
                raise TypeError(f"limits[{name!r}] of kernel {self.op!r} must be a set of values; got {values!r}")

    def why_not(self, facts: Any, device: DeviceFacts) -> tuple[str, ...]:
        """Reasons against using this kernel for these facts; empty means it applies."""
        reasons = []
        for name, values in self.limits.items():
            value = getattr(facts, name)
            if value not in values:
                takes = ", ".join(map(show, _in_order(values)))
                reasons.append(f"{name}={show(value)} (takes {takes})")
        reasons += self._why_not_arch(device)
        if not reasons and self.rule is not None:
            answer = self.rule(facts)
            reasons += [answer] if isinstance(answer, str) else answer
        return tuple(reasons)

    def _why_not_arch(self, device: DeviceFacts) -> list[str]:
        low, high = self.cc
        if (low or high) and device.cc is None:
            return [f"needs a device with a compute capability, {device} has none"]
        if low and device.cc and device.cc < low:
            return [f"needs sm_{low[0]}{low[1]} or newer, {device} is {device.arch}"]
        if high and device.cc and device.cc > high:
            return [f"needs sm_{high[0]}{high[1]} or older, {device} is {device.arch}"]
        if self.archs is not None and device.arch not in self.archs:
            return [f"needs arch {', '.join(sorted(self.archs))}, {device} is {device.arch or 'unknown'}"]
        return []


def _in_order(values: Collection[object]) -> list[object]:
    try:
        return sorted(values)  # type: ignore[type-var]
    except TypeError:
        return sorted(values, key=show)
