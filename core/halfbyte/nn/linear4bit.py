"""Linear layers over a 4-bit weight."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .. import functional
from ..ops import checks
from .params4bit import Params4bit
from .stored import Stored4bit, check_options_4bit, weight_and_bias


class Linear4bit(Stored4bit, nn.Linear):
    """nn.Linear with a 4-bit weight, quantized when the layer is first moved to a device (the CPU counts).

    compute_dtype        dtype of the product; None: the input's, or autocast's
    compress_statistics  quantize the absmax too (QLoRA's double quantization)
    quant_type           "nf4" or "fp4"
    quant_storage        dtype that the packed bytes are viewed as

    Gradients reach the input and the bias; the weight is frozen.

    Raises InputError for a quant_type, a quant_storage or a compute_dtype that there is not.

    Source: Dettmers et al. 2023, QLoRA (arXiv 2305.14314); the signature is bitsandbytes'.
    """

    def __init__(
        self,
        input_features: int,
        output_features: int,
        bias: bool = True,
        compute_dtype: torch.dtype | None = None,
        compress_statistics: bool = True,
        quant_type: str = "fp4",
        quant_storage: torch.dtype = torch.uint8,
        device: torch.device | str | None = None,
    ) -> None:
        check_options_4bit(torch.Size((output_features, input_features)), quant_type, quant_storage)
        if compute_dtype is not None:
            checks.floating("compute_dtype", compute_dtype)
        super().__init__(input_features, output_features, bias, device)
        self.weight = Params4bit(
            self.weight.data,
            requires_grad=False,
            compress_statistics=compress_statistics,
            quant_type=quant_type,
            quant_storage=quant_storage,
            module=self,
        )
        self.compute_dtype = compute_dtype
        self.quant_state = None
        self.quant_storage = quant_storage

    def full_shape(self) -> torch.Size:
        return torch.Size((self.out_features, self.in_features))

    def forward(self, x: Tensor) -> Tensor:
        """(..., in_features) -> (..., out_features), in x's dtype."""
        (weight, bias), compute_dtype = weight_and_bias(self), self.compute_dtype
        state = getattr(weight, "quant_state", None) or self.required_state()
        if compute_dtype is None and torch.is_autocast_enabled(x.device.type):
            x = x.to(torch.get_autocast_dtype(x.device.type))
        dtype = x.dtype
        if compute_dtype is None:
            compute_dtype = dtype
        if bias is not None and bias.dtype is not compute_dtype:
            bias = bias.to(compute_dtype)  # a temporary: the parameter keeps its dtype
        if dtype is compute_dtype:
            return functional.linear_4bit(x, weight, state, bias)
        return functional.linear_4bit(x.to(compute_dtype), weight, state, bias).to(dtype)


class LinearNF4(Linear4bit):
    """Linear4bit in NF4."""

    def __init__(
        self,
        input_features: int,
        output_features: int,
        bias: bool = True,
        compute_dtype: torch.dtype | None = None,
        compress_statistics: bool = True,
        quant_storage: torch.dtype = torch.uint8,
        device: torch.device | str | None = None,
    ) -> None:
        rest = (bias, compute_dtype, compress_statistics, "nf4", quant_storage, device)
        super().__init__(input_features, output_features, *rest)


class LinearFP4(Linear4bit):
    """Linear4bit in FP4."""

    def __init__(
        self,
        input_features: int,
        output_features: int,
        bias: bool = True,
        compute_dtype: torch.dtype | None = None,
        compress_statistics: bool = True,
        quant_storage: torch.dtype = torch.uint8,
        device: torch.device | str | None = None,
    ) -> None:
        rest = (bias, compute_dtype, compress_statistics, "fp4", quant_storage, device)
        super().__init__(input_features, output_features, *rest)
