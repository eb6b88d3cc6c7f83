"""The kernels of the optimizer updates.

Work      a program walks PART steps of whole blocks, loading ahead where STAGES says so; the last program of a tensor
          is masked, all others are not.
Numbers   the coefficients of a step are kernel arguments, or read from memory where step or learning rate are tensors
          on the device, so that nothing waits and a captured step stays right.
Bound by  memory; with 8-bit states also by instructions.
Agrees    with ops/rules.py operation by operation: nothing is fused; with 32-bit states division and square root are
          IEEE too.
"""

from __future__ import annotations

import triton
import triton.language as tl

from halfbyte.native import OPTIMIZERS

from .kept import KEPT_BOOK1, KEPT_BOOK2, KEPT_TABLE1, KEPT_TABLE2, keep_tables
from .pieces import rounded, widened
from .states import decoded, load, store, write_state

_ADAM, _ADEMAMIX, _LION, _MOMENTUM, _RMSPROP, _ADAGRAD = (tl.constexpr(number) for number in range(6))
assert list(OPTIMIZERS.values()) == list(range(6))

FIELDS = 9  # of a table row: p, g, state1, state2, absmax1, its second half, absmax2, elements, seed
_FIELDS: tl.constexpr = tl.constexpr(FIELDS)


# -- pieces --------------------------------------------------------------------------------------------------


@triton.jit
def _finite(x):
    return tl.abs(x) <= 3.4028234663852886e38  # not < inf, which LLVM would test on integers


@triton.jit
def _address(row, field: tl.constexpr, dtype: tl.constexpr, ALIGNED: tl.constexpr):
    ptr = tl.load(row + field).to(tl.pointer_type(dtype))
    if ALIGNED:
        ptr = tl.multiple_of(ptr, 16)
    return ptr


@triton.jit
def _hash32(x):
    """rules.hash32, of uint32."""
    x = (x ^ (x >> 16)) * 0x7FEB352D
    x = (x ^ (x >> 15)) * 0x846CA68B
    return x ^ (x >> 16)


@triton.jit
def _stochastic(value, index, key):
    """rules.stochastically_rounded, of elements `index` (int64)."""
    drawn = _hash32((index ^ (index >> 32)).to(tl.uint32) ^ key) >> 16
    bits = value.to(tl.uint32, bitcast=True)
    up = ((bits + drawn) >> 16).to(tl.int16).to(tl.bfloat16, bitcast=True)
    return tl.where(_finite(value), up, rounded(value, tl.bfloat16))


@triton.jit
def _ratio(a, root_of, factor, eps, EIGHT: tl.constexpr, NVIDIA: tl.constexpr):
    """a / (sqrt(root_of) * factor + eps).

    IEEE with 32-bit states; to the last bits with 8-bit ones, where instructions count: on NVIDIA a root_of below
    2^-126 is then taken for 0, as in csrc/gpu/optimizer.cuh.
    """
    if not EIGHT:
        return tl.div_rn(a, tl.sqrt_rn(root_of) * factor + eps)
    elif NVIDIA:
        root = tl.inline_asm_elementwise(
            "sqrt.approx.ftz.f32 $0, $1;", "=r,r", [root_of], dtype=tl.float32, is_pure=True, pack=1
        )
        return a * tl.inline_asm_elementwise(
            "rcp.approx.ftz.f32 $0, $1;", "=r,r", [root * factor + eps], dtype=tl.float32, is_pure=True, pack=1
        )
    else:
        return a / (tl.sqrt(root_of) * factor + eps)


# -- the kernel ----------------------------------------------------------------------------------------------


@triton.jit
def _step(
    p_ptr,
    g_ptr,
    one_ptr,
    two_ptr,
    slow_ptr,
    absmax_one,
    absmax_two,
    absmax_slow,
    begin,
    n,
    beta1,
    rest1,
    beta2,
    rest2,
    beta3,
    rest3,
    alpha,
    decay,
    coupled,
    eps,
    inverse1,
    inverse2,
    size,
    grad_scale,
    key,
    book1_ptr,
    book2_ptr,
    table1_ptr,
    table2_ptr,
    OPTIMIZER: tl.constexpr,
    BLOCKS: tl.constexpr,
    BLOCKSIZE: tl.constexpr,
    PADDED: tl.constexpr,
    EIGHT: tl.constexpr,
    BOOK1: tl.constexpr,
    BOOK2: tl.constexpr,
    SCALE: tl.constexpr,
    SKIP: tl.constexpr,
    STOCHASTIC: tl.constexpr,
    NORMS: tl.constexpr,
    NVIDIA: tl.constexpr,
    KEEP: tl.constexpr,
    MASKED: tl.constexpr,
):
    """BLOCKS blocks from element `begin`.  With NORMS nothing is written: the sums of p^2 and u^2, float64."""
    column = tl.arange(0, PADDED)[None, :]
    at = tl.arange(0, BLOCKS)[:, None] * BLOCKSIZE + column
    left = tl.minimum(n - begin, BLOCKS * BLOCKSIZE).to(tl.int32)
    inside = (at < left) & (column < BLOCKSIZE)
    block = tl.arange(0, BLOCKS)
    inside_block = block * BLOCKSIZE < left
    first = begin // BLOCKSIZE
    TWO: tl.constexpr = OPTIMIZER <= _ADEMAMIX  # adam too: those with a second state

    # Everything is loaded before the first look-up, whose barrier would hold a load back.
    p = load(p_ptr + begin, at, inside, MASKED)
    g = load(g_ptr + begin, at, inside, MASKED)
    one = load(one_ptr + begin, at, inside, MASKED)
    scale_one = load(absmax_one + first, block, inside_block, MASKED) if EIGHT else 0.0
    if TWO:
        two = load(two_ptr + begin, at, inside, MASKED)
        scale_two = load(absmax_two + first, block, inside_block, MASKED) if EIGHT else 0.0
    if OPTIMIZER == _ADEMAMIX:
        slow = load(slow_ptr + begin, at, inside, MASKED)
        scale_slow = load(absmax_slow + first, block, inside_block, MASKED) if EIGHT else 0.0
    one = decoded(one, scale_one, book1_ptr, EIGHT, KEPT_BOOK1 if KEEP else "")
    if TWO:
        two = decoded(two, scale_two, book2_ptr, EIGHT, KEPT_BOOK2 if KEEP else "")
    if OPTIMIZER == _ADEMAMIX:
        slow = decoded(slow, scale_slow, book1_ptr, EIGHT, KEPT_BOOK1 if KEEP else "")
    p = widened(p)
    g = widened(g)
    if SCALE:
        g = g * grad_scale
    raw = g

    if OPTIMIZER >= _MOMENTUM:  # rmsprop and adagrad too: decay is not decoupled
        g = g + p * coupled
    if OPTIMIZER == _ADAM:
        new_one = one * beta1 + g * rest1
        new_two = two * beta2 + (g * g) * rest2
        u = _ratio(new_one, new_two, 1.0, eps, EIGHT, NVIDIA)
    elif OPTIMIZER == _ADEMAMIX:
        new_one = one * beta1 + g * rest1
        new_slow = slow * beta3 + g * rest3
        new_two = two * beta2 + (g * g) * rest2
        u = _ratio(new_one * inverse1 + new_slow * alpha, new_two, inverse2, eps, EIGHT, NVIDIA)
    elif OPTIMIZER == _LION:
        mixed = one * beta1 + g * rest1
        u = tl.where(mixed > 0, 1.0, tl.where(mixed < 0, -1.0, mixed))  # NaN and zero stay
        new_one = one * beta2 + g * rest2
    elif OPTIMIZER == _MOMENTUM:
        new_one = one * beta1 + g
        u = new_one
    elif OPTIMIZER == _RMSPROP:
        new_one = one * beta1 + (g * g) * rest1
        u = _ratio(g, new_one, 1.0, eps, EIGHT, NVIDIA)
    else:
        new_one = one + g * g
        u = _ratio(g, new_one, 1.0, eps, EIGHT, NVIDIA)

    if NORMS:
        own = tl.where(_finite(p) & inside, p, 0.0).to(tl.float64)
        its = tl.where(_finite(u) & inside, u, 0.0).to(tl.float64)
        return tl.sum(tl.sum(own * own, 1), 0), tl.sum(tl.sum(its * its, 1), 0)
    else:
        if EIGHT:  # what is not finite would spoil its block: the parameter is kept, its states become 0
            kept = _finite(u)
            if OPTIMIZER != _ADAM:  # whose u is not finite where m is not
                kept = kept & _finite(new_one)
            if TWO:
                kept = kept & _finite(new_two)
            if OPTIMIZER == _ADEMAMIX:
                kept = kept & _finite(new_slow)
            # Not a choice between the results, which LLVM would round to 16 bits one by one.
            moved = p * tl.where(kept, decay, 1.0) - tl.where(kept, u, 0.0) * size
            new_one = tl.where(kept, new_one, 0.0)
            if TWO:
                new_two = tl.where(kept, new_two, 0.0)
            if OPTIMIZER == _ADEMAMIX:
                new_slow = tl.where(kept, new_slow, 0.0)
        else:
            moved = p * decay - u * size
        if SKIP:
            moved = tl.where(raw == 0, p, moved)
            new_one = tl.where(raw == 0, one, new_one)
            if TWO:
                new_two = tl.where(raw == 0, two, new_two)
            if OPTIMIZER == _ADEMAMIX:
                new_slow = tl.where(raw == 0, slow, new_slow)
        if STOCHASTIC:
            store(p_ptr + begin, at, _stochastic(moved, begin + at, key), inside, MASKED)
        else:
            store(p_ptr + begin, at, rounded(moved, p_ptr.dtype.element_ty), inside, MASKED)
        write_state(
            one_ptr + begin, absmax_one + first, table1_ptr, new_one, at, block, inside, inside_block, EIGHT, BOOK1,
            NVIDIA, MASKED, KEPT_TABLE1 if KEEP else "",
        )  # fmt: skip
        if TWO:
            write_state(
                two_ptr + begin, absmax_two + first, table2_ptr, new_two, at, block, inside, inside_block, EIGHT,
                BOOK2, NVIDIA, MASKED, KEPT_TABLE2 if KEEP else "",
            )  # fmt: skip
        if OPTIMIZER == _ADEMAMIX:
            write_state(
                slow_ptr + begin, absmax_slow + first, table1_ptr, new_slow, at, block, inside, inside_block, EIGHT,
                BOOK1, NVIDIA, MASKED, KEPT_TABLE1 if KEEP else "",
            )  # fmt: skip
        zero = tl.zeros([], tl.float64)
        return zero, zero


@triton.jit(do_not_specialize=["step"])
def update_kernel(
    table_ptr,
    parts_ptr,
    sums_ptr,
    trust_ptr,
    like_ptr,
    device_ptr,
    step_ptr,
    scale_ptr,
    book1_ptr,
    book2_ptr,
    table1_ptr,
    table2_ptr,
    beta1,
    rest1,
    beta2,
    rest2,
    beta3,
    rest3,
    alpha,
    decay,
    coupled,
    size,
    eps,
    inverse1,
    inverse2,
    grad_scale,
    step,
    OPTIMIZER: tl.constexpr,
    BLOCKS: tl.constexpr,
    BLOCKSIZE: tl.constexpr,
    PADDED: tl.constexpr,
    PART: tl.constexpr,
    STAGES: tl.constexpr,
    EIGHT: tl.constexpr,
    BOOK1: tl.constexpr,
    BOOK2: tl.constexpr,
    ON_DEVICE: tl.constexpr,
    STEP_ON_DEVICE: tl.constexpr,
    SCALE: tl.constexpr,
    SCALE_ON_DEVICE: tl.constexpr,
    SKIP: tl.constexpr,
    STOCHASTIC: tl.constexpr,
    TRUST: tl.constexpr,
    NORMS: tl.constexpr,
    ALIGNED: tl.constexpr,
    EVEN: tl.constexpr,
    NVIDIA: tl.constexpr,
    KEEP: tl.constexpr,
):
    program = tl.program_id(0).to(tl.int64)
    dtype: tl.constexpr = like_ptr.dtype.element_ty
    row = table_ptr + tl.load(parts_ptr + 2 * program) * _FIELDS
    part = tl.load(parts_ptr + 2 * program + 1)
    n = tl.load(row + 7)
    if ON_DEVICE:
        beta1 = tl.load(device_ptr)
        rest1 = tl.load(device_ptr + 1)
        beta2 = tl.load(device_ptr + 2)
        rest2 = tl.load(device_ptr + 3)
        beta3 = tl.load(device_ptr + 4)
        rest3 = tl.load(device_ptr + 5)
        alpha = tl.load(device_ptr + 6)
        decay = tl.load(device_ptr + 7)
        coupled = tl.load(device_ptr + 8)
        size = tl.load(device_ptr + 9)
        eps = tl.load(device_ptr + 10)
        inverse1 = tl.load(device_ptr + 11)
        inverse2 = tl.load(device_ptr + 12)
    if SCALE_ON_DEVICE:
        grad_scale = tl.load(scale_ptr).to(tl.float32)
    if TRUST and not NORMS:
        size = tl.load(trust_ptr + tl.load(parts_ptr + 2 * program)) * size
    key = tl.zeros([], tl.uint32)
    if STOCHASTIC:
        if STEP_ON_DEVICE:
            number = tl.load(step_ptr).to(tl.int64).to(tl.uint32)
        else:
            number = (key + step).to(tl.uint32)
        key = _hash32(tl.load(row + 8).to(tl.uint32) ^ _hash32(number))
    state: tl.constexpr = tl.uint8 if EIGHT else tl.float32
    p_ptr = _address(row, 0, dtype, ALIGNED)
    g_ptr = _address(row, 1, dtype, ALIGNED)
    one_ptr = _address(row, 2, state, ALIGNED)
    two_ptr = _address(row, 3, state, ALIGNED)
    if EVEN:  # so that the second half of state1 is read in wide pieces
        n = tl.multiple_of(n, 16)
    slow_ptr = one_ptr + n
    absmax_one = _address(row, 4, tl.float32, False)
    absmax_slow = _address(row, 5, tl.float32, False)
    absmax_two = _address(row, 6, tl.float32, False)
    SPAN: tl.constexpr = BLOCKS * BLOCKSIZE
    of_p = tl.zeros([], tl.float64)
    of_u = tl.zeros([], tl.float64)
    if KEEP:
        keep_tables(book1_ptr, table1_ptr, book2_ptr, table2_ptr, OPTIMIZER <= _ADEMAMIX)
    # Whole programs need no masks, which would keep accesses narrow; padded blocks always have one.
    begin = part * (PART * SPAN)
    whole = (begin + PART * SPAN <= n) & (PADDED == BLOCKSIZE)
    for masked in tl.static_range(2):
        if whole != (masked == 1):
            for turn in tl.range(0, PART, num_stages=STAGES):
                a, b = _step(
                    p_ptr,
                    g_ptr,
                    one_ptr,
                    two_ptr,
                    slow_ptr,
                    absmax_one,
                    absmax_two,
                    absmax_slow,
                    begin + turn * SPAN,
                    n,
                    beta1,
                    rest1,
                    beta2,
                    rest2,
                    beta3,
                    rest3,
                    alpha,
                    decay,
                    coupled,
                    eps,
                    inverse1,
                    inverse2,
                    size,
                    grad_scale,
                    key,
                    book1_ptr,
                    book2_ptr,
                    table1_ptr,
                    table2_ptr,
                    OPTIMIZER,
                    BLOCKS,
                    BLOCKSIZE,
                    PADDED,
                    EIGHT,
                    BOOK1,
                    BOOK2,
                    SCALE,
                    SKIP,
                    STOCHASTIC,
                    NORMS,
                    NVIDIA,
                    KEEP,
                    masked == 1,
                )
                of_p += a
                of_u += b
    if NORMS:
        tl.store(sums_ptr + 2 * program, of_p)
        tl.store(sums_ptr + 2 * program + 1, of_u)


@triton.jit
def trust_kernel(sums_ptr, bounds_ptr, trust_ptr, norm_ptr, norm, max_unorm, eps, ON_DEVICE: tl.constexpr):
    """rules.trust_factor per tensor; its partial sums are those from bounds[i] on, added in order."""
    tensor = tl.program_id(0)
    at = tl.load(bounds_ptr + tensor)
    end = tl.load(bounds_ptr + tensor + 1)
    of_p = tl.zeros([], tl.float64)
    of_u = tl.zeros([], tl.float64)
    while at < end:
        of_p += tl.load(sums_ptr + 2 * at)
        of_u += tl.load(sums_ptr + 2 * at + 1)
        at += 1
    if ON_DEVICE:
        norm = tl.load(norm_ptr)
    of_p = tl.sqrt(of_p)
    of_u = tl.sqrt(of_u) * norm
    r = tl.minimum((max_unorm * of_p + eps) / of_u, 1.0)
    tl.store(trust_ptr + tensor, tl.where((of_p == 0) | (of_u == 0), 1.0, r).to(tl.float32))
