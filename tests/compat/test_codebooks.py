"""The tables made by recipe: bitsandbytes' bits, by checksum where the formats page has one."""

import hashlib

import pytest
import torch

import halfbyte
from halfbyte import codebooks, formats

CHECKSUMS = [
    ("dynamic_map", (), "e732639a65f497b4"),
    ("dynamic_map", (False,), "305f002cc11278fb"),
    ("linear_map", (), "80bf4c55fa736fa1"),
    ("linear_map", (False,), "7cb9ea560989533d"),
    ("fp8_map", (True, 4, 3), "f3c007a4cafc83fe"),
    ("fp8_map", (), "0da7c4e2990b302a"),
    ("fp8_map", (True, 2, 5), "eb219908101cdfc1"),
    ("fp8_map", (True, 3, 4), "1087860d22494f70"),
    ("fp8_map", (True, 6, 1), "1a59f9be06b263c7"),
    ("normal_map", (), "695151d62a023d25"),
]

OTHERS = [
    *(("dynamic_map", (True, exponents, bits)) for bits in range(2, 9) for exponents in range(1, bits)),
    *(("dynamic_map", (True, exponents, 8)) for exponents in (8,)),
    *(("linear_map", (signed, bits, zero)) for signed in (True, False) for bits in (2, 5, 8) for zero in (True, False)),
    *(("fp8_map", (True, exponents, 7 - exponents)) for exponents in range(1, 7)),
    *(("fp8_map", (False, 5, 3)), ("fp8_map", (True, 2, 1, 4)), ("fp8_map", (False, 3, 2, 5))),
    *(("normal_map", (0.95, False)), ("normal_map", (0.9677083, False)), ("normal_map", (0.99, True))),
]


@pytest.mark.parametrize(("name", "args", "checksum"), CHECKSUMS)
def test_table_has_its_checksum(name, args, checksum):
    table = getattr(codebooks, name)(*args)

    assert (table.dtype, table.shape) == (torch.float32, (256,))
    assert hashlib.sha256(table.numpy().astype("<f4").tobytes()).hexdigest()[:16] == checksum


@pytest.mark.parametrize(("name", "args"), OTHERS)
def test_table_is_that_of_bitsandbytes(oracle, name, args):
    table = getattr(codebooks, name)(*args)

    theirs = oracle.call(f"create_{name}", args)
    if name == "dynamic_map":  # theirs are rounded twice where the steps of a decade are no power of two
        assert torch.allclose(table, theirs, rtol=0, atol=2**-24)
    else:
        assert torch.equal(table, theirs)


def test_normal_map_holds_the_levels_of_nf4():
    table = codebooks.normal_map()

    assert tuple(torch.cat((table[:8], table[-8:])).tolist()) == formats.FORMATS["nf4"].levels


@pytest.mark.parametrize(
    ("name", "args", "message"),
    [
        ("dynamic_map", (False, 3, 8), "3 unsigned decades make 241 values; 8 bits take 256"),
        ("fp8_map", (True, 5, 3), r"exponent_bits \+ precision_bits must be 8; got 5 \+ 3 \+ 1 for the sign"),
    ],
)
def test_impossible_table_is_refused(name, args, message):
    with pytest.raises(halfbyte.InputError, match=f"^{message}$"):
        getattr(codebooks, name)(*args)


@pytest.mark.parametrize("name", ["nf4", "fp4", "af4"])
def test_4bit_table_is_that_of_bitsandbytes(oracle, name):
    theirs = oracle.call("get_4bit_type", (name, "cpu"))

    assert torch.equal(torch.tensor(codebooks.table_4bit(name)), theirs)


def test_int4_has_sixteen_codes_where_bitsandbytes_fails(oracle):
    with pytest.raises(RuntimeError, match="bitsandbytes raised"):
        oracle.call("get_4bit_type", ("int4", "cpu"))

    table = codebooks.table_4bit("int4")
    assert len(table) == 16
    assert (table[0], table[7], table[8], table[15]) == (1.0, 0.0, 0.0, -1.0)


@pytest.mark.parametrize(("name", "blocksize"), [("af4", 128), ("int5", 64)])
def test_unknown_4bit_table_is_refused_as_there(name, blocksize):
    with pytest.raises(NotImplementedError, match=r"64 only|must be one of nf4, fp4, int4, af4; got 'int5'"):
        codebooks.table_4bit(name, blocksize)
