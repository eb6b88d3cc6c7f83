"""Launching: the device, what a failed compilation means, and the tuned configurations.

Configurations are data, `tuned.json`: arch -> operation -> bucket -> constants of the kernel.  They are read at the
first launch and never searched for at run time; `python -m halfbyte_triton.tune` measures candidates on a GPU and
prints new ones.
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
        found = _tuned().get(name, {}).get(operation, {}).get(bucket)
        if found is not None:
            return found
    raise LookupError(f"tuned.json has no {operation} for bucket {bucket!r}")


def _names(name: str) -> list[str]:
    """sm_90 -> sm_90, sm_any, any: a newer chip takes what suits its vendor."""
    return [name, f"{re.sub(r'[0-9].*', '', name)}any", "any"]


@functools.cache
def _tuned() -> dict[str, dict[str, dict[str, Config]]]:
    text = (importlib.resources.files(__package__) / "tuned.json").read_text(encoding="utf-8")
    found: dict[str, dict[str, dict[str, Config]]] = json.loads(text)
    return found


def cdiv(a: int, b: int) -> int:
    return -(-a // b)


def power_of_2(n: int) -> int:
    """The smallest power of two that is not below n."""
    return 1 << max(n - 1, 0).bit_length()
