"""Portable random tensors: made from PCG64's raw bits, so every machine and every numpy draws the same ones."""

from __future__ import annotations

import zlib
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

# What a float tensor may be filled with.  "ties" and "edges" need the levels that an op rounds at.
VALUES = ("normal", "zeros", "equal", "nan", "inf", "tiny", "ties", "edges")

_TINY = {torch.float32: 2.0**-140, torch.bfloat16: 2.0**-130, torch.float16: 2.0**-22}  # subnormal


class Draw:
    """A stream of tensors on the CPU, the same for the same seed.

    seed    any text
    values  one of VALUES: what `floats` is filled with
    """

    def __init__(self, seed: str, values: str = "normal") -> None:
        if values not in VALUES:
            raise ValueError(f"values must be one of {', '.join(VALUES)}; got {values!r}")
        # random_raw and not Generator: numpy promises the same bits for ever only for the former (NEP 19).
        self._bits = np.random.PCG64(zlib.crc32(seed.encode()))
        self.values = values

    def _uniform(self, n: int) -> np.ndarray[tuple[int], np.dtype[np.float64]]:
        """In [0, 1), multiples of 2^-24."""
        return (self._bits.random_raw(n) >> np.uint64(40)).astype(np.float64) * 2.0**-24

    def floats(
        self,
        shape: Sequence[int],
        dtype: torch.dtype,
        *,
        levels: Sequence[float] = (),
        top: float = 1.0,
    ) -> Tensor:
        """A float tensor, filled as `values` says.

        levels  where the op rounds when a block's largest magnitude is `top`: "ties" are exactly there, "edges"
                up to two ulps around, for another largest magnitude
        """
        n = int(np.prod(shape, dtype=np.int64))
        normal = (self._uniform(4 * n).reshape(4, n).sum(0) - 2) * 1.7  # near enough: the sum of four uniforms
        normal = normal.astype(np.float32)
        flat = torch.from_numpy(normal)
        if self.values == "zeros":
            flat = torch.zeros(n)
        elif self.values == "equal":
            flat = torch.full((n,), -0.7216)
        elif self.values == "tiny":
            flat = (flat.double() * _TINY[dtype]).float()
        elif self.values in ("nan", "inf") and n:
            flat[1 % n :: 97] = float(self.values)
            flat[n // 2] = -float(self.values)
        elif self.values in ("ties", "edges") and len(levels):
            flat = torch.from_numpy(self._around(n, np.asarray(levels, np.float32), np.float32(top)))
        return flat.to(dtype).reshape(tuple(shape))

    def _around(
        self, n: int, levels: np.ndarray[tuple[int], np.dtype[np.float32]], top: np.float32
    ) -> np.ndarray[tuple[int], np.dtype[np.float32]]:
        """Every level in turn; one value in sixteen is the block's largest."""
        if self.values == "edges":
            scale = np.float32(0.51 + self._uniform(1)[0])
            top, levels = top * scale, levels * scale
        found = levels[np.arange(n) * 7 % len(levels)]  # a step of 7, so that a block of 32 sees the whole range
        if self.values == "edges":
            ulps = (self._bits.random_raw(n) % np.uint64(5)).astype(np.int32) - 2
            found = (found.view(np.int32) + ulps).view(np.float32)
        found[::16] = top
        return found

    def positive(self, shape: Sequence[int]) -> Tensor:
        """float32 in [1/64, 2)."""
        n = int(np.prod(shape, dtype=np.int64))
        return torch.from_numpy((2.0**-6 + self._uniform(n) * 1.98).astype(np.float32)).reshape(tuple(shape))

    def integers(self, low: int, high: int, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """From low to high, both included."""
        n = int(np.prod(shape, dtype=np.int64))
        drawn = (self._bits.random_raw(n) >> np.uint64(16)) % np.uint64(high - low + 1)
        return torch.from_numpy(drawn.astype(np.int64) + low).to(dtype).reshape(tuple(shape))
