"""The optimizer updates, one launch for all tensors of a call (three with a trust factor).

Table     one row of addresses per tensor, and for each program the tensor and the part of it that it updates; made
          on the host, kept on the device while the addresses stay the same.
Work      a program walks PART steps of whole blocks; the last step of a tensor is masked, all others are not.
Numbers   the coefficients of a step are kernel arguments, or read from memory where step or learning rate are tensors
          on the device, so that nothing waits and a captured step stays right.
Bound by  memory.
Agrees    with ops/rules.py operation by operation: nothing is fused; with 32-bit states division and square root are
          IEEE too.  8-bit codes are found as in eightbit.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from halfbyte.native import OPTIMIZERS, address
from halfbyte.ops import rules

from .eightbit import ANY, encoding, nearest_any, nearest_dynamic
from .fourbit import rounded, widened, width
from .launch import cdiv, config, launch, power_of_2, processors

_ADAM, _ADEMAMIX, _LION, _MOMENTUM, _RMSPROP, _ADAGRAD = (tl.constexpr(number) for number in range(6))
assert list(OPTIMIZERS.values()) == list(range(6))
_ANY: tl.constexpr = tl.constexpr(ANY)
_SIGNED: tl.constexpr = tl.constexpr(1)

FIELDS = 9  # of a table row: p, g, state1, state2, absmax1, its second half, absmax2, elements, seed
_FIELDS: tl.constexpr = tl.constexpr(FIELDS)


# -- pieces --------------------------------------------------------------------------------------------------


@triton.jit
def _finite(x):
    return tl.abs(x) < float("inf")


@triton.jit
def _load(ptr, at, inside, MASKED: tl.constexpr):
    if MASKED:
        return tl.load(ptr + at, mask=inside, other=0)
    else:
        return tl.load(ptr + at)


@triton.jit
def _store(ptr, at, value, inside, MASKED: tl.constexpr):
    if MASKED:
        tl.store(ptr + at, value, mask=inside)
    else:
        tl.store(ptr + at, value)


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
def _look_up(table_ptr, code, SIZE: tl.constexpr, SHARED: tl.constexpr):
    """table[code], 256 entries: from shared memory, or through the cache."""
    if SHARED:
        found = tl.gather(tl.load(table_ptr + tl.arange(0, 256)), tl.reshape(code, [SIZE]), 0)
        return tl.reshape(found, code.shape)
    else:
        return tl.load(table_ptr + code)


@triton.jit
def _read(
    codes,
    absmax,
    book_ptr,
    at,
    block,
    inside,
    inside_block,
    SIZE: tl.constexpr,
    EIGHT: tl.constexpr,
    MASKED: tl.constexpr,
    SHARED: tl.constexpr,
):
    """A state, float32."""
    if EIGHT:
        code = _load(codes, at, inside, MASKED).to(tl.int32)
        scale = _load(absmax, block, inside_block, MASKED)
        return _look_up(book_ptr, code, SIZE, SHARED) * scale[:, None]
    else:
        return _load(codes, at, inside, MASKED)


@triton.jit
def _divided(x, by):
    """x / by, correctly rounded where nothing underflows, with one division for a whole block; 0 where by is 0."""
    inverse = tl.where(by < 3.0e-39, 0.0, tl.div_rn(1.0, by))[:, None]  # below, it would overflow
    q = x * inverse
    rest = tl.fma(-q, tl.broadcast_to(by[:, None], x.shape), x)
    return tl.fma(rest, tl.broadcast_to(inverse, x.shape), q)


@triton.jit
def _ratio(a, root_of, factor, eps, EIGHT: tl.constexpr):
    """a / (sqrt(root_of) * factor + eps).

    IEEE with 32-bit states; to the last bits with 8-bit ones, where instructions bound the kernel.
    """
    if EIGHT:
        return a / (tl.sqrt(root_of) * factor + eps)
    else:
        return tl.div_rn(a, tl.sqrt_rn(root_of) * factor + eps)


@triton.jit
def _write(
    codes,
    absmax,
    table_ptr,
    state,
    at,
    block,
    inside,
    inside_block,
    SIZE: tl.constexpr,
    EIGHT: tl.constexpr,
    BOOK: tl.constexpr,
    MASKED: tl.constexpr,
):
    """Store a state; table_ptr is what `encoding` gives, for any codebook with its number of negative levels after."""
    if EIGHT:
        if MASKED:
            state = tl.where(inside, state, 0.0)
        largest = tl.max(tl.abs(state), axis=1)
        scaled = _divided(state, largest)
        if BOOK == _ANY:
            code = nearest_any(scaled, table_ptr)
            negative = tl.load(table_ptr + 256).to(tl.int32)
            wrong = ((code < negative) != (state < 0)) & (state != 0) & (negative > 0)
            code += tl.where(wrong, tl.where(state > 0, 1, -1), 0)
            code = tl.minimum(tl.maximum(code, 0), 255)
        else:
            code = nearest_dynamic(tl.reshape(scaled, [SIZE]), table_ptr, BOOK, True)
            code = tl.reshape(code, state.shape)
            if BOOK == _SIGNED:  # of the signed map only 127, zero, can have the other sign: a negative state gets 126
                code = tl.where((state < 0) & (code == 127), 126, code)
        _store(codes, at, code.to(tl.uint8), inside, MASKED)
        _store(absmax, block, largest, inside_block, MASKED)
    else:
        _store(codes, at, state, inside, MASKED)


# -- the kernel ----------------------------------------------------------------------------------------------


@triton.jit
def _step(
    row,
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
    dtype: tl.constexpr,
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
    ALIGNED: tl.constexpr,
    SHARED: tl.constexpr,
    MASKED: tl.constexpr,
):
    """BLOCKS blocks from element `begin`.  With NORMS nothing is written: the sums of p^2 and u^2, float64."""
    SIZE: tl.constexpr = BLOCKS * PADDED
    column = tl.arange(0, PADDED)[None, :]
    at = tl.arange(0, BLOCKS)[:, None] * BLOCKSIZE + column
    left = tl.minimum(n - begin, BLOCKS * BLOCKSIZE).to(tl.int32)
    inside = (at < left) & (column < BLOCKSIZE)
    number = tl.arange(0, BLOCKS)
    inside_block = number * BLOCKSIZE < left
    block = begin // BLOCKSIZE

    p_ptr = _address(row, 0, dtype, ALIGNED) + begin
    state: tl.constexpr = tl.uint8 if EIGHT else tl.float32
    one_ptr = _address(row, 2, state, ALIGNED) + begin
    absmax_one = _address(row, 4, tl.float32, False) + block
    p = widened(_load(p_ptr, at, inside, MASKED))
    g = widened(_load(_address(row, 1, dtype, ALIGNED) + begin, at, inside, MASKED))
    if SCALE:
        g = g * grad_scale
    raw = g
    one = _read(one_ptr, absmax_one, book1_ptr, at, number, inside, inside_block, SIZE, EIGHT, MASKED, SHARED)
    TWO: tl.constexpr = OPTIMIZER <= _ADEMAMIX  # adam too: those with a second state
    if TWO:
        two_ptr = _address(row, 3, state, ALIGNED) + begin
        absmax_two = _address(row, 6, tl.float32, False) + block
        two = _read(two_ptr, absmax_two, book2_ptr, at, number, inside, inside_block, SIZE, EIGHT, MASKED, SHARED)
    if OPTIMIZER == _ADEMAMIX:  # the second half of state1
        slow_ptr = _address(row, 2, state, False) + n + begin
        absmax_slow = _address(row, 5, tl.float32, False) + block
        slow = _read(slow_ptr, absmax_slow, book1_ptr, at, number, inside, inside_block, SIZE, EIGHT, MASKED, SHARED)

    if OPTIMIZER >= _MOMENTUM:  # rmsprop and adagrad too: decay is not decoupled
        g = g + p * coupled
    if OPTIMIZER == _ADAM:
        new_one = one * beta1 + g * rest1
        new_two = two * beta2 + (g * g) * rest2
        u = _ratio(new_one, new_two, 1.0, eps, EIGHT)
    elif OPTIMIZER == _ADEMAMIX:
        new_one = one * beta1 + g * rest1
        new_slow = slow * beta3 + g * rest3
        new_two = two * beta2 + (g * g) * rest2
        u = _ratio(new_one * inverse1 + new_slow * alpha, new_two, inverse2, eps, EIGHT)
    elif OPTIMIZER == _LION:
        mixed = one * beta1 + g * rest1
        u = tl.where(mixed > 0, 1.0, tl.where(mixed < 0, -1.0, mixed))  # NaN and zero stay
        new_one = one * beta2 + g * rest2
    elif OPTIMIZER == _MOMENTUM:
        new_one = one * beta1 + g
        u = new_one
    elif OPTIMIZER == _RMSPROP:
        new_one = one * beta1 + (g * g) * rest1
        u = _ratio(g, new_one, 1.0, eps, EIGHT)
    else:
        new_one = one + g * g
        u = _ratio(g, new_one, 1.0, eps, EIGHT)

    if NORMS:
        own = tl.where(_finite(p) & inside, p, 0.0).to(tl.float64)
        its = tl.where(_finite(u) & inside, u, 0.0).to(tl.float64)
        return tl.sum(tl.reshape(own * own, [SIZE]), 0), tl.sum(tl.reshape(its * its, [SIZE]), 0)
    else:
        moved = p * decay - u * size
        if EIGHT:  # what is not finite would spoil its block: the parameter is kept, its states become 0
            kept = _finite(u)
            if OPTIMIZER != _ADAM:  # whose u is not finite where m is not
                kept = kept & _finite(new_one)
            if TWO:
                kept = kept & _finite(new_two)
            if OPTIMIZER == _ADEMAMIX:
                kept = kept & _finite(new_slow)
            moved = tl.where(kept, moved, p)
            new_one = tl.where(kept, new_one, 0.0)
            if TWO:
                new_two = tl.where(kept, new_two, 0.0)
            if OPTIMIZER == _ADEMAMIX:
                new_slow = tl.where(kept, new_slow, 0.0)
        if SKIP:
            moved = tl.where(raw == 0, p, moved)
            new_one = tl.where(raw == 0, one, new_one)
            if TWO:
                new_two = tl.where(raw == 0, two, new_two)
            if OPTIMIZER == _ADEMAMIX:
                new_slow = tl.where(raw == 0, slow, new_slow)
        if STOCHASTIC:
            _store(p_ptr, at, _stochastic(moved, begin + at, key), inside, MASKED)
        else:
            _store(p_ptr, at, rounded(moved, dtype), inside, MASKED)
        _write(one_ptr, absmax_one, table1_ptr, new_one, at, number, inside, inside_block, SIZE, EIGHT, BOOK1, MASKED)
        if TWO:
            _write(
                two_ptr, absmax_two, table2_ptr, new_two, at, number, inside, inside_block, SIZE, EIGHT, BOOK2, MASKED
            )
        if OPTIMIZER == _ADEMAMIX:
            _write(
                slow_ptr,
                absmax_slow,
                table1_ptr,
                new_slow,
                at,
                number,
                inside,
                inside_block,
                SIZE,
                EIGHT,
                BOOK1,
                MASKED,
            )
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
    SHARED: tl.constexpr,
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
    SPAN: tl.constexpr = BLOCKS * BLOCKSIZE
    of_p = tl.zeros([], tl.float64)
    of_u = tl.zeros([], tl.float64)
    for turn in tl.range(0, PART):
        begin = (part * PART + turn) * SPAN
        # Whole steps need no masks, which would keep accesses narrow; padded blocks always have one.
        if PADDED == BLOCKSIZE and begin + SPAN <= n:
            a, b = _step(
                row,
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
                dtype,
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
                ALIGNED,
                SHARED,
                False,
            )
            of_p += a
            of_u += b
        elif begin < n:
            a, b = _step(
                row,
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
                dtype,
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
                ALIGNED,
                SHARED,
                True,
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


# -- adapters ------------------------------------------------------------------------------------------------


class Table:
    """What update_kernel walks, on the device.

    rows    FIELDS numbers per tensor
    parts   (row, part of it) per program
    bounds  first program of each tensor, and the number of programs
    host    where it was copied from; a captured copy reads it again
    stream  that it was copied on, and when: `copied`
    """

    def __init__(self, fields: tuple[int, ...], span: int, device: torch.device) -> None:
        sizes = fields[7::FIELDS]
        counts = torch.tensor([cdiv(size, span) for size in sizes])
        bounds = torch.nn.functional.pad(counts.cumsum(0), (1, 0))
        tensor = torch.repeat_interleave(torch.arange(len(sizes)), counts)
        part = torch.arange(len(tensor)) - bounds[tensor]
        host = torch.cat((torch.tensor(fields), torch.stack((tensor, part), 1).reshape(-1), bounds))
        on_cuda = device.type == "cuda"
        self.host = host.pin_memory() if on_cuda else host
        there = self.host.to(device, non_blocking=on_cuda)
        self.stream = torch.cuda.current_stream(device) if on_cuda else None
        self.copied = self.stream.record_event() if self.stream else None
        self.rows, self.parts, self.bounds = there.split((len(fields), 2 * len(tensor), len(bounds)))


_tables: dict[tuple[Any, ...], Table] = {}  # the last ones made
_captured: list[Table] = []  # those that a CUDA graph reads whenever it is replayed
MOST_TABLES = 256


def _table(fields: tuple[int, ...], span: int, device: torch.device) -> Table:
    """The table of these tensors, kept while their addresses stay the same.

    span   elements of one program
    """
    capturing = device.type == "cuda" and torch.cuda.is_current_stream_capturing()
    key = fields, span, device
    table = _tables.get(key)
    if table is None:
        table = Table(*key)
        if not capturing:  # a captured copy has not happened yet
            if len(_tables) >= MOST_TABLES:
                _tables.pop(next(iter(_tables)), None)
            _tables[key] = table
    elif device.type == "cuda" and not capturing and (stream := torch.cuda.current_stream(device)) != table.stream:
        stream.wait_event(table.copied)  # type: ignore[arg-type]
        table.rows.record_stream(stream)
    if capturing:
        _captured.append(table)
    return table


def _update(
    optimizer: str,
    fields: list[int],
    like: Tensor,
    eight: tuple[int, Tensor, Tensor | None] | None,
    step: Tensor,
    lr: Tensor,
    grad_scale: Tensor | None,
    hyper: rules.Hyper,
    max_unorm: float,
    skip_zeros: bool,
    stochastic: bool,
) -> None:
    """fields   rows of the table, one after the other
    like     a parameter
    eight    block size and codebooks of 8-bit states
    """
    device = like.device
    name = "update_8bit" if eight else "update_32bit"
    tuned = config(name, width(like.dtype), device)
    blocksize = eight[0] if eight else tuned["TILE"]
    padded = power_of_2(blocksize)
    blocks = max(tuned["TILE"] // padded, 1)
    total = sum(fields[7::FIELDS])
    if not total:
        return
    part = max(min(tuned["PART"], total // (blocks * blocksize * 8 * processors(device))), 1)
    table = _table(tuple(fields), part * blocks * blocksize, device)
    tensors, programs = len(table.bounds) - 1, len(table.parts) // 2
    step_, lr_ = rules.host_or_device(step), rules.host_or_device(lr)
    c = rules.coefficients(optimizer, step_, lr_, hyper)
    on_device = any(isinstance(one, Tensor) for one in c)
    numbers: list[float] = [0.0] * len(c)
    coefficients = like
    if on_device:
        coefficients = torch.stack([torch.as_tensor(one, dtype=torch.float32, device=device) for one in c])
    else:
        numbers = [float(one) for one in c]
    scale_on_device = grad_scale is not None and grad_scale.device.type != "cpu"
    books: list[Tensor] = [like, like]
    tables, kinds = [like, like], [ANY, ANY]
    if eight:
        for place, book in enumerate(eight[1:]):
            if book is not None:
                books[place] = book.contiguous()
                kinds[place], tables[place] = encoding(books[place])
                if kinds[place] == ANY:
                    negative = books[place].signbit().sum().float().reshape(1)
                    tables[place] = torch.cat((tables[place], negative))
    trust = torch.empty(tensors, device=device) if max_unorm > 0 else like
    sums = torch.empty(2 * programs, dtype=torch.float64, device=device) if max_unorm > 0 else like
    for norms in (True, False) if max_unorm > 0 else (False,):
        launch(
            update_kernel,
            (programs,),
            device,
            table.rows,
            table.parts,
            sums,
            trust,
            like,
            coefficients,
            step,
            grad_scale if scale_on_device else like,
            *books,
            *tables,
            *numbers[:13],
            float(grad_scale) if grad_scale is not None and not scale_on_device else 1.0,
            0 if isinstance(step_, Tensor) else int(step_),
            OPTIMIZER=OPTIMIZERS[optimizer],
            BLOCKS=blocks,
            BLOCKSIZE=blocksize,
            PADDED=padded,
            PART=part,
            EIGHT=eight is not None,
            BOOK1=kinds[0],
            BOOK2=kinds[1],
            ON_DEVICE=on_device,
            STEP_ON_DEVICE=isinstance(step_, Tensor),
            SCALE=grad_scale is not None,
            SCALE_ON_DEVICE=scale_on_device,
            SKIP=skip_zeros,
            STOCHASTIC=stochastic,
            TRUST=max_unorm > 0,
            NORMS=norms,
            ALIGNED=all(
                not fields[place + field] % 16 for place in range(0, len(fields), FIELDS) for field in range(4)
            ),
            SHARED=bool(tuned["SHARED"]),
            num_warps=min(tuned["num_warps"] * max(padded // tuned["TILE"], 1), 8),
            enable_fp_fusion=False,
        )
        if norms:
            launch(
                trust_kernel,
                (tensors,),
                device,
                sums,
                table.bounds,
                trust,
                coefficients[13:] if on_device else like,
                numbers[13],
                max_unorm,
                0.0 if rules.RULES[optimizer].states[1] else hyper.eps,
                ON_DEVICE=on_device,
                num_warps=1,
                enable_fp_fusion=False,
            )


def update_32bit(
    optimizer: str,
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    state1: Sequence[Tensor],
    state2: Sequence[Tensor],
    step: Tensor,
    lr: Tensor,
    grad_scale: Tensor | None,
    betas: Sequence[float],
    eps: float,
    weight_decay: float,
    alpha: float,
    t_alpha: int,
    t_beta3: int,
    max_unorm: float,
    skip_zeros: bool,
    seeds: Sequence[int],
) -> None:
    hyper = rules.Hyper(betas, eps, weight_decay, alpha, t_alpha, t_beta3)
    grads = [grad.contiguous() for grad in grads]  # kept alive until everything is launched
    nothing = [None] * len(params)
    fields: list[int] = []
    for param, grad, one, two, seed in zip(params, grads, state1, state2 or nothing, seeds or [0] * len(params)):
        addresses = (param.data_ptr(), grad.data_ptr(), one.data_ptr(), address(two))
        fields += (*addresses, 0, 0, 0, param.numel(), seed & 0xFFFFFFFF)
    _update(optimizer, fields, params[0], None, step, lr, grad_scale, hyper, max_unorm, skip_zeros, bool(seeds))


def update_8bit(
    optimizer: str,
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    state1: Sequence[Tensor],
    absmax1: Sequence[Tensor],
    codebook1: Tensor,
    state2: Sequence[Tensor],
    absmax2: Sequence[Tensor],
    codebook2: Tensor | None,
    blocksize: int,
    step: Tensor,
    lr: Tensor,
    grad_scale: Tensor | None,
    betas: Sequence[float],
    eps: float,
    weight_decay: float,
    alpha: float,
    t_alpha: int,
    t_beta3: int,
    max_unorm: float,
    skip_zeros: bool,
    seeds: Sequence[int],
) -> None:
    hyper = rules.Hyper(betas, eps, weight_decay, alpha, t_alpha, t_beta3)
    grads = [grad.contiguous() for grad in grads]
    nothing = [None] * len(params)
    fields: list[int] = []
    for param, grad, one, scale1, two, scale2, seed in zip(
        params, grads, state1, absmax1, state2 or nothing, absmax2 or nothing, seeds or [0] * len(params)
    ):
        first = scale1.data_ptr()
        slow = first + scale1.nbytes // 2  # read for ademamix alone
        addresses = (param.data_ptr(), grad.data_ptr(), one.data_ptr(), address(two), first, slow, address(scale2))
        fields += (*addresses, param.numel(), seed & 0xFFFFFFFF)
    eight = (blocksize, codebook1, codebook2 if state2 else None)
    _update(optimizer, fields, params[0], eight, step, lr, grad_scale, hyper, max_unorm, skip_zeros, bool(seeds))
