"""functional against the real bitsandbytes, within the gates of the formats page.

Known differences of bitsandbytes' CPU path are left out by name: zero blocks, the sign of FP4's zero, a partial last
block (true division), and its 8-bit encoder, a lookup table.
"""

import pytest
import torch

from halfbyte.compat.bitsandbytes import functional as F

DTYPES = [torch.float32, torch.float16, torch.bfloat16]


def randn(*shape, dtype=torch.float32, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


# -- 4 bit ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("nested", [False, True])
def test_4bit_round_trip_is_theirs(oracle, quant_type, dtype, nested):
    x = randn(64, 256, dtype=dtype)

    packed, state = F.quantize_4bit(x, quant_type=quant_type, compress_statistics=nested)
    theirs, entries = oracle.call("quantize_4bit", (x,), {"quant_type": quant_type, "compress_statistics": nested})

    assert packed.shape == theirs.shape
    ours_value = F.dequantize_4bit(packed, state)
    their_state = F.QuantState.from_dict(entries, device="cpu")
    their_value = F.dequantize_4bit(theirs, their_state)
    if not nested:
        assert torch.equal(state.absmax, their_state.absmax)
        assert (ours_value != their_value).float().mean() < 2e-3  # ties of FP4, which their CPU decides otherwise
    assert (ours_value - their_value).abs().float().mean() < 1e-3


def test_defaults_are_fp4_in_blocks_of_64():
    packed, state = F.quantize_4bit(randn(4, 64))

    assert (state.quant_type, state.blocksize, state.nested, packed.dtype) == ("fp4", 64, False, torch.uint8)
    assert F.quantize_nf4(randn(4, 64))[1].quant_type == "nf4"
    assert F.quantize_fp4(randn(4, 64), blocksize=128)[1].blocksize == 128


def test_4bit_writes_to_what_it_is_given():
    x = randn(16, 64)
    packed, state = F.quantize_4bit(x)
    out, absmax = torch.empty_like(packed), torch.empty_like(state.absmax)

    found, given = F.quantize_4bit(x, absmax, out)

    assert found is out
    assert given.absmax is absmax
    assert torch.equal(out, packed)
    target = torch.empty(16, 64)
    assert F.dequantize_4bit(packed, state, out=target) is target
    assert torch.equal(target, F.dequantize_fp4(packed, state))
    target = torch.empty(16, 64)
    F.dequantize_4bit(packed, absmax=absmax, out=target)
    assert torch.equal(target, F.dequantize_4bit(packed, state))


def test_dequantize_4bit_needs_a_state_or_its_parts():
    packed, state = F.quantize_4bit(randn(16, 64))

    with pytest.raises(ValueError, match="both absmax and out"):
        F.dequantize_4bit(packed, absmax=state.absmax)


def test_transposed_codes_give_the_transpose(oracle):
    packed, state = F.quantize_nf4(randn(16, 64))

    assert torch.equal(F.dequantize_4bit(packed.t(), state), F.dequantize_4bit(packed, state).t())
    assert torch.equal(F.dequantize_nf4(packed.reshape(-1, 1), state), F.dequantize_4bit(packed, state))


@pytest.mark.parametrize("storage", [torch.uint8, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("nested", [False, True])
def test_gemv_4bit_is_the_product(storage, nested):
    weight, x = randn(48, 128), randn(1, 1, 128, seed=1)
    packed, state = F.quantize_nf4(weight, compress_statistics=nested, quant_storage=storage)

    y = F.gemv_4bit(x, packed.t(), state=state)

    assert y.shape == (1, 1, 48)
    torch.testing.assert_close(y, x @ F.dequantize_4bit(packed, state).t(), rtol=1e-4, atol=1e-4)
    out = torch.empty(1, 1, 48)
    assert F.gemv_4bit(x, packed, out=out, state=state) is out


def test_gemv_4bit_refuses_more_than_a_row_and_no_state():
    packed, state = F.quantize_nf4(randn(48, 128))

    with pytest.raises(ValueError, match="one row"):
        F.gemv_4bit(randn(2, 128), packed, state=state)
    with pytest.raises(ValueError, match="got state=None"):
        F.gemv_4bit(randn(1, 128), packed)


@pytest.mark.parametrize("args", [((1,), {"blocksize": 100}), ((1,), {"quant_type": "int4"})])
def test_wrong_4bit_arguments_are_value_errors_as_there(args):
    with pytest.raises(ValueError, match="must be one of"):
        F.quantize_4bit(randn(64), **args[1])


def test_storage_that_the_bytes_do_not_fit_is_refused():
    with pytest.raises(ValueError, match="33 packed bytes cannot be viewed as bfloat16"):
        F.quantize_4bit(randn(66), quant_storage=torch.bfloat16)


@pytest.mark.parametrize("name", ["nf4", "fp4", "af4", "int4"])
def test_get_4bit_type_has_every_name(name):
    table = F.get_4bit_type(name, "cpu")

    assert (table.dtype, table.shape, table.abs().max().item()) == (torch.float32, (16,), 1.0)


@pytest.mark.parametrize("dtype", DTYPES)
def test_dtypes_are_spelt_without_torch(dtype):
    _, state = F.quantize_nf4(randn(64).to(dtype), compress_statistics=True)

    entries = state.as_dict()
    assert entries["dtype"] == str(dtype).rpartition(".")[2]
    assert F.QuantState.from_dict(entries, torch.device("cpu")).dtype is dtype


# -- 8 bit ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_blockwise_round_trip_is_theirs(oracle, dtype, nested):
    x = randn(3, 5000, dtype=dtype)

    codes, state = F.quantize_blockwise(x, nested=nested)
    theirs, entries = oracle.call("quantize_blockwise", (x,), {"nested": nested})

    ours, given = state.as_dict(), dict(entries)
    assert ours.keys() == given.keys()
    assert (state.blocksize, state.shape, state.nested) == (4096, None, nested)
    if not nested:
        assert torch.equal(ours["absmax"], given["absmax"])
    # Their CPU encoder misses the nearest level; what either side writes, both decode alike.
    mixed = F.dequantize_blockwise(theirs, F.QuantState.from_dict(given, torch.device("cpu")))
    assert mixed.dtype == dtype
    torch.testing.assert_close(mixed, x, rtol=0.05, atol=0.05)
    torch.testing.assert_close(F.dequantize_blockwise(codes, state), x, rtol=0.05, atol=0.05)


def test_blockwise_takes_its_parts():
    x = randn(1000)
    code = F.create_linear_map()
    out, absmax = torch.empty(1000, dtype=torch.uint8), torch.empty(4)

    codes, state = F.quantize_blockwise(x, code, absmax, out, blocksize=256)

    assert codes is out
    assert state.absmax is absmax
    target = torch.empty(1000)
    found = F.dequantize_blockwise(codes, absmax=absmax, code=code, out=target, blocksize=256)
    assert found is target
    assert torch.equal(found, F.dequantize_blockwise(codes, state))
    assert F.dequantize_blockwise(*F.quantize_blockwise(x.half())).dtype == torch.float16
    with pytest.raises(ValueError, match="quant_state or absmax"):
        F.dequantize_blockwise(codes)


def test_default_table_is_kept_under_its_name():
    F.quantize_blockwise(randn(64))

    assert torch.equal(F.name2qmap["dynamic"], F.create_dynamic_map())


# -- LLM.int8() ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("threshold", [0.0, 2.5])
@pytest.mark.parametrize("rows", [1, 9])
def test_int8_vectorwise_quant_is_theirs(oracle, threshold, rows):
    x = randn(rows, 200, dtype=torch.float16)
    before = x.clone()

    q, stats, outliers = F.int8_vectorwise_quant(x, threshold)
    theirs = oracle.call("int8_vectorwise_quant", (x.clone(), threshold))

    assert torch.equal(x, before)
    assert torch.equal(stats, theirs[1])
    assert outliers is None if not threshold else torch.equal(outliers, theirs[2])
    assert (q.int() - theirs[0].int()).abs().max() <= 1
    assert (q != theirs[0]).float().mean() < 1e-2
    assert torch.equal(F.int8_vectorwise_dequant(q, stats), oracle.call("int8_vectorwise_dequant", (q, stats)))


def test_int8_vectorwise_quant_finds_no_outliers_as_an_empty_tensor():
    _, _, outliers = F.int8_vectorwise_quant(randn(4, 8).clamp(-1, 1), threshold=6.0)

    assert (outliers.dtype, outliers.shape) == (torch.int64, (0,))


@pytest.mark.parametrize("threshold", [0.0, 2.5])
def test_int8_double_quant_has_rows_and_columns(threshold):
    x = randn(16, 32, dtype=torch.float16)

    rows, columns, by_row, by_column, outliers = F.int8_double_quant(x, threshold=threshold)

    assert torch.equal(rows, F.int8_vectorwise_quant(x, threshold)[0])
    kept = x.float() if not threshold else x.float().masked_fill(x.abs() >= threshold, 0)
    assert torch.equal(by_column, kept.abs().amax(0))
    assert torch.equal(columns, (kept * (torch.full((32,), 127.0) / by_column)).round().to(torch.int8))
    assert (outliers is None) == (threshold == 0.0)
    given = [torch.empty_like(one) for one in (by_column, by_row, columns, rows)]
    F.int8_double_quant(x, *given, threshold=threshold)
    assert all(map(torch.equal, given, (by_column, by_row, columns, rows)))


@pytest.mark.parametrize("shape", [(8, 64), (2, 3, 64)])
def test_int8_product_is_theirs(oracle, shape):
    g = torch.Generator().manual_seed(0)
    a = torch.randint(-127, 128, shape, dtype=torch.int8, generator=g)
    b = torch.randint(-127, 128, (24, 64), dtype=torch.int8, generator=g)

    product = F.int8_linear_matmul(a, b)

    assert torch.equal(product, oracle.call("int8_linear_matmul", (a, b)))
    out = torch.empty_like(product)
    assert F.int8_linear_matmul(a, b, out=out) is out


def test_int8_mm_dequant_is_theirs_and_float16(oracle):
    g = torch.Generator().manual_seed(0)
    product = torch.randint(-30000, 30000, (16, 24), dtype=torch.int32, generator=g)
    row, column, bias = torch.rand(16, generator=g), torch.rand(24, generator=g), randn(24, dtype=torch.float16)

    found = F.int8_mm_dequant(product, row.unsqueeze(1), column.unsqueeze(0), bias=bias)

    assert found.dtype == torch.float16
    theirs = oracle.call("int8_mm_dequant", (product, row, column), {"bias": bias})
    torch.testing.assert_close(found, theirs, rtol=2e-3, atol=1e-3)


# -- optimizers ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["adam", "lion", "momentum", "rmsprop", "adagrad", "ademamix", "lamb", "lars"])
def test_32bit_update_is_theirs(oracle, name):
    two = name in ("adam", "ademamix", "lamb")
    p, g = randn(300), randn(300, seed=1)
    states = (2, 300) if name == "ademamix" else (300,)
    args = (name, g, p, torch.zeros(states), 0.9, 1e-8, 1, 1e-2)
    kwargs = {"state2": torch.zeros(300) if two else None, "beta2": 0.99, "beta3": 0.999, "alpha": 5.0}
    kwargs |= {"weight_decay": 0.1 if name != "adagrad" else 0.0}

    theirs = oracle.update("optimizer_update_32bit", args, kwargs)
    F.optimizer_update_32bit(*args, **kwargs)

    ours = [one for one in (*args, *kwargs.values()) if torch.is_tensor(one)]
    for found, expected in zip(ours, theirs, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", ["adam", "lion", "ademamix", "momentum"])
def test_8bit_update_is_theirs(oracle, name):
    two = name in ("adam", "ademamix")
    p, g = randn(512), randn(512, seed=1)
    shape, blocks = ((2, 512), (2, 2)) if name == "ademamix" else ((512,), (2,))
    signed, unsigned = F.create_dynamic_map(), F.create_dynamic_map(False)
    states = torch.zeros(shape, dtype=torch.uint8), torch.zeros(512, dtype=torch.uint8) if two else None
    tables = signed, unsigned if two else None, torch.zeros(blocks), torch.zeros(2) if two else None
    args = (name, g, p, *states, 0.9, 0.99, 0.999, 5.0, 1e-8, 1, 1e-2, *tables)

    theirs = oracle.update("optimizer_update_8bit_blockwise", args, {"weight_decay": 0.1})
    F.optimizer_update_8bit_blockwise(*args, weight_decay=0.1)

    (_, moved, *_), (_, expected, *_) = ([one for one in args if torch.is_tensor(one)], theirs)
    tolerance = 1e-2 if name == "lion" else 2e-5
    torch.testing.assert_close(moved, expected, rtol=1e-5, atol=tolerance)
    torch.testing.assert_close(args[-2], theirs[-2 if two else -1], rtol=1e-5, atol=1e-7)


def test_updates_scale_the_gradient_and_skip_zeros():
    p, g = torch.ones(8), torch.tensor([0.0, 2.0] * 4)
    state = torch.ones(8)

    F.optimizer_update_32bit("momentum", g, p, state, 0.9, 0.0, 2, 0.1, gnorm_scale=0.5, skip_zeros=True)

    torch.testing.assert_close(p, torch.tensor([1.0, 1 - 0.19] * 4))
    torch.testing.assert_close(state, torch.tensor([1.0, 1.9] * 4))


# -- memory --------------------------------------------------------------------------------------------------


def test_paged_tensors_are_marked():
    a = F.get_paged(3, 4, dtype=torch.float16)

    assert (a.shape, a.dtype, a.is_paged, a.page_deviceid) == ((3, 4), torch.float16, True, 0)
    F.fill(a, 2.0)
    F.prefetch_tensor(a, to_cpu=True)
    F.GlobalPageManager.get_instance().prefetch_all()
    assert a.eq(2).all()
    with pytest.raises(ValueError, match="get_paged"):
        F.prefetch_tensor(torch.zeros(3))


def test_small_helpers():
    a = torch.zeros(3)

    assert F.get_ptr(a).value == a.data_ptr()
    assert F.get_ptr(None) is None
    assert F.is_on_gpu([a, None])
    with pytest.raises(ValueError, match="on one device; got cpu, meta"):
        F.is_on_gpu([a, a.to("meta")])
    assert F.C == 127.0
    assert not F.has_avx512bf16()
