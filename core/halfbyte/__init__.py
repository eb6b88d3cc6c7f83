"""halfbyte: a quantization runtime for PyTorch.  Importing it loads plugins and touches no device."""

from __future__ import annotations

from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Any

from .backend import Backend, Check, DeviceFacts, EnvVar
from .errors import (
    BackendUnavailable,
    ConfigError,
    FormatError,
    HalfbyteError,
    HalfbytePerformanceWarning,
    HalfbyteWarning,
    InputError,
    KernelUnusable,
    NoKernel,
    PluginError,
    StorageError,
)
from .hookspecs import hookimpl
from .kernel import Kernel
from .op import Op

try:
    __version__ = version("halfbyte")
except PackageNotFoundError:  # run from a checkout
    __version__ = "0+unknown"

# Below this line plugins are loaded; they may import everything above.
from . import functional, nn
from .choosing import BackendInfo, active, backends, explain, set_backend, use_backend
from .decision import Decision
from .derived import drop_derived
from .freeze import freeze_
from .quant_state import QuantState
from .quantize import QuantizeReport, dequantize_, quantize_

if TYPE_CHECKING:
    from . import optim

__all__ = [
    "Backend",
    "BackendInfo",
    "BackendUnavailable",
    "Check",
    "ConfigError",
    "Decision",
    "DeviceFacts",
    "EnvVar",
    "FormatError",
    "HalfbyteError",
    "HalfbytePerformanceWarning",
    "HalfbyteWarning",
    "InputError",
    "Kernel",
    "KernelUnusable",
    "NoKernel",
    "Op",
    "PluginError",
    "QuantState",
    "QuantizeReport",
    "StorageError",
    "active",
    "backends",
    "dequantize_",
    "drop_derived",
    "explain",
    "freeze_",
    "functional",
    "hookimpl",
    "nn",
    "optim",
    "quantize_",
    "set_backend",
    "use_backend",
]


def __getattr__(name: str) -> Any:
    """The optimizers are loaded when they are first wanted."""
    if name == "optim":
        return import_module(".optim", __name__)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
