"""What importlib.metadata tells of bitsandbytes while halfbyte is in its place."""

from __future__ import annotations

import os
from importlib.metadata import Distribution
from pathlib import Path

from . import VERSION

FILES = {
    "METADATA": f"Metadata-Version: 2.1\nName: bitsandbytes\nVersion: {VERSION}\n"
    "Summary: Served by halfbyte, in the place of bitsandbytes\n",
    "top_level.txt": "bitsandbytes\n",
}


class Served(Distribution):
    """A distribution without files: no installer placed it, and none can remove it."""

    def read_text(self, filename: str | os.PathLike[str]) -> str | None:
        return FILES.get(str(filename))

    def locate_file(self, path: str | os.PathLike[str]) -> Path:
        return Path(__file__).resolve().parent.parent / path
