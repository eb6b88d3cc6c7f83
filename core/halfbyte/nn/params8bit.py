"""Int8Params: a weight that quantizes itself row-wise to int8 on its first move to a device.

Its public state lives in `__dict__` under the constructor's argument names; see params4bit.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor

from .. import functional
from ..errors import FormatError
from .movable import MovableParameter


class Int8Params(MovableParameter):
    """A parameter of int8 rows, or of floats until it is moved to a device (the CPU counts).

    data              float32, float16, bfloat16 (N, K); or int8 with SCB
    has_fp16_weights  stay as floats, and be quantized in each forward
    CB                the int8 data, as bitsandbytes' users read it
    SCB               float32 (N,), the absolute maximum of each row
    kwargs            ignored, so that a foreign `__dict__` may be passed on

    Raises FormatError where SCB is not that of int8 data.
    """

    has_fp16_weights: bool
    CB: Tensor | None
    SCB: Tensor | None

    def __new__(
        cls,
        data: Tensor | None = None,
        requires_grad: bool = True,
        has_fp16_weights: bool = False,
        CB: Tensor | None = None,
        SCB: Tensor | None = None,
        **kwargs: Any,
    ) -> Int8Params:
        if data is not None and data.dtype == torch.int8 and data.ndim == 2:
            _check_absmax(data, SCB)
        self: Int8Params = cls.over(data, requires_grad and (data is None or data.is_floating_point()))
        self.has_fp16_weights = has_fp16_weights
        self.CB = CB
        self.SCB = SCB
        return self

    def to(self, *args: Any, **kwargs: Any) -> Int8Params:
        """As Tensor.to; the first move to a real device quantizes, in place.  A dtype never touches int8 rows."""
        if args == (0,) and not torch.accelerator.is_available():
            args = ("cpu",)  # accelerate 1.15 quantizes a weight for the CPU by .to(0).to("cpu") on every machine
        device, dtype, non_blocking, _ = torch._C._nn._parse_to(*args, **kwargs)
        with torch._C.DisableTorchFunctionSubclass():
            plain = self.data
            if plain.is_floating_point():
                if device is not None and device.type != "meta" and not plain.is_meta and not self.has_fp16_weights:
                    return self._quantize(device)
                return self.rebuilt(Tensor.to(plain, device, dtype or plain.dtype, non_blocking))
            if device is None or device == plain.device:
                return self
            scb = self.SCB
            if scb is not None and device.type != "meta" and not scb.is_meta:  # it outlives a trip to meta
                scb = scb.to(device, non_blocking=non_blocking)
            return self.rebuilt(Tensor.to(plain, device, non_blocking=non_blocking), scb)

    def _quantize(self, device: torch.device) -> Int8Params:
        self.requires_grad_(False)
        with torch.inference_mode(self.is_inference()):  # else inference_mode could not be left for training
            self.data, self.SCB = quantize_rows_as_fp16(self.data.to(device))
        self.CB = self.data
        return self

    def rebuilt(self, data: Tensor, scb: Tensor | None = None) -> Int8Params:
        """The same parameter over other data; with its own statistics where none are given."""
        cb = None if data.is_floating_point() else data
        attributes = {**self.__dict__, "CB": cb, "SCB": self.SCB if scb is None else scb}
        return type(self)(data, self.requires_grad, **attributes)

    def __deepcopy__(self, memo: dict[int, Any]) -> Int8Params:
        if id(self) not in memo:
            memo[id(self)] = self.rebuilt(self.data.clone(), copy.deepcopy(self.SCB, memo))
        return memo[id(self)]  # type: ignore[no-any-return]

    def __reduce_ex__(self, protocol: Any) -> Any:
        return _rebuild, (type(self), self.data, self.requires_grad, self.has_fp16_weights, self.SCB)


def quantize_rows_as_fp16(weight: Tensor) -> tuple[Tensor, Tensor]:
    """int8 rows and their absmax, through float16 as bitsandbytes does, so that checkpoints agree.

    A weight that float16 cannot hold is quantized as it is.
    """
    plain = weight.detach().contiguous()
    q, absmax, _ = functional.quantize_int8_rows(plain.half() if fits_float16(plain) else plain)
    return q, absmax


def fits_float16(weight: Tensor) -> bool:
    """Whether float16 holds every finite value, rounded."""
    return weight.dtype == torch.float16 or not bool((weight.half().isinf() & weight.isfinite()).any())


def _check_absmax(rows: Tensor, absmax: Tensor | None) -> None:
    if absmax is not None and (absmax.dtype != torch.float32 or absmax.shape != rows.shape[:1]):
        raise FormatError(f"SCB must be float32 ({rows.shape[0]},); got {absmax.dtype} {tuple(absmax.shape)}")


def _rebuild(
    cls: type[Int8Params], data: Tensor, requires_grad: bool, has_fp16_weights: bool, scb: Tensor | None
) -> Int8Params:
    cb = None if data.is_floating_point() else data
    return cls(data, requires_grad, has_fp16_weights, cb, scb)
