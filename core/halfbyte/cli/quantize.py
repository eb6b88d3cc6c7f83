"""`halfbyte quantize`: a safetensors folder into a quantized one."""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ..conversion.convert import ConvertedLayer, ConvertReport


def add_parser(subparsers: Any) -> None:
    parser = subparsers.add_parser(
        "quantize",
        help="quantize a Hugging Face safetensors folder",
        description="Quantize the linear layers of a Hugging Face safetensors folder into a new folder that "
        "transformers loads like any bitsandbytes checkpoint.  Memory is bounded by the largest layer, times --jobs.  "
        "After a kill or Ctrl-C the same command goes on from the last finished shard; after an error nothing is left.",
    )
    parser.add_argument("model", metavar="MODEL_DIR", help="folder with config.json and safetensors files")
    parser.add_argument("output", metavar="OUT_DIR", help="folder to create; must not exist")
    parser.add_argument("--format", required=True, metavar="{nf4,fp4,int8}", help="what to quantize to")
    parser.add_argument("--nested", action="store_true", help="4-bit: quantize the absmax too (double quantization)")
    parser.add_argument("--blocksize", type=int, default=64, metavar="N", help="4-bit: weights per absmax (64)")
    parser.add_argument(
        "--threshold", type=float, default=6.0, metavar="X", help="int8: activations from here are outliers (6.0)"
    )
    parser.add_argument(
        "--skip",
        action="append",
        default=[],
        metavar="REGEX",
        help="leave out layers whose path, or its last part, is this name or matches this in full; may be given again",
    )
    parser.add_argument(
        "--include",
        action="append",
        default=[],
        metavar="REGEX",
        help="quantize only the layers that match; may be given again",
    )
    parser.add_argument(
        "--compute-dtype", default="bfloat16", metavar="DTYPE", help="4-bit: what loaded layers compute in (bfloat16)"
    )
    parser.add_argument("--device", default="cpu", help="where to quantize (cpu)")
    parser.add_argument(
        "--jobs",
        type=int,
        default=1,
        metavar="N",
        help="layers at a time; memory grows with it, the result is the same (1)",
    )
    parser.add_argument("--verbose", action="store_true", help="report every layer")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Convert, with a progress bar on stderr and the report on stdout.  Raises HalfbyteError."""
    from rich.console import Console
    from rich.progress import Progress

    from ..conversion.convert import Options, convert

    options = Options(
        format=args.format,
        blocksize=args.blocksize,
        nested=args.nested,
        threshold=args.threshold,
        compute_dtype=args.compute_dtype,
        device=args.device,
    )
    with Progress(console=Console(stderr=True), transient=True, disable=not sys.stderr.isatty()) as bar:
        task = bar.add_task("quantizing", total=None)

        def progress(done: int, total: int, name: str) -> None:
            bar.update(task, completed=done, total=total, description=name)

        report = convert(
            args.model,
            args.output,
            options,
            skip=args.skip,
            include=args.include,
            jobs=args.jobs,
            progress=progress,
        )
    if report.resumed:
        print(f"halfbyte: {report.resumed}", file=sys.stderr)
    for warning in report.warnings:
        print(f"halfbyte: warning: {warning}", file=sys.stderr)
    _print(report, args.verbose)
    return 0


def _print(report: ConvertReport, verbose: bool) -> None:
    from rich.console import Console
    from rich.table import Table

    from ..conversion.sizes import human

    console = Console(highlight=False, soft_wrap=True)
    if verbose:
        table = Table("layer", "shape", "before", "after", "relative error", box=None)
        for layer in report.layers:
            shape = " x ".join(map(str, layer.shape))
            table.add_row(layer.module, shape, *_figures([layer]))
        console.print(table)
    table = Table("kind", "layers", "before", "after", "relative error", box=None)
    kinds: dict[str, list[ConvertedLayer]] = {}
    for layer in report.layers:
        kinds.setdefault(layer.kind, []).append(layer)
    for kind, layers in kinds.items():
        table.add_row(kind, str(len(layers)), *_figures(layers))
    table.add_row("all quantized", str(len(report.layers)), *_figures(report.layers))
    console.print(table)
    before, after = report.bytes_before, report.bytes_after
    console.print(f"model     {human(before)} -> {human(after)} ({after / max(before, 1):.0%}) as {report.format}")
    if report.left_out:
        console.print(f"left out  {', '.join(report.left_out)}", markup=False)
    console.print(f"written   {report.path}", markup=False)


def _figures(layers: Iterable[ConvertedLayer]) -> tuple[str, str, str]:
    from ..conversion.sizes import human

    layers = list(layers)
    norm = math.hypot(*(layer.norm for layer in layers))
    change = math.hypot(*(layer.norm * layer.error for layer in layers))
    before, after = sum(layer.bytes_before for layer in layers), sum(layer.bytes_after for layer in layers)
    return human(before), human(after), f"{change / norm if norm else 0.0:.4f}"
