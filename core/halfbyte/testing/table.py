"""The table at the end: op x dtype x block size, and how many checks passed."""

from __future__ import annotations

from collections import Counter
from typing import NamedTuple

from .cases import Target


class Row(NamedTuple):
    """Where one check counts; blocksize is "" for ops without blocks."""

    op: str
    dtype: str
    blocksize: str
    variant: str


class Table:
    """Outcomes by op, dtype and block size; all variants together."""

    def __init__(self, target: Target) -> None:
        self._target = target
        self._passed: Counter[tuple[str, str, str]] = Counter()
        self._failed: Counter[tuple[str, str, str]] = Counter()
        self._variants: dict[str, Counter[str]] = {}

    def add(self, row: Row, outcome: str) -> None:
        if outcome == "skipped":
            return
        counter = self._passed if outcome == "passed" else self._failed
        counter[row.op, row.dtype, row.blocksize] += 1
        self._variants.setdefault(row.variant, Counter())[outcome] += 1

    def lines(self) -> list[str]:
        """What `pytest` prints: "12" checks passed, "3 of 12 FAILED", "-" not declared."""
        keys = {**self._passed, **self._failed}
        if not keys:
            return []
        sizes = sorted({size for _, _, size in keys if size}, key=int)
        columns = [*sizes, ""] if any(not size for _, _, size in keys) else sizes
        header = ["op", "dtype", *(size or "no blocks" for size in columns)]
        rows = [header]
        for op, dtype in dict.fromkeys((op, dtype) for op, dtype, _ in keys):
            rows.append([op, dtype or "-", *(self._cell((op, dtype, size)) for size in columns)])
        widths = [max(len(row[i]) for row in rows) for i in range(len(header))]
        lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip() for row in rows]
        lines.insert(0, f"backend {self._target.backend.name} on {self._target.facts}: checks passed, by block size")
        for variant, outcomes in self._variants.items():
            if variant:
                lines.append(f"variant {variant}: {outcomes['passed']} passed, {outcomes['failed']} failed")
        return lines

    def _cell(self, key: tuple[str, str, str]) -> str:
        passed, failed = self._passed[key], self._failed[key]
        if failed:
            return f"{failed} of {passed + failed} FAILED"
        return str(passed) if passed else "-"
