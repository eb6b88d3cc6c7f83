"""The linear layer over a 4-bit weight, forward and backward.  ops/fourbit.py says how the weight is laid out."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..calling import call
from ..errors import InputError
from ..op import Op
from . import checks
from .fourbit import PACKED, PackedFacts, check_packed, dequantize_4bit

# Against the reference: it rounds the weight to the activation's dtype, a kernel may keep it exact.
_LINEAR_TOLERANCE = {torch.float32: (1e-4, 1e-4), torch.float16: (1e-2, 1e-2), torch.bfloat16: (4e-2, 4e-2)}


# -- linear_4bit ---------------------------------------------------------------------------------------------


def _linear_facts(
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
) -> tuple[object, ...]:
    return x.device, x.dtype, format, blocksize, nested_absmax is not None  # PackedFacts, on the path of every call


def _check_linear(
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
) -> None:
    if x.dtype not in checks.FLOATS or not x.ndim:
        checks.floating("x", x.dtype)
        raise InputError("x must have at least one dimension; got a scalar")
    in_features = x.shape[-1]
    check_packed(
        x.device,
        packed,
        absmax,
        nested_absmax,
        nested_codebook,
        offset,
        format,
        blocksize,
        out_features * in_features,
    )
    if bias is not None:
        checks.bias_fits(bias, x, out_features)


def linear_4bit(
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
    """x @ dequantized weight^T + bias.

    x         float32, float16, bfloat16; (..., in_features)
    packed    a weight of (out_features, in_features), see dequantize_4bit
    bias      x's dtype, (out_features,)
    returns   x's dtype, (..., out_features)
    """
    shape = [out_features, x.shape[-1]]
    weight = dequantize_4bit(packed, absmax, nested_absmax, nested_codebook, offset, format, blocksize, shape, x.dtype)
    return F.linear(x, weight, bias)


def _fake_linear(
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
    return x.new_empty((*x.shape[:-1], out_features))


def _setup_linear(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, packed, absmax, nested_absmax, nested_codebook, offset, bias, format, blocksize, _ = inputs
    ctx.save_for_backward(packed, absmax, nested_absmax, nested_codebook, offset)
    ctx.rest = (format, blocksize, x.shape[-1])
    ctx.has_bias = bias is not None


def _backward_linear(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
    dx = dbias = None
    if ctx.needs_input_grad[0]:
        op = torch.ops.halfbyte.linear_4bit_backward.default
        dx = call("linear_4bit_backward", op, dy, *ctx.saved_tensors, *ctx.rest)
    if ctx.has_bias and ctx.needs_input_grad[6]:
        dbias = dy.reshape(-1, dy.shape[-1]).sum(0)
    return (dx, None, None, None, None, None, dbias, None, None, None)


# -- linear_4bit_backward ------------------------------------------------------------------------------------


def _backward_facts(
    dy: Tensor,
    packed: Tensor,
    absmax: Tensor,
    nested_absmax: Tensor | None,
    nested_codebook: Tensor | None,
    offset: Tensor | None,
    format: str,
    blocksize: int,
    in_features: int,
) -> PackedFacts:
    return PackedFacts(dy.device, dy.dtype, format, blocksize, nested_absmax is not None)


def _check_backward(
    dy: Tensor,
    packed: Tensor,
    absmax: Tensor,
    nested_absmax: Tensor | None,
    nested_codebook: Tensor | None,
    offset: Tensor | None,
    format: str,
    blocksize: int,
    in_features: int,
) -> None:
    checks.floating("dy", dy.dtype)
    if not dy.ndim:
        raise InputError("dy must have at least one dimension; got a scalar")
    n = dy.shape[-1] * in_features
    check_packed(dy.device, packed, absmax, nested_absmax, nested_codebook, offset, format, blocksize, n)


def linear_4bit_backward(
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
    """Gradient of linear_4bit for its input: dy @ dequantized weight.

    dy        float32, float16, bfloat16; (..., out_features)
    returns   dy's dtype, (..., in_features)
    """
    shape = [dy.shape[-1], in_features]
    weight = dequantize_4bit(packed, absmax, nested_absmax, nested_codebook, offset, format, blocksize, shape, dy.dtype)
    return dy @ weight


def _fake_backward(
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
    return dy.new_empty((*dy.shape[:-1], in_features))


def _setup_backward(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    dy, packed, absmax, nested_absmax, nested_codebook, offset, format, blocksize, _ = inputs
    ctx.save_for_backward(packed, absmax, nested_absmax, nested_codebook, offset)
    ctx.rest = (format, blocksize, dy.shape[-1])


def _double_backward(ctx: Any, ddx: Tensor) -> tuple[Tensor | None, ...]:
    ddy = torch.ops.halfbyte.linear_4bit.default(ddx, *ctx.saved_tensors, None, *ctx.rest)
    return (ddy, None, None, None, None, None, None, None, None)


OPS = (
    Op(
        "linear_4bit",
        f"(Tensor x, {PACKED}, Tensor? bias, str format, int blocksize, SymInt out_features) -> Tensor",
        PackedFacts,
        _linear_facts,
        linear_4bit,
        _fake_linear,
        _check_linear,
        _setup_linear,
        _backward_linear,
        _LINEAR_TOLERANCE,
    ),
    Op(
        "linear_4bit_backward",
        f"(Tensor dy, {PACKED}, str format, int blocksize, SymInt in_features) -> Tensor",
        PackedFacts,
        _backward_facts,
        linear_4bit_backward,
        _fake_backward,
        _check_backward,
        _setup_backward,
        _double_backward,
        _LINEAR_TOLERANCE,
    ),
)
