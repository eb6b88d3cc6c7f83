"""Checks of op arguments that several families share.  Each raises InputError with what was found and what works."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import formats
from ..errors import InputError
from ..kernel import show

FLOATS = (torch.float32, torch.float16, torch.bfloat16)


def floating(name: str, dtype: torch.dtype) -> None:
    if dtype not in FLOATS:
        raise InputError(f"{name} must be {', '.join(map(show, FLOATS))}; got {show(dtype)}")


def dtype_is(name: str, tensor: Tensor, *dtypes: torch.dtype) -> None:
    if tensor.dtype not in dtypes:
        raise InputError(f"{name} must be {' or '.join(map(show, dtypes))}; got {show(tensor.dtype)}")


def same_device(name: str, tensor: Tensor | None, device: torch.device) -> None:
    if tensor is not None and tensor.device != device:
        raise InputError(f"all tensors must be on one device; {name} is on {tensor.device}, the first one on {device}")


def bias_fits(bias: Tensor, x: Tensor, out_features: int) -> None:
    """The bias of a linear layer, (out_features,) of x's dtype and device."""
    if bias.dtype is not x.dtype or bias.device != x.device or bias.shape != (out_features,):
        dtype_is("bias", bias, x.dtype)
        same_device("bias", bias, x.device)
        raise InputError(f"bias must have shape ({out_features},); got {tuple(bias.shape)}")


def format_4bit(format: str, blocksize: int) -> None:
    if format not in formats.FORMATS:
        raise InputError(f"format must be one of {', '.join(formats.FORMATS)}; got {format!r}")
    blocksize_4bit(blocksize)


def blocksize_4bit(blocksize: int) -> None:
    if not isinstance(blocksize, int) or blocksize not in formats.BLOCKSIZES:  # 64.0 is in there, too
        raise InputError(f"blocksize must be one of {', '.join(map(str, formats.BLOCKSIZES))}; got {blocksize!r}")


def length(name: str, tensor: Tensor, expected: int, why: str) -> None:
    """At least `expected` elements: trailing extra entries are tolerated, as some writers emit them."""
    if tensor.numel() < expected:
        raise InputError(f"{name} must have {expected} elements for {why}; got {tensor.numel()}")
