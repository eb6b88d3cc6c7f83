"""Compiling the kernels ahead of time: what their adapters would launch, for a GPU that is not here.

`launches(function, *args)` runs an adapter on meta tensors and records its launches; `compile(launch, target)` gives
the machine code of one.  Needs a process in which TRITON_INTERPRET is not set.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from halfbyte_triton import launch as launching

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx90a": GPUTarget("hip", "gfx90a", 64),
    "gfx942": GPUTarget("hip", "gfx942", 64),
    "gfx1100": GPUTarget("hip", "gfx1100", 32),
    "gfx1201": GPUTarget("hip", "gfx1201", 32),
}
_TYPES = {
    torch.float32: "*fp32",
    torch.float16: "*fp16",
    torch.bfloat16: "*bf16",
    torch.uint8: "*u8",
    torch.int8: "*i8",
    torch.int32: "*i32",
    torch.int64: "*i64",
    torch.float64: "*fp64",
    torch.bool: "*i1",
}
_OPTIONS = ("num_warps", "num_stages", "enable_fp_fusion", "maxnreg")


@dataclass(frozen=True)
class Launch:
    """One launch that an adapter would make."""

    kernel: Any
    args: tuple[Any, ...]
    options: dict[str, Any]


def launches(arch: str, function: Callable[..., Any], *args: Any) -> list[Launch]:
    """The launches of one call on tensors of the meta device, taken for a GPU of that arch."""
    found: list[Launch] = []

    def record(kernel: Any, grid: Any, device: torch.device, *args: Any, **options: Any) -> None:
        found.append(Launch(kernel, args, options))

    with patched(arch, record):
        function(*args)
    return found


class patched:
    """The launcher's view of the machine, for a while."""

    def __init__(self, arch: str, record: Callable[..., None]) -> None:
        self._own = {"arch": lambda device: arch, "processors": lambda device: 132, "launch": record}

    def __enter__(self) -> None:
        import sys

        self._before = []
        for module in [one for name, one in sys.modules.items() if name.startswith("halfbyte_triton.")]:
            for name, value in self._own.items():
                if name in vars(module):
                    self._before.append((module, name, vars(module)[name]))
                    setattr(module, name, value)
        launching.config.cache_clear()
        launching.is_nvidia.cache_clear()

    def __exit__(self, *exc: object) -> None:
        for module, name, value in self._before:
            setattr(module, name, value)
        launching.config.cache_clear()
        launching.is_nvidia.cache_clear()


def compile(launch: Launch, arch: str) -> dict[str, Any]:
    """Machine code and the stages before it: "ptx" and "cubin", or "amdgcn" and "hsaco"."""
    names = launch.kernel.arg_names
    options = {name: value for name, value in launch.options.items() if name in _OPTIONS}
    constants = {name: value for name, value in launch.options.items() if name not in _OPTIONS}
    signature: dict[str, str] = dict.fromkeys(constants, "constexpr")
    attributes = {}
    for place, (name, value) in enumerate(zip(names, launch.args)):
        if hasattr(value, "block_shape"):  # a descriptor
            signature[name] = f"tensordesc<{_TYPES[value.base.dtype][1:]}{list(value.block_shape)},{value.layout!r}>"
        elif isinstance(value, torch.Tensor):
            signature[name] = _TYPES[value.dtype]
            attributes[place,] = [["tt.divisibility", 16]]
        elif isinstance(value, float):
            signature[name] = "fp32"
        elif value == 1:  # as the launcher does
            signature[name] = "constexpr"
            constants[name] = 1
        else:
            signature[name] = "i32" if -(2**31) <= value < 2**31 else "i64"
            if value % 16 == 0:
                attributes[place,] = [["tt.divisibility", 16]]
    ordered = {name: signature[name] for name in names}
    source = _source_of(launch.kernel)(fn=launch.kernel, signature=ordered, constexprs=constants, attrs=attributes)
    assembly: dict[str, Any] = triton.compile(source, target=TARGETS[arch], options=options).asm
    return assembly


def _source_of(kernel: Any) -> Any:
    if not hasattr(kernel, "is_gluon") or not kernel.is_gluon():
        return ASTSource
    from triton.experimental.gluon._runtime import GluonASTSource

    return GluonASTSource
