"""The linear layer over a 4-bit weight: y = x @ dequantized weight^T + bias, and its gradient for x.

Layout    row n of the weight is K/2 bytes of the packed tensor; a block of `blocksize` values shares one absmax.
Work      a program takes BM rows of x and BN of the weight over a share of K, and computes the transposed product:
          the weight, decoded in registers, is the operand of which matrix units take 64 rows (wgmma) or 16 (mma,
          mfma, wmma), so that one row of x wastes little.  A step takes CHUNKS chunks of K, whose codes and absmax are
          loaded at once.  Shares of K are summed by a second kernel, in order.
Scales    SUM: a dot covers values of one block, its float32 result is multiplied by their absmax: nothing but
          the levels is rounded to x's dtype.  Otherwise the weight itself is scaled and rounded, as in the reference.
Limits    K a multiple of the block size or of 64, whichever is less; other shapes, and many rows, are dequantized and
          multiplied by torch.
Bound by  memory for few rows, decoding and matrix units for many.
"""

from __future__ import annotations

import functools
import logging
import math
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from halfbyte import formats
from halfbyte.errors import KernelUnusable

from . import decode
from .fourbit import contiguous_scales, dequantize_4bit, load_absmax
from .launch import Config, arch, cdiv, config, is_nvidia, launch, power_of_2, processors
from .pieces import INTERPRETED, look_up, rounded, widened

_LOG = logging.getLogger("halfbyte.triton")
_VERSION = tuple(map(int, triton.__version__.split(".")[:2]))
FEWEST = 8 if _VERSION >= (3, 6) else 16  # rows of x that a dot takes


@triton.jit
def product(a, b, acc):
    """acc + a @ b in float32."""
    if INTERPRETED:  # whose bfloat16 dot multiplies bit patterns (triton issue 11584)
        return tl.dot(widened(a), widened(b), acc, input_precision="ieee")
    else:
        return tl.dot(a, b, acc, input_precision="ieee")


@triton.jit
def _weight(word, levels_ptr, ASSEMBLY: tl.constexpr, dtype: tl.constexpr):
    """Levels, in dtype, of words of eight codes (ROWS, WORDS): (ROWS, 8 * WORDS), in the order of `_order`.

    levels_ptr   the sixteen levels, or `decode.words`
    """
    ROWS: tl.constexpr = word.shape[0]
    EACH: tl.constexpr = word.shape[1] // 4
    if ASSEMBLY != "":
        # Of tensors, as Triton moves no layout past scalars, and of a copy for each thread of a quad, as ptxas would
        # keep what is the same in all threads where no instruction can use it.
        one = levels_ptr + 4 * (tl.arange(0, 4 * EACH)[None, :] // EACH)
        a, b, c, d = tl.inline_asm_elementwise(
            ASSEMBLY,
            "=&r,=&r,=&r,=&r,r,r,r,r,r",
            [word, tl.load(one), tl.load(one + 1), tl.load(one + 2), tl.load(one + 3)],
            dtype=(tl.int32, tl.int32, tl.int32, tl.int32),
            is_pure=True,
            pack=1,
        )
        pair = tl.join(tl.join(a, b), tl.join(c, d))  # ..., number of the byte: low bit, high bit
        high = (pair & 0xFFFF).to(tl.int16).to(dtype, bitcast=True)
        low = (pair >> 16).to(tl.int16).to(dtype, bitcast=True)
    else:
        byte = tl.join(tl.join(word, word >> 8), tl.join(word >> 16, word >> 24))
        code = tl.reshape(byte & 255, [byte.numel])
        high = tl.reshape(rounded(look_up(levels_ptr, code >> 4, 16), dtype), byte.shape)
        low = tl.reshape(rounded(look_up(levels_ptr, code & 15, 16), dtype), byte.shape)
    all = tl.reshape(tl.join(high, low), [ROWS, 4, EACH, 2, 2, 2])
    return tl.reshape(tl.permute(all, [0, 4, 3, 2, 1, 5]), [ROWS, 32 * EACH])


@triton.jit
def _halves(all):
    """(ROWS, 2 * COLUMNS) -> its left and right half."""
    ROWS: tl.constexpr = all.shape[0]
    COLUMNS: tl.constexpr = all.shape[1] // 2
    return tl.split(tl.permute(tl.reshape(all, [ROWS, 2, COLUMNS]), [0, 2, 1]))


@triton.jit
def _part(all, INDEX: tl.constexpr, PARTS: tl.constexpr):
    """(ROWS, PARTS * COLUMNS) -> one of 1, 2 or 4 tensors of (ROWS, COLUMNS)."""
    if PARTS == 1:
        return all
    else:
        left, right = _halves(all)
        half = left if 2 * INDEX < PARTS else right
        if PARTS == 2:
            return half
        else:
            left, right = _halves(half)
            return left if INDEX % 2 == 0 else right


@triton.jit
def _order(CHUNK: tl.constexpr):
    """Which k each column of a decoded chunk is.

    A thread of a quad holds columns 2t, 2t + 1 and 2t + 8, 2t + 9 of every sixteen that a matrix unit takes.  They are
    given to codes that lie side by side, so that it reads whole words: t is the upper part of k, not a middle one.
    """
    EACH: tl.constexpr = CHUNK // 32  # words of a thread
    column = tl.arange(0, CHUNK)
    word = (column // 2) % 4 * EACH + (column // 8) % EACH
    k = word * 8 + column // (8 * EACH) * 2 + column % 2
    return tl.max_contiguous(tl.multiple_of(k, 2), 2)


@triton.jit
def linear_kernel(
    x_ptr,
    packed_ptr,
    absmax_ptr,
    nested_ptr,
    codebook_ptr,
    offset_ptr,
    levels_ptr,
    bias_ptr,
    out_ptr,
    M,
    N,
    K: tl.constexpr,
    BLOCKSIZE: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    CHUNK: tl.constexpr,
    CHUNKS: tl.constexpr,
    STEPS: tl.constexpr,
    STAGES: tl.constexpr,
    SUM: tl.constexpr,
    ORDERED: tl.constexpr,
    NESTED: tl.constexpr,
    BIAS: tl.constexpr,
    ASSEMBLY: tl.constexpr,
):
    WORDS: tl.constexpr = CHUNK // 8
    SHARE: tl.constexpr = STEPS * CHUNKS * CHUNK
    n = tl.program_id(0) * BN + tl.arange(0, BN)
    m = tl.program_id(1) * BM + tl.arange(0, BM)
    share = tl.program_id(2)
    # Rows beyond the end read the last one and are not stored.
    row = tl.minimum(n, N - 1).to(tl.int64)
    words_ptr = packed_ptr.to(tl.pointer_type(tl.int32))
    w_ptrs = words_ptr + (row * (K // 8) + share * (SHARE // 8))[:, None] + tl.arange(0, CHUNKS * WORDS)[None, :]
    x_rows = tl.minimum(m, M - 1).to(tl.int64) * K + share * SHARE
    if ORDERED:
        k_of_column = tl.arange(0, CHUNK)
    else:
        k_of_column = _order(CHUNK)
    x_ptrs = x_ptr + x_rows[None, :] + k_of_column[:, None]
    dtype: tl.constexpr = x_ptr.dtype.element_ty
    acc = tl.zeros([BN, BM], tl.float32)
    for step in tl.range(0, STEPS, num_stages=STAGES):
        # What a row has for all chunks of a step lies together, and is loaded at once.
        words = tl.load(w_ptrs + step * (CHUNKS * WORDS))
        if BLOCKSIZE == CHUNK:
            blocks = (row * (K // CHUNK) + (share * STEPS + step) * CHUNKS)[:, None] + tl.arange(0, CHUNKS)[None, :]
            scales = load_absmax(absmax_ptr, nested_ptr, codebook_ptr, offset_ptr, blocks, None, NESTED)
        for chunk in tl.static_range(CHUNKS):
            at = step * CHUNKS + chunk
            word = _part(words, chunk, CHUNKS)
            x = tl.load(x_ptrs + at * CHUNK)
            k = share * SHARE + at * CHUNK
            if BLOCKSIZE == CHUNK:
                absmax = tl.reshape(_part(scales, chunk, CHUNKS), [BN])
            else:
                if K % BLOCKSIZE == 0:
                    block = row * (K // BLOCKSIZE) + k // BLOCKSIZE
                else:
                    block = (row * K + k) // BLOCKSIZE
                absmax = load_absmax(absmax_ptr, nested_ptr, codebook_ptr, offset_ptr, block, None, NESTED)
            w = _weight(word, levels_ptr, ASSEMBLY, dtype if SUM or ASSEMBLY != "" else tl.float32)
            if SUM:
                acc += product(w, x, tl.zeros([BN, BM], tl.float32)) * absmax[:, None]
            else:
                acc = product(rounded(widened(w) * absmax[:, None], dtype), x, acc)
    inside = (n < N)[:, None] & (m < M)[None, :]
    if BIAS:
        acc += widened(tl.load(bias_ptr + n, mask=n < N, other=0.0))[:, None]
    # Tile by tile, so that places within one need 32 bits only.
    first = (share.to(tl.int64) * M + tl.program_id(1) * BM) * N + tl.program_id(0) * BN
    place = tl.arange(0, BM)[None, :] * N + tl.arange(0, BN)[:, None]
    tl.store(out_ptr + first + place, rounded(acc, out_ptr.dtype.element_ty), mask=inside)


@triton.jit
def reduce_kernel(part_ptr, bias_ptr, out_ptr, count, N, SHARES: tl.constexpr, TILE: tl.constexpr, BIAS: tl.constexpr):
    """The sum over the first dimension of (SHARES, M, N), in order, plus bias."""
    at = tl.program_id(0).to(tl.int64) * TILE + tl.arange(0, TILE)
    inside = at < count
    total = tl.load(part_ptr + at, mask=inside, other=0.0)
    for share in tl.static_range(1, SHARES):
        total += tl.load(part_ptr + share * count + at, mask=inside, other=0.0)
    if BIAS:
        total += widened(tl.load(bias_ptr + at % N, mask=inside, other=0.0))
    tl.store(out_ptr + at, rounded(total, out_ptr.dtype.element_ty), mask=inside)


def linear_4bit(
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
    k = x.shape[-1]
    m = math.prod(x.shape[:-1])
    n = out_features
    if not (m and n):
        return x.new_empty((*x.shape[:-1], n))
    nested = (nested_absmax, nested_codebook, offset)
    name = arch(x.device)
    hopper = specialized(name)
    if hopper is not None and hopper.takes(x, blocksize, nested_absmax is not None):
        apart = config("linear_4bit_hopper", bucket(m, x.dtype), x.device)
        if apart:
            try:
                y: Tensor = hopper.linear_4bit(x, packed, absmax, nested, bias, format, n, apart)
                return y
            except KernelUnusable as error:
                _LOG.warning("the kernel for sm_90 is given up: %s", error)
                given_up.add(name)
                specialized.cache_clear()
    tuned = config("linear_4bit", bucket(m, x.dtype), x.device)
    chunk = min(blocksize, tuned.get("CHUNK", 0))  # values of K that one dot covers
    if not chunk or not k or k % chunk:
        weight = dequantize_4bit(packed, absmax, *nested, format, blocksize, (n, k), x.dtype)
        return torch.nn.functional.linear(x, weight, bias)
    x, packed, scales = x.contiguous(), aligned(packed.contiguous()), contiguous_scales(absmax, *nested)
    bias = None if bias is None else bias.contiguous()
    y = x.new_empty((*x.shape[:-1], n))
    if tuned["ORDERED"]:  # as _order would read it, but in wide pieces
        x = x.view(m, k // chunk, 4, chunk // 32, 4, 2).permute(0, 1, 4, 3, 2, 5).contiguous()
    bm, bn = max(tuned["BM"], FEWEST), min(tuned["BN"], max(power_of_2(n), 16))
    chunks = math.gcd(k // chunk, tuned["CHUNKS"])
    steps = k // chunk // chunks
    shares = shares_of(steps, cdiv(n, bn) * cdiv(m, bm), tuned, x.device)
    out = y if shares == 1 else x.new_empty((shares, m, n), dtype=torch.float32)
    assembly, levels = "", formats.levels(format, x.device)
    if is_nvidia(x.device) and x.dtype.itemsize == 2:
        assembly, levels = decode.assembly(format, x.dtype), decode.words(format, x.dtype, x.device)
    launch(
        linear_kernel,
        (cdiv(n, bn), cdiv(m, bm), shares),
        x.device,
        x,
        packed,
        *scales,
        levels,
        x if bias is None else bias,
        out,
        m,
        n,
        K=k,
        BLOCKSIZE=blocksize,
        BM=bm,
        BN=bn,
        CHUNK=chunk,
        CHUNKS=chunks,
        STEPS=steps // shares,
        STAGES=tuned["num_stages"],
        SUM=bool(tuned["SUM"]),
        ORDERED=bool(tuned["ORDERED"]),
        NESTED=nested_absmax is not None,
        BIAS=bias is not None and shares == 1,
        ASSEMBLY=assembly,
        num_warps=tuned["num_warps"],
    )
    if shares > 1:
        sum_shares(out, bias, y)
    return y


given_up: set[str] = set()  # archs whose own kernel does not compile


@functools.cache
def specialized(name: str) -> Any:
    """The module with a kernel of an arch's own, where the installed Triton has what it is written in."""
    if name != "sm_90" or name in given_up or INTERPRETED or _VERSION < (3, 6):
        return None
    from . import hopper4bit

    return hopper4bit


def aligned(tensor: Tensor) -> Tensor:
    """At an address from which words can be read."""
    return tensor.clone() if tensor.data_ptr() % 16 else tensor


def bucket(m: int, dtype: torch.dtype) -> str:
    """Rows of x: up to 4, then up to the next power of two from 16 on."""
    rows = 4 if m <= 4 and dtype is not torch.float32 else min(max(power_of_2(m), 16), 1024)
    return f"float32/{rows}" if dtype is torch.float32 else str(rows)


def shares_of(steps: int, tiles: int, tuned: Config, device: torch.device) -> int:
    """Into how many shares K is cut to fill the GPU: a divisor of the number of steps.

    tiles   programs without a division
    """
    wanted = min(max(tuned["PROGRAMS"] * processors(device) // tiles, 1), steps, 64)
    while steps % wanted:
        wanted -= 1
    return wanted


def sum_shares(parts: Tensor, bias: Tensor | None, y: Tensor) -> None:
    count = y.numel()
    tile = 1024 if count > 2**17 else 256
    launch(
        reduce_kernel,
        (cdiv(count, tile),),
        y.device,
        parts,
        y if bias is None else bias,
        y,
        count,
        y.shape[-1],
        SHARES=parts.shape[0],
        TILE=tile,
        BIAS=bias is not None,
        num_warps=4,
    )


def linear_4bit_backward(
    dy: Tensor,
    packed: Tensor,
    absmax: Tensor,
    nested_absmax: Tensor | None,
    nested_codebook: Tensor | None,
    offset: Tensor | None,
    format: str,
    blocksize: int,
    in_features: int,
) -> Tensor:
    """The weight is dequantized once and multiplied by torch: training has many rows, where decoding is hidden."""
    rest: Any = (format, blocksize, (dy.shape[-1], in_features), dy.dtype)
    return dy @ dequantize_4bit(packed, absmax, nested_absmax, nested_codebook, offset, *rest)
