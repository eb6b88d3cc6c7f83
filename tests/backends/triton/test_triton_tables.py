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

from halfbyte_triton import codes8, decode, kept

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


def found(s, table, signed):
    """Codes of scaled values as codes8.nearest_dynamic finds them."""
    bits = s.view(torch.int32).long()
    if signed:
        key = ((bits & 0x7FFFFFFF).clamp(min=0x34800000) ^ (bits >> 31)) & 0xFFFFFFFF
        at = key * codes8._SIGNED_SCALE.value >> 32
    else:
        key = torch.where(s > 2.0**-23, s, 2.0**-23).view(torch.int32).long()
        at = key * codes8._UNSIGNED_SCALE.value >> 32
    return ((table.long()[at % codes8.SIZE] + key) & 0xFFFFFFFF) >> 24


@pytest.mark.parametrize("name", ["dynamic", "dynamic_unsigned"])
@pytest.mark.parametrize("nudged", [False, True])
def test_bins_of_the_dynamic_map_give_the_nearest_code(name, nudged):
    """For every threshold and its neighbors, of both signs."""
    book = formats.codebook(name, CPU)
    s = torch.cat((scaled_values((book[:-1] + book[1:]) * 0.5), torch.tensor([math.nan, -math.nan])))
    codes = found(s, codes8.dynamic_table(name, nudged, CPU), name == "dynamic")
    nearest = eightbit.nearest(s, book).long()
    if nudged and name == "dynamic":
        nearest = torch.where((s < 0) & (nearest == 127), 126, nearest)

    wrong = (codes != nearest).nonzero()
    assert not len(wrong), f"{len(wrong)} codes differ, the first for {s[wrong[0]].item()!r}"


def run(assembly, first, given, results, memory=None):
    """Execute straight-line PTX on 32-bit integers, given as operands from $first on; the results, $0 and following.

    memory   words of shared memory by address, which loads read and stores change
    """
    registers = {f"${first + place}": word & 0xFFFFFFFF for place, word in enumerate(given)}
    registers["halfbyte_kept"] = 1024  # an address

    def value(name):
        return int(name, 16) if name.startswith("0x") else int(name) if name.isdigit() else registers[name]

    for line in assembly.split(";")[1:]:
        line = line.strip(" {}")
        if not line or line.startswith(".reg"):
            continue
        op, rest = line.split(" ", 1)
        if op.startswith("st.shared"):
            place, *words = [part.strip("[]{} ") for part in rest.split(",")]
            memory.update({value(place) + 4 * number: value(word) for number, word in enumerate(words)})
            continue
        target, *args = [part.strip() for part in rest.split(",")]
        if op == "ld.shared.b32":
            registers[target] = memory[sum(value(part) for part in args[0].strip("[]").split(" + "))]
            continue
        given = [value(one) for one in args]
        if op == "shl.b32":
            result = given[0] << given[1]
        elif op == "shr.b32":
            result = given[0] >> given[1]
        elif op == "mov.u32":
            result = given[0]
        elif op == "add.u32":
            result = given[0] + given[1]
        elif op == "mad.lo.u32":
            result = given[0] * given[1] + given[2]
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
    return [registers[f"${place}"] for place in range(results)]


@pytest.mark.parametrize("format", ["nf4", "fp4"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_decode_assembly_gives_the_levels(format, dtype):
    assembly = decode.assembly(format, dtype)
    tables = decode.words(format, dtype, CPU).tolist()
    levels = torch.tensor(formats.FORMATS[format].levels).to(dtype).view(torch.int16).numpy().astype(np.uint16)
    assert tables == tables[:4] * 4
    for first in range(0, 256, 4):
        four = [(first * 7 + step * 85) % 256 for step in range(4)]
        words = run(assembly, 4, (int.from_bytes(bytes(four), "little"), *tables[:4]), 4)
        for byte, word in zip(four, words, strict=True):
            assert word == int(levels[byte >> 4]) | int(levels[byte & 15]) << 16, (byte, word)


def test_assembly_packs_the_upper_bytes():
    words = (0x12AABBCC, 0x34AABBCC, 0xF6AABBCC, 0x78AABBCC)

    assert run(codes8.UPPER_BYTES.value, 1, words, 1) == [0x78F63412]


def test_tables_that_are_kept_are_found_again():
    """All of them in one area."""
    places = [(kept._BOOK1_AT, 256), (kept._BOOK2_AT, 256), (kept._TABLE1_AT, 2048), (kept._TABLE2_AT, 2048)]
    memory = {}
    for number, (first, words) in enumerate(places):
        for index in range(words):
            run(kept._STORE.value, 1, (first.value + 4 * index, 10000 * number + index), 1, memory)

    assert len(memory) == 2 * 256 + 2 * 2048
    assert 4 * len(memory) == kept._AREA
    look_ups = (kept.KEPT_BOOK1, kept.KEPT_BOOK2, kept.KEPT_TABLE1, kept.KEPT_TABLE2)
    for number, (look_up, (_, words)) in enumerate(zip(look_ups, places, strict=True)):
        found = [run(look_up.value, 1, (index,), 1, memory) for index in range(words)]
        assert found == [[10000 * number + index] for index in range(words)]
