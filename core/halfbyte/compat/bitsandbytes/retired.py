"""What bitsandbytes calls deprecated or no longer uses: int8 products, element-wise changes, a pool of outliers.

They are served for old scripts; nothing else here uses them.  bitsandbytes runs them on GPUs alone.
"""

from __future__ import annotations

import warnings

import torch
from torch import Tensor

from ...errors import InputError

__all__ = ["GlobalOutlierPooler", "batched_igemm", "check_matmul", "elementwise_func", "igemm"]


def check_matmul(
    A: Tensor,
    B: Tensor,
    out: Tensor | None,
    transposed_A: bool,
    transposed_B: bool,
    expected_type: torch.dtype = torch.int8,
) -> tuple[int, ...]:
    """The shape of A @ B: of out where it is given.  2 x 2, 3 x 2 and 3 x 3 dimensions; transposing turns the last two.

    Raises TypeError for other element types, InputError for shapes that do not fit.
    """
    _deprecated("check_matmul")
    return _product_shape(A, B, out, transposed_A, transposed_B, expected_type)


def igemm(
    A: Tensor, B: Tensor, out: Tensor | None = None, transposed_A: bool = False, transposed_B: bool = False
) -> Tensor:
    """int32 A @ B of int8 matrices.

    (b, s, i) with (b, s, o) and an out of (i, o) is the sum over b and s of their outer products, the gradient of a
    weight.
    """
    _deprecated("igemm")
    shape = _product_shape(A, B, out, transposed_A, transposed_B)
    if A.dim() == B.dim() == 3 and len(shape) == 2:
        return _into(out, _rows_times_rows(A.flatten(0, 1).t(), B.flatten(0, 1).t()))
    return _into(out, _multiply(_turned(A, transposed_A), _turned(B, transposed_B)))


def batched_igemm(
    A: Tensor, B: Tensor, out: Tensor | None = None, transposed_A: bool = False, transposed_B: bool = False
) -> Tensor:
    """int32 (b, m, n) of int8 (b, m, k) and (b, k, n)."""
    _deprecated("batched_igemm")
    if A.dim() != 3 or B.dim() != 3:
        raise InputError(f"batched_igemm needs 3 dimensions; got {tuple(A.shape)} and {tuple(B.shape)}")
    _product_shape(A, B, out, transposed_A, transposed_B)
    return _into(out, _multiply(_turned(A, transposed_A), _turned(B, transposed_B)))


def _product_shape(
    A: Tensor,
    B: Tensor,
    out: Tensor | None,
    transposed_A: bool,
    transposed_B: bool,
    expected_type: torch.dtype = torch.int8,
) -> tuple[int, ...]:
    if A.dtype != expected_type or B.dtype != expected_type:
        raise TypeError(f"both factors must be {expected_type}; got {A.dtype} and {B.dtype}")
    if (A.dim(), B.dim()) not in ((2, 2), (3, 2), (3, 3)):
        raise InputError(f"factors must have 2 or 3 dimensions, the first no fewer; got {A.dim()} and {B.dim()}")
    left, right = _turned(A, transposed_A).shape, _turned(B, transposed_B).shape
    contracted = A.dim() == B.dim() == 3 and A.shape[:2] == B.shape[:2]
    if contracted and out is not None and out.shape == (A.shape[2], B.shape[2]):
        return tuple(out.shape)
    if left[-1] != right[-2] or (B.dim() == 3 and left[0] != right[0]):
        raise InputError(f"shapes must fit for a product; got {tuple(left)} and {tuple(right)}, as they are multiplied")
    shape = (*left[:-1], right[-1])
    if out is not None and out.shape != shape:
        raise InputError(f"out must be {shape}; got {tuple(out.shape)}")
    return shape


def _turned(x: Tensor, transposed: bool) -> Tensor:
    return x.mT if transposed else x


def _multiply(left: Tensor, right: Tensor) -> Tensor:
    if right.dim() == 2:
        return _rows_times_rows(left.reshape(-1, left.shape[-1]), right.t()).reshape(*left.shape[:-1], right.shape[-1])
    products = [_rows_times_rows(one, other.t()) for one, other in zip(left, right, strict=True)]
    empty = torch.empty((0, left.shape[1], right.shape[2]), dtype=torch.int32, device=left.device)
    return torch.stack(products) if products else empty


def _rows_times_rows(left: Tensor, right: Tensor) -> Tensor:
    product: Tensor = torch.ops.halfbyte.matmul_int8.default(left.contiguous(), right.contiguous())
    return product


def _into(out: Tensor | None, value: Tensor) -> Tensor:
    return value if out is None else out.copy_(value)


def elementwise_func(func_name: str, A: Tensor, B: Tensor | None, value: float, prefetch: bool = True) -> None:
    """Change A in place: "fill" it with value, number its elements ("arange"), or multiply it by B ("_mul").

    Raises NotImplementedError for another name, or elements that are neither float32 nor uint8.
    """
    served = ("fill", "arange", "_mul") if A.dtype == torch.float32 else ("fill",) if A.dtype == torch.uint8 else ()
    if func_name not in served:
        raise NotImplementedError(f"elementwise_func has {', '.join(served) or 'nothing'} for {A.dtype}: {func_name!r}")
    if func_name == "fill":
        A.fill_(value)
    elif func_name == "arange":
        A.copy_(torch.arange(A.numel(), dtype=A.dtype, device=A.device).reshape(A.shape))
    elif B is None:
        raise InputError("_mul needs a second tensor; got None")
    else:
        A.mul_(B)


class GlobalOutlierPooler:
    """A set of outlier columns for the whole process.  No layer reads it: each finds the outliers of its own input."""

    _instance: GlobalOutlierPooler | None = None

    def __init__(self) -> None:
        raise RuntimeError("there is one pooler per process: call GlobalOutlierPooler.get_instance()")

    @classmethod
    def get_instance(cls) -> GlobalOutlierPooler:
        if cls._instance is None:
            cls._instance = cls.__new__(cls)
            cls._instance.initialize()
        return cls._instance

    def initialize(self) -> None:
        self.outliers: set[int] = set()
        self.model_dim: int | None = None

    def add_outliers(self, outlier_idx: Tensor, feature_dim: int) -> None:
        """Add columns of an input of feature_dim columns; another width than the first one's is passed over."""
        if self.model_dim is None:
            self.model_dim = feature_dim
        if feature_dim == self.model_dim:
            self.outliers.update(outlier_idx.tolist())

    def get_current_outlier_idx(self) -> Tensor:
        """int64, in ascending order."""
        return torch.tensor(sorted(self.outliers), dtype=torch.int64)


def _deprecated(name: str) -> None:
    warnings.warn(f"bitsandbytes deprecates {name}; use torch.ops.halfbyte.matmul_int8", FutureWarning, stacklevel=3)
