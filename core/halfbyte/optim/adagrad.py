"""Adagrad."""

from __future__ import annotations

from typing import Any, Unpack

from torch import Tensor
from torch.optim.optimizer import ParamsT

from .base import Optimizer
from .options import Options, refuse


class Adagrad(Optimizer):
    """The gradient over the root of the sum of its squares; weight decay is added to the gradient.

    lr_decay, initial_accumulator_value  must be 0

    The other arguments are explained at the base class, the keyword options at Options.

    Source: Duchi et al. 2011, Adaptive Subgradient Methods for Online Learning and Stochastic Optimization.
    """

    rule = "adagrad"

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-2,
        lr_decay: float = 0,
        weight_decay: float = 0,
        initial_accumulator_value: float = 0,
        eps: float = 1e-10,
        optim_bits: int = 32,
        args: Any = None,
        min_8bit_size: int = 4096,
        **options: Unpack[Options],
    ) -> None:
        refuse(self, lr_decay=(lr_decay, 0), initial_accumulator_value=(initial_accumulator_value, 0))
        super().__init__(params, lr, (0.0, 0.0), eps, weight_decay, optim_bits, args, min_8bit_size, **options)


class Adagrad8bit(Adagrad):
    """Adagrad with 8-bit states; optim_bits must be 8."""

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-2,
        lr_decay: float = 0,
        weight_decay: float = 0,
        initial_accumulator_value: float = 0,
        eps: float = 1e-10,
        optim_bits: int = 8,
        args: Any = None,
        min_8bit_size: int = 4096,
        **options: Unpack[Options],
    ) -> None:
        refuse(self, optim_bits=(optim_bits, 8))
        super().__init__(
            params, lr, lr_decay, weight_decay, initial_accumulator_value, eps, 8, args, min_8bit_size, **options
        )


class Adagrad32bit(Adagrad):
    """Adagrad with 32-bit states; optim_bits must be 32."""

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-2,
        lr_decay: float = 0,
        weight_decay: float = 0,
        initial_accumulator_value: float = 0,
        eps: float = 1e-10,
        optim_bits: int = 32,
        args: Any = None,
        min_8bit_size: int = 4096,
        **options: Unpack[Options],
    ) -> None:
        refuse(self, optim_bits=(optim_bits, 32))
        super().__init__(
            params, lr, lr_decay, weight_decay, initial_accumulator_value, eps, 32, args, min_8bit_size, **options
        )
