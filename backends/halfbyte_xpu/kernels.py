"""The kernels of the SYCL module, on any device that its runtime shows: also what tests run on the CPU."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterable
from typing import Any

from halfbyte import native_gpu, native_gpu_optimizer
from halfbyte.errors import KernelUnusable
from halfbyte.kernel import Kernel

from . import _C

REFUSED = "SYCL cannot compile"  # how csrc/sycl/runtime.cpp begins


def all_kernels(lanes: int, *, optimized: bool = True) -> Iterable[Kernel]:
    """Kernels for sub-groups of 16 or 32 lanes; 0 for 32 where the device has it, else 16."""
    _C.set_options(lanes, optimized)
    for kernel in (*native_gpu.kernels(_C), *native_gpu_optimizer.kernels(_C)):
        yield dataclasses.replace(kernel, function=falling_through(kernel.function))


def falling_through(function: Callable[..., Any]) -> Callable[..., Any]:
    """A kernel that leaves the call to the next backend where its source does not compile for the device.

    Every op launches last what writes to its arguments, so by then nothing has been written.
    """

    @functools.wraps(function)
    def call(*args: Any) -> Any:
        try:
            return function(*args)
        except RuntimeError as error:
            if not str(error).startswith(REFUSED):
                raise
            raise KernelUnusable(str(error)) from error

    return call
