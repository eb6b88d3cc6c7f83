"""Small pieces that kernels share: conversions, maxima, look-ups, and what makes up for Triton's interpreter."""

from __future__ import annotations

import os

import triton
import triton.language as tl

INTERPRETED: tl.constexpr = tl.constexpr(
    os.environ.get("TRITON_INTERPRET", "").lower() in ("1", "true", "on", "yes", "y")
)

# 1.5 * 2^23: a float32 below 2^22 added to it is rounded to an integer, in the low bits.
MAGIC: tl.constexpr = tl.constexpr(12582912.0)


@triton.jit
def rounded(x, dtype: tl.constexpr):
    """float32 to dtype, to the nearest, ties to even."""
    if INTERPRETED and dtype == tl.bfloat16:  # which cuts bits off (triton 3.6 to 3.9)
        bits = x.to(tl.int32, bitcast=True)
        even = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
        return tl.where(x == x, even, 0x7FC0).to(tl.int16).to(tl.bfloat16, bitcast=True)
    return x.to(dtype)


@triton.jit
def widened(x):
    """float32 of any float."""
    if INTERPRETED and x.dtype == tl.bfloat16:  # whose subnormals it gets wrong
        return (x.to(tl.int16, bitcast=True).to(tl.int32) << 16).to(tl.float32, bitcast=True)
    return x.to(tl.float32)


@triton.jit
def or_zero(x):
    """x, and 0 where it is NaN or negative."""
    if INTERPRETED:  # whose maximum spreads NaN
        return tl.where(x > 0, x, 0.0)
    return tl.maximum(x, 0.0)


@triton.jit
def block_absmax(x):
    """The largest magnitude of each row, NaN left out."""
    magnitude = tl.abs(x)
    if INTERPRETED:
        magnitude = tl.where(magnitude >= 0, magnitude, 0.0)
    ROWS: tl.constexpr = x.shape[0]
    COLUMNS: tl.constexpr = x.shape[1]
    if COLUMNS >= 256:  # of eight in a thread, then over a warp as integers, for which NVIDIA has an instruction
        magnitude = or_zero(tl.max(tl.reshape(magnitude, [ROWS, COLUMNS // 8, 8]), axis=2))
        return tl.max(magnitude.to(tl.int32, bitcast=True), axis=1).to(tl.float32, bitcast=True)
    else:
        return or_zero(tl.max(magnitude, axis=1))


# triton 3.2 has no tl.gather, and 3.3 fails to compile it for more than one warp.
GATHERS = tuple(map(int, triton.__version__.split(".")[:2])) >= (3, 4)

if GATHERS:

    @triton.jit
    def look_up(table_ptr, index, SIZE: tl.constexpr):
        """table[index], of a flat tensor of indices below SIZE: through registers or shared memory."""
        return tl.gather(tl.load(table_ptr + tl.arange(0, SIZE)), index, 0)

else:

    @triton.jit
    def look_up(table_ptr, index, SIZE: tl.constexpr):
        return tl.load(table_ptr + index)


@triton.jit
def reciprocal(absmax, NVIDIA: tl.constexpr):
    """1 / absmax; NaN where that overflows, so that every code becomes 0."""
    if NVIDIA:  # the same number in half the instructions of a division
        r = tl.inline_asm_elementwise("rcp.rn.f32 $0, $1;", "=r,r", [absmax], dtype=tl.float32, is_pure=True, pack=1)
    else:
        r = tl.div_rn(1.0, absmax)
    return tl.where(r == float("inf"), float("nan"), r)
