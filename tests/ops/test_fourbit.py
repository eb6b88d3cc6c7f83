"""quantize_4bit, dequantize_4bit, linear_4bit: what they mean, exactly.

The oracles below are written in numpy, block by block, from the format's description and not from the reference.
"""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import halfbyte
from halfbyte import formats
from halfbyte import functional as F

ops = torch.ops.halfbyte
CPU = torch.device("cpu")
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
FORMATS = list(formats.FORMATS)


def encode_oracle(scaled, format):
    """Codes of float32 values in [-1, 1]: count the thresholds strictly below."""
    spec = formats.FORMATS[format]
    thresholds = np.array(spec.threshold_bits, "<u4").view("<f4")
    magnitude = np.abs(scaled) if spec.sign_bit else scaled
    code = np.array(spec.order)[(magnitude[:, None] > thresholds).sum(axis=1)]
    return code + 8 * (scaled < 0) if spec.sign_bit else code


def quantize_oracle(x, format, blocksize):
    flat = x.float().reshape(-1).numpy()
    codes, absmaxes = [], []
    for start in range(0, len(flat), blocksize):
        block = flat[start : start + blocksize]
        finite = np.abs(block[~np.isnan(block)])
        absmax = np.float32(finite.max() if len(finite) else 0)
        with np.errstate(divide="ignore", over="ignore"):
            reciprocal = np.float32(1) / absmax
        if np.isinf(reciprocal):
            codes += [0] * len(block)
        else:
            codes += [0 if np.isnan(v) else c for v, c in zip(block, encode_oracle(block * reciprocal, format))]
        absmaxes.append(absmax)
    if len(codes) % 2:
        codes.append({"nf4": 7, "fp4": 0}[format])
    pairs = np.array(codes, dtype=np.uint8).reshape(-1, 2)
    return pairs[:, 0] * 16 + pairs[:, 1], np.array(absmaxes, dtype=np.float32)


def dequantize_oracle(packed, absmax, format, blocksize, n, dtype):
    packed = packed.numpy().reshape(-1)
    codes = np.stack([packed // 16, packed % 16], axis=1).reshape(-1)[:n]
    values = (
        np.array(formats.FORMATS[format].levels, dtype=np.float32)[codes] * absmax.numpy()[np.arange(n) // blocksize]
    )
    return torch.from_numpy(values).to(dtype)


def same_bits(a, b):
    kind = {1: torch.uint8, 2: torch.int16, 4: torch.int32}[a.element_size()]
    return a.dtype == b.dtype and a.shape == b.shape and torch.equal(a.view(kind), b.view(kind))


def codes_of(packed, n):
    return torch.stack((packed >> 4, packed & 15), dim=1).reshape(-1)[:n].tolist()


def randn(*shape, dtype=torch.float32, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


# -- quantize ------------------------------------------------------------------------------------------------


def test_quantize_4bit_packs_the_example_of_the_format(backend):
    x = torch.tensor([1.0, -1.0, 0.5, *[0.0] * 61])

    packed, absmax = ops.quantize_4bit(x, "nf4", 64)

    assert packed.tolist() == [0xF0, 0xC7, *[0x77] * 30]
    assert absmax.tolist() == [1.0]


@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("format", FORMATS)
def test_quantize_4bit_puts_a_tie_below_and_its_neighbours_apart(backend, format, sign):
    spec = formats.FORMATS[format]
    if sign < 0 and not spec.sign_bit:
        pytest.skip("nf4 has its negative thresholds in the table")
    t = sign * torch.tensor(spec.thresholds)
    one = torch.ones(1)
    inward, outward = torch.nextafter(t, -sign * one), torch.nextafter(t, sign * one)
    x = torch.cat((one, inward, t, outward, torch.zeros(63 - 3 * len(t))))
    sign_bit = 8 if sign < 0 else 0

    packed, _ = ops.quantize_4bit(x, format, 64)

    codes, k = codes_of(packed, 64), len(t)
    below = [code + sign_bit for code in spec.order[:-1]]
    above = [code + sign_bit for code in spec.order[1:]]
    assert codes[1 : 1 + k] == below
    assert codes[1 + k : 1 + 2 * k] == below
    assert codes[1 + 2 * k : 1 + 3 * k] == above


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("code", range(16))
def test_quantize_4bit_finds_each_level(backend, format, code):
    level = formats.FORMATS[format].levels[code]
    x = torch.tensor([1.0] + [level] * 31)

    packed, _ = ops.quantize_4bit(x, format, 32)

    expected = 0 if level == 0 and format == "fp4" else code
    assert codes_of(packed, 32)[1:] == [expected] * 31


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("zero", [0.0, -0.0])
def test_quantize_4bit_stores_a_zero_block_as_zero_bytes(backend, format, dtype, zero):
    x = torch.cat((torch.full((64,), zero), torch.ones(64))).to(dtype)

    packed, absmax = ops.quantize_4bit(x, format, 64)

    assert packed[:32].tolist() == [0] * 32
    assert same_bits(absmax, torch.tensor([0.0, 1.0]))


def test_quantize_4bit_gives_both_zeros_the_same_fp4_code(backend):
    x = torch.tensor([1.0, 0.0, -0.0, 1e-9, -1e-9, *[0.0] * 27])

    packed, _ = ops.quantize_4bit(x, "fp4", 32)

    assert codes_of(packed, 5) == [3, 0, 0, 0, 8]


@pytest.mark.parametrize("format", FORMATS)
def test_quantize_4bit_treats_a_block_whose_reciprocal_overflows_as_zero(backend, format):
    tiny = torch.tensor(2.0**-130)  # subnormal, and 1 / it is infinite
    x = torch.cat((tiny.repeat(32), -tiny.repeat(32), torch.ones(32)))

    packed, absmax = ops.quantize_4bit(x, format, 32)

    assert packed[:32].tolist() == [0] * 32
    assert same_bits(absmax, torch.stack((tiny, tiny, torch.tensor(1.0))))


@pytest.mark.parametrize("format", FORMATS)
def test_quantize_4bit_scales_a_subnormal_block_whose_reciprocal_is_finite(backend, format):
    small = 2.0**-127
    x = torch.tensor([small, -small, *[0.0] * 30])

    packed, absmax = ops.quantize_4bit(x, format, 32)

    assert absmax.tolist() == [small]
    assert codes_of(packed, 3) == ([15, 0, 7] if format == "nf4" else [3, 11, 0])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("format", FORMATS)
def test_quantize_4bit_ignores_nan_in_absmax_and_gives_it_code_zero(backend, format, dtype):
    x = randn(128, dtype=dtype)
    x[5] = math.nan
    with_zero = x.clone()
    with_zero[5] = 0

    packed, absmax = ops.quantize_4bit(x, format, 64)
    expected, expected_absmax = ops.quantize_4bit(with_zero, format, 64)

    assert same_bits(absmax, expected_absmax)
    assert codes_of(packed, 128)[5] == 0
    assert [c for i, c in enumerate(codes_of(packed, 128)) if i != 5] == [
        c for i, c in enumerate(codes_of(expected, 128)) if i != 5
    ]


@pytest.mark.parametrize("format", FORMATS)
def test_quantize_4bit_stores_a_block_of_nan_as_a_zero_block(backend, format):
    packed, absmax = ops.quantize_4bit(torch.full((32,), math.nan), format, 32)

    assert packed.tolist() == [0] * 16
    assert absmax.tolist() == [0.0]


@pytest.mark.parametrize("bad", [math.inf, -math.inf])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("format", FORMATS)
def test_quantize_4bit_keeps_an_infinity_inside_its_block(backend, format, dtype, bad):
    x = randn(192, dtype=dtype)
    packed, absmax = ops.quantize_4bit(x, format, 64)
    x[100] = bad

    found, found_absmax = ops.quantize_4bit(x, format, 64)

    assert found_absmax[1] == math.inf
    assert torch.equal(found_absmax[::2], absmax[::2])
    assert torch.equal(found[:32], packed[:32])
    assert torch.equal(found[64:], packed[64:])


@pytest.mark.parametrize("n", [1, 2, 31, 33, 63, 65, 127, 4095, 4097])
@pytest.mark.parametrize("format", FORMATS)
def test_quantize_4bit_fills_an_odd_count_with_the_code_of_zero(backend, format, n):
    x = randn(n)

    packed, absmax = ops.quantize_4bit(x, format, 64)

    assert packed.shape == ((n + 1) // 2,)
    assert absmax.shape == (math.ceil(n / 64),)
    if n % 2:
        assert packed[-1] & 15 == {"nf4": 7, "fp4": 0}[format]


@pytest.mark.parametrize("shape", [(0,), (0, 64), (3, 0)])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("format", FORMATS)
def test_4bit_round_trip_of_an_empty_tensor_is_empty(backend, format, dtype, shape):
    packed, absmax = ops.quantize_4bit(torch.empty(shape, dtype=dtype), format, 64)
    x = ops.dequantize_4bit(packed, absmax, None, None, None, format, 64, shape, dtype)

    assert (packed.shape, packed.dtype) == ((0,), torch.uint8)
    assert (absmax.shape, absmax.dtype) == ((0,), torch.float32)
    assert (x.shape, x.dtype) == (shape, dtype)


@pytest.mark.parametrize("value", [1.0, -3.5, 0.0])
@pytest.mark.parametrize("format", FORMATS)
def test_4bit_round_trip_of_one_element_is_exact(backend, format, value):
    packed, absmax = ops.quantize_4bit(torch.tensor(value), format, 64)

    assert absmax.tolist() == [abs(value)]
    assert ops.dequantize_4bit(packed, absmax, None, None, None, format, 64, (), torch.float32).item() == value


@pytest.mark.parametrize("blocksize", formats.BLOCKSIZES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("format", FORMATS)
def test_quantize_4bit_agrees_with_the_oracle_for_every_block_size(backend, format, dtype, blocksize):
    n = 2 * blocksize + 37
    x = randn(n, dtype=dtype, seed=blocksize)
    x[:blocksize] *= 1e-3  # so that a scale taken from a neighbouring block shows

    packed, absmax = ops.quantize_4bit(x, format, blocksize)

    expected, expected_absmax = quantize_oracle(x, format, blocksize)
    assert np.array_equal(packed.numpy(), expected)
    assert np.array_equal(absmax.numpy().view("<u4"), expected_absmax.view("<u4"))


@given(
    n=st.integers(1, 700),
    blocksize=st.sampled_from(formats.BLOCKSIZES[:5]),
    dtype=st.sampled_from(DTYPES),
    format=st.sampled_from(FORMATS),
    scale=st.sampled_from([1e-30, 2e-5, 1.0, 300.0]),
    seed=st.integers(0, 2**31),
    zeros=st.booleans(),
)
def test_4bit_agrees_with_the_oracle_and_stays_within_half_a_gap(
    backend, n, blocksize, dtype, format, scale, seed, zeros
):
    x = (randn(n, seed=seed) * scale).to(dtype)
    if zeros:
        x[: n // 2] = 0

    packed, absmax = ops.quantize_4bit(x, format, blocksize)
    back = ops.dequantize_4bit(packed, absmax, None, None, None, format, blocksize, (n,), dtype)

    expected, expected_absmax = quantize_oracle(x, format, blocksize)
    assert np.array_equal(packed.numpy(), expected)
    assert np.array_equal(absmax.numpy(), expected_absmax)
    assert same_bits(back, dequantize_oracle(packed, absmax, format, blocksize, n, dtype))
    levels = torch.tensor(sorted(formats.FORMATS[format].levels))
    half_gap = levels.diff().max() / 2
    bound = absmax.repeat_interleave(blocksize)[:n] * (half_gap + torch.finfo(dtype).eps)
    assert torch.all((back.float() - x.float()).abs() <= bound + torch.finfo(dtype).tiny)


def test_quantize_4bit_reads_a_tensor_flat_across_its_rows(backend):
    x = randn(7, 37)

    assert_equal_pairs(ops.quantize_4bit(x, "nf4", 64), ops.quantize_4bit(x.reshape(-1), "nf4", 64))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("format", FORMATS)
def test_quantize_4bit_takes_any_strides_and_offset(backend, format, dtype):
    base = randn(65, 131, dtype=dtype)
    views = [base.t(), base[1:, 3:], base[::2, ::3], base.reshape(-1)[1:], base[:1].expand(5, 131)]

    for view in views:
        expected = ops.quantize_4bit(view.contiguous().clone(), format, 64)
        assert_equal_pairs(ops.quantize_4bit(view, format, 64), expected)


def test_quantize_4bit_leaves_its_input_alone(backend):
    x = randn(130)
    before, version = x.clone(), x._version

    ops.quantize_4bit(x, "nf4", 64)

    assert torch.equal(x, before)
    assert x._version == version


def assert_equal_pairs(found, expected):
    for one, other in zip(found, expected, strict=True):
        assert same_bits(one, other)


# -- dequantize ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("blocksize", formats.BLOCKSIZES)
@pytest.mark.parametrize("format", FORMATS)
def test_dequantize_4bit_agrees_with_the_oracle_for_every_byte_and_block_size(backend, format, blocksize, dtype):
    packed = torch.arange(256, dtype=torch.uint8).repeat(math.ceil(blocksize / 100))
    n = packed.numel() * 2 - 1
    absmax = randn(math.ceil(n / blocksize), seed=blocksize).abs()

    found = ops.dequantize_4bit(packed, absmax, None, None, None, format, blocksize, (n,), dtype)

    assert same_bits(found, dequantize_oracle(packed, absmax, format, blocksize, n, dtype))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_dequantize_4bit_rounds_once_from_the_float32_product(backend, dtype):
    packed = torch.tensor([0x1E] * 4096, dtype=torch.uint8)
    absmax = torch.rand(256, generator=torch.Generator().manual_seed(1)) + 0.5
    levels = formats.levels("nf4", CPU)

    found = ops.dequantize_4bit(packed, absmax, None, None, None, "nf4", 32, (8192,), dtype)

    exact = (levels[[1, 14]].repeat(16) * absmax[:, None]).reshape(-1)
    early = (levels[[1, 14]].to(dtype).repeat(16) * absmax[:, None].to(dtype)).reshape(-1)
    assert same_bits(found, exact.to(dtype))
    assert not torch.equal(found, early)  # the case can tell


def test_dequantize_4bit_overflows_to_infinity_only_in_the_cast(backend):
    packed = torch.tensor([0xF0], dtype=torch.uint8)

    found = ops.dequantize_4bit(packed, torch.tensor([1e5]), None, None, None, "nf4", 32, (2,), torch.float16)

    assert found.tolist() == [math.inf, -math.inf]


def nested_parts(blocks, seed=0):
    g = torch.Generator().manual_seed(seed)
    codes = torch.randint(0, 256, (blocks,), dtype=torch.uint8, generator=g)
    absmax = torch.rand(math.ceil(blocks / 256), generator=g)
    return codes, absmax, formats.codebook("dynamic", CPU), torch.rand((), generator=g) + 2


@pytest.mark.parametrize("blocks", [1, 255, 256, 257, 513])
@pytest.mark.parametrize("dtype", DTYPES)
def test_dequantize_4bit_decodes_nested_absmax_by_the_formula(backend, blocks, dtype):
    codes, absmax2, code2, offset = nested_parts(blocks)
    n = blocks * 32 - 1
    packed = torch.randint(0, 256, ((n + 1) // 2,), dtype=torch.uint8, generator=torch.Generator().manual_seed(2))
    product = code2.numpy()[codes.numpy()] * absmax2.numpy()[np.arange(blocks) // 256]  # rounded,
    absmax = torch.from_numpy(product + offset.numpy())  # and rounded again

    found = ops.dequantize_4bit(packed, codes, absmax2, code2, offset, "nf4", 32, (n,), dtype)

    assert same_bits(found, dequantize_oracle(packed, absmax, "nf4", 32, n, dtype))


@pytest.mark.parametrize("nested", [False, True])
def test_dequantize_4bit_ignores_trailing_absmax_entries(backend, nested):
    # bitsandbytes on XPU may write one entry more than there are blocks.
    blocks = 256
    codes, absmax2, code2, offset = nested_parts(blocks)
    parts = (codes, absmax2, code2, offset) if nested else (codes.float(), None, None, None)
    packed = torch.arange(256, dtype=torch.uint8).repeat(16)

    def decode(absmax):
        return ops.dequantize_4bit(packed, absmax, *parts[1:], "nf4", 32, (8192,), torch.float32)

    longer = torch.cat((parts[0], parts[0][:1]))
    assert same_bits(decode(longer), decode(parts[0]))


def test_dequantize_4bit_takes_packed_codes_of_any_shape_and_offset(backend):
    packed, absmax = ops.quantize_4bit(randn(256), "nf4", 64)
    shifted = torch.cat((packed[:1], packed))[1:]
    views = [packed.reshape(-1, 1), packed.reshape(1, -1), packed.reshape(8, 16), shifted]

    expected = ops.dequantize_4bit(packed, absmax, None, None, None, "nf4", 64, (256,), torch.float32)
    for view in views:
        found = ops.dequantize_4bit(view, absmax, None, None, None, "nf4", 64, (256,), torch.float32)
        assert same_bits(found, expected)


def test_dequantize_4bit_result_is_contiguous_and_owned(backend):
    packed, absmax = ops.quantize_4bit(randn(6, 64), "nf4", 64)

    first = ops.dequantize_4bit(packed, absmax, None, None, None, "nf4", 64, (6, 64), torch.float32)
    first.zero_()
    second = ops.dequantize_4bit(packed, absmax, None, None, None, "nf4", 64, (6, 64), torch.float32)

    assert second.is_contiguous()
    assert second.abs().sum() > 0


# -- the functional layer ------------------------------------------------------------------------------------


def mean_oracle(values):
    """Pad to a power of two, add the halves, again and again: float32 at each step."""
    total = np.zeros(1 << max(len(values) - 1, 0).bit_length(), dtype=np.float32)
    total[: len(values)] = values
    while len(total) > 1:
        total = total[: len(total) // 2] + total[len(total) // 2 :]
    return total[0] / np.float32(max(len(values), 1))


@pytest.mark.parametrize("n", [0, 1, 2, 3, 255, 256, 257, 1000])
def test_pairwise_mean_has_a_fixed_order(n):
    values = randn(n) * 10

    found = F.pairwise_mean(values)

    assert found.shape == ()
    assert found.item() == mean_oracle(values.numpy())


def test_pairwise_mean_is_close_to_the_exact_mean():
    values = randn(100_003).abs()

    assert F.pairwise_mean(values).item() == pytest.approx(values.double().mean().item(), rel=1e-6)


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("shape", [(64, 256), (33, 65), (0,), (1,)])
def test_nested_state_holds_the_quantized_absmax(backend, format, shape):
    x = randn(*shape)
    _, plain = F.quantize_4bit(x, format=format)

    packed, state = F.quantize_4bit(x, format=format, nested=True)

    offset = F.pairwise_mean(plain.absmax)
    codes, absmax2 = ops.quantize_8bit(plain.absmax - offset, formats.codebook("dynamic", CPU), 256)
    assert state.nested
    assert same_bits(state.absmax, codes)
    assert same_bits(state.state2.absmax, absmax2)
    assert same_bits(state.offset, offset)
    assert state.state2.blocksize == 256
    assert state.state2.dtype == torch.float32
    restored = F.dequantize_4bit(packed, state)
    step = absmax2.max() * 0.008 if absmax2.numel() else 0  # half the widest gap of the dynamic map
    assert restored.shape == shape
    assert torch.all((restored - F.dequantize_4bit(packed, plain)).abs() <= step)


@pytest.mark.parametrize("storage", formats.STORAGES)
def test_quantize_4bit_views_the_same_bytes_as_any_storage(backend, storage):
    x = randn(64, 64)
    packed, state = F.quantize_4bit(x)

    viewed, viewed_state = F.quantize_4bit(x, storage=storage)

    assert viewed.dtype == storage
    assert viewed.shape == (2048 // storage.itemsize, 1)
    assert torch.equal(viewed.view(torch.uint8).reshape(-1, 1), packed)
    assert same_bits(F.dequantize_4bit(viewed, viewed_state), F.dequantize_4bit(packed, state))


def test_storage_keeps_bytes_that_spell_nan():
    # 0x7fff and 0x7fc0... are NaN in every float storage; a cast on the way would make them canonical.
    packed = torch.arange(256, dtype=torch.uint8)
    for storage in formats.STORAGES:
        assert torch.equal(F.as_bytes(packed.view(storage)), packed)


def test_storage_that_does_not_divide_the_bytes_is_refused():
    message = r"^33 packed bytes cannot be viewed as bfloat16 \(2 bytes each\)$"
    with pytest.raises(halfbyte.InputError, match=message):
        F.quantize_4bit(torch.zeros(66), storage=torch.bfloat16)


def test_functional_quantize_4bit_describes_what_it_did(backend):
    packed, state = F.quantize_4bit(randn(5, 7, dtype=torch.bfloat16), format="fp4", blocksize=32)

    assert packed.shape == (18, 1)
    assert (state.shape, state.dtype, state.blocksize) == ((5, 7), torch.bfloat16, 32)
    assert state.quant_type == "fp4"
    assert F.dequantize_4bit(packed, state).dtype == torch.bfloat16
    assert F.dequantize_4bit(packed, state, dtype=torch.float16).dtype == torch.float16


# -- linear --------------------------------------------------------------------------------------------------

TOLERANCE = {torch.float32: (1e-4, 1e-4), torch.float16: (1e-2, 1e-2), torch.bfloat16: (4e-2, 4e-2)}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(
    ("leading", "k", "n"),
    [((), 64, 48), ((1,), 64, 1), ((3,), 100, 33), ((2, 5), 257, 65), ((64,), 128, 128), ((0,), 64, 32)],
)
def test_linear_4bit_is_the_product_with_the_dequantized_weight(backend, leading, k, n, nested, bias, dtype):
    packed, state = F.quantize_4bit(randn(n, k, dtype=dtype) / 8, nested=nested)
    x = randn(*leading, k, dtype=dtype, seed=1)
    b = randn(n, dtype=dtype, seed=2) if bias else None

    found = F.linear_4bit(x, packed, state, b)

    weight = F.dequantize_4bit(packed, state, dtype=torch.float32).double()
    expected = x.double() @ weight.T + (b.double() if bias else 0)
    rtol, atol = TOLERANCE[dtype]
    assert found.dtype == dtype
    assert found.shape == (*leading, n)
    torch.testing.assert_close(found.double(), expected, rtol=rtol, atol=atol * 4)


def test_linear_4bit_takes_strided_activations(backend):
    packed, state = F.quantize_4bit(randn(48, 64) / 8)
    wide = randn(6, 130)
    for x in (wide[:, 1:65], wide[::2, :64], randn(64, 6).t(), wide[:1, :64].expand(4, 64)):
        expected = F.linear_4bit(x.contiguous(), packed, state)
        torch.testing.assert_close(F.linear_4bit(x, packed, state), expected)


def test_linear_4bit_with_a_zero_weight_is_the_bias(backend):
    packed, state = F.quantize_4bit(torch.zeros(8, 64))
    bias = randn(8)

    assert torch.equal(F.linear_4bit(randn(3, 64), packed, state, bias), bias.expand(3, 8))


@given(
    m=st.integers(1, 9),
    k=st.integers(1, 140),
    n=st.integers(1, 40),
    blocksize=st.sampled_from([32, 64, 256]),
    format=st.sampled_from(FORMATS),
    dtype=st.sampled_from(DTYPES),
    seed=st.integers(0, 2**31),
)
def test_linear_4bit_and_its_gradient_agree_with_the_reference(backend, m, k, n, blocksize, format, dtype, seed):
    packed, absmax = ops.quantize_4bit(randn(n, k, dtype=dtype, seed=seed) / k**0.5, format, blocksize)
    x, dy = randn(m, k, dtype=dtype, seed=seed + 1), randn(m, n, dtype=dtype, seed=seed + 2)

    def run():
        forward = ops.linear_4bit(x, packed, absmax, None, None, None, None, format, blocksize, n)
        return forward, ops.linear_4bit_backward(dy, packed, absmax, None, None, None, format, blocksize, k)

    found = run()
    with halfbyte.use_backend("reference"):
        expected = run()

    rtol, atol = TOLERANCE[dtype]
    for one, other in zip(found, expected):
        torch.testing.assert_close(one, other, rtol=rtol, atol=atol)
