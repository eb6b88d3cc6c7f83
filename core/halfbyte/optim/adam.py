"""Adam: the family with bitsandbytes' default weight decay of 0."""

from __future__ import annotations

from typing import Any, Unpack

from torch import Tensor
from torch.optim.optimizer import ParamsT

from .base import Optimizer
from .options import Options, refuse


class Adam(Optimizer):
    """Adam with decoupled weight decay, applied before the update: AdamW with a default decay of 0.

    amsgrad must be False.  The other arguments are explained at the base class, the keyword options at Options.

    Source: Kingma and Ba 2015 (arXiv 1412.6980), Loshchilov and Hutter 2019 (arXiv 1711.05101).
    """

    rule = "adam"

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        betas: Any = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0,
        amsgrad: bool = False,
        optim_bits: int = 32,
        args: Any = None,
        min_8bit_size: int = 4096,
        is_paged: bool = False,
        **options: Unpack[Options],
    ) -> None:
        refuse(self, amsgrad=(amsgrad, False))
        if self.bits is not None:  # the class's name says it; the argument is there for compatibility
            refuse(self, optim_bits=(optim_bits, 32))
        super().__init__(
            params, lr, betas, eps, weight_decay, optim_bits, args, min_8bit_size, is_paged=is_paged, **options
        )


class Adam8bit(Adam):
    """Adam with 8-bit states."""

    bits = 8


class Adam32bit(Adam):
    """Adam with 32-bit states."""

    bits = 32


class PagedAdam(Adam):
    """Adam whose large states may live on the host; see the base class."""

    paged = True


class PagedAdam8bit(PagedAdam):
    """PagedAdam with 8-bit states."""

    bits = 8


class PagedAdam32bit(PagedAdam):
    """PagedAdam with 32-bit states."""

    bits = 32
