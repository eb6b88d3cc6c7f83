"""Private layouts that a kernel makes from a tensor: a weak cache, droppable, never saved.

The canonical tensor stays as it is.  An entry lives as long as the tensor's storage, is rebuilt when the tensor
was written to since, and is dropped by `drop_derived`.  One mutable dictionary, guarded by a lock.
"""

from __future__ import annotations

import os
import threading
import weakref
from collections.abc import Callable, Hashable
from typing import Any

import torch

_lock = threading.RLock()
_cache: weakref.WeakKeyDictionary[torch.UntypedStorage, dict[Hashable, tuple[object, Any]]] = (
    weakref.WeakKeyDictionary()
)


def derived(tensor: torch.Tensor, key: Hashable, build: Callable[[], Any]) -> Any:
    """`build()`, remembered for this tensor and key.

    The value may hold tensors, never `tensor` itself (it would keep its own key alive).
    """
    stamp = _stamp(tensor)
    with _lock:
        entries = _cache.setdefault(tensor.untyped_storage(), {})
        place = (key, tensor.storage_offset(), tuple(tensor.shape), tensor.stride(), tensor.dtype)
        found = entries.get(place)
        if found is None or found[0] != stamp:
            with torch.inference_mode(False), torch.no_grad():  # also of use to a later backward
                found = entries[place] = (stamp, build())
        return found[1]


def drop_derived(target: torch.nn.Module | torch.Tensor) -> int:
    """Forget what was derived from a tensor, or from every parameter and buffer of a module; how many entries."""
    if isinstance(target, torch.nn.Module):
        return sum(drop_derived(tensor) for tensor in (*target.parameters(), *target.buffers()))
    with _lock:
        return len(_cache.pop(target.untyped_storage(), {}))


def derived_bytes(tensor: torch.Tensor) -> int:
    """Bytes that derived tensors of this one occupy."""
    with _lock:
        values = [value for _, value in _cache.get(tensor.untyped_storage(), {}).values()]
    return sum(value.nbytes for value in values if isinstance(value, torch.Tensor))


def _after_fork() -> None:
    global _lock
    _lock = threading.RLock()  # a thread that held it does not exist in the child


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)


def _stamp(tensor: torch.Tensor) -> object:
    # Inference tensors track no version: their storage's address must do.
    return (0 if tensor.is_inference() else tensor._version, tensor.data_ptr())
