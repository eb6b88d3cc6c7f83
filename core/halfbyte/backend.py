"""Backend: who runs kernels.  A leaf module: plugins import it, it imports nothing of halfbyte but `kernel`."""

from __future__ import annotations

import abc
from collections.abc import Iterable
from dataclasses import dataclass
from typing import ClassVar

from .kernel import DeviceFacts, Kernel

__all__ = ["API", "Backend", "Check", "DeviceFacts", "EnvVar"]

API = 1  # version of the contract between halfbyte and its plugins


@dataclass(frozen=True, slots=True)
class EnvVar:
    """An environment variable that a backend or the core reads.

    name      HALFBYTE_...
    doc       one sentence
    values    the values it takes, in words; the choices when empty
    choices   all values it takes, where they can be listed: doctor fails for another one
    """

    name: str
    doc: str
    values: str = ""
    choices: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        object.__setattr__(self, "values", self.values or ", ".join(self.choices))


@dataclass(frozen=True, slots=True)
class Check:
    """One line of `halfbyte doctor`.

    ok        False makes doctor's exit code 1
    """

    name: str
    ok: bool
    message: str


class Backend(abc.ABC):
    """A named set of kernels for some device types.

    name           what users type: [a-z][a-z0-9_]*
    device_types   torch's names for the devices it serves
    priority       among backends that can run: the highest is picked
                   (cuda and rocm 80, xpu 70, triton 60, cpu 40, reference 0)
    api            contract version the backend was written for
    env            environment variables of its own
    """

    name: ClassVar[str]
    device_types: ClassVar[frozenset[str]]
    priority: ClassVar[int]
    api: ClassVar[int] = API
    env: ClassVar[tuple[EnvVar, ...]] = ()

    def claims(self, device_type: str) -> bool:
        """Whether a forced chain that names this backend binds devices of this type."""
        return device_type in self.device_types

    def why_not(self) -> tuple[str, ...]:
        """Reasons why this machine cannot run the backend at all; empty means it can.

        Called at import: creates no device context and imports nothing heavy.
        """
        return ()

    def why_not_device(self, device: DeviceFacts) -> tuple[str, ...]:
        """Reasons why the backend cannot serve this device; empty means it can."""
        return ()

    @abc.abstractmethod
    def kernels(self) -> Iterable[Kernel]:
        """All kernels.  Called once, on first use: the first place for heavy imports."""
