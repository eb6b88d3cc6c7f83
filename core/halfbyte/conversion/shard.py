"""Converting one shard: each layer read, quantized and put down before the next."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from . import jobs
from .checkpoint import Stored
from .entries import ConvertedLayer, quantize_stored
from .plan import Plan
from .shard_reader import ShardReader
from .shard_writer import ShardWriter


@dataclass(frozen=True)
class Shard:
    """A finished shard.

    size     bytes of the file
    nbytes   bytes of its tensors
    layers   that were quantized, in the order of the source
    """

    file: str
    size: int
    nbytes: int
    layers: tuple[ConvertedLayer, ...]


class Steps:
    """Counts layers for a progress callback, from any thread."""

    def __init__(self, callback: Callable[[int, int, str], None] | None, total: int) -> None:
        self._callback, self._total, self._done = callback, total, 0
        self._lock = threading.Lock()

    def skip(self, count: int) -> None:
        self._done += count

    def begin(self, name: str) -> None:
        self._tell(0, name)

    def end(self, name: str) -> None:
        self._tell(1, name)

    def _tell(self, count: int, name: str) -> None:
        with self._lock:
            self._done += count
            if self._callback is not None:
                self._callback(self._done, self._total, name)


def convert_shard(plan: Plan, file: str, spool: Path, destination: Path, count: int, steps: Steps) -> Shard:
    """Write the quantized form of one shard.

    spool        a file for the results on the way; gone afterwards
    destination  the file to write
    count        threads, each with one layer in memory at a time
    """
    path, stored = plan.checkpoint.folder / file, plan.checkpoint.shards[file]
    chosen = [name for name in stored if name in plan.selection.layers]
    reports: dict[str, ConvertedLayer] = {}
    with ShardWriter(spool) as writer:

        def worker() -> Callable[[str], None]:
            reader = ShardReader(path)

            def work(name: str) -> None:
                steps.begin(name)
                tensor = reader.read(name, stored[name].nbytes)
                entries, reports[name] = quantize_stored(plan.selection.layers[name], tensor, plan.options)
                for entry, value in entries.items():
                    writer.add(entry, value)
                steps.end(name)

            return work

        jobs.each(chosen, worker, count)
        _keep(writer, ShardReader(path), {name: one for name, one in stored.items() if name not in reports})
        writer.write(destination)
        return Shard(file, destination.stat().st_size, writer.nbytes, tuple(reports[name] for name in chosen))


def _keep(writer: ShardWriter, reader: ShardReader, stored: dict[str, Stored]) -> None:
    """Tensors that stay as they are: from file to file when their turn comes."""

    def reading(name: str, nbytes: int) -> Callable[[], torch.Tensor]:
        return lambda: reader.read(name, nbytes)

    for name, one in stored.items():
        writer.add_later(name, one, reading(name, one.nbytes))
