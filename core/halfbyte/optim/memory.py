"""How tensors lie in memory: the update ops read parameters, gradients and states as flat runs in one order.

The order of a parameter is given as its strides where it is dense without being contiguous (channels_last,
transposed), and as None for row-major order: contiguous parameters, and those with gaps, which are updated through
a contiguous copy.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

PLAIN = (Tensor, torch.nn.Parameter)
Order = tuple[int, ...] | None


def local(tensor: Tensor) -> Tensor:
    """The shard of a DTensor that this process holds; any other tensor as it is."""
    if type(tensor) in PLAIN or not hasattr(tensor, "to_local"):
        return tensor
    shard: Any = tensor.to_local()
    return shard.wait() if hasattr(shard, "wait") else shard  # type: ignore[no-any-return]  # a pending collective


def local_gradient(param: Tensor) -> Tensor:
    """The gradient of what `local` gives of a parameter."""
    grad: Any = param.grad
    if (
        type(grad) is not Tensor
        and hasattr(grad, "placements")
        and grad.placements != getattr(param, "placements", None)
    ):
        grad = grad.redistribute(placements=param.placements)  # type: ignore[attr-defined]  # a DTensor's
    return local(grad)


def order_of(tensor: Tensor) -> Order:
    """The order in which a tensor's elements lie."""
    if tensor.is_contiguous():
        return None
    dense = torch.empty_like(tensor, device="meta").stride() == tensor.stride()  # keeps the strides of dense tensors
    return tensor.stride() if dense else None


def zeros(like: Tensor, order: Order, dtype: torch.dtype, count: int, device: torch.device) -> Tensor:
    """Zeros of a parameter's shape, (2, *shape) for a count of 2, in the parameter's order."""
    shape, strides = _layout(like.shape, order, count)
    if strides is None:
        return torch.zeros(shape, dtype=dtype, device=device)
    return torch.zeros(count * like.numel(), dtype=dtype, device=device).as_strided(shape, strides)


def lies_in(tensor: Tensor, order: Order, count: int = 1) -> bool:
    """Whether a tensor of a parameter's shape (or of (count, *shape)) lies in an order."""
    if order is None:
        return tensor.is_contiguous()
    return tensor.stride() == _layout(tensor.shape[-len(order) :], order, count)[1]


def ordered(tensor: Tensor, order: Order, count: int = 1) -> Tensor:
    """The same values in an order, copied only where they lie in another."""
    if lies_in(tensor, order, count):
        return tensor
    if order is None:
        return tensor.contiguous()
    shape, strides = _layout(tensor.shape[-len(order) :], order, count)
    assert strides is not None
    return torch.empty_strided(shape, strides, dtype=tensor.dtype, device=tensor.device).copy_(tensor)


def flat(tensor: Tensor, order: Order) -> Tensor:
    """What lies in an order as the op takes it: contiguous, sharing memory."""
    return tensor if order is None else tensor.as_strided((tensor.numel(),), (1,))


def _layout(shape: torch.Size, order: Order, count: int) -> tuple[tuple[int, ...], Order]:
    if count == 1:
        return shape, order
    return (count, *shape), None if order is None else (shape.numel(), *order)
