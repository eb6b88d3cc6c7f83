"""The XPU backend: the portable GPU kernels, compiled by SYCL at run time, for Intel GPUs."""

from __future__ import annotations

import functools
import importlib.util
import os
import re
from collections.abc import Iterable
from pathlib import Path

import torch

import halfbyte
from halfbyte.backend import Backend, EnvVar
from halfbyte.kernel import Kernel

MODULE = "halfbyte_xpu._C"
LANES = "HALFBYTE_XPU_LANES"
SIZES = ("16", "32")
DRIVER = Path("/dev/dri")
MAPS = Path("/proc/self/maps")

_RUNTIME = re.compile(rb"libsycl\.so\.\d+")


class XpuBackend(Backend):
    """Needs torch's XPU build and the very SYCL runtime that it brings: queues of torch go through the module."""

    name = "xpu"
    device_types = frozenset({"xpu"})
    priority = 70
    env = (
        EnvVar(LANES, "The size of sub-groups that the SYCL kernels are compiled for; 32 by default.", choices=SIZES),
    )

    def why_not(self) -> tuple[str, ...]:
        if not getattr(torch.version, "xpu", None):
            return (f"torch {torch.__version__} is built without XPU",)
        module = _module()
        if module is None:
            return (f"{MODULE} is not built: install the intel-sycl-rt that torch requires, then halfbyte again",)
        if not DRIVER.exists():
            return (f"there is no Intel GPU driver: {DRIVER} does not exist",)
        wanted, loaded = runtime_of(module), runtime_of(MAPS)
        if loaded is None:
            return ("there is no SYCL runtime: torch has loaded no libsycl",)
        if wanted != loaded:
            return (f"{MODULE} was built for {wanted}, torch has loaded {loaded}: install halfbyte again beside it",)
        lanes = os.environ.get(LANES)
        if lanes and lanes not in SIZES:
            return (f"{LANES} must be one of {', '.join(SIZES)}; got {lanes!r}",)
        return ()

    def kernels(self) -> Iterable[Kernel]:
        from . import ipex, kernels

        yield from kernels.all_kernels(int(os.environ.get(LANES) or 0))
        yield Kernel("linear_4bit", ipex.linear_4bit, ipex.LIMITS, rule=ipex.why_not, priority=-10, variant="ipex")


def _module() -> Path | None:
    """The compiled module's file, found without loading it: that needs the runtime."""
    spec = importlib.util.find_spec(MODULE)
    return Path(spec.origin) if spec and spec.origin else None


@functools.lru_cache
def runtime_of(file: Path) -> str | None:
    """ "libsycl.so.9", as a file first says it: a module what it needs, the map of a process what it has loaded."""
    try:
        found = _RUNTIME.search(file.read_bytes())
    except OSError:  # not Linux
        return None
    return found[0].decode() if found else None


@halfbyte.hookimpl
def halfbyte_backends() -> Iterable[Backend]:
    yield XpuBackend()
