"""Finds launch configurations for the GPU at hand, and shows what they reach.

    python -m halfbyte_triton.tune                  search everything, write tuned.json, print the table
    python -m halfbyte_triton.tune update_8bit ...  search these operations only
    python -m halfbyte_triton.tune table            print what the present configurations reach

Candidates are compiled by as many processes as there are cores while those before them are timed.  The result stands
under the arch of the GPU in --output, by default the tuned.json of this package.
"""

from __future__ import annotations

import argparse
import copy
import functools
import itertools
import json
import multiprocessing
import os
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import torch

from halfbyte.errors import KernelUnusable

from . import launch, linear4bit
from .measure import BF16, DEVICE, ELEMENTWISE, Call, elementwise, int8_calls, linear_calls, step_call, table, time_us

PRODUCTS = ("linear_4bit", "linear_w8a16", "matmul_int8")
HOPPER = "linear_4bit_hopper"  # on sm_90 alone
UPDATES = ("update_8bit", "update_32bit")
ROWS = (16, 32, 64, 128, 256, 512, 1024)
SIDE = 8192  # of the weights
Config = dict[str, int]


class Bucket(NamedTuple):
    """One entry of tuned.json."""

    operation: str
    name: str


# -- candidates ----------------------------------------------------------------------------------------------


def products(**choices: Sequence[int]) -> Iterator[Config]:
    for values in itertools.product(*choices.values()):
        yield dict(zip(choices, values))


def candidates(bucket: Bucket) -> list[Config]:
    operation, rows = bucket.operation, int(bucket.name)  # or bytes per element
    if operation == "linear_4bit":
        return linear_candidates(rows)
    if operation == HOPPER:
        return hopper_candidates(rows)
    if operation in PRODUCTS:
        parts = [1, 3] if operation == "linear_w8a16" and rows <= 64 else [1]
        same = {"BK": [64, 128] if rows > 64 else [128], "GROUP": [8], "PROGRAMS": parts, "num_stages": [3, 4]}
        if rows < 512:
            return list(products(BM=[min(rows, 128)], BN=[64, 128], **same, num_warps=[4, 8]))
        return list(products(BM=[128, 256], BN=[128], **same, num_warps=[8]))
    if operation in UPDATES:
        plain = [
            *products(TILE=[1024], PART=[4], REGISTERS=[0, 80], num_warps=[4], num_stages=[1, 2]),
            *products(TILE=[2048], PART=[4, 8], REGISTERS=[0, 64, 80], num_warps=[8], num_stages=[1, 2]),
            *products(TILE=[2048], PART=[4], REGISTERS=[0, 128], num_warps=[4], num_stages=[1, 2]),
            *products(TILE=[4096], PART=[4], REGISTERS=[0, 128], num_warps=[8], num_stages=[1, 2]),
        ]
        if operation == "update_32bit":
            return plain
        same = {"KEEP": [1], "num_stages": [1]}  # tables in shared memory: NVIDIA alone
        return [
            *products(TILE=[1024], PART=[8, 16], REGISTERS=[56, 64, 80], num_warps=[4], **same),
            *products(TILE=[2048], PART=[8, 16], REGISTERS=[64, 80], num_warps=[8], **same),
            *({**one, "KEEP": 0} for one in plain),
        ]
    if operation == "dequantize_4bit":
        return [
            {"TILE": 512 // int(bucket.name) * warps, "STEPS": steps, "num_warps": warps, "num_stages": stages}
            for warps, steps, stages in itertools.product((1, 2, 4), (4, 8), (1, 3, 5))
        ]
    if operation == "quantize_int8_rows":
        return list(products(TILE=[8192, 16384], PIECE=[4096, 8192], num_warps=[4, 8]))
    if operation == "dequantize_int8":
        return list(products(TILE=[512, 1024, 2048, 4096]))
    return [
        one
        for one in products(TILE=[512, 1024, 2048, 4096, 8192], num_warps=[1, 2, 4, 8])
        if 8 <= one["TILE"] // one["num_warps"] // 32 <= 32
    ]


def linear_candidates(rows: int) -> list[Config]:
    """{} is to dequantize and to leave the product to torch."""
    same = {"BM": [min(max(rows, 16), 256)], "CHUNK": [64]}
    if rows <= 32:
        few = {**same, "BM": [8, 16] if rows < 16 else [rows], "SUM": [1], "ORDERED": [0]}
        return [
            *products(**few, BN=[64], CHUNKS=[2, 4], PROGRAMS=[4, 6], num_warps=[4], num_stages=[3, 4]),
            *products(**few, BN=[128], CHUNKS=[1, 2, 4], PROGRAMS=[2, 3, 4], num_warps=[4], num_stages=[3, 5]),
            *products(**few, BN=[128], CHUNKS=[1, 4], PROGRAMS=[2, 4], num_warps=[8], num_stages=[3, 5]),
        ]
    if rows <= 128:
        some = {**same, "CHUNKS": [1], "SUM": [0, 1], "PROGRAMS": [1, 2]}
        found = [
            *products(**some, BN=[64], ORDERED=[0], num_warps=[4], num_stages=[3, 4]),
            *products(**some, BN=[128], ORDERED=[0, 1], num_warps=[4, 8], num_stages=[3]),
        ]
        return found if rows < 128 else [{}, *found]
    many = {"CHUNK": [64], "CHUNKS": [1], "SUM": [0], "ORDERED": [1], "PROGRAMS": [1, 2]}
    return [
        {},
        *products(BM=[256], BN=[128], **many, num_warps=[8], num_stages=[3, 4]),
        *products(BM=[256], BN=[64], **many, num_warps=[4], num_stages=[3]),
        *products(BM=[128], BN=[128], **many, num_warps=[4, 8], num_stages=[3, 4]),
        *products(BM=[128], BN=[64], **many, num_warps=[4], num_stages=[4]),
    ]


def hopper_candidates(rows: int) -> list[Config]:
    """{} is to leave it to linear_4bit, as for few rows, where decoding takes all the time."""
    if rows < 64:
        return [{}]
    found = [
        *products(BN=[64], DECODERS=[8], STAGES=[2, 3], SLOTS=[2], PROGRAMS=[1], REGISTERS=[128], num_warps=[4]),
        *products(BN=[128], DECODERS=[8], STAGES=[2, 3, 4], SLOTS=[1, 2], PROGRAMS=[1], REGISTERS=[96], num_warps=[8]),
        *products(BN=[128], DECODERS=[4], STAGES=[3, 4], SLOTS=[1, 2], PROGRAMS=[1], REGISTERS=[128], num_warps=[8]),
    ]
    two = {"BN": [64], "DECODERS": [4], "PROGRAMS": [2], "REGISTERS": [128], "MOST": [128], "num_warps": [4]}
    found += products(STAGES=[2, 3], SLOTS=[2, 3], **two)
    each = [{"BM": bm, **one} for one in found for bm in sorted({min(rows, 256), 128}) if bm <= rows]
    return [{}, *(one for one in each if hopper_bytes(one) * one["PROGRAMS"] <= 225 * 2**10 and registers_suffice(one))]


def registers_suffice(one: Config) -> bool:
    """A product of 256 columns takes 154 registers a thread, of which sixteen warps have 128."""
    return one["BM"] < 256 or one["num_warps"] + one["DECODERS"] < 16


def hopper_bytes(one: Config) -> int:
    """Shared memory that the rings take: tiles of x and of the weight; words and absmax."""
    depth = 64 * 32 * one["DECODERS"] // one["BN"]
    return one["STAGES"] * (one["BM"] + one["BN"]) * depth * 2 + one["SLOTS"] * one["BN"] * (128 + 16)


# -- search --------------------------------------------------------------------------------------------------


def buckets(operations: Sequence[str]) -> list[Bucket]:
    """Longest to compile first."""
    order = (*UPDATES, "linear_4bit", HOPPER, *ELEMENTWISE, "linear_w8a16", "matmul_int8")
    return [
        Bucket(operation, str(name))
        for operation in order
        if operation in operations
        for name in ((4, *ROWS) if operation in ("linear_4bit", HOPPER) else ROWS if operation in PRODUCTS else (2, 4))
    ]


def calls(bucket: Bucket, small: bool) -> list[Call]:
    """What is timed; with `small`, which compiles to the same code, what takes little memory."""
    operation, number = bucket.operation, int(bucket.name)
    if operation in ("linear_4bit", HOPPER):
        rows = 1 if number == 4 else number  # what decoding a token has
        return linear_calls(rows, SIDE, SIDE, copies=int(small)) * (1 if small else 4)
    if operation in PRODUCTS:
        mode = "w8a16" if operation == "linear_w8a16" else "exact"
        return int8_calls(number, SIDE, SIDE, mode, copies=int(small)) * (1 if small else 4)
    dtype = BF16 if number == 2 else torch.float32
    if operation in UPDATES:
        return [step_call("adam", operation == "update_8bit", dtype, [2**26 if small else 2**28])[0]]
    return [elementwise(operation, dtype, 2**22 if small else 2**29)[0]]


def install(bucket: Bucket, candidate: Config) -> None:
    entries = launch.tuned().setdefault(launch.arch(DEVICE), {})
    entries.setdefault(bucket.operation, {})[bucket.name] = candidate
    if bucket.operation == "linear_4bit":  # which the arch's own kernel would stand in for
        entries.setdefault(HOPPER, {})[bucket.name] = {}
    launch.config.cache_clear()


@functools.lru_cache(maxsize=1)
def small_calls(bucket: Bucket) -> list[Call]:
    return calls(bucket, small=True)


def compile_one(bucket: Bucket, candidate: Config) -> bool:
    """In a process of the pool: leave the code in Triton's cache on disk; whether there is any."""
    launch.compile_only = True
    install(bucket, candidate)
    linear4bit.given_up.clear()
    linear4bit.specialized.cache_clear()
    try:
        small_calls(bucket)[0]()
    except KernelUnusable:
        return False
    return not linear4bit.given_up


def best(bucket: Bucket, compiled: Sequence[tuple[Config, Future[bool]]], until: float) -> Config | None:
    """The fastest candidate of those that are compiled in time."""
    work, timed = None, []
    for candidate, done in compiled:
        try:
            if not done.result(timeout=max(until - time.monotonic(), 0)):
                continue
            work = work or calls(bucket, small=False)
            install(bucket, candidate)
            timed.append((time_us(work, repeats=5), json.dumps(candidate)))
        except TimeoutError:
            continue
        except Exception as error:
            print(f"{bucket.operation} {bucket.name} {candidate}: {type(error).__name__}: {error}", flush=True)
    timed.sort()
    for us, text in timed[:3]:
        print(f"{bucket.operation:20}{bucket.name:>6}{us:10.1f} us  {text}", flush=True)
    if len(timed) < len(compiled):
        print(f"{bucket.operation:20}{bucket.name:>6} {len(timed)} of {len(compiled)} candidates timed", flush=True)
    found: Config | None = json.loads(timed[0][1]) if timed else None
    return found


def search(operations: Sequence[str], seconds: float) -> dict[str, dict[str, Config]]:
    until = time.monotonic() + seconds
    found: dict[str, dict[str, Config]] = {}
    before = copy.deepcopy(launch.tuned())
    workers = max(min(os.cpu_count() or 1, 16) - 1, 1)
    with ProcessPoolExecutor(workers, multiprocessing.get_context("spawn")) as pool:
        waiting = [
            (bucket, [(one, pool.submit(compile_one, bucket, one)) for one in candidates(bucket)])
            for bucket in buckets(operations)
        ]
        for bucket, compiled in waiting:
            if (config := best(bucket, compiled, until)) is not None:
                install(bucket, config)
                found.setdefault(bucket.operation, {})[bucket.name] = config
            torch.cuda.empty_cache()
        pool.shutdown(cancel_futures=True)
    merge(before, found)
    launch.tuned().clear()
    launch.tuned().update(before)
    launch.config.cache_clear()
    return found


def merge(everything: dict[str, Any], found: dict[str, dict[str, Config]]) -> None:
    for operation, entries in found.items():
        everything.setdefault(launch.arch(DEVICE), {}).setdefault(operation, {}).update(entries)


def write(path: Path, found: dict[str, dict[str, Config]]) -> None:
    """Put the entries into the file, which keeps what it has, one bucket a line."""
    everything = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    merge(everything, found)
    text = json.dumps(everything, indent=2)
    for entry in [one for arch in everything.values() for family in arch.values() for one in family.values()]:
        text = text.replace(json.dumps(entry, indent=2).replace("\n", "\n      "), json.dumps(entry))
    path.write_text(text + "\n", encoding="utf-8")


def main() -> None:
    known = (*PRODUCTS, HOPPER, *ELEMENTWISE, *UPDATES)
    parser = argparse.ArgumentParser(
        prog="python -m halfbyte_triton.tune", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("what", nargs="*", help=f"table, or of {', '.join(known)}; everything by default")
    parser.add_argument("--output", type=Path, default=Path(__file__).with_name("tuned.json"))
    parser.add_argument("--seconds", type=float, default=90, help="after which no more candidates are waited for")
    given = parser.parse_args()
    if wrong := set(given.what) - {"table", *known}:
        parser.error(f"no such operation: {', '.join(sorted(wrong))}")
    missing: list[Bucket] = []
    if given.what != ["table"]:
        started = time.monotonic()
        able = [one for one in known if one != HOPPER or linear4bit.specialized(launch.arch(DEVICE))]
        chosen = [one for one in given.what if one != "table"] or able
        found = search(chosen, given.seconds)
        write(given.output, found)
        print(f"wrote {given.output} after {time.monotonic() - started:.0f} s")
        missing = [one for one in buckets(chosen) if one.name not in found.get(one.operation, {})]
    if not given.what or "table" in given.what:
        table()
    if missing:
        raise SystemExit(f"nothing found for {', '.join(f'{one.operation} {one.name}' for one in missing)}")


if __name__ == "__main__":
    main()
