"""How an op is reached: the planned kernel where nothing observes the call, torch's op otherwise.

A leaf module: the ops' own gradients call other ops through it.  _runtime fills the tables.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

_PLAIN = (Tensor, torch.nn.Parameter)

planned: dict[str, Callable[..., Any]] = {}
differentiated: dict[str, Callable[..., Any]] = {}  # the same with a gradient


def unobserved(x: Tensor) -> bool:
    """Whether a call on x may skip torch's dispatcher, though not autograd: no compile, trace, mode or transform."""
    return (
        type(x) in _PLAIN
        and not torch.compiler.is_compiling()
        and not torch._C._len_torch_dispatch_stack()
        and torch._C._functorch.peek_interpreter_stack() is None
        and torch._C._get_tracing_state() is None
        and not x.is_meta
    )


def direct(x: Tensor, bias: Tensor | None = None) -> bool:
    """Whether a call on x may skip autograd, too."""
    return unobserved(x) and not _wants_gradient(x, bias)


def _wants_gradient(x: Tensor, bias: Tensor | None) -> bool:
    return torch.is_grad_enabled() and (x.requires_grad or (bias is not None and bias.requires_grad))


def op(name: str, observed: Callable[..., Any], x: Tensor, bias: Tensor | None = None) -> Callable[..., Any]:
    """What runs an op on x.

    observed   torch's op
    x, bias    the tensors that may want a gradient
    """
    if not unobserved(x):
        return observed
    return differentiated[name] if _wants_gradient(x, bias) else planned[name]


def call(name: str, observed: Callable[..., Any], x: Tensor, *rest: Any, bias: Tensor | None = None) -> Any:
    """Run an op on x and the rest of its arguments."""
    return op(name, observed, x, bias)(x, *rest)
