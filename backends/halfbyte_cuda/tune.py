"""Measures every kernel of linear_4bit that can serve a size, and writes the fastest to tuning.json.

    python -m halfbyte_cuda.tune              # on an idle GPU; prints the table, writes tuning.json beside this file
    python -m halfbyte_cuda.tune --least 96   # for 96 rows of x and more; what the file has for fewer stays

Times are medians over replays of a CUDA graph that takes turns at enough copies of a weight to overflow L2 several
times, so that every weight comes from memory.
"""

from __future__ import annotations

import argparse
import datetime
import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .linear4bit import Choice, candidates, run

SIZES = (
    (1024, 4096),
    (4096, 1024),
    (2048, 2048),
    (8192, 2048),
    (2048, 8192),
    (4096, 4096),
    (6144, 4096),
    (5120, 5120),
    (11008, 4096),
    (14336, 4096),
    (4096, 14336),
    (8192, 8192),
    (28672, 8192),
    (8192, 28672),
)
ROWS = (1, 8, 16, 32, 64, 96, 128, 192, 256, 512, 1024, 2048, 4096)


def microseconds(calls: list[Any], repeats: int = 7) -> float:
    """The median time of one call, in a graph of all of them."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        calls[0]()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    times: list[float] = []
    for _ in range(repeats + 1):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) * 1e3 / len(calls))
    return sorted(times[1:])[repeats // 2]


def weights(n: int, k: int) -> list[tuple[Tensor, Tensor]]:
    """Copies of a random NF4 weight, at least four times L2 together, in all three or more."""
    l2 = torch.cuda.get_device_properties().L2_cache_size
    copies = max(3, 4 * l2 // (n * k // 2))
    return [
        (
            torch.randint(0, 256, (n * k // 2,), dtype=torch.uint8, device="cuda"),
            torch.rand(n * k // 64, device="cuda") * 0.02 + 0.01,
        )
        for _ in range(copies)
    ]


def measure(c: Any, n: int, k: int, m: int, copies: list[tuple[Tensor, Tensor]]) -> dict[Choice, float]:
    """Microseconds of every choice for one size."""
    x = torch.randn(m, k, device="cuda", dtype=torch.bfloat16)
    times = {}
    for choice in candidates(m):
        calls = [
            lambda w=w, a=a, choice=choice: run(c, choice, x, w, a, None, None, None, None, "nf4", 64, n)
            for w, a in copies
        ]
        times[choice] = microseconds(calls)
    return times


def main() -> None:
    from . import _C

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--least", type=int, default=1, metavar="M", help="rows of x to begin with")
    least = parser.parse_args().least
    path = Path(__file__).with_name("tuning.json")
    before = json.loads(path.read_text())
    kept = {(row["n"], row["k"]): row["choices"] for row in before["linear_4bit"]}
    table = []
    for n, k in SIZES:
        copies = weights(n, k)
        choices = {m: choice for m, choice in kept.get((n, k), {}).items() if int(m) < least}
        for m in [m for m in ROWS if m >= least]:
            times = measure(_C, n, k, m, copies)
            best = min(times, key=lambda choice: times[choice])
            choices[str(m)] = list(best)
            ranked = sorted(times.items(), key=lambda item: item[1])[:3]
            print(f"{n}x{k} M={m}:", *(f"{'-'.join(map(str, choice))} {us:.1f}" for choice, us in ranked), flush=True)
        table.append({"n": n, "k": k, "choices": choices})
    origin = {"device": torch.cuda.get_device_name(), "date": str(datetime.date.today())}
    document: dict[str, Any] = {"command": "python -m halfbyte_cuda.tune", **origin}
    if least > 1:
        document["command"] += f" --least {least}"
        document["fewer rows"] = {key: before[key] for key in ("command", "device", "date")}
    path.write_text(json.dumps({**document, "linear_4bit": table}, indent=1) + "\n")


if __name__ == "__main__":
    main()
