"""Any parameter of any module in 4 bits: dequantized where it is read, by torch's parametrization.

A checkpoint spells it like a layer's weight: the packed codes under the parameter's name, the statistics below it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
import torch.nn.utils.parametrize as P
from torch import Tensor, nn

from .. import functional
from ..errors import FormatError
from ..quant_state import QuantState
from .params4bit import DEFAULT_BLOCKSIZE


class MissingParameter(AttributeError):
    """A module has no parameter of that name."""


class Bnb4bitParametrization(nn.Module):
    """Packed codes -> the tensor that they stand for.  The state moves with the module and keeps its dtypes."""

    def __init__(self, quant_state: QuantState) -> None:
        super().__init__()
        self.quant_state = quant_state

    @torch.no_grad()
    def forward(self, quantized_param: Tensor) -> Tensor:
        return functional.dequantize_4bit(quantized_param, self.quant_state)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        device = fn(self.quant_state.absmax).device
        if device.type != "meta":  # the state outlives a trip to meta
            self.quant_state = self.quant_state.moved(device)
        return super()._apply(fn, recurse)  # type: ignore[no-untyped-call]


def replace_parameter_4bit(
    module: nn.Module,
    param_name: str,
    compress_statistics: bool = False,
    quant_type: str = "nf4",
    blocksize: int | None = None,
) -> None:
    """Quantize a parameter, of any shape, in place.

    Raises AttributeError where the module has no such attribute, TypeError where it is not a parameter.
    """
    parameter = _parameter(module, param_name)
    packed, state = functional.quantize_4bit(
        parameter.data,
        format=quant_type,
        blocksize=DEFAULT_BLOCKSIZE if blocksize is None else blocksize,
        nested=compress_statistics,
    )
    _parametrize(module, param_name, packed, state)


def replace_parameter_4bit_prequantized(
    module: nn.Module, param_name: str, qs_dict: Mapping[str, Any], device: torch.device | str
) -> None:
    """Take a parameter that holds packed codes for what they stand for, by the statistics of a checkpoint."""
    parameter = _parameter(module, param_name)
    state = QuantState.from_dict(qs_dict, device=device)
    _parametrize(module, param_name, parameter.data.to(device), state)


def _parameter(module: nn.Module, name: str) -> nn.Parameter:
    if not hasattr(module, name):
        raise MissingParameter(f"Module does not have parameter '{name}'")
    parameter = getattr(module, name)
    if not isinstance(parameter, nn.Parameter):
        raise TypeError(f"Parameter '{name}' is not an instance of nn.Parameter")
    return parameter


def _parametrize(module: nn.Module, name: str, packed: Tensor, state: QuantState) -> None:
    setattr(module, name, nn.Parameter(packed, requires_grad=False))
    P.register_parametrization(module, name, Bnb4bitParametrization(state), unsafe=True)
    register_hooks(module, name)


def register_hooks(module: nn.Module, name: str) -> None:
    """Let a module dequantize a parameter once in each forward, and save and load it as a quantized one."""
    module.register_forward_pre_hook(enter_cache)
    module.register_forward_hook(leave_cache, always_call=True)  # forward may raise
    module.register_state_dict_post_hook(partial(_save, name=name))
    module.register_load_state_dict_pre_hook(partial(_load, name=name))


def enter_cache(module: nn.Module, inputs: Any) -> None:
    P._cache_enabled += 1  # what P.cached() does


def leave_cache(module: nn.Module, inputs: Any, output: Any) -> None:
    P._cache_enabled = max(P._cache_enabled - 1, 0)  # called alone where another pre-hook raised
    if not P._cache_enabled:
        P._cache = {}


def _original(name: str) -> str:
    return f"parametrizations.{name}.original"


def _parametrization(module: nn.Module, name: str) -> Bnb4bitParametrization:
    found: Any = module.parametrizations
    return found[name][0]  # type: ignore[no-any-return]


def _save(module: nn.Module, state_dict: dict[str, Any], prefix: str, local_metadata: Any, *, name: str) -> None:
    packed = state_dict.pop(f"{prefix}{_original(name)}", None)
    if packed is None:  # the parametrization was removed
        return
    state_dict[f"{prefix}{name}"] = packed
    for key, tensor in _parametrization(module, name).quant_state.as_dict(packed=True).items():
        state_dict[f"{prefix}{name}.{key}"] = tensor


def _load(
    module: nn.Module,
    state_dict: dict[str, Any],
    prefix: str,
    local_metadata: Any,
    strict: bool,
    missing_keys: list[str],
    unexpected_keys: list[str],
    error_msgs: list[str],
    *,
    name: str,
) -> None:
    key = f"{prefix}{name}"
    if not P.is_parametrized(module, name) or key not in state_dict:
        return
    statistics = {one: state_dict[one] for one in list(state_dict) if one.startswith(f"{key}.")}
    own = _parametrization(module, name)
    try:
        state = QuantState.from_dict(statistics, device=own.quant_state.absmax.device)
        if state.shape != own.quant_state.shape:
            raise FormatError(f"shape must be {tuple(own.quant_state.shape or ())}; got {tuple(state.shape or ())}")
    except FormatError as error:
        error_msgs.append(f"{key}: {error}")
        return
    own.quant_state = state
    for one in statistics:
        del state_dict[one]
    state_dict[f"{prefix}{_original(name)}"] = state_dict.pop(key)
