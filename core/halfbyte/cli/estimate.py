"""`halfbyte estimate`: the memory that a model needs in each format, and to be trained."""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ..conversion.estimate import Estimate, Training

NOT_INCLUDED = "Activations, temporary buffers and what the allocator keeps are not included."


def add_parser(subparsers: Any) -> None:
    parser = subparsers.add_parser(
        "estimate",
        help="say what memory a safetensors folder needs in each format, and to be trained",
        description="Say what memory the weights of a Hugging Face safetensors folder need in each format, and what "
        "QLoRA and full fine-tuning need with AdamW in 32 and 8 bits.  Reads config.json and headers, no tensors; "
        "chooses the layers that `halfbyte quantize` would.  " + NOT_INCLUDED,
    )
    parser.add_argument("model", metavar="MODEL_DIR", help="folder with config.json and safetensors files")
    parser.add_argument("--blocksize", type=int, default=64, metavar="N", help="4-bit: weights per absmax (64)")
    parser.add_argument("--rank", type=int, default=16, metavar="R", help="of the LoRA adapters (16)")
    for option in ("--skip", "--include"):
        parser.add_argument(option, action="append", default=[], metavar="REGEX", help="as for halfbyte quantize")
    parser.add_argument("--json", action="store_true", help="print one JSON object, in bytes")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Print the figures on stdout.  Raises HalfbyteError."""
    from ..conversion.estimate import estimate

    found = estimate(args.model, blocksize=args.blocksize, rank=args.rank, skip=args.skip, include=args.include)
    for warning in found.warnings:
        print(f"halfbyte: warning: {warning}", file=sys.stderr)
    if args.json:
        print(json.dumps(as_json(found), indent=2))
    else:
        _print(found)
    return 0


def as_json(found: Estimate) -> dict[str, Any]:
    """The estimate with the totals; every figure that is not a count of parameters or layers is in bytes."""
    ways = {"full": found.full, **{f"qlora {name}": one for name, one in found.qlora.items()}}
    training = {
        way: {**asdict(one), "total_adamw": one.total_adamw, "total_adamw8bit": one.total_adamw8bit}
        for way, one in ways.items()
    }
    plain = asdict(found)
    for moved in ("qlora", "full", "warnings"):
        del plain[moved]
    return {**plain, "training": training, "not_included": NOT_INCLUDED}


def _print(found: Estimate) -> None:
    from rich.console import Console
    from rich.table import Table

    from ..conversion.sizes import human

    console = Console(highlight=False, soft_wrap=True, markup=False)
    if not console.is_terminal:  # a log or a pipe: whole lines
        console.width = 160
    console.print(
        f"{found.parameters:,} parameters, {human(found.stored)} as stored; "
        f"{found.quantized_parameters:,} of them in {found.layers} layers to quantize"
    )
    table = Table("weights", "memory", "of fp32", box=None)
    for name, nbytes in found.weights.items():
        table.add_row(name, human(nbytes), f"{nbytes / max(found.weights['fp32'], 1):.1%}")
    console.print(table)
    columns = ("training", "parameters", "weights", "gradients", "AdamW", "total", "AdamW8bit", "total")
    table = Table(*columns, box=None)
    for name, one in found.qlora.items():
        table.add_row(f"QLoRA on {name}, rank {found.rank}", *_figures(one))
    table.add_row("full, in the stored dtype", *_figures(found.full))
    console.print(table)
    console.print(NOT_INCLUDED)


def _figures(one: Training) -> tuple[str, ...]:
    from ..conversion.sizes import human

    sizes = (one.weights, one.gradients, one.adamw, one.total_adamw, one.adamw8bit, one.total_adamw8bit)
    return (f"{one.parameters:,}", *map(human, sizes))
