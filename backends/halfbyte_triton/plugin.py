"""The Triton backend: every op for NVIDIA, AMD and Intel GPUs, compiled when it is first called."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch

import halfbyte
from halfbyte import probe
from halfbyte.backend import Backend, DeviceFacts
from halfbyte.errors import BackendUnavailable
from halfbyte.kernel import Kernel
from halfbyte.native import OPTIMIZERS

OLDEST = (3, 2)
LARGEST_BLOCK = 8192  # elements that one program holds in registers

_FLOATS = {torch.float32, torch.float16, torch.bfloat16}
_FOURBIT = {"format": {"nf4", "fp4"}, "blocksize": {32, 64, 128, 256, 512, 1024, 2048, 4096}, "dtype": _FLOATS}


class TritonBackend(Backend):
    """One source of kernels for all vendors that the installed Triton has a driver for."""

    name = "triton"
    device_types = frozenset({"cuda", "xpu"})
    priority = 60

    def why_not(self) -> tuple[str, ...]:
        if importlib.util.find_spec("triton") is None:
            return ("triton is not installed",)
        version = _version()
        if version < OLDEST:
            return (f"needs triton {_dotted(OLDEST)} or newer, {_dotted(version)} is installed",)
        if not (torch.version.cuda or torch.version.hip or getattr(torch.version, "xpu", None)):
            return (f"torch {torch.__version__} is built for no GPU",)
        return ()

    def why_not_device(self, device: DeviceFacts) -> tuple[str, ...]:
        if device.cc is not None and device.cc < (7, 5):
            return (f"needs sm_75 or newer, {device} is {device.arch}",)
        return ()

    def kernels(self) -> Iterable[Kernel]:
        _require_driver()
        yield from all_kernels()


def all_kernels() -> Iterable[Kernel]:
    """The kernels, whatever drivers there are: also what tests run in Triton's interpreter."""
    from . import eightbit, fourbit, int8, linear4bit, optimizer

    functions: Mapping[str, tuple[Callable[..., Any], Mapping[str, Any]]] = {
        "quantize_4bit": (fourbit.quantize_4bit, _FOURBIT),
        "dequantize_4bit": (fourbit.dequantize_4bit, _FOURBIT),
        "linear_4bit": (linear4bit.linear_4bit, _FOURBIT),
        "linear_4bit_backward": (linear4bit.linear_4bit_backward, _FOURBIT),
        "quantize_8bit": (eightbit.quantize_8bit, {"dtype": _FLOATS}),
        "dequantize_8bit": (eightbit.dequantize_8bit, {"dtype": _FLOATS}),
        "quantize_int8_rows": (int8.quantize_int8_rows, {"dtype": _FLOATS}),
        "dequantize_int8": (int8.dequantize_int8, {"dtype": _FLOATS, "source": {torch.int8, torch.int32}}),
        "matmul_int8": (int8.matmul_int8, {}),
        "update_32bit": (optimizer.update_32bit, {"dtype": _FLOATS, "optimizer": set(OPTIMIZERS)}),
        "update_8bit": (optimizer.update_8bit, {"dtype": _FLOATS, "optimizer": set(OPTIMIZERS)}),
        "linear_int8": (int8.linear_int8, {"dtype": _FLOATS, "mode": {"exact", "w8a16"}}),
    }
    for op, (function, limits) in functions.items():
        yield Kernel(op, function, limits=limits, rule=_rule)


def _rule(facts: Any) -> tuple[str, ...]:
    """bfloat16 needs hardware that other dtypes do not; a block has to fit one program."""
    reasons = []
    device = probe.confirmed(facts.device)
    if getattr(facts, "dtype", None) is torch.bfloat16 and device.cc is not None and device.cc < (8, 0):
        reasons.append(f"dtype=bfloat16 needs sm_80 or newer, {device} is {device.arch}")
    if not 1 <= getattr(facts, "blocksize", 1) <= LARGEST_BLOCK:
        reasons.append(f"blocksize={facts.blocksize} (takes 1 to {LARGEST_BLOCK})")
    return tuple(reasons)


def _version() -> tuple[int, ...]:
    """Of the installed Triton, without importing it: "3.6.0" -> (3, 6)."""
    for name in ("triton", "pytorch-triton", "pytorch-triton-rocm", "pytorch-triton-xpu", "triton-xpu", "triton-rocm"):
        try:
            found = re.match(r"(\d+)\.(\d+)", importlib.metadata.version(name))
        except importlib.metadata.PackageNotFoundError:
            continue
        if found:
            return int(found[1]), int(found[2])
    return OLDEST  # not installed as a package: as good as any


def _dotted(version: tuple[int, ...]) -> str:
    return ".".join(map(str, version))


def _require_driver() -> None:
    """Raise where Triton has no driver that goes with a device here: the first question that needs it imported."""
    import triton

    try:
        triton.runtime.driver.active.get_current_target()
    except Exception as error:  # RuntimeError: 0 active drivers; also a missing C compiler
        raise BackendUnavailable(f"triton {triton.__version__} has no active driver: {error}") from error


@halfbyte.hookimpl
def halfbyte_backends() -> Iterable[Backend]:
    yield TritonBackend()
