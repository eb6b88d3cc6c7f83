"""The CPU backend: every op in C++, one kernel per instruction set."""

from __future__ import annotations

import functools
import importlib.util
import os
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch

import halfbyte
from halfbyte.backend import Backend, EnvVar
from halfbyte.kernel import Kernel
from halfbyte.native import OPTIMIZERS

# Lowest first; each includes the ones before it.  CPUs with BF16 dot products have VNNI too.
LEVELS = ("scalar", "avx2", "avx512", "avx512vnni", "avx512bf16")
ISA = "HALFBYTE_CPU_ISA"

_FLOATS = {torch.float32, torch.float16, torch.bfloat16}
_FOURBIT = {"format": {"nf4", "fp4"}, "blocksize": {32, 64, 128, 256, 512, 1024, 2048, 4096}, "dtype": _FLOATS}
_LIMITS: Mapping[str, Mapping[str, Any]] = {
    "quantize_4bit": _FOURBIT,
    "dequantize_4bit": _FOURBIT,
    "linear_4bit": _FOURBIT,
    "linear_4bit_backward": _FOURBIT,
    "quantize_8bit": {"dtype": _FLOATS},
    "dequantize_8bit": {"dtype": _FLOATS},
    "quantize_int8_rows": {"dtype": _FLOATS},
    "dequantize_int8": {"dtype": _FLOATS, "source": {torch.int8, torch.int32}},
    "matmul_int8": {},
    "linear_int8": {"dtype": _FLOATS, "mode": {"exact", "w8a16"}},
    "update_32bit": {"dtype": _FLOATS, "optimizer": set(OPTIMIZERS)},
    "update_8bit": {"dtype": _FLOATS, "optimizer": set(OPTIMIZERS)},
}


class CpuBackend(Backend):
    """AVX2, AVX-512 (VNNI, BF16) and plain C++ as variants of each kernel."""

    name = "cpu"
    device_types = frozenset({"cpu"})
    priority = 40
    env = (EnvVar(ISA, "The highest instruction set that the CPU backend uses.", choices=LEVELS),)

    def why_not(self) -> tuple[str, ...]:
        if importlib.util.find_spec("halfbyte_cpu._C") is None:
            return ("halfbyte_cpu._C is not built: reinstall halfbyte with a C++17 compiler and CMake",)
        highest = os.environ.get(ISA)
        if highest and highest not in LEVELS:
            return (f"{ISA} must be one of {', '.join(LEVELS)}; got {highest!r}",)
        return ()

    def kernels(self) -> Iterable[Kernel]:
        from . import _C, kernels, optimizer  # after torch, whose OpenMP runtime the module shares

        built = _C.levels()
        supported = [level for level in LEVELS if level in built and _C.supports(level)]
        highest = os.environ.get(ISA) or LEVELS[-1]
        for rank, level in enumerate(LEVELS):
            reasons: tuple[str, ...] = ()
            if level not in supported:
                reasons = (f"needs {level}, this CPU has {supported[-1]}",)
            elif rank > LEVELS.index(highest):
                reasons = (f"needs {level}, {ISA}={highest} stops below it",)
            for op, native in built.get(level, {}).items():
                limits = dict(_LIMITS[op])
                if level == "avx512bf16":
                    limits["dtype"] = {torch.bfloat16}
                adapters = optimizer if op.startswith("update_") else kernels
                yield Kernel(
                    op,
                    functools.partial(getattr(adapters, op), native),
                    limits=limits,
                    rule=_always(reasons) if reasons else _RULES.get(op),
                    priority=rank,
                    variant=level,
                )


def _small_blocks(facts: Any) -> tuple[str, ...]:
    if 1 <= facts.blocksize <= 4096:
        return ()
    return (f"blocksize={facts.blocksize} (takes 1 to 4096)",)


_RULES: Mapping[str, Callable[[Any], tuple[str, ...]]] = {"update_8bit": _small_blocks}


def _always(reasons: tuple[str, ...]) -> Callable[[Any], tuple[str, ...]]:
    return lambda facts: reasons


@halfbyte.hookimpl
def halfbyte_backends() -> Iterable[Backend]:
    yield CpuBackend()
