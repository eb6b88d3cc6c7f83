"""Lion: evolved sign momentum."""

from __future__ import annotations

from typing import Any, Unpack

from torch import Tensor
from torch.optim.optimizer import ParamsT

from .base import Optimizer
from .options import Options


class Lion(Optimizer):
    """The sign of a mixture of gradient and momentum, with decoupled weight decay applied before the update.

    The arguments are explained at the base class, the keyword options at Options.

    Source: Chen et al. 2023 (arXiv 2302.06675).
    """

    rule = "lion"

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-4,
        betas: Any = (0.9, 0.99),
        weight_decay: float = 0,
        optim_bits: int = 32,
        args: Any = None,
        min_8bit_size: int = 4096,
        is_paged: bool = False,
        **options: Unpack[Options],
    ) -> None:
        super().__init__(
            params, lr, betas, 0.0, weight_decay, optim_bits, args, min_8bit_size, is_paged=is_paged, **options
        )


class Lion8bit(Lion):
    """Lion with 8-bit states."""

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-4,
        betas: Any = (0.9, 0.99),
        weight_decay: float = 0,
        args: Any = None,
        min_8bit_size: int = 4096,
        is_paged: bool = False,
        **options: Unpack[Options],
    ) -> None:
        super().__init__(params, lr, betas, weight_decay, 8, args, min_8bit_size, is_paged, **options)


class Lion32bit(Lion):
    """Lion with 32-bit states."""

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-4,
        betas: Any = (0.9, 0.99),
        weight_decay: float = 0,
        args: Any = None,
        min_8bit_size: int = 4096,
        is_paged: bool = False,
        **options: Unpack[Options],
    ) -> None:
        super().__init__(params, lr, betas, weight_decay, 32, args, min_8bit_size, is_paged, **options)


class PagedLion(Lion):
    """Lion whose large states may live on the host; see the base class."""

    paged = True

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-4,
        betas: Any = (0.9, 0.99),
        weight_decay: float = 0,
        optim_bits: int = 32,
        args: Any = None,
        min_8bit_size: int = 4096,
        **options: Unpack[Options],
    ) -> None:
        super().__init__(params, lr, betas, weight_decay, optim_bits, args, min_8bit_size, **options)


class PagedLion8bit(PagedLion):
    """PagedLion with 8-bit states."""

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-4,
        betas: Any = (0.9, 0.99),
        weight_decay: float = 0,
        args: Any = None,
        min_8bit_size: int = 4096,
        **options: Unpack[Options],
    ) -> None:
        super().__init__(params, lr, betas, weight_decay, 8, args, min_8bit_size, **options)


class PagedLion32bit(PagedLion):
    """PagedLion with 32-bit states."""

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-4,
        betas: Any = (0.9, 0.99),
        weight_decay: float = 0,
        args: Any = None,
        min_8bit_size: int = 4096,
        **options: Unpack[Options],
    ) -> None:
        super().__init__(params, lr, betas, weight_decay, 32, args, min_8bit_size, **options)
