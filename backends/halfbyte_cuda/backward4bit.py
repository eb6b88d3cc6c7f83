"""linear_4bit's gradient in one call: slabs of the weight, dequantized, times dy by torch's own cuBLAS and its handle.

The products are those of the portable way, which asks torch for each: a fine-tuning step then waits for the host.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from halfbyte import native_gpu
from halfbyte.native import DTYPES
from halfbyte.weights import Way

# Where a program has switched it off, only torch's own calls of cuBLAS keep to that.
_REDUCTION = {
    torch.float16: "allow_fp16_reduced_precision_reduction",
    torch.bfloat16: "allow_bf16_reduced_precision_reduction",
}


def linear_4bit_backward(
    c: Any,
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
    """As the op."""
    tensors = native_gpu.contiguous(packed, absmax, nested_absmax, nested_codebook, offset)
    constant = *tensors, format, blocksize, in_features
    return bind_linear_4bit_backward(c, *constant)(dy, None, tensors)


def bind_linear_4bit_backward(
    c: Any,
    packed: Tensor,
    absmax: Tensor,
    nested_absmax: Tensor | None,
    nested_codebook: Tensor | None,
    offset: Tensor | None,
    format: str,
    blocksize: int,
    in_features: int,
) -> Way:
    constant = (packed, absmax, nested_absmax, nested_codebook, offset, format, blocksize)
    weight = native_gpu.Weight4(*constant)
    portable = native_gpu.bind_linear_4bit_backward(c, *constant, in_features)

    def product(dy: Tensor, bias: Tensor | None, tensors: Any) -> Tensor:
        *rows, n = dy.shape
        m = math.prod(rows)
        index, stream = native_gpu.place(dy)
        if (
            not takes(m, n, in_features)
            or index != torch._C._cuda_getDevice()  # whose handle torch gives
            or getattr(torch.backends.cuda.matmul, _REDUCTION[dy.dtype]) is not True
        ):
            return portable(dy, bias, tensors)
        dy = dy.contiguous()
        dx = dy.new_empty(*rows, in_features)
        columns = native_gpu.slab_columns(n, in_features, dy.element_size())
        slab = dy.new_empty(n * columns)
        c.linear_4bit_backward(
            dy.data_ptr(),
            DTYPES[dy.dtype],
            *weight.fields,
            m,
            n,
            in_features,
            slab.data_ptr(),
            columns,
            dx.data_ptr(),
            torch._C._cuda_getCurrentBlasHandle(),
            index,
            stream,
        )
        return dx

    return product


def takes(m: int, n: int, k: int) -> bool:
    """Whether there is something to compute, of sizes that cuBLAS can count."""
    return bool(m and n and k) and max(m, n, k) < 2**31
