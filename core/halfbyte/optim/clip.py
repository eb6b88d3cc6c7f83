"""The norm of all gradients of a step, and the factor that clips it."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor


def clip_factor(gradients: Iterable[tuple[Tensor, Tensor]], limit: float) -> Tensor:
    """min(1, limit / norm of all gradients together): float32, 0-dim.

    gradients  pairs of a parameter and its gradient; where the parameter is a DTensor, its local shard's

    Shards are summed over their mesh, with one collective for all parameters that are sharded alike.  A norm that
    is not finite gives NaN or 0, as torch.nn.utils.clip_grad_norm_ does.  No host synchronization where all
    gradients are on one device.
    """
    alike: dict[Any, list[Tensor]] = defaultdict(list)
    for param, grad in gradients:
        mesh = getattr(param, "device_mesh", None)
        alike[(grad.device, None, ()) if mesh is None else (grad.device, mesh, param.placements)].append(grad)  # type: ignore[attr-defined]
    squares = []
    for (_, mesh, placements), grads in alike.items():
        total = torch.stack(torch._foreach_norm(grads, 2.0, torch.float32)).square().sum()
        squares.append(total if mesh is None else _summed(total, mesh, placements))
    norm = torch.stack([square.to(squares[0].device) for square in squares]).sum().sqrt()
    return torch.clamp(limit / norm, max=1.0)


def _summed(local: Tensor, mesh: Any, placements: Any) -> Tensor:
    from torch.distributed.tensor import DTensor, Partial

    partial = [Partial() if placement.is_shard() else placement for placement in placements]
    whole: Tensor = DTensor.from_local(local, mesh, partial).full_tensor()
    return whole
