"""RMSprop."""

from __future__ import annotations

from typing import Any, Unpack

from torch import Tensor
from torch.optim.optimizer import ParamsT

from .base import Optimizer
from .options import Options, Unsupported, parse_number, refuse


class RMSprop(Optimizer):
    """The gradient over the root of its squares' average; weight decay is added to the gradient.

    alpha               of the average; may be a string, as may eps, momentum and centered (they come from
                        transformers' `optim_args` as strings)
    momentum, centered  must be 0 and False

    The other arguments are explained at the base class, the keyword options at Options.
    Raises NotImplementedError (an InputError too) for an alpha of 0 and for centered.

    Source: Hinton 2012, Neural Networks for Machine Learning, lecture 6e.
    """

    rule = "rmsprop"

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-2,
        alpha: float | str = 0.99,
        eps: float | str = 1e-8,
        weight_decay: float = 0,
        momentum: float | str = 0,
        centered: bool | str = False,
        optim_bits: int = 32,
        args: Any = None,
        min_8bit_size: int = 4096,
        **options: Unpack[Options],
    ) -> None:
        decay_rate = parse_number("alpha", alpha)
        if decay_rate == 0 or str(centered) != "False":
            raise Unsupported(
                f"{type(self).__name__} needs an alpha other than 0 and centered=False; got {alpha!r} and {centered!r}"
            )
        refuse(self, momentum=(parse_number("momentum", momentum), 0.0))
        super().__init__(
            params,
            lr,
            (decay_rate, 0.0),
            parse_number("eps", eps),
            weight_decay,
            optim_bits,
            args,
            min_8bit_size,
            **options,
        )


class RMSprop8bit(RMSprop):
    """RMSprop with 8-bit states."""

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-2,
        alpha: float | str = 0.99,
        eps: float | str = 1e-8,
        weight_decay: float = 0,
        momentum: float | str = 0,
        centered: bool | str = False,
        args: Any = None,
        min_8bit_size: int = 4096,
        **options: Unpack[Options],
    ) -> None:
        super().__init__(params, lr, alpha, eps, weight_decay, momentum, centered, 8, args, min_8bit_size, **options)


class RMSprop32bit(RMSprop):
    """RMSprop with 32-bit states."""

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-2,
        alpha: float | str = 0.99,
        eps: float | str = 1e-8,
        weight_decay: float = 0,
        momentum: float | str = 0,
        centered: bool | str = False,
        args: Any = None,
        min_8bit_size: int = 4096,
        **options: Unpack[Options],
    ) -> None:
        super().__init__(params, lr, alpha, eps, weight_decay, momentum, centered, 32, args, min_8bit_size, **options)
