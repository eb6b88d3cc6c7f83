"""Arguments for every op, made from facts alone: what the kit calls kernels with.

A third-party Op brings its own: `Op(..., samples=function)`, where `function()` gives a Samples.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .. import formats
from ..op import Op
from . import samples_optimizer
from .draw import Draw

Args = tuple[Any, ...]
Size = tuple[int, ...]

FLOATS = (torch.float32, torch.float16, torch.bfloat16)


@dataclass(frozen=True)
class Samples:
    """How to call one op.

    domain      fact name (all but device) -> the values the op takes; an open set is represented by some of them
    sizes       facts -> size name -> numbers that `make` understands.  "usual" must be there; "empty", "one",
                "partial" and "odd" are tried by the check of odd inputs, "many" with rounding ties
    make        (facts, size, draw) -> arguments on the CPU whose facts are those
    values      what `draw.floats` may be filled with, see draw.VALUES
    specified   (arguments, results) -> results with everything that no format specifies set to zero
    possible    facts -> whether the op takes that combination
    """

    domain: Mapping[str, tuple[object, ...]]
    sizes: Callable[[Any], Mapping[str, Size]]
    make: Callable[[Any, Size, Draw], Args]
    values: tuple[str, ...] = ("normal",)
    specified: Callable[[Args, tuple[Tensor, ...]], tuple[Tensor, ...]] = lambda args, results: results
    possible: Callable[[Any], bool] = lambda facts: True


def of(op: Op) -> Samples | None:
    """The samples of an op; None where a third-party op brings none."""
    if op.samples is not None:
        found = op.samples()
        if not isinstance(found, Samples):
            raise TypeError(f"samples of op {op.name!r} must give a Samples; got {type(found).__name__}")
        return found
    return SAMPLES.get(op.name) if op.namespace == "halfbyte" else None


# -- 4 bit ---------------------------------------------------------------------------------------------------

_QUANTIZE_4BIT = {"dtype": FLOATS, "format": tuple(formats.FORMATS), "blocksize": formats.BLOCKSIZES}
_PACKED = {**_QUANTIZE_4BIT, "nested": (False, True)}


def _block_sizes(facts: Any) -> Mapping[str, Size]:
    block = facts.blocksize
    return {
        "usual": (3 * block,),
        "partial": (2, block + 19),
        "odd": (2 * block + 5,),
        "one": (1,),
        "empty": (0,),
        "many": (2 * max(block, 512),),
    }


def _make_quantize_4bit(facts: Any, size: Size, draw: Draw) -> Args:
    spec = formats.FORMATS[facts.format]
    around = (*spec.thresholds, *(-value for value in spec.thresholds)) if spec.sign_bit else spec.thresholds
    return draw.floats(size, facts.dtype, levels=around), facts.format, facts.blocksize


def _specified_4bit(args: Args, results: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """Codes of a block with an infinite value are unspecified (FORMATS, section 1)."""
    packed, absmax = results
    infinite = absmax.isinf().repeat_interleave(args[2] // 2)[: packed.numel()]
    return packed.masked_fill(infinite, 0), absmax


def _packed_weight(facts: Any, n: int, draw: Draw, *, extra: int = 0) -> tuple[Tensor | None, ...]:
    """Any bytes are codes, so nothing has to be quantized: (packed, absmax, nested_absmax, codebook, offset).

    extra  trailing entries of absmax that some writers emit and no reader minds
    """
    packed = draw.integers(0, 255, ((n + 1) // 2, 1), torch.uint8)
    blocks = -(-n // facts.blocksize)
    if not facts.nested:
        return packed, draw.positive((blocks + extra,)) / 8, None, None, None
    absmax = draw.integers(0, 255, (blocks + extra,), torch.uint8)
    nested_absmax = draw.positive((-(-(blocks + extra) // formats.NESTED_BLOCKSIZE),)) / 32
    codebook = formats.codebook("dynamic", torch.device("cpu")).clone()
    return packed, absmax, nested_absmax, codebook, torch.tensor(0.0837)


def _make_dequantize_4bit(facts: Any, size: Size, draw: Draw) -> Args:
    n = torch.Size(size).numel()
    weight = _packed_weight(facts, n, draw, extra=n % 3)
    return *weight, facts.format, facts.blocksize, list(size), facts.dtype


def _dequantize_sizes(facts: Any) -> Mapping[str, Size]:
    if not facts.nested:
        return _block_sizes(facts)
    # More than 256 blocks, so that there are two nested ones; not for the largest blocks, to stay quick.
    blocks = 259 if facts.blocksize <= 64 else 5
    return {**_block_sizes(facts), "usual": (blocks, facts.blocksize)}


def _linear_4bit_sizes(facts: Any) -> Mapping[str, Size]:
    """(rows of x, out_features, in_features)."""
    k = min(facts.blocksize, 512)
    # As in _dequantize_sizes: more than 256 blocks, where they are small.
    more = 256 if facts.nested and facts.blocksize <= 64 else 0
    # What kernels for many rows and long ones ask for.
    deep = {"deep": (40, 24, 1024)} if facts.blocksize == 64 else {}
    return {
        **deep,
        "usual": (5, 24 + more, k),
        "vector": (1, 32 + more, 2 * k),  # decoding one token
        "tall": (35, 17 + more, k),
        "partial": (3, 9, k + 19),  # blocks cross rows
        "odd": (2, 7, 45),
        "one": (1, 1, 1),
        "empty": (0, 8, 64),
    }


def _make_linear_4bit(facts: Any, size: Size, draw: Draw) -> Args:
    m, n, k = size
    x = draw.floats((m, k), facts.dtype)
    bias = Draw(f"bias {n}").floats((n,), facts.dtype) if n % 2 else None
    if m == 2:
        x = x.reshape(1, 2, k)
    return x, *_packed_weight(facts, n * k, draw), bias, facts.format, facts.blocksize, n


def _make_backward_4bit(facts: Any, size: Size, draw: Draw) -> Args:
    m, n, k = size
    dy = draw.floats((m, n), facts.dtype)
    return dy, *_packed_weight(facts, n * k, draw), facts.format, facts.blocksize, k


# -- 8 bit ---------------------------------------------------------------------------------------------------

_EIGHTBIT = {"dtype": FLOATS, "blocksize": (64, 100, 256, 2048, 4096)}


def _make_quantize_8bit(facts: Any, size: Size, draw: Draw) -> Args:
    unsigned = len(size) > 1
    codebook = formats.codebook("dynamic_unsigned" if unsigned else "dynamic", torch.device("cpu")).clone()
    midpoints = ((codebook[:-1] + codebook[1:]) * 0.5).tolist()
    x = draw.floats(size, facts.dtype, levels=midpoints)
    return x.abs() if unsigned else x, codebook, facts.blocksize


def _specified_8bit(args: Args, results: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    codes, absmax = results
    infinite = absmax.isinf().repeat_interleave(args[2])[: codes.numel()].reshape(codes.shape)
    return codes.masked_fill(infinite, 0), absmax


def _make_dequantize_8bit(facts: Any, size: Size, draw: Draw) -> Args:
    codes = draw.integers(0, 255, size, torch.uint8)
    absmax = draw.positive((-(-codes.numel() // facts.blocksize) + codes.numel() % 3,))
    codebook = formats.codebook("dynamic", torch.device("cpu")).clone()
    return codes, absmax, codebook, facts.blocksize, facts.dtype


# -- int8 ----------------------------------------------------------------------------------------------------


def _rows_sizes(facts: Any) -> Mapping[str, Size]:
    return {"usual": (4, 64), "partial": (3, 2, 77), "odd": (7,), "one": (1, 1), "empty": (0, 16), "many": (9, 300)}


def _make_rows(facts: Any, size: Size, draw: Draw) -> Args:
    halves = [step + 0.5 for step in range(-127, 127)]
    x = draw.floats(size, facts.dtype, levels=halves, top=127.0)
    if len(size) == 2 and draw.values in ("ties", "edges"):
        return x, 0.0
    threshold = 1.75 if len(size) == 2 else 0.0
    if threshold and x.numel() > 8:
        x[0, 5] = threshold  # exactly there: an outlier
    return x, threshold


def _make_dequantize_int8(facts: Any, size: Size, draw: Draw) -> Args:
    limit = 127 if facts.source is torch.int8 else 2_000_000
    q = draw.integers(-limit, limit, size, facts.source)
    rows = draw.positive((q[..., 0].numel(),)) if q.ndim > 1 else draw.positive((1,))
    columns = draw.positive((size[-1],)) if facts.source is torch.int32 else None
    bias = draw.floats((size[-1],), facts.dtype) if size[-1] % 2 else None
    return q, rows, columns, bias, facts.dtype


def _matmul_sizes(facts: Any) -> Mapping[str, Size]:
    return {
        "usual": (5, 24, 64),
        "vector": (1, 32, 128),
        "tall": (35, 17, 64),
        "partial": (3, 9, 83),
        "odd": (2, 7, 45),
        "one": (1, 1, 1),
        "empty": (0, 8, 64),
        "many": (2, 3, 1501),
    }


def _make_matmul(facts: Any, size: Size, draw: Draw) -> Args:
    m, n, k = size
    a = draw.integers(-127, 127, (m, k), torch.int8)
    b = draw.integers(-127, 127, (n, k), torch.int8)
    if k > 64:
        a[0], b[0] = -128, -128  # the largest sum there is; in float32 it would be exact
        a[-1], b[-1] = 127, 127  # "many": an odd sum beyond 2^24
    return a, b


def _make_linear_int8(facts: Any, size: Size, draw: Draw) -> Args:
    m, n, k = size
    x = draw.floats((m, k), facts.dtype)
    threshold = 2.5 if facts.outliers else 0.0
    if facts.outliers and m and k > 8 and draw.values == "normal":
        x[m // 2, 5] = threshold  # exactly there: an outlier
        x[0, k - 1] = -7.0
    weight = draw.integers(-127, 127, (n, k), torch.int8)
    bias = Draw(f"bias {n}").floats((n,), facts.dtype) if n % 2 else None
    if m == 2:
        x = x.reshape(1, 2, k)
    return x, weight, draw.positive((n,)) / 4, bias, threshold, facts.mode


_ROUNDED = ("normal", "zeros", "equal", "nan", "inf", "tiny", "ties", "edges")
_PLAIN = ("normal", "zeros", "equal", "nan", "inf")

SAMPLES: Mapping[str, Samples] = {
    "quantize_4bit": Samples(_QUANTIZE_4BIT, _block_sizes, _make_quantize_4bit, _ROUNDED, _specified_4bit),
    "dequantize_4bit": Samples(_PACKED, _dequantize_sizes, _make_dequantize_4bit),
    "linear_4bit": Samples(_PACKED, _linear_4bit_sizes, _make_linear_4bit, _PLAIN),
    "linear_4bit_backward": Samples(_PACKED, _linear_4bit_sizes, _make_backward_4bit, _PLAIN),
    "quantize_8bit": Samples(_EIGHTBIT, _block_sizes, _make_quantize_8bit, _ROUNDED, _specified_8bit),
    "dequantize_8bit": Samples(_EIGHTBIT, _block_sizes, _make_dequantize_8bit),
    "quantize_int8_rows": Samples({"dtype": FLOATS}, _rows_sizes, _make_rows, _ROUNDED),
    "dequantize_int8": Samples(
        {"dtype": FLOATS, "source": (torch.int8, torch.int32)}, _rows_sizes, _make_dequantize_int8
    ),
    "matmul_int8": Samples({}, _matmul_sizes, _make_matmul),
    "linear_int8": Samples(
        {"dtype": FLOATS, "mode": ("exact", "w8a16"), "outliers": (False, True)},
        _matmul_sizes,
        _make_linear_int8,
        _PLAIN,
    ),
    **{
        name: Samples(
            samples_optimizer.DOMAINS[name],
            samples_optimizer.sizes,
            make,
            samples_optimizer.VALUES,
            possible=samples_optimizer.possible,
        )
        for name, make in (("update_32bit", samples_optimizer.make_32bit), ("update_8bit", samples_optimizer.make_8bit))
    },
}
