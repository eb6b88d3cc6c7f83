"""Gradient release: step each parameter as soon as backward has its gradient, and free the gradient."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor
from torch.utils.hooks import RemovableHandle

from ..dispatch import current_override, entered
from ..errors import InputError
from .base import Optimizer, Place


class GradientRelease:
    """The hooks of `step_in_backward`; `remove()` takes them away, as does leaving a `with` block."""

    def __init__(self, handles: list[RemovableHandle]) -> None:
        self._handles = handles

    def remove(self) -> None:
        """Step no longer in backward."""
        for handle in self._handles:
            handle.remove()

    def __enter__(self) -> GradientRelease:
        return self

    def __exit__(self, *exception: object) -> None:
        self.remove()


def step_in_backward(optimizer: Optimizer) -> GradientRelease:
    """Let backward() step each parameter and free its gradient, so that gradients never exist all at once.

    `optimizer.step()` and `zero_grad()` may stay where they are: they find no gradients.  Every backward() is then
    a step: gradients cannot be accumulated over several, clipped together or unscaled, and under DDP and FSDP, which
    average gradients after these hooks, it must not be used.  Parameters of groups added later are not included.

    Raises InputError for an optimizer with fused_clip, which needs all gradients at once.

    Example::

        with halfbyte.optim.step_in_backward(optimizer):
            for batch in batches:
                model(batch).sum().backward()

    Source: Lv et al. 2023, LOMO, section 3.1 (arXiv 2306.09782).
    """
    if optimizer.fused_clip is not None:
        raise InputError("fused_clip needs all gradients at once; step_in_backward frees each before the next exists")
    chain = current_override()  # backward may run in autograd's own threads

    def hook_at(place: Place) -> Callable[[Tensor], Any]:
        def hook(param: Tensor) -> None:
            with entered(chain):
                optimizer.update([place])
            param.grad = None

        return hook

    params = [param for group in optimizer.param_groups for param in group["params"]]
    return GradientRelease(
        [
            param.register_post_accumulate_grad_hook(hook_at(place))
            for place, param in zip(optimizer.places(), params, strict=True)
            if param.requires_grad
        ]
    )
