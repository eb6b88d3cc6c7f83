"""Launching: the device, what a failed compilation means, and the tuned configurations.

Configurations are data, `tuned.json`: arch -> operation -> bucket -> constants of the kernel.  They are read at the
first launch and never searched for at run time; `python -m halfbyte_triton.tune` measures candidates on a GPU and
writes new ones.
"""

from __future__ import annotations

import functools
import importlib.resources
import json
import re
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import triton
from triton.compiler.errors import CompilationError
from triton.runtime.errors import InterpreterError, OutOfResources, TritonError

from halfbyte import probe
from halfbyte.errors import KernelUnusable

Config = Mapping[str, int]

compile_only = False  # launches only compile: what processes of halfbyte_triton.tune do

# Compilers below Triton's own report failure as RuntimeError, like the driver does for everything.
_REFUSED = re.compile(
    r"PassManager::run failed|no kernel image|image is invalid|ptxas|C compiler|out of resource", re.I
)


def launch(kernel: Any, grid: Sequence[int], device: torch.device, *args: Any, **options: Any) -> None:
    """Run a kernel on the current stream of a device.

    Raises KernelUnusable where it cannot be compiled for, or loaded onto, this device: nothing has been written.
    """
    with _current(device):
        try:
            if compile_only:
                kernel.warmup(*args, grid=tuple(grid), **options)
            else:
                kernel[tuple(grid)](*args, **options)
        except InterpreterError:
            raise
        except (CompilationError, OutOfResources, TritonError) as error:
            raise KernelUnusable(_first_line(error)) from error
        except RuntimeError as error:
            if not _REFUSED.search(str(error)):
                raise
            raise KernelUnusable(_first_line(error)) from error


def _current(device: torch.device) -> AbstractContextManager[Any]:
    """Triton launches on the current device."""
    if device.type == "cuda" and torch.cuda.current_device() != device.index:
        return torch.cuda.device(device)
    if device.type == "xpu" and torch.xpu.current_device() != device.index:
        return torch.xpu.device(device)
    return nullcontext()


def _first_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"Triton {triton.__version__} cannot compile it: {type(error).__name__}: {lines[-1] if lines else 'no text'}"


@functools.cache
def arch(device: torch.device) -> str:
    """What configurations are looked up by: "sm_90", "gfx942"; "cpu" in the interpreter."""
    return probe.confirmed(device).arch if device.type != "cpu" else "cpu"


@functools.cache
def processors(device: torch.device) -> int:
    """How many multiprocessors there are to fill."""
    return probe.confirmed(device).sms or 64


@functools.cache
def is_nvidia(device: torch.device) -> bool:
    return arch(device).startswith("sm_")


@functools.cache
def config(operation: str, bucket: str, device: torch.device) -> Config:
    """The constants to launch an operation with, by arch, then by vendor, then for any GPU."""
    for name in _names(arch(device)):
        found = tuned().get(name, {}).get(operation, {}).get(bucket)
        if found is not None:
            return found
    raise LookupError(f"tuned.json has no {operation} for bucket {bucket!r}")


def _names(name: str) -> list[str]:
    """sm_90 -> sm_90, sm_any, any: a newer chip takes what suits its vendor."""
    return [name, f"{re.sub(r'[0-9].*', '', name)}any", "any"]


@functools.cache
def tuned() -> dict[str, dict[str, dict[str, Config]]]:
    text = (importlib.resources.files(__package__) / "tuned.json").read_text(encoding="utf-8")
    found: dict[str, dict[str, dict[str, Config]]] = json.loads(text)
    return found


def cdiv(a: int, b: int) -> int:
    return -(-a // b)


def power_of_2(n: int) -> int:
    """The smallest power of two that is not below n."""
    return 1 << max(n - 1, 0).bit_length()


def width(dtype: torch.dtype) -> str:
    """Bytes per element, which decide how much one thread should take."""
    return str(dtype.itemsize)


def warps(tuned: Config, tile: int) -> int:
    """The tuned number, more where a block is larger than the tile that it was found for."""
    more: int = tuned["num_warps"] * max(tile // tuned["TILE"], 1)
    return min(more, 8)


def registers(tuned: Config, device: torch.device) -> dict[str, int]:
    """The option that bounds the registers of a thread, so that more threads fit; Triton has it for NVIDIA."""
    most = tuned.get("REGISTERS", 0)
    return {"maxnreg": most} if most and is_nvidia(device) else {}
