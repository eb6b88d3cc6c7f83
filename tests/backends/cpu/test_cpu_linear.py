"""Every instruction-set level of the CPU backend: the linear ops, against float64 and against torch's own rounding."""

import pytest
import torch
import torch.nn.functional as F
from levels import DTYPES, for_each_level, on_offset

from halfbyte import formats
from halfbyte.ops import fourbit, int8, linear4bit

ULP = {torch.float32: 2.0**-23, torch.float16: 2.0**-10, torch.bfloat16: 2.0**-7}
# N, K: whole groups, partial groups, blocks that cross rows, odd K, one row, more than one chunk of K.
SHAPES = [(1, 128), (5, 64), (16, 256), (40, 96), (33, 40), (7, 37), (3, 1), (12, 200), (66, 130), (2, 4224), (9, 2049)]


def weight4(n, k, format, blocksize, nested=False, seed=0):
    generator = torch.Generator().manual_seed(seed)
    packed, absmax = fourbit.quantize_4bit(torch.randn(n, k, generator=generator) * 0.1, format, blocksize)
    if not nested:
        return packed, absmax, None, None, None
    blocks = absmax.numel()
    codes = torch.randint(0, 256, (blocks,), dtype=torch.uint8, generator=generator)
    nested_absmax = torch.rand(-(-blocks // 256), generator=generator) * 0.01
    return packed, codes, nested_absmax, formats.codebook("dynamic", torch.device("cpu")), torch.tensor(0.2)


def close(result, exact, magnitude, dtype, reference):
    """No worse than rounding every weight and the result to `dtype` can be, and than the reference by much.

    magnitude   sum of |x| |w|: what roundings of single weights are relative to
    """
    assert result.dtype is dtype
    assert result.shape == exact.shape
    error = (result.double() - exact).abs()
    subnormal = 2.0**-24 if dtype is torch.float16 else 0.0
    bound = ULP[dtype] * (0.5 * exact.abs() + 0.5 * magnitude) + 4e-7 * magnitude + subnormal
    assert bool((error <= bound).all()), f"error {(error / bound).max():.2f} times the bound"
    if error.numel() > 200:
        theirs = (reference.double() - exact).abs()
        floor = ULP[dtype] * 0.05 * exact.abs().mean()
        assert error.mean() <= 1.25 * theirs.mean() + floor, f"{error.mean()} against {theirs.mean()}"


def check_linear(kernel, m, n, k, format, blocksize, dtype, nested=False, bias=True, offset=False):
    generator = torch.Generator().manual_seed(m * 7 + n + k)
    x = torch.randn(m, k, generator=generator).to(dtype)
    add = torch.randn(n, generator=generator).to(dtype) if bias else None
    weight = weight4(n, k, format, blocksize, nested)
    exact_weight = fourbit.dequantize_4bit(*weight, format, blocksize, [n, k], torch.float32).double()
    exact = F.linear(x.double(), exact_weight, None if add is None else add.double())
    magnitude = x.double().abs() @ exact_weight.abs().T
    given = on_offset(x) if offset else x
    if offset:
        weight = (on_offset(weight[0]), *weight[1:])
    y = kernel(given, *weight, add, format, blocksize, n)
    reference = linear4bit.linear_4bit(x, *weight, add, format, blocksize, n)
    close(y, exact, magnitude, dtype, reference)


@for_each_level("linear_4bit")
@pytest.mark.parametrize("dtype", DTYPES)
def test_linear_4bit_is_as_exact_as_the_reference(kernel, dtype):
    kernel_takes(kernel, dtype)
    for n, k in SHAPES:
        for m in (1, 2, 4, 7):
            check_linear(kernel, m, n, k, "nf4", 64, dtype, bias=m % 2 == 0, offset=m == 3)


@for_each_level("linear_4bit")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("format", ["nf4", "fp4"])
@pytest.mark.parametrize("nested", [False, True])
def test_linear_4bit_takes_every_blocksize(kernel, dtype, format, nested):
    kernel_takes(kernel, dtype)
    for blocksize in formats.BLOCKSIZES:
        for n, k in ((5, 4224), (40, 96), (33, 72)):
            for m in (1, 6):
                check_linear(kernel, m, n, k, format, blocksize, dtype, nested)


@for_each_level("linear_4bit")
@pytest.mark.parametrize("dtype", DTYPES)
def test_linear_4bit_takes_every_number_of_rows(kernel, dtype):
    kernel_takes(kernel, dtype)
    for m in (*range(1, 21), 65, 300):
        check_linear(kernel, m, 70, 192, "nf4", 64, dtype)


@for_each_level("linear_4bit")
@pytest.mark.parametrize("dtype", DTYPES)
def test_linear_4bit_of_an_activation_with_a_mean_has_no_systematic_error(kernel, dtype):
    kernel_takes(kernel, dtype)
    n, k = 256, 4096
    weight = weight4(n, k, "nf4", 64)
    exact_weight = fourbit.dequantize_4bit(*weight, "nf4", 64, [n, k], torch.float32).double()
    for m in (1, 5):
        x = torch.ones(m, k).to(dtype)
        exact = x.double() @ exact_weight.T
        error = (kernel(x, *weight, None, "nf4", 64, n).double() - exact).abs().mean()
        theirs = (linear4bit.linear_4bit(x, *weight, None, "nf4", 64, n).double() - exact).abs().mean()
        assert error <= 1.3 * theirs + 1e-5


@for_each_level("linear_4bit")
def test_linear_4bit_keeps_nan_and_inf_where_they_belong(kernel):
    n, k, dtype = 40, 256, torch.bfloat16
    for m in (3, 9):
        weight = list(weight4(n, k, "nf4", 64))
        x = torch.randn(m, k).to(dtype)
        clean = kernel(x, *weight, None, "nf4", 64, n)
        x[1, 100] = float("nan")
        weight[1] = weight[1].clone()
        weight[1][5 * 4 + 2] = float("nan")  # a block of row 5
        y = kernel(x, *weight, None, "nf4", 64, n)
        touched = torch.zeros(m, n, dtype=torch.bool)
        touched[1] = True
        touched[:, 5] = True
        assert torch.equal(y.isnan(), touched)
        assert torch.equal(y[~touched], clean[~touched])


@for_each_level("linear_4bit_backward")
@pytest.mark.parametrize("dtype", DTYPES)
def test_linear_4bit_backward_is_as_exact_as_the_reference(kernel, dtype):
    kernel_takes(kernel, dtype)
    for n, k in (*SHAPES, (300, 700)):
        for m, blocksize, nested in ((1, 64, False), (3, 32, True), (13, 256, False), (250, 64, True)):
            dy = torch.randn(m, n, generator=torch.Generator().manual_seed(n)).to(dtype)
            weight = weight4(n, k, "nf4", blocksize, nested)
            exact_weight = fourbit.dequantize_4bit(*weight, "nf4", blocksize, [n, k], torch.float32).double()
            dx = kernel(on_offset(dy), *weight, "nf4", blocksize, k)
            reference = linear4bit.linear_4bit_backward(dy, *weight, "nf4", blocksize, k)
            close(dx, dy.double() @ exact_weight, dy.double().abs() @ exact_weight.abs(), dtype, reference)


@for_each_level("linear_int8")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("threshold", [0.0, 3.0])
def test_linear_int8_exact_agrees_with_the_rule(kernel, dtype, threshold):
    for n, k in ((1, 64), (5, 33), (40, 200), (70, 4100)):
        for m in (1, 2, 6, 7, 20):
            generator = torch.Generator().manual_seed(m * n + k)
            x = torch.randn(m, k, generator=generator).to(dtype)
            x[0, k // 2] = 50.0
            weight = torch.randint(-127, 128, (n, k), dtype=torch.int8, generator=generator)
            absmax = torch.rand(n, generator=generator)
            bias = torch.randn(n, generator=generator).to(dtype) if m % 2 else None
            before = x.clone()
            y = kernel(x, weight, absmax, bias, threshold, "exact")
            assert torch.equal(x, before)
            expected = int8.linear_int8(x, weight, absmax, bias, threshold, "exact")
            torch.testing.assert_close(y, expected, rtol=ULP[dtype] * 2, atol=2e-3 * float(expected.abs().mean()))


@for_each_level("linear_int8")
@pytest.mark.parametrize("dtype", DTYPES)
def test_linear_int8_w8a16_is_as_exact_as_the_reference(kernel, dtype):
    for n, k in ((1, 64), (5, 33), (40, 200), (70, 2100)):
        for m in (1, 2, 6, 7, 20):
            x = torch.randn(m, k).to(dtype)
            weight = torch.randint(-127, 128, (n, k), dtype=torch.int8)
            absmax = torch.rand(n)
            bias = torch.randn(n).to(dtype)
            exact_weight = weight.double() * absmax.double()[:, None] / 127
            exact = F.linear(x.double(), exact_weight, bias.double())
            y = kernel(on_offset(x), weight, absmax, bias, 0.0, "w8a16")
            reference = int8.linear_int8(x, weight, absmax, bias, 0.0, "w8a16")
            close(y, exact, x.double().abs() @ exact_weight.abs().T + bias.double().abs(), dtype, reference)


def kernel_takes(kernel, dtype):
    if kernel.level == "avx512bf16" and dtype is not torch.bfloat16:
        pytest.skip("the level takes bfloat16 only")
