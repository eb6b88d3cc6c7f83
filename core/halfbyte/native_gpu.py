"""Adapters and kernels of the portable GPU module, shared by the backends cuda and rocm and by the emulation.

A native module takes addresses, 64-bit sizes, codes of dtypes, then the device and the stream; csrc/gpu/module.cpp
has the order.  The op has checked dtypes and sizes.  Here tensors are made contiguous and aligned, and everything
is allocated, through torch; nothing waits for the device, so that every call can be captured in a graph.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor

from .kernel import Kernel
from .native import DTYPES, FORMATS, address

Module: TypeAlias = Any  # a compiled _C

ALIGNMENT = 16  # bytes: what the widest access of a kernel wants


def place(tensor: Tensor) -> tuple[int, int]:
    """The device's index and the address of its current stream; (-1, 0) for the emulation's CPU tensors."""
    if not tensor.is_cuda:
        return -1, 0
    index = tensor.get_device()
    return index, torch._C._cuda_getCurrentRawStream(index)


def dense(tensor: Tensor) -> Tensor:
    """The tensor itself where it is contiguous and aligned; else a copy that is."""
    tensor = tensor.contiguous()
    return tensor if tensor.data_ptr() % ALIGNMENT == 0 else tensor.clone()


def quantize_4bit(c: Module, x: Tensor, format: str, blocksize: int) -> tuple[Tensor, Tensor]:
    x = dense(x)
    n = x.numel()
    packed = x.new_empty((n + 1) // 2, dtype=torch.uint8)
    absmax = x.new_empty((n + blocksize - 1) // blocksize, dtype=torch.float32)
    if n:
        c.quantize_4bit(
            x.data_ptr(),
            DTYPES[x.dtype],
            n,
            FORMATS[format],
            blocksize,
            packed.data_ptr(),
            absmax.data_ptr(),
            *place(x),
        )
    return packed, absmax


def dequantize_4bit(
    c: Module,
    packed: Tensor,
    absmax: Tensor,
    nested_absmax: Tensor | None,
    nested_codebook: Tensor | None,
    offset: Tensor | None,
    format: str,
    blocksize: int,
    shape: Sequence[int],
    dtype: torch.dtype,
) -> Tensor:
    out = packed.new_empty(shape, dtype=dtype)
    n = out.numel()
    if n:
        weight = Weight4(packed, absmax, nested_absmax, nested_codebook, offset, format, blocksize)
        weight.dequantize(c, out, k=n, columns=n)
    return out


class Weight4:
    """The tensors of a packed 4-bit weight, contiguous and kept alive, and how native functions take them."""

    def __init__(
        self,
        packed: Tensor,
        absmax: Tensor,
        nested_absmax: Tensor | None,
        nested_codebook: Tensor | None,
        offset: Tensor | None,
        format: str,
        blocksize: int,
    ) -> None:
        if nested_absmax is not None and nested_codebook is not None:
            nested_absmax, nested_codebook = nested_absmax.contiguous(), nested_codebook.contiguous()
        tensors = (packed.contiguous(), absmax.contiguous(), nested_absmax, nested_codebook, offset)
        self._kept_alive = tensors
        self.fields = (*map(address, tensors), FORMATS[format], blocksize)

    def dequantize(
        self, c: Module, out: Tensor, *, k: int, row: int = 0, rows: int = 1, column: int = 0, columns: int
    ) -> None:
        """Rows and columns of a matrix with `k` columns into `out`, a new contiguous tensor."""
        c.dequantize_4bit(*self.fields, k, row, rows, column, columns, out.data_ptr(), DTYPES[out.dtype], *place(out))


# -- what is declared ----------------------------------------------------------------------------------------

_FLOATS = frozenset(DTYPES)
_FOURBIT: Mapping[str, Any] = {
    "format": set(FORMATS),
    "blocksize": {32, 64, 128, 256, 512, 1024, 2048, 4096},
    "dtype": _FLOATS,
}
_KERNELS: tuple[tuple[Callable[..., Any], Mapping[str, Any]], ...] = (
    (quantize_4bit, _FOURBIT),
    (dequantize_4bit, _FOURBIT),
)


def kernels(c: Module) -> Iterable[Kernel]:
    """The kernels of a portable module; a backend may yield better ones beside them."""
    for adapter, limits in _KERNELS:
        yield Kernel(adapter.__name__, functools.partial(adapter, c), limits=limits)
