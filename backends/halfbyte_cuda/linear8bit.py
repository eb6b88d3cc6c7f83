"""linear_int8 in mode "exact" on the tensor cores of sm_90a: which sizes they take, and the call."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from halfbyte import native_gpu, native_gpu_int8
from halfbyte.native import DTYPES, address
from halfbyte.weights import Way


def linear_int8(
    c: Any,
    x: Tensor,
    weight: Tensor,
    weight_absmax: Tensor,
    bias: Tensor | None,
    threshold: float,
    mode: str,
) -> Tensor:
    """As the op.  Sizes that the tensor-core kernels do not take go to the portable ones."""
    tensors = native_gpu.dense(weight), weight_absmax.contiguous()
    return bind_linear_int8(c, *tensors, threshold, mode)(x, bias, tensors)


def bind_linear_int8(c: Any, weight: Tensor, weight_absmax: Tensor, threshold: float, mode: str) -> Way:
    portable = native_gpu_int8.bind_linear_int8(c, weight, weight_absmax, threshold, mode)
    n, fields = weight.shape[0], (weight.data_ptr(), weight_absmax.data_ptr())

    def product(x: Tensor, bias: Tensor | None, tensors: tuple[Any, ...]) -> Tensor:
        k = x.shape[-1]
        m = x.numel() // k if k else 0
        if not takes(m, n, k):
            return portable(x, bias, tensors)
        x = native_gpu.dense(x)
        if bias is not None:
            bias = bias.contiguous()
        y = x.new_empty(*x.shape[:-1], n)
        workspace = x.new_empty(c.linear_int8_tensor_workspace(m, n, k, threshold), dtype=torch.uint8)
        c.linear_int8_tensor(
            x.data_ptr(),
            DTYPES[x.dtype],
            threshold,
            workspace.data_ptr(),
            *fields,
            address(bias),
            m,
            n,
            k,
            y.data_ptr(),
            *native_gpu.place(x),
        )
        return y

    return product


def takes(m: int, n: int, k: int) -> bool:
    """Whether the tensor-core kernels take a product of this size."""
    return bool(m and n and k) and k % 16 == 0 and k <= 32768 and max(m, n) < 2**31
