"""The Triton kernels in Triton's interpreter, as a backend for CPU tensors: a pytest plugin for the kit.

    TRITON_INTERPRET=1 pytest -p halfbyte.testing.plugin -p interpreted --backend triton_interpreted \
        --pyargs halfbyte.testing.checks
"""

from __future__ import annotations

import dataclasses
import os
import threading
from collections.abc import Callable, Iterable
from types import SimpleNamespace
from typing import Any

import numpy as np

import halfbyte
from halfbyte._runtime import dispatcher
from halfbyte_triton import plugin


class InterpretedBackend(halfbyte.Backend):
    name = "triton_interpreted"
    device_types = frozenset({"cpu"})
    priority = -1

    def why_not(self) -> tuple[str, ...]:
        return () if os.environ.get("TRITON_INTERPRET") == "1" else ("TRITON_INTERPRET is not 1",)

    def kernels(self) -> Iterable[halfbyte.Kernel]:
        for kernel in plugin.all_kernels():
            limits = dict(kernel.limits)
            if "blocksize" in limits:  # fewer, to stay quick: each is the same kernel with another constant
                limits["blocksize"] = {32, 64, 256, 4096}
            if kernel.op == "update_8bit":
                limits["blocksize"] = {100, 256}
            yield dataclasses.replace(kernel, limits=limits, function=_quiet(kernel.function))


_one_at_a_time = threading.Lock()  # the interpreter patches the language while a kernel runs


def _quiet(function: Callable[..., Any]) -> Callable[..., Any]:
    """numpy, which computes in the interpreter, warns where a GPU gives infinity or NaN."""

    def call(*args: Any) -> Any:
        with _one_at_a_time, np.errstate(all="ignore"):
            return function(*args)

    return call


offered = SimpleNamespace(halfbyte_backends=halfbyte.hookimpl(lambda: [InterpretedBackend()]))
dispatcher.plugins.add(InterpretedBackend.name, "tests", lambda: offered)
