"""The reference as a backend: every op's plain-torch meaning, on any device."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any, ClassVar

import torch

from .backend import Backend
from .kernel import Kernel
from .op import Op


class ReferenceBackend(Backend):
    """Runs everywhere, slowly.  Made from the ops themselves."""

    name = "reference"
    device_types: ClassVar[frozenset[str]] = frozenset()
    priority = 0

    def __init__(self, ops: Mapping[str, Op]) -> None:
        self._ops = ops

    def claims(self, device_type: str) -> bool:
        return True

    def kernels(self) -> Iterable[Kernel]:
        for op in self._ops.values():
            yield Kernel(op.name, _without_autocast(op.reference))


def _without_autocast(reference: Callable[..., Any]) -> Callable[..., Any]:
    """A reference says in which dtype it computes; autocast must not change that inside it."""

    def call(*args: Any) -> Any:
        device = next(arg.device.type for arg in args if isinstance(arg, torch.Tensor))
        if not torch.amp.is_autocast_available(device) or not torch.is_autocast_enabled(device):
            return reference(*args)
        with torch.autocast(device, enabled=False):
            return reference(*args)

    return call
