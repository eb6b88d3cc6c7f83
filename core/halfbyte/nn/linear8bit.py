"""Linear8bitLt: LLM.int8() as a layer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .. import functional, transforms
from .params8bit import Int8Params
from .stored import StoredInt8


@dataclass
class MatmulLtState:
    """Settings of a Linear8bitLt, and a place where bitsandbytes' users look for its weight and statistics.

    The layer itself always reads its weight, so nothing here can go stale.
    """

    CB: Tensor | None = None
    SCB: Tensor | None = None
    CxB: Tensor | None = None
    threshold: float = 0.0
    has_fp16_weights: bool = True
    is_training: bool = True
    use_pool: bool = False

    def reset_grads(self) -> None:
        """Forget weight and statistics, as callers do after they replaced the weight."""
        self.CB = self.SCB = self.CxB = None


class Linear8bitLt(StoredInt8, nn.Linear):
    """nn.Linear with an int8 weight and, in "exact" mode, int8 activations.

    has_fp16_weights  True: the weight stays a trainable float and is quantized in each forward.
                      False: it is quantized when the layer is first moved to a device (the CPU counts)
    threshold         magnitude from which an activation's column stays out of the integer product; 0.0 for none
    index             kept for callers that pass it; unused

    Source: Dettmers et al. 2022, LLM.int8() (arXiv 2208.07339); the signature is bitsandbytes'.
    """

    def __init__(
        self,
        input_features: int,
        output_features: int,
        bias: bool = True,
        has_fp16_weights: bool = True,
        threshold: float = 0.0,
        index: Tensor | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__(input_features, output_features, bias, device)
        self.state = MatmulLtState(threshold=threshold, has_fp16_weights=has_fp16_weights)
        self.index = index
        self.dtype = self.weight.dtype
        self.weight = Int8Params(self.weight.data, requires_grad=has_fp16_weights, has_fp16_weights=has_fp16_weights)

    def stays_float(self) -> bool:
        return self.state.has_fp16_weights

    def require_quantized(self) -> None:
        if not self.stays_float():
            self.required_absmax()

    def forward(self, x: Tensor) -> Tensor:
        """(..., in_features) -> (..., out_features), in x's dtype."""
        if torch.is_autocast_enabled(x.device.type):
            x = x.to(torch.get_autocast_dtype(x.device.type))
        bias = self.bias
        if bias is not None and bias.dtype is not x.dtype:
            bias = bias.to(x.dtype)  # type: ignore[assignment]  # a temporary: the parameter keeps its dtype
        threshold = self.state.threshold
        if self.weight.is_floating_point() and self.state.has_fp16_weights:
            if not torch.compiler.is_compiling() and transforms.active():
                raise transforms.refusal(type(self).__name__)
            return _TrainableInt8.apply(x, self.weight, bias, threshold)  # type: ignore[no-any-return, no-untyped-call]
        return functional.linear_int8(x, self.weight, self.required_absmax(), bias, threshold=threshold)


class _TrainableInt8(torch.autograd.Function):
    """linear_int8 over a float weight that is quantized here; straight-through gradients for all three."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, threshold: float) -> Tensor:
        rows, absmax, _ = functional.quantize_int8_rows(weight)
        ctx.save_for_backward(x, rows, absmax)
        ctx.weight_dtype, ctx.has_bias = weight.dtype, bias is not None
        return functional.linear_int8(x, rows, absmax, bias, threshold=threshold)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (dy,) = grads
        x, rows, absmax = ctx.saved_tensors
        dx = dw = db = None
        flat = dy.reshape(-1, dy.shape[-1])
        if ctx.needs_input_grad[0]:
            dx = dy @ functional.dequantize_int8(rows, absmax, dtype=dy.dtype)
        if ctx.needs_input_grad[1]:
            dw = (flat.T @ x.reshape(-1, x.shape[-1])).to(ctx.weight_dtype)
        if ctx.has_bias and ctx.needs_input_grad[2]:
            db = flat.sum(0)
        return dx, dw, db, None
