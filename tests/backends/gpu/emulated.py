"""A pytest plugin: the portable GPU kernels, emulated at 32 and at 64 lanes, as backends for CPU tensors.

pytest -p emulated -p halfbyte.testing.plugin --backend emulated32 --pyargs halfbyte.testing.checks
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Iterable
from types import SimpleNamespace
from typing import Any

import halfbyte
from halfbyte import native_gpu, native_gpu_optimizer
from halfbyte._runtime import dispatcher

LANES = (32, 64)


def module(lanes: int) -> Any:
    """The compiled emulation; None where it was not built (HALFBYTE_EMULATE=ON)."""
    try:
        return importlib.import_module(f"halfbyte_emulate.warp{lanes}._C")
    except ImportError:
        return None


def backend(lanes: int) -> halfbyte.Backend:
    class Emulated(halfbyte.Backend):
        name = f"emulated{lanes}"
        device_types = frozenset({"cpu"})
        priority = -1

        def why_not(self) -> tuple[str, ...]:
            return () if module(lanes) else ("built without HALFBYTE_EMULATE=ON",)

        def kernels(self) -> Iterable[halfbyte.Kernel]:
            yield from native_gpu.kernels(module(lanes))
            yield from native_gpu_optimizer.kernels(module(lanes))

    return Emulated()


def offer() -> None:
    for lanes in LANES:
        its = backend(lanes)
        if its.name not in dispatcher.plugins.backends:
            hook = halfbyte.hookimpl(lambda its=its: [its])
            dispatcher.plugins.add(its.name, its.name, lambda hook=hook: SimpleNamespace(halfbyte_backends=hook))
    dispatcher.forget()


def pytest_configure(config: Any) -> None:
    offer()
