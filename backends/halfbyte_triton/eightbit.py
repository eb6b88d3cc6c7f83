"""8-bit block-wise quantization to a codebook of 256 ascending levels.

Work      a program takes whole blocks; a block whose size is not a power of two is padded in registers.
Codes     of the built-in dynamic maps from a table of bins, of any other codebook by bisection (see codes8.py).
Limits    block sizes up to 8192.
Bound by  memory, and by instructions for 16-bit inputs; bisection by its eight look-ups, one after the other.
Agrees    bit for bit with the reference: IEEE reciprocal, midpoints in float32, a tie goes to the even code.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .codes8 import ANY, encoding, nearest_any, nearest_dynamic
from .launch import cdiv, config, is_nvidia, launch, power_of_2, warps, width
from .pieces import block_absmax, look_up, reciprocal, rounded, widened

_ANY: tl.constexpr = tl.constexpr(ANY)


# -- quantize ------------------------------------------------------------------------------------------------


@triton.jit
def quantize_kernel(
    x_ptr,
    table_ptr,
    codes_ptr,
    absmax_ptr,
    n,
    BLOCKS: tl.constexpr,
    BLOCKSIZE: tl.constexpr,
    PADDED: tl.constexpr,
    BOOK: tl.constexpr,
    NVIDIA: tl.constexpr,
    WHOLE: tl.constexpr,
):
    SIZE: tl.constexpr = BLOCKS * PADDED
    program = tl.program_id(0).to(tl.int64)
    begin = program * (BLOCKS * BLOCKSIZE)
    left = tl.minimum(n - begin, BLOCKS * BLOCKSIZE).to(tl.int32)
    column = tl.arange(0, PADDED)[None, :]
    at = tl.arange(0, BLOCKS)[:, None] * BLOCKSIZE + column
    inside = (at < left) & (column < BLOCKSIZE)
    if WHOLE:
        x = widened(tl.load(x_ptr + begin + at))
    else:
        x = widened(tl.load(x_ptr + begin + at, mask=inside, other=0.0))
    absmax = block_absmax(x)
    s = x * reciprocal(absmax, NVIDIA)[:, None]
    if BOOK == _ANY:
        code = nearest_any(s, table_ptr)
    else:
        code = nearest_dynamic(tl.reshape(s, [SIZE]), table_ptr, BOOK, False, NVIDIA, "")
        code = tl.reshape(code, [BLOCKS, PADDED])
    block = tl.arange(0, BLOCKS)
    if WHOLE:
        tl.store(codes_ptr + begin + at, code.to(tl.uint8))
        tl.store(absmax_ptr + program * BLOCKS + block, absmax)
    else:
        tl.store(codes_ptr + begin + at, code.to(tl.uint8), mask=inside)
        tl.store(absmax_ptr + program * BLOCKS + block, absmax, mask=block * BLOCKSIZE < left)


def quantize_8bit(x: Tensor, codebook: Tensor, blocksize: int) -> tuple[Tensor, Tensor]:
    x = x.contiguous()
    n = x.numel()
    codes = x.new_empty(x.shape, dtype=torch.uint8)
    absmax = x.new_empty(cdiv(n, blocksize), dtype=torch.float32)
    if n:
        book, table = encoding(codebook.contiguous())
        tuned = config("quantize_8bit", width(x.dtype), x.device)
        padded = power_of_2(blocksize)
        tile = max(tuned["TILE"], padded)
        blocks = tile // padded
        launch(
            quantize_kernel,
            (cdiv(n, blocks * blocksize),),
            x.device,
            x,
            table,
            codes,
            absmax,
            n,
            BLOCKS=blocks,
            BLOCKSIZE=blocksize,
            PADDED=padded,
            BOOK=book,
            NVIDIA=is_nvidia(x.device),
            WHOLE=padded == blocksize and n % tile == 0,
            num_warps=warps(tuned, tile),
        )
    return codes, absmax


# -- dequantize ----------------------------------------------------------------------------------------------


@triton.jit
def dequantize_kernel(
    codes_ptr,
    absmax_ptr,
    codebook_ptr,
    out_ptr,
    n,
    BLOCKS: tl.constexpr,
    BLOCKSIZE: tl.constexpr,
    PADDED: tl.constexpr,
    WHOLE: tl.constexpr,
):
    program = tl.program_id(0).to(tl.int64)
    begin = program * (BLOCKS * BLOCKSIZE)
    left = tl.minimum(n - begin, BLOCKS * BLOCKSIZE).to(tl.int32)
    column = tl.arange(0, PADDED)[None, :]
    at = tl.arange(0, BLOCKS)[:, None] * BLOCKSIZE + column
    inside = (at < left) & (column < BLOCKSIZE)
    block = tl.arange(0, BLOCKS)
    if WHOLE:
        code = tl.load(codes_ptr + begin + at).to(tl.int32)
        absmax = tl.load(absmax_ptr + program * BLOCKS + block)
    else:
        code = tl.load(codes_ptr + begin + at, mask=inside, other=0).to(tl.int32)
        absmax = tl.load(absmax_ptr + program * BLOCKS + block, mask=block * BLOCKSIZE < left, other=0.0)
    level = look_up(codebook_ptr, tl.reshape(code, [BLOCKS * PADDED]), 256)
    values = rounded(tl.reshape(level, [BLOCKS, PADDED]) * absmax[:, None], out_ptr.dtype.element_ty)
    if WHOLE:
        tl.store(out_ptr + begin + at, values)
    else:
        tl.store(out_ptr + begin + at, values, mask=inside)


def dequantize_8bit(codes: Tensor, absmax: Tensor, codebook: Tensor, blocksize: int, dtype: torch.dtype) -> Tensor:
    out = codes.new_empty(codes.shape, dtype=dtype)
    n = out.numel()
    if n:
        tuned = config("dequantize_8bit", width(dtype), out.device)
        padded = power_of_2(blocksize)
        tile = max(tuned["TILE"], padded)
        blocks = tile // padded
        launch(
            dequantize_kernel,
            (cdiv(n, blocks * blocksize),),
            out.device,
            codes.contiguous(),
            absmax.contiguous(),
            codebook.contiguous(),
            out,
            n,
            BLOCKS=blocks,
            BLOCKSIZE=blocksize,
            PADDED=padded,
            WHOLE=padded == blocksize and n % tile == 0,
            num_warps=tuned["num_warps"],
        )
    return out
