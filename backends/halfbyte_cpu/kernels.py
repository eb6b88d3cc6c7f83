"""Tensor -> pointer adapters: one function per op, its first argument the native function of one level.

The op has checked dtypes and sizes.  Here tensors are made contiguous and results allocated; empty results never
reach native code.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TypeAlias

import torch
from torch import Tensor

from halfbyte.native import DTYPES, FORMATS, address, threads

Native: TypeAlias = Callable[..., None]


def quantize_4bit(native: Native, x: Tensor, format: str, blocksize: int) -> tuple[Tensor, Tensor]:
    x = x.contiguous()
    n = x.numel()
    packed = x.new_empty((n + 1) // 2, dtype=torch.uint8)
    absmax = x.new_empty((n + blocksize - 1) // blocksize, dtype=torch.float32)
    if n:
        native(
            x.data_ptr(),
            DTYPES[x.dtype],
            n,
            FORMATS[format],
            blocksize,
            packed.data_ptr(),
            absmax.data_ptr(),
            threads(),
        )
    return packed, absmax


def dequantize_4bit(
    native: Native,
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
        packed, absmax, nested_absmax, nested_codebook = _contiguous(packed, absmax, nested_absmax, nested_codebook)
        native(
            packed.data_ptr(),
            absmax.data_ptr(),
            address(nested_absmax),
            address(nested_codebook),
            address(offset),
            FORMATS[format],
            blocksize,
            out.data_ptr(),
            DTYPES[dtype],
            n,
            threads(),
        )
    return out


def linear_4bit(
    native: Native,
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
    x = x.contiguous()
    *rows, k = x.shape
    m = math.prod(rows)
    y = x.new_empty((*rows, out_features))
    if not (m and out_features):
        return y
    if not k:
        return _only_bias(y, bias)
    packed, absmax, nested_absmax, nested_codebook = _contiguous(packed, absmax, nested_absmax, nested_codebook)
    if bias is not None:
        bias = bias.contiguous()
    native(
        x.data_ptr(),
        DTYPES[x.dtype],
        packed.data_ptr(),
        absmax.data_ptr(),
        address(nested_absmax),
        address(nested_codebook),
        address(offset),
        FORMATS[format],
        blocksize,
        address(bias),
        m,
        out_features,
        k,
        y.data_ptr(),
        threads(),
    )
    return y


def linear_4bit_backward(
    native: Native,
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
    dy = dy.contiguous()
    *rows, n = dy.shape
    m = math.prod(rows)
    dx = dy.new_empty((*rows, in_features))
    if not (m and in_features):
        return dx
    if not n:
        return dx.zero_()
    packed, absmax, nested_absmax, nested_codebook = _contiguous(packed, absmax, nested_absmax, nested_codebook)
    native(
        dy.data_ptr(),
        DTYPES[dy.dtype],
        packed.data_ptr(),
        absmax.data_ptr(),
        address(nested_absmax),
        address(nested_codebook),
        address(offset),
        FORMATS[format],
        blocksize,
        m,
        n,
        in_features,
        dx.data_ptr(),
        threads(),
    )
    return dx


def quantize_8bit(native: Native, x: Tensor, codebook: Tensor, blocksize: int) -> tuple[Tensor, Tensor]:
    x = x.contiguous()
    codebook = codebook.contiguous()
    n = x.numel()
    codes = x.new_empty(x.shape, dtype=torch.uint8)
    absmax = x.new_empty((n + blocksize - 1) // blocksize, dtype=torch.float32)
    if n:
        native(
            x.data_ptr(),
            DTYPES[x.dtype],
            n,
            codebook.data_ptr(),
            blocksize,
            codes.data_ptr(),
            absmax.data_ptr(),
            threads(),
        )
    return codes, absmax


def dequantize_8bit(
    native: Native, codes: Tensor, absmax: Tensor, codebook: Tensor, blocksize: int, dtype: torch.dtype
) -> Tensor:
    codes = codes.contiguous()
    absmax = absmax.contiguous()
    codebook = codebook.contiguous()
    out = codes.new_empty(codes.shape, dtype=dtype)
    n = out.numel()
    if n:
        native(
            codes.data_ptr(),
            absmax.data_ptr(),
            codebook.data_ptr(),
            blocksize,
            out.data_ptr(),
            DTYPES[dtype],
            n,
            threads(),
        )
    return out


def quantize_int8_rows(native: Native, x: Tensor, threshold: float) -> tuple[Tensor, Tensor, Tensor]:
    x = x.contiguous()
    *rows, k = x.shape
    m = math.prod(rows)
    q = x.new_empty(x.shape, dtype=torch.int8)
    if not (m and k):
        return q, x.new_zeros(m, dtype=torch.float32), x.new_zeros(k, dtype=torch.bool)
    absmax = x.new_empty(m, dtype=torch.float32)
    outlier_columns = x.new_empty(k, dtype=torch.bool)
    native(
        x.data_ptr(),
        DTYPES[x.dtype],
        m,
        k,
        threshold,
        q.data_ptr(),
        absmax.data_ptr(),
        outlier_columns.data_ptr(),
        threads(),
    )
    return q, absmax, outlier_columns


def dequantize_int8(
    native: Native,
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
        native(
            q.data_ptr(),
            q.dtype is torch.int32,
            row_absmax.data_ptr(),
            address(col_absmax),
            address(bias),
            out.data_ptr(),
            DTYPES[dtype],
            math.prod(rows),
            n,
            threads(),
        )
    return out


def matmul_int8(native: Native, a: Tensor, b: Tensor) -> Tensor:
    a = a.contiguous()
    b = b.contiguous()
    m, k = a.shape
    n = b.shape[0]
    out = a.new_empty((m, n), dtype=torch.int32)
    if not (m and n):
        return out
    if not k:
        return out.zero_()
    native(a.data_ptr(), b.data_ptr(), m, n, k, out.data_ptr(), threads())
    return out


def linear_int8(
    native: Native,
    x: Tensor,
    weight: Tensor,
    weight_absmax: Tensor,
    bias: Tensor | None,
    threshold: float,
    mode: str,
) -> Tensor:
    x = x.contiguous()
    weight = weight.contiguous()
    weight_absmax = weight_absmax.contiguous()
    if bias is not None:
        bias = bias.contiguous()
    *rows, k = x.shape
    m = math.prod(rows)
    n = weight.shape[0]
    y = x.new_empty((*rows, n))
    if not (m and n):
        return y
    if not k:
        return _only_bias(y, bias)
    native(
        x.data_ptr(),
        DTYPES[x.dtype],
        weight.data_ptr(),
        weight_absmax.data_ptr(),
        address(bias),
        threshold,
        mode == "exact",
        m,
        n,
        k,
        y.data_ptr(),
        threads(),
    )
    return y


def _only_bias(y: Tensor, bias: Tensor | None) -> Tensor:
    """A product over nothing."""
    return y.zero_() if bias is None else y.copy_(bias)


def _contiguous(
    packed: Tensor, absmax: Tensor, nested_absmax: Tensor | None, nested_codebook: Tensor | None
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    if nested_absmax is not None and nested_codebook is not None:
        nested_absmax, nested_codebook = nested_absmax.contiguous(), nested_codebook.contiguous()
    return packed.contiguous(), absmax.contiguous(), nested_absmax, nested_codebook
