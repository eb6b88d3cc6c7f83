"""The norm of all gradients of a step, and the factor that clips it."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable

import torch
from torch import Tensor


def clip_factor(grads: Iterable[Tensor | None], limit: float) -> Tensor:
    """min(1, limit / norm of all gradients together): float32, 0-dim, on the first gradient's device.

    Shards of DTensors are summed over their mesh.  A norm that is not finite gives NaN or 0, as
    torch.nn.utils.clip_grad_norm_ does.  No host synchronization where all gradients are on one device.
    """
    plain: dict[torch.device, list[Tensor]] = defaultdict(list)
    norms: list[Tensor] = []
    for grad in grads:
        if grad is None:
            continue
        if hasattr(grad, "full_tensor"):  # a DTensor
            norms.append(torch.linalg.vector_norm(grad, dtype=torch.float32).full_tensor())
        elif grad.numel():
            plain[grad.device].append(grad)
    for same_device in plain.values():
        norms += torch._foreach_norm(same_device, 2.0, torch.float32)
    if not norms:
        return torch.ones(())
    total = torch.linalg.vector_norm(torch.stack([norm.to(norms[0].device) for norm in norms]))
    return torch.clamp(limit / total, max=1.0)
