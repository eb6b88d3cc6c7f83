"""PytorchAdEMAMix: AdEMAMix in plain torch operations, to compare with."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch.optim.optimizer import ParamsT


class PytorchAdEMAMix(torch.optim.Optimizer):
    """Adam with a second, slow average of the gradient, parameter by parameter in torch operations.

    t_alpha, t_beta3  steps over which alpha rises from 0, and beta3 from beta1; None for none

    States are `m1_m2`, both averages of the gradient, and `nu`; the step is the group's.

    Source: Pagliardini et al. 2024 (arXiv 2409.03137).
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float = 1e-3,
        betas: tuple[float, float, float] = (0.9, 0.999, 0.9999),
        alpha: float = 5.0,
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        t_beta3: int | None = None,
        t_alpha: int | None = None,
    ) -> None:
        numbers = {"lr": lr, "betas": betas, "alpha": alpha, "eps": eps, "weight_decay": weight_decay}
        super().__init__(params, {**numbers, "t_beta3": t_beta3, "t_alpha": t_alpha})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Update every parameter that has a gradient."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            step = group["step"] = group.get("step", 0) + 1
            beta1, beta2, beta3 = group["betas"]
            alpha = group["alpha"]
            if group["t_alpha"]:
                alpha = min(step / group["t_alpha"], 1.0) * alpha
            if group["t_beta3"]:
                done, ln1, ln3 = step / group["t_beta3"], math.log(beta1), math.log(beta3)
                beta3 = min(math.exp(ln1 * ln3 / ((1 - done) * ln3 + done * ln1)), beta3)
            for param in group["params"]:
                if param.grad is None:
                    continue
                state = self.state[param]
                if not state:
                    state["m1_m2"] = param.new_zeros((2, *param.shape))
                    state["nu"] = torch.zeros_like(param)
                fast, slow = state["m1_m2"]
                fast.lerp_(param.grad, 1 - beta1)
                slow.lerp_(param.grad, 1 - beta3)
                state["nu"].mul_(beta2).addcmul_(param.grad, param.grad, value=1 - beta2)
                divisor = (state["nu"] / (1 - beta2**step)).sqrt_().add_(group["eps"])
                update = (fast / (1 - beta1**step)).add_(slow, alpha=alpha).div_(divisor)
                param.mul_(1 - group["lr"] * group["weight_decay"]).sub_(update, alpha=group["lr"])
        return loss
