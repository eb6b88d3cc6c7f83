"""Adapters and kernels of the portable GPU module, shared by the backends cuda and rocm and by the emulation.

A native module takes addresses, 64-bit sizes, codes of dtypes, then the device and the stream; csrc/gpu/module.cpp
has the order.  The op has checked dtypes and sizes.  Here tensors are made contiguous and aligned, and everything
is allocated, through torch; nothing waits for the device, so that every call can be captured in a graph.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch.nn.functional import linear

from .kernel import Kernel
from .native import DTYPES, FORMATS, address
from .weights import ALIGNMENT, Way

Module: TypeAlias = Any  # a compiled _C


def place(tensor: Tensor) -> tuple[int, int]:
    """The device's index and the address of its current stream; (-1, 0) for CPU tensors, which tests use."""
    if tensor.is_cuda:
        index = tensor.get_device()
        return index, torch._C._cuda_getCurrentRawStream(index)
    if tensor.is_xpu:
        index = tensor.get_device()
        return index, torch.xpu.current_stream(index).sycl_queue
    return -1, 0


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
        constant = *contiguous(packed, absmax, nested_absmax, nested_codebook, offset), format, blocksize
        Weight4(*constant).dequantize(c, out, k=n, columns=n)  # constant keeps copies alive until the launch
    return out


def contiguous(*tensors: Tensor | None) -> tuple[Any, ...]:
    """The tensors themselves, or copies that are contiguous."""
    return tuple([one if one is None else one.contiguous() for one in tensors])


class Weight4:
    """How native functions take a packed 4-bit weight of contiguous tensors, which the caller keeps alive."""

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
        tensors = (packed, absmax, nested_absmax, nested_codebook, offset)
        self.fields = (*map(address, tensors), FORMATS[format], blocksize)

    def dequantize(
        self, c: Module, out: Tensor, *, k: int, row: int = 0, rows: int = 1, column: int = 0, columns: int
    ) -> None:
        """Rows and columns of a matrix with `k` columns into `out`, a new contiguous tensor."""
        c.dequantize_4bit(*self.fields, k, row, rows, column, columns, out.data_ptr(), DTYPES[out.dtype], *place(out))


def linear_4bit(
    c: Module,
    x: Tensor,
    packed: Tensor,
    absmax: Tensor,
    nested_absmax: Tensor | None,
    nested_codebook: Tensor | None,
    offset: Tensor | None,
    bias: Tensor | None,
    format: str,
    blocksize: int,
    out_features: int,
) -> Tensor:
    tensors = contiguous(packed, absmax, nested_absmax, nested_codebook, offset)
    constant = *tensors, format, blocksize, out_features
    return bind_linear_4bit(c, *constant)(x, bias, tensors)


def bind_linear_4bit(
    c: Module,
    packed: Tensor,
    absmax: Tensor,
    nested_absmax: Tensor | None,
    nested_codebook: Tensor | None,
    offset: Tensor | None,
    format: str,
    blocksize: int,
    out_features: int,
) -> Way:
    weight = Weight4(packed, absmax, nested_absmax, nested_codebook, offset, format, blocksize)

    def product(x: Tensor, bias: Tensor | None, tensors: Any) -> Tensor:
        *rows, k = x.shape
        m = math.prod(rows)
        if not (m and out_features):
            return x.new_empty(*rows, out_features)
        if not k:
            return only_bias(x.new_empty(*rows, out_features), bias)
        if m > c.few_rows:
            return linear_dequantized(c, x, weight, bias, out_features)
        x = dense(x)
        if bias is not None:
            bias = bias.contiguous()
        y = x.new_empty(*rows, out_features)
        c.linear_4bit(
            x.data_ptr(),
            DTYPES[x.dtype],
            *weight.fields,
            address(bias),
            m,
            out_features,
            k,
            y.data_ptr(),
            *place(x),
        )
        return y

    return product


def linear_dequantized(c: Module, x: Tensor, weight: Weight4, bias: Tensor | None, out_features: int) -> Tensor:
    """linear_4bit by torch's product."""
    k = x.shape[-1]

    def slab(first: int, end: int) -> Tensor:
        part = x.new_empty(end - first, k)
        weight.dequantize(c, part, k=k, row=first, rows=end - first, columns=k)
        return part

    return by_slabs(x, slab, bias, out_features)


def linear_4bit_backward(
    c: Module,
    dy: Tensor,
    packed: Tensor,
    absmax: Tensor,
    nested_absmax: Tensor | None,
    nested_codebook: Tensor | None,
    offset: Tensor | None,
    format: str,
    blocksize: int,
    in_features: int,
) -> Tensor:
    tensors = contiguous(packed, absmax, nested_absmax, nested_codebook, offset)
    constant = *tensors, format, blocksize, in_features
    return bind_linear_4bit_backward(c, *constant)(dy, None, tensors)


def bind_linear_4bit_backward(
    c: Module,
    packed: Tensor,
    absmax: Tensor,
    nested_absmax: Tensor | None,
    nested_codebook: Tensor | None,
    offset: Tensor | None,
    format: str,
    blocksize: int,
    in_features: int,
) -> Way:
    """dy @ weight by slabs of the weight's columns: each column of dx is one sum, nothing is added up in dtype."""
    weight = Weight4(packed, absmax, nested_absmax, nested_codebook, offset, format, blocksize)

    def product(dy: Tensor, bias: Tensor | None, tensors: Any) -> Tensor:
        *rows, n = dy.shape
        m = math.prod(rows)
        if not (m and in_features and n):
            return dy.new_zeros(*rows, in_features)
        dx = dy.new_empty(*rows, in_features)
        dy, out = dy.contiguous().view(m, n), dx.view(m, in_features)
        size = slab_columns(n, in_features, dy.element_size())
        part, first = dy.new_empty(n, size), 0
        for columns in out.unsafe_split(size, 1):
            count = columns.shape[1]
            if count < size:  # the last one
                part = part.view(-1)[: n * count].view(n, count)
            weight.dequantize(c, part, k=in_features, rows=n, column=first, columns=count)
            torch.mm(dy, part, out=columns)
            first += count
        return dx

    return product


# -- 8 bit ---------------------------------------------------------------------------------------------------


def quantize_8bit(c: Module, x: Tensor, codebook: Tensor, blocksize: int) -> tuple[Tensor, Tensor]:
    x = dense(x)
    codebook = codebook.contiguous()
    n = x.numel()
    codes = x.new_empty(x.shape, dtype=torch.uint8)
    absmax = x.new_empty((n + blocksize - 1) // blocksize, dtype=torch.float32)
    if n:
        c.quantize_8bit(
            x.data_ptr(),
            DTYPES[x.dtype],
            n,
            codebook.data_ptr(),
            blocksize,
            codes.data_ptr(),
            absmax.data_ptr(),
            *place(x),
        )
    return codes, absmax


def dequantize_8bit(
    c: Module, codes: Tensor, absmax: Tensor, codebook: Tensor, blocksize: int, dtype: torch.dtype
) -> Tensor:
    codes = dense(codes)
    absmax = absmax.contiguous()
    codebook = codebook.contiguous()
    out = codes.new_empty(codes.shape, dtype=dtype)
    n = out.numel()
    if n:
        c.dequantize_8bit(
            codes.data_ptr(),
            absmax.data_ptr(),
            codebook.data_ptr(),
            blocksize,
            out.data_ptr(),
            DTYPES[dtype],
            n,
            *place(codes),
        )
    return out


# -- products with slabs of a weight -------------------------------------------------------------------------

# Bytes of a weight that is dequantized at a time.  Slabs of 16 MiB would stay in the L2 cache, but a fine-tuning step
# with four of them per layer waits for the host.
SLAB = 64 << 20
_LEAST = 1 << 20  # a weight of fewer bytes is one slab; of a larger one a backward never has more than half


def _slab_size(count: int, each: int, *, multiple: int, most: int | None = None) -> int:
    """How many of `count` rows or columns of `each` bytes make a slab, in multiples of a number that kernels like.

    most   bytes of one; where it is not given SLAB, and never more than half of all but for very little
    """
    size = (most or min(SLAB, max(_LEAST, count * each // 2))) // each
    return max(multiple, size // multiple * multiple)


def slab_columns(n: int, k: int, itemsize: int) -> int:
    """How many columns of a weight (n, k) a backward dequantizes at a time."""
    return min(k, _slab_size(k, n * itemsize, multiple=64))


def by_slabs(x: Tensor, slab: Callable[[int, int], Tensor], bias: Tensor | None, n: int) -> Tensor:
    """x @ weight^T + bias with torch's product, where slab(first, end) gives some of n rows of the weight in x's dtype.

    Into a given tensor, because autocast would choose the dtype of a new one.
    """
    x = x.contiguous()
    *rows, k = x.shape
    y = x.new_empty(*rows, n)
    if bias is None and n * k * x.element_size() <= SLAB:
        return linear(x, slab(0, n), None, out=y)  # type: ignore[call-arg]  # torch's stub omits it
    x, out = x.view(-1, k), y.view(-1, n)  # of more dimensions torch adds the bias after rounding the product
    size = _slab_size(n, k * x.element_size(), multiple=16, most=SLAB)
    for first, part in zip(range(0, n, size), out.unsafe_split(size, 1), strict=True):
        end = first + part.shape[1]
        linear(x, slab(first, end), bias if bias is None else bias[first:end], out=part)  # type: ignore[call-arg]
    return y


def only_bias(y: Tensor, bias: Tensor | None) -> Tensor:
    """A product over nothing."""
    return y.zero_() if bias is None else y.copy_(bias)


# -- what is declared ----------------------------------------------------------------------------------------

FLOATS = frozenset(DTYPES)
_FOURBIT: Mapping[str, Any] = {
    "format": set(FORMATS),
    "blocksize": {32, 64, 128, 256, 512, 1024, 2048, 4096},
    "dtype": FLOATS,
}
# Adapter, its limits, and how it is bound to a weight.
Declared: TypeAlias = tuple[Callable[..., Any], Mapping[str, Any], Callable[..., Way] | None]
_DECLARED: tuple[Declared, ...] = (
    (quantize_4bit, _FOURBIT, None),
    (dequantize_4bit, _FOURBIT, None),
    (linear_4bit, _FOURBIT, bind_linear_4bit),
    (linear_4bit_backward, _FOURBIT, bind_linear_4bit_backward),
    (quantize_8bit, {"dtype": FLOATS}, None),
    (dequantize_8bit, {"dtype": FLOATS}, None),
)


def kernels(c: Module) -> Iterable[Kernel]:
    """The kernels of a portable module; a backend may yield better ones beside them."""
    from . import native_gpu_int8  # it uses what is above

    for adapter, limits, bind in (*_DECLARED, *native_gpu_int8.DECLARED):
        bound = bind and functools.partial(bind, c)
        yield Kernel(adapter.__name__, functools.partial(adapter, c), limits=limits, bind=bound)
