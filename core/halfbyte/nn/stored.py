"""How quantized layers move, save and load: shared by linear layers and embeddings.

A checkpoint spells a 4-bit weight as `weight` plus statistics under `weight.`, an int8 weight as `weight`, `SCB`
and `weight_format`; see docs/pages/formats.md.

A layer holds its weight in one of two layouts.  Live: a Params4bit or Int8Params that carries its statistics, as
bitsandbytes' users expect.  Frozen (`freeze_`): a plain parameter of bytes, and the statistics as buffers
`weight_<name>`, which torch.export, meta tensors and functional calls handle as they do any module's.  Both save
and load the same checkpoints.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from .. import formats, functional
from ..derived import drop_derived
from ..errors import FormatError, InputError
from ..kernel import show
from ..quant_state import QuantState
from .frozen import (
    Frozen4bit,
    freeze_weight,
    frozen_statistics,
    is_sharded,
    keeping_dtype,
    register_statistics,
    statistics_4bit,
)
from .params4bit import Params4bit
from .params8bit import Int8Params


def check_options_4bit(shape: torch.Size, quant_type: str, storage: torch.dtype) -> None:
    """Raise InputError where no weight of that shape can be quantized so: before there is one."""
    if quant_type not in formats.FORMATS:
        raise InputError(f"quant_type must be one of {', '.join(formats.FORMATS)}; got {quant_type!r}")
    functional.check_storage((shape.numel() + 1) // 2, storage)


def weight_and_bias(module: Any) -> tuple[Tensor, Tensor | None]:
    """Of a linear layer, as its attributes; the way there is a third of the time of a call."""
    parameters = module._parameters
    try:
        return parameters["weight"], parameters["bias"]
    except KeyError:  # parametrized, or plain tensors for a while (FSDP)
        return module.weight, module.bias


class Stored4bit(nn.Module):
    """A module with a 4-bit weight called `weight`."""

    weight: Tensor
    quant_state: QuantState | None
    frozen: Frozen4bit | None = None
    float_requires_grad: bool = True  # of the weight that dequantize_ brings back

    def current_state(self) -> QuantState | None:
        """The weight's state; of a plain weight, the buffers' (frozen) or the module's copy (replaced by FSDP)."""
        state: QuantState | None = getattr(self.weight, "quant_state", None)
        if state is not None:
            return state
        return self.quant_state if self.frozen is None else self.frozen.state(self)

    def require_quantized(self) -> None:
        """Raise InputError unless the weight is quantized."""
        self.required_state()

    def required_state(self) -> QuantState:
        state = self.current_state()
        if state is None:
            raise InputError(
                f"this {type(self).__name__} is not quantized yet: move it with .to(device), the CPU counts"
            )
        return state

    def freeze_weight_(self) -> None:
        """Change to the frozen layout.  A float quant_storage ends here: it was for FSDP, which now shards bytes."""
        if self.frozen is not None and not isinstance(self.weight, Params4bit):
            return
        state = self.required_state()
        freeze_weight(self, functional.as_bytes(self.weight.data).reshape(-1, 1), statistics_4bit(state))
        self.frozen, self.quant_state = Frozen4bit.of(state), None

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        if not isinstance(self.weight, Params4bit):
            kept = (self.weight, *frozen_statistics(self))
            super()._apply(keeping_dtype(fn, kept), recurse)  # type: ignore[no-untyped-call]
            if self.quant_state is not None and not self.weight.is_meta:
                self.quant_state = self.quant_state.moved(self.weight.device)
            return self
        with _set_aside(self) as weight:
            super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        self.weight = moved = _applied(weight, fn)
        self.quant_state = moved.quant_state or self.quant_state
        return self

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        live = isinstance(self.weight, Params4bit) or self.frozen is None
        state = self.current_state() if live else self.frozen.complete_state(self)  # type: ignore[union-attr]
        if state is not None:
            for key, tensor in state.as_dict(packed=True).items():
                destination[f"{prefix}weight.{key}"] = tensor if keep_vars else tensor.detach()

    def _load_from_state_dict(
        self,
        state_dict: Any,
        prefix: str,
        local_metadata: Any,
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        name = f"{prefix}weight"
        statistics = {key: value for key, value in state_dict.items() if key.startswith(f"{name}.")}
        taken = set()
        if name in state_dict and (statistics or self._is_quantized()):
            taken = {name, *statistics}
            try:
                if not statistics:
                    raise FormatError(_alone("packed codes with statistics (weight.absmax, ...)", state_dict[name]))
                if is_sharded(self.weight):
                    self._take_statistics(QuantState.from_dict(statistics, device=self.weight.device))
                    taken.remove(name)  # its codes are loaded in place
                else:
                    self._take(state_dict[name], statistics)
            except FormatError as error:
                error_msgs.append(f"{name}: {error}")
            state_dict = {key: value for key, value in state_dict.items() if key not in taken}
        rest = (prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs)
        super()._load_from_state_dict(state_dict, *rest)
        if name in taken and name in missing_keys:
            missing_keys.remove(name)

    def _is_quantized(self) -> bool:
        weight = self.weight
        return weight.is_quantized_4bit if isinstance(weight, Params4bit) else self.current_state() is not None

    def _take(self, packed: Tensor, statistics: dict[str, Tensor]) -> None:
        """Replace the weight by one from a checkpoint, on the device where the weight is."""
        device = packed.device if self.weight.is_meta else self.weight.device
        weight = Params4bit.from_prequantized(packed, statistics, device=device)
        state = weight.quant_state
        expected = self.full_shape()
        if state is None or state.shape != expected:
            raise FormatError(f"shape must be {tuple(expected)}; got {tuple(state.shape or ()) if state else None}")
        frozen = self.frozen is not None and not isinstance(self.weight, Params4bit)
        weight.module = self
        self.weight = weight
        self.quant_state = state
        if frozen:
            self.freeze_weight_()

    def _take_statistics(self, state: QuantState) -> None:
        """Replace the statistics of a weight that is loaded in place."""
        if state.shape != self.full_shape():
            raise FormatError(f"shape must be {tuple(self.full_shape())}; got {tuple(state.shape or ())}")
        if self.frozen is None:
            self.quant_state = state
        else:
            self.frozen = Frozen4bit.of(state)
            register_statistics(self, statistics_4bit(state))

    def _fqn_modifiers(self) -> dict[str, str]:
        """Read by torch.distributed.checkpoint, which resolves keys such as `weight.absmax` by getattr.

        A plain or sharded weight has no such attributes: the names are found in the namespace instead.
        """
        return {} if isinstance(self.weight, Params4bit) else {"weight": "_checkpoint_names"}

    @property
    def _checkpoint_names(self) -> SimpleNamespace:
        state = self.current_state() if self.frozen is None else self.frozen.complete_state(self)
        tensors = {} if state is None else state.as_dict(packed=True)
        return SimpleNamespace(weight=SimpleNamespace(**{**tensors, "quant_state": state}))

    def full_shape(self) -> torch.Size:
        """Shape of the dequantized weight."""
        raise TypeError(f"{type(self).__name__} must say its weight's shape")


class StoredInt8(nn.Module):
    """A module with an int8 weight called `weight`."""

    weight: Tensor
    float_requires_grad: bool = True  # of the weight that dequantize_ brings back
    _absmax: Tensor | None = None  # the weight's statistics again, for when FSDP replaces the parameter

    def require_quantized(self) -> None:
        """Raise InputError unless the weight is quantized, or is one that stays a float."""
        self.required_absmax()

    def stays_float(self) -> bool:
        """Whether the weight is never stored as int8."""
        return False

    def current_absmax(self) -> Tensor | None:
        """The weight's row statistics; of a plain weight, the buffer's (frozen) or the module's copy (FSDP)."""
        weight = self.weight
        if weight.dtype is not torch.int8:
            return None
        absmax: Tensor | None = getattr(weight, "SCB", None)
        if absmax is None:
            absmax = getattr(self, "weight_absmax", None)
        return self._absmax if absmax is None else absmax

    def required_absmax(self) -> Tensor:
        absmax = self.current_absmax()
        if absmax is None:
            raise InputError(
                f"this {type(self).__name__} is not quantized yet: move it with .to(device), the CPU counts"
            )
        return absmax

    @property
    def SCB(self) -> Tensor | None:
        """The row statistics under the checkpoint's name: torch.distributed.checkpoint resolves keys by getattr."""
        return self.current_absmax()

    @property
    def weight_format(self) -> Tensor:
        """0: plain rows, the only layout that is ever saved."""
        return torch.tensor(0, dtype=torch.uint8)

    def freeze_weight_(self) -> None:
        """Change to the frozen layout; a weight that stays a float becomes a plain parameter and trains on."""
        if not isinstance(self.weight, Int8Params):
            return
        self.require_quantized()
        if self.weight.is_floating_point():
            self.weight = nn.Parameter(self.weight.data, self.weight.requires_grad)
        else:
            freeze_weight(self, self.weight.data, {"absmax": self.required_absmax()})
        self._absmax = None

    def register_parameter(self, name: str, param: nn.Parameter | None) -> None:
        super().register_parameter(name, param)
        if name == "weight" and isinstance(param, Int8Params):
            self._absmax = param.SCB

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        if not isinstance(self.weight, Int8Params):
            kept = frozen_statistics(self)
            super()._apply(keeping_dtype(fn, kept), recurse)  # type: ignore[no-untyped-call]
            if self._absmax is not None and not self.weight.is_meta:
                self._absmax = self._absmax.to(self.weight.device)
            return self
        with _set_aside(self) as weight:
            super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        self.weight = _applied(weight, fn)
        return self

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        absmax = self.current_absmax()
        if absmax is not None:
            destination[f"{prefix}SCB"] = absmax if keep_vars else absmax.detach()
            destination[f"{prefix}weight_format"] = self.weight_format

    def _load_from_state_dict(
        self,
        state_dict: Any,
        prefix: str,
        local_metadata: Any,
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        weight, absmax, layout = (f"{prefix}{name}" for name in ("weight", "SCB", "weight_format"))
        taken = set()
        if weight in state_dict and (
            absmax in state_dict or torch.int8 in (self.weight.dtype, state_dict[weight].dtype)
        ):
            taken = {weight, absmax, layout}
            try:
                if absmax not in state_dict:
                    raise FormatError(_alone("int8 rows with SCB", state_dict[weight]))
                self._take(state_dict[weight], state_dict[absmax], state_dict.get(layout, "row"))
                if is_sharded(self.weight):
                    taken.remove(weight)  # its rows are loaded in place
            except FormatError as error:
                error_msgs.append(f"{weight}: {error}")
            state_dict = {key: value for key, value in state_dict.items() if key not in taken}
        rest = (prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs)
        super()._load_from_state_dict(state_dict, *rest)
        if weight in taken and weight in missing_keys:
            missing_keys.remove(weight)

    def _take(self, rows: Tensor, absmax: Tensor, layout: Tensor | str | int) -> None:
        """Replace the weight by one from a checkpoint, on the device where the weight is."""
        check_layout(layout)
        if self.stays_float():
            raise FormatError("a layer with has_fp16_weights=True takes floats; got int8 rows")
        if rows.dtype != torch.int8 or rows.shape != self.weight.shape:
            expected = tuple(self.weight.shape)
            raise FormatError(f"weight must be int8 {expected}; got {rows.dtype} {tuple(rows.shape)}")
        if absmax.dtype != torch.float32 or absmax.shape != rows.shape[:1]:
            raise FormatError(f"SCB must be float32 ({rows.shape[0]},); got {absmax.dtype} {tuple(absmax.shape)}")
        device = rows.device if self.weight.is_meta else self.weight.device
        if is_sharded(self.weight):  # its rows are loaded in place
            if self._absmax is None:
                register_statistics(self, {"absmax": absmax.to(device, copy=True)})
            else:
                self._absmax = absmax.to(device, copy=True)
            return
        rows = rows.to(device, copy=True)
        frozen = getattr(self, "weight_absmax", None) is not None and not isinstance(self.weight, Int8Params)
        self.weight = Int8Params(rows, requires_grad=False, CB=rows, SCB=absmax.to(device, copy=True))
        if frozen:
            self.freeze_weight_()


def _alone(wanted: str, found: Tensor) -> str:
    return f"a quantized layer takes {wanted}; got {show(found.dtype)} {tuple(found.shape)} alone"


@contextlib.contextmanager
def _set_aside(module: nn.Module) -> Iterator[Any]:
    """Hide the weight from nn.Module._apply, which would lose its class and statistics on the way to meta."""
    weight = module._parameters["weight"]
    module._parameters["weight"] = None
    try:
        yield weight
    finally:
        module._parameters["weight"] = weight


def check_layout(layout: Tensor | str | int) -> None:
    """Raise FormatError for a `weight_format` that is not rows."""
    layout = layout.item() if isinstance(layout, Tensor) else layout  # type: ignore[assignment]
    if layout not in (0, "row"):
        raise FormatError(f"weight_format must be 0 or 'row'; got {layout!r}")


def _applied(weight: Any, fn: Callable[[Tensor], Tensor]) -> Any:
    """The weight after fn, with its statistics; the same parameter object where torch can keep it."""
    drop_derived(weight)
    with torch.no_grad(), torch.inference_mode(weight.is_inference()):
        moved = fn(weight)
        if not isinstance(moved, type(weight)):  # such as empty_like: plain data
            moved = weight.rebuilt(moved)
        if moved is weight:
            return weight
        grad = None if weight.grad is None else fn(weight.grad)
        if not torch._has_compatible_shallow_copy_type(weight, moved):
            moved.grad = grad
            return moved
        weight.data = moved.data
        weight.__dict__.update(moved.__dict__)
        weight.grad = grad
        return weight
