"""States of optimizers as pieces of kernels: float32, or 8-bit codes with an absmax per block.

A kernel holds (blocks, elements of a block) of each; `at` is where they are from a pointer on, `block` where their
absmax is.  MASKED accesses touch only what is `inside`.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .codes8 import ANY, nearest_any, nearest_dynamic
from .kept import look_up_kept
from .pieces import block_absmax, look_up

_ANY: tl.constexpr = tl.constexpr(ANY)


@triton.jit
def load(ptr, at, inside, MASKED: tl.constexpr):
    if MASKED:
        return tl.load(ptr + at, mask=inside, other=0)
    else:
        return tl.load(ptr + at)


@triton.jit
def store(ptr, at, value, inside, MASKED: tl.constexpr):
    if MASKED:
        tl.store(ptr + at, value, mask=inside)
    else:
        tl.store(ptr + at, value)


@triton.jit
def decoded(value, scale, book_ptr, EIGHT: tl.constexpr, KEPT: tl.constexpr):
    """A state, float32, of what was loaded.

    KEPT   where `kept` has the codebook, or nothing
    """
    if EIGHT and KEPT != "":
        return look_up_kept(value.to(tl.int32), KEPT).to(tl.float32, bitcast=True) * scale[:, None]
    elif EIGHT:
        code = tl.reshape(value.to(tl.int32), [value.shape[0] * value.shape[1]])
        return tl.reshape(look_up(book_ptr, code, 256), value.shape) * scale[:, None]
    else:
        return value


@triton.jit
def _divided(x, by):
    """x / by, correctly rounded where nothing underflows, with one division for a whole block; 0 where by is 0."""
    inverse = tl.where(by < 3.0e-39, 0.0, tl.div_rn(1.0, by))[:, None]  # below, it would overflow
    q = x * inverse
    rest = tl.fma(-q, tl.broadcast_to(by[:, None], x.shape), x)
    return tl.fma(rest, tl.broadcast_to(inverse, x.shape), q)


@triton.jit
def write_state(
    ptr,
    absmax_ptr,
    table_ptr,
    state,
    at,
    block,
    inside,
    inside_block,
    EIGHT: tl.constexpr,
    BOOK: tl.constexpr,
    NVIDIA: tl.constexpr,
    MASKED: tl.constexpr,
    KEPT: tl.constexpr,
):
    """Store a state.

    KEPT        where `kept` has it, or nothing
    table_ptr   what `codes8.encoding` gives, nudged; for any codebook, its number of negative levels comes after
    """
    if EIGHT:
        if MASKED:
            state = tl.where(inside, state, 0.0)
        largest = block_absmax(state)
        scaled = _divided(state, largest)
        if BOOK == _ANY:
            code = nearest_any(scaled, table_ptr)
            negative = tl.load(table_ptr + 256).to(tl.int32)
            wrong = ((code < negative) != (state < 0)) & (state != 0) & (negative > 0)
            code += tl.where(wrong, tl.where(state > 0, 1, -1), 0)
            code = tl.minimum(tl.maximum(code, 0), 255)
        else:
            # A state of -0.0 comes out of the division as 0.0, which the signed map needs.
            flat = tl.reshape(scaled, [state.shape[0] * state.shape[1]])
            code = tl.reshape(nearest_dynamic(flat, table_ptr, BOOK, True, NVIDIA, KEPT), state.shape)
        store(ptr, at, code.to(tl.uint8), inside, MASKED)
        store(absmax_ptr, block, largest, inside_block, MASKED)
    else:
        store(ptr, at, state, inside, MASKED)
