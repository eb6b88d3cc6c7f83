"""What is timed to find configurations and to show what they reach, and how.

Products are timed inside a CUDA graph that takes turns at copies of a weight which overflow L2 four times; the rest on
tensors much larger than it.
"""

from __future__ import annotations

import functools
import itertools
import statistics
from collections.abc import Callable, Sequence
from typing import Any

import torch

from halfbyte import formats
from halfbyte.ops import rules

from . import eightbit, fourbit, int8, launch, linear4bit, optimizer

Call = Callable[[], Any]
DEVICE = torch.device("cuda", 0)
BF16 = torch.bfloat16
ELEMENTWISE = (
    *("quantize_4bit", "dequantize_4bit", "quantize_8bit", "dequantize_8bit"),
    *("quantize_int8_rows", "dequantize_int8"),
)


# -- timing --------------------------------------------------------------------------------------------------


def time_us(calls: Sequence[Call], repeats: int = 9) -> float:
    """Microseconds per call, in a graph that makes each of them once; median over replays."""
    for call in calls[:2]:
        call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    graph.replay()
    times = []
    for _ in range(repeats):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) * 1000 / len(calls))
    return float(statistics.median(times))


def copy_rate() -> float:
    """Bytes per microsecond that copying 1 GiB reads and writes: by the driver, or by adding 0, whichever is faster."""
    source = torch.randn(2**28, device=DEVICE)
    target = torch.empty_like(source)
    ways: tuple[Call, ...] = (lambda: target.copy_(source), lambda: torch.add(source, 0, out=target))
    return 2 * source.nbytes / min(time_us([way]) for way in ways)


def copies_of(size: int) -> int:
    """How many copies of so many bytes overflow L2 four times; three at least."""
    return max(3, -(-4 * torch.cuda.get_device_properties(DEVICE).L2_cache_size // size))


# -- what is timed -------------------------------------------------------------------------------------------


def linear_calls(m: int, n: int, k: int, nested: bool = False, copies: int = 0) -> list[Call]:
    """linear_4bit of bf16 and NF4 on `copies` weights; as many as overflow L2 for 0."""
    x = torch.randn(m, k, device=DEVICE, dtype=BF16)
    packed, absmax = fourbit.quantize_4bit(torch.randn(n, k, device=DEVICE, dtype=BF16) * 0.02, "nf4", 64)
    nesting: tuple[Any, Any, Any] = (None, None, None)
    if nested:
        book = formats.codebook("dynamic", DEVICE)
        offset = absmax.mean()
        absmax, second = eightbit.quantize_8bit(absmax - offset, book, 256)
        nesting = (second, book, offset)
    weights = [(packed.clone(), absmax.clone()) for _ in range(copies or copies_of(packed.nbytes))]
    return [functools.partial(linear4bit.linear_4bit, x, *weight, *nesting, None, "nf4", 64, n) for weight in weights]


def dense_calls(m: int, n: int, k: int) -> list[Call]:
    """torch's own product, of bf16 weights."""
    x = torch.randn(m, k, device=DEVICE, dtype=BF16)
    weights = [torch.randn(n, k, device=DEVICE, dtype=BF16) for _ in range(copies_of(2 * n * k))]
    return [functools.partial(torch.nn.functional.linear, x, weight) for weight in weights]


def int8_calls(m: int, n: int, k: int, mode: str, threshold: float = 0.0, copies: int = 0) -> list[Call]:
    x = torch.randn(m, k, device=DEVICE, dtype=BF16)
    x[:, 7] = 20
    absmax = torch.rand(n, device=DEVICE)
    weights = [
        torch.randint(-127, 128, (n, k), device=DEVICE, dtype=torch.int8) for _ in range(copies or copies_of(n * k))
    ]
    return [functools.partial(int8.linear_int8, x, weight, absmax, None, threshold, mode) for weight in weights]


def elementwise(operation: str, dtype: torch.dtype, count: int = 2**29) -> tuple[Call, int]:
    """One call, and the bytes that it reads and writes."""
    x = torch.randn(count, device=DEVICE, dtype=dtype)
    book = formats.codebook("dynamic", DEVICE)
    if operation.endswith("4bit"):
        packed, absmax = fourbit.quantize_4bit(x, "nf4", 64)
        moved = x.nbytes + packed.nbytes + absmax.nbytes
        if operation == "quantize_4bit":
            return lambda: fourbit.quantize_4bit(x, "nf4", 64), moved
        return lambda: fourbit.dequantize_4bit(packed, absmax, None, None, None, "nf4", 64, (count,), dtype), moved
    if operation.endswith("8bit"):
        codes, absmax = eightbit.quantize_8bit(x, book, 256)
        moved = x.nbytes + codes.nbytes + absmax.nbytes
        if operation == "quantize_8bit":
            return lambda: eightbit.quantize_8bit(x, book, 256), moved
        return lambda: eightbit.dequantize_8bit(codes, absmax, book, 256, dtype), moved
    rows = x.view(-1, 8192)
    q, absmax, _ = int8.quantize_int8_rows(rows, 0.0)
    moved = x.nbytes + q.nbytes
    if operation == "quantize_int8_rows":
        return lambda: int8.quantize_int8_rows(rows, 0.0), moved
    return lambda: int8.dequantize_int8(q, absmax, None, None, dtype), moved


def step_call(name: str, eight: bool, dtype: torch.dtype, sizes: Sequence[int]) -> tuple[Call, int]:
    """One step of an optimizer, and the bytes that it reads and writes."""
    first, second = rules.RULES[name].states
    params = [torch.randn(n, device=DEVICE, dtype=dtype) for n in sizes]
    grads = [torch.randn(n, device=DEVICE, dtype=dtype) * 1e-3 for n in sizes]
    step, lr = torch.tensor(10), torch.tensor(1e-3, dtype=torch.float64)
    hyper: tuple[Any, ...] = (step, lr, None, [0.9, 0.999, 0.9999], 1e-8, 0.01, 5.0, 0, 0, 0.0, False, [])
    moved = sum(3 * one.nbytes for one in params)
    if not eight:
        one = [torch.zeros(first * n, device=DEVICE) for n in sizes]
        two = [torch.zeros(n, device=DEVICE) for n in sizes] if second else []
        moved += 2 * sum(state.nbytes for state in (*one, *two))
        return lambda: optimizer.update_32bit(name, params, grads, one, two, *hyper), moved
    signed, unsigned = (formats.codebook(book, DEVICE) for book in ("dynamic", "dynamic_unsigned"))
    one = [torch.full((first * n,), 127, device=DEVICE, dtype=torch.uint8) for n in sizes]
    two = [torch.zeros(n, device=DEVICE, dtype=torch.uint8) for n in sizes] if second else []
    scale1 = [torch.zeros(first * launch.cdiv(n, 256), device=DEVICE) for n in sizes]
    scale2 = [torch.zeros(launch.cdiv(n, 256), device=DEVICE) for n in sizes] if second else []
    moved += 2 * sum(state.nbytes for state in (*one, *two, *scale1, *scale2))
    states: tuple[Any, ...] = (one, scale1, signed, two, scale2, unsigned if second else None, 256)
    return lambda: optimizer.update_8bit(name, params, grads, *states, *hyper), moved


def llama_1b() -> list[int]:
    """Elements of each tensor of a Llama-3.2-1B."""
    layer = [2048 * 2048, 512 * 2048, 512 * 2048, 2048 * 2048, *[8192 * 2048] * 3, 2048, 2048]
    return [128256 * 2048, *layer * 16, 2048]


# -- the table -----------------------------------------------------------------------------------------------


def table() -> None:
    """Print what every family reaches, beside the copy rate and torch's own product of the same run."""
    copy = copy_rate()
    print(f"{torch.cuda.get_device_name(DEVICE)}, torch {torch.__version__}, a copy moves {copy / 1e6:.2f} TB/s")
    for operation, dtype in itertools.product(ELEMENTWISE, (BF16, torch.float32)):
        _show(f"{operation} 2^29 {_short(dtype)}", *_timed(elementwise(operation, dtype)), copy)
    for name, eight in (("adam", True), ("lion", True), ("ademamix", True), ("momentum", True), ("adam", False)):
        for sizes, what in (([2**30], "2^30"), (llama_1b(), "Llama-1B list")):
            _show(f"{name} {8 if eight else 32} bit {what} bf16", *_timed(step_call(name, eight, BF16, sizes)), copy)
            torch.cuda.empty_cache()
    for side, rows in ((8192, (1, 16, 32, 64, 128, 256, 1024)), (4096, (1, 16, 64, 256))):
        for m in rows:
            own = time_us(dense_calls(m, side, side) * 4)
            for nested in (False, True) if m in (1, 64) else (False,):
                us = time_us(linear_calls(m, side, side, nested) * 3)
                moved = side * side // 2 + side * side // 64 * (1 if nested else 4) + 4 * m * side
                name = f"linear_4bit {side}^2 bf16 M={m}{' nested' if nested else ''}"
                _show(name, us, moved, copy, f"{own / us:5.2f}x cuBLAS bf16 ({own:.1f} us)")
    for m in (1, 64, 1024):
        own = time_us(dense_calls(m, 8192, 8192) * 4)
        for what, how in (("w8a16", ("w8a16",)), ("exact", ("exact",)), ("exact, threshold 6", ("exact", 6.0))):
            us = time_us(int8_calls(m, 8192, 8192, *how) * 3)
            name = f"linear_int8 8192^2 bf16 M={m} {what}"
            _show(name, us, 8192 * 8192 + 4 * m * 8192, copy, f"{own / us:5.2f}x cuBLAS bf16 ({own:.1f} us)")


def _timed(work: tuple[Call, int]) -> tuple[float, int]:
    return time_us([work[0]]), work[1]


def _show(name: str, us: float, moved: int, copy: float, more: str = "") -> None:
    rate = f"{moved / us / 1e6:6.2f} TB/s {moved / us / copy:5.0%} of copy"
    print(f"{name:46}{us:9.1f} us {rate}  {more}".rstrip(), flush=True)


def _short(dtype: torch.dtype) -> str:
    return "bf16" if dtype is BF16 else "fp32"
