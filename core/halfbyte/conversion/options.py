"""How to quantize a checkpoint, checked at birth."""

from __future__ import annotations

import math
from dataclasses import dataclass

from ..errors import InputError
from ..ops.checks import blocksize_4bit
from ..quantize import FORMATS, require_device

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
        blocksize_4bit(self.blocksize)
        if self.nested and self.format == "int8":
            raise InputError("nested needs a 4-bit format (nf4, fp4): int8 has one scale per row and no blocks")
        if not (math.isfinite(self.threshold) and self.threshold >= 0):
            raise InputError(f"threshold must be 0 (no outliers) or a positive number; got {self.threshold}")
        if self.compute_dtype not in COMPUTE_DTYPES:
            raise InputError(f"compute dtype must be one of {', '.join(COMPUTE_DTYPES)}; got {self.compute_dtype!r}")
        require_device(self.device)
