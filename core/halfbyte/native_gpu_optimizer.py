"""Adapters of the optimizer updates of the portable GPU module: lists of tensors become a plan in device memory.

A plan holds the addresses of all tensors of a call.  Making it costs a few launches, so it is kept as long as the
first state lives and used while every address, size and the stream stay the same.  In a graph that is being
captured each call makes its own, which then belongs to the graph.  Nothing waits for the device.
"""

from __future__ import annotations

import functools
import itertools
import weakref
from array import array
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .kernel import Kernel
from .native import DTYPES, OPTIMIZERS, address, addresses, is_dense, sizes
from .native_gpu import Module, place
from .ops import rules

BLOCKSIZE = 256  # csrc/include/halfbyte/gpu_optimizer.h: kUpdateBlock

# csrc/include/halfbyte/gpu_optimizer.h: Number
_NUMBERS = {torch.float32: 1, torch.float64: 2, torch.int64: 3}
_NONE = (0, 0)


class Plan(NamedTuple):
    """What a kernel reads about the tensors of a call.

    key      what it was made from, apart from the fields
    fields   of every tensor, as csrc/include/halfbyte/gpu_optimizer.h lists them
    tensors  the records, uint8
    chunks   the number of its tensor for each chunk, int32
    """

    key: tuple[Any, ...]
    fields: array[int]
    tensors: Tensor
    chunks: Tensor


# By the address of the first state's Python object, like torch.utils.weak's dictionaries; tensors compare by value.
_plans: dict[int, tuple[weakref.ref[Tensor], Plan]] = {}


def _plan(c: Module, optimizer: str, param: Tensor, state: Tensor, fields: array[int], where: tuple[int, int]) -> Plan:
    if param.is_cuda and torch.cuda.is_current_stream_capturing():
        return _planned(c, (), optimizer, param, state, fields, where)
    key = (id(c), optimizer, param.dtype, state.dtype, *where)
    reference, plan = _plans.get(id(state), (None, None))
    if plan is None or reference is None or reference() is not state or plan.key != key or plan.fields != fields:
        plan = _planned(c, key, optimizer, param, state, fields, where)
        number = id(state)
        _plans[number] = weakref.ref(state, lambda gone: _forget(number, gone)), plan
    return plan


def _forget(number: int, gone: weakref.ref[Tensor]) -> None:
    if _plans.get(number, (None,))[0] is gone:
        del _plans[number]


def _planned(
    c: Module,
    key: tuple[Any, ...],
    optimizer: str,
    param: Tensor,
    state: Tensor,
    fields: array[int],
    where: tuple[int, int],
) -> Plan:
    begin, length = fields.buffer_info()
    count = length // c.UPDATE_FIELDS
    chunks = c.update_chunks(begin, count)
    tensors = torch.empty(count * c.UPDATE_TENSOR_BYTES, dtype=torch.uint8, device=param.device)
    table = torch.empty(chunks, dtype=torch.int32, device=param.device)
    kind = OPTIMIZERS[optimizer], DTYPES[param.dtype], state.element_size()
    c.plan_update(begin, count, chunks, *kind, tensors.data_ptr(), table.data_ptr(), *where)
    return Plan(key, fields, tensors, table)


# -- the ops ---------------------------------------------------------------------------------------------------


def update_32bit(
    c: Module,
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
    none: Sequence[Tensor] = ()
    lists = params, _dense(grads), state1, state2, none, none  # kept alive during the call
    _update(c, optimizer, lists, None, None, step, lr, grad_scale, hyper, max_unorm, skip_zeros, seeds)


def update_8bit(
    c: Module,
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
    codebook1 = codebook1.contiguous()
    codebook2 = None if codebook2 is None or not state2 else codebook2.contiguous()
    lists = params, _dense(grads), state1, state2, absmax1, absmax2
    _update(c, optimizer, lists, codebook1, codebook2, step, lr, grad_scale, hyper, max_unorm, skip_zeros, seeds)


def _update(
    c: Module,
    optimizer: str,
    lists: tuple[Sequence[Tensor], ...],
    codebook1: Tensor | None,
    codebook2: Tensor | None,
    step: Tensor,
    lr: Tensor,
    grad_scale: Tensor | None,
    hyper: rules.Hyper,
    max_unorm: float,
    skip_zeros: bool,
    seeds: Sequence[int],
) -> None:
    params, state1 = lists[0], lists[2]
    fields = _fields(c, optimizer, lists, seeds)
    if not fields:
        return
    param, where = params[0], place(params[0])
    plan = _plan(c, optimizer, param, state1[0], fields, where)
    numbers, drawn, on_device = _coefficients(c, optimizer, step, lr, grad_scale, hyper, param.device, where)
    count, chunks = len(fields) // c.UPDATE_FIELDS, plan.chunks.numel()
    partial = sizes = None
    if max_unorm > 0:
        partial = torch.empty(2 * chunks, dtype=torch.float64, device=param.device)
        sizes = torch.empty(count, dtype=torch.float32, device=param.device)
    c.update(
        OPTIMIZERS[optimizer],
        DTYPES[param.dtype],
        codebook1 is not None,
        skip_zeros,
        bool(seeds),
        count,
        chunks,
        plan.tensors.data_ptr(),
        plan.chunks.data_ptr(),
        address(codebook1),
        address(codebook2),
        numbers,
        drawn,
        address(on_device),
        max_unorm,
        0.0 if rules.RULES[optimizer].states[1] else hyper.eps,
        address(partial),
        address(sizes),
        *where,
    )


def _fields(c: Module, optimizer: str, lists: tuple[Sequence[Tensor], ...], seeds: Sequence[int]) -> array[int]:
    """The fields of all parameters that have elements, filled column by column: there may be ten thousand."""
    counts, absmax1 = sizes(lists[0]), lists[4]
    width = c.UPDATE_FIELDS
    fields = array("q", bytes(8 * width * len(counts)))
    for column, tensors in enumerate(lists):
        if tensors:
            fields[column::width] = addresses(tensors)
    fields[6::width] = counts
    if absmax1 and optimizer == "ademamix":
        fields[7::width] = array("q", [size // 2 for size in sizes(absmax1)])
    if seeds:
        fields[8::width] = array("q", (seed & 0xFFFFFFFF for seed in seeds))
    if all(counts):
        return fields
    kept = [fields[width * i : width * (i + 1)] for i, count in enumerate(counts) if count]
    return array("q", itertools.chain.from_iterable(kept))


def _dense(grads: Sequence[Tensor]) -> Sequence[Tensor]:
    return grads if is_dense(grads) else [grad.contiguous() for grad in grads]


def _coefficients(
    c: Module,
    optimizer: str,
    step: Tensor,
    lr: Tensor,
    grad_scale: Tensor | None,
    hyper: rules.Hyper,
    device: torch.device,
    where: tuple[int, int],
) -> tuple[list[float], int, Tensor | None]:
    """Coefficients and hash of the step; or, where any of it comes from the device, a tensor of them there."""
    given = (step, lr, grad_scale)
    if all(one is None or on_host(one) for one in given):
        scale = 1.0 if grad_scale is None else float(grad_scale)
        numbers = rules.coefficients(optimizer, float(step), float(lr), hyper)
        return [*map(float, numbers), scale], rules.hash32(int(step) & 0xFFFFFFFF), None
    kept = [_number(one, device) for one in given]  # alive until the launch
    out = torch.empty(c.COEFFICIENTS_BYTES, dtype=torch.uint8, device=device)
    scalars = [_NONE if one is None else (one.data_ptr(), _NUMBERS[one.dtype]) for one in kept]
    betas, rising = hyper.betas, (hyper.t_alpha, hyper.t_beta3)
    set_ = (*betas, hyper.eps, hyper.weight_decay, hyper.alpha)
    c.update_coefficients(OPTIMIZERS[optimizer], set_, rising, *scalars, out.data_ptr(), *where)
    return [], 0, out


def on_host(number: Tensor) -> bool:
    """Whether reading a number costs no wait for a device."""
    return number.device.type == "cpu"


def _number(number: Tensor | None, device: torch.device) -> Tensor | None:
    """A number on the device, in a type that a kernel reads.  One from the host is filled in, not copied."""
    if number is None:
        return None
    if on_host(number) and device.type != "cpu":
        return torch.full((), float(number), dtype=torch.float64, device=device)
    return number if number.dtype in _NUMBERS else number.double()


# -- what is declared ------------------------------------------------------------------------------------------

_32BIT = {"dtype": frozenset(DTYPES), "optimizer": frozenset(OPTIMIZERS)}


def kernels(c: Module) -> Iterable[Kernel]:
    """The update kernels of a portable module."""
    yield Kernel("update_32bit", functools.partial(update_32bit, c), limits=_32BIT)
    yield Kernel("update_8bit", functools.partial(update_8bit, c), limits={**_32BIT, "blocksize": {BLOCKSIZE}})
