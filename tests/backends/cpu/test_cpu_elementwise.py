"""Every instruction-set level of the CPU backend agrees bit for bit with the references: the element-wise ops."""

import pytest
import torch
from levels import DTYPES, for_each_level, odd_values, on_offset, same

from halfbyte import formats
from halfbyte.ops import eightbit, fourbit, int8

SIZES = (1, 2, 7, 31, 32, 33, 64, 65, 127, 255, 1000, 4097, 70001)


@for_each_level("quantize_4bit")
@pytest.mark.parametrize("format", ["nf4", "fp4"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_quantize_4bit_equals_the_reference(kernel, format, dtype):
    for n in SIZES:
        for blocksize in (32, 64, 256, 4096):
            x = odd_values(n, dtype, seed=n)
            for given in (x, on_offset(x)):
                packed, absmax = kernel(given, format, blocksize)
                expected_packed, expected_absmax = fourbit.quantize_4bit(x, format, blocksize)
                same(absmax, expected_absmax)
                same(packed, expected_packed)


@for_each_level("quantize_4bit")
@pytest.mark.parametrize("format", ["nf4", "fp4"])
def test_quantize_4bit_puts_ties_below_the_threshold(kernel, format):
    thresholds = torch.tensor(formats.FORMATS[format].threshold_bits, dtype=torch.int64).to(torch.int32)
    near = torch.stack([(thresholds + step).view(torch.float32) for step in (-1, 0, 1)]).reshape(-1)
    x = torch.cat((torch.ones(1), near, -near))
    packed, _ = kernel(x, format, 64)
    same(packed, fourbit.quantize_4bit(x, format, 64)[0])


@for_each_level("dequantize_4bit")
@pytest.mark.parametrize("format", ["nf4", "fp4"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_dequantize_4bit_equals_the_reference(kernel, format, dtype):
    for n in SIZES:
        for blocksize in (32, 64, 512, 4096):
            generator = torch.Generator().manual_seed(n)
            packed = torch.randint(0, 256, ((n + 1) // 2,), dtype=torch.uint8, generator=generator)
            absmax = odd_values(-(-n // blocksize) + 1, torch.float32, seed=n).abs()
            args = (None, None, None, format, blocksize, [n], dtype)
            same(kernel(packed, absmax, *args), fourbit.dequantize_4bit(packed, absmax, *args))
            same(kernel(on_offset(packed), on_offset(absmax), *args), fourbit.dequantize_4bit(packed, absmax, *args))


@for_each_level("dequantize_4bit")
@pytest.mark.parametrize("dtype", DTYPES)
def test_dequantize_4bit_of_nested_absmax_equals_the_reference(kernel, dtype):
    for n in (5, 64 * 256, 64 * 300 + 17, 200000):
        packed = torch.randint(0, 256, ((n + 1) // 2,), dtype=torch.uint8)
        blocks = -(-n // 64)
        nested = (
            torch.randint(0, 256, (blocks,), dtype=torch.uint8),
            torch.rand(-(-blocks // 256)),
            formats.codebook("dynamic", torch.device("cpu")),
            torch.tensor(0.37),
        )
        args = ("nf4", 64, [n], dtype)
        same(kernel(packed, *nested, *args), fourbit.dequantize_4bit(packed, *nested, *args))


@for_each_level("dequantize_4bit")
def test_dequantize_4bit_of_a_large_tensor_bypasses_the_cache_correctly(kernel):
    n = (8 << 20) + 77
    packed = torch.randint(0, 256, ((n + 1) // 2,), dtype=torch.uint8)
    absmax = torch.rand(-(-n // 64))
    for dtype in DTYPES:
        args = (None, None, None, "nf4", 64, [n], dtype)
        same(kernel(packed, absmax, *args), fourbit.dequantize_4bit(packed, absmax, *args))


def codebooks():
    cpu = torch.device("cpu")
    generator = torch.Generator().manual_seed(1)
    yield formats.codebook("dynamic", cpu)
    yield formats.codebook("dynamic_unsigned", cpu)
    yield torch.linspace(-1, 1, 256)
    yield torch.randn(256, generator=generator).clamp(-1, 1).sort().values  # repeats at both ends
    yield (torch.randn(256, generator=generator) * 1e-3 + 0.5).sort().values  # many thresholds in one bucket
    yield torch.cat((torch.zeros(100), torch.linspace(0, 1, 156)))


@for_each_level("quantize_8bit")
@pytest.mark.parametrize("dtype", DTYPES)
def test_quantize_8bit_equals_the_reference(kernel, dtype):
    for codebook in codebooks():
        for n in (1, 17, 256, 1000, 8192, 20001):
            for blocksize in (1, 3, 64, 256, 4096):
                x = odd_values(n, dtype, seed=n)
                codes, absmax = kernel(on_offset(x), codebook, blocksize)
                expected_codes, expected_absmax = eightbit.quantize_8bit(x, codebook, blocksize)
                same(absmax, expected_absmax)
                same(codes, expected_codes)


@for_each_level("quantize_8bit")
def test_quantize_8bit_sends_ties_to_the_even_code(kernel):
    for codebook in codebooks():
        middle = (codebook[1:] + codebook[:-1]) * 0.5
        bits = middle.view(torch.int32)
        near = torch.cat([(bits + step).view(torch.float32) for step in (-1, 0, 1)])
        near = near[near.abs() <= 1]
        for n in (1, 20):  # by search, by table
            x = torch.cat((torch.ones(1), torch.tensor([0.0, -0.0, 1e-44, -1e-44]), near.repeat(n)))
            codes, _ = kernel(x, codebook, x.numel())
            same(codes, eightbit.quantize_8bit(x, codebook, x.numel())[0])


@for_each_level("dequantize_8bit")
@pytest.mark.parametrize("dtype", DTYPES)
def test_dequantize_8bit_equals_the_reference(kernel, dtype):
    codebook = formats.codebook("dynamic", torch.device("cpu"))
    for n in (1, 17, 256, 1000, 20001, 3 << 20):
        for blocksize in (1, 3, 100, 256, 4096):
            if n > 100000 and blocksize < 64:
                continue
            codes = torch.randint(0, 256, (n,), dtype=torch.uint8)
            absmax = odd_values(-(-n // blocksize), torch.float32, seed=n).abs()
            same(
                kernel(on_offset(codes), absmax, codebook, blocksize, dtype),
                eightbit.dequantize_8bit(codes, absmax, codebook, blocksize, dtype),
            )


def quantized_rows(x, threshold):
    """The rule with a true division (a Python scalar over a tensor multiplies by the reciprocal)."""
    rows = x.float()
    magnitude = rows.abs().nan_to_num(nan=0.0, posinf=float("inf"))
    outliers = magnitude >= threshold if threshold > 0 else torch.zeros_like(rows, dtype=torch.bool)
    absmax = magnitude.masked_fill(outliers, 0.0).amax(dim=1)
    columns = outliers.any(dim=0)
    scale = torch.where(absmax > 0, torch.full_like(absmax, 127.0) / absmax, 0.0)
    q = (rows * scale[:, None]).masked_fill(columns, 0.0).nan_to_num(0.0).round().clamp(-127, 127)
    return q.to(torch.int8), absmax, columns


@for_each_level("quantize_int8_rows")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("threshold", [0.0, 2.5, 1e30])
def test_quantize_int8_rows_equals_the_rule(kernel, dtype, threshold):
    for rows, k in ((1, 1), (1, 33), (3, 7), (5, 64), (40, 300), (70, 4099)):
        x = torch.randn(rows, k, generator=torch.Generator().manual_seed(k)).to(dtype)
        x[rows // 2] = 0
        x.view(-1)[k // 2] = float("nan")
        given = on_offset(x)
        before = given.clone()
        for result, expected in zip(kernel(given, threshold), quantized_rows(x, threshold), strict=True):
            same(result, expected)
        same(given, before)


@for_each_level("dequantize_int8")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("source", [torch.int8, torch.int32])
def test_dequantize_int8_equals_the_reference(kernel, dtype, source):
    for rows, n in ((1, 1), (3, 17), (5, 64), (33, 1000)):
        generator = torch.Generator().manual_seed(n)
        top = 127 if source is torch.int8 else 1 << 30
        q = torch.randint(-top, top, (rows, n), dtype=source, generator=generator)
        row, col = torch.rand(rows, generator=generator), torch.rand(n, generator=generator)
        bias = torch.randn(n, generator=generator)
        for column in (None, col):
            for add in (None, bias, bias.to(dtype)):
                expected = int8.dequantize_int8(q, row, column, add, dtype)
                same(kernel(on_offset(q), row, column, add, dtype), expected)


@for_each_level("matmul_int8")
def test_matmul_int8_is_exact(kernel):
    for m in (0, 1, 2, 3, 5, 6, 7, 13, 40):
        for n, k in ((1, 1), (3, 63), (4, 64), (7, 65), (40, 200), (70, 4096), (33, 4100), (5, 9001)):
            generator = torch.Generator().manual_seed(m * n * k)
            a = torch.randint(-128, 128, (m, k), dtype=torch.int8, generator=generator)
            b = torch.randint(-128, 128, (n, k), dtype=torch.int8, generator=generator)
            same(kernel(on_offset(a), on_offset(b)), int8.matmul_int8(a, b))


@for_each_level("matmul_int8")
def test_matmul_int8_survives_extreme_values(kernel):
    a = torch.full((3, 20000), -128, dtype=torch.int8)
    b = torch.full((5, 20000), -128, dtype=torch.int8)
    same(kernel(a, b), torch.full((3, 5), 128 * 128 * 20000, dtype=torch.int32))
