"""Bad inputs of every op: the kind of error, a sentence with what was found and what works, nothing changed."""

import re

import pytest
import torch

import halfbyte
from halfbyte import QuantState, formats
from halfbyte import functional as F
from halfbyte import ops as op_table
from halfbyte.testing import cases

ops = torch.ops.halfbyte
CPU = torch.device("cpu")
FLOAT = torch.float32


def x4(dtype=FLOAT, k=64):
    return torch.ones(2, k, dtype=dtype)


PURE = [op for op in op_table.ALL if not cases.written(op)]  # tests/ops/test_optimizer.py has those that write

# Good arguments of each op, by name, to be spoilt one at a time.
PACKED = {
    "packed": torch.zeros(256, dtype=torch.uint8),
    "absmax": torch.ones(8),
    "nested_absmax": None,
    "nested_codebook": None,
    "offset": None,
}
NESTED = {
    "packed": torch.zeros(256, dtype=torch.uint8),
    "absmax": torch.zeros(8, dtype=torch.uint8),
    "nested_absmax": torch.ones(1),
    "nested_codebook": torch.zeros(256),
    "offset": torch.zeros(()),
}
FOUR = {"format": "nf4", "blocksize": 64}
GOOD = {
    "quantize_4bit": {"x": x4(), **FOUR},
    "dequantize_4bit": {**PACKED, **FOUR, "shape": (8, 64), "dtype": FLOAT},
    "linear_4bit": {"x": x4(), **PACKED, "bias": torch.ones(8), **FOUR, "out_features": 8},
    "linear_4bit_backward": {"dy": torch.ones(2, 8), **PACKED, **FOUR, "in_features": 64},
    "quantize_8bit": {"x": x4(), "codebook": torch.linspace(-1, 1, 256), "blocksize": 64},
    "dequantize_8bit": {
        "codes": torch.zeros(128, dtype=torch.uint8),
        "absmax": torch.ones(2),
        "codebook": torch.linspace(-1, 1, 256),
        "blocksize": 64,
        "dtype": FLOAT,
    },
    "quantize_int8_rows": {"x": x4(), "threshold": 0.0},
    "dequantize_int8": {
        "q": torch.zeros(2, 8, dtype=torch.int8),
        "row_absmax": torch.ones(2),
        "col_absmax": torch.ones(8),
        "bias": torch.ones(8),
        "dtype": FLOAT,
    },
    "matmul_int8": {"a": torch.zeros(2, 8, dtype=torch.int8), "b": torch.zeros(3, 8, dtype=torch.int8)},
    "linear_int8": {
        "x": x4(),
        "weight": torch.zeros(8, 64, dtype=torch.int8),
        "weight_absmax": torch.ones(8),
        "bias": torch.ones(8),
        "threshold": 0.0,
        "mode": "exact",
    },
}

FLOATS = "must be float32, float16, bfloat16; got"
SIZES = "blocksize must be one of 32, 64, 128, 256, 512, 1024, 2048, 4096; got"
ONE_DEVICE = "all tensors must be on one device;"
INT32 = torch.zeros(256, dtype=torch.int32)
META = torch.device("meta")


def meta(name, args):
    return args[name].to("meta")


FOUR_BAD = [
    ({"format": "int4"}, "format must be one of nf4, fp4; got 'int4'"),
    ({"blocksize": 100}, f"{SIZES} 100"),
    ({"blocksize": 0}, f"{SIZES} 0"),
    ({"blocksize": -64}, f"{SIZES} -64"),
    ({"blocksize": 8192}, f"{SIZES} 8192"),
    ({"blocksize": 16}, f"{SIZES} 16"),
]
PACKED_BAD = [
    *FOUR_BAD,
    ({"packed": INT32}, "packed must be uint8; got int32"),
    ({"packed": PACKED["packed"][:-1]}, "packed must have 256 bytes for 512 elements; got 255"),
    ({"packed": torch.zeros(257, dtype=torch.uint8)}, "packed must have 256 bytes for 512 elements; got 257"),
    ({"absmax": torch.ones(7)}, "absmax must have 8 elements for 512 elements; got 7"),
    ({"absmax": torch.ones(8).half()}, "absmax must be float32; got float16"),
    ({"absmax": torch.ones(8).byte()}, "absmax must be float32; got uint8"),
    ({"absmax": torch.ones(8, device=META)}, f"{ONE_DEVICE} absmax is on meta, the first one on cpu"),
    (
        {"offset": NESTED["offset"]},
        "nested absmax needs nested_absmax, nested_codebook and offset together; got offset",
    ),
    (
        {**NESTED, "offset": None},
        "nested absmax needs nested_absmax, nested_codebook and offset together; got nested_absmax, nested_codebook",
    ),
    (
        {**NESTED, "nested_codebook": None},
        "nested absmax needs nested_absmax, nested_codebook and offset together; got nested_absmax, offset",
    ),
    ({**NESTED, "absmax": torch.ones(8)}, "absmax must be uint8; got float32"),
    ({**NESTED, "nested_absmax": torch.ones(0)}, "nested_absmax must have 1 elements for 8 blocks; got 0"),
    ({**NESTED, "nested_absmax": torch.ones(1).half()}, "nested_absmax must be float32; got float16"),
    ({**NESTED, "nested_codebook": torch.ones(16)}, "nested_codebook must have 256 elements for uint8 codes; got 16"),
    ({**NESTED, "nested_codebook": torch.ones(256).half()}, "nested_codebook must be float32; got float16"),
    ({**NESTED, "offset": torch.ones((), dtype=torch.float64)}, "offset must be float32; got float64"),
    ({**NESTED, "offset": torch.ones((), device=META)}, f"{ONE_DEVICE} offset is on meta, the first one on cpu"),
    ({**NESTED, "offset": torch.ones(2)}, "offset must have 1 element; got 2"),
]
BIAS_BAD = [
    ({"bias": torch.ones(7)}, "bias must have shape (8,); got (7,)"),
    ({"bias": torch.ones(1, 8)}, "bias must have shape (8,); got (1, 8)"),
    ({"bias": torch.ones(8).half()}, "bias must be float32; got float16"),
    ({"bias": torch.ones(8, device=META)}, f"{ONE_DEVICE} bias is on meta, the first one on cpu"),
]
CODEBOOK_BAD = [
    ({"codebook": torch.ones(255)}, "codebook must have 256 entries; got 255"),
    ({"codebook": torch.ones(256).half()}, "codebook must be float32; got float16"),
    ({"codebook": torch.ones(256, device=META)}, f"{ONE_DEVICE} codebook is on meta, the first one on cpu"),
    ({"blocksize": 0}, "blocksize must be an integer of at least 1; got 0"),
    ({"blocksize": -1}, "blocksize must be an integer of at least 1; got -1"),
]
THRESHOLD_BAD = [
    ({"threshold": -1.0}, "threshold must be 0 (no outliers) or positive; got -1.0"),
    ({"threshold": float("nan")}, "threshold must be 0 (no outliers) or positive; got nan"),
]

BAD = {
    "quantize_4bit": [
        *FOUR_BAD,
        ({"x": x4(torch.float64)}, f"x {FLOATS} float64"),
        ({"x": x4(torch.int32)}, f"x {FLOATS} int32"),
        ({"x": x4(torch.complex64)}, f"x {FLOATS} complex64"),
    ],
    "dequantize_4bit": [
        *PACKED_BAD,
        ({"dtype": torch.float64}, f"dtype {FLOATS} float64"),
        ({"dtype": torch.uint8}, f"dtype {FLOATS} uint8"),
        ({"shape": (8, 66)}, "packed must have 264 bytes for 528 elements; got 256"),
        ({"shape": (-8, -64)}, "shape must have no negative sizes; got (-8, -64)"),
        ({"packed": torch.zeros(256, dtype=torch.uint8, device=META)}, f"{ONE_DEVICE} absmax is on cpu"),
    ],
    "linear_4bit": [
        *PACKED_BAD,
        *BIAS_BAD,
        ({"x": x4(torch.float64)}, f"x {FLOATS} float64"),
        ({"x": torch.ones(())}, "x must have at least one dimension; got a scalar"),
        ({"x": x4(k=63)}, "packed must have 252 bytes for 504 elements; got 256"),
        ({"out_features": 7}, "packed must have 224 bytes for 448 elements; got 256"),
        ({"out_features": -8}, "sizes must not be negative; got -512 elements"),
        ({"x": x4().half()}, "bias must be float16; got float32"),
        ({"packed": torch.zeros(256, dtype=torch.uint8, device=META)}, f"{ONE_DEVICE} packed is on meta"),
    ],
    "linear_4bit_backward": [
        *PACKED_BAD,
        ({"dy": torch.ones(2, 8, dtype=torch.float64)}, f"dy {FLOATS} float64"),
        ({"dy": torch.ones(())}, "dy must have at least one dimension; got a scalar"),
        ({"dy": torch.ones(2, 7)}, "packed must have 224 bytes for 448 elements; got 256"),
        ({"in_features": 63}, "packed must have 252 bytes for 504 elements; got 256"),
        ({"in_features": -64}, "sizes must not be negative; got -512 elements"),
    ],
    "quantize_8bit": [*CODEBOOK_BAD, ({"x": x4(torch.float64)}, f"x {FLOATS} float64")],
    "dequantize_8bit": [
        *CODEBOOK_BAD,
        ({"dtype": torch.int8}, f"dtype {FLOATS} int8"),
        ({"codes": torch.zeros(128, dtype=torch.int8)}, "codes must be uint8; got int8"),
        ({"absmax": torch.ones(1)}, "absmax must have 2 elements for 128 codes; got 1"),
        ({"absmax": torch.ones(2).half()}, "absmax must be float32; got float16"),
        ({"absmax": torch.ones(2, device=META)}, f"{ONE_DEVICE} absmax is on meta, the first one on cpu"),
    ],
    "quantize_int8_rows": [
        *THRESHOLD_BAD,
        ({"x": x4(torch.float64)}, f"x {FLOATS} float64"),
        ({"x": torch.ones(())}, "x must have at least one dimension; got a scalar"),
    ],
    "dequantize_int8": [
        ({"dtype": torch.float64}, f"dtype {FLOATS} float64"),
        ({"q": torch.zeros(2, 8)}, "q must be int8 or int32; got float32"),
        ({"q": torch.zeros((), dtype=torch.int8)}, "q must have at least one dimension; got a scalar"),
        ({"row_absmax": torch.ones(3)}, "row_absmax must have 2 elements; got 3"),
        ({"row_absmax": torch.ones(2).half()}, "row_absmax must be float32; got float16"),
        ({"row_absmax": torch.ones(2, device=META)}, f"{ONE_DEVICE} row_absmax is on meta, the first one on cpu"),
        ({"col_absmax": torch.ones(7)}, "col_absmax must have 8 elements; got 7"),
        ({"col_absmax": torch.ones(8).half()}, "col_absmax must be float32; got float16"),
        ({"bias": torch.ones(7)}, "bias must have shape (8,); got (7,)"),
        ({"bias": torch.ones(8).int()}, f"bias {FLOATS} int32"),
        ({"bias": torch.ones(8, device=META)}, f"{ONE_DEVICE} bias is on meta, the first one on cpu"),
    ],
    "matmul_int8": [
        ({"a": torch.ones(2, 8)}, "a must be int8; got float32"),
        ({"b": torch.ones(3, 8).byte()}, "b must be int8; got uint8"),
        ({"b": torch.ones(3, 7).char()}, "a and b must be (M, K) and (N, K); got (2, 8) and (3, 7)"),
        ({"a": torch.ones(8).char()}, "a and b must be (M, K) and (N, K); got (8,) and (3, 8)"),
        ({"b": torch.ones(3, 8, device=META).char()}, f"{ONE_DEVICE} b is on meta, the first one on cpu"),
    ],
    "linear_int8": [
        *THRESHOLD_BAD,
        *BIAS_BAD,
        ({"x": x4(torch.float64)}, f"x {FLOATS} float64"),
        ({"x": x4(k=63)}, "x (..., K) must fit weight (N, K); got (2, 63) and (8, 64)"),
        ({"x": torch.ones(())}, "x (..., K) must fit weight (N, K); got () and (8, 64)"),
        ({"weight": torch.zeros(8, 64)}, "weight must be int8; got float32"),
        ({"weight": torch.zeros(8, 64, device=META).char()}, f"{ONE_DEVICE} weight is on meta, the first one on cpu"),
        ({"weight_absmax": torch.ones(7)}, "weight_absmax must have 8 elements; got 7"),
        ({"weight_absmax": torch.ones(8).half()}, "weight_absmax must be float32; got float16"),
        ({"mode": "fast"}, "mode must be one of exact, w8a16; got 'fast'"),
    ],
}

EVERY = [
    pytest.param(name, {**GOOD[name], **change}, message, id=f"{name}-{message[:60]}")
    for name, wrong in BAD.items()
    for change, message in wrong
]


@pytest.mark.parametrize("blocksize", [64.0, 2.5, "64", None])
def test_a_block_size_that_is_no_integer_is_refused(blocksize):
    with pytest.raises(halfbyte.InputError, match=f"^{re.escape(f'{SIZES} {blocksize!r}')}$"):
        F.quantize_4bit(x4(), blocksize=blocksize)
    sentence = f"blocksize must be an integer of at least 1; got {blocksize!r}"
    with pytest.raises(halfbyte.InputError, match=f"^{re.escape(sentence)}$"):
        F.quantize_8bit(x4(), blocksize=blocksize)


def test_every_op_has_bad_inputs():
    assert set(BAD) == set(GOOD) == {op.name for op in PURE}


@pytest.mark.parametrize("op", PURE, ids=lambda op: op.name)
def test_good_input_is_accepted(op):
    op.check(*GOOD[op.name].values())


@pytest.mark.parametrize(("name", "args", "message"), EVERY)
def test_bad_input_says_what_was_found_and_what_works(name, args, message):
    record = next(op for op in PURE if op.name == name)
    tensors = [a for a in args.values() if isinstance(a, torch.Tensor) and not a.is_meta]
    before = [t.clone() for t in tensors]

    with pytest.raises(halfbyte.InputError) as caught:
        record.check(*args.values())

    assert str(caught.value).startswith(message)
    assert all(map(torch.equal, tensors, before))


@pytest.mark.parametrize("name", GOOD)
def test_bad_input_is_refused_through_torch_as_well(name):
    """The op itself checks, not only the functional layer."""
    change, message = next(
        (c, m) for c, m in BAD[name] if not any(isinstance(v, torch.Tensor) and v.is_meta for v in c.values())
    )

    with pytest.raises(halfbyte.InputError, match=re.escape(message)):
        getattr(ops, name)(*{**GOOD[name], **change}.values())


def state(**changes):
    given = {
        "absmax": torch.ones(8),
        "shape": (8, 64),
        "code": formats.levels("nf4", CPU),
        "blocksize": 64,
        "quant_type": "nf4",
        "dtype": FLOAT,
    }
    return QuantState(**{**given, **changes})


FUNCTIONAL = [
    (lambda: F.quantize_4bit(x4(), format="int4"), "format must be one of nf4, fp4; got 'int4'"),
    (lambda: F.quantize_4bit(x4(), blocksize=100), f"{SIZES} 100"),
    (
        lambda: F.quantize_4bit(x4(), storage=torch.int64),
        "storage must be one of uint8, int8, float16, bfloat16, float32, float64, int32; got int64",
    ),
    (
        lambda: F.quantize_8bit(x4(), codebook="linear"),
        "codebook must be a tensor or one of dynamic, dynamic_unsigned; got 'linear'",
    ),
    (
        lambda: F.linear_4bit(x4(k=63), PACKED["packed"], state()),
        "x (..., K) must fit a weight (N, K); got (2, 63) and (8, 64)",
    ),
    (
        lambda: F.linear_4bit(x4(), PACKED["packed"], state(shape=(512,))),
        "x (..., K) must fit a weight (N, K); got (2, 64) and (512,)",
    ),
    (
        lambda: F.dequantize_4bit(PACKED["packed"], state(quant_type=None)),
        "a 4-bit state needs shape, quant_type and blocksize; got QuantState(8-bit, ",
    ),
    (
        lambda: F.dequantize_4bit(PACKED["packed"], state(shape=None)),
        "a 4-bit state needs shape, quant_type and blocksize; got QuantState(nf4, shape=None, ",
    ),
    (lambda: F.linear_int8(x4(), GOOD["linear_int8"]["weight"], torch.ones(8), mode="x"), "mode must be one of"),
]


@pytest.mark.parametrize(("call", "message"), FUNCTIONAL)
def test_functional_refuses_bad_input(call, message):
    with pytest.raises(halfbyte.InputError) as caught:
        call()

    assert str(caught.value).startswith(message)
