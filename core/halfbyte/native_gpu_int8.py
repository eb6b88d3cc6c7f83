"""Adapters of LLM.int8() of the portable GPU module; native_gpu says what a native module takes."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from .native import DTYPES, address
from .native_gpu import FLOATS, Declared, Module, by_slabs, contiguous, dense, only_bias, place
from .weights import Way


def quantize_int8_rows(c: Module, x: Tensor, threshold: float) -> tuple[Tensor, Tensor, Tensor]:
    return _quantized_rows(c, dense(x), threshold, clear=True)


def _quantized_rows(c: Module, x: Tensor, threshold: float, *, clear: bool) -> tuple[Tensor, Tensor, Tensor]:
    """q, absmax, outlier columns; only where `clear` are those columns 0 in q."""
    *rows, k = x.shape
    m = math.prod(rows)
    q = x.new_empty(x.shape, dtype=torch.int8)
    if not (m and k):
        return q, x.new_zeros(m, dtype=torch.float32), x.new_zeros(k, dtype=torch.bool)
    absmax = x.new_empty(m, dtype=torch.float32)
    outlier_columns = x.new_empty(k, dtype=torch.bool)
    c.quantize_int8_rows(
        x.data_ptr(),
        DTYPES[x.dtype],
        m,
        k,
        threshold,
        clear,
        q.data_ptr(),
        absmax.data_ptr(),
        outlier_columns.data_ptr(),
        *place(x),
    )
    return q, absmax, outlier_columns


def dequantize_int8(
    c: Module,
    q: Tensor,
    row_absmax: Tensor,
    col_absmax: Tensor | None,
    bias: Tensor | None,
    dtype: torch.dtype,
) -> Tensor:
    q = q.contiguous()
    row_absmax = row_absmax.contiguous()
    if col_absmax is not None:
        col_absmax = col_absmax.contiguous()
    if bias is not None:
        bias = bias.float().contiguous()
    out = q.new_empty(q.shape, dtype=dtype)
    if out.numel():
        *rows, n = q.shape
        c.dequantize_int8(
            q.data_ptr(),
            q.dtype is torch.int32,
            row_absmax.data_ptr(),
            address(col_absmax),
            address(bias),
            out.data_ptr(),
            DTYPES[dtype],
            math.prod(rows),
            n,
            *place(q),
        )
    return out


def matmul_int8(c: Module, a: Tensor, b: Tensor) -> Tensor:
    a = a.contiguous()
    b = b.contiguous()
    m, k = a.shape
    n = b.shape[0]
    out = a.new_empty((m, n), dtype=torch.int32)
    if not (m and n):
        return out
    if not k:
        return out.zero_()
    if a.is_cuda and _library_multiplies(m, n, k):
        return torch._int_mm(a, b.t())
    c.matmul_int8(a.data_ptr(), b.data_ptr(), m, n, k, out.data_ptr(), *place(a))
    return out


def linear_int8(
    c: Module,
    x: Tensor,
    weight: Tensor,
    weight_absmax: Tensor,
    bias: Tensor | None,
    threshold: float,
    mode: str,
) -> Tensor:
    tensors = contiguous(weight, weight_absmax)
    constant = *tensors, threshold, mode
    return bind_linear_int8(c, *constant)(x, bias, tensors)


def bind_linear_int8(c: Module, weight: Tensor, weight_absmax: Tensor, threshold: float, mode: str) -> Way:
    exact, n, fields = mode == "exact", weight.shape[0], (weight.data_ptr(), weight_absmax.data_ptr())

    def product(x: Tensor, bias: Tensor | None, tensors: tuple[Any, ...]) -> Tensor:
        weight, weight_absmax = tensors
        x = dense(x)
        if bias is not None:
            bias = bias.contiguous()
        *rows, k = x.shape
        m = math.prod(rows)
        if exact and x.is_cuda and x.dtype is not torch.float32 and _library_multiplies(m, n, k):
            return exact_by_library(c, x.view(m, k), weight, weight_absmax, bias, threshold).view(*rows, n)
        if not (m and n):
            return x.new_empty(*rows, n)
        if not k:
            return only_bias(x.new_empty(*rows, n), bias)
        if m > c.few_rows and not exact:
            return by_slabs(
                x,
                lambda first, end: dequantize_int8(c, weight[first:end], weight_absmax[first:end], None, None, x.dtype),
                bias,
                n,
            )
        y = x.new_empty(*rows, n)
        layer = (*fields, address(bias), m, n, k, y.data_ptr(), *place(x))
        if exact:
            workspace = x.new_empty(c.int8_workspace(m, k), dtype=torch.uint8)
            c.linear_int8_exact(x.data_ptr(), DTYPES[x.dtype], threshold, workspace.data_ptr(), *layer)
        else:
            c.linear_int8_w8a16(x.data_ptr(), DTYPES[x.dtype], *layer)
        return y

    return product


def _library_multiplies(m: int, n: int, k: int) -> bool:
    """Whether torch's int8 product takes the size (it wants multiples) and has tensor cores' work to do."""
    return m > 16 and min(n, k) > 0 and not (n % 16 or k % 16)


def exact_by_library(
    c: Module, x: Tensor, weight: Tensor, weight_absmax: Tensor, bias: Tensor | None, threshold: float
) -> Tensor:
    """linear_int8 of many rows with torch's int8 product; which columns have outliers stays on the device."""
    m, k = x.shape
    n = weight.shape[0]
    q, absmax, outlier_columns = _quantized_rows(c, x, threshold, clear=True)
    listed, size = None, 0
    if threshold > 0:
        listed = x.new_empty(k + 1, dtype=torch.int32)  # the count is the last one
        size = listed.data_ptr() + 4 * k
        c.list_columns(outlier_columns.data_ptr(), k, listed.data_ptr(), size, *place(x))
    sums = torch._int_mm(q, weight.t())
    y = x.new_empty((m, n))
    c.scale_int8(
        x.data_ptr(),
        DTYPES[x.dtype],
        absmax.data_ptr(),
        address(listed),
        size,
        sums.data_ptr(),
        weight.data_ptr(),
        weight_absmax.data_ptr(),
        address(bias),
        m,
        n,
        k,
        y.data_ptr(),
        *place(x),
    )
    return y


DECLARED: tuple[Declared, ...] = (
    (quantize_int8_rows, {"dtype": FLOATS}, None),
    (dequantize_int8, {"dtype": FLOATS, "source": {torch.int8, torch.int32}}, None),
    (matmul_int8, {}, None),
    (linear_int8, {"dtype": FLOATS, "mode": {"exact", "w8a16"}}, bind_linear_int8),
)
