"""Code tables, thresholds and packing: each exactly once, with its source.

Adding a 4-bit format is adding one `Format` to `FORMATS` (and a test).  The C++ header with the same numbers is
made from this file by `nox -s tables` (or `python -m halfbyte.formats`); a test compares.
"""

from __future__ import annotations

import base64
import functools
import struct
from dataclasses import dataclass

import torch

from .errors import InputError

__all__ = ["BLOCKSIZES", "FORMATS", "STORAGES", "Format", "codebook", "codebook_names", "cpp_header", "levels"]


@dataclass(frozen=True)
class Format:
    """A 4-bit format: sixteen levels and how a scaled value finds its code.

    levels           value of each code, for a block whose absmax is 1
    threshold_bits   float32 bit patterns, ascending; a value equal to a threshold belongs below it
    order            code of the interval below the first threshold, then above each
    sign_bit         True: thresholds are on the magnitude and a negative value has bit 3 set
    """

    name: str
    levels: tuple[float, ...]
    threshold_bits: tuple[int, ...]
    order: tuple[int, ...]
    sign_bit: bool

    @property
    def thresholds(self) -> tuple[float, ...]:
        return tuple(struct.unpack("<f", bits.to_bytes(4, "little"))[0] for bits in self.threshold_bits)


# Levels: Dettmers et al. 2023, QLoRA, appendix E (arXiv 2305.14314), with the digits that bitsandbytes stores.
# Thresholds: the bit patterns that a C compiler makes of bitsandbytes' decimal literals; at four places they lie
# one ulp above the float32 midpoints, and only an exact tie can tell.
_NF4 = Format(
    "nf4",
    (
        -1.0,
        -0.6961928009986877,
        -0.5250730514526367,
        -0.39491748809814453,
        -0.28444138169288635,
        -0.18477343022823334,
        -0.09105003625154495,
        0.0,
        0.07958029955625534,
        0.16093020141124725,
        0.24611230194568634,
        0.33791524171829224,
        0.44070982933044434,
        0.5626170039176941,
        0.7229568362236023,
        1.0,
    ),
    (
        *(0xBF591CD9, 0xBF1C5270, 0xBEEB8480, 0xBEADEA76, 0xBE703CEC, 0xBE0D38BC, 0xBD3A7871, 0x3D22FAFF),
        *(0x3DF64863, 0x3E5067E0, 0x3E9582D4, 0x3EC753F9, 0x3F006D03, 0x3F248DAF, 0x3F5C89D9),
    ),
    tuple(range(16)),
    sign_bit=False,
)

# Sign and magnitude; the magnitudes are {0, 0.0625, 8, 12, 4, 6, 2, 3} / 12.  Code 8 is stored as +0.0.
_FP4_MAGNITUDES = (
    0.0,
    0.0052083334885537624,
    0.6666666865348816,
    1.0,
    0.3333333432674408,
    0.5,
    0.1666666716337204,
    0.25,
)
_FP4 = Format(
    "fp4",
    (*_FP4_MAGNITUDES, 0.0, *(-magnitude for magnitude in _FP4_MAGNITUDES[1:])),
    (0x3B2AAAB9, 0x3DB00000, 0x3E555555, 0x3E955555, 0x3ED55556, 0x3F155550, 0x3F555555),
    (0, 1, 6, 7, 4, 5, 2, 3),
    sign_bit=True,
)

FORMATS = {"nf4": _NF4, "fp4": _FP4}

BLOCKSIZES = (32, 64, 128, 256, 512, 1024, 2048, 4096)  # of the 4-bit formats

NESTED_BLOCKSIZE = 256  # absmax values that share one nested absmax; fixed by the checkpoint format

# dtypes that a checkpoint may view the packed bytes as
STORAGES = (
    torch.uint8,
    torch.int8,
    torch.float16,
    torch.bfloat16,
    torch.float32,
    torch.float64,
    torch.int32,
)

# The dynamic maps: Dettmers et al. 2022, 8-bit Optimizers via Block-wise Quantization, section 2.2
# (arXiv 2110.02861), as float32, little-endian, base64.  Constants, because the way bitsandbytes computes them
# gives other digits on other CPUs; tests/ops/test_formats.py holds the recipe and the checksums.
_DYNAMIC_SIGNED = (
    "MzN+v5qZer8AAHe/ZmZzv83Mb78zM2y/mplovwAAZb9mZmG/zcxdvzMzWr+amVa/AABTv2ZmT7/NzEu/MzNIv5qZRL8AAEG/ZmY9"
    "v83MOb80Mza/mpkyvwAAL79mZiu/zcwnvzQzJL+amSC/AAAdv2ZmGb/NzBW/NDMSv5qZDr8AAAu/ZmYHv8zMA78zMwC/MjP5vgAA"
    "8r7MzOq+mpnjvmZm3L4zM9W+AADOvszMxr6amb++Zma4vjMzsb4AAKq+zMyivpqZm75mZpS+NDONvgAAhr6ZmX2+MzNvvs3MYL5m"
    "ZlK+AABEvpqZNb4zMye+zcwYvmZmCr4AAPi9NDPbvYXryb33KMS9Z2a+vdejuL1I4bK9uB6tvSpcp72amaG9CtebvXsUlr3rUZC9"
    "XY+Kvc3MhL17FH69XY9yvT0KZ70fhVu9AABQveF6RL3D9Ti9o3AtvYXrIb1nZha9SOEKvVK4/rwVrue816PQvJqZubxdj6K8H4WL"
    "vMP1aLxI4Tq8ZDsfvBgEFrzNzAy8gZUDvGq89LvTTeK7O9/Pu6RwvbsNAqu7dJOYu90khruKbGe7XI9Cuy2yHbv8qfG6ne+nuv9l"
    "d7o+6Fm6gGo8usHsHroBbwG6g+LHuQXnjLkL1yO5Sx+6uLPvirg0gDe4BkKyt/8FAreUGlq2t6MTtQAAAAC3oxM1lBpaNv8FAjcG"
    "QrI3NIA3OLPvijhLH7o4C9cjOQXnjDmD4sc5AW8BOsHsHjqAajw6PuhZOv9ldzqd76c6/KnxOi2yHTtcj0I7imxnO90khjt0k5g7"
    "DQKrO6RwvTs73887003iO2q89DuBlQM8zcwMPBgEFjxkOx88SOE6PMP1aDwfhYs8XY+iPJqZuTzXo9A8Fa7nPFK4/jxI4Qo9Z2YW"
    "PYXrIT2jcC09w/U4PeF6RD0AAFA9H4VbPT0KZz1dj3I9exR+Pc3MhD1dj4o961GQPXsUlj0K15s9mpmhPSpcpz24Hq09SOGyPdej"
    "uD1nZr499yjEPYXryT00M9s9AAD4PWZmCj7NzBg+MzMnPpqZNT4AAEQ+ZmZSPs3MYD4zM28+mZl9PgAAhj40M40+ZmaUPpqZmz7M"
    "zKI+AACqPjMzsT5mZrg+mpm/PszMxj4AAM4+MzPVPmZm3D6ameM+zMzqPgAA8j4yM/k+MzMAP8zMAz9mZgc/AAALP5qZDj80MxI/"
    "zcwVP2ZmGT8AAB0/mpkgPzQzJD/NzCc/ZmYrPwAALz+amTI/NDM2P83MOT9mZj0/AABBP5qZRD8zM0g/zcxLP2ZmTz8AAFM/mplW"
    "PzMzWj/NzF0/ZmZhPwAAZT+amWg/MzNsP83Mbz9mZnM/AAB3P5qZej8zM34/AACAPw=="
)
_DYNAMIC_UNSIGNED = (
    "AAAAAKp7rjSYCVA1OJsONvbMkjZRTN421eUUN24SgzegceE3aOgfOAAYTziaR344mbuWOGRTrjgx68U4S1kGOcpUQTlJUHw55KWb"
    "OaIjuTljodY5Ih/0OXHOCDpQjRc6MEwmOhALNTrvyUM60IhSOq9HYTqOBnA6bsV+OgaBlTo1Xro6ZDvfOkoMAjvhehQ7eOkmOxBY"
    "OTunxks7QDVeO9ejcDs3iYE7gsCKO8/3kzsaL507ZmamO7Kdrzv91Lg7SgzCO5VDyzvhetQ7LrLdO3jp5jvFIPA7D1j5O65HATxU"
    "4wU8+X4KPKAaDzxFthM861EYPJLtHDw3iSE8KlwvPGdmRjyjcF084np0PI/ChTyvR5E8zcycPOtRqDwL17M8KVy/PEfhyjxnZtY8"
    "h+vhPKNw7TzD9fg8cD0CPQAACD2Pwg09H4UTPa9HGT09Ch89zcwkPVyPKj3rUTA9exQ2PQrXOz2amUE9KFxHPbgeTT1H4VI916NY"
    "PWdmXj33KGQ9h+tpPRWubz2jcHU9MzN7PeJ6gD0qXIM9cT2GPbgeiT0AAIw9SOGOPZDCkT3Xo5Q9H4WXPWdmmj2vR5099iigPT4K"
    "oz2F66U9zcyoPRWuqz1cj649pHCxPetRtD0zM7c9exS6PcP1vD0L1789UrjCPZqZxT3iesg9KVzLPQAA1D1mZuI9zczwPTMz/z3M"
    "zAY+AAAOPjQzFT5mZhw+mpkjPszMKj4AADI+NDM5PmZmQD6amUc+zMxOPgAAVj40M10+ZmZkPpqZaz7MzHI+AAB6PpmZgD4zM4Q+"
    "zcyHPmZmiz4AAI8+mpmSPjMzlj7MzJk+ZmadPgAAoT6amaQ+MzOoPszMqz5mZq8+AACzPpqZtj4zM7o+zMy9PmZmwT4AAMU+mpnI"
    "PjMzzD7MzM8+ZmbTPgAA1z6amdo+MzPePszM4T5mZuU+AADpPpqZ7D4zM/A+zMzzPmZm9z4AAPs+mZn+PpoZAT9m5gI/M7MEPwCA"
    "Bj/MTAg/mhkKP2bmCz80sw0/AIAPP81MET+aGRM/ZuYUPzSzFj8AgBg/zUwaP5oZHD9m5h0/NLMfPwCAIT/NTCM/mhklP2bmJj80"
    "syg/AIAqP81MLD+aGS4/ZuYvPzSzMT8AgDM/zUw1P5oZNz9m5jg/NLM6PwCAPD/NTD4/mhlAP2bmQT80s0M/AIBFP8xMRz+aGUk/"
    "ZuZKPzSzTD8AgE4/zExQP5oZUj9m5lM/NLNVPwCAVz/MTFk/mhlbP2bmXD80s14/AIBgP8xMYj+aGWQ/ZuZlPzSzZz8AgGk/zExr"
    "P5oZbT9m5m4/NLNwPwCAcj/MTHQ/mhl2P2bmdz80s3k/AIB7P8xMfT+aGX8/AACAPw=="
)

_CODEBOOKS = {"dynamic": _DYNAMIC_SIGNED, "dynamic_unsigned": _DYNAMIC_UNSIGNED}


def codebook_names() -> tuple[str, ...]:
    """Names of the built-in 8-bit codebooks."""
    return tuple(_CODEBOOKS)


def levels(format: str, device: torch.device) -> torch.Tensor:
    """The sixteen levels of a 4-bit format, float32.  Shared: do not write to it."""
    if format not in FORMATS:
        raise InputError(f"format must be one of {', '.join(FORMATS)}; got {format!r}")
    return _shared("levels", format, device)


def codebook(name: str, device: torch.device) -> torch.Tensor:
    """The 256 sorted float32 values of a built-in 8-bit codebook.  Shared: do not write to it."""
    if name not in _CODEBOOKS:
        raise InputError(f"codebook must be a tensor or one of {', '.join(_CODEBOOKS)}; got {name!r}")
    return _shared("codebook", name, device)


def table(kind: str, name: str, device: torch.device) -> torch.Tensor:
    """The constants of a format as a float32 tensor: its "levels", "thresholds" or "order", or a "codebook"."""
    return _shared(kind, name, device)


def _shared(kind: str, name: str, device: torch.device) -> torch.Tensor:
    # A tensor made under a tracing mode is a fake one, under a torch.func transform a wrapped one: not to be kept.
    observed = torch._C._len_torch_dispatch_stack() or torch._C._functorch.peek_interpreter_stack() is not None
    return (_build.__wrapped__ if observed else _build)(kind, name, device)


# What torch.compiler.assume_constant_result sets, without importing the compiler: dynamo cannot trace the body.
_shared._dynamo_marked_constant = True  # type: ignore[attr-defined]


@functools.cache
def _build(kind: str, name: str, device: torch.device) -> torch.Tensor:
    with torch.inference_mode(False):
        if kind == "codebook":
            raw = base64.b64decode(_CODEBOOKS[name])
            return torch.tensor(struct.unpack("<256f", raw), dtype=torch.float32, device=device)
        dtype = torch.uint8 if kind == "order" else torch.float32
        return torch.tensor(getattr(FORMATS[name], kind), dtype=dtype, device=device)


def cpp_header() -> str:
    """csrc/include/halfbyte/tables.h, with the same numbers."""
    lines = [
        "// clang-format off",
        "// tables.h: the 4-bit code tables as constants.",
        "//",
        "// Made from core/halfbyte/formats.py by `nox -s tables`; do not edit.  Of a format: the level of each",
        "// code; the bits of the thresholds, ascending; the code of each interval between them, lowest first.",
        "// FP4's thresholds are on the magnitude, and a negative value has 8 added to its code.",
        "#pragma once",
        "#include <stdint.h>",
        "",
        "namespace halfbyte {",
    ]
    for name, format in FORMATS.items():
        lines += [
            "",
            *_array("float", f"{name}_levels", [f"{level!r}f" for level in format.levels]),
            *_array("uint32_t", f"{name}_threshold_bits", [f"0x{bits:08x}u" for bits in format.threshold_bits]),
            *_array("uint8_t", f"{name}_order", [str(code) for code in format.order]),
        ]
    return "\n".join([*lines, "", "}  // namespace halfbyte", ""])


def _array(kind: str, name: str, values: list[str]) -> list[str]:
    rows = [f"    {', '.join(values[i : i + 4])}," for i in range(0, len(values), 4)]
    return [f"inline constexpr {kind} {name}[{len(values)}] = {{", *rows, "};"]


if __name__ == "__main__":
    print(cpp_header(), end="")
