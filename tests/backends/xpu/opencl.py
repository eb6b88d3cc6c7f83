"""A pytest plugin: the SYCL kernels on the CPU's OpenCL device, at 16 and 32 lanes, as backends for CPU tensors.

pytest -p opencl -p halfbyte.testing.plugin --backend opencl32 --pyargs halfbyte.testing.checks
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Iterable
from types import SimpleNamespace
from typing import Any

import halfbyte
from halfbyte._runtime import dispatcher

LANES = (16, 32)


@functools.cache
def why_not() -> tuple[str, ...]:
    """Reasons why this machine cannot run the kernels: a module, a runtime or a device is missing."""
    try:
        module = importlib.import_module("halfbyte_xpu._C")
    except ImportError as error:
        return (f"halfbyte_xpu._C cannot be imported: {error}",)
    return () if module.devices() else ("the SYCL runtime shows no device; OCL_ICD_FILENAMES names libintelocl.so",)


def backend(lanes: int) -> halfbyte.Backend:
    class OpenCL(halfbyte.Backend):
        name = f"opencl{lanes}"
        device_types = frozenset({"cpu"})
        priority = -1

        def why_not(self) -> tuple[str, ...]:
            return why_not()

        def kernels(self) -> Iterable[halfbyte.Kernel]:
            from halfbyte_xpu import kernels

            yield from kernels.all_kernels(lanes, optimized=False)  # a fifth of the time

    return OpenCL()


def offer() -> None:
    for lanes in LANES:
        its = backend(lanes)
        if its.name not in dispatcher.plugins.backends:
            hook = halfbyte.hookimpl(lambda its=its: [its])
            dispatcher.plugins.add(its.name, its.name, lambda hook=hook: SimpleNamespace(halfbyte_backends=hook))
    dispatcher.forget()


def pytest_configure(config: Any) -> None:
    offer()
