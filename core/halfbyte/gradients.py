"""The linear layers' gradients for calls that autograd alone observes: torch's registration of one takes longer.

What was measured stands in docs/benchmarks.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from . import calling
from .dispatch import current_override, entered
from .weights import as_bytes

_ops = torch.ops.halfbyte


class _Gradient(torch.autograd.Function):
    @classmethod
    def run(cls, x: Tensor, *rest: Any) -> Tensor:
        """As apply, which looks through all arguments for transforms, where there are none."""
        base: Any = super(torch.autograd.Function, cls)
        y: Tensor = base.apply(torch._C._functorch.unwrap_if_dead(x), *rest)
        return y


class Linear4bit(_Gradient):
    """linear_4bit(x, *weight, bias, *plain); the first tensor of a weight may be viewed as another dtype than uint8."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, bias: Tensor | None, weight: tuple[Any, ...], plain: tuple[Any, ...]) -> Any:
        packed, *statistics = weight
        ctx.save_for_backward(*weight)
        ctx.chain, ctx.plain = current_override(), (*plain[:2], x.shape[-1])
        return calling.bound["linear_4bit"](x, bias, packed, (as_bytes(packed), *statistics), plain)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (dy,) = grads
        dx = dbias = None
        if ctx.needs_input_grad[0]:
            packed, *statistics = ctx.saved_tensors
            with entered(ctx.chain), calling.AsBytes():
                tensors = (as_bytes(packed), *statistics)
                if calling.direct(dy):
                    dx = calling.bound["linear_4bit_backward"](dy, None, packed, tensors, ctx.plain)
                else:
                    dx = _ops.linear_4bit_backward.default(dy, tensors[0].detach(), *statistics, *ctx.plain)
        if ctx.needs_input_grad[1]:
            dbias = _sum_of_rows(dy)
        return dx, dbias, None, None


class LinearInt8(_Gradient):
    """linear_int8(x, *weight, bias, *plain); the quantization of x counts as the identity."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, bias: Tensor | None, weight: tuple[Any, ...], plain: tuple[Any, ...]) -> Any:
        ctx.save_for_backward(*weight)
        ctx.chain = current_override()
        return calling.bound["linear_int8"](x, bias, weight[0], weight, plain)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (dy,) = grads
        dx = dbias = None
        if ctx.needs_input_grad[0]:
            op = _ops.dequantize_int8.default
            with entered(ctx.chain), calling.AsBytes():
                dx = dy @ calling.call("dequantize_int8", op, *ctx.saved_tensors, None, None, dy.dtype)
        if ctx.needs_input_grad[1]:
            dbias = _sum_of_rows(dy)
        return dx, dbias, None, None


def _sum_of_rows(dy: Tensor) -> Tensor:
    return dy.reshape(-1, dy.shape[-1]).sum(0)
