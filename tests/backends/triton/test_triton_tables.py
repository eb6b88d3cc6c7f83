"""The tables and closed forms that the kernels find codes by, without a kernel: in float32, as GPUs compute them."""

import math
import re
from pathlib import Path

import numpy as np
import pytest
import torch

from halfbyte import formats
from halfbyte.ops import eightbit

pytest.importorskip("triton")

from halfbyte_triton import decode
from halfbyte_triton import eightbit as eight

CPU = torch.device("cpu")


def around(values, ulps):
    """The float32 values and their neighbors."""
    bits = torch.as_tensor(values, dtype=torch.float32).view(torch.int32)
    return torch.cat([(bits + step).view(torch.float32) for step in range(-ulps, ulps + 1)])


def scaled_values(levels):
    """Thresholds and what is near them, a fine grid, and values over all magnitudes."""
    generator = torch.Generator().manual_seed(0)
    grid = torch.linspace(-1, 1, 1_000_001)
    small = torch.rand(1_000_000, generator=generator) * 10 ** (-8 * torch.rand(1_000_000, generator=generator))
    values = torch.cat((around(levels, 3), -around(levels, 3), grid, small, -small, torch.zeros(1)))
    return values[values.abs() <= 1.0000002]


def test_nf4_cubic_finds_a_neighboring_threshold():
    """As _encode_nf4 does; the numbers are read from its text."""
    from halfbyte_triton import fourbit

    source = Path(fourbit.__file__).read_text(encoding="utf-8")
    line = re.search(r"near = (.*)", source).group(1)
    thresholds = formats.table("thresholds", "nf4", CPU)
    s = scaled_values(thresholds)
    near = eval(line, {"s": s})
    k = (near + 12582912.0).view(torch.int32) & 15
    codes = k + (s > torch.nn.functional.pad(thresholds, (0, 1), value=math.inf)[k])

    assert near.min() > 0
    assert near.max() < 14.5
    assert torch.equal(codes, torch.bucketize(s, thresholds))


@pytest.mark.parametrize("name", ["dynamic", "dynamic_unsigned"])
def test_closed_form_of_the_dynamic_map_gives_the_nearest_code(name):
    """As nearest_dynamic does, for every threshold and its neighbors, with and without fused multiply-add."""
    book = formats.codebook(name, CPU)
    s = scaled_values((book[:-1] + book[1:]) * 0.5)
    if name == "dynamic_unsigned":
        s = s.abs()
    table = eight.dynamic_table(name, CPU)
    thresholds, factors = table[:256], table[256:]
    u = s.abs()
    decade = ((u.view(torch.int32).long() + eight._OFFSET) * eight._FACTOR) >> 32
    assert int(u.view(torch.int32).max()) + eight._OFFSET < 2**32
    d = decade.clamp(eight._BASE, eight._BASE + 6).int() - eight._BASE
    first = 1 if name == "dynamic" else 2
    eight_ninths = ((d << 23) + (0x3F638E39 if first == 1 else 0x3FE38E39)).int().view(torch.float32)
    for fused in (False, True):
        if fused:
            c = (factors[d].double() * u.double() + eight_ninths.double()).float()
        else:
            c = factors[d] * u + eight_ninths
        k = (c + 12582912.0).view(torch.int32) & 511
        rank = k - first + (u > thresholds[k & 255]).int()
        codes = torch.where(s < 0, 127 - rank.clamp(max=127), 127 + rank) if name == "dynamic" else rank
        wrong = (codes != eightbit.nearest(s, book).int()).nonzero()
        assert not len(wrong), f"{len(wrong)} codes differ, the first for {s[wrong[0]].item()!r}"


def run(assembly, word):
    """Execute the straight-line PTX of one `decode.assembly` block on 32-bit integers; the four results."""
    registers = {"$4": word}

    def value(name):
        return int(name, 16) if name.startswith("0x") else int(name) if name.isdigit() else registers[name]

    for line in assembly.split(";")[1:]:
        line = line.strip(" {}")
        if not line or line.startswith(".reg"):
            continue
        op, rest = line.split(" ", 1)
        target, *args = [part.strip() for part in rest.split(",")]
        given = [value(one) for one in args]
        if op == "shl.b32":
            result = given[0] << given[1]
        elif op == "shr.b32":
            result = given[0] >> given[1]
        elif op == "and.b32":
            result = given[0] & given[1]
        elif op == "lop3.b32":
            a, b, c, table = given
            assert table == 0xCA  # a ? b : c
            result = (a & b) | (~a & c)
        else:
            assert op == "prmt.b32"
            picked = (given[0] | given[1] << 32).to_bytes(8, "little")
            result = 0
            for place in range(4):
                number = given[2] >> (4 * place) & 15
                byte = picked[number & 7]
                result |= (0xFF if byte >> 7 else 0) << 8 * place if number & 8 else byte << 8 * place
        registers[target] = result & 0xFFFFFFFF
    return [registers[f"${place}"] for place in range(4)]


@pytest.mark.parametrize("format", ["nf4", "fp4"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_decode_assembly_gives_the_levels(format, dtype):
    assembly = decode.assembly(format, dtype)
    levels = torch.tensor(formats.FORMATS[format].levels).to(dtype).view(torch.int16).numpy().astype(np.uint16)
    for first in range(0, 256, 4):
        four = [(first * 7 + step * 85) % 256 for step in range(4)]
        words = run(assembly, int.from_bytes(bytes(four), "little"))
        for byte, word in zip(four, words, strict=True):
            assert word == int(levels[byte >> 4]) | int(levels[byte & 15]) << 16, (byte, word)
