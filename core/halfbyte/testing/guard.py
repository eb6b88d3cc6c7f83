"""Guard words: tensors inside larger storages, so that a read or write past an end shows.

Inputs are placed by `place`.  Results are the kernel's own: while an `Arena` is active, what it allocates through
torch (empty, new_empty, empty_like, zeros, ... from Python or C++) lies between guard words too.  Memory that a
kernel gets elsewhere cannot be watched.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

GUARD = 512  # bytes on each side: keeps the alignment that CUDA's allocator gives

_aten = torch.ops.aten
_SIZED = {_aten.empty.memory_format, _aten.new_empty.default, _aten.zeros.default, _aten.new_zeros.default}
_LIKE = {_aten.empty_like.default, _aten.zeros_like.default}
_ZEROED = {_aten.zeros.default, _aten.new_zeros.default, _aten.zeros_like.default}


class Arena(TorchDispatchMode):
    """Allocates with guard words, and remembers them.

    fill   the byte that guards, and memory that is not initialised, hold
    """

    def __init__(self, fill: int) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.fill = fill
        self._outer: list[tuple[Tensor, int]] = []  # whole storage, bytes of the tensor

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in _SIZED:
            like = args[0] if isinstance(args[0], Tensor) else None
            size = args[0] if like is None else args[1]
        elif func in _LIKE:
            like, size = args[0], args[0].shape
            if not like.is_contiguous():
                return func(*args, **kwargs)
        else:
            return func(*args, **kwargs)
        if kwargs.get("memory_format") not in (None, torch.contiguous_format, torch.preserve_format):
            return func(*args, **kwargs)
        dtype = kwargs.get("dtype") or (like.dtype if like is not None else torch.get_default_dtype())
        device = kwargs.get("device") or (like.device if like is not None else torch.device("cpu"))
        if torch.device(device).type == "meta":
            return func(*args, **kwargs)
        made = self._allocate(size, dtype, torch.device(device))
        return made.zero_() if func in _ZEROED else made

    def _allocate(self, size: Sequence[int], dtype: torch.dtype, device: torch.device) -> Tensor:
        n_bytes = math.prod(size) * dtype.itemsize
        outer = torch.full((2 * GUARD + -(-n_bytes // 16) * 16,), self.fill, dtype=torch.uint8, device=device)
        self._outer.append((outer, n_bytes))
        return outer[GUARD : GUARD + n_bytes].view(dtype).view(tuple(size))

    def overwritten(self) -> str:
        """Where guard words changed, in a sentence; empty where none did."""
        for outer, n_bytes in self._outer:
            before, after = outer[:GUARD], outer[GUARD + n_bytes :]
            if int((before != self.fill).sum()):
                return f"writes before the start of a result of {n_bytes} bytes"
            if int((after != self.fill).sum()):
                last = int((after != self.fill).nonzero()[-1])
                return f"writes {last + 1} bytes past the end of a result of {n_bytes} bytes"
        return ""

    def watches(self, tensor: Tensor) -> bool:
        """Whether the tensor lies between this arena's guards."""
        return any(
            tensor.untyped_storage().data_ptr() == outer.untyped_storage().data_ptr() for outer, _ in self._outer
        )


class Placed:
    """Arguments whose tensors lie between guard words.

    outer  the whole storages; a kernel may change none of them, except where its op writes to an argument
    """

    def __init__(self, args: Sequence[Any], fill: int) -> None:
        self.outer: list[Tensor] = []
        self._sizes: list[int] = []
        self.args: tuple[Any, ...] = tuple(pytree.tree_map_only(Tensor, lambda one: self._place(one, fill), list(args)))
        self._before = [outer.clone() for outer in self.outer]

    def _place(self, tensor: Tensor, fill: int) -> Tensor:
        n_bytes = tensor.numel() * tensor.element_size()
        outer = torch.full((2 * GUARD + -(-n_bytes // 16) * 16,), fill, dtype=torch.uint8, device=tensor.device)
        inner = outer[GUARD : GUARD + n_bytes].view(tensor.dtype).view(tensor.shape)
        inner.copy_(tensor)
        self.outer.append(outer)
        self._sizes.append(n_bytes)
        return inner

    def overwritten(self) -> list[int]:
        """Positions (among the tensors) whose guard words are not as they were."""
        found = []
        for i, (now, then, size) in enumerate(zip(self.outer, self._before, self._sizes)):
            head, tail = slice(GUARD), slice(GUARD + size, None)
            if not (torch.equal(now[head], then[head]) and torch.equal(now[tail], then[tail])):
                found.append(i)
        return found

    def changed(self) -> list[int]:
        """Positions (among the tensors) whose storage is not as it was, guard words included."""
        return [i for i, (now, then) in enumerate(zip(self.outer, self._before)) if not torch.equal(now, then)]


# -- layouts -------------------------------------------------------------------------------------------------


def strided(tensor: Tensor) -> Tensor:
    """The same values, every other element of a storage; not contiguous where there are two or more."""
    wide = torch.full((*tensor.shape, 2), 77, device=tensor.device).to(tensor.dtype)
    wide[..., 0] = tensor
    return wide[..., 0]


def transposed(tensor: Tensor) -> Tensor:
    """The same values with the dimensions' strides reversed."""
    backwards = tuple(reversed(range(tensor.ndim)))
    return tensor.permute(backwards).contiguous().permute(backwards)


def offset(tensor: Tensor) -> Tensor:
    """The same values, contiguous, three elements into a storage: not aligned either."""
    longer = torch.full((tensor.numel() + 3,), 77, device=tensor.device).to(tensor.dtype)
    longer[3:] = tensor.reshape(-1)
    return longer[3:].view(tensor.shape)
