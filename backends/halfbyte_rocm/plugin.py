"""The ROCm backend: the portable kernels, built as HIP, for AMD GPUs."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterable
from pathlib import Path

import torch

import halfbyte
from halfbyte.backend import Backend, DeviceFacts
from halfbyte.kernel import Kernel

MODULE = "halfbyte_rocm._C"
DRIVER = Path("/dev/kfd")


class RocmBackend(Backend):
    """Runs on the architectures that the module was built for.  torch calls AMD's devices cuda, too."""

    name = "rocm"
    device_types = frozenset({"cuda"})
    priority = 80

    def why_not(self) -> tuple[str, ...]:
        if torch.version.hip is None:
            return (f"torch {torch.__version__} is built without ROCm",)
        if importlib.util.find_spec(MODULE) is None:
            return (f"{MODULE} is not built: reinstall halfbyte with HIPCXX naming a HIP compiler",)
        if not DRIVER.exists():
            return (f"there is no AMD GPU driver: {DRIVER} does not exist",)
        return ()

    def why_not_device(self, device: DeviceFacts) -> tuple[str, ...]:
        if not device.arch:  # not known before the first op
            return ()
        archs = built_for().split(",")
        # "gfx90a:sramecc+" is built for one setting of a feature that gfx90a has.
        if device.arch in (arch.partition(":")[0] for arch in archs):
            return ()
        return (f"halfbyte_rocm was built for {', '.join(archs)}; {device} is {device.arch}",)

    def kernels(self) -> Iterable[Kernel]:
        from halfbyte import native_gpu, native_gpu_optimizer

        from . import _C

        yield from native_gpu.kernels(_C)
        yield from native_gpu_optimizer.kernels(_C)


def built_for() -> str:
    """CMake's list of the architectures in the module."""
    from . import _C

    return _C.archs()


@halfbyte.hookimpl
def halfbyte_backends() -> Iterable[Backend]:
    yield RocmBackend()
