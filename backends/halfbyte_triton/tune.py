"""Measures the kernels on the GPU at hand, and finds launch configurations for it.

    python -m halfbyte_triton.tune measure           what the present configurations reach
    python -m halfbyte_triton.tune linear_4bit ...   the best of many candidates, as lines of tuned.json

Products are timed inside a CUDA graph that rotates through weights, so that none is in the L2 cache; the rest on
tensors much larger than it.  Medians; the copy rate of the same run stands beside them.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import json
import statistics
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from halfbyte import formats
from halfbyte.errors import KernelUnusable
from halfbyte.ops import rules

from . import eightbit, fourbit, int8, launch, linear4bit, optimizer

Call = Callable[[], Any]
DEVICE = torch.device("cuda", 0)
CACHE = 240 * 2**20  # bytes of weights to rotate through


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
    """Bytes per microsecond that a large copy reads and writes."""
    source = torch.randn(2**28, device=DEVICE)
    target = torch.empty_like(source)
    return 2 * source.nbytes / time_us([lambda: target.copy_(source)])


# -- what is timed -------------------------------------------------------------------------------------------


def linear_calls(m: int, n: int, k: int, dtype: torch.dtype, nested: bool = False) -> list[Call]:
    copies = max(CACHE // (n * k // 2), 2)
    x = torch.randn(m, k, device=DEVICE, dtype=dtype)
    weight = fourbit.quantize_4bit(torch.randn(n, k, device=DEVICE, dtype=dtype) * 0.02, "nf4", 64)
    scales: tuple[Tensor, ...] = (weight[1],)
    nesting: tuple[Any, Any, Any] = (None, None, None)
    if nested:
        book = formats.codebook("dynamic", DEVICE)
        offset = weight[1].mean()
        codes, absmax = eightbit.quantize_8bit(weight[1] - offset, book, 256)
        scales, nesting = (codes,), (absmax, book, offset)
    weights = [(weight[0].clone(), *(one.clone() for one in scales)) for _ in range(copies)]

    def call(packed: Tensor, absmax: Tensor) -> Call:
        return lambda: linear4bit.linear_4bit(x, packed, absmax, *nesting, None, "nf4", 64, n)

    return [call(*one) for one in weights] * (50 // copies + 1)


def int8_calls(m: int, n: int, k: int, mode: str, threshold: float = 0.0) -> list[Call]:
    copies = max(CACHE // (n * k), 2)
    x = torch.randn(m, k, device=DEVICE, dtype=torch.bfloat16)
    x[:, 7] = 20
    weights = [torch.randint(-127, 128, (n, k), device=DEVICE, dtype=torch.int8) for _ in range(copies)]
    absmax = torch.rand(n, device=DEVICE)

    def call(weight: Tensor) -> Call:
        return lambda: int8.linear_int8(x, weight, absmax, None, threshold, mode)

    return [call(one) for one in weights] * (50 // copies + 1)


def elementwise(operation: str, dtype: torch.dtype) -> tuple[Call, int]:
    """One call, and the bytes that it reads and writes."""
    count = 2**29
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


# -- measure -------------------------------------------------------------------------------------------------

ELEMENTWISE = (
    *("quantize_4bit", "dequantize_4bit", "quantize_8bit", "dequantize_8bit"),
    *("quantize_int8_rows", "dequantize_int8"),
)


def measure() -> None:
    """Print what every family reaches, beside the copy rate and torch's own product."""
    copy = copy_rate()
    print(f"{torch.cuda.get_device_name(DEVICE)}, copy {copy / 1e6:.2f} TB/s")
    n = k = 8192
    for m in (1, 4, 16, 32, 64, 128, 256, 1024, 4096):
        x, weights = torch.randn(m, k, device=DEVICE).bfloat16(), torch.randn(4, n, k, device=DEVICE).bfloat16()
        own = time_us([functools.partial(torch.matmul, x, one.T) for one in weights] * 8)
        del weights
        plain = time_us(linear_calls(m, n, k, torch.bfloat16))
        nested = time_us(linear_calls(m, n, k, torch.bfloat16, nested=True))
        print(f"linear_4bit nf4 {n}x{k} bf16 M={m}: {plain:.1f} us, nested {nested:.1f} us; bf16 product {own:.1f} us")
    for m in (1, 16, 64, 256, 1024, 4096):
        times = [time_us(int8_calls(m, n, k, *how)) for how in (("w8a16",), ("exact",), ("exact", 6.0))]
        print(
            f"linear_int8 {n}x{k} bf16 M={m}: w8a16 {times[0]:.1f} us, exact {times[1]:.1f} us, 6.0 {times[2]:.1f} us"
        )
    for operation, dtype in itertools.product(ELEMENTWISE, (torch.bfloat16, torch.float32)):
        call, moved = elementwise(operation, dtype)
        us = time_us([call])
        print(f"{operation} {dtype}: {us:.0f} us, {moved / us / 1e6:.2f} TB/s, {moved / us / copy:.0%} of copy")
    for name, eight in (("adam", True), ("lion", True), ("ademamix", True), ("adam", False)):
        for sizes, what in (([2**30], "2^30"), (llama_1b(), "Llama-1B list")):
            call, moved = step_call(name, eight, torch.bfloat16, sizes)
            us = time_us([call])
            bits = 8 if eight else 32
            print(f"{name} {bits} bit, {what} bf16: {us / 1000:.2f} ms, {moved / us / copy:.0%} of copy")


# -- search --------------------------------------------------------------------------------------------------


def products(**choices: Sequence[int]) -> Iterator[dict[str, int]]:
    for values in itertools.product(*choices.values()):
        yield dict(zip(choices, values))


def linear_candidates(rows: int) -> list[dict[str, int]]:
    found: list[dict[str, int]] = []
    if rows <= 32:
        found += products(
            BM=[rows], BN=[64, 128], CHUNK=[64], CHUNKS=[1, 2, 4], SUM=[1], PROGRAMS=[2, 4, 6], num_warps=[4],
            num_stages=[3, 5],
        )  # fmt: skip
        found += products(
            BM=[rows], BN=[128], CHUNK=[64], CHUNKS=[1, 2], SUM=[1], PROGRAMS=[2, 4], num_warps=[8], num_stages=[3, 5]
        )
    elif rows <= 128:
        found += products(
            BM=[rows], BN=[64, 128], CHUNK=[64], CHUNKS=[1], SUM=[0, 1], PROGRAMS=[1, 2], num_warps=[4, 8],
            num_stages=[3, 4],
        )  # fmt: skip
    else:
        for bm, bn, warps in ((256, 128, 8), (256, 64, 4), (128, 128, 8), (128, 128, 4), (128, 64, 4)):
            found += products(
                BM=[bm], BN=[bn], CHUNK=[64], CHUNKS=[1], SUM=[0, 1], PROGRAMS=[1, 2], num_warps=[warps],
                num_stages=[2, 3, 4],
            )  # fmt: skip
    return [{}, *found] if rows >= 128 else found


def tile_candidates(operation: str) -> list[dict[str, int]]:
    if operation.startswith("update"):
        return list(products(TILE=[512, 1024, 2048, 4096], PART=[1, 4], SHARED=[0, 1], num_warps=[1, 2, 4, 8]))
    if operation == "dequantize_4bit":
        return list(products(TILE=[256, 512, 1024, 2048], STEPS=[1, 2, 4, 8], num_warps=[1, 2, 4]))
    if operation == "quantize_int8_rows":
        return list(products(TILE=[4096, 8192, 16384], PIECE=[2048, 4096, 8192], num_warps=[2, 4, 8]))
    if operation == "dequantize_int8":
        return list(products(TILE=[512, 1024, 2048, 4096]))
    return list(products(TILE=[512, 1024, 2048, 4096, 8192], num_warps=[1, 2, 4, 8]))


def best(operation: str, bucket: str, calls: Sequence[Call], candidates: Sequence[dict[str, int]]) -> None:
    """Print the bucket's best candidates, fastest first."""
    table = launch._tuned().setdefault(launch.arch(DEVICE), {}).setdefault(operation, {})
    before, timed = table.get(bucket), []
    for candidate in candidates:
        table[bucket] = candidate
        launch.config.cache_clear()
        try:
            timed.append((time_us(calls, repeats=5), json.dumps(candidate)))
        except (KernelUnusable, torch.OutOfMemoryError):
            continue
    table.pop(bucket)
    if before is not None:
        table[bucket] = before
    launch.config.cache_clear()
    timed.sort()
    for us, text in timed[:3]:
        print(f'{operation} {us:9.1f} us   "{bucket}": {text}', flush=True)


def search(operation: str, buckets: Sequence[str], n: int, k: int) -> None:
    if operation == "linear_4bit":
        for rows in (16, 32, 64, 128, 256, 512, 1024):
            if not buckets or str(rows) in buckets:
                best(operation, str(rows), linear_calls(rows, n, k, torch.bfloat16), linear_candidates(rows))
        return
    if operation in ("linear_w8a16", "matmul_int8"):
        mode = "w8a16" if operation == "linear_w8a16" else "exact"
        for rows in (16, 32, 64, 128, 256, 512, 1024):
            if not buckets or str(rows) in buckets:
                candidates = list(
                    products(
                        BM=[min(rows, 128), min(rows, 256)] if rows > 128 else [rows],
                        BN=[64, 128],
                        BK=[64, 128] if mode == "w8a16" else [128, 256],
                        GROUP=[8],
                        PROGRAMS=[1, 3],
                        num_warps=[4, 8],
                        num_stages=[3, 4],
                    )
                )
                best(operation, str(rows), int8_calls(rows, n, k, mode), candidates)
        return
    for dtype in (torch.bfloat16, torch.float32):
        if buckets and str(dtype.itemsize) not in buckets:
            continue
        if operation.startswith("update"):
            call, _ = step_call("adam", operation == "update_8bit", dtype, [2**28])
        else:
            call, _ = elementwise(operation, dtype)
        best(operation, str(dtype.itemsize), [call], tile_candidates(operation))


def main() -> None:
    known = ("measure", "linear_4bit", "linear_w8a16", "matmul_int8", *ELEMENTWISE, "update_8bit", "update_32bit")
    parser = argparse.ArgumentParser(prog="python -m halfbyte_triton.tune", description=__doc__)
    parser.add_argument("what", nargs="+", choices=known)
    parser.add_argument("--bucket", action="append", default=[], help="only these: rows of x, or bytes per element")
    parser.add_argument("--shape", default="8192x8192", help="of the weight, out_features x in_features")
    given = parser.parse_args()
    n, k = map(int, given.shape.split("x"))
    for what in given.what:
        if what == "measure":
            measure()
        else:
            search(what, given.bucket, n, k)


if __name__ == "__main__":
    main()
