"""The ops against the real bitsandbytes on the CPU, within the gates of the formats page.

bitsandbytes' CPU path disagrees with its own CUDA path in known places, which are left out by name here: zero blocks
(NF4 byte 0x77 instead of 0x00), the sign of FP4's zero, the partial last block (true division), the 8-bit encoder
(a lookup table).  tests/interop/test_golden_cuda.py compares with the CUDA path.
"""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from halfbyte import QuantState, formats
from halfbyte import functional as F

CPU = torch.device("cpu")
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
dtypes = st.sampled_from(DTYPES)
four = st.sampled_from(list(formats.FORMATS))
few = settings(max_examples=30)


def randn(*shape, dtype=torch.float32, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def same_bits(a, b):
    kind = {1: torch.uint8, 2: torch.int16, 4: torch.int32}[a.element_size()]
    return (
        a.dtype == b.dtype and a.shape == b.shape and torch.equal(a.contiguous().view(kind), b.contiguous().view(kind))
    )


def same_decoded(ours, theirs, format):
    """FP4 by value: their CPU kernel decodes code 8 to -0.0, its table says +0.0."""
    return same_bits(ours, theirs) if format == "nf4" else ours.dtype == theirs.dtype and torch.equal(ours, theirs)


def values_of(packed, format, n):
    """Levels without their absmax."""
    flat = packed.reshape(-1)
    codes = torch.stack((flat >> 4, flat & 15), dim=1).reshape(-1)[:n]
    return formats.levels(format, CPU)[codes.long()]


def test_oracle_is_the_compatibility_target(oracle):
    assert oracle.version() == "0.50.2"


@few
@given(
    blocks=st.integers(1, 9),
    rest=st.integers(0, 63),
    blocksize=st.sampled_from([32, 64, 128, 256]),
    dtype=dtypes,
    format=four,
    scale=st.sampled_from([1e-4, 0.02, 1.0, 100.0]),
    zeros=st.booleans(),
    seed=st.integers(0, 2**31),
)
def test_quantize_4bit_agrees_with_bitsandbytes(
    backend, oracle, blocks, rest, blocksize, dtype, format, scale, zeros, seed
):
    n = blocks * blocksize + rest
    x = (randn(n, seed=seed) * scale).to(dtype)
    if zeros:
        x[:blocksize] = 0

    packed, state = F.quantize_4bit(x, format=format, blocksize=blocksize)
    theirs, their_state = oracle.quantize_4bit(x, format, blocksize)

    assert packed.shape == theirs.shape
    assert same_bits(state.absmax, their_state["absmax"])
    ours_value, their_value = values_of(packed, format, n), values_of(theirs, format, n)
    if zeros:
        assert packed[: blocksize // 2].eq(0).all()
        ours_value[:blocksize] = their_value[:blocksize] = 0
    full = blocks * blocksize
    if dtype is torch.float32 or format == "fp4":
        # A value on a threshold, which they put in another place by some ulp: both codes must be equally near.
        s = x.float() / state.absmax.clamp(min=1e-38).repeat_interleave(blocksize)[:n]
        farther = ((ours_value - s).abs() - (their_value - s).abs()).abs()
        assert torch.all(farther[:full] < 1e-5)
        assert (ours_value != their_value)[:full].sum() <= 1
    else:
        assert torch.equal(ours_value[:full], their_value[:full])
    assert (ours_value != their_value)[full:].sum() <= 1


@few
@given(
    rows=st.integers(1, 9),
    columns=st.integers(1, 200),
    blocksize=st.sampled_from([32, 64, 128, 256, 1024]),
    dtype=dtypes,
    format=four,
    seed=st.integers(0, 2**31),
)
def test_dequantize_4bit_equals_bitsandbytes(backend, oracle, rows, columns, blocksize, dtype, format, seed):
    x = randn(rows, columns, dtype=dtype, seed=seed)

    packed, state = F.quantize_4bit(x, format=format, blocksize=blocksize)

    assert same_decoded(F.dequantize_4bit(packed, state).reshape(-1), flat_dequantized(oracle, packed, state), format)


def flat_dequantized(oracle, packed, state):
    """Asked as one row: where blocks cross rows, as in (3, 96) by 64, their CPU kernel decodes wrong values."""
    entries = {**state.as_dict(), "shape": (state.shape.numel(),)}
    return oracle.dequantize_4bit(packed, entries)


@few
@given(
    n=st.integers(1, 3000),
    blocksize=st.sampled_from([64, 128]),
    dtype=dtypes,
    format=four,
    nested=st.booleans(),
    seed=st.integers(0, 2**31),
)
def test_their_quantized_tensors_decode_to_the_same_bits(backend, oracle, n, blocksize, dtype, format, nested, seed):
    x = randn(n, dtype=dtype, seed=seed)

    packed, entries = oracle.quantize_4bit(x, format, blocksize, nested)

    state = QuantState.from_dict(entries)
    assert state.nested == nested
    assert same_decoded(F.dequantize_4bit(packed, state), oracle.dequantize_4bit(packed, entries), format)


@pytest.mark.parametrize("format", list(formats.FORMATS))
@pytest.mark.parametrize("dtype", DTYPES)
def test_nested_statistics_are_close_to_theirs(backend, oracle, dtype, format):
    x = randn(512, 256, dtype=dtype)

    _, state = F.quantize_4bit(x, format=format, nested=True)
    _, theirs = oracle.quantize_4bit(x, format, 64, True)

    their_state = QuantState.from_dict(theirs)
    assert state.offset.item() == pytest.approx(their_state.offset.item(), rel=1e-6)
    assert same_bits(state.state2.code, their_state.state2.code)
    torch.testing.assert_close(state.state2.absmax, their_state.state2.absmax, rtol=1e-5, atol=1e-6)
    _, plain = F.quantize_4bit(x, format=format)
    ours = F.dequantize_8bit(state.absmax, state.state2) + state.offset
    other = F.dequantize_8bit(their_state.absmax, their_state.state2) + their_state.offset
    # Their encoder is coarser; ours must not be farther from the plain absmax.
    assert (ours - plain.absmax).abs().mean() <= (other - plain.absmax).abs().mean() + 1e-7


@pytest.mark.parametrize("storage", formats.STORAGES)
def test_storages_hold_the_same_bytes_as_theirs(backend, oracle, storage):
    x = randn(64, 64, dtype=torch.float16)

    packed, _ = F.quantize_4bit(x, storage=storage)
    theirs, _ = oracle.quantize_4bit(x, "nf4", 64, False, storage)

    assert packed.shape == theirs.shape
    assert packed.dtype == theirs.dtype
    assert torch.equal(packed.view(torch.uint8), theirs.view(torch.uint8))


@few
@given(
    n=st.integers(1, 2000),
    blocksize=st.sampled_from([64, 256, 4096]),
    dtype=dtypes,
    name=st.sampled_from(list(formats.codebook_names())),
    seed=st.integers(0, 2**31),
)
def test_quantize_8bit_is_never_worse_than_their_lookup_table(backend, oracle, n, blocksize, dtype, name, seed):
    x = randn(n, dtype=dtype, seed=seed)
    x = x.abs() if name == "dynamic_unsigned" else x
    table = formats.codebook(name, CPU)

    codes, state = F.quantize_8bit(x, codebook=name, blocksize=blocksize)
    theirs, absmax = oracle.quantize_blockwise(x, table.clone(), blocksize)

    assert same_bits(state.absmax, absmax)
    s = x.float() / absmax.repeat_interleave(blocksize)[:n]
    ours_value, their_value = table[codes.long()], table[theirs.long()]
    assert torch.all((ours_value - s).abs() <= (their_value - s).abs() + 2e-7)
    steps = (codes.int() - theirs.int()).abs()
    assert torch.all((steps <= 1) | ((ours_value - their_value).abs() <= 1e-4))


@few
@given(
    rows=st.integers(1, 9),
    columns=st.integers(1, 200),
    blocksize=st.sampled_from([64, 100, 256, 4096]),
    dtype=dtypes,
    name=st.sampled_from(list(formats.codebook_names())),
    seed=st.integers(0, 2**31),
)
def test_dequantize_8bit_equals_bitsandbytes(backend, oracle, rows, columns, blocksize, dtype, name, seed):
    g = torch.Generator().manual_seed(seed)
    codes = torch.randint(0, 256, (rows, columns), dtype=torch.uint8, generator=g)
    absmax = torch.rand(-(-codes.numel() // blocksize), generator=g)
    table = formats.codebook(name, CPU)

    found = torch.ops.halfbyte.dequantize_8bit(codes, absmax, table, blocksize, dtype)

    theirs = oracle.dequantize_blockwise(codes, absmax, table.clone(), blocksize, dtype)
    if dtype == torch.float16:  # on a Xeon with AVX512-FP16 their subnormals differed by one step
        torch.testing.assert_close(found, theirs, rtol=0, atol=2**-24)
        theirs = torch.where(theirs.abs() < 2**-14, found, theirs)
    assert same_bits(found, theirs)


@pytest.mark.parametrize(("name", "args"), [("dynamic", ()), ("dynamic_unsigned", (False,))])
def test_codebooks_are_those_that_bitsandbytes_computes(oracle, name, args):
    if torch.backends.cpu.get_cpu_capability() == "DEFAULT":
        pytest.skip("bitsandbytes computes other digits without AVX2")

    assert same_bits(oracle.create_map("create_dynamic_map", args), formats.codebook(name, CPU))


@pytest.mark.parametrize("format", list(formats.FORMATS))
def test_4bit_tables_are_theirs(oracle, format):
    assert same_bits(oracle.create_map("get_4bit_type", (format, "cpu")), formats.levels(format, CPU))


@few
@given(
    rows=st.integers(1, 9),
    columns=st.integers(1, 200),
    dtype=dtypes,
    threshold=st.sampled_from([0.0, 1.5, 6.0]),
    seed=st.integers(0, 2**31),
)
def test_quantize_int8_rows_agrees_with_bitsandbytes(backend, oracle, rows, columns, dtype, threshold, seed):
    x = randn(rows, columns, dtype=dtype, seed=seed)
    x[:, 0] = 0.5  # no row of outliers alone: they divide by zero there

    q, absmax, outliers = F.quantize_int8_rows(x, threshold=threshold)
    theirs, stats, their_columns = oracle.int8_vectorwise_quant(x, threshold)

    assert same_bits(absmax, stats)
    assert outliers.nonzero().reshape(-1).tolist() == ([] if their_columns is None else their_columns.tolist())
    differ = q != theirs  # they round 127 / absmax twice: only a value between two codes can tell
    assert torch.all((q.int() - theirs.int()).abs() <= 1)
    between = x.float() * 127 / absmax[:, None]
    assert torch.all((between - between.floor() - 0.5).abs()[differ] < 1e-4)


def test_dequantize_int8_agrees_with_bitsandbytes(backend, oracle):
    q, absmax = torch.randint(-127, 128, (9, 100), dtype=torch.int8), randn(9).abs()

    found, theirs = F.dequantize_int8(q, absmax), oracle.int8_vectorwise_dequant(q, absmax)

    assert same_bits(found, theirs)


@pytest.mark.parametrize(("m", "n", "k"), [(1, 8, 64), (17, 33, 100), (5, 3, 1000)])
def test_matmul_int8_equals_bitsandbytes(backend, oracle, m, n, k):
    g = torch.Generator().manual_seed(k)
    a = torch.randint(-127, 128, (m, k), dtype=torch.int8, generator=g)
    b = torch.randint(-127, 128, (n, k), dtype=torch.int8, generator=g)

    assert torch.equal(torch.ops.halfbyte.matmul_int8(a, b), oracle.int8_linear_matmul(a, b))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("threshold", [0.0, 2.0])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("rows", [1, 7])
def test_linear_int8_is_close_to_bitsandbytes(backend, oracle, rows, bias, threshold, dtype):
    weight, x = randn(48, 128, seed=1) / 8, randn(rows, 128, dtype=dtype, seed=2)
    b = randn(48, dtype=torch.float16, seed=3) if bias else None

    q, absmax, _ = F.quantize_int8_rows(weight.half())
    found = F.linear_int8(x, q, absmax, None if b is None else b.to(dtype), threshold=threshold)
    their_q, their_absmax, theirs = oracle.linear_int8(x, weight, b, threshold)

    assert same_bits(absmax, their_absmax)
    assert torch.all((q.int() - their_q.int()).abs() <= 1)
    assert (q != their_q).sum() <= 2
    assert found.dtype == theirs.dtype == dtype
    # They cast activations to float16 first, and their constant 1 / 127^2 is off by 1.8e-5.
    scale = np.sqrt(128) / 8
    torch.testing.assert_close(found.float(), theirs.float(), rtol=2e-2, atol=1e-2 * scale)
