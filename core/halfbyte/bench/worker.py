"""One process of the benchmark: times one case with one library and prints a line of JSON.

Run by `halfbyte.bench.run` as `python -m halfbyte.bench.worker LIBRARY CASE THREADS`.  halfbyte is imported in
every such process, as the cases are part of it; until it is called it runs nothing.
"""

from __future__ import annotations

import json
import statistics
import sys
import time
import warnings

import torch

SECONDS = 1.0  # to spend on one case
REPEATS = 30  # at least this many calls, unless one takes very long


def main(library: str, name: str, threads: int) -> None:
    """Print {"min": s, "median": s, "repeats": n, "copy_gb_s": before and after}."""
    from halfbyte.bench.cases import cases

    warnings.simplefilter("ignore")
    torch.set_num_threads(threads)
    (case,) = [case for case in cases() if case.name == name]
    before = copy_rate()
    with torch.inference_mode(case.inference), torch.no_grad():
        call = case.prepare(library)
        for _ in range(3):
            call()
        times: list[float] = []
        begin = time.perf_counter()
        while time.perf_counter() - begin < SECONDS or len(times) < REPEATS:
            started = time.perf_counter()
            call()
            times.append(time.perf_counter() - started)
            if time.perf_counter() - begin > 5 * SECONDS:
                break
    result = {
        "min": min(times),
        "median": statistics.median(times),
        "repeats": len(times),
        "copy_gb_s": [before, copy_rate()],
    }
    print(json.dumps(result))


def copy_rate() -> float:
    """GB/s read and written by a large copy: tells a quiet machine from a busy one."""
    source = torch.empty(2**25, dtype=torch.uint8)
    target = torch.empty_like(source)
    best = 0.0
    for _ in range(5):
        started = time.perf_counter()
        target.copy_(source)
        best = max(best, 2 * source.numel() / (time.perf_counter() - started) / 1e9)
    return round(best, 1)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], int(sys.argv[3]))
