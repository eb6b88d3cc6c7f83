"""Runs the cases: libraries in alternating processes on one machine, several rounds, best of each round's medians."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from ..errors import HalfbyteError
from .cases import Case


@dataclass
class Row:
    """Figures of one case: library -> seconds, one per round."""

    name: str
    medians: dict[str, list[float]] = field(default_factory=dict)
    minima: dict[str, list[float]] = field(default_factory=dict)
    copy_gb_s: list[float] = field(default_factory=list)

    def seconds(self, library: str) -> float | None:
        """The best round's median: rounds that other load disturbed do not count."""
        return min(self.medians[library], default=None) if self.medians.get(library) else None

    def ratio(self, library: str, to: str = "halfbyte") -> float | None:
        """How many times longer `library` takes than `to`."""
        own, other = self.seconds(to), self.seconds(library)
        return other / own if own and other else None


def run(
    cases: Sequence[Case],
    libraries: Sequence[str],
    threads: int,
    rounds: int,
    progress: Callable[[str], None] = lambda text: None,
) -> list[Row]:
    """Time every case in `rounds` rounds; within a round the libraries take turns, each in a process of its own.

    Raises HalfbyteError where a library cannot be run, with its last line.
    """
    rows = []
    for case in cases:
        row = Row(case.name)
        for turn in range(rounds):
            for library in libraries:
                if library not in case.libraries:
                    continue
                progress(f"{case.name}: {library}, round {turn + 1}")
                figures = _measure(library, case.name, threads)
                row.medians.setdefault(library, []).append(figures["median"])
                row.minima.setdefault(library, []).append(figures["min"])
                row.copy_gb_s += figures["copy_gb_s"]
        rows.append(row)
    return rows


def _measure(library: str, name: str, threads: int) -> dict[str, Any]:
    command = [sys.executable, "-m", "halfbyte.bench.worker", library, name, str(threads)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        last = done.stderr.strip().rpartition("\n")[2]
        raise HalfbyteError(f"{library} cannot run {name!r}: {last}")
    result: dict[str, Any] = json.loads(done.stdout.strip().rpartition("\n")[2])
    return result


def markdown(rows: Sequence[Row], libraries: Sequence[str], heading: str) -> str:
    """The table, in microseconds, with the ratios to halfbyte."""
    peers = [library for library in libraries if library != "halfbyte"]
    titles = ["case", "halfbyte µs", *(f"{peer} µs" for peer in peers), *(f"{peer} / halfbyte" for peer in peers)]
    lines = [heading, "", "| " + " | ".join(titles) + " |", "|---|" + "--:|" * (len(titles) - 1)]
    for row in rows:
        cells = [row.name, _microseconds(row.seconds("halfbyte"))]
        cells += [_microseconds(row.seconds(peer)) for peer in peers]
        ratios = [row.ratio(peer) for peer in peers]
        cells += ["" if ratio is None else f"{ratio:.2f}x" for ratio in ratios]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def _microseconds(seconds: float | None) -> str:
    return "" if seconds is None else f"{seconds * 1e6:,.0f}"
