"""What torch.func's transforms meet: a sentence instead of a slow loop (vmap) or a lost tangent (jvp)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from .errors import InputError

# The key at which a transform that is active sees an op first.
KEY = "FuncTorchDynamicLayerFrontMode"


def refusal(name: str) -> InputError:
    """The error for an op or layer on tensors that a transform has wrapped."""
    return InputError(
        f"{name} cannot run inside torch.func.vmap, grad or jvp: call it outside, with the batch as a leading "
        "dimension, and use backward() for gradients"
    )


def active() -> bool:
    """Whether a transform is running."""
    return torch._C._functorch.peek_interpreter_stack() is not None


def handler(name: str, op: Callable[..., Any]) -> Callable[..., Any]:
    """A kernel for KEY: runs the op where no argument takes part in the transform, refuses otherwise."""
    wrapped = torch._C._functorch.is_functorch_wrapped_tensor

    def call(*args: Any) -> Any:
        from torch._functorch.pyfunctorch import temporarily_clear_interpreter_stack

        for arg in args:
            for one in arg if isinstance(arg, list) else (arg,):
                if isinstance(one, torch.Tensor) and wrapped(one):
                    raise refusal(name)
        with temporarily_clear_interpreter_stack():
            return op(*args)

    return call
