"""The folder in which a conversion grows, and what is left of it for a rerun.

    OUT_DIR's parent/.OUT_DIR.halfbyte-partial/
        lock            held by the process at work; the system frees it when that process ends, however it ends
        manifest.json   what is converted and how, and which shards are finished
        files/          becomes OUT_DIR
        spool/          of no use to a rerun

Finished shards survive kill -9, a power loss and Ctrl-C.  After an error nothing is left.
"""

from __future__ import annotations

import errno
import json
import os
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

from ..errors import FormatError, HalfbyteError, InputError
from .checkpoint import read_object
from .entries import ConvertedLayer
from .model_files import sync_entry
from .shard import Shard

_LOCK, _MANIFEST, _FILES, _SPOOL = "lock", "manifest.json", "files", "spool"


class Partial:
    """A partial folder that this process has locked.

    files     finished files
    spool     for what is under way
    finished  shards that an earlier run left, by file name
    note      a sentence about what an earlier run left; "" where there is nothing to say
    """

    def __init__(self, folder: Path, identity: dict[str, Any]) -> None:
        self.folder = folder
        self.files, self.spool = folder / _FILES, folder / _SPOOL
        self._identity = identity
        self.finished, self.note = _left(folder, identity)
        if not self.finished:
            shutil.rmtree(self.files, ignore_errors=True)
        shutil.rmtree(self.spool, ignore_errors=True)
        self.files.mkdir(exist_ok=True)
        self.spool.mkdir()
        for path in list(self.files.iterdir()):
            if path.name not in self.finished:
                shutil.rmtree(path) if path.is_dir() else path.unlink()
        self._write_manifest()

    def finish(self, shard: Shard, path: Path) -> None:
        """Take a shard from where it was written; from here on a rerun need not do it again."""
        path.rename(self.files / shard.file)
        sync_entry(self.files)
        self.finished[shard.file] = shard
        self._write_manifest()

    def _write_manifest(self) -> None:
        shards = [asdict(shard) for shard in self.finished.values()]
        new = self.spool / _MANIFEST
        with new.open("w", encoding="utf-8") as file:
            json.dump({**self._identity, "finished": shards}, file, indent=1)
            file.flush()
            os.fsync(file.fileno())
        new.rename(self.folder / _MANIFEST)
        sync_entry(self.folder)


def partial_name(target: Path) -> Path:
    return target.parent / f".{target.name}.halfbyte-partial"


@contextmanager
def partial_folder(target: Path, identity: dict[str, Any]) -> Iterator[Partial]:
    """Lock and prepare the partial folder of a target; remove it after success and after an error.

    identity   what the conversion depends on, for the manifest: finished shards of another are not used

    After an interruption by the user (KeyboardInterrupt) finished shards stay, and the exception says so.
    Raises InputError where another process is at work, or something else has the name.
    """
    folder = partial_name(target)
    if folder.is_symlink() or (folder.exists() and not _is_ours(folder)):
        raise InputError(f"{folder} is in the way and is not what a conversion leaves behind; move it away")
    with _locked(folder, target):
        try:
            partial = Partial(folder, identity)
            yield partial
        except KeyboardInterrupt as stop:
            kept = len(partial.finished) if "partial" in locals() else 0
            if not kept:
                _remove(folder)
                raise
            shutil.rmtree(partial.spool, ignore_errors=True)
            raise KeyboardInterrupt(
                f"interrupted; {kept} finished {'shard stays' if kept == 1 else 'shards stay'} in {folder}, and the "
                "same command goes on from there (remove the folder to give up)"
            ) from stop
        except BaseException:
            _remove(folder)
            raise
        _remove(folder)


def _remove(folder: Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)


def _is_ours(folder: Path) -> bool:
    return folder.is_dir() and {entry.name for entry in os.scandir(folder)} <= {_LOCK, _MANIFEST, _FILES, _SPOOL}


def _left(folder: Path, identity: dict[str, Any]) -> tuple[dict[str, Shard], str]:
    """The finished shards of an earlier run that did the same, and a sentence about them."""
    if not (folder / _MANIFEST).is_file():
        return {}, ""
    try:
        manifest = read_object(folder / _MANIFEST)
        shards = [_shard(entry) for entry in manifest.pop("finished")]
    except (HalfbyteError, KeyError, TypeError, AttributeError):
        return {}, "what an earlier run left cannot be read, so the conversion starts afresh"
    if not shards:
        return {}, ""
    if differs := [key for key in {**manifest, **identity} if manifest.get(key) != identity.get(key)]:
        return {}, f"an earlier run left shards, but its {differs[0]} differ, so the conversion starts afresh"
    whole = {shard.file: shard for shard in shards if _size(folder / _FILES / shard.file) == shard.size}
    return whole, f"{len(whole)} finished {'shard' if len(whole) == 1 else 'shards'} of an earlier run used"


def _shard(entry: dict[str, Any]) -> Shard:
    if os.path.basename(entry["file"]) != entry["file"]:
        raise FormatError("a shard has a plain name")
    return Shard(entry["file"], entry["size"], entry["nbytes"], tuple(map(_layer, entry["layers"])))


def _layer(entry: dict[str, Any]) -> ConvertedLayer:
    return ConvertedLayer(**{**entry, "shape": tuple(entry["shape"])})


def _size(path: Path) -> int:
    return path.stat().st_size if path.is_file() and not path.is_symlink() else -1


# -- the lock ------------------------------------------------------------------------------------------------


@contextmanager
def _locked(folder: Path, target: Path) -> Iterator[None]:
    """Hold the folder's lock, and the folder itself: both are made where they are missing."""
    while True:
        folder.mkdir(exist_ok=True)
        try:
            handle = os.open(folder / _LOCK, os.O_RDWR | os.O_CREAT, 0o666)
        except FileNotFoundError:  # its owner removed the folder at this moment
            continue
        try:
            if not _try_lock(handle):
                raise InputError(f"another process is writing {target} (it holds {folder / _LOCK})")
            if _is_at(handle, folder / _LOCK):
                yield
                return
        finally:
            os.close(handle)


def _is_at(handle: int, path: Path) -> bool:
    """Whether an open file is still the one at a path: its last owner may have removed it before we locked it."""
    try:
        return os.path.samestat(os.fstat(handle), path.stat())
    except FileNotFoundError:
        return False


def _try_lock(handle: int) -> bool:
    try:
        if sys.platform == "win32":
            import msvcrt

            msvcrt.locking(handle, msvcrt.LK_NBLCK, 1)
        else:
            import fcntl

            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        return False
    except OSError as error:  # a network folder without locks: better unlocked than not at all
        return error.errno in (errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP)
    return True
