"""8-bit block-wise quantization to a codebook of 256 ascending levels.

Work      a program takes whole blocks; a block whose size is not a power of two is padded in registers.
Codes     of the built-in dynamic maps by their closed form and one comparison (see `nearest_dynamic`), of any other
          codebook by bisection.
Limits    block sizes up to 8192.
Bound by  memory, and by instructions for 16-bit inputs; bisection by its eight look-ups, one after the other.
Agrees    bit for bit with the reference: IEEE reciprocal, midpoints in float32, a tie goes to the even code.
"""

from __future__ import annotations

import functools
import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from halfbyte import formats

from .fourbit import MAGIC, block_absmax, reciprocal, rounded, warps, widened, width
from .launch import cdiv, config, launch, power_of_2

# Which codebook a kernel is compiled for.
ANY, SIGNED, UNSIGNED = 0, 1, 2
_SIGNED: tl.constexpr = tl.constexpr(SIGNED)
_UNSIGNED: tl.constexpr = tl.constexpr(UNSIGNED)
_ANY: tl.constexpr = tl.constexpr(ANY)

# (bits of u + OFFSET) * FACTOR / 2^32 is BASE + 6 from u = 0.0997 on and one less per decade below it, see
# nearest_dynamic; BASE is such that OFFSET is positive.
_FACTOR, _BASE = 154, 34
_OFFSET = (_BASE + 6) * 2**32 // _FACTOR - int((127 - 0.073 - 2**32 / _FACTOR / 2**23) * 2**23)
DECADE_FACTOR: tl.constexpr = tl.constexpr(_FACTOR)
DECADE_BASE: tl.constexpr = tl.constexpr(_BASE)
DECADE_OFFSET: tl.constexpr = tl.constexpr(_OFFSET)


# -- the nearest level ---------------------------------------------------------------------------------------


@triton.jit
def nearest_dynamic(s, table_ptr, BOOK: tl.constexpr, FINITE: tl.constexpr):
    """Codes of scaled values, a flat tensor, in a dynamic map; NaN gets 0, unless FINITE says there is none.

    The map has n = 2^d levels (unsigned: 2^(d+1)) of each sign in the decade from 10^(d-7) to 10^(d-6), d = 0..6,
    evenly spaced, so that the number of the threshold nearest to u = |s| is  k = n * (10/9 * u * 10^(6-d) + 8/9)  to
    the nearest integer.  Comparing with that threshold decides exactly; for the tie that belongs above it, the table
    holds the float32 below.  A neighboring decade's line serves as well near its end, so that d may be read off the
    bits of u, which are a piecewise linear logarithm: 3.3247 * 2^23 of them are a decade, near enough.
    Source: reference/PERFORMANCE 4.7, checked in tests/backends/triton/test_triton_tables.py.

    table_ptr   `dynamic_table`: 256 thresholds by k, 8 factors by decade
    """
    u = tl.abs(s) if BOOK == _SIGNED else tl.where(s > 0, s, 0.0)
    bits = u.to(tl.uint32, bitcast=True)
    decade = tl.umulhi(bits + DECADE_OFFSET, tl.full(bits.shape, DECADE_FACTOR, tl.uint32)).to(tl.int32)
    d = tl.minimum(tl.maximum(decade, DECADE_BASE), DECADE_BASE + 6) - DECADE_BASE
    factor = tl.gather(tl.load(table_ptr + 256 + tl.arange(0, 8)), d, 0)
    FIRST: tl.constexpr = 1 if BOOK == _SIGNED else 2  # n of decade 0
    eight_ninths = ((d << 23) + (0x3F638E39 if FIRST == 1 else 0x3FE38E39)).to(tl.float32, bitcast=True)
    k = (tl.fma(factor, u, eight_ninths) + MAGIC).to(tl.int32, bitcast=True) & 511
    threshold = tl.gather(tl.load(table_ptr + tl.arange(0, 256)), k & 255, 0)
    rank = k - FIRST + (u > threshold).to(tl.int32)
    if BOOK == _SIGNED:
        code = tl.where(s < 0, 127 - tl.minimum(rank, 127), 127 + rank)
        return code if FINITE else tl.where(s == s, code, 0)
    else:
        return rank


@triton.jit
def nearest_any(s, midpoints_ptr):
    """Codes by bisection over 255 ascending midpoints, filled up with infinity to 256; a tie goes to the even code."""
    code = tl.zeros_like(s).to(tl.int32)
    for power in tl.static_range(8):
        code += tl.where(tl.load(midpoints_ptr + code + ((128 >> power) - 1)) < s, 128 >> power, 0)
    tie = tl.load(midpoints_ptr + code) == s
    code += (tie & (code % 2 == 1)).to(tl.int32)
    return tl.where(s == s, code, 0)


@functools.cache
def dynamic_table(name: str, device: torch.device) -> Tensor:
    """What `nearest_dynamic` looks up, on a device."""
    book = formats.codebook(name, torch.device("cpu"))
    signed = name == "dynamic"
    positive = book[127:] if signed else book
    midpoints = (positive[:-1] + positive[1:]) * 0.5  # of ranks k - 1 and k, k = 1 ...
    k = torch.arange(1, len(midpoints) + 1)
    # Codes are 127 + rank and 127 - rank, or rank: the even one is above where k is odd, or even.
    above = k % 2 == (1 if signed else 0)
    midpoints = torch.where(above, torch.nextafter(midpoints, torch.tensor(0.0)), midpoints)
    first = 1 if signed else 2
    thresholds = torch.full((256,), math.inf)
    thresholds[(k - 1 + first) % 256] = midpoints

    decade = torch.arange(8)
    factors = first * 10 / 9 * 2.0 ** decade.double() * 10.0 ** (6 - decade.double())
    return torch.cat((thresholds, factors.float())).to(device)


def which(codebook: Tensor) -> int:
    """The built-in map that a codebook is: known by its memory, as a look at the values would wait for the GPU."""
    for book, name in ((SIGNED, "dynamic"), (UNSIGNED, "dynamic_unsigned")):
        if codebook.data_ptr() == formats.codebook(name, codebook.device).data_ptr():
            return book
    return ANY


def encoding(codebook: Tensor) -> tuple[int, Tensor]:
    """Which codebook it is, and the table that its search reads."""
    book = which(codebook)
    if book != ANY:
        return book, dynamic_table("dynamic" if book == SIGNED else "dynamic_unsigned", codebook.device)
    middles = (codebook[:-1] + codebook[1:]) * 0.5
    return book, torch.nn.functional.pad(middles, (0, 1), value=math.inf)


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
    s = x * reciprocal(absmax)[:, None]
    if BOOK == _ANY:
        code = nearest_any(s, table_ptr)
    else:
        code = tl.reshape(nearest_dynamic(tl.reshape(s, [SIZE]), table_ptr, BOOK, False), [BLOCKS, PADDED])
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
    level = tl.gather(tl.load(codebook_ptr + tl.arange(0, 256)), tl.reshape(code, [BLOCKS * PADDED]), 0)
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
