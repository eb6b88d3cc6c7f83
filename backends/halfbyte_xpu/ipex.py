"""linear_4bit by the weight-only linear of intel-extension-for-pytorch (IPEX), for programs that have imported it.

Its development ended with 2.8.  Importing it changes global state, so that is the program's to do; and our own
kernels come first, as nothing has been measured.
"""

from __future__ import annotations

import sys
from collections.abc import Collection, Mapping
from typing import Any

import torch
from torch import Tensor

from halfbyte.derived import derived
from halfbyte.errors import KernelUnusable

MODULE = "intel_extension_for_pytorch"

LIMITS: Mapping[str, Collection[object]] = {
    "format": {"nf4"},
    "blocksize": {32, 64, 128},
    "nested": {False},
    "dtype": {torch.float32, torch.bfloat16},
}

# Of IPEX 2.8, quantization/_qconfig.py: WoqWeightDtype.NF4, WoqLowpMode.NONE, WoqActQuantMode.NONE.
_NF4, _LOWP_NONE, _ACT_NONE = 3, 0, -1


def why_not(facts: Any) -> tuple[str, ...]:
    """Reasons against: the rule of the kernel."""
    if MODULE not in sys.modules:
        return (f"{MODULE} is not imported",)
    if not hasattr(torch.ops.torch_ipex, "ipex_woq_linear"):
        return (f"this build of {MODULE} has no weight-only linear",)
    return ()


def linear_4bit(
    x: Tensor,
    packed: Tensor,
    absmax: Tensor,
    nested_absmax: None,
    nested_codebook: None,
    offset: None,
    bias: Tensor | None,
    format: str,
    blocksize: int,
    out_features: int,
) -> Tensor:
    """x @ weight^T + bias, for NF4 with one float32 scale per block.

    Raises KernelUnusable where blocks cross rows, which IPEX's groups cannot.
    """
    k = x.shape[-1]
    if k % blocksize:
        raise KernelUnusable(f"in_features={k} is no multiple of blocksize={blocksize}")
    key = ("ipex", absmax.data_ptr(), absmax._version, blocksize, out_features)
    context = derived(packed, key, lambda: _prepacked(packed, absmax, blocksize, out_features, k))
    y: Tensor = torch.ops.torch_ipex.ipex_woq_linear(x, context.get_data_handle())
    return y if bias is None else y + bias


def _prepacked(packed: Tensor, absmax: Tensor, blocksize: int, n: int, k: int) -> Any:
    """IPEX's own layout.  It takes rows of bytes with the first of two codes in the low nibble, ours is in the high."""
    codes = (packed << 4 | packed >> 4).view(n, k // 2)
    scales = absmax[: n * k // blocksize].view(n, k // blocksize)
    return torch.ops.ipex_prepack.weight_only_qlinear_prepack(
        codes, _NF4, [n, k], scales, None, None, None, None, blocksize, _LOWP_NONE, _ACT_NONE, False
    )
