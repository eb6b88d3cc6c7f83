"""How to quantize a checkpoint, checked at birth."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from .. import formats
from ..errors import InputError
from ..quantize import FORMATS

COMPUTE_DTYPES = ("bfloat16", "float16", "float32")


@dataclass(frozen=True)
class Options:
    """How to quantize.

    format         "nf4", "fp4" or "int8"
    blocksize      4-bit: elements that share one absmax
    nested         4-bit: quantize the absmax too
    threshold      int8: magnitude from which an activation is an outlier
    compute_dtype  4-bit: what the loaded layers compute in
    device         where to quantize

    Raises InputError.
    """

    format: str
    blocksize: int = 64
    nested: bool = False
    threshold: float = 6.0
    compute_dtype: str = "bfloat16"
    device: str = "cpu"

    def __post_init__(self) -> None:
        if self.format not in FORMATS:
            raise InputError(f"format must be one of {', '.join(FORMATS)}; got {self.format!r}")
        if self.blocksize not in formats.BLOCKSIZES:
            allowed = ", ".join(map(str, formats.BLOCKSIZES))
            raise InputError(f"blocksize must be one of {allowed}; got {self.blocksize}")
        if self.nested and self.format == "int8":
            raise InputError("nested needs a 4-bit format (nf4, fp4): int8 has one scale per row and no blocks")
        if not (math.isfinite(self.threshold) and self.threshold >= 0):
            raise InputError(f"threshold must be 0 (no outliers) or a positive number; got {self.threshold}")
        if self.compute_dtype not in COMPUTE_DTYPES:
            raise InputError(f"compute dtype must be one of {', '.join(COMPUTE_DTYPES)}; got {self.compute_dtype!r}")
        try:
            torch.zeros(1, device=self.device).item()
        except Exception as error:  # torch raises what it likes here: RuntimeError, AssertionError, NotImplementedError
            raise InputError(f"device {self.device!r} cannot be used: {str(error).splitlines()[0]}") from error
