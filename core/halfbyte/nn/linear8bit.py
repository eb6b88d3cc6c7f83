"""Linear8bitLt: LLM.int8() as a layer."""

from __future__ import annotations

import copy
import weakref
from dataclasses import KW_ONLY, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .. import functional, transforms
from .params8bit import Int8Params
from .stored import StoredInt8, weight_and_bias


@dataclass
class MatmulLtState:
    """Settings of a Linear8bitLt, and a place where bitsandbytes' users look for its weight and statistics.

    The layer itself always reads its weight, so nothing here can go stale.  Positional arguments are bitsandbytes';
    of them only CB and SCB have a meaning.
    """

    force_no_igemmlt: bool = False
    CB: Tensor | None = None
    SB: Tensor | None = None
    SCB: Tensor | None = None
    SBt: Tensor | None = None
    CBt: Tensor | None = None
    subB: Tensor | None = None
    outlier_pool: Any = None
    idx: Tensor | None = None
    _: KW_ONLY
    CxB: Tensor | None = None
    threshold: float = 0.0
    has_fp16_weights: bool = True
    is_training: bool = True
    use_pool: bool = False

    def reset_grads(self) -> None:
        """Forget weight and statistics, as callers do after they replaced the weight."""
        self.CB = self.SCB = self.CxB = None


class LayerState(MatmulLtState):
    """The state of a Linear8bitLt.  CB and SCB are its weight's as it is now, unless they were set to something."""

    _layer: weakref.ref[nn.Module] | None = None

    def __init__(self, layer: nn.Module, **settings: Any) -> None:
        self.bind(layer)
        super().__init__(**settings)

    def bind(self, layer: nn.Module) -> None:
        self._layer = weakref.ref(layer)

    @property
    def CB(self) -> Tensor | None:
        return self._found("CB")

    @CB.setter
    def CB(self, value: Tensor | None) -> None:
        self._CB = value

    @property
    def SCB(self) -> Tensor | None:
        return self._found("SCB")

    @SCB.setter
    def SCB(self, value: Tensor | None) -> None:
        self._SCB = value

    def _found(self, name: str) -> Tensor | None:
        value: Tensor | None = getattr(self, f"_{name}")
        layer = self._layer() if self._layer else None  # of a copy none, until the copy of the layer binds it
        if value is not None or layer is None or layer.weight.dtype is not torch.int8:
            return value
        return getattr(layer.weight, name, None)

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "_layer"}

    def __eq__(self, other: object) -> bool:
        """Whether the settings are equal."""
        return isinstance(other, MatmulLtState) and all(
            getattr(self, name) == getattr(other, name) for name in ("threshold", "has_fp16_weights", "is_training")
        )

    __hash__ = None  # type: ignore[assignment]  # as every dataclass that compares


class Linear8bitLt(StoredInt8, nn.Linear):
    """nn.Linear with an int8 weight and, in "exact" mode, int8 activations.

    has_fp16_weights  True: the weight stays a trainable float and is quantized in each forward.
                      False: it is quantized when the layer is first moved to a device (the CPU counts)
    threshold         magnitude from which an activation's column stays out of the integer product; 0.0 for none
    index             kept for callers that pass it; unused

    Source: Dettmers et al. 2022, LLM.int8() (arXiv 2208.07339); the signature is bitsandbytes'.
    """

    def __init__(
        self,
        input_features: int,
        output_features: int,
        bias: bool = True,
        has_fp16_weights: bool = True,
        threshold: float = 0.0,
        index: Tensor | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__(input_features, output_features, bias, device)
        self.state = LayerState(self, threshold=threshold, has_fp16_weights=has_fp16_weights)
        self.index = index
        self.dtype = self.weight.dtype
        self.weight = Int8Params(self.weight.data, requires_grad=has_fp16_weights, has_fp16_weights=has_fp16_weights)

    def stays_float(self) -> bool:
        return self.state.has_fp16_weights

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        self.state = copy.copy(self.state)
        self.state.bind(self)

    def require_quantized(self) -> None:
        if not self.stays_float():
            self.required_absmax()

    def forward(self, x: Tensor) -> Tensor:
        """(..., in_features) -> (..., out_features), in x's dtype."""
        if torch.is_autocast_enabled(x.device.type):
            x = x.to(torch.get_autocast_dtype(x.device.type))
        weight, bias = weight_and_bias(self)
        if bias is not None and bias.dtype is not x.dtype:
            bias = bias.to(x.dtype)  # a temporary: the parameter keeps its dtype
        state = self.state
        with functional.AsBytes():
            absmax = getattr(weight, "SCB", None) if weight.dtype is torch.int8 else None
            if absmax is None and not (state.has_fp16_weights and weight.is_floating_point()):
                absmax = self.required_absmax()
        if absmax is None:
            return linear_trainable(x, weight, bias, state.threshold)
        return functional.linear_int8(x, weight, absmax, bias, threshold=state.threshold)


def linear_trainable(x: Tensor, weight: Tensor, bias: Tensor | None, threshold: float) -> Tensor:
    """linear_int8 over a float weight (N, K) that is quantized here, with gradients for x, weight and bias."""
    if not torch.compiler.is_compiling() and transforms.active():
        raise transforms.refusal(Linear8bitLt.__name__)
    return _TrainableInt8.apply(x, weight, bias, threshold)  # type: ignore[no-any-return, no-untyped-call]


class _TrainableInt8(torch.autograd.Function):
    """linear_int8 over a float weight that is quantized here; straight-through gradients for all three."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, threshold: float) -> Tensor:
        rows, absmax, _ = functional.quantize_int8_rows(weight)
        ctx.save_for_backward(x, rows, absmax)
        ctx.weight_dtype, ctx.has_bias = weight.dtype, bias is not None
        return functional.linear_int8(x, rows, absmax, bias, threshold=threshold)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (dy,) = grads
        x, rows, absmax = ctx.saved_tensors
        dx = dw = db = None
        flat = dy.reshape(-1, dy.shape[-1])
        if ctx.needs_input_grad[0]:
            dx = dy @ functional.dequantize_int8(rows, absmax, dtype=dy.dtype)
        if ctx.needs_input_grad[1]:
            dw = (flat.T @ x.reshape(-1, x.shape[-1])).to(ctx.weight_dtype)
        if ctx.has_bias and ctx.needs_input_grad[2]:
            db = flat.sum(0)
        return dx, dw, db, None
