"""The code tables are the published ones, bit for bit, and stand only once."""

import hashlib
import struct
from pathlib import Path

import numpy as np
import pytest
import torch

import halfbyte
from halfbyte import formats

CPU = torch.device("cpu")
ROOT = Path(__file__).resolve().parents[2]

CHECKSUMS = {
    "nf4": "8501941daa1b8a90ad1bbfeb632e5101b5dddbc4bb52d6e55abcfd777e60c06a",
    "fp4": "b830bcf8857895e5676b8e2ce608a60bb8af9b3ce6270073e9de34814196f09c",
    "dynamic": "e732639a65f497b4ad684bb166a4467708255edd5207757de8b8f0c7e1fda89c",
    "dynamic_unsigned": "305f002cc11278fb769d13b25b9fd0c7c83c8402c40a878fe086f4039fde6398",
}


def checksum(values):
    return hashlib.sha256(np.asarray(values).astype("<f4").tobytes()).hexdigest()


@pytest.mark.parametrize("name", ["nf4", "fp4"])
def test_levels_have_the_published_checksum(name):
    assert checksum(formats.levels(name, CPU)) == CHECKSUMS[name]


@pytest.mark.parametrize("name", ["dynamic", "dynamic_unsigned"])
def test_codebook_has_the_published_checksum(name):
    assert checksum(formats.codebook(name, CPU)) == CHECKSUMS[name]


def test_checksums_cover_every_table():
    assert {*formats.FORMATS, *formats.codebook_names()} == set(CHECKSUMS)


def fma(a, b, c):
    """float32 fma through float64: the product is exact there, and the sum of these operands too."""
    return np.float32(np.float64(a) * np.float64(b) + np.float64(c))


def dynamic_map(signed):
    """Dettmers et al. 2022 (arXiv 2110.02861), section 2.2, with the roundings of bitsandbytes' linspace."""
    low, values = np.float32(0.1), []
    for i in range(7):
        points = 2**i + 1 if signed else 2 ** (i + 1) + 1
        step = np.float32(np.float32(1 - low) / np.float32(points - 1))
        bounds = np.array(
            [fma(step, k, low) if k < points // 2 else fma(-step, points - 1 - k, 1) for k in range(points)],
            dtype=np.float32,
        )
        means = (bounds[:-1] + bounds[1:]) / np.float32(2) * np.float32(10.0 ** (i - 6))
        values += [*means, *(-means if signed else ())]
    return np.sort(np.array([*values, 0, 1], dtype=np.float32))


@pytest.mark.parametrize(("name", "signed"), [("dynamic", True), ("dynamic_unsigned", False)])
def test_codebook_follows_from_its_recipe(name, signed):
    table = dynamic_map(signed)

    assert len(np.unique(table)) == 256
    assert np.array_equal(table, formats.codebook(name, CPU).numpy())


def test_dynamic_codebooks_have_the_published_landmarks():
    signed = formats.codebook("dynamic", CPU).tolist()
    unsigned = formats.codebook("dynamic_unsigned", CPU).tolist()

    assert [signed[i] for i in (0, 126, 127, 128, 254, 255)] == [
        *(-0.992968738079071, -5.500000384017767e-07, 0.0),
        *(5.500000384017767e-07, 0.992968738079071, 1.0),
    ]
    assert [unsigned[i] for i in (0, 1, 254, 255)] == [0.0, 3.2500003044333425e-07, 0.9964843988418579, 1.0]


# The literals of bitsandbytes 0.50 csrc/kernels.cu (dQuantizeNF4) as a C compiler reads them.
NF4_BITS = (
    "bf591cd9 bf1c5270 beeb8480 beadea76 be703cec be0d38bc bd3a7871 3d22faff 3df64863 3e5067e0 3e9582d4 3ec753f9 "
    "3f006d03 3f248daf 3f5c89d9"
)
FP4_BITS = "3b2aaab9 3db00000 3e555555 3e955555 3ed55556 3f155550 3f555555"


@pytest.mark.parametrize(("name", "bits"), [("nf4", NF4_BITS), ("fp4", FP4_BITS)])
def test_thresholds_have_the_published_bits(name, bits):
    found = formats.table("thresholds", name, CPU)

    assert [f"{one:08x}" for one in found.view(torch.int32).numpy().view("<u4")] == bits.split()
    assert formats.FORMATS[name].thresholds == tuple(found.tolist())


def test_nf4_thresholds_lie_at_most_one_ulp_above_the_midpoints():
    levels = formats.levels("nf4", CPU)
    midpoints = (levels[:-1] + levels[1:]) / 2
    difference = formats.table("thresholds", "nf4", CPU).view(torch.int32) - midpoints.view(torch.int32)

    assert [i for i in range(15) if difference[i]] == [0, 8, 12, 14]
    assert difference.abs().max() == 1


@pytest.mark.parametrize("name", list(formats.FORMATS))
def test_intervals_ascend_with_the_levels(name):
    spec = formats.FORMATS[name]
    levels = [spec.levels[code] for code in spec.order]
    thresholds = list(spec.thresholds)

    assert levels == sorted(levels)
    assert thresholds == sorted(thresholds)
    assert all(low < t < high for low, t, high in zip(levels, thresholds, levels[1:]))


def test_fp4_is_a_sign_and_a_magnitude():
    spec = formats.FORMATS["fp4"]
    magnitudes = torch.tensor([0, 0.0625, 8, 12, 4, 6, 2, 3]) / 12

    assert spec.order == (0, 1, 6, 7, 4, 5, 2, 3)
    assert torch.equal(torch.tensor(spec.levels[:8]), magnitudes)
    assert [-x for x in spec.levels[9:]] == list(spec.levels[1:8])
    assert struct.pack("<f", spec.levels[8]) == bytes(4)  # +0.0


def test_tables_are_shared_between_calls():
    assert formats.levels("nf4", CPU) is formats.levels("nf4", CPU)


def test_tables_made_in_inference_mode_serve_autograd():
    formats._build.cache_clear()
    with torch.inference_mode():
        table = formats.levels("fp4", CPU)

    assert not table.is_inference()


def test_unknown_format_names_those_known():  # bitsandbytes bug 22
    with pytest.raises(halfbyte.InputError, match=r"^format must be one of nf4, fp4; got 'int4'$"):
        formats.levels("int4", CPU)


def test_unknown_codebook_names_those_known():
    message = r"^codebook must be a tensor or one of dynamic, dynamic_unsigned; got 'linear'$"
    with pytest.raises(halfbyte.InputError, match=message):
        formats.codebook("linear", CPU)


def test_cpp_header_is_made_from_the_tables():
    header = ROOT / "csrc" / "include" / "halfbyte" / "tables.h"
    if not header.exists():
        pytest.skip("csrc/include/halfbyte/tables.h is not in this tree")

    assert header.read_text() == formats.cpp_header()
