"""The commands, one file each: `add_parser(subparsers)` declares it, `run(args)` does it and gives the exit code."""

from __future__ import annotations

from . import bench, demo, doctor, estimate, quantize, run

COMMANDS = (doctor, quantize, estimate, run, demo, bench)
