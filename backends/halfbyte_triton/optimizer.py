"""The optimizer updates, one launch for all tensors of a call (three with a trust factor).

The kernels are in update.py, states in states.py, the table of addresses that a launch walks in addresses.py.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from halfbyte.native import OPTIMIZERS, address
from halfbyte.ops import rules

from .addresses import table_of
from .codes8 import ANY, encoding
from .launch import config, is_nvidia, launch, power_of_2, processors, registers, width
from .pieces import GATHERS
from .update import FIELDS, trust_kernel, update_kernel


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
    span = blocks * blocksize
    # Fewer steps to a program where they would not fill the GPU, or most tensors would not fill a program.
    tensors = len(fields) // FIELDS
    part = max(min(tuned["PART"], total // (span * 8 * processors(device)), total // (span * tensors)), 1)
    table = table_of(tuple(fields), part * span, device)
    programs = len(table.parts) // 2
    step_, lr_ = rules.host_or_device(step), rules.host_or_device(lr)
    c = rules.coefficients(optimizer, step_, lr_, hyper)
    on_device = any(isinstance(one, Tensor) for one in c)
    numbers: list[float] = [0.0] * len(c)
    coefficients = like
    if on_device:
        coefficients = _on_device(c, device)
    else:
        numbers = [float(one) for one in c]
    scale_on_device = grad_scale is not None and grad_scale.device.type != "cpu"
    keeps = eight is not None and bool(tuned.get("KEEP")) and is_nvidia(device)
    books: list[Tensor] = [like, like]
    tables, kinds = [like, like], [ANY, ANY]
    if eight:
        for place, book in enumerate(eight[1:]):
            if book is not None:
                books[place] = book.contiguous()
                kinds[place], tables[place] = encoding(books[place], nudged=True)
                if kinds[place] == ANY:
                    keeps = False  # its search reads another table
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
            step if isinstance(step_, Tensor) else like,
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
            STAGES=tuned["num_stages"] if GATHERS else 1,  # triton 3.2 cannot load codes ahead of what they look up
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
            EVEN=not any(elements % 16 for elements in fields[7::FIELDS]),
            NVIDIA=is_nvidia(device),
            KEEP=keeps,
            num_warps=min(tuned["num_warps"] * max(padded // tuned["TILE"], 1), 8),
            enable_fp_fusion=False,
            **registers(tuned, device),
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


def _on_device(numbers: Sequence[Tensor | float], device: torch.device) -> Tensor:
    """float32, filled in and not copied from the host, as a graph captures no copy of pageable memory."""
    filled = [one if isinstance(one, Tensor) else torch.full((), one, device=device) for one in numbers]
    return torch.stack([one.float() for one in filled])


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
