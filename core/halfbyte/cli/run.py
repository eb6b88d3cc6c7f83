"""`halfbyte run`: a script with halfbyte in the place of bitsandbytes."""

from __future__ import annotations

import argparse
from typing import Any


def add_parser(subparsers: Any) -> None:
    parser = subparsers.add_parser(
        "run",
        help="run a script with halfbyte in the place of bitsandbytes",
        description="Run a Python script, or a module with -m, so that `import bitsandbytes` is halfbyte, here and in "
        "the processes that it starts.  The exit code is the script's.",
    )
    parser.add_argument("-m", dest="module", action="store_true", help="SCRIPT is a module's name, as for python -m")
    parser.add_argument("script", metavar="SCRIPT", help="what to run")
    parser.add_argument("args", metavar="ARGS", nargs=argparse.REMAINDER, help="the script's own arguments")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Run it in this process; 2 where there is no such script."""
    from halfbyte_boot.run import run

    return run(args.script, args.args, module=args.module)
