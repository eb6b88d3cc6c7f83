"""torch.ops.bitsandbytes.*: bitsandbytes' schemas as shims over halfbyte's ops, with fake kernels.

They exist from the call of `define`, once in a process.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ... import formats
from ... import functional as core
from ...dispatch import current_override, entered
from ...errors import InputError
from . import functional as F

_ops = torch.ops.halfbyte
_libraries: list[torch.library.Library] = []  # a Library unregisters its ops when it is collected

Kernel = Callable[..., Any]


def define() -> None:
    """Register the ops.  A second call does nothing.

    Raises ImportError where something else, such as the real bitsandbytes, has registered them: torch has no way to
    take them back.
    """
    if _libraries:
        return
    taken = [name for name in torch._C._dispatch_get_all_op_names() if name.startswith("bitsandbytes::")]
    if taken:
        raise ImportError(
            f"torch.ops.bitsandbytes is taken already ({taken[0]} and {len(taken) - 1} more): another bitsandbytes was "
            "imported in this process. Import halfbyte.compat.bitsandbytes before anything that imports bitsandbytes, "
            "or set HALFBYTE_BITSANDBYTES=1."
        )
    library = torch.library.Library("bitsandbytes", "DEF")
    _libraries.append(library)
    for schema, kernel, fake in _SHIMS:
        name = schema.partition("(")[0]
        library.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
        library.impl(name, kernel, "CompositeExplicitAutograd")
        torch.library.register_fake(f"bitsandbytes::{name}", fake, lib=library)
    torch.library.register_autograd("bitsandbytes::gemm_4bit", _gemm_backward, setup_context=_gemm_setup, lib=library)


# -- 4 bit ---------------------------------------------------------------------------------------------------


def _quantize_4bit(A: Tensor, blocksize: int, quant_type: str, quant_storage: torch.dtype) -> tuple[Tensor, Tensor]:
    packed, state = core.quantize_4bit(A, format=quant_type, blocksize=blocksize, storage=quant_storage)
    return packed, state.absmax


def _fake_quantize_4bit(
    A: Tensor, blocksize: int, quant_type: str, quant_storage: torch.dtype
) -> tuple[Tensor, Tensor]:
    n = A.numel()
    packed = A.new_empty(((n + 1) // 2 // quant_storage.itemsize, 1), dtype=quant_storage)
    return packed, A.new_empty(((n + blocksize - 1) // blocksize,), dtype=torch.float32)


def _dequantize_4bit(
    A: Tensor, absmax: Tensor, blocksize: int, quant_type: str, shape: list[int], dtype: torch.dtype
) -> Tensor:
    packed = core.as_bytes(F.column(A))
    x: Tensor = _ops.dequantize_4bit.default(packed, absmax, None, None, None, quant_type, blocksize, shape, dtype)
    return x


def _fake_dequantize_4bit(
    A: Tensor, absmax: Tensor, blocksize: int, quant_type: str, shape: list[int], dtype: torch.dtype
) -> Tensor:
    return A.new_empty(shape, dtype=dtype)


def _gemm_4bit(
    A: Tensor,
    B: Tensor,
    shapeB: list[int],
    absmax: Tensor,
    blocksize: int,
    quant_type: str,
    bias: Tensor | None = None,
    absmax_8bit: Tensor | None = None,
    absmax_code: Tensor | None = None,
    absmax_offset: Tensor | None = None,
) -> Tensor:
    packed = core.as_bytes(F.column(B))
    statistics = _statistics(absmax, absmax_8bit, absmax_code, absmax_offset)
    y: Tensor = _ops.linear_4bit.default(A, packed, *statistics, bias, quant_type, blocksize, shapeB[0])
    return y


def _statistics(
    absmax: Tensor, absmax_8bit: Tensor | None, absmax_code: Tensor | None, absmax_offset: Tensor | None
) -> tuple[Tensor | None, ...]:
    """absmax, nested_absmax, nested_codebook and offset, as halfbyte's ops take them."""
    if absmax_8bit is None:
        return absmax, None, None, None
    return absmax_8bit, absmax, absmax_code, None if absmax_offset is None else absmax_offset.float()


def _fake_gemm_4bit(A: Tensor, B: Tensor, shapeB: list[int], *rest: Any, **named: Any) -> Tensor:
    return A.new_empty((*A.shape[:-1], shapeB[0]))


def _gemm_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, B, shapeB, absmax, blocksize, quant_type, bias, *nested = inputs
    ctx.save_for_backward(B, absmax, *nested)
    ctx.rest = (quant_type, blocksize, shapeB[1])
    ctx.has_bias = bias is not None
    ctx.halfbyte_chain = current_override()


def _gemm_backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
    dx = dbias = None
    if ctx.needs_input_grad[0]:
        B, *statistics = ctx.saved_tensors
        packed = core.as_bytes(F.column(B))
        with entered(ctx.halfbyte_chain):
            dx = _ops.linear_4bit_backward.default(dy, packed, *_statistics(*statistics), *ctx.rest)
    if ctx.has_bias and ctx.needs_input_grad[6]:
        dbias = dy.reshape(-1, dy.shape[-1]).sum(0)
    return (dx, None, None, None, None, None, dbias, None, None, None)


def _gemv_4bit(A: Tensor, B: Tensor, shapeB: list[int], absmax: Tensor, code: Tensor, blocksize: int) -> Tensor:
    return _gemm_4bit(A, B, shapeB, absmax, blocksize, _format_of(code))


def _fake_gemv_4bit(A: Tensor, B: Tensor, shapeB: list[int], absmax: Tensor, code: Tensor, blocksize: int) -> Tensor:
    return A.new_empty((*A.shape[:-1], shapeB[0]))


def _format_of(code: Tensor) -> str:
    """The format whose table this is; the shared tables are known without reading them back."""
    for name in formats.FORMATS:
        if code.data_ptr() == formats.levels(name, code.device).data_ptr():
            return name
    found = code.tolist()
    for name, spec in formats.FORMATS.items():
        if len(found) == 16 and all(abs(a - b) < 1e-3 for a, b in zip(found, spec.levels)):
            return name
    raise InputError(f"code must be the table of {' or '.join(formats.FORMATS)}; got {found[:4]}...")


# -- 8 bit ---------------------------------------------------------------------------------------------------


def _quantize_blockwise(A: Tensor, code: Tensor, blocksize: int) -> tuple[Tensor, Tensor]:
    codes, absmax = _ops.quantize_8bit.default(A, code, blocksize)
    return codes, absmax


def _fake_quantize_blockwise(A: Tensor, code: Tensor, blocksize: int) -> tuple[Tensor, Tensor]:
    absmax = A.new_empty(((A.numel() + blocksize - 1) // blocksize,), dtype=torch.float32)
    return A.new_empty(A.shape, dtype=torch.uint8), absmax


def _dequantize_blockwise(A: Tensor, absmax: Tensor, code: Tensor, blocksize: int, dtype: torch.dtype) -> Tensor:
    x: Tensor = _ops.dequantize_8bit.default(A, absmax, code, blocksize, dtype)
    return x


def _fake_dequantize_blockwise(A: Tensor, absmax: Tensor, code: Tensor, blocksize: int, dtype: torch.dtype) -> Tensor:
    return A.new_empty(A.shape, dtype=dtype)


# -- LLM.int8() ----------------------------------------------------------------------------------------------


def _fake_vectorwise_quant(A: Tensor, threshold: float = 0.0) -> tuple[Tensor, Tensor, Tensor | None]:
    stats = A.new_empty((math.prod(A.shape[:-1]),), dtype=torch.float32)
    return A.new_empty(A.shape, dtype=torch.int8), stats, _fake_outliers(A, threshold)


def _fake_outliers(A: Tensor, threshold: float) -> Tensor | None:
    if threshold <= 0:
        return None
    return A.new_empty((torch.library.get_ctx().new_dynamic_size(),), dtype=torch.int64)


def _vectorwise_dequant(A: Tensor, stats: Tensor) -> Tensor:
    return F.int8_vectorwise_dequant(A, stats)


def _fake_vectorwise_dequant(A: Tensor, stats: Tensor) -> Tensor:
    return A.new_empty(A.shape, dtype=torch.float32)


def _double_quant(A: Tensor, threshold: float = 0.0) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor | None]:
    return F.int8_double_quant(A, threshold=threshold)


def _fake_double_quant(A: Tensor, threshold: float = 0.0) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor | None]:
    by_row, by_column = (A.new_empty((size,), dtype=torch.float32) for size in A.shape)
    rows, columns = (A.new_empty(A.shape, dtype=torch.int8) for _ in range(2))
    return rows, columns, by_row, by_column, _fake_outliers(A, threshold)


def _linear_matmul(A: Tensor, B: Tensor) -> Tensor:
    return F.int8_linear_matmul(A, B)


def _fake_linear_matmul(A: Tensor, B: Tensor) -> Tensor:
    return A.new_empty((*A.shape[:-1], B.shape[0]), dtype=torch.int32)


def _mm_dequant(
    A: Tensor, row_stats: Tensor, col_stats: Tensor, dtype: torch.dtype | None = None, bias: Tensor | None = None
) -> Tensor:
    x: Tensor = _ops.dequantize_int8.default(A, row_stats, col_stats, bias, dtype or torch.float16)
    return x


def _fake_mm_dequant(
    A: Tensor, row_stats: Tensor, col_stats: Tensor, dtype: torch.dtype | None = None, bias: Tensor | None = None
) -> Tensor:
    return A.new_empty(A.shape, dtype=dtype or torch.float16)


def _scaled_mm(
    A: Tensor,
    B: Tensor,
    row_stats: Tensor,
    col_stats: Tensor,
    bias: Tensor | None = None,
    dtype: torch.dtype | None = None,
) -> Tensor:
    return _mm_dequant(_linear_matmul(A, B), row_stats, col_stats, dtype, bias)


def _fake_scaled_mm(
    A: Tensor,
    B: Tensor,
    row_stats: Tensor,
    col_stats: Tensor,
    bias: Tensor | None = None,
    dtype: torch.dtype | None = None,
) -> Tensor:
    return A.new_empty((*A.shape[:-1], B.shape[0]), dtype=dtype or torch.float16)


def _mixed_scaled_mm(
    A: Tensor,
    CA: Tensor,
    CB: Tensor,
    SCA: Tensor,
    SCB: Tensor,
    outlier_cols: Tensor | None = None,
    bias: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    if outlier_cols is None:
        return _scaled_mm(CA, CB, SCA, SCB, bias, A.dtype), None
    y = _scaled_mm(CA, CB, SCA, SCB, bias, torch.float32)
    outliers = A[..., outlier_cols]
    weight: Tensor = _ops.dequantize_int8.default(CB[:, outlier_cols], SCB, None, None, torch.float32)
    return (y + outliers.float() @ weight.T).to(A.dtype), outliers


def _fake_mixed_scaled_mm(
    A: Tensor,
    CA: Tensor,
    CB: Tensor,
    SCA: Tensor,
    SCB: Tensor,
    outlier_cols: Tensor | None = None,
    bias: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    outliers = None if outlier_cols is None else A.new_empty((*A.shape[:-1], outlier_cols.shape[0]))
    return A.new_empty((*A.shape[:-1], CB.shape[0])), outliers


# -- optimizers ----------------------------------------------------------------------------------------------


def _update_32bit(
    optimizer_name: str,
    g: Tensor,
    p: Tensor,
    state1: Tensor,
    state2: Tensor | None,
    unorm_vec: Tensor | None,
    max_unorm: float,
    param_norm: float,
    beta1: float,
    beta2: float,
    beta3: float,
    alpha: float,
    eps: float,
    weight_decay: float,
    step: int,
    lr: float,
    gnorm_scale: float,
    skip_zeros: bool = False,
) -> None:
    betas = (beta1, eps, step, lr, state2, beta2, beta3, alpha)
    rest = (weight_decay, gnorm_scale, unorm_vec, max_unorm, skip_zeros)
    F.optimizer_update_32bit(optimizer_name, g, p, state1, *betas, *rest)


def _update_8bit(*args: Any) -> None:
    F.optimizer_update_8bit_blockwise(*args)


def _nothing(*args: Any, **named: Any) -> None:
    return None


def _into(kernel: Kernel) -> Kernel:
    """The overload that writes its result to `out`."""

    def run(*args: Any, out: Tensor | None = None) -> None:
        *inputs, target = args if out is None else (*args, out)
        target.copy_(kernel(*inputs))

    return run


_DEQUANTIZE = "Tensor A, Tensor absmax, int blocksize, str quant_type, int[] shape, ScalarType dtype"
_BLOCKWISE = "Tensor A, Tensor absmax, Tensor code, int blocksize, ScalarType dtype"
_GEMV = "Tensor A, Tensor B, int[] shapeB, Tensor absmax, Tensor code, int blocksize"

_SHIMS: tuple[tuple[str, Kernel, Kernel], ...] = (
    (
        "quantize_4bit(Tensor A, int blocksize, str quant_type, ScalarType quant_storage) -> (Tensor, Tensor)",
        _quantize_4bit,
        _fake_quantize_4bit,
    ),
    (f"dequantize_4bit({_DEQUANTIZE}) -> Tensor", _dequantize_4bit, _fake_dequantize_4bit),
    (f"dequantize_4bit.out({_DEQUANTIZE}, Tensor(a0!) out) -> ()", _into(_dequantize_4bit), _nothing),
    (
        "gemm_4bit(Tensor A, Tensor B, int[] shapeB, Tensor absmax, int blocksize, str quant_type, Tensor? bias=None, "
        "Tensor? absmax_8bit=None, Tensor? absmax_code=None, Tensor? absmax_offset=None) -> Tensor",
        _gemm_4bit,
        _fake_gemm_4bit,
    ),
    (f"gemv_4bit({_GEMV}) -> Tensor", _gemv_4bit, _fake_gemv_4bit),
    (f"gemv_4bit.out({_GEMV}, Tensor(a0!) out) -> ()", _into(_gemv_4bit), _nothing),
    (
        "quantize_blockwise(Tensor A, Tensor code, int blocksize) -> (Tensor, Tensor)",
        _quantize_blockwise,
        _fake_quantize_blockwise,
    ),
    (f"dequantize_blockwise({_BLOCKWISE}) -> Tensor", _dequantize_blockwise, _fake_dequantize_blockwise),
    (f"dequantize_blockwise.out({_BLOCKWISE}, Tensor(a0!) out) -> ()", _into(_dequantize_blockwise), _nothing),
    (
        "int8_vectorwise_quant(Tensor A, float threshold=0.0) -> (Tensor, Tensor, Tensor?)",
        F.int8_vectorwise_quant,
        _fake_vectorwise_quant,
    ),
    ("int8_vectorwise_dequant(Tensor A, Tensor stats) -> Tensor", _vectorwise_dequant, _fake_vectorwise_dequant),
    (
        "int8_double_quant(Tensor A, float threshold=0.0) -> (Tensor, Tensor, Tensor, Tensor, Tensor?)",
        _double_quant,
        _fake_double_quant,
    ),
    ("int8_linear_matmul(Tensor A, Tensor B) -> Tensor", _linear_matmul, _fake_linear_matmul),
    ("int8_linear_matmul.out(Tensor A, Tensor B, Tensor(a0!) out) -> ()", _into(_linear_matmul), _nothing),
    (
        "int8_mm_dequant(Tensor A, Tensor row_stats, Tensor col_stats, ScalarType? dtype=None, Tensor? bias=None) "
        "-> Tensor",
        _mm_dequant,
        _fake_mm_dequant,
    ),
    (
        "int8_scaled_mm(Tensor A, Tensor B, Tensor row_stats, Tensor col_stats, Tensor? bias=None, "
        "ScalarType? dtype=None) -> Tensor",
        _scaled_mm,
        _fake_scaled_mm,
    ),
    (
        "int8_mixed_scaled_mm(Tensor A, Tensor CA, Tensor CB, Tensor SCA, Tensor SCB, Tensor? outlier_cols=None, "
        "Tensor? bias=None) -> (Tensor, Tensor?)",
        _mixed_scaled_mm,
        _fake_mixed_scaled_mm,
    ),
    (
        "optimizer_update_32bit(str optimizer_name, Tensor(a0!) g, Tensor(a1!) p, Tensor(a2!) state1, "
        "Tensor(a3!)? state2, Tensor(a4!)? unorm_vec, float max_unorm, float param_norm, float beta1, float beta2, "
        "float beta3, float alpha, float eps, float weight_decay, int step, float lr, float gnorm_scale, "
        "bool skip_zeros=False) -> ()",
        _update_32bit,
        _nothing,
    ),
    (
        "optimizer_update_8bit_blockwise(str optimizer_name, Tensor(a0!) g, Tensor(a1!) p, Tensor(a2!) state1, "
        "Tensor(a3!)? state2, float beta1, float beta2, float beta3, float alpha, float eps, int step, float lr, "
        "Tensor(a4!) qmap1, Tensor(a5!)? qmap2, Tensor(a6!) absmax1, Tensor(a7!)? absmax2, float weight_decay, "
        "float gnorm_scale, bool skip_zeros=False) -> ()",
        _update_8bit,
        _nothing,
    ),
)
