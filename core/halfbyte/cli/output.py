"""Files that a command writes at its end."""

from __future__ import annotations

from pathlib import Path


def require_writable(*paths: str | None) -> None:
    """Raise OSError for a file that cannot be written: before the work, not after it."""
    for path in map(Path, filter(None, paths)):
        there = path.exists()
        path.open("a").close()
        if not there:
            path.unlink()
