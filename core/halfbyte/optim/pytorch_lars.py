"""PytorchLARS: LARS in plain torch operations, with dampening and Nesterov momentum."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch.optim.optimizer import ParamsT

from ..errors import InputError


class PytorchLARS(torch.optim.Optimizer):
    """SGD whose step is bounded by the norm of the parameter, parameter by parameter in torch operations.

    max_unorm  bound on norm(update) / norm(parameter); 0 for none

    States are `momentum_buffer`, of the parameter's dtype and shape.  Any floating dtype; norms are float32.
    Raises InputError for a negative lr, momentum or weight_decay, and for nesterov without momentum or with
    dampening.

    Source: You et al. 2017 (arXiv 1708.03888), with bitsandbytes' bound in place of the paper's ratio.
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float = 0.01,
        momentum: float = 0,
        dampening: float = 0,
        weight_decay: float = 0,
        nesterov: bool = False,
        max_unorm: float = 0.02,
    ) -> None:
        numbers = {"lr": lr, "momentum": momentum, "weight_decay": weight_decay, "max_unorm": max_unorm}
        for name, value in numbers.items():
            if not value >= 0:
                raise InputError(f"{name} must be at least 0; got {value}")
        if nesterov and (momentum == 0 or dampening != 0):
            raise InputError(f"nesterov needs momentum and no dampening; got {momentum} and {dampening}")
        super().__init__(params, {**numbers, "dampening": dampening, "nesterov": nesterov})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Update every parameter that has a gradient."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for param in group["params"]:
                if param.grad is None:
                    continue
                update = param.grad.add(param, alpha=group["weight_decay"])
                if momentum := group["momentum"]:
                    state = self.state[param]
                    if "momentum_buffer" not in state:
                        buffer = state["momentum_buffer"] = update.clone()
                    else:
                        buffer = state["momentum_buffer"].mul_(momentum).add_(update, alpha=1 - group["dampening"])
                    update = update.add(buffer, alpha=momentum) if group["nesterov"] else buffer
                if bound := group["max_unorm"]:
                    norm, size = (torch.linalg.vector_norm(x, dtype=torch.float32) for x in (param, update))
                    factor = torch.where(size > 0, bound * norm / size, 1.0).clamp(max=1.0)
                    update = update * factor.to(update.dtype)
                param.sub_(update * group["lr"])
        return loss
