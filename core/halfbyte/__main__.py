"""The command line: `halfbyte <command>`, also `python -m halfbyte`."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence

from . import __version__
from .cli import COMMANDS
from .errors import HalfbyteError


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command.

    returns    the exit code: the command's own (0 or 1); 2 for an error, told in one sentence on stderr; 130 when
               interrupted
    """
    parser = argparse.ArgumentParser(prog="halfbyte", description="Quantization for PyTorch, on any backend.")
    parser.add_argument("--version", action="version", version=f"halfbyte {__version__}")
    subparsers = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for command in COMMANDS:
        command.add_parser(subparsers)
    args = parser.parse_args(argv)
    if args.command == "run":
        return int(args.run(args))  # the script's errors are its own
    try:
        code = int(args.run(args))
        sys.stdout.flush()
        return code
    except BrokenPipeError:  # `halfbyte ... | head`; what Python flushes at its end must go somewhere
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except (HalfbyteError, OSError) as error:
        print(f"halfbyte: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt as stop:
        print(f"halfbyte: {stop or 'interrupted'}", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
