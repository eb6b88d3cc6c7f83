"""Codes of 8-bit codebooks: the nearest of 256 ascending levels, as pieces of kernels and the tables they read.

The built-in dynamic maps are found by a table of bins.  The bits of a float32 are a piecewise linear logarithm; they
are cut into BINS bins per binade, so narrow that none holds two thresholds.  The entry of a bin is

    bits 31..24  the code at its lower end
    bits 23..0   2^24 - the bits of the first number above its threshold

so that adding the bits of a number carries into the code where it is above the threshold: a multiplication, a look-up
and an addition.  Negative numbers are complemented, which keeps their order, and have bins of their own.  Any other
codebook is searched by bisection.
Source of the idea: csrc/gpu/codes8.cuh, whose bins are cut by shifting and need twice the table.
"""

from __future__ import annotations

import functools
import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from halfbyte import formats

from .kept import SIZE, look_up_kept
from .pieces import look_up

# Which codebook a kernel is compiled for.
ANY, SIGNED, UNSIGNED = 0, 1, 2
_SIGNED: tl.constexpr = tl.constexpr(SIGNED)

# Per map: bins per binade, and the exponent of the magnitude below which everything has the code of 0.  Levels just
# below 1 are 9/640 and 9/1280 apart, so 36 and 72 bins would do; these ones make all bins fit SIZE without a collision.
_BINS = {"dynamic": (40, -22), "dynamic_unsigned": (80, -23)}
_SIZE: tl.constexpr = tl.constexpr(SIZE)
_SIGNED_SCALE: tl.constexpr = tl.constexpr(40 * 512)  # (bits * SCALE) >> 32 is the number of a bin
_UNSIGNED_SCALE: tl.constexpr = tl.constexpr(80 * 512)

# The upper bytes of four words, in one.
UPPER_BYTES: tl.constexpr = tl.constexpr(
    "{ .reg .b32 a, b; prmt.b32 a, $1, $2, 0x0073; prmt.b32 b, $3, $4, 0x0073; prmt.b32 $0, a, b, 0x5410; }"
)


@triton.jit
def nearest_dynamic(
    s,
    table_ptr,
    BOOK: tl.constexpr,
    FINITE: tl.constexpr,
    NVIDIA: tl.constexpr,
    KEPT: tl.constexpr,
):
    """Codes, uint8, of scaled values, a flat tensor, in a dynamic map; NaN gets 0, FINITE says that there is none.

    table_ptr   `dynamic_table`
    KEPT        where `kept` has it, or nothing
    """
    if BOOK == _SIGNED:
        bits = s.to(tl.int32, bitcast=True)
        if FINITE:
            size = tl.maximum(tl.abs(s), 2.384185791015625e-07).to(tl.int32, bitcast=True)  # 2^-22
        else:
            size = tl.maximum(bits & 0x7FFFFFFF, 0x34800000)  # of integers: NaN stays
        key = (size ^ (bits >> 31)).to(tl.uint32, bitcast=True)
    else:
        key = tl.maximum(s, 1.1920928955078125e-07).to(tl.uint32, bitcast=True)  # 2^-23
    SCALE: tl.constexpr = _SIGNED_SCALE if BOOK == _SIGNED else _UNSIGNED_SCALE
    at = tl.umulhi(key, tl.full(key.shape, SCALE, tl.uint32)).to(tl.int32) & (_SIZE - 1)
    if KEPT != "":
        entry = look_up_kept(at, KEPT).to(tl.uint32, bitcast=True)
    else:
        entry = look_up(table_ptr, at, _SIZE).to(tl.uint32, bitcast=True)
    if NVIDIA:
        return tl.inline_asm_elementwise(
            UPPER_BYTES,
            "=r,r,r,r,r",
            [entry + key],
            dtype=tl.uint8,
            is_pure=True,
            pack=4,
        )
    else:
        return ((entry + key) >> 24).to(tl.uint8)


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
def dynamic_table(name: str, nudged: bool, device: torch.device) -> Tensor:
    """The bins of a built-in codebook, int32 (SIZE,), on a device.

    nudged   negative numbers get no code of 0: what the states of optimizers ask for
    """
    signed = name == "dynamic"
    positive = formats.codebook(name, torch.device("cpu"))[127 if signed else 0 :]
    middles = (positive[:-1] + positive[1:]) * 0.5
    rank = torch.arange(1, len(middles) + 1)
    # Codes are 127 + rank and 127 - rank, or rank.  A tie goes to the even one: up where rank is odd, or even.
    steps = middles.view(torch.int32).long() + (rank % 2 != (1 if signed else 0)).long()
    scale, tiny, one = _BINS[name][0] * 512, (127 + _BINS[name][1]) << 23, 127 << 23
    table = torch.zeros(SIZE, dtype=torch.int64)
    # Products by a reciprocal may be an ulp or two above 1.
    _fill(table, scale, tiny, one + 2, steps, 127 if signed else 0)
    _fill(table, scale, 0x7FC00000, 0x7FFFFFFF, steps[:0], 0)  # NaN
    if signed:
        negative = (2**32 - steps[:127]).flip(0)  # of complements, whose codes rise to that of 0
        _fill(table, scale, 2**32 - 1 - one - 2, 2**32 - 1 - tiny, negative[:-1] if nudged else negative, 0)
        _fill(table, scale, 0x80000000, 0x803FFFFF, steps[:0], 0)
    return (table - ((table >> 31) << 32)).to(torch.int32).to(device)


def _fill(table: Tensor, scale: int, first: int, last: int, steps: Tensor, code: int) -> None:
    """Make the bins of keys first to last; at each of the ascending steps the code, `code` before them, rises by 1."""
    number = torch.arange(first * scale >> 32, (last * scale >> 32) + 1)
    low, high = -(-(number << 32) // scale), -(-((number + 1) << 32) // scale) - 1
    before, after = torch.searchsorted(steps, low, right=True), torch.searchsorted(steps, high, right=True)
    step = torch.nn.functional.pad(steps, (0, 1))[before]
    table[number % SIZE] = (((code + before) << 24) + torch.where(before < after, 2**24 - step, -low)) & 0xFFFFFFFF


def which(codebook: Tensor) -> int:
    """The built-in map that a codebook is: known by its memory, as a look at the values would wait for the GPU."""
    for book, name in ((SIGNED, "dynamic"), (UNSIGNED, "dynamic_unsigned")):
        if codebook.data_ptr() == formats.codebook(name, codebook.device).data_ptr():
            return book
    return ANY


def encoding(codebook: Tensor, *, nudged: bool = False) -> tuple[int, Tensor]:
    """Which codebook it is, and the table that its search reads: bins, or midpoints."""
    book = which(codebook)
    if book != ANY:
        return book, dynamic_table("dynamic" if book == SIGNED else "dynamic_unsigned", nudged, codebook.device)
    middles = (codebook[:-1] + codebook[1:]) * 0.5
    return book, torch.nn.functional.pad(middles, (0, 1), value=math.inf)
