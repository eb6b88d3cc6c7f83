"""LLM.int8(): row-wise int8 quantization, the integer product, and the linear layer with outlier columns.

Source: Dettmers et al. 2022, LLM.int8(), section 3 (arXiv 2208.07339).
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..calling import call
from ..errors import InputError
from ..op import Op
from . import checks

# Used as float32.
PER_127 = 1 / 127
PER_127_SQUARED = 1 / 127**2

MODES = ("exact", "w8a16")


# -- quantize_int8_rows --------------------------------------------------------------------------------------


class RowsFacts(NamedTuple):
    """What a kernel for quantize_int8_rows may be chosen on."""

    device: torch.device
    dtype: torch.dtype


def _rows_facts(x: Tensor, threshold: float) -> RowsFacts:
    return RowsFacts(x.device, x.dtype)


def _check_rows(x: Tensor, threshold: float) -> None:
    checks.floating("x", x.dtype)
    if not x.ndim:
        raise InputError("x must have at least one dimension; got a scalar")
    if not threshold >= 0:
        raise InputError(f"threshold must be 0 (no outliers) or positive; got {threshold}")


def quantize_int8_rows(x: Tensor, threshold: float) -> tuple[Tensor, Tensor, Tensor]:
    """Quantize each row to int8 by its absolute maximum.

    x          float32, float16, bfloat16; (..., K), rows are all leading dimensions together
    threshold  values of this magnitude or more are outliers: they do not enter the maximum, and their whole
               column is 0 in q; 0.0 for none
    returns    q int8, x's shape; absmax float32 (rows,); outlier_columns bool (K,)

    q = rint(x * (127 / absmax)), ties to even; a row of zeros gives zeros; NaN gives 0.
    """
    rows = x.reshape(math.prod(x.shape[:-1]), x.shape[-1]).float()
    magnitude = rows.abs().nan_to_num(nan=0.0, posinf=math.inf)
    outliers = magnitude >= threshold if threshold > 0 else torch.zeros_like(rows, dtype=torch.bool)
    magnitude = magnitude.masked_fill(outliers, 0.0)
    absmax = magnitude.amax(dim=1) if rows.shape[1] else rows.new_zeros(rows.shape[0])
    columns = outliers.any(dim=0)
    # Divided, not `127.0 / absmax`: torch computes that as 127 * (1 / absmax), rounded twice.
    scale = torch.where(absmax > 0, torch.full_like(absmax, 127.0) / absmax, 0.0)
    q = (rows * scale[:, None]).masked_fill(columns, 0.0).nan_to_num(0.0).round().clamp(-127, 127)
    return q.to(torch.int8).reshape(x.shape).contiguous(), absmax, columns


def _fake_rows(x: Tensor, threshold: float) -> tuple[Tensor, Tensor, Tensor]:
    return (
        x.new_empty(x.shape, dtype=torch.int8),
        x.new_empty((math.prod(x.shape[:-1]),), dtype=torch.float32),
        x.new_empty((x.shape[-1],), dtype=torch.bool),
    )


# -- dequantize_int8 -----------------------------------------------------------------------------------------


class DequantizeFacts(NamedTuple):
    """What a kernel for dequantize_int8 may be chosen on; source is q's dtype, dtype the result's."""

    device: torch.device
    dtype: torch.dtype
    source: torch.dtype


def _dequantize_facts(
    q: Tensor, row_absmax: Tensor, col_absmax: Tensor | None, bias: Tensor | None, dtype: torch.dtype
) -> tuple[object, ...]:
    return q.device, dtype, q.dtype  # DequantizeFacts, on the path of every backward


def _check_dequantize(
    q: Tensor, row_absmax: Tensor, col_absmax: Tensor | None, bias: Tensor | None, dtype: torch.dtype
) -> None:
    checks.floating("dtype", dtype)
    checks.dtype_is("q", q, torch.int8, torch.int32)
    if not q.ndim:
        raise InputError("q must have at least one dimension; got a scalar")
    _check_vector("row_absmax", row_absmax, math.prod(q.shape[:-1]), q.device)
    if col_absmax is not None:
        _check_vector("col_absmax", col_absmax, q.shape[-1], q.device)
    if bias is not None:
        checks.floating("bias", bias.dtype)
        checks.same_device("bias", bias, q.device)
        if bias.shape != q.shape[-1:]:
            raise InputError(f"bias must have shape ({q.shape[-1]},); got {tuple(bias.shape)}")


def _check_vector(name: str, vector: Tensor, length: int, device: torch.device) -> None:
    if vector.dtype is torch.float32 and vector.device == device and vector.numel() == length:
        return
    checks.dtype_is(name, vector, torch.float32)
    checks.same_device(name, vector, device)
    raise InputError(f"{name} must have {length} elements; got {vector.numel()}")


def dequantize_int8(
    q: Tensor, row_absmax: Tensor, col_absmax: Tensor | None, bias: Tensor | None, dtype: torch.dtype
) -> Tensor:
    """Undo row-wise int8 quantization, or scale an integer product.

    q           int8 or int32, (..., N)
    row_absmax  float32 (rows,)
    col_absmax  float32 (N,) for a product of two quantized matrices; None for a quantized matrix
    bias        (N,) or None, added in float32
    returns     dtype, q's shape: q * row / 127, or q * (row * col) / 127^2; float32, rounded once
    """
    values = q.reshape(math.prod(q.shape[:-1]), q.shape[-1]).float()
    rows = row_absmax.reshape(-1, 1)
    if col_absmax is None:
        values = values * rows * PER_127
    else:
        values = values * (rows * col_absmax.reshape(1, -1)) * PER_127_SQUARED
    if bias is not None:
        values = values + bias.float()
    return values.to(dtype).reshape(q.shape).contiguous()


def _fake_dequantize(
    q: Tensor, row_absmax: Tensor, col_absmax: Tensor | None, bias: Tensor | None, dtype: torch.dtype
) -> Tensor:
    return q.new_empty(q.shape, dtype=dtype)


# -- matmul_int8 ---------------------------------------------------------------------------------------------


class MatmulFacts(NamedTuple):
    """What a kernel for matmul_int8 may be chosen on."""

    device: torch.device


def _matmul_facts(a: Tensor, b: Tensor) -> MatmulFacts:
    return MatmulFacts(a.device)


def _check_matmul(a: Tensor, b: Tensor) -> None:
    checks.dtype_is("a", a, torch.int8)
    checks.dtype_is("b", b, torch.int8)
    checks.same_device("b", b, a.device)
    if a.ndim != 2 or b.ndim != 2 or a.shape[1] != b.shape[1]:
        raise InputError(f"a and b must be (M, K) and (N, K); got {tuple(a.shape)} and {tuple(b.shape)}")


def matmul_int8(a: Tensor, b: Tensor) -> Tensor:
    """The exact integer product a @ b^T.

    a         int8 (M, K)
    b         int8 (N, K)
    returns   int32 (M, N)
    """
    return (a.double() @ b.double().T).to(torch.int32)  # exact: float64 holds integers up to 2^53


def _fake_matmul(a: Tensor, b: Tensor) -> Tensor:
    return a.new_empty((a.shape[0], b.shape[0]), dtype=torch.int32)


# -- linear_int8 ---------------------------------------------------------------------------------------------


class LinearFacts(NamedTuple):
    """What a kernel for linear_int8 may be chosen on; outliers: threshold > 0."""

    device: torch.device
    dtype: torch.dtype
    mode: str
    outliers: bool


def _linear_facts(
    x: Tensor, weight: Tensor, weight_absmax: Tensor, bias: Tensor | None, threshold: float, mode: str
) -> tuple[object, ...]:
    return x.device, x.dtype, mode, threshold > 0  # LinearFacts, on the path of every call


def _check_linear(
    x: Tensor, weight: Tensor, weight_absmax: Tensor, bias: Tensor | None, threshold: float, mode: str
) -> None:
    checks.floating("x", x.dtype)
    checks.dtype_is("weight", weight, torch.int8)
    checks.same_device("weight", weight, x.device)
    if weight.ndim != 2 or not x.ndim or x.shape[-1] != weight.shape[1]:
        raise InputError(f"x (..., K) must fit weight (N, K); got {tuple(x.shape)} and {tuple(weight.shape)}")
    _check_vector("weight_absmax", weight_absmax, weight.shape[0], x.device)
    if bias is not None:
        checks.bias_fits(bias, x, weight.shape[0])
    if not threshold >= 0:
        raise InputError(f"threshold must be 0 (no outliers) or positive; got {threshold}")
    if mode not in MODES:
        raise InputError(f"mode must be one of {', '.join(MODES)}; got {mode!r}")


def linear_int8(
    x: Tensor, weight: Tensor, weight_absmax: Tensor, bias: Tensor | None, threshold: float, mode: str
) -> Tensor:
    """x @ (weight * weight_absmax / 127)^T + bias.

    x              float32, float16, bfloat16; (..., K); never written to
    weight         int8 (N, K)
    weight_absmax  float32 (N,)
    bias           x's dtype, (N,)
    threshold      as in quantize_int8_rows; outlier columns are multiplied in float32
    mode           "exact": x is quantized too, LLM.int8(); "w8a16": x stays as it is
    returns        x's dtype, (..., N); float32 sums, rounded once
    """
    rows = x.reshape(math.prod(x.shape[:-1]), x.shape[-1])
    if mode == "w8a16":
        y = rows.float() @ (weight.float() * weight_absmax[:, None] * PER_127).T
    else:
        q, absmax, outlier_columns = quantize_int8_rows(rows, threshold)
        y = dequantize_int8(matmul_int8(q, weight), absmax, weight_absmax, None, torch.float32)
        if threshold > 0:
            outliers = rows.float().masked_fill(~outlier_columns, 0.0)
            y = y + outliers @ (weight.float() * weight_absmax[:, None] * PER_127).T
    if bias is not None:
        y = y + bias.float()
    return y.to(x.dtype).reshape(*x.shape[:-1], weight.shape[0])


def _fake_linear(
    x: Tensor, weight: Tensor, weight_absmax: Tensor, bias: Tensor | None, threshold: float, mode: str
) -> Tensor:
    return x.new_empty((*x.shape[:-1], weight.shape[0]))


def _setup_linear(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, weight, weight_absmax, bias, _, _ = inputs
    ctx.save_for_backward(weight, weight_absmax)
    ctx.has_bias = bias is not None


def _backward_linear(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
    """The straight-through gradient: the quantization of x counts as the identity."""
    dx = dbias = None
    if ctx.needs_input_grad[0]:
        weight, weight_absmax = ctx.saved_tensors
        op = torch.ops.halfbyte.dequantize_int8.default
        dx = dy @ call("dequantize_int8", op, weight, weight_absmax, None, None, dy.dtype)
    if ctx.has_bias and ctx.needs_input_grad[3]:
        dbias = dy.reshape(-1, dy.shape[-1]).sum(0)
    return (dx, None, None, dbias, None, None)


# float32 is tight enough to show one wrong digit in the constants.
_TOLERANCE = {torch.float32: (1e-5, 1e-5), torch.float16: (1e-2, 1e-2), torch.bfloat16: (2e-2, 2e-2)}

OPS = (
    Op(
        "quantize_int8_rows",
        "(Tensor x, float threshold) -> (Tensor, Tensor, Tensor)",
        RowsFacts,
        _rows_facts,
        quantize_int8_rows,
        _fake_rows,
        _check_rows,
    ),
    Op(
        "dequantize_int8",
        "(Tensor q, Tensor row_absmax, Tensor? col_absmax, Tensor? bias, ScalarType dtype) -> Tensor",
        DequantizeFacts,
        _dequantize_facts,
        dequantize_int8,
        _fake_dequantize,
        _check_dequantize,
    ),
    Op(
        "matmul_int8",
        "(Tensor a, Tensor b) -> Tensor",
        MatmulFacts,
        _matmul_facts,
        matmul_int8,
        _fake_matmul,
        _check_matmul,
    ),
    Op(
        "linear_int8",
        "(Tensor x, Tensor weight, Tensor weight_absmax, Tensor? bias, float threshold, str mode) -> Tensor",
        LinearFacts,
        _linear_facts,
        linear_int8,
        _fake_linear,
        _check_linear,
        _setup_linear,
        _backward_linear,
        _TOLERANCE,
    ),
)
