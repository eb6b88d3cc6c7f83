"""Which hidden dimensions of a model carry outliers: from the weights that write them.

Source: Dettmers et al. 2022, LLM.int8(), sections 3.2 and 4 (arXiv 2208.07339).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from .errors import InputError

MAGNITUDE = 6.0  # from which an activation counts as an outlier


def find_outlier_dims(
    weight: Tensor, reduction_dim: int = 0, zscore: float = 4.0, topk: int | None = None, rdm: bool = False
) -> Tensor:
    """Indices along the kept dimension whose standard deviation stands out.

    zscore  standard deviations above the mean of all deviations
    topk    give the so many largest instead
    rdm     give so many random ones instead, to compare with
    """
    if rdm:
        if topk is None:
            raise InputError("rdm needs topk, the number of dimensions to draw")
        return torch.randint(0, weight.shape[1], (topk,), device=weight.device)
    deviation = weight.float().std(reduction_dim)
    if topk is not None:
        return deviation.topk(topk).indices
    return ((deviation - deviation.mean()) / deviation.std() > zscore).nonzero().flatten()


class OutlierTracer:
    """Follows one forward of a model, and tells for each linear layer which of its inputs carry outliers.

    They are written by the layer that ran before, and found in its weight; for the first layer in its input.
    There is one tracer per process: `get_instance()`.
    """

    _instance: OutlierTracer | None = None

    def __init__(self) -> None:
        raise RuntimeError("there is one tracer per process: call OutlierTracer.get_instance()")

    @classmethod
    def get_instance(cls) -> OutlierTracer:
        if cls._instance is None:
            cls._instance = cls.__new__(cls)
        return cls._instance

    def initialize(self, model: nn.Module) -> None:
        """Watch every linear layer of a model, and forget an earlier one."""
        for hook in getattr(self, "hooks", ()):
            hook.remove()
        self.outliers: list[Tensor] = []
        self.hvalues: list[int] = []
        self.hvalue2outlier_idx: dict[int, Tensor] = {}
        layers = [module for module in model.modules() if isinstance(module, nn.Linear)]
        self.hooks: list[RemovableHandle] = [layer.register_forward_pre_hook(outlier_hook) for layer in layers]

    def is_initialized(self) -> bool:
        return hasattr(self, "hooks")

    def get_hvalue(self, weight: Tensor) -> int:
        return weight.data_ptr()

    def get_outliers(self, weight: Tensor) -> Tensor | None:
        """The outlier inputs of the layer with a weight; None where it was not watched."""
        return self.hvalue2outlier_idx.get(self.get_hvalue(weight)) if self.is_initialized() else None


def outlier_hook(module: nn.Module, input: tuple[Any, ...]) -> None:
    """Before a linear layer's first forward under the tracer."""
    tracer = OutlierTracer.get_instance()
    weight: Any = module.weight
    value = tracer.get_hvalue(weight)
    if value in tracer.hvalue2outlier_idx:
        return
    written = find_outlier_dims(weight.detach(), reduction_dim=1)  # hidden dimensions that this layer writes
    if tracer.outliers and tracer.outliers[-1].numel() and int(tracer.outliers[-1].max()) < weight.shape[1]:
        found = tracer.outliers[-1]
    else:
        rows = input[0].detach().reshape(-1, weight.shape[1])
        large = (rows.abs() > MAGNITUDE).any(dim=0).nonzero().flatten()
        found = torch.cat((large, find_outlier_dims(rows))).unique()
    tracer.hvalues.append(value)
    tracer.outliers.append(written)
    tracer.hvalue2outlier_idx[value] = found


class OutlierAwareLinear(nn.Linear):
    """Base of a linear layer that quantizes its weight around outlier dimensions, found by the OutlierTracer.

    A subclass defines forward_with_outliers and quantize_weight.  The weight is quantized in the first forward.
    """

    def __init__(
        self, input_features: int, output_features: int, bias: bool = True, device: torch.device | str | None = None
    ) -> None:
        super().__init__(input_features, output_features, bias, device)
        self.outlier_dim: Tensor | None = None
        self.is_quantized = False

    def forward_with_outliers(self, x: Tensor, outlier_idx: Tensor | None) -> Tensor:
        raise NotImplementedError(f"{type(self).__name__} must define forward_with_outliers(x, outlier_idx)")

    def quantize_weight(self, w: Tensor, outlier_idx: Tensor | None) -> Tensor:
        raise NotImplementedError(f"{type(self).__name__} must define quantize_weight(w, outlier_idx)")

    def forward(self, x: Tensor) -> Tensor:
        if self.outlier_dim is None:
            tracer = OutlierTracer.get_instance()
            if not tracer.is_initialized():
                raise InputError("OutlierAwareLinear needs OutlierTracer.get_instance().initialize(model) first")
            self.outlier_dim = tracer.get_outliers(self.weight)
        if not self.is_quantized:
            self.weight.data.copy_(self.quantize_weight(self.weight, self.outlier_dim))
            self.is_quantized = True
        return self.forward_with_outliers(x, self.outlier_dim)
