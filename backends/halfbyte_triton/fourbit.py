"""4-bit block-wise quantization: fp32, fp16 or bf16 <-> packed codes and one absmax per block.

Layout    byte i holds codes 2i (high nibble) and 2i + 1 (low nibble); absmax[b] scales codes b * blocksize ... .
Work      a program takes TILE elements, a multiple of the block size; threads of one warp share a block.
Limits    block sizes that are powers of two; sizes up to 2^62.
Bound by  memory; quantizing is close to the instruction rate, so codes are found in a few operations (see _encode).
Agrees    bit for bit with the reference: IEEE reciprocal, one product per value, rounded once.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from halfbyte import formats

from .launch import cdiv, config, is_nvidia, launch, warps, width
from .pieces import INTERPRETED, MAGIC, block_absmax, look_up, reciprocal, rounded, widened


@triton.jit
def load_absmax(absmax_ptr, nested_ptr, codebook_ptr, offset_ptr, block, mask, NESTED: tl.constexpr):
    """The float32 absmax of blocks, decoded where it is nested: product and sum are each rounded."""
    if NESTED:
        code = tl.load(absmax_ptr + block, mask=mask).to(tl.int32)  # a byte: inside the codebook, masked or not
        scale = tl.load(nested_ptr + block // 256, mask=mask)
        return tl.load(codebook_ptr + code) * scale + tl.load(offset_ptr)
    else:
        return tl.load(absmax_ptr + block, mask=mask)


# -- quantize ------------------------------------------------------------------------------------------------


@triton.jit
def _encode_nf4(s, table_ptr):
    """Codes of scaled values; a value on a threshold belongs below it, NaN gets 0.

    A cubic through the thresholds' numbers finds the nearest one, k: it is off by at most 0.27 between thresholds,
    and 0.5 would do (tests/backends/triton/test_triton_tables.py).  One comparison with the threshold itself, which a
    shuffle or shared memory serves, then decides between codes k and k + 1.
    """
    if INTERPRETED:  # whose maximum spreads NaN
        s = tl.where(s > -1, s, -1.0)
    else:
        s = tl.maximum(s, -1.0)
    near = ((-4.42463185 * s + 0.64410488) * s + 11.41405378) * s + 6.62003184
    k = (near + MAGIC).to(tl.int32, bitcast=True) & 15
    below = look_up(table_ptr, k, 16) - s  # whose sign is exact
    return k + (below.to(tl.uint32, bitcast=True) >> 31).to(tl.int32)


@triton.jit
def _encode_fp4(s, table_ptr):
    """As above, by bisection over the seven thresholds of the magnitude; code 8 and up is negative."""
    size = tl.abs(s)
    t0 = tl.load(table_ptr)
    t1 = tl.load(table_ptr + 1)
    t2 = tl.load(table_ptr + 2)
    t3 = tl.load(table_ptr + 3)
    t4 = tl.load(table_ptr + 4)
    t5 = tl.load(table_ptr + 5)
    t6 = tl.load(table_ptr + 6)
    high = size > t3
    middle = size > tl.where(high, t5, t1)
    last = tl.where(high, tl.where(middle, t6, t4), tl.where(middle, t2, t0))
    interval = high.to(tl.int32) * 4 + middle.to(tl.int32) * 2 + (size > last).to(tl.int32)
    code = (0x32547610 >> (interval * 4)) & 7
    return code + (s < 0).to(tl.int32) * 8


@triton.jit
def quantize_kernel(
    x_ptr,
    table_ptr,
    packed_ptr,
    absmax_ptr,
    n,
    BLOCKS: tl.constexpr,
    BLOCKSIZE: tl.constexpr,
    FP4: tl.constexpr,
    NVIDIA: tl.constexpr,
    WHOLE: tl.constexpr,
):
    TILE: tl.constexpr = BLOCKS * BLOCKSIZE
    program = tl.program_id(0).to(tl.int64)
    left = tl.minimum(n - program * TILE, TILE).to(tl.int32)
    at = tl.arange(0, BLOCKS)[:, None] * BLOCKSIZE + tl.arange(0, BLOCKSIZE)[None, :]
    if WHOLE:
        x = widened(tl.load(x_ptr + program * TILE + at))
    else:
        x = widened(tl.load(x_ptr + program * TILE + at, mask=at < left, other=0.0))
    absmax = block_absmax(x)
    s = tl.reshape(x * reciprocal(absmax, NVIDIA)[:, None], [TILE])
    if FP4:
        code = _encode_fp4(s, table_ptr)
        blank = 0
    else:
        code = _encode_nf4(s, table_ptr)
        blank = 7
    if not WHOLE:  # an odd count is filled up with the code of 0.0
        code = tl.where(tl.arange(0, TILE) < left, code, blank)
    high, low = tl.split(tl.reshape(code, [TILE // 2, 2]))
    byte = ((high << 4) + low).to(tl.uint8)
    place = tl.arange(0, TILE // 2)
    block = tl.arange(0, BLOCKS)
    if WHOLE:
        tl.store(packed_ptr + program * (TILE // 2) + place, byte)
        tl.store(absmax_ptr + program * BLOCKS + block, absmax)
    else:
        tl.store(packed_ptr + program * (TILE // 2) + place, byte, mask=place < (left + 1) // 2)
        tl.store(absmax_ptr + program * BLOCKS + block, absmax, mask=block * BLOCKSIZE < left)


def quantize_4bit(x: Tensor, format: str, blocksize: int) -> tuple[Tensor, Tensor]:
    x = x.contiguous()
    n = x.numel()
    packed = x.new_empty((n + 1) // 2, dtype=torch.uint8)
    absmax = x.new_empty(cdiv(n, blocksize), dtype=torch.float32)
    if n:
        tuned = config("quantize_4bit", width(x.dtype), x.device)
        tile = max(tuned["TILE"], blocksize)
        launch(
            quantize_kernel,
            (cdiv(n, tile),),
            x.device,
            x,
            thresholds(format, x.device),
            packed,
            absmax,
            n,
            BLOCKS=tile // blocksize,
            BLOCKSIZE=blocksize,
            FP4=formats.FORMATS[format].sign_bit,
            NVIDIA=is_nvidia(x.device),
            WHOLE=n % tile == 0,
            num_warps=warps(tuned, tile),
        )
    return packed, absmax


@functools.cache
def thresholds(format: str, device: torch.device) -> Tensor:
    """The thresholds of a format, filled up to sixteen."""
    values = formats.table("thresholds", format, device)
    return torch.nn.functional.pad(values, (0, 16 - values.numel()), value=math.inf)


# -- dequantize ----------------------------------------------------------------------------------------------


@triton.jit
def dequantize_kernel(
    packed_ptr,
    absmax_ptr,
    nested_ptr,
    codebook_ptr,
    offset_ptr,
    levels_ptr,
    out_ptr,
    n,
    BLOCKS: tl.constexpr,
    BLOCKSIZE: tl.constexpr,
    STEPS: tl.constexpr,
    STAGES: tl.constexpr,
    NESTED: tl.constexpr,
    WHOLE: tl.constexpr,
):
    # A step is small, so that a thread reads as many bytes as become one 16-byte store; the next ones are loaded ahead.
    TILE: tl.constexpr = BLOCKS * BLOCKSIZE
    place = tl.arange(0, TILE // 2)
    block = tl.arange(0, BLOCKS)
    at = block[:, None] * BLOCKSIZE + tl.arange(0, BLOCKSIZE)[None, :]
    for step in tl.range(0, STEPS, num_stages=STAGES):
        tile = tl.program_id(0).to(tl.int64) * STEPS + step
        left = tl.minimum(n - tile * TILE, TILE).to(tl.int32)  # below 0 for a step beyond the end
        inside = None if WHOLE else block * BLOCKSIZE < left
        if WHOLE:
            byte = tl.load(packed_ptr + tile * (TILE // 2) + place).to(tl.int32)
        else:
            byte = tl.load(packed_ptr + tile * (TILE // 2) + place, mask=place * 2 < left, other=0).to(tl.int32)
        absmax = load_absmax(absmax_ptr, nested_ptr, codebook_ptr, offset_ptr, tile * BLOCKS + block, inside, NESTED)
        code = tl.reshape(tl.join(byte >> 4, byte & 15), [TILE])
        level = tl.reshape(look_up(levels_ptr, code, 16), [BLOCKS, BLOCKSIZE])
        values = rounded(level * absmax[:, None], out_ptr.dtype.element_ty)
        if WHOLE:
            tl.store(out_ptr + tile * TILE + at, values)
        else:
            tl.store(out_ptr + tile * TILE + at, values, mask=at < left)


def dequantize_4bit(
    packed: Tensor,
    absmax: Tensor,
    nested_absmax: Tensor | None,
    nested_codebook: Tensor | None,
    offset: Tensor | None,
    format: str,
    blocksize: int,
    shape: Sequence[int],
    dtype: torch.dtype,
) -> Tensor:
    out = packed.new_empty(shape, dtype=dtype)
    n = out.numel()
    if n:
        packed, scales = packed.contiguous(), contiguous_scales(absmax, nested_absmax, nested_codebook, offset)
        tuned = config("dequantize_4bit", width(dtype), packed.device)
        tile = max(tuned["TILE"], blocksize)
        steps = max(tuned["STEPS"] * tuned["TILE"] // tile, 1)
        launch(
            dequantize_kernel,
            (cdiv(n, tile * steps),),
            packed.device,
            packed,
            *scales,
            formats.levels(format, packed.device),
            out,
            n,
            BLOCKS=tile // blocksize,
            BLOCKSIZE=blocksize,
            STEPS=steps,
            STAGES=tuned["num_stages"],
            NESTED=nested_absmax is not None,
            WHOLE=n % (tile * steps) == 0,
            num_warps=tuned["num_warps"],
            enable_fp_fusion=False,
        )
    return out


def contiguous_scales(
    absmax: Tensor, nested_absmax: Tensor | None, nested_codebook: Tensor | None, offset: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """absmax, nested_absmax, nested_codebook, offset for a kernel: absmax again for those that are not there."""
    absmax = absmax.contiguous()
    if nested_absmax is None or nested_codebook is None or offset is None:
        return absmax, absmax, absmax, absmax
    return absmax, nested_absmax.contiguous(), nested_codebook.contiguous(), offset
