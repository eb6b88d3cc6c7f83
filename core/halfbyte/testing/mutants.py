"""Backends that are wrong on purpose: each is the reference with one planted error, to prove that the kit bites.

Also a pytest plugin that offers them: `-p halfbyte.testing.mutants --backend mutant_tie_to_odd`, and the kit's own
options as for any backend.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any, ClassVar

import torch
from torch import Tensor

from .. import formats
from .._runtime import dispatcher
from ..backend import Backend
from ..hookspecs import hookimpl
from ..kernel import Kernel

Wrong = Callable[..., Any]  # (the reference, its arguments) -> wrong results


@dataclass(frozen=True)
class Mutant:
    """One planted error.

    op       where it is
    kernel   the wrong kernel: called with the reference and the arguments
    limits   of the kernel
    rule     of the kernel
    bound    whether the kernel itself is right, and only what it is bound to a weight is wrong
    """

    name: str
    op: str
    kernel: Wrong
    limits: Mapping[str, Any]
    rule: Callable[[Any], Any] | None = None
    bound: bool = False


MUTANTS: dict[str, Mutant] = {}


def mutant(
    op: str, limits: Mapping[str, Any] | None = None, rule: Any = None, bound: bool = False
) -> Callable[[Wrong], Wrong]:
    def add(function: Wrong) -> Wrong:
        name = f"mutant_{function.__name__}"
        MUTANTS[name] = Mutant(name, op, function, limits or {}, rule, bound)
        return function

    return add


# -- scales and codes ----------------------------------------------------------------------------------------


@mutant("dequantize_4bit")
def scale_off_by_one_block(reference: Wrong, packed: Tensor, absmax: Tensor, *rest: Any) -> Any:
    return reference(packed, absmax.roll(1), *rest)


@mutant("dequantize_4bit")
def nibbles_swapped(reference: Wrong, packed: Tensor, *rest: Any) -> Any:
    return reference((packed << 4) | (packed >> 4), *rest)


@mutant("dequantize_4bit")
def nested_offset_ignored(reference: Wrong, *args: Any) -> Any:
    packed, absmax, nested, codebook, offset, *rest = args
    return reference(packed, absmax, nested, codebook, None if offset is None else offset * 0, *rest)


@mutant("dequantize_4bit")
def second_nested_block_ignored(reference: Wrong, packed: Tensor, absmax: Tensor, nested: Any, *rest: Any) -> Any:
    return reference(packed, absmax, _first_for_all(nested), *rest)


@mutant("dequantize_4bit")
def blocks_start_anew_in_each_row(reference: Wrong, *args: Any) -> Any:
    packed, absmax, nested, _, _, format, blocksize, shape, dtype = args
    whole: Tensor = reference(*args)
    if nested is not None or len(shape) != 2 or shape[1] % blocksize == 0:
        return whole
    rows = torch.arange(whole.numel()).reshape(shape)
    wanted = (rows // shape[1] * -(-shape[1] // blocksize) + rows % shape[1] // blocksize).clamp(max=len(absmax) - 1)
    unscaled = reference(packed, torch.ones_like(absmax), None, None, None, format, blocksize, shape, torch.float32)
    return (unscaled * absmax[wanted]).to(dtype)


@mutant("quantize_4bit")
def threshold_off_by_an_ulp(reference: Wrong, x: Tensor, format: str, blocksize: int) -> Any:
    packed, absmax = reference(x, format, blocksize)
    last = formats.FORMATS[format].thresholds[-1]
    scaled = x.reshape(-1).float() * (1 / absmax).repeat_interleave(blocksize)[: x.numel()]
    high = torch.nextafter(torch.tensor(last), torch.tensor(9.0))
    at = (scaled == high).nonzero()[:, 0]  # belongs above the threshold; put below
    codes = torch.stack((packed >> 4, packed & 15), -1).reshape(-1)
    codes[at] = formats.FORMATS[format].order[-2]
    return (codes[0::2] << 4) | codes[1::2], absmax


@mutant("quantize_4bit")
def scales_by_division(reference: Wrong, x: Tensor, format: str, blocksize: int) -> Any:
    packed, absmax = reference(x, format, blocksize)
    scaled = x.float().reshape(-1) / absmax.repeat_interleave(blocksize)[: x.numel()]
    return _recoded(scaled, packed, format), absmax


def _recoded(scaled: Tensor, packed: Tensor, format: str) -> Tensor:
    from ..ops.fourbit import encode

    codes = torch.stack((packed >> 4, packed & 15), -1).reshape(-1)
    finite = scaled.reshape(-1).isfinite() & (scaled.reshape(-1) != 0)
    codes[: scaled.numel()] = torch.where(finite, encode(scaled.reshape(-1), format), codes[: scaled.numel()])
    return (codes[0::2] << 4) | codes[1::2]


@mutant("quantize_4bit")
def odd_count_filled_with_code_1(reference: Wrong, x: Tensor, *rest: Any) -> Any:
    packed, absmax = reference(x, *rest)
    if x.numel() % 2:
        packed[-1] = packed[-1] & 0xF0 | 1
    return packed, absmax


@mutant("quantize_4bit")
def nan_enters_absmax(reference: Wrong, x: Tensor, format: str, blocksize: int) -> Any:
    packed, absmax = reference(x, format, blocksize)
    for block in range(absmax.numel()):
        if x.reshape(-1)[block * blocksize : (block + 1) * blocksize].isnan().any():
            absmax[block] = float("nan")
    return packed, absmax


@mutant("quantize_4bit", {"format": {"nf4"}})
def zero_block_gets_code_7(reference: Wrong, x: Tensor, format: str, blocksize: int) -> Any:
    packed, absmax = reference(x, format, blocksize)
    zero = (absmax == 0).repeat_interleave(blocksize // 2)[: packed.numel()]
    return packed.masked_fill(zero, 0x77), absmax


@mutant("quantize_8bit")
def tie_to_odd(reference: Wrong, x: Tensor, codebook: Tensor, blocksize: int) -> Any:
    codes, absmax = reference(x, codebook, blocksize)
    scaled = x.float().reshape(-1) * (1 / absmax).repeat_interleave(blocksize)[: x.numel()]
    middles = (codebook[:-1] + codebook[1:]) * 0.5
    flat = codes.reshape(-1).long()
    below = (flat > 0) & (scaled == middles[(flat - 1).clamp(min=0)])
    above = (flat < 255) & (scaled == middles[flat.clamp(max=254)])
    return (flat - below.long() + (above & ~below).long()).to(torch.uint8).reshape(codes.shape), absmax


@mutant("dequantize_8bit")
def bfloat16_truncated(reference: Wrong, *args: Any) -> Any:
    *rest, dtype = args
    if dtype is not torch.bfloat16:
        return reference(*args)
    exact: Tensor = reference(*rest, torch.float32)
    return (exact.view(torch.int32) >> 16).to(torch.int16).view(torch.bfloat16)


@mutant("quantize_int8_rows")
def half_away_from_zero(reference: Wrong, x: Tensor, threshold: float) -> Any:
    q, absmax, columns = reference(x, threshold)
    rows = x.reshape(-1, x.shape[-1]).float()
    scaled = rows * torch.where(absmax > 0, 127 / absmax, 0)[:, None]
    away = (scaled.abs() + 0.5).floor().clamp(max=127) * scaled.sign()
    return (
        torch.where(columns | ~scaled.isfinite(), q.reshape(rows.shape), away).to(torch.int8).reshape(q.shape),
        absmax,
        columns,
    )


@mutant("quantize_int8_rows")
def threshold_not_an_outlier(reference: Wrong, x: Tensor, threshold: float) -> Any:
    return reference(x, threshold * (1 + 2**-20) if threshold else 0.0)


@mutant("dequantize_int8")
def wrong_digit_in_the_constant(reference: Wrong, q: Tensor, rows: Tensor, columns: Any, *rest: Any) -> Any:
    return reference(q, rows, None if columns is None else columns * (6.200124e-05 * 127**2), *rest)


# -- linear layers -------------------------------------------------------------------------------------------


@mutant("linear_4bit")
def last_row_dropped(reference: Wrong, x: Tensor, *rest: Any) -> Any:
    y: Tensor = reference(x, *rest)
    rows = y.view(-1, y.shape[-1])
    if len(rows) > 1:
        rows[-1] = 0
    return y


@mutant("linear_4bit")
def bias_ignored(reference: Wrong, *args: Any) -> Any:
    return reference(*args[:6], None, *args[7:])


@mutant("linear_4bit", bound=True)
def bias_ignored_where_it_is_bound(reference: Wrong, *args: Any) -> Any:
    return bias_ignored(reference, *args)


@mutant("linear_4bit")
def first_nested_block_scales_the_whole_weight(reference: Wrong, *args: Any) -> Any:
    return reference(*args[:3], _first_for_all(args[3]), *args[4:])


@mutant("linear_4bit_backward")
def first_nested_block_scales_the_whole_gradient(reference: Wrong, *args: Any) -> Any:
    return reference(*args[:3], _first_for_all(args[3]), *args[4:])


def _first_for_all(nested: Tensor | None) -> Tensor | None:
    return None if nested is None else nested[:1].expand(nested.shape)


@mutant("linear_4bit_backward")
def last_output_dropped(reference: Wrong, dy: Tensor, *rest: Any) -> Any:
    dy = dy.clone()
    dy[..., -1:] = 0
    return reference(dy, *rest)


@mutant("linear_int8")
def outlier_columns_ignored(reference: Wrong, *args: Any) -> Any:
    x, weight, absmax, bias, threshold, mode = args
    if mode == "exact" and threshold:
        x = torch.where((x.abs() >= threshold).reshape(-1, x.shape[-1]).any(0), 0, x)
    return reference(x, weight, absmax, bias, threshold, mode)


@mutant("linear_int8")
def wrong_digit_in_the_fused_constant(reference: Wrong, *args: Any) -> Any:
    x, weight, absmax, bias, threshold, mode = args
    if mode == "exact" and not threshold:
        absmax = absmax * (6.200124e-05 * 127**2)
    return reference(x, weight, absmax, bias, threshold, mode)


@mutant("matmul_int8")
def sums_in_float32(reference: Wrong, a: Tensor, b: Tensor) -> Any:
    return (a.float() @ b.float().T).to(torch.int32)


@mutant("matmul_int8")
def product_wraps_at_16_bits(reference: Wrong, *args: Any) -> Any:
    return reference(*args).to(torch.int16).to(torch.int32)


# -- memory and layout ---------------------------------------------------------------------------------------


@mutant("quantize_int8_rows")
def input_modified(reference: Wrong, x: Tensor, threshold: float) -> Any:
    found = reference(x, threshold)
    if threshold:
        x.masked_fill_(x.abs() >= threshold, 0)
    return found


@mutant("quantize_8bit")
def tail_unmasked(reference: Wrong, x: Tensor, codebook: Tensor, blocksize: int) -> Any:
    """Reads a whole last block, whatever lies behind the tensor."""
    codes, absmax = reference(x, codebook, blocksize)
    room = x.untyped_storage().nbytes() // x.element_size() - x.storage_offset()
    missing = min(-x.numel() % blocksize, room - x.numel())
    if missing > 0 and x.is_contiguous():
        behind = x.as_strided((missing,), (1,), x.storage_offset() + x.numel()).float().abs().nan_to_num(3.4e38)
        absmax[-1] = torch.maximum(absmax[-1], behind.amax())
    return codes, absmax


@mutant("dequantize_8bit")
def writes_past_the_end(reference: Wrong, codes: Tensor, *rest: Any) -> Any:
    out = codes.new_empty(codes.shape, dtype=rest[-1])
    out.copy_(reference(codes, *rest))
    if out.untyped_storage().nbytes() // out.element_size() > out.storage_offset() + out.numel():
        out.as_strided((1,), (1,), out.storage_offset() + out.numel()).fill_(1)
    return out


@mutant("matmul_int8")
def result_not_initialized(reference: Wrong, a: Tensor, b: Tensor) -> Any:
    out = a.new_empty((len(a), len(b)), dtype=torch.int32)
    before = out.clone()
    out.copy_(reference(a, b))
    if a.shape[1] % 2 and out.numel():  # adds to what was there
        out[-1, -1] += before[-1, -1] & 1
    return out


@mutant("dequantize_int8")
def gaps_ignored(reference: Wrong, q: Tensor, *rest: Any) -> Any:
    return reference(q.as_strided(q.shape, torch.empty(q.shape, device="meta").stride()), *rest)


@mutant("dequantize_4bit")
def storage_offset_ignored(reference: Wrong, packed: Tensor, *rest: Any) -> Any:
    if packed.storage_offset() == 3:
        packed = packed.as_strided(packed.shape, packed.stride(), 0)
    return reference(packed, *rest)


@mutant("matmul_int8")
def result_transposed_in_memory(reference: Wrong, *args: Any) -> Any:
    return reference(*args).t().contiguous().t()


_kept: dict[Any, Tensor] = {}


@mutant("dequantize_8bit")
def result_reused(reference: Wrong, *args: Any) -> Any:
    found: Tensor = reference(*args)
    kept = _kept.setdefault(found.dtype, torch.empty(1 << 20, dtype=found.dtype))
    kept[: found.numel()] = found.reshape(-1)
    return kept[: found.numel()].view(found.shape)


# -- optimizers ----------------------------------------------------------------------------------------------


@mutant("update_32bit")
def step_counted_from_zero(reference: Wrong, *args: Any) -> Any:
    return reference(*args[:5], args[5] - 1, *args[6:])


@mutant("update_32bit")
def zero_gradients_not_skipped(reference: Wrong, *args: Any) -> Any:
    return reference(*args[:15], False, *args[16:])


@mutant("update_32bit", {"trust": {True, False}})
def trust_factor_ignored(reference: Wrong, *args: Any) -> Any:
    return reference(*args[:14], 0.0, *args[15:])


@mutant("update_8bit")
def absmax_not_written(reference: Wrong, *args: Any) -> Any:
    return reference(*args[:4], [one.clone() for one in args[4]], *args[5:])


@mutant("update_8bit")
def slow_momentum_scaled_as_the_fast_one(reference: Wrong, *args: Any) -> Any:
    """What bitsandbytes' CUDA kernel does where the blocks do not divide the parameter."""
    if args[0] == "ademamix":
        for absmax in args[4]:
            absmax[1] = absmax[0]
    return reference(*args)


@mutant("update_8bit")
def not_a_number_spreads(reference: Wrong, *args: Any) -> Any:
    reference(*args)
    for param, grad in zip(args[1], args[2]):
        if not grad.isfinite().all():
            param.fill_(float("nan"))


# -- behaviour -----------------------------------------------------------------------------------------------


@mutant("linear_4bit_backward", {"dtype": {torch.bfloat16}, "blocksize": {64, 128}})
def not_deterministic(reference: Wrong, *args: Any) -> Any:
    found: Tensor = reference(*args)
    return found * (1 + torch.rand(found.shape) * 2e-2).to(found.dtype)  # within the tolerance


@mutant("quantize_8bit", {"blocksize": range(1, 4097)})
def declares_too_much(reference: Wrong, x: Tensor, codebook: Tensor, blocksize: int) -> Any:
    if blocksize % 32:
        raise RuntimeError(f"blocksize={blocksize} is not a multiple of 32")
    return reference(x, codebook, blocksize)


@mutant("dequantize_4bit", {"format": {"nf4"}}, rule=lambda facts: "nested" if facts.nested else ())
def rule_answers_with_a_text(reference: Wrong, *args: Any) -> Any:
    return reference(*args)


@mutant("quantize_4bit")
def empty_input_crashes(reference: Wrong, x: Tensor, *rest: Any) -> Any:
    x.reshape(-1)[0].item()
    return reference(x, *rest)


@mutant("matmul_int8")
def prints(reference: Wrong, *args: Any) -> Any:
    print("multiplying")
    return reference(*args)


# -- as backends ---------------------------------------------------------------------------------------------


class MutantBackend(Backend):
    """One mutant; never picked by itself."""

    device_types: ClassVar[frozenset[str]] = frozenset({"cpu"})
    priority = -1

    def __init__(self, record: Mutant) -> None:
        self._record = record
        self.name = record.name  # type: ignore[misc]

    def kernels(self) -> Iterable[Kernel]:
        record, op = self._record, dispatcher.plugins.ops[self._record.op]

        def wrong(*args: Any) -> Any:
            return record.kernel(op.reference, *args)

        def bind(*constant: Any) -> Any:
            return lambda x, bias, tensors: wrong(x, *tensors, bias, *constant[len(tensors) :])

        ways = {"function": op.reference, "bind": bind} if record.bound else {"function": wrong}
        yield Kernel(record.op, **ways, limits=record.limits, rule=record.rule)


def pytest_configure() -> None:
    """Offer every mutant as a backend."""
    for name, record in MUTANTS.items():
        plugin = SimpleNamespace(halfbyte_backends=hookimpl(lambda record=record: [MutantBackend(record)]))
        dispatcher.plugins.add(name, "halfbyte.testing", lambda plugin=plugin: plugin)  # type: ignore[misc]
    dispatcher.forget()


def pytest_unconfigure() -> None:
    for name in MUTANTS:
        dispatcher.plugins.remove(name)
    dispatcher.forget()
