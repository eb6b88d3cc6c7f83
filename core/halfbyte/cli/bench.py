"""`halfbyte bench`: this machine's figures against bitsandbytes and plain torch."""

from __future__ import annotations

import argparse
import json
import platform
import re
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

from ..errors import InputError
from .output import require_writable

LIBRARIES = ("halfbyte", "bitsandbytes", "torch")


def add_parser(subparsers: Any) -> None:
    parser = subparsers.add_parser(
        "bench",
        help="time halfbyte against bitsandbytes on the CPU",
        description="Time the ops with each library, in processes that take turns, and print the ratios.",
    )
    parser.add_argument("--threads", type=int, default=2, metavar="N", help="threads of each library (2)")
    parser.add_argument("--rounds", type=int, default=3, metavar="N", help="turns of each library; the best counts (3)")
    parser.add_argument("--cases", default=".*", metavar="REGEX", help="only the cases whose name contains a match")
    parser.add_argument("--libraries", default=",".join(LIBRARIES), metavar="LIST", help="which ones to time")
    parser.add_argument("--markdown", metavar="FILE", help="write the table to a file, too")
    parser.add_argument("--json", metavar="FILE", help="write all figures to a file, too")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Measure and print the table.  Raises InputError for a bad option, HalfbyteError where a library cannot run."""
    from rich.console import Console
    from rich.status import Status

    from ..bench.cases import cases
    from ..bench.run import markdown
    from ..bench.run import run as measure

    libraries = [name.strip() for name in args.libraries.split(",")]
    if unknown := set(libraries) - set(LIBRARIES):
        raise InputError(f"--libraries must list some of {', '.join(LIBRARIES)}; got {sorted(unknown)[0]!r}")
    if args.threads < 1 or args.rounds < 1:
        raise InputError(f"--threads and --rounds must be at least 1; got {args.threads} and {args.rounds}")
    try:
        chosen = [case for case in cases() if re.search(args.cases, case.name)]
    except re.error as error:
        raise InputError(f"--cases must be a regular expression; got {args.cases!r} ({error})") from error
    if not chosen:
        raise InputError(f"--cases {args.cases!r} matches none of: {'; '.join(case.name for case in cases())}")
    require_writable(args.markdown, args.json)
    with Status("starting", console=Console(stderr=True)) as status:
        rows = measure(chosen, libraries, args.threads, args.rounds, status.update)
    table = markdown(rows, libraries, heading(args.threads, args.rounds, [r for row in rows for r in row.copy_gb_s]))
    print(table, end="")
    if args.markdown:
        Path(args.markdown).write_text(table, encoding="utf-8")
    if args.json:
        Path(args.json).write_text(json.dumps([asdict(row) for row in rows], indent=2) + "\n", encoding="utf-8")
    return 0


def heading(threads: int, rounds: int, copy_gb_s: list[float]) -> str:
    """On what and how the figures were measured."""
    import torch

    import halfbyte

    python = ".".join(map(str, sys.version_info[:2]))
    return (
        f"{processor()}, {threads} threads, torch {torch.__version__}, Python {python}, halfbyte "
        f"{halfbyte.__version__}; median of the best of {rounds} rounds; copy rate {min(copy_gb_s)} to "
        f"{max(copy_gb_s)} GB/s during the run."
    )


def processor() -> str:
    """The CPU's name, as far as the system tells."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()
