"""bitsandbytes.autograd._functions: products with quantized weights, with gradients.

The gradients are those of halfbyte's ops; the classes are here for callers that use their `apply`.
"""

from __future__ import annotations

import warnings

import torch
from torch import Tensor

from .... import functional
from ....errors import InputError
from ....nn import Int8Params, MatmulLtState
from ....nn.linear8bit import linear_trainable
from ....nn.params8bit import quantize_rows_as_fp16
from ....quant_state import QuantState
from ..functional import column
from ..retired import GlobalOutlierPooler

__all__ = [
    "GlobalOutlierPooler",
    "MatMul4Bit",
    "MatMul8bitFp",
    "MatMul8bitLt",
    "MatmulLtState",
    "matmul",
    "matmul_4bit",
]


def matmul_4bit(
    A: Tensor, B: Tensor, quant_state: QuantState, out: Tensor | None = None, bias: Tensor | None = None
) -> Tensor:
    """A @ W^T + bias over a packed weight W (N, K), with gradients for A and bias.

    B  packed codes, or their transpose

    A weight that was quantized as (K, N) gives A @ W + bias, with a DeprecationWarning.
    """
    if quant_state is None:
        raise InputError("matmul_4bit needs the state that quantize_4bit gave; got quant_state=None")
    if bias is not None and bias.dtype is not A.dtype:
        bias = bias.to(A.dtype)
    shape = quant_state.shape
    if shape is not None and len(shape) == 2 and A.shape[-1] == shape[0] != shape[1]:
        y = _times_transposed(A, B, quant_state)
        y = y if bias is None else y + bias
    else:
        y = functional.linear_4bit(A, column(B), quant_state, bias)
    return y if out is None else out.copy_(y)


def _times_transposed(x: Tensor, packed: Tensor, state: QuantState) -> Tensor:
    """x @ W for W (K, N): what the gradient of the product with W (N, K) computes."""
    warnings.warn(
        f"this 4-bit weight was quantized as (in_features, out_features) {tuple(state.shape or ())}, which is slow. "
        "Re-quantize from the weight as torch.nn.Linear has it, (out_features, in_features).",
        DeprecationWarning,
        stacklevel=3,
    )
    assert state.shape is not None
    product: Tensor = torch.ops.halfbyte.linear_4bit_backward.default(
        x,
        functional.as_bytes(column(packed)).detach(),
        state.absmax,
        *state.nested_tensors(),
        state.quant_type,
        state.blocksize,
        state.shape[1],
    )
    return product


def matmul(
    A: Tensor,
    B: Tensor,
    out: Tensor | None = None,
    state: MatmulLtState | None = None,
    threshold: float = 0.0,
    bias: Tensor | None = None,
) -> Tensor:
    """LLM.int8(): A @ B^T + bias over int8 rows of both.

    B      float (N, K), quantized here; int8 rows where state or B itself has their statistics
    state  has_fp16_weights: B is a float that is trained, and quantized in each call; otherwise CB and SCB are used
           and, where there are none yet, set
    """
    state = state or MatmulLtState()
    if threshold > 0.0:
        state.threshold = threshold
    if bias is not None and bias.dtype is not A.dtype:
        bias = bias.to(A.dtype)
    if state.has_fp16_weights and B.is_floating_point():
        y = linear_trainable(A, B, bias, state.threshold)
    else:
        rows, absmax = _rows(B, state)
        y = functional.linear_int8(A, rows, absmax, bias, threshold=state.threshold)
    return y if out is None else out.copy_(y)


def _rows(B: Tensor, state: MatmulLtState) -> tuple[Tensor, Tensor]:
    """int8 rows and their absmax: the state's, else B's own, else of B quantized now."""
    if state.CB is None or state.SCB is None:
        absmax = state.SCB if state.SCB is not None else getattr(B, "SCB", None)
        if B.is_floating_point():
            state.CB, state.SCB = quantize_rows_as_fp16(B)
        elif absmax is None:
            raise InputError("int8 rows need their statistics; got neither state.SCB nor an Int8Params with SCB")
        else:
            state.CB, state.SCB = B.data if isinstance(B, Int8Params) else B, absmax
    return state.CB, state.SCB


class MatMul4Bit:
    """`MatMul4Bit.apply(A, B, out, bias, quant_state)`."""

    @staticmethod
    def apply(
        A: Tensor,
        B: Tensor,
        out: Tensor | None = None,
        bias: Tensor | None = None,
        quant_state: QuantState | None = None,
    ) -> Tensor:
        if quant_state is None:
            raise InputError("MatMul4Bit needs the state that quantize_4bit gave; got quant_state=None")
        return matmul_4bit(A, B, quant_state, out, bias)


class MatMul8bitLt:
    """`MatMul8bitLt.apply(A, B, out, bias, state)`."""

    @staticmethod
    def apply(
        A: Tensor,
        B: Tensor,
        out: Tensor | None = None,
        bias: Tensor | None = None,
        state: MatmulLtState | None = None,
    ) -> Tensor:
        return matmul(A, B, out, state, bias=bias)


MatMul8bitFp = MatMul8bitLt  # on devices without an integer product, bitsandbytes takes another class
