"""Code tables made by recipe: what bitsandbytes' users build for block-wise quantization, as 256 float32 values.

The two dynamic maps of 8 bits that checkpoints use are constants and stand in formats.py.  The recipes below are
computed in double precision and rounded where float32 arithmetic with fused multiply-add would round, so that every
machine gives the same digits; tests/compat/test_codebooks.py holds the checksums.
"""

from __future__ import annotations

import itertools
import statistics
import struct
from collections.abc import Iterable

import torch
from torch import Tensor

from . import formats
from .errors import InputError

ENTRIES = 256

# Yoshida 2023, NF4 Isn't Information Theoretically Optimal, table 1 (arXiv 2306.06965): for blocks of 64.
_AF4 = (
    *(-1.0, -0.69441008, -0.51243739, -0.3736951, -0.25607552, -0.14982478, -0.04934812, 0.0),
    *(0.04273164, 0.12934483, 0.21961274, 0.31675666, 0.42563882, 0.55496234, 0.72424863, 1.0),
)


class UnsupportedTable(InputError, NotImplementedError):
    """A table that bitsandbytes too answers with NotImplementedError."""


def dynamic_map(signed: bool = True, max_exponent_bits: int = 7, total_bits: int = 8) -> Tensor:
    """Dynamic-tree quantization: decades of numbers, each split evenly, the largest one finest.

    Raises InputError where the decades do not make up 2^total_bits values, such as most unsigned ones.

    Source: Dettmers et al. 2022, 8-bit Optimizers via Block-wise Quantization, section 2.2 (arXiv 2110.02861).
    """
    if (max_exponent_bits, total_bits) == (7, 8):
        name = "dynamic" if signed else "dynamic_unsigned"
        return formats.codebook(name, torch.device("cpu")).clone()
    bits = total_bits - 1
    values = [0.0, 1.0]
    for i in range(max_exponent_bits):
        exponent = i + bits - max_exponent_bits + (0 if signed else 1)
        values += _decade(int(2.0**exponent + 1), i - max_exponent_bits + 1, signed)
    if (extra := int(2.0 ** (bits - max_exponent_bits)) - 1) > 0:
        values += _decade(extra + 1, 0, signed)
    if len(values) != 2**total_bits:
        kind = "signed" if signed else "unsigned"
        raise InputError(
            f"{max_exponent_bits} {kind} decades make {len(values)} values; {total_bits} bits take {2**total_bits}"
        )
    return _filled(values)


def _decade(points: int, exponent: int, signed: bool) -> list[float]:
    """Midpoints of so many even steps from 0.1 to 1, times a power of ten."""
    bounds = _even(0.1, 1.0, points)
    scale = _single(10.0**exponent)
    means = [_single(_single(_single(a + b) / 2) * scale) for a, b in itertools.pairwise(bounds)]
    return means + [-mean for mean in means] if signed else means


def linear_map(signed: bool = True, total_bits: int = 8, add_zero: bool = True) -> Tensor:
    """Evenly spaced values from -1 (or 0) to 1; what is left of the 256 entries are zeros in the middle."""
    count = 2**total_bits
    if signed and (add_zero or total_bits < 8):
        count -= 1  # symmetric around 0
    values = _even(-1.0 if signed else 0.0, 1.0, count)
    half = len(values) // 2
    return torch.tensor([*values[:half], *[0.0] * (ENTRIES - count), *values[half:]])


def fp8_map(signed: bool = True, exponent_bits: int = 5, precision_bits: int = 2, total_bits: int = 8) -> Tensor:
    """The values of a small float format, subnormals included, scaled to a largest one of 1.

    Raises InputError where sign, exponent and precision do not make up total_bits.
    """
    if exponent_bits + precision_bits + bool(signed) != total_bits:
        made = f"{exponent_bits} + {precision_bits}" + (" + 1 for the sign" if signed else "")
        raise InputError(f"exponent_bits + precision_bits must be {total_bits}; got {made}")
    bias = 2 ** (exponent_bits - 1)
    values = []
    for exponent in range(2**exponent_bits):
        for fraction in range(2**precision_bits):
            significand = fraction / 2**precision_bits + (exponent > 0)
            value = significand * 2.0 ** (-bias if exponent == 0 else bias + 1 - exponent)
            values += [value, -value] if signed else [value]
    table = _filled(values)
    return table / table.max()


def normal_map(offset: float = 0.9677083, use_extra_value: bool = True) -> Tensor:
    """Quantiles of the normal distribution, scaled to a largest one of 1: the levels of NF4.

    offset           the probability whose quantile becomes 1
    use_extra_value  eight positive levels instead of seven; the negative ones are always seven

    Source: Dettmers et al. 2023, QLoRA, appendix E (arXiv 2305.14314).
    """
    quantile = statistics.NormalDist().inv_cdf
    positive = [_single(quantile(p)) for p in _even(offset, 0.5, 9 if use_extra_value else 8)[:-1]]
    negative = [-_single(quantile(p)) for p in _even(offset, 0.5, 8)[:-1]]
    levels = sorted([*positive, *negative, *[0.0] * (ENTRIES - len(positive) - len(negative))])
    table = torch.tensor(levels)
    return table / table.max()


def table_4bit(name: str, blocksize: int = 64) -> tuple[float, ...]:
    """The sixteen levels of a 4-bit type by code: a format of the ops, or "int4" or "af4", of which only the tables
    exist.

    Raises UnsupportedTable for another name, and for af4 with another block size than 64.
    """
    if name in formats.FORMATS:
        return formats.FORMATS[name].levels
    if name == "int4":
        return tuple(code / 7 for code in (*range(7, 0, -1), 0, 0, *range(-1, -8, -1)))
    if name == "af4":
        if blocksize != 64:
            raise UnsupportedTable(f"af4 has levels for blocksize 64 only; got {blocksize}")
        return _AF4[::-1]
    raise UnsupportedTable(f"a 4-bit type must be one of {', '.join(formats.FORMATS)}, int4, af4; got {name!r}")


def _even(first: float, last: float, count: int) -> list[float]:
    """Evenly spaced float32 values, from both ends to the middle, with one rounding each."""
    if count == 1:
        return [_single(first)]
    first, last = _single(first), _single(last)
    step = _single((last - first) / (count - 1))
    near, far = range(count // 2), range(count // 2, count)
    return [_single(step * k + first) for k in near] + [_single(last - step * (count - 1 - k)) for k in far]


def _filled(values: Iterable[float]) -> Tensor:
    listed = list(values)
    return torch.tensor(sorted([*listed, *[0.0] * (ENTRIES - len(listed))]))


def _single(value: float) -> float:
    """Rounded to float32."""
    rounded: float = struct.unpack("<f", struct.pack("<f", value))[0]
    return rounded
