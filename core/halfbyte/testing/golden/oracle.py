"""What every op gives, in numpy, written from docs/pages/formats.md and not from the reference.

Slow and plain.  It shares no table and no function with the rest of halfbyte: an error in the reference must
show as a difference.  Floats arrive as float32, as every 16-bit float is one; float32 arithmetic is IEEE.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

Array = Any  # an ndarray; numpy's own types would say no more here
F = np.float32

# Values by nibble, and the bits of the thresholds that bitsandbytes' C compiler makes.
_NF4 = np.array(
    (
        *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635),
        *(-0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725),
        *(0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941),
        *(0.7229568362236023, 1.0),
    ),
    F,
)
_FP4 = np.array([0, 0.0625, 8, 12, 4, 6, 2, 3], np.float64) / 12
_FP4 = np.concatenate((_FP4, [0.0], -_FP4[1:])).astype(F)
_NF4_SHA = "8501941daa1b8a90ad1bbfeb632e5101b5dddbc4bb52d6e55abcfd777e60c06a"
_FP4_SHA = "b830bcf8857895e5676b8e2ce608a60bb8af9b3ce6270073e9de34814196f09c"

_BITS = "bf591cd9 bf1c5270 beeb8480 beadea76 be703cec be0d38bc bd3a7871 3d22faff 3df64863 3e5067e0 3e9582d4 3ec753f9"
_NF4_CUTS = np.array([int(word, 16) for word in f"{_BITS} 3f006d03 3f248daf 3f5c89d9".split()], np.uint32).view(F)
_BITS = "3b2aaab9 3db00000 3e555555 3e955555 3ed55556 3f155550 3f555555"
_FP4_CUTS = np.array([int(word, 16) for word in _BITS.split()], np.uint32).view(F)
_FP4_ORDER = np.array([0, 1, 6, 7, 4, 5, 2, 3], np.uint8)  # codes by growing magnitude


def compute(op: str, args: tuple[Any, ...], facts: Any) -> list[Tensor]:
    """The results of an op; floats have the dtype of the facts, absmax is float32."""
    for table, digest in ((_NF4, _NF4_SHA), (_FP4, _FP4_SHA)):
        if hashlib.sha256(table.astype("<f4").tobytes()).hexdigest() != digest:
            raise AssertionError("the oracle's own table is wrong")
    with np.errstate(all="ignore"):
        given = [_numpy(arg) for arg in args]
        found = _ORACLES[op](*given)
    return [_torch(one, getattr(facts, "dtype", torch.float32)) for one in found]


def _numpy(arg: Any) -> Any:
    if isinstance(arg, list):
        return [_numpy(one) for one in arg]
    if not isinstance(arg, Tensor):
        return arg
    return (arg.float() if arg.is_floating_point() else arg).numpy()


def _torch(array: Array, dtype: torch.dtype) -> Tensor:
    """A float64 array is a result to round, to `dtype`; everything else is kept."""
    if array.dtype != np.float64:
        return torch.from_numpy(np.ascontiguousarray(array))
    single = array.astype(F)
    if dtype is torch.float32:
        return torch.from_numpy(single)
    if dtype is torch.float16:
        return torch.from_numpy(single.astype(np.float16))
    bits = single.view(np.uint32).astype(np.uint64)
    rounded = ((bits + 0x7FFF + (bits >> 16 & 1)) >> 16).astype(np.uint16)  # to nearest, ties to even
    rounded[np.isnan(single)] = 0x7FC0
    return torch.from_numpy(rounded.view(np.int16)).view(torch.bfloat16)


# -- blocks --------------------------------------------------------------------------------------------------


def _scaled(x: Array, blocksize: int) -> tuple[list[Array], Array]:
    """Block by block: x * (1 / absmax), None where the reciprocal overflows; and the absmax."""
    flat = x.reshape(-1)
    blocks, absmax = [], []
    for start in range(0, flat.size, blocksize):
        block = flat[start : start + blocksize]
        magnitudes = np.abs(block[~np.isnan(block)])
        largest = F(magnitudes.max()) if magnitudes.size else F(0)
        reciprocal = F(1) / largest
        absmax.append(largest)
        blocks.append(np.zeros(block.size, F) * F("nan") if np.isinf(reciprocal) else block * reciprocal)
    return blocks, np.array(absmax, F)


def _quantize_4bit(x: Array, format: str, blocksize: int) -> list[Array]:
    blocks, absmax = _scaled(x, blocksize)
    codes = [_code_4bit(value, format) for block in blocks for value in block]  # NaN, also a zero block's: code 0
    if len(codes) % 2:
        codes.append(_code_4bit(F(0), format))
    pairs = np.array(codes, np.uint8).reshape(-1, 2)
    return [pairs[:, 0] * 16 + pairs[:, 1], absmax]


def _code_4bit(value: Any, format: str) -> int:
    if np.isnan(value):
        return 0
    if format == "nf4":
        return int((value > _NF4_CUTS).sum())
    return int(_FP4_ORDER[(abs(value) > _FP4_CUTS).sum()]) + 8 * bool(value < 0)


def _weights(stored: list[Any], n: int) -> Array:
    """The first n values as float32 products, one rounding each."""
    packed, absmax, nested, codebook, offset, format, blocksize = stored
    if nested is not None:
        # product, then sum, each rounded to float32
        absmax = np.array([codebook[code] * nested[i // 256] + offset for i, code in enumerate(absmax)], F)
    table = _NF4 if format == "nf4" else _FP4
    flat = packed.reshape(-1)
    out = np.empty(n, F)
    for i in range(n):
        code = flat[i // 2] >> 4 if i % 2 == 0 else flat[i // 2] & 15
        out[i] = table[code] * absmax[i // blocksize]
    return out


def _dequantize_4bit(*args: Any) -> list[Array]:
    *weight, shape, _ = args
    n = int(np.prod(shape))
    return [_weights(weight, n).reshape(shape).astype(np.float64)]


def _linear_4bit(x: Array, *args: Any) -> list[Array]:
    *packed, bias, format, blocksize, n = args
    k = x.shape[-1]
    weight = _weights([*packed, format, blocksize], n * k).reshape(n, k).astype(np.float64)
    y = x.astype(np.float64) @ weight.T
    return [y if bias is None else y + bias.astype(np.float64)]


def _linear_4bit_backward(dy: Array, *args: Any) -> list[Array]:
    *weight, k = args
    n = dy.shape[-1]
    return [dy.astype(np.float64) @ _weights(weight, n * k).reshape(n, k).astype(np.float64)]


# -- 8 bit ---------------------------------------------------------------------------------------------------


def _quantize_8bit(x: Array, codebook: Array, blocksize: int) -> list[Array]:
    blocks, absmax = _scaled(x, blocksize)
    codes = [_code_8bit(value, codebook) for block in blocks for value in block]
    return [np.array(codes, np.uint8).reshape(x.shape), absmax]


def _code_8bit(value: Any, codebook: Array) -> int:
    if np.isnan(value):
        return 0
    middles = (codebook[:-1] + codebook[1:]) * F(0.5)
    below = int((middles < value).sum())
    tie = below < 255 and middles[below] == value
    return below + (tie and below % 2)  # halfway: the even one of below and below + 1


def _dequantize_8bit(codes: Array, absmax: Array, codebook: Array, blocksize: int, dtype: object) -> list[Array]:
    flat = codes.reshape(-1)
    values = [codebook[code] * absmax[i // blocksize] for i, code in enumerate(flat)]
    return [np.array(values, F).reshape(codes.shape).astype(np.float64)]


# -- int8 ----------------------------------------------------------------------------------------------------


def _quantize_int8_rows(x: Array, threshold: float) -> list[Array]:
    rows = x.reshape(-1, x.shape[-1])
    outlier = np.abs(rows) >= F(threshold) if threshold > 0 else np.zeros(rows.shape, bool)
    columns = outlier.any(axis=0)
    q = np.zeros(rows.shape, np.int8)
    absmax = np.zeros(len(rows), F)
    for i, row in enumerate(rows):
        inside = np.abs(row[~outlier[i] & ~np.isnan(row)])
        absmax[i] = inside.max() if inside.size else 0
        if absmax[i] > 0:
            scaled = np.where(np.isnan(row) | columns, F(0), row * (F(127) / absmax[i]))
            q[i] = np.clip(np.rint(scaled), -127, 127).astype(np.int8)
    return [q.reshape(x.shape), absmax, columns]


def _dequantize_int8(q: Array, rows: Array, columns: Array, bias: Array, dtype: object) -> list[Array]:
    values = q.reshape(-1, q.shape[-1]).astype(F)
    if columns is None:
        values = values * rows[:, None] * F(1 / 127)
    else:
        values = values * (rows[:, None] * columns[None, :]) * F(1 / 127**2)
    if bias is not None:
        values = values + bias
    return [values.reshape(q.shape).astype(np.float64)]


def _matmul_int8(a: Array, b: Array) -> list[Array]:
    return [(a.astype(np.int64) @ b.astype(np.int64).T).astype(np.int32)]


def _linear_int8(x: Array, weight: Array, absmax: Array, bias: Array, threshold: float, mode: str) -> list[Array]:
    rows = x.reshape(-1, x.shape[-1])
    exact = weight.astype(np.float64) * absmax[:, None].astype(np.float64) / 127
    if mode == "w8a16":
        y = rows.astype(np.float64) @ exact.T
    else:
        q, row_absmax, columns = _quantize_int8_rows(rows, threshold)
        (product,) = _matmul_int8(q, weight)
        y = product * (row_absmax[:, None].astype(np.float64) * absmax[None, :]) / 127**2
        y += rows[:, columns].astype(np.float64) @ exact[:, columns].T
    if bias is not None:
        y = y + bias
    return [y.reshape(*x.shape[:-1], len(weight))]


# -- optimizers ----------------------------------------------------------------------------------------------


def _moved(name: str, p: Array, g: Array, old: list[Array], hyper: list[Any]) -> tuple[Array, list[Array]]:
    """One step of one flat parameter in float32, each operation rounded; the scalars are float64 before."""
    step, lr, scale, betas, eps, decay, alpha, t_alpha, t_beta3, max_unorm, skip_zeros, _ = hyper
    t, lr = int(step), float(lr)
    b1, b2, b3 = betas
    c1, c2 = 1 - b1**t, np.sqrt(1 - b2**t)
    scaled = g if scale is None else g * F(scale)
    coupled = name in ("momentum", "rmsprop", "adagrad")
    g = scaled + p * F(decay) if coupled else scaled
    shrunk = p if coupled else p * F(1 - lr * decay)
    size, correction = lr, 1.0
    if name == "adam":
        m, v = old[0] * F(b1) + g * F(1 - b1), old[1] * F(b2) + g * g * F(1 - b2)
        size, correction = lr * c2 / c1, c2 / c1
        new, u = [m, v], m / (np.sqrt(v) + F(eps * c2))
    elif name == "ademamix":
        a = min(t * alpha / t_alpha, alpha)
        x = t / t_beta3
        slow = min(np.exp(np.log(b1) * np.log(b3) / ((1 - x) * np.log(b3) + x * np.log(b1))), b3)
        m1, m2 = old[0] * F(b1) + g * F(1 - b1), old[1] * F(slow) + g * F(1 - slow)
        v = old[2] * F(b2) + g * g * F(1 - b2)
        new, u = [m1, m2, v], (m1 * F(1 / c1) + m2 * F(a)) / (np.sqrt(v) * F(1 / c2) + F(eps))
    elif name == "lion":
        new, u = [old[0] * F(b2) + g * F(1 - b2)], np.sign(old[0] * F(b1) + g * F(1 - b1))
    elif name == "momentum":
        new = [old[0] * F(b1) + g]
        u = new[0]
    else:
        v = old[0] + g * g if name == "adagrad" else old[0] * F(b1) + g * g * F(1 - b1)
        new, u = [v], g / (np.sqrt(v) + F(eps))
    factor = F(size)
    if max_unorm > 0:
        norms = [np.sqrt((x.astype(np.float64) ** 2).sum()) for x in (p, u)]
        allowed = max_unorm * norms[0] + (0 if name == "adam" else eps)
        factor = F(min(1.0, allowed / (norms[1] * correction))) * F(size)
    moved = shrunk - u * factor
    if skip_zeros:
        moved, new = np.where(scaled == 0, p, moved), [np.where(scaled == 0, o, n) for o, n in zip(old, new)]
    return moved, new


def _kept(state: Array) -> list[Array]:
    """The values of a state: AdEMAMix keeps two under one name."""
    return [row.reshape(-1) for row in state] if state.ndim > 1 else [state]


def _update_32bit(
    name: str, params: list[Array], grads: list[Array], one: list[Array], two: list[Array], *rest: Any
) -> list[Array]:
    moved, first, second = [], [], []
    for i, (p, g) in enumerate(zip(params, grads)):
        old = [*_kept(one[i]), *([two[i]] if two else [])]
        value, new = _moved(name, p, g, old, list(rest))
        moved.append(value.astype(np.float64))
        first.append(np.stack(new[: len(_kept(one[i]))]).reshape(one[i].shape).astype(F))
        second += [new[-1].astype(F)] if two else []
    return [*moved, *first, *second]


def _update_8bit(name: str, params: list[Array], grads: list[Array], *args: Any) -> list[Array]:
    codes1, absmax1, book1, codes2, absmax2, book2, blocksize, *rest = args
    moved, lists = [], [[], [], [], []]  # type: ignore[var-annotated]
    for i, (p, g) in enumerate(zip(params, grads)):
        places = [(c, a, book1) for c, a in zip(_kept(codes1[i]), _kept(absmax1[i]))]
        firsts = len(places)
        places += [(codes2[i], absmax2[i], book2)] if codes2 else []
        old = [np.array([book[c] * a[j // blocksize] for j, c in enumerate(codes)], F) for codes, a, book in places]
        value, new = _moved(name, p, g, old, rest)
        moved.append(value.astype(np.float64))
        made = [_coded(state, book, blocksize) for state, (_, _, book) in zip(new, places)]
        for kind in (0, 1):  # codes, absmax
            shape = (codes1, absmax1)[kind][i].shape
            lists[kind].append(np.stack([one[kind] for one in made[:firsts]]).reshape(shape))
            lists[kind + 2] += [made[-1][kind]] if codes2 else []
    return [*moved, *lists[0], *lists[1], *lists[2], *lists[3]]


def _coded(state: Array, codebook: Array, blocksize: int) -> tuple[Array, Array]:
    codes, absmax = [], []
    for start in range(0, state.size, blocksize):
        block = state[start : start + blocksize]
        largest = np.abs(block).max()
        absmax.append(largest)
        for value in block:
            code = _code_8bit(value / largest if largest else F(0), codebook)
            if codebook[0] < 0 and value < 0 <= codebook[code]:
                code -= 1  # a negative value keeps its sign
            elif codebook[0] < 0 and codebook[code] < 0 < value:
                code += 1
            codes.append(code)
    return np.array(codes, np.uint8), np.array(absmax, F)


_ORACLES: dict[str, Callable[..., list[Array]]] = {
    "quantize_4bit": _quantize_4bit,
    "dequantize_4bit": _dequantize_4bit,
    "linear_4bit": _linear_4bit,
    "linear_4bit_backward": _linear_4bit_backward,
    "quantize_8bit": _quantize_8bit,
    "dequantize_8bit": _dequantize_8bit,
    "quantize_int8_rows": _quantize_int8_rows,
    "dequantize_int8": _dequantize_int8,
    "matmul_int8": _matmul_int8,
    "linear_int8": _linear_int8,
    "update_32bit": _update_32bit,
    "update_8bit": _update_8bit,
}
