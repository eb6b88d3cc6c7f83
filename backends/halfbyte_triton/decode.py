"""Decoding of 4-bit codes in registers, as assembly of NVIDIA GPUs: a table of sixteen 16-bit levels without memory.

`prmt` picks four bytes of eight by four 3-bit numbers, which the low 16 bits of four codes' nibbles are.  Low and
high bytes of levels 0..7 and 8..15 are four such tables; bit 3 of each code, spread over a byte by prmt's sign mode,
chooses between the halves.  A word of eight codes costs 21 instructions and no look-up in memory.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from halfbyte import formats


@functools.cache
def assembly(format: str, dtype: torch.dtype) -> str:
    """PTX for `tl.inline_asm_elementwise`: a word of eight codes and the four of `words` -> four words of two levels.

    Byte i of the codes gives word i; the earlier level, that of the high nibble, is in its low half.
    """
    low, high = _bytes(format, dtype)
    lines = [
        "shl.b32 up, $4, 4;",  # brings bit 3 of the low nibbles to the sign of each byte
        "and.b32 index, $4, 0x77777777;",
    ]
    for half, signs in enumerate(("0x9d8c", "0xbfae")):
        lines += [
            f"prmt.b32 sign, $4, up, {signs};",
            f"prmt.b32 a, $5, {_word(low[4:8]):#x}, index;",
            f"prmt.b32 b, $6, {_word(low[12:16]):#x}, index;",
            "lop3.b32 lows, sign, b, a, 0xca;",  # sign ? b : a
            f"prmt.b32 a, $7, {_word(high[4:8]):#x}, index;",
            f"prmt.b32 b, $8, {_word(high[12:16]):#x}, index;",
            "lop3.b32 highs, sign, b, a, 0xca;",
            # Per byte of codes: the high nibble, which comes first, into the low half.
            f"prmt.b32 ${2 * half}, lows, highs, 0x4051;",
            f"prmt.b32 ${2 * half + 1}, lows, highs, 0x6273;",
            *(["shr.b32 index, index, 16;"] if half == 0 else []),
        ]
    return "{ .reg .b32 up, index, sign, a, b, lows, highs; " + " ".join(lines) + " }"


@functools.cache
def words(format: str, dtype: torch.dtype, device: torch.device) -> Tensor:
    """The words of the tables that have to be in registers, int32 (16,), once for each thread of a quad.

    They come from memory, as of a constant the assembler would make a copy at every use.
    """
    low, high = _bytes(format, dtype)
    four = [_word(part) for part in (low[0:4], low[8:12], high[0:4], high[8:12])]
    return torch.tensor([value - (value >> 31 << 32) for value in four] * 4, dtype=torch.int32, device=device)


def _bytes(format: str, dtype: torch.dtype) -> tuple[list[int], list[int]]:
    """Low and high bytes of the levels."""
    levels = torch.tensor(formats.FORMATS[format].levels).to(dtype).view(torch.int16)
    bits = [value & 0xFFFF for value in levels.tolist()]
    return [value & 0xFF for value in bits], [value >> 8 for value in bits]


def _word(four: list[int]) -> int:
    return int.from_bytes(bytes(four), "little")
