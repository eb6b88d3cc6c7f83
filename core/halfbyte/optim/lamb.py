"""LAMB: AdamW with a layer-wise bound on the step."""

from __future__ import annotations

from typing import Any, Unpack

from torch import Tensor
from torch.optim.optimizer import ParamsT

from .base import Optimizer
from .options import Options, refuse


class LAMB(Optimizer):
    """AdamW whose step is bounded by the norm of the parameter.

    max_unorm        bound on norm(update) / norm(parameter), for each parameter; it only ever shrinks a step
    bias_correction  must be True
    amsgrad          must be False
    adam_w_mode      must be True

    The other arguments are explained at the base class, the keyword options at Options.

    Source: You et al. 2020 (arXiv 1904.00962), with bitsandbytes' bound in place of the paper's ratio.
    """

    rule = "adam"

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        bias_correction: bool = True,
        betas: Any = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0,
        amsgrad: bool = False,
        adam_w_mode: bool = True,
        optim_bits: int = 32,
        args: Any = None,
        min_8bit_size: int = 4096,
        max_unorm: float = 1.0,
        **options: Unpack[Options],
    ) -> None:
        refuse(self, bias_correction=(bias_correction, True), amsgrad=(amsgrad, False), adam_w_mode=(adam_w_mode, True))
        super().__init__(
            params, lr, betas, eps, weight_decay, optim_bits, args, min_8bit_size, max_unorm=max_unorm, **options
        )


class LAMB8bit(LAMB):
    """LAMB with 8-bit states."""

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        bias_correction: bool = True,
        betas: Any = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0,
        amsgrad: bool = False,
        adam_w_mode: bool = True,
        args: Any = None,
        min_8bit_size: int = 4096,
        max_unorm: float = 1.0,
        **options: Unpack[Options],
    ) -> None:
        super().__init__(
            params,
            lr,
            bias_correction,
            betas,
            eps,
            weight_decay,
            amsgrad,
            adam_w_mode,
            8,
            args,
            min_8bit_size,
            max_unorm,
            **options,
        )


class LAMB32bit(LAMB):
    """LAMB with 32-bit states."""

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        bias_correction: bool = True,
        betas: Any = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0,
        amsgrad: bool = False,
        adam_w_mode: bool = True,
        args: Any = None,
        min_8bit_size: int = 4096,
        max_unorm: float = 1.0,
        **options: Unpack[Options],
    ) -> None:
        super().__init__(
            params,
            lr,
            bias_correction,
            betas,
            eps,
            weight_decay,
            amsgrad,
            adam_w_mode,
            32,
            args,
            min_8bit_size,
            max_unorm,
            **options,
        )
