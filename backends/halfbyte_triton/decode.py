"""Decoding of 4-bit codes in registers, as assembly of NVIDIA GPUs: a table of sixteen 16-bit levels without memory.

`prmt` picks four bytes of eight by four 3-bit numbers, which the low 16 bits of four codes' nibbles are.  Low and
high bytes of levels 0..7 and 8..15 are four such tables; bit 3 of each code, spread over a byte by prmt's sign mode,
chooses between the halves.  A word of eight codes costs 21 instructions and no look-up in memory.
"""

from __future__ import annotations

import functools
import struct

import torch

from halfbyte import formats


@functools.cache
def assembly(format: str, dtype: torch.dtype) -> str:
    """PTX for `tl.inline_asm_elementwise(pack=4)`: four packed bytes -> four words of two levels each.

    The earlier level, that of the high nibble, is in the low half of its word.
    """
    bits = _bits(format, dtype)
    low, high = [value & 0xFF for value in bits], [value >> 8 for value in bits]
    lines = [
        "shl.b32 up, $4, 4;",  # brings bit 3 of the low nibbles to the sign of each byte
        "and.b32 index, $4, 0x77777777;",
    ]
    for half, signs in enumerate(("0x9d8c", "0xbfae")):
        lines += [
            f"prmt.b32 sign, $4, up, {signs};",
            f"prmt.b32 a, {_word(low[0:4])}, {_word(low[4:8])}, index;",
            f"prmt.b32 b, {_word(low[8:12])}, {_word(low[12:16])}, index;",
            "lop3.b32 lows, sign, b, a, 0xca;",  # sign ? b : a
            f"prmt.b32 a, {_word(high[0:4])}, {_word(high[4:8])}, index;",
            f"prmt.b32 b, {_word(high[8:12])}, {_word(high[12:16])}, index;",
            "lop3.b32 highs, sign, b, a, 0xca;",
            # Per byte of codes: the high nibble, which comes first, into the low half.
            f"prmt.b32 ${2 * half}, lows, highs, 0x4051;",
            f"prmt.b32 ${2 * half + 1}, lows, highs, 0x6273;",
            *(["shr.b32 index, index, 16;"] if half == 0 else []),
        ]
    return "{ .reg .b32 up, index, sign, a, b, lows, highs; " + " ".join(lines) + " }"


CONSTRAINTS = "=&r,=&r,=&r,=&r,r"


def _bits(format: str, dtype: torch.dtype) -> list[int]:
    levels = torch.tensor(formats.FORMATS[format].levels).to(dtype).view(torch.int16)
    return [value & 0xFFFF for value in levels.tolist()]


def _word(four: list[int]) -> str:
    return f"0x{struct.unpack('<I', bytes(four))[0]:08x}"
