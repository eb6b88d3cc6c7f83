"""Every exception and warning that halfbyte raises."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .decision import Decision


class HalfbyteError(Exception):
    """Base of every error that halfbyte raises on purpose."""


class InputError(HalfbyteError, ValueError):
    """An argument does not fit the operation; nothing was changed."""


class FormatError(HalfbyteError, ValueError):
    """Stored data (a checkpoint, a quantization state) is not what its format says."""


class StorageError(HalfbyteError, OSError):
    """A file or folder could not be written: the disk is full, the folder is read-only."""


class ConfigError(HalfbyteError, ValueError):
    """An environment variable or a backend choice cannot be understood."""


class BackendUnavailable(HalfbyteError, RuntimeError):
    """A backend that was asked for by name cannot run on this machine."""


class KernelUnusable(HalfbyteError, RuntimeError):
    """A kernel raises it where, against what its limits say, it cannot run here; nothing has been written.

    The dispatcher keeps the sentence as a reason against that kernel and picks again: for a compiler that runs at
    the first call.
    """


class PluginError(HalfbyteError, RuntimeError):
    """A plugin broke the contract of the hooks and was quarantined."""


class NoKernel(HalfbyteError, RuntimeError):
    """No backend that may be used has a kernel for this situation.

    decision   the whole trace, as `halfbyte.explain` gives it
    tried      (backend, reasons) for each backend that was asked
    """

    def __init__(self, decision: Decision, note: str = "") -> None:
        super().__init__(f"{decision}{note}")
        self.decision = decision
        self.tried = decision.tried


class HalfbyteWarning(UserWarning):
    """Base of halfbyte's warnings."""


class HalfbytePerformanceWarning(HalfbyteWarning):
    """Something runs, but slower than the hardware could."""
