"""linear_4bit on the tensor cores of sm_90a: what a kernel takes, which one serves a size, and the call."""

from __future__ import annotations

import functools
import json
import math
from importlib import resources
from typing import Any, TypeAlias

from torch import Tensor

from halfbyte import native_gpu
from halfbyte.native import DTYPES, address
from halfbyte.weights import Way

# A kernel and its parameters: ("stream", tiles, depth), ("tile", columns, groups, turns, log_splits), ("wide", columns,
# splits) as in csrc/include/halfbyte/gemm.h, or ("dequantize",): the weight in slabs, then torch's matmul.
Choice: TypeAlias = tuple[Any, ...]


def linear_4bit(
    c: Any,
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
    """As the op.  Sizes that no tensor-core kernel takes go to the portable one."""
    tensors = aligned(packed, absmax, nested_absmax, nested_codebook, offset)
    constant = *tensors, format, blocksize, out_features
    return bind_linear_4bit(c, *constant)(x, bias, tensors)


def bind_linear_4bit(
    c: Any,
    packed: Tensor,
    absmax: Tensor,
    nested_absmax: Tensor | None,
    nested_codebook: Tensor | None,
    offset: Tensor | None,
    format: str,
    blocksize: int,
    out_features: int,
) -> Way:
    constant = (packed, absmax, nested_absmax, nested_codebook, offset, format, blocksize)
    weight = native_gpu.Weight4(*constant)
    portable = native_gpu.bind_linear_4bit(c, *constant, out_features)
    n = out_features

    def product(x: Tensor, bias: Tensor | None, tensors: Any) -> Tensor:
        k = x.shape[-1]
        m = x.numel() // k if k else 0
        if not takes(m, n, k, blocksize):
            return portable(x, bias, tensors)
        return launch(c, choose(m, n, k), x, weight, bias, n)

    return product


def aligned(packed: Tensor, absmax: Tensor, *nested: Tensor | None) -> tuple[Any, ...]:
    """The tensors themselves, or copies that are contiguous and, where kernels want it, aligned."""
    return native_gpu.dense(packed), native_gpu.dense(absmax), *native_gpu.contiguous(*nested)


def takes(m: int, n: int, k: int, blocksize: int) -> bool:
    """Whether the tensor-core kernels take a product of this size."""
    return bool(m and n and k) and not (k % 256 or k % blocksize) and blocksize >= 64 and max(m, n, k) < 2**31


def run(
    c: Any,
    choice: Choice,
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
    """linear_4bit with one kernel of those that take the size."""
    constant = *aligned(packed, absmax, nested_absmax, nested_codebook, offset), format, blocksize
    return launch(c, choice, x, native_gpu.Weight4(*constant), bias, out_features)  # constant is alive until the launch


def launch(
    c: Any, choice: Choice, x: Tensor, weight: native_gpu.Weight4, bias: Tensor | None, out_features: int
) -> Tensor:
    """The same over a weight of aligned tensors."""
    if choice[0] == "dequantize":
        return native_gpu.linear_dequantized(c, x, weight, bias, out_features)
    x = native_gpu.dense(x)
    if bias is not None:
        bias = bias.contiguous()
    *rows, k = x.shape
    y = x.new_empty(*rows, out_features)
    call = getattr(c, f"linear_4bit_{choice[0]}")
    call(
        x.data_ptr(),
        DTYPES[x.dtype],
        *weight.fields,
        address(bias),
        math.prod(rows),
        out_features,
        k,
        y.data_ptr(),
        *choice[1:],
        *native_gpu.place(x),
    )
    return y


# -- choosing ------------------------------------------------------------------------------------------------


@functools.cache
def measured() -> dict[tuple[int, int], dict[int, Choice]]:
    """(n, k) -> m -> the fastest choice, as `python -m halfbyte_cuda.tune` found it."""
    table = json.loads(resources.files(__package__).joinpath("tuning.json").read_text())["linear_4bit"]
    return {(row["n"], row["k"]): {int(m): tuple(choice) for m, choice in row["choices"].items()} for row in table}


@functools.lru_cache(4096)
def choose(m: int, n: int, k: int) -> Choice:
    """What was fastest at the nearest measured weight, at the next measured m; above the last, dequantizing."""
    table = measured()
    nearest = min(table, key=lambda size: abs(math.log(size[0] / n)) + abs(math.log(size[1] / k)))
    for rows, choice in sorted(table[nearest].items()):
        if m <= rows:
            return choice
    return ("dequantize",)


def candidates(m: int) -> list[Choice]:
    """Every choice that can serve m rows of x well."""
    found: list[Choice] = []
    if m <= 8:
        found += [("stream", 4, 2), ("stream", 4, 3)]
    elif m <= 16:
        found += [("stream", 2, 2), ("stream", 2, 3), ("stream", 3, 2), ("stream", 4, 2)]
    for columns, shapes in ((32, ((4, 1), (2, 2), (1, 4))), (64, ((4, 1), (2, 2), (1, 4))), (128, ((2, 1), (1, 2)))):
        if columns / 4 < m <= (columns if columns < 64 else 4 * columns):
            found += [("tile", columns, *shape, splits) for shape in shapes for splits in (0, 1, 2)]
    if m >= 96:
        found += [("wide", columns, splits) for columns in (128, 256) for splits in (1, 2, 3)]
        found.append(("dequantize",))
    return found
