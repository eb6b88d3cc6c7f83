"""Adapters of the optimizer updates: hyperparameters become numbers, lists of tensors become rows of addresses.

The ops have checked everything; csrc/cpu/module.cpp has the order of numbers and fields.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeAlias

from torch import Tensor

from halfbyte.native import DTYPES, OPTIMIZERS, address, threads
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
    keys = _keys(seeds, step, len(params))
    grads = [grad.contiguous() for grad in grads]  # kept alive during the call
    state2 = state2 or [None] * len(params)  # type: ignore[list-item]
    fields: list[int] = []
    for param, grad, one, two, key in zip(params, grads, state1, state2, keys):
        fields += (param.data_ptr(), grad.data_ptr(), one.data_ptr(), address(two), 0, 0, 0, param.numel(), key)
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
    keys = _keys(seeds, step, len(params))
    grads = [grad.contiguous() for grad in grads]
    codebook1 = codebook1.contiguous()
    codebook2 = None if codebook2 is None or not state2 else codebook2.contiguous()
    nothing = [None] * len(params)
    fields: list[int] = []
    for param, grad, one, scale1, two, scale2, key in zip(
        params, grads, state1, absmax1, state2 or nothing, absmax2 or nothing, keys
    ):
        first = scale1.data_ptr()
        slow = first + scale1.nbytes // 2  # read for ademamix alone
        addresses = (param.data_ptr(), grad.data_ptr(), one.data_ptr(), address(two), first, slow, address(scale2))
        fields += (*addresses, param.numel(), key)
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


def _keys(seeds: Sequence[int], step: Tensor, count: int) -> list[int]:
    return [rules.rounding_key(seed, float(step)) for seed in seeds] if seeds else [0] * count
