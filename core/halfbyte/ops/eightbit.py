"""8-bit block-wise quantization to a codebook of 256 levels."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ..errors import InputError
from ..op import Op
from . import checks


class Facts(NamedTuple):
    """What a kernel may be chosen on; dtype is that of the floating side."""

    device: torch.device
    dtype: torch.dtype
    blocksize: int


def _check_codebook(codebook: Tensor, blocksize: int, device: torch.device) -> None:
    if codebook.numel() != 256:
        raise InputError(f"codebook must have 256 entries; got {codebook.numel()}")
    checks.dtype_is("codebook", codebook, torch.float32)
    checks.same_device("codebook", codebook, device)
    if not isinstance(blocksize, int) or blocksize < 1:
        raise InputError(f"blocksize must be an integer of at least 1; got {blocksize!r}")


# -- quantize_8bit -------------------------------------------------------------------------------------------


def _quantize_facts(x: Tensor, codebook: Tensor, blocksize: int) -> Facts:
    return Facts(x.device, x.dtype, blocksize)


def _check_quantize(x: Tensor, codebook: Tensor, blocksize: int) -> None:
    checks.floating("x", x.dtype)
    _check_codebook(codebook, blocksize, x.device)


def quantize_8bit(x: Tensor, codebook: Tensor, blocksize: int) -> tuple[Tensor, Tensor]:
    """Quantize block-wise to the nearest of 256 levels.

    x         float32, float16, bfloat16; any shape, read flat
    codebook  float32 (256,), ascending
    returns   codes uint8, x's shape; absmax float32 (ceil(n / blocksize),)

    The scaled value is x * (1 / absmax) with the IEEE float32 reciprocal.  A tie between two levels goes to the
    even code.  NaN does not enter absmax and gets code 0; a block whose reciprocal overflows gets codes 0.

    Source: Dettmers et al. 2022, 8-bit Optimizers via Block-wise Quantization, section 2 (arXiv 2110.02861).
    """
    n = x.numel()
    flat = x.reshape(-1).float()
    blocks = F.pad(flat, (0, -n % blocksize)).reshape(-1, blocksize)
    absmax = blocks.abs().nan_to_num(nan=0.0, posinf=math.inf).amax(dim=1) if n else flat.new_empty(0)
    reciprocal = 1.0 / absmax
    codes = nearest(blocks * reciprocal[:, None], codebook)
    codes = torch.where(reciprocal.isinf()[:, None], 0, codes)
    return codes.reshape(-1)[:n].reshape(x.shape), absmax


def nearest(scaled: Tensor, codebook: Tensor) -> Tensor:
    """Index (uint8) of the nearest level; halfway between two levels the even one."""
    midpoints = (codebook[:-1] + codebook[1:]) * 0.5
    index = torch.bucketize(scaled, midpoints)
    tie = scaled == F.pad(midpoints, (0, 1), value=math.nan)[index]
    index = index + (tie & (index % 2 == 1))
    return torch.where(scaled.isnan(), 0, index).to(torch.uint8)


def _fake_quantize(x: Tensor, codebook: Tensor, blocksize: int) -> tuple[Tensor, Tensor]:
    codes = x.new_empty(x.shape, dtype=torch.uint8)
    return codes, x.new_empty(((x.numel() + blocksize - 1) // blocksize,), dtype=torch.float32)


# -- dequantize_8bit -----------------------------------------------------------------------------------------


def _dequantize_facts(codes: Tensor, absmax: Tensor, codebook: Tensor, blocksize: int, dtype: torch.dtype) -> Facts:
    return Facts(codes.device, dtype, blocksize)


def _check_dequantize(codes: Tensor, absmax: Tensor, codebook: Tensor, blocksize: int, dtype: torch.dtype) -> None:
    checks.floating("dtype", dtype)
    checks.dtype_is("codes", codes, torch.uint8)
    checks.dtype_is("absmax", absmax, torch.float32)
    _check_codebook(codebook, blocksize, codes.device)
    checks.same_device("absmax", absmax, codes.device)
    checks.length("absmax", absmax, -(-codes.numel() // blocksize), f"{codes.numel()} codes")


def dequantize_8bit(codes: Tensor, absmax: Tensor, codebook: Tensor, blocksize: int, dtype: torch.dtype) -> Tensor:
    """Undo block-wise 8-bit quantization: codebook[code] * absmax of its block.

    codes     uint8, any shape
    absmax    float32, at least ceil(n / blocksize) entries
    returns   dtype, codes' shape; the product is float32 and rounded once
    """
    scale = absmax.reshape(-1).repeat_interleave(blocksize)[: codes.numel()]
    return (codebook[codes.reshape(-1).long()] * scale).to(dtype).reshape(codes.shape)


def _fake_dequantize(codes: Tensor, absmax: Tensor, codebook: Tensor, blocksize: int, dtype: torch.dtype) -> Tensor:
    return codes.new_empty(codes.shape, dtype=dtype)


OPS = (
    Op(
        "quantize_8bit",
        "(Tensor x, Tensor codebook, int blocksize) -> (Tensor, Tensor)",
        Facts,
        _quantize_facts,
        quantize_8bit,
        _fake_quantize,
        _check_quantize,
    ),
    Op(
        "dequantize_8bit",
        "(Tensor codes, Tensor absmax, Tensor codebook, int blocksize, ScalarType dtype) -> Tensor",
        Facts,
        _dequantize_facts,
        dequantize_8bit,
        _fake_dequantize,
        _check_dequantize,
    ),
)
