"""LLM.int8(): int8 rows, their integer product, and the linear layer with outlier columns.

Rows        a program takes one row or a few, in pieces; with a threshold a first pass finds the outlier columns.
Product     int8 dot in int32, exact; scales, outliers and bias are added in float32 to the sum, and rounded once.
Outliers    the columns of x that hold one are multiplied in float32: a list of them, made on the device, is walked
            by every program, so that nothing waits for the host.
Agrees      bit for bit with the reference in quantize_int8_rows, dequantize_int8 and matmul_int8.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from halfbyte.ops import int8 as reference

from .launch import cdiv, config, launch, power_of_2, width
from .linear4bit import product, shares_of, sum_shares
from .pieces import INTERPRETED, MAGIC, or_zero, rounded, widened

# -- rows ----------------------------------------------------------------------------------------------------


@triton.jit
def _magnitude(x, threshold, OUTLIERS: tl.constexpr):
    """|x| of what enters the row's maximum, which leaves NaN out."""
    size = tl.abs(x)
    if INTERPRETED:
        size = or_zero(size)
    if OUTLIERS:
        size = tl.where(size >= threshold, 0.0, size)
    return size


@triton.jit
def _quantized(x, scale):
    """rint(x * scale) in -127 .. 127; NaN gives 0."""
    scaled = x * scale
    scaled = tl.where(scaled == scaled, scaled, 0.0)
    scaled = tl.minimum(tl.maximum(scaled, -127.0), 127.0)
    return (scaled + MAGIC).to(tl.int32, bitcast=True).to(tl.int8)


@triton.jit
def rows_kernel(
    x_ptr,
    q_ptr,
    absmax_ptr,
    columns_ptr,
    threshold,
    M,
    K: tl.constexpr,
    ROWS: tl.constexpr,
    PIECE: tl.constexpr,
    OUTLIERS: tl.constexpr,
    QUANTIZE: tl.constexpr,
    ALIGNED: tl.constexpr,
):
    """Row maxima; then the codes, or with OUTLIERS the columns where some value reaches the threshold."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    valid = (row < M)[:, None]
    start = (row * K)[:, None]
    column = tl.arange(0, PIECE)[None, :]
    largest = tl.zeros([ROWS], tl.float32)
    if K <= PIECE:  # once through: the row stays in registers
        inside = valid if ALIGNED else valid & (column < K)
        x = widened(tl.load(x_ptr + start + column, mask=inside, other=0.0))
        largest = or_zero(tl.max(_magnitude(x, threshold, OUTLIERS), axis=1))
        if OUTLIERS:
            found = tl.max((tl.abs(x) >= threshold).to(tl.int32), axis=0)
            tl.store(columns_ptr + tl.arange(0, PIECE), 1, mask=(found != 0) & (tl.arange(0, PIECE) < K))
    else:
        for begin in range(0, K, PIECE):
            inside = valid if ALIGNED else valid & (column < K - begin)
            x = widened(tl.load(x_ptr + start + begin + column, mask=inside, other=0.0))
            largest = tl.maximum(largest, tl.max(_magnitude(x, threshold, OUTLIERS), axis=1))
            if OUTLIERS:
                found = tl.max((tl.abs(x) >= threshold).to(tl.int32), axis=0)
                at = begin + tl.arange(0, PIECE)
                tl.store(columns_ptr + at, 1, mask=(found != 0) & (at < K))
    tl.store(absmax_ptr + row, largest, mask=row < M)
    if QUANTIZE:
        scale = tl.where(largest > 0, tl.div_rn(127.0, largest), 0.0)[:, None]
        if K <= PIECE:
            inside = valid if ALIGNED else valid & (column < K)
            tl.store(q_ptr + start + column, _quantized(x, scale), mask=inside)
        else:
            for begin in range(0, K, PIECE):
                inside = valid if ALIGNED else valid & (column < K - begin)
                x = widened(tl.load(x_ptr + start + begin + column, mask=inside, other=0.0))
                tl.store(q_ptr + start + begin + column, _quantized(x, scale), mask=inside)


@triton.jit
def codes_kernel(x_ptr, q_ptr, absmax_ptr, columns_ptr, M, K: tl.constexpr, ROWS: tl.constexpr, PIECE: tl.constexpr):
    """The second pass where there is a threshold: codes, with whole outlier columns 0."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    valid = (row < M)[:, None]
    start = (row * K)[:, None]
    largest = tl.load(absmax_ptr + row, mask=row < M, other=0.0)
    scale = tl.where(largest > 0, tl.div_rn(127.0, largest), 0.0)[:, None]
    for begin in range(0, K, PIECE):
        column = begin + tl.arange(0, PIECE)[None, :]
        inside = valid & (column < K)
        x = widened(tl.load(x_ptr + start + column, mask=inside, other=0.0))
        outlier = tl.load(columns_ptr + column, mask=column < K, other=0)
        tl.store(q_ptr + start + column, _quantized(tl.where(outlier != 0, 0.0, x), scale), mask=inside)


def quantize_int8_rows(x: Tensor, threshold: float) -> tuple[Tensor, Tensor, Tensor]:
    x = x.contiguous()
    k = x.shape[-1]
    m = math.prod(x.shape[:-1])
    q = x.new_empty(x.shape, dtype=torch.int8)
    columns = x.new_zeros(k, dtype=torch.uint8)
    if not (m and k):
        return q, x.new_zeros(m, dtype=torch.float32), columns.view(torch.bool)
    absmax = x.new_empty(m, dtype=torch.float32)
    tuned = config("quantize_int8_rows", width(x.dtype), x.device)
    piece = min(power_of_2(k), tuned["PIECE"])
    rows = max(tuned["TILE"] // piece, 1)
    outliers = threshold > 0
    launch(
        rows_kernel,
        (cdiv(m, rows),),
        x.device,
        x,
        q,
        absmax,
        columns,
        float(threshold),
        m,
        K=k,
        ROWS=rows,
        PIECE=piece,
        OUTLIERS=outliers,
        QUANTIZE=not outliers,
        ALIGNED=k % piece == 0,
        num_warps=tuned["num_warps"],
        enable_fp_fusion=False,
    )
    if outliers:
        launch(
            codes_kernel,
            (cdiv(m, rows),),
            x.device,
            x,
            q,
            absmax,
            columns,
            m,
            K=k,
            ROWS=rows,
            PIECE=piece,
            num_warps=tuned["num_warps"],
            enable_fp_fusion=False,
        )
    return q, absmax, columns.view(torch.bool)


# -- dequantize ----------------------------------------------------------------------------------------------


@triton.jit
def dequantize_kernel(
    q_ptr,
    rows_ptr,
    columns_ptr,
    bias_ptr,
    out_ptr,
    N,
    per_127,
    per_127_squared,
    TILE: tl.constexpr,
    COLUMNS: tl.constexpr,
    BIAS: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * TILE + tl.arange(0, TILE)
    inside = column < N
    values = tl.load(q_ptr + row * N + column, mask=inside, other=0).to(tl.float32)
    scale = tl.load(rows_ptr + row)
    if COLUMNS:
        values = values * (scale * tl.load(columns_ptr + column, mask=inside, other=0.0)) * per_127_squared
    else:
        values = values * scale * per_127
    if BIAS:
        values += widened(tl.load(bias_ptr + column, mask=inside, other=0.0))
    tl.store(out_ptr + row * N + column, rounded(values, out_ptr.dtype.element_ty), mask=inside)


def dequantize_int8(
    q: Tensor, row_absmax: Tensor, col_absmax: Tensor | None, bias: Tensor | None, dtype: torch.dtype
) -> Tensor:
    q, row_absmax = q.contiguous(), row_absmax.contiguous()
    out = q.new_empty(q.shape, dtype=dtype)
    if out.numel():
        n = q.shape[-1]
        tile = min(power_of_2(n), config("dequantize_int8", width(dtype), q.device)["TILE"])
        launch(
            dequantize_kernel,
            (q.numel() // n, cdiv(n, tile)),
            q.device,
            q,
            row_absmax,
            row_absmax if col_absmax is None else col_absmax.contiguous(),
            row_absmax if bias is None else bias.contiguous(),
            out,
            n,
            reference.PER_127,
            reference.PER_127_SQUARED,
            TILE=tile,
            COLUMNS=col_absmax is not None,
            BIAS=bias is not None,
            num_warps=4,
            enable_fp_fusion=False,
        )
    return out


# -- products ------------------------------------------------------------------------------------------------


@triton.jit
def list_kernel(columns_ptr, list_ptr, K: tl.constexpr, PIECE: tl.constexpr):
    """How many columns are flagged, then their numbers, ascending.  One program."""
    count = tl.zeros([], tl.int32)
    for begin in range(0, K, PIECE):
        column = begin + tl.arange(0, PIECE)
        flag = tl.load(columns_ptr + column, mask=column < K, other=0).to(tl.int32)
        tl.store(list_ptr + count + tl.cumsum(flag, 0), column, mask=flag != 0)
        count += tl.sum(flag, 0)
    tl.store(list_ptr, count)


@triton.jit
def product_kernel(
    a_ptr,
    w_ptr,
    x_ptr,
    rows_ptr,
    columns_ptr,
    bias_ptr,
    list_ptr,
    out_ptr,
    per_127,
    per_127_squared,
    M,
    N,
    K: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    STEPS: tl.constexpr,
    STAGES: tl.constexpr,
    GROUP: tl.constexpr,
    MODE: tl.constexpr,
    BIAS: tl.constexpr,
    ALIGNED: tl.constexpr,
):
    """The transposed product of w (N, K) int8 and a (M, K), by MODE:

    0  a int8: the sum, int32
    1  a int8: the sum times rows * columns / 127^2, plus bias
    2  as 1, plus the outlier columns of x, which list_ptr has, in float32
    3  a of x's dtype: the sum times columns / 127, plus bias; or a share of it, without bias
    """
    tiles_m = tl.cdiv(M, BM)
    tiles_n = tl.cdiv(N, BN)
    # Programs that run together share operands: GROUP rows of tiles are walked column by column.
    program = tl.program_id(0)
    group = program // (GROUP * tiles_m)
    height = tl.minimum(tiles_n - group * GROUP, GROUP)
    within = program % (GROUP * tiles_m)
    tile_n = group * GROUP + within % height
    tile_m = within // height
    share = tl.program_id(1)
    m = tile_m * BM + tl.arange(0, BM)
    n = tile_n * BN + tl.arange(0, BN)
    row = tl.minimum(m, M - 1).to(tl.int64)  # beyond the end the last one, not stored
    column = tl.minimum(n, N - 1).to(tl.int64)
    k = tl.arange(0, BK)
    begin = share * (STEPS * BK)
    w_ptrs = w_ptr + (column * K + begin)[:, None] + k[None, :]
    a_ptrs = a_ptr + (row * K + begin)[None, :] + k[:, None]
    acc = tl.zeros([BN, BM], tl.float32 if MODE == 3 else tl.int32)
    for step in tl.range(0, STEPS, num_stages=STAGES):
        if ALIGNED:
            w = tl.load(w_ptrs + step * BK)
            a = tl.load(a_ptrs + step * BK)
        else:
            left = K - begin - step * BK
            w = tl.load(w_ptrs + step * BK, mask=(k < left)[None, :], other=0)
            a = tl.load(a_ptrs + step * BK, mask=(k < left)[:, None], other=0)
        if MODE == 3:
            acc = product(rounded(w.to(tl.float32), a.dtype), a, acc)
        else:
            acc = tl.dot(w, a, acc, out_dtype=tl.int32)
    inside = (n < N)[:, None] & (m < M)[None, :]
    first = (share.to(tl.int64) * M + tile_m * BM) * N + tile_n * BN
    place = tl.arange(0, BM)[None, :] * N + tl.arange(0, BN)[:, None]
    if MODE == 0:
        tl.store(out_ptr + first + place, acc, mask=inside)
    else:
        scale = tl.load(columns_ptr + column)
        if MODE == 3:
            y = acc * (scale * per_127)[:, None]
        else:
            y = acc.to(tl.float32) * (tl.load(rows_ptr + row)[None, :] * scale[:, None]) * per_127_squared
        if MODE == 2:
            extra = tl.zeros([BN, BM], tl.float32)
            count = tl.load(list_ptr)
            at = 1
            while at <= count:
                outlier = tl.load(list_ptr + at)
                left_ = tl.load(w_ptr + column * K + outlier).to(tl.float32) * scale * per_127
                right = widened(tl.load(x_ptr + row * K + outlier))
                extra += left_[:, None] * right[None, :]
                at += 1
            y += extra
        if BIAS:
            y += widened(tl.load(bias_ptr + column))[:, None]
        tl.store(out_ptr + first + place, rounded(y, out_ptr.dtype.element_ty), mask=inside)


def _multiply(
    mode: int,
    a: Tensor,
    w: Tensor,
    out: Tensor,
    x: Tensor,
    rows: Tensor,
    columns: Tensor,
    bias: Tensor | None,
    outliers: Tensor,
) -> None:
    """Launch product_kernel; a (M, K), w (N, K), out (M, N)."""
    n, k = w.shape
    m = out.numel() // n
    name = "float32/" if a.dtype is torch.float32 else ""
    tuned = config(
        "linear_w8a16" if mode == 3 else "matmul_int8", f"{name}{min(max(power_of_2(m), 16), 1024)}", a.device
    )
    bm, bn = tuned["BM"], min(tuned["BN"], max(power_of_2(n), 16))
    bk = min(tuned["BK"], max(power_of_2(k), 32))
    steps, tiles = cdiv(k, bk), cdiv(m, bm) * cdiv(n, bn)
    shares = shares_of(steps, tiles, tuned, a.device) if mode == 3 else 1
    parts = out if shares == 1 else out.new_empty((shares, m, n), dtype=torch.float32)
    launch(
        product_kernel,
        (tiles, shares),
        a.device,
        a,
        w,
        x,
        rows,
        columns,
        a if bias is None else bias,
        outliers,
        parts,
        reference.PER_127,
        reference.PER_127_SQUARED,
        m,
        n,
        K=k,
        BM=bm,
        BN=bn,
        BK=bk,
        STEPS=steps // shares,
        STAGES=tuned["num_stages"],
        GROUP=tuned["GROUP"],
        MODE=mode,
        BIAS=bias is not None and shares == 1,
        ALIGNED=k % bk == 0,
        num_warps=tuned["num_warps"],
    )
    if shares > 1:
        sum_shares(parts, bias, out)


def matmul_int8(a: Tensor, b: Tensor) -> Tensor:
    a, b = a.contiguous(), b.contiguous()
    out = a.new_empty((a.shape[0], b.shape[0]), dtype=torch.int32)
    if not out.numel():
        return out
    if not a.shape[1]:
        return out.zero_()
    _multiply(0, a, b, out, out, out, out, None, out)
    return out


def linear_int8(
    x: Tensor, weight: Tensor, weight_absmax: Tensor, bias: Tensor | None, threshold: float, mode: str
) -> Tensor:
    n, k = weight.shape
    y = x.new_empty((*x.shape[:-1], n))
    if not y.numel():
        return y
    if not k:
        return y.zero_() if bias is None else y.copy_(bias)
    x, weight, weight_absmax = x.contiguous(), weight.contiguous(), weight_absmax.contiguous()
    bias = None if bias is None else bias.contiguous()
    if mode == "w8a16":
        _multiply(3, x, weight, y, x, weight_absmax, weight_absmax, bias, x)
        return y
    q, absmax, columns = quantize_int8_rows(x, threshold)
    if threshold > 0:
        outliers = torch.empty(k + 1, dtype=torch.int32, device=x.device)
        piece = min(power_of_2(k), 1024)
        launch(list_kernel, (1,), x.device, columns.view(torch.uint8), outliers, K=k, PIECE=piece, num_warps=4)
        _multiply(2, q, weight, y, x, absmax, weight_absmax, bias, outliers)
    else:
        _multiply(1, q, weight, y, x, absmax, weight_absmax, bias, q)
    return y
