"""Counting steps: each state has an int, or with `capturable` a tensor on the device, which is never read back.

One op call serves parameters that have taken the same number of steps.  Tensors cannot be compared without waiting
for the device; instead parameters that always step together share one tensor, and those that step without the
others get a copy of their own.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

Steps = int | Tensor


class Zeros:
    """Counts for parameters that step for the first time, one tensor per device."""

    def __init__(self, capturable: bool) -> None:
        self.capturable = capturable
        self._tensors: dict[torch.device, Tensor] = {}

    def on(self, device: torch.device) -> Steps:
        """Zero steps."""
        if not self.capturable:
            return 0
        if device not in self._tensors:
            self._tensors[device] = torch.zeros((), dtype=torch.float32, device=device)
        return self._tensors[device]


def converted(steps: Any, capturable: bool, device: torch.device) -> Steps:
    """A stored count, as this optimizer keeps it."""
    if not capturable:
        return int(steps)
    return torch.tensor(float(steps), dtype=torch.float32, device=device)


def share(states: Iterable[dict[str, Any]]) -> None:
    """Let states with equal tensors on one device share them.  Reads them back: for loading, not for steps."""
    known: dict[tuple[torch.device, float], Tensor] = {}
    for state in states:
        if isinstance(steps := state.get("step"), Tensor):
            state["step"] = known.setdefault((steps.device, float(steps)), steps)


def separate(stepping: Sequence[dict[str, Any]], every: Iterable[Any]) -> None:
    """Give states that step now copies of the tensors that they share with states that do not."""
    sharing = Counter(id(state.get("step")) for state in every if isinstance(state, dict))
    taking = Counter(id(state["step"]) for state in stepping)
    own: dict[int, Tensor] = {}
    for state in stepping:
        steps = state["step"]
        if taking[id(steps)] < sharing[id(steps)]:
            state["step"] = own.setdefault(id(steps), steps.clone())


def identity(steps: Steps) -> int:
    """Equal for states that one call can serve."""
    return id(steps) if isinstance(steps, Tensor) else steps


def following(steps: Steps) -> Tensor:
    """The number of the step to take, as the op wants it."""
    return steps + 1 if isinstance(steps, Tensor) else torch.scalar_tensor(steps + 1.0, dtype=torch.float64)
