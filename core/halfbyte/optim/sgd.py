"""SGD with momentum."""

from __future__ import annotations

from typing import Any, Unpack

from torch import Tensor
from torch.optim.optimizer import ParamsT

from .base import Optimizer
from .options import Options, momentum_betas, refuse


class SGD(Optimizer):
    """Stochastic gradient descent with momentum; weight decay is added to the gradient.

    momentum             must be given and not be 0
    dampening, nesterov  must be 0 and False

    The other arguments are explained at the base class, the keyword options at Options.
    Raises NotImplementedError (an InputError too) without momentum.

    Source: Sutskever et al. 2013, On the importance of initialization and momentum in deep learning.
    """

    rule = "momentum"

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor,
        momentum: float = 0,
        dampening: float = 0,
        weight_decay: float = 0,
        nesterov: bool = False,
        optim_bits: int = 32,
        args: Any = None,
        min_8bit_size: int = 4096,
        **options: Unpack[Options],
    ) -> None:
        refuse(self, dampening=(dampening, 0), nesterov=(nesterov, False))
        betas = momentum_betas(self, momentum)
        super().__init__(params, lr, betas, 0.0, weight_decay, optim_bits, args, min_8bit_size, **options)


class SGD8bit(SGD):
    """SGD with 8-bit states."""

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor,
        momentum: float = 0,
        dampening: float = 0,
        weight_decay: float = 0,
        nesterov: bool = False,
        args: Any = None,
        min_8bit_size: int = 4096,
        **options: Unpack[Options],
    ) -> None:
        super().__init__(params, lr, momentum, dampening, weight_decay, nesterov, 8, args, min_8bit_size, **options)


class SGD32bit(SGD):
    """SGD with 32-bit states."""

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor,
        momentum: float = 0,
        dampening: float = 0,
        weight_decay: float = 0,
        nesterov: bool = False,
        args: Any = None,
        min_8bit_size: int = 4096,
        **options: Unpack[Options],
    ) -> None:
        super().__init__(params, lr, momentum, dampening, weight_decay, nesterov, 32, args, min_8bit_size, **options)
