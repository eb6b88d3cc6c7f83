"""The frozen layout: a plain parameter of bytes, and its statistics as buffers called `weight_<name>`.

Buffers are not persistent: checkpoints keep bitsandbytes' keys, which the layers write themselves.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .. import formats
from ..quant_state import QuantState

PREFIX = "weight_"


@dataclass(frozen=True)
class Frozen4bit:
    """What is not a tensor of a frozen 4-bit weight's state; offset is a number too, so that meta can be saved."""

    shape: torch.Size
    blocksize: int
    quant_type: str
    dtype: torch.dtype
    nested_dtype: torch.dtype | None
    offset: float | None

    @classmethod
    def of(cls, state: QuantState) -> Frozen4bit:
        if state.shape is None or state.blocksize is None or state.quant_type is None or state.dtype is None:
            raise TypeError(f"not the state of a 4-bit weight: {state!r}")
        nested_dtype = None if state.state2 is None else state.state2.dtype
        offset = None if state.offset is None else float(state.offset)
        return cls(state.shape, state.blocksize, state.quant_type, state.dtype, nested_dtype, offset)

    def state(self, module: Any) -> QuantState:
        """The state over the buffers as they are now, without the code table: the ops do not read it."""
        state = QuantState(module.weight_absmax, self.shape, None, self.blocksize, self.quant_type, self.dtype)
        if self.offset is not None:
            absmax, codebook = module.weight_nested_absmax, module.weight_nested_codebook
            state.state2 = QuantState(absmax, None, codebook, formats.NESTED_BLOCKSIZE, None, self.nested_dtype)
            state.offset = module.weight_offset
        return state

    def complete_state(self, module: Any) -> QuantState:
        """The state as checkpoints store it."""
        state = self.state(module)
        state.code = formats.levels(self.quant_type, state.absmax.device)
        if self.offset is not None:
            state.offset = torch.tensor(self.offset)
        return state


def statistics_4bit(state: QuantState) -> dict[str, Tensor]:
    """The tensors of a state by their name as buffers."""
    if state.state2 is None or state.state2.code is None or state.offset is None:
        return {"absmax": state.absmax}
    return {
        "absmax": state.absmax,
        "nested_absmax": state.state2.absmax,
        "nested_codebook": state.state2.code.clone(),  # shared by all weights until here
        "offset": state.offset,
    }


def freeze_weight(module: nn.Module, data: Tensor, statistics: dict[str, Tensor]) -> None:
    """Make `data` the plain weight of a module, and register its statistics."""
    module.weight = nn.Parameter(data, requires_grad=False)
    register_statistics(module, statistics)


def register_statistics(module: nn.Module, statistics: dict[str, Tensor]) -> None:
    for name in [name for name in module._buffers if name.startswith(PREFIX)]:  # of a weight that was replaced
        delattr(module, name)
    for name, tensor in statistics.items():
        module.register_buffer(f"{PREFIX}{name}", _whole(tensor), persistent=False)


def _whole(tensor: Tensor) -> Tensor:
    """The tensor with a storage of its own size: torch.export.save warns of slices."""
    return tensor if tensor.untyped_storage().nbytes() == tensor.nbytes else tensor.clone()


def frozen_statistics(module: nn.Module) -> Iterable[Tensor]:
    return [tensor for name, tensor in module._buffers.items() if name.startswith(PREFIX) and tensor is not None]


def is_sharded(weight: Tensor) -> bool:
    """Whether something (FSDP2's DTensor) stands in for the weight, which then can be written to but not replaced."""
    return type(weight).__torch_dispatch__ is not Tensor.__torch_dispatch__


def keeping_dtype(fn: Callable[[Tensor], Tensor], protected: Iterable[Tensor]) -> Callable[[Tensor], Tensor]:
    """`fn` of a module's `_apply`, by which protected tensors move but are not cast."""
    kept = list(protected)

    def apply(tensor: Tensor) -> Tensor:
        moved = fn(tensor)
        if moved.dtype != tensor.dtype and any(tensor is one for one in kept):
            return tensor.to(moved.device)
        return moved

    return apply
