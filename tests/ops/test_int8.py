"""quantize_int8_rows, dequantize_int8, matmul_int8, linear_int8: LLM.int8(), exactly."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import halfbyte
from halfbyte import functional as F

ops = torch.ops.halfbyte
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
TOLERANCE = {torch.float32: (1e-4, 1e-4), torch.float16: (1e-2, 1e-2), torch.bfloat16: (2e-2, 2e-2)}


def randn(*shape, dtype=torch.float32, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def int8(*shape, seed=0):
    g = torch.Generator().manual_seed(seed)
    return torch.randint(-127, 128, shape, generator=g, dtype=torch.int8)


def same_bits(a, b):
    kind = {1: torch.uint8, 2: torch.int16, 4: torch.int32}[a.element_size()]
    return a.dtype == b.dtype and a.shape == b.shape and torch.equal(a.view(kind), b.view(kind))


def rows_oracle(x, threshold):
    rows = x.float().reshape(-1, x.shape[-1]).numpy()
    outlier = np.abs(rows) >= threshold if threshold > 0 else np.zeros_like(rows, dtype=bool)
    columns = outlier.any(axis=0)
    q, absmaxes = np.zeros(rows.shape, dtype=np.int8), np.zeros(len(rows), dtype=np.float32)
    for i, row in enumerate(rows):
        inside = np.abs(row[~outlier[i] & ~np.isnan(row)])
        absmaxes[i] = inside.max() if len(inside) else 0
        if absmaxes[i] > 0:
            scaled = np.rint(row * (np.float32(127) / absmaxes[i]))  # rint: ties to even
            q[i] = np.where(columns | np.isnan(scaled), 0, scaled).astype(np.int8)
    return q.reshape(x.shape), absmaxes, columns


# -- rows ----------------------------------------------------------------------------------------------------


def test_quantize_int8_rows_rounds_ties_to_even(backend):
    x = torch.tensor([[127.0, 0.5, 1.5, 2.5, -0.5, -1.5, -2.5, 126.5]])

    q, absmax, columns = ops.quantize_int8_rows(x, 0.0)

    assert q.tolist() == [[127, 0, 2, 2, 0, -2, -2, 126]]
    assert absmax.tolist() == [127.0]
    assert not columns.any()


def test_quantize_int8_rows_gives_zeros_for_a_zero_row(backend):
    x = torch.tensor([[0.0, -0.0, 0.0], [1.0, -1.0, 0.25]])

    q, absmax, _ = ops.quantize_int8_rows(x, 0.0)

    assert q.tolist() == [[0, 0, 0], [127, -127, 32]]
    assert absmax.tolist() == [0.0, 1.0]


def test_quantize_int8_rows_gives_zero_for_nan_and_ignores_it(backend):
    q, absmax, _ = ops.quantize_int8_rows(torch.tensor([[math.nan, 2.0], [math.nan, math.nan]]), 0.0)

    assert q.tolist() == [[0, 127], [0, 0]]
    assert absmax.tolist() == [2.0, 0.0]


def test_quantize_int8_rows_takes_a_value_on_the_threshold_for_an_outlier(backend):
    x = torch.tensor([[6.0, 1.0, 5.9, 0.0], [2.0, -1.0, 1.0, 0.0]])

    q, absmax, columns = ops.quantize_int8_rows(x, 6.0)

    assert columns.tolist() == [True, False, False, False]
    assert q[:, 0].tolist() == [0, 0]  # the whole column, in every row
    # An outlier stays out of its row's maximum; a smaller value in its column does not.
    assert absmax.tolist() == [torch.tensor(5.9).item(), 2.0]
    assert q[1].tolist() == [0, -64, 64, 0]


def test_quantize_int8_rows_of_outliers_only_is_zero(backend):
    q, absmax, columns = ops.quantize_int8_rows(torch.full((2, 3), 9.0), 6.0)

    assert not q.any()
    assert absmax.tolist() == [0.0, 0.0]
    assert columns.tolist() == [True, True, True]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("threshold", [0.0, 2.5])
@pytest.mark.parametrize("shape", [(1, 64), (5,), (7, 33), (2, 3, 65), (3, 1)])
def test_quantize_int8_rows_agrees_with_the_oracle(backend, shape, threshold, dtype):
    x = randn(*shape, dtype=dtype)

    q, absmax, columns = ops.quantize_int8_rows(x, threshold)

    expected, expected_absmax, expected_columns = rows_oracle(x, threshold)
    assert np.array_equal(q.numpy(), expected)
    assert np.array_equal(absmax.numpy(), expected_absmax)
    assert np.array_equal(columns.numpy(), expected_columns)


@pytest.mark.parametrize("shape", [(0, 8), (3, 0), (0,), (2, 0, 4)])
def test_quantize_int8_rows_of_an_empty_tensor(backend, shape):
    q, absmax, columns = ops.quantize_int8_rows(torch.empty(shape), 6.0)

    assert (q.shape, q.dtype) == (shape, torch.int8)
    assert (absmax.shape, absmax.dtype) == ((math.prod(shape[:-1]),), torch.float32)
    assert columns.tolist() == [False] * shape[-1]
    assert not absmax.any()


@given(
    rows=st.integers(1, 6),
    columns=st.integers(1, 120),
    dtype=st.sampled_from(DTYPES),
    threshold=st.sampled_from([0.0, 1e-3, 2.0, 1e9]),
    scale=st.sampled_from([1e-6, 1.0, 1e4]),
    seed=st.integers(0, 2**31),
)
def test_int8_rows_agree_with_the_oracle_and_restore_x(backend, rows, columns, dtype, threshold, scale, seed):
    x = (randn(rows, columns, seed=seed) * scale).to(dtype)

    q, absmax, outlier = ops.quantize_int8_rows(x, threshold)
    back = ops.dequantize_int8(q, absmax, None, None, torch.float32)

    expected, expected_absmax, expected_columns = rows_oracle(x, threshold)
    assert np.array_equal(q.numpy(), expected)
    assert np.array_equal(absmax.numpy(), expected_absmax)
    assert np.array_equal(outlier.numpy(), expected_columns)
    error = (back - x.float()).abs()[:, ~outlier]
    assert torch.all(error <= absmax[:, None] / 127 * 0.5001)


@pytest.mark.parametrize("dtype", DTYPES)
def test_quantize_int8_rows_takes_any_strides_and_offset(backend, dtype):
    base = randn(65, 131, dtype=dtype)

    for view in (base.t(), base[1:, 3:], base[::2, ::3], base[:1].expand(5, 131)):
        found = ops.quantize_int8_rows(view, 2.0)
        for one, other in zip(found, ops.quantize_int8_rows(view.contiguous().clone(), 2.0)):
            assert same_bits(one, other) if one.dtype != torch.bool else torch.equal(one, other)
            assert one.is_contiguous()


# -- dequantize ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
def test_dequantize_int8_multiplies_by_the_float32_constant(backend, dtype):
    q, absmax = int8(5, 64), randn(5).abs()

    found = ops.dequantize_int8(q, absmax, None, None, dtype)

    values = q.numpy().astype(np.float32) * absmax.numpy()[:, None] * np.float32(7.874015718698502e-3)
    assert same_bits(found, torch.from_numpy(values).to(dtype))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bias", [None, torch.float32, torch.float16])
def test_dequantize_int8_scales_a_product_by_the_exact_constant(backend, bias, dtype):  # bitsandbytes bug 12
    q = torch.randint(-(2**24), 2**24, (5, 33), dtype=torch.int32, generator=torch.Generator().manual_seed(0))
    rows, columns = randn(5, seed=1).abs(), randn(33, seed=2).abs()
    b = None if bias is None else randn(33, seed=3).to(bias)

    found = ops.dequantize_int8(q, rows, columns, b, dtype)

    outer = rows.numpy()[:, None] * columns.numpy()[None, :]
    values = q.numpy().astype(np.float32) * outer * np.float32(6.200012e-05)
    values = values if b is None else values + b.float().numpy()
    assert np.float32(6.200012e-05) == np.float32(1 / 127**2)
    assert same_bits(found, torch.from_numpy(values).to(dtype))


@pytest.mark.parametrize("shape", [(0, 4), (4, 0), (7,), (2, 3, 4)])
@pytest.mark.parametrize("source", [torch.int8, torch.int32])
def test_dequantize_int8_keeps_the_shape(backend, source, shape):
    rows = torch.ones(math.prod(shape[:-1]))
    columns = torch.ones(shape[-1])

    found = ops.dequantize_int8(torch.zeros(shape, dtype=source), rows, columns, None, torch.float16)

    assert (found.shape, found.dtype) == (shape, torch.float16)


# -- product -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("m", "n", "k"), [(1, 1, 1), (1, 7, 33), (5, 3, 64), (17, 65, 129), (4, 4, 0), (0, 3, 8), (3, 0, 8)]
)
def test_matmul_int8_is_exact(backend, m, n, k):
    a, b = int8(m, k), int8(n, k, seed=1)

    found = ops.matmul_int8(a, b)

    assert found.dtype == torch.int32
    assert np.array_equal(found.numpy(), a.numpy().astype(np.int64) @ b.numpy().astype(np.int64).T)


@pytest.mark.parametrize("k", [63, 4096, 70001])
@pytest.mark.parametrize("left", [-128, 127])
@pytest.mark.parametrize("right", [-128, 127])
def test_matmul_int8_is_exact_at_the_extremes(backend, left, right, k):
    # 2^24 is passed, where float32 sums would round; a saturating 16-bit pair sum would show at once.
    a = torch.full((2, k), left, dtype=torch.int8)
    b = torch.full((3, k), right, dtype=torch.int8)
    a[0, 0] = 1

    found = ops.matmul_int8(a, b)

    assert found[1].tolist() == [k * left * right] * 3
    assert found[0].tolist() == [(k - 1) * left * right + right] * 3


def test_matmul_int8_takes_strided_matrices(backend):
    a, b = int8(40, 50), int8(60, 50, seed=1)

    found = ops.matmul_int8(a[::2, 1:40], b[1:, :39])

    assert torch.equal(found, ops.matmul_int8(a[::2, 1:40].contiguous(), b[1:, :39].contiguous()))
    assert torch.equal(
        ops.matmul_int8(a.t(), b[:, :40].t()[:, :40]),
        ops.matmul_int8(*map(torch.clone, (a.t().contiguous(), b[:, :40].t()[:, :40].contiguous()))),
    )


# -- linear --------------------------------------------------------------------------------------------------


def linear_oracle(x, weight, absmax, bias, threshold, mode):
    """In float64 apart from the quantization of x."""
    w = weight.double() * absmax.double()[:, None] / 127
    rows = x.reshape(-1, x.shape[-1])
    if mode == "w8a16":
        y = rows.double() @ w.T
    else:
        q, row_absmax, columns = map(torch.from_numpy, rows_oracle(rows, threshold))
        y = (q.double() * row_absmax.double()[:, None] / 127) @ w.T
        y = y + torch.where(columns, rows.double(), 0.0) @ w.T
    y = y if bias is None else y + bias.double()
    return y.reshape(*x.shape[:-1], len(weight))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("mode", ["exact", "w8a16"])
@pytest.mark.parametrize("threshold", [0.0, 2.5])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("leading", [(), (1,), (9,), (2, 5), (0,)])
def test_linear_int8_follows_the_formula(backend, leading, bias, threshold, mode, dtype):
    weight, absmax = int8(33, 100), randn(33, seed=1).abs() / 10 + 0.01
    x = randn(*leading, 100, dtype=dtype, seed=2)
    b = randn(33, dtype=dtype, seed=3) if bias else None

    found = F.linear_int8(x, weight, absmax, b, threshold=threshold, mode=mode)

    assert found.dtype == dtype
    assert found.shape == (*leading, 33)
    rtol, atol = TOLERANCE[dtype]
    expected = linear_oracle(x, weight, absmax, b, threshold, mode)
    torch.testing.assert_close(found.double(), expected, rtol=rtol, atol=atol)


@pytest.mark.parametrize("dtype", DTYPES)
def test_linear_int8_is_its_parts(backend, dtype):
    x, weight, absmax, bias = randn(6, 64, dtype=dtype), int8(8, 64), randn(8, seed=1).abs(), randn(8, seed=2)
    q, rows, _ = ops.quantize_int8_rows(x, 0.0)

    found = ops.linear_int8(x, weight, absmax, bias.to(dtype), 0.0, "exact")

    parts = ops.dequantize_int8(ops.matmul_int8(q, weight), rows, absmax, bias.to(dtype), dtype)
    rtol, atol = TOLERANCE[dtype]
    torch.testing.assert_close(found, parts, rtol=rtol / 10, atol=atol / 10)


def test_linear_int8_does_not_overflow_in_half_precision_on_the_way(backend):
    # bitsandbytes writes the product as float16; here it must survive to bfloat16.
    x = torch.full((2, 64), 200.0, dtype=torch.bfloat16)
    weight, absmax = torch.full((4, 64), 127, dtype=torch.int8), torch.full((4,), 100.0)

    found = F.linear_int8(x, weight, absmax)

    assert torch.all((found.float() / 1.28e6 - 1).abs() < 0.01)


def test_linear_int8_takes_large_activations(backend):
    found = F.linear_int8(torch.full((1, 8), 1e5), torch.full((1, 8), 127, dtype=torch.int8), torch.ones(1))

    assert found.item() == pytest.approx(8e5, rel=1e-5)


@pytest.mark.parametrize("mode", ["exact", "w8a16"])
@pytest.mark.parametrize("threshold", [0.0, 1.0])
def test_linear_int8_leaves_its_inputs_alone(backend, threshold, mode):
    inputs = [randn(6, 64), int8(8, 64), randn(8).abs(), randn(8)]
    kept, versions = [t.clone() for t in inputs], [t._version for t in inputs]

    F.linear_int8(*inputs, threshold=threshold, mode=mode)

    assert all(map(torch.equal, inputs, kept))
    assert [t._version for t in inputs] == versions


def test_linear_int8_takes_strided_activations_and_weights(backend):
    x, weight, absmax = randn(7, 200), int8(33, 200), randn(33).abs()

    found = F.linear_int8(x[::2, 50:150], weight[:, 50:150], absmax, threshold=2.0)

    expected = F.linear_int8(x[::2, 50:150].contiguous(), weight[:, 50:150].contiguous(), absmax, threshold=2.0)
    torch.testing.assert_close(found, expected)


@given(
    m=st.integers(1, 8),
    k=st.integers(1, 150),
    n=st.integers(1, 40),
    threshold=st.sampled_from([0.0, 1.5]),
    mode=st.sampled_from(["exact", "w8a16"]),
    dtype=st.sampled_from(DTYPES),
    seed=st.integers(0, 2**31),
)
def test_linear_int8_agrees_with_the_reference(backend, m, k, n, threshold, mode, dtype, seed):
    args = randn(m, k, dtype=dtype, seed=seed), int8(n, k, seed=seed), randn(n, seed=seed).abs() / k**0.5

    found = ops.linear_int8(*args, None, threshold, mode)
    with halfbyte.use_backend("reference"):
        expected = ops.linear_int8(*args, None, threshold, mode)

    rtol, atol = TOLERANCE[dtype]
    torch.testing.assert_close(found, expected, rtol=rtol, atol=atol)
