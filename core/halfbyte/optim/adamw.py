"""AdamW: Adam with a default weight decay of 0.01."""

from __future__ import annotations

from typing import Any, Unpack

from torch import Tensor
from torch.optim.optimizer import ParamsT

from .adam import Adam
from .options import Options


class AdamW(Adam):
    """Adam with decoupled weight decay (arXiv 1711.05101); the arguments are Adam's."""

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        betas: Any = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        amsgrad: bool = False,
        optim_bits: int = 32,
        args: Any = None,
        min_8bit_size: int = 4096,
        is_paged: bool = False,
        **options: Unpack[Options],
    ) -> None:
        super().__init__(
            params, lr, betas, eps, weight_decay, amsgrad, optim_bits, args, min_8bit_size, is_paged, **options
        )


class AdamW8bit(AdamW):
    """AdamW with 8-bit states."""

    bits = 8


class AdamW32bit(AdamW):
    """AdamW with 32-bit states."""

    bits = 32


class PagedAdamW(AdamW):
    """AdamW whose large states may live on the host; see the base class."""

    paged = True

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        betas: Any = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        amsgrad: bool = False,
        optim_bits: int = 32,
        args: Any = None,
        min_8bit_size: int = 4096,
        **options: Unpack[Options],
    ) -> None:
        super().__init__(params, lr, betas, eps, weight_decay, amsgrad, optim_bits, args, min_8bit_size, **options)


class PagedAdamW8bit(PagedAdamW):
    """PagedAdamW with 8-bit states."""

    bits = 8


class PagedAdamW32bit(PagedAdamW):
    """PagedAdamW with 32-bit states."""

    bits = 32
