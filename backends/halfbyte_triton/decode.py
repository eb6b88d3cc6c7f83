"""Decoding of 4-bit codes in registers, as assembly of NVIDIA GPUs: a table of sixteen 16-bit levels without memory.

`prmt` picks four bytes of eight by four 3-bit numbers, which the low 16 bits of four codes' nibbles are.  Low and
high bytes of levels 0..7 and 8..15 are four such tables; bit 3 of each code, spread over a byte by prmt's sign mode,
chooses between the halves.  A word of eight codes costs 21 instructions and no look-up in memory.  The table holds
the levels, or, for a block of codes in one thread, what they are times its absmax: 32 more instructions a block.
"""

from __future__ import annotations

import functools
import struct
from collections.abc import Sequence

import torch
from torch import Tensor

from halfbyte import formats


@functools.cache
def assembly(format: str, dtype: torch.dtype) -> str:
    """PTX of `tl.inline_asm_elementwise`: a word of eight codes and the four of `words` -> four words of two levels."""
    low, high = _bytes(format, dtype)
    known = [f"{_word(part):#x}" for part in (low[4:8], low[12:16], high[4:8], high[12:16])]
    return _pick("$4", [one for pair in zip(("$5", "$6", "$7", "$8"), known) for one in pair])


@functools.cache
def scaled_table(format: str, dtype: torch.dtype) -> str:
    """PTX: an absmax -> the eight words that `look_up` takes, of levels * absmax, rounded once."""
    levels = formats.FORMATS[format].levels
    kind = {torch.bfloat16: "bf16x2", torch.float16: "f16x2"}[dtype]
    lines = []
    for four in range(4):
        for place, level in enumerate(levels[4 * four : 4 * four + 4]):
            lines.append(f"mul.rn.f32 p{place}, $8, 0f{struct.pack('>f', level).hex()};")
        lines += [
            f"cvt.rn.{kind}.f32 u, p1, p0;",
            f"cvt.rn.{kind}.f32 v, p3, p2;",
            f"prmt.b32 ${four}, u, v, 0x6420;",
            f"prmt.b32 ${four + 4}, u, v, 0x7531;",
        ]
    return "{ .reg .f32 p0, p1, p2, p3; .reg .b32 u, v; " + " ".join(lines) + " }"


@functools.cache
def look_up() -> str:
    """PTX: a word of eight codes and the eight of `scaled_table` -> four words of two weights."""
    return _pick("$4", [f"${place}" for place in range(5, 13)])


def _pick(codes: str, tables: Sequence[str]) -> str:
    """PTX: byte i of the codes gives result i; the earlier level, that of the high nibble, is in its low half.

    tables   words of four bytes: the low ones of levels 0, 4, 8, 12 and on, then the high ones
    """
    lines = [
        f"shl.b32 up, {codes}, 4;",  # brings bit 3 of the low nibbles to the sign of each byte
        f"and.b32 index, {codes}, 0x77777777;",
    ]
    for half, signs in enumerate(("0x9d8c", "0xbfae")):
        lines.append(f"prmt.b32 sign, {codes}, up, {signs};")
        for name, four in (("lows", tables[:4]), ("highs", tables[4:])):
            lines += [
                f"prmt.b32 a, {four[0]}, {four[1]}, index;",
                f"prmt.b32 b, {four[2]}, {four[3]}, index;",
                f"lop3.b32 {name}, sign, b, a, 0xca;",  # sign ? b : a
            ]
        lines += [
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
