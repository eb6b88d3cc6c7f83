"""`halfbyte doctor`: what is installed, which backend runs where and why, and whether it computes right."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import Console


def add_parser(subparsers: Any) -> None:
    parser = subparsers.add_parser(
        "doctor",
        help="show devices, backends and settings, and check every op",
        description="Show devices, backends and settings, and check every op against its reference. "
        "The exit code is 1 when a forced backend cannot run, kernels cannot be loaded, a setting is wrong or a check "
        "disagrees.",
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Print the diagnosis; 0 when all is well, 1 when not."""
    from ..diagnosis import diagnose

    found = diagnose()
    if args.json:
        print(json.dumps(found, indent=2))
    else:
        _print(found)
    return 0 if found["ok"] else 1


def _print(found: dict[str, Any]) -> None:
    from rich.console import Console

    console = Console(highlight=False, soft_wrap=True, markup=False)
    if not console.is_terminal:  # a log or a pipe: whole lines
        console.width = 160
    versions = found["versions"]
    console.print(f"halfbyte {versions['halfbyte']}, torch {versions['torch']}, Python {versions['python']}")
    console.print(versions["platform"])
    _table(
        console,
        "devices",
        ("device", "name", "arch", "backend"),
        [
            (one["device"], one["name"] or one["vendor"], one["arch"], one["backend"] or "none")
            for one in found["devices"]
        ],
    )
    rows = [
        (
            one["name"],
            str(one["priority"]),
            ", ".join(one["device_types"]),
            one["provider"],
            "; ".join(one["reasons"]) or "can run",
        )
        for one in found["backends"]
    ]
    rows += [(one["plugin"], "", "", one["provider"], f"quarantined: {one['reason']}") for one in found["quarantined"]]
    _table(console, "backends", ("name", "priority", "devices", "from", "here"), rows)
    _table(
        console,
        "environment variables",
        ("name", "value", "what it is"),
        [
            (
                one["name"],
                "not set" if one["value"] is None else repr(one["value"]),
                f"{one['doc']} ({one['values']})" if one["values"] else one["doc"],
            )
            for one in found["variables"]
        ],
    )
    if found["kernels"]:
        rows = [
            (one["device"], one["op"], _kernel(one), f"{one['agree']} of {len(one['cases'])} agree", _why(one))
            for one in found["kernels"]
        ]
        _table(console, "kernels", ("device", "op", "kernel", "self-check", "why"), rows)
    _print_verdict(console, found)


def _print_verdict(console: Console, found: dict[str, Any]) -> None:
    console.print()
    if advice := found["build"]["advice"]:
        console.print(f"The native CPU module is not built: {advice}")
    for one in found["checks"]:
        console.print(f"{'ok' if one['ok'] else 'FAILED'}  {one['name']}: {one['message']}")
    for one in found["selfchecks"]["failed"]:
        console.print(f"FAILED  {one['op']} on {one['device']} ({one['case']}), {_kernel(one)}: {one['message']}")
    for error in found["configuration_errors"]:
        console.print(f"WRONG   {error}")
    if not found["configuration_errors"]:
        run, failed = found["selfchecks"]["run"], len(found["selfchecks"]["failed"])
        console.print(f"{run - failed} of {run} self-checks agree with the reference")
    console.print("all is well" if found["ok"] else "something is wrong, see above")


def _kernel(one: dict[str, Any]) -> str:
    return f"{one['backend']} ({one['variant']})" if one["variant"] else one["backend"] or "none"


def _why(one: dict[str, Any]) -> str:
    """Who chose the kernel, and what was against the backends before it."""
    reasons = [f"{name}: {', '.join(against)}" for name, against in one["against"].items()]
    return "; ".join([one["chosen_by"] or "see below", *reasons])


def _table(console: Console, title: str, columns: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> None:
    """Columns side by side; only the last one is ever wrapped."""
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, pad_edge=False, title_justify="left")
    for column in columns[:-1]:
        table.add_column(column, no_wrap=True)
    table.add_column(columns[-1], overflow="fold")
    for row in rows:
        table.add_row(*map(Text, row))
    console.print()
    console.print(title)
    console.print(table, soft_wrap=False)
