"""QuantState and its checkpoint form: exact text, exact keys, and no file that is read wrongly in silence."""

import copy
import json
import pickle

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import halfbyte
from halfbyte import QuantState, formats
from halfbyte import functional as F

CPU = torch.device("cpu")
BLOB = "quant_state.bitsandbytes__nf4"


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def quantized(nested=False, format="nf4", shape=(8, 64), dtype=torch.bfloat16, blocksize=64):
    return F.quantize_4bit(randn(*shape).to(dtype), format=format, nested=nested, blocksize=blocksize)


def stored(nested=False, **kwargs):
    return quantized(nested, **kwargs)[1].as_dict(packed=True)


def same(a, b):
    assert (a.shape, a.blocksize, a.quant_type, a.dtype, a.nested) == (
        b.shape,
        b.blocksize,
        b.quant_type,
        b.dtype,
        b.nested,
    )
    assert torch.equal(a.absmax, b.absmax)
    assert torch.equal(a.code, b.code)
    if a.nested:
        assert torch.equal(a.offset, b.offset)
        assert a.offset.dtype == b.offset.dtype == torch.float32
        assert torch.equal(a.state2.absmax, b.state2.absmax)
        assert torch.equal(a.state2.code, b.state2.code)
        assert (a.state2.blocksize, a.state2.dtype) == (b.state2.blocksize, b.state2.dtype)


def text(blob):
    return bytes(blob.tolist()).decode()


def spoilt(nested=False, **changes):
    """A packed dictionary whose JSON has other entries; None removes one."""
    entries = stored(nested)
    plain = {**json.loads(text(entries[BLOB])), **changes}
    plain = {key: value for key, value in plain.items() if value is not None}
    entries[BLOB] = blob(json.dumps(plain))
    return entries


def blob(words):
    return torch.frombuffer(bytearray(words.encode()), dtype=torch.uint8)


# -- round trips ---------------------------------------------------------------------------------------------


@given(
    nested=st.booleans(),
    packed=st.booleans(),
    format=st.sampled_from(list(formats.FORMATS)),
    shape=st.lists(st.integers(0, 40), min_size=1, max_size=3),
    dtype=st.sampled_from([torch.float32, torch.float16, torch.bfloat16]),
    blocksize=st.sampled_from(formats.BLOCKSIZES),
    prefix=st.sampled_from(["", "weight.", "model.layers.0.mlp.up_proj.weight.", "a.quant_state.b."]),
)
def test_quant_state_round_trip(nested, packed, format, shape, dtype, blocksize, prefix):
    codes, state = quantized(nested, format, tuple(shape), dtype, blocksize)

    entries = {prefix + key: value for key, value in state.as_dict(packed=packed).items()}
    before = dict(entries)
    back = QuantState.from_dict(entries, device="cpu")

    same(back, state)
    assert entries.keys() == before.keys()
    assert all(entries[key] is before[key] for key in entries)
    assert torch.equal(F.dequantize_4bit(codes, back), F.dequantize_4bit(codes, state))


def test_packed_state_is_the_json_of_the_format():
    state = quantized()[1]

    entries = state.as_dict(packed=True)

    assert list(entries) == ["absmax", "quant_map", BLOB]
    assert text(entries[BLOB]) == '{"quant_type": "nf4", "blocksize": 64, "dtype": "bfloat16", "shape": [8, 64]}'
    assert entries[BLOB].dtype == torch.uint8
    assert entries[BLOB].ndim == 1
    assert (entries["quant_map"].dtype, entries["quant_map"].shape) == (torch.float32, (16,))


def test_packed_nested_state_is_the_json_of_the_format():
    state = quantized(nested=True)[1]
    state.offset = torch.tensor(2.6018524169921875)

    entries = state.as_dict(packed=True)

    assert list(entries) == ["absmax", "quant_map", "nested_absmax", "nested_quant_map", BLOB]
    assert text(entries[BLOB]) == (
        '{"quant_type": "nf4", "blocksize": 64, "dtype": "bfloat16", "shape": [8, 64], '
        '"nested_blocksize": 256, "nested_dtype": "float32", "nested_offset": 2.6018524169921875}'
    )
    assert entries["absmax"].dtype == torch.uint8
    assert entries["nested_absmax"].dtype == torch.float32
    assert entries["nested_quant_map"].shape == (256,)


def test_packed_state_of_fp4_is_named_after_it():
    assert "quant_state.bitsandbytes__fp4" in stored(format="fp4")


def test_unpacked_state_has_the_keys_of_the_format():
    assert list(quantized(nested=True)[1].as_dict()) == [
        *("quant_type", "absmax", "blocksize", "quant_map", "dtype", "shape"),
        *("nested_absmax", "nested_blocksize", "nested_quant_map", "nested_dtype", "nested_offset"),
    ]


def test_stored_tables_share_no_memory():
    one, other = stored(nested=True), stored(nested=True)

    places = [entries[key].data_ptr() for entries in (one, other) for key in ("quant_map", "nested_quant_map")]
    assert len(set(places)) == 4


@pytest.mark.parametrize("nested", [False, True])
def test_state_survives_safetensors(nested, tmp_path):
    from safetensors.torch import load_file, save_file

    codes, state = quantized(nested)
    save_file({"w": codes, **{f"w.{k}": v for k, v in state.as_dict(packed=True).items()}}, tmp_path / "x.safetensors")
    loaded = load_file(tmp_path / "x.safetensors")
    packed = loaded.pop("w")

    back = QuantState.from_dict(loaded, device="cpu")

    assert torch.equal(F.dequantize_4bit(packed, back), F.dequantize_4bit(codes, state))


def test_trailing_extra_absmax_is_accepted():
    codes, state = quantized()
    entries = state.as_dict(packed=True)
    entries["absmax"] = torch.cat((entries["absmax"], torch.full((1,), 7.0)))

    assert torch.equal(F.dequantize_4bit(codes, QuantState.from_dict(entries)), F.dequantize_4bit(codes, state))


def test_trailing_extra_nested_absmax_is_accepted():
    codes, state = quantized(nested=True, shape=(256, 64))
    entries = state.as_dict(packed=True)
    entries["absmax"] = torch.cat((entries["absmax"], entries["absmax"][:1]))

    assert torch.equal(F.dequantize_4bit(codes, QuantState.from_dict(entries)), F.dequantize_4bit(codes, state))


def test_table_rounded_to_four_digits_is_accepted():
    entries = stored(format="fp4")
    entries["quant_map"] = (entries["quant_map"] * 1e4).round() / 1e4

    assert QuantState.from_dict(entries).quant_type == "fp4"


# -- refusals ------------------------------------------------------------------------------------------------


def without(key, **kwargs):
    entries = stored(**kwargs)
    del entries[key]
    return entries


def with_(key, value, **kwargs):
    return {**stored(**kwargs), key: value}


REFUSED = {
    "no blob": (without(BLOB), "a quantized tensor needs exactly one quant_state entry; got 0"),
    "two blobs": (
        with_("quant_state.bitsandbytes__fp4", torch.zeros(2, dtype=torch.uint8)),
        "a quantized tensor needs exactly one quant_state entry; got 2",
    ),
    "two tensors": (
        {**{f"a.{k}": v for k, v in stored().items()}, **{f"b.{k}": v for k, v in stored().items()}},
        "two entries for absmax: a.absmax and b.absmax",
    ),
    "unknown key": (with_("zero_point", torch.zeros(1)), "unknown entries in a quantization state: zero_point"),
    "unknown json": (spoilt(zero_point=1), f"unknown entries in {BLOB}: zero_point"),
    "tensors in json": (spoilt(absmax=[1.0]), f"unknown entries in {BLOB}: absmax"),
    "no absmax": (without("absmax"), "a quantization state lacks absmax"),
    "no table": (without("quant_map"), "a quantization state lacks quant_map"),
    "no shape": (spoilt(shape=None), "a quantization state lacks shape"),
    "no offset": (spoilt(True, nested_offset=None), "a quantization state lacks nested_offset"),
    "no nested table": (without("nested_quant_map", nested=True), "a quantization state lacks nested_quant_map"),
    "stray nested": (spoilt(nested_blocksize=256), "a quantization state has nested_blocksize but no nested_absmax"),
    "not json": (with_(BLOB, blob("{'quant_type'")), f"{BLOB} is not JSON: "),
    "not utf-8": (with_(BLOB, torch.full((4,), 255, dtype=torch.uint8)), f"{BLOB} is not JSON: "),
    "empty": (with_(BLOB, torch.zeros(0, dtype=torch.uint8)), f"{BLOB} is not JSON: "),
    "deep json": (with_(BLOB, blob("[" * 100_000)), f"{BLOB} is not JSON: "),
    "list": (with_(BLOB, blob("[1, 2]")), f"{BLOB} must hold a JSON object; got list"),
    "blob is int64": (with_(BLOB, torch.zeros(4, dtype=torch.int64)), f"{BLOB} must be a one-dimensional uint8 tensor"),
    "blob is 2-d": (with_(BLOB, torch.zeros(4, 1).byte()), f"{BLOB} must be a one-dimensional uint8 tensor"),
    "blob is text": (with_(BLOB, "{}"), f"{BLOB} must be a one-dimensional uint8 tensor"),
    "other type": (spoilt(quant_type="fp4"), f"{BLOB} says quant_type 'fp4'"),
    "absmax is half": (with_("absmax", torch.ones(8).half()), "absmax must be a float32 tensor; got float16"),
    "absmax is a list": (with_("absmax", [1.0]), "absmax must be a float32 tensor; got list"),
    "nested absmax float": (with_("absmax", torch.ones(8), nested=True), "absmax must be a uint8 tensor; got float32"),
    "short absmax": (with_("absmax", torch.ones(7)), "absmax must have 8 entries; got 7"),
    "short nested": (with_("nested_absmax", torch.ones(0), nested=True), "nested_absmax must have 1 entries; got 0"),
    "short table": (with_("quant_map", torch.ones(8)), "quant_map must have 16 entries; got 8"),
    "other table": (with_("quant_map", torch.linspace(-1, 1, 16)), "quant_map is not the table of nf4"),
    "nan table": (with_("quant_map", torch.full((16,), float("nan"))), "quant_map is not the table of nf4"),
    "fp4 table": (with_("quant_map", formats.levels("fp4", CPU)), "quant_map is not the table of nf4"),
    "long table": (with_("quant_map", torch.ones(256)), "quant_map is not the table of nf4"),
    "shape is text": (spoilt(shape="8,64"), "shape must be a list of sizes; got '8,64'"),
    "shape is negative": (spoilt(shape=[-8, -64]), "shape must be a list of sizes; got [-8, -64]"),
    "shape is float": (spoilt(shape=[8.0, 64]), "shape must be a list of sizes; got [8.0, 64]"),
    "shape is bool": (spoilt(shape=[True, 64]), "shape must be a list of sizes; got [True, 64]"),
    "shape is huge": (spoilt(shape=[2**62, 2**62]), "absmax must have "),
    "blocksize": (spoilt(blocksize=100), "blocksize must be one of 32, 64, 128, 256, 512, 1024, 2048, 4096; got 100"),
    "blocksize float": (
        spoilt(blocksize=64.0),
        "blocksize must be one of 32, 64, 128, 256, 512, 1024, 2048, 4096; got 64.0",
    ),
    "dtype": (spoilt(dtype="float64"), "dtype must be one of float32, float16, bfloat16; got 'float64'"),
    "dtype hub": (spoilt(dtype="hub"), "dtype must be one of float32, float16, bfloat16; got 'hub'"),
    "dtype path": (spoilt(dtype="__class__"), "dtype must be one of float32, float16, bfloat16; got '__class__'"),
    "dtype list": (spoilt(dtype=["float32"]), "dtype must be one of float32, float16, bfloat16; got ['float32']"),
    "dtype prefixed": (
        spoilt(dtype="torch.float32"),
        "dtype must be one of float32, float16, bfloat16; got 'torch.float32'",
    ),
    "nested dtype": (spoilt(True, nested_dtype="load"), "dtype must be one of float32, float16, bfloat16; got 'load'"),
    "nested size": (spoilt(True, nested_blocksize=64), "nested_blocksize must be 256; got 64"),
    "offset is text": (spoilt(True, nested_offset="1"), "nested_offset must be a number; got '1'"),
    "offset is bool": (spoilt(True, nested_offset=True), "nested_offset must be a number; got True"),
    "offset is huge": (spoilt(True, nested_offset=10**400), "nested_offset must be a number; got 1000"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_from_dict_refuses(case):  # bitsandbytes bug 22: "dtype prefixed"
    entries, message = REFUSED[case]

    with pytest.raises(halfbyte.FormatError) as caught:
        QuantState.from_dict(entries)

    assert str(caught.value).startswith(message)


@pytest.mark.parametrize("quant_type", ["int4", ["nf4"], 4])
def test_from_dict_refuses_an_unpacked_state_of_unknown_type(quant_type):
    entries = {**quantized()[1].as_dict(), "quant_type": quant_type}

    with pytest.raises(halfbyte.FormatError, match=r"^quant_type must be one of nf4, fp4; got "):
        QuantState.from_dict(entries)


def test_from_dict_takes_only_whole_last_components():
    with pytest.raises(halfbyte.FormatError, match="unknown entries in a quantization state: my_absmax"):
        QuantState.from_dict({**stored(), "weight.my_absmax": torch.zeros(1)})


def test_as_dict_refuses_a_state_that_could_not_be_read_back():
    _, eight = F.quantize_8bit(randn(64))
    with pytest.raises(halfbyte.FormatError, match="8-bit codes has no packed form"):
        eight.as_dict(packed=True)
    with pytest.raises(halfbyte.FormatError, match="a state without shape, code and dtype cannot be stored"):
        QuantState(torch.ones(1)).as_dict()


def test_8bit_states_are_read_back():
    codes, state = F.quantize_8bit(randn(3, 300))

    again = QuantState.from_dict(state.as_dict())

    assert again == state
    assert torch.equal(F.dequantize_8bit(codes, again), F.dequantize_8bit(codes, state))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"blocksize": 0}, "blocksize must be a whole number of at least 1; got 0"),
        ({"blocksize": "64"}, "blocksize must be a whole number of at least 1; got '64'"),
        ({"quant_map": torch.zeros(16)}, "quant_map must have 256 entries; got 16"),
        ({"shape": [-1]}, "shape must be a list of sizes"),
    ],
)
def test_from_dict_refuses_a_spoilt_8bit_state(changes, message):
    entries = {**F.quantize_8bit(randn(64))[1].as_dict(), **changes}

    with pytest.raises(halfbyte.FormatError, match=f"^{message}"):
        QuantState.from_dict(entries)


# -- reading and writing as bitsandbytes' users do -----------------------------------------------------------


@pytest.mark.parametrize("nested", [False, True])
def test_states_are_equal_by_value(nested):
    state = quantized(nested)[1]
    again = QuantState.from_dict(state.as_dict(packed=True))

    assert again == state
    assert len({again, state}) == 2
    again.absmax = again.absmax.clone()
    again.absmax[0] += 1
    assert again != state
    assert state != quantized(not nested)[1]
    assert state != 1


def test_states_are_indexed_like_the_list_that_they_were():
    state = quantized(nested=True)[1]

    assert state[0] is state.absmax
    assert (state[1], state[2], state[3], state[5]) == (state.shape, state.dtype, state.blocksize, state.quant_type)
    assert state[4] == [state.offset, state.state2]
    assert quantized()[1][4] is None


def test_nested_can_be_written_off():
    packed, state = quantized(nested=True)
    expected = F.dequantize_4bit(packed, state)

    state.absmax = F.dequantize_8bit(state.absmax, state.state2) + state.offset
    state.nested = False

    assert not state.nested
    assert state.offset is None
    assert torch.equal(F.dequantize_4bit(packed, state), expected)
    with pytest.raises(halfbyte.InputError, match="nested by its state2"):
        state.nested = True


# -- moving and copying --------------------------------------------------------------------------------------


@pytest.mark.parametrize("nested", [False, True])
def test_moved_does_not_touch_the_original(nested):
    state = quantized(nested)[1]
    expected = copy.deepcopy(state)

    there = state.moved("meta")

    same(state, expected)
    assert state.absmax.device == CPU
    assert there.absmax.is_meta
    assert there.code.is_meta
    assert (there.shape, there.blocksize, there.dtype, there.quant_type) == (
        *(state.shape, state.blocksize, state.dtype, state.quant_type),
    )
    if nested:
        assert there.state2.absmax.is_meta
        assert there.offset.is_meta
        assert state.state2.absmax.device == CPU
        assert there.state2 is not state.state2


def test_to_moves_in_place():
    state = quantized(nested=True)[1]

    state.to("meta")

    assert state.absmax.is_meta
    assert state.state2.code.is_meta


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("how", [copy.deepcopy, lambda state: pickle.loads(pickle.dumps(state))])
def test_copies_are_equal_and_independent(how, nested):
    codes, state = quantized(nested)
    expected = F.dequantize_4bit(codes, state)

    other = how(state)
    same(other, state)
    other.absmax.zero_()
    other.code.zero_()
    if nested:
        other.offset.zero_()
        other.state2.absmax.zero_()

    assert torch.equal(F.dequantize_4bit(codes, state), expected)


def test_shallow_copy_shares_tensors_but_not_attributes():
    state = quantized()[1]

    other = copy.copy(state)
    other.shape = torch.Size((4, 128))

    assert other.absmax is state.absmax
    assert state.shape == (8, 64)


def test_attribute_of_the_blob_is_what_fsdp_asks_for():
    state = quantized(nested=True)[1]

    assert torch.equal(state.bitsandbytes__nf4, state.as_dict(packed=True)[BLOB])
    with pytest.raises(AttributeError, match="QuantState has no attribute 'bitsandbytes__fp4'"):
        _ = state.bitsandbytes__fp4
    with pytest.raises(AttributeError, match="QuantState has no attribute 'absmx'"):
        _ = state.absmx


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("blocks", [(0, 3), (3, 8), (256, 300), (255, 257), (8, 8), (5, 1000)])
def test_sliced_state_decodes_that_part(nested, blocks):
    codes, state = quantized(nested, shape=(300 * 64 - 7,))
    begin, end = blocks[0] * 64, min(blocks[1] * 64, 300 * 64 - 7)

    part = state.sliced(blocks[0] * 64, blocks[1] * 64)

    assert part.shape == (end - begin,)
    found = F.dequantize_4bit(codes[begin // 2 : (end + 1) // 2], part)
    assert torch.equal(found, F.dequantize_4bit(codes, state)[begin:end])
    assert state.shape == (300 * 64 - 7,)


def test_sliced_state_must_begin_with_a_block():
    assert quantized()[1].sliced(32, 128) is None


def test_nbytes_counts_statistics_only():
    plain, nested = quantized()[1], quantized(nested=True)[1]

    assert plain.nbytes() == 8 * 4
    assert nested.nbytes() == 8 + 4 + 4


def test_repr_names_what_matters():
    text = repr(quantized(nested=True)[1])

    assert text == "QuantState(nf4, shape=(8, 64), blocksize=64, nested=True, dtype=bfloat16, device=cpu)"
