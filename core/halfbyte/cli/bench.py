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

from ..bench import LIBRARIES, PEERS
from ..errors import InputError
from .output import require_writable


def add_parser(subparsers: Any) -> None:
    parser = subparsers.add_parser(
        "bench",
        help="time halfbyte against bitsandbytes and plain torch",
        description="Time the ops with each library, in turns, and print the ratios.",
    )
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="where to run (cpu)")
    parser.add_argument("--threads", type=int, default=2, metavar="N", help="threads of each library (2)")
    parser.add_argument("--rounds", type=int, default=3, metavar="N", help="turns of each library; the best counts (3)")
    parser.add_argument("--cases", default=".*", metavar="REGEX", help="only the cases whose name contains a match")
    parser.add_argument("--libraries", default=",".join(LIBRARIES), metavar="LIST", help="which ones to time")
    parser.add_argument("--plot", metavar="FILE", help="cuda: draw the linear cases under the copy rate, too")
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
    if unknown := set(libraries) - {*LIBRARIES, *PEERS}:
        raise InputError(f"--libraries must list some of {', '.join((*LIBRARIES, *PEERS))}; got {sorted(unknown)[0]!r}")
    if args.device == "cpu" and (alone := set(libraries) & set(PEERS)):
        raise InputError(f"--libraries {sorted(alone)[0]} needs --device cuda; got cpu")
    if args.threads < 1 or args.rounds < 1:
        raise InputError(f"--threads and --rounds must be at least 1; got {args.threads} and {args.rounds}")
    require_writable(args.markdown, args.json, args.plot)
    with Status("starting", console=Console(stderr=True)) as status:
        if args.device == "cuda":
            table, rows = _on_cuda(args, libraries, status.update)
        else:
            chosen = choose(cases(), args.cases)
            rows = measure(chosen, libraries, args.threads, args.rounds, status.update)
            text = heading(args.threads, args.rounds, [rate for row in rows for rate in row.copy_gb_s])
            table = markdown(rows, libraries, text)
    print(table, end="")
    if args.markdown:
        Path(args.markdown).write_text(table, encoding="utf-8")
    if args.json:
        Path(args.json).write_text(json.dumps([asdict(row) for row in rows], indent=2) + "\n", encoding="utf-8")
    return 0


def _on_cuda(args: argparse.Namespace, libraries: list[str], progress: Any) -> tuple[str, list[Any]]:
    """The table and its rows, measured on the current CUDA device."""
    import torch

    from ..bench import gpu

    if not torch.cuda.is_available():
        raise InputError("--device cuda needs a CUDA GPU; torch finds none")
    chosen = choose(gpu.cases(), args.cases)
    rate = gpu.copy_rate()
    rows = gpu.run(chosen, libraries, args.rounds, progress)
    if args.plot:
        gpu.plot(rows, libraries, rate, args.plot)
    return gpu.markdown(rows, libraries, gpu.heading(rate, args.rounds), rate), rows


def choose(cases: list[Any], pattern: str) -> list[Any]:
    """The cases whose name contains a match.  Raises InputError where none does, or for a bad expression."""
    try:
        chosen = [case for case in cases if re.search(pattern, case.name)]
    except re.error as error:
        raise InputError(f"--cases must be a regular expression; got {pattern!r} ({error})") from error
    if not chosen:
        raise InputError(f"--cases {pattern!r} matches none of: {'; '.join(case.name for case in cases)}")
    return chosen


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
