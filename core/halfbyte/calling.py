"""How an op is reached: the planned kernel where nothing observes the call, torch's op otherwise.

A leaf module: the ops' own gradients call other ops through it.  _runtime fills the tables.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

_PLAIN = (Tensor, torch.nn.Parameter)

AsBytes = torch._C.DisableTorchFunctionSubclass  # Params4bit intercepts torch functions; inside it is only bytes

planned: dict[str, Callable[..., Any]] = {}
bound: dict[str, Callable[..., Any]] = {}  # the same over a weight that serves many calls: see Dispatcher.binder


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
    return unobserved(x) and not wants_gradient(x, bias)


def wants_gradient(x: Tensor, bias: Tensor | None) -> bool:
    return torch.is_grad_enabled() and (x.requires_grad or (bias is not None and bias.requires_grad))


def call(name: str, observed: Callable[..., Any], x: Tensor, *rest: Any) -> Any:
    """Run an op on x and the rest of its arguments: the planned kernel, or torch's op where something observes."""
    return planned[name](x, *rest) if direct(x) else observed(x, *rest)
