"""What stands in `bitsandbytes` itself."""

from __future__ import annotations

from ..._runtime import dispatcher
from . import autograd, cextension, functional, nn, optim, utils
from .autograd._functions import MatmulLtState, matmul, matmul_4bit
from .nn import modules
from .ops import define
from .optim import adam

__all__ = [
    "MatmulLtState",
    "adam",
    "autograd",
    "cextension",
    "features",
    "functional",
    "matmul",
    "matmul_4bit",
    "modules",
    "nn",
    "optim",
    "supported_torch_devices",
    "utils",
]

features = {"multi_backend"}

# Device types that some backend computes on; whether this machine has one is not asked here.
supported_torch_devices = {"cpu"}.union(*(one.device_types for one in dispatcher.plugins.backends.values()))

define()
