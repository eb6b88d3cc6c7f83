"""4-bit block-wise quantization; ops/linear4bit.py has the linear layer over it.

Layout: the tensor is flattened row-major and cut into blocks of `blocksize` elements that share one absmax; blocks
may cross rows.  Two codes share a byte, the earlier one in the high nibble.  With nested absmax (`nested_absmax`
given) `absmax` holds uint8 codes:  absmax[i] = nested_codebook[code[i]] * nested_absmax[i // 256] + offset.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import formats
from ..errors import InputError
from ..op import Op
from . import checks

PACKED = "Tensor packed, Tensor absmax, Tensor? nested_absmax, Tensor? nested_codebook, Tensor? offset"


# -- quantize_4bit -------------------------------------------------------------------------------------------


class QuantizeFacts(NamedTuple):
    """What a kernel for quantize_4bit may be chosen on."""

    device: torch.device
    dtype: torch.dtype
    format: str
    blocksize: int


def _quantize_facts(x: Tensor, format: str, blocksize: int) -> QuantizeFacts:
    return QuantizeFacts(x.device, x.dtype, format, blocksize)


def _check_quantize(x: Tensor, format: str, blocksize: int) -> None:
    checks.floating("x", x.dtype)
    checks.format_4bit(format, blocksize)


def quantize_4bit(x: Tensor, format: str, blocksize: int) -> tuple[Tensor, Tensor]:
    """Quantize block-wise to 4 bits: the code whose interval holds x / absmax of its block.

    x         float32, float16, bfloat16; any shape, read flat
    returns   packed uint8 (ceil(n / 2),); absmax float32 (ceil(n / blocksize),)

    The scaled value is x * (1 / absmax) with the IEEE float32 reciprocal.  NaN does not enter absmax and gets
    code 0.  A block whose reciprocal overflows (all zero, or subnormal) gets codes 0.  An odd count is filled up
    with the code of 0.0.

    Source: Dettmers et al. 2023, QLoRA, section 3 (arXiv 2305.14314).
    """
    n = x.numel()
    flat = x.reshape(-1).float()
    blocks = F.pad(flat, (0, -n % blocksize)).reshape(-1, blocksize)
    absmax = blocks.abs().nan_to_num(nan=0.0, posinf=math.inf).amax(dim=1) if n else flat.new_empty(0)
    reciprocal = 1.0 / absmax
    codes = encode(blocks * reciprocal[:, None], format)
    codes = torch.where(reciprocal.isinf()[:, None], 0, codes).reshape(-1)[:n]
    if n % 2:
        codes = torch.cat((codes, encode(flat.new_zeros(1), format)))
    return (codes[0::2] << 4) | codes[1::2], absmax


def encode(scaled: Tensor, format: str) -> Tensor:
    """Codes (uint8) of values scaled to [-1, 1]; a value on a threshold belongs to the interval below."""
    spec = formats.FORMATS[format]
    values = scaled.abs() if spec.sign_bit else scaled
    interval = torch.bucketize(values, formats.table("thresholds", format, scaled.device))
    codes = formats.table("order", format, scaled.device)[interval]
    if spec.sign_bit:
        codes = codes + 8 * (scaled < 0).to(torch.uint8)
    return torch.where(scaled.isnan(), 0, codes)


def _fake_quantize(x: Tensor, format: str, blocksize: int) -> tuple[Tensor, Tensor]:
    n = x.numel()
    packed = x.new_empty(((n + 1) // 2,), dtype=torch.uint8)
    return packed, x.new_empty(((n + blocksize - 1) // blocksize,), dtype=torch.float32)


# -- dequantize_4bit -----------------------------------------------------------------------------------------


class PackedFacts(NamedTuple):
    """What a kernel that reads packed weights may be chosen on; dtype is that of the result."""

    device: torch.device
    dtype: torch.dtype
    format: str
    blocksize: int
    nested: bool


def _dequantize_facts(
    packed: Tensor,
    absmax: Tensor,
    nested_absmax: Tensor | None,
    nested_codebook: Tensor | None,
    offset: Tensor | None,
    format: str,
    blocksize: int,
    shape: list[int],
    dtype: torch.dtype,
) -> PackedFacts:
    return PackedFacts(packed.device, dtype, format, blocksize, nested_absmax is not None)


def check_packed(
    device: torch.device,
    packed: Tensor,
    absmax: Tensor,
    nested_absmax: Tensor | None,
    nested_codebook: Tensor | None,
    offset: Tensor | None,
    format: str,
    blocksize: int,
    n: int,
) -> None:
    """The packed tensors fit each other and hold `n` elements.

    On the path of every call: one condition decides, and the words are found only where it fails.
    """
    if format not in formats.FORMATS or blocksize not in formats.BLOCKSIZES:
        checks.format_4bit(format, blocksize)
    blocks = -(-n // blocksize)
    nested = nested_absmax is not None
    if (
        packed.dtype is not torch.uint8
        or absmax.dtype is not (torch.uint8 if nested else torch.float32)
        or packed.device != device
        or absmax.device != device
        or packed.numel() != (n + 1) // 2
        or n < 0
        or absmax.numel() < blocks
        or nested != (nested_codebook is not None)
        or nested != (offset is not None)
    ):
        _explain_packed(device, packed, absmax, nested, nested_codebook, offset, n, blocks)
    if nested_absmax is None or nested_codebook is None or offset is None:
        return
    groups = -(-blocks // formats.NESTED_BLOCKSIZE)
    if (
        not (nested_absmax.dtype is nested_codebook.dtype is offset.dtype is torch.float32)
        or not (nested_absmax.device == nested_codebook.device == offset.device == device)
        or nested_absmax.numel() < groups
        or nested_codebook.numel() < 256
        or offset.numel() != 1
    ):
        _explain_nested(device, nested_absmax, nested_codebook, offset, blocks, groups)


def _explain_nested(
    device: torch.device, nested_absmax: Tensor, nested_codebook: Tensor, offset: Tensor, blocks: int, groups: int
) -> None:
    named = {"nested_absmax": nested_absmax, "nested_codebook": nested_codebook, "offset": offset}
    for name, tensor in named.items():
        checks.dtype_is(name, tensor, torch.float32)
        checks.same_device(name, tensor, device)
    checks.length("nested_absmax", nested_absmax, groups, f"{blocks} blocks")
    checks.length("nested_codebook", nested_codebook, 256, "uint8 codes")
    raise InputError(f"offset must have 1 element; got {offset.numel()}")


def _explain_packed(
    device: torch.device,
    packed: Tensor,
    absmax: Tensor,
    nested: bool,
    nested_codebook: Tensor | None,
    offset: Tensor | None,
    n: int,
    blocks: int,
) -> None:
    checks.dtype_is("packed", packed, torch.uint8)
    checks.dtype_is("absmax", absmax, torch.uint8 if nested else torch.float32)
    checks.same_device("packed", packed, device)
    checks.same_device("absmax", absmax, device)
    if n < 0:
        raise InputError(f"sizes must not be negative; got {n} elements")
    if packed.numel() != (n + 1) // 2:
        raise InputError(f"packed must have {(n + 1) // 2} bytes for {n} elements; got {packed.numel()}")
    checks.length("absmax", absmax, blocks, f"{n} elements")
    given = ["nested_absmax"] * nested
    given += ["nested_codebook"] * (nested_codebook is not None) + ["offset"] * (offset is not None)
    raise InputError(f"nested absmax needs nested_absmax, nested_codebook and offset together; got {', '.join(given)}")


def _check_dequantize(
    packed: Tensor,
    absmax: Tensor,
    nested_absmax: Tensor | None,
    nested_codebook: Tensor | None,
    offset: Tensor | None,
    format: str,
    blocksize: int,
    shape: list[int],
    dtype: torch.dtype,
) -> None:
    checks.floating("dtype", dtype)
    if min(shape, default=0) < 0:
        raise InputError(f"shape must have no negative sizes; got {tuple(shape)}")
    check_packed(
        packed.device,
        packed,
        absmax,
        nested_absmax,
        nested_codebook,
        offset,
        format,
        blocksize,
        math.prod(shape),
    )


def dequantize_4bit(
    packed: Tensor,
    absmax: Tensor,
    nested_absmax: Tensor | None,
    nested_codebook: Tensor | None,
    offset: Tensor | None,
    format: str,
    blocksize: int,
    shape: list[int],
    dtype: torch.dtype,
) -> Tensor:
    """Undo block-wise 4-bit quantization: level[code] * absmax of its block.

    packed    uint8, ceil(n / 2) bytes, read flat; the high nibble comes first
    absmax    float32, at least ceil(n / blocksize) entries; uint8 codes where nested_absmax is given
    returns   dtype, shape; the product is float32 and rounded once

    Source: Dettmers et al. 2023, QLoRA, section 3 (arXiv 2305.14314).
    """
    n = math.prod(shape)
    flat = packed.reshape(-1)
    codes = torch.stack((flat >> 4, flat & 0xF), dim=-1).reshape(-1)[:n]
    absmax = unnest(absmax.reshape(-1)[: -(-n // blocksize)], nested_absmax, nested_codebook, offset)
    scale = absmax.repeat_interleave(blocksize)[:n]
    return (formats.levels(format, packed.device)[codes.long()] * scale).to(dtype).reshape(shape)


def unnest(
    absmax: Tensor, nested_absmax: Tensor | None, nested_codebook: Tensor | None, offset: Tensor | None
) -> Tensor:
    """The float32 absmax, decoded where it is nested: product and sum are each rounded."""
    if nested_absmax is None or nested_codebook is None or offset is None:
        return absmax
    scale = nested_absmax.reshape(-1).repeat_interleave(formats.NESTED_BLOCKSIZE)[: absmax.numel()]
    return nested_codebook[absmax.long()] * scale + offset


def _fake_dequantize(
    packed: Tensor,
    absmax: Tensor,
    nested_absmax: Tensor | None,
    nested_codebook: Tensor | None,
    offset: Tensor | None,
    format: str,
    blocksize: int,
    shape: list[int],
    dtype: torch.dtype,
) -> Tensor:
    return packed.new_empty(shape, dtype=dtype)


OPS = (
    Op(
        "quantize_4bit",
        "(Tensor x, str format, int blocksize) -> (Tensor, Tensor)",
        QuantizeFacts,
        _quantize_facts,
        quantize_4bit,
        _fake_quantize,
        _check_quantize,
    ),
    Op(
        "dequantize_4bit",
        f"({PACKED}, str format, int blocksize, SymInt[] shape, ScalarType dtype) -> Tensor",
        PackedFacts,
        _dequantize_facts,
        dequantize_4bit,
        _fake_dequantize,
        _check_dequantize,
    ),
)
