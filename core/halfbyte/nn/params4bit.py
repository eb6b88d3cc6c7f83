"""Params4bit: a weight that quantizes itself to 4 bits on its first move to a device, and never changes after.

Its public state lives in `__dict__` under the constructor's argument names, because transformers and peft rebuild
parameters as `Params4bit(value, requires_grad=False, **old.__dict__)`.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from .. import functional
from ..errors import FormatError
from ..quant_state import QuantState
from .movable import MovableParameter

DEFAULT_BLOCKSIZE = 64


def _of_state(*path: str) -> property:
    """A read-only proxy of the quantization state: FSDP resolves checkpoint keys such as `weight.absmax` by getattr.

    A property and not `__getattr__`, which Dynamo does not trace on tensor subclasses.
    """

    def get(self: Params4bit) -> Any:
        value: Any = self.__dict__.get("quant_state")
        for name in path:
            if value is None:
                break
            value = getattr(value, name)
        if value is None:
            raise AttributeError(f"this Params4bit has no {'.'.join(path)}: it is not quantized, or not nested")
        return value

    return property(get)


class Params4bit(MovableParameter):
    """A parameter of packed 4-bit codes, or of floats until it is moved to a device (the CPU counts).

    data                 float32, float16, bfloat16 of any shape; or packed codes with a quant_state
    blocksize            elements that share one absmax; None means 64
    compress_statistics  quantize the absmax too
    quant_type           "nf4" or "fp4"
    quant_storage        dtype that the packed bytes are viewed as
    module               the layer that keeps a second reference to the state (FSDP drops the parameter's)
    bnb_quantized        whether data holds packed codes already
    kwargs               ignored, so that a foreign `__dict__` may be passed on
    """

    quant_state: QuantState | None
    blocksize: int
    compress_statistics: bool
    quant_type: str
    quant_storage: torch.dtype
    module: nn.Module | None
    bnb_quantized: bool

    def __new__(
        cls,
        data: Tensor | None = None,
        requires_grad: bool = False,
        quant_state: QuantState | None = None,
        blocksize: int | None = None,
        compress_statistics: bool = True,
        quant_type: str = "fp4",
        quant_storage: torch.dtype = torch.uint8,
        module: nn.Module | None = None,
        bnb_quantized: bool = False,
        **kwargs: Any,
    ) -> Params4bit:
        self: Params4bit = cls.over(data, requires_grad)
        self.quant_state = quant_state
        self.blocksize = DEFAULT_BLOCKSIZE if blocksize is None else blocksize
        self.compress_statistics = compress_statistics
        self.quant_type = quant_type
        self.quant_storage = quant_storage
        self.module = module
        self.bnb_quantized = bnb_quantized
        return self

    @classmethod
    def from_prequantized(
        cls,
        data: Tensor,
        quantized_stats: Mapping[str, Any],
        requires_grad: bool = False,
        device: torch.device | str | int | None = None,
        module: nn.Module | None = None,
        **kwargs: Any,
    ) -> Params4bit:
        """Packed codes and the statistics of a checkpoint.

        quantized_stats  keys as in the checkpoint; whatever stands before the last dot is ignored
        device           of the result; the data's when None
        module           the layer that the parameter is for, which gets the state, too

        Raises FormatError where the statistics are not a 4-bit state, or not of these data and this layer.
        """
        device = data.device if device is None else torch.device(device)
        state = QuantState.from_dict(quantized_stats, device=device)
        shape = torch.Size(state.shape or ())
        wanted: Any = getattr(module, "full_shape", None)
        expected = wanted() if wanted else shape
        if shape != expected:
            raise FormatError(f"shape must be {tuple(expected)}; got {tuple(shape)}")
        n_bytes = data.numel() * data.element_size()
        if n_bytes != (shape.numel() + 1) // 2:
            raise FormatError(f"{tuple(shape)} takes {(shape.numel() + 1) // 2} packed bytes; got {n_bytes}")
        if module is not None:
            module.quant_state = state  # type: ignore[assignment]
        return cls(
            data.to(device),
            requires_grad,
            state,
            state.blocksize,
            state.nested,
            state.quant_type or "",
            data.dtype,
            module,
            bnb_quantized=True,
        )

    @property
    def is_quantized_4bit(self) -> bool:
        """Whether the data are packed codes.

        Floats of the state's shape are a new weight, whatever the flag says: some peft tuners merge into a
        parameter built from the old one's `__dict__`.
        """
        if not self.bnb_quantized:
            return False
        state = self.quant_state
        return not (self.is_floating_point() and state is not None and self.shape == state.shape)

    absmax = _of_state("absmax")
    code = _of_state("code")
    quant_map = _of_state("code")
    offset = _of_state("offset")
    state2 = _of_state("state2")
    nested_absmax = _of_state("state2", "absmax")
    nested_blocksize = _of_state("state2", "blocksize")
    nested_quant_map = _of_state("state2", "code")
    nested_dtype = _of_state("state2", "dtype")
    nested_offset = _of_state("offset")

    # -- moving ----------------------------------------------------------------------------------------------

    def to(self, *args: Any, **kwargs: Any) -> Params4bit:
        """As Tensor.to; the first move to a real device quantizes, in place.  A dtype never touches codes."""
        device, dtype, non_blocking, _ = torch._C._nn._parse_to(*args, **kwargs)
        with torch._C.DisableTorchFunctionSubclass():
            plain = self.data
            if not self.is_quantized_4bit:
                if device is not None and device.type != "meta" and plain.is_floating_point() and not plain.is_meta:
                    return self._quantize(device)
                return self.rebuilt(Tensor.to(plain, device, dtype or plain.dtype, non_blocking))
            if device is None or device == plain.device:
                return self
            state = self.quant_state
            if state is not None and device.type != "meta":  # the state outlives a trip to meta
                state = state.moved(device, non_blocking)
            return self.rebuilt(Tensor.to(plain, device, non_blocking=non_blocking), state)

    # nn.Module.half() and its like cast every float parameter, and packed codes may be stored as floats.

    def float(self, memory_format: Any = None) -> Any:
        return self.to(torch.float32)

    def half(self, memory_format: Any = None) -> Any:
        return self.to(torch.float16)

    def bfloat16(self, memory_format: Any = None) -> Any:
        return self.to(torch.bfloat16)

    def double(self, memory_format: Any = None) -> Any:
        return self.to(torch.float64)

    def _quantize(self, device: torch.device) -> Params4bit:
        with torch.inference_mode(self.is_inference()):  # else inference_mode could not be left for training
            packed, self.quant_state = functional.quantize_4bit(
                self.data.to(device),
                format=self.quant_type,
                blocksize=self.blocksize,
                nested=bool(self.compress_statistics),
                storage=self.quant_storage,
            )
        self.data = packed
        self.bnb_quantized = True
        if self.module is not None:
            self.module.quant_state = self.quant_state  # type: ignore[assignment]
        return self

    def rebuilt(self, data: Tensor, state: QuantState | None = None) -> Params4bit:
        """The same parameter over other data; with its own state where none is given."""
        attributes = {**self.__dict__, "quant_state": state or self.quant_state}
        return type(self)(data, self.requires_grad, **attributes)

    # -- copies ----------------------------------------------------------------------------------------------

    def __deepcopy__(self, memo: dict[int, Any]) -> Params4bit:
        if id(self) in memo:
            return memo[id(self)]  # type: ignore[no-any-return]
        result = memo[id(self)] = self.rebuilt(self.data.clone())
        result.quant_state = copy.deepcopy(self.quant_state, memo)
        # In a deepcopy of the layer the copy of the layer is already in memo; alone, the copy belongs to none.
        result.module = memo.get(id(self.module))
        return result

    def __copy__(self) -> Params4bit:
        return self.rebuilt(self.data, self.quant_state)

    def __reduce_ex__(self, protocol: Any) -> Any:
        state = dict(self.__dict__)
        return _rebuild, (type(self), self.data, self.requires_grad), state

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Results are plain tensors, except chunks and splits: those stay parameters of their own elements."""
        with torch._C.DisableTorchFunctionSubclass():
            result = func(*args, **(kwargs or {}))
            if func in _CUTS and isinstance(args[0], Params4bit):
                return _cut(args[0], result)
            return result


_CUTS = (torch.chunk, torch.split, Tensor.chunk, Tensor.split)


def _cut(whole: Params4bit, parts: tuple[Tensor, ...]) -> tuple[Params4bit, ...]:
    """Each part with the statistics of its own elements; without any where it does not begin at a block."""
    begin, cut = 0, []
    quantized = whole.quant_state if whole.is_quantized_4bit else None
    for part in parts:
        elements = 2 * part.numel() * part.element_size()
        state = None if quantized is None else quantized.sliced(begin, begin + elements)
        piece = whole.rebuilt(part)
        piece.quant_state, piece.module = state, None
        cut.append(piece)
        begin += elements
    return tuple(cut)


def _rebuild(cls: type[Params4bit], data: Tensor, requires_grad: bool) -> Params4bit:
    return cls(data, requires_grad)
