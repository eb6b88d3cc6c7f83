"""LARS: SGD with a layer-wise bound on the step."""

from __future__ import annotations

from typing import Any, Unpack

from torch import Tensor
from torch.optim.optimizer import ParamsT

from .base import Optimizer
from .options import Options, momentum_betas, refuse


class LARS(Optimizer):
    """SGD with momentum whose step is bounded by the norm of the parameter.

    max_unorm            bound on norm(momentum) / norm(parameter), for each parameter; it only ever shrinks a step
    momentum             must be given and not be 0
    dampening, nesterov  must be 0 and False

    The other arguments are explained at the base class, the keyword options at Options.
    Raises NotImplementedError (an InputError too) without momentum.

    Source: You et al. 2017 (arXiv 1708.03888), with bitsandbytes' bound in place of the paper's ratio.
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
        max_unorm: float = 0.02,
        **options: Unpack[Options],
    ) -> None:
        refuse(self, dampening=(dampening, 0), nesterov=(nesterov, False))
        betas = momentum_betas(self, momentum)
        super().__init__(
            params, lr, betas, 0.0, weight_decay, optim_bits, args, min_8bit_size, max_unorm=max_unorm, **options
        )


class LARS8bit(LARS):
    """LARS with 8-bit states."""

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
        max_unorm: float = 0.02,
        **options: Unpack[Options],
    ) -> None:
        super().__init__(
            params, lr, momentum, dampening, weight_decay, nesterov, 8, args, min_8bit_size, max_unorm, **options
        )


class LARS32bit(LARS):
    """LARS with 32-bit states."""

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
        max_unorm: float = 0.02,
        **options: Unpack[Options],
    ) -> None:
        super().__init__(
            params, lr, momentum, dampening, weight_decay, nesterov, 32, args, min_8bit_size, max_unorm, **options
        )
