"""The kernels: plain torch here; a real backend would call its own library."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable

import torch
from torch import Tensor

from halfbyte import formats

NESTED_BLOCKSIZE = formats.NESTED_BLOCKSIZE


def quantize_4bit(x: Tensor, format: str, blocksize: int) -> tuple[Tensor, Tensor]:
    """Block by block, so that the intermediate values of one block at a time are in memory."""
    flat = x.reshape(-1).float()
    n, step = flat.numel(), 1024 * blocksize
    packed = x.new_empty(((n + 1) // 2,), dtype=torch.uint8)
    absmax = x.new_empty((-(-n // blocksize),), dtype=torch.float32)
    for start in range(0, n, step):
        part = flat[start : start + step]
        blocks = torch.nn.functional.pad(part, (0, -len(part) % blocksize)).reshape(-1, blocksize)
        largest = blocks.abs().nan_to_num(nan=0.0, posinf=math.inf).amax(1)
        reciprocal = 1 / largest
        scaled = (blocks * reciprocal[:, None]).masked_fill(reciprocal.isinf()[:, None], math.nan)
        codes = torch.bucketize(scaled, formats.table("thresholds", format, x.device)).masked_fill(scaled.isnan(), 0)
        codes = codes.reshape(-1)[: len(part)].to(torch.uint8)
        if len(codes) % 2:
            codes = torch.cat((codes, codes.new_tensor([7])))  # the code of 0
        packed[start // 2 : start // 2 + len(codes) // 2] = (codes[0::2] << 4) | codes[1::2]
        absmax[start // blocksize : start // blocksize + len(largest)] = largest
    return packed, absmax


def _dequantize(
    decode: Callable[[Tensor, str], Tensor],
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
    n = math.prod(shape)
    blocks = -(-n // blocksize)
    scale = absmax.reshape(-1)[:blocks]
    if nested_absmax is not None and nested_codebook is not None and offset is not None:
        outer = nested_absmax.reshape(-1).repeat_interleave(NESTED_BLOCKSIZE)[:blocks]
        scale = nested_codebook[scale.long()] * outer + offset
    values = decode(packed.reshape(-1), format)[:n]
    return (values * scale.repeat_interleave(blocksize)[:n]).to(dtype).reshape(shape)


def _by_nibble(packed: Tensor, format: str) -> Tensor:
    codes = torch.stack((packed >> 4, packed & 15), -1).reshape(-1)
    return formats.levels(format, packed.device)[codes.long()]


def _by_byte(packed: Tensor, format: str) -> Tensor:
    return _byte_table(format)[packed.long()].reshape(-1)


@functools.cache
def _byte_table(format: str) -> Tensor:
    """(256, 2): both values of every byte."""
    return _by_nibble(torch.arange(256, dtype=torch.uint8), format).reshape(256, 2)


DEQUANTIZE = {
    "byte": functools.partial(_dequantize, _by_byte),
    "nibble": functools.partial(_dequantize, _by_nibble),
}


def swap_pairs(x: Tensor) -> Tensor:
    return x.unflatten(-1, (x.shape[-1] // 2, 2)).flip(-1).reshape(x.shape)
