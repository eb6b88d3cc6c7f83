"""What users call: fills in defaults, packs and unpacks QuantState, calls the op."""

from __future__ import annotations

import torch
from torch import Tensor

from . import _runtime as _runtime  # fills the tables of calling
from . import calling, formats
from .calling import AsBytes as AsBytes
from .calling import call
from .errors import InputError
from .gradients import Linear4bit, LinearInt8
from .kernel import show
from .ops import checks
from .quant_state import QuantState
from .weights import as_bytes as as_bytes

_NOT_NESTED = (None, None, None)
_ops = torch.ops.halfbyte


# -- 4 bit ---------------------------------------------------------------------------------------------------


def quantize_4bit(
    x: Tensor,
    *,
    format: str = "nf4",
    blocksize: int = 64,
    nested: bool = False,
    storage: torch.dtype = torch.uint8,
) -> tuple[Tensor, QuantState]:
    """Quantize a tensor to 4 bits with one absmax per block.

    x          float32, float16, bfloat16; any shape
    format     "nf4" or "fp4"
    blocksize  a power of two from 32 to 4096
    nested     quantize the absmax too (QLoRA's double quantization)
    storage    dtype that the packed bytes are viewed as
    returns    packed ((n + 1) // 2 / itemsize, 1) of `storage`, and the state that undoes it

    Raises InputError for a wrong dtype, format, block size, or a byte count that `storage` does not divide.
    Source: Dettmers et al. 2023, QLoRA, section 3 (arXiv 2305.14314).
    """
    n_bytes = (x.numel() + 1) // 2
    check_storage(n_bytes, storage)
    packed, absmax = call("quantize_4bit", _ops.quantize_4bit.default, x.detach(), format, blocksize)
    code = formats.levels(format, x.device)
    state = QuantState(absmax, x.shape, code, blocksize, format, x.dtype)
    if nested:
        state.offset = pairwise_mean(absmax)
        state.absmax, state.state2 = quantize_8bit(absmax - state.offset, blocksize=formats.NESTED_BLOCKSIZE)
    return packed.view(storage).unsqueeze(1), state


def check_storage(n_bytes: int, storage: torch.dtype) -> None:
    """Raise InputError where so many packed bytes cannot be viewed as `storage`."""
    if storage not in formats.STORAGES:
        raise InputError(f"storage must be one of {', '.join(map(show, formats.STORAGES))}; got {show(storage)}")
    if n_bytes % storage.itemsize:
        raise InputError(f"{n_bytes} packed bytes cannot be viewed as {show(storage)} ({storage.itemsize} bytes each)")


def dequantize_4bit(packed: Tensor, state: QuantState, *, dtype: torch.dtype | None = None) -> Tensor:
    """Undo quantize_4bit.

    dtype      of the result; the original's when None
    returns    the state's shape
    """
    shape, format, blocksize = _described(state)
    with AsBytes():
        x: Tensor = call(
            "dequantize_4bit",
            _ops.dequantize_4bit.default,
            as_bytes(packed),
            state.absmax,
            *state.nested_tensors(),
            format,
            blocksize,
            shape,
            dtype or state.dtype,
        )
        return x


def linear_4bit(x: Tensor, packed: Tensor, state: QuantState, bias: Tensor | None = None) -> Tensor:
    """x @ dequantized weight^T + bias, with gradients for x and bias.

    x          float32, float16, bfloat16; (..., in_features)
    packed     a quantized weight of shape (out_features, in_features)
    bias       x's dtype, (out_features,)
    returns    x's dtype, (..., out_features)
    """
    shape, format, blocksize = _described(state)
    if len(shape) != 2 or not x.ndim or x.shape[-1] != shape[1]:
        raise InputError(f"x (..., K) must fit a weight (N, K); got {tuple(x.shape)} and {tuple(shape)}")
    statistics = (state.absmax, *(_NOT_NESTED if state.state2 is None else state.nested_tensors()))
    plain = (format, blocksize, shape[0])
    with AsBytes():
        if not calling.unobserved(x):
            observed = as_bytes(packed).detach()  # modes want plain tensors
            y: Tensor = _ops.linear_4bit.default(x, observed, *statistics, bias, *plain)
            return y
        if bias is not None:
            checks.bias_fits(bias, x, shape[0])
        if calling.wants_gradient(x, bias):
            return Linear4bit.run(x, bias, (packed, *statistics), plain)
        return calling.bound["linear_4bit"](x, bias, packed, (as_bytes(packed), *statistics), plain)  # type: ignore[no-any-return]


def _described(state: QuantState) -> tuple[torch.Size, str, int]:
    if state.shape is None or state.quant_type is None or state.blocksize is None:
        raise InputError(f"a 4-bit state needs shape, quant_type and blocksize; got {state!r}")
    return state.shape, state.quant_type, state.blocksize


def pairwise_mean(x: Tensor) -> Tensor:
    """The float32 mean, summed in a fixed order on every device: pad with zeros to a power of two, fold halves."""
    n = x.numel()
    total = torch.nn.functional.pad(x.reshape(-1), (0, (1 << max(n - 1, 0).bit_length()) - n))
    while total.numel() > 1:
        half = total.numel() // 2
        total = total[:half] + total[half:]
    return (total / max(n, 1)).reshape(())


# -- 8 bit ---------------------------------------------------------------------------------------------------


def quantize_8bit(x: Tensor, *, codebook: str | Tensor = "dynamic", blocksize: int = 256) -> tuple[Tensor, QuantState]:
    """Quantize a tensor to the nearest of 256 levels, with one absmax per block.

    x          float32, float16, bfloat16; any shape
    codebook   "dynamic", "dynamic_unsigned", or 256 ascending float32 values
    returns    codes uint8 of x's shape, and the state that undoes it

    Raises InputError for a wrong dtype, block size or codebook; on an accelerator its order is not checked.
    Source: Dettmers et al. 2022, 8-bit Optimizers via Block-wise Quantization, section 2 (arXiv 2110.02861).
    """
    if isinstance(codebook, str):
        table = formats.codebook(codebook, x.device)
    else:
        table = codebook
        # To look at it would wait for an accelerator and break a graph.
        if table.device.type == "cpu" and calling.unobserved(x) and bool((table[1:] < table[:-1]).any()):
            raise InputError("codebook must ascend; got one that does not")
    codes, absmax = call("quantize_8bit", _ops.quantize_8bit.default, x.detach(), table, blocksize)
    return codes, QuantState(absmax, x.shape, table, blocksize, None, x.dtype)


def dequantize_8bit(codes: Tensor, state: QuantState, *, dtype: torch.dtype | None = None) -> Tensor:
    """Undo quantize_8bit.

    dtype      of the result; the original's when None
    """
    x: Tensor = call(
        "dequantize_8bit",
        _ops.dequantize_8bit.default,
        codes,
        state.absmax,
        state.code,
        state.blocksize,
        dtype or state.dtype,
    )
    return x


# -- LLM.int8() ----------------------------------------------------------------------------------------------


def quantize_int8_rows(x: Tensor, *, threshold: float = 0.0) -> tuple[Tensor, Tensor, Tensor]:
    """Quantize each row to int8.

    x          float32, float16, bfloat16; (..., K)
    threshold  magnitude from which a value is an outlier; 0.0 for none
    returns    q int8 of x's shape, absmax float32 (rows,), outlier_columns bool (K,)
    """
    return call("quantize_int8_rows", _ops.quantize_int8_rows.default, x.detach(), float(threshold))  # type: ignore[no-any-return]


def quantize_int8_columns(x: Tensor, *, threshold: float = 0.0) -> tuple[Tensor, Tensor]:
    """Quantize each column to int8.

    x          float32, float16, bfloat16; (rows, K)
    threshold  magnitude from which a value is an outlier, which becomes 0 and is not scaled by; 0.0 for none
    returns    q int8 of x's shape, absmax float32 (K,)
    """
    if x.ndim != 2:
        raise InputError(f"x must have two dimensions; got {tuple(x.shape)}")
    if threshold > 0:
        x = x.masked_fill(x.abs() >= threshold, 0.0)
    q, absmax, _ = quantize_int8_rows(x.T.contiguous())
    return q.T.contiguous(), absmax


def dequantize_int8(q: Tensor, absmax: Tensor, *, dtype: torch.dtype = torch.float32) -> Tensor:
    """Undo quantize_int8_rows: q * absmax / 127 of its row."""
    x: Tensor = call("dequantize_int8", _ops.dequantize_int8.default, q, absmax, None, None, dtype)
    return x


def linear_int8(
    x: Tensor,
    weight: Tensor,
    absmax: Tensor,
    bias: Tensor | None = None,
    *,
    threshold: float = 0.0,
    mode: str = "exact",
) -> Tensor:
    """x @ (weight * absmax / 127)^T + bias, with gradients for x and bias.

    x          float32, float16, bfloat16; (..., K)
    weight     int8 (N, K)
    absmax     float32 (N,), one per row of the weight
    threshold  magnitude from which an activation is an outlier and stays out of the integer product; 0.0 for none
    mode       "exact": LLM.int8(), activations are quantized; "w8a16": only the weight is
    returns    x's dtype, (..., N)

    Source: Dettmers et al. 2022, LLM.int8(), section 3 (arXiv 2208.07339).
    """
    plain = (float(threshold), mode)
    with AsBytes():
        if not calling.unobserved(x):
            y: Tensor = _ops.linear_int8.default(x, weight, absmax, bias, *plain)
            return y
        if bias is not None and weight.ndim == 2:
            checks.bias_fits(bias, x, weight.shape[0])
        if calling.wants_gradient(x, bias):
            return LinearInt8.run(x, bias, (weight, absmax), plain)
        return calling.bound["linear_int8"](x, bias, weight, (weight, absmax), plain)  # type: ignore[no-any-return]
