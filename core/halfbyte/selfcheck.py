"""Small fixed inputs for every op, and the comparison of what a backend makes of them with the reference.

`halfbyte doctor` runs them on each device; the conformance kit may start from them.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from . import calling, choosing, formats
from .errors import HalfbyteError, HalfbytePerformanceWarning
from .kernel import show
from .op import Op
from .ops import checks, fourbit, int8, rules

DTYPES = checks.FLOATS

_ROWS, _OUT, _IN = 5, 48, 128  # one row more than most kernels take at once; several blocks


@dataclass(frozen=True)
class Case:
    """Arguments for one call of an op, on the CPU.

    label   what is special about them: "bfloat16, nf4, nested"
    """

    op: str
    label: str
    args: tuple[Any, ...]


@dataclass(frozen=True)
class Result:
    """What came of one case on one device.

    backend   that ran it; None where none could
    ok        whether the result agrees with the reference
    message   why not; else how the backend was chosen
    against   reasons against each backend that was asked before
    """

    op: str
    device: str
    label: str
    backend: str | None
    variant: str
    ok: bool
    message: str
    against: tuple[tuple[str, tuple[str, ...]], ...] = ()


def cases(op: str) -> Iterator[Case]:
    """The inputs of a built-in op; none for an op that is not known here."""
    if op in _CASES:
        for label, *args in _CASES[op]():
            yield Case(op, label, tuple(args))


def run_case(op: Op, case: Case, device: torch.device | str) -> Result:
    """Run one case through the dispatcher and compare.  Never raises."""
    where = (op.name, str(device), case.label)
    ran: tuple[str | None, str] = (None, "")
    try:
        args, kept = on_device(case.args, device), on_device(case.args, "cpu")
        decision = choosing.explain(op, *args)
        if decision.backend is None:
            return Result(*where, *ran, False, str(decision), decision.tried)
        ran = (decision.backend, decision.variant)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", HalfbytePerformanceWarning)  # the result says which backend ran
            got = results(op, calling.planned[op.name], args)
        wrong = differences(op, got, results(op, op.reference, kept))
    except HalfbyteError as error:
        return Result(*where, *ran, False, str(error))
    except Exception as error:  # a kernel may raise anything; doctor goes on
        return Result(*where, *ran, False, f"{type(error).__name__}: {error}")
    message = "; ".join(wrong) or f"chosen by {decision.chosen_by}"
    return Result(*where, *ran, not wrong, message, decision.tried)


def differences(op: Op, got: Any, expected: Any) -> tuple[str, ...]:
    """How a result departs from the reference's: equality, or the op's tolerance where it has one for the dtype."""
    got, expected = tuple(pytree.tree_leaves(got)), tuple(pytree.tree_leaves(expected))
    if len(got) != len(expected):
        return (f"{len(got)} results instead of {len(expected)}",)
    return tuple(
        f"result {index}: {reason}"
        for index, (one, other) in enumerate(zip(got, expected, strict=True))
        if (reason := _difference(op, one.detach().cpu(), other))
    )


def on_device(args: tuple[Any, ...], device: torch.device | str) -> tuple[Any, ...]:
    """Copies of the same arguments on a device."""
    return tuple(pytree.tree_map_only(Tensor, lambda tensor: tensor.to(device, copy=True), list(args)))


def written(op: Op) -> list[int]:
    """Positions of the arguments that the op writes to."""
    schema = torch._C.parse_schema(f"{op.namespace}::{op.name}{op.schema}")
    return [i for i, arg in enumerate(schema.arguments) if arg.alias_info is not None and arg.alias_info.is_write]


def results(op: Op, function: Callable[..., Any], args: tuple[Any, ...]) -> tuple[Tensor, ...]:
    """Everything that a call gives: what it returns, then what it wrote to."""
    returned = function(*args)
    given = [returned, *(args[i] for i in written(op))]
    return tuple(leaf for leaf in pytree.tree_leaves(given) if isinstance(leaf, Tensor))


def _difference(op: Op, got: Tensor, expected: Tensor) -> str:
    if got.shape != expected.shape or got.dtype != expected.dtype:
        return f"{show(got.dtype)} {tuple(got.shape)} instead of {show(expected.dtype)} {tuple(expected.shape)}"
    rtol, atol = op.tolerance.get(expected.dtype, (0.0, 0.0))
    far = ~torch.isclose(got.double(), expected.double(), rtol=rtol, atol=atol, equal_nan=True)
    if not far.any():
        return ""
    worst = float((got.double() - expected.double()).abs()[far].max())
    allowed = f"more than rtol {rtol}, atol {atol}" if (rtol or atol) else "and must be equal"
    return f"{int(far.sum())} of {far.numel()} values differ, by up to {worst:.3g}, {allowed}"


# -- inputs --------------------------------------------------------------------------------------------------


def _random(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    """Normal values, the same everywhere: made on the CPU."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def _codes(*shape: int) -> Tensor:
    return torch.randint(-127, 128, shape, generator=torch.Generator().manual_seed(1)).to(torch.int8)


@functools.cache
def _packed(format: str, blocksize: int, nested: bool) -> tuple[Tensor | None, ...]:
    """A weight (_OUT, _IN), as the ops take it, scaled like a trained one: tolerances are for results of order one."""
    scale = _IN**-0.5
    packed, absmax = fourbit.quantize_4bit(_random(_OUT, _IN, seed=2) * scale, format, blocksize)
    if not nested:
        return packed, absmax, None, None, None
    codes = (torch.arange(absmax.numel()) * 37 % 256).to(torch.uint8)
    groups = -(-absmax.numel() // formats.NESTED_BLOCKSIZE)
    codebook = formats.codebook("dynamic", torch.device("cpu"))
    return packed, codes, torch.full((groups,), 0.25 * scale), codebook, torch.tensor(1.5 * scale)


def _quantize_4bit() -> Iterator[tuple[Any, ...]]:
    for dtype in DTYPES:
        for format in formats.FORMATS:
            yield f"{show(dtype)}, {format}", _random(_OUT, _IN, dtype=dtype), format, 64
    odd = _random(3, 67)
    odd[0] = 0.0
    yield "odd count, zeros", odd, "nf4", 32


def _weights() -> Iterator[tuple[str, tuple[Tensor | None, ...], str, int, torch.dtype]]:
    for dtype in DTYPES:
        for format in formats.FORMATS:
            for nested in (False, True):
                label = f"{show(dtype)}, {format}{', nested' if nested else ''}"
                yield label, _packed(format, 64, nested), format, 64, dtype
    yield "float32, nf4, blocks across rows", _packed("nf4", 256, False), "nf4", 256, torch.float32


def _dequantize_4bit() -> Iterator[tuple[Any, ...]]:
    for label, weight, format, blocksize, dtype in _weights():
        yield label, *weight, format, blocksize, [_OUT, _IN], dtype


def _linear_4bit() -> Iterator[tuple[Any, ...]]:
    for label, weight, format, blocksize, dtype in _weights():
        x, bias = _random(_ROWS, _IN, dtype=dtype, seed=3), _random(_OUT, dtype=dtype, seed=4)
        yield label, x, *weight, bias, format, blocksize, _OUT
        yield f"{label}, one row", x[:1], *weight, None, format, blocksize, _OUT


def _linear_4bit_backward() -> Iterator[tuple[Any, ...]]:
    for label, weight, format, blocksize, dtype in _weights():
        yield label, _random(_ROWS, _OUT, dtype=dtype, seed=5), *weight, format, blocksize, _IN


def _quantize_8bit() -> Iterator[tuple[Any, ...]]:
    for dtype in DTYPES:
        for name in formats.codebook_names():
            codebook = formats.codebook(name, torch.device("cpu"))
            yield f"{show(dtype)}, {name}", _random(3, 701, dtype=dtype).abs(), codebook, 256


def _dequantize_8bit() -> Iterator[tuple[Any, ...]]:
    codes = (torch.arange(3 * 701) * 89 % 256).to(torch.uint8).reshape(3, 701)
    for dtype in DTYPES:
        yield show(dtype), codes, _random(9).abs(), formats.codebook("dynamic", torch.device("cpu")), 256, dtype


def _activations(dtype: torch.dtype) -> Tensor:
    x = _random(_ROWS, _IN, dtype=dtype, seed=6)
    x[1, 7] = 20.0  # an outlier
    x[2] = 0.0
    return x


def _quantize_int8_rows() -> Iterator[tuple[Any, ...]]:
    for dtype in DTYPES:
        for threshold in (0.0, 6.0):
            yield f"{show(dtype)}, threshold {threshold}", _activations(dtype), threshold


def _dequantize_int8() -> Iterator[tuple[Any, ...]]:
    rows, columns, product = _random(_ROWS).abs(), _random(_IN, seed=7).abs(), _codes(_ROWS, _IN).int() * 1000
    for dtype in DTYPES:
        yield f"{show(dtype)}, rows", _codes(_ROWS, _IN), rows, None, None, dtype
        yield f"{show(dtype)}, product", product, rows, columns, _random(_IN, dtype=dtype, seed=8), dtype


def _matmul_int8() -> Iterator[tuple[Any, ...]]:
    yield "int8", _codes(_ROWS, _IN), _codes(_OUT, _IN)


def _linear_int8() -> Iterator[tuple[Any, ...]]:
    weight, absmax = _codes(_OUT, _IN), _random(_OUT).abs()
    for dtype in DTYPES:
        bias = _random(_OUT, dtype=dtype, seed=9)
        for mode in int8.MODES:
            for threshold in (0.0, 6.0):
                label = f"{show(dtype)}, {mode}, threshold {threshold}"
                yield label, _activations(dtype), weight, absmax, bias, threshold, mode


def _parameters(dtype: torch.dtype) -> tuple[list[Tensor], list[Tensor]]:
    return [_random(700, dtype=dtype), _random(5, dtype=dtype, seed=1)], [
        _random(700, dtype=dtype, seed=10),
        _random(5, dtype=dtype, seed=11),
    ]


def _hyper(optimizer: str) -> tuple[Any, ...]:
    rate, schedule = torch.tensor(0.01, dtype=torch.float64), 50 if optimizer == "ademamix" else 0
    return torch.tensor(3), rate, None, [0.9, 0.99, 0.999], 1e-8, 0.1, 5.0, schedule, schedule, 0.0, False, []


def _update_32bit() -> Iterator[tuple[Any, ...]]:
    for dtype in DTYPES:
        for optimizer, rule in rules.RULES.items():
            params, grads = _parameters(dtype)
            one = [_random(rule.states[0] * param.numel(), seed=12).abs() for param in params]
            two = [_random(param.numel(), seed=13).abs() for param in params] if rule.states[1] else []
            yield f"{show(dtype)}, {optimizer}", optimizer, params, grads, one, two, *_hyper(optimizer)


def _update_8bit() -> Iterator[tuple[Any, ...]]:
    signed, unsigned = (formats.codebook(name, torch.device("cpu")) for name in formats.codebook_names())
    for dtype in DTYPES:
        for optimizer, rule in rules.RULES.items():
            params, grads = _parameters(dtype)
            first, second = rule.states
            # Codes from 127 on: no negative second moments in the signed codebook.
            one = [(torch.arange(first * param.numel()) * 89 % 128 + 127).to(torch.uint8) for param in params]
            two = [(torch.arange(param.numel()) * 37 % 256).to(torch.uint8) for param in params] if second else []
            scales = [_random(first * -(-param.numel() // 256), seed=14).abs() for param in params]
            more = [_random(-(-param.numel() // 256), seed=15).abs() for param in params] if second else []
            states = (one, scales, signed, two, more, unsigned if second else None, 256)
            yield f"{show(dtype)}, {optimizer}", optimizer, params, grads, *states, *_hyper(optimizer)


_CASES: dict[str, Callable[[], Iterator[tuple[Any, ...]]]] = {
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
