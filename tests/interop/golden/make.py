"""Write golden.safetensors: what bitsandbytes 0.50.2 computes on a GPU, for test_golden_cuda.py to compare with.

    python tests/interop/golden/make.py [--device cuda] [--out golden.safetensors]

Needs numpy, torch, safetensors and bitsandbytes; imports nothing of halfbyte.  Inputs are not stored: they are
made from the raw words of numpy's PCG64 by exact arithmetic, so that every numpy version makes the same.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
from pathlib import Path

import numpy as np
import torch

VERSION = "0.50.2"
DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
FORMATS = ("nf4", "fp4")

# Thresholds as float32 bits: bitsandbytes 0.50 csrc/kernels.cu, the literals as a C compiler reads them.
THRESHOLDS = {
    "nf4": (
        "bf591cd9 bf1c5270 beeb8480 beadea76 be703cec be0d38bc bd3a7871 3d22faff 3df64863 3e5067e0 3e9582d4 "
        "3ec753f9 3f006d03 3f248daf 3f5c89d9"
    ),
    "fp4": "3b2aaab9 3db00000 3e555555 3e955555 3ed55556 3f155550 3f555555",
}


# -- inputs --------------------------------------------------------------------------------------------------


def random(n: int, seed: int) -> torch.Tensor:
    """About normal, deviation 1: the sum of four 16-bit fields of a PCG64 word.  float32, exact."""
    words = np.random.PCG64(seed).random_raw(n)
    fields = words.view("<u2").reshape(n, 4).astype(np.float64)
    values = (fields.sum(axis=1) - 2 * 65535) / (65536 * 0.5774)
    return torch.from_numpy(values.astype(np.float32))


def uneven(n: int, blocksize: int, dtype: str, seed: int) -> torch.Tensor:
    """Blocks of very different scale, one of them all zero, the last one partial."""
    x = random(n, seed)
    scales = torch.tensor([0.02, 1.0, 30.0, 1e-3])[torch.arange(n) // blocksize % 4]
    x = x * scales
    if n > 3 * blocksize:
        x[2 * blocksize : 3 * blocksize] = 0
    return x.to(DTYPES[dtype])


def ties_4bit(format: str) -> torch.Tensor:
    """float32, blocks of 64: each threshold, and one ulp below and above, of both signs; absmax 1."""
    t = torch.from_numpy(np.array([int(word, 16) for word in THRESHOLDS[format].split()], dtype="<u4").view("<f4"))
    one = torch.ones(1)
    t = torch.cat((t, -t)) if format == "fp4" else t
    values = torch.cat((t, torch.nextafter(t, -2 * one), torch.nextafter(t, 2 * one)))
    return blocks_of(values, 64)


def ties_8bit(codebook: torch.Tensor) -> torch.Tensor:
    """float32, blocks of 64: each midpoint, and one ulp below and above; absmax 1."""
    middle = (codebook[:-1] + codebook[1:]) * 0.5
    one = torch.ones(1)
    return blocks_of(torch.cat((middle, torch.nextafter(middle, -2 * one), torch.nextafter(middle, 2 * one))), 64)


def blocks_of(values: torch.Tensor, blocksize: int) -> torch.Tensor:
    """Values in blocks that each begin with 1.0."""
    rows = torch.nn.functional.pad(values, (0, -len(values) % (blocksize - 1))).reshape(-1, blocksize - 1)
    return torch.cat((torch.ones(len(rows), 1), rows), dim=1).reshape(-1)


# Blocks of 64 with something special in each; the test says what it expects of which.
EDGES = ("zero", "minus_zero", "tiny", "one", "equal", "nan", "all_nan", "inf", "subnormal", "after")


def edges() -> torch.Tensor:
    x = random(64 * len(EDGES), seed=7).reshape(len(EDGES), 64)
    row = {name: x[i] for i, name in enumerate(EDGES)}
    row["zero"].zero_()
    row["minus_zero"].fill_(-0.0)
    row["tiny"][1:] = torch.tensor([1e-9, -1e-9, 0.0, -0.0, 1e-20, -1e-20, 1e-38]).repeat(9)
    row["one"].zero_()
    row["one"][5] = -3.5
    row["equal"].fill_(0.7)
    row["nan"][9] = float("nan")
    row["all_nan"].fill_(float("nan"))
    row["inf"][9] = float("inf")
    row["inf"][11] = float("-inf")
    row["subnormal"].zero_()
    row["subnormal"][3] = 1e-40
    return x.reshape(-1)


def cases_4bit():
    """(key, format, blocksize, x)"""
    for format in FORMATS:
        for dtype in DTYPES:
            for i, blocksize in enumerate((64, 128, 256)):
                n = 7 * blocksize + 37
                yield f"{format}.{dtype}.{blocksize}", format, blocksize, uneven(n, blocksize, dtype, 10 + i)
            yield f"{format}.{dtype}.4096", format, 4096, uneven(2 * 4096 + 37, 4096, dtype, 20)
            yield f"{format}.{dtype}.one", format, 64, uneven(1, 64, dtype, 21)
            yield f"{format}.{dtype}.even", format, 64, uneven(640, 64, dtype, 22)
            yield f"{format}.{dtype}.edges", format, 64, edges().to(DTYPES[dtype])
        yield f"{format}.float32.ties", format, 64, ties_4bit(format)


def cases_nested():
    """(key, format, x): 600 blocks of 64, so that the nested blocks are three, the last one partial."""
    for format in FORMATS:
        yield f"nested.{format}", format, (random(64 * 600 - 5, 30) * 0.02).bfloat16()


def cases_8bit(codebooks):
    """(key, codebook name, blocksize, x)"""
    for name, codebook in codebooks.items():
        for dtype in DTYPES:
            for i, blocksize in enumerate((64, 256, 4096)):
                n = (5 if blocksize < 4096 else 1) * blocksize + 37
                x = uneven(n, blocksize, dtype, 40 + i)
                yield f"{name}.{dtype}.{blocksize}", name, blocksize, x.abs() if "unsigned" in name else x
        yield f"{name}.float32.ties", name, 64, ties_8bit(codebook)
        yield f"{name}.float32.edges", name, 64, edges().abs() if "unsigned" in name else edges()


def cases_int8():
    """(key, threshold, x)"""
    for rows, columns in ((1, 100), (7, 100), (33, 256)):
        x = random(rows * columns, 50 + rows).reshape(rows, columns)
        x[:, 3] *= 5
        if rows > 3:
            x[2] = 0
        for threshold in (0.0, 4.0):
            yield f"int8.{rows}x{columns}.{threshold}", threshold, x.half()


def product():
    """(a, b, row absmax, column absmax) for int8_mm_dequant."""
    a = (random(32 * 64, 60).reshape(32, 64) * 40).clamp(-127, 127).to(torch.int8)
    b = (random(48 * 64, 61).reshape(48, 64) * 40).clamp(-127, 127).to(torch.int8)
    return a, b, random(32, 62).abs(), random(48, 63).abs()


# -- results -------------------------------------------------------------------------------------------------


def checksum(x: torch.Tensor) -> torch.Tensor:
    """sha256 of a result, with -0.0 and NaN each of one kind, as 32 bytes."""
    values = x.detach().cpu().float() + 0.0
    values = torch.where(values.isnan(), torch.tensor(float("nan")), values)
    return torch.tensor(list(hashlib.sha256(values.numpy().astype("<f4").tobytes()).digest()), dtype=torch.uint8)


def make(device: str) -> dict[str, torch.Tensor]:
    import bitsandbytes.functional as F

    out: dict[str, torch.Tensor] = {}

    def keep(key: str, **results: torch.Tensor) -> None:
        out.update({f"{key}.{name}": value.detach().cpu().contiguous().clone() for name, value in results.items()})

    for key, format, blocksize, x in cases_4bit():
        packed, state = F.quantize_4bit(x.to(device), blocksize=blocksize, quant_type=format)
        y = F.dequantize_4bit(packed, state)
        keep(key, packed=packed.reshape(-1), absmax=state.absmax, decoded=checksum(y.reshape(-1)))

    for key, format, x in cases_nested():
        packed, state = F.quantize_4bit(x.to(device), quant_type=format, compress_statistics=True)
        y = F.dequantize_4bit(packed, state)
        keep(key, packed=packed.reshape(-1), absmax=state.absmax, offset=state.offset.reshape(1))
        keep(key, nested_absmax=state.state2.absmax, decoded=checksum(y.reshape(-1)))

    codebooks = {"dynamic": F.create_dynamic_map(True), "dynamic_unsigned": F.create_dynamic_map(False)}
    keep("codebook", **codebooks)
    for key, name, blocksize, x in cases_8bit(codebooks):
        codes, state = F.quantize_blockwise(x.to(device), code=codebooks[name].to(device), blocksize=blocksize)
        y = F.dequantize_blockwise(codes, state)
        keep(key, codes=codes, absmax=state.absmax, decoded=checksum(y))

    for key, threshold, x in cases_int8():
        q, stats, columns = F.int8_vectorwise_quant(x.to(device), threshold)
        columns = torch.empty(0, dtype=torch.int64) if columns is None else columns
        keep(key, q=q, absmax=stats, columns=columns, decoded=checksum(F.int8_vectorwise_dequant(q, stats)))

    a, b, rows, columns = (part.to(device) for part in product())
    accumulated = F.int8_linear_matmul(a, b)
    keep("product", int32=accumulated, scaled=F.int8_mm_dequant(accumulated, rows, columns))
    return out


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--out", type=Path, default=Path(__file__).with_name("golden.safetensors"))
    arguments = parser.parse_args()
    if arguments.device == "cpu":
        os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")

    import bitsandbytes
    from safetensors.torch import save_file

    if bitsandbytes.__version__ != VERSION:
        raise SystemExit(f"bitsandbytes must be {VERSION}; got {bitsandbytes.__version__}")
    name = torch.cuda.get_device_name() if arguments.device != "cpu" else "cpu"
    results = make(arguments.device)
    made_with = {"bitsandbytes": bitsandbytes.__version__, "torch": torch.__version__, "device": name}
    save_file(results, arguments.out, metadata=made_with)
    print(json.dumps({**made_with, "tensors": len(results), "bytes": arguments.out.stat().st_size}))


if __name__ == "__main__":
    main()
