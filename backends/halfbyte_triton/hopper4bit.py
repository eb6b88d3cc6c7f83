"""The linear layer over a 4-bit weight for sm_90: some warps decode, others multiply, and neither waits for the other.

Layout    as in linear4bit.py.
Work      a program takes BN rows of the weight and BM of x over a share of K.  DECODERS warps turn words of codes into
          tiles in shared memory, which the others hand to wgmma with tiles of x.  All go through rings; those that come
          from memory are filled by the copy engine.  linear4bit.reduce_kernel sums shares, in order.
Scales    a thread decodes a whole block, by a table of sixteen products level * absmax, each rounded once.
Limits    x of 16 bits; blocks of 64; K a multiple of 256, of 1024 where absmax is nested.
Bound by  the matrix units from 256 rows on, decoding below.
Agrees    with dequantizing and a product of torch but for the order of sums: the weights have the same bits.
Needs     gluon as of triton 3.6: what it cannot compile there falls back to linear4bit.linear_kernel.
"""

from __future__ import annotations

import functools
import math
from typing import Any

import torch
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from . import decode
from .fourbit import contiguous_scales
from .launch import Config, cdiv, launch
from .linear4bit import aligned, shares_of, sum_shares

TURN = 256  # values of K whose words are fetched at once

# Renamed after triton 3.6.
together = getattr(gl, "barrier", None) or gl.thread_barrier  # of the warps of a partition
copy_in = getattr(tma, "async_load", None) or tma.async_copy_global_to_shared


@gluon.jit
def _fetch(desc, row, column, ready, target, BYTES: gl.constexpr, wanted):
    """Start a copy of a tile into shared memory; `ready` completes with it."""
    mbarrier.expect(ready, BYTES, pred=wanted)
    copy_in(desc, [row, column], ready, target, pred=wanted)


@gluon.jit
def _halves(all):
    """(ROWS, 2 * COLUMNS) -> its left and right half."""
    ROWS: gl.constexpr = all.shape[0]
    COLUMNS: gl.constexpr = all.shape[1] // 2
    return gl.split(gl.permute(gl.reshape(all, [ROWS, 2, COLUMNS]), (0, 2, 1)))


@gluon.jit
def _parts(all, PARTS: gl.constexpr):
    """(ROWS, PARTS * COLUMNS) -> PARTS tensors of (ROWS, COLUMNS)."""
    if PARTS == 1:
        return (all,)
    else:
        left, right = _halves(all)
        if PARTS == 2:
            return (left, right)
        else:
            a, b = _halves(left)
            c, d = _halves(right)
            if PARTS == 4:
                return (a, b, c, d)
            else:
                a, b, c, d = _parts(a, PARTS // 4), _parts(b, PARTS // 4), _parts(c, PARTS // 4), _parts(d, PARTS // 4)
                return a + b + c + d


@gluon.jit
def _decode(
    words_desc, words_ring, words_ready, absmax_desc, absmax_ring, absmax_ready, nested_ptr, codebook_ptr, offset_ptr,
    w_ring, ready, free, n0, k0, N, K: gl.constexpr, TURNS: gl.constexpr, TABLE: gl.constexpr, LOOK_UP: gl.constexpr,
):  # fmt: skip
    """Fill w_ring.  A thread decodes one block of 64 weights at a time, with a table of its 16 scaled levels."""
    SLOTS: gl.constexpr = words_ring.shape[0]
    STAGES: gl.constexpr = w_ring.shape[0]
    BN: gl.constexpr = w_ring.shape[1]
    BK: gl.constexpr = w_ring.shape[2]
    B: gl.constexpr = BK // 64
    PIECES: gl.constexpr = 256 // BK
    NESTED: gl.constexpr = absmax_ring.dtype == gl.uint8
    EACH: gl.constexpr = absmax_ring.shape[2] // 4  # turns whose absmax come at once
    WORDS: gl.constexpr = BN * 128
    ABSMAX: gl.constexpr = BN * 16
    of_words: gl.constexpr = gl.BlockedLayout([1, 8], [32, 1], [BN // 32, B], [1, 0])
    of_absmax: gl.constexpr = gl.BlockedLayout([1, 1], [32, 1], [BN // 32, B], [1, 0])
    cube: gl.constexpr = gl.BlockedLayout([1, 1, 8], [32, 1, 1], [BN // 32, B, 1], [2, 1, 0])
    for i in gl.static_range(SLOTS):
        _fetch(words_desc, n0, k0 // 8 + i * 32, words_ready.index(i), words_ring.index(i), WORDS, i < TURNS)
        column = k0 // 64 + i * 4 * EACH
        _fetch(absmax_desc, n0, column, absmax_ready.index(i), absmax_ring.index(i), ABSMAX, i * EACH < TURNS)
    if NESTED:
        row = gl.minimum(n0 + gl.arange(0, BN, gl.SliceLayout(1, of_absmax)), N - 1).to(gl.int64)
        offset = gl.load(offset_ptr)
    for group in range(TURNS // EACH):
        for part in gl.static_range(EACH):
            turn = group * EACH + part
            slot = turn % SLOTS
            mbarrier.wait(words_ready.index(slot), turn // SLOTS & 1)
            words = _parts(words_ring.index(slot).load(of_words), PIECES)
            if part == 0:
                from_slot = group % SLOTS
                mbarrier.wait(absmax_ready.index(from_slot), group // SLOTS & 1)
                absmax = absmax_ring.index(from_slot).load(of_absmax)
            together()
            _fetch(
                words_desc, n0, k0 // 8 + (turn + SLOTS) * 32, words_ready.index(slot), words_ring.index(slot), WORDS,
                turn + SLOTS < TURNS,
            )  # fmt: skip
            if part == 0:
                column = k0 // 64 + (group + SLOTS) * 4 * EACH
                _fetch(
                    absmax_desc, n0, column, absmax_ready.index(from_slot), absmax_ring.index(from_slot), ABSMAX,
                    (group + SLOTS) * EACH < TURNS,
                )  # fmt: skip
                if NESTED:
                    outer = gl.load(nested_ptr + (row * (K // 64) + (k0 // 64 + group * 4 * EACH)) // 256)
                    absmax = gl.load(codebook_ptr + absmax.to(gl.int32)) * gl.expand_dims(outer, 1) + offset
                scales = _parts(absmax, EACH * PIECES)
            for piece in gl.static_range(PIECES):
                scale = gl.convert_layout(scales[part * PIECES + piece], gl.SliceLayout(2, cube))
                t0, t1, t2, t3, t4, t5, t6, t7 = gl.inline_asm_elementwise(
                    TABLE,
                    "=&r,=&r,=&r,=&r,=&r,=&r,=&r,=&r,r",
                    [gl.expand_dims(scale, 2)],
                    dtype=(gl.int32, gl.int32, gl.int32, gl.int32, gl.int32, gl.int32, gl.int32, gl.int32),
                    is_pure=True,
                    pack=1,
                )
                word = gl.convert_layout(gl.reshape(words[piece], [BN, B, 8]), cube)
                a, b, c, d = gl.inline_asm_elementwise(
                    LOOK_UP,
                    "=&r,=&r,=&r,=&r,r,r,r,r,r,r,r,r,r",
                    [word, t0, t1, t2, t3, t4, t5, t6, t7],
                    dtype=(gl.int32, gl.int32, gl.int32, gl.int32),
                    is_pure=True,
                    pack=1,
                )
                pairs = gl.join(gl.join(a, c), gl.join(b, d))
                one = (pairs & 0xFFFF).to(gl.int16).to(w_ring.dtype, bitcast=True)
                other = (pairs >> 16).to(gl.int16).to(w_ring.dtype, bitcast=True)
                step = turn * PIECES + piece
                stage = step % STAGES
                mbarrier.wait(free.index(stage), (step // STAGES & 1) ^ 1)
                w_ring.index(stage).store(gl.reshape(gl.join(one, other), [BN, BK]))
                fence_async_shared()
                together()
                mbarrier.arrive(ready.index(stage))


@gluon.jit
def _multiply(
    w_ring, x_desc, x_ring, ready, free, bias_ptr, out_ptr, n0, m0, k0, share, M, N,
    STEPS: gl.constexpr, BIAS: gl.constexpr,
):  # fmt: skip
    STAGES: gl.constexpr = w_ring.shape[0]
    BN: gl.constexpr = w_ring.shape[1]
    BM: gl.constexpr = x_ring.shape[1]
    layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [gl.num_warps(), 1], [16, BM, 16])
    BK: gl.constexpr = x_ring.shape[2]
    BYTES: gl.constexpr = BM * BK * 2
    for i in gl.static_range(STAGES):
        _fetch(x_desc, m0, k0 + i * BK, ready.index(i), x_ring.index(i), BYTES, i < STEPS)
    acc = gl.zeros([BN, BM], gl.float32, layout)
    for step in range(STEPS):
        slot = step % STAGES
        mbarrier.wait(ready.index(slot), step // STAGES & 1)
        acc = warpgroup_mma(w_ring.index(slot), x_ring.index(slot).permute((1, 0)), acc, is_async=True)
        acc = warpgroup_mma_wait(1, deps=(acc,))
        together()
        last = (step + STAGES - 1) % STAGES
        mbarrier.arrive(free.index(last), pred=step > 0)
        next = step + STAGES - 1
        _fetch(
            x_desc, m0, k0 + next * BK, ready.index(last), x_ring.index(last), BYTES, (step > 0) & (next < STEPS)
        )  # fmt: skip
    acc = warpgroup_mma_wait(0, deps=(acc,))
    n = n0 + gl.arange(0, BN, gl.SliceLayout(1, layout))
    m = m0 + gl.arange(0, BM, gl.SliceLayout(0, layout))
    if BIAS:
        bias = gl.load(bias_ptr + n, mask=n < N, other=0.0).to(gl.float32)
        acc += gl.expand_dims(bias, 1)
    inside = gl.expand_dims(n < N, 1) & gl.expand_dims(m < M, 0)
    place = gl.expand_dims((share.to(gl.int64) * M + m) * N, 0) + gl.expand_dims(n, 1)
    gl.store(out_ptr + place, acc.to(out_ptr.dtype.element_ty), mask=inside)


@gluon.jit
def hopper_kernel(
    x_desc,
    words_desc,
    absmax_desc,
    nested_ptr,
    codebook_ptr,
    offset_ptr,
    bias_ptr,
    out_ptr,
    M,
    N,
    K: gl.constexpr,
    DECODERS: gl.constexpr,
    STAGES: gl.constexpr,
    SLOTS: gl.constexpr,
    TURNS: gl.constexpr,
    REGISTERS: gl.constexpr,
    BIAS: gl.constexpr,
    TABLE: gl.constexpr,
    LOOK_UP: gl.constexpr,
):
    BM: gl.constexpr = x_desc.block_shape[0]
    BK: gl.constexpr = x_desc.block_shape[1]
    BN: gl.constexpr = words_desc.block_shape[0]
    n0 = gl.program_id(0) * BN
    m0 = gl.program_id(1) * BM
    share = gl.program_id(2)
    k0 = share * (TURNS * 256)
    x_ring = gl.allocate_shared_memory(x_desc.dtype, [STAGES, BM, BK], x_desc.layout)
    w_ring = gl.allocate_shared_memory(x_desc.dtype, [STAGES, BN, BK], gl.NVMMASharedLayout(128, 16))
    words_ring = gl.allocate_shared_memory(gl.int32, [SLOTS, BN, 32], words_desc.layout)
    ABSMAX: gl.constexpr = absmax_desc.block_shape[1]
    absmax_ring = gl.allocate_shared_memory(absmax_desc.dtype, [SLOTS, BN, ABSMAX], absmax_desc.layout)
    ready = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    free = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    words_ready = gl.allocate_shared_memory(gl.int64, [SLOTS, 1], mbarrier.MBarrierLayout())
    absmax_ready = gl.allocate_shared_memory(gl.int64, [SLOTS, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(STAGES):
        mbarrier.init(ready.index(i), count=2)  # x and the weight
        mbarrier.init(free.index(i), count=1)
    for i in gl.static_range(SLOTS):
        mbarrier.init(words_ready.index(i), count=1)
        mbarrier.init(absmax_ready.index(i), count=1)
    fence_async_shared()
    together()
    STEPS: gl.constexpr = TURNS * 256 // BK
    gl.warp_specialize(
        [
            (
                _multiply,
                (w_ring, x_desc, x_ring, ready, free, bias_ptr, out_ptr, n0, m0, k0, share, M, N, STEPS, BIAS),
            ),
            (
                _decode,
                (
                    words_desc, words_ring, words_ready, absmax_desc, absmax_ring, absmax_ready, nested_ptr,
                    codebook_ptr, offset_ptr, w_ring, ready, free, n0, k0, N, K, TURNS, TABLE, LOOK_UP,
                ),
            ),
        ],
        [DECODERS],
        [REGISTERS],
    )  # fmt: skip


def takes(x: Tensor, blocksize: int, nested: bool) -> bool:
    """Whether shape and dtype suit the kernel."""
    k = x.shape[-1]
    return x.dtype.itemsize == 2 and blocksize == 64 and k > 0 and k % (4 * TURN if nested else TURN) == 0


def linear_4bit(
    x: Tensor,
    packed: Tensor,
    absmax: Tensor,
    nested: tuple[Tensor | None, Tensor | None, Tensor | None],
    bias: Tensor | None,
    format: str,
    n: int,
    tuned: Config,
) -> Tensor:
    k = x.shape[-1]
    m = math.prod(x.shape[:-1])
    y = x.new_empty((*x.shape[:-1], n))
    absmax, *rest = contiguous_scales(absmax, *nested)
    bias = None if bias is None else bias.contiguous()
    bm, bn, decoders = tuned["BM"], tuned["BN"], tuned["DECODERS"]
    each = 4 if nested[0] is not None else 1  # turns whose absmax come at once: 16 bytes
    shares = shares_of(k // TURN // each, cdiv(n, bn) * cdiv(m, bm), tuned, x.device)
    out = y if shares == 1 else x.new_empty((shares, m, n), dtype=torch.float32)
    of_x, of_words, of_absmax = _tiles(bm, bn, decoders, x.dtype, each)
    launch(
        hopper_kernel,
        (cdiv(n, bn), cdiv(m, bm), shares),
        x.device,
        TensorDescriptor.from_tensor(aligned(x.contiguous()).view(m, k), *of_x),
        TensorDescriptor.from_tensor(aligned(packed.contiguous()).view(n, k // 2).view(torch.int32), *of_words),
        TensorDescriptor.from_tensor(aligned(absmax).view(n, k // 64), *of_absmax),
        *rest,
        x if bias is None else bias,
        out,
        m,
        n,
        K=k,
        DECODERS=decoders,
        STAGES=tuned["STAGES"],
        SLOTS=tuned["SLOTS"],
        TURNS=k // TURN // shares,
        REGISTERS=tuned["REGISTERS"],
        BIAS=bias is not None and shares == 1,
        TABLE=decode.scaled_table(format, x.dtype),
        LOOK_UP=decode.look_up(),
        num_warps=tuned["num_warps"],
        **({"maxnreg": tuned["MOST"]} if "MOST" in tuned else {}),
    )
    if shares > 1:
        sum_shares(out, bias, y)
    return y


@functools.cache
def _tiles(bm: int, bn: int, decoders: int, dtype: torch.dtype, each: int) -> list[tuple[list[int], Any]]:
    """Shapes and layouts of what is fetched at once: of x, words, absmax."""
    kind = gl.bfloat16 if dtype is torch.bfloat16 else gl.float16
    absmax = ([bn, 4], gl.float32) if each == 1 else ([bn, 16], gl.uint8)
    shapes = (([bm, 64 * 32 * decoders // bn], kind), ([bn, 32], gl.int32), absmax)
    return [(shape, gl.NVMMASharedLayout.get_default_for(shape, kind)) for shape, kind in shapes]
