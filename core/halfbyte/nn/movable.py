"""What both quantized parameters share: every way to move it goes through `to`."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ..errors import InputError


class MovableParameter(nn.Parameter):
    """A parameter whose subclass decides in `to` what a move means."""

    @classmethod
    def over(cls, data: Tensor | None, requires_grad: bool) -> Any:
        """A parameter over plain data.  Raises InputError for a tensor that is simulated, such as a FakeTensor."""
        data = torch.empty(0) if data is None else data
        if type(data).__torch_dispatch__ is not Tensor.__torch_dispatch__:
            raise InputError(
                f"{cls.__name__} cannot hold a {type(data).__name__}: build the layer on the device 'meta', "
                "or a real one that freeze_ makes plain"
            )
        return Tensor._make_subclass(cls, data, requires_grad)

    def to(self, *args: Any, **kwargs: Any) -> Any:
        raise TypeError(f"{type(self).__name__} must define to()")

    def cpu(self, memory_format: Any = None) -> Any:
        return self.to(device="cpu")

    def cuda(self, device: Any = None, non_blocking: bool = False, memory_format: Any = None) -> Any:
        return self.to(device=_indexed("cuda", device), non_blocking=non_blocking)

    def xpu(self, device: Any = None, non_blocking: bool = False, memory_format: Any = None) -> Any:
        return self.to(device=_indexed("xpu", device), non_blocking=non_blocking)

    def rebuilt(self, data: Tensor) -> Any:
        """The same parameter, with its statistics, over other data."""
        raise TypeError(f"{type(self).__name__} must define rebuilt()")

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Results are plain tensors.  (Overridden also so that torch's fused fast paths see a special weight.)"""
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **(kwargs or {}))


def _indexed(type_: str, device: Any) -> Any:
    if device is None:
        return type_
    return torch.device(type_, device) if isinstance(device, int) else device
