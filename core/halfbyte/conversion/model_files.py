"""A model's folder: which files travel with its weights, and how a new one comes to be whole or not at all.

Settings and tokenizers travel; nothing that can run.
"""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
from collections.abc import Iterator, Set
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ..errors import FormatError, HalfbyteError, StorageError
from .sizes import human

_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_FORBIDDEN = (errno.EROFS, errno.EACCES, errno.EPERM)

_COMPANION = re.compile(
    r".*\.json|.*\.model|.*\.tiktoken|.*\.jinja"
    r"|vocab.*\.txt|merges\.txt|added_tokens.*\.txt|special_tokens.*\.txt|spiece\..*vocab|tekken.*\.txt"
)
_BELOW = re.compile(r".*\.json|.*\.jinja")  # in subfolders: 1_Pooling/config.json, additional_chat_templates/x.jinja
_INDEX = re.compile(r".*\.index\.json")  # names files of weights that are not there any more


def copy_companions(source: Path, target: Path, *, written: Set[str]) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Copy the companions of a model.

    written    names that the target has already, from elsewhere
    returns    names copied, names left out; sorted, with "/" between the parts
    """
    copied, left_out = [], []
    for path in _files(source):
        name = path.relative_to(source).as_posix()
        if name in written:
            continue
        if not path.is_file() or not _travels(name):
            left_out.append(name)
            continue
        (target / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, target / name)
        copied.append(name)
    return tuple(copied), tuple(left_out)


def _travels(name: str) -> bool:
    folder, _, file = name.rpartition("/")
    hidden = any(part.startswith(".") for part in name.split("/"))
    pattern = _BELOW if folder else _COMPANION
    return bool(pattern.fullmatch(file)) and not _INDEX.fullmatch(file) and not hidden


def _files(folder: Path) -> Iterator[Path]:
    """All files below a folder, sorted; linked and hidden folders stand for themselves and are not entered."""
    for entry in sorted(os.scandir(folder), key=lambda entry: entry.name):
        if entry.is_dir(follow_symlinks=False) and not entry.name.startswith("."):
            yield from _files(Path(entry.path))
        else:
            yield Path(entry.path)


# -- the new folder ------------------------------------------------------------------------------------------


@contextmanager
def storing(target: Path, source: Path, needed: int) -> Iterator[None]:
    """Turn what the system says against writing into a sentence.

    source   where reading fails: such errors name their file and are let through
    needed   bytes that the whole conversion writes

    Raises StorageError.
    """
    try:
        yield
    except (HalfbyteError, UnicodeError):
        raise
    except OSError as error:
        if error.filename is not None and source in Path(os.fsdecode(error.filename)).parents:
            raise
        reason = (error.strerror or str(error)).lower()
        if error.errno in _FULL:
            reason += f": {_room(target, needed)}"
        elif error.errno in _FORBIDDEN:
            reason += f" ({error.filename or target.parent}): name an output in a folder that can be written to"
        elif error.filename:
            reason += f" ({error.filename})"
        raise StorageError(f"{target} cannot be written: {reason}") from error


def require_space(target: Path, needed: int) -> None:
    """Raises StorageError where a folder's disk has less room than that."""
    if shutil.disk_usage(target.parent).free < needed:
        raise StorageError(f"{target} cannot be written: {_room(target, needed)}")


def _room(target: Path, needed: int) -> str:
    free = shutil.disk_usage(target.parent).free
    return f"the conversion needs {human(needed)} in {target.parent}, {human(free)} are free"


def write_json(path: Path, value: dict[str, Any]) -> None:
    try:
        text = json.dumps(value, indent=2)
    except RecursionError as error:
        raise FormatError(f"{path.name} is nested too deeply to be written") from error
    path.write_text(text + "\n", encoding="utf-8")


def sync_folder(folder: Path) -> None:
    """Bring a folder with all below it to the disk."""
    for root, _, files in os.walk(folder):
        for file in files:
            with open(os.path.join(root, file), "rb+") as handle:
                os.fsync(handle.fileno())
        sync_entry(Path(root))


def sync_entry(folder: Path) -> None:
    if os.name != "posix":  # elsewhere a folder cannot be opened
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
