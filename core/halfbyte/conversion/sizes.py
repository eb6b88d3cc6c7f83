"""Bytes as people read them."""

from __future__ import annotations


def human(nbytes: float) -> str:
    """ "1.5 MB", in powers of ten."""
    for unit in ("B", "kB", "MB"):
        if nbytes < 1000:
            return f"{nbytes:.0f} {unit}" if unit == "B" else f"{nbytes:.1f} {unit}"
        nbytes /= 1000
    return f"{nbytes:.2f} GB"
