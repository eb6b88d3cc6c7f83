"""bitsandbytes.functional: its names, argument orders and defaults over halfbyte's functions."""

from __future__ import annotations

import ctypes
import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from ... import codebooks, functional
from ...errors import InputError
from ...quant_state import QuantState
from .retired import batched_igemm, check_matmul, elementwise_func, igemm
from .utils import pack_dict_to_tensor, unpack_tensor_to_dict

__all__ = [
    "FIRST_CUDA_DEVICE",
    "C",
    "GlobalPageManager",
    "QuantState",
    "batched_igemm",
    "check_matmul",
    "create_dynamic_map",
    "create_fp8_map",
    "create_linear_map",
    "create_normal_map",
    "dequantize_4bit",
    "dequantize_blockwise",
    "dequantize_fp4",
    "dequantize_nf4",
    "elementwise_func",
    "fill",
    "gemv_4bit",
    "get_4bit_type",
    "get_paged",
    "get_ptr",
    "has_avx512bf16",
    "igemm",
    "int8_double_quant",
    "int8_linear_matmul",
    "int8_mm_dequant",
    "int8_vectorwise_dequant",
    "int8_vectorwise_quant",
    "is_on_gpu",
    "name2qmap",
    "optimizer_update_8bit_blockwise",
    "optimizer_update_32bit",
    "pack_dict_to_tensor",
    "prefetch_tensor",
    "quantize_4bit",
    "quantize_blockwise",
    "quantize_fp4",
    "quantize_nf4",
    "unpack_tensor_to_dict",
]

C = 127.0
FIRST_CUDA_DEVICE = torch.device("cuda", index=0)
OPTIMIZER_BLOCKSIZE = 256

name2qmap: dict[str, Tensor] = {}  # "dynamic": the default table of quantize_blockwise, there after its first use

create_dynamic_map = codebooks.dynamic_map
create_fp8_map = codebooks.fp8_map
create_linear_map = codebooks.linear_map
create_normal_map = codebooks.normal_map


# -- 4 bit ---------------------------------------------------------------------------------------------------


def quantize_4bit(
    A: Tensor,
    absmax: Tensor | None = None,
    out: Tensor | None = None,
    blocksize: int | None = None,
    compress_statistics: bool = False,
    quant_type: str = "fp4",
    quant_storage: torch.dtype = torch.uint8,
) -> tuple[Tensor, QuantState]:
    """Packed codes and their state; absmax and out are filled and used in place of new tensors."""
    packed, state = functional.quantize_4bit(
        A,
        format=quant_type,
        blocksize=64 if blocksize is None else blocksize,
        nested=compress_statistics,
        storage=quant_storage,
    )
    if absmax is not None:
        state.absmax = absmax.copy_(state.absmax)
    return packed if out is None else out.copy_(packed), state


def quantize_fp4(
    A: Tensor,
    absmax: Tensor | None = None,
    out: Tensor | None = None,
    blocksize: int | None = None,
    compress_statistics: bool = False,
    quant_storage: torch.dtype = torch.uint8,
) -> tuple[Tensor, QuantState]:
    return quantize_4bit(A, absmax, out, blocksize, compress_statistics, "fp4", quant_storage)


def quantize_nf4(
    A: Tensor,
    absmax: Tensor | None = None,
    out: Tensor | None = None,
    blocksize: int | None = None,
    compress_statistics: bool = False,
    quant_storage: torch.dtype = torch.uint8,
) -> tuple[Tensor, QuantState]:
    return quantize_4bit(A, absmax, out, blocksize, compress_statistics, "nf4", quant_storage)


def dequantize_4bit(
    A: Tensor,
    quant_state: QuantState | None = None,
    absmax: Tensor | None = None,
    out: Tensor | None = None,
    blocksize: int | None = None,
    quant_type: str = "fp4",
) -> Tensor:
    """The tensor of packed codes; its transpose where they come as a row, as the transpose of packed codes does.

    Without quant_state, absmax gives the statistics, and out the shape and dtype.
    """
    if quant_state is None:
        if absmax is None or out is None:
            raise InputError("dequantize_4bit needs quant_state, or both absmax and out; got neither")
        blocksize = 64 if blocksize is None else blocksize
        quant_state = QuantState(absmax, out.shape, None, blocksize, quant_type, out.dtype)
    x = functional.dequantize_4bit(A.contiguous(), quant_state)
    if out is not None:
        x = out.copy_(x)
    return x.t() if A.ndim and A.shape[0] == 1 and x.ndim <= 2 else x


def dequantize_fp4(
    A: Tensor,
    quant_state: QuantState | None = None,
    absmax: Tensor | None = None,
    out: Tensor | None = None,
    blocksize: int | None = None,
) -> Tensor:
    return dequantize_4bit(A, quant_state, absmax, out, blocksize, "fp4")


def dequantize_nf4(
    A: Tensor,
    quant_state: QuantState | None = None,
    absmax: Tensor | None = None,
    out: Tensor | None = None,
    blocksize: int | None = None,
) -> Tensor:
    return dequantize_4bit(A, quant_state, absmax, out, blocksize, "nf4")


def gemv_4bit(
    A: Tensor,
    B: Tensor,
    out: Tensor | None = None,
    transposed_A: bool = False,
    transposed_B: bool = False,
    state: QuantState | None = None,
) -> Tensor:
    """A row, (..., K) with one element along the rest, times a packed weight (N, K), transposed."""
    if state is None:
        raise InputError("gemv_4bit needs the state that quantize_4bit gave; got state=None")
    if A.numel() != A.shape[-1]:
        raise InputError(f"gemv_4bit multiplies one row; got {tuple(A.shape)}")
    return _into(out, functional.linear_4bit(A, column(B), state))


def column(packed: Tensor) -> Tensor:
    """Packed codes as a column, from a column or its transpose; no copy where they lie together."""
    return packed if packed.is_contiguous() else packed.reshape(-1, 1)


def _into(out: Tensor | None, value: Tensor) -> Tensor:
    return value if out is None else out.copy_(value)


def get_4bit_type(typename: str, device: torch.device | str | None = None, blocksize: int = 64) -> Tensor:
    """The sixteen levels of nf4, fp4, int4 or af4, scaled to a largest magnitude of 1; on the accelerator if any."""
    if device is None:
        device = torch.accelerator.current_accelerator() or "cpu"
    return torch.tensor(codebooks.table_4bit(typename, blocksize), dtype=torch.float32, device=device)


# -- 8 bit ---------------------------------------------------------------------------------------------------


def quantize_blockwise(
    A: Tensor,
    code: Tensor | None = None,
    absmax: Tensor | None = None,
    out: Tensor | None = None,
    blocksize: int = 4096,
    nested: bool = False,
) -> tuple[Tensor, QuantState]:
    """Codes of A's shape and their state; absmax and out are filled and used in place of new tensors."""
    table = (_dynamic() if code is None else code).to(A.device, torch.float32)
    codes, state = functional.quantize_8bit(A, codebook=table, blocksize=blocksize)
    state.shape = None  # what bitsandbytes leaves there: codes have their tensor's shape
    if nested:
        state.offset = functional.pairwise_mean(state.absmax)
        state.absmax, state.state2 = quantize_blockwise(state.absmax - state.offset, blocksize=blocksize)
    if absmax is not None:
        state.absmax = absmax.copy_(state.absmax)
    return codes if out is None else out.copy_(codes), state


def dequantize_blockwise(
    A: Tensor,
    quant_state: QuantState | None = None,
    absmax: Tensor | None = None,
    code: Tensor | None = None,
    out: Tensor | None = None,
    blocksize: int = 4096,
    nested: bool = False,
) -> Tensor:
    """The tensor of codes.  Without quant_state, absmax gives the statistics, and the result is float32.

    nested is what the state says, whatever the argument.
    """
    if quant_state is None:
        if absmax is None:
            raise InputError("dequantize_blockwise needs quant_state or absmax; got neither")
        code = _dynamic() if code is None else code
        quant_state = QuantState(absmax, None, code, blocksize, None, torch.float32)
    absmax, table = quant_state.absmax, quant_state.code
    if quant_state.state2 is not None and quant_state.offset is not None:
        absmax = dequantize_blockwise(quant_state.absmax, quant_state.state2) + quant_state.offset
    if table is None:
        raise InputError("dequantize_blockwise needs a state with a code table; got none")
    plain = QuantState(
        absmax.float(), None, table.to(A.device, torch.float32), quant_state.blocksize, None, quant_state.dtype
    )
    return _into(out, functional.dequantize_8bit(A, plain))


def _dynamic() -> Tensor:
    if "dynamic" not in name2qmap:
        name2qmap["dynamic"] = create_dynamic_map()
    return name2qmap["dynamic"]


# -- LLM.int8() ----------------------------------------------------------------------------------------------


def int8_vectorwise_quant(A: Tensor, threshold: float = 0.0) -> tuple[Tensor, Tensor, Tensor | None]:
    """int8 rows, their absmax and, for a threshold above 0, the indices of the columns with outliers."""
    q, absmax, outliers = functional.quantize_int8_rows(A, threshold=threshold)
    return q, absmax, outliers.nonzero().flatten() if threshold > 0 else None


def int8_vectorwise_dequant(A: Tensor, stats: Tensor) -> Tensor:
    """float32 of int8 rows."""
    return functional.dequantize_int8(A, stats)


def int8_double_quant(
    A: Tensor,
    col_stats: Tensor | None = None,
    row_stats: Tensor | None = None,
    out_col: Tensor | None = None,
    out_row: Tensor | None = None,
    threshold: float = 0.0,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor | None]:
    """A quantized by rows and by columns: (rows, columns, row_stats, col_stats, outlier columns)."""
    rows, by_row, outliers = int8_vectorwise_quant(A, threshold)
    columns, by_column = functional.quantize_int8_columns(A, threshold=threshold)
    return (
        _into(out_row, rows),
        _into(out_col, columns),
        _into(row_stats, by_row),
        _into(col_stats, by_column),
        outliers,
    )


def int8_linear_matmul(A: Tensor, B: Tensor, out: Tensor | None = None, dtype: torch.dtype = torch.int32) -> Tensor:
    """The integer product of int8 (..., K) and (N, K), transposed: int32 (..., N)."""
    rows = A.reshape(math.prod(A.shape[:-1]), A.shape[-1])
    product: Tensor = torch.ops.halfbyte.matmul_int8.default(rows, B)
    return _into(out, product.reshape(*A.shape[:-1], B.shape[0]).to(dtype))


def int8_mm_dequant(
    A: Tensor, row_stats: Tensor, col_stats: Tensor, out: Tensor | None = None, bias: Tensor | None = None
) -> Tensor:
    """float16 of an integer product of rows with statistics."""
    x: Tensor = torch.ops.halfbyte.dequantize_int8.default(A, row_stats.float(), col_stats.float(), bias, torch.float16)
    return _into(out, x)


# -- optimizers ----------------------------------------------------------------------------------------------

RULES = {"lamb": "adam", "lars": "momentum"}  # bitsandbytes' names of rules that have another one here


def optimizer_update_32bit(
    optimizer_name: str,
    g: Tensor,
    p: Tensor,
    state1: Tensor,
    beta1: float,
    eps: float,
    step: int,
    lr: float,
    state2: Tensor | None = None,
    beta2: float = 0.0,
    beta3: float = 0.0,
    alpha: float = 0.0,
    weight_decay: float = 0.0,
    gnorm_scale: float = 1.0,
    unorm_vec: Tensor | None = None,
    max_unorm: float = 0.0,
    skip_zeros: bool = False,
) -> None:
    """One step of a parameter with float32 states, in place.  unorm_vec is not needed and not written."""
    torch.ops.halfbyte.update_32bit.default(
        RULES.get(optimizer_name, optimizer_name),
        [p],
        [g],
        [state1],
        [] if state2 is None else [state2],
        *_hyper(step, lr, gnorm_scale, (beta1, beta2, beta3), eps, weight_decay, alpha, max_unorm, skip_zeros),
    )


def optimizer_update_8bit_blockwise(
    optimizer_name: str,
    g: Tensor,
    p: Tensor,
    state1: Tensor,
    state2: Tensor | None,
    beta1: float,
    beta2: float,
    beta3: float,
    alpha: float,
    eps: float,
    step: int,
    lr: float,
    qmap1: Tensor,
    qmap2: Tensor | None,
    absmax1: Tensor,
    absmax2: Tensor | None,
    weight_decay: float = 0.0,
    gnorm_scale: float = 1.0,
    skip_zeros: bool = False,
) -> None:
    """One step of a parameter with 8-bit states, in place."""
    torch.ops.halfbyte.update_8bit.default(
        RULES.get(optimizer_name, optimizer_name),
        [p],
        [g],
        [state1],
        [absmax1],
        qmap1,
        [] if state2 is None else [state2],
        [] if absmax2 is None else [absmax2],
        qmap2,
        OPTIMIZER_BLOCKSIZE,
        *_hyper(step, lr, gnorm_scale, (beta1, beta2, beta3), eps, weight_decay, alpha, 0.0, skip_zeros),
    )


def _hyper(
    step: int,
    lr: float,
    gnorm_scale: float,
    betas: tuple[float, float, float],
    eps: float,
    weight_decay: float,
    alpha: float,
    max_unorm: float,
    skip_zeros: bool,
) -> tuple[Any, ...]:
    """The arguments that both update ops end with; alpha and beta3 come with their schedules applied."""
    number = torch.float64  # on the host
    scale = None if gnorm_scale == 1.0 else torch.tensor(gnorm_scale, dtype=number)
    first = torch.tensor(float(step), dtype=number), torch.tensor(float(lr), dtype=number), scale
    return *first, list(betas), eps, weight_decay, alpha, 0, 0, max_unorm, skip_zeros, []


# -- memory --------------------------------------------------------------------------------------------------


class GlobalPageManager:
    """The tensors that get_paged gave, until they are freed.  There is nothing to prefetch: see get_paged."""

    _instance: GlobalPageManager | None = None

    def __init__(self) -> None:
        raise RuntimeError("there is one manager per process: call GlobalPageManager.get_instance()")

    @classmethod
    def get_instance(cls) -> GlobalPageManager:
        if cls._instance is None:
            cls._instance = cls.__new__(cls)
            cls._instance.initialize()
        return cls._instance

    def initialize(self) -> None:
        self.paged_tensors: list[Tensor] = []

    def prefetch_all(self, to_cpu: bool = False) -> None:
        return None


def get_paged(
    *shape: int, dtype: torch.dtype = torch.float32, device: torch.device | str = FIRST_CUDA_DEVICE
) -> Tensor:
    """Zeros marked as paged, on the device, or the host where it is missing: only optimizers page their states."""
    device = torch.device(device)
    found = torch.accelerator.current_accelerator(check_available=True)
    there = device if device.type == "cpu" or (found is not None and found.type == device.type) else "cpu"
    tensor: Any = torch.zeros(shape, dtype=dtype, device=there)
    tensor.is_paged, tensor.page_deviceid = True, device.index or 0
    return tensor  # type: ignore[no-any-return]


def prefetch_tensor(A: Tensor, to_cpu: bool = False) -> None:
    """Raises InputError for a tensor that get_paged did not give; otherwise there is nothing to do."""
    if not getattr(A, "is_paged", False):
        raise InputError("only tensors that get_paged gave can be prefetched")


def fill(A: Tensor, value: float, device: torch.device | None = None, prefetch: bool = True) -> None:
    A.fill_(value)


def is_on_gpu(tensors: Iterable[Tensor | None]) -> bool:
    """True.  Raises InputError for tensors on several devices; paged ones may lie anywhere."""
    devices = {one.device for one in tensors if one is not None and not getattr(one, "is_paged", False)}
    if len(devices) > 1:
        raise InputError(f"all tensors must be on one device; got {', '.join(sorted(map(str, devices)))}")
    return True


def get_ptr(A: Tensor | None) -> ctypes.c_void_p | None:
    return None if A is None else ctypes.c_void_p(A.data_ptr())


def has_avx512bf16() -> bool:
    """False: here it asks whether weights are repacked on the CPU, and they never are."""
    return False
