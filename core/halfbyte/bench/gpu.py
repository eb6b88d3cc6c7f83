"""The benchmark on a CUDA GPU: halfbyte, bitsandbytes and plain torch in one process, in turns, on the same data.

Layers are timed in CUDA graphs that take turns at enough copies of a weight to overflow L2 several times, so every
weight comes from memory.  Everything else is called several times in a row, as a training loop does, so that the host
runs ahead where it can.  "host" rows are the time a call keeps the CPU.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import nn

from . import LIBRARIES, PEERS

Call = Callable[[], Any]
BF16 = torch.bfloat16
SIZES = ((1024, 4096), (4096, 4096), (6144, 4096), (14336, 4096), (4096, 14336), (8192, 8192), (28672, 8192))
ROWS = (1, 8, 16, 32, 64, 128, 256, 1024, 4096)
ELEMENTS = 2**29
PARAMETERS = 2**30
IN_A_ROW = 4


@dataclass(frozen=True)
class Case:
    """One thing to time.

    name       what is done, on what
    kind       "graph" (calls that take turns in a CUDA graph), "stream" (events around calls in a row) or "host"
    bytes      what must at least be read and written
    prepare    library -> calls on different copies of the data; none where it has no such thing
    libraries  that are asked
    """

    name: str
    kind: str
    bytes: int
    prepare: Callable[[str], list[Call]]
    libraries: tuple[str, ...] = LIBRARIES


@dataclass
class Row:
    """Figures of one case: library -> microseconds, one per round."""

    name: str
    kind: str
    bytes: int
    times: dict[str, list[float]] = field(default_factory=dict)

    def microseconds(self, library: str) -> float | None:
        return statistics.median(self.times[library]) if self.times.get(library) else None


def cases() -> list[Case]:
    """Every case, in the order of the table."""
    found = [
        _linear(n, k, m, nested) for n, k in SIZES for m in ROWS for nested in (False, True) if m < 1024 or not nested
    ]
    for dtype in (BF16, torch.float32):
        found += [_blockwise(op, bits, dtype) for bits in (4, 8) for op in ("quantize", "dequantize")]
    found += [_int8(4096, 4096, m) for m in (1, 16, 64)] + [_int8(8192, 8192, m) for m in (1, 64, 4096)]
    found += [_step(name) for name in ("AdamW8bit", "Lion8bit", "SGD8bit", "AdEMAMix8bit", "AdamW32bit")]
    return [*found, _model(), _many_tensors(), _host()]


# -- cases -----------------------------------------------------------------------------------------------------


def _linear(n: int, k: int, m: int, nested: bool) -> Case:
    def prepare(library: str) -> list[Call]:
        x = torch.randn(m, k, device="cuda", dtype=BF16)
        dense = torch.randn(n, k, device="cuda", dtype=BF16) * 0.02
        if library == "torch":
            weights = [dense.clone() for _ in range(_copies(2 * n * k))]
            return [partial(torch.nn.functional.linear, x, w) for w in weights]
        copies = _copies(n * k // 2)
        if library == "humming":
            return [partial(layer, x) for layer in _humming(dense, copies)]
        if library == "halfbyte":
            from halfbyte import functional

            packed, state = functional.quantize_4bit(dense, nested=nested)
            return [partial(functional.linear_4bit, x, packed.clone(), state) for _ in range(copies)]
        import bitsandbytes as bnb

        packed, state = bnb.functional.quantize_4bit(dense, quant_type="nf4", compress_statistics=nested)
        return [partial(bnb.matmul_4bit, x, packed.clone().t(), quant_state=state) for _ in range(copies)]

    scales = n * k // 64 * (1 if nested else 4)
    name = f"nf4{' nested' if nested else ''} linear {n}x{k}, bf16, M={m}"
    peers = LIBRARIES if nested else (*LIBRARIES, *PEERS)
    return Case(name, "graph", n * k // 2 + scales + 2 * m * (n + k), prepare, peers)


def _humming(dense: torch.Tensor, copies: int) -> list[Any]:
    """Layers of int4 with a scale in bf16 for every 64 weights; a kernel is compiled when it is first called."""
    from humming.layer import HummingLayer  # type: ignore[import-not-found, unused-ignore]

    n, k = dense.shape
    layers = []
    for _ in range(copies):
        layer = HummingLayer(n, k, weight_config={"dtype": "int4", "group_size": 64}, torch_dtype=BF16).cuda()
        layer.load_from_unquantized(dense)
        layer.transform()
        layers.append(layer)
    return layers


def _blockwise(op: str, bits: int, dtype: torch.dtype) -> Case:
    def prepare(library: str) -> list[Call]:
        x = torch.randn(ELEMENTS, device="cuda", dtype=dtype)
        if library == "halfbyte":
            from halfbyte import functional as f

            quantize: Any = f.quantize_4bit if bits == 4 else f.quantize_8bit
            dequantize: Any = f.dequantize_4bit if bits == 4 else f.dequantize_8bit
            options: dict[str, Any] = {}
        elif library == "bitsandbytes":
            import bitsandbytes.functional as b

            quantize = b.quantize_4bit if bits == 4 else b.quantize_blockwise
            dequantize = b.dequantize_4bit if bits == 4 else b.dequantize_blockwise
            options = {"quant_type": "nf4"} if bits == 4 else {"blocksize": 256}
        else:
            return []
        if op == "quantize":
            return [lambda: quantize(x, **options)]
        codes, state = quantize(x, **options)
        return [lambda: dequantize(codes, state)]

    wide, narrow, blocksize = dtype.itemsize, bits / 8, 64 if bits == 4 else 256
    name = f"{op}_{bits}bit, 2^29 {'bf16' if dtype is BF16 else 'fp32'}"
    return Case(name, "stream", int(ELEMENTS * (wide + narrow + 4 / blocksize)), prepare)


def _int8(n: int, k: int, m: int) -> Case:
    def prepare(library: str) -> list[Call]:
        dtype = torch.float16 if library == "bitsandbytes" else BF16
        x = torch.randn(m, k, device="cuda", dtype=dtype)
        x[:, :3] *= 20  # three outlier columns
        layer: Any = nn.Linear(k, n, bias=False, dtype=dtype)
        if library != "torch":
            module = _library(library)
            plain, layer = layer, module.nn.Linear8bitLt(k, n, bias=False, has_fp16_weights=False, threshold=6.0)
            layer.weight.data = plain.weight.data
        layer = layer.cuda().eval()
        return [lambda: layer(x)]

    return Case(f"int8 linear {n}x{k}, threshold 6, M={m}", "stream", n * k + 2 * m * (n + k), prepare)


STATES = {"AdamW8bit": 4.0625, "Lion8bit": 2.03125, "SGD8bit": 2.03125, "AdEMAMix8bit": 6.09375, "AdamW32bit": 16}


def _step(name: str) -> Case:
    def prepare(library: str) -> list[Call]:
        param = nn.Parameter(torch.randn(PARAMETERS, device="cuda", dtype=BF16) * 0.02)
        param.grad = torch.randn(PARAMETERS, device="cuda", dtype=BF16) * 0.01
        return _optimizer(library, name, [param])

    return Case(f"{name}, 2^30 bf16 parameters", "stream", int(PARAMETERS * (6 + STATES[name])), prepare)


def _model() -> Case:
    """The tensors of a Llama-3.2-1B."""
    layer = [2048 * 2048] * 2 + [512 * 2048] * 2 + [8192 * 2048] * 3 + [2048] * 2
    sizes = [128_256 * 2048, *layer * 16, 2048]

    def prepare(library: str) -> list[Call]:
        params = [nn.Parameter(torch.randn(n, device="cuda", dtype=BF16) * 0.02) for n in sizes]
        for param in params:
            param.grad = torch.randn_like(param) * 0.01
        return _optimizer(library, "AdamW8bit", params)

    return Case("AdamW8bit, 146 tensors of 1.24e9 bf16 parameters", "stream", int(sum(sizes) * 10.0625), prepare)


def _many_tensors() -> Case:
    def prepare(library: str) -> list[Call]:
        params = [nn.Parameter(torch.randn(4096, device="cuda", dtype=BF16)) for _ in range(10_000)]
        for param in params:
            param.grad = torch.randn_like(param)
        return _optimizer(library, "AdamW8bit", params)

    return Case("AdamW8bit, 10,000 tensors of 4,096 bf16 parameters", "stream", int(4096e4 * 10.0625), prepare)


def _optimizer(library: str, name: str, params: list[nn.Parameter]) -> list[Call]:
    if library == "torch":
        if not name.startswith("AdamW"):
            return []
        return [torch.optim.AdamW(params, lr=1e-4, fused=True).step]
    momentum = {"momentum": 0.9} if name.startswith("SGD") else {}
    return [getattr(_library(library).optim, name)(params, lr=1e-4, **momentum).step]


def _host() -> Case:
    def prepare(library: str) -> list[Call]:
        x = torch.randn(1, 1024, device="cuda", dtype=BF16)
        layer: Any = nn.Linear(1024, 1024, bias=False, dtype=BF16)
        if library != "torch":
            plain, layer = (
                layer,
                _library(library).nn.Linear4bit(1024, 1024, bias=False, compute_dtype=BF16, quant_type="nf4"),
            )
            layer.weight.data = plain.weight.data
        layer = layer.cuda().eval()
        return [lambda: layer(x)]

    return Case("host time of a Linear4bit call (torch: nn.Linear)", "host", 0, prepare)


def _library(name: str) -> Any:
    import importlib

    return importlib.import_module(name)


def _copies(size: int) -> int:
    """How many copies of `size` bytes overflow L2 four times; three at least."""
    return max(3, -(-4 * torch.cuda.get_device_properties().L2_cache_size // size))


# -- measuring -------------------------------------------------------------------------------------------------


def run(
    chosen: Sequence[Case], libraries: Sequence[str], rounds: int, progress: Callable[[str], None] = lambda text: None
) -> list[Row]:
    """Time every case with every library that has it, in turns."""
    rows = []
    with torch.no_grad():
        for case in chosen:
            row = Row(case.name, case.kind, case.bytes)
            progress(case.name)
            timers = {}
            for library in libraries:
                calls = case.prepare(library) if library in case.libraries else []
                if calls:
                    timers[library] = _timer(case.kind, calls)
                del calls
            for _ in range(rounds):
                for library, timer in timers.items():
                    row.times.setdefault(library, []).append(timer())
            rows.append(row)
            del timers
            torch.cuda.empty_cache()
    return rows


def _timer(kind: str, calls: list[Call]) -> Callable[[], float]:
    """What measures the microseconds of one call, once."""
    for call in calls[:1] * 3:
        call()
    torch.cuda.synchronize()
    if kind == "host":
        return lambda: _host_time(calls[0])
    if kind == "graph":
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            for call in calls:
                call()
        return lambda: _event_time(graph.replay, 5) / len(calls)

    def in_a_row() -> None:
        for _ in range(IN_A_ROW):
            calls[0]()

    return lambda: _event_time(in_a_row, 5) / IN_A_ROW


def _event_time(call: Call, repeats: int) -> float:
    times: list[float] = []
    for _ in range(repeats):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        torch.cuda.synchronize()
        start.record()
        call()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) * 1e3)
    return statistics.median(times)


def _host_time(call: Call, calls: int = 300) -> float:
    torch.cuda.synchronize()
    started = time.perf_counter()
    for _ in range(calls):
        call()
    seconds = time.perf_counter() - started
    torch.cuda.synchronize()
    return seconds / calls * 1e6


def copy_rate() -> float:
    """Bytes a second, read and written, of copying 2 GiB: the ceiling of what memory bounds.

    The better of the driver's copy and a kernel that adds zero.
    """
    source = torch.randn(2**29, device="cuda")
    target = torch.empty_like(source)
    ways: tuple[Call, ...] = (lambda: target.copy_(source), lambda: torch.add(source, 0, out=target))
    for way in ways:
        way()
    return 2 * source.nbytes / min(_event_time(way, 9) for way in ways for _ in range(2)) * 1e6


def heading(rate: float, rounds: int) -> str:
    """On what and how the figures were measured."""
    import halfbyte

    return (
        f"{torch.cuda.get_device_name()}, torch {torch.__version__}, halfbyte {halfbyte.__version__}; median of "
        f"{rounds} rounds in one process; a copy of 2 GiB reads and writes {rate / 1e12:.2f} TB/s."
    )


def markdown(rows: Sequence[Row], libraries: Sequence[str], text: str, rate: float) -> str:
    """The table: microseconds, the share of the copy rate that halfbyte reaches, and ratios."""
    others = [name for name in libraries if name != "halfbyte"]
    head = [
        "case",
        *(f"{name} µs" for name in libraries),
        "of the copy rate",
        *(f"{name} / halfbyte" for name in others),
    ]
    lines = [text, "", "| " + " | ".join(head) + " |", "|---|" + "--:|" * (len(head) - 1)]
    for row in rows:
        own = row.microseconds("halfbyte")
        figures = [row.microseconds(name) for name in libraries]
        cells = ["" if us is None else f"{us:,.1f}" for us in figures]
        cells.append(f"{row.bytes / own / rate * 1e8:.0f} %" if own and row.bytes else "")
        ratios = [(row.microseconds(name), own) for name in others]
        cells += [f"{other / mine:.2f}x" if other and mine else "" for other, mine in ratios]
        lines.append(f"| {row.name} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def plot(rows: Sequence[Row], libraries: Sequence[str], rate: float, path: str) -> None:
    """Bytes a second that each library reaches in the linear cases, against M, under the copy rate."""
    import re

    import matplotlib  # type: ignore[import-not-found, unused-ignore]

    matplotlib.use("Agg")
    from matplotlib import pyplot  # type: ignore[import-not-found, unused-ignore]

    sizes: dict[str, list[tuple[int, Row]]] = {}
    for row in rows:
        if found := re.fullmatch(r"nf4 linear (\d+x\d+), bf16, M=(\d+)", row.name):
            sizes.setdefault(found[1], []).append((int(found[2]), row))
    figure, axes = pyplot.subplots(
        1, max(1, len(sizes)), figsize=(4 * max(1, len(sizes)), 4), squeeze=False, sharey=True
    )
    for axis, (size, points) in zip(axes[0], sizes.items(), strict=False):
        axis.axhline(rate / 1e12, color="black", linestyle=":", label="copy")
        for library in libraries:
            found_times = [(m, row.bytes / us / 1e6) for m, row in points if (us := row.microseconds(library))]
            axis.plot([m for m, _ in found_times], [rate for _, rate in found_times], marker="o", label=library)
        axis.set(title=size, xlabel="M", xscale="log", ylabel="TB/s of NF4 weight, scales, x and y")
    axes[0][0].legend()
    figure.tight_layout()
    figure.savefig(path, dpi=110)
