"""bitsandbytes.optim.optimizer: the base classes, and the manager of overrides, which is halfbyte's own.

The bases step through halfbyte's ops: a subclass that overrides bitsandbytes' update_step or init_state is not served.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import SimpleNamespace
from typing import Any

from torch import Tensor
from torch.optim.optimizer import ParamsT

from ....errors import InputError
from ....ops.rules import RULES
from ....optim import GlobalOptimManager, Optimizer
from ..functional import RULES as OTHER_NAMES

__all__ = ["GlobalOptimManager", "MockArgs", "Optimizer1State", "Optimizer2State", "Optimizer8bit"]

Optimizer8bit = Optimizer  # what every optimizer is an instance of


class MockArgs(SimpleNamespace):
    """An object with the entries of a mapping as attributes."""

    def __init__(self, initial_data: Mapping[str, Any]) -> None:
        super().__init__(**initial_data)


class Optimizer2State(Optimizer):
    """The optimizer of a rule with two states: adam, lamb or ademamix."""

    states = 2

    def __init__(
        self,
        optimizer_name: str,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        betas: Any = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        optim_bits: int = 32,
        args: Any = None,
        min_8bit_size: int = 4096,
        max_unorm: float = 0.0,
        skip_zeros: bool = False,
        is_paged: bool = False,
        alpha: float = 0.0,
        t_alpha: int | None = None,
        t_beta3: int | None = None,
    ) -> None:
        self.rule = OTHER_NAMES.get(optimizer_name, optimizer_name)  # type: ignore[misc]
        if self.rule not in RULES or 1 + bool(RULES[self.rule].states[1]) != self.states:
            raise InputError(f"{optimizer_name!r} is not an optimizer of {type(self).__name__}")
        args = args or MockArgs(
            {
                "optim_bits": optim_bits,
                "min_8bit_size": min_8bit_size,
                "max_unorm": max_unorm,
                "skip_zeros": skip_zeros,
            }
        )
        super().__init__(
            params,
            lr,
            betas,
            eps,
            weight_decay,
            optim_bits,
            args,
            min_8bit_size,
            is_paged=is_paged,
            alpha=alpha,
            t_alpha=t_alpha,
            t_beta3=t_beta3,
        )

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "rule": self.rule}


class Optimizer1State(Optimizer2State):
    """The optimizer of a rule with one state: momentum, lars, rmsprop, adagrad or lion."""

    states = 1

    def __init__(
        self,
        optimizer_name: str,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        betas: Any = (0.9, 0.0),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        optim_bits: int = 32,
        args: Any = None,
        min_8bit_size: int = 4096,
        max_unorm: float = 0.0,
        skip_zeros: bool = False,
        is_paged: bool = False,
    ) -> None:
        rest = (optim_bits, args, min_8bit_size, max_unorm, skip_zeros, is_paged)
        super().__init__(optimizer_name, params, lr, betas, eps, weight_decay, *rest)


for _one in (MockArgs, Optimizer1State, Optimizer2State):
    _one.__module__ = "bitsandbytes.optim.optimizer"
