"""The CUDA backend: kernels of the module that nvcc built, for NVIDIA GPUs."""

from __future__ import annotations

import ctypes
import functools
import importlib.util
import re
from collections.abc import Collection, Iterable, Mapping

import torch

import halfbyte
from halfbyte.backend import Backend, DeviceFacts
from halfbyte.kernel import Kernel

MODULE = "halfbyte_cuda._C"
TENSOR_CORES: Mapping[str, Collection[object]] = {
    "format": {"nf4", "fp4"},
    "blocksize": {64, 128, 256, 512, 1024, 2048, 4096},
    "dtype": {torch.float16, torch.bfloat16},
}
CUBLAS: Mapping[str, Collection[object]] = {**TENSOR_CORES, "blocksize": {32, *TENSOR_CORES["blocksize"]}}
TENSOR_CORES_INT8: Mapping[str, Collection[object]] = {"mode": {"exact"}, "dtype": {torch.float16, torch.bfloat16}}


class CudaBackend(Backend):
    """Runs on the compute capabilities that the module was built for."""

    name = "cuda"
    device_types = frozenset({"cuda"})
    priority = 80

    def why_not(self) -> tuple[str, ...]:
        if torch.version.cuda is None:
            return (f"torch {torch.__version__} is built without CUDA",)
        if importlib.util.find_spec(MODULE) is None:
            return (f"{MODULE} is not built: reinstall halfbyte with nvcc, CUDA 12.4 or newer, on the PATH",)
        if not driver_is_there():
            return ("there is no NVIDIA driver: libcuda.so.1 cannot be loaded",)
        return ()

    def why_not_device(self, device: DeviceFacts) -> tuple[str, ...]:
        if device.cc is None:  # not known before the first op
            return ()
        archs = built_for()
        if runs_on(archs, device.cc):
            return ()
        return (f"halfbyte_cuda was built for {archs.replace(',', ', ')}; {device} is {device.arch}",)

    def kernels(self) -> Iterable[Kernel]:
        from halfbyte import native_gpu, native_gpu_optimizer

        from . import _C, backward4bit, linear4bit, linear8bit

        yield from native_gpu.kernels(_C)
        yield from native_gpu_optimizer.kernels(_C)
        if _C.has_cublas():
            yield Kernel(
                "linear_4bit_backward",
                functools.partial(backward4bit.linear_4bit_backward, _C),
                limits=CUBLAS,
                cc=((8, 0), None),
                priority=10,
                variant="cublas",
                bind=functools.partial(backward4bit.bind_linear_4bit_backward, _C),
            )
        if "90a" in _C.archs():
            yield Kernel(
                "linear_4bit",
                functools.partial(linear4bit.linear_4bit, _C),
                limits=TENSOR_CORES,
                cc=((9, 0), (9, 0)),
                priority=10,
                variant="sm_90a",
                bind=functools.partial(linear4bit.bind_linear_4bit, _C),
            )
            yield Kernel(
                "linear_int8",
                functools.partial(linear8bit.linear_int8, _C),
                limits=TENSOR_CORES_INT8,
                cc=((9, 0), (9, 0)),
                priority=10,
                variant="sm_90a",
                bind=functools.partial(linear8bit.bind_linear_int8, _C),
            )


def built_for() -> str:
    """CMake's list of the architectures in the module."""
    from . import _C

    return _C.archs()


@functools.cache
def driver_is_there() -> bool:
    """Whether the driver's library can be loaded, which initializes nothing."""
    try:
        ctypes.CDLL("libcuda.so.1")
    except OSError:
        return False
    return True


def runs_on(archs: str, cc: tuple[int, int]) -> bool:
    """Whether code built for CMake's list of architectures runs on a compute capability.

    Machine code runs on the same major version from its minor version on, an "a" one on its own chip only, an "f"
    one within its major version; PTX ("-virtual", or without a word) of a plain one runs on everything newer.
    Source: CUDA C++ Programming Guide, section 5 (Compute Capabilities).
    """
    for arch in archs.split(","):
        found = re.fullmatch(r"(\d+)(\d)([af]?)(-real|-virtual)?", arch)
        if found is None:
            continue
        built, special, kind = (int(found[1]), int(found[2])), found[3], found[4]
        if special == "a":
            fits = built == cc
        elif kind == "-virtual":
            fits = built <= cc
        else:
            fits = built[0] == cc[0] and built[1] <= cc[1]
        if fits or (kind is None and not special and built <= cc):
            return True
    return False


@halfbyte.hookimpl
def halfbyte_backends() -> Iterable[Backend]:
    yield CudaBackend()
