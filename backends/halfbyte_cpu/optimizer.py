"""Adapters of the optimizer updates: hyperparameters become numbers, lists of tensors become rows of addresses.

The ops have checked everything; csrc/cpu/module.cpp has the order of numbers and fields.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeAlias

from torch import Tensor

from halfbyte.native import DTYPES, OPTIMIZERS, address, addresses, is_dense, sizes, threads
from halfbyte.ops import rules

Native: TypeAlias = Callable[..., None]


def update_32bit(
    native: Native,
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
    grads = grads if is_dense(grads) else [grad.contiguous() for grad in grads]  # kept alive during the call
    fields = _fields((params, grads, state1, state2), seeds, step)
    native(
        OPTIMIZERS[optimizer],
        DTYPES[params[0].dtype],
        _numbers(optimizer, step, lr, grad_scale, hyper, max_unorm),
        skip_zeros,
        bool(seeds),
        fields,
        threads(),
    )


def update_8bit(
    native: Native,
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
    grads = grads if is_dense(grads) else [grad.contiguous() for grad in grads]
    codebook1 = codebook1.contiguous()
    codebook2 = None if codebook2 is None or not state2 else codebook2.contiguous()
    slow = [one.view(-1)[one.numel() // 2 :] for one in absmax1] if optimizer == "ademamix" else ()
    fields = _fields((params, grads, state1, state2, absmax1, slow, absmax2), seeds, step)
    native(
        OPTIMIZERS[optimizer],
        DTYPES[params[0].dtype],
        _numbers(optimizer, step, lr, grad_scale, hyper, max_unorm),
        skip_zeros,
        bool(seeds),
        fields,
        blocksize,
        codebook1.data_ptr(),
        address(codebook2),
        threads(),
    )


def _numbers(
    optimizer: str, step: Tensor, lr: Tensor, grad_scale: Tensor | None, hyper: rules.Hyper, max_unorm: float
) -> list[float]:
    c = rules.coefficients(optimizer, float(step), float(lr), hyper)
    scale = 1.0 if grad_scale is None else float(grad_scale)
    trust_eps = 0.0 if rules.RULES[optimizer].states[1] else hyper.eps
    return [*map(float, c), scale, max_unorm, trust_eps]


def _fields(lists: Sequence[Sequence[Tensor]], seeds: Sequence[int], step: Tensor) -> list[int]:
    """A row of nine per parameter, filled column by column; 0 for a list that is empty."""
    params = lists[0]
    fields = [0] * (9 * len(params))
    for column, tensors in enumerate(lists):
        if tensors:
            fields[column::9] = addresses(tensors)
    fields[7::9] = sizes(params)
    if seeds:
        fields[8::9] = [rules.rounding_key(seed, float(step)) for seed in seeds]
    return fields
